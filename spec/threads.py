"""numba's threads beside torch's."""

from __future__ import annotations

import ctypes
import os

_RUNTIMES = (None, "libgomp.so.1", "libiomp5.so")  # None: whatever was preloaded


def launch() -> None:
    """Starts numba's thread pool and takes back what it does to the OpenMP runtime that torch shares with it.

    numba switches nested parallel regions on. From then on every small matrix product inside one of torch's parallel
    loops (attention's, say) starts and ends threads of its own, and takes a hundred times as long. For the modules that
    have parallel kernels, when they are imported.
    """
    from numba.np.ufunc.parallel import _launch_threads

    _launch_threads()
    for name in _RUNTIMES:
        try:
            runtime = ctypes.CDLL(name) if name is None else ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            runtime.omp_set_max_active_levels(1)
        except (OSError, AttributeError):  # not loaded here, or not an OpenMP runtime
            continue
