#!/usr/bin/env python3
"""What should represent a block of keys when blocks are ranked before keys are scored (`Budget(candidates=...)`)?

    python scripts/study_key_blocks.py smollm2-135m --adapter smollm2-135m --texts bible-kjv-text --output runs/key-blocks

One prefill of real text and of two task prompts. In some layers and for some groups of 64 queries of the second half, key blocks
are ranked in several ways, the best are kept with those that always belong, and of their keys the k best are compared with the k
best of all keys (one level, same indexer):

    key recall     the share of the k best that is chosen
    mass kept      the attention mass of the k that are chosen over that of the k best; 100 = nothing lost

Ways: mean and bound (per-channel maxima and minima: what Quest does) of a block's keys; between them at a quarter, half and three
quarters; the mean beside the key that is farthest from it; and, as limits, the best key's own score (which needs all scores) and
the most recent blocks. Evidence: distilled. Prints a table, then one JSON line; writes report.json and report.md to --output.
"""

import argparse
import json
import sys
from pathlib import Path

from npu_sparse import cann

with cann.required():
    import torch

from npu_sparse import Budget, Indexer, SparsePrefill, checkpoints, ops
from npu_sparse.measure.prompts import text_prompts
from npu_sparse.ops.select_two_level.blocks import CANDIDATE_QUERIES as GROUP
from npu_sparse.runs.machine import machine, machine_line
from npu_sparse.runs.page import markdown_table, say
from npu_sparse.runs.store import open_run, write_json, write_text
from npu_sparse.tasks import documents, encode, generate

TASKS = ("niah_multikey_1", "vt")


def parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo name, directory, GGUF file or hub id")
    parser.add_argument("--adapter", required=True, help="a distilled indexer")
    parser.add_argument("--length", default=8192, type=int, help="tokens of a prompt")
    parser.add_argument("--k", default=512, type=int)
    parser.add_argument("--candidates", default="1024,2048,4096", type=numbers)
    parser.add_argument("--key-blocks", default="32,64,128", type=numbers)
    parser.add_argument("--blocks", default="1,64", type=numbers, help="queries that share a support (b_sel)")
    parser.add_argument("--groups", default=4, type=int, help="groups of 64 queries that are looked at")
    parser.add_argument("--every", default=1, type=int, help="every n-th full-attention layer is looked at")
    parser.add_argument("--texts", default="builtin", help="separated by commas")
    parser.add_argument("--seed", default=1, type=int)
    parser.add_argument("--output", required=True, type=Path)
    return parser.parse_args(arguments)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def products(q, vectors, w):
    """`sum_h w ReLU(q k)` of float32 queries `[H, R, D]` and vectors `[N, D]`, `[R, N]`; the scale changes no order."""
    return weighted(torch.relu(q @ vectors.T), w)


def weighted(z, w):
    return (z if w is None else z * w.T[..., None]).sum(0)


def between(q, mean, low, high, share: float, w):
    """Ranks by bounds that lie this share of the way from the mean to the extremes: 0 = mean, 1 = bound."""
    high, low = mean + share * (high - mean), mean + share * (low - mean)
    return weighted(torch.relu(q.clamp(min=0) @ high.T + q.clamp(max=0) @ low.T), w)


def ranks(q, keys, w, z, key_block: int) -> dict:
    """Every way's rank of every whole block of `keys [N, D]`, `[R, N / key_block]`; `z [R, N]`: the keys' own scores."""
    blocks = keys.unflatten(0, (-1, key_block))
    mean, high, low = blocks.mean(1), blocks.amax(1), blocks.amin(1)
    farthest = blocks[torch.arange(len(blocks)), (blocks - mean[:, None]).norm(dim=-1).argmax(1)]
    scores = {name: between(q, mean, low, high, share, w) for name, share in
             (("mean", 0), ("a quarter", 0.25), ("half way", 0.5), ("three quarters", 0.75), ("bound", 1))}  # fmt: skip
    scores["mean or farthest key"] = torch.maximum(scores["mean"], products(q, farthest, w))
    scores["best key"] = z.unflatten(-1, (-1, key_block)).amax(-1)
    scores["most recent"] = torch.arange(len(blocks), dtype=torch.float32).expand(len(q[0]), -1)
    return scores


