"""`--backend`: the tests of a back-end that cannot run here fail, where without it they skip."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*options: str) -> subprocess.CompletedProcess:
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_select_tokens.py", *options)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif("NPU_SPARSE_RUNTIME_STUB" in os.environ, reason="the stub's npu device runs here")
def test_the_tests_of_a_required_back_end_fail_where_it_cannot_run():
    found = run("--backend", "npu")
    assert found.returncode == 1 and "passed" not in found.stdout and "skipped" not in found.stdout, found.stdout


def test_only_the_tests_of_a_required_back_end_run():
    found = run("--backend", "reference")
    assert found.returncode == 0 and "skipped" not in found.stdout and "passed" in found.stdout, found.stdout


def test_an_unknown_back_end_is_refused():
    found = run("--backend", "card")
    assert found.returncode == 4 and "--backend must name some of" in found.stderr and "'card'" in found.stderr
