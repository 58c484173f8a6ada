"""How numba compiles kernels whose sums may be taken in any order."""

from __future__ import annotations

from typing import Any

# A helper that is called, not inlined, has two versions of machine code: its own, and one in the cached object of its
# caller. Which of them runs depends on whether this process compiled it or loaded it, and they vectorise sums
# differently: the first run on a machine would differ from every later one, and from itself resumed.
REPRODUCIBLE: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "forceinline": True}
