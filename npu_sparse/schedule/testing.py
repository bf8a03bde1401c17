"""Oracles for the tests of the scheduler: a SCoP's C text executed step by step, and its dependences by enumeration.

Neither uses isl's algorithms: loops run as C runs them, conflicts are found by looking at every pair. And programs, compiled and
run before and after scheduling.
"""

import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import islpy as isl
from pycparser import c_ast

from . import config, legality
from .c.print import generate_file
from .frontend.c import parse_c
from .frontend.preprocess import constant, is_integer
from .frontend.regions import parse_function
from .scheduler import schedule
from .scop import Scop

HEADERS = "#include <stdio.h>\n#include <stdlib.h>\n#include <stdint.h>\n#include <math.h>\n"
FLAGS = ("-O1", "-fopenmp", "-ffp-contract=off", "-std=gnu11", "-w", "-Werror=implicit-function-declaration")
Element = tuple[str, tuple[int, ...]]  # an array and indices


@dataclass(frozen=True)
class Instance:
    """One execution of the statement on a line of the source: its iteration, and the elements that it touches."""

    line: int
    iteration: tuple[int, ...]
    reads: frozenset[Element]
    writes: frozenset[Element]


def execute(text: str, sizes: dict[str, int], function: str | None = None) -> list[Instance]:
    """The statement instances of the scop of C text in the order in which C executes them.

    Only integers are computed. Where a value decides (x > 0 ? a : b), both sides count as read.
    """
    _, definition = parse_function(text, "<text>", function)
    items = definition.body.block_items
    edges = [at for at, item in enumerate(items) if isinstance(item, c_ast.Pragma)]
    out: list[Instance] = []
    values = dict(sizes)
    for item in items[: edges[0]]:
        if isinstance(item, c_ast.Decl) and item.init is not None and is_integer(item.type):
            values[item.name] = _value(item.init, values)
    for item in items[edges[0] + 1: edges[1]]:
        _run(item, values, [], sizes, out)
    return out


def instances(scop: Scop, sizes: dict[str, int]) -> list[tuple[str, Instance]]:
    """The statement instances that a scop describes, with their statements' names, in the order it describes."""
    timed = []
    for statement in scop.statements:
        reads, writes = ([_elements(access.relation, len(statement.iterators), sizes) for access in accesses]
                         for accesses in (statement.reads, statement.writes))
        for iteration in points(statement.domain, sizes):
            place = dict(zip(statement.iterators, iteration))
            time = tuple(entry if isinstance(entry, int) else -place[entry[1:]] if entry[0] == "-" else place[entry]
                         for entry in statement.position)
            touched = [frozenset(e for access in group for e in access.get(iteration, ())) for group in (reads, writes)]
            timed.append((time, statement.name, Instance(statement.line, iteration, *touched)))
    return [(name, instance) for _, name, instance in sorted(timed, key=lambda item: item[0])]


def points(region: isl.Set, sizes: dict[str, int]) -> list[tuple[int, ...]]:
    """The integer points of a bounded set for given parameters."""
    for at in range(region.dim(isl.dim_type.param)):
        region = region.fix_val(isl.dim_type.param, at, sizes[region.get_dim_name(isl.dim_type.param, at)])
    listed = []
    region.foreach_point(lambda point: listed.append(tuple(
        point.get_coordinate_val(isl.dim_type.set, at).to_python() for at in range(region.dim(isl.dim_type.set)))))
    return listed


def flow(trace: list[tuple[str, Instance]]) -> set[tuple]:
    """(kind, array, source, source iteration, sink, sink iteration) by remembering who touched each element last."""
    edges, writer, readers = set(), {}, {}
    for name, instance in trace:
        here = (name, instance.iteration)
        for element in instance.reads:
            if element in writer:
                edges.add(("RAW", element[0], *writer[element], *here))
        for element in instance.writes:
            edges.update(("WAR", element[0], *reader, *here) for reader in readers.get(element, ()))
            if element in writer:
                edges.add(("WAW", element[0], *writer[element], *here))
        for element in instance.writes:  # reads of the same instance came before its writes
            writer[element], readers[element] = here, set()
        for element in instance.reads - instance.writes:
            readers.setdefault(element, set()).add(here)
    return edges


