"""scripts/ttft_qwen35.py as a user runs it, on a tiny model of the same architecture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "ttft_qwen35.py"
TINY = ["--size", "tiny", "--runs", "2", "--warmup", "1"]


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
    assert sum("amdahl_ceiling" in row for row in report["rows"]) == 2
    assert len(list((tmp_path / "profile").iterdir())) == 8
    records = {path: path.read_text() for path in (output / "records").iterdir()}
    again = run(*options, "--output", str(output))
    assert again.returncode == 0, again.stderr
    assert {path: path.read_text() for path in (output / "records").iterdir()} == records


@pytest.mark.skipif("NPU_SPARSE_RUNTIME_STUB" in os.environ, reason="torch_npu is there")
def test_without_torch_npu_one_sentence_says_where_to_look(tmp_path):
    refused = run(*TINY, "--device", "npu", "--lengths", "48", "--output", str(tmp_path / "run"))
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].endswith("see docs/ascend.md")
    assert refused.stderr.strip().splitlines()[-1].startswith("error: device 'npu' must have torch_npu and CANN")
