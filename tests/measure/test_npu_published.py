"""The model against timings that somebody else published, and the stream that stands for their kernel."""

import pytest

from npu_sparse.measure import npu_cost as cost
from npu_sparse.measure import npu_published as published

MOST = 0.30  # the largest error on shapes that nothing was fitted to


@pytest.fixture(scope="module")
def rows():
    return published.against_published()


def test_the_model_is_within_30_percent_of_three_timings_it_was_not_fitted_to(rows):
    held_out = [row for row in rows if not row["fitted"]]
    assert len(held_out) == 3
    assert all(abs(row["error"]) <= MOST for row in held_out), held_out


def test_the_launch_is_what_the_smallest_timing_leaves(rows):
    (fitted,) = (row for row in rows if row["fitted"])
    assert fitted["published_us"] == min(row["published_us"] for row in rows)
    assert abs(fitted["error"]) < 0.01


def test_the_sentence_says_the_range_of_the_held_out_errors(rows):
    errors = sorted(100 * row["error"] for row in rows if not row["fitted"])
    assert f"{errors[0]:+.0f} % to {errors[-1]:+.0f} %" in published.error_sentence(rows)


@pytest.mark.parametrize("shape", published.LIGHTNING_INDEXER, ids=lambda shape: shape.name)
def test_a_stream_does_the_arithmetic_of_its_shape(shape):
    trace = published.lightning_indexer(shape, 20)
    timing = cost.simulate(trace)
    padded = -(-shape.queries * shape.heads // 16) * 16
    assert timing.mac == shape.batch * padded * shape.keys * published.DIM
    scores = sum(step[12][published.SPACES.index("WORKSPACE")] for core in trace["cores"] for step in core["steps"])
    assert scores == 4 * shape.batch * padded * shape.keys
    aivs = (step for core in trace["cores"] if not core["cube"] for step in core["steps"])
    taken = sum(step[11][published.SPACES.index("WORKSPACE")] for step in aivs if step[9] > 1)  # a list is one piece
    assert taken == 4 * shape.batch * shape.queries * shape.heads * shape.keys


def test_blocks_are_dealt_in_order_and_evenly():
    many = published.dealt(published.LIGHTNING_INDEXER[0], 20)
    assert [len(blocks) for blocks in many] == [5] * 16 + [4] * 4
    in_order = [(block.sequence, block.key_block) for blocks in many for block in blocks]
    assert in_order == [(s, b) for s in range(16) for b in range(6)]
    few = published.dealt(published.LIGHTNING_INDEXER[3], 20)
    assert [len(blocks) for blocks in few] == [1] * 8


def test_more_queries_than_a_base_block_are_refused():
    shape = cost.replace(published.LIGHTNING_INDEXER[0], queries=9)
    with pytest.raises(ValueError, match=r"queries must lie in \[1, 8\], got 9"):
        published.lightning_indexer(shape, 20)


def alone(stream):
    core = {"name": stream.name, "cube": stream.cube, "steps": stream.steps}
    return {"columns": published.COLUMNS, "spaces": published.SPACES, "cores": [core]}


def test_the_bounds_of_fixpipe_give_what_was_measured():
    """shane-kshongmo/vTriton on 910B3: 143.5 GB/s for tiles of 128 x 128 fp32, one after the other."""
    aic = published.Stream(0, "AIC 0", True)
    for _ in range(64):
        aic.fixpipe(128, 128)
    seconds = cost.simulate(alone(aic)).busy["AIC.FIX"] / (published.CHIP.ghz * 1e9)
    assert 64 * 128 * 128 * 4 / seconds == pytest.approx(143.5e9, rel=0.02)


def test_a_vector_instruction_follows_another_as_slowly_as_was_measured():
    """The same source: 256 halves an instruction, 15.1 to 16.2 G a second for Add, Mul, Max and Min."""
    aiv = published.Stream(0, "AIV 0.0", False)
    for _ in range(1000):
        aiv.vector("Max", 2 * published.LANES, barrier=False)
    seconds = cost.simulate(alone(aiv)).cycles / (published.CHIP.ghz * 1e9)
    assert 14.6e9 < 1000 * 256 / seconds < 16.5e9
