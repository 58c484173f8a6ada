"""The inner block of a bf16 matrix product with float32 sums, for numba kernels: VDPBF16PS on 24 vector registers.

The instruction multiplies pairs of bf16 values that lie next to each other in 32 bits and adds both products to a
float32 lane. Operands are therefore words, pairs along the summed dimension. A block is ``HEIGHT`` rows of the left
operand by ``WIDTH`` columns of the right one, which lie side by side (a panel), so that the inner loop reads them in
order; its 12 x 32 sums fill 24 of the 32 registers. Whether a CPU has the instruction says
:func:`onpolicy.bf16_products.available`.

numba's disk cache notices a change of the file a kernel is in, not of what it calls elsewhere. So whoever changes what
is emitted here renames it: then the files of the kernels change too.
"""

from __future__ import annotations

import itertools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

HEIGHT, WIDTH = 12, 32
FLAT, BROAD = 8, 48  # the same number of sums, for few rows
LANES = 16


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _keep_rolled(branch: Any, module: Any) -> None:
    """Unrolled, the loop would load operands ahead into registers that the sums take, and spill these."""
    count = len(module.metadata)
    loop = module.add_metadata([ir.Constant(ir.IntType(32), count)])  # a loop's metadata begins with itself
    loop.operands = (loop, module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")]))
    branch.set_metadata("llvm.loop", loop)


def _generate(
    height: int = HEIGHT,
    width: int = WIDTH,
    add: bool = False,  # the block to what is there
    stream: bool = False,  # store it past the caches
    narrow: bool = False,  # store it as bf16
    fetch: bool = False,  # in every step something needed later
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i64, i32 = ir.IntType(64), ir.IntType(32)
        sums_type, words_type = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(i32, LANES)
        halves_type = ir.VectorType(_BFloat(), 2 * LANES)
        left, right, out = (
            cgutils.create_struct_proxy(signature.args[i])(context, builder, value=arguments[i]).data for i in (0, 4, 7)
        )
        _, left_at, row_stride, pair_stride, _, right_at, pairs, _, out_at, out_stride, *later = arguments
        dot = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(sums_type, (sums_type, halves_type, halves_type)),
            "llvm.x86.avx512bf16.dpbf16ps.512",
        )  # fmt: skip
        rows = [builder.gep(left, [builder.add(left_at, builder.mul(row_stride, i64(i)))]) for i in range(height)]
        right = builder.gep(right, [right_at])
        address = ir.IntType(8).as_pointer()
        prefetch = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), (address, i32, i32, i32)), "llvm.prefetch.p0i8"
        )
        if add:  # what is added to comes from memory while the products are taken
            for i, j in itertools.product(range(height), range(width // LANES)):
                at = builder.add(builder.add(out_at, builder.mul(out_stride, i64(i))), i64(LANES * j))
                line = builder.bitcast(builder.gep(out, [at]), address)
                builder.call(prefetch, [line, i32(1), i32(3), i32(1)])  # to write, into all caches, data
        rounded_type = ir.VectorType(_BFloat(), LANES)
        rounded = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(rounded_type, (sums_type,)), "llvm.x86.avx512bf16.cvtneps2bf16.512"
        )
        before, loop, after = builder.block, builder.append_basic_block("pairs"), builder.append_basic_block("sums")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(i64)
        sums = [[builder.phi(sums_type) for _ in range(width // LANES)] for _ in range(height)]
        base = builder.gep(right, [builder.mul(step, i64(width))])
        columns = [
            builder.load(builder.bitcast(builder.gep(base, [i64(LANES * j)]), halves_type.as_pointer()), align=4)
            for j in range(width // LANES)
        ]
        if fetch:
            needed, first, stride = later
            array = cgutils.create_struct_proxy(signature.args[10])(context, builder, value=needed).data
            line = builder.gep(array, [builder.add(first, builder.mul(step, stride))])
            builder.call(prefetch, [builder.bitcast(line, address), i32(0), i32(2), i32(1)])  # to read, from L2 on
        offset = builder.mul(step, pair_stride)
        results = []
        for i in range(height):
            word = builder.load(builder.gep(rows[i], [offset]))
            single = builder.insert_element(words_type(ir.Undefined), word, i32(0))
            same = ir.Constant(words_type, [0] * LANES)
            row = builder.bitcast(builder.shuffle_vector(single, single, same), halves_type)
            results.append(
                [builder.call(dot, (total, row, column)) for total, column in zip(sums[i], columns, strict=True)]
            )
        following = builder.add(step, i64(1))
        step.add_incoming(i64(0), before)
        step.add_incoming(following, loop)
        zero = ir.Constant(sums_type, [0.0] * LANES)
        for phis, values in zip(sums, results, strict=True):
            for phi, value in zip(phis, values, strict=True):
                phi.add_incoming(zero, before)
                phi.add_incoming(value, loop)
        _keep_rolled(builder.cbranch(builder.icmp_signed("<", following, pairs), loop, after), builder.module)
        builder.position_at_end(after)
        for i, values in enumerate(results):
            start = builder.add(out_at, builder.mul(out_stride, i64(i)))
            for j, value in enumerate(values):
                at = builder.gep(out, [builder.add(start, i64(LANES * j))])
                if narrow:
                    place = builder.bitcast(at, rounded_type.as_pointer())
                    builder.store(builder.call(rounded, [value]), place, align=2)
                    continue
                place = builder.bitcast(at, sums_type.as_pointer())
                total = builder.fadd(builder.load(place, align=4), value) if add else value
                stored = builder.store(total, place, align=64 if stream else 4)
                if stream:
                    stored.set_metadata("nontemporal", builder.module.add_metadata([i32(1)]))
        return context.get_dummy_value()

    return generate


def _block(**kind: Any) -> Any:
    """An intrinsic of this kind, see :func:`_generate`."""

    def emit(
        typing_context: Any,
        left: Any,
        left_at: Any,
        row_stride: Any,
        pair_stride: Any,
        right: Any,
        right_at: Any,
        pairs: Any,
        out: Any,
        out_at: Any,
        out_stride: Any,
    ) -> Any:
        i64 = types.int64
        return types.void(left, i64, i64, i64, right, i64, i64, out, i64, i64), _generate(**kind)

    return intrinsic(emit)


def _fetching_block(**kind: Any) -> Any:
    """One that also fetches."""

    def emit(
        typing_context: Any,
        left: Any,
        left_at: Any,
        row_stride: Any,
        pair_stride: Any,
        right: Any,
        right_at: Any,
        pairs: Any,
        out: Any,
        out_at: Any,
        out_stride: Any,
        needed: Any,
        needed_at: Any,
        needed_stride: Any,
    ) -> Any:
        i64 = types.int64
        signature = types.void(left, i64, i64, i64, right, i64, i64, out, i64, i64, needed, i64, i64)
        return signature, _generate(fetch=True, **kind)

    return intrinsic(emit)


product = _block()
"""``product(left, left_at, row_stride, pair_stride, right, right_at, pairs, out, out_at, out_stride)``

12 rows of 32 float32, ``out_stride`` apart from ``out_at`` on, become left [12, P] times right [P, 32]. Word (i, k) of
the left operand stands at ``left_at + i * row_stride + k * pair_stride``, word (k, j) of the right one at
``right_at + 32 * k + j``. All arrays are contiguous; ``pairs`` is at least 1.
"""
added_product = _block(add=True)
"""As :data:`product`, added to what is there."""
fetching_added_product = _fetching_block(add=True)
"""``fetching_added_product(..., out_stride, needed, needed_at, needed_stride)``: as :data:`added_product`.

On the way, every step of the sum fetches into the cache what stands at ``needed_at`` of an array that is needed next,
and the following one ``needed_stride`` elements further; places beyond its end do no harm.
"""
streamed_product = _fetching_block(stream=True)
"""As :data:`product`, for results too many to stay in a cache: not read before they are written. ``out_at`` and
``out_stride`` are multiples of 16, and ``out`` begins at a multiple of 64 bytes. Fetches on the way."""
flat_product = _fetching_block(height=FLAT, width=BROAD)
"""As :data:`product`, of 8 rows by 48 columns: for few rows and a right operand that comes from memory. Fetches too."""
narrow_flat_product = _fetching_block(height=FLAT, width=BROAD, narrow=True)
"""As :data:`flat_product`, rounded to bf16 (to nearest, ties to even): ``out`` holds 16-bit words."""


def _rounded(builder: Any, low: Any, high: Any) -> Any:
    """Two vectors of 16 float32 -> 32 bf16, the first one's before the second's; to nearest, ties to even."""
    single, both = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_BFloat(), 2 * LANES)
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    convert = cgutils.get_or_insert_function(builder.module, ir.FunctionType(both, (single, single)), name)
    return builder.call(convert, [high, low])


def _data(context: Any, builder: Any, signature: Any, arguments: Any, i: int) -> Any:
    """Where argument ``i``, an array, begins."""
    return cgutils.create_struct_proxy(signature.args[i])(context, builder, value=arguments[i]).data


def _lanes(builder: Any, base: Any, at: Any) -> Any:
    """The 16 words from element ``at`` on, as float32."""
    place = builder.bitcast(builder.gep(base, [at]), ir.VectorType(ir.FloatType(), LANES).as_pointer())
    return builder.load(place, align=4)


@intrinsic
def narrow(typing_context: Any, source: Any, source_at: Any, to: Any, to_at: Any) -> Any:
    """32 float32 of ``source`` (or their bits) -> the 16 words of their bf16 values."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base, out = (_data(context, builder, signature, arguments, i) for i in (0, 2))
        low, high = (_lanes(builder, base, builder.add(arguments[1], ir.IntType(64)(i))) for i in (0, LANES))
        place = builder.gep(out, [arguments[3]])
        value = _rounded(builder, low, high)
        builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(source, types.int64, to, types.int64), generate


@intrinsic
def narrow_pairs(typing_context: Any, source: Any, low_at: Any, high_at: Any, to: Any, to_at: Any) -> Any:
    """16 float32 from ``low_at`` on and 16 from ``high_at`` on -> 16 words, each a pair of their bf16 values."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base, out = (_data(context, builder, signature, arguments, i) for i in (0, 3))
        value = _rounded(builder, *(_lanes(builder, base, at) for at in arguments[1:3]))
        mask = [half * LANES + lane for lane in range(LANES) for half in range(2)]
        value = builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(ir.IntType(32), 2 * LANES), mask))
        place = builder.gep(out, [arguments[4]])
        builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(source, types.int64, types.int64, to, types.int64), generate


@intrinsic
def transpose(
    typing_context: Any, source: Any, source_at: Any, stride: Any, to: Any, to_at: Any, to_stride: Any
) -> Any:
    """16 rows of 16 words, ``stride`` apart from ``source_at``, become the columns of 16 rows ``to_stride`` apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i64 = ir.IntType(64)
        words_type = ir.VectorType(ir.IntType(32), LANES)
        source, to = (
            cgutils.create_struct_proxy(signature.args[i])(context, builder, value=arguments[i]).data for i in (0, 3)
        )

        def row(base: Any, start: Any, stride: Any, i: int) -> Any:
            at = builder.add(start, builder.mul(stride, i64(i)))
            return builder.bitcast(builder.gep(base, [at]), words_type.as_pointer())

        rows = [builder.load(row(source, arguments[1], arguments[2], i), align=4) for i in range(LANES)]
        for distance in (8, 4, 2, 1):  # swap the off-diagonal halves of ever smaller squares
            for i in (i for i in range(LANES) if not i & distance):
                upper, lower = rows[i], rows[i + distance]
                masks = (
                    [lane if not lane & distance else LANES + lane - distance for lane in range(LANES)],
                    [lane + distance if not lane & distance else LANES + lane for lane in range(LANES)],
                )
                rows[i], rows[i + distance] = (
                    builder.shuffle_vector(upper, lower, ir.Constant(words_type, mask)) for mask in masks
                )
        for i, words in enumerate(rows):
            builder.store(words, row(to, arguments[4], arguments[5], i), align=4)
        return context.get_dummy_value()

    return types.void(source, types.int64, types.int64, to, types.int64, types.int64), generate