def conflicts(trace: list[tuple[str, Instance]]) -> Iterator[tuple[tuple, tuple]]:
    """All pairs of instances, in order, that touch an element in common, at least one writing."""
    touched: dict[Element, list[tuple[tuple, bool]]] = {}
    for name, instance in trace:
        here = (name, instance.iteration)
        for element in instance.reads | instance.writes:
            writes = element in instance.writes
            for other, wrote in touched.setdefault(element, []):
                if writes or wrote:
                    yield other, here
            touched[element].append((here, writes))


def random_scop(seed: int, strides: bool = True) -> str:
    """C text of a random small scop over parameters n and m, with every statement on a line of its own."""
    chance = random.Random(seed)
    lines = ["void f(int n, int m, double A[n][m], double B[n], double C[n][n], double x, double y)", "{", "#pragma scop"]
    left = chance.randint(1, 5)  # statements

    def affine(names):
        factors = [1, 1, 1, -1, 2] if strides else [1, 1, -1]
        terms = [f"{chance.choice(factors)} * {name}" for name in names if chance.random() < 0.5]
        return " + ".join([*terms, str(chance.randint(-1, 2))])

    def element(names):
        array, dims = chance.choice([("A", 2), ("B", 1), ("B", 1), ("C", 2), ("x", 0), ("y", 0)])
        return array + "".join(f"[{affine(names)}]" for _ in range(dims))

    def assignment(names, pad):
        nonlocal left
        left -= 1
        right = [element(names) for _ in range(chance.randint(1, 2))]
        value = chance.choice([" + ".join(right), f"fmax({', '.join([*right, '1.0'][:2])})",
                               f"{affine(names or ['n'])} > 0 ? {right[0]} : {right[-1]}"])
        lines.append(f"{pad}{element(names)} {chance.choice(['=', '=', '=', '+=', '*='])} {value};")

    def block(names):
        pad = "    " * (len(names) + 1)
        for _ in range(chance.randint(1, 2)):
            kind = chance.random()
            if left <= 0:
                return
            if kind < 0.6 and len(names) < 3:
                name = "ijk"[len(names)]
                low = chance.choice(["0", "1", *names])
                high = chance.choice(["n", "m", "n - 1", "3", *(f"{other} + 2" for other in names)])
                step = chance.choice([1, 1, 1, 2]) if strides else 1
                lines.append(pad + chance.choice([f"for (int {name} = {low}; {name} < {high}; {name} += {step}) {{",
                                                  f"for (int {name} = {high}; {name} >= {low}; {name} -= {step}) {{"]))
                block([*names, name])
                lines.append(pad + "}")
            elif kind < 0.7 and names:
                compare = chance.choice(["<", "<=", ">", ">=", "==", "!="])
                lines.append(f"{pad}if ({affine(names)} {compare} {affine([*names, 'n'])}) {{")
                assignment(names, pad + "    ")
                lines.append(pad + "} else {")
                assignment(names, pad + "    ")
                lines.append(pad + "}")
            else:
                assignment(names, pad)

    while left > 0:
        block([])
    return "\n".join([*lines, "#pragma endscop", "}", ""])


