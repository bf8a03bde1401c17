"""Budget(dense_below="auto") on a card: measured on the model's own first layers, once."""

import copy
import json

import pytest
import torch

from npu_sparse import Budget, Indexer, SparsePrefill, calibration, selectors
from npu_sparse.models import crossover
from npu_sparse.models.architectures import decoder
from npu_sparse.testing import tiny_model

BUDGET = Budget(k=16, block=8, dense_below="auto")
attach = SparsePrefill.attach


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path))
    return tmp_path / "crossover"


@pytest.fixture
def model():
    return tiny_model("qwen3_5")


def modelled(crossing, tried):
    """`measure` of a device where dense takes L^2 and sparse as long as dense does at `crossing`, and L more."""

    def measure(length):
        tried.append(length)
        return length**2, crossing**2 - crossing + length

    return measure


@pytest.mark.parametrize("crossing", [1, 700, 1024, 1025, 1536, 1537, 2048, 3000, 5000, 9000, 40000, 100000])
def test_the_search_brackets_where_the_two_cross(crossing):
    tried = []
    timings = calibration.search(modelled(crossing, tried), calibration.lengths(1 << 20))
    assert sorted(tried) == list(timings)
    first = calibration.first_faster(timings)
    assert first >= crossing  # nothing below it is slower than dense
    assert first <= max(1024, 1.5 * crossing)
    assert max(tried) <= max(2048, 4 * crossing)  # and no time is spent far beyond


def test_a_budget_that_never_pays_is_dense_everywhere():
    timings = calibration.search(lambda length: (1.0, 1.1), calibration.lengths(10_000))
    assert list(timings) == [1024, 2048, 4096, 8192] and calibration.first_faster(timings) == crossover.NEVER


def test_a_length_where_sparse_is_slower_again_counts():
    slower = {1024: 0.9, 2048: 1.1}
    timings = calibration.search(lambda length: (1.0, slower.get(length, 0.9)), calibration.lengths(1 << 20))
    assert calibration.first_faster(timings) == 3072


