"""From a kernel to its modelled time: the trace program, the trace, the pipeline model."""

import shutil
import subprocess
from pathlib import Path

import pytest

from npu_sparse.measure import npu_cost as cost

ROOT = Path(__file__).resolve().parents[2]
GROUP, DIM, QUERIES, KEYS, K, BLOCK = 4, 64, 64, 512, 128, 32


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("the trace program needs g++: install it")
    program = tmp_path_factory.mktemp("trace") / "sparse_attention"
    command = ["g++", "-std=c++17", "-O1", "-pthread", "-DNPU_SPARSE_OPERATOR=1", "-I", str(ROOT / "ops/emulation")]
    subprocess.run([*command, "-o", str(program), str(ROOT / "ops/emulation/tools/trace.cpp")], check=True)

    def run(k=K, length=2.0, dim=DIM):
        path = program.with_suffix(".json")
        arguments = map(str, (GROUP, dim, QUERIES, KEYS, k, BLOCK, length, 0))
        subprocess.run([str(program), str(path), *arguments], check=True, capture_output=True, text=True)
        return cost.load_trace(path)

    return run


def test_products_of_a_trace_are_those_of_the_operator(attention):
    rows = QUERIES * GROUP
    assert cost.simulate(attention()).mac == 2 * rows * K * DIM  # q k^T and p v; 128 keys are one whole chunk
    assert cost.simulate(attention(k=256)).mac == 2 * rows * 256 * DIM


def test_gathered_bytes_of_a_trace_are_those_of_the_supports(attention):
    few, many = (cost.simulate(attention(k=k)).gm_read for k in (128, 256))
    gathered = 2 * (QUERIES // BLOCK) * 128 * DIM * 2  # k and v of 128 more keys for every support, 16-bit
    assert many - few >= gathered


def test_longer_runs_take_fewer_copies_and_less_time(attention):
    short, long = (cost.simulate(attention(k=256, length=length)) for length in (1.0, 64.0))
    assert long.busy["AIC.MTE2"] < short.busy["AIC.MTE2"]
    assert long.cycles < short.cycles
    assert long.mac == short.mac


def test_a_copy_brings_the_next_run_too_where_it_is_no_shorter(attention):
    trace = attention(k=128, length=2.0)
    opcode, bursts = (trace["columns"].index(name) for name in ("opcode", "bursts"))
    (cube,) = (core for core in trace["cores"] if core["cube"])
    brought = [step[bursts] for step in cube["steps"] if step[opcode] == "DataCopy(Nd2Nz)"]
    gathered = [rows for rows in brought if rows < BLOCK]  # all others: queries, values and weights, 32 or 128 rows
    assert sum(gathered) == (QUERIES // BLOCK) * 128
    assert len(gathered) < 0.8 * sum(gathered) / 2  # of as many runs


def test_problems_outside_the_limits_are_refused(attention):
    with pytest.raises(subprocess.CalledProcessError) as refused:
        attention(dim=72)
    assert refused.value.stderr.strip() == "D must be a multiple of 16 from 16 to 256, got 72 (nearest: 80)"


@pytest.fixture(scope="module")
def selection(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("the trace program needs g++: install it")
    program = tmp_path_factory.mktemp("trace") / "select_by_index"
    command = ["g++", "-std=c++17", "-O1", "-pthread", "-DNPU_SPARSE_OPERATOR=2", "-I", str(ROOT / "ops/emulation")]
    subprocess.run([*command, "-o", str(program), str(ROOT / "ops/emulation/tools/trace.cpp")], check=True)

    def run(queries, heads, block=1, partition=0):
        path = program.with_suffix(".json")
        arguments = map(str, (DIM, queries, 1024, 512, block, heads, partition, 0))
        subprocess.run([str(program), str(path), *arguments], check=True, capture_output=True, text=True)
        return cost.load_trace(path)

    return run


def test_heads_fill_the_rows_of_a_product_where_there_are_few_queries(selection):
    timing = cost.simulate(selection(queries=6, heads=24))
    assert timing.mac == 2 * 80 * 1024 * DIM  # 24 heads of a sub-tile's 3 queries are 72 rows, 80 in whole fractals
    alone = cost.simulate(selection(queries=6, heads=1))
    assert alone.mac == 2 * 16 * 1024 * DIM


def test_a_partition_takes_vector_time_and_no_products(selection):
    plain, shifted = (cost.simulate(selection(queries=128, heads=1, block=64, partition=p)) for p in (0, 1))
    assert shifted.mac == plain.mac and shifted.busy["AIV.V"] > plain.busy["AIV.V"]
