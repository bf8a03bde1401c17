from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from npu_sparse.schedule import config, kernels, legality
from npu_sparse.schedule.c import work
from npu_sparse.schedule.c.print import generate_file
from npu_sparse.schedule.c.run import FLAGS, RunError, run
from npu_sparse.schedule.config import Tiling
from npu_sparse.schedule.frontend.c import parse_c
from npu_sparse.schedule.isl_baseline import isl_tree, mark_parallel
from npu_sparse.schedule.plan import original
from npu_sparse.schedule.scheduler import schedule

KERNELS = Path(next(iter(kernels.__path__)))
MANIFEST = yaml.safe_load((KERNELS / "manifest.yaml").read_text())
QUICK = ("-O1", *FLAGS[1:])
THREADS = (1, 2, 4)

SCALE = """
void init_scale(int n, double a, double x[n]) { for (int i = 0; i < n; i++) x[i] = i + 1; }
void kernel_scale(int n, double a, double x[n]) {
#pragma scop
  for (int i = 0; i < n; i++) x[i] *= a;
#pragma endscop
}
"""


@pytest.fixture(autouse=True)
def small_loops_run_on_threads(monkeypatch):
    monkeypatch.setattr(work, "PARALLEL_WORK", 1)


def compared(name: str, variants: dict[str, str], size: str = "small", flags=QUICK) -> None:
    path = KERNELS / f"{name}.c"
    text, values = path.read_text(), MANIFEST[name]
    scalars = values.get("scalars", {})
    variants = {"original": text, **variants}
    results = run(parse_c(path), variants, values[size], scalars=scalars, threads=THREADS, repeats=1, flags=flags)
    assert len(results) == len(variants) * len(THREADS)
    assert [(r.variant, r.threads, r.difference) for r in results if r.difference] == []


def scheduled(name: str, strategy: str, tiling: Tiling | None = None, separate: bool = False) -> str:
    path = KERNELS / f"{name}.c"
    scop, settings = parse_c(path), config.load(strategy)
    plan = schedule(scop, replace(settings, tiling=tiling) if tiling else settings)
    assert legality.check(scop, plan.union_map()) == []
    return generate_file(scop, path.read_text(), plan.tree(), separate=separate)


def test_thirty_kernels_are_there():
    assert len(MANIFEST) == 30 and all((KERNELS / f"{name}.c").exists() for name in MANIFEST)


@pytest.mark.parametrize("name", sorted(MANIFEST))
def test_kernel_computes_the_same_under_strategies_and_isl(name):
    scop = parse_c(KERNELS / f"{name}.c")
    text = (KERNELS / f"{name}.c").read_text()
    variants = {
        "in parallel": generate_file(scop, text, mark_parallel(scop, original(scop).tree())),
        "isl": generate_file(scop, text, isl_tree(scop, (4, 5, 8)), separate=True),
        "pluto": scheduled(name, "pluto", Tiling((4, 5, 8), wavefront=True)),
        "cpu-vector": scheduled(name, "cpu-vector", Tiling((8, 4), unroll_jam=2)),
    }
    compared(name, variants)


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", config.shipped())
@pytest.mark.parametrize("name", sorted(MANIFEST))
def test_kernel_computes_the_same_under_every_strategy(name, strategy):
    variants = {"as shipped": scheduled(name, strategy), "tiled": scheduled(name, strategy, Tiling((4, 8, 16), wavefront=True))}
    variants["separated"] = scheduled(name, strategy, Tiling((5,), wavefront=True, unroll_jam=2), separate=True)
    compared(name, variants, flags=FLAGS)


def test_wrong_program_is_told_from_a_right_one():
    scop = parse_c(SCALE)
    variants = {"original": SCALE, "same": SCALE, "wrong": SCALE.replace("x[i] *= a", "x[i] *= i == 7 ? a + 1 : a")}
    results = {r.variant: r for r in run(scop, variants, {"n": 10}, scalars={"a": 2.0}, repeats=2)}
    assert results["original"].difference == results["same"].difference == ""
    assert results["wrong"].difference == "element 7 of x is 24, expected 16"


def test_a_last_bit_is_a_difference():
    scop = parse_c(SCALE)
    variants = {"original": SCALE, "rounded": SCALE.replace("x[i] *= a", "x[i] = x[i] * a * (1 + 2.3e-16)")}
    assert run(scop, variants, {"n": 3}, scalars={"a": 2.0}, repeats=1)[1].difference.startswith("element 0 of x is 2")


