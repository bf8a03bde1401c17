#!/usr/bin/env python3
"""What does one full-attention layer cost, sparse against dense, and how close is each kernel to its roofline?

    python scripts/bench_ops.py --output runs/bench-ops

One layer in the shape of a model, batch 1, causal, random hidden states, queries, keys and values. The sparse stage is all that
replaces dense attention: index projection, scoring, top-k, gather attention. Its supports come from an untrained indexer
(evidence: untrained), or with --adapter from a distilled one that reads real text through --checkpoint (evidence: distilled;
queries, keys and values stay random, so these are times and no quality). Dense baselines (FlashAttention-2 and cuDNN through
PyTorch, FlashAttention-3 where it is installed, flex_attention over equally large block supports) and every budget run in one
process, in a new order every round.

A length that is finished is in records/ and is not measured again. Prints tables, then one JSON line; writes report.json,
report.md and report.png to --output.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from npu_sparse import cann

with cann.required():
    import torch

from npu_sparse import Budget, Support, ops
from npu_sparse.indexer import IndexerConfig, IndexHead
from npu_sparse.measure.ttft.baselines import DENSE, available
from npu_sparse.measure.variants import budgets_of
from npu_sparse.runs import stats
from npu_sparse.runs.figures import new_figure, write_figure
from npu_sparse.runs.machine import machine, machine_line
from npu_sparse.runs.page import markdown_table
from npu_sparse.runs.store import open_run, write_json, write_text
from npu_sparse.selectors import LayerInputs, Oracle

SHAPES = {  # query heads, KV heads, head_dim, hidden size, rotary dimensions
    "qwen3.5-0.8b": (8, 2, 256, 1024, 64),
    "qwen3.5-9b": (16, 4, 256, 4096, 64),
    "qwen3-8b": (32, 8, 128, 4096, 128),
}
FLEX_BLOCK = 128
SAMPLE_MS = 25  # the length of a sample, of as many calls as that takes


def parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3.5-0.8b")
    parser.add_argument("--lengths", default="32768,65536,131072", type=numbers, help="tokens")
    sparse = "2048:64,2048:16,4096:16,2048:1"
    parser.add_argument("--sparse", default=sparse, type=budgets, help="k=2048,block=64;... or k:b_sel:candidates,...")
    parser.add_argument("--key-block", default=64, type=int, help="keys of a block, where there are candidates")
    parser.add_argument("--sink", default=4, type=int, help="keys always kept at the start")
    parser.add_argument("--recent", default=64, type=int, help="latest keys always kept")
    parser.add_argument("--heads", default=1, type=int, help="index heads, without --adapter")
    parser.add_argument("--dim", default=128, type=int, help="d_idx, without --adapter")
    parser.add_argument("--adapter", help="a distilled indexer; with --checkpoint")
    parser.add_argument("--checkpoint", help="what the adapter was distilled for: its layers read --texts")
    parser.add_argument("--texts", default="builtin", help="texts that the checkpoint reads, separated by commas")
    parser.add_argument("--layer", type=int, help="full-attention layer whose supports are used (default: the middle one)")
    parser.add_argument("--dense", default="fa2,cudnn,fa3", help="of fa2, cudnn, fa3, flex")
    parser.add_argument("--oracle", action="store_true", help="also time the oracle's supports of the first budget")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--runs", default=10, type=int)
    parser.add_argument("--warmup", default=2, type=int)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", required=True, type=Path)
    return parser.parse_args(arguments)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def budgets(text: str) -> list[tuple[int, int, int]]:
    """`(k, b_sel, candidates)`; without candidates, 0, every key is scored."""
    if text.replace(",", "").isdigit():
        raise ValueError(f"budgets must be k:b_sel or k:b_sel:candidates, got {text}")
    parsed = budgets_of(text)
    if any(one != Budget(k=one.k, block=one.block, candidates=one.candidates) for one in parsed):
        raise ValueError(f"budgets must name k, block and candidates only, got {text}")
    return [(one.k, one.block, one.candidates) for one in parsed]


class Layer:
    """The inputs of one layer at one length, and what is run on them."""

    def __init__(self, args, length: int):
        Hq, Hkv, D, hidden, rotary = SHAPES[args.shape]
        dtype, device = getattr(torch, args.dtype), args.device
        generator = torch.Generator(device).manual_seed(args.seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        self.q, self.k, self.v = (normal(1, length, heads, D).transpose(1, 2) for heads in (Hq, Hkv, Hkv))
        self.scale, self.args = D**-0.5, args
        self.hidden = normal(1, length, hidden)
        angles = torch.arange(length, device=device)[:, None] * 1e7 ** -(torch.arange(0, rotary, 2, device=device) / rotary)
        angles = torch.cat([angles, angles], -1)[None]
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self.index, heads, dim = None, args.heads, args.dim
        if args.adapter:
            self.index = distilled_index(args, length)
            heads, dim = self.index[0].shape[1], self.index[0].shape[3]
        torch.manual_seed(args.seed)
        self.head = IndexHead(IndexerConfig(hidden, (0,), rotary, heads, dim)).to(device, dtype)

    def project(self):
        made = self.head(self.hidden, self.cos, self.sin)
        return self.index or made  # a distilled indexer's projection costs as much and is already done

    def select(self, budget: tuple[int, int, int], index) -> Support:
        (k, block, candidates), (qi, ki, w) = budget, index
        options = dict(k=k, block=block, sink=self.args.sink, recent=self.args.recent)
        if candidates:
            return ops.select_two_level(qi, ki, w, candidates=candidates, key_block=self.args.key_block, **options)
        return ops.select_by_index(qi, ki, w, **options)

    def sparse(self, budget: tuple[int, int, int]):
        return self.attend(self.select(budget, self.project()))

    def oracle(self, k: int, block: int) -> Support:
        return Oracle().select(LayerInputs(0, self.q, self.k, self.v, self.scale), Budget(k=k, block=block))

    def attend(self, support: Support):
        return ops.sparse_attention(self.q, self.k, self.v, support, scale=self.scale)


@torch.inference_mode()
def distilled_index(args, length: int):
    """`(qi, ki, w)` of one layer of --checkpoint reading --texts; beyond its trained context its positions are extrapolated."""
    from npu_sparse import Indexer, SparsePrefill, checkpoints, tasks

    model, tokenizer = checkpoints.load(args.checkpoint, dtype=args.dtype, device=args.device)
    text = model.config.get_text_config()
    text.max_position_embeddings = max(length, text.max_position_embeddings)
    ids = []
    for document in tasks.documents(args.texts.split(",")):
        ids += tokenizer(document.text, add_special_tokens=not ids).input_ids
        if len(ids) >= length:
            break
    if len(ids) < length:
        raise ValueError(f"texts must hold {length} tokens, got {len(ids)}")
    indexer, seen = Indexer.from_pretrained(args.adapter), {}
    layer = indexer.config.layers[len(indexer.config.layers) // 2] if args.layer is None else args.layer

    def keep(inputs, support, out):
        if inputs.layer == layer:
            seen["index"] = inputs.index

    with SparsePrefill.attach(model, indexer, Budget(k=2048, block=64), observe=keep):
        model(input_ids=torch.tensor([ids[:length]], device=args.device), logits_to_keep=1, use_cache=False)
    return seen["index"]


def flex(layer: Layer, k: int):
    """flex_attention over block supports of k keys for every 128 queries: random blocks of 128, their own among them."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    T, device = layer.q.shape[2], layer.q.device
    blocks, held = T // FLEX_BLOCK, k // FLEX_BLOCK
    chosen = torch.rand(blocks, blocks, device=device, generator=torch.Generator(device).manual_seed(0)).tril(-1)
    chosen = chosen.topk(held - 1, -1)
    full_number = (chosen.values > 0).sum(-1).int()[None, None]
    full = torch.zeros(1, 1, blocks, blocks, dtype=torch.int32, device=device)
    full[..., : held - 1] = chosen.indices
    own = torch.zeros_like(full)
    own[..., 0] = torch.arange(blocks, device=device)
    mask = BlockMask.from_kv_blocks(
        torch.ones_like(full_number), own, full_number, full, BLOCK_SIZE=FLEX_BLOCK, mask_mod=lambda b, h, q, kv: q >= kv
    )
    run = torch.compile(flex_attention, dynamic=False)
    return lambda: run(layer.q, layer.k, layer.v, block_mask=mask, scale=layer.scale, enable_gqa=True)


