#!/usr/bin/env python3
"""How much of the host's time does a sparse layer take beside a dense one, and where does it go?

    python scripts/bench_host_time.py --device cuda --output runs/host-time
    python scripts/bench_host_time.py --device cuda --sparse k=1024,block=64 --sparse k=2048,block=16 --output runs/host-time

A device that is always busy hides the host, and one that waits shows nothing else: at short prompts the launches are the time.
The clock here never waits for the device. Before every decoder layer the device is emptied and then given something to do, so
that the layer is issued into a queue that is not empty and far from full; the time to issue it is the host's alone. The parts of
a sparse layer are timed within the same forward. Dense (each implementation in --dense) and sparse (each budget in --sparse) run
in one process, every round in a new order. On the CPU the same clock holds the arithmetic too.

One more forward a variant counts, under the profiler: operators that PyTorch dispatched, kernels that the device ran, and with
--functions the Python functions that took longest. On CUDA every wait for the device is named with the line that waited. Then
the time to first token of the same variants at --lengths, which is a run of `npu-sparse ttft` in ttft/; with --graphs also that
of a prefill that a CUDA graph recorded, which takes the host next to nothing.

The model has the shape of Qwen2.5-0.5B (--shape) and random weights, unless --model names a checkpoint: times are those of a
real one, quality is not. A part that is finished is in records/ and is not measured again.
Prints tables, then one JSON line; writes report.json and report.md to --output.
"""

import argparse
import cProfile
import json
import os
import pstats
import random
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from npu_sparse import cann

with cann.required():
    import torch

from npu_sparse import Budget, Indexer, SparsePrefill, checkpoints
from npu_sparse.measure.clocks import HostTimer, layers_issued, synchronize
from npu_sparse.measure.ttft import TtftConfig, run_ttft, time_to_first_token
from npu_sparse.measure.ttft import baselines as dense
from npu_sparse.measure.ttft.shapes import QWEN2_SIZES, qwen2
from npu_sparse.models.architectures import attention_modules, decoder
from npu_sparse.runs import stats
from npu_sparse.runs.machine import machine, machine_line
from npu_sparse.runs.page import markdown_table, say
from npu_sparse.runs.store import Cells, open_run, read_json, write_json, write_text

STAGES = ("projection", "scoring", "top-k", "attention", "exact")
DEFAULT = ["k=2048,block=64,reduce=softmax_max,exact_last=128", "k=1024,block=64"]


def parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=QWEN2_SIZES, default="0.5b", help="of the random weights (tiny: to try the script)")
    parser.add_argument("--model", help="a real checkpoint in place of random weights")
    parser.add_argument("--adapter", help="directory of an indexer; without it an untrained one with partition heads")
    parser.add_argument("--device", default="cuda", help="cuda, npu or cpu, with an index if you like")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--length", default=8192, type=int, help="tokens of the prompt whose layers are timed")
    parser.add_argument("--lengths", default="4096,8192,16384,32768", help="prompts for the time to first token; none to skip it")
    parser.add_argument("--dense", help="fa2, cudnn, fa3 (CUDA), or transformers' names (default: sdpa and, where it is, fa3)")
    parser.add_argument("--sparse", action="append", help=f"a budget; may be repeated (default: {' and '.join(DEFAULT)})")
    parser.add_argument("--functions", default=0, type=int, help="also list this many Python functions, by their own time")
    parser.add_argument("--graphs", action="store_true", help="also time prefills recorded as CUDA graphs, at --lengths")
    parser.add_argument("--runs", default=10, type=int)
    parser.add_argument("--warmup", default=3, type=int)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args(arguments)
    if args.graphs and not args.device.startswith("cuda"):
        raise ValueError(f"--graphs must have a CUDA device, got --device {args.device}")
    installed = dense.available(("fa3",)) if args.device.startswith("cuda") else []
    args.dense = (args.dense or ",".join(["sdpa", *installed])).split(",")
    args.sparse = args.sparse or DEFAULT
    args.lengths = [] if args.lengths == "none" else [int(part) for part in args.lengths.split(",")]
    return args


def variants(args) -> dict[str, dict]:
    """Every way to run the prefill, by name; sparse ones keep the first dense implementation for what is dense in them."""
    named = {f"dense {name}": {"native": name, "budget": None} for name in args.dense}
    return named | {f"sparse {text}": {"native": args.dense[0], "budget": Budget.parse(text)} for text in args.sparse}


def build(args):
    """`(model, indexer)` on the device; every dense implementation is registered, or refused by name."""
    for name in args.dense:
        dense.register(name)
    if args.model:
        model, _ = checkpoints.load(args.model, dtype=args.dtype, device=args.device)
    else:
        model = qwen2(args.shape, dtype=getattr(torch, args.dtype), device=args.device, seed=args.seed)
    if args.adapter:
        return model, Indexer.from_pretrained(args.adapter)
    return model, Indexer.for_model(model, partition=True, seed=args.seed)


