#!/usr/bin/env python3
"""How long until Qwen3.5's first token, dense against sparse, on one GPU, one Ascend card or this CPU?

    python scripts/ttft_qwen35.py --device cuda --size 0.8b --dense fa2,cudnn,fa3 --sparse 2048:64,2048:16 --output runs/ttft-0.8b
    python scripts/ttft_qwen35.py --device npu --size 0.8b --lengths 32768,65536,131072 --output runs/ttft-0.8b

The model has Qwen3.5's true shape and, without --model, random weights: times are those of the real checkpoint, quality is
not, and every row says so (evidence "untrained" where no adapter is given). Dense attention (each implementation in --dense)
and sparse prefill (each budget in --sparse) run interleaved in one process, in a new order every round, with the same other
layers: --hybrid fast attaches FastHybrid to dense and sparse alike, stock leaves transformers' own, and both may be named.

A length that is finished is in records/ and is not measured again: --budget-s stops after a length where the next one would not
fit in that time, with exit status 3, and the same command goes on. A variant that runs out of memory is named in the report and
the others go on.
--chunk 4096 feeds the prompt in pieces. --crossover adds to a file the lengths from which sparse is faster than the fastest
dense, which is where Budget(dense_below="auto") looks.

Prints a table, then one JSON line; writes report.json, report.md and report.png to --output.
"""

import argparse
import gc
import importlib.util
import json
import os
import random
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from npu_sparse import Budget, FastHybrid, Indexer, SparsePrefill, checkpoints
from npu_sparse.measure.clocks import (
    amdahl_ceiling,
    dense_attention_timed,
    modules_timed,
    peak_memory_bytes,
    reset_peak_memory,
    stage_timer,
)
from npu_sparse.measure.ttft import baselines as dense
from npu_sparse.measure.ttft import time_to_first_token
from npu_sparse.measure.ttft.shapes import SIZES, qwen35
from npu_sparse.models import crossover
from npu_sparse.models.architectures import delta_net_modules, describe, gated_mlp_modules, norm_modules
from npu_sparse.runs import stats
from npu_sparse.runs.figures import new_figure, write_figure
from npu_sparse.runs.machine import machine, machine_line
from npu_sparse.runs.page import markdown_table, say
from npu_sparse.runs.store import open_run, write_json, write_text

STARTED = time.monotonic()
UNFINISHED = 3  # exit status where --budget-s left lengths out
# on an NPU "flash_attention_2" is torch_npu's fused attention
DENSE = {"npu": "flash_attention_2,sdpa", "cpu": "sdpa"}
HYBRID = {"cuda": "fast"}
STAGES = ("projection", "scoring", "top-k", "attention", "exact", "gdn", "feed-forward", "norms", "rest")
COLOURS = ("#f0e442", "#e69f00", "#d55e00", "#0072b2", "#009e73", "#56b4e9", "#cc79a7", "#cccccc")


def parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.8b", help="shape of the random weights (tiny: to try the script)")
    parser.add_argument("--model", help="a real checkpoint in place of random weights")
    parser.add_argument("--adapter", help="directory of a distilled indexer; without it the indexer is untrained")
    parser.add_argument("--device", default="npu", help="cuda, npu or cpu, with an index if you like")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--lengths", default="32768,65536,131072,262144", type=numbers, help="prompt lengths in tokens")
    parser.add_argument(
        "--dense",
        help="fa2, cudnn, fa3 (CUDA), or transformers' names (default: cuda all that are installed; npu flash_attention_2,sdpa)",
    )
    parser.add_argument(
        "--sparse", default="1024:64",
        help="budgets, separated by commas: k:b_sel and any field of Budget, as in 2048:16:reduce=mean:share_layers=2",
    )  # fmt: skip
    parser.add_argument("--hybrid", help="fast, stock or fast,stock: the other layers (default: fast on cuda, else stock)")
    parser.add_argument("--heads", default=1, type=int, help="index heads of an untrained indexer")
    parser.add_argument("--dim", default=128, type=int, help="d_idx of an untrained indexer")
    parser.add_argument("--impl", default="auto", choices=["auto", "reference", "kernel"], help="which operators run")
    parser.add_argument("--chunk", default=0, type=int, help="tokens per forward; 0 = the whole prompt at once")
    parser.add_argument("--runs", default="10", help="rounds; or by length, from each on: 4096=10,131072=5,262144=3")
    parser.add_argument("--warmup", default="2", help="rounds that are not reported, given like --runs")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--budget-s", type=float, help="seconds; stops after a length where the next would end later")
    parser.add_argument("--profile", help="directory for a chrome trace of one prefill per variant and length")
    parser.add_argument("--crossover", type=Path, help="a file of measured lengths for dense_below='auto' to add to")
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args(arguments)
    kind = args.device.partition(":")[0]
    args.dense = args.dense or (",".join(dense.available()) if kind == "cuda" else DENSE.get(kind, "sdpa"))
    args.hybrid = args.hybrid or HYBRID.get(kind, "stock")
    return args


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def by_length(text: str, length: int) -> int:
    """The number that "3" or "4096=10,131072=3" gives a length: that of the last start up to it."""
    if "=" not in text:
        return int(text)
    steps = sorted(tuple(int(number) for number in part.split("=")) for part in text.split(","))
    return next((number for start, number in reversed(steps) if start <= length), steps[0][1])


