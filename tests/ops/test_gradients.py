"""Gradients of sparse attention are those of dense attention under the support as a mask, in fp64 to the last digits."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from npu_sparse import ops
from npu_sparse.ops import workspace
from npu_sparse.testing import assert_accurate, attention_inputs, hostile, index_inputs, padding, poisoned, random_support


def dense(q, k, v, support, scale, tail=False, valid=None):
    """Attention over all keys under the support as a mask, with the tail as one more key of every query, by plain products."""
    Tq, Tk, G = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    member = support.member_mask(Tk)
    sees = member.repeat_interleave(support.block, 2)[:, :, :Tq]
    sees = sees & torch.ones(Tq, Tk, dtype=torch.bool).tril(Tk - Tq)
    sees = sees.repeat_interleave(q.shape[1] // sees.shape[1], 1)
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    scores = (q @ k.mT * scale).masked_fill(~sees, float("-inf"))
    if tail:
        first = torch.arange(Tq) // support.block * support.block + Tk - Tq
        before = (torch.arange(Tk) <= first[:, None]).expand(q.shape[0], -1, -1)
        if valid is not None:
            before = before & valid[:, None]
        before = before[:, None]
        inside = member.repeat_interleave(support.block, 2)[:, :, :Tq] & (torch.arange(Tk) <= first[:, None])
        held = (support.count > 0).repeat_interleave(support.block, 2)[:, :, :Tq]
        number = (before.sum(-1) - inside.sum(-1)).clamp(min=0) * held
        number = number.repeat_interleave(q.shape[1] // number.shape[1], 1)
        share = before.to(q.dtype) / before.sum(-1, keepdim=True).clamp(min=1)
        means, values = share @ k, share @ v
        extra = (q * means).sum(-1) * scale + number.clamp(min=1).to(q.dtype).log()
        extra = extra.masked_fill(number == 0, float("-inf"))
        weights = torch.softmax(torch.cat([scores, extra[..., None]], -1), -1).nan_to_num(0.0)
        return weights[..., :-1] @ v + weights[..., -1:] * values
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


def gradients(function, inputs, towards):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs), inputs, towards)


@pytest.mark.parametrize("Tq, Tk", [(37, 37), (21, 50), (1, 9)])
@pytest.mark.parametrize("block, per_kv", [(1, False), (4, True), (16, False), (64, True)])
def test_gradients_are_those_of_dense_attention_under_the_mask(block, per_kv, Tq, Tk, monkeypatch):
    q, k, v = attention_inputs(2, 4, 2, Tq, Tk, 8, 12, dtype=torch.float64)
    support = random_support(2, 2 if per_kv else 1, Tq, Tk, k=7, block=block, empty=True)
    towards = torch.randn(2, 4, Tq, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = gradients(lambda q, k, v: dense(q, k, v, support, 0.3), (q, k, v), towards)
    for size in (workspace.SIZE, 1):  # whole, and one block of queries at a time
        monkeypatch.setattr(workspace, "SIZE", size)
        actual = gradients(lambda q, k, v: ops.sparse_attention(q, k, v, support, scale=0.3), (q, k, v), towards)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("block, per_kv", [(1, True), (4, False), (16, True)])
def test_gradients_with_a_tail_go_through_its_means(block, per_kv, side):
    q, k, v = attention_inputs(2, 4, 2, 37, 50, 8, 12, dtype=torch.float64)
    valid = None if side is None else padding(2, 50, side)
    support = random_support(2, 2 if per_kv else 1, 37, 50, k=7, block=block, empty=True)
    towards = torch.randn(2, 4, 37, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = gradients(lambda q, k, v: dense(q, k, v, support, 0.3, tail=True, valid=valid), (q, k, v), towards)
    actual = gradients(
        lambda q, k, v: ops.sparse_attention_with_tail(q, k, v, support, scale=0.3, valid=valid), (q, k, v), towards
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # the means are made in fp32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradients_of_every_dtype_are_as_accurate_as_dense_ones(dtype):
    q, k, v = attention_inputs(1, 4, 2, 48, 48, 16, dtype=dtype)
    support = random_support(1, 1, 48, 48, k=16, block=16)
    towards = torch.randn(1, 4, 48, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = gradients(lambda q, k, v: dense(q, k, v, support, 0.3), [x.double() for x in (q, k, v)], towards.double())
    yardstick = gradients(lambda q, k, v: dense(q, k, v, support, 0.3), (q, k, v), towards)
    actual = gradients(lambda q, k, v: ops.sparse_attention(q, k, v, support, scale=0.3), (q, k, v), towards)
    for one, right, rough in zip(actual, exact, yardstick):
        assert one.dtype == dtype
        assert_accurate(one, right, rough)


def test_gradients_by_a_back_end_are_the_references(backend):
    q, k, v = attention_inputs(2, 4, 2, 37, 37, backend.dim(16), dtype=backend.dtype(), device=backend.device)
    support = random_support(2, 1, 37, 37, k=8, block=4, device=backend.device)
    towards = torch.ones_like(q)

    def by(impl):
        return gradients(lambda q, k, v: ops.sparse_attention(q, k, v, support, scale=0.3, impl=impl), (q, k, v), towards)

    torch.testing.assert_close(by(backend.impl), by("reference"), rtol=0, atol=0)


@pytest.mark.parametrize("block", [1, 16])
def test_keys_that_nobody_selects_get_no_gradient_even_where_they_are_nan(block):
    q, k, v = attention_inputs(2, 4, 2, 37, 37, 8, dtype=torch.float64)
    support = hostile(random_support(2, 1, 37, 37, k=3, block=block, empty=True))
    selected = support.member_mask(37).any(2)
    towards = torch.ones_like(q)

    def run(q, k, v):
        return ops.sparse_attention(q, k, v, support, scale=0.3)

    clean = gradients(run, (q, k, v), towards)
    actual = gradients(run, (q, poisoned(k, selected), poisoned(v, selected)), towards)
    torch.testing.assert_close(actual, clean)
    assert not bool(actual[1][~selected.expand(-1, 2, -1)].any())


def test_gradient_checkpointing_gives_the_same_gradients():
    q, k, v = attention_inputs(1, 4, 2, 37, 37, 8, dtype=torch.float64)
    support = random_support(1, 1, 37, 37, k=8, block=16)

    def run(q, k, v):
        return ops.sparse_attention(q * 2, k, v, support, scale=0.3)

    towards = torch.ones_like(q)
    again = gradients(lambda *x: checkpoint(run, *x, use_reentrant=False), (q, k, v), towards)
    torch.testing.assert_close(again, gradients(run, (q, k, v), towards), rtol=0, atol=0)


@pytest.mark.parametrize("candidates", [0, 16])
def test_a_selection_is_a_constant(candidates):
    qi, ki, w = (x.requires_grad_() for x in index_inputs(1, 2, 200, 200, 64))
    q, k, _ = (x.requires_grad_() for x in attention_inputs(1, 4, 2, 37, 37, 8))
    mass = ops.attention_mass(q, k, scale=0.3, reduce_block=4)
    assert not ops.index_scores(qi, ki, w, block=4).requires_grad and not mass.requires_grad
    select = partial(ops.select_two_level, candidates=candidates, key_block=16) if candidates else ops.select_by_index
    assert not select(qi, ki, w, k=8, block=4).indices.requires_grad


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_gradients_of_dense_rows_are_those_of_dense_attention(side, monkeypatch):
    q, k, v = attention_inputs(2, 4, 2, 5, 30, 8, 12, dtype=torch.float64)
    positions = torch.tensor([[29, 3, -1, 7, 28], [0, 1, 2, 12, 20]], dtype=torch.int32)
    valid = None if side is None else padding(2, 30, side)
    towards = torch.randn(2, 4, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def plain(q, k, v):
        sees = torch.arange(30) <= positions[..., None]
        sees = (sees if valid is None else sees & valid[:, None])[:, None]
        scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~sees, float("-inf"))
        return torch.softmax(scores, -1).nan_to_num(0.0) @ v.repeat_interleave(2, 1)

    for size in (workspace.SIZE, 1):
        monkeypatch.setattr(workspace, "SIZE", size)
        actual = gradients(lambda q, k, v: ops.dense_rows(q, k, v, positions, scale=0.3, valid=valid), (q, k, v), towards)
        torch.testing.assert_close(actual, gradients(plain, (q, k, v), towards), rtol=1e-10, atol=1e-12)
