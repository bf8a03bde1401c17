import importlib.util
from pathlib import Path

import pytest
import torch

from npu_sparse import Indexer
from npu_sparse.ops.select_two_level.blocks import block_bounds
from npu_sparse.ops.select_two_level.reference import block_scores
from npu_sparse.testing import index_inputs, tiny_model


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "scripts" / "study_key_blocks.py"
    spec = importlib.util.spec_from_file_location("study_key_blocks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_half_way_is_what_the_operator_ranks_by(script):
    qi, ki, w = index_inputs(1, 2, 64, 320, 16)
    sinks = torch.zeros(1, 20, dtype=torch.bool)
    expected = block_scores(qi, block_bounds(ki, 16, None), w, sinks, 256, 16, 64, 0, None)[0, 0, :16]
    ranked = script.ranks(qi[0], ki[0, :256], w[0], torch.zeros(64, 256), 16)["half way"]
    torch.testing.assert_close(ranked.amax(0), expected)


def test_bounds_are_bounds_and_the_best_key_is_the_best(script):
    qi, ki, _ = index_inputs(1, 1, 64, 256, 16)
    z = script.products(qi[0], ki[0], None)
    ranked = script.ranks(qi[0], ki[0], None, z, 16)
    assert torch.equal(ranked["best key"], z.unflatten(-1, (-1, 16)).amax(-1))
    assert bool((ranked["bound"] >= ranked["best key"] - 1e-4).all())
    assert bool((ranked["mean or farthest key"] >= ranked["mean"]).all())


def test_with_every_key_a_candidate_nothing_is_lost(script, tmp_path):
    model = tiny_model("llama")
    args = script.parse([
        "tiny", "--adapter", "tiny", "--k", "40", "--candidates", "48,512", "--key-blocks", "16", "--groups", "2", "--every", "2",
        "--output", str(tmp_path),
    ])  # fmt: skip
    ids = torch.randint(1, 90, (500,), generator=torch.Generator().manual_seed(0))
    rows = script.study(args, model, Indexer.for_model(model, dim=64), [("random", ids)])
    assert {row["n"] for row in rows} == {2 * 2}  # layers 0 and 2, two groups
    for row in rows:
        assert row["candidates"] == 48 or (row["recall"], row["mass"]) == pytest.approx((1, 1))
    few = {row["way"]: row["recall"] for row in rows if row["candidates"] == 48 and row["block"] == 64}
    assert 0 < few["most recent"] < few["best key"] < 1
    text = script.markdown({"config": {k: v for k, v in vars(args).items()}, "rows": rows, "machine": script.machine()})
    assert "| 64 | 16 | 48 |" in text
