"""One line for other projects' tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from spec.audit.conditionals import Conditionals, ModelConditionals
from spec.audit.sample import EngineUnderAudit
from spec.audit.scoring import Scorer
from spec.audit.statistical import Settings, audit
from spec.audit.verdict import Verdict
from spec.params import Params

if TYPE_CHECKING:
    from spec.models.base import LanguageModel


def assert_lossless(
    engine: EngineUnderAudit,
    target: Conditionals | LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    draft: Conditionals | LanguageModel | None = None,
    tokens: int = 20_000,
    epsilon: float = 0.05,
    delta: float = 1e-3,
    max_tokens: int = 32,
    tolerance: float = 0.0,
    panel: Sequence[Params] | None = None,
    seed: int = 0,
) -> Verdict:
    """AssertionError, with the fault's name, where ``engine`` is shown to differ from ``target``.

    Also where so many tokens do not bound the shift by ``epsilon``: a test that cannot tell does not pass.

    Args:
        engine: an adapter of :mod:`spec.audit.engines`, or any object with ``name``, ``unsupported`` and
            ``generate(requests) -> samples``.
        target, draft: a :class:`spec.models.base.LanguageModel` or an object with ``vocab_size`` and
            ``rows(samples, most)``. The draft sharpens the test where there is one.
        prompts: token ids. panel: the sampling parameters to cycle through, by default all kinds the engine supports.
        tolerance: mass per token outside the target's support that rounding may cause; 0 for exact arithmetic.
    """
    settings = Settings(
        delta=delta, epsilon=epsilon, tokens=tokens, max_tokens=max_tokens, tolerance=tolerance, seed=seed
    )
    scorer = Scorer(_conditionals(target), None if draft is None else _conditionals(draft), seed)
    verdict = audit(engine, scorer, prompts, settings, panel)
    assert verdict.verdict == "equivalent", verdict.sentence()
    return verdict


def _conditionals(model: Conditionals | LanguageModel) -> Conditionals:
    return cast("Conditionals", model) if hasattr(model, "rows") else ModelConditionals(model)
