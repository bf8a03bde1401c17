"""GGUF files become bf16 safetensors."""

import hashlib
import os
import shutil
import struct

import pytest

from npu_sparse import checkpoints
from npu_sparse.checkpoints import CheckpointError, gguf


def test_gguf_file_is_unpacked_to_bf16_once_and_keyed_by_its_contents(gguf_file, tmp_path, monkeypatch):
    import torch
    from safetensors.torch import load_file

    file, unpacked = gguf_file
    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path))
    model, tokenizer = checkpoints.load(file, progress=False)
    assert not model.training and model.dtype == torch.bfloat16

    directory = tmp_path / "checkpoints" / f"gguf-{hashlib.sha256(file.read_bytes()).hexdigest()[:32]}"
    stored = load_file(directory / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for theirs, ours in (("token_embd", "embed_tokens"), ("blk.0.ffn_down", "layers.0.mlp.down_proj")):
        assert torch.equal(stored[f"model.{ours}.weight"], torch.from_numpy(unpacked[theirs]).bfloat16())
    assert {file.stat().st_mode & 0o777 for file in directory.iterdir()} == {0o666 & ~umask()}

    text = "he said: hello"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    output = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert output.shape[1] > len(text.split())

    def refuse(gguf, target):
        raise AssertionError("converted a second time")

    monkeypatch.setattr(gguf, "write_bf16", refuse)
    copy = tmp_path / "same-contents.gguf"
    shutil.copy(file, copy)
    again, _ = checkpoints.load(copy, dtype="float32", progress=False)
    assert again.dtype == torch.float32
    assert checkpoints.identity(copy) == checkpoints.identity(model) == checkpoints.identity(again)
    assert checkpoints.load_tokenizer(copy, progress=False).encode(text) == tokenizer.encode(text)


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """`refused(file)`: the sentence that preparing a file ends with; nothing is left of it in the cache."""
    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path / "cache"))

    def refuse(file):
        with pytest.raises(CheckpointError) as caught:
            checkpoints.prepare(file, progress=False)
        assert "\n" not in str(caught.value) and file.name in str(caught.value)
        assert list((tmp_path / "cache" / "checkpoints").iterdir()) == []
        assert [entry.name for entry in (tmp_path / "cache" / "partial").rglob("*") if entry.is_file()] == []
        return str(caught.value)

    return refuse


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a GGUF file, and is empty"),
        (b"GGUF", "is cut off or damaged"),
        (b"GGUF" + bytes(64), "must be GGUF version 2 or 3, got 0"),
        (b"PK\x03\x04" + bytes(64), r"must be a GGUF file, and begins with b'PK\x03\x04'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "that git-LFS leaves in its place: run `git lfs pull`"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + bytes(64), "is cut off or damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + bytes(64), "is cut off or damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "its header must name general.architecture"),
    ],
)
def test_file_that_is_no_gguf_is_refused_in_one_sentence(refused, tmp_path, content, message):
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    assert message in refused(file)


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.6, 0.99])
def test_a_gguf_file_that_is_cut_off_is_refused(refused, make_gguf, kept):
    file = make_gguf()
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    assert "is cut off" in refused(file)


@pytest.mark.parametrize("by_transformers", [False, True])
def test_a_gguf_file_with_a_tensor_renamed_is_refused_by_its_name(refused, make_gguf, monkeypatch, by_transformers):
    if by_transformers:
        monkeypatch.setattr(gguf, "_DIRECT", ())

    def rename(tensors):
        tensors["blk.0.ffn_upper.weight"] = tensors.pop("blk.0.ffn_up.weight")

    said = refused(make_gguf(change=rename))
    assert "lacks weights of its model, which would run on random numbers: " in said
    assert ("model.layers.0.mlp.up_proj.weight" if by_transformers else "blk.0.ffn_up.weight") in said


