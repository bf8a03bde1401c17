#!/usr/bin/env python3
"""What should an oracle of k keys a query keep, and what becomes of the rest? Rules and partial oracles on one task's prompts.

    python scripts/oracle_rules.py --model gemma3-270m --task niah_single_1 --count 60 --device cuda --output runs/rules

For every prompt that dense attention solves, the model prefills with each rule in its full-attention layers and is then fed,
densely, the tokens that dense attention went on with up to the end of the answer. Reported: the share of prompts where it would
have written the same, and by how much its log-likelihood of them falls short of dense attention's, paired, with 95% bootstrap
intervals. Everything is eager and [heads, rows, keys] at a time: it is for looking, not for use. Cells that are done are kept.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from npu_sparse import cann

with cann.required():
    import torch

from torch import Tensor

from npu_sparse import checkpoints, tasks
from npu_sparse.models.architectures import attention_modules, attention_selection, text_config
from npu_sparse.models.attention import register_around
from npu_sparse.runs import stats
from npu_sparse.runs.machine import machine as this_machine
from npu_sparse.runs.machine import machine_line
from npu_sparse.runs.page import markdown_table, say
from npu_sparse.runs.store import Cells, check, open_run, write_json, write_text

ROWS = 512
MOST_NEW = 24
INF = float("inf")


# Rules. Each gets one tile of queries: A [H, rows, keys] attention weights, s scores (-inf ahead), q, k [H, ., D],
# v [H, keys, Dv], and returns the attention output [H, rows, Dv].


def top(score: Tensor, k: int) -> Tensor:
    """Bool: the k largest of every row."""
    chosen = torch.zeros_like(score, dtype=torch.bool)
    return chosen.scatter_(-1, score.topk(min(k, score.shape[-1]), -1, sorted=False).indices, True)


def renormalised(choose: Callable) -> Callable:
    def rule(A, s, q, k, v, scale):
        kept = choose(A.masked_fill(s == -INF, -1.0), v)
        return torch.softmax(s.masked_fill(~kept, -INF), -1) @ v

    return rule


def by_mean(k: int) -> Callable:
    return renormalised(lambda A, v: top(A.mean(0, keepdim=True), k))


def with_tail(k: int, of_dropped: bool = False) -> Callable:
    """One more key: the mean of all keys so far (or of the dropped ones), with the logarithm of how many are dropped."""

    def rule(A, s, q, keys, v, scale):
        visible = s > -INF
        kept = top(A.mean(0, keepdim=True).masked_fill(~visible[:1], -1.0), k) & visible[:1]
        dropped = (visible[:1] & ~kept).float()
        members = dropped if of_dropped else visible[:1].float()
        number, members = dropped.sum(-1, keepdim=True), members / members.sum(-1, keepdim=True).clamp(min=1)
        extra = (q * (members @ keys)).sum(-1, keepdim=True) * scale + number.log()
        weights = torch.softmax(torch.cat([s.masked_fill(~kept, -INF), extra], -1), -1)
        return weights[..., :-1] @ v + weights[..., -1:] * (members @ v)

    return rule


def with_true_lost_mass(k: int) -> Callable:
    """What is dropped keeps its true mass and is given its mean value: needs all scores, and bounds what a tail can do."""

    def rule(A, s, q, keys, v, scale):
        visible = s > -INF
        kept = top(A.mean(0, keepdim=True).masked_fill(~visible[:1], -1.0), k) & visible[:1]
        dropped = (visible[:1] & ~kept).float()
        lost = (A * ~kept).sum(-1, keepdim=True)
        return (A * kept) @ v + lost * (dropped @ v) / dropped.sum(-1, keepdim=True).clamp(min=1)

    return rule


def with_sample(k: int, sampled: int) -> Callable:
    """k - sampled keys by mass, the others drawn at random from the rest, each standing for as many as were not drawn."""

    def rule(A, s, q, keys, v, scale):
        visible = s > -INF
        kept = top(A.mean(0, keepdim=True).masked_fill(~visible[:1], -1.0), k - sampled) & visible[:1]
        noise = torch.rand(A.shape[1:], generator=torch.Generator().manual_seed(A.shape[-1])).to(A)[None]
        drawn = top(noise.masked_fill(kept | ~visible[:1], -1.0), sampled) & visible[:1] & ~kept
        rest = (visible[:1] & ~kept).sum(-1, keepdim=True) / drawn.sum(-1, keepdim=True).clamp(min=1)
        bias = torch.where(drawn, rest.log(), torch.where(kept, 0.0, -INF))
        return torch.softmax(s + bias, -1) @ v

    return rule


def quota(A: Tensor, v: Tensor, k: int) -> Tensor:
    """k keys in the order of their best rank in any head."""
    rank = (-A).argsort(-1).argsort(-1).amin(0, keepdim=True).float()
    return top(A.mean(0, keepdim=True) - rank, k)


def rules(k: int) -> dict[str, Callable]:
    return {
        f"mean over heads, {k} (the paper)": by_mean(k),
        f"maximum over heads, {k}": renormalised(lambda A, v: top(A.amax(0, keepdim=True), k)),
        f"best rank in any head, {k}": renormalised(lambda A, v: quota(A, v, k)),
        f"root mean square over heads, {k}": renormalised(lambda A, v: top(A.sign() * A.square().mean(0, keepdim=True), k)),
        f"mean of mass x |v|, {k}": renormalised(lambda A, v: top((A * v.norm(dim=-1)[:, None]).mean(0, keepdim=True), k)),
        f"every head its own {k}": renormalised(lambda A, v: top(A, k)),
        f"mean over heads, {2 * k}": by_mean(2 * k),
        f"mean over heads, {4 * k}": by_mean(4 * k),
        f"{k - k // 4} + {k // 4} drawn at random": with_sample(k, k // 4),
        f"{k} + mean of the dropped keys": with_tail(k, of_dropped=True),
        f"{k} + running mean (tail)": with_tail(k),
        f"{k // 2} + running mean (tail)": with_tail(k // 2),
        f"{k} + mean value with the true lost mass": with_true_lost_mass(k),
    }  # fmt: skip


# The model with a rule


class Lab:
    """A model whose full-attention layers prefill by `rule(A, s, q, k, v, scale)`, in `layers` and `rows` only; None is dense."""

    def __init__(self, model):
        native = text_config(model)._attn_implementation
        layer_of = {id(module): layer for layer, module in attention_modules(model).items()}
        self.model, self.rule, self.layers, self.rows = model, None, None, None

        def around(dense, module, q, k, v, mask, *, scaling=None, **kwargs):
            layer = layer_of.get(id(module))
            chosen = layer is not None and q.shape[2] > 1 and self.rule and (self.layers is None or layer in self.layers)
            if not chosen:
                return dense(module, q, k, v, mask, scaling=scaling, **kwargs)
            return self.attend(q, k, v, scaling)[None].to(q.dtype).transpose(1, 2).contiguous(), None

        model.set_attn_implementation(attention_selection(model, register_around(native, "lab", around)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        group, T = q.shape[1] // k.shape[1], q.shape[2]
        q, k, v = q[0].float(), *(x[0].float().repeat_interleave(group, 0) for x in (k, v))
        parts = []
        for start in range(0, T, ROWS):
            stop = min(start + ROWS, T)
            s = torch.matmul(q[:, start:stop], k[:, :stop].mT) * scale  # [H, rows, stop]
            s = s.masked_fill(torch.ones(s.shape[1:], dtype=torch.bool, device=s.device).triu_(start + 1), -INF)
            A = torch.softmax(s, -1)
            out = self.rule(A, s, q[:, start:stop], k[:, :stop], v[:, :stop], scale)
            if self.rows is not None:
                sparse = self.rows(torch.arange(start, stop, device=s.device), T)
                out = torch.where(sparse[:, None], out, A @ v[:, :stop])
            parts.append(out)
        return torch.cat(parts, 1)  # [H, T, Dv]

    @torch.no_grad()
    def follow(self, ids: Tensor, after: Tensor, rule=None, layers=None, rows=None) -> tuple[float, bool]:
        """`(log-likelihood, whether greedy decoding writes them)` of the tokens `after` a prefill of `ids`."""
        from transformers import DynamicCache

        from npu_sparse.measure.decode import cache_argument

        name = cache_argument(self.model)
        cache = DynamicCache(config=self.model.config)
        self.rule, self.layers, self.rows = rule, layers, rows
        logits = self.model(ids, **{name: cache}, logits_to_keep=1).logits
        self.rule = None
        if after.shape[1] > 1:
            logits = torch.cat([logits, self.model(after[:, :-1], **{name: cache}).logits], 1)
        logits = logits[0].float()
        likelihood = torch.log_softmax(logits, -1).gather(-1, after[0][:, None]).sum()
        return float(likelihood), bool((logits.argmax(-1) == after[0]).all())


def dense_answer(model, tokenizer, example) -> Tensor | None:
    """The tokens dense attention goes on with up to the end of the answer, `[1, n]`, or None where it does not give one."""
    ids = torch.tensor([tasks.encode(tokenizer, example)], device=model.device)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MOST_NEW, do_sample=False)[:, ids.shape[1] :]
    for n in range(1, made.shape[1] + 1):
        if tasks.score(example, tokenizer.decode(made[0, :n], skip_special_tokens=True)) == 1:
            return made[:, :n]
    return None


def cells(model, k: int) -> dict[str, dict]:
    """What is measured: every rule everywhere, and the paper's in one layer or part of the queries only."""
    paper = by_mean(k)
    wanted = {"dense": {}} | {name: {"rule": rule} for name, rule in rules(k).items()}
    layers = sorted(attention_modules(model))
    for layer in layers if len(layers) <= 6 else ():
        wanted[f"mean over heads, {k}, in layer {layer} only"] = {"rule": paper, "layers": {layer}}
    wanted[f"mean over heads, {k}, for the last 64 queries only"] = {"rule": paper, "rows": lambda t, T: t >= T - 64}
    wanted[f"mean over heads, {k}, for all but the last 64 queries"] = {"rule": paper, "rows": lambda t, T: t < T - 64}
    return wanted


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--task", default="niah_single_1")
    parser.add_argument("--texts", default="builtin", help="of the haystack, where the task has one")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--count", type=int, default=60, help="prompts; those that dense attention does not solve are left out")
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    config = {"stage": "oracle_rules", **{name: value for name, value in vars(args).items() if name != "output"}}
    directory = open_run(args.output, config)
    model, tokenizer = checkpoints.load(args.model, dtype=args.dtype, device=args.device)
    needs_text = tasks.TASKS[args.task].needs == "haystack"
    examples = tasks.generate(
        args.task, tokenizer, length=args.length, count=args.count, seed=args.seed,
        haystack=tasks.documents(args.texts.split(",")) if needs_text else None,
    )  # fmt: skip
    wanted = cells(model, args.k)
    prompts = {f"{example.index:04d}": example for example in examples}
    done = records(directory, list(prompts), list(wanted))

    def measure(name: str) -> dict:
        example = prompts[name]
        after = dense_answer(model, tokenizer, example)
        results = {}
        if after is not None:
            ids = torch.tensor([tasks.encode(tokenizer, example)], device=model.device)
            lab = Lab(model)
            try:
                results = {rule: lab.follow(ids, after, **options) for rule, options in wanted.items()}
            finally:
                model.set_attn_implementation(attention_selection(model, "sdpa"))
        say(f"prompt {example.index}: {'not solved' if after is None else sum(same for _, same in results.values())}")
        return {"rules": results}

    done.compute(measure)
    return summarise(directory, config, [record["rules"] for record in done.records().values()], list(wanted))


