"""Pages of a report, and lines for the person who waits."""

import sys


def markdown_table(rows: list[dict], columns: dict[str, str] | None = None) -> str:
    """A markdown table of dicts; `columns` maps keys to headings, in order. Floats show 4 significant digits."""
    columns = columns or {key: key for key in rows[0]}
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def say(message: str) -> None:
    """One line for the person who waits, on stderr."""
    print(message, file=sys.stderr, flush=True)
