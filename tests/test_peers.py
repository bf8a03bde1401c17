import math

import pytest
import torch

from npu_sparse import Budget, SparsePrefill, peers
from npu_sparse.measure.variants import VARIANTS, evidence_of, selector_of
from npu_sparse.ops import workspace
from npu_sparse.selectors import LayerInputs
from npu_sparse.testing import attention_inputs, padding, tiny_model, tokens

PEERS = {
    "pooled": lambda: peers.PooledBlocks(key_block=8),
    "pooled, top-p": lambda: peers.PooledBlocks(0.6, key_block=8),
    "antidiagonal": lambda: peers.Antidiagonal(key_block=8, stride=4),
    "antidiagonal, top-p": lambda: peers.Antidiagonal(0.6, key_block=8, stride=4),
    "vertical-slash": lambda: peers.VerticalSlash(10),
}
every_peer = pytest.mark.parametrize("make", PEERS.values(), ids=list(PEERS))


def inputs(Tq=37, Tk=50, B=2, Hq=4, Hkv=2, side=None, seed=0):
    q, k, v = attention_inputs(B, Hq, Hkv, Tq, Tk, 8, seed=seed)
    valid = None if side is None else padding(B, Tk, side)
    return LayerInputs(0, q, k, v, 8**-0.5, valid, impl="reference")


def keys_of(support, b, h, n):
    return support.indices[b, h, n, : support.count[b, h, n]].tolist()


