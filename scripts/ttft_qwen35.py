#!/usr/bin/env python3
"""How long until Qwen3.5's first token, dense against sparse, on one GPU, one Ascend card or this CPU?

    python scripts/ttft_qwen35.py --device cuda --size 0.8b --dense fa2,cudnn,fa3 --sparse 2048:64,2048:16 --output runs/ttft-0.8b
    python scripts/ttft_qwen35.py --device npu --size 0.8b --lengths 32768,65536,131072 --output runs/ttft-0.8b

This is `npu-sparse ttft --shape qwen3.5-0.8b` with the arguments for such runs; its help says what it does and writes. The model
has Qwen3.5's true shape and, without --model, random weights: times are those of the real checkpoint, quality is not, and every
row says so (evidence "untrained" where no adapter is given). Dense attention (each implementation in --dense) and sparse prefill
(each budget in --sparse) run interleaved in one process, with the same other layers: --hybrid fast attaches FastHybrid to dense
and sparse alike, stock leaves transformers' own, and both may be named.

--budget-s stops after a length where the next one would not fit in that time, with exit status 3, and the same command goes on.

Prints a report, then one JSON line; writes report.json, report.md and report.png to --output.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from npu_sparse import cann

with cann.required():
    import torch  # noqa: F401

from npu_sparse.errors import FAILURE, UNFINISHED
from npu_sparse.measure.ttft import TtftConfig, baselines, run_ttft
from npu_sparse.measure.ttft.page import figure, markdown
from npu_sparse.measure.ttft.run import LeftOutError
from npu_sparse.measure.ttft.shapes import SIZES
from npu_sparse.measure.variants import budgets_of, spelled
from npu_sparse.runs.figures import write_figure
from npu_sparse.runs.store import write_json, write_text

STARTED = time.monotonic()
# on an NPU "flash_attention_2" is torch_npu's fused attention
DENSE = {"npu": "flash_attention_2,sdpa", "cpu": "sdpa"}
HYBRID = {"cuda": "fast"}
FORMER_STAGE = "ttft-qwen35"  # of runs from before this was a command of npu-sparse


def parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.8b", help="shape of the random weights (tiny: to try the script)")
    parser.add_argument("--model", help="a real checkpoint in place of random weights")
    parser.add_argument("--adapter", help="directory of a distilled indexer; without it the indexer is untrained")
    parser.add_argument("--device", default="npu", help="cuda, npu or cpu, with an index if you like")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--lengths", default="32768,65536,131072,262144", help="prompt lengths in tokens")
    parser.add_argument(
        "--dense",
        help="fa2, cudnn, fa3 (CUDA), or transformers' names (default: cuda all that are installed; npu flash_attention_2,sdpa)",
    )
    parser.add_argument(
        "--sparse", default="1024:64",
        help="budgets, separated by semicolons, as in k=2048,block=16,reduce=mean;k=1024; or k:b_sel and other fields, separated "
        "by commas, as in 1024:64,2048:16:reduce=mean:share_layers=2",
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
    parser.add_argument("--profile", type=Path, help="directory for a chrome trace of one prefill per variant and length")
    parser.add_argument("--crossover", type=Path, help="a file of measured lengths for dense_below='auto' to add to")
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args(arguments)
    kind = args.device.partition(":")[0]
    args.dense = args.dense or (",".join(baselines.available()) if kind == "cuda" else DENSE.get(kind, "sdpa"))
    args.hybrid = args.hybrid or HYBRID.get(kind, "stock")
    for layers in args.hybrid.split(","):
        if layers not in ("fast", "stock"):
            raise ValueError(f"--hybrid must be fast, stock or both, got {layers!r}")
    return args


def budgets(text: str) -> dict[str, str]:
    """`{variant of `npu-sparse ttft`: its name here}` of the budgets in --sparse."""
    spelt = [spelled(budget) for budget in budgets_of(text)]
    return {f"indexer-shared:{one}": "sparse " + one.replace("block=", "b_sel=").translate({61: " ", 44: ", "}) for one in spelt}


def config(args) -> TtftConfig:
    names = ("adapter", "heads", "dim", "impl", "chunk", "runs", "warmup", "seed", "dtype", "device")
    return TtftConfig(
        model=args.model or "", shape=None if args.model else f"qwen3.5-{args.size}", prompt="random", stage_runs=1, parts=True,
        lengths=tuple(int(length) for length in args.lengths.split(",")), variants=("dense", *budgets(args.sparse)),
        baselines=tuple(args.dense.split(",")), layers=tuple(args.hybrid.split(",")),
        **{name: getattr(args, name) for name in names},
    )  # fmt: skip


def renamed(result: dict, names: dict[str, str]) -> dict:
    """A report whose sparse variants have the names of this script."""

    def named(variant: str) -> str:
        base, space, layers = variant.partition(" ")
        return names[base] + space + layers if base in names else variant

    rows = [{**row, "label": named(row["variant"])} for row in result["rows"]]
    return {**result, "rows": rows, "refused": [[named(name), reason] for name, reason in result["refused"]]}


def flat(row: dict, ceilings: dict) -> dict:
    """A row with the fields that this script writes."""
    kept = ("length", "evidence", "layers", "over", "over_best_dense", "peak_bytes", "stages_s")
    record = {name: row[name] for name in kept}
    seconds = row["ttft_s"]
    record |= {"variant": row["label"], "ttft_s": seconds["median"], "q1_s": seconds["q1"], "q3_s": seconds["q3"]}
    if row["peak_over_best_dense"] is not None:
        record["peak_over_best_dense"] = row["peak_over_best_dense"]
    if (row["length"], row["label"]) in ceilings:
        record["amdahl_ceiling"] = ceilings[row["length"], row["label"]]
    return record


def main(arguments=None) -> int:
    args = parse(arguments)
    wanted, written = config(args), args.output / "config.json"
    if written.exists() and json.loads(written.read_text()).get("stage") == FORMER_STAGE:
        raise ValueError(
            f"output directory {args.output} must be new: its run was measured before this script was a command of npu-sparse, "
            "and its report.json stays as it is"
        )
    left_s = None if args.budget_s is None else args.budget_s - (time.monotonic() - STARTED)
    status = 0
    try:
        run_ttft(wanted, args.output, budget_s=left_s, profile=args.profile, crossover=args.crossover)
    except LeftOutError as error:
        status, told = FAILURE, str(error)
    result = renamed(json.loads((args.output / "report.json").read_text()), budgets(args.sparse))
    if status:
        for variant, name in budgets(args.sparse).items():
            told = told.replace(variant, name)
        print(f"error: {told}", file=sys.stderr)
    write_text(args.output / "report.md", markdown(result))
    if result["rows"]:
        write_figure(args.output / "report.png", figure(result))
    ceilings = {(one["length"], one["label"]): one["ceiling"] for one in result["ceilings"]}
    aside = ("output", "profile", "budget_s", "crossover")
    result |= {
        "config": {key: value for key, value in vars(args).items() if key not in aside} | {"lengths": list(wanted.lengths)},
        "linear_attention": result["machines"][0]["linear_attention"],
        "rows": [flat(row, ceilings) for row in result["rows"]],
    }
    write_json(args.output / "report.json", result)
    print((args.output / "report.md").read_text())
    print(json.dumps(result))
    return status or (UNFINISHED if result["missing"] else 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError, ImportError) as error:
        if os.environ.get("NPU_SPARSE_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
