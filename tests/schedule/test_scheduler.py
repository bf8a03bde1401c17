"""What each configuration key changes, and what happens where a strategy has no schedule."""

import pytest

pytest.importorskip("islpy")
pytest.importorskip("highspy")

from npu_sparse.schedule import config, legality, scheduler  # noqa: E402
from npu_sparse.schedule.c.print import generate  # noqa: E402
from npu_sparse.schedule.config import ConfigError, Dimension  # noqa: E402
from npu_sparse.schedule.frontend.c import parse_c  # noqa: E402
from npu_sparse.schedule.plan import Plan, original  # noqa: E402
from npu_sparse.schedule.solve import farkas, ilp  # noqa: E402
from npu_sparse.schedule.solve.problem import Attempt  # noqa: E402

MATRICES = "int n, double a[n][n], double b[n][n], double c[n][n]"
PRODUCT = "for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) for (int k = 0; k < n; k++) c[i][j] += a[i][k] * b[k][j];"
TWO = (
    "for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) b[i][j] = a[i][j] + 1;\n"
    "for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) c[i][j] = b[i][j] * 2;"
)
SWEEP = "for (int i = 1; i < n; i++) for (int j = 0; j < n; j++) a[i][j] = a[i-1][j] + 1;"
STENCIL = (
    "for (int t = 0; t < n; t++) {\n for (int i = 1; i < n - 1; i++) b[0][i] = a[0][i-1] + a[0][i] + a[0][i+1];\n"
    " for (int i = 1; i < n - 1; i++) a[0][i] = b[0][i]; }"
)


def scop(body: str, arguments: str = MATRICES):
    return parse_c(f"void f({arguments}) {{\n#pragma scop\n{body}\n#pragma endscop\n}}\n")


def loops(plan: Plan, statement: str = "S0") -> list[str]:
    """Loop expressions around a statement, outermost first, in the order of execution."""
    return [loop.exprs[statement] for names, band in plan.bands() if statement in names for loop in band.inner()]


def parse(text: str):
    return config.parse(text, "my.yaml", "mine")


def strategy(text: str) -> config.Config:
    return parse("scheduling_strategy:\n  " + text.replace("\n", "\n  "))


def test_plan_views_agree():
    plan = scheduler.schedule(scop(TWO), "npu-vector")
    assert [row.kind for row in plan.rows] == ["loop", "loop", "scalar"]
    assert plan.rows[0].exprs == {"S0": "i", "S1": "i"} and plan.rows[2].exprs == {"S0": "0", "S1": "1"}
    assert plan.rows[0].parallel and not plan.rows[1].parallel and plan.rows[1].vector
    assert plan.union_map().intersect_domain(plan.scop.domain()).domain().is_equal(plan.scop.domain())
    assert "parallel" in str(plan.tree()) and "vector" in str(plan.tree())


def test_original_plan_is_the_original_order():
    program = scop(STENCIL)
    assert not legality.check(program, original(program).union_map())
    assert [row.kind for row in original(program).rows] == ["loop", "scalar", "loop"]


@pytest.mark.parametrize("cost, rows", [("contiguity", ["i", "k", "j"]), ("proximity", ["i", "j", "k"])])
def test_cost_functions_order_a_matrix_product(cost, rows):
    settings = strategy(f"ILP_construction: [{{scheduling_dimension: default, cost_functions: [{cost}]}}]")
    assert loops(scheduler.schedule(scop(PRODUCT), settings)) == rows


def test_big_loops_first():
    body = "for (int i = 0; i < 4; i++) for (int j = 0; j < n; j++) for (int k = 0; k < 9; k++) c[i][j] += a[i][k] * b[k][j];"
    settings = strategy("ILP_construction: [{scheduling_dimension: default, cost_functions: [big_loops_first]}]")
    assert loops(scheduler.schedule(scop(body), settings)) == ["j", "k", "i"]


def test_contiguous_last_keeps_the_iterator_along_memory_for_the_end():
    program = scop(
        "for (int i = 0; i < n; i++) for (int j = 0; j < i; j++) x[i] -= a[i][j] * x[j];", "int n, double a[n][n], double x[n]"
    )
    settings = "ILP_construction: [{{scheduling_dimension: 0, cost_functions: [{}feautrier], constraints: [no_skewing]}}]"
    assert loops(scheduler.schedule(program, strategy(settings.format(""))))[0] == "j"
    assert loops(scheduler.schedule(program, strategy(settings.format("contiguous_last, "))))[0] == "i"


