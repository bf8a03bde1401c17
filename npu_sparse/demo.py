"""All stages on a real checkpoint, in minutes: how much dense attention it needs, how much of that the shipped indexer finds,
what sharing supports costs, and what prefill gains. Each part is the stage of the same name at a small size."""

from pathlib import Path

from . import checkpoints
from .distill import DistillConfig
from .distill.data import Contexts
from .distill.validate import validate
from .indexer import Indexer, shipped
from .measure.quality import MACRO, EvalConfig, points, run_eval
from .measure.quality.forced import nats
from .measure.ttft import TtftConfig, run_ttft
from .oracle import OracleConfig, run_oracle
from .runs.figures import PALETTE, caption, new_figure, write_figure
from .runs.machine import fast_dtype, machine, machine_line
from .runs.page import markdown_table, say
from .runs.store import open_run, write_json, write_text

TEXTS = ("builtin",)
RECALL_BUDGETS, RECALL_LENGTH = (128, 256, 512), 1024


def run_demo(output, model_name: str = "smollm2-135m") -> dict:
    """Writes `output`/report.md with its parts beside it and returns the summary; running it again resumes."""
    if model_name not in shipped():
        raise ValueError(f"model must be one with a shipped adapter ({', '.join(shipped())}), got {model_name!r}")
    dtype = fast_dtype()
    output = open_run(output, {"stage": "demo", "model": model_name, "dtype": dtype})
    say(f"1/5 checkpoint: {model_name} in {dtype}")
    model, tokenizer = checkpoints.load(model_name, dtype=dtype)
    indexer = Indexer.from_pretrained(model_name)
    loaded = {"model": model, "tokenizer": tokenizer}

    say("2/5 oracle: how much dense attention does it need?")
    oracle = run_oracle(_oracle_config(model_name, dtype), output / "oracle", **loaded)
    say("3/5 indexer: how much of that does the distilled indexer find?")
    recall = _recall(model, tokenizer, indexer, model_name, output / "recall")
    say("4/5 quality: what do the oracle, the indexer and sharing cost on tasks?")
    quality = run_eval(_eval_config(model_name, dtype), output / "eval", indexer=indexer, **loaded)
    say("5/5 TTFT: what does prefill gain?")
    ttft = run_ttft(_ttft_config(model_name, model, dtype), output / "ttft", indexer=indexer, **loaded)

    summary = _summary(oracle, recall, quality, ttft)
    write_json(output / "report.json", {"stage": "demo", "machine": machine(), "summary": summary})
    write_figure(output / "report.png", _figure(model_name, oracle, quality, ttft))
    text = _markdown(model_name, summary)
    write_text(output / "report.md", text)
    print(markdown_table(summary))
    print(f"Report: {output / 'report.md'}")
    return {"summary": summary}


def _oracle_config(name: str, dtype: str) -> OracleConfig:
    noise_dtype = "auto" if dtype == "bfloat16" else "none"  # a dense run in bfloat16 would take most of the time
    return OracleConfig(
        model=name, length=1024, budgets=(64, 256), texts=TEXTS, prompts=1, heads=("all",), blocks=(1, 64), reduces=("max",),
        controls=("local",), position_stride=4, dtype=dtype, noise_dtype=noise_dtype,
    )  # fmt: skip


def _eval_config(name: str, dtype: str) -> EvalConfig:
    return EvalConfig(
        model=name, adapter=name, tasks=("niah_single_2",), length=1024, count=4, budget="k=128,block=64", batch=4,
        variants=("dense", "oracle-shared", "indexer-shared", "local:block=64"), max_new_tokens=16, texts=TEXTS, dtype=dtype,
        instruments=("forced",), stress=False,  # at this size no task tells an indexer from a control, and KL does
    )  # fmt: skip


def _ttft_config(name: str, model, dtype: str) -> TtftConfig:
    longest = min(4096, model.config.get_text_config().max_position_embeddings)
    return TtftConfig(
        model=name, adapter=name, lengths=(1024, longest), budget="k=512,block=64", variants=("dense", "indexer-shared"), runs=2,
        warmup=1, stage_runs=1, texts=TEXTS, dtype=dtype,
    )  # fmt: skip


def _recall(model, tokenizer, indexer, name: str, directory: Path) -> dict:
    config = DistillConfig(
        model=name, texts=TEXTS, tasks=(), task_fraction=0.0, validation_prompts=1, validation_length=RECALL_LENGTH,
        budgets=RECALL_BUDGETS,
    )  # fmt: skip
    directory = open_run(directory, {"stage": "recall", **config.to_dict()})
    report = validate(model, indexer, Contexts(config, tokenizer).held_out(), config.budgets)
    write_json(directory / "report.json", {**report, "machine": machine()})
    return report


