"""The cubin cache and where NVRTC is looked for; no compiler and no card is needed."""

import pytest

from npu_sparse.ops import nvrtc
from npu_sparse.ops.dispatch import KernelUnavailableError


def test_no_library_of_the_users_directory_is_loaded(tmp_path, monkeypatch):
    planted = tmp_path / "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"
    planted.parent.mkdir(parents=True)
    planted.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nvrtc.sys, "path", ["", "."])
    tried = []

    def load(path):
        tried.append(path)
        raise OSError("no such library")

    monkeypatch.setattr(nvrtc.ctypes, "CDLL", load)
    with pytest.raises(KernelUnavailableError, match="need NVRTC"):
        nvrtc._nvrtc.__wrapped__()
    assert tried == ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]


def test_a_cubin_that_does_not_fit_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path))
    monkeypatch.setattr(nvrtc, "_nvrtc", lambda: None)
    monkeypatch.setattr(nvrtc, "_version", lambda library: (13, 0))
    made = []
    monkeypatch.setattr(nvrtc, "compile_source", lambda *arguments: (made.append(arguments) or b"cubin", ""))
    source = next(path.relative_to(nvrtc._FOLDER).as_posix() for path in nvrtc._FOLDER.glob("*/hopper.cu"))
    assert [nvrtc.compiled(source, {}, "sm_90a") for _ in range(2)] == [b"cubin"] * 2 and len(made) == 1
    (kept,) = (tmp_path / "cuda").glob("*.cubin")
    for damage in (lambda: kept.write_bytes(b""), lambda: kept.write_bytes(b"cubim"), lambda: kept.chmod(0o666)):
        damage()
        before = len(made)
        assert nvrtc.compiled(source, {}, "sm_90a") == b"cubin" and len(made) == before + 1
    tmp_path.chmod(0o777)  # nothing is read there, and nothing is kept
    before = len(made)
    assert [nvrtc.compiled(source, {}, "sm_90a") for _ in range(2)] == [b"cubin"] * 2 and len(made) == before + 2
