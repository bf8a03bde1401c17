#!/usr/bin/env python3
"""How fast would the AscendC operators be on a 910B card? Modelled, never measured: there is no card here.

    python scripts/model_npu.py --output docs/results/npu-modelled

Compiles ops/emulation/tools/trace.cpp, lets the host emulation execute the real kernels on one AI core at Qwen3.5's shape,
replays their instruction streams on the pipes of the chip (npu_sparse.measure.npu_cost) and scales from one core's queries to a
layer, a context and a model:

* sparse_attention: cycles per query from two numbers of queries, supports of `--k` keys in runs of `--run` neighbours (the
  shipped indexers select runs of 1.7 to 2.7 keys on real text);
* select_by_index: cycles of one more tile of queries as a straight line through contexts, checked at a third one;
* the share of reads that L2 serves: what is read again, as far as all keys and values fit into it beside the workspaces, which
  its cores write and read all the time and HBM does not see;
* dense attention: its FLOPs at `--dense-efficiency` of the peak. The rest of the model: the linear part of the dense times that
  arXiv 2606.07703 publishes for Qwen3.5-0.8B on its NPU (5.957 s at 128K, 17.928 s at 256K), taken as it is for both.

Every time is reported with the model's assumed overheads halved and doubled, and beside the model's error on published
timings: four shapes of the vendor's lightning_indexer, whose own stream is replayed (npu_sparse.measure.npu_published), and
the flash attention of the PTO instruction library, 910B2, D = 128, 128 rows a core (30.5 us for 4096 more keys), for which
there is only a kernel of ours.
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from npu_sparse import Budget
from npu_sparse.measure import npu_cost as cost
from npu_sparse.measure.npu_published import LIGHTNING_INDEXER, against_published, error_sentence
from npu_sparse.runs.figures import new_figure, write_figure
from npu_sparse.runs.machine import machine, machine_line
from npu_sparse.runs.page import markdown_table
from npu_sparse.runs.store import open_run, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
DENSE_128K_S, DENSE_256K_S = 5.957, 17.928  # arXiv 2606.07703: Qwen3.5-0.8B, NPU, vLLM-Ascend
PUBLISHED_FA_US = 68.778 - 38.317  # PTO flash attention on 910B2: 4096 -> 8192 keys, 128 rows a core, D = 128
CONTEXTS = (32768, 65536, 131072, 262144)
QUERY_HEADS, KV_HEADS, DIM, LAYERS = 8, 2, 256, 6  # Qwen3.5-0.8B's full attention
SCALES = (1.0, 0.5, 2.0)
LOSSLESS = "k=2048,block=64,reduce=softmax_max,exact_last=128"  # what loses next to nothing on retrieval


def build(folder: Path) -> dict[str, Path]:
    """The trace programs."""
    programs = {}
    for number, name in ((1, "sparse_attention"), (2, "select_by_index"), (3, "dense_rows")):
        programs[name] = folder / name
        command = ["g++", "-std=c++17", "-O2", "-pthread", f"-DNPU_SPARSE_OPERATOR={number}", "-I", str(ROOT / "ops/emulation")]
        subprocess.run([*command, "-o", str(programs[name]), str(ROOT / "ops/emulation/tools/trace.cpp")], check=True)
    return programs


def trace(program: Path, *arguments) -> dict:
    path = program.with_suffix(".json")
    subprocess.run([str(program), str(path), *map(str, arguments)], check=True)
    return cost.load_trace(path)


def attention_traces(programs, dim: int, k: int, block: int, run: float) -> list[dict]:
    """sparse_attention for 256 and for 512 queries of one KV head on one AI core."""
    key = (dim, k, block, run)
    if key not in _TRACES:
        _TRACES[key] = [trace(programs["sparse_attention"], 4, dim, n, max(16384, 2 * k), k, block, run, 0) for n in (256, 512)]
    return _TRACES[key]


def attention_cycles(traces: list[dict], scale: float, l2_hit: float) -> dict:
    """Cycles per query and KV head of `attention_traces`, and its cube's utilisation, tiles back to back."""
    rates = cost.Rates().scaled(scale)
    few, many = (cost.simulate(traced, rates, l2_hit=l2_hit) for traced in traces)
    cycles = many.cycles - few.cycles
    busy = {pipe: (many.busy[pipe] - few.busy[pipe]) / cycles for pipe in many.busy}
    tensors = [timing.gm_read - timing.workspace_read for timing in (few, many)]
    return {"cycles_per_query": cycles / 256, "busy": busy, "gm_bytes_per_query": (tensors[1] - tensors[0]) / 256}


