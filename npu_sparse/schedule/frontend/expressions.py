"""C's expressions: what they read, and which of them are affine in loop iterators and parameters, in C's own types.

An affine form stands for the mathematical value. Signed arithmetic has it wherever C defines a result. Unsigned arithmetic has
it up to a multiple of two to the width, so an unsigned form is *settled* before it is compared, divided or used as a subscript:
proven to lie in its type's range, or rewritten so that the wrapping is explicit, or refused.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import islpy as isl
from pycparser import c_ast

from npu_sparse.schedule.frontend import strides, types
from npu_sparse.schedule.frontend.calls import MAXIMA, MINIMA, is_pure
from npu_sparse.schedule.frontend.forms import Linear, NotAffine, add, isl_text
from npu_sparse.schedule.frontend.syntax import show
from npu_sparse.schedule.frontend.types import Integer
from npu_sparse.schedule.scop import ScopError

# Names that headers define; only what a loop nest may mention.
CONSTANTS = set("INFINITY NAN HUGE_VAL M_PI M_E M_SQRT2 FLT_MAX FLT_MIN FLT_EPSILON DBL_MAX DBL_MIN DBL_EPSILON INT_MAX INT_MIN "
                "true false".split())
COMPARISONS = {"<": "<", "<=": "<=", ">": ">", ">=": ">=", "==": "=", "!=": "!="}


@dataclass(frozen=True)
class Touch:
    """An access before the parameters are known: subscripts as isl text, under the guards of conditional expressions.

    A subscript that isl reads only as a condition has the name of a dimension, and `footprint` says what it is. `inner` are
    iterators of loops inside of the statement, whose bounds are guards.
    """

    array: str
    subscripts: tuple[str, ...]
    guards: tuple[str, ...] = ()
    footprint: str = ""
    may: bool = False
    inner: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Symbol:
    """A declared name.

    Attributes:
        key: its name in the SCoP, unique there and no keyword of isl; `name` is C's.
        shape: extents, () for scalars.
        kind: the type of an integer or of integer elements; `floats`: whether it is of a floating type.
        value: of an integer that never changes; form, text, reads: of a local integer that is affine and never changes.
        arithmetic: whether it holds numbers. persistent: whether its value outlives the function.
        pointers: what leads to it that is declared as a pointer, so that it may point to anything; itself perhaps.
        missing: why the field of that name cannot be used.
        names: what the names in its extents meant where it was declared.
    """

    key: str
    name: str
    ctype: str
    shape: tuple[c_ast.Node | None, ...] = ()
    kind: Integer | None = None
    floats: bool = False
    value: int | None = None
    form: tuple | None = None
    text: str = ""
    reads: tuple[Touch, ...] = ()
    argument: bool = False
    local: bool = False
    persistent: bool = False
    pointers: tuple[str, ...] = ()
    missing: str = ""
    volatile: bool = False
    iterator: bool = False
    arithmetic: bool = True
    names: dict = field(default_factory=dict)
    node: c_ast.Node | None = None

    @property
    def integer(self) -> bool:
        return self.kind is not None and not self.shape

    @property
    def field(self) -> bool:
        """Whether it is a field of a struct: its name is a path."""
        return not self.name.isidentifier()


@dataclass(frozen=True)
class Loop:
    name: str
    conditions: tuple[str, ...]
    kind: Integer = types.INT


class Scope:
    """The names that are visible, the open loops and the conditions around the current place of a walk over a region."""

    def __init__(self, source: str, context: str, typedefs: types.Typedefs, pure: frozenset[str] = frozenset()):
        self.source, self.context, self.typedefs, self.pure = source, context, typedefs, pure
        self.symbols: dict[str, Symbol] = {}  # by C's names: what is visible
        self.known: dict[str, Symbol] = {}  # by key
        self.tags: dict[str, c_ast.Struct] = {}  # the definitions of structs that have names
        self.loops: list[Loop] = []
        self.conditions: list[str] = []
        self.facts: list[str] = []  # what declarations say of parameters
        self.terms: dict[str, str] = {}  # existentially quantified names of isl texts, and their definitions
        self.used: set[str] = set()  # integers in affine expressions: the parameters
        self.touched: set[str] = set()
        self.written: set[str] = set()  # C's names that the region changes
        self.layouts: dict[str, tuple] = {}  # of arrays of one dimension in C and several in the region (see strides.py)
        self.wrapping = True  # whether an unsigned value that may wrap around is spelled out, not refused

    # What expressions read

    def expression(self, node: c_ast.Node, reads: list[Touch], guards: tuple[str, ...]) -> None:
        """Appends what the expression reads; an affine condition of ?: restricts the reads of its branches."""
        if isinstance(node, c_ast.ID):
            self.variable(node, reads, guards)
        elif isinstance(node, c_ast.ArrayRef):
            base, subscripts = node, []
            while isinstance(base, c_ast.ArrayRef):
                subscripts.insert(0, base.subscript)
                base = base.name
            symbol = self.symbols.get(base.name) if isinstance(base, c_ast.ID) else None
            if symbol is None:
                self.refuse(node, f"array must be declared, got {show(node)}")
            self.check_field(node, symbol)
            if None in symbol.shape[1:]:
                self.refuse(node, f"array must have extents, got pointers to pointers in {show(node)}")
            if len(symbol.shape) != len(subscripts):
                self.refuse(node, f"{base.name} must have {len(symbol.shape)} subscripts, got {show(node)}")
            if len(subscripts) == 1:
                forms = strides.element(self, node, symbol)
            else:
                forms = [self.affine(subscript, "subscript", self.linear) for subscript in subscripts]
            reads.append(self.touch(node, symbol, forms, guards))
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
                condition = None
                self.expression(node.cond, reads, guards)
            for branch, guard in ((node.iftrue, condition), (node.iffalse, f"not ({condition})")):
                self.expression(branch, reads, guards if condition is None else (*guards, guard))
        elif isinstance(node, c_ast.FuncCall) and isinstance(node.name, c_ast.ID):
            if re.fullmatch(r"S\d+", node.name.name):
                self.refuse(node, f"function must not have the name of a statement, got {show(node)}")
            for argument in node.args.exprs if node.args else ():
                self.expression(argument, reads, guards)
            if not is_pure(node.name.name, self.pure):
                self.refuse(node, f"function must be known to be pure (see --pure), got {show(node)}")
        elif not isinstance(node, c_ast.Constant):
            self.refuse(node, f"expression must have no side effects and no pointers, got {show(node)}")

    def variable(self, node: c_ast.ID, reads: list[Touch], guards: tuple[str, ...]) -> None:
        symbol = self.symbols.get(node.name)
        if symbol is None and node.name in CONSTANTS or symbol and (symbol.iterator or symbol.value is not None):
            return
        if symbol is None:
            self.refuse(node, f"name must be declared, got {node.name}")
        if symbol.shape:
            self.refuse(node, f"array must have {len(symbol.shape)} subscripts, got {node.name}")
        if symbol.form is not None:
            reads += [Touch(t.array, t.subscripts, (*guards, *t.guards), t.footprint) for t in symbol.reads]
        else:
            reads.append(self.touch(node, symbol, [], guards))

    def touch(self, node: c_ast.Node, symbol: Symbol, forms: list[Linear], guards: tuple[str, ...] = ()) -> Touch:
        """The access of an element, which from now on belongs to the SCoP."""
        self.check_field(node, symbol)
        if symbol.volatile:
            self.refuse(node, f"variable must not be volatile or of one thread, got {symbol.name}")
        if not symbol.arithmetic:
            self.refuse(node, f"variable must hold numbers, got {symbol.name} of type {symbol.ctype}")
        self.touched.add(symbol.key)
        subscripts, conditions = [], []
        for at, form in enumerate(forms):
            subscripts.append(isl_text(form))
            if any(name in self.terms for name in form):
                subscripts[-1] = f"_d{at}"
                conditions.append(self.compare({f"_d{at}": 1}, "=", form))
        return Touch(symbol.key, tuple(subscripts), guards, " and ".join(conditions))

    def check_field(self, node: c_ast.Node, symbol: Symbol) -> None:
        if symbol.missing:
            self.refuse(node, f"field must be a number or an array of a struct, got {symbol.name}, {symbol.missing}")

    # Affine forms

    def lookup(self, name: str) -> types.Typed | None:
        symbol = self.symbols.get(name)
        return (symbol.value, symbol.kind) if symbol and symbol.value is not None and not symbol.shape else None

    def linear(self, node: c_ast.Node) -> Linear:
        """An affine form over iterators and parameters; raises NotAffine."""
        return self.settled(*self.typed(node), node)

    def typed(self, node: c_ast.Node) -> tuple[Linear, Integer]:
        """A form and C's type of it; of unsigned types the form is the value only up to a multiple of two to the width."""
        if constant := types.evaluate(node, self.lookup, self.typedefs):
            return ({"": constant[0]} if constant[0] else {}), constant[1]
        if isinstance(node, c_ast.ID) and (symbol := self.symbols.get(node.name)):
            if symbol.form is not None:
                return symbol.form
            changes = symbol.local or symbol.name in self.written or symbol.volatile
            if symbol.integer and (symbol.iterator or not changes):
                if not symbol.iterator:
                    self.used.add(symbol.key)
                return {symbol.key: 1}, symbol.kind
        elif isinstance(node, c_ast.UnaryOp) and node.op in "+-":
            form, kind = self.typed(node.expr)
            return add({}, form, 1 if node.op == "+" else -1), types.promoted(kind)
        elif isinstance(node, c_ast.Cast) and (kind := self.cast_type(node)):
            return self.converted(*self.typed(node.expr), kind, node), kind
        elif isinstance(node, c_ast.TernaryOp):
            return self.choice(node)
        elif isinstance(node, c_ast.FuncCall) and show(node.name) in MINIMA + MAXIMA and node.args and len(node.args.exprs) == 2:
            left, right, kind = self.operands(*node.args.exprs)
            return self.extreme("min" if show(node.name) in MINIMA else "max", left, right), kind
        elif isinstance(node, c_ast.BinaryOp):
            return self.binary(node)
        raise NotAffine(show(node))

    def cast_type(self, node: c_ast.Cast) -> Integer | None:
        kind = types.integer(node.to_type, self.typedefs) if isinstance(node.to_type.type, c_ast.TypeDecl) else None
        return kind if kind and kind.bits > 1 else None

    def binary(self, node: c_ast.BinaryOp) -> tuple[Linear, Integer]:
        if node.op in "+-*":
            (left, a), (right, b) = self.typed(node.left), self.typed(node.right)
            kind = types.common(a, b)
            left, right = self.converted(left, a, kind, node.left), self.converted(right, b, kind, node.right)
            if node.op != "*":
                return add(left, right, 1 if node.op == "+" else -1), kind
            if not set(left) - {""} or not set(right) - {""}:
                factor, form = (left, right) if not set(left) - {""} else (right, left)
                return add({}, form, factor.get("", 0)), kind
        elif node.op in ("/", "%"):
            form, divisor, kind = self.operands(node.left, node.right)
            if set(divisor) == {""}:
                quotient = self.quotient(form, divisor[""])
                return (quotient if node.op == "/" else self.remainder(form, divisor[""], quotient)), kind
        elif node.op in ("<<", ">>", "&"):
            (form, kind), right = self.typed(node.left), types.evaluate(node.right, self.lookup, self.typedefs)
            kind = types.promoted(kind)
            if right and node.op == "<<" and 0 <= right[0] < kind.bits - 1:
                return add({}, form, 2 ** right[0]), kind
            if right and node.op == ">>" and 0 <= right[0] < kind.bits - 1:
                return self.floor(self.settled(form, kind, node.left), 2 ** right[0]), kind
            if right and node.op == "&" and right[0] > 0 and right[0] & (right[0] + 1) == 0:  # the low bits, of any sign
                return self.modulo(form, right[0] + 1), types.common(kind, right[1])
        raise NotAffine(show(node))

    def operands(self, left: c_ast.Node, right: c_ast.Node) -> tuple[Linear, Linear, Integer]:
        """Both as values of their common type."""
        (first, a), (second, b) = self.typed(left), self.typed(right)
        kind = types.common(a, b)
        return (self.settled(self.converted(first, a, kind, left), kind, left),
                self.settled(self.converted(second, b, kind, right), kind, right), kind)

    def converted(self, form: Linear, kind: Integer, to: Integer, node: c_ast.Node) -> Linear:
        """What a conversion of the form to another type gives."""
        if to.holds(kind):
            return form if kind.signed or to.bits == kind.bits else self.settled(form, kind, node)
        if not to.signed:
            return form if kind.signed or to.bits <= kind.bits else self.settled(form, kind, node)
        if to.bits > kind.bits:
            return self.settled(form, kind, node)
        if not self.possible(self.outside(form, to)):
            return form
        if to.bits <= 16:
            return add(self.modulo(add(form, {"": -to.low}, 1), 2**to.bits), {"": to.low}, 1)
        self.refuse(node, f"value must be known to fit {to.text}, got {show(node)}")

    def settled(self, form: Linear, kind: Integer, node: c_ast.Node) -> Linear:
        """The value of a form of that type."""
        if kind.signed:
            return form
        if not set(form) - {""}:
            return {"": value} if (value := kind.wrapped(form.get("", 0))) else {}
        if len(form) == 1 and (symbol := self.known.get(next(iter(form)))) and form[symbol.key] == 1 and kind.holds(symbol.kind):
            return form
        if not self.possible(self.outside(form, kind)):
            return form
        size = 2**kind.bits
        if self.wrapping and kind.bits <= 16:
            return self.modulo(form, size)
        if self.wrapping and kind.bits == 32:
            pieces = [(shift, f"{-shift} <= {isl_text(form)} <= {size - 1 - shift}") for shift in (-size, 0, size)]
            if not self.possible(self.close("not (" + " or ".join(text for _, text in pieces) + ")", form)):
                return self.quantified(lambda q: " or ".join(
                    f"({text} and {q} = {isl_text(add(form, {'': shift}, 1))})" for shift, text in pieces), form)
        self.refuse(node, f"unsigned value must be known to lie between 0 and {kind.high}, got {show(node)}")

    def outside(self, form: Linear, kind: Integer) -> str:
        return self.close(f"{isl_text(form)} < {kind.low} or {isl_text(form)} > {kind.high}", form)

    def quotient(self, form: Linear, divisor: int) -> Linear:
        """C's division, which truncates towards zero."""
        if divisor < 0:
            return add({}, self.quotient(form, -divisor), -1)
        if not self.possible(self.compare(form, "<", {})):
            return self.floor(form, divisor)
        text, d = isl_text(form), divisor
        return self.quantified(lambda q: f"({text} >= 0 and {d}*{q} <= {text} and {text} <= {d}*{q} + {d - 1}) or "
                               f"({text} < 0 and {d}*{q} >= {text} and {text} >= {d}*{q} - {d - 1})", form)

    def remainder(self, form: Linear, divisor: int, quotient: Linear) -> Linear:
        if divisor > 0 and next(iter(quotient), "").startswith("floor"):
            return {f"(({isl_text(form)}) mod {divisor})": 1}
        return add(form, quotient, -divisor)

    def floor(self, form: Linear, divisor: int) -> Linear:
        if not any(name in self.terms for name in form):
            return {f"floor(({isl_text(form)})/{divisor})": 1}
        text = isl_text(form)
        return self.quantified(lambda q: f"{divisor}*{q} <= {text} and {text} <= {divisor}*{q} + {divisor - 1}", form)

    def modulo(self, form: Linear, divisor: int) -> Linear:
        if not any(name in self.terms for name in form):
            return {f"(({isl_text(form)}) mod {divisor})": 1}
        return add(form, self.floor(form, divisor), -divisor)

    def extreme(self, which: str, left: Linear, right: Linear) -> Linear:
        a, b = isl_text(left), isl_text(right)
        if not any(name in self.terms for name in (*left, *right)):
            return {f"{which}({a}, {b})": 1}
        return self.quantified(lambda q: f"({a} {'<=' if which == 'min' else '>='} {b} and {q} = {a}) or "
                               f"({a} {'>' if which == 'min' else '<'} {b} and {q} = {b})", left, right)

    def choice(self, node: c_ast.TernaryOp) -> tuple[Linear, Integer]:
        condition = self.condition(node.cond)
        left, right, kind = self.operands(node.iftrue, node.iffalse)
        if isinstance(node.cond, c_ast.BinaryOp) and node.cond.op in ("<", "<=", ">", ">="):
            sides, down = [show(node.cond.left), show(node.cond.right)], node.cond.op in ("<", "<=")
            if [show(node.iftrue), show(node.iffalse)] in (sides, sides[::-1]):
                smaller = down == (show(node.iftrue) == sides[0])
                return self.extreme("min" if smaller else "max", left, right), kind
        return self.quantified(lambda q: f"(({condition}) and {q} = {isl_text(left)}) or "
                               f"(not ({condition}) and {q} = {isl_text(right)})", left, right), kind

    # isl's text

    def quantified(self, definition: Callable[[str], str], *forms: Linear) -> Linear:
        """A new name for the only integer that satisfies the definition."""
        name = f"_q{len(self.terms)}"
        self.terms[name] = self.close(definition(name), *forms)
        return {name: 1}

    def close(self, text: str, *forms: Linear) -> str:
        """The condition with the quantified names of these forms bound."""
        for name in dict.fromkeys(name for form in forms for name in form if name in self.terms):
            text = f"(exists ({name} : ({self.terms[name]}) and ({text})))"
        return text

    def compare(self, left: Linear, op: str, right: Linear) -> str:
        return self.close(f"{isl_text(left)} {op} {isl_text(right)}", left, right)

    def mentions(self, names: Linear, name: str) -> bool:
        """Whether a term of the form, looked into, holds the name."""
        return any(name in re.findall(r"\w+", key) or key in self.terms and name in re.findall(r"\w+", self.terms[key])
                   for key in names if key != name)

    def condition(self, node: c_ast.Node) -> str:
        """An affine condition as isl text; raises NotAffine."""
        if isinstance(node, c_ast.BinaryOp) and node.op in ("&&", "||"):
            return f"(({self.condition(node.left)}) {'and' if node.op == '&&' else 'or'} ({self.condition(node.right)}))"
        if isinstance(node, c_ast.UnaryOp) and node.op == "!":
            return f"not ({self.condition(node.expr)})"
        if isinstance(node, c_ast.BinaryOp) and node.op in COMPARISONS:
            left, right, _ = self.operands(node.left, node.right)
            return self.compare(left, COMPARISONS[node.op], right)
        return self.compare(self.linear(node), "!=", {})

    def affine(self, node: c_ast.Node, what: str, form: Callable):
        try:
            return form(node)
        except NotAffine as error:
            got = show(node) if str(error) == show(node) else f"{error} in {show(node)}"
            self.refuse(node, f"{what} must be affine in loop iterators and parameters, got {got}")

    def possible(self, condition: str) -> bool:
        """Whether a statement at this place may see the condition hold."""
        names = [loop.name for loop in self.loops]
        parameters = {key: s.kind for key, s in self.known.items() if s.integer and not s.iterator and key not in names}
        ranges = [(key, kind) for key, kind in [*parameters.items(), *((loop.name, loop.kind) for loop in self.loops)]]
        facts = [f"{max(kind.low, -types.LONGEST)} <= {name} <= {min(kind.high, types.LONGEST)}" for name, kind in ranges]
        facts += [text for loop in self.loops for text in loop.conditions] + self.conditions + self.facts
        facts += [self.context] if self.context else []
        text = f"[{', '.join(parameters)}] -> {{ [{', '.join(names)}] : "
        return not isl.Set(text + " and ".join(f"({c})" for c in [*facts, condition]) + " }").is_empty()

    def refuse(self, node: c_ast.Node, sentence: str):
        line = f":{node.coord.line}" if getattr(node, "coord", None) and self.source != "<python>" else ""
        raise ScopError(f"{self.source}{line}: {sentence}")
