import math
from dataclasses import replace

import pytest
import torch

from npu_sparse import Indexer, IndexerConfig, ops
from npu_sparse.distill.loss import DistillLoss, index_logits, kl, shared_kl, sparse_kl, teacher_mass
from npu_sparse.distill.teacher import Tap
from npu_sparse.testing import assert_accurate, attention_inputs, naive_attention_mass, naive_index_scores, normal

INF = math.inf


def probabilities(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def naive_kl(mass: list[float], logits: list[float], keys) -> float:
    """KL of one row over `keys`, both sides renormalised there, term by term."""
    total = sum(mass[s] for s in keys)
    shares = {s: math.exp(logits[s]) for s in keys}
    whole = sum(shares.values())
    return sum(mass[s] / total * math.log(mass[s] / total / (shares[s] / whole)) for s in keys if mass[s] > 0)


def causal_rows(rows: int, keys: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass and logits `[2, rows, keys]` in float64 of the last rows, with zeros and -inf ahead."""
    ahead = torch.ones(rows, keys, dtype=torch.bool).triu_(keys - rows + 1)
    scores = normal(2, rows, keys, dtype=torch.float64, seed=seed).mul_(3).masked_fill_(ahead, -INF)
    logits = normal(2, rows, keys, dtype=torch.float64, seed=seed + 1).mul_(3).masked_fill_(ahead, -INF)
    return scores.softmax(-1), logits


def make_tap(B: int = 2, T: int = 37, hidden: int = 24, layer: int = 0) -> Tap:
    q, k, _ = attention_inputs(B, 4, 2, T, T, 16)
    angle = torch.arange(T)[None, :, None] * 0.3 ** torch.arange(8)[None, None]
    angle = torch.cat([angle, angle], -1)
    return Tap(layer, normal(B, T, hidden, seed=5), angle.cos(), angle.sin(), q, k, 0.25)


def make_indexer(heads: int, layers=(0,)) -> Indexer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Indexer(IndexerConfig(24, layers, 16, heads, 64))


# KL over all causal keys


def test_kl_is_the_sum_over_causal_keys():
    mass, logits = causal_rows(5, 12)
    expected = [
        [naive_kl(mass[b, t].tolist(), logits[b, t].tolist(), range(8 + t)) for t in range(5)] for b in range(2)
    ]
    torch.testing.assert_close(kl(mass, logits), probabilities(*expected))


def test_kl_of_a_distribution_with_itself_is_zero():
    mass, _ = causal_rows(6, 6)
    torch.testing.assert_close(kl(mass, mass.log()), torch.zeros(2, 6, dtype=torch.float64), rtol=0, atol=1e-12)
    assert bool((kl(mass, mass.log() + 7) < 1e-12).all())  # a softmax does not see a shift


def test_kl_of_one_certain_key_under_a_uniform_guess_is_log_n():
    actual = kl(probabilities([1, 0, 0, 0]), probabilities([2, 2, 2, 2]))
    torch.testing.assert_close(actual, torch.tensor([math.log(4)], dtype=torch.float64))


def test_kl_ignores_keys_that_neither_sees():
    inside = kl(probabilities([0.3, 0.7]), probabilities([1, 2]))
    torch.testing.assert_close(kl(probabilities([0.3, 0.7, 0]), probabilities([1, 2, -INF])), inside)


def test_kl_is_infinite_where_the_indexer_rules_out_a_key_with_mass():
    assert kl(probabilities([0.5, 0.5]), probabilities([1, -INF])).item() == INF


def test_kl_gradient_is_the_difference_of_the_distributions():
    mass, logits = causal_rows(5, 9)
    logits.requires_grad_()
    kl(mass, logits).sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - mass)


# KL over the keys that matter


@pytest.mark.parametrize("k", [1, 3, 20])
def test_sparse_kl_is_the_kl_over_the_union_of_both_top_k(k):
    mass, logits = causal_rows(5, 12)
    expected = []
    for b in range(2):
        rows = []
        for t in range(5):
            p, z = mass[b, t].tolist(), logits[b, t].tolist()
            seen = range(8 + t)
            union = {*sorted(seen, key=lambda s: -p[s])[:k], *sorted(seen, key=lambda s: -z[s])[:k]}
            rows.append(naive_kl(p, z, union))
        expected.append(rows)
    torch.testing.assert_close(sparse_kl(mass, logits, k), probabilities(*expected))


def test_sparse_kl_of_all_keys_is_kl():
    mass, logits = causal_rows(7, 7)
    torch.testing.assert_close(sparse_kl(mass, logits, 7), kl(mass, logits))


def test_sparse_kl_ignores_keys_outside_the_union():
    mass, logits = probabilities([0.6, 0.3, 0.06, 0.04]), probabilities([5, 4, 1, 0])
    before = sparse_kl(mass, logits, 2)
    after = sparse_kl(probabilities([0.6, 0.3, 0.04, 0.06]), probabilities([5, 4, -3, 2]), 2)
    torch.testing.assert_close(before, after)
    torch.testing.assert_close(before.item(), naive_kl([0.6, 0.3], [5, 4], (0, 1)))


def test_sparse_kl_charges_a_key_that_the_indexer_wrongly_prefers():
    mass = probabilities([0.9, 0.1, 0.0])
    agreed, wrong = probabilities([9.0, 0, 0]), probabilities([9.0, 0, 12])
    assert sparse_kl(mass, wrong, 1) > sparse_kl(mass, agreed, 1) + 3


def test_sparse_kl_stays_finite_in_rows_with_fewer_keys_than_k():
    mass, logits = causal_rows(6, 6)
    logits.requires_grad_()
    loss = sparse_kl(mass, logits, 4)
    loss.sum().backward()
    assert bool(loss.isfinite().all()) and bool(logits.grad.isfinite().all())
    torch.testing.assert_close(loss[:, 0], torch.zeros(2, dtype=torch.float64))


# The two sides


# KL of what a block shares


def test_shared_kl_compares_the_largest_mass_with_the_largest_score_less_its_log_partition():
    mass, logits = causal_rows(5, 9)
    actual = shared_kl(mass, logits, 2)
    assert actual.shape == (2, 3)  # the last block has one row
    log_q = logits - logits.logsumexp(-1, keepdim=True)
    for b in range(2):
        for n, rows in enumerate(([0, 1], [2, 3], [4])):
            target = [max(float(mass[b, t, s]) for t in rows) for s in range(9)]
            guess = [max(float(log_q[b, t, s]) for t in rows) for s in range(9)]
            keys = [s for s in range(9) if target[s] > 0]
            assert float(actual[b, n]) == pytest.approx(naive_kl(target, guess, keys), abs=1e-12)


def test_shared_kl_of_the_teacher_itself_is_zero_whatever_its_queries_loudness():
    mass, _ = causal_rows(6, 6)
    loud = mass.log() + torch.arange(6)[:, None]
    torch.testing.assert_close(shared_kl(mass, loud, 3), torch.zeros(2, 2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_shared_kl_has_finite_gradients_where_keys_lie_ahead():
    mass, logits = causal_rows(6, 6)
    shared_kl(mass, logits.requires_grad_(), 4).sum().backward()
    assert bool(logits.grad.isfinite().all()) and bool(logits.grad.abs().sum() > 0)


@pytest.mark.parametrize("segment", [(0, 37), (0, 1), (20, 37), (7, 24)])
def test_teacher_mass_is_the_mean_of_the_heads_softmaxes(segment):
    tap = make_tap()
    start, stop = segment
    exact, naive = (
        naive_attention_mass(tap.q, tap.k, scale=tap.scale, dtype=dtype)[:, 0, start:stop, :stop]
        for dtype in (torch.float64, torch.float32)
    )
    actual = teacher_mass(tap, segment)
    assert_accurate(actual, exact, naive)
    torch.testing.assert_close(actual.sum(-1), torch.ones(2, stop - start))


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 3])
def test_index_logits_are_the_operators_scores_at_block_1(heads):
    tap, indexer = make_tap(), make_indexer(heads)
    qi, ki, w = indexer(0, tap.hidden, tap.cos, tap.sin)
    scores = ops.index_scores(qi, ki, w, block=1, impl="reference")
    exact, naive = (naive_index_scores(qi, ki, w, dtype=dtype) for dtype in (torch.float64, torch.float32))
    segments = [(0, 1), (5, 20), (33, 37)]
    everything = torch.cat([z.flatten() for z in index_logits(indexer.layers["0"], tap, segments)])
    exact, naive = (
        torch.cat([z[:, start:stop, :stop].flatten() for start, stop in segments]) for z in (exact, naive)
    )
    assert_accurate(everything, exact, naive)
    for (start, stop), logits in zip(segments, index_logits(indexer.layers["0"], tap, segments)):
        torch.testing.assert_close(logits, scores[:, start:stop, :stop], rtol=1e-5, atol=1e-5)
        assert torch.equal(logits == -INF, torch.ones(stop - start, stop).triu(start + 1).bool().expand_as(logits))


# The module


@pytest.mark.parametrize("kind", ["kl", "sparse", "both"])
def test_loss_is_the_mean_over_layers_and_rows(make_config, kind):
    taps, indexer = [make_tap(), replace(make_tap(T=37), layer=1, scale=0.5)], make_indexer(2, (0, 1))
    segments = [(4, 9), (30, 37)]
    loss, by_layer = DistillLoss(indexer, make_config(loss=kind, sparse_k=3))(taps, segments)
    expected = []
    for tap in taps:
        logits = index_logits(indexer.layers[str(tap.layer)], tap, segments)
        pairs = [(teacher_mass(tap, segment), z) for segment, z in zip(segments, logits)]
        full = torch.cat([kl(mass, z).flatten() for mass, z in pairs]).mean()
        sparse = torch.cat([sparse_kl(mass, z, 3).flatten() for mass, z in pairs]).mean()
        expected.append({"kl": full, "sparse": sparse, "both": full + sparse}[kind])
    torch.testing.assert_close(by_layer, torch.stack(expected).detach())
    torch.testing.assert_close(loss, torch.stack(expected).mean())


@pytest.mark.parametrize("kind", ["kl", "sparse", "both", "shared"])
def test_loss_gradients_reach_every_parameter(make_config, kind):
    indexer = make_indexer(2)
    loss, by_layer = DistillLoss(indexer, make_config(loss=kind))([make_tap()], [(0, 37)])
    loss.backward()
    assert not by_layer.requires_grad
    for name, parameter in indexer.named_parameters():
        assert bool(parameter.grad.isfinite().all()) and float(parameter.grad.abs().max()) > 0, name


def test_streamed_gradients_are_those_of_the_eager_loss(make_config):
    tap, segments = make_tap(), [(4, 9), (30, 37)]
    gradients = []
    for streamed in (True, False):
        indexer = make_indexer(2)
        if streamed:
            loss, _ = DistillLoss(indexer, make_config())([tap], segments)
        else:
            logits = index_logits(indexer.layers["0"], tap, segments)
            pairs = zip((teacher_mass(tap, segment) for segment in segments), logits)
            loss = torch.cat([kl(mass, z).flatten() for mass, z in pairs]).mean()
        loss.backward()
        gradients.append([parameter.grad for parameter in indexer.parameters()])
    for ours, eager in zip(*gradients):
        torch.testing.assert_close(ours, eager)


def test_loss_of_a_bf16_model_runs_under_autocast(make_config):
    tap = make_tap()
    low = replace(tap, hidden=tap.hidden.bfloat16(), q=tap.q.bfloat16(), k=tap.k.bfloat16())
    indexer = make_indexer(2)
    wanted, _ = DistillLoss(indexer, make_config())([tap], [(0, 37)])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = DistillLoss(indexer, make_config())([low], [(0, 37)])
    loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in indexer.parameters())
    torch.testing.assert_close(loss, wanted, rtol=0.1, atol=0)
