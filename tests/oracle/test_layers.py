from dataclasses import replace

import pytest
import torch

from npu_sparse.budget import Budget
from npu_sparse.oracle import layers
from npu_sparse.oracle.quality import hidden_states
from npu_sparse.selectors import LayerInputs, Oracle

GRANULARITIES = [
    (heads, block, reduce) for heads in ("all", "kv") for block, reduce in
    ((1, None), (16, "max"), (16, "mean"), (64, "max"), (64, "mean"))
]  # fmt: skip
BUDGETS = (5, 30, 150)


def random_layer(T: int, seed: int = 0) -> tuple[LayerInputs, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, T, 8, generator=generator) for heads in (4, 2, 2))
    inputs = LayerInputs(3, 2 * q, k, v, scale=8**-0.5, impl="reference")
    return inputs, attention(inputs) @ v.repeat_interleave(2, 1)


def attention(inputs: LayerInputs) -> torch.Tensor:
    T = inputs.q.shape[2]
    scores = inputs.q @ inputs.k.repeat_interleave(2, 1).transpose(-1, -2) * inputs.scale
    return scores.masked_fill(~torch.ones(T, T).tril().bool(), float("-inf")).softmax(-1)  # [1, Hq, T, T]


def naive(
    inputs: LayerInputs, out: torch.Tensor, heads: str, block: int, reduce: str | None, k: int, first: int
) -> dict:
    """The same statistics from whole S x S matrices, with the support that selectors.Oracle gives."""
    T = inputs.q.shape[2]
    weights = attention(inputs)[0].unflatten(0, (2, 2))  # [Hkv, G, T, T]

    def kept_by(granularity_block, granularity_reduce, keys):
        budget = Budget(k=keys, block=granularity_block, reduce=granularity_reduce or "max")
        support = Oracle(per_kv=heads == "kv").select(inputs, budget)
        member = support.member_mask(T)[0].repeat_interleave(granularity_block, 1)[:, :T]  # [Hs, T, T]
        member = member & torch.ones(T, T).tril().bool()
        member = member.expand(2, -1, -1)[:, None]
        return member, (weights * member).sum(-1).mean((0, 1))[first:]

    member, kept = kept_by(block, reduce, k)
    _, own = kept_by(1, None, k)
    _, doubled = kept_by(block, reduce, 2 * k)
    sparse = (weights * member / (weights * member).sum(-1, keepdim=True).clamp(min=1e-30)) @ inputs.v[0][:, None]
    sparse, exact = sparse.flatten(0, 1)[:, first:], out[0][:, first:]
    row = {"output_error": float((sparse - exact).square().sum().sqrt() / exact.square().sum().sqrt())}
    for name, values in (("retained", kept), ("relative", kept / own), ("doubled", doubled / own)):
        row[f"{name}_mean"] = float(values.mean())
        row[f"{name}_p5"] = float(values.sort().values[int(0.05 * (len(values) - 1))])
    return row


