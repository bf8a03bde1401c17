import random
import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import islpy as isl
import pytest

from npu_sparse.schedule import config
from npu_sparse.schedule.c import print as printer
from npu_sparse.schedule.c import work
from npu_sparse.schedule.c.marks import CodegenError
from npu_sparse.schedule.c.print import generate, generate_file
from npu_sparse.schedule.c.run import FLAGS, run
from npu_sparse.schedule.config import HEURISTICS, Tiling
from npu_sparse.schedule.frontend.c import parse_c
from npu_sparse.schedule.isl_baseline import isl_tree, mark_parallel, tile_bands
from npu_sparse.schedule.plan import Band, Leaf, Loop, Plan, original
from npu_sparse.schedule.scheduler import schedule
from npu_sparse.schedule.testing import random_scop

QUICK = ("-O1", *FLAGS[1:])
SIZES = {"n": 13, "m": 9}

PRODUCT = """
void f(int n, int m, double C[n][n], double A[n][m], double B[m][n]) {
#pragma scop
  for (int i = 0; i < n; i++)
    for (int k = 0; k < m; k++)
      for (int j = 0; j < n; j++)
        C[i][j] += A[i][k] * B[k][j];
#pragma endscop
}
"""
TRIANGLE = """
void f(int n, int m, double C[n][n], double A[n][m]) {
#pragma scop
  for (int i = 0; i < n; i++) {
    for (int j = 0; j <= i; j++) C[i][j] *= 1.5;
    for (int k = 0; k < m; k++)
      for (int j = 0; j <= i; j++)
        C[i][j] += A[i][k] * A[j][k];
  }
#pragma endscop
}
"""
TEMPORARIES = """
void f(int n, int m, double A[n][m], double B[n][m], double row[m]) {
  double s;
#pragma scop live_out(B)
  for (int i = 0; i < n; i++) {
    s = 0.0;
    for (int j = 0; j < m; j++) s += A[i][j];
    for (int j = 0; j < m; j++) row[j] = A[i][j] * s;
    for (int j = 0; j < m; j++) B[i][j] = row[m - 1 - j];
  }
#pragma endscop
}
"""


@pytest.fixture(autouse=True)
def small_loops_run_on_threads(monkeypatch):
    monkeypatch.setattr(work, "PARALLEL_WORK", 1)


def same(text: str, variants: dict[str, str], sizes=SIZES, threads=(1, 2, 4), scalars=None) -> None:
    """Every variant computes what the original does, bit for bit."""
    results = run(parse_c(text), {"original": text, **variants}, sizes, threads=threads, repeats=1, flags=QUICK, scalars=scalars)
    assert len(results) == (1 + len(variants)) * len(threads)
    assert [(r.variant, r.threads, r.difference) for r in results if r.difference] == []


def marked(scop, mark: str, depth: int = 0) -> isl.Schedule:
    """The original tree with a mark above the band `depth` loops deep."""
    node = original(scop).tree().get_root().child(0)
    for _ in range(depth):
        node = node.child(0)
    return node.insert_mark(isl.Id(mark)).get_schedule()


def in_bounds(text: str) -> str:
    """A random scop with arrays so large that all of its subscripts hit, and values that stay finite."""
    head, body = text.split("#pragma scop")
    head = re.sub(r"\[\w+\]", "[140]", head)
    return "#include <math.h>\n" + head + "#pragma scop" + re.sub(r"\[([^\]]*)\]", r"[\1 + 60]", body).replace("*=", "-=")


def random_configuration(chance: random.Random):
    sizes = tuple(chance.choice([1, 2, 3, 4, 7]) for _ in range(chance.randint(1, 3)))
    tiling = Tiling(sizes, chance.choice([1, 2]), chance.random() < 0.6, chance.choice([0, 0, 2, 3]))
    settings = config.load(chance.choice(config.shipped()))
    return replace(settings, tiling=tiling, fusion_heuristic=chance.choice(HEURISTICS), parallel_work=chance.choice([0, 2]))


