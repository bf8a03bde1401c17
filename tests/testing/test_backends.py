"""`--backend` and NPU_SPARSE_REQUIRE: the tests of a back-end that cannot run here fail, where without them they skip."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*options: str, tests: str = "tests/ops/test_select_tokens.py", **environment: str) -> subprocess.CompletedProcess:
    command = (sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", tests, *options)
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif("NPU_SPARSE_RUNTIME_STUB" in os.environ, reason="the stub's npu device runs here")
def test_the_tests_of_a_required_back_end_fail_where_it_cannot_run():
    done = run("--backend", "npu")
    assert done.returncode == 1 and "passed" not in done.stdout and "skipped" not in done.stdout, done.stdout


def test_only_the_tests_of_a_required_back_end_run():
    done = run("--backend", "reference")
    assert done.returncode == 0 and "skipped" not in done.stdout and "passed" in done.stdout, done.stdout


def test_an_unknown_back_end_is_refused():
    done = run("--backend", "card")
    assert done.returncode == 4 and "--backend must name some of" in done.stderr and "'card'" in done.stderr


@pytest.mark.skipif("NPU_SPARSE_RUNTIME_STUB" in os.environ, reason="the stub's npu device runs here")
def test_on_a_card_that_is_required_tests_fail_by_the_name_of_their_back_end():
    """Beside the other back-ends, which skip as ever; a test with "npu" in its name is none of the card's."""
    chosen = ("-k", "(npu or reference) and not cuda and not hypothesis")
    done = run(*chosen, NPU_SPARSE_REQUIRE="npu")
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED") or line.startswith("ERROR")]
    assert done.returncode == 1 and failed and all("[npu" in line or "-npu" in line for line in failed), done.stdout
    assert "passed" in done.stdout


CASES = """
import pytest

@pytest.mark.parametrize("backend", ["npu", "reference"])
def test_that_skips(backend):
    pytest.skip("nothing to do")

@pytest.mark.parametrize("backend", ["npu"])
def test_of_an_operator_that_has_no_kernel_there(backend):
    pytest.skip("select_two_level has no kernel on 'npu': it has kernels for cuda only: pass impl='reference'")

def test_about_npu():
    pytest.skip("no card")
"""


def test_what_a_test_itself_skips_is_a_failure_of_a_required_back_end(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    (tmp_path / "test_cases.py").write_text(CASES)
    at = ("--rootdir", str(tmp_path), "-o", "addopts=")
    done = run(*at, tests=str(tmp_path), NPU_SPARSE_REQUIRE="npu")
    assert "1 failed, 3 skipped" in done.stdout and "must run on 'npu', got Skipped: nothing to do" in done.stdout, done.stdout
    assert "4 skipped" in run(*at, tests=str(tmp_path)).stdout


def test_an_unknown_required_back_end_is_refused():
    done = run(NPU_SPARSE_REQUIRE="card")
    assert done.returncode == 4 and "NPU_SPARSE_REQUIRE must name some of" in done.stderr and "'card'" in done.stderr
