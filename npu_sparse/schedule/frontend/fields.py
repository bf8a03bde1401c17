"""Fields of structs: `s.a`, `p->a` and `p[i].a` are variables and arrays of their own, as long as nothing reaches them otherwise.

In the tree, such a path is one name: `s.a`, `p->a`, and `p[].a` with the subscript behind it, as for any array.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pycparser import c_ast

from npu_sparse.schedule.frontend import types
from npu_sparse.schedule.frontend.syntax import nodes

if TYPE_CHECKING:
    from npu_sparse.schedule.frontend.expressions import Symbol

Tags = dict[str, c_ast.Struct]
STEP = re.compile(r"\[\]|->\w+|\.\w+")


@dataclass(frozen=True)
class Field:
    """What a path leads to: its type, the extents on the way, its qualifiers, and the pointers that it goes through.

    `kind` is None where the path is none that the scheduler follows; `got` says why.
    """

    kind: c_ast.Node | None
    shape: tuple[c_ast.Node | None, ...] = ()
    quals: frozenset[str] = frozenset()
    pointers: tuple[str, ...] = ()
    got: str = ""


def field_named(node: c_ast.Node) -> c_ast.Node:
    """A reference to a field as a name, with the subscripts on the way behind it; other nodes as they are."""
    if not isinstance(node, c_ast.StructRef):
        return node
    base, indices = node.name, []
    while isinstance(base, c_ast.ArrayRef):
        indices.insert(0, base.subscript)
        base = base.name
    if not isinstance(base, c_ast.ID):
        return node
    new = indices[base.name.count("[]"):]
    step = node.type
    if step == "." and len(new) == 1 and isinstance(new[0], c_ast.Constant) and types.literal(new[0].value) == (0, types.INT):
        step, new = "->", []  # (*p).x and p[0].x are p->x
        indices.pop()
    path: c_ast.Node = c_ast.ID(f"{base.name}{'[]' * len(new)}{step}{node.field.name}", node.coord)
    for index in indices:
        path = c_ast.ArrayRef(path, index, node.coord)
    return path


def root(name: str) -> str:
    """The variable that a path begins with."""
    return re.match(r"\w*", name)[0]


def paths(node: c_ast.Node) -> dict[str, list[str]]:
    """The paths below a node, by the variables that they begin with."""
    by_root: dict[str, list[str]] = {}
    for name in dict.fromkeys(part.name for part in nodes(node, c_ast.ID) if STEP.search(part.name)):
        by_root.setdefault(root(name), []).append(name)
    return by_root


def related(one: str, other: str) -> bool:
    """Whether one of two paths is the other or a part of it."""
    short, long = sorted((one, other), key=len)
    return long == short or long.startswith(short) and STEP.match(long, len(short)) is not None


def follow(path: str, kind: c_ast.Node, typedefs: types.Typedefs, tags: Tags) -> Field:
    """What a path leads to from a variable of that type."""
    shape, quals, pointers, place = [], set(), [], root(path)
    for match in STEP.finditer(path):
        kind, step = plain(kind, typedefs, quals), match[0]
        if step == "[]" or step.startswith("->"):
            if not isinstance(kind, (c_ast.PtrDecl, c_ast.ArrayDecl)):
                return Field(None, got="what is no pointer")
            if isinstance(kind, c_ast.PtrDecl):
                pointers.append(place)
            if step == "[]":
                shape.append(getattr(kind, "dim", None))
            kind = plain(kind.type, typedefs, quals)
        if step != "[]":
            struct = getattr(kind, "type", None)
            if isinstance(struct, c_ast.Struct) and struct.decls is None:
                struct = tags.get(struct.name, struct)
            decls = struct.decls or () if isinstance(struct, c_ast.Struct) else ()
            member = next((decl for decl in decls if getattr(decl, "name", None) == step.lstrip("->.")), None)
            if member is None:
                return Field(None, got="a union" if isinstance(struct, c_ast.Union) else "what no struct of the file declares")
            if member.bitsize is not None:  # threads that write neighbours would write over each other
                return Field(None, got="a bit-field")
            kind = member.type
            quals |= set(member.quals)
        place = path[: match.end()]
    if path.count("->") + path.count("[]") > 1 and len(pointers) > 1:
        return Field(None, got="a pointer behind a pointer")
    return Field(kind, tuple(shape), frozenset(quals), tuple(pointers))


def plain(kind: c_ast.Node, typedefs: types.Typedefs, quals: set[str]) -> c_ast.Node:
    """A type without the typedefs in front of it; its qualifiers are added to the set."""
    for _ in range(20):
        quals |= set(getattr(kind, "quals", None) or ())
        names = getattr(getattr(kind, "type", None), "names", ())
        if not isinstance(kind, c_ast.TypeDecl) or len(names) != 1 or names[0] not in typedefs:
            break
        kind = typedefs[names[0]]
    return kind


def mixed(symbols: list["Symbol"]) -> "tuple[str, str] | None":
    """Two paths of which one uses a pointer as such and the other as an array, so that both may mean one element."""
    ways: dict[str, str] = {}
    for symbol in symbols:
        for match in re.finditer(r"->|\[\]", symbol.name):
            before = ways.setdefault(symbol.name[: match.start()], symbol.name)
            if before[match.start() : match.end()] != match[0]:
                return before, symbol.name
    return None
