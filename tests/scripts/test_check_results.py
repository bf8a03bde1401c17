"""A published number that no report has is found; one that a report has is not."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
specification = importlib.util.spec_from_file_location("check_results", ROOT / "scripts" / "check_results.py")
check_results = importlib.util.module_from_spec(specification)
specification.loader.exec_module(check_results)

REPORT = {"rows": [{"tokens": 32768, "ttft_s": 0.0926, "over": 1.713, "score": 0.8533}], "bytes": 3_000_000}


@pytest.fixture
def unfound(tmp_path):
    folder = tmp_path / "results" / "run"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(REPORT))
    (folder / "report.md").write_text("")

    def look(text: str) -> list[str]:
        page = tmp_path / "page.md"
        page.write_text(text)
        return [line.split(": ")[1].split(" in ")[0] for line in check_results.unfound(page)]

    return look


@pytest.mark.parametrize(
    "text, missing",
    [
        ("32K tokens take 0.093 s, 92.6 ms, 1.71x, 85.3 points, 85 %, 3.0 MB", []),
        ("32K tokens take 0.094 s", ["0.094 s"]),
        ("92.7 ms", ["92.7 ms"]),
        ("1.72x", ["1.72x"]),
        ("85.4 points", ["85.4 points"]),
        ("171.3x and 1713 s", ["171.3x", "1713 s"]),  # no speed-up is in per cent, no second in milliseconds
        ("34K", ["34K"]),
        ("`k=777`, H200, Qwen2.5-0.5B, arXiv 2606.07703, commit 29a9c2927d9c: no number", []),
        ("<!-- not in a report: a limit -->\n777 bytes\n\n778 bytes", ["778"]),
        ("| tokens | dense (ms) |\n| --- | --- |\n| 32768 | 92.6 |", []),
        ("| tokens | dense (s) |\n| --- | --- |\n| 32768 | 92.6 |", ["92.6"]),
    ],
)
def test_numbers_are_found_in_the_report_at_the_precision_and_unit_they_are_printed_with(unfound, text, missing):
    assert unfound(f"## Section\n[report](results/run/report.md)\n\n{text}\n") == missing


def test_a_section_that_links_to_no_report_has_no_numbers(unfound):
    assert unfound("## One\n[report](results/run/report.md) 1.71x\n## Two\n1.71x\n") == ["1.71x"]


def test_every_published_number_is_in_a_report():
    assert [line for name in check_results.PAGES for line in check_results.unfound(ROOT / name)] == []


def test_a_changed_figure_of_the_results_page_is_seen(tmp_path):
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    (page.parent / "results").symlink_to(ROOT / "docs" / "results")
    text = (ROOT / "docs" / "results.md").read_text()
    assert "8.19x" in text
    page.write_text(text.replace("8.19x", "8.39x"))
    assert [line for line in check_results.unfound(page) if "8.39x" in line]
