"""The order in which prompts are visited: reshuffled every epoch, resumable at any prompt."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from onpolicy.seeds import derive
from onpolicy.types import Prompt


class PromptOrder:
    """A cursor over ``prompts`` that never ends.

    The order of an epoch depends on ``seed`` and the epoch's number alone, so the state is two integers. Every
    prompt is visited once an epoch; a batch may span two epochs. Without ``shuffle`` the given order repeats.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True) -> None:
        if not prompts:
            raise ValueError("there are no prompts to order: check prompts.source and prompts.size")
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._fingerprint = _fingerprint(prompts, seed, shuffle)
        self._go_to(epoch=0, position=0)

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self._epoch

    def next_batch(self, size: int) -> list[Prompt]:
        """The next ``size`` prompts."""
        if size < 1:
            raise ValueError(f"a batch needs at least 1 prompt, got {size}")
        batch: list[Prompt] = []
        while len(batch) < size:
            if self._position == len(self._order):
                self._go_to(self._epoch + 1, 0)
            chosen = self._order[self._position : self._position + size - len(batch)]
            batch.extend(self._prompts[index] for index in chosen)
            self._position += len(chosen)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the cursor stands: ``epoch``, ``position`` (prompts of it visited), ``fingerprint`` of the order."""
        return {"epoch": self._epoch, "position": self._position, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises ValueError if it was taken over other prompts, or with another seed or ``shuffle``.
        """
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                "the saved prompt order belongs to other prompts or another seed: resume with the prompts section "
                "the run was started with (its config.yaml), or start a new run"
            )
        self._go_to(int(state["epoch"]), int(state["position"]))

    def _go_to(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._order = list(range(len(self._prompts)))
        if self._shuffle:
            random.Random(derive(self._seed, "order", epoch)).shuffle(self._order)


def _fingerprint(prompts: Sequence[Prompt], seed: int, shuffle: bool) -> str:
    content = hashlib.blake2b(f"{seed}:{shuffle}".encode(), digest_size=8)
    for prompt in prompts:
        content.update(prompt.id.encode())
        content.update(repr(prompt.token_ids).encode())
    return content.hexdigest()