def test_cost_functions_differ_by_dimension():
    settings = strategy(
        "ILP_construction:\n"
        "- {scheduling_dimension: 0, cost_functions: [feautrier]}\n"
        "- {scheduling_dimension: default, cost_functions: [contiguity]}"
    )
    assert loops(scheduler.schedule(scop(PRODUCT), settings)) == ["k", "i", "j"]


def test_custom_constraint_chooses_the_first_loop():
    settings = strategy('custom_constraints: [{scheduling_dimension: 0, constraints: ["S0_it_2 >= 1", "S0_it_i = 1"]}]')
    assert loops(scheduler.schedule(scop(PRODUCT), settings)) == ["k", "i", "j"]


def test_constraint_for_all_statements():
    settings = strategy('custom_constraints: [{scheduling_dimension: 0, constraints: ["Si_it_0 = 0"]}]')
    plan = scheduler.schedule(scop(TWO), settings)
    assert loops(plan, "S0") == loops(plan, "S1") == ["j", "i"]


def test_user_variable_counts_as_a_cost():
    settings = strategy(
        "new_variables: [x]\n"
        "ILP_construction: [{scheduling_dimension: 0, cost_functions: [x], constraints: ['S0_it_0 + S0_it_1 - x <= 0']}]"
    )
    assert loops(scheduler.schedule(scop(PRODUCT), settings)) == ["k", "i", "j"]


def test_require_parallel_finds_the_parallel_row_or_says_why_not():
    settings = strategy("ILP_construction: [{scheduling_dimension: 0, cost_functions: [proximity], require_parallel: true}]")
    assert loops(scheduler.schedule(scop(SWEEP), settings)) == ["j", "i"]
    plan = scheduler.schedule(scop("for (int i = 1; i < n; i++) a[0][i] = a[0][i-1];"), settings)
    assert loops(plan) == ["i"] and plan.notes, "a requirement that cannot hold is reported"


def test_fusion_groups_and_distribution():
    grouped = strategy("fusion: [{scheduling_dimension: 0, stmts_fusion: [[0], [1]]}]")
    total = strategy("fusion: [{scheduling_dimension: 0, total_distribution: true}]")
    inner = strategy("fusion: [{scheduling_dimension: 0, stmts_fusion: [[0, 1]]}]")
    apart = [("S0",), ("S1",)]
    assert [names for names, _ in scheduler.schedule(scop(TWO), grouped).bands()] == apart
    assert [names for names, _ in scheduler.schedule(scop(TWO), total).bands()] == apart
    assert [names for names, _ in scheduler.schedule(scop(TWO), inner).bands()] == [("S0", "S1")]


@pytest.mark.parametrize("heuristic, nests", [("max", 1), ("dimensionality", 1), ("parallelism", 1), ("none", 2)])
def test_fusion_heuristics(heuristic, nests):
    assert len(list(scheduler.schedule(scop(TWO), parse(f"fusion_heuristic: {heuristic}")).bands())) == nests


def test_parallelism_heuristic_does_not_fuse_what_would_lose_the_parallel_loop():
    body = "for (int i = 0; i < n; i++) b[0][i] = a[0][i];\nfor (int i = 1; i < n - 1; i++) c[0][i] = b[0][i-1] + b[0][i+1];"
    assert len(list(scheduler.schedule(scop(body), parse("fusion_heuristic: max")).bands())) == 1
    assert len(list(scheduler.schedule(scop(body), parse("fusion_heuristic: parallelism")).bands())) == 2


def test_parallel_directive_puts_the_iterator_outermost():
    plan = scheduler.schedule(scop(PRODUCT), strategy("directives: [{type: parallel, stmts: [0], iterator: 1}]"))
    assert loops(plan)[0] == "j" and plan.rows[0].parallel


def test_vectorize_directive_puts_the_iterator_innermost():
    plan = scheduler.schedule(scop(PRODUCT), strategy("directives: [{type: vectorize, stmts: [0], iterator: 0}]"))
    assert loops(plan)[-1] == "i" and plan.rows[-1].vector


def test_sequential_directive_keeps_threads_off_a_loop():
    assert scheduler.schedule(scop(TWO), strategy("fusion: []")).rows[0].parallel
    settings = strategy("directives: [{type: sequential, stmts: [0], iterator: 0}]")
    assert not scheduler.schedule(scop(TWO), settings).rows[0].parallel


