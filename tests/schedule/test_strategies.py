"""The shipped strategies find what the literature says they find."""

from pathlib import Path

import pytest

pytest.importorskip("islpy")
pytest.importorskip("highspy")

from npu_sparse.schedule import config, kernels, scheduler  # noqa: E402
from npu_sparse.schedule.dependences import dependences  # noqa: E402
from npu_sparse.schedule.frontend.c import parse_c  # noqa: E402
from npu_sparse.schedule.isl_baseline import from_isl  # noqa: E402
from npu_sparse.schedule.plan import Plan  # noqa: E402
from npu_sparse.schedule.solve.problem import prepare  # noqa: E402

STRATEGIES = ("pluto", "pluto-plus", "feautrier", "tensor-scheduler", "cpu-vector", "npu-vector")
KERNELS = sorted(Path(kernels.__path__[0]).glob("*.c"))


def scop(body: str, arguments: str = "int n, double a[n][n]"):
    return parse_c(f"void f({arguments}) {{\n#pragma scop\n{body}\n#pragma endscop\n}}\n")


def loops(plan: Plan) -> list[dict[str, str]]:
    return [row.exprs for row in plan.rows if row.kind == "loop"]


def kernel(name: str):
    return parse_c(next(path for path in KERNELS if path.stem == name))


PUBLISHED = {  # Bondhugula et al., PLDI 2008, and the hyperplanes Pluto prints
    "jacobi_1d": [{"S0": "t", "S1": "t"}, {"S0": "2t + i", "S1": "2t + i + 1"}],
    "jacobi_2d": [{"S0": "t", "S1": "t"}, {"S0": "2t + i", "S1": "2t + i + 1"}, {"S0": "2t + j", "S1": "2t + j + 1"}],
    "seidel_2d": [{"S0": "t"}, {"S0": "t + i"}, {"S0": "2t + i + j"}],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_pluto_finds_the_published_hyperplanes(name):
    plan = scheduler.schedule(kernel(name), "pluto")
    assert loops(plan) == PUBLISHED[name]
    (names, band), *points = plan.bands()
    assert band.permutable and band.wavefront and all(loop.tile == 32 for loop in band.loops)
    # in a tile, one statement's points and then the other's
    assert [group for group, _ in points] == ([("S0",), ("S1",)] if names == ("S0", "S1") else [])
    assert not any(loop.tile for _, point in points for loop in point.loops)


REVERSAL = "for (int i = 0; i < n; i++) b[i] = 2 * a[i];\nfor (int i = 0; i < n; i++) c[i] = 3 * b[n - 1 - i];"
VECTORS = "int n, double a[n], double b[n], double c[n]"


def test_pluto_plus_reverses_a_loop_to_fuse_and_parallelise():
    plan = scheduler.schedule(scop(REVERSAL, VECTORS), "pluto-plus")
    (names, band), *rest = plan.bands()
    assert not rest and names == ("S0", "S1"), "one fused nest"
    assert band.loops[0].coincident and band.loops[0].parallel
    assert {band.loops[0].exprs[name].startswith("-i") for name in names} == {True, False}


def test_pluto_without_negative_coefficients_cannot_fuse_the_reversal():
    plan = scheduler.schedule(scop(REVERSAL, VECTORS), "pluto")
    assert [names for names, _ in plan.bands()] == [("S0",), ("S1",)]


LATENCY = {  # Feautrier, IJPP 1992: the row of minimal latency
    "recurrence": ("for (int i = 1; i < n; i++) a[i][0] = a[i-1][0] + 1;", {"S0": "i"}),
    "wavefront": (
        "for (int i = 1; i < n; i++) for (int j = 1; j < n; j++) a[i][j] = a[i-1][j] + a[i][j-1];",
        {"S0": "i + j"},
    ),
    "reduction": (
        "for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) for (int k = 0; k < n; k++) a[i][j] += a[i][j] * k;",
        {"S0": "k"},
    ),
    "elimination": (
        "for (int k = 0; k < n; k++) {\n for (int i = k+1; i < n; i++) a[i][k] /= a[k][k];\n"
        " for (int i = k+1; i < n; i++) for (int j = k+1; j < n; j++) a[i][j] -= a[i][k] * a[k][j]; }",
        {"S0": "2k", "S1": "2k + 1"},
    ),
    "nine points": (
        "for (int t = 0; t < n; t++) for (int i = 1; i < n-1; i++) for (int j = 1; j < n-1; j++)\n"
        " a[i][j] = a[i-1][j-1] + a[i-1][j] + a[i-1][j+1] + a[i][j-1] + a[i][j] + a[i][j+1]\n"
        " + a[i+1][j-1] + a[i+1][j] + a[i+1][j+1];",
        {"S0": "4t + 2i + j"},
    ),
}


@pytest.mark.parametrize("body, row", LATENCY.values(), ids=LATENCY)
def test_feautrier_finds_the_row_of_minimal_latency(body, row):
    plan = scheduler.schedule(scop(body), "feautrier")
    assert loops(plan)[0] == row
    _, first = next(plan.bands())
    assert len(first.loops) == 1, "what the row satisfies is dropped before the next row"


def coincident(plan: Plan) -> dict[str, int]:
    counts = {statement.name: 0 for statement in plan.scop.statements}
    for names, band in plan.bands():
        for name in names:
            counts[name] += sum(loop.coincident for loop in band.loops)
    return counts


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_isl_strategy_has_as_many_coincident_dimensions_as_isl(path):
    program = parse_c(path)
    edges = dependences(program)
    problem = prepare(program, config.load("isl"), edges)
    theirs = from_isl(program, problem.dependences)
    ours = scheduler.schedule(program, "isl", edges)
    assert theirs is not None and not ours.notes
    expected = coincident(theirs)
    assert all(count >= expected[name] for name, count in coincident(ours).items())


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "cpu-vector" else pytest.mark.exhaustive) for name in STRATEGIES]
)
def test_every_strategy_schedules_every_kernel_without_a_fallback(name, path):
    plan = scheduler.schedule(parse_c(path), name)  # raises or notes a fallback when the legality check finds a violation
    assert not any("fallback" in note or "original order" in note for note in plan.notes)