def test_a_tensor_that_the_model_has_no_place_for_is_refused_by_its_name(refused, make_gguf):
    import numpy as np

    said = refused(make_gguf(change=lambda tensors: tensors.update({"rope_freqs.weight": np.ones(8, "float32")})))
    assert "must hold its model's weights alone, got rope_freqs.weight as well" in said


def test_a_tensor_of_another_shape_is_refused_by_its_name(refused, make_gguf):
    def cut(tensors):
        tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"][:-1]

    assert "tensor blk.0.ffn_up.weight must have shape (96, 64), got (95, 64)" in refused(make_gguf(change=cut))


@pytest.mark.parametrize("by_transformers", [False, True])
@pytest.mark.parametrize(("kind", "value"), [("F32", "nan"), ("F32", "-inf"), ("F16", "inf"), ("F32", 3.4e38), ("Q8_0", "nan")])
def test_weights_that_are_not_finite_are_refused_by_name(refused, make_gguf, monkeypatch, by_transformers, kind, value):
    if by_transformers:
        monkeypatch.setattr(gguf, "_DIRECT", ())
    written = {}
    file = make_gguf("qwen2", lambda tensors: written.update(tensors), kind)
    if kind == "Q8_0":  # the scale of a block of 32 weights, 2 bytes before them
        from gguf import GGMLQuantizationType, quantize

        packed = quantize(written["blk.0.ffn_up.weight"], GGMLQuantizationType.Q8_0).tobytes()
        data = file.read_bytes()
        assert data.count(packed) == 1
        file.write_bytes(data.replace(packed, b"\x00\x7e" + packed[2:]))
    else:  # 3.4e38 is finite in fp32, and Inf in bf16
        file = make_gguf("qwen2", lambda tensors: tensors["blk.0.ffn_up.weight"].__setitem__((5, 7), float(value)), kind)
    name = "model.layers.0.mlp.up_proj.weight" if by_transformers else "blk.0.ffn_up.weight"
    assert refused(file).endswith(f"must have finite weights in bfloat16, got NaN or Inf in {name}")


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        *((architecture, "Q8_0") for architecture in ("llama", "qwen2", "qwen3", "gemma3")),
        *(("qwen2", kind) for kind in ("F32", "F16", "BF16", "Q5_0", "Q4_1")),
    ],
)
def test_weights_read_here_are_those_that_transformers_reads(make_gguf, tmp_path, monkeypatch, architecture, kind):
    file = make_gguf(architecture, kind=kind)
    assert architecture in gguf._DIRECT
    for place, direct in (("ours", gguf._DIRECT), ("theirs", ())):
        (tmp_path / place).mkdir()
        monkeypatch.setattr(gguf, "_DIRECT", direct)
        gguf.write_bf16(file, tmp_path / place)
    names = sorted(entry.name for entry in (tmp_path / "theirs").iterdir())
    assert sorted(entry.name for entry in (tmp_path / "ours").iterdir()) == names
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


def test_an_untied_head_is_read(make_gguf, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path / "cache"))
    file = make_gguf("qwen2", lambda tensors: tensors.update({"output.weight": tensors["token_embd.weight"][::-1].copy()}))
    stored = load_file(checkpoints.prepare(file, progress=False).path / "model.safetensors")
    assert stored["lm_head.weight"].equal(stored["model.embed_tokens.weight"].flip(0))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("no tokenizer in it"), r"transformers cannot convert .*a\.gguf: no tokenizer in it"),
        ("I/O error: No space left on device (os error 28)", "no space left in .*NPU_SPARSE_CACHE"),
    ],
)
def test_errors_of_the_conversion_are_told_apart(gguf_file, tmp_path, monkeypatch, error, message):
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    def from_pretrained(*arguments, **options):
        raise SafetensorError(error) if isinstance(error, str) else error

    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    shutil.copy(gguf_file[0], tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match=message):
        checkpoints.prepare(tmp_path / "a.gguf", progress=False)