@pytest.mark.parametrize("T", [192, 200, 37])
def test_rows_equal_those_of_whole_matrices(T):
    inputs, out = random_layer(T)
    rows, _ = layers.measure_layer(inputs, out, GRANULARITIES, BUDGETS)
    assert len(rows) == len(GRANULARITIES) * len(BUDGETS)
    for row in rows:
        expected = naive(inputs, out, row["heads"], row["block"], row["reduce"], row["k"], T // 2 // 64 * 64)
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("sharpness", [0.0, 400.0])
def test_ties_are_settled_as_the_selector_settles_them(sharpness):
    inputs, _ = random_layer(192)
    inputs = replace(inputs, q=inputs.q * sharpness)  # all masses equal, or almost all of them zero
    out = attention(inputs) @ inputs.v.repeat_interleave(2, 1)
    for row in layers.measure_layer(inputs, out, GRANULARITIES, BUDGETS)[0]:
        expected = naive(inputs, out, row["heads"], row["block"], row["reduce"], row["k"], 64)
        del expected["output_error"]  # the naive one cannot renormalise a support without mass
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_overlap_equals_that_of_sets():
    T, k = 200, 20
    inputs, out = random_layer(T)
    _, (row,) = layers.measure_layer(inputs, out, [("all", 1, None)], [k])
    support = Oracle().select(inputs, Budget(k=k, block=1))
    own = [set(support.indices[0, 0, t].tolist()) for t in range(64, T)]
    jaccard = [len(a & b) / len(a | b) for a, b in zip(own, own[1:])]
    assert row["jaccard"] == pytest.approx(sum(jaccard) / len(jaccard))
    for n in (8, 16, 64):
        unions = [len(set.union(*own[i : i + n])) for i in range(0, len(own) - n + 1, n)]
        assert row[f"union_{n}"] == pytest.approx(sum(unions) / len(unions))


def test_slices_change_no_row(monkeypatch):
    inputs, out = random_layer(400)
    whole, overlap = layers.measure_layer(inputs, out, GRANULARITIES, BUDGETS)
    monkeypatch.setattr(layers, "SLICE_ELEMENTS", 1)
    sliced, overlap_of_slices = layers.measure_layer(inputs, out, GRANULARITIES, BUDGETS)
    for row, other in zip(whole, sliced):
        values = {name: value for name, value in row.items() if isinstance(value, float)}
        assert values == pytest.approx({name: other[name] for name in values}, rel=1e-4)
    for row, other in zip(overlap, overlap_of_slices):
        assert {n: v for n, v in row.items() if n != "jaccard"} == {n: v for n, v in other.items() if n != "jaccard"}


def test_own_support_keeps_at_least_what_a_shared_one_keeps():
    rows = {(r["heads"], r["block"], r["reduce"], r["k"]): r for r in layers.measure_layer(
        *random_layer(256), GRANULARITIES, BUDGETS)[0]}  # fmt: skip
    for (heads, block, _, k), row in rows.items():
        assert row["retained_mean"] <= rows[heads, 1, None, k]["retained_mean"] + 1e-6
        assert row["relative_p5"] <= row["relative_mean"] <= 1 + 1e-6
        if block == 1:
            assert row["relative_mean"] == pytest.approx(1)


def test_the_mean_over_a_block_keeps_at_least_the_mass_of_the_maximum():
    rows = {(r["heads"], r["block"], r["reduce"], r["k"]): r for r in layers.measure_layer(
        *random_layer(256), GRANULARITIES, BUDGETS)[0]}  # fmt: skip
    for heads in ("all", "kv"):
        for block in (16, 64):
            for k in BUDGETS:
                assert (
                    rows[heads, block, "mean", k]["retained_mean"]
                    >= rows[heads, block, "max", k]["retained_mean"] - 1e-6
                )


def test_retained_mass_grows_with_k_and_all_keys_keep_all():
    T = 192
    budgets = (1, 7, 50, 130, T)
    rows, _ = layers.measure_layer(*random_layer(T), GRANULARITIES, budgets)
    for start in range(0, len(rows), len(budgets)):
        kept = [row["retained_mean"] for row in rows[start : start + len(budgets)]]
        assert kept == sorted(kept) and kept[-1] == pytest.approx(1) and kept[0] < 0.9
        assert rows[start + len(budgets) - 1]["output_error"] < 1e-5


def test_layers_on_the_dense_trajectory_get_the_dense_models_inputs(model, monkeypatch):
    ids = torch.randint(1, model.config.vocab_size, (130,), generator=torch.Generator().manual_seed(0))
    seen = {}
    monkeypatch.setattr(
        layers, "measure_layer", lambda inputs, out, *rest: (seen.update({inputs.layer: inputs}), [], [])[1:]
    )
    report = layers.measure_layers(model, ids, hidden_states(model, ids), GRANULARITIES, BUDGETS)
    assert sorted(seen) == [0, 1]
    keys = {}
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(lambda m, a, out, n=n: keys.update({n: out}))
        for n, layer in enumerate(model.model.layers)
    ]
    hidden_states(model, ids)
    for hook in hooks:
        hook.remove()
    for n, inputs in seen.items():
        norms = keys[n].unflatten(-1, (2, 8)).transpose(1, 2).norm(dim=-1)  # rotation keeps norms
        torch.testing.assert_close(inputs.k.norm(dim=-1), norms, rtol=1e-4, atol=1e-4)
    assert report["path"]["kl"] < 1e-5 and report["path"]["agreement"] == 1
