"""Files as people keep them: where the region stands, what surrounds it, what its names are."""

import subprocess
import sys
from pathlib import Path

import pytest

from npu_sparse.schedule import config
from npu_sparse.schedule.c.print import generate_file
from npu_sparse.schedule.c.run import run
from npu_sparse.schedule.frontend import preprocess
from npu_sparse.schedule.frontend.c import parse_c
from npu_sparse.schedule.frontend.preprocess import EXPANDED
from npu_sparse.schedule.isl_baseline import mark_parallel
from npu_sparse.schedule.plan import original
from npu_sparse.schedule.scheduler import schedule
from npu_sparse.schedule.scop import ScopError

HEAD = "#include <stdio.h>\n#include <math.h>\n"
FLAGS = ("-O1", "-fopenmp", "-ffp-contract=off", "-std=gnu11", "-w", "-Werror=implicit-function-declaration")
MAIN = """
int main(void) {
  double a[40], b[40];
  for (int i = 0; i < 40; i++) a[i] = i % 7 - 2.5, b[i] = i;
  f(12, a + 4, b + 4);
  for (int i = 0; i < 40; i++) printf("%.17g %.17g\\n", a[i], b[i]);
}
"""
SIGNATURE = "void f(int n, double a[n], double b[n])"
REGION = "#pragma scop\nfor (int i = 0; i < n; i++) b[i] = 2 * a[i];\n#pragma endscop\n"


def output(text: str, directory: Path) -> str:
    (directory / "p.c").write_text(HEAD + text + MAIN)
    done = subprocess.run(["gcc", *FLAGS, "p.c", "-lm", "-o", "p"], cwd=directory, capture_output=True, text=True)
    assert not done.returncode, done.stderr + text
    return subprocess.run([directory / "p"], capture_output=True, text=True, timeout=20, check=True).stdout


def agree(text: str, directory: Path, function: str | None = None) -> str:
    """The file after scheduling; it prints what it printed before."""
    scop = parse_c(text, function)
    new = generate_file(scop, text, schedule(scop, config.load("cpu-vector")).tree())
    assert output(new, directory) == output(text, directory), new
    return new


