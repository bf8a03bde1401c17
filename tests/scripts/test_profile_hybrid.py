"""scripts/profile_hybrid.py as a user runs it, on a tiny layer of the same architecture."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "profile_hybrid.py"


def test_one_run_compares_numbers_and_times_every_stage(tmp_path):
    options = ["--sizes", "tiny", "--lengths", "70,130", "--check", "67", "--device", "cpu", "--dtype", "bfloat16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *options, "--runs", "1", "--warmup", "0", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "report.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == result
    tiny = result["sizes"]["tiny"]
    assert all(errors["passed"] and 0 <= errors["after"] < 0.05 for errors in tiny["errors"].values())
    assert 0 < tiny["errors"]["output"]["between"] < 0.05
    assert [entry["length"] for entry in tiny["timings"]] == [70, 130]
    for entry in tiny["timings"]:
        assert set(entry["stages_ms"]["after"]) == set(entry["stages_ms"]["before"])
        assert all(took > 0 for name, took in entry["stages_ms"]["after"].items())
        assert entry["stages_ms"]["before"]["gdn delta rule"] > 0
