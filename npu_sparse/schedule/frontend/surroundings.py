"""What the rest of a function says of its region: what is read after it, what may run it again, what changes a name before it."""

from collections.abc import Iterator

from pycparser import c_ast

from npu_sparse.schedule.frontend.calls import is_pure
from npu_sparse.schedule.frontend.fields import related
from npu_sparse.schedule.frontend.syntax import assigned, declarations, first_use, nodes

LOOPS = (c_ast.For, c_ast.While, c_ast.DoWhile)


class Surroundings:
    """A function around the statements of its region; places are positions in the text's order.

    Attributes:
        after: names that may be read once the region has run, by whatever runs afterwards.
        escaped: names whose address something else may hold; whole: names that are used without subscripts.
        repeats: whether the region may run again in one call of the function.
    """

    def __init__(self, function: c_ast.FuncDef, pragma: c_ast.Pragma, body: list[c_ast.Node]):
        self.function, self.pragma = function, pragma
        self.place = {id(node): at for at, node in enumerate(nodes(function.body))}
        self.inside = {id(part) for item in body for part in nodes(item)}
        self.end = max((self.place[at] for at in self.inside), default=self.place[id(pragma)])
        self.loops = [node for node in nodes(function.body, LOOPS) if any(part is pragma for part in nodes(node, c_ast.Pragma))]
        self.jumps = next(nodes(function.body, (c_ast.Label, c_ast.Case, c_ast.Default)), None) is not None
        self.repeats = bool(self.loops) or self.jumps
        outside = [node for node in nodes(function.body, c_ast.ID) if id(node) not in self.inside]
        self.after = {node.name for node in outside if self.repeats or self.place[id(node)] > self.end}
        if self.repeats:  # what one turn wrote, the next one may read in the region before it writes
            self.after |= {node.name for item in body for node in nodes(item, c_ast.ID)}
        self.escaped, self.whole = (set(_escaped(function.body, whole)) for whole in (False, True))
        self.meant = declarations(function.body)

    def read_after(self, name: str) -> bool:
        """Whether a value that the region leaves in a variable may be read."""
        if self.jumps:
            return any(node.name == name and id(node) not in self.inside for node in nodes(self.function.body, c_ast.ID))
        following = self.following(self.function.body) or []
        if first_use(c_ast.Compound(following), name) == "read":
            return True
        return any(first_use(part, name) == "read" for loop in self.loops for part in
                   (getattr(loop, "cond", None), getattr(loop, "next", None), loop.stmt) if part is not None)

    def following(self, node: c_ast.Node) -> list[c_ast.Node] | None:
        """What runs after the region's block ends, in order, or None where the region is not below the node."""
        if isinstance(node, c_ast.Compound) and self.pragma in (node.block_items or ()):
            return [item for item in node.block_items if self.place[id(item)] > self.end]
        for _, child in node.children():
            after = self.following(child)
            if after is not None:
                rest = [] if not isinstance(node, c_ast.Compound) else \
                    [item for item in node.block_items if self.place[id(item)] > self.place[id(child)]]
                return after + rest
        return None

    def change(self, name: str, variable: c_ast.Node | None, persistent: bool, since: c_ast.Node | None) -> c_ast.Node | None:
        """What may change a variable between a declaration, or the function's begin, and the end of the region."""
        begin, own = self.place.get(id(since), -1), id(variable) if id(variable) in self.place else None
        for changed, node in assigned(self.function.body):
            target = node.lvalue if isinstance(node, c_ast.Assignment) else node.expr
            if changed == name and self.meant.get(id(target)) == own and self.between(node, begin):
                return node
        for call in nodes(self.function.body, c_ast.FuncCall) if persistent else ():
            if not (isinstance(call.name, c_ast.ID) and is_pure(call.name.name, frozenset())) and self.between(call, begin):
                return call
        return None

    def between(self, node: c_ast.Node, begin: int) -> bool:
        at = self.place[id(node)]
        again = self.jumps or any(self.place[id(loop)] < at and any(part is node for part in nodes(loop)) for loop in self.loops)
        return at > begin and (at <= self.end or again)

    def sources(self, name: str, pointers: set[str]) -> set[str]:
        """The names that a pointer is set from, by way of other pointers too."""
        pairs = [(node.name, node.init) for node in nodes(self.function.body, c_ast.Decl) if node.init is not None]
        pairs += [(node.lvalue.name, node.rvalue) for node in nodes(self.function.body, c_ast.Assignment)
                  if isinstance(node.lvalue, c_ast.ID)]
        reached, new = set(), {name}
        while new:
            reached |= new
            values = [value for target, value in pairs if any(related(target, other) for other in new & pointers)]
            new = {part.name for value in values for part in nodes(value, c_ast.ID)} - reached
        return reached - {name}


def _escaped(body: c_ast.Node, whole: bool) -> Iterator[str]:
    """Names whose address is taken, or names that are used whole."""
    for node in nodes(body):
        if isinstance(node, c_ast.UnaryOp) and node.op == "&":
            target = node.expr
            while isinstance(target, (c_ast.ArrayRef, c_ast.StructRef)):
                target = target.name
            if isinstance(target, c_ast.ID) and not whole:
                yield target.name
            continue
        for field, child in node.children() if whole else ():
            if isinstance(child, c_ast.ID) and not (isinstance(node, c_ast.ArrayRef) and field == "name"):
                yield child.name
