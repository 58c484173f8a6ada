"""Rollouts on disk: one JSON object a line, readable by eye and by ``datasets``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from onpolicy.checkpoint import atomic_file
from onpolicy.types import Prompt, Rollout


def save_rollouts(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Write atomically: a reader finds all of them or no file."""
    with atomic_file(path) as file:
        for rollout in rollouts:
            fields = {name: getattr(rollout, name) for name in rollout.__dataclass_fields__}
            fields["prompt"] = asdict(rollout.prompt)
            fields["completion_ids"] = rollout.completion_ids.tolist()
            fields["logprobs"] = rollout.logprobs.tolist()
            file.write(json.dumps(fields) + "\n")


def load_rollouts(path: Path) -> list[Rollout]:
    """What :func:`save_rollouts` wrote, bit for bit (float32 survives the decimal form)."""
    return [_from_json(json.loads(line)) for line in path.read_text().splitlines()]


def _from_json(fields: dict) -> Rollout:
    prompt = dict(fields.pop("prompt"))
    prompt["token_ids"] = tuple(prompt["token_ids"])
    if prompt["completion_ids"] is not None:
        prompt["completion_ids"] = tuple(prompt["completion_ids"])
    fields["completion_ids"] = np.array(fields["completion_ids"], np.int64)
    fields["logprobs"] = np.array(fields["logprobs"], np.float32)
    return Rollout(prompt=Prompt(**prompt), **fields)
