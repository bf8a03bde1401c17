import builtins
import errno
import json
import os
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file, save_file

from npu_sparse import Budget, Indexer, IndexerConfig, SparsePrefill
from npu_sparse.indexer import AdapterError, IndexHead, rotary_for, rotate, shipped
from npu_sparse.testing import TINY_MODELS, normal, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def indexer(model):
    return Indexer.for_model(model, heads=2, dim=64)


@pytest.fixture
def adapter(indexer, tmp_path):
    return indexer.save_pretrained(tmp_path / "adapter")


def rewritten(adapter, **changes):
    config = json.loads((adapter / "config.json").read_text())
    config.update(changes)
    (adapter / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


# Scores' ingredients


def test_for_model_is_seeded_and_leaves_the_global_generator_alone(model):
    state = torch.get_rng_state()
    first, same, other = (Indexer.for_model(model, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["layers.0.q_proj.weight"], other["layers.0.q_proj.weight"])


@pytest.mark.parametrize("name", TINY_MODELS)
def test_for_model_has_a_head_for_every_full_attention_layer(name):
    model = tiny_model(name)
    indexer = Indexer.for_model(model, heads=2, dim=64)
    assert indexer.config.rotary_dim == 16 and indexer.config.hidden_size == 64
    assert indexer.evidence == "untrained"
    assert {p.dtype for p in indexer.parameters()} == {torch.float32}
    indexer.check_base(model)
    hidden, angle = normal(2, 9, 64), normal(2, 9, 16)
    qi, ki, w = indexer(indexer.config.layers[-1], hidden, angle.cos(), angle.sin())
    assert (qi.shape, ki.shape, w.shape) == ((2, 2, 9, 64), (2, 9, 64), (2, 9, 2))


def test_one_head_has_no_weights():
    head = IndexHead(IndexerConfig(16, (0,), 8, heads=1, dim=64))
    angle = normal(2, 5, 8)
    assert head(normal(2, 5, 16), angle.cos(), angle.sin())[2] is None


@pytest.mark.parametrize("name, module", [("llama", "llama.modeling_llama"), ("qwen3_5", "qwen3_5.modeling_qwen3_5")])
def test_rotate_is_the_models_own_rotary_embedding(name, module):
    apply = import_module(f"transformers.models.{module}").apply_rotary_pos_emb
    model = tiny_model(name)
    head_dim = model.config.get_text_config().head_dim or 16
    q, k = normal(2, 4, 9, head_dim, seed=1), normal(2, 2, 9, head_dim, seed=2)
    position = torch.arange(9)[None].expand(2, -1)
    position = position if name == "llama" else position.expand(3, -1, -1)
    cos, sin = model.model.rotary_emb(q, position)
    expected_q, expected_k = apply(q, k, cos, sin)
    torch.testing.assert_close(rotate(q, cos[:, None], sin[:, None]), expected_q)
    torch.testing.assert_close(rotate(k, cos[:, None], sin[:, None]), expected_k)


def test_rotated_products_depend_on_distance_only():
    inverse = 1e4 ** (-torch.arange(16) / 16)
    angle = torch.arange(20)[:, None] * torch.cat([inverse, inverse])  # [T, 32]
    q, k = normal(64, seed=1).expand(20, -1), normal(64, seed=2).expand(20, -1)
    for dim in (32, 64):
        cos, sin = rotary_for(angle.cos(), dim), rotary_for(angle.sin(), dim)
        products = rotate(q, cos, sin) @ rotate(k, cos, sin).T
        for distance in (0, 3, 9):
            diagonal = products.diagonal(-distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rotary_dim", [64, 80, 96, 128, 192, 256])
def test_a_cut_rotary_table_keeps_the_whole_range_of_frequencies(rotary_dim):
    frequency = torch.arange(rotary_dim // 2, dtype=torch.float32)
    table = torch.cat([frequency, frequency])[None]
    cut = rotary_for(table, 64)[0]
    assert cut.shape == (64,)
    assert torch.equal(cut[:32], cut[32:])
    assert cut[0] == 0 and cut[31] >= rotary_dim // 2 - rotary_dim // 64 - 1
    steps = cut[1:32] - cut[:31]
    assert int(steps.min()) >= 1 and int(steps.max() - steps.min()) <= 1


def test_a_short_rotary_table_is_left_alone_and_the_rest_passes_through():
    table = normal(3, 16)
    assert rotary_for(table, 64) is table
    x = normal(3, 64)
    turned = rotate(x, table.cos(), table.sin())
    assert torch.equal(turned[:, 16:], x[:, 16:]) and not torch.equal(turned[:, :16], x[:, :16])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"dim": 96}, r"dim \(d_idx\) must be one of 64, 128, 256, got 96"),
        ({"heads": 0}, r"heads must be an integer in \[1, 64\], got 0"),
        ({"heads": 1.5}, "heads must be an integer"),
        ({"layers": ()}, "layers must name at least one layer"),
        ({"layers": (1, 1)}, "none twice"),
        ({"rotary_dim": 7}, "rotary_dim must be a positive even number, got 7"),
    ],
)
def test_a_broken_geometry_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        IndexerConfig(**{"hidden_size": 16, "layers": (0, 1), "rotary_dim": 8, **fields})


