"""Ways of running a model while it is attached that its own attention serves: gradients, autocast, long RoPE, PEFT, weights in
few bits. Each is compared with what the model computes by itself where the budget holds every key."""

import copy

import pytest
import torch
from torch import nn

from npu_sparse import Budget, Indexer, SparsePrefill, selectors
from npu_sparse.models.architectures import UnsupportedArchitectureError, describe
from npu_sparse.testing import tiny_model, tokens

T = 70
ALL = dict(k=T, dense_below=0)
KINDS = ["indexer", "oracle", "local", "random", "dense", "tail", "two levels", "exact"]


def attach(kind, model, block=16, **options):
    budget = Budget(k=24, block=block, sink=2, recent=4, dense_below=0)
    if kind in ("indexer", "tail", "two levels", "exact"):
        changes = {"tail": dict(tail=True), "two levels": dict(candidates=32, key_block=16), "exact": dict(exact_last=9)}
        changes = changes.get(kind, {})
        return SparsePrefill.attach(model, Indexer.for_model(model, dim=64, heads=2), budget.replace(**changes), **options)
    chosen = {"oracle": selectors.Oracle(), "local": selectors.Local(), "random": selectors.Random(), "dense": selectors.Dense()}
    return SparsePrefill.attach(model, chosen[kind], budget, **options)


def loss_gradients(model, ids, **options):
    model.zero_grad()
    model(ids, labels=ids, **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 16])
def test_a_forward_with_gradients_on_works(kind, block):
    model = tiny_model("qwen3")
    with attach(kind, model, block):
        gradients = loss_gradients(model, tokens(2, T))
    assert all(bool(g.isfinite().all()) for g in gradients.values())
    assert {name.split(".")[-2] for name in gradients} >= {"q_proj", "k_proj", "v_proj", "embed_tokens"}


@pytest.mark.parametrize("name", ["llama", "qwen3_5"])
@pytest.mark.parametrize("block", [1, 16])
def test_gradients_through_every_key_are_those_of_dense_attention(name, block):
    model, ids = tiny_model(name, dtype=torch.float64), tokens(2, T)
    dense = loss_gradients(model, ids)
    with SparsePrefill.attach(model, selectors.Dense(), Budget(block=block, **ALL)):
        sparse = loss_gradients(model, ids)
    assert sparse.keys() == dense.keys()
    for key, value in dense.items():
        torch.testing.assert_close(sparse[key], value, rtol=1e-6, atol=1e-9, msg=key)


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_through_exact_rows_are_those_of_dense_attention(padded):
    model, ids = tiny_model("llama", dtype=torch.float64), tokens(2, T)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :13] = 0
    dense = loss_gradients(model, ids, attention_mask=mask)
    with SparsePrefill.attach(model, selectors.Dense(), Budget(block=16, exact_last=20, **ALL)):
        sparse = loss_gradients(model, ids, attention_mask=mask)
    for key, value in dense.items():
        torch.testing.assert_close(sparse[key], value, rtol=1e-6, atol=1e-9, msg=key)


@pytest.mark.parametrize("share_layers", [1, 2])
@pytest.mark.parametrize("kind", ["indexer", "oracle"])
def test_gradient_checkpointing_changes_nothing(kind, share_layers):
    model, ids = tiny_model("qwen3", dtype=torch.float64), tokens(2, T)
    budget = Budget(k=24, block=16, dense_below=0, share_layers=share_layers)
    selector = Indexer.for_model(model, dim=64) if kind == "indexer" else selectors.Oracle()
    with SparsePrefill.attach(model, selector, budget):
        plain = loss_gradients(model, ids, use_cache=False)
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        again = loss_gradients(model, ids, use_cache=False)
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, rtol=1e-9, atol=1e-12, msg=key)


def test_an_index_of_a_cache_keeps_no_graph():
    model, ids = tiny_model("qwen3"), tokens(2, T)
    with attach("indexer", model):
        cache = model(ids, use_cache=True).past_key_values
        assert not cache.layers[0].index_keys.keys.requires_grad
        model(ids[:, :1], past_key_values=cache)
        assert not cache.layers[0].index_keys.pending[0][0].requires_grad


