"""Scheduling strategies as data: YAML files, checked key by key, every mistake with its file and line."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import yaml

COST_FUNCTIONS = ("proximity", "feautrier", "contiguity", "contiguous_last", "big_loops_first")
DIRECTIVES = ("vectorize", "parallel", "sequential")
HEURISTICS = ("max", "dimensionality", "parallelism", "none")
STRATEGIES = Path(__file__).parent / "strategies"


class ConfigError(ValueError):
    """A strategy that is malformed, contradictory, or impossible for the program at hand; one sentence."""


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


@dataclass(frozen=True)
class Fusion:
    """Groups of statements, by index, executed one after the other from a dimension on; or every component on its own."""

    total_distribution: bool = False
    stmts_fusion: tuple[tuple[int, ...], ...] = ()
    where: str = ""


@dataclass(frozen=True)
class Directive:
    """vectorize: the iterator is the innermost loop and carries nothing. parallel: it is the outermost loop and carries
    nothing. sequential: the loop over it is never marked parallel."""

    type: str
    stmts: tuple[int, ...]
    iterator: int
    where: str = ""


@dataclass(frozen=True)
class Tiling:
    """Tiling of permutable bands.

    Attributes:
        sizes: of the band's loops, outermost first; the last one repeats. () does not tile; 0 or 1 leaves a loop untiled.
        minimum_depth: bands with fewer loops stay untiled.
        wavefront: make tile loops parallel by skewing the outermost when none is parallel.
        unroll_jam: size of the register tiles of innermost bands, along the two loops around the innermost; 0 for none.
    """

    sizes: tuple[int, ...] = ()
    minimum_depth: int = 2
    wavefront: bool = False
    unroll_jam: int = 0


@dataclass(frozen=True)
class Config:
    """A scheduling strategy.

    Attributes:
        dimensions, custom_constraints, fusion: by scheduling dimension; the key None is the default.
        fusion_heuristic: what is fused where `fusion` says nothing. "max": everything that can be. "dimensionality": strongly
            connected components of equal depth. "parallelism": what costs no component parallel loops. "none": nothing.
        negative_coefficients: let rows reverse loops and skew both ways.
        parametric_shift: let rows contain parameters.
        relax_reductions: let the updates x op= e of one statement run in any order, which reassociates op.
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

    def dimension(self, number: int) -> Dimension:
        return self.dimensions.get(number, self.dimensions.get(None, Dimension()))

    def constraints(self, number: int) -> tuple[Constraint, ...]:
        return self.custom_constraints.get(number, self.custom_constraints.get(None, ()))

    def fusion_at(self, number: int) -> Fusion:
        return self.fusion.get(number, self.fusion.get(None, Fusion()))


def shipped() -> tuple[str, ...]:
    """Names of the strategies that come with the package."""
    return tuple(sorted(path.stem for path in STRATEGIES.glob("*.yaml")))


def load(path_or_name: str | Path) -> Config:
    """The strategy of that shipped name, or of that YAML file.

    Raises:
        ConfigError: no such strategy, or a mistake in the file.
    """
    path = Path(path_or_name)
    if path.suffix not in (".yaml", ".yml"):
        if str(path_or_name) not in shipped():
            raise ConfigError(f"strategy must be one of {', '.join(shipped())} or a .yaml file, got {str(path_or_name)!r}")
        path = STRATEGIES / f"{path_or_name}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"strategy file must be readable, got {path}: {error}") from error
    return parse(text, str(path), path.stem)