def test_reversed_loop_is_scheduled_and_reported():
    body = "for (int i = n - 2; i >= 0; i--) a[0][i] = a[0][i+1] + 1;"
    plan = scheduler.schedule(scop(body), "pluto")
    assert loops(plan)[0].startswith("-i") and "reversal" in plan.notes[0]


def test_code_sinking_decides_whether_a_shallow_statement_shares_the_inner_loop():
    body = (
        "for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) {\n c[i][j] = 0;\n"
        " for (int k = 0; k < n; k++) c[i][j] += a[i][k] * b[k][j]; }"
    )
    sunk = [len(band.loops) for _, band in scheduler.schedule(scop(body), parse("code_sinking: true")).bands()]
    kept = [len(band.loops) for _, band in scheduler.schedule(scop(body), parse("code_sinking: false")).bands()]
    assert (sunk, kept) == ([3], [2, 1])


def test_constant_extents_are_not_used_as_skewing_factors():
    body = "for (int i = 0; i < 16; i++) for (int j = 0; j < 16; j++) a[0][0] = a[0][0] + b[i][j];"
    first = strategy("ILP_construction: [{scheduling_dimension: 0, cost_functions: [feautrier]}]")
    wide = config.with_options(first, coefficient_bound=20)
    assert loops(scheduler.schedule(scop(body), wide))[0] == "16i + j"
    assert loops(scheduler.schedule(scop(body), config.with_options(wide, constant_to_parameter=8)))[0] == "i"


def test_parametric_shift_lets_dependent_loops_share_a_nest():
    body = "for (int i = 0; i < n; i++) b[0][i] = a[0][i];\nfor (int i = 0; i < n; i++) c[0][i] = b[0][n - 1 - i];"
    assert loops(scheduler.schedule(scop(body), parse("parametric_shift: true")), "S1") == ["i + n"]
    assert len(list(scheduler.schedule(scop(body), parse("parametric_shift: false")).bands())) == 2


def test_callback_sees_what_was_found_and_chooses_per_dimension():
    seen = []

    def choose(attempt: Attempt):
        seen.append((attempt.dimension, attempt.number, len(attempt.band)))
        if attempt.number == 0:
            return Dimension(("contiguity",), require_parallel=True)
        return Dimension(("feautrier",)) if attempt.number == 1 else None

    plan = scheduler.schedule(scop(SWEEP), config.Config(callback=choose))
    assert seen == [(0, 0, 0), (1, 0, 1), (1, 1, 1)]
    assert loops(plan) == ["j", "i"]


@pytest.mark.parametrize("answer, got", [(Dimension(("prox",)), "'prox'"), ("proximity", "'proximity'")])
def test_answer_of_a_callback_is_checked_like_a_file(answer, got):
    with pytest.raises(ConfigError, match=f"must be .*, got {got}"):
        scheduler.schedule(scop(SWEEP), config.Config(callback=lambda attempt: answer))


def test_relaxed_reduction_runs_in_any_order_but_not_in_parallel():
    body = "for (int i = 0; i < n; i++) for (int j = 0; j < i; j++) c[0][0] += a[n - 1 - j][i];"
    held = strategy('custom_constraints: [{scheduling_dimension: 0, constraints: ["S0_it_1 = -1", "S0_it_0 = 0"]}]')
    held = config.with_options(held, negative_coefficients=True)
    with pytest.raises(ConfigError, match="S0"):
        scheduler.schedule(scop(body), held)
    relaxed = config.with_options(held, relax_reductions=True, parallel_work=0)
    plan = scheduler.schedule(scop(body), relaxed)
    assert loops(plan)[0] == "-j" and not any(row.parallel for row in plan.rows)
    assert legality.check(plan.scop, plan.union_map()) and not legality.check(plan.scop, plan.union_map(), relax_reductions=True)
    assert generate(plan.scop, plan.tree())


def test_tiles_and_wavefront_are_legal_and_in_the_tree():
    plan = scheduler.schedule(scop(STENCIL), parse("tiling: {sizes: [8, 16], wavefront: true}"))
    (_, band), *_ = plan.bands()
    assert [loop.tile for loop in band.loops] == [8, 16] and band.wavefront and band.loops[0].parallel
    assert "/8)" in str(plan.tree()) and "/16)" in str(plan.tree())
    assert not legality.check(plan.scop, plan.union_map())


