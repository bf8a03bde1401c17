"""GGUF files become bf16 safetensors."""

import hashlib
import os
import shutil

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


def test_file_that_is_no_gguf_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(CheckpointError, match=r"transformers cannot convert .*broken\.gguf: ") as caught:
        checkpoints.prepare(file, progress=False)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("no tokenizer in it"), r"transformers cannot convert .*a\.gguf: no tokenizer in it"),
        ("I/O error: No space left on device (os error 28)", "no space left in .*NPU_SPARSE_CACHE"),
    ],
)
def test_errors_of_the_conversion_are_told_apart(tmp_path, monkeypatch, error, message):
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    def from_pretrained(*arguments, **options):
        raise SafetensorError(error) if isinstance(error, str) else error

    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    (tmp_path / "a.gguf").touch()
    with pytest.raises(CheckpointError, match=message):
        checkpoints.prepare(tmp_path / "a.gguf", progress=False)
