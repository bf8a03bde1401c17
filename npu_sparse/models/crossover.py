"""From which length on sparse prefill is faster than dense, as measured: what `Budget(dense_below="auto")` stands for.

Figures come from `npu-sparse ttft` (`--crossover` adds them to crossover.json): device, attention geometry, budget, the
fastest dense implementation, and the run they were measured in. A figure is the first measured length from which no longer one is
slower than dense; lengths in between were not measured. An indexer wider than the figure's costs more than it says.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..budget import Budget
from .architectures import describe

PATH = Path(__file__).with_name("crossover.json")
KEY = ("device", "query_heads", "kv_heads", "head_dim", "k", "block")
NEVER = 1 << 30  # for a budget that was slower than dense at every measured length


def entries(path: Path = PATH) -> list[dict]:
    """The measured figures."""
    return json.loads(path.read_text())


def dense_below(model, budget: Budget, measured: Sequence[dict] | None = None) -> int:
    """The length in tokens from which `budget` is faster than dense on this model's device.

    Of the figures for the device, those of a budget that costs at least as much count (its k no smaller, its b_sel no larger):
    the smallest of those with the model's own heads, each of which alone is an upper bound; else the largest of the others.
    Raises ValueError where there is none.
    """
    device, architecture = device_name(model.device), describe(model.config)
    k = max(budget.k.values()) if isinstance(budget.k, Mapping) else budget.k
    k = max([k, *budget.per_layer.values()])
    of_device = [one for one in (entries() if measured is None else measured) if one["device"] == device]
    served = [one for one in of_device if one["k"] >= k and one["block"] <= budget.block]
    heads = architecture.query_heads, architecture.kv_heads, architecture.head_dim
    own = [one for one in served if (one["query_heads"], one["kv_heads"], one["head_dim"]) == heads]
    if own:
        return min(one["dense_below"] for one in own)
    if served:  # of other heads: none of them bounds this model
        return max(one["dense_below"] for one in served)
    have = ", ".join(f"k {one['k']} b_sel {one['block']}" for one in of_device) or "no budget"
    raise ValueError(
        f'dense_below="auto" must have a measured figure for k {k}, b_sel {budget.block} on {device!r}, which has {have}: pass a '
        "number of tokens, or measure one with npu-sparse ttft --crossover"
    )


def device_name(device) -> str:
    """What figures are kept under: the product name on CUDA, else the device's type."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def first_faster(dense_s: Mapping[int, float], sparse_s: Mapping[int, float]) -> int:
    """The first length (both map lengths to seconds) from which sparse is never slower than dense; NEVER where it always is."""
    if set(dense_s) != set(sparse_s) or not dense_s:
        raise ValueError(f"dense and sparse must be measured at the same lengths, got {sorted(dense_s)} and {sorted(sparse_s)}")
    first = NEVER
    for length in sorted(dense_s, reverse=True):
        if sparse_s[length] > dense_s[length]:
            break
        first = length
    return first


def merge(path: Path, measured: Sequence[dict]) -> None:
    """Adds figures to a file of them, in place of those with the same KEY."""
    from ..runs.store import write_text

    kept = {tuple(one[name] for name in KEY): one for one in (entries(path) if path.exists() else [])}
    kept |= {tuple(one[name] for name in KEY): one for one in measured}
    lines = (json.dumps(kept[key]) for key in sorted(kept))
    write_text(path, "[\n  " + ",\n  ".join(lines) + "\n]\n" if kept else "[]\n")
