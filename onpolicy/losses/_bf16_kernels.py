"""numba kernels of :mod:`onpolicy.losses._bf16_products`, around :mod:`onpolicy.bf16_block`. Imported at first use.

Shape legend: n tokens, V vocabulary, D hidden size; P pairs of the summed dimension.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from onpolicy.bf16_block import HEIGHT, LANES, WIDTH, added_product, product, transpose

STRIPE = 16 * HEIGHT  # rows of the head's gradient whose operand is packed at a time
u32: Any = np.uint32  # Any: numba gives these their types, not the annotations
_jit = njit(cache=True, nogil=True, error_model="numpy")
_inline = njit(cache=True, nogil=True, error_model="numpy", inline="always")


@_inline
def _bf16(bits: Any) -> Any:
    """The upper half of a float32's bits, rounded to nearest even; NaN stays NaN."""
    rounded = (bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16)
    return u32(0x7FC0) if (bits & u32(0x7FFFFFFF)) > u32(0x7F800000) else rounded


@_jit
def pack_rows(matrix: Any, packed: Any) -> None:
    """[n, P] pairs -> [ceil(n / 12), P, 12], the last tile filled up with zeros."""
    rows, pairs = matrix.shape
    for tile in range(packed.shape[0]):
        for i in range(HEIGHT):
            row = tile * HEIGHT + i
            for k in range(pairs):
                packed[tile, k, i] = matrix[row, k] if row < rows else u32(0)


@_jit
def _pack_head(head: Any, start: int, width: int, pairs: int, rounded: Any, panel: Any) -> None:
    """Rows ``start`` to ``start + width`` of the head -> ``panel`` [P, 32], filled up with zeros."""
    if width < WIDTH:
        panel[:] = 0
    if head.shape[1] != pairs:
        for j in range(width):
            for k in range(pairs):
                low, high = _bf16(head[start + j, 2 * k]), _bf16(head[start + j, 2 * k + 1])
                rounded[j, k] = low | (high << u32(16))
        source, first = rounded.reshape(-1), 0
    else:
        source, first = head.reshape(-1), start * pairs
    squares = pairs // LANES if width == WIDTH else 0
    for square in range(squares):
        for half in range(WIDTH // LANES):
            at = first + half * LANES * pairs + square * LANES
            transpose(source, at, pairs, panel, square * LANES * WIDTH + half * LANES)
    for j in range(width):
        for k in range(squares * LANES, pairs):
            panel[k * WIDTH + j] = source[first + j * pairs + k]


@_jit
def logits(first: int, last: int, head: Any, hidden: Any, out: Any) -> None:
    """Columns 32 first : 32 last of ``out`` [n, V] = hidden @ head.T.

    head: [V, P] pairs of bf16, or [V, 2 P] bits of float32. hidden: from :func:`pack_rows`.
    """
    rows, vocab = out.shape
    tiles, pairs, _ = hidden.shape
    left, flat = hidden.reshape(-1), out.reshape(-1)
    rounded, panel = np.empty((WIDTH, pairs), np.uint32), np.empty(pairs * WIDTH, np.uint32)
    block = np.empty(HEIGHT * WIDTH, np.float32)
    for part in range(first, last):
        start = part * WIDTH
        width = min(WIDTH, vocab - start)
        _pack_head(head, start, width, pairs, rounded, panel)
        for tile in range(tiles):
            at, row = tile * pairs * HEIGHT, tile * HEIGHT
            if width == WIDTH and row + HEIGHT <= rows:
                product(left, at, 1, HEIGHT, panel, 0, pairs, flat, row * vocab + start, vocab)
            else:
                product(left, at, 1, HEIGHT, panel, 0, pairs, block, 0, WIDTH)
                for i in range(min(HEIGHT, rows - row)):
                    for j in range(width):
                        out[row + i, start + j] = block[i * WIDTH + j]


@_jit
def pack_tokens(hidden: Any, panels: Any) -> None:
    """bf16 bits [n, D] -> [ceil(D / 32), ceil(n / 2), 32] pairs along the tokens, filled up with zeros."""
    rows, size = hidden.shape
    for panel in range(panels.shape[0]):
        for k in range(panels.shape[1]):
            for j in range(WIDTH):
                column = panel * WIDTH + j
                low = u32(hidden[2 * k, column]) if column < size else u32(0)
                high = u32(hidden[2 * k + 1, column]) if column < size and 2 * k + 1 < rows else u32(0)
                panels[panel, k, j] = low | (high << u32(16))


@_jit
def head_gradient(first: int, last: int, grad: Any, hidden: Any, total: Any) -> None:
    """Rows STRIPE first : STRIPE last of ``total`` [V, D] float32 += grad.T [V, n] @ hidden [n, D].

    grad: bf16 bits [n, V]. hidden: from :func:`pack_tokens`.
    """
    rows, vocab = grad.shape
    panels, pairs, _ = hidden.shape
    size = total.shape[1]
    right, flat = hidden.reshape(-1), total.reshape(-1)
    stripe, block = np.empty(pairs * STRIPE, np.uint32), np.empty(HEIGHT * WIDTH, np.float32)
    for part in range(first, last):
        start = part * STRIPE
        width = min(STRIPE, vocab - start)
        for k in range(pairs):
            low, high = grad[2 * k], grad[min(2 * k + 1, rows - 1)]
            keep = u32(0xFFFF) if 2 * k + 1 < rows else u32(0)
            for j in range(width):
                stripe[k * STRIPE + j] = u32(low[start + j]) | ((u32(high[start + j]) & keep) << u32(16))
        for i in range(0, width, HEIGHT):
            for panel in range(panels):
                at, column = (start + i) * size + panel * WIDTH, panel * pairs * WIDTH
                if i + HEIGHT <= width and (panel + 1) * WIDTH <= size:
                    added_product(stripe, i, 1, STRIPE, right, column, pairs, flat, at, size)
                else:
                    product(stripe, i, 1, STRIPE, right, column, pairs, block, 0, WIDTH)
                    for y in range(min(HEIGHT, width - i)):
                        for x in range(min(WIDTH, size - panel * WIDTH)):
                            total[start + i + y, panel * WIDTH + x] += block[y * WIDTH + x]