def test_original_tree_gives_the_loops_as_written():
    scop = parse_c(PRODUCT)
    code = generate(scop, original(scop).tree())
    assert re.findall(r"for \(long (\w+) = 0; \1 < (\w+)", code) == [("t0", "n"), ("t1", "m"), ("t2", "n")]
    assert "#pragma" not in code and "S0(t0, t1, t2);" in code


@pytest.mark.parametrize("text", [PRODUCT, TRIANGLE, TEMPORARIES])
@pytest.mark.parametrize("separate", [False, True])
def test_isl_schedules_tiled_and_separated_compute_the_same(text, separate):
    scop = parse_c(text)
    variants = {f"tile {tile}": generate_file(scop, text, isl_tree(scop, tile), separate=separate) for tile in (0, 4, (3, 5, 2))}
    same(text, variants)


def test_separation_gives_full_tiles_without_minima():
    scop = parse_c(PRODUCT)
    plain, separated = (generate(scop, isl_tree(scop, 4), separate=separate) for separate in (False, True))
    full = re.search(r"for \(long (\w+) = 4 \* (\w+); \1 <= 4 \* \2 \+ 3; \1\+\+\)", separated)
    assert full and not re.search(r"<= 4 \* \w+ \+ 3;", plain)


def test_parallel_mark_that_carries_a_value_is_refused():
    scop = parse_c(PRODUCT)
    message = r"a parallel loop must carry nothing .* got a value of C from S0\[\d+, \d+, \d+\] to S0\["
    with pytest.raises(CodegenError, match=message):
        generate(scop, marked(scop, "parallel", depth=1))
    generate(scop, marked(scop, "parallel", depth=2))


def test_parallel_mark_that_overwrites_live_data_is_refused():
    text = TEMPORARIES.replace("live_out(B)", "live_out(B, row)")
    scop = parse_c(text)
    with pytest.raises(CodegenError, match="same element of row"):
        generate(scop, marked(scop, "parallel"))


@pytest.mark.parametrize("mark", ["parallell", "unroll(x)", ""])
def test_unknown_mark_is_refused(mark):
    scop = parse_c(PRODUCT)
    with pytest.raises(CodegenError, match="mark must be one of parallel, vector, unroll"):
        generate(scop, marked(scop, mark))


def test_temporaries_become_private():
    scop = parse_c(TEMPORARIES)
    tree = mark_parallel(scop, original(scop).tree())
    inside, outlined = generate(scop, tree), generate_file(scop, TEMPORARIES, tree)
    assert "private(s)" in inside and "double *row = __builtin_malloc(sizeof(double) * (m));" in inside
    assert "__builtin_free(row);" in inside
    same(TEMPORARIES, {"inside": printer.replace_scop(TEMPORARIES, inside), "outlined": outlined}, {"n": 40, "m": 30})


def test_temporary_behind_a_pointer_is_not_private():
    """How large it is, nobody has said; before, its copies had the size sizeof(double) * ()."""
    pointer = "double s, *row = __builtin_malloc(m * sizeof(double));"
    text = TEMPORARIES.replace(", double row[m])", ")").replace("double s;", pointer)
    scop = parse_c(text)
    assert not scop.arrays["row"].sized and parse_c(TEMPORARIES).arrays["row"].sized
    plan = schedule(scop, "cpu-vector")
    assert not any("original order" in note for note in plan.notes)
    variants = {"planned": generate_file(scop, text, plan.tree())}
    variants["in parallel"] = generate_file(scop, text, mark_parallel(scop, original(scop).tree()))
    assert [code.count("malloc") for code in variants.values()] == [1, 1]  # the declaration
    same(text, variants, {"n": 40, "m": 30})


def test_vector_loop_with_a_private_array_is_left_to_the_compiler():
    scop = parse_c(TEMPORARIES)
    assert "#pragma omp simd" not in generate(scop, marked(scop, "vector"))


def test_value_from_outside_is_not_private():
    text = TEMPORARIES.replace("s = 0.0;", "")
    scop = parse_c(text)
    assert "parallel" not in generate(scop, mark_parallel(scop, original(scop).tree())).split("S1(")[0].split("{", 1)[1]
    with pytest.raises(CodegenError, match="a value of s"):
        generate(scop, marked(scop, "parallel"))


