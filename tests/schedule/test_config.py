"""Strategy files: what is read, and the sentence for each mistake."""

import re

import pytest

from npu_sparse.schedule import config
from npu_sparse.schedule.config import Config, ConfigError, Constraint, Dimension, Directive, Fusion, Tiling, parse_constraint

FULL = """
scheduling_strategy:
  new_variables: [x]
  ILP_construction:
    - {scheduling_dimension: default, cost_functions: [contiguity, x], constraints: [no_skewing, "S0_it_1 - x <= 0"]}
    - {scheduling_dimension: 1, require_parallel: true, otherwise: {cost_functions: [feautrier], starts_band: true}}
  custom_constraints:
    - {scheduling_dimension: 0, constraints: ["S0_it_1 + 2*S1_it_0 >= 1"]}
  fusion:
    - {scheduling_dimension: 0, stmts_fusion: [[0, 1], [2]]}
    - {scheduling_dimension: default, total_distribution: true}
  directives:
    - {type: vectorize, stmts: [0], iterator: 2}
fusion_heuristic: parallelism
negative_coefficients: true
parametric_shift: true
relax_reductions: true
privatisation: true
code_sinking: false
constant_to_parameter: 8
auto_vectorisation: true
tiling: {sizes: [32, 64], wavefront: true, minimum_depth: 3, unroll_jam: 4}
parallel_work: 1
coefficient_bound: 2
time_limit: 2.5
"""


def test_every_key_is_read():
    read = config.parse(FULL, "full.yaml", "full")
    assert read.new_variables == ("x",)
    default = read.dimension(0)
    assert default.cost_functions == ("contiguity", "x") and default.no_skewing and not default.require_parallel
    assert default.constraints[0].terms == ((1, "S0_it_1"), (-1, "x")) and default.constraints[0].relation == "<="
    assert read.dimension(1).require_parallel and read.dimension(1).otherwise == Dimension(("feautrier",), starts_band=True)
    assert read.constraints(0)[0].terms == ((1, "S0_it_1"), (2, "S1_it_0")) and read.constraints(0)[0].constant == -1
    assert read.constraints(1) == ()
    assert read.fusion_at(0).stmts_fusion == ((0, 1), (2,)) and read.fusion_at(5).total_distribution
    assert (read.directives[0].type, read.directives[0].stmts, read.directives[0].iterator) == ("vectorize", (0,), 2)
    assert read.tiling == Tiling((32, 64), 3, True, 4)
    assert (read.fusion_heuristic, read.negative_coefficients, read.parametric_shift) == ("parallelism", True, True)
    assert (read.constant_to_parameter, read.auto_vectorisation, read.parallel_work) == (8, True, 1)
    assert not read.code_sinking and read.privatisation and read.relax_reductions
    assert (read.coefficient_bound, read.time_limit) == (2, 2.5)


def test_empty_file_is_the_default_strategy():
    assert config.parse("").dimension(0) == Dimension(("proximity",))


def test_shipped_strategies_load():
    names = {"pluto", "pluto-plus", "feautrier", "isl", "tensor-scheduler", "cpu-vector", "npu-vector"}
    assert set(config.shipped()) == names
    assert {config.load(name).name for name in names} == names


def strategy(text: str) -> str:
    return "scheduling_strategy:\n  " + text.replace("\n", "\n  ")


