#!/usr/bin/env python3
"""Where does the time of a Qwen3.5 Gated DeltaNet layer go, before and after FastHybrid, and are its numbers the same?

    python scripts/profile_hybrid.py --sizes 0.8b,9b --lengths 32768,131072 --output runs/profile-hybrid

One layer of the true shape with random weights, a new cache every time, batch 1. Transformers' forward ("before": its own fast
paths where their packages are installed) and FastHybrid's run interleaved; stages are timed by events on the device, without
waiting in between. Floors are the bytes of a stage at the measured copy bandwidth and its FLOPs at the measured matmul rate.

First the numbers: outputs and states of both, in --dtype, against the layer in fp32 computed token by token. The run fails
where FastHybrid is further away than 1.1 times transformers. --tiles times other tile sizes of the kernels.
Prints tables, then one JSON line; writes report.json and report.md to --output.
"""

import argparse
import copy
import json
import os
import statistics
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

from npu_sparse import cann

with cann.required():
    import torch

from npu_sparse import FastHybrid
from npu_sparse.measure.clocks import stage_timer
from npu_sparse.measure.ttft.shapes import SIZES, qwen35
from npu_sparse.models.architectures import delta_net_modules, gated_mlp_modules, norm_modules
from npu_sparse.runs.machine import machine, machine_line
from npu_sparse.runs.page import markdown_table
from npu_sparse.runs.store import open_run, write_json, write_text
from npu_sparse.testing import rms_error

STAGES = ("gdn projections", "gdn convolution", "gdn gates", "gdn delta rule", "gdn norm", "gdn output")
CHUNK = 64  # tokens of a chunk of the delta rule
TILES = {
    "CONVOLUTION": [(16, 4), (32, 4), (64, 4), (64, 8), (128, 8)],
    "NORM": [(1024, 2), (2048, 4), (4096, 4), (4096, 8), (8192, 8)],
    "SWIGLU": [(1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8)],
}


def parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.8b,9b", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--lengths", default="32768,131072", help="tokens")
    parser.add_argument("--check", default=4133, type=int, help="tokens of the comparison of numbers")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--runs", default=5, type=int)
    parser.add_argument("--warmup", default=2, type=int)
    parser.add_argument("--tiles", action="store_true", help="also time other tile sizes of the kernels")
    parser.add_argument("--output", required=True, type=Path)
    return parser.parse_args(arguments)


def layer(args, size: str):
    """A model of one Gated DeltaNet layer in the shape of `size`, and that layer."""
    dtype = getattr(torch, args.dtype)
    kinds = {"num_hidden_layers": 1, "layer_types": ["linear_attention"], "vocab_size": 256}
    model = qwen35(size, dtype=dtype, device=args.device, **kinds)
    return model, delta_net_modules(model)[0]


def milliseconds(clock) -> dict[str, float]:
    return {name: 1e3 * took for name, took in clock.seconds.items()}


def run(module, hidden, pieces=()):
    """`(output, cache)` of one forward, or of one per piece where the sequence is cut at `pieces`."""
    from transformers import DynamicCache

    with torch.inference_mode():
        cache = DynamicCache(config=module.model_config)
        cuts = zip((0, *pieces), (*pieces, hidden.shape[1]))
        return torch.cat([module(hidden[:, start:stop], cache) for start, stop in cuts], 1), cache


