#!/usr/bin/env python3
"""Draws the support of one layer of a real checkpoint beside its attention mass.

    python scripts/draw_support.py --output docs/images/support.svg

Every cell of the drawing is a (query, key) pair of one forward of the checkpoint with its shipped indexer.
"""

import argparse
from pathlib import Path

from npu_sparse import cann

with cann.required():
    import torch

from npu_sparse import Budget, Indexer, SparsePrefill, checkpoints
from npu_sparse.ops import attention_mass
from npu_sparse.runs.figures import PALETTE, RULE
from npu_sparse.runs.store import write_text

TEXT = (
    "Some numbers are hidden in this text. The grass is green. The sky is blue. The sun is yellow. Here we go. One of the "
    "special magic numbers for Oslo is 4817. The grass is green. The sky is blue. The sun is yellow. There and back again. What "
    "is the special magic number for Oslo? The special magic number for Oslo is"
)
BUDGET = Budget.parse("k=24,block=8,sink=2,recent=4")
KINDS = {  # kinds of pairs and their names
    "sink": (PALETTE["distilled"], "sink: the first {sink} keys"),
    "recent": (PALETTE["local"], "recent: the last {recent} before each query of the block"),
    "chosen": (PALETTE["oracle"], "chosen by the indexer"),
    "unread": ("#eeeeee", "seen, but not in the support"),
}
CELL, LEFT, TOP = 5, 46, 34


def kinds(support, queries: int, budget: Budget) -> list[list[str]]:
    """For every query and every key that it sees, one of KINDS."""
    member = support.member_mask(queries)[0, 0].tolist()  # [Nq, Tk]
    rows = []
    for t in range(queries):
        row = []
        for s in range(t + 1):
            n = t // budget.block
            if not member[n][s]:
                row.append("unread")
            else:
                row.append("sink" if s < budget.sink else "recent" if s > n * budget.block - budget.recent else "chosen")
        rows.append(row)
    return rows


def svg(mass: list[list[float]], rows: list[list[str]], budget: Budget, title: str) -> str:
    """Two panels over the same pairs: attention mass of every block `[Nq, Tk]`, and what every query reads."""
    T, most = len(rows), max(max(row) for row in mass)
    side, gap = CELL * T, 30
    width, height = 2 * (LEFT + side) + gap, TOP + side + 62
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
        f"<title>{title}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]

    def text(x: float, y: float, said: str, extra: str = "") -> None:
        out.append(f'<text x="{x}" y="{y}" {extra}>{said}</text>')

    def run(x: int, y: int, cells: int, high: int, colour: str) -> None:
        out.append(f'<rect x="{x}" y="{y}" width="{CELL * cells}" height="{CELL * high}" fill="{colour}"/>')

    for left, heading in ((LEFT, "attention mass of every block of queries"), (2 * LEFT + side + gap, "its support, k = {k}")):
        text(left, 16, heading.format(k=budget.k))
        text(left, 28, "keys", 'fill="#666666"')
        text(left - 34, TOP + 10, "queries", f'fill="#666666" transform="rotate(90 {left - 34} {TOP + 10})"')
    for n, row in enumerate(mass):
        high = min(budget.block, T - n * budget.block)
        for s, share in enumerate(row[: n * budget.block + high]):
            shade = round(238 * (1 - (share / most) ** 0.4))
            run(LEFT + CELL * s, TOP + CELL * n * budget.block, 1, high, f"#{shade:02x}{shade:02x}{shade:02x}")
    left = 2 * LEFT + side + gap
    for t, row in enumerate(rows):
        start = 0
        for s in range(1, len(row) + 1):
            if s == len(row) or row[s] != row[start]:
                run(left + CELL * start, TOP + CELL * t, s - start, 1, KINDS[row[start]][0])
                start = s
    for first in range(0, T, budget.block):
        for x in (LEFT, left):
            y = TOP + CELL * first
            out.append(f'<line x1="{x - 8}" x2="{x + side}" y1="{y}" y2="{y}" stroke="{RULE}" stroke-width="0.5"/>')
    text(left - 8, TOP + side + 14, f"a row between two lines: {budget.block} queries, one support", 'fill="#666666"')
    x, y = LEFT, TOP + side + 34
    for colour, said in KINDS.values():
        out.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        text(x + 15, y, said.format(sink=budget.sink, recent=budget.recent))
        x += round(30 + 5.6 * len(said))
    text(LEFT, y + 20, title, 'fill="#666666"')
    return "\n".join([*out, "</svg>"]) + "\n"


def draw(model, tokenizer, indexer, layer: int, budget: Budget, title: str) -> str:
    """The SVG of one layer's support for TEXT."""
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    seen = {}
    with (
        SparsePrefill.attach(model, indexer, budget, impl="reference", observe=lambda *what: seen.update({what[0].layer: what})),
        torch.no_grad(),
    ):
        model(ids)
    inputs, support, _ = seen[layer]
    mass = attention_mass(inputs.q, inputs.k, scale=inputs.scale, reduce_block=budget.block, impl="reference")[0, 0]
    return svg(mass.tolist(), kinds(support, ids.shape[1], budget), budget, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a demo checkpoint with a shipped indexer")
    parser.add_argument("--layer", type=int, default=14, help="the full-attention layer that is drawn")
    parser.add_argument("--output", type=Path, required=True, help="the SVG file")
    options = parser.parse_args()
    model, tokenizer = checkpoints.load(options.model, dtype="float32")
    title = f"{options.model}, layer {options.layer}, its shipped indexer, {BUDGET}"
    write_text(options.output, draw(model, tokenizer, Indexer.from_pretrained(options.model), options.layer, BUDGET, title))


if __name__ == "__main__":
    main()
