"""An identity names the weights that an adapter was made for."""

import json

import pytest

from npu_sparse import checkpoints
from npu_sparse.testing import tiny_model


def tiny_qwen():
    """Tiny Qwen3.5: two linear-attention layers, then full attention, as a text model and inside the vision model."""
    import torch
    from transformers import Qwen3_5Config, Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3_5Config(text_config=text, vision_config=vision)
    whole = Qwen3_5ForConditionalGeneration(config)
    alone = Qwen3_5ForCausalLM(config.text_config)
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    return alone, whole


def tiny_llama():
    import torch

    changes = dict(vocab_size=300, num_hidden_layers=2, initializer_range=0.02, pad_token_id=None)
    return tiny_model("llama", dtype=torch.bfloat16, **changes)


def test_text_model_and_vision_model_around_it_have_one_identity_but_for_architectures():
    alone, whole = map(checkpoints.identity, tiny_qwen())
    assert (alone.pop("architectures"), whole.pop("architectures")) == (
        ["Qwen3_5ForCausalLM"],
        ["Qwen3_5ForConditionalGeneration"],
    )
    assert alone == whole
    for fingerprint in (alone.pop("weights_fingerprint"), alone.pop("backbone_fingerprint")):
        assert len(fingerprint) == 16 and int(fingerprint, 16) >= 0
    assert alone == {
        "model_type": "qwen3_5_text", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300,
    }  # fmt: skip


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_identity_from_files_is_that_of_the_loaded_model(tmp_path, shard):
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    assert checkpoints.identity(tmp_path) == checkpoints.identity(model)
    json.dumps(checkpoints.identity(model))


def test_fingerprint_does_not_depend_on_the_dtype_of_loading(tmp_path):
    import torch

    model = tiny_llama()
    with torch.no_grad():  # values that fp16 rounds or drops
        model.model.embed_tokens.weight.view(-1)[::7] = torch.tensor(3.3e-7)
        model.model.layers[0].self_attn.q_proj.weight.view(-1)[::5] = torch.tensor(-1.7e-9)
        model.model.layers[1].mlp.down_proj.weight.view(-1)[::3] = torch.tensor(2.1e-6)
    expected = checkpoints.weights_fingerprint(model), checkpoints.backbone_fingerprint(model)
    model.save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.float32):
        # load() would want a tokenizer, which this directory has not.
        loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
        assert loaded.dtype == dtype
        assert (checkpoints.weights_fingerprint(loaded), checkpoints.backbone_fingerprint(loaded)) == expected


def test_fp32_weights_have_one_fingerprint_in_fp32_and_bf16(tmp_path):
    import torch

    model = tiny_llama()
    with torch.no_grad():
        model = model.float()
        model.model.embed_tokens.weight.add_(1e-4)  # no longer representable in bf16
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert not torch.equal(loaded.model.embed_tokens.weight.float(), model.model.embed_tokens.weight)
    assert checkpoints.weights_fingerprint(loaded) == checkpoints.weights_fingerprint(model)
    assert checkpoints.backbone_fingerprint(loaded) == checkpoints.backbone_fingerprint(model)


def test_fingerprint_tells_fine_tuned_weights_apart():
    import torch

    model = tiny_llama()
    seen = {checkpoints.weights_fingerprint(model)}
    for weight in (model.model.embed_tokens.weight, model.model.layers[0].self_attn.q_proj.weight):
        with torch.no_grad():
            weight.mul_(1.05)
        seen.add(checkpoints.weights_fingerprint(model))
    assert len(seen) == 3


LLAMA_MATRICES = [
    "embed_tokens",
    *(f"layers.{layer}.{name}" for layer in (0, 1) for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )),
]  # fmt: skip


@pytest.mark.parametrize("name", LLAMA_MATRICES)
def test_a_small_low_rank_change_of_any_matrix_changes_the_backbones_fingerprint(name):
    import torch

    model = tiny_llama()
    before = checkpoints.backbone_fingerprint(model)
    weight = model.model.get_submodule(name).weight
    torch.manual_seed(0)
    down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    with torch.no_grad():
        weight.add_((1e-3 * up @ down).bfloat16())  # a LoRA of rank 2, merged
    assert checkpoints.backbone_fingerprint(model) != before


def test_a_change_of_a_linear_attention_layer_changes_the_backbones_fingerprint():
    import torch

    model, whole = tiny_qwen()
    before = checkpoints.backbone_fingerprint(model)
    assert checkpoints.backbone_fingerprint(whole) == before
    with torch.no_grad():
        whole.model.visual.blocks[0].mlp.linear_fc1.weight.mul_(2)  # no part of the text model
        assert checkpoints.backbone_fingerprint(whole) == before
        model.model.layers[0].linear_attn.out_proj.weight.mul_(1.05)
    assert checkpoints.backbone_fingerprint(model) != before


def test_fingerprint_reads_the_first_full_attention_layer():
    import torch

    model, _ = tiny_qwen()
    before = checkpoints.weights_fingerprint(model)
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight.mul_(1.05)
    assert checkpoints.weights_fingerprint(model) != before


def test_model_without_the_weights_that_identify_it_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"model must have embed_tokens and layers\.0\.self_attn\.q_proj weights"):
        checkpoints.weights_fingerprint(model)


@pytest.mark.checkpoint
@pytest.mark.parametrize(
    ("name", "fingerprint"),
    [
        ("smollm2-135m", "6e3da957fa58f7a2"), ("gemma3-270m", "aeb131a59e5f368a"), ("qwen2.5-coder-0.5b", "e1ce2e01e0a58662"),
        ("qwen2.5-coder-1.5b", "4743317d6de2d640"),
    ],
)
def test_cached_demo_has_the_weights_that_adapters_were_made_for(name, fingerprint):
    if not checkpoints.is_prepared(checkpoints.resolve(name).path):
        pytest.skip(f"{name} is not cached: run `python -m npu_sparse.checkpoints {name}`")
    assert checkpoints.identity(name)["weights_fingerprint"] == fingerprint
