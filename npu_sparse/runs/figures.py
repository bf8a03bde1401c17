"""Figures of a report in the house look."""

from .store import write_bytes

# What is drawn has one colour in every figure (those of Okabe and Ito), dense and the noise around it shades of grey.
PALETTE = {
    "dense": "#222222", "attached": "#8a8a8a", "control": "#8a8a8a", "oracle": "#0072b2", "oracle, per query": "#56b4e9",
    "distilled": "#d55e00", "distilled, per query": "#e69f00", "untrained": "#cc79a7", "local": "#009e73", "random": "#999933",
    "training-free": "#009e73", "pooled": "#44aa99", "antidiagonal": "#117733", "vertical-slash": "#88ccee",
}  # fmt: skip
SERIES = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#999933")  # for whatever else is compared
STAGES = {
    "projection": "#f0e442", "scoring": "#e69f00", "top-k": "#d55e00", "attention": "#0072b2", "gdn": "#009e73",
    "exact": "#999933", "feed-forward": "#56b4e9", "norms": "#cc79a7", "rest": "#cccccc",
}  # fmt: skip
PAPER, RULE = "#ffffff", "#bbbbbb"


def caption(figure, *lines: str) -> None:
    """What was drawn, and on what it was measured, above a figure."""
    figure.suptitle("\n".join(lines), fontsize=8, x=0.01, ha="left")


def write_figure(path, figure) -> None:
    """`write_bytes` of a matplotlib figure as PNG, 144 dpi; what it says above its panels is in the file as Description, too."""
    from io import BytesIO

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=144, bbox_inches="tight", metadata={"Description": figure.get_suptitle()})
    write_bytes(path, buffer.getvalue())


def new_figure(columns: int = 1, rows: int = 1, width: float = 5.2, height: float = 3.6):
    """`(figure, axes array [rows, columns])` on a headless canvas, in the house look."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.grid(True, alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes
