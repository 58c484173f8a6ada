"""A run in several processes: each draws and learns from its share of a step, and all agree on what they do next.

Everything that decides whether a collective operation takes place (is there anything to learn from, is the run to
stop) is decided from figures that are equal in all processes: else some would wait for the others for ever.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Which of a numbered list of things are this process's: every ``of``-th, from ``index`` on."""

    index: int = 0
    of: int = 1

    def has(self, item: int) -> bool:
        return item % self.of == self.index


class Processes:
    """What the processes of a run say to each other. Every method is to be called by all of them."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.share = Share(accelerator.process_index, accelerator.num_processes)
        self.several = accelerator.num_processes > 1

    def sum(self, value: float) -> float:
        """Over all processes; as it is where there is one."""
        return sum(self.gather([value])) if self.several else value

    def any(self, flag: bool) -> bool:
        """Whether it is so in some process."""
        return any(self.gather([flag]))

    def gather(self, items: Sequence[T]) -> list[T]:
        """Everybody's items, in the order of the processes. They are pickled: tensors should lie on the CPU."""
        if not self.several:
            return list(items)
        lists: list[Any] = [None] * self.share.of
        torch.distributed.all_gather_object(lists, list(items))
        return [item for one in lists for item in one]

    @torch.no_grad()
    def start_alike(self, parameters: Sequence[torch.Tensor]) -> None:
        """Give all processes the first one's values: what is drawn at random (an adapter) differs between them."""
        if self.several:
            for parameter in parameters:
                torch.distributed.broadcast(parameter.data, src=0)

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Every gradient becomes its sum over all processes: losses carry the denominator of the whole update.

        Zeros where a process had nothing to learn from, so that all take part.
        """
        if self.several:
            for parameter in parameters:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(own)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def launched() -> int:
    """How many processes the launcher (torchrun, accelerate launch) started for this run; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and speaks, known before any of them have met."""
    return os.environ.get("RANK", "0") == "0"