def test_every_run_starts_from_the_same_values():
    results = run(parse_c(SCALE), {"original": SCALE}, {"n": 10}, scalars={"a": 2.0}, threads=(1, 2), repeats=3)
    assert [(r.threads, r.difference, len(r.wall_s), len(r.cpu_s)) for r in results] == [(1, "", 3, 3), (2, "", 3, 3)]
    assert all(0 < r.cpu < 1 and 0 < r.wall < 1 for r in results)


def test_program_without_an_init_function_gets_fixed_values():
    text = SCALE.partition("\n")[2].partition("\n")[2]
    assert "init" not in text
    results = run(parse_c(text), {"original": text, "wrong": text.replace("*=", "+=")}, {"n": 10}, scalars={"a": 2.0}, repeats=1)
    assert [bool(r.difference) for r in results] == [False, True]


def test_missing_size_is_named():
    with pytest.raises(RunError, match="sizes must give a value for a$"):
        run(parse_c(SCALE), {"original": SCALE}, {"n": 10})


def test_program_that_does_not_compile_is_reported_with_its_name():
    with pytest.raises(RunError, match=r"(?s)broken must compile, got: .*undeclared"):
        run(parse_c(SCALE), {"original": SCALE, "broken": SCALE.replace("x[i] *= a", "z = 1")}, {"n": 4}, scalars={"a": 1})


def test_program_that_hangs_or_crashes_is_reported():
    scop = parse_c(SCALE)
    with pytest.raises(RunError, match="must end within 1 s"):
        run(scop, {"original": SCALE.replace("i++) x[i] *", "i += 0) x[i] *")}, {"n": 4}, scalars={"a": 1}, timeout_s=1)
    with pytest.raises(RunError, match="must exit with 0, got -"):
        run(scop, {"original": SCALE.replace("x[i] *= a", "__builtin_trap()")}, {"n": 4}, scalars={"a": 1})


def test_results_that_cannot_be_compared_are_refused():
    text = SCALE.replace("double x[n])", "double y[n])").replace("void init", "double x[100];\nvoid init", 1)
    with pytest.raises(RunError, match="results must be array arguments of kernel_scale to be compared, got x"):
        run(parse_c(text.replace("#pragma scop", "#pragma scop live_out(x)")), {"original": text}, {"n": 4}, scalars={"a": 1})


LEAVES = {
    "before anything runs": SCALE.replace("x[i] = i + 1; }", "x[i] = i + 1; exit(0); }", 1),
    "in the loops": SCALE.replace("x[i] *= a;", "{ if (i == 2) _exit(0); x[i] *= a; }"),
    "before main": SCALE + "__attribute__((constructor)) static void early(void) { _exit(0); }\n",
}


@pytest.mark.parametrize("source", LEAVES.values(), ids=LEAVES)
def test_program_that_leaves_before_it_is_compared_is_no_success(source):
    head = "#include <stdlib.h>\n#include <unistd.h>\n"
    with pytest.raises(RunError, match="kernel_scale must return from all 4 runs, got 0: the program ends itself in original$"):
        run(parse_c(SCALE), {"original": head + source, "same": head + SCALE}, {"n": 4}, scalars={"a": 2}, repeats=2)


def test_variant_that_leaves_is_named():
    wrong = "#include <stdlib.h>\n" + SCALE.replace("x[i] *= a", "exit(0)")
    with pytest.raises(RunError, match="got 1: the program ends itself in wrong$"):
        run(parse_c(SCALE), {"original": SCALE, "wrong": wrong}, {"n": 4}, scalars={"a": 2})


def test_results_of_an_earlier_run_are_not_taken_for_those_of_a_later_one():
    """init_scale leaves y as it is: a variant that does nothing must not find there what the original wrote."""
    text = SCALE.replace("double x[n])", "double x[n], double y[n])").replace("x[i] *= a", "y[i] = x[i] * a")
    lazy = text.replace("y[i] = x[i] * a", ";")
    results = run(parse_c(text), {"original": text, "same": text, "lazy": lazy}, {"n": 4}, scalars={"a": 2}, repeats=2)
    assert [(r.variant, bool(r.difference)) for r in results] == [("original", False), ("same", False), ("lazy", True)]


def test_random_initial_values_are_the_same_in_every_run():
    text = "#include <stdlib.h>\n" + SCALE.replace("x[i] = i + 1", "x[i] = rand() + drand48()", 1)
    results = run(parse_c(SCALE), {"original": text, "same": text}, {"n": 9}, scalars={"a": 2}, repeats=3)
    assert [r.difference for r in results] == ["", ""]