def selection_line(programs, dim: int, k: int, block: int, partition: bool, scale: float) -> dict:
    """Cycles of select_by_index on one AI core for one more tile of `queries` queries: intercept + slope x keys, and what a third
    point says; `once`: the cycles that a core's first tile takes longer."""
    queries, lengths = max(256, 4 * block), (16384, 32768, 65536)  # as many as fill both vector cores' sub-tiles
    key = (dim, k, block, partition)
    if key not in _TRACES:
        sizes = [(tiles * queries, n) for n in lengths for tiles in (1, 2)]
        _TRACES[key] = [trace(programs["select_by_index"], dim, *size, k, block, 1, int(partition), 0) for size in sizes]
    rates = cost.Rates().scaled(scale)
    timings = [cost.simulate(each, rates, l2_hit=1.0) for each in _TRACES[key]]  # all index keys fit into L2
    # a core begins with the tile that has the most keys, so the second one ends where the first began
    more = [two.cycles - one.cycles for one, two in zip(timings[::2], timings[1::2])]
    keys = lengths[2] - lengths[0]
    slope = (more[2] - more[0]) / keys
    intercept = more[0] - slope * (lengths[0] - queries)
    last = timings[4]
    return {
        "queries": queries, "intercept": intercept, "slope": slope, "once": timings[0].cycles - (intercept + slope * lengths[0]),
        "off_the_line": more[1] / (intercept + slope * (lengths[1] - queries)) - 1,
        "busy": {pipe: (last.busy[pipe] - timings[0].busy[pipe]) / (last.cycles - timings[0].cycles) for pipe in last.busy},
    }  # fmt: skip


_TRACES: dict[tuple, list[dict]] = {}


def l2_share(chip: cost.Chip, length: int, k: int, block: int, workspace: int) -> float:
    """The share of gathered bytes that L2 serves: repeated reads, as far as the layer's keys and values fit beside the cores'
    `workspace` bytes."""
    footprint = 2 * length * KV_HEADS * DIM * 2
    repeats = max(0.0, 1 - length / max(length, length / block * k))
    return repeats * min(1.0, (chip.l2 - chip.cores * workspace) / footprint)


