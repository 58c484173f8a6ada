"""numba kernels of :mod:`onpolicy.losses._bf16_products`, around :mod:`onpolicy.bf16_block`. Imported at first use.

Shape legend: n tokens, V vocabulary, D hidden size; P pairs of the summed dimension.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from onpolicy.bf16_block import HEIGHT, LANES, WIDTH, fetching_added_product, product, streamed_product, transpose
from spec import threads

threads.launch()

STRIPE = 16 * HEIGHT  # rows of the head's gradient whose operand is packed at a time
DEPTH, GROUP = 192, 9  # rows of the head, and panels of its columns, multiplied at a time for the hidden's gradient
u32: Any = np.uint32  # Any: numba gives these their types, not the annotations
_jit = njit(cache=True, nogil=True, error_model="numpy")
_parallel = njit(cache=True, nogil=True, error_model="numpy", parallel=True)
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
            transpose(source, at, pairs, panel, square * LANES * WIDTH + half * LANES, WIDTH)
    for j in range(width):
        for k in range(squares * LANES, pairs):
            panel[k * WIDTH + j] = source[first + j * pairs + k]


@_jit
def _logits(first: int, last: int, head: Any, hidden: Any, out: Any, aligned: bool) -> None:
    """Columns 32 first : 32 last of ``out`` [n, V] = hidden @ head.T.

    head: [V, P] pairs of bf16, or [V, 2 P] bits of float32. hidden: from :func:`pack_rows`. ``aligned``: every row of
    ``out`` begins at a multiple of 64 bytes.
    """
    rows, vocab = out.shape
    tiles, pairs, _ = hidden.shape
    left, flat, words = hidden.reshape(-1), out.reshape(-1), head.reshape(-1)
    each = -(-WIDTH * head.shape[1] // (tiles * pairs))  # words of the next rows of the head to fetch in a step
    rounded, panel = np.empty((WIDTH, pairs), np.uint32), np.empty(pairs * WIDTH, np.uint32)
    block = np.empty(HEIGHT * WIDTH, np.float32)
    for part in range(first, last):
        start = part * WIDTH
        width = min(WIDTH, vocab - start)
        _pack_head(head, start, width, pairs, rounded, panel)
        for tile in range(tiles):
            at, row = tile * pairs * HEIGHT, tile * HEIGHT
            if width == WIDTH and row + HEIGHT <= rows and aligned:
                following = (start + WIDTH) * head.shape[1] + tile * pairs * each
                streamed_product(
                    left, at, 1, HEIGHT, panel, 0, pairs, flat, row * vocab + start, vocab, words, following, each
                )
            elif width == WIDTH and row + HEIGHT <= rows:
                product(left, at, 1, HEIGHT, panel, 0, pairs, flat, row * vocab + start, vocab)
            else:
                product(left, at, 1, HEIGHT, panel, 0, pairs, block, 0, WIDTH)
                for i in range(min(HEIGHT, rows - row)):
                    for j in range(width):
                        out[row + i, start + j] = block[i * WIDTH + j]


@_parallel
def logits(parts: int, head: Any, hidden: Any, out: Any, aligned: bool) -> None:
    """All columns, see :func:`_logits`, on ``parts`` threads."""
    count = -(-out.shape[1] // WIDTH)
    for part in prange(parts):
        _logits(count * part // parts, count * (part + 1) // parts, head, hidden, out, aligned)


@_jit
def _pack_pairs(head: Any, start: int, pairs: int, first: int, panels: Any) -> None:
    """Rows ``start`` to ``start + 2 pairs``, from column ``first`` on -> ``panels`` [S, P, 32] pairs along the rows."""
    size, narrow = head.shape[1], head.itemsize == 2
    line = np.zeros(len(panels) * WIDTH, np.uint32)
    filled = line[: min(line.size, size - first)]
    for k in range(pairs):
        low, high = head[start + 2 * k, first:], head[start + 2 * k + 1, first:]
        if narrow:
            for j in range(filled.size):
                filled[j] = u32(low[j]) | (u32(high[j]) << u32(16))
        else:
            for j in range(filled.size):
                filled[j] = _bf16(u32(low[j])) | (_bf16(u32(high[j])) << u32(16))
        for panel in range(len(panels)):
            to, part = panels[panel, k], line[panel * WIDTH :]
            for j in range(WIDTH):
                to[j] = part[j]


@_jit
def _hidden_gradient(first: int, last: int, grad: Any, head: Any, total: Any) -> None:
    """Columns 32 first : 32 last of ``total`` [n filled up to 12, D filled up to 32] += grad @ head.

    grad: words [n, V / 2]. head: bits of bf16 (uint16) or of float32 (uint32) [V, D].
    """
    rows, size = len(grad), total.shape[1]
    tiles, depth = len(total) // HEIGHT, DEPTH // 2
    flat, source, inputs = total.reshape(-1), head.reshape(-1), head.shape[1]
    # Rows of a gradient stand pages apart, where they would share the same few lines of the cache.
    left, panels = np.zeros((len(total), depth + LANES), np.uint32), np.zeros((last - first, depth, WIDTH), np.uint32)
    words, right, stride = left.reshape(-1), panels.reshape(-1), left.shape[1]
    each = -(-len(panels) * WIDTH // depth)
    for start in range(0, grad.shape[1], depth):
        pairs = min(depth, grad.shape[1] - start)
        _pack_pairs(head, 2 * start, pairs, first * WIDTH, panels)
        for i in range(rows):
            to, row = left[i], grad[i, start:]
            for k in range(pairs):
                to[k] = row[k]
        for panel in range(len(panels)):
            for tile in range(tiles):
                at, out = tile * HEIGHT * stride, tile * HEIGHT * size + (first + panel) * WIDTH
                following = 2 * (start + depth) + min(panel * tiles + tile, DEPTH - 1)  # of the head, in the next round
                fetching_added_product(
                    words, at, stride, 1, right, panel * depth * WIDTH, pairs, flat, out, size,
                    source, following * inputs + first * WIDTH, each,
                )  # fmt: skip


@_parallel
def hidden_gradient(parts: int, grad: Any, head: Any, total: Any) -> None:
    """All columns, see :func:`_hidden_gradient`, on ``parts`` threads; as many at a time as stay in a core's cache."""
    count = total.shape[1] // WIDTH
    for part in prange(parts):
        start, stop = count * part // parts, count * (part + 1) // parts
        for first in range(start, stop, GROUP):
            _hidden_gradient(first, min(stop, first + GROUP), grad, head, total)


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
def _head_gradient(first: int, last: int, grad: Any, hidden: Any, total: Any) -> None:
    """Rows STRIPE first : STRIPE last of ``total`` [V, D] float32 += grad.T [V, n] @ hidden [n, D].

    grad: bf16 bits [n, V]. hidden: from :func:`pack_tokens`.
    """
    rows, vocab = grad.shape
    panels, pairs, _ = hidden.shape
    size = total.shape[1]
    right, flat, source = hidden.reshape(-1), total.reshape(-1), grad.reshape(-1)
    each = -(-STRIPE // pairs)
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
                    following = min(i // HEIGHT * panels + panel, rows - 1)  # of the gradient, its next stripe
                    fetching_added_product(
                        stripe, i, 1, STRIPE, right, column, pairs, flat, at, size,
                        source, following * vocab + start + STRIPE, each,
                    )  # fmt: skip
                else:
                    product(stripe, i, 1, STRIPE, right, column, pairs, block, 0, WIDTH)
                    for y in range(min(HEIGHT, width - i)):
                        for x in range(min(WIDTH, size - panel * WIDTH)):
                            total[start + i + y, panel * WIDTH + x] += block[y * WIDTH + x]


@_parallel
def head_gradient(parts: int, grad: Any, hidden: Any, total: Any) -> None:
    """All rows, see :func:`_head_gradient`, on ``parts`` threads."""
    count = -(-grad.shape[1] // STRIPE)
    for part in prange(parts):
        _head_gradient(count * part // parts, count * (part + 1) // parts, grad, hidden, total)
