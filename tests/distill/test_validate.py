import pytest
import torch

from npu_sparse import Indexer
from npu_sparse.distill.teacher import tap
from npu_sparse.distill.validate import validate
from npu_sparse.testing import naive_attention_mass, naive_index_scores

BUDGETS = (1, 5, 32)


@pytest.fixture(scope="module")
def contexts():
    generator = torch.Generator().manual_seed(4)
    return [(kind, torch.randint(1, 300, (1, 37), generator=generator)) for kind in ("text", "tasks", "text")]


def top(row: list[float], k: int) -> set[int]:
    """The k largest, of equal ones the first: a ReLU makes many scores exactly zero."""
    return set(sorted(range(len(row)), key=lambda s: (-row[s], s))[:k])


@torch.no_grad()
def naive_metrics(model, indexer, ids) -> list[dict]:
    """KL and both recalls of every layer of one context, row by row in float64."""
    metrics = []

    def receive(tapped):
        mass = naive_attention_mass(tapped.q, tapped.k, scale=tapped.scale)[0, 0]
        qi, ki, w = indexer(tapped.layer, tapped.hidden, tapped.cos, tapped.sin)
        scores = naive_index_scores(qi, ki, w)[0]
        rows = range(mass.shape[0])
        kl = [
            float((mass[t, : t + 1] * (mass[t, : t + 1].log() - scores[t, : t + 1].log_softmax(-1))).sum())
            for t in rows
        ]
        record = {"kl": sum(kl) / len(kl), "mass_recall": {}, "support_recall": {}}
        for k in BUDGETS:
            ratios, shares = [], []
            for t in range(k, mass.shape[0]):
                oracle, ours = top(mass[t, : t + 1].tolist(), k), top(scores[t, : t + 1].tolist(), k)
                ratios.append(float(mass[t, list(ours)].sum() / mass[t, list(oracle)].sum()))
                shares.append(len(ours & oracle) / k)
            record["mass_recall"][str(k)] = sum(ratios) / len(ratios)
            record["support_recall"][str(k)] = sum(shares) / len(shares)
        metrics.append(record)

    tap(model, ids, receive)
    return metrics


def assert_same_metrics(actual: dict, expected: list[dict]) -> None:
    n = len(expected)
    assert actual["kl"] == pytest.approx(sum(m["kl"] for m in expected) / n, rel=1e-4)
    for name in ("mass_recall", "support_recall"):
        assert list(actual[name]) == [str(k) for k in BUDGETS]
        for k, value in actual[name].items():
            assert value == pytest.approx(sum(m[name][k] for m in expected) / n, abs=1e-4), (name, k)


@pytest.mark.parametrize("heads", [1, 2])
def test_validation_is_kl_and_recall_by_definition(model, contexts, heads):
    indexer = Indexer.for_model(model, heads=heads, dim=64, seed=heads)
    report = validate(model, indexer, contexts, BUDGETS)
    naive = [naive_metrics(model, indexer, ids) for _, ids in contexts]
    assert_same_metrics(report, [record for records in naive for record in records])
    assert_same_metrics(report["by_kind"]["text"], naive[0] + naive[2])
    assert_same_metrics(report["by_kind"]["tasks"], naive[1])
    for layer, part in enumerate(report["by_layer"]):
        assert part["layer"] == layer
        assert_same_metrics(part, [records[layer] for records in naive])


def test_long_contexts_are_validated_in_parts(model, contexts, monkeypatch):
    indexer = Indexer.for_model(model, dim=64)
    whole = validate(model, indexer, contexts[:1], BUDGETS)
    monkeypatch.setattr("npu_sparse.distill.validate.ROWS", 8)
    in_parts = validate(model, indexer, contexts[:1], BUDGETS)
    assert in_parts["kl"] == pytest.approx(whole["kl"], rel=1e-5)
    assert in_parts["support_recall"] == pytest.approx(whole["support_recall"])


def test_validation_leaves_the_indexer_and_its_gradients_alone(model, contexts):
    indexer = Indexer.for_model(model, dim=64)
    before = {name: tensor.clone() for name, tensor in indexer.state_dict().items()}
    validate(model, indexer, contexts[:1], BUDGETS)
    assert all(torch.equal(before[name], tensor) for name, tensor in indexer.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in indexer.parameters())


def test_kinds_are_in_a_fixed_order(model, contexts):
    report = validate(model, Indexer.for_model(model, dim=64), contexts, BUDGETS)
    assert list(report["by_kind"]) == ["tasks", "text"]
