import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

from npu_sparse.runs.store import RunError
from npu_sparse.schedule.candidates import FEATURES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def fit():
    spec = importlib.util.spec_from_file_location("fit_candidates", ROOT / "scripts" / "fit_candidates.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(kernel: str, **speedups: float) -> dict:
    times = {"original": 1.0, "polycc default": 0.1, **{name.replace("_", " "): 1 / s for name, s in speedups.items()}}
    return {"kernel": kernel, "tuning": {name: {"cpu_s": [seconds, 2 * seconds]} for name, seconds in times.items()}}


def test_weights_follow_what_was_fast(fit, monkeypatch, tmp_path, capsys):
    kernels = [record(name, feautrier_0=0.5, pluto_0=2.0, pluto_32=4.0) for name in ("gemm", "mvt", "syrk")]
    (tmp_path / "report.json").write_text(json.dumps({"kernels": kernels}))
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "report.json"), "--output", str(tmp_path / "weights.yaml")])
    fit.main()
    weights = yaml.safe_load((tmp_path / "weights.yaml").read_text())
    assert tuple(weights["features"]) == FEATURES and list(weights["choices"]) == ["feautrier 0", "pluto 0", "pluto 32"]
    assert weights["choices"]["pluto 32"] > weights["choices"]["feautrier 0"]
    shown = capsys.readouterr().out
    assert "best of the first 1: 4x" in shown and "best of all: 4x" in shown
    assert fit._fit(list(weights["choices"]), *fitted(fit, kernels), without="gemm").shape == (len(FEATURES) + 3,)


def test_a_report_without_times_is_refused_by_name(fit, monkeypatch, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"kernels": [{"kernel": "gemm", "tuning": {"pluto 0": {}}}]}))
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "report.json")])
    with pytest.raises(RunError, match=r"report.json cannot be read \(it.kernels\[0\].tuning must have 'original'"):
        fit.main()


def fitted(fit, kernels):
    speedups = {record["kernel"]: fit._speedups(record) for record in kernels}
    return {name: fit._describe(name, list(ratios))[0] for name, ratios in speedups.items()}, speedups
