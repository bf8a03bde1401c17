"""The header of a GGUF file (version 2 or 3, little-endian): metadata and the table of tensors, with every length checked.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. transformers' own reader trusts the header, and needs ten seconds for a
vocabulary of 150,000 tokens; a conversion would read it three or four times.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..boundary import reading
from .cache import CheckpointError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
VOCABULARY = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS


@dataclass(frozen=True)
class Tensor:
    """One row of the table; `shape` is in torch's order, `start` counts from the beginning of the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself. `metadata` holds the length of an array of strings instead of the strings."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    entries: tuple[tuple[str, bytes], ...]  # (key, the entry as stored) of the metadata, without the vocabulary
    table: bytes  # the table of tensors as stored
    data_start: int
    version: int

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]


def read_header(path: Path) -> Header:
    """The header of a GGUF file. Raises CheckpointError with one sentence for a file of another kind, cut off or damaged."""
    with reading(path, CheckpointError, "its GGUF header"), open(path, "rb") as file:
        start = file.read(len(LFS_POINTER))
        if not start:
            raise CheckpointError(f"{path} must be a GGUF file, and is empty")
        if start == LFS_POINTER:
            raise CheckpointError(f"{path} must be a GGUF file, got the pointer that git-LFS leaves in its place: "
                                  "run `git lfs pull`")  # fmt: skip
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parsed(path, _Cursor(path, data))


class _Cursor:
    """A place in the file; nothing is read past its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at, self.size = path, data, 0, len(data)

    def need(self, count: int, each: int = 1) -> None:
        if count > (self.size - self.at) // each:
            raise CheckpointError(
                f"{self.path} is cut off or damaged: its header wants {count * each} bytes at {self.at} of {self.size}"
            )

    def numbers(self, form: str, count: int = 1) -> tuple:
        width = struct.calcsize(form)
        self.need(count, width)
        values = struct.unpack_from(f"<{count}{form}", self.data, self.at)
        self.at += count * width
        return values

    def number(self, form: str) -> Any:
        return self.numbers(form)[0]

    def raw(self) -> bytes:
        length = self.number("Q")
        self.need(length)
        self.at += length
        return self.data[self.at - length : self.at]

    def string(self) -> str:
        return self.raw().decode()

    def skip_strings(self, count: int) -> None:
        self.need(count, 8)
        data, at, size, length = self.data, self.at, self.size, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > size:
                break
            at += 8 + length(data, at)[0]
        self.at, at = min(at, size), at
        self.need(at - self.at)

    def value(self) -> Any:
        kind = self.number("I")
        if kind in _FORMATS:
            return self.number(_FORMATS[kind])
        if kind == _STRING:
            return self.raw().decode(errors="replace")
        if kind != _ARRAY:
            raise CheckpointError(f"{self.path} is damaged: its header has a value of type {kind}, which GGUF has not")
        kind, count = self.number("I"), self.number("Q")
        if kind in _FORMATS:
            return list(self.numbers(_FORMATS[kind], count))
        if kind != _STRING:
            raise CheckpointError(f"{self.path} is damaged: its header has an array of type {kind}")
        self.skip_strings(count)
        return count


def _parsed(path: Path, cursor: _Cursor) -> Header:
    magic = bytes(cursor.numbers("B", min(4, cursor.size)))
    if magic != b"GGUF":
        raise CheckpointError(f"{path} must be a GGUF file, and begins with {magic!r}")
    version, tensor_count, entry_count = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in _VERSIONS:
        raise CheckpointError(f"{path} must be GGUF version 2 or 3, got {version}")
    cursor.need(entry_count, 13)
    metadata, entries = {}, []
    for _ in range(entry_count):
        start = cursor.at
        key = cursor.string()
        metadata[key] = cursor.value()
        if key not in VOCABULARY:
            entries.append((key, cursor.data[start : cursor.at]))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise CheckpointError(f"{path} is damaged: general.alignment must be in [1, 2**20], got {alignment!r}")
    if not isinstance(metadata.get("general.architecture"), str):
        raise CheckpointError(f"{path} is damaged: its header must name general.architecture")
    start = cursor.at
    cursor.need(tensor_count, 24)
    rows = list(_rows(cursor, tensor_count))
    table = cursor.data[start : cursor.at]
    data_start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in rows:
        if name in tensors:
            raise CheckpointError(f"{path} is damaged: it names the tensor {name} twice")
        length = _bytes(path, name, shape, kind)
        if data_start + offset + length > cursor.size:
            raise CheckpointError(
                f"{path} is cut off: tensor {name} ends at byte {data_start + offset + length}, the file at {cursor.size}"
            )
        tensors[name] = Tensor(name, shape, kind, data_start + offset, length)
    return Header(path, metadata, tensors, tuple(entries), table, data_start, version)


def _rows(cursor: _Cursor, count: int) -> Iterator[tuple]:
    for _ in range(count):
        name, dimensions = cursor.string(), cursor.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise CheckpointError(f"{cursor.path} is damaged: tensor {name} has {dimensions} dimensions")
        shape = tuple(reversed(cursor.numbers("Q", dimensions)))  # stored fastest-moving first
        yield name, shape, cursor.number("I"), cursor.number("Q")


def _bytes(path: Path, name: str, shape: tuple[int, ...], kind: int) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        elements, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: tensor {name} has type {kind}, which this gguf package does not know") from error
    row = shape[-1] if shape else 1
    if row % elements:
        raise CheckpointError(f"{path} is damaged: rows of tensor {name} must be a multiple of {elements} long, got {row}")
    return prod(shape) // elements * width


def write_without_vocabulary(header: Header, path: Path) -> None:
    """A GGUF file of the same metadata and tensors, without vocabulary and with holes for the data, to read a config from.

    The size of the vocabulary, which a config needs, is put in where the file has it only as a list.
    """
    entries = [entry for _, entry in header.entries]
    name = f"{header.architecture}.vocab_size"
    tokens = header.metadata.get(VOCABULARY[0])
    if name not in header.metadata and isinstance(tokens, int):
        key = name.encode()
        entries.append(struct.pack("<Q", len(key)) + key + struct.pack("<II", _UINT32, tokens))
    start = b"GGUF" + struct.pack("<IQQ", header.version, len(header.tensors), len(entries)) + b"".join(entries) + header.table
    alignment = header.metadata.get("general.alignment", 32)
    data_bytes = max((tensor.start + tensor.bytes for tensor in header.tensors.values()), default=header.data_start)
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(-(-len(start) // alignment) * alignment + data_bytes - header.data_start)