def budgets(text: str) -> dict[str, Budget]:
    """Named budgets of "k:b_sel[:field=value...]", several separated by commas."""
    found = {}
    for part in text.split(","):
        k, block, *fields = part.split(":")
        pairs = dict(field.split("=", 1) for field in fields)
        changes = {name: int(value) if value.isdigit() else value for name, value in pairs.items()}
        if unknown := set(changes) - set(Budget.__dataclass_fields__):
            raise ValueError(f"--sparse must name fields of Budget, got {', '.join(sorted(unknown))}")
        name = f"sparse k {k}, b_sel {block}" + "".join(f", {field} {value}" for field, value in pairs.items())
        found[name] = Budget(**{"k": int(k), "block": int(block), **changes})
    return found


def variants(args) -> dict[str, dict]:
    """Every way to run the prefill, by name: an implementation of dense attention, or a budget over the first of them."""
    natives, layers = args.dense.split(","), args.hybrid.split(",")
    for kind in layers:
        if kind not in ("fast", "stock"):
            raise ValueError(f"--hybrid must be fast, stock or both, got {kind!r}")
    found = {}
    for kind in layers:
        named = f" ({kind} layers)" if len(layers) > 1 else ""
        for native in natives:
            found[f"dense {native}{named}"] = {"native": native, "budget": None, "layers": kind}
        for name, budget in budgets(args.sparse).items():
            found[name + named] = {"native": natives[0], "budget": budget, "layers": kind}
    return found


def build(args):
    """`(model, indexer, evidence)` on the device; every dense implementation is registered, or refused by name."""
    if args.device.startswith("npu"):
        try:
            import torch_npu  # noqa: F401  - registers the device where it is not loaded by itself
        except ImportError as error:
            raise RuntimeError(f"device {args.device!r} must have torch_npu and CANN ({error}): see docs/ascend.md") from error
    for name in args.dense.split(","):
        dense.register(name)
    if args.model:
        model, _ = checkpoints.load(args.model, dtype=args.dtype, device=args.device)
    else:
        model = qwen35(args.size, dtype=getattr(torch, args.dtype), device=args.device, seed=args.seed)
    if args.adapter:
        return model, Indexer.from_pretrained(args.adapter), "distilled"
    return model, Indexer.for_model(model, heads=args.heads, dim=args.dim, seed=args.seed), "untrained"


@contextmanager
def attached(args, model, indexer, variant: dict, stage=None):
    """The model running one variant; with `stage`, the time of its parts is taken."""
    model.set_attn_implementation(variant["native"])
    with ExitStack() as stack:
        if variant["layers"] == "fast":
            stack.enter_context(FastHybrid.attach(model))
        if stage is not None:
            mlps, norms = gated_mlp_modules(model), norm_modules(model)
            parts = {"gdn": delta_net_modules(model).values(), "feed-forward": mlps, "norms": norms}
            stack.enter_context(modules_timed(parts, stage))
        if variant["budget"] is not None:
            stack.enter_context(SparsePrefill.attach(model, indexer, variant["budget"], impl=args.impl, stage=stage))
        elif stage is not None:
            stack.enter_context(dense_attention_timed(model, stage))
        yield


def first_token(args, model, indexer, variant: dict, ids, stage=None) -> tuple[float, int | None]:
    """`(seconds, peak bytes)` of one prefill. Where memory runs out it is tried again with the allocator's blocks returned."""

    def once():
        gc.collect()  # caches of earlier prefills hold each other
        with attached(args, model, indexer, variant, stage):
            reset_peak_memory(model.device)
            return time_to_first_token(model, ids, args.chunk)[0], peak_memory_bytes(model.device)

    try:
        return once()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    release(model.device)
    once()  # allocates anew, which is no time to report
    return once()


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


