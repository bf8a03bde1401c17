"""Maxima in Triton that keep NaN: a NaN among scores must not be lost in their maximum."""

import triton
import triton.language as tl


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, axis: tl.constexpr):
    return tl.reduce(x, axis, larger)
