"""index_heads: a layer's index queries, keys, head weights and log-partitions from their projections, in one operator."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import FLOATS, check_tensor
from .reference import index_heads as reference


def _fake(queries, keys, weights, dots, hidden, cos, sin, norm_weight, norm_bias, line, eps, start):
    B, T, D = keys.shape
    return (
        queries.new_empty((B, queries.shape[-1] // D, T, D)),
        queries.new_empty((B, T, D)),
        queries.new_empty((0,) if weights is None else weights.shape),
        queries.new_empty((0,) if dots is None else (B, T), dtype=torch.float32),
        queries.new_empty((2, B, T), dtype=torch.bool),
    )


dispatch.define(
    "index_heads",
    "(Tensor queries, Tensor keys, Tensor? weights, Tensor? dots, Tensor hidden, Tensor cos, Tensor sin, Tensor norm_weight, "
    "Tensor norm_bias, Tensor? line, float eps, int start) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference,
    _fake,
    devices=("cuda",),
)


def index_heads(
    queries: Tensor,
    keys: Tensor,
    weights: Tensor | None,
    dots: Tensor | None,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    line: Tensor | None = None,
    eps: float = 1e-5,
    start: int = 0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """`(qi [B, Hi, T, Di], ki [B, T, Di], w [B, T, Hi] or None, c float32 [B, T] or None, finite bool [2, B, T])`.

    Computes `IndexHead` from its projections: `qi = rotate(queries)`, `ki = rotate(LayerNorm(keys))`, `w = weights / sqrt(Hi)`
    (arXiv 2606.07703, "Indexer"; 2606.22874), and `PartitionHead` from its own: `c = dots + b + g log n`, where n is the number
    of keys up to the token and nothing is padding. `finite[0]` says whether each token's hidden state is finite, `finite[1]`
    whether its index query, key and weights are. Results have the dtype of the projections. The reference rounds to it after
    every step, kernels once at the end.

    Args:
        queries: `[B, T, Hi * Di]`, keys: `[B, T, Di]`, weights: `[B, T, Hi]` or None, dots: `[B, T]` or None: projections of
            the hidden states, of one dtype; their last dimension is contiguous. They may be parts of one tensor.
        hidden: `[B, T, H]`; only checked for being finite.
        cos, sin: the model's, `[B or 1, T, R]`; R is even. Where R exceeds Di, `rotary_for` thins them out.
        norm_weight, norm_bias, eps: of the LayerNorm, `[Di]` each.
        line: `[2]`, b and g, with dots.
        start: position of the first token.
        impl: "auto", "reference" or "kernel"; kernels exist for cuda only.
    """
    check_tensor("keys", keys, (None, None, None), FLOATS)
    B, T, D = keys.shape
    check_tensor("queries", queries, (B, T, None), (keys.dtype,), keys.device)
    if D < 2 or queries.shape[-1] % D or not queries.shape[-1]:
        raise ValueError(f"queries must hold whole heads of {D} dimensions, at least 2, got {queries.shape[-1]}")
    if weights is not None:
        check_tensor("weights", weights, (B, T, queries.shape[-1] // D), (keys.dtype,), keys.device)
    if (dots is None) != (line is None):
        raise ValueError(f"line must be given with dots, got {'no line' if line is None else 'no dots'}")
    if dots is not None:
        check_tensor("dots", dots, (B, T), (keys.dtype,), keys.device)
        check_tensor("line", line, (2,), FLOATS, keys.device)
    check_tensor("hidden", hidden, (B, T, None), FLOATS, keys.device)
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, (None, T, None), FLOATS, keys.device)
        if table.shape[0] not in (1, B) or table.shape[-1] % 2 or table.shape != cos.shape:
            raise ValueError(f"{name} must have shape ({B} or 1, {T}, an even number) like cos, got {tuple(table.shape)}")
    for name, part in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_tensor(name, part, (D,), FLOATS, keys.device)
    qi, ki, w, c, finite = dispatch.call(
        "index_heads", impl, keys.device.type, queries, keys, weights, dots, hidden, cos, sin, norm_weight, norm_bias, line,
        float(eps), start,
    )  # fmt: skip
    return qi, ki, None if weights is None else w, None if dots is None else c, finite
