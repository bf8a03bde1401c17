"""What is installed is what was tested: an exact version of every direct dependency, within the range that is supported."""

import sys
from pathlib import Path

import pytest

packaging = pytest.importorskip("packaging.requirements")
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).resolve().parent.parent
TORCHS = {"triton"}  # torch's CUDA build pins it


def requirements(lines):
    parsed = (packaging.Requirement(line.partition(" #")[0]) for line in lines if line.strip() and not line.startswith("#"))
    return {requirement.name.lower().replace("_", "-"): requirement for requirement in parsed}


def pinned():
    return requirements((ROOT / "constraints.txt").read_text().splitlines())


def direct():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return requirements([*project["dependencies"], *extras])


def test_every_direct_dependency_has_one_exact_version():
    constraints = pinned()
    assert set(direct()) - TORCHS == set(constraints)
    for name, requirement in constraints.items():
        assert [spec.operator for spec in requirement.specifier] == ["=="], name


def test_every_version_lies_in_the_range_that_is_supported():
    constraints = pinned()
    for name, requirement in direct().items():
        if name not in TORCHS:
            (exact,) = constraints[name].specifier
            assert requirement.specifier.contains(exact.version), name


def test_transformers_is_bounded_on_both_sides():
    (lower, upper) = sorted(direct()["transformers"].specifier, key=lambda spec: spec.operator, reverse=True)
    assert (lower.operator, upper.operator) == (">=", "<")
    (tested,) = pinned()["transformers"].specifier
    assert int(tested.version.split(".")[0]) < int(upper.version)
    makefile = (ROOT / "Makefile").read_text()
    assert f"transformers=={lower.version}.0" in makefile  # the version that `make test-oldest` installs
