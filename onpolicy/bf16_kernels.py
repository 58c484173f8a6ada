"""numba kernels of :mod:`onpolicy.bf16_products`, around :mod:`onpolicy.bf16_block`. Imported at first use.

Shape legend: n tokens, V vocabulary, D hidden size; P pairs of the summed dimension.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from onpolicy.bf16_block import (
    HEIGHT,
    LANES,
    WIDTH,
    added_product,
    fetching_added_product,
    narrow,
    narrow_pairs,
    product,
    streamed_product,
    transpose,
)
from spec import threads

threads.launch()

STRIPE = 16 * HEIGHT  # rows of the head's gradient whose operand is packed at a time
LINE = 64  # bytes that a cache fetches together
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
        bits, source, first = head.reshape(-1), rounded.reshape(-1), 0
        for j in range(width):
            whole = pairs // LANES * LANES
            for k in range(0, whole, LANES):
                narrow(bits, (start + j) * head.shape[1] + 2 * k, source, j * pairs + k)
            for k in range(whole, pairs):
                low, high = _bf16(head[start + j, 2 * k]), _bf16(head[start + j, 2 * k + 1])
                rounded[j, k] = low | (high << u32(16))
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
    size, wide = head.shape[1], head.itemsize == 4
    source, out, depth = head.reshape(-1), panels.reshape(-1), panels.shape[1]
    for k in range(pairs):
        row = (start + 2 * k) * size
        for panel in range(len(panels)):
            column, to = first + panel * WIDTH, panels[panel, k]
            width = min(WIDTH, size - column)
            if wide and width == WIDTH:
                for half in range(0, WIDTH, LANES):
                    at, place = row + column + half, (panel * depth + k) * WIDTH + half
                    narrow_pairs(source, at, at + size, out, place)
                continue
            low, high = head[start + 2 * k, column:], head[start + 2 * k + 1, column:]
            for j in range(width):
                if wide:
                    to[j] = _bf16(u32(low[j])) | (_bf16(u32(high[j])) << u32(16))
                else:
                    to[j] = u32(low[j]) | (u32(high[j]) << u32(16))


@_jit
def _hidden_gradient(first: int, last: int, grad: Any, head: Any, total: Any) -> None:
    """Columns 32 first : 32 last of ``total`` [n filled up to 12, D filled up to 32] += grad @ head.

    grad: words [n, V / 2]. head: bits of bf16 (uint16) or of float32 (uint32) [V, D].
    """
    rows, half = grad.shape
    size, inputs, tiles, depth = total.shape[1], head.shape[1], len(total) // HEIGHT, DEPTH // 2
    flat, source, slopes = total.reshape(-1), head.reshape(-1), grad.reshape(-1)
    # Rows of a gradient stand pages apart, where they would share the same few lines of the cache.
    left, panels = np.zeros((len(total), depth + LANES), np.uint32), np.zeros((last - first, depth, WIDTH), np.uint32)
    words, right, stride = left.reshape(-1), panels.reshape(-1), left.shape[1]
    # A product may fetch one line of ``depth`` rows of what the next round reads: of the head, then of the gradient.
    line = LINE // head.itemsize
    of_head, of_grad = -(-len(panels) * WIDTH // line) * 2, -(-depth // LANES) * -(-rows // depth)
    every = max(1, len(panels) * tiles // (of_head + of_grad))
    for start in range(0, half, depth):
        pairs = min(depth, half - start)
        _pack_pairs(head, 2 * start, pairs, first * WIDTH, panels)
        for i in range(rows):
            to, row = left[i], grad[i, start:]
            for k in range(pairs):
                to[k] = row[k]
        following = start + depth
        for panel in range(len(panels)):
            for tile in range(tiles):
                at, to_right, out = (
                    tile * HEIGHT * stride,
                    panel * depth * WIDTH,
                    tile * HEIGHT * size + (first + panel) * WIDTH,
                )
                index = panel * tiles + tile
                turn = index // every
                if index % every or turn >= of_head + of_grad:
                    added_product(words, at, stride, 1, right, to_right, pairs, flat, out, size)
                elif turn < of_head:
                    begin = (2 * following + turn % 2 * depth) * inputs + first * WIDTH + turn // 2 * line
                    fetching_added_product(
                        words, at, stride, 1, right, to_right, pairs, flat, out, size, source, begin, inputs
                    )
                else:
                    lines = -(-depth // LANES)
                    begin = (turn - of_head) // lines * depth * half + following + (turn - of_head) % lines * LANES
                    fetching_added_product(
                        words, at, stride, 1, right, to_right, pairs, flat, out, size, slopes, begin, half
                    )


@_parallel
def hidden_gradient(parts: int, grad: Any, head: Any, total: Any) -> None:
    """All columns, see :func:`_hidden_gradient`, on ``parts`` threads; as many at a time as stay in a core's cache."""
    count = total.shape[1] // WIDTH
    for part in prange(parts):
        start, stop = count * part // parts, count * (part + 1) // parts
        for first in range(start, stop, GROUP):
            _hidden_gradient(first, min(stop, first + GROUP), grad, head, total)


@_jit
def _pack_tokens(first: int, last: int, hidden: Any, panels: Any) -> None:
    """Panels ``first`` to ``last``."""
    rows, size = hidden.shape
    broad = panels.shape[2]
    for panel in range(first, last):
        column = panel * broad
        width = min(broad, size - column)
        for k in range(panels.shape[1]):
            low, high = hidden[2 * k, column:], hidden[min(2 * k + 1, rows - 1), column:]
            keep, to = u32(0xFFFF) if 2 * k + 1 < rows else u32(0), panels[panel, k]
            if width < broad:
                to[:] = 0
            for j in range(width):
                to[j] = u32(low[j]) | ((u32(high[j]) & keep) << u32(16))


@_parallel
def pack_tokens(parts: int, hidden: Any, panels: Any) -> None:
    """bf16 bits [n, D] -> [ceil(D / W), ceil(n / 2), W] pairs along the rows, filled up with zeros.

    A product sums over the rows then, of tokens or of a weight.
    """
    count = len(panels)
    for part in prange(parts):
        _pack_tokens(count * part // parts, count * (part + 1) // parts, hidden, panels)


@_jit
def _weight_gradient(first: int, last: int, grad: Any, hidden: Any, total: Any) -> None:
    """Rows 12 first : 12 last of ``total`` [V, D] float32 += grad.T [V, n] @ hidden [n, D].

    grad: bf16 bits [n, V]. hidden: from :func:`pack_tokens`.
    """
    rows, vocab = grad.shape
    panels, pairs, _ = hidden.shape
    size = total.shape[1]
    right, flat, source = hidden.reshape(-1), total.reshape(-1), grad.reshape(-1)
    each = -(-STRIPE // pairs)
    stripe, block = np.zeros(pairs * STRIPE, np.uint32), np.empty(HEIGHT * WIDTH, np.float32)
    for start in range(first * HEIGHT, min(last * HEIGHT, vocab), STRIPE):
        width = min(STRIPE, last * HEIGHT - start, vocab - start)
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
def weight_gradient(parts: int, grad: Any, hidden: Any, total: Any) -> None:
    """All rows, see :func:`_weight_gradient`, on ``parts`` threads."""
    count = -(-grad.shape[1] // HEIGHT)
    for part in prange(parts):
        _weight_gradient(count * part // parts, count * (part + 1) // parts, grad, hidden, total)
