"""vLLM's rejection sampler, white box: ``python -m spec.audit.exact_vllm [--repair]`` prints one JSON object.

A process of its own, because vLLM changes the process it is imported in. The acceptance decision is probed through the
uniforms, the recovered token through the exponential race it is drawn by: argmax(residual * w) turns from token a to b
where w_b / w_a = residual_a / residual_b. Single precision inside vLLM: gaps below 1e-5 are rounding.

Shape legend: B probes as requests of one batch, K drafts, V vocabulary.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from spec.audit.exact import World, joint_gap
from spec.verify import length_law
from spec.vllm_engine import quiet, survive_numba

TEMPERATURE = 0.7  # not 1, so that the settings must reach the rows
ROUNDING = 1e-5
_TINY = -1e4  # logit of a token that cannot be said


def main() -> None:
    """Gap of the kernels as they are, or repaired."""
    import vllm

    _register_kernels()
    from vllm.v1.sample import rejection_sampler

    if "--repair" in sys.argv:
        from spec.vllm_plugin import repairs

        repairs.repair(rejection_sampler)
    gaps = []
    for seed in range(2):
        world = World(3, 2, seed=seed)
        gaps.append(joint_gap(lambda p, q, ids: step(rejection_sampler, p, q, ids), world))
    print(json.dumps({"version": vllm.__version__, "gap": max(gaps), "rounding": ROUNDING}))


def _register_kernels() -> None:
    """As a worker on a CPU without Triton does."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if not current_platform.is_cpu() or HAS_TRITON:
        return
    current_platform.import_kernels()
    import vllm.v1.sample.rejection_sampler  # noqa: F401  the launchers to register for

    survive_numba()
    with quiet():
        current_platform.register_triton_kernel_overrides()


def step(sampler: ModuleType, target: Tensor, draft: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """See :data:`spec.audit.exact.StepLaw`. The bonus is drawn outside the rejection sampler: taken as p."""
    size = len(ids)
    accept = torch.stack([_turning_points(sampler, target, draft, ids, i) for i in range(size)])
    last = torch.stack([*(_recovered(sampler, target, draft, ids, i) for i in range(size)), target[-1]])
    return length_law(accept, "token"), last


def _turning_points(sampler: ModuleType, target: Tensor, draft: Tensor, ids: Tensor, at: int) -> Tensor:
    """Acceptance probability at position ``at``, by a grid of uniforms in one batch, four digits at a time."""
    low, high = 0.0, 1.0
    for _ in range(6):
        grid = torch.linspace(low, high, 102, dtype=torch.float64)[1:-1]
        uniforms = torch.zeros(len(grid), len(ids), dtype=torch.float64)
        uniforms[:, at] = grid
        out = _run(sampler, target, draft, ids, uniforms, None)
        passed = grid[(out[:, : at + 1] == ids[: at + 1]).all(1) & (out[:, at + 1] >= 0)]
        above = grid[grid > (passed.max() if len(passed) else -1)]
        low, high = (float(passed.max()) if len(passed) else low), (float(above.min()) if len(above) else high)
    return torch.tensor((low + high) / 2 if high < 1 else 1.0, dtype=torch.float64)


def _recovered(sampler: ModuleType, target: Tensor, draft: Tensor, ids: Tensor, at: int) -> Tensor:
    """[V] the law of the recovered token at ``at``, from where the race turns."""
    vocabulary = target.shape[-1]
    even = _race(sampler, target, draft, ids, at, torch.ones(1, vocabulary))
    best = int(even[0])
    weights = torch.ones(vocabulary, dtype=torch.float64)
    for token in range(vocabulary):
        if token == best:
            continue
        low, high = 0.0, 30.0  # log of the handicap at which the token wins
        for _ in range(5):
            grid = torch.linspace(low, high, 102)[1:-1]
            race = torch.full((len(grid), vocabulary), 1e-30)
            race[:, best], race[:, token] = 1.0, grid.exp()
            wins = _race(sampler, target, draft, ids, at, race) == token
            if not bool(wins.any()):
                low = high
                break
            first = int(wins.int().argmax())
            low, high = float(grid[first - 1]) if first else low, float(grid[first])
        weights[token] = 0.0 if low >= 29.0 else torch.tensor(-(low + high) / 2, dtype=torch.float64).exp()
    return weights / weights.sum()


def _race(sampler: ModuleType, target: Tensor, draft: Tensor, ids: Tensor, at: int, weights: Tensor) -> Tensor:
    """[B] tokens recovered at ``at`` with the given race weights [B, V]."""
    uniforms = torch.zeros(len(weights), len(ids), dtype=torch.float64)
    uniforms[:, at] = 1e9  # never accepted
    return _run(sampler, target, draft, ids, uniforms, weights)[:, at]


def _run(sampler: Any, target: Tensor, draft: Tensor, ids: Tensor, uniforms: Tensor, weights: Tensor | None) -> Tensor:
    """[B, K+1] what vLLM commits for B copies of one request, -1 after the last."""
    count, size = uniforms.shape
    metadata = SimpleNamespace(
        temperature=torch.full((count,), TEMPERATURE),
        top_k=None, top_p=None, all_greedy=False, all_random=True, generators={},
    )  # fmt: skip
    sums = size * torch.arange(1, count + 1, dtype=torch.int32)
    rows = (target[:size].log() * TEMPERATURE).clamp(min=_TINY).float()
    logits = sampler.apply_sampling_constraints(rows.repeat(count, 1), sums, metadata)
    race = torch.ones(count, target.shape[-1]) if weights is None else weights
    draw = torch.Tensor.exponential_

    def exponential(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor.copy_(race.reciprocal()) if tensor.shape == race.shape else draw(tensor, *args, **kwargs)

    with (
        mock.patch.object(sampler, "generate_uniform_probs", lambda *_: uniforms.flatten()),
        mock.patch.object(torch.Tensor, "exponential_", exponential),
    ):
        output: Tensor = sampler.rejection_sample(
            ids.to(torch.int32).repeat(count), [size] * count, size, sums, draft.float().repeat(count, 1), logits,
            torch.zeros(count, 1, dtype=torch.int32), metadata,
        )  # fmt: skip
    return output.long()


if __name__ == "__main__":
    main()
