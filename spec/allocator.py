"""Memory that a program has freed once stays with it: the C allocator's habit of giving it back is dear here."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
_LARGEST = 2**31 - 1  # an int


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep freed blocks, for the whole process; False where there is none to tell.

    Every verification step frees and takes again a few [rows, V] tensors, megabytes of them. By default each round
    trip goes through the kernel, which hands out zeroed pages one fault at a time. For programs to call when they
    start; a preloaded allocator (tcmalloc) does not mind.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _LARGEST)) and bool(mallopt(_MMAP_THRESHOLD, _LARGEST))
