"""The AscendC kernels sparse_attention and attention_mass on the emulation, against double precision."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

OPS = Path(__file__).parents[2] / "ops"
CHECKS = [
    "limits",
    "attention_shapes",
    "attention_tuned",
    "attention_lengths",
    "attention_causal",
    "attention_empty",
    "attention_future",
    "attention_gather",
    "attention_seeds",
    "mass_shapes",
    "mass_tuned",
    "mass_lengths",
    "mass_padding",
    "mass_seeds",
]


def compiled(directory: Path, *options: str) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler: install g++ or set CXX")
    program = directory / "attention"
    source = OPS / "ascendc" / "tests" / "attention.cpp"
    flags = ["-std=c++17", "-pthread", "-Wall", "-Wextra", f"-I{OPS / 'emulation'}", *options]
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    return compiled(tmp_path_factory.mktemp("attention"), "-O2")


@pytest.mark.parametrize("check", CHECKS)
def test_kernel(driver, check):
    run = subprocess.run([driver, check], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_every_check_of_the_driver_runs_here(driver):
    usage = subprocess.run([driver], capture_output=True, text=True).stderr
    assert {line.strip() for line in usage.splitlines() if line.startswith("  ")} == set(CHECKS)


def test_kernels_run_with_the_macro_of_older_toolkits(tmp_path):
    """In place of attributes; the emulation holds it against the launch as well."""
    program = compiled(tmp_path, "-O1", "-DNPU_SPARSE_TASK_TYPE_MACRO")
    for check in ("attention_empty", "mass_padding"):
        run = subprocess.run([program, check], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