def measure(args, model, indexer, evidence: str, length: int) -> dict:
    began = time.monotonic()
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(args.seed))
    ways, orders = variants(args), []
    seconds, peaks, stages, refused = {name: [] for name in ways}, {}, {}, {}
    shuffled = random.Random(args.seed)

    def attempt(name, stage=None):
        try:
            return first_token(args, model, indexer, ways[name], ids, stage)
        except (RuntimeError, ValueError, TypeError) as error:
            kind = "out of memory" if out_of_memory(error) else type(error).__name__
            refused[name] = f"{kind} at {length} tokens: {str(error).splitlines()[0]}"
            del seconds[name]
            say(f"{name} is left out: {refused[name]}")
        release(model.device)
        return None

    for round_ in range(-by_length(args.warmup, length), by_length(args.runs, length)):
        order = shuffled.sample(list(seconds), len(seconds))  # without those that were left out
        for name in order:
            found = attempt(name)
            if found is not None and round_ >= 0:
                seconds[name].append(found[0])
                peaks[name] = max(filter(None, (found[1], peaks.get(name))), default=None)
        if round_ >= 0:
            orders.append(order)
    for name in list(seconds):
        timer = stage_timer(model.device)
        if (found := attempt(name, timer)) is not None:
            stages[name] = {**timer.seconds, "total": found[0]}
            if args.profile:
                profile(args, model, indexer, ways[name], ids, Path(args.profile) / f"{length}-{name.replace(' ', '-')}.json")
    medians = {name: stats.summary(times)["median"] for name, times in seconds.items()}
    say(f"{length} tokens: " + ", ".join(f"{name} {took:.4g} s" for name, took in medians.items()))
    return {
        "length": length, "seconds": seconds, "orders": orders, "peak_bytes": peaks, "stages": stages, "refused": refused,
        "machine": machine(args.device), "device_name": crossover.device_name(model.device),
        "evidence": {name: "dense" if way["budget"] is None else evidence for name, way in ways.items()},
        "layers": {name: way["layers"] for name, way in ways.items()},
        "linear_attention": "flash-linear-attention" if importlib.util.find_spec("fla") else "transformers' torch fallback",
        "weights": args.model or f"random, Qwen3.5-{args.size} shape", "geometry": describe(model.config).to_dict(),
        "load_average": os.getloadavg()[0], "took_s": time.monotonic() - began,
    }  # fmt: skip


def profile(args, model, indexer, way, ids, path: Path) -> None:
    """One prefill under the device's profiler, as a chrome trace."""
    if model.device.type == "npu":
        import torch_npu.profiler as profiler
    else:
        import torch.profiler as profiler
    path.parent.mkdir(parents=True, exist_ok=True)
    with attached(args, model, indexer, way), profiler.profile() as found:
        time_to_first_token(model, ids, args.chunk)
    found.export_chrome_trace(str(path))


def fits(args, paths: dict[int, Path], length: int) -> bool:
    """Whether a length is likely to end within --budget-s, judged by the last one finished; the first is always tried."""
    done = [json.loads(path.read_text()) for path in paths.values() if path.exists()]
    if args.budget_s is None or not done:
        return True
    last = min(done, key=lambda record: abs(record["length"] - length))
    rounds = [by_length(args.runs, n) + by_length(args.warmup, n) + 1 for n in (length, last["length"])]
    expected = last["took_s"] * (length / last["length"]) ** 1.7 * rounds[0] / rounds[1]
    return time.monotonic() - STARTED + expected <= args.budget_s


def tabulate(args, records: list[dict]) -> list[dict]:
    rows = []
    for record in records:
        medians = {name: stats.summary(times)["median"] for name, times in record["seconds"].items()}
        for name, times in record["seconds"].items():
            layers, spread, peak = record["layers"][name], stats.summary(times), record["peak_bytes"].get(name)
            peers = {n for n in medians if record["evidence"][n] == "dense" and record["layers"][n] == layers}
            best = min(peers, key=medians.get, default=None)
            over = {
                other: stats.ratio_of_medians(record["seconds"][other], times, seed=args.seed).to_dict()
                for other in medians if other in peers and len(record["seconds"][other]) == len(times)
            }  # fmt: skip
            stage = record["stages"].get(name)
            row = {
                "length": record["length"], "variant": name, "evidence": record["evidence"][name], "layers": layers,
                "ttft_s": spread["median"], "q1_s": spread["q1"], "q3_s": spread["q3"], "over": over,
                "over_best_dense": over.get(best), "peak_bytes": peak, "stages_s": stage and with_rest(stage),
            }  # fmt: skip
            if peak and best and record["peak_bytes"].get(best):
                row["peak_over_best_dense"] = peak / record["peak_bytes"][best]
            if record["evidence"][name] == "dense" and stage:
                row["amdahl_ceiling"] = amdahl_ceiling(stage["total"], stage["attention"])
            rows.append(row)
    return rows


