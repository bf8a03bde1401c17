"""Figures of a report in the house look."""

from .store import write_bytes


def write_figure(path, figure) -> None:
    """`write_bytes` of a matplotlib figure as PNG, 144 dpi."""
    from io import BytesIO

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=144, bbox_inches="tight")
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
