#!/usr/bin/env python3
"""How long until Qwen3.5's first token, dense against sparse, on one Ascend card, one GPU or this CPU?

    python scripts/ttft_qwen35.py --device npu --size 0.8b --lengths 32768,65536,131072 --output runs/ttft-0.8b

The model has Qwen3.5's true shape and, without --model, random weights: times are those of the real checkpoint, quality is
not, and every row says so (evidence "untrained" where no adapter is given). Dense attention (each implementation in --dense)
and sparse prefill (each k:b_sel pair in --sparse) run interleaved in one process, in a new order every round, with the same
hybrid layers: Gated DeltaNet runs through flash-linear-attention where that package is installed for the device.
--chunk 4096 feeds the prompt in pieces. A length that is finished is in records/ and is not measured again.

Prints a table, then one JSON line; writes report.json and report.md to --output.
"""

import argparse
import importlib.util
import json
import os
import random
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from npu_sparse import Budget, Indexer, SparsePrefill, checkpoints, report
from npu_sparse.bench import stats
from npu_sparse.bench.timing import (
    StageTimer,
    amdahl_ceiling,
    dense_attention_timed,
    peak_memory_bytes,
    reset_peak_memory,
    synchronize,
)

COMMON = dict(
    vocab_size=248320, head_dim=256, max_position_embeddings=262144, linear_conv_kernel_dim=4, linear_key_head_dim=128,
    linear_value_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=16,
    rope_parameters={
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
)  # fmt: skip
SIZES = {
    "0.8b": dict(
        hidden_size=1024, intermediate_size=3584, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "9b": dict(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, num_attention_heads=16, num_key_value_heads=4,
        linear_num_value_heads=32,
    ),
    "tiny": dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=256,
        head_dim=64, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        rope_parameters={**COMMON["rope_parameters"], "mrope_section": [3, 3, 2]},
    ),
}  # fmt: skip
# transformers' names; on an NPU "flash_attention_2" is torch_npu's fused attention
DENSE = {"npu": "flash_attention_2,sdpa", "cuda": "sdpa", "cpu": "sdpa"}


def parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.8b", help="shape of the random weights (tiny: to try the script)")
    parser.add_argument("--model", help="a real checkpoint in place of random weights")
    parser.add_argument("--adapter", help="directory of a distilled indexer; without it the indexer is untrained")
    parser.add_argument("--device", default="npu", help="npu, cuda or cpu, with an index if you like")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--lengths", default="32768,65536,131072,262144", type=numbers, help="prompt lengths in tokens")
    parser.add_argument("--dense", help="dense attention implementations (default: npu flash_attention_2,sdpa; else sdpa)")
    parser.add_argument("--sparse", default="1024:64", type=pairs, help="k:b_sel, several separated by commas")
    parser.add_argument("--heads", default=1, type=int, help="index heads of an untrained indexer")
    parser.add_argument("--dim", default=128, type=int, help="d_idx of an untrained indexer")
    parser.add_argument("--impl", default="auto", choices=["auto", "reference", "kernel"], help="which operators run")
    parser.add_argument("--chunk", default=0, type=int, help="tokens per forward; 0 = the whole prompt at once")
    parser.add_argument("--runs", default=10, type=int)
    parser.add_argument("--warmup", default=2, type=int)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--profile", help="directory for a chrome trace of one prefill per variant and length")
    parser.add_argument("--output", required=True, type=Path)
    return parser.parse_args(arguments)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def pairs(text: str) -> list[tuple[int, int]]:
    return [tuple(int(number) for number in part.split(":", 1)) for part in text.split(",")]


def build(args):
    """`(model, indexer, evidence)` on the device."""
    if args.device.startswith("npu"):
        try:
            import torch_npu  # noqa: F401  - registers the device where it is not loaded by itself
        except ImportError as error:
            raise RuntimeError(f"device {args.device!r} must have torch_npu and CANN ({error}): see docs/ascend.md") from error

    dtype = getattr(torch, args.dtype)
    if args.model:
        model, _ = checkpoints.load(args.model, dtype=args.dtype, device=args.device)
    else:
        from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

        torch.manual_seed(args.seed)
        shape = COMMON | SIZES[args.size]
        kinds = ["full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(shape["num_hidden_layers"])]
        with torch.device(args.device):
            torch.set_default_dtype(dtype)
            model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**shape, layer_types=kinds)).eval()
            torch.set_default_dtype(torch.float32)
    if args.adapter:
        return model, Indexer.from_pretrained(args.adapter), "distilled"
    return model, Indexer.for_model(model, heads=args.heads, dim=args.dim, seed=args.seed), "untrained"


def variants(args) -> dict[str, dict]:
    """Every way to run the prefill, by name: a dense implementation, or a budget over the first of them."""
    dense = (args.dense or DENSE.get(torch.device(args.device).type, "sdpa")).split(",")
    found = {f"dense {name}": {"native": name, "budget": None} for name in dense}
    for k, block in args.sparse:
        found[f"sparse k {k}, b_sel {block}"] = {"native": dense[0], "budget": Budget(k=k, block=block)}
    return found


def attached(args, model, indexer, variant: dict, stage=None):
    """The model running one variant, as a context manager; with `stage`, its attention's time is taken."""
    model.set_attn_implementation(variant["native"])
    if variant["budget"] is None:
        return nullcontext() if stage is None else dense_attention_timed(model, stage)
    return SparsePrefill.attach(model, indexer, variant["budget"], impl=args.impl, stage=stage)


