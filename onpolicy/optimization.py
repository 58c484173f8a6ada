"""Optimizer, schedule, and the one place where gradients become new weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from onpolicy.config import OptimConfig, Schedule

LOWER_THE_RATE = "Lower optim.learning_rate (or warm_start.learning_rate) and continue with --resume"


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite; the update was not applied."""


def schedule_scale(step: int, total: int, warmup: int, schedule: Schedule, final: float) -> float:
    """Share of the peak learning rate at update ``step`` of ``total``, counted from 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return 1 - (1 - final) * progress
    if schedule == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
    return 1.0


class Optimization:
    """AdamW over the trainable parameters."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], config: OptimConfig):
        self.parameters, self.config = list(parameters), config
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )

    def apply(self, learning_rate: float, where: str) -> float:
        """Clip the gradients, update, clear. Returns the norm before clipping.

        They are those of the whole update (:meth:`onpolicy.processes.Processes.sum_gradients`). Raises
        NonFiniteError, leaving the weights as they are, when a gradient is not finite.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm).item()
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(
                f"{where}: the gradient is {norm}; the update was not applied and the last checkpoint is intact. "
                f"{LOWER_THE_RATE}; if it happens at the first step, check the data, or start another --name with "
                "student.precision: float32"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # fresh pages cost more than zeros
        return norm
