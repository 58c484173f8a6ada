"""Large CPU buffers kept from call to call.

An allocation of this size is mapped afresh and given back every time, and touching its pages for the first time costs
several times the arithmetic done in them. CUDA's allocator keeps memory by itself.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_kept = threading.local()


def take(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor that the next ``take`` of the same name in this thread overwrites."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    kept: Tensor | None = getattr(_kept, name, None)
    if kept is None or len(kept) < size:
        setattr(_kept, name, None)  # the old one goes before the new one comes
        kept = torch.empty(size, dtype=torch.uint8)
        setattr(_kept, name, kept)
    return kept[:size].view(dtype).view(shape)
