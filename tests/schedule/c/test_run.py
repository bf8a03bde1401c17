from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from npu_sparse.schedule import config, kernels, legality
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
