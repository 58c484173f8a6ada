"""numba kernels of :mod:`onpolicy.losses._bf16_products`. Imported there, at the first use.

VDPBF16PS multiplies pairs of bf16 values that lie next to each other in 32 bits and adds both products to a float32
lane. Operands are therefore packed: pairs along the summed dimension, ``HEIGHT`` rows of the left and ``WIDTH``
columns of the right operand side by side, so that one step of the inner loop reads them in order. The 12 x 32 block of
sums fills 24 of the 32 vector registers.

One file on purpose: numba's disk cache notices a change of the file a kernel is in, not of what it calls elsewhere.

Shape legend: n tokens, V vocabulary, D hidden size; P pairs of the summed dimension.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

HEIGHT, WIDTH = 12, 32
_LANES = 16
u32: Any = np.uint32  # Any: numba gives these their types, not the annotations
_jit = njit(cache=True, nogil=True, error_model="numpy")
_inline = njit(cache=True, nogil=True, error_model="numpy", inline="always")


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


@intrinsic
def _multiply(typing_context: Any, left: Any, left_at: Any, right: Any, right_at: Any, pairs: Any, block: Any) -> Any:
    """``block`` [12 x 32] float32 = left [P, 12] from ``left_at`` on, times right [P, 32] from ``right_at`` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i64, i32 = ir.IntType(64), ir.IntType(32)
        sums_type, pairs_type = ir.VectorType(ir.FloatType(), _LANES), ir.VectorType(i32, _LANES)
        left, right, block = (
            cgutils.create_struct_proxy(signature.args[i])(context, builder, value=arguments[i]).data for i in (0, 2, 5)
        )
        left = builder.gep(left, [arguments[1]])
        right = builder.gep(right, [arguments[3]])
        halves_type = ir.VectorType(_BFloat(), 2 * _LANES)
        dot = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(sums_type, (sums_type, halves_type, halves_type)),
            "llvm.x86.avx512bf16.dpbf16ps.512",
        )  # fmt: skip
        before, loop, after = builder.block, builder.append_basic_block("pairs"), builder.append_basic_block("sums")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(i64)
        sums = [[builder.phi(sums_type) for _ in range(WIDTH // _LANES)] for _ in range(HEIGHT)]
        base = builder.gep(right, [builder.mul(step, i64(WIDTH))])
        columns = [
            builder.load(builder.bitcast(builder.gep(base, [i64(_LANES * j)]), halves_type.as_pointer()), align=4)
            for j in range(WIDTH // _LANES)
        ]
        base = builder.gep(left, [builder.mul(step, i64(HEIGHT))])
        results = []
        for i in range(HEIGHT):
            single = builder.insert_element(pairs_type(ir.Undefined), builder.load(builder.gep(base, [i64(i)])), i32(0))
            same = ir.Constant(pairs_type, [0] * _LANES)
            row = builder.bitcast(builder.shuffle_vector(single, single, same), halves_type)
            results.append(
                [builder.call(dot, (total, row, column)) for total, column in zip(sums[i], columns, strict=True)]
            )
        following = builder.add(step, i64(1))
        step.add_incoming(i64(0), before)
        step.add_incoming(following, loop)
        zero = ir.Constant(sums_type, [0.0] * _LANES)
        for phis, values in zip(sums, results, strict=True):
            for phi, value in zip(phis, values, strict=True):
                phi.add_incoming(zero, before)
                phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, arguments[4]), loop, after)
        builder.position_at_end(after)
        for i, values in enumerate(results):
            for j, value in enumerate(values):
                place = builder.gep(block, [i64(WIDTH * i + _LANES * j)])
                builder.store(value, builder.bitcast(place, sums_type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(left, types.int64, right, types.int64, types.int64, block), generate


@intrinsic
def _transpose(typing_context: Any, source: Any, source_at: Any, stride: Any, to: Any, to_at: Any) -> Any:
    """16 rows of 16 words, ``stride`` apart from ``source_at`` on, become the columns of 16 rows ``WIDTH`` apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i64 = ir.IntType(64)
        words_type = ir.VectorType(ir.IntType(32), _LANES)
        source, to = (
            cgutils.create_struct_proxy(signature.args[i])(context, builder, value=arguments[i]).data for i in (0, 3)
        )

        def row(base: Any, start: Any, stride: Any, i: int) -> Any:
            at = builder.add(start, builder.mul(stride, i64(i)))
            return builder.bitcast(builder.gep(base, [at]), words_type.as_pointer())

        rows = [builder.load(row(source, arguments[1], arguments[2], i), align=4) for i in range(_LANES)]
        for distance in (8, 4, 2, 1):  # swap the off-diagonal halves of ever smaller squares
            for i in (i for i in range(_LANES) if not i & distance):
                upper, lower = rows[i], rows[i + distance]
                masks = (
                    [lane if not lane & distance else _LANES + lane - distance for lane in range(_LANES)],
                    [lane + distance if not lane & distance else _LANES + lane for lane in range(_LANES)],
                )
                rows[i], rows[i + distance] = (
                    builder.shuffle_vector(upper, lower, ir.Constant(words_type, mask)) for mask in masks
                )
        for i, words in enumerate(rows):
            builder.store(words, row(to, arguments[4], i64(WIDTH), i), align=4)
        return context.get_dummy_value()

    return types.void(source, types.int64, types.int64, to, types.int64), generate


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
    squares = pairs // _LANES if width == WIDTH else 0
    for square in range(squares):
        for half in range(WIDTH // _LANES):
            at = first + half * _LANES * pairs + square * _LANES
            _transpose(source, at, pairs, panel, square * _LANES * WIDTH + half * _LANES)
    for j in range(width):
        for k in range(squares * _LANES, pairs):
            panel[k * WIDTH + j] = source[first + j * pairs + k]


@_jit
def logits(first: int, last: int, head: Any, hidden: Any, out: Any) -> None:
    """Columns 32 first : 32 last of ``out`` [n, V] = hidden @ head.T.

    head: [V, P] pairs of bf16, or [V, 2 P] bits of float32. hidden: from :func:`pack_rows`.
    """
    rows, vocab = out.shape
    tiles, pairs, _ = hidden.shape
    left = hidden.reshape(-1)
    rounded, panel = np.empty((WIDTH, pairs), np.uint32), np.empty(pairs * WIDTH, np.uint32)
    block = np.empty(HEIGHT * WIDTH, np.float32)
    for part in range(first, last):
        start = part * WIDTH
        width = min(WIDTH, vocab - start)
        _pack_head(head, start, width, pairs, rounded, panel)
        for tile in range(tiles):
            _multiply(left, tile * pairs * HEIGHT, panel, 0, pairs, block)
            if width == WIDTH and (tile + 1) * HEIGHT <= rows:  # known counts compile to a fifth of the time
                for i in range(HEIGHT):
                    for j in range(WIDTH):
                        out[tile * HEIGHT + i, start + j] = block[i * WIDTH + j]
            else:
                for i in range(min(HEIGHT, rows - tile * HEIGHT)):
                    for j in range(width):
                        out[tile * HEIGHT + i, start + j] = block[i * WIDTH + j]
