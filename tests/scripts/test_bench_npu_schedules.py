import importlib.util
import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load():
    spec = importlib.util.spec_from_file_location("bench_npu_schedules", ROOT / "scripts/bench_npu_schedules.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_ideal_counts_elements_that_enter_and_leave():
    bench = load()
    assert bench.ideal_bytes(bench.builder.add(4, 8), {}) == 4 * 3 * 32
    assert bench.ideal_bytes(bench.builder.lu_decomp(4), {}) == 4 * (16 + 12)  # the first row stays as it is
    assert bench.ideal_bytes(bench.builder.trsmL_off_diag(16, n=4), {}) == 4 * (6 + 64 + 48)
    assert bench.ideal_bytes(bench.builder.softmax(), {"R": 3, "C": 5}) == 4 * 2 * 15  # intermediates move nothing


def test_operands_are_counted_whole():
    bench = load()
    plan = bench.schedule(bench.builder.trsmL_off_diag(16, n=4), "npu-vector")
    assert bench.operand_bytes(bench.compile_plan(plan, {}, 1)) == 4 * (16 + 2 * 64)  # b enters and leaves
    plan = bench.schedule(bench.builder.softmax(), "npu-vector")
    assert bench.operand_bytes(bench.compile_plan(plan, {"R": 3, "C": 5}, 1)) == 4 * 2 * 15


def test_the_sizes_are_those_of_akg():
    names = [case.name for case in load().cases() if case.akg]
    assert len(names) == 17 and {"lu_decomp 16", "trsmL 16", "trsmL_off_diag 16", "trsmU_T 112", "add 1024x32"} <= set(names)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the emulation")
def test_a_report_says_modelled_and_has_every_schedule(tmp_path, capsys):
    assert load().main(["--only", "trsmL", "--output", str(tmp_path / "run")]) == 0
    text = (tmp_path / "run/report.md").read_text()
    assert "No card was used: all cycles below are modelled" in text and text.startswith("# Modelled")
    [row] = json.loads((tmp_path / "run/report.json").read_text())["rows"]
    assert set(row["schedules"]) == {"npu-vector", "pluto", "isl", "isl, re-examined"}
    assert all(entry["error"] <= 1e-5 for entry in row["schedules"].values())
    assert row["schedules"]["npu-vector"]["cycles"] < row["schedules"]["isl"]["cycles"]