def _run(node: c_ast.Node, values: dict[str, int], loops: list[str], sizes: dict[str, int], out: list[Instance]) -> None:
    if isinstance(node, c_ast.Compound):
        for item in node.block_items or ():
            _run(item, values, loops, sizes, out)
    elif isinstance(node, c_ast.If):
        branch = node.iftrue if _value(node.cond, values) else node.iffalse
        if branch is not None:
            _run(branch, values, loops, sizes, out)
    elif isinstance(node, c_ast.For):
        declared = isinstance(node.init, c_ast.DeclList)
        name = node.init.decls[0].name if declared else node.init.lvalue.name
        here = {**values, name: _value(node.init.decls[0].init if declared else node.init.rvalue, values)}
        while _value(node.cond, here):
            _run(node.stmt, here, [*loops, name], sizes, out)
            step = node.next
            if isinstance(step, c_ast.UnaryOp):
                here[name] += 1 if "+" in step.op else -1
            elif step.op == "=":
                here[name] = _value(step.rvalue, here)
            else:
                here[name] += _value(step.rvalue, here) * (1 if step.op == "+=" else -1)
    elif not isinstance(node, c_ast.EmptyStatement):
        reads: set[Element] = set()
        writes: set[Element] = set()
        if isinstance(node, c_ast.Decl):
            if node.init is None:
                return
            target, value, op = c_ast.ID(node.name), node.init, "="
        elif isinstance(node, c_ast.UnaryOp):
            target, value, op = node.expr, None, "+="
        else:
            target, value, op = node.lvalue, node.rvalue, node.op
        _reads(target, values, sizes, writes)
        if op != "=":
            reads |= writes
        if value is not None:
            _reads(value, values, sizes, reads)
        out.append(Instance(node.coord.line, tuple(values[loop] for loop in loops), frozenset(reads), frozenset(writes)))


def _reads(node: c_ast.Node, values: dict[str, int], sizes: dict[str, int], out: set[Element]) -> None:
    if isinstance(node, c_ast.ID):
        if node.name not in values:
            out.add((node.name, ()))
    elif isinstance(node, c_ast.ArrayRef):
        indices = []
        while isinstance(node, c_ast.ArrayRef):
            indices.insert(0, _value(node.subscript, values))
            node = node.name
        out.add((node.name, tuple(indices)))
    elif isinstance(node, c_ast.TernaryOp) and (truth := _value(node.cond, values)) is not None:
        _reads(node.iftrue if truth else node.iffalse, values, sizes, out)
    elif isinstance(node, c_ast.FuncCall):
        _reads(node.args, values, sizes, out)
    else:
        for _, child in node.children():
            _reads(child, values, sizes, out)


def _value(node: c_ast.Node, values: dict[str, int]) -> int | None:
    return constant(node, values)


def _elements(relation: isl.Map, depth: int, sizes: dict[str, int]) -> dict[tuple[int, ...], set[Element]]:
    array = relation.get_tuple_name(isl.dim_type.out)
    elements: dict[tuple[int, ...], set[Element]] = {}
    for point in points(relation.wrap(), sizes):
        elements.setdefault(point[:depth], set()).add((array, point[depth:]))
    return elements


def function(body: str, head: str, before: str = "", after: str = "", file: str = "") -> str:
    """A file with a function around a region: what stands before and after it there, and what the file declares."""
    return f"{HEADERS}{file}\n{head} {{\n{before}\n#pragma scop\n{body}\n#pragma endscop\n{after}\n}}\n"


def output(text: str, directory: Path, flags: tuple[str, ...] = FLAGS) -> str:
    """What a C program prints; an AssertionError where it does not compile, or does not end well."""
    (directory / "p.c").write_text(text)
    done = subprocess.run(["gcc", *flags, "p.c", "-lm", "-o", "p"], cwd=directory, capture_output=True, text=True)
    assert not done.returncode, done.stderr + text
    done = subprocess.run([directory / "p"], capture_output=True, text=True, timeout=20)
    assert not done.returncode, text
    return done.stdout


def generated(text: str, strategy: str, **options) -> str:
    """A C file after scheduling, by a plan that is legal."""
    scop = parse_c(text, **options)
    plan = schedule(scop, config.load(strategy))
    assert legality.check(scop, plan.union_map()) == []
    return generate_file(scop, text, plan.tree())


def agree(text: str, directory: Path, main: str, strategies: tuple[str, ...], **options) -> None:
    """Asserts that a file and `main` behind it print the same before and after scheduling."""
    expected = output(text + main, directory)
    assert expected
    for strategy in strategies:
        new = generated(text, strategy, **options)
        assert "#pragma scop" not in new
        assert output(new + main, directory) == expected, new
