import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from npu_sparse.distill import DistillConfig
from npu_sparse.measure.frontier import FrontierConfig
from npu_sparse.measure.quality import EvalConfig
from npu_sparse.measure.ttft import TtftConfig
from npu_sparse.runs.machine import ROOT, chosen_dtype, fast_dtype, machine, machine_line


def test_the_machine_is_named_with_its_versions_and_commit():
    facts = machine()
    assert {"processor", "cores", "python", "device", "commit", "dirty", "date", "torch", "transformers"} <= set(facts)
    json.dumps(facts)
    line = machine_line({**facts, "commit": "abc", "dirty": True})
    assert "commit abc+changes" in line and f"torch {facts['torch']}" in line


def test_a_machine_without_git_is_still_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "commit unknown;" in machine_line(machine())


def repository(folder):
    """A repository of somebody else's, with one commit."""
    git = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@e"]
    subprocess.run([*git[:3], "init", "-q"], check=True)
    (folder / "notes.txt").write_text("mine")
    subprocess.run([*git[:3], "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "mine"], check=True)


@pytest.mark.parametrize("place", [".venv/lib/python3/site-packages", "vendor", "."])
def test_the_commit_of_the_repository_that_an_installation_lies_in_is_not_reported(tmp_path, place):
    """An installation is run from somebody else's repository: below its root, and at the root itself."""
    site = tmp_path / place
    site.mkdir(parents=True, exist_ok=True)
    ignored = shutil.ignore_patterns("adapters", "__pycache__")
    shutil.copytree(ROOT / "npu_sparse", site / "npu_sparse", symlinks=True, ignore=ignored)
    repository(tmp_path)
    program = "from npu_sparse.runs.machine import machine; found = machine(); print(repr(found['commit']), found['dirty'])"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    environment.pop("NPU_SPARSE_COMMIT", None)
    shown = subprocess.run([sys.executable, "-c", program], cwd=site, env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "'' False"


def test_the_projects_own_commit_is_reported(monkeypatch):
    monkeypatch.delenv("NPU_SPARSE_COMMIT", raising=False)
    if not (ROOT / ".git").exists():
        pytest.skip("the tree has no history")
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert len(machine()["commit"]) == 12 and head.startswith(machine()["commit"])


@pytest.mark.parametrize("slower, dtype", [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")])
def test_the_fast_dtype_is_decided_by_a_measured_product(monkeypatch, slower, dtype):
    """Whatever flags the processor has: the clock says what the library makes of them."""
    product, clock = torch.Tensor.__matmul__, [0.0]

    def timed(a, b):
        clock[0] += 43.0 if a.dtype == slower else 1.0
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", timed)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    fast_dtype.cache_clear()
    try:
        assert fast_dtype("cpu") == dtype and fast_dtype("cuda") == fast_dtype("npu:1") == "bfloat16"
        assert chosen_dtype("auto", "cpu") == dtype and chosen_dtype("float16", "cpu") == "float16"
        spent = clock[0]
        assert fast_dtype("cpu") == dtype and clock[0] == spent  # once a process
    finally:
        fast_dtype.cache_clear()


@pytest.mark.parametrize("config", [EvalConfig, TtftConfig, FrontierConfig, DistillConfig])
def test_every_stage_takes_it_by_default_and_its_config_says_which(config):
    assert config("m").dtype == fast_dtype("cpu") == config("m").to_dict()["dtype"]
    assert config("m", device="cuda").dtype == "bfloat16" and config("m", dtype="float16").dtype == "float16"
