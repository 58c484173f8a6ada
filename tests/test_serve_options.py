"""From the command line to a backend: names, config files, refusals, and what vLLM's server is started with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from spec.serve.backend import choose, vllm_command
from spec.serve.options import parse

ROOT = Path(__file__).parents[1]


def test_help_is_quick() -> None:
    imports = (
        "import sys, spec.serve.__main__; assert not {'torch', 'transformers', 'fastapi', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", imports], check=True, cwd=ROOT)
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("serve_*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_parse(path: Path) -> None:
    options = parse(["--config", str(path)])
    assert options.target and choose(options)


def test_the_command_line_has_the_last_word_and_keys_come_from_the_environment(tmp_path, monkeypatch) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("target: a/b\ndraft-length: 3\nmax_running: 7\ncors_origin: [http://x]\nlog_text: true\n")
    monkeypatch.setenv("SPEC_API_KEY", "k")
    options = parse(["--config", str(config), "--max-running", "9"])
    assert (options.target, options.draft_length, options.max_running) == ("a/b", "3", 9)
    assert options.cors_origin == ["http://x"] and options.log_text and options.api_key == "k"
    assert parse(["--target", "a/b", "--api-key", "other"]).api_key == "other"
    assert options.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("target: a/b\ntaget: x", "unknown option 'taget'"),
        ("max_running: many", "max_running='many' is not valid"),
        ("backend: tpu", "backend='tpu' is not valid"),
        ("cors_origin: http://x", "is not valid"),
        ("api_key: s", "is a secret: put it into $SPEC_API_KEY"),
        ("[1, 2", "--config"),
        ("just text", "unknown option 'the file'"),
        ("draft: ngram", "--target is missing"),
        ("target: a/b\nmax_running: 0", "--max-running must be at least 1"),
    ),
)
def test_config_mistakes_end_with_status_2(text: str, message: str, tmp_path, capsys) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        parse(["--config", str(config)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "gpu", "installed", "expected"),
    (
        ((), False, True, ("torch", "no GPU")),
        ((), True, True, ("vllm", "a GPU")),
        ((), True, False, ("torch", "not installed")),
        (("--device", "cpu"), True, True, ("torch", "no GPU")),
        (("--mode", "token"), True, True, ("torch", "--mode")),
        (("--draft", "suffix"), True, True, ("torch", "no drafter 'suffix'")),
        (("--backend", "torch"), True, True, ("torch", "asked for")),
        (("--backend", "vllm"), False, True, ("vllm", "asked for")),
    ),
)
def test_auto_says_which_backend_and_why(arguments, gpu, installed, expected, monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(Path, "exists", lambda path: gpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    backend, why = choose(parse(["--target", "a/b", *arguments]))
    assert backend == expected[0] and expected[1] in why


def test_vllm_refuses_what_it_would_drop() -> None:
    options = parse(["--target", "a/b", "--backend", "vllm", "--mode", "token", "--max-waiting", "3"])
    with pytest.raises(ValueError, match="--max-waiting, --mode: only the torch backend"):
        choose(options)


def test_vllms_server_gets_a_speculative_configuration_and_no_secret_on_its_command_line(monkeypatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "")
    command = vllm_command(
        parse(["--target", "a/b", "--draft", "c/d", "--draft-length", "3", "--api-key", "s3cret", "--port", "81"])
    )
    arguments = dict(zip(command.argv[3::2], command.argv[4::2], strict=True))
    assert arguments["--model"] == arguments["--served-model-name"] == "a/b"
    assert (arguments["--host"], arguments["--port"], arguments["--allowed-origins"]) == ("127.0.0.1", "81", "[]")
    assert json.loads(arguments["--speculative-config"]) == {
        "method": "draft_model", "model": "c/d", "num_speculative_tokens": 3, "draft_sample_method": "probabilistic"
    }  # fmt: skip
    assert "s3cret" not in " ".join(command.argv) and command.environment["VLLM_API_KEY"] == "s3cret"
    assert "VLLM_PLUGINS" not in command.environment  # "" would leave the plugin out, and with it its repairs
    plain = vllm_command(parse(["--target", "a/b", "--draft", "c/d", "--draft-length", "0"]))
    assert "--speculative-config" not in plain.argv
    with pytest.raises(ValueError, match="no drafter 'suffix'"):
        vllm_command(parse(["--target", "a/b", "--draft", "suffix"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (("--target", "nowhere"), "unknown target 'nowhere'"),
        (("--target", "EMPTY"), "has no config.json"),
        (("--target", "a/b", "--draft-length", "some"), "give a number"),
        (("--target", "a/b", "--host", "192.0.2.1"), "cannot bind 192.0.2.1:8000"),
    ),
)
def test_mistakes_end_before_anything_is_loaded(arguments, message: str, tmp_path, capsys) -> None:
    from spec.serve.__main__ import main

    given = [str(tmp_path) if argument == "EMPTY" else argument for argument in arguments]
    assert main([*given, "--backend", "torch"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last
