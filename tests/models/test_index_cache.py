import copy

import pytest
import torch

from npu_sparse.indexer import IndexerConfig, IndexHead
from npu_sparse.models import index_cache
from npu_sparse.models.index_cache import IndexKeyCache
from npu_sparse.testing import normal


@pytest.fixture(params=[8, 128], ids="rotary_dim={}".format)
def head(request):
    torch.manual_seed(0)
    head = IndexHead(IndexerConfig(hidden_size=16, layers=(0,), rotary_dim=request.param, dim=64))
    head.rotary_dim = request.param
    return head.requires_grad_(False)


def step(head, seed, length=1, B=2):
    hidden, angle = normal(B, length, 16, seed=seed), normal(1, length, head.rotary_dim, seed=seed + 50)
    return hidden, angle.cos(), angle.sin()


def keys(head, *steps):
    return torch.cat([head(hidden, cos, sin)[1] for hidden, cos, sin in steps], 1)


@pytest.mark.parametrize("pending_steps", [0, 2, 256])
def test_remembered_steps_become_the_keys_they_would_have_had(head, monkeypatch, pending_steps):
    monkeypatch.setattr(index_cache, "PENDING_STEPS", pending_steps)
    steps = [step(head, seed, length) for seed, length in enumerate((7, 1, 1, 1, 5))]
    cache = IndexKeyCache()
    for hidden, cos, sin in steps[:-1]:
        cache.remember(hidden, cos, sin, head)
        assert len(cache.pending) <= pending_steps
    torch.testing.assert_close(cache.extend(keys(head, steps[-1]), 10, head), keys(head, *steps))
    assert not cache.pending


@pytest.mark.parametrize("tokens", range(11))
def test_keep_forgets_the_last_tokens_wherever_they_are(head, tokens):
    steps = [step(head, seed, length) for seed, length in enumerate((4, 3, 1, 2))]
    cache = IndexKeyCache()
    cache.extend(keys(head, steps[0]), 0, head)
    for hidden, cos, sin in steps[1:]:
        cache.remember(hidden, cos, sin, head)
    cache.keep(tokens)
    cache.flush(head)
    torch.testing.assert_close(cache.keys, keys(head, *steps)[:, :tokens])


def test_missing_and_extra_tokens_are_an_error(head):
    cache = IndexKeyCache()
    with pytest.raises(ValueError, match="holds 3 tokens of which 0 have index keys"):
        cache.extend(keys(head, step(head, 0)), 3, head)
    cache.extend(keys(head, step(head, 0)), 0, head)
    with pytest.raises(ValueError, match="holds 0 tokens of which 1 have index keys"):
        cache.extend(keys(head, step(head, 0)), 0, head)


def test_a_change_applies_to_keys_and_to_what_is_pending(head):
    first, second = step(head, 0, 3), step(head, 1)
    cache = IndexKeyCache()
    cache.extend(keys(head, first), 0, head)
    cache.remember(*second, head)
    cache.apply(lambda t: t.flip(0))
    cache.flush(head)
    torch.testing.assert_close(cache.keys, keys(head, first, second).flip(0))


def test_the_layers_of_a_copied_cache_act_on_their_own_keys(head):
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    IndexKeyCache.of(cache, 0).extend(keys(head, step(head, 0, 3)), 0, head)
    copied = copy.deepcopy(cache)
    copied.batch_select_indices(torch.tensor([1]))
    assert IndexKeyCache.of(copied, 0).keys.shape[0] == 1 and copied.layers[0].keys.shape[0] == 1
    assert IndexKeyCache.of(cache, 0).keys.shape[0] == 2 and cache.layers[0].keys.shape[0] == 2


def test_a_layer_that_does_not_exist_yet_is_made():
    from transformers import DynamicCache

    cache = DynamicCache()
    held = IndexKeyCache.of(cache, 2)
    assert len(cache.layers) == 3
    cache.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 2)
    assert IndexKeyCache.of(cache, 2) is held
