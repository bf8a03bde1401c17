"""C's integer types on machines of 64 bits: what a declaration names, usual conversions, constants with their types."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from pycparser import c_ast

# No array is longer and no loop ends later than this, so parameters of 64 bits are taken to lie within.
LONGEST = 2**48
WIDTHS = {"char": 8, "_Bool": 1, "short": 16, "int": 32, "long": 64}
NAMED = {"size_t": (64, False), "ssize_t": (64, True), "ptrdiff_t": (64, True), "intptr_t": (64, True), "uintptr_t": (64, False),
         "intmax_t": (64, True), "uintmax_t": (64, False), "off_t": (64, True), "uint": (32, False), "ulong": (64, False)}
FLOATING = {"float", "double", "_Float16", "_Float32", "_Float64", "__fp16", "float32_t", "float64_t"}


@dataclass(frozen=True)
class Integer:
    """An integer type; `text` is how C writes it."""

    bits: int
    signed: bool
    text: str

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        return 2 ** (self.bits - (1 if self.signed else 0)) - 1

    def wrapped(self, value: int) -> int:
        """What a conversion of the value to this type gives."""
        return int(bool(value)) if self.bits == 1 else (value - self.low) % 2**self.bits + self.low

    def holds(self, other: "Integer") -> bool:
        """Whether every value of the other type is one of this one."""
        return self.low <= other.low and other.high <= self.high


INT, UNSIGNED, LONG, UNSIGNED_LONG = (Integer(bits, signed, text) for bits, signed, text in (
    (32, True, "int"), (32, False, "unsigned int"), (64, True, "long"), (64, False, "unsigned long")))
Typedefs = dict[str, c_ast.Node]
Typed = tuple[int, Integer]


def integer(kind: c_ast.Node, typedefs: Typedefs) -> Integer | None:
    """The integer type of a declaration without arrays and pointers, or None where it is none."""
    while isinstance(kind, (c_ast.Typename, c_ast.TypeDecl)):
        kind = kind.type
    if not isinstance(kind, c_ast.IdentifierType):
        return None
    return _named(tuple(kind.names), typedefs)


def floating(kind: c_ast.Node, typedefs: Typedefs) -> bool:
    """Whether a declaration without arrays and pointers is of a floating type."""
    while isinstance(kind, (c_ast.Typename, c_ast.TypeDecl)):
        kind = kind.type
    names = base(tuple(getattr(kind, "names", ())), typedefs)
    return bool(FLOATING & set(names)) and "_Complex" not in names


def arithmetic(kind: c_ast.Node, typedefs: Typedefs) -> bool:
    """Whether a declaration without arrays and pointers is of a number, or of an enumeration that has a name."""
    for _ in range(20):
        while isinstance(kind, (c_ast.Typename, c_ast.TypeDecl)):
            kind = kind.type
        names = getattr(kind, "names", ())
        if len(names) != 1 or names[0] not in typedefs:
            break
        kind = typedefs[names[0]]
    return bool(names) and names[0] not in ("FILE", "va_list", "void") or isinstance(kind, c_ast.Enum) and kind.name is not None


def common(left: Integer, right: Integer) -> Integer:
    """The type in which C computes with both (usual arithmetic conversions)."""
    left, right = promoted(left), promoted(right)
    if left.signed == right.signed:
        return left if left.bits >= right.bits else right
    signed, unsigned = (left, right) if left.signed else (right, left)
    return unsigned if unsigned.bits >= signed.bits else signed


def promoted(kind: Integer) -> Integer:
    return INT if kind.bits < 32 else kind


def literal(text: str) -> Typed | None:
    """Value and type of an integer constant."""
    match = re.fullmatch(r"(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)([uUlL]*)", text)
    if not match:
        return None
    digits, suffix = match[1], match[2].lower()
    octal = re.fullmatch(r"0[0-7]+", digits)
    if not octal and re.fullmatch(r"0\d+", digits):
        return None
    value = int(digits, 8 if octal else 0)
    kinds = [kind for kind in (INT, UNSIGNED, LONG, UNSIGNED_LONG) if (kind.bits == 64 or "l" not in suffix)
             and (not kind.signed if "u" in suffix else kind.signed or digits[0] == "0")]
    return next(((value, kind) for kind in kinds if value <= kind.high), None)


def spelled(value: int, kind: Integer) -> str:
    """C text of a constant, with its type and safe beside any operator."""
    suffix = {INT: "", UNSIGNED: "u", LONG: "L", UNSIGNED_LONG: "uL"}.get(
        next((k for k in (INT, UNSIGNED, LONG, UNSIGNED_LONG) if (k.bits, k.signed) == (kind.bits, kind.signed)), kind))
    if suffix is None:
        return f"(({kind.text}) {value})" if value >= 0 else f"(({kind.text}) ({value}))"
    if value == kind.low < 0:
        return f"(-{-(value + 1)}{suffix} - 1)"
    return f"{value}{suffix}" if value >= 0 else f"(-{-value}{suffix})"


def evaluate(node: c_ast.Node, lookup: Callable[[str], Typed | None], typedefs: Typedefs) -> Typed | None:
    """Value and type of an integer constant expression as C has them; None where it is none or C leaves it undefined."""
    if isinstance(node, c_ast.Constant):
        if node.type == "char" and re.fullmatch(r"'[^\\']'", node.value):
            return ord(node.value[1]), INT
        return literal(node.value) if "int" in node.type else None
    if isinstance(node, c_ast.ID):
        return lookup(node.name)
    if isinstance(node, c_ast.Cast):
        kind, value = integer(node.to_type, typedefs), evaluate(node.expr, lookup, typedefs)
        plain = isinstance(node.to_type.type, c_ast.TypeDecl)
        return None if kind is None or value is None or not plain else (kind.wrapped(value[0]), kind)
    if isinstance(node, c_ast.TernaryOp):
        parts = [evaluate(part, lookup, typedefs) for part in (node.cond, node.iftrue, node.iffalse)]
        if None in parts:
            return None
        kind = common(parts[1][1], parts[2][1])
        return kind.wrapped(parts[1 if parts[0][0] else 2][0]), kind
    if isinstance(node, c_ast.UnaryOp) and node.op in ("-", "+", "!", "~"):
        operand = evaluate(node.expr, lookup, typedefs)
        if operand is None:
            return None
        value, kind = operand[0], promoted(operand[1])
        return (int(not value), INT) if node.op == "!" else _inside({"-": -value, "+": value, "~": ~value}[node.op], kind)
    if isinstance(node, c_ast.BinaryOp):
        left, right = evaluate(node.left, lookup, typedefs), evaluate(node.right, lookup, typedefs)
        return None if left is None or right is None else _binary(node.op, left, right)
    return None


def base(names: tuple[str, ...], typedefs: Typedefs) -> tuple[str, ...]:
    """The type behind typedefs of variables, as C writes it without any header; other names are left alone."""
    for _ in range(20):
        if len(names) != 1 or names[0] not in typedefs:
            break
        alias = typedefs[names[0]]
        while isinstance(alias, (c_ast.Typename, c_ast.TypeDecl)):
            alias = alias.type
        if not isinstance(alias, c_ast.IdentifierType):
            break
        names = tuple(alias.names)
    if len(names) == 1 and names[0] not in typedefs:
        match = re.fullmatch(r"(u?)int(?:_least)?(8|16|32|64)_t", names[0])
        bits, signed = (int(match[2]), not match[1]) if match else NAMED.get(names[0], (0, True))
        if bits:
            word = {8: "char", 16: "short", 32: "int", 64: "long"}[bits]
            return (("signed", word) if bits == 8 else (word,)) if signed else ("unsigned", word)
    return ("_Bool",) if names == ("bool",) and "bool" not in typedefs else names


def _named(names: tuple[str, ...], typedefs: Typedefs) -> Integer | None:
    names = base(names, typedefs)
    if names == ("char",):  # signed on some machines, unsigned on others
        return None
    words = [name for name in names if name not in ("signed", "unsigned", "__signed__")]
    if any(word not in WIDTHS for word in words) or not names:
        return None
    bits = 64 if "long" in words else min((WIDTHS[word] for word in words if word != "int"), default=32)
    return Integer(bits, "unsigned" not in names and bits != 1, " ".join(names))


def _binary(op: str, left: Typed, right: Typed) -> Typed | None:
    (a, a_kind), (b, b_kind) = left, right
    if op in ("&&", "||"):
        return int(bool(a and b) if op == "&&" else bool(a or b)), INT
    if op in ("<<", ">>"):
        kind = promoted(a_kind)
        return _inside(a << b if op == "<<" else a >> b, kind) if 0 <= b < kind.bits else None
    kind = common(a_kind, b_kind)
    a, b = kind.wrapped(a), kind.wrapped(b)
    if op in ("/", "%"):
        if not b:
            return None
        quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        return _inside(quotient if op == "/" else a - quotient * b, kind)
    compare = {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b, "==": a == b, "!=": a != b}
    if op in compare:
        return int(compare[op]), INT
    values = {"+": a + b, "-": a - b, "*": a * b, "&": a & b, "|": a | b, "^": a ^ b}
    return _inside(values[op], kind) if op in values else None


def _inside(value: int, kind: Integer) -> Typed | None:
    """Unsigned results wrap around; a signed one outside of its type is undefined."""
    return (value if kind.signed else kind.wrapped(value), kind) if not kind.signed or kind.low <= value <= kind.high else None