@contextmanager
def attached(model, indexer, variant: dict, stage=None):
    model.set_attn_implementation(variant["native"])
    with ExitStack() as stack:
        if variant["budget"] is not None:
            stack.enter_context(SparsePrefill.attach(model, indexer, variant["budget"], stage=stage))
        yield


def ttft_config(args) -> TtftConfig:
    """The run of `npu-sparse ttft` that times the same prefills to the first token."""
    return TtftConfig(
        model=args.model or "", shape=None if args.model else f"qwen2.5-{args.shape}", adapter=args.adapter, prompt="random",
        lengths=tuple(args.lengths), variants=("dense", *sparse_names(args)), baselines=tuple(args.dense), runs=args.runs,
        warmup=args.warmup, stage_runs=1, seed=args.seed, dtype=args.dtype, device=args.device,
    )  # fmt: skip


def sparse_names(args) -> dict[str, str]:
    """`{variant of `npu-sparse ttft`: its name here}`."""
    return {f"indexer-shared:{text}": f"sparse {text}" for text in args.sparse}


def interleaved(args, ways: dict) -> list[tuple[bool, str]]:
    """`(counted, variant)` of every forward: each round in a new order, the first rounds to warm up."""
    shuffled, order = random.Random(args.seed), []
    for round_ in range(-args.warmup, args.runs):
        order += [(round_ >= 0, name) for name in shuffled.sample(list(ways), len(ways))]
    return order


def prompt(args, model, length: int):
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randint(model.config.get_text_config().vocab_size, (1, length), generator=generator)


def measure_host(args, model, indexer) -> dict:
    """Host time of every full-attention layer and of its parts, s, by variant; then what one forward dispatches."""
    ids, ways, device = prompt(args, model, args.length), variants(args), model.device
    full = {decoder(model).layers[layer]: layer for layer in attention_modules(model)}
    layers = {name: [] for name in ways}  # [run][layer]
    parts = {name: [] for name in ways}
    for counted, name in interleaved(args, ways):
        timer = HostTimer()
        with attached(model, indexer, ways[name], timer), layers_issued(list(full), device) as issued:
            time_to_first_token(model, ids)
        if counted:
            layers[name].append(issued)
            parts[name].append({stage: took / len(full) for stage, took in timer.seconds.items()})
    results = {name: {"layers_s": layers[name], "stages_s": parts[name]} for name in ways}
    for name in ways:
        results[name] |= count(args, model, indexer, ways[name], ids, len(full))
    return {"length": args.length, "layers": len(full), "variants": results, "machine": machine(args.device)}


def count(args, model, indexer, variant: dict, ids, layers: int) -> dict:
    """What one forward of the decoder makes PyTorch and the device do."""
    counts: dict = {"waits": waits(model, indexer, variant, ids) if model.device.type == "cuda" else None}
    activities = [torch.profiler.ProfilerActivity.CPU]
    if model.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with attached(model, indexer, variant):
        with torch.profiler.profile(activities=activities) as profile:
            time_to_first_token(model, ids)
        events = profile.events()
        counts["operators"] = sum(event.name.startswith(("aten::", "npu_sparse::")) for event in events) / layers
        on_device = torch.autograd.DeviceType.CUDA
        names: dict[str, int] = {}
        for event in events:
            if event.device_type == on_device:
                names[event.name[:80]] = names.get(event.name[:80], 0) + 1
        counts["kernels"] = sum(names.values()) / layers if names else None
        counts["kernels_by_name"] = dict(sorted(names.items(), key=lambda item: -item[1])[:40])
        if args.functions:
            counts["functions"] = functions(args, model, ids, layers)
    return counts