def test_tensor_scheduler_ends_on_the_contiguous_iterator_without_skewing():
    plan = scheduler.schedule(kernel("gemm"), "tensor-scheduler")
    band = [loop.exprs["S1"] for names, band in plan.bands() if "S1" in names for loop in band.loops]
    assert sorted(band) == ["i", "j", "k"] and band[-1] == "j"


def test_cpu_vector_orders_a_matrix_product_i_k_j():
    plan = scheduler.schedule(kernel("gemm"), "cpu-vector")
    band = next(band for names, band in plan.bands() if "S1" in names)
    assert [loop.exprs["S1"] for loop in band.loops] == ["i", "k", "j"]
    assert band.loops[0].parallel and band.loops[-1].vector


def test_cpu_vector_starts_threads_once_per_step_of_an_elimination():
    plan = scheduler.schedule(kernel("lu"), "cpu-vector")
    outer, inner, *_ = [band for _, band in plan.bands()]
    assert set(outer.loops[0].exprs.values()) == {"k", "j"} and not outer.loops[0].parallel
    assert set(inner.loops[0].exprs) == {"S0", "S1", "S2"} and inner.loops[0].parallel
    assert sum(loop.parallel for _, band in plan.bands() for loop in band.loops) == 1
    assert all(band.loops[-1].vector for names, band in plan.bands() if len(names) == 1)


def test_cpu_vector_does_not_skew_a_stencil():
    plan = scheduler.schedule(kernel("jacobi_2d"), "cpu-vector")
    assert {text for row in loops(plan) for text in row.values()} == {"t", "i", "j"}


@pytest.mark.parametrize("name", ["lu_decomp", "trsmL_off_diag", "trsmU_T", "trsmL"])
def test_npu_vector_returns_permutations_for_small_solvers(name):
    from npu_sparse.schedule.frontend import builder

    program = getattr(builder, name)()
    iterators = {name for statement in program.statements for name in statement.iterators}
    plan = scheduler.schedule(program, "npu-vector")
    assert not plan.notes
    chunks = {f"floor(({name})/64)" for name in iterators}
    coefficients = {text for row in loops(plan) for text in row.values()}
    assert coefficients <= iterators | chunks | {"0"}, "no coefficient above 1, no skewing"


@pytest.mark.parametrize("name", ["softmax", "rms_norm_residual", "rope", "indexer"])
def test_npu_vector_fuses_an_operator_under_one_parallel_row_loop(name):
    from npu_sparse.schedule.frontend import builder

    program = getattr(builder, name)()
    names, band = next(scheduler.schedule(program, "npu-vector").bands())
    assert len(names) == len(program.statements) and band.loops[0].parallel
