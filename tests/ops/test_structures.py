"""The arguments of a CUDA kernel are a struct in its source and a mirror of it in Python: the same fields in the same order."""

import ctypes
import re
from importlib import import_module
from pathlib import Path

import pytest

from npu_sparse.ops import nvrtc

OPS = Path(nvrtc.__file__).parent
MIRRORS = [
    ("index_scores", "hopper.cu", "Arguments", "Score"),
    ("index_scores", "candidates.cu", "Row", "Row"),
    ("index_scores", "candidates.cu", "Estimate", "Estimate"),
    ("index_scores", "candidates.cu", "Select", "Select"),
    ("index_scores", "candidates.cu", "Rescue", "Rescue"),
    ("sparse_attention", "hopper.cu", "Arguments", "Attend"),
    ("sparse_attention", "union.cu", "Arguments", "Unite"),
]
KINDS = {"long long": ctypes.c_int64, "int": ctypes.c_int32, "float": ctypes.c_float}


def fields_of(source: str, name: str) -> list[tuple[str, object]]:
    """`(field, type)` of a struct in CUDA C++: a pointer is c_void_p, a struct within it its name."""
    body = re.search(rf"^struct {name} \{{\n(.*?)^\}};", source, re.M | re.S)[1]
    fields = []
    for statement in re.sub(r"//[^\n]*|DEVICE [^\n]*", "", body).split(";"):
        words = " ".join(statement.split())
        if not words:
            continue
        kind = re.match(r"(?:const )?(long long|\w+)", words)
        for declared in words[kind.end() :].split(","):
            pointer, field = re.fullmatch(r" ?(\* ?)?(\w+)", declared).groups()
            fields.append((field, ctypes.c_void_p if pointer else KINDS.get(kind[1], kind[1])))
    return fields


@pytest.mark.parametrize("operator, file, struct, mirror", MIRRORS, ids=lambda value: value)
def test_a_mirror_has_the_fields_of_its_struct(operator, file, struct, mirror):
    python = getattr(import_module(f"npu_sparse.ops.{operator}.hopper"), mirror)._fields_
    python = [(field, kind.__name__ if issubclass(kind, ctypes.Structure) else kind) for field, kind in python]
    assert fields_of((OPS / operator / file).read_text(), struct) == python


def test_every_struct_that_a_kernel_takes_has_a_mirror():
    taken = set()
    for path in OPS.glob("*/*.cu"):
        text = path.read_text()
        for struct in re.findall(r"__global__[^;{]*?\(const __grid_constant__ (\w+) a\)", text):
            taken.add((path.parent.name, path.name, struct))
    assert taken == {one[:3] for one in MIRRORS if one[3] != "Row"}