MISTAKES = {
    "unknown key": ("tilling: {}", 1, "key of file must be one of scheduling_strategy,", "got 'tilling'"),
    "second line": ("parametric_shift: true\ntiling: {size: [2]}", 2, "key of tiling must be one of sizes,", "got 'size'"),
    "not YAML": ("tiling: [", 1, "file must be YAML", "got"),
    "a list": ("- 1", 1, "file must be a mapping", "got a list"),
    "key twice": ("time_limit: 1\ntime_limit: 2", 2, "file must have each key once", "'time_limit'"),
    "boolean": ("auto_vectorisation: 3", 1, "auto_vectorisation must be true or false", "got '3'"),
    "size": ("tiling: {sizes: [-1]}", 1, "sizes must be an integer from 0", "got '-1'"),
    "size is text": ("tiling:\n  sizes:\n    - 32\n    - many", 4, "sizes must be an integer", "got 'many'"),
    "time": ("time_limit: 0", 1, "time_limit must be a positive number", "got '0'"),
    "time is not a number": ("time_limit: .nan", 1, "time_limit must be a positive number", "got '.nan'"),
    "heuristic": ("fusion_heuristic: some", 1, "must be one of max, dimensionality, parallelism, none", "got 'some'"),
    "cost": (
        strategy("ILP_construction:\n- {scheduling_dimension: default, cost_functions: [prox]}"),
        3,
        "cost_functions must be one of proximity, feautrier, contiguity, contiguous_last, big_loops_first",
        "got 'prox'",
    ),
    "dimension": (strategy("ILP_construction:\n- {scheduling_dimension: -1}"), 3, "must be default, 0, 1, 2", "got -1"),
    "no dimension": (strategy("ILP_construction:\n- {cost_functions: []}"), 3, "must have the key 'scheduling_dimension'", "got"),
    "dimension twice": (
        strategy("ILP_construction:\n- {scheduling_dimension: 1}\n- {scheduling_dimension: 1}"),
        4,
        "one entry per scheduling_dimension",
        "got 1 twice",
    ),
    "directive": (strategy("directives: [{type: vec, stmts: [0], iterator: 0}]"), 2, "one of vectorize, parallel,", "got 'vec'"),
    "directive short": (strategy("directives: [{type: parallel}]"), 2, "must have the key 'stmts'", "got type"),
    "fusion twice": (
        strategy("fusion: [{scheduling_dimension: 0, stmts_fusion: [[0], [0]]}]"),
        2,
        "must name every statement once",
        "got [[0], [0]]",
    ),
    "fusion both": (
        strategy("fusion:\n- scheduling_dimension: 0\n  total_distribution: true\n  stmts_fusion: [[0]]"),
        3,
        "must have total_distribution or stmts_fusion",
        "got both",
    ),
    "variable": (strategy("new_variables: [S0_it_1]"), 2, "must be names other than coefficients", "got 'S0_it_1'"),
    "variable twice": (strategy("new_variables: [x, x]"), 2, "new_variables must differ", "got x, x"),
    "no relation": (
        strategy("custom_constraints: [{scheduling_dimension: 0, constraints: ['S0_it_1 > 3']}]"),
        2,
        "constraint must have the form 'sum >= sum'",
        "got 'S0_it_1 > 3'",
    ),
    "name": (
        strategy("custom_constraints: [{scheduling_dimension: 0, constraints: ['S0_iter_1 >= 3']}]"),
        2,
        "constraint names must be like S0_it_0",
        "got 'S0_iter_1'",
    ),
    "product": (
        strategy("custom_constraints: [{scheduling_dimension: 0, constraints: ['S0_it_1 S0_it_0 >= 3']}]"),
        2,
        "constraint must be a sum",
        "got",
    ),
    "one side": (
        strategy("custom_constraints: [{scheduling_dimension: 0, constraints: ['S0_it_1 >= ']}]"),
        2,
        "constraint must have two sides",
        "got",
    ),
    "no_skewing": (
        strategy("custom_constraints: [{scheduling_dimension: 0, constraints: [no_skewing]}]"),
        2,
        "no_skewing must stand under ILP_construction",
        "got",
    ),
}


@pytest.mark.parametrize("text, line, rule, got", MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_refused_with_file_line_rule_and_value(text, line, rule, got):
    with pytest.raises(ConfigError) as caught:
        config.parse(text, "my.yaml")
    message = str(caught.value)
    assert message.startswith(f"my.yaml:{line}: ") and rule in message and got in message and "\n" not in message


def test_unknown_strategy_lists_the_shipped_ones():
    with pytest.raises(ConfigError, match="must be one of cpu-vector, feautrier, isl, .*got 'plutto'"):
        config.load("plutto")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="must be readable, got .*none.yaml"):
        config.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "text, terms, constant, relation",
    [
        ("S0_it_1 + S1_it_0 >= 1", {"S0_it_1": 1, "S1_it_0": 1}, -1, ">="),
        ("Si_it_i >= 0", {"Si_it_i": 1}, 0, ">="),
        ("2*S0_cst - 3 S1_par_2 <= 4 - S0_cst", {"S0_cst": 3, "S1_par_2": -3}, -4, "<="),
        ("-S0_it_0 = -1", {"S0_it_0": -1}, 1, "="),
    ],
)
def test_constraint_text(text, terms, constant, relation):
    read = config.parse_constraint(text)
    assert ({name: factor for factor, name in read.terms}, read.constant, read.relation) == (terms, constant, relation)


def test_with_options_refuses_unknown_names():
    assert config.with_options(config.load("pluto"), tiling=Tiling((8,))).tiling.sizes == (8,)
    with pytest.raises(ConfigError, match="option must be one of .*got 'tile'"):
        config.with_options(config.load("pluto"), tile=3)


