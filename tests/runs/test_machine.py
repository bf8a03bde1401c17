import json
import os
import shutil
import subprocess
import sys

import pytest

from npu_sparse.runs.machine import ROOT, machine, machine_line


def test_the_machine_is_named_with_its_versions_and_commit():
    found = machine()
    assert {"processor", "cores", "python", "device", "commit", "dirty", "date", "torch", "transformers"} <= set(found)
    json.dumps(found)
    line = machine_line({**found, "commit": "abc", "dirty": True})
    assert "commit abc+changes" in line and f"torch {found['torch']}" in line


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
