import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from npu_sparse.runs import store
from npu_sparse.runs.store import Cells, RunError, check_shard, open_run, write_bytes, write_json, write_text

CONFIG = {"model": "tiny", "k": [512, 1024], "budget": {"sink": 4}, "seed": 0}


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


START = """
import sys, time
from npu_sparse.runs import store
from npu_sparse.runs.store import Cells, RunError, check_shard, open_run, write_bytes, write_json, write_text
directory, value, at = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
while time.time() < at:
    pass
try:
    open_run(directory, {"stage": "eval", "k": value})
    print("got it")
except RunError as error:
    print(error)
"""


def test_of_different_configs_that_open_one_new_directory_at_once_one_gets_it(tmp_path):
    """Several processes in step, several times over: with a look before the write almost every start was granted twice."""
    for attempt in range(4):
        directory, at = tmp_path / f"run-{attempt}", time.time() + 2.0
        starts = [
            subprocess.Popen([sys.executable, "-c", START, str(directory), str(k), str(at)], stdout=subprocess.PIPE, text=True)
            for k in (256, 512, 1024, 2048)
        ]
        said = [start.communicate(timeout=60)[0].strip() for start in starts]
        assert said.count("got it") == 1, said
        assert all("holds another run (k = " in line for line in said if line != "got it")
        assert json.loads((directory / "config.json").read_text())["k"] == (256, 512, 1024, 2048)[said.index("got it")]
        assert [entry.name for entry in directory.iterdir()] == ["config.json"]


def test_a_config_that_appears_after_the_look_is_not_overwritten(tmp_path, monkeypatch):
    """The other process wins between this one's look at the directory and its claim."""
    link = os.link

    def late(source, target, **options):
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "seed": 7}))
        return link(source, target, **options)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(RunError, match=r"\(seed = 7 there, 0 now\)"):
        open_run(tmp_path, CONFIG)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 7


@pytest.mark.parametrize("taken", [False, True])
def test_a_file_system_without_links_is_claimed_all_the_same(tmp_path, monkeypatch, taken):
    def refused(*_, **__):
        if taken:
            (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "seed": 7}))
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    if taken:
        with pytest.raises(RunError, match="seed = 7 there"):
            open_run(tmp_path, CONFIG)
    else:
        open_run(tmp_path, CONFIG)
        assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_a_directory_of_an_earlier_version_is_resumed_through_its_upgrade(tmp_path):
    open_run(tmp_path, {"stage": "eval", "k": 512})
    now = {"stage": "eval", "budget": "k=512"}
    assert open_run(tmp_path, now, upgrade=lambda stored: {"stage": "eval", "budget": f"k={stored['k']}"}) == tmp_path
    with pytest.raises(RunError, match="holds another run"):
        open_run(tmp_path, {**now, "budget": "k=256"}, upgrade=lambda stored: {"stage": "eval", "budget": f"k={stored['k']}"})
    with pytest.raises(RunError, match="holds another run"):
        open_run(tmp_path, now, upgrade=lambda stored: stored["absent"])


# Temporary files


