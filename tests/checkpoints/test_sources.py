"""What a name means, before anything is fetched."""

import pytest

from npu_sparse import checkpoints
from npu_sparse.checkpoints import CheckpointError


def test_names_resolve_to_their_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "a.gguf").touch()
    kinds = {
        "smollm2-135m": "demo",
        str(tmp_path / "model"): "directory",
        str(tmp_path / "a.gguf"): "gguf",
        "Qwen/Qwen3.5-0.8B": "hub",
        "gpt2": "hub",
    }
    assert {name: checkpoints.resolve(name).kind for name in kinds} == kinds
    assert checkpoints.resolve(tmp_path / "a.gguf").gguf_file == "a.gguf"
    assert checkpoints.resolve("smollm2-135m").path == tmp_path / "cache" / "checkpoints" / "smollm2-135m"
    assert checkpoints.resolve("smollm2-135m").license == "Apache-2.0"
    assert checkpoints.resolve("gemma3-270m").license.startswith("Gemma Terms of Use")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/directory", "missing.gguf", "a/b/c", "", "~/nowhere/x"])
def test_path_that_is_not_there_is_not_taken_for_a_hub_id(name):
    with pytest.raises(CheckpointError, match="give a directory, a GGUF file, a hub id, or one of smollm2-135m"):
        checkpoints.resolve(name)


def test_directory_without_config_points_at_its_gguf_file(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"config\.json, and has none: name the file, .*model\.gguf"):
        checkpoints.resolve(tmp_path)


def test_directory_called_like_a_demo_needs_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "config.json").touch()
    assert checkpoints.resolve("smollm2-135m").kind == "demo"
    assert checkpoints.resolve("./smollm2-135m").kind == "directory"
