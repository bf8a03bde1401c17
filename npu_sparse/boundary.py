"""Reading files that others wrote: whatever goes wrong becomes one sentence that names the file.

A parser of untrusted bytes fails in unexpected ways: RecursionError for deep nesting, struct.error for a short header,
OverflowError for a length. Callers see one error class and the file that caused it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import full_device_error

JSON_BYTES = 64 << 20  # more than any config, index or record has; tokenizers are not read through here


@contextmanager
def reading(path, error: type[Exception] = ValueError, what: str = "") -> Iterator[None]:
    """Runs its body; any exception of it leaves as `error("PATH: WHAT cannot be read (reason)")`.

    An `error` passes through as it is, so that a check inside may choose its own words, and so does running out of a
    device's memory. MemoryError is the file's fault: a length in it was taken at its word.
    """
    try:
        yield
    except error:
        raise
    except BaseException as caught:
        if not is_the_files_fault(caught):
            raise
        raise error(f"{path}: {what + ' ' if what else ''}cannot be read ({reason(caught)})") from caught


def is_the_files_fault(error: BaseException) -> bool:
    """Whether an exception tells about what was read, and not about an interrupt or a device that is full.

    A panic of a library in Rust is no Exception in Python, and is one here. Every such library makes a class of its own for it,
    which cannot be imported: its name is all that these classes share.
    """
    panicked = type(error).__name__ == "PanicException"
    return panicked or isinstance(error, Exception) and not isinstance(error, full_device_error())


def reason(error: BaseException) -> str:
    """The first line of an error, at most 200 characters of it, or a name for an error without a message."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else f"{text[:200]}..."


def read_json(path, error: type[Exception] = ValueError, kind: type = dict) -> Any:
    """The JSON value of a UTF-8 file, a `kind` (dict, list, ...). Raises `error` with one sentence for anything else.

    NaN and infinities are refused, because they are not JSON; so are files of more than 64 MiB. A missing file stays a
    FileNotFoundError or NotADirectoryError: the caller knows what should have made it.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= JSON_BYTES else b""
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as caught:
        raise error(f"{path}: cannot be read ({reason(caught)})") from caught
    if size > JSON_BYTES:
        raise error(f"{path} must have at most {JSON_BYTES} bytes, got {size}")
    try:
        value = json.loads(data.decode(), parse_constant=_refuse)
    except Exception as caught:
        raise error(f"{path} is not JSON ({reason(caught)})") from caught
    if not isinstance(value, kind):
        raise error(f"{path} must hold a JSON {_NAMES.get(kind, kind.__name__)}, got {type(value).__name__}")
    return value


_NAMES = {dict: "object", list: "array", str: "string"}


def _refuse(constant: str):
    raise ValueError(f"{constant} is not JSON")
