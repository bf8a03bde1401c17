"""What declarations make known: types through typedefs, extents, enumerators, integers that never change."""

import re
from collections.abc import Sequence
from dataclasses import replace

from pycparser import c_ast

from npu_sparse.schedule.frontend import types
from npu_sparse.schedule.frontend.expressions import Scope, Symbol
from npu_sparse.schedule.frontend.fields import follow, paths
from npu_sparse.schedule.frontend.syntax import assigned, nodes

# Keywords of isl's texts: variables of these names have others in the SCoP.
RESERVED = set("and or not exists mod floor ceil floord ceild min max implies true false infty infinity nan rat".split())


class Declarations:
    """Declares names in a scope."""

    def __init__(self, scope: Scope, function: c_ast.FuncDef, words: frozenset[str]):
        """`words` are the identifiers of the file, its macros included."""
        self.scope, self.words = scope, words
        self.assigned = {name for name, _ in assigned(function)}
        self.paths = paths(function)
        self.taken = {node.name for node in nodes(function, c_ast.ID)}

    def visible(self, node: c_ast.Node, outer: bool = False) -> None:
        """What a declaration before the region makes known."""
        if isinstance(node, (c_ast.Typedef, c_ast.Decl)):
            self.scope.tags |= {part.name: part for part in nodes(node.type, c_ast.Struct) if part.decls is not None}
        if isinstance(node, c_ast.Typedef):
            self.enumerators(node)
            self.scope.typedefs[node.name] = node.type
        elif isinstance(node, c_ast.Decl) and isinstance(node.type, c_ast.Enum):
            self.enumerators(node)
        elif isinstance(node, c_ast.Decl) and not isinstance(node.type, c_ast.FuncDecl) and node.name:
            self.enumerators(node)
            self.declare(node, outer=outer)

    def enumerators(self, node: c_ast.Node) -> None:
        for enum in nodes(node.type, c_ast.Enum):
            last = -1
            for item in enum.values.enumerators if enum.values else ():
                value = types.evaluate(item.value, self.scope.lookup, self.scope.typedefs) if item.value is not None else \
                    (last + 1, types.INT)
                if value is None:
                    break
                last = value[0]
                symbol = Symbol(item.name, item.name, "int", kind=types.INT, value=last, node=item)
                self.scope.symbols[item.name] = symbol

    def declare(self, node: c_ast.Decl, argument: bool = False, local: bool = False, outer: bool = False) -> Symbol:
        scope = self.scope
        kind, shape, quals, pointer, ctype = self.described(node.type, set(node.quals))
        whole = types.integer(kind, scope.typedefs)
        persistent = outer or bool({"static", "extern"} & set(node.storage))
        # An initialised integer that nothing can change is its value.
        value = None
        if whole and not shape and node.init is not None and node.name not in self.assigned and not argument and \
                not quals & {"volatile", "_Atomic"} and (not outer or "const" in quals):
            constant = types.evaluate(node.init, scope.lookup, scope.typedefs)
            value = whole.wrapped(constant[0]) if constant else None
        key = node.name
        hidden = scope.symbols.get(node.name)
        if local and key in scope.known or hidden and hidden.argument:
            key = self.fresh(key)
        key = self.key(key)
        symbol = Symbol(key, node.name, ctype, tuple(shape), whole, types.floating(kind, scope.typedefs), value,
                        argument=argument, local=local, persistent=persistent, pointers=(node.name,) if pointer else (),
                        volatile=bool(quals & {"volatile", "_Atomic"}) or "_Thread_local" in node.storage,
                        arithmetic=types.arithmetic(kind, scope.typedefs), names=self.meant(shape), node=node)
        scope.symbols[node.name] = scope.known[key] = symbol
        for path in self.paths.get(node.name, ()) if not local else ():
            self.field(path, symbol)
        return symbol

    def field(self, path: str, variable: Symbol) -> None:
        """Declares the field of a struct that a path from the variable leads to."""
        scope = self.scope
        followed = follow(path, variable.node.type, scope.typedefs, scope.tags)
        key = "_".join(re.findall(r"\w+", path))
        key = self.fresh(key) if key in self.words or key in scope.known and scope.known[key].name != path else self.key(key)
        symbol = Symbol(key, path, "", missing=followed.got, node=variable.node)
        if followed.kind is not None:
            kind, shape, quals, pointer, ctype = self.described(followed.kind, {*variable.node.quals, *followed.quals})
            shape = (*followed.shape, *shape)
            symbol = replace(symbol, ctype=ctype, shape=shape, kind=types.integer(kind, scope.typedefs),
                             floats=types.floating(kind, scope.typedefs), arithmetic=types.arithmetic(kind, scope.typedefs),
                             pointers=(*followed.pointers, *([path] if pointer else [])), names=self.meant(shape),
                             volatile=bool(quals & {"volatile", "_Atomic"}) or "_Thread_local" in variable.node.storage)
        scope.symbols[path] = scope.known[key] = symbol

    def meant(self, shape: Sequence[c_ast.Node | None]) -> dict[str, Symbol | None]:
        """What the names in extents mean here."""
        used = {part.name for extent in shape if extent is not None for part in nodes(extent, c_ast.ID)}
        return {name: self.scope.symbols.get(name) for name in used}

    def described(self, kind: c_ast.Node, quals: set[str]) -> tuple[c_ast.Node, list[c_ast.Node | None], set[str], bool, str]:
        """Of a type: that of its elements, extents, qualifiers, whether it is a pointer, and C's text for the elements."""
        scope, shape, pointer = self.scope, [], None
        while True:
            quals |= set(getattr(kind, "quals", None) or ())
            if isinstance(kind, (c_ast.ArrayDecl, c_ast.PtrDecl)):
                pointer = isinstance(kind, c_ast.PtrDecl) if pointer is None else pointer
                shape.append(kind.dim if isinstance(kind, c_ast.ArrayDecl) else None)
            names = getattr(getattr(kind, "type", None), "names", None)
            if isinstance(kind, c_ast.TypeDecl) and names and len(names) == 1 and names[0] in scope.typedefs:
                alias = scope.typedefs[names[0]]
                if isinstance(alias, (c_ast.ArrayDecl, c_ast.PtrDecl)):
                    kind = alias
                    continue
            if not isinstance(kind, (c_ast.ArrayDecl, c_ast.PtrDecl)):
                break
            kind = kind.type
        inner = getattr(kind, "type", kind)
        tag = getattr(inner, "name", None) or ""
        ctype = " ".join(types.base(tuple(names), scope.typedefs)) if names else f"{type(inner).__name__.lower()} {tag}".strip()
        return kind, shape, quals, bool(pointer), ctype

    def key(self, name: str) -> str:
        """The name itself where isl can read it."""
        return self.fresh(name) if name.lower() in RESERVED else name

    def fresh(self, name: str) -> str:
        """A name that neither the function nor isl uses."""
        number = 1
        while f"{name}_{number}" in self.taken | set(self.scope.known):
            number += 1
        self.taken.add(f"{name}_{number}")
        return f"{name}_{number}"
