"""The accuracy assertion, and yardsticks for it."""

from collections.abc import Callable

import torch
from torch import Tensor


def plain_products(a: Tensor, b: Tensor) -> Tensor:
    """`a [B, M, D] @ b [B, N, D]^T` in fp32 `[B, M, N]`, added as the plainest kernel of the device adds.

    fp32: one accumulator, a rounding after each of the D terms, as fused multiply-adds do; libraries add in trees and are two to
    three times as accurate. fp16 and bf16 on CUDA: the tensor cores' own product, which cuts off where IEEE arithmetic rounds.
    Both measured against float64 on an H200: no kernel of full precision is asked to beat them, one of lower precision (tf32,
    half-precision sums) is a thousand times off.
    """
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(a, b.mT, out_dtype=torch.float32)
    total = torch.zeros(*a.shape[:2], b.shape[1], device=a.device)
    for left, right in zip(a.double().unbind(-1), b.double().unbind(-1)):
        total = (total.double() + left[:, :, None] * right[:, None]).float()
    return total


def rms_error(actual: Tensor, exact: Tensor) -> float:
    """Root mean square of `actual - exact` in float64; equal infinities count as no error, NaN as infinite error."""
    actual, exact = actual.double().cpu(), exact.double().cpu()
    if actual.shape != exact.shape:
        raise ValueError(f"actual must have shape {tuple(exact.shape)}, got {tuple(actual.shape)}")
    error = torch.where(actual == exact, 0.0, actual - exact).nan_to_num(nan=float("inf"))
    return float(error.square().mean().sqrt()) if error.numel() else 0.0


def assert_accurate(actual: Tensor, exact: Tensor, *yardsticks: Tensor, factor: float = 2.0) -> None:
    """Asserts that the RMS error of `actual` is at most `factor` times that of the yardsticks' worst, all against `exact`.

    A yardstick is another computation in the same dtype: the reference for a kernel, a naive one for the reference, and where
    the order of additions decides (a GPU), one by `plain_products`. Nobody is asked to do better than `exact` rounded once to
    actual's dtype.
    """
    error, theirs = rms_error(actual, exact), max(rms_error(yardstick, exact) for yardstick in yardsticks)
    rounding = rms_error(exact.to(actual.dtype), exact)
    limit = factor * max(theirs, rounding)
    assert error <= limit, (
        f"RMS error must be at most {limit:.3e} ({factor} x {theirs:.3e} of the yardstick or {rounding:.3e} "
        f"of rounding), got {error:.3e}"
    )


def over_seeds(compute: Callable, device: str, factor: float = 2.0) -> None:
    """`assert_accurate` of what `compute(seed)` gives, `(actual, exact, *yardsticks)`, over eight seeds together on CUDA.

    An RMS of a few dozen numbers is noise, and so is one of many numbers that share one softmax: the same correct kernel was
    between 0.6 and 4.6 times its yardstick by seed. A CPU's order of additions is the same for both sides; one seed does there.
    """
    results = [compute(seed) for seed in range(8 if device == "cuda" else 1)]
    assert_accurate(*(torch.cat([x.flatten() for x in each]) for each in zip(*results)), factor=factor)