def test_dropout_of_attention_weights_is_refused():
    model = tiny_model("llama", attention_dropout=0.1).train()
    with attach("oracle", model), pytest.raises(ValueError, match=r"attention_dropout must be 0 .* got 0.1: call model.eval\(\)"):
        model(tokens(2, T))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_of_an_fp32_model_works(kind, dtype):
    model, ids = tiny_model("qwen3"), tokens(2, T)
    with torch.no_grad(), torch.autocast("cpu", dtype), attach(kind, model):
        assert model(ids).logits.dtype == dtype
        assert bool(model(ids).logits.isfinite().all())


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "qwen3_5", "gemma3"])
def test_autocast_is_as_close_to_fp32_as_dense_attention_under_autocast_is(name):
    model, ids = tiny_model(name), tokens(2, T)
    with torch.no_grad():
        exact = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            dense = model(ids).logits
            with SparsePrefill.attach(model, selectors.Dense(), Budget(block=16, **ALL)):
                sparse = model(ids).logits
    error = [float((x.float() - exact).square().mean().sqrt()) for x in (sparse, dense)]
    assert 0 < error[0] <= 1.5 * error[1]


@torch.no_grad()
def test_selection_under_autocast_is_made_in_fp32():
    """The mass of an oracle is fp32 whatever the model's dtype: under autocast its products stay so."""
    model, ids = tiny_model("qwen3"), tokens(2, T)
    seen = []
    with torch.autocast("cpu", torch.bfloat16), attach("oracle", model, observe=lambda *what: seen.append(what)):
        model(ids)
    inputs, support, _ = seen[0]
    assert inputs.q.dtype == inputs.k.dtype == inputs.v.dtype == torch.bfloat16
    assert torch.equal(selectors.Oracle().select(inputs, Budget(k=24, block=16, sink=2, recent=4)).indices, support.indices)


@torch.no_grad()
def test_a_cache_may_be_filled_under_autocast_and_continued_without():
    model, ids = tiny_model("qwen3"), tokens(2, T)
    with attach("indexer", model):
        with torch.autocast("cpu", torch.bfloat16):
            cache = model(ids[:, :40], use_cache=True).past_key_values
        out = model(ids[:, 40:], past_key_values=cache).logits
    assert bool(out.isfinite().all()) and cache.layers[0].index_keys.keys.shape[1] == T


# Rotary embeddings scaled for long contexts

YARN = dict(rope_type="yarn", rope_theta=1e4)
SCALED = {
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
    "yarn of the config": dict(rope_type="yarn", factor=4.0),
    "linear": dict(rope_type="linear", factor=4.0),
    "dynamic": dict(rope_type="dynamic", factor=4.0),
    "llama3": dict(
        rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    "longrope": dict(
        rope_type="longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8, factor=4.0, original_max_position_embeddings=32
    ),
}


def scaled(kind):
    longest = 128 if kind in ("llama3", "longrope") else 32
    return tiny_model("llama", max_position_embeddings=longest, rope_parameters={"rope_theta": 1e4, **SCALED[kind]})


@torch.no_grad()
@pytest.mark.parametrize("kind", SCALED)
def test_a_long_prompt_by_scaled_rope_is_what_transformers_makes_of_it(kind):
    model, ids = scaled(kind), tokens(length=100)
    assert describe(model.config).max_positions == 128
    dense = model(ids).logits
    for block in (1, 16):
        with SparsePrefill.attach(model, selectors.Dense(), Budget(k=128, block=block, dense_below=0)):
            torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", SCALED)
def test_the_index_turns_by_the_models_own_angles(kind):
    """An index head that copies a layer's only head of queries and keys scores as that layer's attention does."""
    model, ids, angles = scaled(kind), tokens(length=100), []
    model.model.rotary_emb.register_forward_hook(lambda module, args, out: angles.append(out))
    seen = []
    indexer = Indexer.for_model(model, dim=64)
    with SparsePrefill.attach(model, indexer, Budget(k=16, dense_below=0), observe=lambda inputs, *_: seen.append(inputs)):
        hidden = []
        model.model.layers[0].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: hidden.append(kwargs["hidden_states"]), with_kwargs=True
        )
        model(ids)
    expected = indexer(0, hidden[0], *angles[0])
    torch.testing.assert_close(seen[0].index[0], expected[0])
    torch.testing.assert_close(seen[0].index[1], expected[1])


@torch.no_grad()
@pytest.mark.parametrize("kind", SCALED)
def test_beyond_the_scaled_length_a_prompt_is_refused(kind):
    with attach("oracle", scaled(kind)) as attached:
        with pytest.raises(ValueError, match="prompt must fit the model's 128 positions, got 129 tokens"):
            attached.model(tokens(length=129))


@pytest.mark.parametrize(
    "name, changes, longest",
    [
        ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=1e4)), 512),
        ("llama", dict(rope_parameters=YARN | dict(factor=4.0, original_max_position_embeddings=128)), 512),
        ("llama", dict(rope_parameters=YARN | dict(factor=2.5, original_max_position_embeddings=512)), 1280),
        ("gemma3", {}, 512),
    ],
)
def test_max_positions_follow_the_kind_of_scaling(name, changes, longest):
    assert describe(tiny_model(name, **changes).config).max_positions == longest


