import hashlib

import pytest
import torch

from npu_sparse.distill.teacher import tap
from npu_sparse.models.architectures import attention_modules, describe, text_config
from npu_sparse.testing import TINY_MODELS, naive_attention_mass, tiny_model

IDS = torch.randint(1, 95, (2, 33), generator=torch.Generator().manual_seed(2))


def taps_of(model, ids=IDS) -> list:
    taps = []
    tap(model, ids, taps.append)
    return taps


def fingerprint(model) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_taps_give_the_attention_weights_of_the_model(name):
    model = tiny_model(name)
    model.set_attn_implementation("eager")  # the one that also returns its weights
    weights, hidden = {}, {}
    handles = []
    for layer, module in attention_modules(model).items():
        def remember(module, args, kwargs, output, layer=layer):
            hidden[layer] = kwargs.get("hidden_states", args[0] if args else None)
            weights[layer] = output[1]

        handles.append(module.register_forward_hook(remember, with_kwargs=True))
    with torch.no_grad():
        model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    taps = taps_of(model)
    assert tuple(one.layer for one in taps) == describe(model.config).layers
    for one in taps:
        torch.testing.assert_close(one.hidden, hidden[one.layer], rtol=0, atol=0)
        mass = naive_attention_mass(one.q, one.k, scale=one.scale)[:, 0]
        torch.testing.assert_close(mass.float(), weights[one.layer].mean(1), rtol=1e-4, atol=1e-6)
        assert one.cos.shape == one.sin.shape == (one.cos.shape[0], 33, describe(model.config).rotary_dim)
        assert one.cos.shape[0] in (1, 2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen3_5_wrapper", "gemma3"])
def test_tapping_leaves_the_model_as_it_was(name, implementation):
    model = tiny_model(name)
    model.set_attn_implementation(implementation)
    before, weights = model(IDS).logits, fingerprint(model)
    taps_of(model)
    assert text_config(model)._attn_implementation == implementation
    assert torch.equal(model(IDS).logits, before)
    assert fingerprint(model) == weights
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_tap_restores_the_model(error):
    model = tiny_model("qwen2")

    def fail(one):
        raise error("stop")

    before = model(IDS).logits
    with pytest.raises(error):
        tap(model, IDS, fail)
    assert text_config(model)._attn_implementation == "sdpa"
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(IDS).logits, before)


def test_a_tapped_forward_computes_what_the_model_computes():
    model = tiny_model("gemma3")
    seen = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output.logits[:, -1]))
    taps_of(model)
    expected = model(IDS).logits[:, -1]
    handle.remove()
    torch.testing.assert_close(seen[0], expected)


def test_taps_record_no_graph():
    assert all(not one.q.requires_grad and one.hidden.grad_fn is None for one in taps_of(tiny_model("llama")))


def test_one_token_is_a_context():
    (first, *_) = taps_of(tiny_model("llama"), IDS[:1, :1])
    assert first.q.shape[2] == first.k.shape[2] == first.hidden.shape[1] == 1