def functions(args, model, ids, layers: int) -> list[dict]:
    """Python functions of one forward by their own time a layer, in microseconds; the profiler makes all of them slower."""
    profile = cProfile.Profile()
    time_to_first_token(model, ids)
    profile.enable()
    time_to_first_token(model, ids)
    profile.disable()
    rows = []
    for (file, line, name), (_, calls, own, total, _) in pstats.Stats(profile).stats.items():
        where = "/".join(Path(file).parts[-2:])
        rows.append({
            "function": f"{where}:{line} {name}"[:100], "calls": calls / layers, "own_us": 1e6 * own / layers,
            "total_us": 1e6 * total / layers,
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["own_us"])[: args.functions]


def waits(model, indexer, variant: dict, ids) -> list[str]:
    """The lines of a forward on CUDA, without the copies of the prompt and of the answer, that wait for the device."""
    ids = ids.to(model.device)
    mode = torch.cuda.get_sync_debug_mode()
    with attached(model, indexer, variant), warnings.catch_warnings(record=True) as caught, torch.inference_mode():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model(ids, use_cache=True, logits_to_keep=1)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    lines = [f"{'/'.join(Path(one.filename).parts[-2:])}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]
    return [line for line in lines if not line.startswith("cuda/__init__.py")]  # the warning that this mode is a beta feature


def measure_graphs(args, model, indexer, length: int) -> dict:
    ids = prompt(args, model, length)
    return {"seconds": {name: replayed(args, model, indexer, one, ids) for name, one in variants(args).items()}}


def replayed(args, model, indexer, variant: dict, ids) -> list[float]:
    """Seconds from a prompt on the host to its first token, of a prefill that is recorded once and replayed."""
    placed = ids.to(model.device)

    def prefill():
        return model(placed, use_cache=True, logits_to_keep=1).logits[0, -1].argmax()

    with attached(model, indexer, variant), torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what compiles or allocates does so before the graph is recorded
            for _ in range(2):
                prefill()
        torch.cuda.current_stream().wait_stream(stream)
        graph, seconds = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            token = prefill()
        for round_ in range(-args.warmup, args.runs):
            synchronize(model.device)
            started = time.perf_counter()
            placed.copy_(ids)
            graph.replay()
            int(token)  # waits for the device
            if round_ >= 0:
                seconds.append(time.perf_counter() - started)
    return seconds


def tabulate(args, host: dict, ttft: list[dict], graphs: dict[int, dict]) -> dict:
    rows, base = [], None
    for name, one in host["variants"].items():
        per_layer = [stats.summary(run)["median"] for run in one["layers_s"]]
        median = stats.summary(per_layer)["median"]
        dense_like = name.startswith("dense")
        base = median if dense_like and (base is None or median < base) else base
        row = {
            "variant": name, "layer_us": 1e6 * median, "iqr_us": 1e6 * stats.summary(per_layer)["iqr"],
            "added_us": None if dense_like else 1e6 * (median - base), "operators": one["operators"], "kernels": one["kernels"],
            "waits": None if one["waits"] is None else len(one["waits"]),
        }  # fmt: skip
        for stage in STAGES:
            times = [run[stage] for run in one["stages_s"] if stage in run]
            row[f"{stage}_us"] = 1e6 * stats.summary(times)["median"] if times else None
        rows.append(row)
    first, names = [], sparse_names(args)
    for timing in ttft:
        name = names.get(timing["variant"], timing["variant"])
        over = timing["over_best_dense"]["value"]
        row = {"length": timing["length"], "variant": name, "ttft_ms": 1e3 * timing["ttft_s"]["median"], "over_dense": over}
        if times := graphs.get(timing["length"], {}).get(name):
            row["graph_ms"] = 1e3 * stats.summary(times)["median"]
        first.append(row)
    return {"rows": rows, "ttft": first}


def markdown(result: dict, host: dict) -> str:
    columns = {
        "variant": "variant", "layer_us": "layer (us)", "iqr_us": "IQR", "added_us": "beside dense", "operators": "operators",
        "kernels": "kernels", "waits": "waits (a forward)", **{f"{stage}_us": f"{stage} (us)" for stage in STAGES},
    }  # fmt: skip
    page = f"# Host time of a layer\n\n{host['length']} tokens, {host['layers']} layers; operators and kernels a layer.\n\n"
    page += markdown_table(result["rows"], columns)
    for name, one in host["variants"].items():
        if one["waits"]:
            page += f"\n{name} waits at {', '.join(one['waits'])}.\n"
        if one.get("functions"):
            page += f"\n## {name}: Python by its own time, a layer, under the profiler\n\n" + markdown_table(one["functions"])
    if result["ttft"]:
        page += "\n## Time to first token\n\n" + markdown_table(result["ttft"])
    return page + f"\nMeasured on {machine_line(host['machine'])}.\n"


def main(arguments=None) -> int:
    args = parse(arguments)
    variants(args)  # what cannot be understood is refused before anything is loaded
    config = {key: value for key, value in vars(args).items() if key != "output"}
    directory = open_run(args.output, {"stage": "host-time", **config})
    built = cache(lambda: build(args))
    graphs = {f"graphs-{length}": length for length in args.lengths} if args.graphs else {}
    cells = Cells(directory / "records", {"host": {"length": args.length}} | {name: {"length": n} for name, n in graphs.items()})

    def measure(part: str) -> dict:
        started = time.monotonic()
        measured = measure_host(args, *built()) if part == "host" else measure_graphs(args, *built(), graphs[part])
        say(f"{part}: {time.monotonic() - started:.1f} s")
        return measured

    cells.compute(measure)
    host, ttft = cells.read("host"), {"rows": []}
    if args.lengths:
        timed = directory / "ttft" / "report.json"
        if not timed.exists():
            model, indexer = built()
            run_ttft(ttft_config(args), directory / "ttft", model=model, indexer=indexer)
        ttft = read_json(timed, dict)
    recorded = {length: cells.read(name)["seconds"] for name, length in graphs.items()}
    result = {"config": config, "machine": host["machine"], **tabulate(args, host, ttft["rows"], recorded)}
    write_json(directory / "report.json", result)
    write_text(directory / "report.md", markdown(result, host))
    print((directory / "report.md").read_text())
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError, ImportError) as error:
        if os.environ.get("NPU_SPARSE_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
