"""Run directories: config.json first, named cells, everything written atomically; resumed by the same config, refused by another.

A run is a list of cells. A cell with a record is finished and never computed again; several processes may share a directory and
divide its cells. A record must be complete and belong to its cell: whatever is wrong with a file is one RunError that names it.
"""

import errno
import fcntl
import json
import math
import os
import re
import secrets
import types
import typing
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import FAILURE, USER_ERROR, ActionableError

DEEPEST = 50  # the most lists and objects within each other
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


class RunError(ActionableError, ValueError):
    """An output directory that cannot be used: unwritable, damaged, or already holding something else."""

    @property
    def exit_status(self) -> int:
        """That of a failure where the system refused, of a mistake where the directory is the wrong one."""
        return FAILURE if isinstance(self.__cause__, OSError) else USER_ERROR


def open_run(directory, config: Mapping, *, upgrade: Callable[[dict], dict] | None = None) -> Path:
    """The directory of a run, with `config` in config.json.

    A new or empty directory is made and claimed: of several processes that open it at once with different configs one gets it. A
    directory of the same config is resumed, and what a killed process left half-written is swept. Anything else is refused with
    RunError: nothing is ever mixed or overwritten.

    Args:
        upgrade: turns the config of an earlier version into one of this version; an exception means that it is another run's.
    """
    directory = Path(directory)
    config = json.loads(json.dumps(config))
    path = directory / "config.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        entries = [entry.name for entry in directory.iterdir() if not entry.name.startswith(".")]
        if path.name not in entries and not path.exists():
            if entries:
                raise RunError(f"output directory {directory} must be empty or hold an earlier run, found {sorted(entries)[0]!r}")
            if claim(path, _encoded(config)):
                return directory
    except OSError as error:
        raise RunError(f"output directory {directory} must be writable ({error.strerror})") from error
    stored = _config(directory)
    if upgrade is not None and stored != config:
        try:
            stored = json.loads(json.dumps(upgrade(stored)))
        except Exception:  # whatever an unknown config raises: the comparison below says what differs
            pass
    if stored != config:
        keys = [key for key in {**stored, **config} if stored.get(key, ...) != config.get(key, ...)]
        change = ", ".join(f"{key} = {shown(stored.get(key))} there, {shown(config.get(key))} now" for key in sorted(keys)[:3])
        raise RunError(f"output directory {directory} holds another run ({change}): choose another directory")
    for folder in (directory, *(entry for entry in directory.iterdir() if entry.is_dir() and not entry.is_symlink())):
        sweep(folder)
    return directory


def open_stage(directory, stage: str, config, **beside) -> Path:
    """`open_run` of a stage's config, an object with `to_dict` and `from_dict`; a field that came later has its default there."""

    def upgrade(stored: dict) -> dict:
        own = {key: value for key, value in stored.items() if key not in ("stage", *beside)}
        return {"stage": stored["stage"], **{key: stored[key] for key in beside}, **type(config).from_dict(own).to_dict()}

    return open_run(directory, {"stage": stage, **beside, **config.to_dict()}, upgrade=upgrade)


def read_stage(directory, stage: str, config_class):
    """The config of a run of this stage, made by `config_class.from_dict`. RunError where config.json is none."""
    directory = Path(directory)
    stored = _config(directory)
    if (own := stored.pop("stage", None)) != stage:
        raise RunError(f"{directory} must be the directory of a run of {stage}, got a config.json of stage {shown(own)}")
    try:
        for name, hint in typing.get_type_hints(config_class).items():
            if name in stored:
                check(stored[name], _form(hint), name)
        return config_class.from_dict(stored)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{directory / 'config.json'} cannot be read ({error})") from error


def _form(hint):
    """The form of a config's field, as `check` takes it."""
    of = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return [_form(of[0])]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(None if one is type(None) else _form(one) for one in of)
    return hint if hint in _KINDS else None