MADE_WRONG = {  # in Python, where no file and line can be named
    "heuristic": (lambda: Config(fusion_heuristic="bogus"), "fusion_heuristic must be one of max, .*, none, got 'bogus'"),
    "boolean": (lambda: Config(relax_reductions="yes"), "relax_reductions must be true or false, got 'yes'"),
    "bound": (lambda: Config(coefficient_bound=0), "coefficient_bound must be an integer from 1 to 100, got 0"),
    "work": (lambda: Config(parallel_work=1.5), "parallel_work must be an integer from 0 to 100, got 1.5"),
    "time": (lambda: Config(time_limit=float("nan")), "time_limit must be a positive number, got nan"),
    "tiling": (lambda: Config(tiling=(32, 32)), r"tiling must be a Tiling, got \(32, 32\)"),
    "cost": (lambda: Config(dimensions={None: Dimension(("prox",))}), "cost_functions must be one of proximity, .*, got 'prox'"),
    "cost of an alternative": (
        lambda: Config(dimensions={0: Dimension(otherwise=Dimension(("x",)))}),
        "cost_functions must be one of .*, got 'x'",
    ),
    "dimension": (lambda: Config(dimensions={-1: Dimension()}), "dimensions must have keys None, 0, 1, 2 ..., got -1"),
    "no dimension": (lambda: Config(dimensions={0: "contiguity"}), "dimension must be a Dimension, got 'contiguity'"),
    "no mapping": (lambda: Config(fusion=Fusion()), "fusion must map scheduling dimensions to what holds there, got Fusion"),
    "fusion": (lambda: Config(fusion={0: [[0], [1]]}), r"fusion must be a Fusion, got \[\[0\], \[1\]\]"),
    "constraint": (
        lambda: Config(custom_constraints={0: ("S0_it_0 >= 1",)}),
        "custom_constraints must be a Constraint, got 'S0_it_0 >= 1'",
    ),
    "name in a constraint": (
        lambda: Config(custom_constraints={0: (parse_constraint("x >= 1", ("x",)),)}),
        "names in a constraint must be coefficients or new_variables, got 'x'",
    ),
    "relation": (
        lambda: Constraint("x < 1", "", ((1, "x"),), -1, "<"),
        "relation of a constraint must be one of >=, <=, =, got '<'",
    ),
    "variable": (lambda: Config(new_variables=("proximity",)), "new_variables must be names other than .*, got 'proximity'"),
    "variables": (lambda: Config(new_variables=("x", "x")), "new_variables must differ, got x, x"),
    "directive": (lambda: Directive("vectorise", (0,), 0), "type must be one of vectorize, .*, got 'vectorise'"),
    "statements": (lambda: Directive("parallel", 0, 0), "stmts must be a list, got 0"),
    "directives": (lambda: Config(directives=["parallel"]), "directives must be a Directive, got 'parallel'"),
    "callback": (lambda: Config(callback="me"), "callback must be a function, got 'me'"),
    "parallel": (
        lambda: Dimension(require_parallel="always"),
        "require_parallel must be true or false, or outermost, got 'always'",
    ),
    "one name": (lambda: Dimension("proximity"), "cost_functions must be a list, got 'proximity'"),
    "size": (lambda: Tiling((32, -1)), "sizes must be an integer from 0 to 1000000, got -1"),
    "size alone": (lambda: Tiling(32), "sizes must be a list, got 32"),
    "jam": (lambda: Tiling(unroll_jam=65), "unroll_jam must be an integer from 0 to 64, got 65"),
    "statement twice": (lambda: Fusion(stmts_fusion=((0,), (0, 1))), r"every statement once, got \[\[0\], \[0, 1\]\]"),
    "both": (lambda: Fusion(True, ((0,),)), "total_distribution or stmts_fusion, got both"),
    "replaced": (
        lambda: config.with_options(config.load("pluto"), fusion_heuristic="bogus"),
        "fusion_heuristic must be one of .*, got 'bogus'",
    ),
}


@pytest.mark.parametrize("make, sentence", MADE_WRONG.values(), ids=MADE_WRONG)
def test_a_strategy_refuses_what_it_cannot_be_wherever_it_is_made(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_lists_are_as_good_as_tuples():
    assert Tiling([8, 0]) == Tiling((8, 0)) and Fusion(stmts_fusion=[[0], [1]]) == Fusion(stmts_fusion=((0,), (1,)))
    assert Directive("parallel", [0], 1) == Directive("parallel", (0,), 1)


DAMAGED = {
    "key that is a list": (
        "scheduling_strategy:\n  [directives]: []\n",
        r":2: key of scheduling_strategy must be a text, got a list$",
    ),
    "key that is a mapping": ("? {a: 1}\n: x\n", r":1: key of file must be a text, got a mapping$"),
    "text over lines": (
        "scheduling_strategy:\n  directives: |\n    - type: parallel\n    - stmts: [0]\n",
        r":2: directives must be a list, got - type: parallel - stmts: \[0\] $",
    ),
    "long text": ("fusion_heuristic: " + "x" * 5000, r":1: fusion_heuristic must be one of .*xxx\.\.\.$"),
    "no number": ("parallel_work: '['\n", r":1: parallel_work must be an integer from 0 to 100, got '\['$"),
    "no date": ("auto_vectorisation: 2020-13-45\n", r":1: auto_vectorisation must be true or false, got '2020-13-45'$"),
    "long number": ("parallel_work: -" + "9" * 5000, r":1: parallel_work must be an integer from 0 to 100, got '-999"),
    "dimension that is a list": (
        "scheduling_strategy: {ILP_construction: [{scheduling_dimension: '*x'}]}\n",
        r":1: scheduling_dimension must be default, 0, 1, 2 \.\.\., got \*x$",
    ),
    "deep": ("tiling: " + "[" * 20_000, r": the strategy cannot be read \(it is nested too deeply\)$"),
    "endless": (
        "scheduling_strategy: {ILP_construction: [{scheduling_dimension: 0, otherwise: &a {otherwise: *a}}]}\n",
        r": the strategy cannot be read \(it is nested too deeply\)$",
    ),
}


@pytest.mark.parametrize("text, sentence", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "damaged.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(path)) + sentence) as caught:
        config.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
