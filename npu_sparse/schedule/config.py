"""Strategies as YAML files, read key by key: every mistake with its file and line. strategy.py has the data."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import yaml

from npu_sparse.boundary import reading
from npu_sparse.schedule.strategy import (
    BOOLEAN,
    COST_FUNCTIONS,
    DIRECTIVES,
    HEURISTICS,
    STATEMENT,
    VARIABLE,
    Config,
    ConfigError,
    Constraint,
    Dimension,
    Directive,
    Fusion,
    Rule,
    Tiling,
    one_of,
    parse_constraint,
)

__all__ = [
    "COST_FUNCTIONS", "DIRECTIVES", "HEURISTICS", "Config", "ConfigError", "Constraint", "Dimension", "Directive", "Fusion",
    "Tiling", "load", "parse", "parse_constraint", "shipped", "with_options",
]  # fmt: skip
STRATEGIES = Path(__file__).parent / "strategies"
_LONGEST = 600  # characters of a sentence: more is what the file says, quoted


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
    with reading(source, ConfigError, "the strategy"):
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = mark.line + 1 if mark else 1
            problem = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise ConfigError(f"{source}:{line}: file must be YAML, got: {problem}") from error
        return _Reader(source).config(root, name) if root is not None else Config(name, source)


class _Reader:
    """Reads YAML nodes of one file; `self.source` goes into every message."""

    def __init__(self, source: str):
        self.source = source
        self.variables: tuple[str, ...] = ()

    def config(self, root: yaml.Node, name: str) -> Config:
        readers = {"scheduling_strategy": self.strategy, **self.ruled(Config), "tiling": self.tiling}
        values = self.mapping(root, "file", readers)
        return Config(name=name, source=self.source, **values.pop("scheduling_strategy", {}), **values)

    def strategy(self, node: yaml.Node, what: str) -> dict:
        pairs = self.pairs(node, what)
        if "new_variables" in pairs:
            self.variables = self.list_of(self.value(VARIABLE))(pairs["new_variables"][1], "new_variables")
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
            choice = self.value(one_of((*COST_FUNCTIONS, *self.variables)))
            values["cost_functions"] = self.list_of(choice)(pairs["cost_functions"][1], "cost_functions")
        if "constraints" in pairs:
            texts = self.list_of(self.constraint)(pairs["constraints"][1], "constraints")
            values["no_skewing"] = "no_skewing" in texts
            values["constraints"] = tuple(item for item in texts if item != "no_skewing")
        for name in ("require_parallel", "starts_band"):
            if name in pairs:
                values[name] = self.value(Dimension.RULES[name])(pairs[name][1], name)
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
        readers = {"total_distribution": self.value(BOOLEAN), "stmts_fusion": self.list_of(self.list_of(self.value(STATEMENT)))}
        values = {name: readers[name](value, name) for name, (_, value) in pairs.items()}
        return Fusion(**values, where=self.where(node))

    def directive(self, node: yaml.Node, what: str) -> Directive:
        rules = self.ruled(Directive)
        readers = {"type": rules["type"], "stmts": self.list_of(self.value(STATEMENT)), "iterator": rules["iterator"]}
        self.needs(node, self.pairs(node, "directives"), tuple(readers), "directives")
        return Directive(**self.mapping(node, "directives", readers), where=self.where(node))

    def tiling(self, node: yaml.Node, what: str) -> Tiling:
        readers = {"sizes": self.list_of(self.value(Tiling.SIZE)), **self.ruled(Tiling)}
        return Tiling(**self.mapping(node, "tiling", readers))

    def by_dimension(self, read: Callable):
        """Reader of a list of mappings that each have a scheduling_dimension: default, 0, 1 ..."""

        def result(node: yaml.Node, what: str) -> dict:
            dimensions: dict = {}
            for item in self.items(node, what):
                pairs = self.pairs(item, what)
                self.needs(item, pairs, ("scheduling_dimension",), what)
                key = pairs.pop("scheduling_dimension")[1]
                number = None if getattr(key, "value", None) == "default" else self.dimension_number(key)
                if number in dimensions:
                    self.fail(key, f"{what} must have one entry per scheduling_dimension, got {key.value} twice")
                dimensions[number] = read(item, pairs)
            return dimensions

        return result

    def dimension_number(self, node: yaml.Node) -> int:
        value = _plain(node)
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


    def mapping(self, node: yaml.Node, what: str, readers: dict[str, Callable]) -> dict:
        pairs = self.pairs(node, what)
        self.only(pairs, tuple(readers), what)
        return {key: readers[key](value, key) for key, (_, value) in pairs.items()}

    def pairs(self, node: yaml.Node, what: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, f"{what} must be a mapping, got {_text(node)}")
        entries: dict = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.fail(key, f"key of {what} must be a text, got {_text(key)}")
            if key.value in entries:
                self.fail(key, f"{what} must have each key once, got {key.value!r} twice")
            entries[key.value] = (key, value)
        return entries

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

    def value(self, rule: Rule):
        """Reader of a plain value that a rule holds for."""

        def result(node: yaml.Node, what: str):
            value = _plain(node)
            if isinstance(node, yaml.ScalarNode) and rule.holds(node.value):
                return node.value  # a text, also where YAML has another reading of it
            if not rule.holds(value):
                self.fail(node, f"{what} must {rule.must}, got {_text(node)!r}")
            return value

        return result

    def ruled(self, kind: type) -> dict[str, Callable]:
        """Readers of the plain values of a part of the strategy."""
        return {name: self.value(rule) for name, rule in kind.RULES.items()}

    def where(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}: "

    def fail(self, node: yaml.Node, message: str):
        message = message.replace("\n", " ")  # of a text over several lines
        raise ConfigError(self.where(node) + (message if len(message) <= _LONGEST else f"{message[:_LONGEST]}..."))


def _plain(node: yaml.Node):
    """What YAML reads in a scalar: its text where that is nothing by itself, such as a quoted "[" or a 13th month; else None."""
    if not isinstance(node, yaml.ScalarNode):
        return None
    try:
        return yaml.safe_load(node.value)
    except (yaml.YAMLError, ValueError, RecursionError):
        return node.value


def _text(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return node.value
    return "a mapping" if isinstance(node, yaml.MappingNode) else "a list"


def with_options(config: Config, **changes) -> Config:
    """The configuration with some options replaced, such as tiling=Tiling((64,))."""
    known = {item.name for item in fields(Config)}
    for key in changes:
        if key not in known:
            raise ConfigError(f"option must be one of {', '.join(sorted(known))}, got {key!r}")
    return replace(config, **changes)
