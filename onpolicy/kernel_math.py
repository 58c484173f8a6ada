"""Arithmetic of the compiled kernels, to be inlined into them: exp, log, a row's maximum, rounding to bf16.

numba's disk cache notices a change of the file a kernel is in, not of what it calls elsewhere. So whoever changes what
one of these computes renames it: then the files of the kernels change too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from spec.compiled import REPRODUCIBLE

f32: Any = np.float32  # Any: numba gives these their types, not the annotations
i32: Any = np.int32
# No "ninf" or "nnan": masked logits are infinite, and NaN has to reach the caller.
MATH = {"reassoc", "contract", "arcp", "nsz"}
_inline = njit(cache=True, nogil=True, error_model="numpy", fastmath=MATH, inline="always")
_jit = njit(**REPRODUCIBLE, fastmath=MATH)


@_inline
def exp(x: Any) -> Any:
    """exp for x <= 0, relative error about 1e-7 (Cephes' polynomial); 0 below -87."""
    y = x if not x < f32(-87.0) else f32(-87.0)
    n = np.floor(y * f32(1.44269504) + f32(0.5))
    r = y - n * f32(0.693359375) + n * f32(2.12194440e-4)
    s = f32(1.9875691500e-4)
    s = s * r + f32(1.3981999507e-3)
    s = s * r + f32(8.3334519073e-3)
    s = s * r + f32(4.1665795894e-2)
    s = s * r + f32(1.6666665459e-1)
    s = s * r + f32(5.0000001201e-1)
    s = s * r * r + r + f32(1.0)
    power = i32((i32(n) + i32(127)) << i32(23)).view(f32)
    return f32(0.0) if x < f32(-87.0) else s * power


@_inline
def log(x: Any) -> Any:
    """log for normal x > 0, relative error about 1e-7 (Cephes' polynomial)."""
    bits = f32(x).view(i32)
    # Mantissa in [sqrt(1/2), sqrt(2)): shifting the exponent's border there keeps log(x) exact near x = 1.
    shifted = bits - i32(0x3F3504F3)
    e = f32(shifted >> i32(23))
    r = i32((shifted & i32(0x007FFFFF)) + i32(0x3F3504F3)).view(f32) - f32(1.0)
    s = f32(7.0376836292e-2)
    s = s * r + f32(-1.1514610310e-1)
    s = s * r + f32(1.1676998740e-1)
    s = s * r + f32(-1.2420140846e-1)
    s = s * r + f32(1.4249322787e-1)
    s = s * r + f32(-1.6668057665e-1)
    s = s * r + f32(2.0000714765e-1)
    s = s * r + f32(-2.4999993993e-1)
    s = s * r + f32(3.3333331174e-1)
    square = r * r
    return r + (s * r * square - f32(2.12194440e-4) * e - f32(0.5) * square) + f32(0.693359375) * e


@_jit
def maximum(x: Any) -> Any:
    """Row maximum, NaN if there is one. Taken over integers ordered like the floats, which vectorises without flags."""
    words = x.view(i32)
    top = i32(-(2**31) + 1)
    for i in range(words.size):
        w = words[i]
        w = w ^ ((w >> i32(31)) & i32(0x7FFFFFFF))
        top = max(top, w)
    return i32(top ^ ((top >> i32(31)) & i32(0x7FFFFFFF))).view(f32)


@_inline
def to_bf16(x: Any) -> Any:
    """float32 -> bf16 bits, to nearest, ties to even; finite values only."""
    bits = f32(x).view(i32)
    return np.int16((bits + i32(0x7FFF) + ((bits >> i32(16)) & i32(1))) >> i32(16))