def with_rest(stage: dict) -> dict:
    """The stages and "rest", which add up to "total"."""
    return {**stage, "rest": stage["total"] - sum(took for name, took in stage.items() if name != "total")}


def crossovers(args, records: list[dict]) -> list[dict]:
    """From which of the finished lengths on each plain budget is faster than the fastest dense, as crossover.json keeps it."""
    kinds = args.hybrid.split(",")
    kind = "fast" if "fast" in kinds else kinds[0]
    found = []
    for name, way in variants(args).items():
        budget = way["budget"]
        if budget is None or way["layers"] != kind or budget != Budget(k=budget.k, block=budget.block):
            continue
        dense_s, sparse_s, fastest = {}, {}, None
        for record in sorted(records, key=lambda record: record["length"]):
            medians = {n: stats.summary(times)["median"] for n, times in record["seconds"].items() if record["layers"][n] == kind}
            others = {n: took for n, took in medians.items() if record["evidence"][n] == "dense"}
            if name in medians and others:
                fastest = min(others, key=others.get)
                dense_s[record["length"]], sparse_s[record["length"]] = others[fastest], medians[name]
        if dense_s:
            first, geometry = records[0], records[0]["geometry"]
            found.append({
                "device": first["device_name"], **{key: geometry[key] for key in ("query_heads", "kv_heads", "head_dim")},
                "k": budget.k, "block": budget.block, "dense_below": crossover.first_faster(dense_s, sparse_s),
                "lengths": sorted(dense_s), "dense": fastest.split()[1], "layers": kind, "weights": first["weights"],
                "evidence": first["evidence"][name], "commit": first["machine"]["commit"], "source": args.output.name,
            })  # fmt: skip
    return found


def markdown(result: dict) -> str:
    table, stages = [], []
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["over"]))
    for row in result["rows"]:
        peak = row["peak_bytes"]
        over = {f"over {name.removeprefix('dense ')}": ratio(row["over"].get(name)) for name in names}
        table.append({
            "tokens": row["length"], "prefill": row["variant"], "evidence": row["evidence"],
            "TTFT median (s)": row["ttft_s"], "quartiles (s)": f"{row['q1_s']:.4g} - {row['q3_s']:.4g}", **over,
            "ceiling": row.get("amdahl_ceiling"), "peak (MiB)": None if peak is None else f"{peak / 2**20:.0f}",
            "peak / dense": row.get("peak_over_best_dense"),
        })  # fmt: skip
        if row["stages_s"]:
            shown = {f"{name} (s)": row["stages_s"].get(name) for name in (*STAGES, "total")}
            stages.append({"tokens": row["length"], "prefill": row["variant"], **shown})
    config = result["config"]
    text = (
        f"# Qwen3.5 time to first token\n\n{result['weights']}; linear attention: {result['linear_attention']}; other layers: "
        f"{config['hybrid']}; measured on {machine_line(result['machines'][0])}; batch 1, {config['dtype']}, random "
        f"prompt, {fed(config)}, {config['runs']} interleaved rounds. Speed-ups "
        "are ratios of medians with 95% paired bootstrap intervals, over dense with the same other layers. The "
        "ceiling is the speed-up over that row of attention that costs nothing.\n\n" + markdown_table(table)
    )
    if stages:
        text += "\n## Where the time goes\n\nOne run of each with clocks. rest: projections and rotary embedding of the "
        text += "attention layers, residuals, embedding, head.\n\n" + markdown_table(stages)
    if result["refused"]:
        text += "\n## Left out\n\n" + "".join(f"- {name}: {reason}\n" for name, reason in result["refused"])
    if result["crossovers"]:
        shown = ("k", "block", "dense", "lengths", "dense_below")
        rows = [{key: one[key] for key in shown} for one in result["crossovers"]]
        text += "\n## From which length on sparse is faster\n\nThan the fastest dense, of the lengths measured "
        text += f"({crossover.NEVER}: of none).\n\n" + markdown_table(rows)
    if result["missing"]:
        text += f"\nNot measured yet: {', '.join(map(str, result['missing']))} tokens.\n"
    return text + "\nAn untrained indexer says how fast the runtime is and nothing about quality.\n"


def fed(config: dict) -> str:
    return f"chunks of {config['chunk']}" if config["chunk"] else "the whole prompt at once"