@every_peer
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("block", [4, 16])
def test_supports_keep_their_contract_and_their_budget(make, side, block):
    given = inputs(side=side)
    support = make().select(given, Budget(k=24, block=block))
    support.check(37, 50)
    assert support.indices.shape[:3] == (2, 2, -(-37 // block)) and int(support.count.max()) <= 24
    if side:
        held = support.member_mask(50).any(2).any(1)
        assert not bool((held & ~given.valid).any())


@every_peer
def test_a_budget_of_every_key_keeps_every_visible_key_but_those_that_top_p_leaves_out(make):
    peer, given = make(), inputs(Tq=40, Tk=40)
    support = peer.select(given, Budget(k=40, block=8))
    whole = [list(range(8 * n + 8)) for n in range(5)]
    kept = [keys_of(support, 0, 0, n) for n in range(5)]
    assert (kept == whole) == (getattr(peer, "top_p", 1.0) == 1.0)
    assert all(set(a) <= set(b) for a, b in zip(kept, whole))


@every_peer
def test_slices_of_queries_select_the_same(make, monkeypatch):
    given, budget = inputs(Tq=48, Tk=48), Budget(k=16, block=8)
    whole = make().select(given, budget)
    monkeypatch.setattr(workspace, "SIZE", 4 * 2 * 2 * 48 * 2)  # two blocks at a time
    sliced = make().select(given, budget)
    assert torch.equal(whole.count, sliced.count)
    assert torch.equal(whole.member_mask(48), sliced.member_mask(48))


@every_peer
def test_padding_may_hold_anything(make):
    given, budget = inputs(side="left"), Budget(k=16, block=8)
    expected = make().select(given, budget).member_mask(50)
    poisoned = LayerInputs(
        0, given.q.masked_fill(~given.valid[:, None, -37:, None], float("nan")),
        given.k.masked_fill(~given.valid[:, None, :, None], float("nan")), given.v, given.scale, given.valid, impl="reference",
    )  # fmt: skip
    if isinstance(make(), peers.VerticalSlash):
        poisoned = LayerInputs(0, given.q, poisoned.k.nan_to_num(77.0), given.v, given.scale, given.valid, impl="reference")
    actual = make().select(poisoned, budget).member_mask(50)
    real = given.valid[:, 13:][:, ::8]  # blocks whose first query is real
    for b in range(2):
        for n in range(real.shape[1]):
            if real[b, n]:
                assert torch.equal(actual[b, :, n], expected[b, :, n])


# The published rules, by hand


def one_head(q, k):
    q, k = (torch.tensor(x, dtype=torch.float32).view(1, 1, -1, len(x[0])) for x in (q, k))
    return LayerInputs(0, q, k, k, 1.0, impl="reference")


def test_pooled_blocks_are_ranked_by_the_softmax_of_means():
    # key blocks of 2 with means 0, 3, 1, 0; one block of queries with mean 1
    k = [[-5.0], [5.0], [2.0], [4.0], [1.0], [1.0], [9.0], [-9.0]]
    given = one_head([[2.0], [0.0]], k)
    shares = peers.PooledBlocks(key_block=2)._probabilities(given, 2, 0, 2, 8, None)
    weights = [math.exp(x) for x in (0, 3, 1, 0)]
    torch.testing.assert_close(shares[0, 0, 0], torch.tensor([w / sum(weights) for w in weights]))
    best = peers.PooledBlocks(key_block=2).select(given, Budget(k=4, block=2))
    assert keys_of(best, 0, 0, 0) == [2, 3, 6, 7]  # the best, and the block of the queries themselves


def test_top_p_keeps_the_fewest_blocks_that_reach_it():
    k = [[math.log(w)] for w in (5.0, 5.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0)]  # shares .5, .3, .1, .1
    given = one_head([[1.0], [1.0]], k)
    for top_p, expected in ((0.49, [0, 1, 6, 7]), (0.51, [0, 1, 2, 3, 6, 7]), (0.85, [0, 1, 2, 3, 4, 5, 6, 7])):
        support = peers.PooledBlocks(top_p, key_block=2).select(given, Budget(k=8, block=2))
        assert keys_of(support, 0, 0, 0) == expected


def test_antidiagonals_of_groups_rank_blocks():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 8, 3, generator=generator), torch.randn(1, 1, 8, 3, generator=generator)
    given = LayerInputs(0, q, k, k, 1.0, impl="reference")
    shares = peers.Antidiagonal(key_block=4, stride=2)._probabilities(given, 4, 0, 8, 8, None)[0, 0]
    scores = q[0, 0] @ k[0, 0].T
    groups = torch.tensor([[scores[2 * i + 1, 2 * j] + scores[2 * i, 2 * j + 1] for j in range(4)] for i in range(4)]) / 2
    rows = groups.masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf")).softmax(-1)
    expected = torch.stack([rows[:2].sum(0), rows[2:].sum(0)]).unflatten(-1, (2, 2)).sum(-1) / 2
    torch.testing.assert_close(shares, expected)


def test_verticals_and_slashes_of_the_last_queries():
    q, k, _ = attention_inputs(1, 1, 1, 12, 12, 8, seed=3)
    given = LayerInputs(0, q, k, k, 8**-0.5, impl="reference")
    last = 4
    mass = (q[0, 0, -last:] @ k[0, 0].T * 8**-0.5).masked_fill(torch.ones(last, 12).triu(9).bool(), float("-inf")).softmax(-1)
    vertical, slash = mass.sum(0), torch.zeros(12)
    for r in range(last):
        for s in range(9 + r):
            slash[8 + r - s] += mass[r, s]
    support = peers.VerticalSlash(last).select(given, Budget(k=3, block=1))
    for t in range(12):
        score = [max(float(vertical[s]), float(slash[t - s])) for s in range(t + 1)]
        best = sorted(sorted(range(t + 1), key=lambda s: (-score[s], s))[:3])
        assert keys_of(support, 0, 0, t) == best
    shared = peers.VerticalSlash(last).select(given, Budget(k=3, block=4))
    for n in range(3):
        queries = range(4 * n, 4 * n + 4)
        score = [max(float(vertical[s]), *(float(slash[t - s]) for t in queries if t >= s)) for s in range(4 * n + 4)]
        best = sorted(sorted(range(4 * n + 4), key=lambda s: (-score[s], s))[:3])
        assert keys_of(shared, 0, 0, n) == best


@pytest.mark.parametrize("make", [PEERS["pooled"], PEERS["antidiagonal"]], ids=["pooled", "antidiagonal"])
def test_a_padded_sequence_selects_what_it_would_alone(make):
    q, k, v = attention_inputs(1, 4, 2, 32, 32, 8)
    alone = make().select(LayerInputs(0, q, k, v, 1.0, impl="reference"), Budget(k=16, block=8))
    wide = [torch.cat([torch.full_like(x[:, :, :16], 50.0), x], 2) for x in (q, k, v)]  # two blocks of padding in front
    valid = (torch.arange(48) >= 16)[None]
    padded = make().select(LayerInputs(0, *wide, 1.0, valid, impl="reference"), Budget(k=16, block=8))
    for n in range(4):
        assert [s - 16 for s in keys_of(padded, 0, 1, n + 2)] == keys_of(alone, 0, 1, n)


# In a model, in a table


@every_peer
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_5"])
def test_a_peer_attaches_to_a_model(make, name):
    model, ids = tiny_model(name), tokens(2, 40)
    with torch.no_grad():
        dense = model(ids).logits
        with SparsePrefill.attach(model, make(), Budget(k=8, block=8)):
            sparse = model(ids).logits
        if getattr(make(), "top_p", 1.0) == 1.0:
            with SparsePrefill.attach(model, make(), Budget(k=40, block=8)):
                torch.testing.assert_close(model(ids).logits, dense, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sparse, dense, atol=1e-2)


def test_anchors_are_the_best_of_all_choices():
    from itertools import combinations

    similarity = torch.rand(7, 7, generator=torch.Generator().manual_seed(0))
    for count in (1, 2, 4, 7):
        value = {}
        for rest in combinations(range(1, 7), count - 1):
            anchors = (0, *rest)
            value[anchors] = sum(float(similarity[max(a for a in anchors if a <= layer), layer]) for layer in range(7))
        assert peers.choose_anchors(similarity, count) == max(value, key=value.get)
    for count in (0, 8, True):
        with pytest.raises(ValueError, match=r"count must lie in \[1, 7\], the number of layers, got"):
            peers.choose_anchors(similarity, count)


def test_a_layers_own_support_keeps_the_most_of_its_attention():
    model = tiny_model("llama")
    prompts = [torch.randint(1, 90, (60,), generator=torch.Generator().manual_seed(n)) for n in range(2)]
    similarity = peers.anchor_similarity(model, prompts, Budget(k=8, block=1), impl="reference")
    assert similarity.shape == (3, 3) and torch.equal(similarity.diagonal(), torch.ones(3, dtype=torch.float64))
    assert bool((similarity <= 1 + 1e-6).all()) and float(similarity.min()) < 0.99
    anchors = peers.choose_anchors(similarity, 2)
    with SparsePrefill.attach(model, peers.PooledBlocks(key_block=8), Budget(k=8, block=4, anchors=anchors)):
        model(prompts[0][None])


def test_peers_are_variants_with_an_evidence_of_their_own():
    for name in ("pooled", "antidiagonal", "vertical-slash"):
        assert VARIANTS[name].shared and evidence_of(name) == "training-free"
        assert selector_of(name).indexer is None


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: peers.PooledBlocks(0.0), r"top_p must lie in \(0, 1\], got 0.0"),
        (lambda: peers.PooledBlocks(1.5), r"top_p must lie in \(0, 1\], got 1.5"),
        (lambda: peers.Antidiagonal(float("nan")), r"top_p must lie in \(0, 1\], got nan"),
        (lambda: peers.PooledBlocks(key_block=0), "key_block must be a positive number of keys, got 0"),
        (lambda: peers.Antidiagonal(stride=7), "stride must divide the key block of 64, got 7"),
        (lambda: peers.VerticalSlash(0), "last must be a positive number of queries, got 0"),
        (lambda: peers.Antidiagonal().select(inputs(), Budget(k=24, block=4)), "block must be a multiple of the stride of 8"),
    ],
)
def test_a_threshold_out_of_range_is_refused_in_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
