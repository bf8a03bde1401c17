"""The largest of several numbers in Triton, or NaN where one of them is: a score that is not a number must not look like one."""

import triton
import triton.language as tl


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, axis: tl.constexpr):
    return tl.reduce(x, axis, larger)