def look(args, inputs, start: int) -> list[dict]:
    """Rows of one layer and one group of queries, those from `start` on."""
    qi, ki, w = inputs.index
    q, w = qi[0, :, start : start + GROUP].float(), None if w is None else w[0, start : start + GROUP].float()
    end = start + GROUP
    keys = ki[0, :end].float()
    position = torch.arange(end)
    seen = position <= torch.arange(start, end)[:, None]
    z = products(q, keys, w)  # [GROUP, end]
    mass = ops.attention_mass(inputs.q[:, :, start:end], inputs.k[:, :, :end], scale=inputs.scale)[0, 0]  # [GROUP, end]
    rows = []
    for key_block in args.key_blocks:
        whole = start // key_block  # blocks before the group
        by_way = ranks(q, keys[: whole * key_block], w, z[:, : whole * key_block], key_block)
        for block in args.blocks:
            reduced = z.masked_fill(~seen, float("-inf")).unflatten(0, (-1, block)).amax(1)  # [GROUP / block, end]
            share = mass.unflatten(0, (-1, block)).mean(1)
            best = members(reduced, args.k)
            for way, rank in by_way.items():
                order = rank.amax(0)  # the group shares its candidates
                order[0] = float("inf")  # the first block always belongs
                for candidates in args.candidates:
                    room = min(-(-candidates // key_block) + 1, whole)
                    kept = torch.zeros(whole, dtype=torch.bool).scatter_(0, order.topk(room).indices, True)
                    kept = torch.cat([kept.repeat_interleave(key_block), torch.ones(end - whole * key_block, dtype=torch.bool)])
                    chosen = members(reduced.masked_fill(~kept, float("-inf")), args.k)
                    rows.append({
                        "way": way, "key_block": key_block, "block": block, "candidates": candidates, "layer": inputs.layer,
                        "recall": float(((chosen & best).sum(-1) / best.sum(-1)).mean()),
                        "mass": float(((share * chosen).sum(-1) / (share * best).sum(-1)).mean()),
                    })  # fmt: skip
    return rows


def members(scores, k: int):
    """Bool: the k best of every row."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(k, -1).indices, True)


def study(args, model, indexer, prompts) -> list[dict]:
    """Means over layers, groups and prompts, a row for every way, key block, b_sel and number of candidates."""
    samples, layers = [], indexer.config.layers[:: args.every]

    def observe(inputs, support, out):
        if inputs.layer not in layers:
            return
        T = inputs.q.shape[2]
        step = T // 2 // args.groups // GROUP * GROUP
        for n in range(args.groups):
            samples.extend(look(args, inputs, T // GROUP * GROUP - GROUP - n * step))

    for name, ids in prompts:
        attached = SparsePrefill.attach(model, indexer, Budget(args.k), impl="reference", observe=observe)
        with attached, torch.inference_mode():
            model(ids[None], logits_to_keep=1)
        say(f"{name}: {len(ids)} tokens")
    groups: dict[tuple, list[dict]] = {}
    for row in samples:
        groups.setdefault((row["block"], row["key_block"], row["candidates"], row["way"]), []).append(row)
    return [
        {
            "block": block, "key_block": key_block, "candidates": candidates, "way": way, "n": len(rows),
            **{name: sum(row[name] for row in rows) / len(rows) for name in ("recall", "mass")},
        }
        for (block, key_block, candidates, way), rows in sorted(groups.items(), key=lambda item: item[0][:3])
    ]  # fmt: skip


def prompts_of(args, tokenizer) -> list[tuple[str, torch.Tensor]]:
    texts = documents(args.texts.split(","))
    prompts = [("text", text_prompts(tokenizer, texts, length=args.length, count=1, seed=args.seed)[0][1])]
    for task in TASKS:
        needed = texts if task != "vt" else None
        example = generate(task, tokenizer, length=args.length, count=1, seed=args.seed, haystack=needed, max_new_tokens=16)[0]
        prompts.append((task, torch.tensor(encode(tokenizer, example))))
    return prompts


def markdown(result: dict) -> str:
    config, rows = result["config"], result["rows"]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    lines: dict[tuple, dict] = {}
    for row in rows:
        line = lines.setdefault((row["block"], row["key_block"], row["candidates"]), {
            "b_sel": row["block"], "key block": row["key_block"], "candidates": row["candidates"]
        })  # fmt: skip
        line[row["way"]] = f"{100 * row['mass']:.1f} ({100 * row['recall']:.0f})"
    return (
        f"# What should stand for a block of keys?\n\n{config['model']}, prompts of {config['length']} tokens (text, "
        f"{', '.join(TASKS)}), k {config['k']}, the distilled indexer `{config['adapter']}` (evidence: distilled). Mass kept, "
        "of 100, relative to the k best of all keys, and in brackets key recall in per cent; 64 queries share candidates. "
        "\"Best key\" needs the scores of all keys; \"most recent\" needs none.\n\n"
        + markdown_table(list(lines.values()), {name: name for name in ("b_sel", "key block", "candidates", *ways)})
        + f"\nMeasured on {machine_line(result['machine'])}\n"
    )  # fmt: skip


def main(arguments=None) -> int:
    args = parse(arguments)
    config = {name: value for name, value in vars(args).items() if name != "output"}
    directory = open_run(args.output, {"stage": "key-blocks", **config})
    model, tokenizer = checkpoints.load(args.model, dtype="bfloat16")
    rows = study(args, model, Indexer.from_pretrained(args.adapter), prompts_of(args, tokenizer))
    result = {"config": config, "rows": rows, "base": checkpoints.identity(model), "machine": machine()}
    write_json(directory / "report.json", result)
    write_text(directory / "report.md", markdown(result))
    print((directory / "report.md").read_text())
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
