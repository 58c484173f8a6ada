"""Temperature 0: every token must be the target's argmax given the text before it, up to ties that rounding decides.

No probability is involved. A tie is certified by arithmetic: if the engine's logits are within d of ours, whatever it
takes for the largest is within 2 d of our largest. d is measured (:mod:`spec.audit.floor`), the target against itself,
and is never below the rounding of the logits themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from spec.audit.conditionals import Conditionals
from spec.audit.sample import EngineUnderAudit, Sample
from spec.audit.verdict import Fault, Verdict
from spec.params import Params, row_options
from spec.request import Request
from spec.sampling import adjusted_logits

PANEL = (Params(temperature=0.0), Params(temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.3))
_SHAPING = ("temperature", "top_k", "top_p", "min_p")


def audit_greedy(
    engine: EngineUnderAudit,
    target: Conditionals,
    prompts: Sequence[Sequence[int]],
    *,
    tie: float,
    tokens: int = 5000,
    max_tokens: int = 64,
) -> Verdict:
    """``different`` with the first token that is short of the argmax by more than ``tie`` nats of logit.

    ``equivalent`` says that no audited token is, nothing of others. ``tests``: how many were ties, the largest gap.
    """
    panel = panel_for(engine)
    found = ties = 0
    worst, where = 0.0, ""
    for prompt in prompts:
        samples = engine.generate([Request(tuple(prompt), params, max_tokens) for params in panel])
        for sample in samples:
            gaps = argmax_gaps(target, sample)
            found += len(gaps)
            ties += int((gaps > 0).sum())
            if len(gaps) and float(gaps.max()) > worst:
                worst, where = float(gaps.max()), f"token {int(gaps.argmax())} of a completion"
        if worst > tie or found >= tokens:
            break
    fault = Fault("not the target's argmax", {"short by": worst}, {"place": where}) if worst > tie else None
    return Verdict(
        verdict="different" if fault else "equivalent",
        engine=engine.name,
        mode="greedy",
        delta=0.0,
        tokens=found,
        fault=fault,
        tests={"ties": ties, "largest_gap": worst, "tie": tie, "decided_at": found},
    )


def panel_for(engine: EngineUnderAudit) -> list[Params]:
    """The settings that the engine does not refuse, each once."""
    panel = [replace(p, **{name: getattr(Params(), name) for name in engine.unsupported}) for p in PANEL]
    return list({repr(p): replace(p, temperature=0.0) for p in panel}.values())


def argmax_gaps(target: Conditionals, sample: Sample, most: int = 128) -> torch.Tensor:
    """[N] how far below the largest adjusted logit each token of a sample is; 0 for the argmax."""
    gaps, at = [torch.zeros(0)], 0
    for logits in target.rows([sample], most):
        tokens = sample.token_ids[at : at + len(logits)]
        outputs = [sample.token_ids[: at + i] for i in range(len(logits))]
        n = len(logits)
        options = row_options(
            [sample.params] * n, logits.shape[-1], [sample.prompt_ids] * n, outputs, logits.device
        )  # fmt: skip
        scores = adjusted_logits(logits, **{name: v for name, v in options.items() if name not in _SHAPING})
        chosen = scores.gather(-1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0]
        gaps.append((scores.amax(-1) - chosen).float().cpu())
        at += n
    return torch.cat(gaps)