def test_a_saved_adapter_loads_as_its_bf16_weights(indexer, adapter):
    loaded = Indexer.from_pretrained(adapter)
    assert loaded.config == indexer.config and loaded.base == indexer.base
    assert loaded.evidence == "untrained" and loaded.budget is None
    for name, tensor in indexer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16().float())
    assert not any(p.requires_grad for p in loaded.parameters())
    again = Indexer.from_pretrained(loaded.save_pretrained(adapter), dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert {t.dtype for t in load_file(adapter / "model.safetensors").values()} == {torch.bfloat16}


def test_evidence_and_budget_travel_with_the_adapter(model, indexer, tmp_path):
    indexer.evidence, indexer.budget = "distilled", Budget(k=32, block=8, per_layer={1: 64}).to_dict()
    loaded = Indexer.from_pretrained(indexer.save_pretrained(tmp_path))
    assert loaded.evidence == "distilled"
    with SparsePrefill.attach(model, loaded) as attached:
        assert attached.budget == Budget(k=32, block=8, per_layer={1: 64})
        assert attached.selector.evidence == "distilled"


def test_an_adapters_budget_may_be_spelled(indexer, tmp_path):
    path = indexer.save_pretrained(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"budget": "k=32,block=8,per_layer=1:64"}))
    assert Indexer.from_pretrained(tmp_path).budget == Budget(k=32, block=8, per_layer={1: 64}).to_dict()


