"""Settings: every shipped file parses, mistakes are refused with a message, nothing heavy is imported to say so."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from onpolicy.train import main, parse

ROOT = Path(__file__).parents[1]
YAMLS = sorted((ROOT / "configs").glob("*.yaml"))
CONFIGS = [path for path in YAMLS if not path.name.startswith("serve_")]  # those are a server's


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_parses_and_says_nothing_in_vain(path) -> None:
    config, resume = parse(["--config", str(path)])
    assert config.name == path.stem and not resume
    defaults, _ = parse([])
    for key, value in yaml.safe_load(path.read_text()).items():
        current = getattr(config, key)
        if not isinstance(value, dict):
            assert current == value
        for name in value if isinstance(value, dict) else ():
            assert hasattr(getattr(defaults, key), name)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--optim.learning_rat=1", "learning_rat"),
        ("--steps=many", "steps"),
        ("--student.layers=1.5", "layers"),
        ("--algorithm=ppo", "ppo"),
        ("--prompts.template=jinja", "template"),
        ("--config=no/such/file.yaml", "no/such/file.yaml"),
    ],
)
def test_a_wrong_option_exits_2_and_names_it(option, message, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([option])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_key_in_a_file_is_an_error(tmp_path, capsys) -> None:
    (tmp_path / "c.yaml").write_text("optim:\n  lr: 1.0\n")
    with pytest.raises(SystemExit) as exit_:
        main(["--config", str(tmp_path / "c.yaml")])
    assert exit_.value.code == 2 and "lr" in capsys.readouterr().err


def test_print_config_can_be_used_as_a_config(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        parse(["--config", str(ROOT / "configs" / "quickstart.yaml"), "--steps=7", "--print_config"])
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    config, _ = parse(["--config", str(tmp_path / "c.yaml")])
    assert config.steps == 7 and config.student.freeze_embeddings


def best_of(command: list[str], runs: int = 3) -> float:
    """Seconds of the fastest of some runs: the machine may be busy with other things."""
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True, env=os.environ)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def test_import_and_help_are_quick() -> None:
    assert best_of(["-c", "import onpolicy"]) - best_of(["-c", "pass"]) < 0.3
    assert best_of(["-m", "onpolicy.train", "--help"]) < 2.0


def test_help_explains_every_option() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "onpolicy.train", "--help"], check=True, capture_output=True, text=True
    ).stdout
    for words in ("Peak learning rate of the on-policy phase", "Passes over the teacher's samples", "--resume"):
        assert words in " ".join(text.split())


def test_nothing_heavy_is_imported_before_the_options_are_checked() -> None:
    code = (
        "import sys; import onpolicy.train as t; t.parse([]); "
        "print([m for m in ('torch', 'vllm', 'trl') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"