@pytest.mark.parametrize(
    "body",
    [
        "for (int i = 0; i < n; i++) { if (i < 1) B[i][0] = s; s = A[i][0]; B[i][1] = s; }",
        "for (int i = 0; i < n; i++) { s = A[i][0]; B[i][1] = s; }\n  B[0][0] = s;",
    ],
    ids=["value from before the loop", "value used after the loop"],
)
def test_temporary_with_a_life_outside_of_the_loop_is_not_private(body):
    head = "void f(int n, int m, double A[n][m], double B[n][m]) {\n  double s = 3;\n#pragma scop\n"
    text = head + body + "\n#pragma endscop\n}\n"
    scop = parse_c(text)
    code = generate_file(scop, text, mark_parallel(scop, original(scop).tree()))
    assert "#pragma omp parallel" not in code
    same(text, {"unchanged": code})


SUMS = {  # statements whose sums are exact in any order, for the arrays hold small whole numbers
    "scalar": ("double s;", "s = 0; for (int i = 0; i < n; i++) s += A[i][0] * B[0][i]; C[0][0] = s;", "+:"),
    "element": ("", "for (int i = 0; i < n; i++) C[0][0] += A[i][1] * B[1][i];", "+:"),
    "difference": ("", "for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) C[i][0] -= A[i][j] * B[0][j];", "+:"),
    "product": ("", "for (int i = 0; i < n && i < 30; i++) C[0][0] *= 2 + A[i][0] - A[i][0];", "*:"),
    "two sums": (
        "", "for (int i = 0; i < n; i++) for (int j = 0; j <= i; j++) { C[i][0] += A[i][j]; C[i][1] += B[i][j]; }", "+:",
    ),
    "matrix": ("", "for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) C[0][0] += A[i][j];", "+:"),
}  # fmt: skip
SUM = """
void init_sum(int n, double A[n][n], double B[n][n], double C[n][n]) {{
  for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) A[i][j] = (i + 3 * j) % 7, B[i][j] = (2 * i + j) % 5, C[i][j] = 1;
}}
void kernel_sum(int n, double A[n][n], double B[n][n], double C[n][n]) {{
  {declared}
#pragma scop live_out(C)
  {body}
#pragma endscop
}}
"""


@pytest.mark.parametrize("strategy", ["cpu-vector", "pluto"])
@pytest.mark.parametrize("declared, body, clause", SUMS.values(), ids=SUMS)
def test_sums_are_made_in_parts_where_reductions_are_relaxed(declared, body, clause, strategy):
    text = SUM.format(declared=declared, body=body)
    scop, exact = parse_c(text), config.load(strategy)
    relaxed = schedule(scop, replace(exact, relax_reductions=True))
    code = generate_file(scop, text, relaxed.tree())
    assert re.search(rf"#pragma omp .*reduction\({re.escape(clause)}", code)
    assert "reduction(" not in generate_file(scop, text, schedule(scop, exact).tree())
    same(text, {"relaxed": code, "separated": generate_file(scop, text, relaxed.tree(), separate=True)}, {"n": 37})


def test_updates_that_do_not_follow_each_other_are_not_run_in_parallel():
    """In the source every k lies between the updates of C[0][1] by (0, 1, k) and (1, 0, k); with k outermost nothing does."""
    nest = "for (int i = 0; i < n; i++) for (int j = 0; j < n - i; j++) for (int k = 0; k < n; k++) C[0][i + j] += B[0][k];"
    text = SUM.format(declared="", body=nest)
    scop = parse_c(text)
    variants = {}
    for name in config.shipped():
        plan = schedule(scop, replace(config.load(name), relax_reductions=True, parallel_work=0))
        variants[name] = generate_file(scop, text, plan.tree())  # refuses a loop that is not parallel
    same(text, variants, {"n": 19}, threads=(1, 3))


NO_SUMS = {
    "read on the way": "{ C[0][0] += A[i][0]; B[i][0] = C[0][0]; }",
    "added to in two places": "{ C[0][0] += A[i][0]; C[0][0] += B[i][0]; }",
    "another element each time": "C[i + 1][0] += C[i][0];",
    "set on the way": "{ if (i > 4) C[0][0] = 0; C[0][0] += A[i][0]; }",
}