def parse(text: str, source: str = "<string>", name: str = "custom") -> Config:
    """The strategy written in a YAML text."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{source}:{line}: file must be YAML, got: {problem}") from error
    reader = _Reader(source)
    return reader.config(root, name) if root is not None else Config(name, source)


class _Reader:
    """Reads YAML nodes of one file; `self.source` goes into every message."""

    def __init__(self, source: str):
        self.source = source
        self.variables: tuple[str, ...] = ()

    def config(self, root: yaml.Node, name: str) -> Config:
        readers = {
            "scheduling_strategy": self.strategy,
            "fusion_heuristic": self.one_of(HEURISTICS),
            "negative_coefficients": self.boolean,
            "parametric_shift": self.boolean,
            "relax_reductions": self.boolean,
            "privatisation": self.boolean,
            "code_sinking": self.boolean,
            "constant_to_parameter": self.integer(0, 10**9),
            "auto_vectorisation": self.boolean,
            "sink_vector_loop": self.integer(0, 10**6),
            "tiling": self.tiling,
            "parallel_work": self.integer(0, 100),
            "coefficient_bound": self.integer(1, 100),
            "time_limit": self.number,
        }
        values = self.mapping(root, "file", readers)
        return Config(name=name, source=self.source, **values.pop("scheduling_strategy", {}), **values)

    def strategy(self, node: yaml.Node, what: str) -> dict:
        pairs = self.pairs(node, what)
        if "new_variables" in pairs:
            self.variables = self.list_of(self.variable)(pairs["new_variables"][1], "new_variables")
            if len(set(self.variables)) < len(self.variables):
                self.fail(pairs["new_variables"][1], f"new_variables must differ, got {', '.join(self.variables)}")
        readers = {
            "new_variables": lambda node, what: self.variables,
            "ILP_construction": self.by_dimension(self.construction),
            "custom_constraints": self.by_dimension(self.custom),
            "fusion": self.by_dimension(self.fusion),
            "directives": self.list_of(self.directive),
        }
        values = self.mapping(node, what, readers)
        if "ILP_construction" in values:
            values["dimensions"] = values.pop("ILP_construction")
            values["dimensions"].setdefault(None, Dimension())
        return values

    def construction(self, node: yaml.Node, pairs: dict) -> Dimension:
        allowed = ("cost_functions", "constraints", "require_parallel", "starts_band", "otherwise")
        self.only(pairs, allowed, "ILP_construction")
        values: dict = {}
        if "cost_functions" in pairs:
            choice = self.one_of((*COST_FUNCTIONS, *self.variables))
            values["cost_functions"] = self.list_of(choice)(pairs["cost_functions"][1], "cost_functions")
        if "constraints" in pairs:
            texts = self.list_of(self.constraint)(pairs["constraints"][1], "constraints")
            values["no_skewing"] = "no_skewing" in texts
            values["constraints"] = tuple(item for item in texts if item != "no_skewing")
        if "require_parallel" in pairs:
            node = pairs["require_parallel"][1]
            named = _text(node) == "outermost"
            values["require_parallel"] = "outermost" if named else self.boolean(node, "require_parallel", ", or outermost")
        if "starts_band" in pairs:
            values["starts_band"] = self.boolean(pairs["starts_band"][1], "starts_band")
        if "otherwise" in pairs:
            inner = pairs["otherwise"][1]
            values["otherwise"] = self.construction(inner, self.pairs(inner, "otherwise"))
        return Dimension(**values)

    def custom(self, node: yaml.Node, pairs: dict) -> tuple[Constraint, ...]:
        self.only(pairs, ("constraints",), "custom_constraints")
        self.needs(node, pairs, ("constraints",), "custom_constraints")
        texts = self.list_of(self.constraint)(pairs["constraints"][1], "constraints")
        if "no_skewing" in texts:
            self.fail(pairs["constraints"][1], "no_skewing must stand under ILP_construction, got it under custom_constraints")
        return texts

    def fusion(self, node: yaml.Node, pairs: dict) -> Fusion:
        self.only(pairs, ("total_distribution", "stmts_fusion"), "fusion")
        distribution = "total_distribution" in pairs and self.boolean(pairs["total_distribution"][1], "total_distribution")
        groups = ()
        if "stmts_fusion" in pairs:
            groups = self.list_of(self.list_of(self.integer(0, 10**6)))(pairs["stmts_fusion"][1], "stmts_fusion")
            flat = [statement for group in groups for statement in group]
            if len(set(flat)) < len(flat):
                self.fail(
                    pairs["stmts_fusion"][1], f"stmts_fusion must name every statement once, got {[list(g) for g in groups]}"
                )
        if distribution and groups:
            self.fail(node, "fusion must have total_distribution or stmts_fusion, got both")
        return Fusion(distribution, groups, self.where(node))

    def directive(self, node: yaml.Node, what: str) -> Directive:
        readers = {
            "type": self.one_of(DIRECTIVES),
            "stmts": self.list_of(self.integer(0, 10**6)),
            "iterator": self.integer(0, 100),
        }
        self.needs(node, self.pairs(node, "directives"), tuple(readers), "directives")
        return Directive(**self.mapping(node, "directives", readers), where=self.where(node))

    def tiling(self, node: yaml.Node, what: str) -> Tiling:
        readers = {
            "sizes": self.list_of(self.integer(0, 10**6)),
            "minimum_depth": self.integer(1, 100),
            "wavefront": self.boolean,
            "unroll_jam": self.integer(0, 64),
        }
        return Tiling(**self.mapping(node, "tiling", readers))

    def by_dimension(self, read: Callable):
        """Reader of a list of mappings that each have a scheduling_dimension: default, 0, 1 ..."""

        def result(node: yaml.Node, what: str) -> dict:
            found: dict = {}
            for item in self.items(node, what):
                pairs = self.pairs(item, what)
                self.needs(item, pairs, ("scheduling_dimension",), what)
                key = pairs.pop("scheduling_dimension")[1]
                number = None if getattr(key, "value", None) == "default" else self.dimension_number(key)
                if number in found:
                    self.fail(key, f"{what} must have one entry per scheduling_dimension, got {key.value} twice")
                found[number] = read(item, pairs)
            return found

        return result

    def dimension_number(self, node: yaml.Node) -> int:
        value = yaml.safe_load(node.value) if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.fail(node, f"scheduling_dimension must be default, 0, 1, 2 ..., got {_text(node)}")
        return value

    def constraint(self, node: yaml.Node, what: str) -> Constraint | str:
        if _text(node) == "no_skewing":
            return "no_skewing"
        text = _text(node)
        try:
            return parse_constraint(text, self.variables, self.where(node))
        except ValueError as error:
            self.fail(node, str(error))

    # ------------------------------------------------------------------------------------------------------------- plain values

    def mapping(self, node: yaml.Node, what: str, readers: dict[str, Callable]) -> dict:
        pairs = self.pairs(node, what)
        self.only(pairs, tuple(readers), what)
        return {key: readers[key](value, key) for key, (_, value) in pairs.items()}

    def pairs(self, node: yaml.Node, what: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, f"{what} must be a mapping, got {_text(node)}")
        found: dict = {}
        for key, value in node.value:
            if key.value in found:
                self.fail(key, f"{what} must have each key once, got {key.value!r} twice")
            found[key.value] = (key, value)
        return found

    def only(self, pairs: dict, allowed: tuple[str, ...], what: str) -> None:
        for name, (key, _) in pairs.items():
            if name not in allowed:
                self.fail(key, f"key of {what} must be one of {', '.join(allowed)}, got {name!r}")

    def needs(self, node: yaml.Node, pairs: dict, names: tuple[str, ...], what: str) -> None:
        for name in names:
            if name not in pairs:
                self.fail(node, f"entry of {what} must have the key {name!r}, got {', '.join(pairs) or 'none'}")

    def items(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            self.fail(node, f"{what} must be a list, got {_text(node)}")
        return node.value

    def list_of(self, read: Callable):
        return lambda node, what: tuple(read(item, what) for item in self.items(node, what))

    def one_of(self, allowed: tuple[str, ...]):
        def result(node: yaml.Node, what: str) -> str:
            if _text(node) not in allowed:
                self.fail(node, f"{what} must be one of {', '.join(allowed)}, got {_text(node)!r}")
            return node.value

        return result

    def boolean(self, node: yaml.Node, what: str, also: str = "") -> bool:
        value = yaml.safe_load(node.value) if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(value, bool):
            self.fail(node, f"{what} must be true or false{also}, got {_text(node)!r}")
        return value

    def integer(self, low: int, high: int):
        def result(node: yaml.Node, what: str) -> int:
            value = yaml.safe_load(node.value) if isinstance(node, yaml.ScalarNode) else None
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                self.fail(node, f"{what} must be an integer from {low} to {high}, got {_text(node)!r}")
            return value

        return result

    def number(self, node: yaml.Node, what: str) -> float:
        value = yaml.safe_load(node.value) if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            self.fail(node, f"{what} must be a positive number, got {_text(node)!r}")
        return float(value)

    def variable(self, node: yaml.Node, what: str) -> str:
        text = _text(node)
        if not re.fullmatch(r"[A-Za-z_]\w*", text) or _COEFFICIENT.fullmatch(text) or text in COST_FUNCTIONS:
            self.fail(node, f"{what} must be names other than coefficients and cost functions, got {text!r}")
        return text

    def where(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}: "

    def fail(self, node: yaml.Node, message: str):
        raise ConfigError(self.where(node) + message)


def _text(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return node.value
    return "a mapping" if isinstance(node, yaml.MappingNode) else "a list"


_COEFFICIENT = re.compile(r"S(\d+|i)_(it|par)_(\d+|i)|S(\d+|i)_cst(_0)?")
_TERM = re.compile(r"\s*([+-])?\s*(?:(\d+)\s*\*?\s*)?([A-Za-z_]\w*)?\s*")


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
            elif _COEFFICIENT.fullmatch(match[3]) or match[3] in variables:
                terms[match[3]] = terms.get(match[3], 0) + factor
            else:
                allowed = ", ".join(("S0_it_0", "S0_par_0", "S0_cst", *variables))
                raise ValueError(f"constraint names must be like {allowed}, got {match[3]!r} in {text!r}")
            place = match.end()
    relation = "=" if sides[1] == "==" else sides[1]
    return Constraint(text, where, tuple((factor, name) for name, factor in terms.items()), constant, relation)


def with_options(config: Config, **changes) -> Config:
    """The configuration with some options replaced, such as tiling=Tiling((64,))."""
    known = {item.name for item in fields(Config)}
    for key in changes:
        if key not in known:
            raise ConfigError(f"option must be one of {', '.join(sorted(known))}, got {key!r}")
    return replace(config, **changes)