def test_where_memory_runs_out_the_search_ends():
    def measure(length):
        if length > 5000:
            raise torch.OutOfMemoryError("out of memory")
        return 1.0, 0.9 if length > 3000 else 2.0

    timings = calibration.search(measure, calibration.lengths(1 << 20))
    assert list(timings) == [1024, 2048, 3072, 4096] and calibration.first_faster(timings) == 3072
    with pytest.raises(torch.OutOfMemoryError):
        calibration.search(lambda length: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")), [1024])
    with pytest.raises(RuntimeError, match="lost"):
        calibration.search(lambda length: (_ for _ in ()).throw(RuntimeError("device lost")), [1024])


def test_no_length_is_begun_after_its_time(monkeypatch):
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr(calibration.time, "monotonic", lambda: next(clock))
    timings = calibration.search(lambda length: (1.0, 2.0), calibration.lengths(1 << 20))
    assert list(timings) == [1024]


@pytest.mark.parametrize(
    "most, expected", [(512, [512]), (1024, [1024]), (5000, [1024, 2048, 4096]), (1 << 20, [1024 << n for n in range(8)])]
)
def test_lengths_double_as_far_as_the_model_serves(most, expected):
    assert calibration.lengths(most) == expected


@pytest.mark.parametrize(
    "full, budget, expected",
    [
        (range(24), Budget(), 4),
        ((3, 7, 11, 15, 19, 23), Budget(), 16),
        ((1, 3), Budget(), 4),
        (range(24), Budget(share_layers=3), 6),
        (range(24), Budget(anchors=(0, 2, 9)), 9),
        (range(24), Budget(anchors=(0,)), 24),
    ],
)
def test_whole_groups_of_layers_run(full, budget, expected):
    assert calibration.first_layers(tuple(full), budget) == expected


@pytest.mark.parametrize("kind", ["indexer", "oracle"])
@pytest.mark.parametrize("name", ["qwen3_5", "gemma3", "qwen2"])
def test_a_calibration_runs_both_ways_and_leaves_the_model_as_it_was(monkeypatch, name, kind):
    model = tiny_model(name)
    selector = selectors.ByIndexer(Indexer.for_model(model, dim=64)) if kind == "indexer" else selectors.Oracle()
    layers, before = decoder(model).layers, copy.deepcopy(model.state_dict())
    ids = torch.randint(1, 90, (1, 60))
    with torch.no_grad():
        logits = model(ids).logits
    ran, seconds_of = [], calibration.seconds_of

    def watched(text, count, ids):
        ran.append((ids.shape[1], count, text.config._attn_implementation.startswith("npu_sparse")))
        return seconds_of(text, count, ids)

    monkeypatch.setattr(calibration, "seconds_of", watched)
    monkeypatch.setattr(calibration, "RUNS", 2)
    timings = calibration.calibrate(model, selector, BUDGET.replace(exact_last=4), attach=attach)
    assert list(timings) == [512] and all(seconds > 0 for seconds in timings[512])  # the longest context of these models
    assert sorted(sparse for _, _, sparse in ran) == [False] * 4 + [True] * 4
    assert {(length, count) for length, count, _ in ran} == {(512, 3 if name == "qwen2" else 4)}
    assert decoder(model).layers is layers
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


def test_a_model_is_itself_again_when_a_calibration_fails(model, monkeypatch):
    layers = decoder(model).layers
    monkeypatch.setattr(calibration, "synchronize", lambda device: (_ for _ in ()).throw(RuntimeError("device lost")))
    with pytest.raises(RuntimeError, match="device lost"):
        calibration.calibrate(model, selectors.Oracle(), BUDGET, attach=attach)
    assert decoder(model).layers is layers and model.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.fixture
def counted(monkeypatch):
    """How often it was measured; every measurement crosses at 3000."""
    times = []

    def calibrate(model, selector, budget, **options):
        times.append(budget)
        return calibration.search(modelled(3000, []), calibration.lengths(1 << 20))

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    monkeypatch.setattr(calibration, "measures", lambda device: True)
    return times


def test_what_was_measured_is_kept(model, cache, counted):
    for _ in range(2):
        assert calibration.dense_below(model, selectors.Oracle(), BUDGET, attach=attach) == 3072
    assert len(counted) == 1
    (path,) = cache.glob("*.json")
    kept = json.loads(path.read_text())
    assert kept["dense_and_sparse_s"]["3072"] == [3072**2, 3000**2 - 3000 + 3072]
    path.write_text(path.read_text()[:40])  # damaged
    assert calibration.dense_below(model, selectors.Oracle(), BUDGET, attach=attach) == 3072 and len(counted) == 2
    assert json.loads(path.read_text()) == kept


def test_anything_that_a_measurement_depends_on_is_measured_anew(model, cache, counted, monkeypatch):
    oracle = selectors.Oracle()
    calibration.dense_below(model, oracle, BUDGET, attach=attach)
    calibration.dense_below(model, oracle, BUDGET.replace(dense_below=7), attach=attach)  # this is no part of it
    assert len(counted) == 1
    calibration.dense_below(model, oracle, BUDGET.replace(k=32), attach=attach)
    calibration.dense_below(model, selectors.ByIndexer(Indexer.for_model(model, dim=64)), BUDGET, attach=attach)
    calibration.dense_below(model, selectors.ByIndexer(Indexer.for_model(model, dim=128)), BUDGET, attach=attach)
    calibration.dense_below(tiny_model("qwen3_5", dtype=torch.bfloat16), oracle, BUDGET, attach=attach)
    calibration.dense_below(tiny_model("qwen3_5", hidden_size=128), oracle, BUDGET, attach=attach)
    calibration.dense_below(model, oracle, BUDGET, impl="reference", attach=attach)
    calibration.dense_below(model, oracle, BUDGET, workspace_mib=3, attach=attach)
    monkeypatch.setattr(calibration, "device_name", lambda device: "another card")
    calibration.dense_below(model, oracle, BUDGET, attach=attach)
    assert len(counted) == 9 == len(list(cache.glob("*.json")))


def test_attaching_asks_for_it_on_a_card(model, cache, counted):
    with SparsePrefill.attach(model, selectors.Oracle(), BUDGET) as attached:
        assert attached.budget.dense_below == 3072
    with SparsePrefill.attach(model, selectors.Oracle(), BUDGET) as attached:
        assert attached.budget.dense_below == 3072
    assert len(counted) == 1


def test_where_nothing_can_be_kept_it_is_measured_every_time(model, tmp_path, counted, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        assert calibration.dense_below(model, selectors.Oracle(), BUDGET, attach=attach) == 3072
    assert len(counted) == 2