@pytest.mark.parametrize("body", NO_SUMS.values(), ids=NO_SUMS)
def test_what_is_no_sum_of_one_element_is_not_made_in_parts(body):
    text = SUM.format(declared="", body=f"for (int i = 0; i < n - 1; i++) {body}")
    scop = parse_c(text)
    with pytest.raises(CodegenError, match="a parallel loop must carry nothing"):
        generate(scop, marked(scop, "parallel reduction"))
    code = generate_file(scop, text, schedule(scop, replace(config.load("cpu-vector"), relax_reductions=True)).tree())
    same(text, {"relaxed": code}, {"n": 37})


def test_sum_is_refused_as_a_parallel_loop_unless_the_mark_asks_for_parts():
    text = SUM.format(declared="", body="for (int i = 0; i < n; i++) C[0][0] += A[i][0];")
    scop = parse_c(text)
    with pytest.raises(CodegenError, match="a value of C"):
        generate(scop, marked(scop, "parallel"))
    assert "reduction(+:part0)" in generate(scop, marked(scop, "parallel reduction"))


def test_marks_become_pragmas():
    scop = parse_c(PRODUCT)
    assert "#pragma omp parallel for if(" in generate(scop, marked(scop, "parallel"))
    assert "#pragma omp simd\n" in generate(scop, marked(scop, "vector", depth=2))
    assert "#pragma GCC unroll 8\n" in generate(scop, marked(scop, "unroll(8)", depth=2))
    assert "#pragma GCC unroll 4\n" in generate(scop, marked(scop, "unroll", depth=1))


def guards(code: str) -> list[str]:
    """What is compared with the work that pays, in the order of the text."""
    return re.findall(r"#pragma omp parallel.* if\((.*) >= \d+\)", code)


def estimated(code: str, values: dict[str, int]) -> list[float]:
    """The estimates of the parallel loops that are entered once, as C computes them."""
    guarded = re.findall(r"((?: *const long \w+ = .*;\n)*) *#pragma omp parallel.* if\((.*) >= \d+\)", code)
    macros = "".join(line + "\n" for line in code.splitlines() if re.match(r"#define (min|max|floord)", line))
    shown = "".join(f'{{ {declared} printf("%.17g\\n", (double)({text})); }}\n' for declared, text in guarded)
    sizes = "".join(f"int {name} = {value};" for name, value in values.items())
    source = f"#include <stdio.h>\n{macros}int main(void) {{ {sizes}\n{shown} return 0; }}\n"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guards.c"
        path.write_text(source)
        subprocess.run(["gcc", "-fsanitize=undefined", "-fno-sanitize-recover", path, "-o", path.with_suffix("")], check=True)
        shown = subprocess.run([path.with_suffix("")], check=True, capture_output=True, text=True).stdout
    return [float(line) for line in shown.splitlines()]


def test_small_parallel_loop_keeps_its_threads_asleep_wherever_it_is():
    text = PRODUCT.replace("C[i][j] += A[i][k] * B[k][j]", "C[k][j] = C[k][j] + A[i][k]")
    assert guards(generate(parse_c(text), marked(parse_c(text), "parallel", depth=1))) == ["(double)m * (double)n"]
    assert guards(generate(parse_c(PRODUCT), marked(parse_c(PRODUCT), "parallel"))) == ["(double)n * (double)m * (double)n"]
    assert f">= {work.PARALLEL_WORK})" in generate(parse_c(PRODUCT), marked(parse_c(PRODUCT), "parallel"))


@pytest.mark.parametrize("n", [37, 1300, 2**31 - 1])
def test_estimated_work_does_not_overflow(n):
    code = generate(parse_c(PRODUCT), marked(parse_c(PRODUCT), "parallel"))
    assert estimated(code, {"n": n, "m": n}) == [pytest.approx(float(n) ** 3)]


