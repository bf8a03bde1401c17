"""The page of the frontier: rows are joined only where they are one path, and what nobody measured is said."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
specification = importlib.util.spec_from_file_location("frontier_page", ROOT / "scripts" / "frontier_page.py")
frontier_page = sys.modules["frontier_page"] = importlib.util.module_from_spec(specification)
specification.loader.exec_module(frontier_page)

SHARED = "indexer:k=64,block=16"
MODEL = "qwen2.5-coder-0.5b"


def estimate(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def matched(right, count, timed=(), card="NVIDIA H200", commit="abc", adapter="a", **more):
    row = {"variant": SHARED, "evidence": "distilled", "right": estimate(right), "kl": estimate(0.5)}
    row["over_dense"] = estimate(right - 1)
    dense = {"variant": "dense", "evidence": "dense", "right": estimate(1.0), "kl": estimate(0.0), "over_dense": estimate(0.0)}
    clock = [
        {"length": length, "variant": name, "best_dense": "dense fa3", "ttft_s": {"median": seconds, "n": 8},
         "speed_up": estimate(0.4 / seconds)}
        for length in timed for name, seconds in (("dense sdpa", 0.5), ("dense fa3", 0.4), (SHARED, 0.2))
    ]  # fmt: skip
    return {
        "config": {"model": MODEL, "length": 16384, "count": count, "dtype": "bfloat16", "impl": "auto"},
        "base": {"weights_fingerprint": "w"}, "adapter": adapter, "rows": [dense, {**row, **more}], "timings": clock,
        "machines": [{"card": card, "commit": commit}],
    }  # fmt: skip


@pytest.fixture
def rows_of(tmp_path):
    def rows_of(**reports):
        for name, report in reports.items():
            folder = tmp_path / name.replace("_", "-")
            folder.mkdir(exist_ok=True)
            (folder / "report.json").write_text(json.dumps(report))
        return frontier_page.read_all(tmp_path)

    return rows_of


def test_quality_and_time_of_one_path_are_one_row(rows_of):
    rows = rows_of(matched_a=matched(0.5, 30), matched_b=matched(0.7, 20, timed=(16384, 32768), commit="def"))
    shown = [frontier_page.line(row) for row in rows]
    dense, shared, dense32, shared32 = shown
    assert [row["tokens"] for row in shown] == [16384, 16384, 32768, 32768]
    assert dense["TTFT (ms)"] == "400.0" and dense["right (of 100)"].startswith("100.0")
    assert shared["right (of 100)"] == "50.0 [40.0, 60.0]"  # of the run with more prompts
    assert shared["over dense (points)"].startswith("-50.0") and shared["KL (nats)"].startswith("0.5000")
    assert (shared["TTFT (ms)"], shared["dense / this"], shared["commit"]) == ("200.0", "2.00x", "`abc, def`")
    assert shared32["right (of 100)"] == "not measured" and shared32["TTFT (ms)"] == "200.0"
    assert shared["realization gap"] == "not measured" and shared["generated (of 100)"] == "not measured"


@pytest.mark.parametrize("change", [{"card": "another"}, {"adapter": "b"}])
def test_another_device_or_adapter_is_another_row(rows_of, change):
    rows = rows_of(matched_a=matched(0.5, 30), matched_b=matched(0.7, 20, timed=(16384,), **change))
    shared = [row for row in rows if row.path == SHARED]
    assert len(shared) == 2 and {bool(row.time) for row in shared} == {True, False}


def test_gaps_stay_where_the_run_with_more_prompts_has_none(rows_of):
    gaps = {"realization gap": estimate(-0.2)}
    rows = rows_of(matched_a=matched(0.5, 30, gaps=gaps), matched_b=matched(0.7, 200, gaps={}))
    shown = next(frontier_page.line(row) for row in rows if row.path == SHARED)
    assert shown["right (of 100)"].startswith("70.0") and shown["realization gap"] == "-20.0 [-30.0, -10.0]"
    assert shown["oracle gap"] == "not measured"


def test_what_nobody_measured_is_named(rows_of, tmp_path):
    rows = rows_of(matched_a=matched(0.5, 30))
    assert frontier_page.main(["--results", str(tmp_path)]) == 0
    page = (tmp_path / "frontier.md").read_text()
    missing = next(line for line in page.splitlines() if line.startswith(f"| {MODEL} | 16384 | oracle"))
    assert "pooled, shared" in missing and "indexer, shared" not in missing and "indexer, per query" in missing
    assert f"| {MODEL} | 8192 | dense; oracle, per query" in page and "| smollm2-135m | 4096 | dense;" in page
    assert "Threats to validity" in page and (tmp_path / "frontier.png").exists() and len(rows) == 2


def test_the_published_page_is_made_of_the_published_reports():
    page = frontier_page.RESULTS / "frontier.md"
    assert page.read_text() == frontier_page.markdown(frontier_page.read_all(frontier_page.RESULTS))


def test_a_folder_without_reports_is_refused(tmp_path):
    with pytest.raises(ValueError, match="results must hold reports of matched, eval or ttft, got none"):
        frontier_page.main(["--results", str(tmp_path)])
