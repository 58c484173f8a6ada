"""Every random stream of a run, derived from one seed by name, so that no two purposes share one."""

from __future__ import annotations

import hashlib


def derive(seed: int, *parts: str | int) -> int:
    """A 63-bit seed that depends on ``seed`` and on every part, and on nothing else.

    Stable across processes and Python versions (unlike ``hash``), so a resumed run draws what the
    uninterrupted one would have drawn: ``derive(run_seed, "rollout", step, prompt_id, sample_index)``.
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
