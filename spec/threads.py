"""numba's threads beside torch's."""

from __future__ import annotations

import ctypes
import os

_RUNTIMES = (None, "libgomp.so.1", "libiomp5.so")  # None: whatever was preloaded


def launch() -> None:
    """Starts numba's thread pool and takes back what it does to the OpenMP runtime that torch shares with it.

    numba switches nested parallel regions on. From then on every small matrix product inside one of torch's parallel
    loops (attention's, say) starts and ends threads of its own, and takes a hundred times as long. It also makes torch
    use as many threads as there are CPUs, whatever OMP_NUM_THREADS or torch.set_num_threads said. For the modules that
    have parallel kernels, when they are imported.
    """
    import torch
    from numba.np.ufunc.parallel import _launch_threads

    threads = torch.get_num_threads()
    _launch_threads()
    torch.set_num_threads(threads)
    for name in _RUNTIMES:
        try:
            runtime = ctypes.CDLL(name) if name is None else ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            runtime.omp_set_max_active_levels(1)
        except (OSError, AttributeError):  # not loaded here, or not an OpenMP runtime
            continue