def check(args, size: str) -> dict:
    """RMS errors of transformers' layer and of FastHybrid's against fp32, and between the two."""
    model, module = layer(args, size)
    wide = copy.deepcopy(model).float()
    exact_module = delta_net_modules(wide)[0]
    exact_module.model_config = module.model_config = model.config
    hidden = torch.randn(1, args.check, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    hidden = hidden.to(args.device, getattr(torch, args.dtype))
    with FastHybrid.attach(wide, impl="reference"):
        exact = run(exact_module, hidden.float())
    before = run(module, hidden)
    with FastHybrid.attach(model):
        after, pieces = run(module, hidden), run(module, hidden, (args.check // 3, args.check // 3 + 3))

    def parts(result):
        out, cache = result
        held = cache.layers[0]
        states = [states[0] if isinstance(states, dict) else states for states in (held.conv_states, held.recurrent_states)]
        return {"output": out, "convolution's state": states[0], "recurrent state": states[1]}

    errors = {}
    for name, whole in parts(exact).items():
        size_ = float(whole.double().square().mean().sqrt())
        kinds = {"before": before, "after": after, "after, in three pieces": pieces}
        errors[name] = {kind: rms_error(parts(result)[name], whole) / size_ for kind, result in kinds.items()}
        errors[name]["between"] = rms_error(parts(after)[name], parts(before)[name]) / size_
        floor = 1e-5 if args.dtype == "float32" else 0.0
        errors[name]["passed"] = max(errors[name][kind] for kind in kinds) <= max(1.1 * errors[name]["before"], floor)
    return errors


@contextmanager
def staged(module, clock):
    """Transformers' own forward with the same stages timed, as far as they are functions or modules of their own."""
    modelling = sys.modules[type(module).__module__]
    functions = {"causal_conv1d_fn": "gdn convolution", "torch_chunk_gated_delta_rule": "gdn delta rule"}
    modules = {
        "in_proj_qkv": "gdn projections", "in_proj_z": "gdn projections", "in_proj_b": "gdn projections",
        "in_proj_a": "gdn projections", "norm": "gdn norm", "out_proj": "gdn output",
    }  # fmt: skip

    def timed(function, stage):
        def call(*args, **kwargs):
            with clock(stage):
                return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name, stage in functions.items():
            if hasattr(modelling, name):
                stack.enter_context(mock.patch.object(modelling, name, timed(getattr(modelling, name), stage)))
        for name, stage in modules.items():
            part = getattr(module, name)
            stack.callback(delattr, part, "forward")
            part.forward = timed(part.forward, stage)
        yield


def measure(args, size: str, length: int) -> dict:
    """Milliseconds of the layer and of its stages, before and after, medians over interleaved runs; and of norms and MLP."""
    model, module = layer(args, size)
    module.model_config = model.config
    hidden = torch.randn(1, length, model.config.hidden_size, device=args.device, dtype=getattr(torch, args.dtype))
    totals, stages = {"before": [], "after": []}, {"before": [], "after": []}
    for round_ in range(-args.warmup, args.runs):
        for way in ("before", "after"):
            for staged_run in (False, True):
                clock = stage_timer(model.device)
                with ExitStack() as stack:
                    if way == "after":
                        stack.enter_context(FastHybrid.attach(model, stage=clock if staged_run else None))
                    elif staged_run:
                        stack.enter_context(staged(module, clock))
                    with clock("layer"):
                        run(module, hidden)
                measured = milliseconds(clock)
                if round_ >= 0:
                    if staged_run:
                        rest = measured["layer"] - sum(measured.get(name, 0.0) for name in STAGES)
                        stages[way].append({**{name: measured.get(name) for name in STAGES}, "rest": rest})
                    else:
                        totals[way].append(measured["layer"])
    return {
        "length": length,
        "layer_ms": {way: statistics.median(times) for way, times in totals.items()},
        "layer_all_ms": totals,
        "stages_ms": {way: median_of(records) for way, records in stages.items()},
        "others_ms": others(args, model, hidden),
    }


def median_of(records: list[dict]) -> dict:
    return {
        name: None if records[0][name] is None else statistics.median(one[name] for one in records) for name in records[0]
    }  # fmt: skip


def others(args, model, hidden) -> dict:
    """Milliseconds of one norm of hidden states and of one feed-forward, before and after."""
    norm, mlp = norm_modules(model)[0], gated_mlp_modules(model)[0]
    samples = {"norm": {"before": [], "after": []}, "feed-forward": {"before": [], "after": []}}
    with torch.inference_mode():
        for round_ in range(-args.warmup, args.runs):
            for way in ("before", "after"):
                with ExitStack() as stack:
                    if way == "after":
                        stack.enter_context(FastHybrid.attach(model))
                    clock = stage_timer(model.device)
                    with clock("norm"):
                        norm(hidden)
                    with clock("feed-forward"):
                        mlp(hidden)
                if round_ >= 0:
                    for name, took in milliseconds(clock).items():
                        samples[name][way].append(took)
    return {name: {way: statistics.median(times) for way, times in ways.items()} for name, ways in samples.items()}


def work(size: str, model_config, length: int) -> dict[str, dict[str, float]]:
    """FLOPs and bytes (two an element) that each stage of the fast layer cannot do without, as its kernels are cut."""
    c = model_config
    hidden, Hk, Hv = c.hidden_size, c.linear_num_key_heads, c.linear_num_value_heads
    K, V = Hk * c.linear_key_head_dim, Hv * c.linear_value_head_dim
    wide, gates = 2 * K + V, 2 * Hv
    w, h = Hv * c.linear_key_head_dim, Hv * c.linear_key_head_dim * c.linear_value_head_dim / CHUNK
    elements = {
        "gdn projections": 3 * hidden + wide + V + gates,
        "gdn convolution": 2 * wide,
        "gdn gates": gates + 3 * Hv,
        # its four kernels: (k -> A), (k, v, A -> w, u), (k, w, u -> h, u'), (q, k, u', h -> out)
        "gdn delta rule": (K + CHUNK * Hv) + (K + V + CHUNK * Hv + w + V) + (K + w + V + h + V) + (2 * K + V + h + V),
        "gdn norm": 3 * V,
        "gdn output": V + hidden,
    }
    flops = {"gdn projections": 2 * hidden * (wide + V + gates), "gdn output": 2 * V * hidden}
    return {name: {"bytes": 2 * n * length, "flops": flops.get(name, 0) * length} for name, n in elements.items()}


def roofline(args) -> dict:
    """Bytes/s of a copy and FLOP/s of a product in the run's dtype, measured."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    n, elements = (8192, 1 << 29) if device.type != "cpu" else (256, 1 << 20)
    a, flat = torch.randn(n, n, device=device, dtype=dtype), torch.empty(elements, device=device, dtype=torch.int16)
    into = torch.empty_like(flat)
    times = {"copy": [], "product": []}
    for _ in range(6):
        clock = stage_timer(device)
        with clock("copy"):
            into.copy_(flat)
        with clock("product"):
            a @ a
        for name, took in milliseconds(clock).items():
            times[name].append(took)
    copy_ms, product_ms = (statistics.median(times[name]) for name in ("copy", "product"))
    return {"bytes_per_s": 4e3 * elements / copy_ms, "flops_per_s": 2e3 * n**3 / product_ms}


def tiles(args, size: str, length: int) -> list[dict]:
    """Milliseconds of the kernels under other tiles, `(elements or tokens, warps)`; the shipped one is marked."""
    from npu_sparse.ops.hybrid import triton as kernels

    model, module = layer(args, size)
    module.model_config = model.config
    hidden = torch.randn(1, length, model.config.hidden_size, device=args.device, dtype=getattr(torch, args.dtype))
    mlp, norm, rows = gated_mlp_modules(model)[0], norm_modules(model)[0], []
    for name, choices in TILES.items():
        shipped = getattr(kernels, name)
        for tile in choices:
            times = []
            with mock.patch.object(kernels, name, tile), torch.inference_mode():
                for round_ in range(5):
                    clock = stage_timer(model.device)
                    with FastHybrid.attach(model, stage=clock):
                        if name == "SWIGLU":
                            gate, up = mlp.gate_proj(hidden), mlp.up_proj(hidden)
                            with clock("swiglu"):
                                kernels.swiglu(gate, up)
                        else:
                            run(module, hidden)
                            with clock("norm"):
                                norm(hidden)
                    if round_ > 1:
                        times.append(milliseconds(clock))
            shown = {"CONVOLUTION": ["gdn convolution"], "NORM": ["gdn norm", "norm"], "SWIGLU": ["swiglu"]}[name]
            ms = {stage: statistics.median(one[stage] for one in times) for stage in shown}
            rows.append({"kernel": name, "tile": list(tile), "shipped": tile == shipped, "ms": ms})
    return rows


def table(entry: dict, roof: dict) -> list[dict]:
    rows, before, after = [], entry["stages_ms"]["before"], entry["stages_ms"]["after"]
    for name in (*STAGES, "rest"):
        need = entry["work"].get(name, {"bytes": 0, "flops": 0})
        floor = 1e3 * max(need["bytes"] / roof["bytes_per_s"], need["flops"] / roof["flops_per_s"])
        rows.append({
            "stage": name.removeprefix("gdn "), "before (ms)": before[name], "after (ms)": after[name],
            "floor (ms)": floor or None, "GB": need["bytes"] / 1e9 or None, "TFLOP": need["flops"] / 1e12 or None,
        })  # fmt: skip
    layer_ms = entry["layer_ms"]
    return rows + [{
        "stage": "**the layer**", "before (ms)": layer_ms["before"], "after (ms)": layer_ms["after"],
        "floor (ms)": sum(row["floor (ms)"] or 0.0 for row in rows),
    }]  # fmt: skip


def markdown(result: dict) -> str:
    roof = result["roofline"]
    text = (
        f"# A Gated DeltaNet layer before and after FastHybrid\n\nMeasured on {machine_line(result['machine'])}; "
        f"{result['config']['dtype']}, batch 1, a new cache, medians of {result['config']['runs']} interleaved runs; random "
        f"weights. Copy {roof['bytes_per_s'] / 1e12:.2f} TB/s, matmul {roof['flops_per_s'] / 1e12:.0f} TFLOP/s. Before: "
        f"transformers {result['before']}.\n\n"
    )
    for size, measured in result["sizes"].items():
        text += f"## Qwen3.5-{size}: numbers\n\nRMS error relative to the fp32 layer, {result['config']['check']} tokens.\n\n"
        text += markdown_table([{"of": name, **errors} for name, errors in measured["errors"].items()])
        for entry in measured["timings"]:
            text += f"\n## Qwen3.5-{size}, {entry['length']} tokens\n\n" + markdown_table(table(entry, roof))
            others_ = [{"module": name, **ways} for name, ways in entry["others_ms"].items()]
            text += "\nOf the other modules (ms):\n\n" + markdown_table(others_)
        if measured["tiles"]:
            rows = [{**row, "tile": str(row["tile"]), "ms": str(row["ms"])} for row in measured["tiles"]]
            text += f"\n## Qwen3.5-{size}: tiles\n\n" + markdown_table(rows)
        text += "\n"
    return text


def before() -> str:
    """Which fast paths transformers' forward finds here."""
    import importlib.util

    import transformers

    def has(name):
        return "with" if importlib.util.find_spec(name) else "without"

    return f"{transformers.__version__} {has('fla')} flash-linear-attention, {has('causal_conv1d')} causal-conv1d"


def main(arguments=None) -> int:
    args = parse(arguments)
    sizes, lengths = args.sizes.split(","), [int(length) for length in args.lengths.split(",")]
    config = {key: value for key, value in vars(args).items() if key != "output"}
    directory = open_run(args.output, {"stage": "profile-hybrid", **config})
    result = {
        "config": config, "machine": machine(args.device), "before": before(), "roofline": roofline(args),
        "sizes": {},
    }  # fmt: skip
    for size in sizes:
        errors = check(args, size)
        timings = []
        for length in lengths:
            entry = measure(args, size, length)
            model, _ = layer(args, size)
            timings.append({**entry, "work": work(size, model.config, length)})
        swept = tiles(args, size, max(lengths)) if args.tiles else []
        result["sizes"][size] = {"errors": errors, "timings": timings, "tiles": swept}
    write_json(directory / "report.json", result)
    write_text(directory / "report.md", markdown(result))
    print((directory / "report.md").read_text())
    print(json.dumps(result))
    wrong = [f"{size} {name}" for size in sizes for name, e in result["sizes"][size]["errors"].items() if not e["passed"]]
    if wrong:
        print(f"error: FastHybrid must be as close to fp32 as transformers, and is not for {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError, ImportError) as error:
        if os.environ.get("NPU_SPARSE_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