def records(directory: Path, prompts: list[str], rules: list[str]) -> Cells:
    """A cell a prompt: of every rule the log-likelihood and whether the answer is the same; none where dense fails."""

    def upgrade(name: str, record: dict) -> dict:
        """Until version 0.1 a record held nothing but the rules."""
        record = record if "rules" in record else {"rules": record, "prompt": name}
        check(record["rules"], {rule: [(float, bool), 2] for rule in rules} if record["rules"] else {})
        return record

    return Cells(directory / "cells", {name: {"prompt": name} for name in prompts}, upgrade=upgrade)


def summarise(directory: Path, config: dict, records: list[dict], names: list[str]) -> int:
    solved = [cell for cell in records if cell]
    if not solved:
        raise ValueError(f"dense attention must solve at least one of {len(records)} prompts, got none")
    rows = []
    for name in names:
        shortfall = stats.macro_mean([[cell["dense"][0] - cell[name][0] for cell in solved]])
        same = stats.macro_mean([[float(cell[name][1]) for cell in solved]])
        rows.append({"rule": name, "same": same.to_dict(), "shortfall": shortfall.to_dict()})
    machine = this_machine(config["device"])
    write_json(directory / "report.json", {"config": config, "solved": len(solved), "rows": rows, "machine": machine})
    table = [
        {
            "rule": row["rule"],
            "same answer (%)": "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * row["same"][n] for n in ("value", "low", "high"))),
            "log-likelihood lost (nats)": "{:.3f} [{:.3f}, {:.3f}]".format(
                *(row["shortfall"][n] for n in ("value", "low", "high"))
            ),
        }
        for row in rows
    ]
    text = (
        f"# What should an oracle keep, and what becomes of the rest?\n\n{config['model']}, {config['task']}, {config['length']} "
        f"tokens, {config['dtype']}: the {len(solved)} of {len(records)} prompts that dense attention solves. Evidence: oracle. "
        "Prefill by each rule in all full-attention layers (or where it says), then dense attention's own answer, densely. 95% "
        f"bootstrap intervals over prompts.\n\n{markdown_table(table)}\nMeasured on {machine_line(machine)}.\n"
    )
    write_text(directory / "report.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
