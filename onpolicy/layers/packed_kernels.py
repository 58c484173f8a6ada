"""numba kernels of :mod:`onpolicy.layers.packed`, around :mod:`onpolicy.bf16_block`. Imported at first use.

Shape legend: n rows, N outputs, P pairs of inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from onpolicy.bf16_block import BROAD, FLAT, LANES, flat_product, narrow_flat_product, transpose
from onpolicy.kernel_math import MATH, exp, f32, i32, to_bf16
from spec import threads
from spec.compiled import REPRODUCIBLE

threads.launch()

u32: Any = np.uint32  # Any: numba gives it its type, not the annotation
_ROWS = 30 * FLAT  # of the left operand, that stay in a core's cache beside a panel
_jit = njit(**REPRODUCIBLE, fastmath=MATH)
_inline = njit(cache=True, nogil=True, error_model="numpy", fastmath=MATH, inline="always")
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
def _last_rows(x: Any) -> Any:
    """Of x [n, P], the rows beyond the last whole tile, filled up with zeros: [8, P]."""
    rows, pairs = x.shape
    rest = np.zeros((FLAT, pairs), np.uint32)
    whole = rows // FLAT * FLAT
    for i in range(whole, rows):
        to, source = rest[i - whole], x[i]
        for k in range(pairs):
            to[k] = source[k]
    return rest


@_jit
def _multiply(first: int, last: int, x: Any, panels: Any, wide: Any, narrow: Any) -> None:
    """Columns 48 first : 48 last of x [n, P] times the panels, into ``wide`` [n, N] float32 or ``narrow`` bf16 bits.

    The other one has no rows.
    """
    rows, pairs = x.shape
    outputs = wide.shape[1]
    left, right, out, short = x.reshape(-1), panels.reshape(-1), wide.reshape(-1), narrow.reshape(-1)
    rest, block = _last_rows(x), np.empty((FLAT, BROAD), np.float32)
    flat, last_rows = block.reshape(-1), rest.reshape(-1)
    size, tiles = pairs * BROAD, -(-min(rows, _ROWS) // FLAT)
    ahead = -(-BROAD // tiles)  # words of the next panel to fetch in a step, so that all tiles together fetch it
    for start in range(0, rows, _ROWS):
        for panel in range(first, last):
            column, begin = panel * BROAD, panel * size
            width, following = min(BROAD, outputs - column), min(panel + 1, last - 1) * size
            for row in range(start, min(start + _ROWS, rows), FLAT):
                height, to = min(FLAT, rows - row), row * outputs + column
                fetch = following + (row - start) // FLAT * pairs * ahead
                if height < FLAT:
                    flat_product(last_rows, 0, pairs, 1, right, begin, pairs, flat, 0, BROAD, right, fetch, ahead)
                elif width < BROAD:
                    flat_product(left, row * pairs, pairs, 1, right, begin, pairs, flat, 0, BROAD, right, fetch, ahead)
                elif len(wide):
                    flat_product(
                        left, row * pairs, pairs, 1, right, begin, pairs, out, to, outputs, right, fetch, ahead
                    )
                    continue
                else:
                    narrow_flat_product(
                        left, row * pairs, pairs, 1, right, begin, pairs, short, to, outputs, right, fetch, ahead
                    )
                    continue
                for i in range(height):
                    for j in range(width):
                        if len(wide):
                            wide[row + i, column + j] = block[i, j]
                        else:
                            narrow[row + i, column + j] = to_bf16(block[i, j])


@_parallel
def multiply(parts: int, x: Any, panels: Any, wide: Any, narrow: Any) -> None:
    """All columns, see :func:`_multiply`, on ``parts`` threads."""
    count = len(panels)
    for part in prange(parts):
        _multiply(count * part // parts, count * (part + 1) // parts, x, panels, wide, narrow)


@_inline
def _gated(gate: Any, through: Any) -> Any:
    """silu(gate) * through."""
    small = exp(-abs(gate))
    return gate * (f32(1.0) if gate >= f32(0.0) else small) / (f32(1.0) + small) * through


@_jit
def _multiply_gated(first: int, last: int, x: Any, panels: Any, out: Any) -> None:
    """Columns 24 first : 24 last of ``out`` [n, F] bf16 bits = silu(gate) * up.

    A panel's first 24 columns are the gates, the others what these let through.
    """
    rows, pairs = x.shape
    outputs, half = out.shape[1], BROAD // 2
    left, right = x.reshape(-1), panels.reshape(-1)
    rest, block = _last_rows(x), np.empty((FLAT, BROAD), np.float32)
    flat, last_rows = block.reshape(-1), rest.reshape(-1)
    size, tiles = pairs * BROAD, -(-min(rows, _ROWS) // FLAT)
    ahead = -(-BROAD // tiles)
    for start in range(0, rows, _ROWS):
        for panel in range(first, last):
            column, begin = panel * half, panel * size
            width, following = min(half, outputs - column), min(panel + 1, last - 1) * size
            for row in range(start, min(start + _ROWS, rows), FLAT):
                height = min(FLAT, rows - row)
                fetch = following + (row - start) // FLAT * pairs * ahead
                if height < FLAT:
                    flat_product(last_rows, 0, pairs, 1, right, begin, pairs, flat, 0, BROAD, right, fetch, ahead)
                else:
                    flat_product(left, row * pairs, pairs, 1, right, begin, pairs, flat, 0, BROAD, right, fetch, ahead)
                for i in range(height):
                    gates, through, to = block[i, :half], block[i, half:], out[row + i, column:]
                    for j in range(half):
                        gates[j] = _gated(gates[j], through[j])
                    for j in range(width):
                        to[j] = to_bf16(gates[j])


@_parallel
def multiply_gated(parts: int, x: Any, panels: Any, out: Any) -> None:
    """All columns, see :func:`_multiply_gated`, on ``parts`` threads."""
    count = len(panels)
    for part in prange(parts):
        _multiply_gated(count * part // parts, count * (part + 1) // parts, x, panels, out)


@_jit
def _widen(bits: Any, line: Any) -> None:
    """bf16 bits -> float32."""
    words = line.view(np.int32)
    for j in range(bits.size):
        words[j] = i32(bits[j]) << i32(16)


@_jit
def _rms_norm(first: int, last: int, x: Any, residual: Any, weight: Any, epsilon: Any, out: Any) -> None:
    """Rows ``first`` to ``last`` of bf16 bits [n, C]."""
    size = x.shape[1]
    line, other, scale = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    _widen(weight, scale)
    for r in range(first, last):
        to = out[r]
        _widen(x[r], line)
        if len(residual):
            stream = residual[r]
            _widen(stream, other)
            for j in range(size):
                line[j] += other[j]
                stream[j] = to_bf16(line[j])
        total = f32(0.0)
        for j in range(size):
            total += line[j] * line[j]
        factor = f32(1.0) / np.sqrt(total / f32(size) + epsilon)
        for j in range(size):
            to[j] = to_bf16(line[j] * factor * scale[j])


@_parallel
def rms_norm(parts: int, x: Any, residual: Any, weight: Any, epsilon: Any, out: Any) -> None:
    """``out`` = x / sqrt(mean x^2 + epsilon) * weight, all bf16 bits: [n, C], weight [C]; on ``parts`` threads.

    Where ``residual`` has rows, x is added to it first, in place, and the sum's norm is taken.
    """
    count = len(x)
    for part in prange(parts):
        _rms_norm(count * part // parts, count * (part + 1) // parts, x, residual, weight, epsilon, out)


@_jit
def _silu_mul(first: int, last: int, x: Any, out: Any) -> None:
    size = out.shape[1]
    gates, through = np.empty(size, np.float32), np.empty(size, np.float32)
    for r in range(first, last):
        to = out[r]
        _widen(x[r, :size], gates)
        _widen(x[r, size:], through)
        for j in range(size):
            to[j] = to_bf16(_gated(gates[j], through[j]))


@_parallel
def silu_mul(parts: int, x: Any, out: Any) -> None:
    """``out`` [n, F] = silu(x[:, :F]) * x[:, F:], bf16 bits, on ``parts`` threads."""
    count = len(x)
    for part in prange(parts):
        _silu_mul(count * part // parts, count * (part + 1) // parts, x, out)