def test_an_adapter_is_three_files_and_a_card(indexer, tmp_path):
    directory = indexer.save_pretrained(tmp_path / "deep" / "adapter", card="# mine\n")
    assert sorted(entry.name for entry in directory.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (directory / "README.md").read_text() == "# mine\n"
    assert "(untrained)" in (indexer.save_pretrained(tmp_path / "b") / "README.md").read_text()


def test_truncated_weights_are_refused(adapter):
    data = (adapter / "model.safetensors").read_bytes()
    for size in (0, 7, len(data) // 2, len(data) - 1):
        (adapter / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(AdapterError, match="truncated or changed"):
            Indexer.from_pretrained(adapter)


def test_a_flipped_bit_is_refused(adapter):
    data = bytearray((adapter / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (adapter / "model.safetensors").write_bytes(data)
    with pytest.raises(AdapterError, match=r"truncated or changed \(its sha256 differs\)"):
        Indexer.from_pretrained(adapter)


@pytest.mark.parametrize("damage", ["rename", "drop", "reshape"])
def test_weights_that_do_not_fit_the_config_are_refused(adapter, damage):
    import hashlib

    weights = load_file(adapter / "model.safetensors")
    tensor = weights.pop("layers.1.q_proj.weight")
    if damage == "rename":
        weights["layers.9.q_proj.weight"] = tensor
    elif damage == "reshape":
        weights["layers.1.q_proj.weight"] = tensor[:-1].clone()
    save_file(weights, adapter / "model.safetensors")
    digest = hashlib.sha256((adapter / "model.safetensors").read_bytes()).hexdigest()
    rewritten(adapter, weights_sha256=digest)
    with pytest.raises(AdapterError, match="weights do not fit config.json"):
        Indexer.from_pretrained(adapter)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": 2}, "format must be 1, got 2; distil it again or update npu-sparse"),
        ({"format": ...}, "format must be 1, got None"),
        ({"weights_sha256": ..., "base": ...}, "config.json must have base, weights_sha256"),
        ({"indexer": {"hidden_size": 64}}, r"weights do not fit config.json \(.*missing"),
        (
            {"indexer": {"hidden_size": 64, "layers": [0], "rotary_dim": 16, "colour": 1}},
            "do not fit config.json .*colour",
        ),
        ({"base": "llama"}, "do not fit config.json"),
    ],
)
def test_a_changed_config_is_refused(adapter, changes, message):
    rewritten(adapter, **changes)
    with pytest.raises(AdapterError, match=message):
        Indexer.from_pretrained(adapter)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", b"\xff\xfe"])
def test_a_config_that_is_not_an_adapters_is_refused(adapter, content):
    (adapter / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AdapterError, match="config.json is not JSON|format must be 1, got None"):
        Indexer.from_pretrained(adapter)


def restored(adapter, change):
    """The adapter with its weights changed by `change(weights)`, and a digest that fits."""
    import hashlib

    weights = load_file(adapter / "model.safetensors")
    change(weights)
    save_file(weights, adapter / "model.safetensors")
    rewritten(adapter, weights_sha256=hashlib.sha256((adapter / "model.safetensors").read_bytes()).hexdigest())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn])
def test_weights_in_a_dtype_that_casting_would_ruin_are_refused(adapter, dtype):
    name = "layers.1.k_proj.weight"
    restored(adapter, lambda weights: weights.update({name: weights[name].to(dtype)}))
    with pytest.raises(AdapterError, match=rf"{name} must be stored in one of F64, F32, F16, BF16, got \w+"):
        Indexer.from_pretrained(adapter)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_weights_in_another_floating_dtype_are_taken(adapter, dtype):
    expected = Indexer.from_pretrained(adapter).state_dict()
    restored(adapter, lambda weights: weights.update({name: tensor.to(dtype) for name, tensor in weights.items()}))
    loaded = Indexer.from_pretrained(adapter).state_dict()
    assert all(torch.allclose(loaded[name], expected[name], atol=1e-7) for name in expected)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["layers.1.q_proj.weight", "layers.2.k_norm.bias", "layers.0.w_proj.weight"])
def test_weights_that_are_not_finite_are_refused_with_their_layer(adapter, name, value):
    restored(adapter, lambda weights: weights[name].view(-1)[3:4].fill_(float(value)))
    layer = name.split(".")[1]
    with pytest.raises(AdapterError, match=rf"must have finite weights, and layer {layer} has not \({name}\)"):
        Indexer.from_pretrained(adapter)


def test_weights_that_overflow_in_the_models_dtype_are_refused_with_their_layer():
    half = tiny_model("llama", dtype=torch.float16)
    indexer, before = Indexer.for_model(half, dim=64), half.config._attn_implementation
    with torch.no_grad():
        indexer.layers["2"].q_proj.weight[0, 0] = 1e5
    with pytest.raises(AdapterError, match=r"an indexer in float16 must have finite weights, and layer 2 has not"):
        SparsePrefill.attach(half, indexer, Budget(k=8))
    assert half.config._attn_implementation == before


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"indexer": {"hidden_size": 64, "layers": ["a.b"], "rotary_dim": 16}}, "layers must be integers, got 'a.b'"),
        ({"indexer": {"hidden_size": 64, "layers": "01", "rotary_dim": 16}}, "layers must be integers, got '01'"),
        ({"indexer": {"hidden_size": 64, "layers": [True], "rotary_dim": 16}}, "layers must be integers, got True"),
        ({"indexer": {"hidden_size": 300000, "layers": [0], "rotary_dim": 16}}, "hidden_size must be in"),
        ({"indexer": {"hidden_size": 64.0, "layers": [0], "rotary_dim": 16}}, "hidden_size must be an integer, got 64.0"),
        ({"indexer": []}, "do not fit config.json"),
        ({"budget": {"k": 8, "per_layer": []}}, "do not fit config.json"),
        ({"budget": [1]}, "do not fit config.json"),
        ({"evidence": 3}, "evidence must be one of distilled, untrained, got 3"),
    ],
)
def test_what_a_config_may_not_hold_is_refused_in_a_sentence(adapter, changes, said):
    rewritten(adapter, **changes)
    with pytest.raises(AdapterError) as caught:
        Indexer.from_pretrained(adapter)
    assert said in str(caught.value) and str(adapter) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_are_named(adapter, tmp_path):
    with pytest.raises(AdapterError, match="must be a directory with config.json"):
        Indexer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="must be a directory with config.json"):
        Indexer.from_pretrained(adapter / "README.md")
    (adapter / "model.safetensors").unlink()
    with pytest.raises(AdapterError, match="must contain model.safetensors"):
        Indexer.from_pretrained(adapter)