# PEFT


@pytest.fixture
def adapted():
    """`(PeftModel, plain)`: a model with random LoRA on every projection, and the same with the LoRA merged."""
    peft = pytest.importorskip("peft")

    def make(targets="all-linear", **changes):
        torch.manual_seed(0)
        model = tiny_model("qwen3", **changes)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        merged = copy.deepcopy(wrapped).merge_and_unload()
        return wrapped.eval(), merged.eval()

    return make


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_model_gives_what_its_merged_weights_do(adapted, kind):
    wrapped, merged = adapted()
    ids = tokens(2, T)
    before = wrapped(ids).logits
    with attach(kind, merged):
        expected = merged(ids).logits
    torch.manual_seed(0)
    with attach(kind, wrapped) as attached:
        assert attached.model is wrapped.get_base_model()
        actual = wrapped(ids).logits
    assert kind == "dense" or not torch.allclose(actual, before)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(wrapped(ids).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj"], ["q_proj", "embed_tokens"]], ids=str)
@pytest.mark.parametrize("wrapping", [True, False])
def test_an_indexer_of_the_base_serves_its_lora(adapted, targets, wrapping):
    model = tiny_model("qwen3")
    indexer = Indexer.for_model(model, dim=64)
    assert indexer.base["weights_fingerprint"] and indexer.base["backbone_fingerprint"]
    wrapped, _ = adapted(targets)
    given = wrapped if wrapping else wrapped.get_base_model()
    with SparsePrefill.attach(given, indexer, Budget(k=16, dense_below=0)):
        assert bool(given(tokens(2, T)).logits.isfinite().all())


@torch.no_grad()
def test_generation_by_a_peft_model_is_sparse(adapted):
    wrapped, _ = adapted()
    seen = []
    with attach("indexer", wrapped, observe=lambda *what: seen.append(what)):
        text = wrapped.generate(input_ids=tokens(2, T), max_new_tokens=3, do_sample=False)
    assert text.shape == (2, T + 3) and len(seen) == len(describe(wrapped.config).layers)


def test_lora_is_trained_through_a_sparse_prefill(adapted):
    wrapped, _ = adapted(["q_proj", "v_proj"])
    with attach("indexer", wrapped):
        gradients = loss_gradients(wrapped, tokens(2, T))
    assert gradients and all("lora" in name and bool(g.any()) for name, g in gradients.items())


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_model("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UnsupportedArchitectureError, match="PEFT's PROMPT_TUNING is not supported: its virtual tokens"):
        attach("oracle", wrapped)


# Weights in few bits


class Int8Linear(nn.Module):
    """A projection as libraries of quantisation keep it: int8 weights and a scale a row."""

    def __init__(self, linear):
        super().__init__()
        self.scale = nn.Parameter(linear.weight.abs().amax(1, keepdim=True) / 127, requires_grad=False)
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, (self.weight * self.scale).to(x.dtype))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_int8_weights_is_served(kind):
    model, ids = tiny_model("qwen3"), tokens(2, T)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Int8Linear(getattr(layer.self_attn, name)))
    with attach(kind, model):
        assert bool(model(ids).logits.isfinite().all())
    dense = model(ids).logits
    with SparsePrefill.attach(model, selectors.Dense(), Budget(block=16, **ALL)):
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_indexer_of_the_whole_weights_serves_them_in_int8():
    model = tiny_model("qwen3")
    indexer = Indexer.for_model(model, dim=64)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Int8Linear(layer.self_attn.q_proj)
    with SparsePrefill.attach(model, indexer, Budget(k=16, dense_below=0)):
        assert bool(model(tokens(2, T)).logits.isfinite().all())


# What is not finite


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("part", ["q_proj", "k_proj"])
def test_an_index_that_is_not_finite_names_its_layer(part, value):
    model = tiny_model("qwen3")
    indexer = Indexer.for_model(model, dim=64)
    layer = describe(model.config).layers[1]
    with SparsePrefill.attach(model, indexer, Budget(k=16, dense_below=0)) as attached:
        getattr(attached.indexer.layers[str(layer)], part).weight[3, 5] = value  # attaching refuses one that has it already
        with pytest.raises(FloatingPointError, match=f"index queries and keys of layer {layer} must be finite, got NaN or Inf"):
            model(tokens(2, T))


@torch.no_grad()
def test_an_oracle_whose_scores_are_not_finite_names_its_layer():
    model = tiny_model("llama")
    layer = describe(model.config).layers[1]
    model.model.layers[layer].self_attn.k_proj.weight[3, 5] = float("nan")
    with attach("oracle", model), pytest.raises(FloatingPointError, match=f"scores of layer {layer} must be finite"):
        model(tokens(2, T))