@pytest.mark.parametrize("tile", [0, 4, (8, 4, 2)])
def test_estimated_work_counts_the_instances_of_all_statements(tile):
    """n m of S0, n m p of S1 and n (n - 1) of S2, whatever the tiles are."""
    text = """
void f(int n, int m, int p, double A[n][m], double B[n][p], double C[n][n]) {
#pragma scop
  for (int i = 0; i < n; i++) {
    for (int j = 0; j < m; j++) A[i][j] = i + j;
    for (int j = 0; j < m; j++) for (int k = 0; k < p; k++) A[i][j] += B[i][k];
    for (int j = 1; j < n; j++) C[i][j] = A[i][0] + j;
  }
#pragma endscop
}
"""
    scop, sizes = parse_c(text), {"n": 64, "m": 40, "p": 24}
    instances = 64 * 40 + 64 * 40 * 24 + 64 * 63
    assert sum(estimated(generate(scop, mark_parallel(scop, original(scop).tree())), sizes)) == instances
    by_isl = estimated(generate(scop, isl_tree(scop, tile), separate=True), sizes)  # one of the loops runs, others are for n < 4
    assert max(by_isl) == pytest.approx(instances, rel=0.1)


def test_work_of_a_triangle_is_taken_at_the_middle_of_its_rows():
    text = """
void f(int n, int m, double A[n][n], double B[n][n]) {
#pragma scop
  for (int k = 0; k < m; k++) {
    for (int i = 0; i < n; i++) for (int j = 0; j <= i; j++) A[i][j] *= 1.5;
    for (int i = 0; i < n; i++) for (int j = 0; j <= i; j++) B[i][j] += 2 * A[j][i];
  }
#pragma endscop
}
"""
    scop = parse_c(text)
    tree = mark_parallel(scop, original(scop).tree())
    code = generate(scop, tree, reserved={"t7m"})
    assert guards(code) == ["(double)n * ((double)t_1m + 1)"] * 2
    assert code.count("const long t_1m = n / 2;") == 2
    assert estimated(code, {"n": 100}) == [100 * 51] * 2
    same(text, {"parallel": generate_file(scop, text, tree)})


def test_mark_of_a_loop_that_isl_leaves_out_does_not_reach_the_loop_below():
    """With one tile of i, the sequential loop over tiles of k would otherwise inherit the pragma."""
    scop = parse_c(TRIANGLE)
    code = generate(scop, isl_tree(scop, (4, 5, 8)), separate=True)
    parallel = re.findall(r"#pragma omp parallel for.*\n *for \(long (\w+)", code)
    assert parallel and set(parallel) == {"t0"}


def test_unroll_and_jam_writes_full_strips_out():
    scop = parse_c(PRODUCT)
    loops = tuple(Loop({"S0": name}, unroll=factor, vector=name == "j") for name, factor in (("i", 3), ("k", 2), ("j", 0)))
    tree = Plan(scop, Band(loops, Leaf(), permutable=True), "test").tree()
    code = generate(scop, tree)
    body = re.search(r"#pragma omp simd\n *for \(long t2 .*\n((?: *S0\(.*\n)+)", code)[1]
    assert re.findall(r"S0\((.*)\);", body) == [
        f"({i}), ({k}), t2" for i in ("3 * t0", "3 * t0 + 1", "3 * t0 + 2") for k in ("2 * t1", "2 * t1 + 1")
    ]
    for sizes in ({"n": 13, "m": 9}, {"n": 12, "m": 8}, {"n": 2, "m": 1}):
        same(PRODUCT, {"unrolled": generate_file(scop, PRODUCT, tree)}, sizes)


def test_budget_falls_back_to_simpler_code_and_says_so(monkeypatch):
    scop = parse_c(TRIANGLE)
    tree = isl_tree(scop, 4)
    monkeypatch.setattr(printer, "SEPARATION", 1)
    code = generate_file(scop, TRIANGLE, tree, separate=True)
    assert "/* generated without separation of full tiles: the operation budget was exceeded */" in code
    same(TRIANGLE, {"simple": code})
    monkeypatch.setattr(printer, "UNROLLING", 1)
    assert "without separation and unrolling" in generate(scop, tree)
    monkeypatch.setattr(printer, "OPERATIONS", 1)
    with pytest.raises(CodegenError, match="at most 1 isl operations"):
        generate(scop, tree)
    assert isl.DEFAULT_CONTEXT.get_max_operations() == 0
    isl.Set("{ [i] : 0 <= i < 10 }").is_empty()  # the budget of the failure is gone


