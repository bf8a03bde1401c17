"""How the package hangs together: no circles, nothing imported from above, no file too long, one file where transformers ends."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import npu_sparse

ROOT = Path(npu_sparse.__file__).parent
FILES = {
    ".".join(("npu_sparse", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
# From below to above: what is loaded with a module stands before it. Imports within functions are left to the test for circles.
ORDER = """
__init__ errors boundary budget support runs tasks cann checkpoints compiled ascendc ops indexer models selectors
exact_end layer checks calibration prefill peers testing measure oracle distill demo integrations schedule doctor bench native cli
__main__
""".split()
MOST_LINES = 500


def imports(name: str, everywhere: bool) -> set[str]:
    """The modules of this package that a module imports when it is loaded or, with `everywhere`, in its functions too."""
    path, seen = FILES[name], set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]

    def visit(node, loaded: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import) and (loaded or everywhere):
            seen.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and (loaded or everywhere):
            start = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            seen.update(f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in FILES else origin for alias in node.names)
        within = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, loaded and not within)

    visit(ast.parse(path.read_text()), True)
    return {module for module in seen if module in FILES and module != name}


def room(name: str) -> str:
    """The file or folder right below npu_sparse that a module is in."""
    return (name.split(".") + ["__init__"])[1]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A way from a module back to itself; [] where there is none."""
    done, way = set(), []

    def follow(name: str) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        way.append(name)
        for other in sorted(graph[name]):
            if met := follow(other):
                return met
        done.add(way.pop())
        return []

    return next((met for name in graph if (met := follow(name))), [])


def test_circles_are_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert {"npu_sparse.ops.dispatch", "npu_sparse.ascendc"} <= imports("npu_sparse.ops", everywhere=False)


def test_no_module_leads_back_to_itself():
    assert circle({name: imports(name, everywhere=True) for name in FILES}) == []


def test_nothing_is_imported_from_above():
    places = {name: place for place, name in enumerate(ORDER)}
    assert sorted(places) == sorted({room(name) for name in FILES}), "give what is new its place in ORDER"
    upward = [
        f"{name} imports {other}" for name in FILES for other in imports(name, everywhere=False)
        if places[room(other)] > places[room(name)]
    ]  # fmt: skip
    assert upward == []


def test_no_file_is_longer_than_a_reader_bears():
    assert {name for name, path in FILES.items() if len(path.read_text().splitlines()) > MOST_LINES} == set()


def test_one_file_registers_with_transformers():
    texts = {name: path.read_text() for name, path in FILES.items() if not name.startswith("npu_sparse.testing")}
    assert {name for name, text in texts.items() if "Interface.register(" in text} == {"npu_sparse.models.attention"}


@pytest.mark.parametrize("module, heavy", [("npu_sparse", "torch"), ("npu_sparse.doctor", "torch"), ("npu_sparse.cli", "torch"),
                                           ("npu_sparse.schedule.scheduler", "torch")])  # fmt: skip
def test_what_must_start_at_once_imports_nothing_heavy(module, heavy):
    script = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('{heavy}', 'transformers')))"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT.parent)
