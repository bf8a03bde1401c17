"""Random small programs under random configurations: every plan is legal without help from the fallbacks."""

import pytest

pytest.importorskip("islpy")
pytest.importorskip("highspy")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from npu_sparse.schedule import config, legality, scheduler  # noqa: E402
from npu_sparse.schedule.c.print import generate  # noqa: E402
from npu_sparse.schedule.config import Config, ConfigError, Constraint, Dimension, Directive, Fusion, Tiling  # noqa: E402
from npu_sparse.schedule.frontend.c import parse_c  # noqa: E402

subscripts = st.sampled_from(["i", "i - 1", "i + 1", "j", "j - 1", "j + 1", "i + j", "n - 1 - i", "n - i", "2 * j", "0", "3"])
names = st.sampled_from("abc")


@st.composite
def programs(draw) -> str:
    """Nests with one or two statements each, of depth one to three with an outer time loop at times."""
    lines = []
    for _ in range(draw(st.integers(1, 3))):
        down, time, both = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
        head = "for (int i = n - 2; i >= 1; i--)" if down else "for (int i = 1; i < n - 1; i++)"
        lower = draw(st.sampled_from(["1", "i", "0"]))
        statements = []
        for _ in range(1 + both):
            target, source = draw(names), draw(names)
            write = f"{target}[{draw(subscripts)} + 4][{draw(subscripts)} + 4]"
            operator = draw(st.sampled_from(["=", "+="]))
            reads = f"{source}[{draw(subscripts)} + 4][{draw(subscripts)} + 4]"
            statements.append(f"{write} {operator} {reads} * 2;")
        nest = f"{head} for (int j = {lower}; j < n - 1; j++) {{ {' '.join(statements)} }}"
        lines.append(f"for (int t = 0; t < n; t++) {{ {nest} }}" if time else nest)
    arguments = ", ".join(f"double {name}[3 * n + 8][3 * n + 8]" for name in "abc")
    return f"void f(int n, {arguments}) {{\n#pragma scop\n" + "\n".join(lines) + "\n#pragma endscop\n}\n"


costs = st.lists(st.sampled_from([*config.COST_FUNCTIONS, "x"]), min_size=0, max_size=3, unique=True).map(tuple)
dimensions = st.builds(
    Dimension,
    cost_functions=costs,
    no_skewing=st.booleans(),
    require_parallel=st.sampled_from([False, False, True, "outermost"]),
    starts_band=st.booleans(),
    otherwise=st.none() | st.builds(Dimension, cost_functions=costs),
)
configs = st.builds(
    Config,
    name=st.just("random"),
    new_variables=st.just(("x",)),
    dimensions=st.fixed_dictionaries({None: dimensions}, optional={0: dimensions, 1: dimensions}),
    fusion_heuristic=st.sampled_from(config.HEURISTICS),
    negative_coefficients=st.booleans(),
    parametric_shift=st.booleans(),
    relax_reductions=st.booleans(),
    privatisation=st.booleans(),
    code_sinking=st.booleans(),
    auto_vectorisation=st.booleans(),
    parallel_work=st.integers(0, 3),
    coefficient_bound=st.integers(1, 4),
    tiling=st.builds(
        Tiling,
        sizes=st.lists(st.sampled_from([0, 2, 5, 32]), max_size=3).map(tuple),
        minimum_depth=st.integers(1, 3),
        wavefront=st.booleans(),
        unroll_jam=st.sampled_from([0, 2]),
    ),
)
relaxed = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@relaxed
@given(programs(), configs)
def test_plan_is_legal_and_made_by_the_strategy(text, chosen):
    plan = scheduler.schedule(parse_c(text), chosen)
    assert not legality.check(plan.scop, plan.union_map(), chosen.relax_reductions)
    assert not any("illegal schedule" in note for note in plan.notes), "the fallback hid a mistake of the scheduler"
    assert generate(plan.scop, plan.tree()), "code generation refuses a parallel or vector mark that does not hold"


requests = st.one_of(
    st.builds(
        lambda factor, iterator, bound: {
            "custom_constraints": {0: (Constraint("c", "", ((factor, f"Si_it_{iterator}"),), -bound, ">="),)}
        },
        st.sampled_from([-1, 1]),
        st.integers(0, 1),
        st.integers(0, 2),
    ),
    st.builds(
        lambda kind, iterator: {"directives": (Directive(kind, (0,), iterator),)},
        st.sampled_from(config.DIRECTIVES),
        st.integers(0, 1),
    ),
    st.just({"fusion": {0: Fusion(stmts_fusion=((0, 1),))}}),
    st.just({"fusion": {0: Fusion(stmts_fusion=((1,), (0,)))}}),
)


@relaxed
@given(programs(), configs, requests)
def test_request_gives_a_legal_plan_or_a_sentence(text, chosen, request):
    try:
        plan = scheduler.schedule(parse_c(text), config.with_options(chosen, **request))
    except ConfigError as error:
        assert "\n" not in str(error) and "must" in str(error) or "exists for" in str(error)
        return
    assert not legality.check(plan.scop, plan.union_map(), chosen.relax_reductions)
    assert not any("illegal schedule" in note for note in plan.notes)