def test_tiling_a_band_that_is_not_permutable_would_be_caught():
    from dataclasses import replace

    program = scop(STENCIL)
    plan = original(program)
    outer = plan.root
    wrong = replace(outer, loops=tuple(replace(loop, tile=4) for loop in outer.child.children[0][1].loops + outer.loops)[-1:])
    mixed = plan.with_root(replace(wrong, loops=(replace(wrong.loops[0], exprs={"S0": "-t", "S1": "-t"}),)))
    assert legality.check(program, mixed.union_map())


def test_minimum_depth_and_size_one_leave_loops_untiled():
    assert not any(row.tile for row in scheduler.schedule(scop(PRODUCT), parse("tiling: {sizes: [8], minimum_depth: 4}")).rows)
    assert [row.tile for row in scheduler.schedule(scop(PRODUCT), parse("tiling: {sizes: [8, 0, 4]}")).rows] == [8, 0, 4]


def test_unroll_and_jam_makes_register_tiles_of_the_two_loops_around_the_innermost():
    plan = scheduler.schedule(scop(PRODUCT), parse("auto_vectorisation: true\ntiling: {sizes: [32], unroll_jam: 4}"))
    (_, band), *_ = plan.bands()
    assert [loop.unroll for loop in band.loops] == [4, 4, 0]
    assert "unroll" in str(plan.tree()) and not legality.check(plan.scop, plan.union_map())


PAYS = {  # a statement -> the register tile along each loop
    "row reused, sums kept": ("c[i][j] += a[i][k] * b[k][j];", {("i", 4), ("k", 4), ("j", 0)}),
    "reads what it writes elsewhere": ("c[i][j] += a[i][k] * c[k][j];", {("i", 0), ("k", 0), ("j", 0)}),
    "every element once": ("c[i][j] = a[i][j] * 2;", {("i", 0), ("j", 0)}),
    "sums along memory": ("c[0][i] += a[j][i] * b[0][j];", {("j", 4), ("i", 0)}),
    "sums that do not wait for each other": ("c[i][0] += a[i][j] * a[0][j];", {("i", 4), ("j", 0)}),
    "recurrences that do not wait for each other": ("a[i][j + 1] = a[i][j] * 2;", {("i", 4), ("j", 0)}),
    "recurrence in both directions": ("a[i + 1][j + 1] = a[i][j + 1] + a[i + 1][j];", {("i", 0), ("j", 0)}),
}


@pytest.mark.parametrize("body, tiles", PAYS.values(), ids=PAYS)
def test_register_tiles_are_where_they_save_loads_or_waiting(body, tiles):
    nest = "for (int i = 0; i < n - 1; i++) for (int j = 0; j < n - 1; j++) "
    nest += "for (int k = 0; k < n; k++) " * ("[k]" in body)
    plan = scheduler.schedule(scop(nest + body), parse("auto_vectorisation: true\ntiling: {unroll_jam: 4}"))
    assert {(loop.exprs["S0"], loop.unroll) for _, band in plan.bands() for loop in band.loops} == tiles
    assert not legality.check(plan.scop, plan.union_map())


def test_register_tiles_do_not_take_what_an_outer_loop_carries_from_a_vector_loop():
    body = "for (int i = 1; i < n; i++) for (int j = 1; j < n; j++) a[i][j] = a[i-1][j-1] + 1;"
    plan = scheduler.schedule(scop(body), parse("auto_vectorisation: true\nparallel_work: 0\ntiling: {unroll_jam: 4}"))
    assert generate(plan.scop, plan.tree())
    (_, band), *_ = plan.bands()
    assert band.loops[-1].vector and not band.loops[0].unroll


def test_auto_vectorisation_moves_the_contiguous_parallel_loop_innermost():
    assert loops(scheduler.schedule(scop(PRODUCT), parse("auto_vectorisation: true"))) == ["i", "k", "j"]
    plan = scheduler.schedule(scop(PRODUCT), parse("auto_vectorisation: true"))
    assert plan.rows[-1].vector and not plan.rows[0].vector


def test_parallel_loop_with_too_little_work_inside_is_not_marked():
    body = "for (int t = 0; t < n; t++) for (int i = 0; i < n; i++) a[0][i] = a[0][i] * 2;\n"
    held = strategy('custom_constraints: [{scheduling_dimension: 0, constraints: ["S0_it_0 = 1", "S0_it_1 = 0"]}]')
    marked = [row.parallel for row in scheduler.schedule(scop(body), held).rows]
    assert not any(marked)
    marked = [row.parallel for row in scheduler.schedule(scop(body), config.with_options(held, parallel_work=1)).rows]
    assert marked == [frozenset(), {"S0"}]


