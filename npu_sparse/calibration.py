"""From which length on a budget is faster than dense, measured on this device with this model: `Budget(dense_below="auto")`.

The first few layers of the model run dense and sparse, interleaved, at doubling lengths, until sparse prefill is no longer slower
at two lengths in a row; what lies between the last slower and the first faster length is halved once. That takes seconds, once:
the result is kept in the cache directory under everything that it depends on.
"""

import gc
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict

import torch
from torch import nn

from .boundary import read_json
from .budget import Budget
from .checkpoints import cache_dir
from .checks import selecting_layers
from .models.architectures import decoder, describe, text_config
from .models.crossover import NEVER, device_name
from .ops import workspace
from .ops.dispatch import synchronize
from .runs.store import RunError, write_json

SHORTEST, LONGEST = 1024, 131072  # tokens
FULL_LAYERS = 4  # full-attention layers that run, or more where they share supports
RUNS, WARMUP = 5, 2
SECONDS = 60.0  # no further length is begun after this
FORMAT = 1


def measures(device: torch.device) -> bool:
    """Whether `dense_below="auto"` is measured on such a device; on a CPU it is looked up (crossover.py)."""
    return device.type != "cpu"


def dense_below(
    model, selector, budget: Budget, *, attach: Callable, impl: str = "auto", workspace_mib: int = workspace.DEFAULT_MIB
) -> int:
    """The length in tokens from which sparse prefill with `budget` is measured to be no slower than the model's own attention;
    crossover.NEVER where it is slower at every length that the model serves. Measured once per device, model geometry, dtype, own
    attention, selector, budget and version. `attach` is `SparsePrefill.attach`, which asks for it. Errors as in attach."""
    made_of = identity(model, selector, budget, impl, workspace_mib)
    path = cache_dir() / "crossover" / f"{hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:24]}.json"
    with suppress(ValueError, OSError):
        kept = read_json(path)
        if kept.get("made_of") == made_of and isinstance(kept.get("dense_below"), int) and kept["dense_below"] >= 1:
            return kept["dense_below"]
    measured = calibrate(model, selector, budget, attach=attach, impl=impl, workspace_mib=workspace_mib)
    seconds = {str(length): [dense, sparse] for length, (dense, sparse) in measured.items()}
    threshold = first_faster(measured)
    with suppress(RunError, OSError):  # where nothing can be written, it is measured again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"made_of": made_of, "dense_below": threshold, "dense_and_sparse_s": seconds})
    return threshold


def identity(model, selector, budget: Budget, impl: str, workspace_mib: int) -> dict:
    """Everything that the measurement depends on, as JSON."""
    from . import __version__

    indexer = getattr(selector, "indexer", None)
    config = None if indexer is None else asdict(indexer.config)
    made_of = {
        "format": FORMAT, "device": device_name(model.device), "geometry": describe(model.config).to_dict(),
        "intermediate_size": getattr(text_config(model), "intermediate_size", None), "dtype": str(model.dtype),
        "attention": text_config(model)._attn_implementation, "selector": selector.name, "indexer": config,
        "budget": str(budget.replace(dense_below=0)), "impl": impl, "workspace_mib": workspace_mib, "torch": torch.__version__,
        "npu_sparse": __version__,
    }  # fmt: skip
    return json.loads(json.dumps(made_of))


def calibrate(
    model, selector, budget: Budget, *, attach: Callable, impl: str = "auto", workspace_mib: int = workspace.DEFAULT_MIB
) -> dict[int, tuple[float, float]]:
    """`{length: (dense, sparse) seconds}` of the first layers of the model, medians, at the lengths that were tried."""
    architecture, text = describe(model.config), decoder(model)
    layers = first_layers(architecture.layers, budget)
    vocabulary, generator = text_config(model).vocab_size, torch.Generator().manual_seed(0)
    attached = attach(model, selector, budget.replace(dense_below=0), impl=impl, workspace_mib=workspace_mib)
    attached.detach()  # what it has checked and copied stays

    def sparsely(ids) -> float:
        attached._patch()
        try:
            return seconds_of(text, layers, ids)
        finally:
            attached.detach()

    def measure(length: int) -> tuple[float, float]:
        ids = torch.randint(vocabulary, (1, length), generator=generator).to(model.device)
        ways = {"dense": lambda: seconds_of(text, layers, ids), "sparse": lambda: sparsely(ids)}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for round_ in range(-WARMUP, RUNS):
            for name in sorted(ways, reverse=bool(round_ % 2)):
                took = ways[name]()
                if round_ >= 0:
                    seconds[name].append(took)
        return statistics.median(seconds["dense"]), statistics.median(seconds["sparse"])

    with torch.inference_mode():
        timings = search(measure, lengths(architecture.max_positions))
    gc.collect()  # caches hold each other
    return timings


def seconds_of(text, layers: int, ids) -> float:
    """One prefill of the decoder's first layers into a new cache, until the device is done."""
    from inspect import signature

    from transformers import DynamicCache

    name = "cache" if "cache" in signature(text.forward).parameters else "past_key_values"
    with prefix(text, layers):
        synchronize(ids.device)
        started = time.perf_counter()
        text(input_ids=ids, use_cache=True, **{name: DynamicCache(config=text.config)})
        synchronize(ids.device)
        return time.perf_counter() - started


def first_layers(full: Sequence[int], budget: Budget) -> int:
    """How many decoder layers run: FULL_LAYERS full-attention layers and all before them, whole groups that share a support."""
    selects = selecting_layers(budget, full)
    for n, layer in enumerate(full):
        if n >= FULL_LAYERS and selects[layer] == layer:
            return full[n - 1] + 1
    return full[-1] + 1


@contextmanager
def prefix(text, count: int) -> Iterator[None]:
    """The decoder with its first `count` layers alone."""
    whole = text.layers
    text.layers = nn.ModuleList(list(whole)[:count])
    try:
        yield
    finally:
        text.layers = whole


def lengths(most: int) -> list[int]:
    """Doubling lengths up to `most` positions, which is the last where it is less than LONGEST."""
    doubling = []
    length = SHORTEST
    while length <= min(most, LONGEST):
        doubling.append(length)
        length *= 2
    return doubling or [most]


def search(measure: Callable[[int], tuple[float, float]], candidates: Sequence[int]) -> dict[int, tuple[float, float]]:
    """What `measure` gives at the candidates from the shortest on, until sparse is faster twice in a row, memory runs out or
    SECONDS are over; then between the last slower and the first faster of them."""
    timings: dict[int, tuple[float, float]] = {}
    began = time.monotonic()
    faster = 0
    for length in candidates:
        if time.monotonic() - began > SECONDS:
            break
        try:
            timings[length] = measure(length)
        except (RuntimeError, MemoryError) as error:
            if not workspace.is_exhausted(error) or not timings:
                raise
            break
        dense, sparse = timings[length]
        faster = faster + 1 if sparse <= dense else 0
        if faster == 2:
            break
    first = first_faster(timings)
    slower = [length for length in timings if length < first]
    if first != NEVER and slower:
        between = (slower[-1] + first) // 2
        timings[between] = measure(between)
    return dict(sorted(timings.items()))


def first_faster(measured: dict[int, tuple[float, float]]) -> int:
    """The first of the lengths from which sparse is never slower than dense; NEVER where it is at the longest."""
    first = NEVER
    for length in sorted(measured, reverse=True):
        dense, sparse = measured[length]
        if sparse > dense:
            break
        first = length
    return first
