"""A scheduling strategy as data. Whoever makes it, every part of it refuses values that it cannot have."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import ClassVar

from ..errors import USER_ERROR, ActionableError

COST_FUNCTIONS = ("proximity", "feautrier", "contiguity", "contiguous_last", "big_loops_first")
DIRECTIVES = ("vectorize", "parallel", "sequential")
HEURISTICS = ("max", "dimensionality", "parallelism", "none")
COEFFICIENT = re.compile(r"S(\d+|i)_(it|par)_(\d+|i)|S(\d+|i)_cst(_0)?")
_TERM = re.compile(r"\s*([+-])?\s*(?:(\d+)\s*\*?\s*)?([A-Za-z_]\w*)?\s*")


class ConfigError(ActionableError, ValueError):
    """A strategy that is malformed, contradictory, or impossible for the program at hand; one sentence."""

    exit_status = USER_ERROR


@dataclass(frozen=True)
class Rule:
    """What a value must be: the end of the sentence `<name> must ...`, and the test."""

    must: str
    holds: Callable[[object], bool]

    def check(self, name: str, value: object, where: str = "") -> None:
        if not self.holds(value):
            raise ConfigError(f"{where}{name} must {self.must}, got {value!r}")


def integer(low: int, high: int) -> Rule:
    return Rule(
        f"be an integer from {low} to {high}",
        lambda value: isinstance(value, Integral) and not isinstance(value, bool) and low <= value <= high,
    )


def one_of(names: tuple[str, ...]) -> Rule:
    return Rule(f"be one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def made_of(kind: type) -> Rule:
    return Rule(f"be a {kind.__name__}", lambda value: isinstance(value, kind))


BOOLEAN = Rule("be true or false", lambda value: isinstance(value, bool))
PARALLEL = Rule("be true or false, or outermost", lambda value: isinstance(value, bool) or value == "outermost")
POSITIVE = Rule(
    "be a positive number",
    lambda value: isinstance(value, Real) and not isinstance(value, bool) and 0 < value < float("inf"),
)
STATEMENT = integer(0, 10**6)
GROUP = Rule("be a list of lists", lambda value: isinstance(value, list | tuple))
TEXT = Rule("be a text", lambda value: isinstance(value, str))
VARIABLE = Rule(
    "be names other than coefficients and cost functions",
    lambda value: isinstance(value, str)
    and re.fullmatch(r"[A-Za-z_]\w*", value) is not None
    and not COEFFICIENT.fullmatch(value)
    and value not in COST_FUNCTIONS,
)
NUMBER = Rule("have keys None, 0, 1, 2 ...", lambda value: value is None or integer(0, 10**9).holds(value))


def listed(name: str, values: object, rule: Rule, where: str = "") -> tuple:
    """The values as a tuple, each of them checked."""
    if not isinstance(values, list | tuple):
        raise ConfigError(f"{where}{name} must be a list, got {values!r}")
    for value in values:
        rule.check(name, value, where)
    return tuple(values)


def by_dimension(name: str, values: object) -> dict:
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must map scheduling dimensions to what holds there, got {values!r}")
    for key in values:
        NUMBER.check(name, key)
    return values


_set = object.__setattr__  # of a frozen dataclass that is still being made


@dataclass(frozen=True)
class Constraint:
    """`sum of factor * variable + constant  (>= | <= | =)  0` on the coefficients of a scheduling row.

    Attributes:
        text, where: as written, and "file:line: ".
        terms: (factor, name) with names like "S0_it_1", "Si_cst", "S2_par_i" or a user variable.
        relation: ">=", "<=" or "=".
    """

    text: str
    where: str
    terms: tuple[tuple[int, str], ...]
    constant: int
    relation: str

    def __post_init__(self):
        for name, rule in (("relation", one_of((">=", "<=", "="))), ("constant", integer(-(10**9), 10**9)), ("text", TEXT)):
            rule.check(f"{name} of a constraint", getattr(self, name), self.where)
        for factor, name in self.terms:
            integer(-(10**9), 10**9).check("factor of a constraint", factor, self.where)
            TEXT.check("name in a constraint", name, self.where)


@dataclass(frozen=True)
class Dimension:
    """How one scheduling dimension is built.

    Attributes:
        cost_functions: names of COST_FUNCTIONS or user variables, minimised in lexicographic order.
        constraints: on this dimension only.
        no_skewing: at most one iterator, with coefficient one, per statement.
        require_parallel: the row must be zero on every active dependence; "outermost" asks for that only until one is.
        starts_band: only for the first row of a band; later rows end the band rather than try this.
        otherwise: what to try when no such row exists.
    """

    cost_functions: tuple[str, ...] = ("proximity",)
    constraints: tuple[Constraint, ...] = ()
    no_skewing: bool = False
    require_parallel: bool | str = False
    starts_band: bool = False
    otherwise: "Dimension | None" = None

    RULES: ClassVar = {"no_skewing": BOOLEAN, "require_parallel": PARALLEL, "starts_band": BOOLEAN}

    def __post_init__(self):
        for name, rule in self.RULES.items():
            rule.check(name, getattr(self, name))
        _set(self, "cost_functions", listed("cost_functions", self.cost_functions, TEXT))
        _set(self, "constraints", listed("constraints", self.constraints, made_of(Constraint)))
        if self.otherwise is not None:
            made_of(Dimension).check("otherwise", self.otherwise)


@dataclass(frozen=True)
class Fusion:
    """Groups of statements, by index, executed one after the other from a dimension on; or every component on its own."""

    total_distribution: bool = False
    stmts_fusion: tuple[tuple[int, ...], ...] = ()
    where: str = ""

    def __post_init__(self):
        BOOLEAN.check("total_distribution", self.total_distribution, self.where)
        groups = listed("stmts_fusion", self.stmts_fusion, GROUP, self.where)
        groups = tuple(listed("stmts_fusion", group, STATEMENT, self.where) for group in groups)
        flat = [statement for group in groups for statement in group]
        if len(set(flat)) < len(flat):
            raise ConfigError(f"{self.where}stmts_fusion must name every statement once, got {[list(g) for g in groups]}")
        if self.total_distribution and groups:
            raise ConfigError(f"{self.where}fusion must have total_distribution or stmts_fusion, got both")
        _set(self, "stmts_fusion", groups)


@dataclass(frozen=True)
class Directive:
    """vectorize: the iterator is the innermost loop and carries nothing. parallel: it is the outermost loop and carries
    nothing. sequential: the loop over it is never marked parallel."""

    type: str
    stmts: tuple[int, ...]
    iterator: int
    where: str = ""

    RULES: ClassVar = {"type": one_of(DIRECTIVES), "iterator": integer(0, 100)}

    def __post_init__(self):
        for name, rule in self.RULES.items():
            rule.check(name, getattr(self, name), self.where)
        _set(self, "stmts", listed("stmts", self.stmts, STATEMENT, self.where))


@dataclass(frozen=True)
class Tiling:
    """Tiling of permutable bands.

    Attributes:
        sizes: of the band's loops, outermost first; the last one repeats. () does not tile; 0 or 1 leaves a loop untiled.
        minimum_depth: bands with fewer loops stay untiled.
        wavefront: make tile loops parallel by skewing the outermost when none is parallel.
        unroll_jam: size of the register tiles of innermost bands, along those of the two loops around the innermost that save
            loads or break a chain of dependences; 0 for none.
        distribute: run the statements of skewed tiles one after the other inside of the outer point loops, where that is legal
            and gives them vector loops.
    """

    sizes: tuple[int, ...] = ()
    minimum_depth: int = 2
    wavefront: bool = False
    unroll_jam: int = 0
    distribute: bool = True

    RULES: ClassVar = {
        "minimum_depth": integer(1, 100), "wavefront": BOOLEAN, "unroll_jam": integer(0, 64), "distribute": BOOLEAN,
    }  # fmt: skip
    SIZE: ClassVar = integer(0, 10**6)

    def __post_init__(self):
        for name, rule in self.RULES.items():
            rule.check(name, getattr(self, name))
        _set(self, "sizes", listed("sizes", self.sizes, self.SIZE))


@dataclass(frozen=True)
class Config:
    """A scheduling strategy.

    Attributes:
        dimensions, custom_constraints, fusion: by scheduling dimension; the key None is the default.
        fusion_heuristic: what is fused where `fusion` says nothing. "max": everything that can be. "dimensionality": strongly
            connected components of equal depth. "parallelism": what costs no component parallel loops. "none": nothing.
        negative_coefficients: let rows reverse loops and skew both ways.
        parametric_shift: let rows contain parameters.
        relax_reductions: let the updates x op= e of one statement run in any order, and sums, products, maxima and minima of one
            element in parallel or in SIMD lanes, which reassociates op.
        privatisation: let rows that require_parallel be sequential for the storage, not the values, of temporaries.
        code_sinking: let a statement whose own loops are all found share further loops of deeper statements; otherwise the band
            ends there and the statement goes before or after those loops.
        constant_to_parameter: constants of at least this size act as parameters; 0 for never.
        auto_vectorisation: move a parallel contiguous loop of a permutable band innermost and mark it, and another parallel
            loop outermost.
        sink_vector_loop: move a parallel contiguous loop that statements of unequal depth share below all other loops, into each
            statement; chunks of that many iterations stay where it was. 0 for never.
        parallel_work: loops a parallel region must contain where it is entered once per iteration of an outer loop.
        coefficient_bound: largest absolute value of an iterator's coefficient.
        time_limit: seconds for the solver, per dimension.
        callback: asked for every attempt at a dimension, see solve.problem.Attempt; overrides `dimensions`.
    """

    name: str = "custom"
    source: str = "<python>"
    new_variables: tuple[str, ...] = ()
    dimensions: dict[int | None, Dimension] = field(default_factory=lambda: {None: Dimension()})
    custom_constraints: dict[int | None, tuple[Constraint, ...]] = field(default_factory=dict)
    fusion: dict[int | None, Fusion] = field(default_factory=dict)
    fusion_heuristic: str = "max"
    directives: tuple[Directive, ...] = ()
    negative_coefficients: bool = False
    parametric_shift: bool = False
    relax_reductions: bool = False
    privatisation: bool = False
    code_sinking: bool = True
    constant_to_parameter: int = 0
    auto_vectorisation: bool = False
    sink_vector_loop: int = 0
    tiling: Tiling = Tiling()
    parallel_work: int = 2
    coefficient_bound: int = 4
    time_limit: float = 10.0
    callback: Callable | None = None

    RULES: ClassVar = {
        "fusion_heuristic": one_of(HEURISTICS),
        "negative_coefficients": BOOLEAN,
        "parametric_shift": BOOLEAN,
        "relax_reductions": BOOLEAN,
        "privatisation": BOOLEAN,
        "code_sinking": BOOLEAN,
        "constant_to_parameter": integer(0, 10**9),
        "auto_vectorisation": BOOLEAN,
        "sink_vector_loop": integer(0, 10**6),
        "parallel_work": integer(0, 100),
        "coefficient_bound": integer(1, 100),
        "time_limit": POSITIVE,
    }

    def __post_init__(self):
        for name, rule in self.RULES.items():
            rule.check(name, getattr(self, name))
        TEXT.check("name", self.name)
        made_of(Tiling).check("tiling", self.tiling)
        _set(self, "new_variables", listed("new_variables", self.new_variables, VARIABLE))
        if len(set(self.new_variables)) < len(self.new_variables):
            raise ConfigError(f"new_variables must differ, got {', '.join(self.new_variables)}")
        _set(self, "directives", listed("directives", self.directives, made_of(Directive)))
        for dimension in by_dimension("dimensions", self.dimensions).values():
            self.check(dimension)
        for constraints in by_dimension("custom_constraints", self.custom_constraints).values():
            self._check_names(listed("custom_constraints", constraints, made_of(Constraint)))
        for fusion in by_dimension("fusion", self.fusion).values():
            made_of(Fusion).check("fusion", fusion)
        if self.callback is not None and not callable(self.callback):
            raise ConfigError(f"callback must be a function, got {self.callback!r}")

    def check(self, dimension: object) -> None:
        """Raises ConfigError for what is no Dimension of this strategy: it may name other costs and variables."""
        made_of(Dimension).check("dimension", dimension)
        for name in dimension.cost_functions:
            one_of((*COST_FUNCTIONS, *self.new_variables)).check("cost_functions", name)
        self._check_names(dimension.constraints)
        if dimension.otherwise is not None:
            self.check(dimension.otherwise)

    def _check_names(self, constraints: tuple[Constraint, ...]) -> None:
        for constraint in constraints:
            for _, name in constraint.terms:
                if not COEFFICIENT.fullmatch(name) and name not in self.new_variables:
                    raise ConfigError(
                        f"{constraint.where}names in a constraint must be coefficients or new_variables, got {name!r}"
                    )

    def dimension(self, number: int) -> Dimension:
        return self.dimensions.get(number, self.dimensions.get(None, Dimension()))

    def constraints(self, number: int) -> tuple[Constraint, ...]:
        return self.custom_constraints.get(number, self.custom_constraints.get(None, ()))

    def fusion_at(self, number: int) -> Fusion:
        return self.fusion.get(number, self.fusion.get(None, Fusion()))


def parse_constraint(text: str, variables: tuple[str, ...] = (), where: str = "") -> Constraint:
    """The constraint of a text like "2*S0_it_1 + S1_cst - x >= 1".

    `S<statement>_it_<iterator>`, `S<statement>_par_<parameter>` and `S<statement>_cst` are the coefficients of the row. The
    statement `i` stands for one constraint per statement, the iterator or parameter `i` for the sum over all of them.

    Raises:
        ValueError: malformed, or a name that is neither a coefficient nor a user variable.
    """
    sides = re.split(r"(>=|<=|==|=)", text)
    if len(sides) != 3:
        raise ValueError(f"constraint must have the form 'sum >= sum', '<=' or '=', got {text!r}")
    terms: dict[str, int] = {}
    constant = 0
    for side, sign in ((sides[0], 1), (sides[2], -1)):
        place = 0
        if not side.strip():
            raise ValueError(f"constraint must have two sides, got {text!r}")
        while place < len(side):
            match = _TERM.match(side, place)
            if not match or not (match[2] or match[3]) or (place and not match[1]):
                raise ValueError(f"constraint must be a sum of integers, coefficients and variables, got {text!r}")
            factor = sign * (-1 if match[1] == "-" else 1) * int(match[2] or 1)
            if match[3] is None:
                constant += factor
            elif COEFFICIENT.fullmatch(match[3]) or match[3] in variables:
                terms[match[3]] = terms.get(match[3], 0) + factor
            else:
                allowed = ", ".join(("S0_it_0", "S0_par_0", "S0_cst", *variables))
                raise ValueError(f"constraint names must be like {allowed}, got {match[3]!r} in {text!r}")
            place = match.end()
    relation = "=" if sides[1] == "==" else sides[1]
    return Constraint(text, where, tuple((factor, name) for name, factor in terms.items()), constant, relation)