@pytest.mark.parametrize("victim", ["model.safetensors", "README.md", "config.json"])
def test_a_disk_that_fills_up_leaves_the_old_adapter_usable(indexer, adapter, victim, monkeypatch):
    before = Indexer.from_pretrained(adapter).state_dict()
    real, real_open, victims = builtins.open, os.open, set()

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def fileno(self):
            return self.file.fileno()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path, mode="r", *args, **kwargs):
        file = real(path, mode, *args, **kwargs)
        return Full(file) if "w" in mode and path in victims else file

    def opening(path, *args, **kwargs):
        descriptor = real_open(path, *args, **kwargs)
        if victim in str(path):
            victims.add(descriptor)
        return descriptor

    changed = Indexer(indexer.config, indexer.base)
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", opened)
        patch.setattr(os, "open", opening)
        with pytest.raises(OSError, match="No space left"):
            changed.save_pretrained(adapter)
    assert sorted(entry.name for entry in adapter.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    after = Indexer.from_pretrained(adapter).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_process_killed_while_writing_leaves_the_old_adapter_usable(indexer, adapter):
    child = os.fork()
    if not child:
        os.fsync = lambda descriptor: os._exit(9)  # dies with the first file half way
        try:
            Indexer(indexer.config, indexer.base).save_pretrained(adapter)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    Indexer.from_pretrained(adapter)


def test_adapters_of_another_base_or_geometry_are_refused(model, adapter):
    loaded = Indexer.from_pretrained(adapter)
    loaded.check_base(model)
    with pytest.raises(AdapterError, match="weights_fingerprint must be"):
        loaded.check_base(tiny_model("llama", seed=1))
    with pytest.raises(
        AdapterError, match=r"geometry \(hidden_size, full-attention layers, rotary_dim\) = \(64, \(1, 3\), 16\)"
    ):
        loaded.check_base(tiny_model("qwen3_5"))
    with pytest.raises(AdapterError, match="model_type must be 'llama', the model has 'qwen2'"):
        loaded.check_base(tiny_model("qwen2"))


def test_a_backbone_with_a_lora_merged_into_v_proj_is_another_base(model, adapter):
    loaded, changed = Indexer.from_pretrained(adapter), tiny_model("llama")
    loaded.check_base(changed)
    weight = changed.model.layers[2].self_attn.v_proj.weight
    with torch.no_grad():
        weight.add_(1e-3 * normal(weight.shape[0], 2) @ normal(2, weight.shape[1]))
    with pytest.raises(AdapterError, match="backbone_fingerprint must be .*: a matrix was changed, as by merging a LoRA"):
        loaded.check_base(changed)


def test_an_adapter_says_what_of_its_base_it_checks(model, indexer):
    assert indexer.checks == "the geometry and every weight matrix"
    del indexer.base["backbone_fingerprint"]  # older adapters have none
    assert indexer.checks == "the geometry, the embedding and one query projection"
    indexer.check_base(model)
    with pytest.raises(AdapterError, match="weights_fingerprint must be"):
        indexer.check_base(tiny_model("llama", seed=1))
    indexer.base = {}
    assert indexer.checks == "the geometry"


@pytest.mark.parametrize("name", shipped())
def test_shipped_adapters_load_and_say_what_they_check(name):
    loaded = Indexer.from_pretrained(name)
    assert loaded.base["weights_fingerprint"] and loaded.checks.startswith("the geometry")


def test_a_copy_for_a_model_is_frozen_and_its_own():
    model = tiny_model("llama", dtype=torch.bfloat16)
    indexer = Indexer.for_model(model)
    copy = indexer.copy_for(model)
    assert {p.dtype for p in copy.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in copy.parameters())
    with torch.no_grad():
        copy.layers["0"].q_proj.weight.zero_()
    assert float(indexer.layers["0"].q_proj.weight.detach().abs().max()) > 0
    assert (copy.base, copy.evidence, copy.config) == (indexer.base, indexer.evidence, indexer.config)
