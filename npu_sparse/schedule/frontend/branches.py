"""An if whose condition depends on data, with all that is below it: one statement, whose writes may happen."""

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from pycparser import c_ast

from npu_sparse.schedule.frontend.expressions import Touch
from npu_sparse.schedule.frontend.forms import NotAffine
from npu_sparse.schedule.frontend.syntax import nodes, show, step_assignment
from npu_sparse.schedule.frontend.text import statement_text

if TYPE_CHECKING:
    from npu_sparse.schedule.frontend.c import Walk


def data_branch(walk: "Walk", node: c_ast.If) -> None:
    """Records the statement. What loops below the condition touch, it touches; their iterators and its variables are its own."""
    branch = _Branch(walk, node)
    branch.visit(node)
    if branch.writes:
        text = statement_text(walk.scope, without_pragmas(node))
        walk.record(node, list(dict.fromkeys(branch.reads)), list(dict.fromkeys(branch.writes)), text, None)


def without_pragmas(node: c_ast.Node) -> c_ast.Node:
    """The node, whose text can be that of a macro."""
    for block in nodes(node, c_ast.Compound):
        block.block_items = [item for item in block.block_items or () if not isinstance(item, c_ast.Pragma)]
    return node


class _Branch:
    """Collects the accesses below the condition; `own` are the variables that its open blocks declare."""

    def __init__(self, walk: "Walk", node: c_ast.If):
        self.walk, self.node, self.depth = walk, node, len(walk.scope.loops)
        self.reads: list[Touch] = []
        self.writes: list[Touch] = []
        self.own: list[str] = []

    def visit(self, part: c_ast.Node) -> None:
        if isinstance(part, c_ast.If):
            self.reading(part.cond)
            for branch in (part.iftrue, part.iffalse):
                if branch is not None:
                    self.visit(branch)
        elif isinstance(part, c_ast.Compound):
            known, outside = dict(self.walk.scope.symbols), list(self.own)
            for item in part.block_items or ():
                self.visit(item)
            for name in self.own[len(outside):]:  # variables of the statement are none of the SCoP
                self.walk.scope.touched.discard(name)
                self.walk.scope.known.pop(name)
            self.walk.scope.symbols, self.own = known, outside
        elif isinstance(part, c_ast.For):
            with self.walk.opened(part) as (_, declared):
                if not declared:
                    rule = "loop below a condition on data must declare its iterator"
                    self.walk.scope.refuse(part, f"{rule}, got {show(part.init)}")
                self.visit(part.stmt)
        elif isinstance(part, c_ast.Decl):
            self.declare(part)
        elif isinstance(part, c_ast.UnaryOp) and part.op in ("p++", "++", "p--", "--"):
            self.visit(step_assignment(part))
        elif isinstance(part, c_ast.Assignment) and not isinstance(part.rvalue, c_ast.Assignment):
            write = self.walk.target(part.lvalue)
            if part.op != "=":
                self.keep(self.reads, write)
            self.reading(part.rvalue)
            self.keep(self.writes, replace(write, may=True))
        elif not isinstance(part, (c_ast.EmptyStatement, c_ast.Pragma)):
            self.walk.scope.affine(self.node.cond, "condition", self.walk.scope.condition)

    def declare(self, node: c_ast.Decl) -> None:
        scope = self.walk.scope
        plain = isinstance(node.type, c_ast.TypeDecl) and not node.storage
        if not plain or node.name in scope.symbols or node.name in scope.known:
            rule = "declaration below a condition on data must be of a variable with a name of its own"
            scope.refuse(node, f"{rule}, got {show(node)}")
        symbol = self.walk.declarations.declare(node, local=True)
        self.own.append(node.name)
        if symbol.key != node.name:
            scope.refuse(node, f"declaration below a condition on data must have a name that isl can read, got {node.name}")
        if node.init is None:
            return
        self.reading(node.init)
        if symbol.integer and symbol.value is None and node.name not in self.walk.declarations.assigned and not symbol.volatile:
            with suppress(NotAffine):
                form = (scope.converted(*scope.typed(node.init), symbol.kind, node.init), symbol.kind)
                scope.symbols[node.name] = scope.known[symbol.key] = replace(symbol, form=form)

    def reading(self, node: c_ast.Node) -> None:
        touches: list[Touch] = []
        self.walk.scope.expression(node, touches, ())
        for touch in touches:
            self.keep(self.reads, touch)

    def keep(self, touches: list[Touch], touch: Touch) -> None:
        if touch.array in self.own:
            return
        loops = self.walk.scope.loops[self.depth:]
        guards = tuple(condition for loop in loops for condition in loop.conditions)
        touches.append(replace(touch, guards=(*touch.guards, *guards), inner=tuple(loop.name for loop in loops)))
