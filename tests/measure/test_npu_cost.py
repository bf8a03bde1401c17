"""The pipeline model against schedules small enough to work out by hand."""

import pytest

from npu_sparse.measure import npu_cost as cost

COLUMNS = ["step", "pipe", "opcode", "line", "id", "repeats", "m", "n", "k", "bursts", "burst_bytes", "read", "written", "after"]
SPACES = ["UB", "L1", "L0A", "L0B", "L0C", "BT", "FB", "GM", "WORKSPACE"]
FREE = cost.Rates(
    hbm=32, l2_read=64, read_latency=0, write_latency=0, load_latency=0, cube_latency=0, flag_latency=0, cross_latency=0, dma=0,
    burst=0, issue=0, vector_issue=0, scalar=0,
)  # fmt: skip


def step(kind, pipe, opcode="", after=(), repeats=0, mnk=(0, 0, 0), bursts=1, **bytes_of):
    read = [bytes_of.get(f"from_{space}", 0) for space in SPACES]
    written = [bytes_of.get(f"to_{space}", 0) for space in SPACES]
    return [kind, pipe, opcode, 1, 0, repeats, *mnk, bursts, 0, read, written, [list(edge) for edge in after]]


def trace(*cores):
    named = [{"name": f"core {n}", "cube": cube, "block": 0, "sub": 0, "steps": steps} for n, (cube, steps) in enumerate(cores)]
    return {"kernel": "test", "columns": COLUMNS, "spaces": SPACES, "cores": named}


def copy(size, **options):
    return step("instruction", "MTE2", "DataCopy", from_GM=size, to_UB=size, **options)


def test_a_matrix_product_takes_one_cycle_per_16_cubed():
    timing = cost.simulate(trace((True, [step("instruction", "M", "Mmad", mnk=(128, 128, 100))])), FREE)
    assert timing.cycles == 8 * 8 * 7
    assert timing.mac == 128 * 128 * 100
    assert timing.utilisation("AIC.M") == 1.0 and timing.bound == "AIC.M"


def test_pipes_overlap_and_flags_order_them():
    vector = step("instruction", "V", "Add", repeats=100)
    apart = cost.simulate(trace((False, [copy(3200), vector])), FREE)
    assert apart.cycles == 100 + cost.VECTOR_LATENCY
    flags = [copy(3200), step("set", "MTE2"), step("wait", "V", after=[(0, 1)]), vector]
    assert cost.simulate(trace((False, flags)), FREE).cycles == 200 + cost.VECTOR_LATENCY


def test_one_pipe_runs_in_order_and_a_barrier_waits_for_the_result():
    vector = step("instruction", "V", "Add", repeats=10)
    assert cost.simulate(trace((False, [vector, vector])), FREE).cycles == 20 + cost.VECTOR_LATENCY
    held = cost.simulate(trace((False, [vector, step("barrier", "V"), vector])), FREE)
    assert held.cycles == 20 + 2 * cost.VECTOR_LATENCY + cost.VECTOR_HEAD


def test_a_barrier_of_all_pipes_holds_the_issue():
    steps = [copy(3200), step("barrier", "ALL"), step("instruction", "V", "Add", repeats=1)]
    assert cost.simulate(trace((False, steps)), FREE).cycles == 100 + 1 + cost.VECTOR_LATENCY


def test_cross_core_waits_hold_the_other_core():
    product = step("instruction", "M", "Mmad", mnk=(160, 16, 16))
    aic = (True, [product, step("cross_set", "M")])
    aiv = (False, [step("cross_wait", "S", after=[(0, 1)]), step("instruction", "V", "Add", repeats=5)])
    assert cost.simulate(trace(aic, aiv), FREE).cycles == 10 + 5 + cost.VECTOR_LATENCY
    waits = (True, [step("cross_wait", "S", after=[(1, 0)])])
    with pytest.raises(ValueError, match="must not form a cycle"):
        cost.simulate(trace(waits, (False, [step("cross_wait", "S", after=[(0, 0)])])), FREE)


def test_reads_that_l2_serves_are_faster():
    assert cost.simulate(trace((False, [copy(6400)])), FREE).cycles == 200
    assert cost.simulate(trace((False, [copy(6400)])), FREE, l2_hit=1.0).cycles == 100
    assert cost.simulate(trace((False, [copy(6400)])), FREE, l2_hit=0.5).cycles == 150
    passed_on = copy(6400, from_WORKSPACE=6400)
    timing = cost.simulate(trace((False, [passed_on, copy(3200)])), FREE)
    assert (timing.cycles, timing.gm_read, timing.workspace_read) == (200, 9600, 6400)
    with pytest.raises(ValueError, match=r"l2_hit must lie in \[0, 1\], got 2"):
        cost.simulate(trace(), FREE, l2_hit=2)


def test_small_gathers_pay_for_every_instruction():
    rates = cost.Rates()
    whole = cost.simulate(trace((False, [copy(16384)])), rates)
    pieces = cost.simulate(trace((False, [copy(512) for _ in range(32)])), rates)
    assert whole.gm_read == pieces.gm_read == 16384
    assert pieces.busy["AIV.MTE2"] > 4 * whole.busy["AIV.MTE2"]
    assert pieces.cycles < cost.simulate(trace((False, [copy(512) for _ in range(32)])), rates.scaled(2)).cycles


def test_scalar_reads_of_gm_miss_once_per_cache_line():
    rates = cost.replace(FREE, scalar=10, read_latency=320)
    reads = [step("instruction", "S", "GetValue", from_GM=4, bursts=int(n == 0)) for n in range(16)]
    assert cost.simulate(trace((True, reads)), rates).cycles == 16 * 10 + 320
    local = [step("instruction", "S", "GetValue", from_UB=4, bursts=0)]
    assert cost.simulate(trace((False, local)), rates).cycles == 10


def test_slow_vector_instructions_take_more_cycles():
    add, exp = (cost.simulate(trace((False, [step("instruction", "V", op, repeats=64)])), FREE) for op in ("Add", "Exp"))
    assert exp.busy["AIV.V"] == 2 * add.busy["AIV.V"] == 128


def test_peak_and_dense_time_follow_the_chips_table():
    assert cost.CHIPS["910B3"].peak_flops == pytest.approx(295e12, rel=0.002)
    assert cost.CHIPS["910B1"].peak_flops == pytest.approx(364e12, rel=0.002)
    seconds = cost.dense_seconds(cost.CHIPS["910B3"], 131072, 8, 256, 0.6)
    assert seconds == pytest.approx(2 * 131072**2 * 2048 / (0.6 * 294.9e12), rel=1e-3)
    with pytest.raises(ValueError, match="efficiency must lie in"):
        cost.dense_seconds(cost.CHIPS["910B3"], 1, 1, 1, 0.0)