def ways(args, layer: Layer) -> dict:
    """Everything that is timed, by name; a baseline that cannot run here is named with the reason."""
    named = {}
    for name in args.dense.split(","):
        if name == "flex":
            for k in sorted({k for k, *_ in args.sparse}):
                named[f"flex_attention, blocks of 128, k {k}"] = flex(layer, k)
        elif name in available():
            attend = DENSE[name]()
            named[f"dense {name}"] = lambda attend=attend: attend(layer.q, layer.k, layer.v, layer.scale)
    for budget in args.sparse:
        if budget[0] <= layer.q.shape[2]:
            named[sparse_name(*budget)] = lambda budget=budget: layer.sparse(budget)
    if args.oracle:
        k, block, _ = args.sparse[0]
        named[f"oracle supports k {k}, b_sel {block}"] = lambda: layer.oracle(k, block)
    return named


def sparse_name(k: int, block: int, candidates: int) -> str:
    return f"sparse k {k}, b_sel {block}" + (f", candidates {candidates}" if candidates else "")


def milliseconds(run, calls: int = 1) -> float:
    """Milliseconds of one of `calls` calls that are queued one after the other, as the layers of a prefill are."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def calls_for(run) -> int:
    """How many calls take about SAMPLE_MS together, so that a sample does not measure the host's launch time."""
    milliseconds(run)
    return max(1, round(SAMPLE_MS / milliseconds(run)))


