"""The intermediate representation of a static control part (SCoP): statements, their iterations, what they read and write."""

import re
from dataclasses import dataclass, field

import islpy as isl

from ..errors import USER_ERROR, ActionableError


class ScopError(ActionableError, ValueError):
    """A program or description outside of what the scheduler handles; one sentence, with file and line where there is one."""

    exit_status = USER_ERROR


@dataclass(frozen=True)
class Access:
    """The elements of an array that a statement instance touches.

    Attributes:
        array: its name.
        relation: `{ S0[i, j] -> A[e0, e1] }`; a scalar is an array without dimensions: `{ S0[i] -> x[] }`. Restricted to the
            statement's domain. One instance may touch many elements (opaque statements).
        may: whether a write may leave elements of the relation as they were, so that it kills no earlier write.
    """

    array: str
    relation: isl.Map
    may: bool = False


@dataclass(frozen=True)
class Statement:
    """A statement with all its instances.

    Attributes:
        name, index: "S0", "S1" ... in text order; the tuples of domain and accesses carry the name.
        domain: `[n] -> { S0[i, j] : ... }`.
        iterators: names of the enclosing loops, outermost first.
        reads, writes: an instance performs all its reads before its writes.
        body: C text over iterators, parameters and arrays; every iterator is in parentheses, so that it may serve as the
            body of a macro.
        position: the original 2d+1 schedule: (0, "i", 1, "j", 0); "-i" for a loop that counts down.
        reduction: "+", "*", "max", "min" for x op= e where e does not use x, otherwise None. Such a statement's first read
            and its only write are x.
        line: of the source; 0 for statements built in Python.
    """

    name: str
    index: int
    domain: isl.Set
    iterators: tuple[str, ...]
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    body: str
    position: tuple[int | str, ...]
    reduction: str | None = None
    line: int = 0


@dataclass(frozen=True)
class Accumulation:
    """A statement `element op= value;` or `element = call(element, value);` in parts, for code that keeps it elsewhere."""

    element: str
    assign: str  # "+=", "-=" or "*="; "" with a call
    value: str
    call: str = ""  # fmax, fmaxf, fmin or fminf

    @property
    def operator(self) -> str:
        """As OpenMP has it: "+", "*", "max" or "min"."""
        return self.call[1:4] if self.call else "*" if self.assign == "*=" else "+"

    @property
    def start(self) -> str:
        """The value of a part that holds nothing yet."""
        return {"+": "0", "*": "1", "max": "-__builtin_inf()", "min": "__builtin_inf()"}[self.operator]

    def update(self, part: str) -> str:
        """The statement with a part in the place of the element."""
        return f"{part} = {self.call}({part}, {self.value});" if self.call else f"{part} {self.assign} {self.value};"

    def join(self, element: str, part: str) -> str:
        """The statement by which an element takes in a part."""
        return f"{element} = {self.call}({element}, {part});" if self.call else f"{element} {self.operator}= {part};"


def accumulation(statement: Statement) -> Accumulation | None:
    """The parts of an update of a sum, a product, a maximum or a minimum; None for other statements and ways to write it."""
    body, parts = " ".join(statement.body.split()), None
    if found := re.fullmatch(r"([^=]*?) ([-+*]=)(?!=) (.*);", body):
        parts = Accumulation(*found.groups())
    elif found := re.fullmatch(r"([^=]*?) = (fmaxf?|fminf?)\((.*)\);", body):
        element, call, arguments = found.groups()
        for value in (arguments.removeprefix(f"{element}, "), arguments.removesuffix(f", {element}")):
            if value != arguments:
                parts = Accumulation(element, "", value, call)
    return parts if parts and parts.operator == statement.reduction else None


@dataclass(frozen=True)
class Array:
    """An array or scalar.

    Attributes:
        shape: extents as C expressions over the parameters, "" for one that is not known (the first, behind a pointer); () for
            a scalar.
        ctype: element type, such as "double".
        live_out: whether its final contents matter after the scop.
        local: whether it is declared inside the scop, so that generated code has to declare it.
    """

    name: str
    shape: tuple[str, ...]
    ctype: str
    live_out: bool
    local: bool = False

    @property
    def sized(self) -> bool:
        """Whether another array of this size can be made."""
        return all(self.shape)


@dataclass(frozen=True)
class Scop:
    """A static control part.

    Attributes:
        context: what is known of the parameters: `[n] -> { : n >= 1 }`.
        arrays: every array and scalar that statements touch, in order of declaration.
        source: path or "<python>".
        function: the C function it stands in; "" without one.
        arguments: the parameters of that function in order: sizes and coefficients (shape ()) and arrays.
        region: its lines in the source, from `#pragma scop` to `#pragma endscop`, both included; (0, 0) without one.
        start: the line on which the definition of that function begins; 0 where it does not begin a line, or is unknown.
        types: the C type of each parameter.
        tail: statements that leave behind the last values of iterators that are read after the loops.
        aliases: C's names of parameters, arrays and arguments that have other names here, as isl does not read C's.
        fields: what in C leads to parameters and arrays that are fields of structs: "s.a", "p->a", or "p[].a" where the
            first subscripts are inside of it.
    """

    name: str
    parameters: tuple[str, ...]
    context: isl.Set
    arrays: dict[str, Array]
    statements: tuple[Statement, ...]
    source: str
    function: str = ""
    arguments: tuple[Array, ...] = ()
    region: tuple[int, int] = (0, 0)
    start: int = 0
    types: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    tail: tuple[str, ...] = ()
    fields: dict[str, str] = field(default_factory=dict)

    def domain(self) -> isl.UnionSet:
        """All statement instances."""
        domain = isl.UnionSet.empty(self.context.get_space())
        for statement in self.statements:
            domain = domain.union(isl.UnionSet.from_set(statement.domain))
        return domain

    def original(self) -> isl.UnionMap:
        """The order of the source: every instance to a point of one unnamed space, 2d+1 dimensions, padded with zeros."""
        length = max((len(statement.position) for statement in self.statements), default=0)
        schedule = isl.UnionMap.empty(self.context.get_space())
        for statement in self.statements:
            schedule = schedule.union(isl.UnionMap.from_map(
                statement_schedule(statement, length).intersect_domain(statement.domain)))
        return schedule

    def statement(self, name: str) -> Statement:
        """The statement of that name."""
        return next(statement for statement in self.statements if statement.name == name)


def statement_schedule(statement: Statement, length: int) -> isl.Map:
    """The original schedule of one statement, padded with zeros to `length` dimensions, on all integers."""
    entries = [str(entry) for entry in statement.position]
    entries += ["0"] * (length - len(entries))
    text = f"{{ {statement.name}[{', '.join(statement.iterators)}] -> [{', '.join(entries)}] }}"
    return isl.Map(text)