def ratio(found: dict | None) -> str | None:
    return None if found is None else f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def figure(result: dict):
    from matplotlib.ticker import LogLocator

    rows = result["rows"]
    names, lengths = (list(dict.fromkeys(row[key] for row in rows)) for key in ("variant", "length"))
    longest = [row for row in rows if row["length"] == max(lengths) and row["stages_s"]]
    drawn, axes = new_figure(columns=2, width=6.4, height=max(3.8, 1.6 + 0.3 * len(longest)))
    left, right = axes[0]
    for name in names:
        own = [row for row in rows if row["variant"] == name]
        errors = [[row["ttft_s"] - row["q1_s"] for row in own], [row["q3_s"] - row["ttft_s"] for row in own]]
        style = "--" if own[0]["evidence"] == "dense" else "-"
        left.errorbar(
            [row["length"] for row in own], [row["ttft_s"] for row in own], yerr=errors, marker="o", markersize=4, capsize=2,
            linewidth=1.2, linestyle=style, label=f"{name} ({own[0]['evidence']})" if style == "-" else name,
        )  # fmt: skip
    if len(lengths) > 1:
        left.set_xscale("log", base=2)
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        left.yaxis.set_major_formatter("{x:g}")
    left.set_xticks(lengths, [f"{length // 1024}K" if length % 1024 == 0 else str(length) for length in lengths])
    left.minorticks_off()
    left.set_xlabel("prompt (tokens)")
    left.set_ylabel("TTFT (s), median and quartiles")
    left.set_title("How long until the first token?", fontsize=10, loc="left")
    left.legend(fontsize=7.5, frameon=False)
    start = [0.0] * len(longest)
    for stage, colour in zip(STAGES, COLOURS):
        width = [max(0.0, row["stages_s"].get(stage, 0.0)) for row in longest]
        right.barh(range(len(longest)), width, left=start, height=0.7, color=colour, label=stage)
        start = [a + b for a, b in zip(start, width)]
    right.set_yticks(range(len(longest)), [row["variant"] for row in longest], fontsize=7.5)
    right.invert_yaxis()
    right.grid(False, axis="y")
    right.set_xlabel(f"time at {max(lengths)} tokens (s), one run with clocks")
    right.set_title("Where does it go?", fontsize=10, loc="left")
    right.legend(fontsize=7.5, frameon=False, ncols=4, loc="upper left", bbox_to_anchor=(-0.02, -0.16))
    config = result["config"]
    drawn.suptitle(
        f"{result['weights']}; batch 1, {config['dtype']}, {fed(config)}, other "
        f"layers {config['hybrid']}\nmeasured: {machine_line(result['machines'][0])}",
        fontsize=8, x=0.01, ha="left",
    )  # fmt: skip
    return drawn


def main(arguments=None) -> int:
    args = parse(arguments)
    variants(args)  # what cannot be understood is refused before anything is loaded
    aside = ("output", "profile", "budget_s", "crossover")
    config = {key: value for key, value in vars(args).items() if key not in aside}
    directory = open_run(args.output, {"stage": "ttft-qwen35", **config})
    (directory / "records").mkdir(exist_ok=True)
    paths = {length: directory / "records" / f"{length}.json" for length in args.lengths}
    if todo := [length for length in args.lengths if not paths[length].exists()]:
        model, indexer, evidence = build(args)
        for length in todo:
            if not fits(args, paths, length):
                break
            write_json(paths[length], measure(args, model, indexer, evidence, length))
    records = [json.loads(path.read_text()) for path in paths.values() if path.exists()]
    result = {
        "config": config, "rows": tabulate(args, records), "machines": [record["machine"] for record in records],
        "weights": records[0]["weights"], "linear_attention": records[0]["linear_attention"],
        "refused": [(name, reason) for record in records for name, reason in record["refused"].items()],
        "crossovers": crossovers(args, records), "missing": [length for length in args.lengths if not paths[length].exists()],
    }  # fmt: skip
    write_json(directory / "report.json", result)
    write_text(directory / "report.md", markdown(result))
    if result["rows"]:
        write_figure(directory / "report.png", figure(result))
    if args.crossover:
        crossover.merge(args.crossover, result["crossovers"])
    print((directory / "report.md").read_text())
    print(json.dumps(result))
    if result["missing"]:
        say(f"stopped for --budget-s before {', '.join(map(str, result['missing']))} tokens: the same command goes on")
    failed = [f"{name} ({reason})" for name, reason in result["refused"] if not reason.startswith("out of memory")]
    if failed:
        print(f"error: every variant must run, these did not: {'; '.join(failed)}", file=sys.stderr)
        return 1
    return UNFINISHED if result["missing"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError, ImportError) as error:
        if os.environ.get("NPU_SPARSE_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