def kernels(run) -> dict[str, float]:
    """Milliseconds of every kernel that a call launches, by name."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / 1e3 for event in trace.key_averages() if event.device_time_total}


@torch.inference_mode()
def measure(args, length: int) -> dict:
    layer, refused = Layer(args, length), {}
    todo = ways(args, layer)
    for name, run in list(todo.items()):
        try:
            for _ in range(args.warmup):
                run()
            torch.cuda.synchronize()
        except (RuntimeError, ValueError, ImportError) as error:
            refused[name] = str(error).partition("\n")[0][:300]
            del todo[name]
            torch.cuda.empty_cache()
    order = random.Random(args.seed)
    times, calls, peaks = {name: [] for name in todo}, {}, {}
    for name, run in todo.items():
        torch.cuda.reset_peak_memory_stats()
        calls[name] = calls_for(run)
        peaks[name] = torch.cuda.max_memory_allocated()
    for _ in range(args.runs):
        for name in order.sample(list(todo), len(todo)):
            times[name].append(milliseconds(todo[name], calls[name]))
    parts = {}
    for budget in args.sparse:
        if (name := sparse_name(*budget)) in todo:
            parts[name] = breakdown(args, layer, budget)
    return {
        "length": length, "milliseconds": times, "refused": refused, "parts": parts, "rates": rates(args),
        "peaks": peaks, "machine": machine(args.device), "evidence": "distilled" if args.adapter else "untrained",
    }  # fmt: skip


def breakdown(args, layer: Layer, budget: tuple[int, int, int]) -> dict:
    """Stages of one budget in milliseconds, its kernels with FLOPs and bytes, and how alike the supports of neighbours are."""
    index = layer.project()
    support = layer.select(budget, index)
    stages = {
        "projection": lambda: layer.project(),
        "scoring and top-k": lambda: layer.select(budget, index),
        "attention": lambda: layer.attend(support),
    }
    medians = {}
    for name, run in stages.items():
        calls = calls_for(run)
        medians[name] = stats.summary([milliseconds(run, calls) for _ in range(args.runs)])["median"]
    timed = kernels(lambda: layer.attend(layer.select(budget, index)))
    needed = work(layer, index, support, budget[2], args.key_block)
    return {"stages": medians, "kernels": timed, "work": needed, "overlap": overlap(support)}


def work(layer: Layer, index, support: Support, candidates: int = 0, key_block: int = 64) -> dict:
    """FLOPs of the products that are needed, and the least bytes: each input read once, each output written once.

    With candidates, of two products with every key block in front of a query and one with every key that may be scored: the
    candidates, and three blocks that always belong.
    """
    Hq, T, D = layer.q.shape[1:]
    Hi, Di = index[0].shape[1], index[0].shape[3]
    last = torch.arange(T, device=layer.q.device)
    held = support.count[0, 0].double().repeat_interleave(support.block)[:T]
    pairs = float(torch.minimum(held, last + 1.0).sum())
    bits = layer.q.element_size()
    scores = T * (T + 1) / 2
    if candidates:
        scores = 2 * scores / key_block + float(torch.minimum(last + 1.0, last * 0.0 + candidates + 3 * key_block).sum())
    return {
        "scoring": {"flops": 2 * scores * Hi * Di, "bytes": (index[0].numel() + index[1].numel()) * bits},
        "attention": {
            "flops": 4 * pairs * Hq * D,
            "bytes": bits * (2 * layer.q.numel() + layer.k.numel() + layer.v.numel()) + 4 * support.indices.numel(),
        },
    }


def overlap(support: Support) -> dict:
    """Of the last supports: the union of all that 32 queries read, over what one reads, and neighbours' Jaccard index."""
    rows = max(1, 32 // support.block)
    held = [set(row[:n].tolist()) for row, n in zip(support.indices[0, 0, -rows:].cpu(), support.count[0, 0, -rows:].cpu())]
    jaccard = [len(a & b) / len(a | b) for a, b in zip(held, held[1:])]
    return {
        "union_of_32_queries": len(set().union(*held)) / (sum(map(len, held)) / len(held)),
        "neighbours_jaccard": sum(jaccard) / len(jaccard) if jaccard else None,
    }


def rates(args) -> dict:
    """What this card reaches now: TFLOP/s of a large matrix product, and GB/s of a large copy, reads and writes counted."""
    a = torch.randn(8192, 8192, device=args.device, dtype=getattr(torch, args.dtype))
    b, c = (torch.empty(1 << 30, dtype=torch.uint8, device=args.device) for _ in range(2))
    product = stats.summary([milliseconds(lambda: a @ a) for _ in range(12)][2:])["median"]
    copy = stats.summary([milliseconds(lambda: c.copy_(b)) for _ in range(12)][2:])["median"]
    return {"tflops": 2 * 8192**3 / product / 1e9, "gb_s": 2 * (1 << 30) / copy / 1e6}


KERNELS = {  # operator -> kernels that are its floating-point work
    "scoring": ("filter_scores", "_reduce", "_rank", "_score"),
    "attention": ("attend_supports", "_attend"),
}
TOP_K = ("sample_scores", "estimate_thresholds", "select_candidates", "rescue_rows", "_select", "_place")


def tabulate(record: dict, seed: int) -> tuple[list[dict], list[dict]]:
    """Rows of the stage table and of the kernel table."""
    times = record["milliseconds"]
    stage_rows, kernel_rows = [], []
    for name, samples in times.items():
        spread = stats.summary(samples)
        row = {
            "tokens": record["length"], "what": name, "evidence": evidence(name, record),
            "median_ms": spread["median"], "q1_ms": spread["q1"], "q3_ms": spread["q3"], "peak_bytes": record["peaks"][name],
        }  # fmt: skip
        for base in ("fa3", "cudnn", "fa2"):
            if f"dense {base}" in times:
                row[f"over_{base}"] = stats.ratio_of_medians(times[f"dense {base}"], samples, seed=seed).to_dict()
        if name in record["parts"]:
            part = record["parts"][name]
            row |= part["stages"] | part["overlap"]
            kernel_rows += kernel_table(record, name)
        stage_rows.append(row)
    return stage_rows, kernel_rows


def evidence(name: str, record: dict) -> str:
    return {"sparse": record["evidence"], "oracle": "oracle"}.get(name.partition(" ")[0], "dense")


def kernel_table(record: dict, name: str) -> list[dict]:
    part, rates_, rows = record["parts"][name], record["rates"], []
    for operator, names in KERNELS.items():
        took = sum(ms for kernel, ms in part["kernels"].items() if kernel in names)
        if not took:
            continue
        flops, moved = part["work"][operator]["flops"], part["work"][operator]["bytes"]
        floor = max(flops / rates_["tflops"] / 1e9, moved / rates_["gb_s"] / 1e6)
        rows.append({
            "tokens": record["length"], "what": name, "operator": operator, "ms": took, "TFLOP": flops / 1e12, "GB": moved / 1e9,
            "TFLOP/s": flops / took / 1e9, "% of roofline": 100 * floor / took,
        })  # fmt: skip
    took = {kernel: ms for kernel, ms in part["kernels"].items() if kernel in TOP_K}
    common = {"tokens": record["length"], "what": name}
    if took:
        rows.append(common | {"operator": "top-k (" + ", ".join(took) + ")", "ms": sum(took.values())})
    if "unite_supports" in part["kernels"]:
        rows.append(common | {"operator": "unions", "ms": part["kernels"]["unite_supports"]})
    return rows


def markdown(result: dict) -> str:
    config, first = result["config"], result["machines"][0]
    stages = [
        {
            **{key: row[key] for key in ("tokens", "what", "evidence")}, "median (ms)": row["median_ms"],
            "quartiles (ms)": f"{row['q1_ms']:.4g} - {row['q3_ms']:.4g}",
            "projection": row.get("projection"), "scoring + top-k": row.get("scoring and top-k"),
            "attention": row.get("attention"),
            **{f"over {base}": times(row.get(f"over_{base}")) for base in ("fa3", "cudnn", "fa2")},
            "union of 32 queries / k": row.get("union_of_32_queries"), "peak (MiB)": f"{row['peak_bytes'] / 2**20:.0f}",
        }
        for row in result["rows"]
    ]  # fmt: skip
    measured = "; ".join(f"{r['tflops']:.0f} TFLOP/s and {r['gb_s']:.0f} GB/s" for r in result["rates"])
    refused = "".join(f"\nNot run: {name} at {length} tokens ({why})." for length, name, why in result["refused"])
    supports = f"supports from an untrained indexer of {config['heads']} x {config['dim']}; evidence: untrained"
    if config["adapter"]:
        supports = (
            f"supports from the distilled indexer {config['adapter']} as {config['checkpoint']} reads real text, beyond its "
            "trained context with extrapolated positions; evidence: distilled, times only"
        )
    return (
        f"# One layer's attention, {config['shape']} shape\n\nMeasured on {machine_line(first)}; batch 1, causal, "
        f"{config['dtype']}, random inputs, {supports}; {config['runs']} interleaved rounds, medians; a sample is as many "
        f"calls in a row as take about {SAMPLE_MS} ms. The sparse stage is "
        f"index projection + scoring + top-k + gather attention; sinks {config['sink']}, recent {config['recent']}.\n\n"
        + markdown_table(stages)
        + f"\n## Kernels\n\nThe roofline is what the card reached in the same process: {measured} (one pair a length). Bytes: "
        "every input read and every output written once; that keys and values are gathered many times is not counted.\n\n"
        + markdown_table(result["kernels"]) + refused + "\n"
    )


def times(estimate) -> str | None:
    return None if estimate is None else f"{estimate['value']:.2f}x [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def figure(result: dict):
    drawing, axes = new_figure(1)
    axis = axes[0][0]
    for name in dict.fromkeys(row["what"] for row in result["rows"]):
        points = [(row["tokens"], row["median_ms"]) for row in result["rows"] if row["what"] == name]
        axis.plot(*zip(*points), "o--" if name.startswith("dense") else "o-", label=name)
    axis.set(xlabel="tokens", ylabel="milliseconds", xscale="log", yscale="log")
    axis.set_title("One layer: dense attention, or all that replaces it")
    axis.legend(fontsize="small")
    return drawing


def main(arguments=None) -> int:
    args = parse(arguments)
    if bool(args.adapter) != bool(args.checkpoint):
        raise ValueError("adapter and checkpoint must be given together")
    config = {key: value for key, value in vars(args).items() if key != "output"}
    directory = open_run(args.output, {"stage": "bench-ops", **config})
    (directory / "records").mkdir(exist_ok=True)
    records = []
    for length in args.lengths:
        path = directory / "records" / f"{length}.json"
        if not path.exists():
            write_json(path, measure(args, length))
        records.append(json.loads(path.read_text()))
    tables = [tabulate(record, args.seed) for record in records]
    result = {
        "config": config, "rows": [row for rows, _ in tables for row in rows],
        "kernels": [row for _, rows in tables for row in rows],
        "rates": [record["rates"] for record in records], "machines": [record["machine"] for record in records],
        "refused": [(record["length"], name, why) for record in records for name, why in record["refused"].items()],
    }  # fmt: skip
    write_json(directory / "report.json", result)
    write_text(directory / "report.md", markdown(result))
    write_figure(directory / "report.png", figure(result))
    print((directory / "report.md").read_text())
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")
