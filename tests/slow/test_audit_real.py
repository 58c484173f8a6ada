"""Audits of engines as they are installed: transformers' assisted generation, and vLLM with and without repair."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))
from rollout_models import VOCAB, tiny_llama  # noqa: E402

from spec.audit.conditionals import Conditionals, ModelConditionals  # noqa: E402
from spec.audit.sample import EngineUnderAudit  # noqa: E402
from spec.audit.scoring import Scorer  # noqa: E402
from spec.audit.statistical import Settings, audit, panel_for  # noqa: E402
from spec.audit.verdict import Verdict  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
PROMPTS = [[5, 17, 200, 3, 44, 120, 9], [1, 2, 3], list(range(40, 60)), [300, 301, 300, 301, 300, 301, 300]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target, and a draft near it."""
    import torch
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("models")
    target = tiny_llama(root / "target", seed=1, sharpness=3.0)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn(parameter.shape, generator=draw))
    model.to(torch.bfloat16).save_pretrained(root / "draft")
    return target, root / "draft"


def conditionals(path: Path) -> Conditionals:
    from spec.models.transformers_model import TransformersModel

    return ModelConditionals(TransformersModel.load(path))


def audited(engine: EngineUnderAudit, models: tuple[Path, Path], epsilon: float, tokens: int) -> Verdict:
    settings = Settings(tokens=tokens, epsilon=epsilon, max_tokens=16, tolerance=1e-3)
    panel = panel_for(engine, vocabulary=VOCAB)
    verdict = audit(engine, Scorer(*(conditionals(m) for m in models)), PROMPTS, settings, panel)
    print(engine.name, verdict.sentence(), json.dumps(verdict.tests["standard"]))
    return verdict


@pytest.mark.parametrize("draft", ["draft", "ngram", None])
def test_vllm_repaired_is_bounded(draft: str | None, models: tuple[Path, Path]) -> None:
    pytest.importorskip("vllm")
    from spec.audit.engines.vllm import VllmEngine

    path = str(models[1]) if draft == "draft" else draft
    with VllmEngine(
        str(models[0]), path, dtype="float32", max_model_len=128, block_size=32, kv_cache_gib=0.25
    ) as engine:  # fmt: skip
        assert audited(engine, models, 0.03, 20_000).verdict == "equivalent"


def test_vllm_unrepaired_is_found_and_its_temperature_named(models: tuple[Path, Path]) -> None:
    vllm = pytest.importorskip("vllm")
    if not vllm.__version__.startswith("0.32.0"):
        pytest.skip("the fault is 0.32.0's")
    from spec.audit.engines.vllm import VllmEngine

    with VllmEngine(
        str(models[0]), str(models[1]), repaired=False, dtype="float32", max_model_len=128, block_size=32,
        kv_cache_gib=0.25,
    ) as engine:  # fmt: skip
        verdict = audited(engine, models, 0.03, 5000)
    assert verdict.verdict == "different" and verdict.tests["decided_at"] <= 1000
    assert verdict.fault is not None and "temperature" in verdict.fault.name, verdict.fault


def test_vllm_kernels_white_box() -> None:
    """Repaired they are exact to single precision; as installed (0.32.0 on a CPU) they are not."""
    vllm = pytest.importorskip("vllm")
    from spec.audit.cli import main

    assert main(["--mode", "exact", "--engine", "vllm"]) == 0
    if vllm.__version__.startswith("0.32.0"):
        assert main(["--mode", "exact", "--engine", "vllm", "--without-repair"]) == 3


@pytest.mark.parametrize("how", ["plain", "assisted", "lookup"])
def test_transformers_generate(how: str, models: tuple[Path, Path]) -> None:
    from spec.audit.engines.hf import TransformersEngine
    from spec.models.transformers_model import TransformersModel

    target, draft = (TransformersModel.load(m).model for m in models)
    engine = TransformersEngine(target, draft if how == "assisted" else None, 3 if how == "lookup" else 0)
    assert audited(engine, models, 0.06, 6000).verdict in ("equivalent", "undecided")


def test_our_own_server_by_its_url(tmp_path: Path, tokenizer: object) -> None:
    """A real process, asked as any client asks: whole token ids, log-probs that are the target's, both seed paths."""
    from conftest import make_model
    from serve_process import ServerProcess

    from spec.audit.cli import main

    target, out = make_model(tmp_path / "target", tokenizer), tmp_path / "verdict.json"
    server = ServerProcess(
        "--target", target, "--draft", "ngram", "--backend", "torch", "--dtype", "float32", "--device", "cpu",
        "--audit-at-start", "0",
    )  # fmt: skip
    try:
        status = main(
            ["--engine", server.url, "--target", str(target), "--dtype", "float32", "--epsilon", "0.2",
             "--max-tokens-audited", "3000", "--max-tokens", "12", "--json", str(out)]
        )  # fmt: skip
    finally:
        server.stop()
    found = json.loads(out.read_text())
    assert status == 0 and found["tests"]["left_out"] == 0 and found["tests"]["logprob_gap"] < 1e-3
