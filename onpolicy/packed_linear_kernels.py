"""numba kernels of :mod:`onpolicy.packed_linear`, around :mod:`onpolicy.bf16_block`. Imported at first use.

Shape legend: n rows, N outputs, P pairs of inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from onpolicy.bf16_block import BROAD, FLAT, LANES, flat_product, transpose
from spec import threads

threads.launch()

f32: Any = np.float32  # Any: numba gives these their types, not the annotations
i32: Any = np.int32
u32: Any = np.uint32
_ROWS = 30 * FLAT  # of the left operand, that stay in a core's cache beside a panel
_jit = njit(cache=True, nogil=True, error_model="numpy")
_parallel = njit(cache=True, nogil=True, error_model="numpy", parallel=True)


@_jit
def _pack(first: int, last: int, weight: Any, panels: Any) -> None:
    """Panels ``first`` to ``last`` of [ceil(N / 48), P, 48] from words [N, P], filled up with zeros."""
    outputs, pairs = weight.shape
    source, to = weight.reshape(-1), panels.reshape(-1)
    for panel in range(first, last):
        for third in range(0, BROAD, LANES):
            row, at = panel * BROAD + third, panel * pairs * BROAD + third
            squares = pairs // LANES * LANES if row + LANES <= outputs else 0
            for k in range(0, squares, LANES):
                transpose(source, row * pairs + k, pairs, to, at + k * BROAD, BROAD)
            for j in range(LANES):
                for k in range(squares, pairs):
                    to[at + k * BROAD + j] = weight[row + j, k] if row + j < outputs else u32(0)


@_parallel
def pack(parts: int, weight: Any, panels: Any) -> None:
    """All panels, see :func:`_pack`, on ``parts`` threads."""
    count = len(panels)
    for part in prange(parts):
        _pack(count * part // parts, count * (part + 1) // parts, weight, panels)


@_jit
def _multiply(first: int, last: int, x: Any, panels: Any, wide: Any, narrow: Any) -> None:
    """Columns 48 first : 48 last of x [n, P] times the panels, into ``wide`` [n, N] float32 or ``narrow`` bf16 bits.

    The other one has no rows.
    """
    rows, pairs = x.shape
    outputs = wide.shape[1]
    left, right, out = x.reshape(-1), panels.reshape(-1), wide.reshape(-1)
    rest, block = np.zeros((FLAT, pairs), np.uint32), np.empty((FLAT, BROAD), np.float32)
    flat, last_rows, words = block.reshape(-1), rest.reshape(-1), block.view(np.int32)
    whole = rows // FLAT * FLAT
    for i in range(whole, rows):
        to, source = rest[i - whole], x[i]
        for k in range(pairs):
            to[k] = source[k]
    size, tiles = pairs * BROAD, -(-min(rows, _ROWS) // FLAT)
    ahead = -(-BROAD // tiles)  # words of the next panel to fetch in a step, so that all tiles together fetch it
    for start in range(0, rows, _ROWS):
        for panel in range(first, last):
            column = panel * BROAD
            width, following = min(BROAD, outputs - column), min(panel + 1, last - 1) * size
            for row in range(start, min(start + _ROWS, rows), FLAT):
                height = min(FLAT, rows - row)
                fetch = following + (row - start) // FLAT * pairs * ahead
                direct = len(wide) > 0 and height == FLAT and width == BROAD
                if direct:
                    flat_product(
                        left, row * pairs, pairs, 1, right, panel * size, pairs, out, row * outputs + column, outputs,
                        fetch, ahead,
                    )  # fmt: skip
                    continue
                if height == FLAT:
                    flat_product(left, row * pairs, pairs, 1, right, panel * size, pairs, flat, 0, BROAD, fetch, ahead)
                else:
                    flat_product(last_rows, 0, pairs, 1, right, panel * size, pairs, flat, 0, BROAD, fetch, ahead)
                for i in range(height):
                    if len(wide):
                        for j in range(width):
                            wide[row + i, column + j] = block[i, j]
                    else:
                        result, bits = narrow[row + i, column:], words[i]
                        for j in range(width):  # rounded to nearest, ties to even; NaN stays NaN
                            b = bits[j]
                            rounded = (b + i32(0x7FFF) + ((b >> i32(16)) & i32(1))) >> i32(16)
                            nan = (b & i32(0x7FFFFFFF)) > i32(0x7F800000)
                            result[j] = np.int16(i32(0x7FC0) if nan else rounded)


@_parallel
def multiply(parts: int, x: Any, panels: Any, wide: Any, narrow: Any) -> None:
    """All columns, see :func:`_multiply`, on ``parts`` threads."""
    count = len(panels)
    for part in prange(parts):
        _multiply(count * part // parts, count * (part + 1) // parts, x, panels, wide, narrow)
