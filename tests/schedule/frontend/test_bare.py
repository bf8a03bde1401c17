"""Regions outside of functions: nests for experiments."""

import subprocess

import pytest

from npu_sparse import cli
from npu_sparse.schedule import config, legality
from npu_sparse.schedule.c.print import generate_file
from npu_sparse.schedule.c.run import RunError, run
from npu_sparse.schedule.frontend.c import parse_c
from npu_sparse.schedule.scheduler import schedule
from npu_sparse.schedule.scop import ScopError

NESTS = {
    "product": "for (i = 0; i < n; i++)\n  for (j = 0; j < n; j++) {\n    c[i][j] = 0;\n    for (k = 0; k < n; k++)\n"
               "      c[i][j] += a[i][k] * b[k][j];\n  }\n",
    "sum": "s = 0;\nfor (i = 0; i < n; i++)\n  s += x[i] * alpha;\nx[0] = s;\n",
    "stencil": "for (t = 0; t < m; t++)\n  for (i = 1; i < n - 1; i++)\n    x[i] = x[i - 1] + 0.5 * x[i + 1];\n",
    "parameters": "for (i = m; i <= n; i++)\n  x[i] = y[l];\n",
    "iterators of its own": "for (int i = 0; i < n; i++)\n  for (int j = 0; j <= i; j++) a[i][j] = sqrt(a[j][i] + i);\n",
    "a counter": "for (i = 0; i < n; i++)\n  if (x[i] > 3) count++;\n",
}  # fmt: skip
DECLARATIONS = """
#include <math.h>
#include <stdio.h>
double a[30][30], b[30][30], c[30][30], x[30], y[30], s, count;
int n = 25, m = 7, l = 3, i, j, k, t;
double alpha = 1.25;
"""
PROGRAM = """
int main(void) {
  for (int p = 0; p < 30; p++) for (int q = 0; q < 30; q++) a[p][q] = p % 5 + q, b[p][q] = p - q / 3., x[p] = p % 7, y[p] = p;
  BODY
  for (int p = 0; p < 30; p++) for (int q = 0; q < 30; q++) printf("%.17g %.17g %.17g ", a[p][q], c[p][q], x[p]);
  printf("%.17g %.17g", s, count);
}
"""


def region(body: str) -> str:
    return f"#pragma scop\n{body}#pragma endscop\n"


def output(body: str, directory) -> str:
    (directory / "p.c").write_text(DECLARATIONS + PROGRAM.replace("BODY", body))
    flags = ["-O1", "-fopenmp", "-ffp-contract=off", "-std=gnu11", "-w"]
    subprocess.run(["gcc", *flags, "p.c", "-lm", "-o", "p"], cwd=directory, check=True)
    return subprocess.run([directory / "p"], capture_output=True, text=True, timeout=20, check=True).stdout


@pytest.mark.parametrize("strategy", ["pluto", "cpu-vector"])
@pytest.mark.parametrize("name", NESTS)
def test_a_bare_nest_becomes_one_that_computes_the_same(name, strategy, tmp_path):
    text = region(NESTS[name])
    scop = parse_c(text)
    plan = schedule(scop, config.load(strategy))
    assert legality.check(scop, plan.union_map()) == []
    new = generate_file(scop, text, plan.tree())
    assert "nest(" not in new and "#pragma scop" not in new
    assert output(new, tmp_path) == output(NESTS[name], tmp_path)


def test_names_are_what_the_region_does_with_them():
    scop = parse_c(region(NESTS["sum"]))
    assert scop.function == "" and scop.arguments == () and scop.parameters == ("n",)
    assert {name: (len(array.shape), array.live_out) for name, array in scop.arrays.items()} == {
        "s": (0, True), "x": (1, True), "alpha": (0, False)}  # fmt: skip
    declared = parse_c("float x[100];\nlong n;\n" + region(NESTS["stencil"]))
    assert declared.arrays["x"].ctype == "float" and declared.arrays["x"].shape == ("100",)
    assert declared.types["n"] == "long"


BEFORE = ["", "// a comment\n\n", "int before(int q) { return q; }\n", "for (i = 0; i < n; i++) { y[i] = 0; }\n"]


@pytest.mark.parametrize("before", BEFORE,
                         ids=["nothing", "a comment", "a function", "statements"])
def test_lines_keep_their_numbers_and_what_stands_before(before):
    text = before + region(NESTS["stencil"])
    scop = parse_c(text)
    line = before.count("\n") + 1
    assert scop.region == (line, line + 4) and scop.statements[0].line == line + 3
    assert generate_file(scop, text, schedule(scop, "pluto").tree()).startswith(before)
    with pytest.raises(ScopError, match=f"^<text>:{line + 1}: .*got x"):
        parse_c(before + region("for (i = 0; i < x; i++)\n  x[i * i] = 0;\n").replace("i < x", "i < x[0]"))


@pytest.mark.parametrize("text, message", [
    (region("x[0] = 1;\n") + region("x[1] = 1;\n"), "<text>:4: a file without functions must hold one region, got a second"),
    ("#pragma scop\nx[0] = 1;\n", "<text>:1: #pragma scop must end with #pragma endscop, got none"),
    ("#pragma scop\n#pragma endscop\n", "<text>:1: #pragma scop must stand in a function, got it outside"),
    (region("x[0] = f(2);\n"), "<text>:2: function must be known to be pure (see --pure), got f(2)"),
    (region("x[0] = ;\n"), "<text>:2: source must be C"),
    ("double x[10;\n" + region("x[0] = 1;\n"), "source must be C"),
])  # fmt: skip
def test_mistakes_are_refused_in_one_sentence(text, message):
    with pytest.raises(ScopError) as error:
        parse_c(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_bare_nest_is_scheduled_by_the_command_and_cannot_be_run(tmp_path, capsys):
    path = tmp_path / "nest.c"
    path.write_text(region(NESTS["product"]))
    assert cli.main(["schedule", str(path)]) == 0 and "#pragma omp parallel for" in capsys.readouterr().out
    with pytest.raises(RunError, match="must define the SCoP inside of a function to be run"):
        run(parse_c(path), {"original": path.read_text()}, {"n": 3})
