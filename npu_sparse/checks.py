"""Checks before the first token, for transformers (prefill.py) and vLLM (integrations/vllm)."""

from collections.abc import Mapping, Sequence

import torch

from .budget import Budget
from .indexer import Indexer
from .models.architectures import Architecture
from .ops.dispatch import check_limits, check_selection, require_kernel, require_kernels, uses_kernel


def selecting_layers(budget: Budget, layers: Sequence[int]) -> dict[int, int]:
    """`{full-attention layer: the layer whose support it reads}`, itself where it selects, by `anchors` or `share_layers`."""
    if budget.anchors:
        return {layer: max((a for a in budget.anchors if a <= layer), default=layer) for layer in layers}
    return {layer: layers[n - n % budget.share_layers] for n, layer in enumerate(layers)}


def check_layers(budget: Budget, layers: Sequence[int]) -> None:
    """Raises ValueError where a budget names layers that have no full attention, or that do not select."""
    unknown = set(budget.per_layer) - set(layers)
    if unknown:
        raise ValueError(f"per_layer must name full-attention layers {list(layers)}, got {sorted(unknown)}")
    anchors = set(budget.anchors)
    if anchors and not {layers[0]} <= anchors <= set(layers):
        raise ValueError(
            f"anchors must be full-attention layers {list(layers)}, the first among them, got {sorted(anchors)}"
        )
    selects = selecting_layers(budget, layers)
    followers = sorted(layer for layer in budget.per_layer if selects[layer] != layer)
    if followers:
        raise ValueError(
            f"per_layer must name layers that select for themselves ({'anchors' if anchors else 'share_layers'} "
            f"{sorted(anchors) or budget.share_layers}), got {followers}"
        )


def check_kernels(
    budget: Budget, impl: str, device_type: str, dtype: torch.dtype, architecture: Architecture, indexer: Indexer | None = None
) -> None:
    """Raises KernelUnavailableError or ValueError where the kernels that `impl` means on a device cannot serve a budget.

    With an indexer, also where they cannot select by it for this budget.
    """
    if not uses_kernel(impl, device_type):
        return
    require_kernels(device_type)
    if budget.tail:
        require_kernel("sparse_attention_with_tail", device_type, "or Budget(tail=False)")
    if budget.exact_last:
        require_kernel("dense_rows", device_type, "or Budget(exact_last=0)")
    if budget.candidates:
        require_kernel("select_two_level", device_type, "or Budget(candidates=0)")
    tiers = budget.k if isinstance(budget.k, Mapping) else (0,)
    most_k = max(budget.k_for(start, layer) for start in tiers for layer in architecture.layers)
    check_limits(device_type, dtype=dtype, block=budget.block, k=most_k, head_dim=architecture.head_dim)
    if indexer is not None and not budget.candidates:
        sizes = {"heads": indexer.config.heads, "dim": indexer.config.dim, "block": budget.block, "reduce": budget.reduce}
        check_selection(device_type, k=most_k, **sizes)