SURROUNDINGS = {
    "static on its own line": "static\nvoid\nf(int n, double a[n], double b[n])\n{\n" + REGION + "}\n",
    "brace and function on one line": "int x; " + SIGNATURE + " {\n" + REGION + "}\n",
    "function behind a comment": "/* of two\nlines */ " + SIGNATURE + " {\n" + REGION + "}\n",
    "function behind a macro": "#define M \\\n  0\n" + SIGNATURE + " {\n" + REGION + "}\n",
    "pragma in a comment": "/*\n#pragma scop\n#pragma endscop\n*/\n// #pragma scop\n" + SIGNATURE + " {\n/*\n#pragma scop\n*/\n"
                           + REGION + "}\n",
    "pragma under #if 0": "#if 0\n#pragma scop\n" + REGION + "#endif\n" + SIGNATURE + " {\n#if 0\n" + REGION + "#else\n" + REGION
                          + "#endif\n}\n",
    "pragma in a string": 'const char *s = "\\\n#pragma scop\\\n";\n' + SIGNATURE + " {\n" + REGION + "}\n",
    "attribute": "__attribute__((noinline)) " + SIGNATURE + " {\n" + REGION + "}\n",
    "attribute on its own line": "__attribute__((noinline,\n  aligned(16)))\n" + SIGNATURE + " {\n" + REGION + "}\n",
    "attributes of parameters": "static inline void f(int n, double *__restrict__ a, double *__restrict b "
                                "__attribute__((unused))) {\n" + REGION + "}\n",
    "declaration first": SIGNATURE + " __attribute__((hot));\n" + SIGNATURE + " {\n" + REGION + "}\n",
    "semicolons of Windows": (SIGNATURE + " {\n" + REGION + "}\n").replace("\n", "\r\n"),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_stay_as_they_are(name, tmp_path):
    new = agree(SURROUNDINGS[name], tmp_path)
    assert new.count("#pragma omp") >= 1 and "b[i] = 2 * a[i]" not in new.split("#else")[-1].split("*/")[-1]


def test_one_of_two_functions_is_scheduled(tmp_path):
    other = SIGNATURE.replace("f(", "g(") + " {\n" + REGION.replace("b[i] = 2 * a[i]", "a[i] = 3 * b[i]") + "}\n"
    for text in (SIGNATURE + " {\n" + REGION + "}\n" + other, other + SIGNATURE + " {\n" + REGION + "}\n"):
        new = agree(text, tmp_path, "f")
        assert "a[i] = 3 * b[i]" in new and new.count("#pragma scop") == 1
        both = generate_file(parse_c(new, "g"), new, schedule(parse_c(new, "g"), config.load("cpu-vector")).tree())
        assert "#pragma scop" not in both and output(both, tmp_path) == output(text, tmp_path)


def test_printed_code_is_nothing_but_code(tmp_path):
    path = tmp_path / 'k "quoted" \'.c'
    path.write_text(HEAD + SIGNATURE + " {\n" + REGION + "}\n")
    environment = {"PYTHONPATH": str(Path(__file__).parents[3]), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "npu_sparse", "schedule", path.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr
    assert done.stdout.startswith(HEAD)
    (tmp_path / "out.c").write_text(done.stdout)
    subprocess.run(["gcc", *FLAGS, "-c", "out.c"], cwd=tmp_path, check=True)


def test_a_quote_in_a_name_and_an_error(tmp_path):
    path = tmp_path / 'k"\\.c'
    path.write_text(SIGNATURE + " {\n" + REGION.replace("b[i] =", "b[i * i] =") + "}\n")
    with pytest.raises(ScopError) as caught:
        parse_c(path)
    assert str(caught.value) == f"{path}:3: subscript must be affine in loop iterators and parameters, got i * i"
    path.write_text(SIGNATURE + " {\n" + REGION.replace("b[i] =", "b[i] ==") + "}\n")
    with pytest.raises(ScopError) as caught:
        parse_c(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    path.write_text("#define N 3\n" + SIGNATURE + " {\n" + REGION.replace("n;", "N;") + "}\n")
    assert str(parse_c(path, cpp=("-DM=1",)).statements[0].domain) == "[n] -> { S0[i] : 0 <= i <= 2 }"


WORKSPACE = """#include <stdlib.h>
void f(int n, double a[n], double b[n]) {
  double *w = malloc(n * sizeof(double));
  double (*v)[n] = malloc(n * n * sizeof(double));
#pragma scop
  for (int i = 0; i < n; i++) {
    for (int j = 0; j < n; j++) { w[j] = a[i] * j; v[1][j] = w[j]; }
    for (int j = 0; j < n; j++) b[i] += w[n - 1 - j] + v[1][n - 1 - j];
  }
#pragma endscop
  free(w); free(v);
}
"""


def test_a_workspace_of_malloc_keeps_its_size(tmp_path):
    for strategy in ("cpu-vector", "pluto"):
        scop = parse_c(WORKSPACE)
        new = generate_file(scop, WORKSPACE, schedule(scop, config.load(strategy)).tree())
        assert output(new, tmp_path) == output(WORKSPACE, tmp_path)
    new = generate_file(scop, WORKSPACE, mark_parallel(scop, original(scop).tree()))
    assert output(new, tmp_path) == output(WORKSPACE, tmp_path)
    dead = WORKSPACE.replace("#pragma scop", "#pragma scop live_out(b)")
    new = generate_file(parse_c(dead), dead, mark_parallel(parse_c(dead), original(parse_c(dead)).tree()))
    assert output(new, tmp_path) == output(WORKSPACE, tmp_path)


def test_private_arrays_bring_their_declarations(tmp_path):
    text = """void f(int n, double a[n], double b[n]) {
  double w[n];
#pragma scop
  for (int i = 0; i < n; i++) {
    for (int j = 0; j < n; j++) w[j] = a[i] * j;
    for (int j = 0; j < n; j++) b[i] += w[n - 1 - j];
  }
#pragma endscop
}
"""
    scop = parse_c(text)
    new = generate_file(scop, text, mark_parallel(scop, original(scop).tree()))
    assert "malloc(" in new and output(new, tmp_path) == output(text, tmp_path)


# EACH is a loop over i; between SCOP and END is the region.
NAMES = {
    "max and min":
        "double max = -9, min = 9;\nSCOP\nEACH { max = fmax(max, a[i]); min = fmin(min, a[i]); }\n"
        "EACH b[i] = max - min;\nEND\na[0] = max + min;\n",
    "mod as a bound": "int mod = n - 2;\nSCOP\nfor (int i = 0; i < mod; i++) b[i] = mod * a[i];\nEND\n",
    "floor as an iterator": "SCOP\nfor (int floor = 0; floor < n; floor++) b[floor] = a[floor] - floor;\nEND\n",
    "rat as an array": "double rat[n];\nSCOP\nEACH rat[i] = a[i];\nEACH b[i] = rat[i];\nEND\na[0] = rat[1];\n",
    "one local name in two loops":
        "SCOP\nEACH { double t = a[i]; b[i] = t * t; }\n"
        "for (int i = 1; i < n; i++) { float t = b[i - 1]; { int t = 3; a[i] = t; } a[i] += t; }\nEND\n",
    "a local that hides an argument": "SCOP\nEACH { double n = a[i]; b[i] = n * n; }\nEND\n",
    "MIN and MAX of a macro":
        "#define MIN(a, b) ((a) < (b) ? (a) : (b))\n#define MAX(a, b) ((a) > (b) ? (a) : (b))\nSCOP\n"
        "for (int t = 0; t < n; t += 4) for (int i = MAX(t, 1); i < MIN(t + 4, n - 1); i++) b[i] = b[i - 1] + a[i];\n"
        "END\n",
    "half the elements": "SCOP\nfor (int i = 0; i < n/2; i++) b[i] = a[n - 1 - i];\nEND\n",
    "half of what may be negative": "int m = n - 20;\nSCOP\nfor (int i = 8; i > m / 3 + 4; i--) b[i] = i;\nEND\n",
    "a shift": "SCOP\nfor (int i = 0; i < n >> 1; i++) b[i << 1] = a[(i - 3 >> 1) + 2];\nEND\n",
    "enumerators": "enum { FIRST = 2, NEXT, LAST = FIRST * 4 };\nSCOP\nfor (int i = FIRST; i < LAST; i++) b[i] = NEXT;\nEND\n",
    "typedefs of an index": "typedef long idx;\nSCOP\nfor (idx i = 0; i < (idx)n; i++) b[i] = i;\nEND\n",
    "a periodic subscript": "SCOP\nEACH b[i] = a[i == 0 ? n - 1 : i - 1] + a[i == n - 1 ? 0 : i + 1];\nEND\n",
    "chained assignments": "SCOP\nEACH { float t; a[i] = t = b[i] = 0.1; a[i] += b[i] -= t; }\nEND\n",
    "a condition on data":
        "double t = 0;\nSCOP\n"
        "for (int i = 1; i < n; i++) { if (a[i] > 0) { b[i] = a[i]; t += 1; } else if (a[i] < -2)\n"
        "b[i] = i; }\nfor (int i = 1; i < n; i++) b[i] = b[i] * 2 + t;\nEND\n",
    "a temporary under a condition on data": "double t = 0;\nSCOP\nEACH { if (a[i] > 0) t = a[i]; b[i] = t; }\nEND\n",
    "an affine local": "SCOP\nEACH { const int k = n - 1 - i; int l = k; b[l] = a[i] + k / 2; }\nEND\n",
    "commas": "SCOP\nEACH a[i] = 2, b[i] = a[i] + i;\nEND\n",
    "unequal":
        "SCOP\nfor (int i = n - 1; i != -1; --i) b[i] = a[i];\n"
        "for (int i = 0; i != n; i++) if (i != 3) a[i] = b[i];\nEND\n",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_and_expressions_of_users(name, tmp_path):
    text = NAMES[name].replace("EACH", "for (int i = 0; i < n; i++)")
    text = text.replace("SCOP", "#pragma scop").replace("END", "#pragma endscop")
    agree(SIGNATURE + " {\n" + text + "}\n", tmp_path)


def test_arguments_that_isl_cannot_name_have_sizes():
    text = "void f(int max, double min[max]) {\n#pragma scop\nfor (int i = 0; i < max; i++) min[i] *= 2;\n#pragma endscop\n}\n"
    scop = parse_c(text)
    new = generate_file(scop, text, schedule(scop, config.load("cpu-vector")).tree())
    wrong = text.replace("*= 2", "*= 3")
    results = run(scop, {"original": text, "new": new, "wrong": wrong}, {"max": 9}, repeats=1)
    assert [bool(result.difference) for result in results] == [False, False, True]


def test_macros_that_grow_without_end_are_refused(tmp_path):
    bomb = "#define A0 1 + 1\n" + "".join(f"#define A{k + 1} A{k} + A{k}\n" for k in range(60))
    sentence = f"macros must expand to at most {EXPANDED} characters, got more"
    for text in (bomb + SIGNATURE + " {\n" + REGION.replace("2 *", "A60 *") + "}\n",
                 bomb.replace("A0", "A0(x)", 1) + SIGNATURE + " {\n" + REGION.replace("2 *", "A60 *") + "}\n",
                 bomb + "#if A60\n#endif\n" + SIGNATURE + " {\n" + REGION + "}\n"):
        try:
            parse_c(text)
        except ScopError as error:
            assert sentence in str(error)
        else:
            assert "A0(x)" in text  # the name without its parentheses is no call: nothing grows


@pytest.mark.slow
def test_macros_that_grow_without_end_are_refused_by_gcc_too(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "GCC_SECONDS", 2)  # it uses up all of this processor time
    path = tmp_path / "k.c"
    path.write_text("#define A0 1 + 1\n" + "".join(f"#define A{k + 1} A{k} + A{k}\n" for k in range(60)) +
                    SIGNATURE + " {\n" + REGION.replace("2 *", "A60 *") + "}\n")
    with pytest.raises(ScopError, match="preprocessor must"):
        parse_c(path, cpp=())
