"""From the command line to a backend: names, config files, refusals, and what vLLM's server is started with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spec.serve import backend, choice
from spec.serve.backend import vllm_command
from spec.serve.choice import Trial, cache_file, cause, choose, verdict
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
    assert options.target and backend.vllm_speculation(options)


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
        ("target: a/b\nmax_model_len: 0", "--max-model-len must be at least 1"),
    ),
)
def test_config_mistakes_end_with_status_2(text: str, message: str, tmp_path, capsys) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        parse(["--config", str(config)])
    assert message in capsys.readouterr().err


@pytest.fixture
def machine(monkeypatch):
    """``machine(gpu=..., vllm=..., plugin=...)``: what is there, whatever is here."""

    def make(gpu: bool = False, vllm: str | None = "cpu", plugin: bool = True) -> None:
        class Point:
            value = "spec.vllm_plugin:register"

        monkeypatch.setattr(backend, "gpu", lambda options: gpu)
        monkeypatch.setattr(backend, "vllm_build", lambda: vllm)
        monkeypatch.setattr(backend.metadata, "entry_points", lambda group: [Point] * plugin)

    return make


LACKS = (
    ((), {"vllm": None}, "not installed"),
    ((), {"plugin": False}, "does not see the plugin"),
    (("--mode", "token", "--max-waiting", "3"), {}, "only the torch backend has --max-waiting, --mode"),
    (("--draft", "suffix"), {}, "no drafter 'suffix'"),
    (("--draft", "ngram+a/b"), {}, "no drafter 'ngram+a/b'"),
    (("--device", "cpu"), {"gpu": True, "vllm": "cuda"}, "--device cpu: the vLLM that is installed runs on cuda"),
    (("--device", "cuda"), {}, "--device cuda: the vLLM that is installed runs on cpu"),
    ((), {"vllm": "cuda"}, "needs a GPU"),
)


@pytest.mark.parametrize(("arguments", "here", "reason"), LACKS)
def test_what_vllm_cannot_do_is_refused_where_asked_for_and_torchs_under_auto(
    arguments, here, reason, machine, monkeypatch
) -> None:
    """One predicate for both; nothing is tried."""
    machine(**here)
    monkeypatch.setattr(choice, "_run", None)
    backend_, why = choose(parse(["--target", "a/b", *arguments]))
    assert backend_ == "torch" and reason in why
    with pytest.raises(ValueError, match=f"--backend vllm: .*{re.escape(reason)}.*--backend torch"):
        choose(parse(["--target", "a/b", "--backend", "vllm", *arguments]))


def test_what_is_asked_for_is_taken_untried(machine, monkeypatch) -> None:
    machine()
    monkeypatch.setattr(choice, "_run", None)
    for name in ("torch", "vllm"):
        assert choose(parse(["--target", "a/b", "--backend", name])) == (name, "asked for")


def test_auto_takes_the_fastest_and_remembers(machine, monkeypatch, tmp_path, capsys) -> None:
    """Tried once for the same options, models and versions; again where one of them changed, or on demand."""
    monkeypatch.setenv("ONPOLICY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_text("1")
    machine()
    tried = []

    def run(name, options):
        tried.append(name)
        return Trial(tokens_per_second={"torch": 90.0, "vllm": 60.0}[name])

    monkeypatch.setattr(choice, "_run", run)
    arguments = ["--target", str(tmp_path / "model"), "--draft", "ngram"]
    name, why = choose(parse(arguments))
    assert name == "torch" and "90 tokens/s, 1.50 times vllm's 60" in why and tried == ["torch", "vllm"]
    assert "trying vllm" in capsys.readouterr().err
    name, why = choose(parse([*arguments, "--port", "81", "--api-key", "x"]))
    assert name == "torch" and "--retry-backends" in why and len(tried) == 2
    assert "x" not in cache_file(parse(arguments)).read_text()
    choose(parse([*arguments, "--retry-backends"]))
    assert len(tried) == 4
    choose(parse([*arguments, "--dtype", "float32"]))
    assert len(tried) == 6
    os.utime(tmp_path / "model/weights", (1, 1))
    choose(parse(arguments))
    assert len(tried) == 8
    cache_file(parse(arguments)).write_text("{")  # a broken file is none
    choose(parse(arguments))
    assert len(tried) == 10


def test_a_backend_that_fails_is_not_taken_however_fast_the_other_is_not() -> None:
    name, why = verdict({"torch": Trial(1.0), "vllm": Trial(failure="sampling is not exact")}, "now")
    assert name == "torch" and "vllm failed: sampling is not exact" in why
    assert verdict({"torch": Trial(1.0), "vllm": Trial(2.0)}, "now")[0] == "vllm"
    with pytest.raises(ValueError, match="torch failed: a; vllm failed: b"):
        verdict({"torch": Trial(failure="a"), "vllm": Trial(failure="b")}, "now")


def test_a_failed_trial_says_its_innermost_reason() -> None:
    text = (
        "INFO 11-26 [core.py:1] hello\n(EngineCore pid=3) ERROR 11-26 11:02:03 [core.py:99] ValueError: no such head\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\nerror: vllm ended with status 1\n"
    )
    assert cause(text) == "ValueError: no such head"
    assert cause("warning\nerror: start-up self-test: wrong\n") == "start-up self-test: wrong"


def test_a_trial_that_cannot_load_fails_with_the_reason(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ONPOLICY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text("{}")
    trial = choice._run("torch", parse(["--target", str(tmp_path)]))
    assert trial.tokens_per_second is None and trial.failure


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
    assert arguments["--load-format"] == "safetensors"


def test_vllm_on_a_cpu_takes_a_bounded_cache(monkeypatch) -> None:
    """By itself it wants 92 % of the memory, and does not start where something else has a tenth of it."""
    for build, space, bounded in (("cpu", None, True), ("cpu", "2", False), ("gpu", None, False)):
        monkeypatch.setattr(backend, "vllm_build", lambda build=build: build)
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", space) if space else monkeypatch.delenv(
            "VLLM_CPU_KVCACHE_SPACE", raising=False
        )
        argv = vllm_command(parse(["--target", "a/b"])).argv
        assert ("--kv-cache-memory-bytes" in argv) == bounded


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


@pytest.mark.parametrize(("asked_for", "status"), (("auto", 0), ("vllm", 7)))
def test_auto_falls_back_where_vllm_dies_before_it_is_ready(asked_for, status, tmp_path, monkeypatch, capsys) -> None:
    """With ``--backend vllm`` its end is the server's."""
    from spec.serve import __main__ as program

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(program, "choose", lambda options: ("vllm", "fast"))
    monkeypatch.setattr(program, "supervise", lambda *_: program.Outcome(7, ready=False))
    monkeypatch.setattr(program, "serve", lambda options, listener: 0)
    assert program.main(["--target", str(tmp_path), "--port", "0", "--backend", asked_for]) == status
    said = "backend: torch (vLLM's server ended with status 7 before it was ready)" in capsys.readouterr().err
    assert said == (asked_for == "auto")
