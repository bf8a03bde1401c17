"""scripts/ttft_qwen35.py as a user runs it, on a tiny model of the same architecture."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from npu_sparse import FastHybrid
from npu_sparse.measure.ttft import run as harness
from npu_sparse.measure.ttft.config import by_length
from npu_sparse.measure.variants import budget_of

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "ttft_qwen35.py"
TINY = ["--size", "tiny", "--runs", "2", "--warmup", "1"]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("ttft_qwen35", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, timeout=300)


def test_one_run_compares_dense_and_sparse_and_resumes(tmp_path):
    output = tmp_path / "run"
    options = [*TINY, "--device", "cpu", "--lengths", "48,64", "--sparse", "16:8,8:1", "--dense", "sdpa,eager", "--chunk", "32"]
    done = run(*options, "--profile", str(tmp_path / "profile"), "--output", str(output))
    assert done.returncode == 0, done.stderr
    report = json.loads((output / "report.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == report
    names = ["dense sdpa", "dense eager", "sparse k 16, b_sel 8", "sparse k 8, b_sel 1"]
    assert [(row["length"], row["variant"]) for row in report["rows"]] == [(n, name) for n in (48, 64) for name in names]
    assert {row["evidence"] for row in report["rows"]} == {"dense", "untrained"}
    assert all(row["ttft_s"] > 0 and row["stages_s"]["attention"] > 0 for row in report["rows"])
    assert sum("amdahl_ceiling" in row for row in report["rows"]) == 4
    assert {row["layers"] for row in report["rows"]} == {"stock"}
    assert all(set(row["over"]) == {"dense sdpa", "dense eager"} for row in report["rows"])
    for row in report["rows"]:
        stages = row["stages_s"]
        assert all(stages[name] > 0 for name in ("gdn", "feed-forward", "norms", "attention", "rest"))
        assert sum(stages.values()) == pytest.approx(2 * stages["total"])
    assert len(list((tmp_path / "profile").iterdir())) == 8
    records = {path: path.read_text() for path in (output / "records").iterdir()}
    again = run(*options, "--output", str(output))
    assert again.returncode == 0, again.stderr
    assert {path: path.read_text() for path in (output / "records").iterdir()} == records


def test_fast_and_stock_layers_are_compared_with_their_own_kind(script, tmp_path, monkeypatch):
    attached, attach = [], FastHybrid.attach
    monkeypatch.setattr(FastHybrid, "attach", lambda model: attached.append(model) or attach(model))
    options = [*TINY, "--device", "cpu", "--lengths", "48", "--sparse", "16:8:reduce=mean", "--hybrid", "fast,stock"]
    assert script.main([*options, "--crossover", str(tmp_path / "crossover.json"), "--output", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    rows = {row["variant"]: row for row in report["rows"]}
    sparse = "sparse k 16, b_sel 8, reduce mean"
    assert set(rows) == {f"{name} ({kind} layers)" for name in ("dense sdpa", sparse) for kind in ("fast", "stock")}
    assert set(rows[f"{sparse} (fast layers)"]["over"]) == {"dense sdpa (fast layers)"}
    # once to see that they run, then two of four variants: rounds, warm-up and the run with clocks
    assert len(attached) == 1 + 2 * (2 + 1 + 1)
    assert (tmp_path / "run" / "report.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "crossover.json").read_text()) == []  # only plain budgets are kept


def test_a_time_budget_stops_after_a_length_and_the_same_command_goes_on(script, tmp_path, capsys):
    options = [*TINY, "--device", "cpu", "--lengths", "40,64,48", "--sparse", "16:8", "--output", str(tmp_path / "run")]
    crossover = tmp_path / "crossover.json"
    assert script.main([*options, "--budget-s", "0"]) == script.UNFINISHED
    assert "stopped for --budget-s before 64, 48 tokens" in capsys.readouterr().err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["missing"] == [64, 48] and {row["length"] for row in report["rows"]} == {40}
    first = (tmp_path / "run" / "records" / "40.json").read_text()
    assert script.main([*options, "--budget-s", "10000", "--crossover", str(crossover)]) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["missing"] == []
    assert (tmp_path / "run" / "records" / "40.json").read_text() == first
    (figure,) = json.loads(crossover.read_text())
    assert figure["lengths"] == [40, 48, 64] and figure["device"] == "cpu" and figure["dense"] == "sdpa"
    assert (figure["query_heads"], figure["k"], figure["block"]) == (4, 16, 8)


def test_running_out_of_memory_is_recorded_by_name_and_the_others_go_on(script, tmp_path, monkeypatch, capsys):
    prefill, tried = harness._prefill, []

    def starved(config, subject, way, *rest):
        if not way.dense:
            budget = budget_of(way.variant, config.budget)
            tried.append(budget.k)
            if budget.k == 8 or tried.count(16) == 3:  # 16 only once: what was fragmented is returned
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB\nmore")
        return prefill(config, subject, way, *rest)

    monkeypatch.setattr(harness, "_prefill", starved)
    options = [*TINY, "--device", "cpu", "--lengths", "48", "--sparse", "16:8,8:8", "--output", str(tmp_path / "run")]
    assert script.main(options) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["variant"] for row in report["rows"]] == ["dense sdpa", "sparse k 16, b_sel 8"]
    reason = "out of memory at 48 tokens: CUDA out of memory. Tried to allocate 2 TiB"
    assert report["refused"] == [["sparse k 8, b_sel 8", reason]]
    assert "- sparse k 8, b_sel 8: out of memory at 48 tokens" in capsys.readouterr().out
    assert tried.count(8) == 2 and tried.count(16) == 1 + 2 + 1 + 2


def test_another_error_ends_the_run_with_a_status_after_the_rest_is_measured(script, tmp_path, monkeypatch, capsys):
    prefill = harness._prefill

    def broken(config, subject, way, *rest):
        if not way.dense:
            raise ValueError("no such kernel")
        return prefill(config, subject, way, *rest)

    monkeypatch.setattr(harness, "_prefill", broken)
    options = [*TINY, "--device", "cpu", "--lengths", "48", "--sparse", "16:8", "--output", str(tmp_path / "run")]
    assert script.main(options) == 1
    assert [row["variant"] for row in json.loads((tmp_path / "run" / "report.json").read_text())["rows"]] == ["dense sdpa"]
    assert "did not: sparse k 16, b_sel 8 (ValueError at 48 tokens: no such kernel)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dense", "fa3", "--sparse", "16:8"], "dense fa3 must have FlashAttention-3: run `pip install fa3-fwd`"),
        (["--sparse", "16:8:colour=3"], "budget must name fields among .*, got 'colour'"),
        (["--hybrid", "faster"], "--hybrid must be fast, stock or both, got 'faster'"),
    ],
)
def test_what_it_cannot_run_is_refused_in_a_sentence(script, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(script.baselines, "FA3_MODULES", ("a_module_that_is_not_there",))
    with pytest.raises((ValueError, ImportError), match=message):
        script.main([*TINY, "--device", "cpu", "--lengths", "48", *arguments, "--output", str(tmp_path / "run")])


def test_rounds_by_length():
    assert by_length("runs", "5", 99, 1) == 5
    assert [by_length("runs", "64=4,256=2", length, 1) for length in (8, 64, 255, 256, 999)] == [4, 4, 4, 2, 2]


@pytest.mark.skipif("NPU_SPARSE_RUNTIME_STUB" in os.environ, reason="torch_npu is there")
def test_without_torch_npu_one_sentence_says_where_to_look(tmp_path):
    refused = run(*TINY, "--device", "npu", "--lengths", "48", "--sparse", "16:8", "--output", str(tmp_path / "run"))
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].endswith("see docs/ascend.md")
    assert refused.stderr.strip().splitlines()[-1].startswith("error: device 'npu' must have torch_npu and CANN")