def test_generated_names_capture_no_name_of_the_program():
    text = """
void S1(double *x) { *x += 1; }
#define nest0 3
void f(int n, int t1, double t0[n][n], double low, double table[n], double S0) {
  double high = 2, t2, nest1 = 7;
#pragma scop
  for (int i = 0; i < n; i++) {
    t2 = low * i + nest1;
    for (int j = 0; j <= i && j < t1; j++)
      t0[i][j] = t0[i][j] * t2 + high * table[j] + S0 + nest0;
  }
#pragma endscop
}
"""
    scop = parse_c(text)
    tree = mark_parallel(scop, original(scop).tree())
    tiled = mark_parallel(scop, tile_bands(original(scop).tree(), 4))
    variants = {"parallel": generate_file(scop, text, tree), "tiled": generate_file(scop, text, tiled)}
    variants["isl"] = generate_file(scop, text, isl_tree(scop, 3))
    same(text, variants, {"n": 11, "t1": 7}, scalars={"low": 0.5, "S0": 1.25})


def test_arguments_of_macros_are_in_parentheses():
    text = """
void f(int n, double A[n], double B[3 * n]) {
#pragma scop
  for (int i = 0; i < n; i++)
    A[n - 1 - i] = B[2 * i] * (i % 3) - i / 2.0;
#pragma endscop
}
"""
    scop = parse_c(text)
    plan = Plan(scop, Band((Loop({"S0": "n - 2*i"}),), Leaf()), "test")
    same(text, {"reversed": generate_file(scop, text, plan.tree())}, {"n": 17}, threads=(1,))


def test_compiler_does_not_drop_the_call_of_a_nest():
    """gcc 12 takes this nest for a function without effects when it may look into it: its addresses become 2 * p - A."""
    text = """
#include <math.h>
void f(int m, double A[140][140]) {
#pragma scop
  for (int j = 0; j < 4; j++)
    for (int k = 1; k <= m; k++)
      A[2 * j + k + 60][2 * j + 61] = fmax(A[2 * k + 63][62], 1.0);
#pragma endscop
}
"""
    scop = parse_c(text)
    same(text, {"nest": generate_file(scop, text, isl_tree(scop, 3))}, {"m": 4})


def test_tiles_of_negative_places():
    text = """
void f(int n, int m, double A[n], double B[n]) {
#pragma scop
  for (int i = 0; i < n; i++)
    for (int j = i; j < m; j++)
      A[i] = A[i] * B[j] + 1;
#pragma endscop
}
"""
    scop = parse_c(text)
    loops = (Loop({"S0": "-i - n"}, tile=4), Loop({"S0": "j - 2*n"}, tile=3))
    tree = Plan(scop, Band(loops, Leaf(), permutable=True), "test").tree()
    assert "floord(" in generate(scop, tree)
    for sizes in ({"n": 13, "m": 14}, {"n": 8, "m": 9}, {"n": 1, "m": 1}):
        same(text, {"tiled": generate_file(scop, text, tree)}, sizes, threads=(1,))


def test_source_without_one_region_is_refused():
    with pytest.raises(CodegenError, match="got 0"):
        printer.replace_scop("int x;\n", "")
    with pytest.raises(CodegenError, match="got 2"):
        printer.replace_scop(PRODUCT + PRODUCT, "")


@pytest.mark.parametrize(
    "seed", [*range(10), 11, 486, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (10, *range(12, 200)))]
)
def test_random_program_under_random_configurations_computes_the_same(seed):
    chance, text = random.Random(seed), in_bounds(random_scop(seed))
    scop = parse_c(text)
    if not any(array.live_out for array in scop.arrays.values()):
        pytest.skip("nothing that the program computes lives after its loops")
    variants = {}
    for n in range(3):
        plan = schedule(scop, random_configuration(chance))
        variants[f"{n}: {plan.strategy}"] = generate_file(scop, text, plan.tree(), separate=chance.random() < 0.5)
    variants["in parallel"] = generate_file(scop, text, mark_parallel(scop, original(scop).tree()))
    same(text, variants, {"n": 5, "m": 4}, threads=(1, 3), scalars={"x": 1.5, "y": 0.5})