def test_program_may_write_to_its_output():
    text = "#include <stdio.h>\n" + SCALE.replace("x[i] = i + 1", r'puts("{\"threads\": 7}"), x[i] = i + 1', 1)
    assert [r.threads for r in run(parse_c(SCALE), {"original": text}, {"n": 4}, scalars={"a": 2}, repeats=2)] == [1]


def test_initialisation_that_takes_other_arguments_is_refused():
    text = SCALE.replace("init_scale(int n, double a, double x[n])", "init_scale(double *x, int n, double a)")
    with pytest.raises(RunError, match="(?s)original must compile, got: .*conflicting types"):
        run(parse_c(SCALE), {"original": text}, {"n": 4}, scalars={"a": 2})


COUNTED = """
void kernel_counted(int n, unsigned char m, float a, double x[n][n * n - 10]) {
#pragma scop
  for (int i = 0; i < n; i++) x[i][0] = x[i][0] * a + m;
#pragma endscop
}
"""
WRONG_SIZES = {
    "negative": ({"n": -1}, "sizes must satisfy n > 0, which kernel_counted needs, got n=-1"),
    "nothing runs": ({"n": 0}, "sizes must satisfy n > 0, which kernel_counted needs, got n=0"),
    "fraction": ({"n": 50.7}, "sizes must be whole numbers for parameters of loops, got n=50.7"),
    "fraction of a value": ({"n": 4, "m": 1.5}, "m must be a value of unsigned char, got 1.5"),
    "too large for the type": ({"n": 4, "m": 256}, "m must be a value of unsigned char, got 256"),
    "too large for int": ({"n": 2**32 + 4}, r"n must be a value of int, got 4294967300"),
    "unknown": ({"n": 4, "k": 2}, r"sizes must name scalar arguments of kernel_counted \(n, m, a\), got k"),
    "an array": ({"n": 4, "x": 2}, r"sizes must name scalar arguments of kernel_counted \(n, m, a\), got x"),
    "endless": ({"n": 4, "a": float("inf")}, "sizes must be finite numbers, got a=inf"),
    "no number": ({"n": float("nan")}, "sizes must be finite numbers, got n=nan"),
    "empty array": ({"n": 3}, r"extent .*n \* n.* - 10 of x must be positive, got -1"),
    "memory": ({"n": 30_000}, "arrays of kernel_counted must fit into the machine's memory, got 4.32e.14 bytes"),
}


@pytest.mark.parametrize("sizes, sentence", WRONG_SIZES.values(), ids=WRONG_SIZES)
def test_sizes_that_leave_nothing_to_compare_are_refused(sizes, sentence):
    with pytest.raises(RunError, match=f"^{sentence}$"):
        run(parse_c(COUNTED), {"original": COUNTED, "same": COUNTED}, {"m": 2, "a": 0.1, **sizes}, repeats=1)


def test_sizes_for_which_no_statement_runs_are_refused():
    text = SCALE.replace("int i = 0", "int i = 3")
    with pytest.raises(RunError, match="^sizes must let some statement of kernel_scale run, got n=3$"):
        run(parse_c(text), {"original": text}, {"n": 3}, scalars={"a": 1})
    assert run(parse_c(text), {"original": text}, {"n": 4}, scalars={"a": 1})


def test_program_without_results_is_refused():
    text = SCALE.replace("#pragma scop", "#pragma scop live_out()")
    with pytest.raises(RunError, match="kernel_scale must have results to be compared"):
        run(parse_c(text), {"original": text, "wrong": text.replace("*=", "+=")}, {"n": 4}, scalars={"a": 2})


def test_array_of_unknown_extent_is_refused():
    text = SCALE.replace("double x[n]", "double *x")
    with pytest.raises(RunError, match=r"kernel_scale must have extents .* got double \*x$"):
        run(parse_c(text), {"original": text}, {"n": 4}, scalars={"a": 2})


def test_process_that_a_program_leaves_behind_ends_with_it():
    text = "#include <unistd.h>\n" + SCALE.replace("x[i] = i + 1;", "x[i] = i + 1; if (!fork()) for (;;) pause();", 1)
    assert run(parse_c(SCALE), {"original": text}, {"n": 1}, scalars={"a": 2}, repeats=1, timeout_s=20)


def test_program_that_only_writes_is_stopped_in_time():
    text = "#include <stdio.h>\n" + SCALE.replace("x[i] = i + 1;", 'for (;;) puts("more");', 1)
    with pytest.raises(RunError, match="must end within 1 s"):
        run(parse_c(SCALE), {"original": text}, {"n": 1}, scalars={"a": 2}, timeout_s=1)
