"""The command line end to end on tiny models: every mode and engine that needs no other package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model

from spec.audit import everything
from spec.audit.cli import main
from spec.audit.engines.vllm import VllmEngine


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> tuple[str, str]:
    """A target, and a draft."""
    folder = tmp_path_factory.mktemp("audited")
    return str(make_model(folder / "target", tokenizer)), str(make_model(folder / "draft", tokenizer, layers=2, seed=1))


def audited(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, the JSON and the HTML."""
    out, page = tmp_path / "verdict.json", tmp_path / "report.html"
    status = main([*arguments, "--json", str(out), "--html", str(page), "--device", "cpu"])
    return status, json.loads(out.read_text()), page.read_text()


SHORT = ["--dtype", "float32", "--epsilon", "0.3", "--max-tokens-audited", "700", "--max-tokens", "8"]


@pytest.mark.parametrize("engine", ["torch", "hf"])
def test_statistical(engine: str, models: tuple[str, str], tmp_path: Path) -> None:
    status, found, page = audited(tmp_path, "--engine", engine, "--target", models[0], "--draft", models[1], *SHORT)
    assert status == 0 and found["verdict"] == "equivalent" and found["epsilon"] <= 0.3
    assert found["tests"]["tolerance"] >= 0.002 and found["tests"]["left_out"] == 0
    assert {"shape mean TV", "kernels mean TV", "dtype mean TV"} <= found["floor"].keys()
    assert any(name.startswith("mass outside the support, ") for name in found["floor"])
    assert page.count("<svg") >= 2 and "floor, kernels mean TV" in page
    if engine == "torch":  # it reports log-probs, and they are its target's
        assert found["tests"]["logprob_gap"] < 1e-3


def test_one_setting_and_a_tolerance_of_the_users_own(
    models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found, _ = audited(
        tmp_path, "--engine", "torch", "--target", models[0], "--temperature", "0.6", "--draft", "ngram", *SHORT,
        "--tolerance", "0.01",
    )  # fmt: skip
    assert status == 0 and found["tests"]["tolerance"] == 0.01
    assert main(["--target", models[0], "--temperature", "0"]) == 2
    assert "--mode greedy" in capsys.readouterr().err


def test_greedy_in_bfloat16_by_other_kernels_is_no_fault(models: tuple[str, str], tmp_path: Path) -> None:
    status, found, _ = audited(
        tmp_path, "--mode", "greedy", "--engine", "hf", "--target", models[0], "--max-tokens-audited", "300"
    )
    assert status == 0 and found["verdict"] == "equivalent"
    assert found["tests"]["tie"] >= torch.finfo(torch.bfloat16).eps


def test_samples(models: tuple[str, str], tmp_path: Path) -> None:
    status, found, _ = audited(
        tmp_path,
        "--mode",
        "samples",
        "--against",
        "hf",
        "--target",
        models[0],
        "--delta",
        "0.001",
        "--dtype",
        "float32",
    )
    assert status == 4 and found["verdict"] == "undecided" and found["tests"]["p"] > 0.001


def test_vllm_that_is_missing_is_a_users_mistake(
    models: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--engine", "vllm", "--target", models[0]]) == 2
    assert "vLLM is not installed" in capsys.readouterr().err


def test_a_child_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    monkeypatch.setattr("spec.audit.engines.vllm._PATIENCE_S", 0.2)
    engine = VllmEngine("somewhere")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdin=subprocess.PIPE, text=True)
    engine._process = child
    engine.__exit__()
    assert child.returncode is not None and child.returncode < 0


def test_everything_that_is_audited() -> None:
    found = everything.commands("T", ["ngram", "D"], ["torch", "hf"])
    assert [c for c in found if "exact" in c] == [["--mode", "exact", "--engine", e] for e in ("torch", "hf")]
    of_torch = [c for c in found if "torch" in c and "--target" in c]
    assert len(of_torch) == 3 + 1 + 2  # plain and two drafts, greedy, two token-wise
    assert all(c[c.index("--target") + 1] == "T" for c in found if "exact" not in c)
    assert sum("greedy" in c and c[c.index("--draft") + 1] == "D" for c in found) == 2
