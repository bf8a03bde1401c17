#!/usr/bin/env python3
"""Is every published number in the report that it is read from?

    python scripts/check_results.py [PAGE ...]

A section of README.md, docs/results.md or docs/results/frontier.md (from one heading to the next) may state what stands in the
report.json and config.json of the reports that it links to, at the precision it is written with: as it is, or in the unit that
stands behind it (per cent, ms, us, K, M, MB, GB). Code, links, names and versions are no numbers. A paragraph that has its
numbers from elsewhere says so in front of it: `<!-- not in a report: reason -->`. Exit status 1, and a line for every number
that is not found.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/results.md", "docs/results/frontier.md")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
REPORT = re.compile(r"\]\(([^()\s]*results/[^()\s]*)/report\.md\)")
ESCAPED = re.compile(r"<!-- not in a report: \S.*? -->\n(?:.+\n?)*")
# these only look like numbers: places in lists, code, link targets, papers, commits, names that hold digits, kinds of interval
NO_NUMBER = re.compile(
    r"^\d+\. |Python \d\.\d+|`[^`]*`|\]\([^)]*\)|<!--.*?-->|arXiv \d+\.\d+|commit [0-9a-f]{7,}|\b[A-Za-z][\w.-]*\d[\w.-]*"
    r"|\b\d+\.?\d*B\b|95 ?% (?=bootstrap|interval)",
    re.M | re.S,
)
NUMBER = re.compile(
    r"(?<![\w.,])[-+]?(\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?)(?![\w.]*\d)(x\b| ?%| ?ms\b| ?us\b| ?s\b|[KM]\b| (?:GB|MB|points)\b)?"
)
# factors by which a number in this unit may be scaled; a score out of 100 is a share in the report
SCALES = {
    "": (1,), "x": (1,), "s": (1,), "ms": (1, 1e3), "us": (1, 1e6), "score": (1, 100), "%": (1, 100), "K": (1 / 1024, 1e-3),
    "M": (1 / 2**20, 1e-6), "GB": (1, 1e-9), "MB": (1, 1e-6),
}  # fmt: skip


def numbers(value) -> set[float]:
    """All numbers of a JSON value: leaves, keys, and in strings."""
    if isinstance(value, dict):
        return set().union(*(numbers(part) for pair in value.items() for part in pair), set())
    if isinstance(value, list):
        return set().union(*map(numbers, value), {float(len(value))})
    if isinstance(value, bool) or value is None:
        return set()
    if isinstance(value, (int, float)):
        return {abs(float(value))}
    return {float(digits) for digits in re.findall(r"\d+(?:\.\d+)?", str(value))}


def known(folder: Path) -> set[float]:
    """The numbers of a run's report and config."""
    values = set()
    for name in ("report.json", "config.json"):
        if (folder / name).exists():
            values |= numbers(json.loads((folder / name).read_text()))
    return values


def states(text: str, value: float) -> bool:
    """Whether `text`, as printed, may stand for `value`: within half of its last digit."""
    digits = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5000001 * 10.0**-digits


def sections(text: str):
    """`(heading, body)` of every section."""
    parts = re.split(r"^(#+ .*)$", FENCE.sub("", text), flags=re.M)
    return zip(["", *parts[1::2]], [parts[0], *parts[2::2]])


def unit_of(line: str, place: int, header: str) -> str:
    """The unit that the header of a table states for the column of a cell, as in "dense (ms)"; "score" in text and elsewhere."""
    cells = header.split("|")
    column = line[:place].count("|")
    stated = re.search(r"\((ms|us|s|%|MB|GB)\)", cells[column]) if line.startswith("|") and column < len(cells) else None
    return {"s": ""}.get(stated[1], stated[1]) if stated else "score"


def unfound(page: Path) -> list[str]:
    """`heading: number ... line` of every number of the page that none of its section's reports has."""
    missing = []
    for heading, body in sections(page.read_text()):
        folders = {(page.parent / link).resolve() for link in REPORT.findall(body)}
        values = set().union(*map(known, folders)) if folders else set()
        header = ""
        for line in NO_NUMBER.sub(" ", ESCAPED.sub("", body)).splitlines():
            header = "" if not line.startswith("|") else header or line
            for match in NUMBER.finditer(line):
                scales = SCALES[(match[2] or "").strip().replace("points", "score") or unit_of(line, match.start(), header)]
                if not any(states(match[1].replace(",", ""), value * scale) for value in values for scale in scales):
                    missing.append(f"{page.name}, {heading.strip('# ') or 'top'}: {match[0]} in {line.strip()[:100]!r}")
    return missing


def main(arguments: list[str]) -> int:
    pages = [Path(name) for name in arguments] or [ROOT / name for name in PAGES]
    missing = [line for page in pages for line in unfound(page)]
    print("\n".join(missing) or f"every number of {', '.join(page.name for page in pages)} is in a report")
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