def _config(directory: Path) -> dict:
    try:
        stored = _decoded((directory / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"output directory {directory}: config.json cannot be read ({_reason(error)})") from error
    if not isinstance(stored, dict):
        raise RunError(f"output directory {directory}: config.json cannot be read (it holds no object)")
    return stored


@dataclass(frozen=True)
class Cells:
    """The cells of a run, one JSON record each in `directory`.

    Attributes:
        identities: `{name: fields}` in the order of computation; a record holds these fields, with these values.
        form: what else a record holds, as `check` takes it, or a function from a cell's name to that.
        upgrade: makes the record of a cell by an earlier version, `upgrade(name, record)`, one of this version.
    """

    directory: Path
    identities: Mapping[str, Mapping]
    form: object = None
    upgrade: Callable[[str, dict], dict] | None = None

    def path(self, name: str) -> Path:
        """Where the record of a cell is, or will be."""
        return self.directory / f"{name}.json"

    def done(self, name: str) -> bool:
        """Whether a cell is finished."""
        return self.path(name).exists()

    def missing(self) -> list[str]:
        """The cells that are not finished."""
        return [name for name in self.identities if not self.done(name)]

    def read(self, name: str) -> dict:
        """The record of a finished cell. RunError where it is damaged or belongs to another cell."""
        path = self.path(name)
        record = read_json(path, dict)
        try:
            record = record if self.upgrade is None else self.upgrade(name, record)
            check(record, self.form(name) if callable(self.form) and not isinstance(self.form, type) else self.form)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunError(f"{path} cannot be read ({error}): delete it to make it again") from error
        for field, expected in json.loads(json.dumps(self.identities[name])).items():
            if field not in record or record[field] != expected:
                raise RunError(
                    f"{path} must be the record of {field} {shown(expected)}, got {shown(record.get(field))}: "
                    "delete it to make it again"
                )
        return record

    def records(self) -> dict[str, dict]:
        """The records of all finished cells, by name."""
        return {name: self.read(name) for name in self.identities if self.done(name)}

    def write(self, name: str, record: Mapping) -> None:
        """Finishes a cell: its record with the fields of its identity."""
        self.directory.mkdir(exist_ok=True)
        write_json(self.path(name), {**record, **self.identities[name]})

    def compute(self, measure: Callable[[str], Mapping], shard: tuple[int, int] = (0, 1)) -> None:
        """Measures the unfinished cells i, i + n, i + 2n, ... of shard `(i, n)`, each finished before the next begins."""
        for name in list(self.identities)[shard[0] :: shard[1]]:
            if not self.done(name):
                self.write(name, measure(name))


def check_shard(shard: tuple[int, int]) -> None:
    """Raises ValueError unless `shard` is `(i, n)` with 0 <= i < n."""
    part, parts = shard
    if not 0 <= part < parts:
        raise ValueError(f"shard must be (i, n) with 0 <= i < n, got {shard}")


def read_json(path, form=None):
    """The value of a JSON file in the form that `check` describes. RunError with the file's name where there is none."""
    try:
        value = _decoded(Path(path).read_bytes())
        check(value, form)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({_reason(error)}): delete it to make it again") from error
    return value


def check(value, form, name: str = "it") -> None:
    """Raises ValueError, with the place, unless a JSON value has a form.

    Forms: None = anything; a type (float takes whole numbers too, and numbers are finite); `[form]` = a list, `[form, n]` = one
    of n; `{"key": form}` = an object with these keys at least, and `str: form` in it says what all others hold; a tuple = one of
    these forms, None in it being null; a set = one of these texts.
    """
    if form is None:
        return
    if isinstance(form, tuple):
        problems = []
        for one in form:
            if one is None and value is None:
                return
            if one is not None:
                try:
                    return check(value, one, name)
                except ValueError as error:
                    problems.append(error)
        raise problems[-1]
    if isinstance(form, (set, frozenset)):
        if not isinstance(value, str) or value not in form:
            raise ValueError(f"{name} must be one of {', '.join(sorted(form))}, got {shown(value)}")
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list, got {shown(value)}")
        if len(form) == 2 and len(value) != form[1]:
            raise ValueError(f"{name} must have {form[1]} entries, got {len(value)}")
        for n, item in enumerate(value):
            check(item, form[0], f"{name}[{n}]")
    elif isinstance(form, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object, got {shown(value)}")
        for key, part in form.items():
            if key is str:
                for own in value.keys() - form.keys():
                    check(value[own], part, f"{name}.{own}")
            elif key not in value:
                raise ValueError(f"{name} must have {key!r}, got none")
            else:
                check(value[key], part, f"{name}.{key}")
    else:
        allowed = (int, float) if form is float else form
        if not isinstance(value, allowed) or (isinstance(value, bool) and form is not bool):
            raise ValueError(f"{name} must be {_KINDS[form]}, got {shown(value)}")
        if isinstance(value, (int, float)) and not (abs(value) < 1e300 and math.isfinite(value)):
            raise ValueError(f"{name} must be finite, got {shown(value)}")


_KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object", list: "a list"}


def shown(value, most: int = 200) -> str:
    """A value for a sentence, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"it must hold finite numbers, got {shown(text, 20)}")
    return value


def _decoded(data: bytes):
    try:
        value = json.loads(data, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [value]
    for _ in range(DEEPEST):
        level = [
            item for one in level if isinstance(one, (dict, list)) for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:  # half of a pair, which no report could be written with
                raise ValueError("it must hold Unicode text, got a lone surrogate") from error
            return value
    raise ValueError("it is nested too deeply")


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def replace_files(files: Mapping[Path, bytes]) -> None:
    """Writes files so that a reader sees the old content or all of the new: none is replaced before all are on the disk.

    OSError passes through; the old files are whole then, and nothing else is left behind. What killed processes left in these
    directories is swept.
    """
    for folder in {Path(path).parent for path in files}:
        sweep(folder)
    with ExitStack() as stack:
        written = {path: stack.enter_context(_temporary(Path(path), data)) for path, data in files.items()}
        for path, temporary in written.items():
            os.replace(temporary, path)


def claim(path: Path, data: bytes) -> bool:
    """Whether this call made the file, whole; False where it is there already. OSError passes through."""
    with _temporary(path, data) as temporary:
        try:
            os.link(temporary, path, follow_symlinks=False)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            try:  # a file system without links: a reader may meet the file half-written, and refuses it then
                made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                return False
            with open(made, "wb") as file:
                file.write(data)
        return True


def sweep(directory: Path) -> None:
    """Removes the temporary files of processes that were killed; those of living ones are locked and stay."""
    try:
        names = [name for name in os.listdir(directory) if TEMPORARY.fullmatch(name)]
    except OSError:
        return
    for name in names:
        path = Path(directory) / name
        try:
            opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except OSError:
            pass
        finally:
            os.close(opened)


@contextmanager
def _temporary(path: Path, data: bytes):
    """A file beside `path` that holds `data` on the disk: of a name nobody can guess, new, locked while it is there."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        opened = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            with open(opened, "wb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    swept = not temporary.exists()  # by another process, between the two calls
                except OSError:  # a file system without locks, where nothing is swept either
                    swept = False
                if swept:
                    continue
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                yield temporary
                return
        finally:
            temporary.unlink(missing_ok=True)


def write_bytes(path, data: bytes) -> None:
    """`replace_files` of one file. Raises RunError where that fails."""
    try:
        replace_files({Path(path): data})
    except OSError as error:
        raise RunError(f"{path} could not be written ({error.strerror})") from error


def write_text(path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path, value) -> None:
    """`write_bytes` of indented JSON; NaN and infinities are refused, they are not JSON."""
    write_bytes(path, _encoded(value))


def _encoded(value) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
