"""Loading a checkpoint by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from npu_sparse import checkpoints
from npu_sparse.checkpoints import CheckpointError

ROOT = Path(checkpoints.__file__).parent.parent.parent


def test_import_is_cheap():
    script = "import npu_sparse.checkpoints, sys; print({'torch', 'transformers', 'numpy', 'rich'} & {*sys.modules})"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", script], env=env, text=True).strip() == "set()"


def test_hub_id_that_transformers_cannot_load_is_explained(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    def from_pretrained(name, **options):
        asked = {"dtype": "bfloat16", "output_loading_info": True, "ignore_mismatched_sizes": True}
        assert (name, options) == ("someone/nothing", asked)  # the name is passed on unchanged
        raise OSError("someone/nothing is not a local folder\nand more lines")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(CheckpointError, match=r"cannot load 'someone/nothing' \(someone/nothing is not a .* folder\)"):
        checkpoints.load("someone/nothing", progress=False)


# What is loaded is the checkpoint's, all of it and nothing else


@pytest.fixture
def saved(tmp_path):
    """`saved(shard, change)` stores a tiny Llama with a tokenizer, its weights changed by `change(weights)`."""
    from safetensors.torch import load_file, save_file

    from npu_sparse.testing import tiny_model, tiny_tokenizer

    def save(shard="1GB", change=lambda weights: None):
        directory = tmp_path / "model"
        tiny_model("llama").save_pretrained(directory, max_shard_size=shard)
        tiny_tokenizer(["some words"], size=300).save_pretrained(directory)
        files = sorted(directory.glob("*.safetensors"))
        assert len(files) == (1 if shard == "1GB" else len(files)) and (shard == "1GB" or len(files) > 1)
        for file in files:
            weights = load_file(file)
            change(weights)
            save_file(weights, file, metadata={"format": "pt"})
        return directory

    return save


LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_a_checkpoint_with_a_weight_missing_is_refused_by_its_name(saved, shard):
    directory = saved(shard, lambda weights: weights.pop(LAYER, None))
    with pytest.raises(CheckpointError, match=rf"model lacks weights of its model, .* random numbers: {LAYER}$"):
        checkpoints.load(directory, progress=False)


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_a_checkpoint_with_a_weight_renamed_is_refused_by_its_name(saved, shard):
    def rename(weights):
        if LAYER in weights:
            weights["model.layers.1.mlp.upper_proj.weight"] = weights.pop(LAYER)

    with pytest.raises(CheckpointError, match=rf"lacks weights of its model, .*: {LAYER}$"):
        checkpoints.load(saved(shard, rename), progress=False)


def test_weights_that_the_model_has_no_place_for_are_refused_by_name(saved):
    import torch

    def add(weights):
        weights["model.layers.1.self_attn.q_proj.lora_A"] = torch.zeros(2, 2)

    with pytest.raises(CheckpointError, match=r"must hold its model's weights alone, got .*lora_A as well"):
        checkpoints.load(saved(change=add), progress=False)


def test_a_weight_of_another_shape_is_refused_by_name(saved):
    def cut(weights):
        weights[LAYER] = weights[LAYER][:-1].clone()

    with pytest.raises(CheckpointError, match=rf"weights of another shape than its config says: {LAYER}"):
        checkpoints.load(saved(change=cut), progress=False)


def test_many_missing_weights_are_a_sentence_all_the_same(saved):
    with pytest.raises(CheckpointError, match=r"random numbers: (\S+, ){3}\S+ and \d+ more$") as caught:
        checkpoints.load(saved(change=lambda weights: [weights.pop(n) for n in list(weights) if ".1." in n]), progress=False)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite_are_refused_by_name(saved, shard, value):
    def spoil(weights):
        if LAYER in weights:
            weights[LAYER][-1, -1] = float(value)

    with pytest.raises(CheckpointError, match=rf"model must have finite weights in bfloat16, got NaN or Inf in {LAYER}$"):
        checkpoints.load(saved(shard, spoil), progress=False)


def test_weights_that_the_asked_for_dtype_cannot_hold_are_refused_by_name(saved):
    directory = saved(change=lambda weights: weights[LAYER].view(-1)[0].fill_(1e6))
    with pytest.raises(CheckpointError, match=rf"must have finite weights in float16, got NaN or Inf in {LAYER}$"):
        checkpoints.load(directory, dtype="float16", progress=False)
    checkpoints.load(directory, dtype="float32", progress=False)


def test_many_weights_that_are_not_finite_are_a_sentence_all_the_same(saved):
    directory = saved(change=lambda weights: [weight.fill_(float("nan")) for weight in weights.values()])
    with pytest.raises(CheckpointError, match=r"NaN or Inf in (\S+, ){3}\S+ and \d+ more$"):
        checkpoints.load(directory, progress=False)


def test_a_hub_checkpoint_with_a_weight_missing_is_refused_too(saved, monkeypatch):
    from transformers import AutoModelForCausalLM

    directory = saved(change=lambda weights: weights.pop(LAYER))
    real = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name, **options: real(directory, **options))
    with pytest.raises(CheckpointError, match=rf"^someone/model lacks weights of its model, .*: {LAYER}$"):
        checkpoints.load("someone/model", progress=False)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456\n"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: b"", "must be a safetensors file, and is empty"),
        (lambda data: POINTER, "got the pointer that git-LFS leaves in its place: run `git lfs pull`"),
        (lambda data: data[:-100], "is cut off or damaged: its header wants"),
        (lambda data: data[:100], "is cut off or no safetensors file"),
        (lambda data: data[:5], "its safetensors header cannot be read"),
        (lambda data: data[:8] + b"[" * (len(data) - 8), "its safetensors header cannot be read"),
    ],
)
@pytest.mark.parametrize("shard", ["1GB", "40KB"])
@pytest.mark.parametrize("call", [checkpoints.load, checkpoints.identity])
def test_a_damaged_weight_file_is_one_sentence_with_its_name(saved, shard, damage, message, call):
    directory = saved(shard)
    file = sorted(directory.glob("*.safetensors"))[-1]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as caught:
        call(directory)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "index, message",
    [
        ("{", "model.safetensors.index.json is not JSON"),
        ("[]", "must hold a JSON object, got list"),
        ('{"weight_map": 3}', "must have a weight_map"),
        ('{"weight_map": {"a": 3}}', "must have a weight_map"),
        ('{"weight_map": {"a": "../../secret"}}', r"must name files of its own directory, got '\.\./\.\./secret'"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors is named by the checkpoint's index, and is not there"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("call", [checkpoints.load, checkpoints.identity])
def test_a_damaged_index_is_one_sentence(saved, index, message, call):
    directory = saved("40KB")
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message) as caught:
        call(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"model_type": "llama", "hidden_size": "x"}', "[" * 100_000])
@pytest.mark.parametrize("call", [checkpoints.load, checkpoints.identity, checkpoints.load_tokenizer])
def test_a_config_that_is_none_is_one_sentence(saved, content, call):
    directory = saved()
    (directory / "config.json").write_text(content)
    if call is checkpoints.load_tokenizer:
        (directory / "tokenizer.json").write_text(content)
        (directory / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        call(directory)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


def test_a_whole_checkpoint_loads_as_before(saved):
    import torch

    from npu_sparse.testing import tiny_model

    for shard in ("1GB", "40KB"):
        model, tokenizer = checkpoints.load(saved(shard), dtype="float32", progress=False)
        expected = tiny_model("llama").state_dict()
        assert json.dumps(sorted(expected)) == json.dumps(sorted(model.state_dict()))
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
