"""Threads for the compiled kernels, which release the interpreter lock; numba's own layer would be a third pool."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch


def in_threads(count: int, work: Callable[[int, int], None]) -> None:
    """``work(first, last)`` on nearly equal parts of ``range(count)``, one for each of torch's threads."""
    threads = max(1, min(torch.get_num_threads(), count))
    bounds = [count * i // threads for i in range(threads + 1)]
    if threads == 1:
        work(0, count)
    else:
        list(_pool(threads).map(work, bounds[:-1], bounds[1:]))


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="onpolicy-losses")
