import pytest
import torch

from npu_sparse.models.architectures import (
    SUPPORTED,
    UnsupportedArchitectureError,
    attention_modules,
    attention_selection,
    describe,
    text_config,
)
from npu_sparse.testing import TINY_MODELS, tiny_model

EXPECTED = {
    "llama": ("llama", (0, 1, 2), 2, 16, 16),
    "qwen2": ("qwen2", (0, 1, 2), 2, 16, 16),
    "qwen3": ("qwen3", (0, 1, 2), 2, 16, 16),
    "qwen3_next": ("qwen3_next", (1, 3), 2, 32, 16),
    "qwen3_5": ("qwen3_5_text", (1, 3), 2, 32, 16),
    "qwen3_5_wrapper": ("qwen3_5_text", (1, 3), 2, 32, 16),
    "gemma3": ("gemma3_text", (1, 3), 1, 16, 16),
}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_geometry_of_every_supported_architecture(name):
    model = tiny_model(name)
    a = describe(model.config)
    assert (a.model_type, a.layers, a.kv_heads, a.head_dim, a.rotary_dim) == EXPECTED[name]
    assert (a.hidden_size, a.query_heads, a.max_positions) == (64, 4, 512)
    assert a.to_dict() == {**a.__dict__, "layers": list(a.layers)}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_rotary_dim_is_what_the_model_rotates(name):
    model = tiny_model(name)
    tables = []
    for module in attention_modules(model).values():
        module.register_forward_pre_hook(
            lambda m, a, k: tables.append(k["position_embeddings"][0].shape), with_kwargs=True
        )
    with torch.no_grad():
        model(torch.ones(1, 5, dtype=torch.long))
    assert {shape[-1] for shape in tables} == {describe(model.config).rotary_dim}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_attention_modules_are_the_full_attention_layers(name):
    model = tiny_model(name)
    modules = attention_modules(model)
    assert [module.layer_idx for module in modules.values()] == list(modules) == list(describe(model.config).layers)
    assert all(getattr(module, "sliding_window", None) is None for module in modules.values())


def test_the_wrapper_and_its_text_model_are_one_architecture():
    assert describe(tiny_model("qwen3_5_wrapper").config) == describe(tiny_model("qwen3_5").config)


def test_only_the_text_layers_of_a_wrapper_change_their_implementation():
    wrapper, text = tiny_model("qwen3_5_wrapper"), tiny_model("qwen3_5")
    assert attention_selection(wrapper, "x") == {"text_config": "x"}
    assert attention_selection(text, "x") == "x"
    wrapper.set_attn_implementation(attention_selection(wrapper, "eager"))
    assert text_config(wrapper)._attn_implementation == "eager"
    assert wrapper.config.vision_config._attn_implementation == "sdpa"


def test_qwen3_5_as_published():
    from transformers import Qwen3_5TextConfig

    a = describe(
        Qwen3_5TextConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2)
    )
    assert (a.layers, a.head_dim, a.rotary_dim) == ((3, 7, 11, 15, 19, 23), 256, 64)


def test_gemma3_as_published():
    from transformers import Gemma3TextConfig

    a = describe(Gemma3TextConfig(num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1, head_dim=256))
    assert (a.layers, a.rotary_dim) == ((5, 11, 17), 256)


def unsupported():
    import transformers as t

    yield t.GPT2Config(), "'gpt2' is not supported: it has no rotary embedding"
    yield t.Gemma2Config(), "'gemma2' is not supported: its attention scores are soft-capped"
    yield t.Gemma3Config(), r"'gemma3' is not supported: .* load the text model \(Gemma3ForCausalLM\)"
    yield t.BertConfig(), "'bert' is not supported: it attends in both directions"
    yield t.MistralConfig(), "'mistral' is not supported: only gemma3_text, llama, .* are"
    yield t.Gemma3TextConfig(use_bidirectional_attention=True), "'gemma3_text' with bidirectional attention"
    yield t.Gemma3TextConfig(attn_logit_softcapping=50.0), "soft-capped attention scores"
    yield t.LlamaConfig(is_causal=False), "bidirectional attention"
    sliding = ["sliding_attention"] * 2
    yield t.Gemma3TextConfig(num_hidden_layers=2, layer_types=sliding), "no full-attention layer"


@pytest.mark.parametrize("config, message", list(unsupported()), ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_not_supported_is_refused_with_the_reason(config, message):
    with pytest.raises(UnsupportedArchitectureError, match=message):
        describe(config)


def test_a_model_without_decoder_layers_is_refused():
    model = torch.nn.Linear(1, 1)
    model.config = tiny_model("llama").config
    with pytest.raises(
        UnsupportedArchitectureError, match="Linear must be a causal language model with decoder layers"
    ):
        attention_modules(model)


def test_every_supported_type_has_a_tiny_model():
    assert {tiny_model(name).config.model_type for name in TINY_MODELS} == set(SUPPORTED)