def test_loop_whose_only_obstacle_is_a_temporary_becomes_parallel():
    body = (
        "for (int i = 0; i < n; i++) {\n for (int j = 0; j < n; j++) b[0][j] = a[i][j];\n"
        " for (int j = 0; j < n; j++) c[i][j] = b[0][n - 1 - j]; }"
    )
    temporary = parse_c(f"void f({MATRICES}) {{\n#pragma scop live_out(c)\n{body}\n#pragma endscop\n}}\n")
    plan = scheduler.schedule(temporary, "cpu-vector")
    _, band = next(plan.bands())
    assert band.loops[0].parallel and not band.loops[0].free
    assert generate(temporary, plan.tree()), "code generation makes the temporary private"
    assert not next(scheduler.schedule(scop(body), "cpu-vector").bands())[1].loops[0].parallel, "its contents are wanted"


def test_chunks_of_the_vector_loop_run_in_parallel_when_nothing_else_can():
    body = "for (int i = 1; i < n; i++) for (int j = 0; j < n; j++) c[0][j] += a[i][j];"
    plan = scheduler.schedule(scop(body), "cpu-vector")
    (_, band), *_ = plan.bands()
    assert [loop.exprs["S0"] for loop in band.loops] == ["i", "j"]
    assert [(loop.tile > 0, loop.parallel, loop.vector) for loop in band.loops] == [(False, False, False), (True, True, True)]
    assert not legality.check(plan.scop, plan.union_map())


@pytest.mark.parametrize("name", ["pluto", "cpu-vector"])
@pytest.mark.parametrize("body", [PRODUCT, TWO, SWEEP, STENCIL])
def test_generated_code_accepts_every_mark(name, body):
    program = scop(body)
    assert generate(program, scheduler.schedule(program, name).tree())  # refuses a mark that a dependence contradicts


def test_solver_without_time_falls_back_to_isl_and_says_so():
    plan = scheduler.schedule(scop(PRODUCT), config.Config(name="hasty", time_limit=1e-9))
    assert ["no solution within" in note for note in plan.notes] == [True, True, False]
    assert plan.notes[-1] == "scheduled by isl's scheduler"
    assert not legality.check(plan.scop, plan.union_map())


def test_row_that_is_not_the_best_is_reported(monkeypatch):
    solve = ilp._run

    def slow(solver, terms, count, time_limit):
        solution, status = solve(solver, terms, count, time_limit)
        return solution, "late" if status == "optimal" else status

    monkeypatch.setattr(ilp, "_run", slow)
    plan = scheduler.schedule(scop(PRODUCT), "pluto")
    assert "dimension 0 of S0: not the best row within the time limit" in plan.notes
    assert not legality.check(plan.scop, plan.union_map())


def test_last_resort_is_the_original_order(monkeypatch):
    monkeypatch.setattr(scheduler, "from_isl", lambda *_: None)
    plan = scheduler.schedule(scop(STENCIL), config.Config(name="hasty", time_limit=1e-9))
    assert plan.notes[-1] == "kept in the original order"
    assert loops(plan, "S1") == ["t", "i"]


def test_illegal_plan_never_leaves_the_scheduler(monkeypatch):
    """With a solver that forgets legality, the independent check catches every plan it makes."""
    monkeypatch.setattr(scheduler.Program, "legal", lambda self, dependence: None)
    monkeypatch.setattr(farkas.Cone, "contains", lambda self, vector: True)
    backwards = strategy('custom_constraints: [{scheduling_dimension: 0, constraints: ["S0_it_0 = -1"]}]')
    plan = scheduler.schedule(scop(SWEEP), config.with_options(backwards, negative_coefficients=True))
    assert "illegal schedule" in plan.notes[0] and not legality.check(plan.scop, plan.union_map())


def test_fused_chain_of_64_statements():
    arrays = ", ".join(f"double a{k}[n][n]" for k in range(65))
    body = "\n".join(
        f"for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) a{k + 1}[i][j] = a{k}[i][j] + 1;" for k in range(64)
    )
    names, band = next(scheduler.schedule(scop(body, f"int n, {arrays}"), "npu-vector").bands())
    assert len(names) == 64 and band.loops[0].parallel and band.loops[-1].vector
