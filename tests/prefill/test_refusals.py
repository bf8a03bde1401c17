"""What cannot be served is refused, with the reason."""

import pytest
import torch
from transformers import DynamicCache

from npu_sparse import Budget, SparsePrefill, ascendc, selectors
from npu_sparse.models.architectures import UnsupportedArchitectureError
from npu_sparse.ops import KernelUnavailableError, dispatch
from npu_sparse.testing import tiny_model, tiny_selector, tokens

T = 75
EVERYTHING = Budget(k=512, block=16)
SPARSE = Budget(k=24, block=8, sink=2, recent=4)
pytestmark = pytest.mark.usefixtures("no_gradients")


def test_an_unknown_architecture_is_refused_with_the_reason():
    from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

    tiny = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedArchitectureError, match="'gpt2' is not supported: it has no rotary embedding"):
        SparsePrefill.attach(gpt2, selectors.Oracle())
    mistral = MistralForCausalLM(MistralConfig(**tiny, intermediate_size=32, num_key_value_heads=1))
    with pytest.raises(UnsupportedArchitectureError, match="'mistral' is not supported: only .*llama.* are"):
        SparsePrefill.attach(mistral, selectors.Oracle())


def test_a_tail_is_refused_where_no_kernel_reads_it(monkeypatch):
    monkeypatch.setattr(dispatch, "_KERNELS", {(op, "cpu"): print for op in ascendc.OPERATORS})
    message = r"sparse_attention_with_tail has no kernel on 'cpu': it has kernels for cuda only: .*, or Budget\(tail=False\)"
    with pytest.raises(KernelUnavailableError, match=message):
        SparsePrefill.attach(
            tiny_model("llama", dtype=torch.bfloat16), selectors.Oracle(), SPARSE.replace(tail=True), impl="kernel"
        )


@pytest.mark.parametrize(
    "budget, impl, error, message",
    [
        (SPARSE.replace(per_layer={0: 64}), "auto", ValueError, r"full-attention layers \[1, 3\], got \[0\]"),
        (SPARSE, "kernel", KernelUnavailableError, "has no kernel on 'cpu': .* pass impl='reference'"),
        (SPARSE, "fast", ValueError, "impl must be one of auto, reference, kernel, got 'fast'"),
        ({"k": 8}, "auto", TypeError, "budget must be a Budget, got dict"),
    ],
)
def test_what_cannot_run_is_refused_when_attaching_and_changes_nothing(budget, impl, error, message, monkeypatch):
    monkeypatch.setattr(dispatch, "_KERNELS", {})
    monkeypatch.setattr(ascendc, "load_if_built", lambda device_type: {})
    model, ids = tiny_model("gemma3"), tokens()
    before = model(ids).logits
    with pytest.raises(error, match=message):
        SparsePrefill.attach(model, selectors.Oracle(), budget, impl=impl)
    assert torch.equal(model(ids).logits, before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    SparsePrefill.attach(model, selectors.Oracle(), SPARSE).detach()


def test_a_second_attachment_is_refused(models):
    model = models("llama")
    with SparsePrefill.attach(model, selectors.Oracle(), SPARSE):
        with pytest.raises(ValueError, match="model must not be attached twice: detach"):
            SparsePrefill.attach(model, selectors.Oracle(), SPARSE)


@pytest.mark.parametrize("kind", ["oracle", "indexer"])
@pytest.mark.parametrize("layer", [0, 2])
def test_nan_hidden_states_name_the_layer(kind, layer):
    model = tiny_model("llama")
    model.model.layers[layer].input_layernorm.weight[3] = float("nan")
    with SparsePrefill.attach(model, tiny_selector(kind, model), SPARSE):
        with pytest.raises(FloatingPointError, match=f"hidden states of layer {layer} must be finite"):
            model(tokens())


def test_large_but_finite_fp16_hidden_states_are_finite():
    model = tiny_model("llama", dtype=torch.float16)
    model.model.embed_tokens.weight.fill_(1.0)
    model.model.layers[0].input_layernorm.weight.fill_(30.0)  # their sum is beyond fp16
    model.model.layers[0].self_attn.o_proj.weight.zero_()
    with SparsePrefill.attach(model, selectors.Dense(), EVERYTHING):
        assert bool(model(tokens()).logits.isfinite().all())


def test_an_empty_prompt_is_refused(models):
    model = models("llama")
    with SparsePrefill.attach(model, selectors.Oracle(), SPARSE):
        with pytest.raises(ValueError, match="prompt must hold at least one token, got none"):
            model(torch.zeros(1, 0, dtype=torch.long))


def test_a_prompt_beyond_the_models_positions_is_refused():
    model = tiny_model("llama", max_position_embeddings=64)
    with SparsePrefill.attach(model, selectors.Oracle(), SPARSE):
        model(tokens(1, 64))
        with pytest.raises(ValueError, match="prompt must fit the model's 64 positions, got 65 tokens"):
            model(tokens(1, 65))
        cache = DynamicCache(config=model.config)
        model(tokens(1, 60), past_key_values=cache)
        with pytest.raises(ValueError, match="64 positions, got 65 tokens"):
            model(tokens(1, 5), past_key_values=cache)


def test_a_custom_four_dimensional_mask_is_refused(models):
    model = models("llama")
    mask = torch.ones(2, 1, T, T, dtype=torch.bool).tril()
    with SparsePrefill.attach(model, selectors.Oracle(), SPARSE):
        with pytest.raises(ValueError, match=r"2-D padding mask \(batch, length\), got 4 dimensions"):
            model(tokens(), attention_mask=mask)


@pytest.mark.parametrize("kind", ["oracle", "indexer", "dense"])
def test_a_mask_of_another_length_is_refused(models, kind):
    model, ids = models("llama"), tokens()
    with SparsePrefill.attach(model, tiny_selector(kind, model), SPARSE):
        cache = DynamicCache(config=model.config)
        model(ids[:, :40], past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask must cover all 75 tokens, .* got \(2, 35\)"):
            model(ids[:, 40:], attention_mask=torch.ones(2, 35), past_key_values=cache)


def test_packed_sequences_are_refused(models):
    model, ids = models("llama"), tokens()
    packed = torch.cat([torch.arange(40), torch.arange(35)]).expand(2, -1)
    with SparsePrefill.attach(model, selectors.Oracle(), SPARSE):
        with pytest.raises(ValueError, match="one causal sequence per row; packed or custom masks"):
            model(ids, position_ids=packed, use_cache=False)
