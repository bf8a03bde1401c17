import errno
import json
import os
import resource
import signal

import pytest

from npu_sparse.runs.store import RunError, open_run, write_bytes, write_json, write_text

CONFIG = {"model": "tiny", "k": [512, 1024], "budget": {"sink": 4}, "seed": 0}


# Runs


def test_a_new_run_has_its_config_first(tmp_path):
    run = open_run(tmp_path / "deep" / "run", CONFIG)
    assert [entry.name for entry in run.iterdir()] == ["config.json"]
    assert json.loads((run / "config.json").read_text()) == CONFIG


def test_the_same_config_resumes_and_keeps_what_is_there(tmp_path):
    run = open_run(tmp_path, CONFIG)
    (run / "part-1.json").write_text("{}")
    before = (run / "config.json").stat().st_mtime_ns
    assert open_run(tmp_path, {**CONFIG, "k": (512, 1024)}) == run  # tuples are lists in JSON
    assert (run / "part-1.json").exists()
    assert (run / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": [512]}, r"holds another run \(k = \[512, 1024\] there, \[512\] now\): choose another directory"),
        ({"seed": 1}, r"\(seed = 0 there, 1 now\)"),
        ({"new": 3}, r"\(new = None there, 3 now\)"),
        ({"new": None}, "new"),
    ],
)
def test_another_config_is_refused_with_the_difference(tmp_path, change, message):
    open_run(tmp_path, CONFIG)
    with pytest.raises(RunError, match=message):
        open_run(tmp_path, {**CONFIG, **change})
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_a_directory_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="must be empty or hold an earlier run, found 'thesis.txt'"):
        open_run(tmp_path, CONFIG)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_not_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="output directory .*file must be writable"):
        open_run(tmp_path / "file", CONFIG)
    with pytest.raises(RunError, match="must be writable"):
        open_run(tmp_path / "file" / "below", CONFIG)


@pytest.mark.parametrize("content", ["", '{"model": "ti', "[]", "null", "3"])
def test_a_config_that_is_no_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match="config.json cannot be read|holds another run"):
        open_run(tmp_path, CONFIG)
    assert (tmp_path / "config.json").read_text() == content


def test_leftovers_of_a_run_that_died_at_once_are_no_run(tmp_path):
    (tmp_path / ".config.json.4242").write_text('{"half')
    open_run(tmp_path, CONFIG)


# Writing


def test_written_files_replace_the_old_ones(tmp_path):
    write_text(tmp_path / "a.md", "old and long")
    write_text(tmp_path / "a.md", "nüw")
    assert (tmp_path / "a.md").read_bytes() == "nüw".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.md"]


class Interrupted(BaseException):
    """What Ctrl-C is: no Exception."""


@pytest.mark.parametrize(
    "error, raised", [(OSError(errno.ENOSPC, "No space left on device"), RunError), (Interrupted(), Interrupted)]
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch, error, raised, call):
    write_text(tmp_path / "a.json", "old")

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(raised, match="No space left" if raised is RunError else None):
            write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_file_that_may_not_grow_is_a_run_error(tmp_path):
    """A real limit of the operating system, in a process of its own."""
    write_text(tmp_path / "a.json", "old")
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            write_bytes(tmp_path / "a.json", b"x" * 5000)
        except RunError as error:
            status = 0 if "a.json could not be written (File too large)" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "a.json").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_missing_directory_is_a_run_error(tmp_path):
    with pytest.raises(RunError, match="could not be written"):
        write_text(tmp_path / "nowhere" / "a.md", "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"deep": [float("-inf")]}])
def test_what_is_not_json_is_refused_and_nothing_is_written(tmp_path, value):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", value)
    assert not list(tmp_path.iterdir())
