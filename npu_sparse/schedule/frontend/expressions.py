"""C's expressions: what they read, and which of them are affine in loop iterators and parameters."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import islpy as isl
from pycparser import c_ast

from npu_sparse.schedule.frontend.preprocess import constant, is_integer
from npu_sparse.schedule.frontend.syntax import Printer, show
from npu_sparse.schedule.scop import ScopError

# Names that C programs use and headers define; only what a loop nest may mention.
CONSTANTS = set("INFINITY NAN HUGE_VAL M_PI M_E M_SQRT2 FLT_MAX FLT_MIN FLT_EPSILON DBL_MAX DBL_MIN DBL_EPSILON INT_MAX INT_MIN "
                "true false".split())
RESERVED = set("and or not exists mod floor ceil floord ceild min max implies true false infty infinity nan rat".split())
COMPARISONS = {"<": "<", "<=": "<=", ">": ">", ">=": ">=", "==": "=", "!=": "!="}
Linear = dict[str, int]  # coefficients by name; "" is the constant, "floor((i)/2)" and "((i) mod 2)" are names too


@dataclass(frozen=True)
class Symbol:
    """A declared name. shape: extents, () for scalars; value: of an integer that never changes."""

    name: str
    ctype: str
    shape: tuple[c_ast.Node | None, ...]
    integer: bool
    value: int | None = None
    argument: bool = False
    local: bool = False


@dataclass(frozen=True)
class Loop:
    name: str
    conditions: tuple[str, ...]


@dataclass(frozen=True)
class Touch:
    """An access before the parameters are known: subscripts as isl text, under the guards of conditional expressions."""

    array: str
    subscripts: tuple[str, ...]
    guards: tuple[str, ...] = ()
    footprint: str = ""  # condition on further dimensions, of opaque statements
    may: bool = False


class NotAffine(Exception):
    pass


def add(left: Linear, right: Linear, factor: int) -> Linear:
    total = dict(left)
    for name, value in right.items():
        total[name] = total.get(name, 0) + factor * value
    return {name: value for name, value in total.items() if value}


def isl_text(form: Linear) -> str:
    terms = [f"{value}" if not name else name if value == 1 else f"{value}*{name}" for name, value in form.items()]
    return " + ".join(terms).replace("+ -", "- ") or "0"


class Scope:
    """The names that are visible, the open loops and the conditions around the current place of a walk over a region."""

    def __init__(self, source: str, context: str, assigned: set[str]):
        self.source, self.context, self.assigned = source, context, assigned
        self.symbols: dict[str, Symbol] = {}
        self.loops: list[Loop] = []
        self.conditions: list[str] = []
        self.used: set[str] = set()  # integers in affine expressions: the parameters
        self.touched: set[str] = set()
        self.written: set[str] = set()  # names that the region changes

    def declare(self, node: c_ast.Decl, argument: bool = False, local: bool = False) -> None:
        if node.name in self.symbols and local:
            self.refuse(node, f"{node.name} must be declared once, got a second declaration in the scop")
        kind, shape = node.type, []
        while isinstance(kind, (c_ast.ArrayDecl, c_ast.PtrDecl)):
            shape.append(kind.dim if isinstance(kind, c_ast.ArrayDecl) else None)
            kind = kind.type
        names = getattr(getattr(kind, "type", None), "names", None)
        ctype = " ".join(names) if names else "struct"
        integer = not shape and is_integer(kind)
        # An initialised integer that the whole function never changes is its value.
        value = None
        if integer and node.init is not None and node.name not in self.assigned and not argument:
            value = constant(node.init, {name: s.value for name, s in self.symbols.items() if s.value is not None})
        self.symbols[node.name] = Symbol(node.name, ctype, tuple(shape), integer, value, argument, local)

    def body(self, node: c_ast.Node) -> str:
        iterators = {loop.name for loop in self.loops}

        def name(text):
            if text in iterators:
                return f"({text})"
            symbol = self.symbols.get(text)
            return str(symbol.value) if symbol and symbol.value is not None and not symbol.shape else text
        return Printer(name).visit(node)

    def expression(self, node: c_ast.Node, reads: list[Touch], guards: tuple[str, ...]) -> None:
        """Appends what the expression reads; an affine condition of ?: restricts the reads of its branches."""
        if isinstance(node, c_ast.ID):
            symbol = self.symbols.get(node.name)
            if any(loop.name == node.name for loop in self.loops) or symbol and symbol.value is not None:
                return
            if symbol is None and node.name in CONSTANTS:
                return
            if symbol is None:
                self.refuse(node, f"name must be declared, got {node.name}")
            if symbol.shape:
                self.refuse(node, f"array must have {len(symbol.shape)} subscripts, got {node.name}")
            self.check_name(node, node.name)
            self.touched.add(node.name)
            reads.append(Touch(node.name, (), guards))
        elif isinstance(node, c_ast.ArrayRef):
            base, subscripts = node, []
            while isinstance(base, c_ast.ArrayRef):
                subscripts.insert(0, base.subscript)
                base = base.name
            symbol = self.symbols.get(base.name) if isinstance(base, c_ast.ID) else None
            if symbol is None:
                self.refuse(node, f"array must be declared, got {show(node)}")
            if None in symbol.shape[1:]:
                self.refuse(node, f"array must have extents, got pointers to pointers in {show(node)}")
            if len(symbol.shape) != len(subscripts):
                self.refuse(node, f"{base.name} must have {len(symbol.shape)} subscripts, got {show(node)}")
            self.check_name(node, base.name)
            self.touched.add(base.name)
            indices = tuple(isl_text(self.affine(subscript, "subscript", self.linear)) for subscript in subscripts)
            reads.append(Touch(base.name, indices, guards))
        elif isinstance(node, c_ast.BinaryOp):
            self.expression(node.left, reads, guards)
            self.expression(node.right, reads, guards)
        elif isinstance(node, c_ast.UnaryOp) and node.op in ("-", "+", "!", "~"):
            self.expression(node.expr, reads, guards)
        elif isinstance(node, c_ast.Cast):
            self.expression(node.expr, reads, guards)
        elif isinstance(node, c_ast.TernaryOp):
            try:
                condition = self.condition(node.cond)
            except NotAffine:
                self.expression(node.cond, reads, guards)
                self.expression(node.iftrue, reads, guards)
                self.expression(node.iffalse, reads, guards)
            else:
                self.expression(node.iftrue, reads, (*guards, condition))
                self.expression(node.iffalse, reads, (*guards, f"not ({condition})"))
        elif isinstance(node, c_ast.FuncCall) and isinstance(node.name, c_ast.ID):
            if re.fullmatch(r"S\d+", node.name.name):
                self.refuse(node, f"function must not have the name of a statement, got {show(node)}")
            for argument in node.args.exprs if node.args else ():
                self.expression(argument, reads, guards)
        elif not isinstance(node, c_ast.Constant):
            self.refuse(node, f"expression must have no side effects and no pointers, got {show(node)}")

    def linear(self, node: c_ast.Node) -> Linear:
        """An affine form over iterators and parameters; raises NotAffine."""
        value = constant(node, {name: s.value for name, s in self.symbols.items() if s.value is not None})
        if value is not None:
            return {"": value} if value else {}
        if isinstance(node, c_ast.ID):
            if any(loop.name == node.name for loop in self.loops):
                return {node.name: 1}
            symbol = self.symbols.get(node.name)
            if symbol and symbol.integer and not symbol.local and node.name not in self.written:
                self.check_name(node, node.name)
                self.used.add(node.name)
                return {node.name: 1}
        elif isinstance(node, c_ast.UnaryOp) and node.op in "+-":
            return add({}, self.linear(node.expr), 1 if node.op == "+" else -1)
        elif isinstance(node, c_ast.Cast) and is_integer(node.to_type):
            return self.linear(node.expr)
        elif isinstance(node, c_ast.BinaryOp) and node.op in "+-":
            return add(self.linear(node.left), self.linear(node.right), 1 if node.op == "+" else -1)
        elif isinstance(node, c_ast.BinaryOp) and node.op == "*":
            left, right = self.linear(node.left), self.linear(node.right)
            if not set(left) - {""} or not set(right) - {""}:
                factor, form = (left, right) if not set(left) - {""} else (right, left)
                return add({}, form, factor.get("", 0))
        elif isinstance(node, c_ast.BinaryOp) and node.op in "/%":
            form, divisor = self.linear(node.left), self.linear(node.right)
            if set(divisor) == {""} and divisor[""] > 0:
                if self.possible(f"{isl_text(form)} < 0"):  # C truncates towards zero, floor does not
                    self.refuse(node, f"operand of {node.op} must not be negative, got {show(node)}")
                text, d = isl_text(form), divisor[""]
                return {f"floor(({text})/{d})" if node.op == "/" else f"(({text}) mod {d})": 1}
        raise NotAffine(show(node))

    def condition(self, node: c_ast.Node) -> str:
        """An affine condition as isl text; raises NotAffine."""
        if isinstance(node, c_ast.BinaryOp) and node.op in ("&&", "||"):
            return f"(({self.condition(node.left)}) {'and' if node.op == '&&' else 'or'} ({self.condition(node.right)}))"
        if isinstance(node, c_ast.UnaryOp) and node.op == "!":
            return f"not ({self.condition(node.expr)})"
        if isinstance(node, c_ast.BinaryOp) and node.op in COMPARISONS:
            return f"{isl_text(self.linear(node.left))} {COMPARISONS[node.op]} {isl_text(self.linear(node.right))}"
        return f"{isl_text(self.linear(node))} != 0"

    def affine(self, node: c_ast.Node, what: str, form: Callable):
        try:
            return form(node)
        except NotAffine as error:
            got = show(node) if str(error) == show(node) else f"{error} in {show(node)}"
            self.refuse(node, f"{what} must be affine in loop iterators and parameters, got {got}")

    def possible(self, condition: str) -> bool:
        """Whether a statement at this place may see the condition hold."""
        conditions = [text for loop in self.loops for text in loop.conditions] + self.conditions
        parameters = [name for name, s in self.symbols.items() if s.integer]
        extra = [self.context] if self.context else []
        names = [loop.name for loop in self.loops]
        text = f"[{', '.join(p for p in parameters if p not in names)}] -> {{ [{', '.join(names)}] : "
        return not isl.Set(text + " and ".join(f"({c})" for c in [*conditions, *extra, condition]) + " }").is_empty()

    def check_name(self, node: c_ast.Node, name: str) -> None:
        if name.lower() in RESERVED:
            self.refuse(node, f"name must not be a keyword of isl, got {name}")

    def refuse(self, node: c_ast.Node, sentence: str):
        line = f":{node.coord.line}" if getattr(node, "coord", None) and self.source != "<python>" else ""
        raise ScopError(f"{self.source}{line}: {sentence}")
