import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from npu_sparse import Budget, SparsePrefill, selectors
from npu_sparse.models import crossover
from npu_sparse.testing import tiny_model

HEADS = {"query_heads": 4, "kv_heads": 2, "head_dim": 32}
OTHERS = {"query_heads": 16, "kv_heads": 4, "head_dim": 256}


def figure(k, block, length, device="cpu", **heads):
    return {"device": device, **(heads or HEADS), "k": k, "block": block, "dense_below": length}


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3_5")


@pytest.mark.parametrize(
    "measured, expected",
    [
        ([figure(64, 8, 100)], 100),
        ([figure(128, 8, 300), figure(64, 8, 200), figure(64, 4, 250)], 200),
        ([figure(64, 8, 200), figure(64, 8, 50, **OTHERS)], 200),
        ([figure(64, 8, 90, **OTHERS), figure(128, 4, 400, **OTHERS)], 400),
        ([figure(64, 8, 200), figure(64, 8, 50, device="another")], 200),
    ],
)
def test_the_tightest_figure_that_bounds_the_budget_counts(model, measured, expected):
    assert crossover.dense_below(model, Budget(k=64, block=8), measured) == expected


@pytest.mark.parametrize("measured", [[], [figure(32, 8, 100)], [figure(64, 16, 100)], [figure(64, 8, 100, device="another")]])
def test_without_a_figure_one_sentence_says_what_to_do(model, measured):
    with pytest.raises(ValueError, match='dense_below="auto" must have a measured figure for k 64, b_sel 8 on \'cpu\''):
        crossover.dense_below(model, Budget(k=64, block=8), measured)


def test_the_largest_k_of_a_budget_counts(model):
    measured = [figure(64, 8, 100), figure(256, 8, 300)]
    assert crossover.dense_below(model, Budget(k={0: 32, 90: 128}, block=8), measured) == 300
    assert crossover.dense_below(model, Budget(k=32, block=8, per_layer={1: 200}), measured) == 300


@torch.no_grad()
def test_a_model_attaches_with_the_measured_length(model, monkeypatch):
    monkeypatch.setattr(crossover, "entries", lambda: [figure(16, 8, 50)])
    ids, budget = torch.randint(1, 90, (1, 60)), Budget(k=16, block=8, dense_below="auto")
    with SparsePrefill.attach(model, selectors.Oracle(), budget) as attached:
        assert attached.budget.dense_below == 50
        assert not attached.is_sparse(49, 49) and attached.is_sparse(50, 50)
        sparse = [model(ids[:, :length]).logits for length in (49, 60)]
    dense = [model(ids[:, :length]).logits for length in (49, 60)]
    assert torch.equal(sparse[0], dense[0]) and not torch.equal(sparse[1], dense[1])
    monkeypatch.setattr(crossover, "entries", lambda: [])
    with pytest.raises(ValueError, match="pass a number of tokens"):
        SparsePrefill.attach(model, selectors.Oracle(), budget)
    assert model(ids).logits.equal(dense[1])


def test_a_budget_takes_auto_and_nothing_else():
    assert Budget.from_dict(Budget(dense_below="auto").to_dict()).dense_below == "auto"
    with pytest.raises(TypeError, match="dense_below must be an integer, got 'always'"):
        Budget(dense_below="always")


def test_first_faster_looks_from_the_longest_down():
    dense = {4: 1.0, 8: 2.0, 16: 4.0, 32: 8.0}
    assert crossover.first_faster(dense, {4: 1.1, 8: 1.9, 16: 3.0, 32: 5.0}) == 8
    assert crossover.first_faster(dense, {4: 0.9, 8: 2.1, 16: 3.0, 32: 5.0}) == 16
    assert crossover.first_faster(dense, dense) == 4
    assert crossover.first_faster(dense, {4: 0.9, 8: 1.0, 16: 3.0, 32: 9.0}) == crossover.NEVER
    with pytest.raises(ValueError, match="at the same lengths"):
        crossover.first_faster(dense, {4: 1.0})


def test_merging_replaces_equal_keys_and_keeps_the_rest(tmp_path: Path):
    path = tmp_path / "crossover.json"
    crossover.merge(path, [figure(64, 8, 100), figure(32, 8, 70)])
    crossover.merge(path, [figure(64, 8, 90), figure(64, 16, 60)])
    merged = [(one["k"], one["block"], one["dense_below"]) for one in crossover.entries(path)]
    assert merged == [(32, 8, 70), (64, 8, 90), (64, 16, 60)]
    crossover.merge(empty := tmp_path / "empty.json", [])
    assert json.loads(empty.read_text()) == []


def test_the_shipped_figures_are_complete():
    for one in crossover.entries():
        assert set(crossover.KEY) < set(one) and {"dense_below", "dense", "source", "commit"} <= set(one)
        assert one["dense_below"] >= 1


def test_devices_are_named_by_product_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert crossover.device_name(SimpleNamespace(type="cuda")) == "NVIDIA H100 80GB HBM3"
    assert crossover.device_name(torch.device("cpu")) == "cpu"
