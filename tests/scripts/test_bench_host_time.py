"""scripts/bench_host_time.py as a user runs it, on a tiny model on the CPU."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from npu_sparse.measure import clocks

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_host_time.py"
BUDGET = "k=32,block=16,reduce=softmax_max,exact_last=8"
OPTIONS = ["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--length", "96", "--runs", "2", "--warmup", "1"]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("bench_host_time", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_run_times_dense_and_sparse_layers_and_resumes(script, tmp_path, capsys):
    output = tmp_path / "run"
    options = [*OPTIONS, "--lengths", "64", "--sparse", BUDGET, "--functions", "5", "--output", str(output)]
    assert script.main(options) == 0
    report = json.loads((output / "report.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report
    dense, sparse = report["rows"]
    assert (dense["variant"], sparse["variant"]) == ("dense sdpa", f"sparse {BUDGET}")
    assert dense["added_us"] is None and sparse["added_us"] == pytest.approx(sparse["layer_us"] - dense["layer_us"])
    assert dense["projection_us"] is None
    stages = [sparse[f"{stage}_us"] for stage in script.STAGES]
    assert min(stages) > 0 and sum(stages) < sparse["layer_us"]
    assert 0 < dense["operators"] < sparse["operators"]
    assert {(row["length"], row["variant"]) for row in report["ttft"]} == {(64, row["variant"]) for row in report["rows"]}
    host = json.loads((output / "records" / "host.json").read_text())["variants"][f"sparse {BUDGET}"]
    assert [len(run) for run in host["layers_s"]] == [2, 2]  # runs, layers
    assert len(host["functions"]) == 5
    records = {path: path.read_text() for path in (output / "records").iterdir()}
    assert script.main(options) == 0
    assert {path: path.read_text() for path in (output / "records").iterdir()} == records


def test_an_unknown_field_is_refused_before_anything_is_loaded(script, tmp_path):
    with pytest.raises(ValueError, match="budget must name fields among"):
        script.main([*OPTIONS, "--sparse", "size=3", "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_graphs_are_refused_without_a_card(script, tmp_path):
    with pytest.raises(ValueError, match="--graphs must have a CUDA device, got --device cpu"):
        script.main([*OPTIONS, "--graphs", "--output", str(tmp_path / "run")])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_recorded_prefills_are_timed(script, tmp_path):
    options = [*OPTIONS, "--device", "cuda", "--dtype", "bfloat16", "--lengths", "512", "--sparse", BUDGET, "--graphs"]
    assert script.main([*options, "--output", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert all(row["graph_ms"] > 0 for row in report["ttft"])


def test_a_layer_is_issued_once_a_forward(monkeypatch):
    at = iter(range(100))
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(at))
    inner, other = torch.nn.Identity(), torch.nn.Identity()
    with clocks.layers_issued([inner, other], torch.device("cpu")) as seconds:
        other(inner(torch.ones(1)))
    assert seconds == [1, 1]
    inner(torch.ones(1))
    assert len(seconds) == 2
