"""Products of bf16 values in float32, on CPUs that have them and no matrix unit.

torch has none there: its bf16 product rounds the result, and oneDNN's float32 product that may use bf16 arithmetic
inside does not use VDPBF16PS, so it runs at the speed of float32 (`python -m benchmarks.projection`): the loss's logits
and its gradient by the head take a half to two thirds of that time here.
numba is imported and the kernels compiled (then cached on disk) at the first use.

Shape legend: n tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from onpolicy.bf16_bits import words


@lru_cache
def available() -> bool:
    """Whether this CPU has the instruction and numba can be imported. With AMX, oneDNN is the faster one."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # an older torch
    own = bool(found.get("avx512_bf16")) and not found.get("amx_bf16")
    return own and importlib.util.find_spec("numba") is not None


def supports(head: Tensor) -> bool:
    """Whether bf16 products with this head, on the CPU, can be taken here."""
    dtypes = (torch.bfloat16, torch.float32)
    return available() and head.shape[1] % 2 == 0 and head.is_contiguous() and head.dtype in dtypes


def logits(hidden: Tensor, head: Tensor, out: Tensor) -> None:
    """``out`` [n, V] float32 = hidden [n, D] bf16 @ head.T [D, V], a float32 head rounded to bf16. All contiguous."""
    from onpolicy import bf16_kernels as kernels
    from onpolicy.bf16_block import HEIGHT

    pairs = hidden.shape[1] // 2
    packed = np.empty((-(-len(hidden) // HEIGHT), pairs, HEIGHT), np.uint32)
    kernels.pack_rows(words(hidden), packed)
    aligned = out.data_ptr() % 64 == 0 and out.shape[1] % 16 == 0
    kernels.logits(torch.get_num_threads(), words(head), packed, out.numpy(), aligned)


def hidden_gradient(grad: Tensor, head: Tensor) -> Tensor:
    """[n, D] float32 = grad @ head, grad [n, V] bf16, a float32 head [V, D] rounded to bf16, V even. All contiguous."""
    from onpolicy import bf16_kernels as kernels
    from onpolicy.bf16_block import HEIGHT, WIDTH

    rows, size = len(grad), head.shape[1]
    total = np.zeros((-(-rows // HEIGHT) * HEIGHT, -(-size // WIDTH) * WIDTH), np.float32)
    kernels.hidden_gradient(torch.get_num_threads(), words(grad), _bits(head), total)
    return torch.from_numpy(total)[:rows, :size]


def add_weight_gradient(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """``total`` [V, D] float32 += grad.T @ hidden, grad [n, V] and hidden [n, D] bf16. All contiguous."""
    from onpolicy import bf16_kernels as kernels
    from onpolicy.bf16_block import WIDTH

    bits, size = _bits(grad), hidden.shape[1]
    packed = np.empty((-(-size // WIDTH), -(-len(hidden) // 2), WIDTH), np.uint32)
    kernels.pack_tokens(torch.get_num_threads(), _bits(hidden), packed)
    kernels.weight_gradient(torch.get_num_threads(), bits, packed, total.numpy())


def _bits(matrix: Tensor) -> np.ndarray:
    """Of a bf16 matrix, [rows, columns] uint16; of a float32 one, uint32."""
    signed, unsigned = (torch.int16, np.uint16) if matrix.dtype == torch.bfloat16 else (torch.int32, np.uint32)
    return matrix.detach().contiguous().view(signed).numpy().view(unsigned)
