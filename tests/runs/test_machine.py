import json

from npu_sparse.runs.machine import machine, machine_line


def test_the_machine_is_named_with_its_versions_and_commit():
    found = machine()
    assert {"processor", "cores", "python", "device", "commit", "dirty", "date", "torch", "transformers"} <= set(found)
    json.dumps(found)
    line = machine_line({**found, "commit": "abc", "dirty": True})
    assert "commit abc+changes" in line and f"torch {found['torch']}" in line


def test_a_machine_without_git_is_still_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "commit unknown;" in machine_line(machine())
