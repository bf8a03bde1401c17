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
