"""The indexer's AscendC kernels on the host emulation: the tests of ops/ascendc/tests/indexer.cpp, one by one."""

import shutil
import subprocess
from pathlib import Path

import pytest

OPS = Path(__file__).parents[2] / "ops"
TESTS = [
    "scores_of_random_shapes",
    "scores_of_long_rows",
    "selection_of_random_scores",
    "selection_of_long_rows",
    "fused_equals_the_reference_set",
    "fused_of_long_rows",
    "full_buffers_fit",
    "rows_in_ub_are_those_of_the_readme",
    "ties_go_to_the_smaller_position",
    "fused_mean_selects_by_its_scores",
    "partitions_of_random_shapes",
    "scores_are_less_their_partitions",
    "fused_selects_less_its_partitions",
    "nan_in_invisible_keys_does_not_leak",
    "nan_in_future_keys_stays_in_the_future",
    "hundred_seeds_are_identical",
    "refusals_name_the_rule",
]
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulated kernels need g++")


@pytest.fixture(scope="session")
def indexer(tmp_path_factory):
    program = tmp_path_factory.mktemp("indexer") / "indexer"
    command = ["g++", "-std=c++17", "-O1", "-pthread", f"-I{OPS / 'emulation'}", OPS / "ascendc/tests/indexer.cpp", "-o", program]
    subprocess.run(command, check=True)
    return program


def test_every_test_of_the_program_is_listed_here(indexer):
    listed = subprocess.run([indexer], capture_output=True, text=True, check=True).stdout.split()
    assert listed == sorted(TESTS)


@pytest.mark.parametrize("name", TESTS)
def test_indexer_kernels(indexer, name):
    done = subprocess.run([indexer, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
