from dataclasses import replace
from pathlib import Path

import pytest

from npu_sparse.schedule import config, kernels, legality
from npu_sparse.schedule.c.print import generate_file
from npu_sparse.schedule.c.run import FLAGS, run
from npu_sparse.schedule.config import Tiling
from npu_sparse.schedule.frontend.c import parse_c
from npu_sparse.schedule.plan import Band, Sequence
from npu_sparse.schedule.scheduler import schedule

QUICK = ("-O1", *FLAGS[1:])
HEAD = "void kernel_f(int m, int n, double a[n][n], double b[n][n], double c[n][n]) {\n#pragma scop\n"
HEAD += "for (int t = 0; t < m; t++) {\n"
TAIL = "}\n#pragma endscop\n}\n"
PLANE = "for (int i = 1; i < n - 1; i++) for (int j = 1; j < n - 1; j++) "
AROUND = "b[i][j] = a[i][j - 1] + a[i][j + 1] + a[i - 1][j] + a[i + 1][j];\n"
SMOOTH = HEAD + PLANE + AROUND + PLANE + "a[i][j] = 0.25 * b[i][j];" + TAIL
THREE = (
    HEAD + PLANE + "b[i][j] -= 0.5 * (a[i][j] - a[i][j - 1]);\n" + PLANE + "c[i][j] -= 0.5 * (a[i][j] - a[i - 1][j]);\n"
    + PLANE + "a[i][j] -= 0.7 * (b[i][j + 1] - b[i][j] + c[i + 1][j] - c[i][j]);" + TAIL
)  # fmt: skip
ONE_LINE = HEAD + "for (int j = 1; j < n; j++) { a[0][j] = b[0][j - 1] + a[0][j - 1]; b[0][j] = 0.5 * a[0][j]; }" + TAIL
ACROSS = HEAD + PLANE + "b[j][i] = a[j - 1][i] + a[j + 1][i] + a[j][i - 1] + a[j][i + 1];\n"
ACROSS += PLANE + "a[j][i] = 0.25 * b[j][i];" + TAIL


def tiled(text: str, sizes: tuple[int, ...] = (4, 8, 16), **options):
    """`(scop, plan)` under the strategy pluto with these tiles."""
    scop = parse_c(text)
    plan = schedule(scop, replace(config.load("pluto"), fusion_heuristic="max", tiling=Tiling(sizes, 2, True, **options)))
    assert legality.check(scop, plan.union_map()) == []
    return scop, plan


def distributed(plan) -> list[Band]:
    return [band for _, band in plan.bands() if band.shared >= 0]


def check(text: str, scop, plan, sizes=({"m": 7, "n": 45}, {"m": 1, "n": 3}, {"m": 40, "n": 17})) -> str:
    """The generated program, after it has computed what the original does."""
    new = generate_file(scop, text, plan.tree())
    for values in sizes:
        results = run(scop, {"original": text, "new": new}, values, threads=(1, 3), repeats=1, flags=QUICK)
        assert [result.difference for result in results] == [""] * 4
    return new


@pytest.mark.parametrize("text", [SMOOTH, THREE], ids=["two statements", "three statements"])
def test_statements_of_a_time_tile_run_apart_without_guards_and_in_vector_loops(text):
    scop, plan = tiled(text)
    [band] = distributed(plan)
    assert band.shared == 1 and band.wavefront and isinstance(band.child, Sequence)
    assert all(own.loops[-1].vector for _, own in band.child.children)
    new = check(text, scop, plan)
    assert new.count("#pragma omp simd") == len(scop.statements) and "if (" not in new.replace("for if(", "")
    joined = generate_file(*(lambda scop, plan: (scop, text, plan.tree()))(*tiled(text, distribute=False)))
    assert "#pragma omp simd" not in joined and "if (" in joined


def test_statements_that_need_each_other_at_one_time_stay_together():
    scop, plan = tiled(ONE_LINE, (4, 8))
    assert distributed(plan) == []
    check(ONE_LINE, scop, plan)


def test_the_vector_loop_is_the_contiguous_one_wherever_it_stood():
    scop, plan = tiled(ACROSS)
    [band] = distributed(plan)
    assert all("i" in own.loops[-1].exprs[name] and own.loops[-1].vector for (name,), own in band.child.children)
    check(ACROSS, scop, plan)


def test_a_loop_that_carries_something_for_its_statement_is_no_vector_loop():
    text = SMOOTH.replace("a[i][j] = 0.25 * b[i][j];", "a[i][j] = 0.25 * b[i][j] + a[i][j - 1];")
    scop, plan = tiled(text)
    [band] = distributed(plan)
    vectors = {name: [loop.vector for loop in own.loops] for (name,), own in band.child.children}
    assert vectors == {"S0": [False, True], "S1": [False, False]}
    check(text, scop, plan)


def test_rows_that_are_parameters_take_no_register_tiles():
    path = Path(next(iter(kernels.__path__))) / "correlation.c"
    scop, text = parse_c(path), path.read_text()
    plan = schedule(scop, replace(config.load("isl"), tiling=Tiling((5,), 2, True, 2)))
    [band] = [band for band in distributed(plan) if any(loop.unroll for _, own in band.child.children for loop in own.loops)]
    assert "n" in {text for _, own in band.child.children for loop in own.loops for text in loop.exprs.values()}
    check(text, scop, plan, [{"m": 28, "n": 32}])