def first_token(model, ids, chunk: int) -> tuple[float, int]:
    """`(seconds, token id)`: from prompt ids on the host to the first token's id on the host."""
    import time

    from transformers import DynamicCache

    with torch.inference_mode():
        synchronize(model.device)
        started = time.perf_counter()
        prompt, cache = ids.to(model.device), DynamicCache(config=model.config)
        for part in prompt.split(chunk or ids.shape[1], 1):
            logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = int(logits[0, -1].argmax())
        return time.perf_counter() - started, token


def measure(args, model, indexer, evidence: str, length: int) -> dict:
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(args.seed))
    ways = variants(args)
    seconds, peaks, stages = {name: [] for name in ways}, {}, {name: [] for name in ways}
    shuffled = random.Random(args.seed)
    for round_ in range(-args.warmup, args.runs):
        for name in shuffled.sample(list(ways), len(ways)):
            with attached(args, model, indexer, ways[name]):
                reset_peak_memory(model.device)
                elapsed, _ = first_token(model, ids, args.chunk)
            if round_ >= 0:
                seconds[name].append(elapsed)
                peaks[name] = peak_memory_bytes(model.device)
    for name, way in ways.items():
        timer = StageTimer(model.device)
        with attached(args, model, indexer, way, timer):
            total, _ = first_token(model, ids, args.chunk)
        stages[name] = {**timer.seconds, "total": total}
        if args.profile:
            profile(args, model, indexer, way, ids, Path(args.profile) / f"{length}-{name.replace(' ', '-')}.json")
    return {
        "length": length, "seconds": seconds, "peak_bytes": peaks, "stages": stages, "machine": report.machine(args.device),
        "evidence": {name: "dense" if way["budget"] is None else evidence for name, way in ways.items()},
        "linear_attention": "flash-linear-attention" if importlib.util.find_spec("fla") else "transformers' torch fallback",
        "weights": args.model or f"random, Qwen3.5-{args.size} shape",
        "load_average": os.getloadavg()[0],
    }  # fmt: skip


def profile(args, model, indexer, way, ids, path: Path) -> None:
    """One prefill under the device's profiler, as a chrome trace."""
    if model.device.type == "npu":
        import torch_npu.profiler as profiler
    else:
        import torch.profiler as profiler
    path.parent.mkdir(parents=True, exist_ok=True)
    with attached(args, model, indexer, way), profiler.profile() as found:
        first_token(model, ids, args.chunk)
    found.export_chrome_trace(str(path))


def tabulate(args, records: list[dict]) -> list[dict]:
    rows = []
    for record in records:
        dense = [name for name in record["seconds"] if name.startswith("dense")]
        best = min(dense, key=lambda name: stats.summary(record["seconds"][name])["median"])
        for name, times in record["seconds"].items():
            spread, stage = stats.summary(times), record["stages"][name]
            gain = stats.ratio_of_medians(record["seconds"][best], times, seed=args.seed).to_dict()
            row = {
                "length": record["length"], "variant": name, "evidence": record["evidence"][name],
                "ttft_s": spread["median"], "q1_s": spread["q1"], "q3_s": spread["q3"], "over_best_dense": gain,
                "peak_bytes": record["peak_bytes"][name], "stages_s": stage,
            }  # fmt: skip
            if name == best:
                row["amdahl_ceiling"] = amdahl_ceiling(stage["total"], stage["attention"])
            rows.append(row)
    return rows


def markdown(result: dict) -> str:
    table = []
    for row in result["rows"]:
        gain, peak = row["over_best_dense"], row["peak_bytes"]
        table.append({
            "tokens": row["length"], "prefill": row["variant"], "evidence": row["evidence"],
            "TTFT median (s)": row["ttft_s"], "quartiles (s)": f"{row['q1_s']:.4g} - {row['q3_s']:.4g}",
            "speed-up over the best dense": f"{gain['value']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}]",
            "attention stages (s)": f"{sum(v for k, v in row['stages_s'].items() if k != 'total'):.4g}",
            "ceiling": row.get("amdahl_ceiling"), "peak (MiB)": None if peak is None else f"{peak / 2**20:.0f}",
        })  # fmt: skip
    first = result["machines"][0]
    return (
        f"# Qwen3.5 time to first token\n\n{result['weights']}; linear attention: {result['linear_attention']}; measured on "
        f"{report.machine_line(first)}; batch 1, {result['config']['dtype']}, random prompt, "
        f"{'the whole prompt at once' if not result['config']['chunk'] else 'chunks of ' + str(result['config']['chunk'])}, "
        f"{result['config']['runs']} interleaved rounds. The ceiling is the speed-up of attention that costs nothing.\n\n"
        + report.markdown_table(table)
        + "\nAn untrained indexer says how fast the runtime is and nothing about quality.\n"
    )


def main(arguments=None) -> int:
    args = parse(arguments)
    config = {key: value for key, value in vars(args).items() if key not in ("output", "profile")}
    directory = report.open_run(args.output, {"stage": "ttft-qwen35", **config})
    (directory / "records").mkdir(exist_ok=True)
    paths = {length: directory / "records" / f"{length}.json" for length in args.lengths}
    if todo := [length for length in args.lengths if not paths[length].exists()]:
        model, indexer, evidence = build(args)
        for length in todo:
            report.write_json(paths[length], measure(args, model, indexer, evidence, length))
    records = [json.loads(path.read_text()) for path in paths.values()]
    result = {
        "config": config, "rows": tabulate(args, records), "machines": [record["machine"] for record in records],
        "weights": records[0]["weights"], "linear_attention": records[0]["linear_attention"],
    }  # fmt: skip
    report.write_json(directory / "report.json", result)
    report.write_text(directory / "report.md", markdown(result))
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