def _summary(oracle: dict, recall: dict, quality: dict, ttft: dict) -> list[dict]:
    rows = []
    for row in oracle["end_to_end"]:
        if row["evidence"] == "noise floor" or row.get("k") == 256:
            sharing = f"k 256 of {oracle['config']['length']}" if "k" in row else ""
            rows.append(_row("How much dense attention is needed?", f"{row['label']}, {sharing}".rstrip(", "), row["evidence"],
                             f"next token agrees with dense {row['agreement']:.1%}, KL {row['kl']:.4f} nats"))  # fmt: skip
    for k in ("128", "256", "512"):
        answer = f"{recall['mass_recall'][k]:.1%} of the oracle's mass, {recall['support_recall'][k]:.1%} of its keys"
        rows.append(_row("How well does the indexer find it?", f"per query, k {k} of {RECALL_LENGTH}", "distilled", answer))
    forced = (quality.get("forced") or {"rows": []})["rows"]
    divergence = {row["variant"]: row["kl"] for row in forced if row["task"] == MACRO and row["variant"] != "dense"}
    for row in quality["rows"]:
        if row["task"] == MACRO:
            where = row["label"] + (f", k {row['k']} of {quality['config']['length']}" if row["k"] else "")
            score = f"score {points(row['score'])} of 100"
            if row.get("variant") in divergence:
                score += f", KL {nats(divergence[row['variant']])} nats"
            rows.append(_row("What do selecting and sharing cost?", where, row["evidence"], score))
    for row in ttft["rows"]:
        label = f"{row['label']}, {row['length']} tokens"
        gain = "" if row["variant"] == "dense" else f", {row['speed_up']['value']:.2f}x dense"
        rows.append(_row("What does prefill gain?", label, row["evidence"], f"TTFT {row['ttft_s']['median']:.2f} s{gain}"))
    for ceiling in ttft["ceilings"]:
        rows.append(_row("What does prefill gain?", f"ceiling: attention free, {ceiling['length']} tokens", "measured",
                         f"{ceiling['ceiling']:.2f}x dense"))  # fmt: skip
    return rows


def _figure(name: str, oracle: dict, quality: dict, ttft: dict):
    """The story in three panels: what dense attention needs, what selecting and sharing cost, and what prefill gains."""
    figure, axes = new_figure(columns=3, width=4.4, height=3.4)
    needs, costs, gains = axes[0]
    for evidence in ("oracle", "control"):
        lines: dict[str, list] = {}
        for row in oracle["end_to_end"]:
            if row["evidence"] == evidence:
                lines.setdefault(row["label"], []).append((row["k"], 100 * row["agreement"]))
        for label, line in lines.items():
            colour = PALETTE["oracle, per query" if label == "per query" else evidence]
            needs.plot(*zip(*sorted(line)), "o-", markersize=4, linewidth=1.2, color=colour, label=f"{label} ({evidence})")
    needs.set(xlabel=f"keys read per query, of {oracle['config']['length']}", ylabel="next token as dense says (%)")
    needs.set_title("How much dense attention is needed?", fontsize=10, loc="left")
    shown = [row for row in quality["forced"]["rows"] if row["task"] == MACRO and row["variant"] != "dense"]
    for n, row in enumerate(shown):
        kl = row["kl"]
        costs.errorbar(
            [kl["value"]], [n], xerr=[[max(0.0, kl["value"] - kl["low"])], [max(0.0, kl["high"] - kl["value"])]], fmt="o",
            markersize=5, capsize=2, color=PALETTE[row["evidence"]],
        )  # fmt: skip
    costs.set_yticks(range(len(shown)), [row["label"] for row in shown], fontsize=8)
    costs.invert_yaxis()
    costs.set_xscale("symlog", linthresh=0.01)
    costs.set_xlim(left=0)
    costs.set_xlabel(f"KL of the answer to dense (nats), k {shown[0]['k']} of {quality['config']['length']}" if shown else "")
    costs.set_title("What do selecting and sharing cost?", fontsize=10, loc="left")
    for variant in dict.fromkeys(row["variant"] for row in ttft["rows"]):
        line = [row for row in ttft["rows"] if row["variant"] == variant]
        points_ = [(row["length"], row["ttft_s"]["median"]) for row in line]
        gains.plot(*zip(*points_), "o-", markersize=4, color=PALETTE[line[0]["evidence"]], label=line[0]["label"])
    gains.set(xlabel="prompt (tokens)", ylabel="TTFT (s), median", ylim=(0, None))
    gains.set_title("What does prefill gain?", fontsize=10, loc="left")
    for ax in (needs, gains):
        ax.legend(fontsize=7.5, frameon=False)
    caption(figure, f"{name}, few prompts and runs; measured: {machine_line(machine())}")
    return figure


def _row(question: str, what: str, evidence: str, answer: str) -> dict:
    return {"question": question, "what": what, "evidence": evidence, "found": answer}


def _markdown(name: str, summary: list[dict]) -> str:
    return (
        f"# npu-sparse on {name}\n\n![what it needs, what it costs, what it gains](report.png)\n\n{markdown_table(summary)}\n"
        "Few prompts and runs, so that it takes minutes: read the intervals. The wide runs are in docs/results.\n\n"
        f"All measured on {machine_line(machine())}.\n\n"
        "## How much dense attention is needed?\n\n![quality](oracle/quality.png)\n![retained](oracle/retained.png)\n"
        "[report](oracle/report.md)\n\n"
        "## What do selecting and sharing cost?\n\n![eval](eval/report.png)\n[report](eval/report.md)\n\n"
        "## What does prefill gain?\n\n![ttft](ttft/report.png)\n[report](ttft/report.md)\n"
    )
