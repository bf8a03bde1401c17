"""Figures of an oracle study. Colour, in Okabe and Ito's palette, says how many queries share a support."""

from pathlib import Path

from ..runs.figures import new_figure
from ..runs.machine import machine_line
from .config import sparsity

BLOCK_COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00")
CONTROL_STYLES = {"local": ("#555555", "X"), "random": ("#999999", "P")}
MARKERS = {None: "o", "max": "^", "mean": "s"}
HEAD_LINES = {"all": "-", "kv": ":"}
LAYER_LINES = ("--", "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)))  # line styles where two, three, ... layers share a support
MOST_ANNOTATED_LAYERS = 40


def draw(report: dict) -> dict:
    """`{file name: figure}` of a report."""
    drawn = {"quality.png": quality(report)}
    if report["config"]["tasks"]:
        drawn["tasks.png"] = tasks(report)
    if report["layers"]:
        drawn |= {"retained.png": retained(report), "error.png": error(report), "sharing.png": sharing(report)}
    return drawn


def quality(report: dict):
    """KL and agreement against the budget, with the controls and the noise floor."""
    figure, axes = new_figure(columns=2, width=5.6, height=4.4)
    left, right = axes[0]
    rows = [row for row in report["end_to_end"] if "kl" in row]
    for line in _lines(rows):
        _plot_budgets(left, report, line, "kl_second_half")
        _plot_budgets(right, report, line, "agreement_second_half", scale=100)
    floor = next((row for row in rows if row["evidence"] == "noise floor" and row["label"].startswith("dense")), None)
    if floor:
        _floor(left, floor, "kl_second_half")
        _floor(right, floor, "agreement_second_half", scale=100)
    left.set_yscale("log")
    left.set_ylabel("KL(dense || sparse), nats per token")
    right.set_ylabel("same most likely next token as dense, %")
    _budget_axis(left, report)
    _budget_axis(right, report)
    _legend(figure, left)
    _title(
        figure, report, "How close to dense does each budget come?", "second half of each prompt; bars: 95% over prompts"
    )
    return figure


def tasks(report: dict):
    """Task score against the budget, with dense as a line."""
    figure, axes = new_figure(width=7.2, height=4.4)
    ax = axes[0, 0]
    for line in _lines(report["end_to_end"]):
        _plot_budgets(ax, report, line, "score", scale=100)
    dense = next(row for row in report["end_to_end"] if row["evidence"] == "dense")
    _floor(ax, dense, "score", scale=100)
    ax.set_ylabel("mean score, %")
    _budget_axis(ax, report)
    _legend(figure, ax)
    config = report["config"]
    note = f"{', '.join(config['tasks'])}; {config['task_count']} examples each; bars: 95% over examples"
    _title(figure, report, "Does the model still solve the tasks?", note)
    return figure


def retained(report: dict):
    """Heat maps of retained attention mass, layer by budget, one per way of sharing."""
    rows = [row for row in report["layers"] if row["heads"] == _heads(report)[0]]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    layers = sorted({row["layer"] for row in rows})
    budgets = report["config"]["budgets"]
    height = max(3.0, 0.19 * len(layers) + 1.4)
    figure, axes = new_figure(columns=len(labels), width=max(1.9, 0.55 * len(budgets) + 0.6), height=height)
    lowest = min(row["retained_mean"] for row in rows)
    image = None
    for ax, label in zip(axes[0], labels):
        value = {(row["layer"], row["k"]): row["retained_mean"] for row in rows if row["label"] == label}
        grid = [[100 * value[layer, k] for k in budgets] for layer in layers]
        image = ax.imshow(grid, aspect="auto", cmap="cividis", vmin=100 * lowest, vmax=100, interpolation="nearest")
        ax.grid(False)
        ax.set_title(label.replace(", ", "\n"), fontsize=9)
        ax.set_xticks(range(len(budgets)), [str(k) for k in budgets], fontsize=8)
        ax.set_xlabel("budget k, keys")
        ax.set_yticks(range(len(layers)), [str(layer) for layer in layers] if ax is axes[0, 0] else [], fontsize=7)
        if len(layers) <= MOST_ANNOTATED_LAYERS:
            _annotate(ax, grid, 100 * lowest)
    axes[0, 0].set_ylabel("layer")
    figure.colorbar(image, ax=list(axes[0]), label="mass kept, %", shrink=0.9, pad=0.02)
    note = "each layer on its dense inputs; mean over queries of the second half"
    _title(figure, report, "How much of the attention mass fits in the budget?", note)
    return figure


def error(report: dict):
    """Relative output error of every layer at each budget."""
    budgets = report["config"]["budgets"]
    figure, axes = new_figure(columns=len(budgets), width=4.0, height=3.8)
    heads = _heads(report)[0]
    for ax, k in zip(axes[0], budgets):
        for line in _lines([row for row in report["layers"] if row["k"] == k and row["heads"] == heads]):
            x = [row["layer"] for row in line]
            y = [100 * row["output_error"] for row in line]
            ax.plot(x, y, **_style(report, line[0]), linewidth=1.3, markersize=3.5)
        ax.set_title(f"k = {k} ({100 * sparsity(k, report['config']['length']):.0f}% of pairs skipped)", fontsize=9)
        ax.set_xlabel("layer")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_ylim(bottom=0)
        ax.sharey(axes[0, 0])
    axes[0, 0].set_ylabel("output error, % of dense (RMS)")
    _legend(figure, axes[0, 0])
    note = "each layer on its dense inputs, so errors do not add up here"
    _title(figure, report, "Which layers does sparsity hurt?", note)
    return figure


def sharing(report: dict):
    """What a shared support keeps relative to own supports, and how large the exact alternative, their union, is."""
    figure, axes = new_figure(columns=2, width=5.6, height=4.2)
    left, right = axes[0]
    budgets = report["config"]["budgets"]
    heads = _heads(report)[0]
    shades = ("#56B4E9", "#0072B2", "#CC79A7", "#D55E00", "#E69F00", "#009E73")
    for n, k in enumerate(budgets):
        group = [row for row in report["overlap"] if row["heads"] == heads and row["k"] == k]
        names = [name for name in group[0] if name.startswith("union")]
        sizes = [1, *[int(name.removeprefix("union_")) for name in names]]
        times = [1, *[sum(row[name] for row in group) / len(group) / k for name in names]]
        left.plot(sizes, times, color=shades[n % len(shades)], marker="o", label=f"k = {k}")
    left.set_xscale("log", base=2)
    left.set_xticks([1, 8, 16, 64], ["1", "8", "16", "64"])
    left.minorticks_off()
    left.set_ylim(bottom=0)
    left.set_xlabel("neighbouring queries")
    left.set_ylabel("keys in the union of own supports, in k")
    left.set_title("exact: gather the union of everyone's own top-k", fontsize=10)
    left.legend(frameon=False, fontsize=9)
    shared = [row for row in report["layers"] if row["heads"] == heads and row["block"] > 1]
    for shift, line in enumerate(_lines(shared)):
        x = [k * 2 ** (0.07 * (shift - 1.5)) for k in budgets]  # side by side, for the whiskers
        style = _style(report, line[0])
        by_k = [[row for row in line if row["k"] == k] for k in budgets]
        for name, fill, word in (("relative", "full", "k"), ("doubled", "none", "2k")):
            style_here = {**style, "label": f"{style['label'].removeprefix('oracle: ')}: {word} keys"}
            values = [100 * sum(row[f"{name}_mean"] for row in rows) / len(rows) for rows in by_k]
            lows = [100 * sum(row[f"{name}_p5"] for row in rows) / len(rows) for rows in by_k]
            dashes = "-" if name == "relative" else "--"
            line_style = {**style_here, "linestyle": dashes, "fillstyle": fill}
            right.errorbar(
                x, values, yerr=[[max(0, v - low) for v, low in zip(values, lows)], [0] * len(values)],
                capsize=2, elinewidth=0.7, **line_style,
            )  # fmt: skip
    right.axhline(100, color="black", linewidth=0.8)
    _budget_axis(right, report)
    right.set_ylabel("mass kept, % of what own top-k keeps")
    right.set_title("approximate: share one support (whisker: 5th percentile)", fontsize=10)
    if shared:
        _legend(figure, right)
    _title(
        figure, report, "What does sharing a support among neighbours cost?", "mean over layers, on their dense inputs"
    )
    return figure


def _heads(report: dict) -> list[str]:
    return list(dict.fromkeys(row["heads"] for row in report["overlap"]))


def _lines(rows: list[dict]) -> list[list[dict]]:
    """Rows with a budget, by support: each a line of a figure."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if row.get("k") is not None:
            groups.setdefault(row["label"], []).append(row)
    return list(groups.values())


def _style(report: dict, row: dict) -> dict:
    if row["evidence"] == "control":
        colour, marker = CONTROL_STYLES[row["selector"]]
        return {"color": colour, "marker": marker, "linestyle": "--", "label": f"control: {row['label']}"}
    blocks, layers = report["config"]["blocks"], row["share_layers"]
    return {
        "color": BLOCK_COLOURS[blocks.index(row["block"]) % len(BLOCK_COLOURS)],
        "marker": MARKERS[row["reduce"]],
        "linestyle": HEAD_LINES[row["heads"]] if layers == 1 else LAYER_LINES[(layers - 2) % len(LAYER_LINES)],
        "label": f"oracle: {row['label']}",
    }


def _plot_budgets(ax, report: dict, line: list[dict], name: str, scale: float = 1.0) -> None:
    values = [scale * row[name] for row in line]
    ends = [row[f"{name}_interval"] or [row[name], row[name]] for row in line]
    below = [max(0.0, value - scale * low) for value, (low, _) in zip(values, ends)]
    above = [max(0.0, scale * high - value) for value, (_, high) in zip(values, ends)]
    ax.errorbar(
        [row["k"] for row in line], values, yerr=[below, above], elinewidth=0.8, capsize=2, linewidth=1.4, markersize=5,
        **_style(report, line[0]),
    )  # fmt: skip


def _floor(ax, row: dict, name: str, scale: float = 1.0) -> None:
    """A horizontal band: the interval of a row that has no budget."""
    low, high = row[f"{name}_interval"] or [row[name], row[name]]
    ax.axhspan(scale * low, scale * high, color="black", alpha=0.08, linewidth=0)
    label = f"noise floor: {row['label']}" if row["evidence"] == "noise floor" else row["label"]
    ax.axhline(scale * row[name], color="black", linewidth=1.0, linestyle=(0, (1, 1)), label=label)


def _budget_axis(ax, report: dict) -> None:
    config = report["config"]
    ax.set_xscale("log", base=2)
    ticks = [f"{k}\n{100 * sparsity(k, config['length']):.0f}%" for k in config["budgets"]]
    ax.set_xticks(config["budgets"], ticks)
    ax.minorticks_off()
    ax.margins(x=0.08)
    ax.set_xlabel("budget k, keys (below: causal pairs skipped)")


def _annotate(ax, grid: list[list[float]], lowest: float) -> None:
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            dark = value < lowest + 0.45 * (100 - lowest)
            ax.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=6.5, color="white" if dark else "black")


def _legend(figure, ax) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)


def _title(figure, report: dict, question: str, note: str) -> None:
    config = report["config"]
    figure.suptitle(f"{question}\n{Path(config['model']).name}, {config['length']} tokens", fontsize=12)
    figure.supxlabel(f"{note}\n{machine_line(report['machine'])}", fontsize=7, color="#555555")
