"""Every form of C that the scheduler promises to take: the scheduled program prints what the original prints."""

from dataclasses import dataclass

import pytest

from npu_sparse.schedule.c.print import generate_file
from npu_sparse.schedule.frontend.c import parse_c
from npu_sparse.schedule.scheduler import schedule
from npu_sparse.schedule.testing import agree, function, output

HEAD = "void f(int n, int m, double a[n], double b[n])"
MAIN = """
int main(void) {
  static double a[80], b[80];
  for (int i = 0; i < 80; i++) a[i] = i % 7 - 2.5, b[i] = i;
  f(24, 5, a + 4, b + 4);
  for (int i = 0; i < 80; i++) printf("%.17g %.17g\\n", a[i], b[i]);
}
"""
HEADER = """#include <stdio.h>
#define ROUND(x) ((x) / 4 * 4)
typedef struct { void (*call)(int); } Hooks;
typedef __int128 wide_int;
enum { WIDE = 80 };
static inline int twice(int x) { struct { int y; } z = {x}; return 2 * z.y; }
struct inner { double w[WIDE]; };
typedef struct inner Store;
"""
MACROS = "#define MIN(x, y) ((x) < (y) ? (x) : (y))\n#define MAX(x, y) ((x) > (y) ? (x) : (y))\n"


@dataclass(frozen=True)
class Form:
    """A region, and what stands around it."""

    body: str
    before: str = ""
    after: str = ""
    file: str = ""
    head: str = HEAD


FORMS = {
    "minimum of a macro": Form(
        "for (int t = 0; t < n; t += 5) for (int i = MAX(t, 1); i < MIN(t + 5, n); i++) b[i] += b[i - 1];", file=MACROS),
    "minimum of a call": Form("for (int t = 0; t < n; t += 5) for (int i = max(t, 1); i < min(t + 5, n); i++) b[i] += b[i - 1];",
                              file="static int min(int x, int y) { return x < y ? x : y; }\n"
                                   "static int max(int x, int y) { return x > y ? x : y; }"),
    "minimum of an expression": Form("for (int i = m < 3 ? m : 3; i < (n < 20 ? n : 20); i++) b[i] = a[i] + b[i - 1];"),
    "choice in a bound": Form("for (int i = 0; i < (m == 5 ? n - 2 : n); i++) b[i] = 2 * a[i];"),
    "periodic subscripts": Form("for (int i = 0; i < n; i++) b[i] = a[i == 0 ? n - 1 : i - 1] + a[i == n - 1 ? 0 : i + 1];"),
    "periodic by a remainder": Form("for (int i = 0; i < 24; i++) b[i] = a[(i + 23) % 24] - a[(i + 1) % 24];"),
    "chained assignments": Form("for (int i = 0; i < n; i++) { float t; a[i] = t = b[i] = 0.1 * i; a[i] += b[i] *= t; }"),
    "unequal": Form("for (int i = 0; i != n; i++) b[i] = a[i];\nfor (int i = n - 1; i != 2; i--) if (i != 7) b[i] += b[i - 1];"),
    "division in a bound": Form("for (int i = 0; i < (n - 1) / 4; i++) b[i] = a[4 * i];"),
    "division towards zero": Form("for (int i = 8; i > (m - 20) / 4 + 4; i--) b[i] = a[i];"),
    "shift in a bound": Form("for (int i = 0; i < n >> 1; i++) b[i << 1] = a[(i - 9 >> 2) + 3];"),
    "rows of constant length": Form(
        "for (int i = 1; i < 4; i++) for (int j = 0; j < 6; j++) b[i * 6 + j] += b[(i - 1) * 6 + j];"),
    "rows of a parameter": Form("for (int i = 1; i < 4; i++) for (int j = 0; j < m; j++) b[i * m + j] += b[i * m + j - m];"),
    "pointers": Form("for (int i = 1; i < n; i++) *(p + i) = *(p + i - 1) + *q * *(q - 2 + i) + *(q - i + n);",
                     head="void f(int n, int m, double *q, double *p)"),
    "restrict and static": Form(
        "for (int i = 1; i < n; i++) b[i] = b[i - 1] + a[i];",
        head="void f(int n, int m, const double a[restrict static n], double b[const restrict static 8])"),
    "extent of static": Form("for (int i = 0; i < 6; i++) for (int j = 0; j < 4; j++) v[i][j] += a[4 * i + j] * i;",
                             after="for (int i = 0; i < 24; i++) b[i] = v[i / 4][i % 4];", before="static double v[6][4];"),
    "iterator read after its loop": Form("int k; for (i = 2; i < n; i += 3) b[i] = a[i]; for (j = m; j >= 0; j--) b[j] = 1;",
                                         "int i, j;", "a[0] = i + 100 * j;"),
    "local declarations": Form("for (int i = 0; i < n; i++) { int k = n - 1 - i; const double x = a[k], y = x * x; double z[2]; "
                               "z[0] = y; z[1] = x; b[k] = z[0] - z[1] + k / 3; }"),
    "typedefs": Form("for (index_t i = 0; i < n; i++) { real t = a[i] / 3; row[i] = t; b[i] = row[i]; }", "row_t row;",
                     file="typedef long index_t; typedef float real; typedef real row_t[40];"),
    "condition on data": Form("for (int i = 1; i < n; i++) { if (a[i] > 0 && b[i] > m) { b[i] = a[i - 1]; t += b[i]; } "
                              "else if (a[i] < -1) b[i] -= t; b[i] *= 2; }", "double t = 1;", "a[0] = t;"),
    "choice by data": Form("for (int i = 1; i < n; i++) b[i] = a[i] > 0 ? b[i - 1] : a[i];"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_form_is_taken_and_keeps_its_meaning(name, tmp_path):
    form = FORMS[name]
    text = function(form.body, form.head, form.before, form.after, form.file)
    agree(text, tmp_path, MAIN, ("cpu-vector", "pluto"))


def test_several_regions_of_one_function(tmp_path):
    text = function(
        "for (int i = 1; i < n; i++) b[i] = b[i - 1] + a[i];", HEAD,
        after="a[2] = b[n - 1];\n#pragma scop\nfor (int i = 0; i < n; i++) a[i] = b[n - 1 - i];\n#pragma endscop\nb[3] = a[1];",
    )  # fmt: skip
    new = text
    for number in (2, 1):  # from the end, so that the first one's number stays
        scop = parse_c(new, number=number)
        new = generate_file(scop, new, schedule(scop, "cpu-vector").tree())
    assert "#pragma scop" not in new and output(new + MAIN, tmp_path) == output(text + MAIN, tmp_path)


def test_headers_and_definitions_come_through_the_preprocessor(tmp_path):
    (tmp_path / "sizes.h").write_text(HEADER)
    text = function("for (int i = SKIP; i < ROUND(n); i++) s.w[i] = a[i] * SKIP;", HEAD, "static Store s;",
                    "for (int i = 0; i < n; i++) b[i] = s.w[i];", '#include "sizes.h"')  # fmt: skip
    path = tmp_path / "k.c"
    path.write_text(text)
    scop = parse_c(path, cpp=(f"-I{tmp_path}", "-DSKIP=3"))
    new = generate_file(scop, text, schedule(scop, "cpu-vector").tree())
    flags = ("-O1", "-fopenmp", "-w", "-DSKIP=3", f"-I{tmp_path}")
    assert "#pragma scop" not in new and output(new + MAIN, tmp_path, flags) == output(text + MAIN, tmp_path, flags)
