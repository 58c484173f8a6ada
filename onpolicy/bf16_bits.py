"""How kernels are handed bf16 tensors, which numpy has no type for: as their bits, or in words of two."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def bits(states: Tensor) -> np.ndarray:
    """int16 of a contiguous bf16 tensor, in its own memory: what a kernel writes there arrives."""
    return states.detach().view(torch.int16).numpy()


def words(states: Tensor) -> np.ndarray:
    """uint32: pairs of bf16 values along the last dimension, or a float32 tensor's bits; a copy if not contiguous."""
    return states.detach().contiguous().view(torch.int32).numpy().view(np.uint32)
