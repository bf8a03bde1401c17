"""Whatever a file of somebody else's holds, its reader raises one error class with one sentence and the file's name."""

import json
import struct

import pytest
import torch

from npu_sparse.boundary import JSON_BYTES, read_json, reading


class FileError(ValueError):
    pass


class PanicException(BaseException):
    """What a panic in a library of Rust is called; it is no Exception."""


@pytest.mark.parametrize(
    "raised, said",
    [
        (struct.error("unpack requires a buffer of 8 bytes"), "unpack requires a buffer of 8 bytes"),
        (RecursionError("maximum recursion depth exceeded"), "it is nested too deeply"),
        (KeyError("weight_map"), "'weight_map'"),
        (MemoryError(), "MemoryError"),
        (PanicException("index out of bounds"), "index out of bounds"),
        (OverflowError("Python int too large\nto convert"), "Python int too large"),
        (OSError(5, "Input/output error", "a/b"), "Input/output error"),
        (AttributeError("x" * 900), "x" * 200 + "..."),
    ],
)
def test_any_exception_becomes_a_sentence_with_the_files_name(raised, said):
    with pytest.raises(FileError) as caught, reading("a/b.json", FileError, "its header"):
        raise raised
    assert str(caught.value) == f"a/b.json: its header cannot be read ({said})"
    assert caught.value.__cause__ is raised


@pytest.mark.parametrize("raised", [FileError("own words"), torch.OutOfMemoryError("out"), KeyboardInterrupt()])
def test_what_is_not_the_files_fault_passes_through(raised):
    with pytest.raises(type(raised)) as caught, reading("a", FileError):
        raise raised
    assert caught.value is raised


def test_an_error_that_is_merely_called_out_of_memory_is_the_files_fault():
    named = type("OutOfMemoryError", (ValueError,), {})
    with pytest.raises(FileError, match="cannot be read"), reading("a", FileError):
        raise named("a length in it")


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "config.json is not JSON (Expecting value: line 1 column 1 (char 0))"),
        (b"{", "config.json is not JSON (Expecting property name"),
        (b"[" * 100_000, "config.json is not JSON (it is nested too deeply)"),
        (b'{"a":' * 100_000, "config.json is not JSON (it is nested too deeply)"),
        (b"\xff\xfe{}", "config.json is not JSON ('utf-8' codec"),
        (b'{"a": NaN}', "config.json is not JSON (NaN is not JSON)"),
        (b'{"a": -Infinity}', "config.json is not JSON (-Infinity is not JSON)"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "config.json is not JSON (Exceeds the limit"),
        (b"[]", "must hold a JSON object, got list"),
        (b"3", "must hold a JSON object, got int"),
        (b"null", "must hold a JSON object, got NoneType"),
    ],
)
def test_json_that_is_none_is_refused_with_the_files_name(tmp_path, content, said):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(FileError) as caught:
        read_json(file, FileError)
    assert said in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_json_file_of_a_size_that_no_config_has_is_not_read(tmp_path):
    file = tmp_path / "huge.json"
    with open(file, "wb") as handle:
        handle.truncate(JSON_BYTES + 1)
    with pytest.raises(FileError, match=f"huge.json must have at most {JSON_BYTES} bytes, got {JSON_BYTES + 1}"):
        read_json(file, FileError)


def test_json_is_read_and_a_missing_file_stays_missing(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([1, {"ä": None}]))
    assert read_json(file, FileError, list) == [1, {"ä": None}]
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json", FileError)
    with pytest.raises(NotADirectoryError):
        read_json(file / "b.json", FileError)
    with pytest.raises(FileError, match="cannot be read"):
        read_json(tmp_path, FileError)
