"""Maxima, minima and sums that threads and SIMD lanes make in parts, where `relax_reductions` allows it."""

import re
from dataclasses import replace

import pytest

from npu_sparse.schedule import config
from npu_sparse.schedule.c import work
from npu_sparse.schedule.c.print import generate_file
from npu_sparse.schedule.frontend.c import parse_c
from npu_sparse.schedule.scheduler import schedule
from npu_sparse.schedule.testing import FLAGS, function, output

HEAD = "void f(int n, double a[n][n], float b[n], double c[n])"
MAIN = """
int main(void) {
  enum { n = 64 };
  static double a[n][n], c[n]; static float b[n];
  for (int i = 0; i < n; i++) {
    for (int j = 0; j < n; j++) a[i][j] = FILL;
    b[i] = (i * 37 % 64) - 31, c[i] = START;
  }
  f(n, a, b, c);
  for (int i = 0; i < n; i++) printf("%.17g %.9g\\n", c[i], b[i]);
}
"""
# NAN in places, and in all of the row 3; the largest and the smallest number of each row are somewhere inside.
MIXED = MAIN.replace("FILL", "i == 3 || (i + j) % 5 == 0 ? NAN : (i * 7 + j * 29) % 61 - 30.5")
MIXED = MIXED.replace("START", "i == 9 ? 99 : 0")


def relaxed(text: str, strategy: str = "cpu-vector") -> str:
    scop = parse_c(text)
    return generate_file(scop, text, schedule(scop, replace(config.load(strategy), relax_reductions=True)).tree())


@pytest.fixture(autouse=True)
def small_loops_run_on_threads(monkeypatch):
    monkeypatch.setattr(work, "PARALLEL_WORK", 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")


@pytest.mark.parametrize("strategy", ["cpu-vector", "pluto"])
@pytest.mark.parametrize("body, operator", [
    ("for (int i = 0; i < n; i++) c[0] = fmax(c[0], a[1][i]);", "max"),
    ("for (int i = 0; i < n; i++) c[0] = fmin(a[1][i] * a[2][i], c[0]);", "min"),
    ("for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) c[i] = fmax(c[i], a[i][j]);", "max"),
    ("for (int i = 1; i < n; i++) b[0] = fminf(b[0], b[i]);", "min"),
    ("for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) c[0] = fmin(c[0], a[i][j]);", "min"),
])  # fmt: skip
def test_maxima_are_made_in_parts_and_are_exact(body, operator, strategy, tmp_path):
    text = function(body, HEAD)
    new = relaxed(text, strategy)
    assert re.search(rf"#pragma omp .*reduction\({operator}:part0\)", new)
    assert output(new + MIXED, tmp_path) == output(text + MIXED, tmp_path)
    scop = parse_c(text)
    assert "reduction(" not in generate_file(scop, text, schedule(scop, strategy).tree())  # none unless it is asked for


@pytest.mark.parametrize("body", [
    "for (int i = 0; i < n; i++) { c[0] = fmax(c[0], a[1][i]); b[i] = c[0]; }",
    "for (int i = 0; i < n; i++) c[0] = fmax(c[0], a[1][i]) + 1;",
    "for (int i = 0; i < n; i++) c[0] = fmax(fabs(c[0]), a[1][i]);",
    "for (int i = 0; i < n - 1; i++) c[i + 1] = fmax(c[i], a[1][i]);",
])  # fmt: skip
def test_what_is_no_maximum_of_one_element_stays_in_order(body, tmp_path):
    text = function(body, HEAD)
    new = relaxed(text)
    assert "reduction(" not in new and output(new + MIXED, tmp_path) == output(text + MIXED, tmp_path)


# In order, 1 is lost in 1e16 each time. Lanes that do not hold 1e16 keep theirs.
LARGE_FIRST = MAIN.replace("FILL", "j ? 1 : 1e16").replace("START", "0")
LANES = {
    "element": "for (int j = 0; j < n; j++) c[0] += a[0][j];",
    "elements of an array": "for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) c[i] += a[i][j];",
    "differences": "for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) c[i] -= a[i][j];",
}


@pytest.mark.parametrize("name", LANES)
def test_simd_lanes_make_sums_in_parts(name, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text, optimised = function(LANES[name], HEAD), ("-O3", *FLAGS[1:])
    new = relaxed(text)
    dropped, count = re.subn(r" reduction\([-+]:part0\)", "", new)
    assert count == 1 and re.search(r"#pragma omp .*simd.* reduction\(\+:part0\)", new)

    def sums(program):
        lines = output(program + LARGE_FIRST, tmp_path, optimised).splitlines()
        return [abs(float(line.split()[0])) for line in lines[: 1 if name == "element" else None]]

    assert set(sums(text)) == set(sums(dropped)) == {1e16} and min(sums(new)) > 1e16
