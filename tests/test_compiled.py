"""Compiled code is loaded where this user wrote all of it, and made again everywhere else."""

import os

import pytest

from npu_sparse import compiled


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "cache" / "cuda" / "kernel.cubin"
    compiled.write(path, b"compiled")
    return path


def test_what_was_written_is_read_and_is_this_users_alone(file):
    assert compiled.read(file) == b"compiled" and compiled.misfit(file) is None
    assert sorted(entry.name for entry in file.parent.iterdir()) == ["kernel.cubin", "kernel.cubin.sha256"]
    assert not any(entry.stat().st_mode & 0o022 for entry in (file.parent, *file.parent.iterdir()))
    compiled.write(file, b"another")
    assert compiled.read(file) == b"another"


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda file: file.write_bytes(b""), "is empty"),
        (lambda file: file.write_bytes(b"compile"), "is truncated or changed (its sha256 differs)"),
        (lambda file: file.chmod(0o664), "may be written by others (mode 664)"),
        (lambda file: file.with_name("kernel.cubin.sha256").unlink(), "has no digest beside it: it was not finished"),
        (lambda file: file.with_name("kernel.cubin.sha256").write_text(""), "is truncated or changed (its sha256 differs)"),
        (lambda file: file.unlink(), "No such file or directory"),
    ],
)
def test_a_file_that_does_not_fit_is_not_read_and_is_written_again(file, damage, why):
    damage(file)
    assert compiled.read(file) is None and compiled.misfit(file) == why
    compiled.write(file, b"compiled")
    assert compiled.read(file) == b"compiled"


def test_a_link_to_another_file_is_not_followed(file, tmp_path):
    (tmp_path / "planted").write_bytes(b"compiled")
    file.unlink()
    file.symlink_to(tmp_path / "planted")
    assert compiled.read(file) is None
    compiled.write(file, b"compiled")
    assert not file.is_symlink() and compiled.read(file) == b"compiled"


def test_a_file_of_another_user_is_not_read(file, monkeypatch):
    if os.geteuid() == 0:
        os.chown(file, 12345, -1)
    else:
        owner = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert compiled.read(file) is None and "belongs to user" in compiled.misfit(file)


def test_a_directory_of_another_user_or_of_everybody_is_not_used(file, monkeypatch):
    file.parent.parent.chmod(0o777)
    assert compiled.read(file) is None
    with pytest.raises(OSError, match="cache must not be writable by everybody"):
        compiled.write(file, b"compiled")
    file.parent.parent.chmod(0o755)
    assert compiled.read(file) == b"compiled"
    if os.geteuid() == 0:
        os.chown(file.parent, 12345, -1)
        assert compiled.read(file) is None
        with pytest.raises(OSError, match="must belong to this user or to root, and belongs to user 12345"):
            compiled.write(file, b"compiled")


def test_the_digest_is_written_last_and_after_the_file_is_on_the_disk(file, monkeypatch):
    done = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append("fsync " + os.readlink(f"/proc/self/fd/{fd}")) or real_fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(f"replace {b}") or real_replace(a, b))
    compiled.write(file, b"new")
    kinds = [step.split()[0] for step in done]
    replaced = [step for step in done if step.startswith("replace")]
    assert replaced == [f"replace {file}", f"replace {file}.sha256"]
    assert kinds[0] == "fsync" and done.index(f"fsync {file.parent}") > done.index(replaced[0])
    assert kinds.index("replace") > 0 and kinds[done.index(replaced[1]) - 1] == "fsync"


@pytest.mark.parametrize("step", [0, 1])
def test_a_process_killed_between_any_two_steps_leaves_nothing_that_loads_by_mistake(file, step):
    child = os.fork()
    if not child:
        real, count = os.replace, [0]

        def replace(source, target):
            if count[0] == step:
                os._exit(9)
            count[0] += 1
            real(source, target)

        os.replace = replace
        try:
            compiled.write(file, b"half of another")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert compiled.read(file) is None