def exact_end_cycles(programs, chip: cost.Chip, rows: int, length: int, scale: float, hit: float) -> float:
    """Cycles of dense_rows for the last `rows` queries: as many tiles as cores, each of which reads all keys of its head."""
    block = -(-rows // min(rows, -(-chip.cores // KV_HEADS)))
    lengths = (8192, 16384)
    key = ("dense_rows", block)
    if key not in _TRACES:
        _TRACES[key] = [trace(programs["dense_rows"], QUERY_HEADS // KV_HEADS, DIM, block, n, 0) for n in lengths]
    few, many = (cost.simulate(each, cost.Rates().scaled(scale), l2_hit=hit).cycles for each in _TRACES[key])
    turns = -(-(-(-rows // block) * KV_HEADS) // chip.cores)
    return turns * (few + (many - few) / (lengths[1] - lengths[0]) * (length - lengths[0]))


def layers(programs, chip: cost.Chip, args, scale: float, budget: Budget) -> list[dict]:
    """`layer` at all contexts. softmax_max is with learned log-partitions."""
    line = selection_line(programs, args.dim, budget.k, budget.block, budget.reduce == "softmax_max", scale)
    return [layer(programs, chip, length, args, scale, budget, line) for length in CONTEXTS]


def layer(programs, chip: cost.Chip, length: int, args, scale: float, budget: Budget, line: dict) -> dict:
    """Modelled seconds of one layer's attention stage at a context, with `selection_line`."""
    k = budget.k
    traces = attention_traces(programs, DIM, k, budget.block, args.run)
    workspace = traces[0]["workspace"]  # dense_rows has the same
    hit = l2_share(chip, length, k, budget.block, workspace)
    gather = attention_cycles(traces, scale, hit)
    hertz = chip.ghz * 1e9
    attention_s = gather["cycles_per_query"] * length * KV_HEADS / chip.cores / hertz
    missed = gather["gm_bytes_per_query"] * length * KV_HEADS * (1 - hit)
    attention_s = max(attention_s, missed / chip.hbm)
    tiles = length / line["queries"]
    selection_s = (tiles * (line["intercept"] + line["slope"] * length / 2) / chip.cores + line["once"]) / hertz
    projection_s = 2 * length * 1024 * 2 * args.dim / (0.5 * chip.peak_flops)  # W_Q and W_K, one index head, half the peak
    exact_s = 0.0
    if budget.exact_last:
        all_keys = l2_share(chip, length, length, 64, workspace)
        exact_s = exact_end_cycles(programs, chip, budget.exact_last, length, scale, all_keys) / hertz
    launches = (3 + bool(budget.exact_last)) * cost.Rates().launch_us * 1e-6
    total = attention_s + selection_s + projection_s + exact_s + launches
    return {
        "length": length, "projection_s": projection_s, "selection_s": selection_s, "attention_s": attention_s,
        "exact_s": exact_s, "total_s": total, "l2_hit": hit,
        "dense_s": cost.dense_seconds(chip, length, QUERY_HEADS, DIM, args.dense_efficiency),
        "attention_busy": gather["busy"], "selection_busy": line["busy"], "off_the_line": line["off_the_line"],
    }  # fmt: skip


def scored_as_published(programs, chip: cost.Chip) -> list[dict]:
    """Our select_by_index in the published shapes: one sequence on a core, as many at once as there are cores."""
    rows = []
    for shape in LIGHTNING_INDEXER:
        sizes = (shape.queries, shape.keys, min(shape.k, shape.keys), 1, shape.heads)
        traced = trace(programs["select_by_index"], 128, *sizes, 0, 0)
        timing = cost.simulate(traced)
        turns = -(-shape.batch // chip.cores)
        rows.append({
            "name": shape.name, "lightning_indexer_us": shape.microseconds,
            "select_by_index_us": cost.Rates().launch_us + turns * timing.cycles / chip.ghz / 1e3, "bound": timing.bound,
        })  # fmt: skip
    return rows


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=cost.CHIPS, default="910B3")
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--block", type=int, default=64, help="b_sel")
    parser.add_argument("--dim", type=int, default=128, help="d_idx, one index head")
    parser.add_argument("--run", type=float, default=1.9, help="mean run of neighbouring keys in a support")
    parser.add_argument("--dense-efficiency", type=float, default=0.6)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    chip = cost.CHIPS[args.chip]
    config = {"stage": "npu-modelled", **{key: value for key, value in vars(args).items() if key != "output"}}
    directory = open_run(args.output, config)
    with tempfile.TemporaryDirectory() as folder:
        programs = build(Path(folder))
        fast = Budget(k=args.k, block=args.block)
        rows = {scale: layers(programs, chip, args, scale, fast) for scale in SCALES}
        careful = Budget.parse(LOSSLESS)
        lossless = {scale: layers(programs, chip, args, scale, careful) for scale in SCALES}
        fa = check_against_published(programs)
        ours = scored_as_published(programs, cost.CHIPS["910B3"])
    b = (DENSE_256K_S - 2 * DENSE_128K_S) / (2 * 131072**2)  # dense attention's seconds per token^2, all layers
    rest_per_token = (DENSE_128K_S - b * 131072**2) / 131072
    result = {
        "config": config, "evidence": "modelled", "chip": asdict(chip), "machine": machine(), "published_check": fa,
        "published": against_published(), "rates": asdict(cost.Rates()),
        "rest_s_per_token": rest_per_token, "paper_dense_efficiency": 2 * QUERY_HEADS * DIM * LAYERS / b / chip.peak_flops,
        "select_by_index_in_published_shapes": ours, "lossless_budget": LOSSLESS,
        "rows": [_row(rows, index, rest_per_token) for index in range(len(CONTEXTS))],
        "lossless_rows": [_row(lossless, index, rest_per_token) for index in range(len(CONTEXTS))],
    }  # fmt: skip
    errors = [row["error"] for row in result["published"] if not row["fitted"]]
    # what is left of a speed-up if the kernels take as much longer than modelled as the timed one
    for row in result["rows"] + result["lossless_rows"]:
        row["speed_up_at_error"] = [row["speed_up"] * (1 + error) for error in (min(errors), max(errors))]
    write_json(directory / "report.json", result)
    write_text(directory / "report.md", _markdown(result, args))
    write_figure(directory / "report.png", _figure(result))
    print((directory / "report.md").read_text())
    return 0


def check_against_published(programs) -> dict:
    """4096 more contiguous keys for 128 rows of D = 128, modelled, beside what another kernel was measured to take."""
    chip = cost.CHIPS["910B2"]
    traces = [trace(programs["sparse_attention"], 4, 128, 32, 16384, k, 32, k, 0) for k in (4096, 8192)]
    cycles = [cost.simulate(each, l2_hit=1.0).cycles for each in traces]
    modelled = (cycles[1] - cycles[0]) / chip.ghz / 1e3
    return {"modelled_us": modelled, "published_us": PUBLISHED_FA_US, "error": modelled / PUBLISHED_FA_US - 1}


def _row(rows: dict, index: int, rest_per_token: float) -> dict:
    base = rows[1.0][index]
    rest = rest_per_token * base["length"]
    ttft = {name: rest + LAYERS * base[name] for name in ("dense_s", "total_s")}
    return {
        **base, "speed_up": base["dense_s"] / base["total_s"],
        "speed_up_if_overheads": {str(scale): rows[scale][index]["dense_s"] / rows[scale][index]["total_s"] for scale in SCALES},
        "ttft_dense_s": ttft["dense_s"], "ttft_sparse_s": ttft["total_s"], "ttft_speed_up": ttft["dense_s"] / ttft["total_s"],
        "ttft_ceiling": ttft["dense_s"] / rest,
    }  # fmt: skip


def _markdown(result: dict, args) -> str:
    chip, fa, first = result["chip"], result["published_check"], result["rows"][-2]
    models = []
    for row in result["rows"]:
        models.append({
            "tokens": row["length"], "dense TTFT (s)": row["ttft_dense_s"], "sparse TTFT (s)": row["ttft_sparse_s"],
            "speed-up": f"{row['ttft_speed_up']:.2f}", "ceiling (attention free)": f"{row['ttft_ceiling']:.2f}",
        })  # fmt: skip
    ours = [
        {"shape": row["name"], "lightning_indexer, published (us)": row["lightning_indexer_us"],
         "select_by_index, modelled (us)": row["select_by_index_us"], "bound by": row["bound"]}
        for row in result["select_by_index_in_published_shapes"]
    ]  # fmt: skip
    published = [
        {"shape": row["name"], "published (us)": row["published_us"], "modelled (us)": row["modelled_us"],
         "error (%)": f"{100 * row['error']:+.1f}", "": "fitted" if row["fitted"] else ""}
        for row in result["published"]
    ]  # fmt: skip

    rates = result["rates"]
    fixpipe = rates["dma"] + 4 * 128 * 128 / min(rates["l0c"], rates["l2_write"])

    def pipes(busy: dict) -> str:
        return ", ".join(f"{pipe} {100 * share:.0f} %" for pipe, share in sorted(busy.items(), key=lambda item: -item[1])[:5])

    return f"""# Modelled: the AscendC operators on {chip["name"]}

**No card was used: every time below is modelled**, from the instruction streams of the host emulation;
`npu_sparse.measure.npu_cost` lists the constants, the assumptions among them, and what is left out. Qwen3.5-0.8B,
{QUERY_HEADS}/{KV_HEADS} heads, D {DIM}, batch 1, bf16; k {args.k}, b_sel {args.block}, one index head of {args.dim}; supports in
runs of {args.run} keys; evidence: untrained (times only). Dense attention: its FLOPs at {100 * args.dense_efficiency:.0f} % of
{chip["cores"]} x 16^3 multiply-adds per cycle at {chip["ghz"]} GHz.

{error_sentence(result["published"])}
([below](#against-published-measurements)). "At the model's error" is the speed-up if these kernels take as much longer than
modelled as that one does.

## One layer's attention stage

{markdown_table(_layers(result["rows"]))}
Busy at {first["length"]} tokens, gather attention: {pipes(first["attention_busy"])}. Scoring + top-k:
{pipes(first["selection_busy"])}. The straight line of scoring over contexts is off by
{100 * abs(first["off_the_line"]):.1f} % at a third point. What bounds scoring of 128 index dimensions is the Fixpipe, which takes
128 x 128 fp32 scores to GM in {fixpipe:.0f} cycles where the cube needs 512: {100 * 512 / fixpipe:.0f} % of the cube at most.

## The lossless default

`{result["lossless_budget"]}`, log-partitions learned:

{markdown_table(_layers(result["lossless_rows"]))}
## The model

The rest of the model is the linear part of the dense times that arXiv 2606.07703 publishes for this model on its NPU
({1e6 * result["rest_s_per_token"]:.1f} us per token), the same for both columns; in those times dense attention runs at
{100 * result["paper_dense_efficiency"]:.0f} % of this chip's peak, not at {100 * args.dense_efficiency:.0f} %.

{markdown_table(models)}
## Against published measurements

Tile-lang's comparison (tile-ai/tilelang-ascend, pull request 1476) gives task durations of the vendor's lightning_indexer on
910B3; its tiling is public, and its own stream is what is modelled here:

{markdown_table(published)}
Our select_by_index in the same shapes, one sequence on a core, so that cores are idle where there are fewer sequences:

{markdown_table(ours)}
The launch, {result["rates"]["launch_us"]:g} us, is fitted to the smallest of them; nothing is fitted to the others.

4096 more contiguous keys for 128 rows of D = 128 on one 910B2 core: modelled {fa["modelled_us"]:.1f} us with this project's
sparse_attention, measured {fa["published_us"]:.1f} us with the PTO library's flash attention ({100 * fa["error"]:+.0f} %). Two
kernels of the same arithmetic, so this says whether the model is plausible, not how exact it is.

Modelled on {machine_line(result["machine"])}.
"""


def _layers(rows: list[dict]) -> list[dict]:
    layers = []
    for row in rows:
        spread = row["speed_up_if_overheads"]
        layers.append({
            "tokens": row["length"], "dense (ms)": 1e3 * row["dense_s"], "projection (ms)": 1e3 * row["projection_s"],
            "scoring + top-k (ms)": 1e3 * row["selection_s"], "gather attention (ms)": 1e3 * row["attention_s"],
            **({"exact end (ms)": 1e3 * row["exact_s"]} if row["exact_s"] else {}),
            "sparse, sum (ms)": 1e3 * row["total_s"], "speed-up": f"{row['speed_up']:.2f}",
            "at the model's error": " - ".join(f"{each:.1f}" for each in row["speed_up_at_error"]),
            "with overheads x 0.5 / x 2": f"{spread['0.5']:.2f} / {spread['2.0']:.2f}", "L2 hits": f"{row['l2_hit']:.2f}",
        })  # fmt: skip
    return layers


def _figure(result: dict):
    figure, axes = new_figure(1)
    axis = axes[0][0]
    rows = result["rows"]
    lengths = [row["length"] for row in rows]
    parts = {"dense_s": "dense, assumed efficiency", "total_s": "sparse, sum", "selection_s": "scoring + top-k",
             "attention_s": "gather attention", "projection_s": "projection"}  # fmt: skip
    for name, label in parts.items():
        axis.plot(lengths, [1e3 * row[name] for row in rows], "o-" if name in ("dense_s", "total_s") else ".--", label=label)
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms per layer, modelled",
             title=f"{result['chip']['name']}, modelled: attention stage")  # fmt: skip
    axis.set_xticks(lengths, [f"{length // 1024}K" for length in lengths], minor=False)
    axis.minorticks_off()
    axis.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    sys.exit(main())