def test_a_link_at_the_former_temporary_name_is_not_written_through(tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    for name in (f".report.json.{os.getpid()}", ".report.json.tmp", "report.json"):
        (run / name).symlink_to(victim)
    write_json(run / "report.json", {"a": 1})
    assert victim.read_text() == "precious"
    assert not (run / "report.json").is_symlink() and json.loads((run / "report.json").read_text()) == {"a": 1}


def test_temporary_names_cannot_be_guessed_and_are_never_reused(tmp_path, monkeypatch):
    seen, fsync = [], os.fsync

    def look(descriptor):
        seen.extend(entry.name for entry in tmp_path.iterdir() if entry.name.endswith(".tmp"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    for _ in range(3):
        write_text(tmp_path / "a.md", "x")
    assert len(set(seen)) == 3 and all(store.TEMPORARY.fullmatch(name) for name in seen)


KILLED = """
import os, signal, sys
from npu_sparse.runs import store
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
store.write_text(sys.argv[1] + "/records/a.json", "half")
"""


def test_what_a_killed_writer_left_is_swept_when_the_run_goes_on(tmp_path):
    open_run(tmp_path, CONFIG)
    (tmp_path / "records").mkdir()
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert [entry.name for entry in (tmp_path / "records").iterdir() if store.TEMPORARY.fullmatch(entry.name)]
    open_run(tmp_path, CONFIG)
    assert not list((tmp_path / "records").iterdir())


def test_the_temporary_file_of_a_living_writer_is_not_swept(tmp_path, monkeypatch):
    fsync = os.fsync

    def swept(descriptor):
        store.sweep(tmp_path)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", swept)
    write_text(tmp_path / "a.md", "whole")
    assert (tmp_path / "a.md").read_text() == "whole"


CELLS = {"vt-k8": {"task": "vt", "budget": {"k": 8}}, "vt-k16": {"task": "vt", "budget": {"k": 16}}, "cwe-k8": {"task": "cwe"}}
CELL_FORM = {"score": float, "machine": {"commit": str}, "samples": [{"output": (str, None)}], "evidence": {"oracle", "dense"}}
RECORD = {"score": 1, "machine": {"commit": "abc"}, "samples": [{"output": "x"}, {"output": None}], "evidence": "oracle"}


@pytest.fixture
def cells(tmp_path):
    return Cells(tmp_path / "records", CELLS, CELL_FORM)


def test_shards_measure_every_cell_once_and_a_finished_cell_is_not_measured_again(cells):
    measured = []

    def measure(name):
        measured.append(name)
        return RECORD

    cells.compute(measure, (1, 2))
    assert measured == ["vt-k16"] and cells.missing() == ["vt-k8", "cwe-k8"]
    cells.compute(measure, (0, 2))
    cells.compute(measure)
    assert measured == ["vt-k16", "vt-k8", "cwe-k8"] and cells.missing() == []
    assert cells.records()["cwe-k8"] == {**RECORD, "task": "cwe"}


def test_a_record_of_another_cell_is_refused(cells):
    cells.write("vt-k8", RECORD)
    os.rename(cells.path("vt-k8"), cells.path("vt-k16"))
    with pytest.raises(RunError, match=r"vt-k16.json must be the record of budget .*16.*, got .*8.*: delete it to make it again"):
        cells.read("vt-k16")


def test_a_record_of_an_earlier_version_is_read_through_its_upgrade(cells, tmp_path):
    old = Cells(cells.directory, {"vt-k8": {"task": "vt"}}, CELL_FORM)
    old.write("vt-k8", RECORD)
    with pytest.raises(RunError, match=r"vt-k8.json must be the record of budget \{'k': 8\}, got None"):
        cells.read("vt-k8")
    upgraded = Cells(cells.directory, CELLS, CELL_FORM, upgrade=lambda name, record: {"budget": {"k": 8}, **record})
    assert upgraded.read("vt-k8")["budget"] == {"k": 8}


@pytest.mark.parametrize(
    "content, reason",
    [
        ("", "Expecting value"),
        ('{"score": 1', "Expecting"),
        ("[" * 100_000, "it is nested too deeply"),
        ("[" * 60 + "]" * 60, "it is nested too deeply"),
        ("\xff\xfe", "codec can't decode|Expecting value"),
        ("[]", "it must be an object, got \\[\\]"),
        ("{}", "it must have 'score', got none"),
        (json.dumps({**RECORD, "score": "1"}), "it.score must be a number, got '1'"),
        (json.dumps({**RECORD, "score": True}), "it.score must be a number, got True"),
        (json.dumps({**RECORD, "score": float("nan")}), "it must hold finite numbers, got 'NaN'"),
        (json.dumps({**RECORD, "score": 1e308 * 10}), "it must hold finite numbers, got 'Infinity'"),
        ('{"score": 1e999}', "it must hold finite numbers, got '1e999'"),
        ('{"score": 1' + "0" * 5000 + "}", "Exceeds the limit|must be finite|must have"),
        (json.dumps({**RECORD, "machine": {}}), "it.machine must have 'commit', got none"),
        (json.dumps({**RECORD, "samples": [{"output": 3}]}), r"it.samples\[0\].output must be a text, got 3"),
        (json.dumps({**RECORD, "samples": {}}), "it.samples must be a list, got {}"),
        (json.dumps({**RECORD, "evidence": "rumour"}), "it.evidence must be one of dense, oracle, got 'rumour'"),
        (json.dumps({**RECORD, "extra": ["\ud800"]}), "it must hold Unicode text, got a lone surrogate"),
        (json.dumps({**RECORD, "\udfff": 1}), "it must hold Unicode text, got a lone surrogate"),
        (json.dumps({**RECORD, "evidence": []}), r"it.evidence must be one of dense, oracle, got \[\]"),
    ],
)
def test_a_damaged_record_is_one_sentence_with_its_name(cells, content, reason):
    cells.directory.mkdir()
    cells.path("vt-k8").write_text(content, encoding="latin-1")
    with pytest.raises(RunError, match=rf"vt-k8.json cannot be read \((?:{reason}).*\): delete it to make it again") as caught:
        cells.read("vt-k8")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 60 + "1" + "}" * 60])
def test_a_config_nested_too_deeply_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"config.json cannot be read \(it is nested too deeply\)"):
        open_run(tmp_path, CONFIG)


@pytest.mark.parametrize("shard", [(1, 1), (-1, 2), (2, 2)])
def test_a_shard_that_is_none_is_refused(shard):
    with pytest.raises(ValueError, match=r"shard must be \(i, n\) with 0 <= i < n"):
        check_shard(shard)
