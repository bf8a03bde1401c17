"""The C front end, against a step-by-step execution of the same text."""

import random
from pathlib import Path

import pytest
import yaml

import npu_sparse.schedule
from npu_sparse.schedule import testing
from npu_sparse.schedule.frontend.c import parse_c
from npu_sparse.schedule.frontend.preprocess import preprocess
from npu_sparse.schedule.scop import ScopError

KERNELS = Path(npu_sparse.schedule.__file__).parent / "kernels"
MANIFEST = yaml.safe_load((KERNELS / "manifest.yaml").read_text())
NAMES = sorted(path.stem for path in KERNELS.glob("*.c"))


def scop_text(body, head="void f(int n, int m, double A[n][m], double B[n], double s)", before=""):
    return f"{head}\n{{\n{before}\n#pragma scop\n{body}\n#pragma endscop\n}}\n"  # the body begins on line 5


def trace(text, n=5, m=4):
    return testing.execute(text, {"n": n, "m": m})


def described(text, n=5, m=4):
    return [instance for _, instance in testing.instances(parse_c(text), {"n": n, "m": m})]


def test_there_are_thirty_kernels():
    assert len(NAMES) == 30 and set(NAMES) == set(MANIFEST)


@pytest.mark.parametrize("name", NAMES)
def test_kernel_describes_its_execution(name):
    path = KERNELS / f"{name}.c"
    scop = parse_c(path)
    assert (scop.name, scop.function) == (name, f"kernel_{name}")
    for extra in (0, 1):
        sizes = {p: 3 if p.startswith("t") else 5 + (k + extra) % 2 for k, p in enumerate(scop.parameters)}
        executed = testing.execute(path.read_text(), sizes)
        assert executed == [instance for _, instance in testing.instances(scop, sizes)]
        assert len(executed) >= 18


@pytest.mark.parametrize("name", NAMES)
def test_kernel_stays_inside_its_arrays(name):
    scop = parse_c(KERNELS / f"{name}.c")
    sizes = {p: 3 + k % 3 for k, p in enumerate(scop.parameters)}
    for _, instance in testing.instances(scop, sizes):
        for array, indices in instance.reads | instance.writes:
            extents = [eval(extent, {}, sizes) for extent in scop.arrays[array].shape]
            assert len(extents) == len(indices) and all(0 <= i < e for i, e in zip(indices, extents)), (array, indices)


@pytest.mark.parametrize("name", NAMES)
def test_manifest_gives_every_argument_a_value(name):
    scop, entry = parse_c(KERNELS / f"{name}.c"), MANIFEST[name]
    values = [a.name for a in scop.arguments if not a.shape and a.ctype == "int"]
    assert list(entry["small"]) == values and list(entry["large"]) == values
    assert list(entry.get("scalars", {})) == [a.name for a in scop.arguments if not a.shape and a.ctype != "int"]
    live = [a for a in scop.arrays.values() if a.live_out]
    written = {access.array for statement in scop.statements for access in statement.writes}
    assert live and all(a.shape and a.name in written for a in live)


@pytest.mark.parametrize("seed", range(120))
def test_random_scop_describes_its_execution(seed):
    text = testing.random_scop(seed)
    n, m = random.Random(seed).choice([(4, 4), (3, 5), (5, 2), (1, 1)])
    try:
        instances = described(text, n, m)
    except ScopError as error:
        assert "conditions that never hold" in str(error) and not trace(text, n, m)
        return
    assert instances == trace(text, n, m)


@pytest.mark.parametrize("body", [
    "for (int i = n - 1; i >= 0; i--) B[i] = B[i] + 1;",
    "for (int i = n; i > 1; i = i - 2) B[i - 1] = s;",
    "for (int i = 1; n > i; i = 3 + i) B[i] += s;",
    "for (int i = 0; i <= n - 1 && i < m; ++i) B[i] -= s;",
    "for (int i = 0; 2 * i < n; i++) B[2 * i] *= s;",
    "for (int i = n - 1; i >= 0; i -= 3)\nfor (int j = i; j < m; j += 2)\nA[i][j] = B[n - 1 - i];",
    "for (int i = 0; i < n; i++)\nif (i == 2 || i > 3 && !(i >= m))\nB[i] = 0;\nelse\nB[i] = 1;",
    "for (int i = 0; i < n; i++)\nif (i % 2 == 1)\nB[i / 2] = B[i % 3];",
    "for (int i = 0; i < n; i++)\nB[i] = i > 0 ? B[i - 1] : s;",
    "for (int i = 0; i < n; i++)\nB[i] = i > 0 && i < m ? (i < 2 ? s : A[i][0]) : B[0];",
    "for (int i = 0; i < n; i++)\nB[i] = B[i] > s ? A[i][0] : A[0][i];",
    "for (int i = 0; i < n; i++) {\ndouble t = B[i];\nB[i] = t * t;\n}",
    "for (int i = 0; i < n; i++) {\nB[i]++;\n--s;\n}",
    "for (int i = 0; i < n; i++)\nB[i] = sqrt(fabs(A[i][0]) + pow(s, 2.0)) + (double)i / n;",
    "if (n > 3)\ns = 0;\nif (m - 1)\ns = 1;",
    "for (int i = 0; i < n; i++)\nB[(i - 3) / 2 + 1] = A[i][(i - 2) % 2 + 1];",
    "for (int i = 0; i != n; i++) B[i] = 0;",
    "for (int i = n - 1; i != -1; i--)\nB[i] = A[i][0];",
    "{\n;\n{\ns = 0;\n}\n}",
])
def test_construct_describes_its_execution(body):
    text = scop_text(body)
    for n, m in ((5, 4), (3, 6), (1, 1)):
        assert described(text, n, m) == trace(text, n, m)
    assert trace(text)


def test_a_loop_that_counts_down_has_a_negative_position():
    scop = parse_c(scop_text("s = 0;\nfor (int i = n - 1; i >= 0; i--)\nfor (int j = 0; j < m; j++)\nA[i][j] = s;"))
    assert [s.position for s in scop.statements] == [(0,), (1, "-i", 0, "j", 0)]
    assert [s.line for s in scop.statements] == [5, 8]
    assert scop.region == (4, 9)


def test_body_puts_iterators_in_parentheses_and_constants_in_place():
    text = scop_text("for (int i = 0; i < n; i++) A[i][c] += s * f(i, n) + (double)i;", before="const int c = 3;")
    scop = parse_c(text, pure=("f",))
    assert scop.statements[0].body == "A[(i)][3] += (s * f(((int) (i)), n)) + ((double) (i));"
    assert str(scop.statements[0].writes[0].relation) == "[n, m] -> { S0[i] -> A[i, 3] : 0 <= i < n }"


def test_parameters_are_the_integers_that_shape_the_scop():
    scop = parse_c(scop_text("for (int i = 0; i < n; i++) B[i] = k * s;", head="void f(int n, int k, double B[n], double s)"))
    assert scop.parameters == ("n",) and list(scop.arrays) == ["k", "B", "s"]
    assert [a.array for a in scop.statements[0].reads] == ["k", "s"]
    assert [(a.name, a.shape, a.ctype) for a in scop.arguments] == [
        ("n", (), "int"), ("k", (), "int"), ("B", ("n",), "double"), ("s", (), "double")]
    assert str(scop.context) == "[n] -> {  : n > 0 }"  # B has an element


def test_an_integer_that_the_scop_changes_is_data():
    scop = parse_c(scop_text("for (int i = 0; i < n; i++) k = k + 1;", head="void f(int n, int k)"))
    assert scop.parameters == ("n",) and scop.statements[0].writes[0].array == "k"


@pytest.mark.parametrize(("assignment", "operator"), [
    ("B[i] += s", "+"), ("B[i] -= A[i][0]", "+"), ("B[i] *= 2", "*"), ("B[i] /= s", "*"), ("B[i]++", "+"),
    ("B[i] = B[i] + s", "+"), ("B[i] = s + B[i]", "+"), ("B[i] = s + B[i] - A[i][0]", "+"), ("B[i] = B[i] * s / 2", "*"),
    ("B[i] = fmax(B[i], s)", "max"), ("B[i] = fminf(s, B[i])", "min"), ("B[i] += B[n + i]", "+"),
    ("B[i] = s - B[i]", None), ("B[i] = s / B[i]", None), ("B[i] = B[i] * s + 1", None), ("B[i] += B[i]", None),
    ("B[i] = B[i] + B[i]", None), ("B[i] += B[0]", None), ("B[i] = s", None), ("B[i] = fmax(B[i] + 1, s)", None),
    ("B[i] = B[i - 1] + s", None), ("B[i] = 2 * B[i] + s", None), ("B[i] = fmod(B[i], s)", None),
])
def test_reduction(assignment, operator):
    statement = parse_c(scop_text(f"for (int i = 0; i < n; i++) {assignment};")).statements[0]
    assert statement.reduction == operator
    if operator:
        assert statement.reads[0].relation.is_equal(statement.writes[0].relation)


def test_live_out_is_what_others_can_see():
    body = "s = 0;\nt = s;\nu = t;\nB[0] = u;\nG[0] = A[0][0];"
    text = "double G[10];\n" + scop_text(body, before="double t, u;").replace("endscop\n", "endscop\ns = t;\n")
    live = {name for name, array in parse_c(text).arrays.items() if array.live_out}
    assert live == {"B", "G", "s", "t"}
    assert [a.name for a in parse_c(text.replace("scop\n", "scop live_out(u)\n", 1)).arrays.values() if a.live_out] == ["u"]


def test_live_out_includes_what_an_enclosing_loop_reads_again():
    text = scop_text("B[r] = t;\nt = s;", before="{ float n; }\ndouble t = 0;\nfor (int r = 0; r < n; r++) {")
    scop = parse_c(text.replace("endscop\n", "endscop\n}\n"))
    assert {name for name, a in scop.arrays.items() if a.live_out} == {"B", "t"}
    assert scop.parameters == ("n", "r")


def test_extents_may_be_any_expression():
    scop = parse_c(scop_text("B[0] = 0;", head="void f(int n, double B[n / 2 + n * n])"))
    assert scop.arrays["B"].shape == ("(n / 2) + (n * n)",)


def test_macros_comments_and_other_functions():
    text = """#include <stdio.h>
#define N 8 /* a comment
   of two lines */
#define AT(a, i) a[(i) + 1]
#define TWICE(x) \\
    AT(B, x) + AT(B, x)  // both
#ifdef DEBUG
#error not here
#elif defined(N) && N > 7
#define STEP i++
#endif
static void unknown(foo_t *x) { while (x->y) x = x->next; }
void helper(bar_t);
void f(double B[N + 1])
{
    const char *name = "#pragma scop /* no comment */";
#pragma scop
    for (int i = 0; i < N; STEP)
        AT(B, i) = TWICE(i -
                         1);  // the call spans two lines
#pragma omp something
    B[0] = '/';
#pragma endscop
}
"""
    scop = parse_c(text)
    assert [s.line for s in scop.statements] == [19, 22]
    assert scop.statements[0].body == "B[(i) + 1] = B[((i) - 1) + 1] + B[((i) - 1) + 1];"
    assert str(scop.statements[0].domain) == "{ S0[i] : 0 <= i <= 7 }"
    assert preprocess(text, "").count("\n") == text.count("\n")


def test_a_function_is_chosen_by_name():
    text = scop_text("s = 1;") + scop_text("s = 2;").replace("void f", "void g")
    assert parse_c(text, "g").statements[0].body == "s = 2;"
    with pytest.raises(ScopError, match="<text>: function must be named where several hold a scop, got f, g"):
        parse_c(text)


def test_gcc_preprocesses_a_file_with_headers(tmp_path):
    (tmp_path / "sizes.h").write_text("#include <stdlib.h>\n#define EXTENT(n) n\ntypedef struct { int x; } odd;\n")
    path = tmp_path / "k.c"
    path.write_text('#include "sizes.h"\n#include <stdio.h>\nvoid k(int n, double B[EXTENT(n)])\n{\n#pragma scop\n'
                    "for (int i = 0; i < EXTENT(n) + PAD; i++)\nB[i] = 0;\n#pragma endscop\n}\n")
    scop = parse_c(path, cpp=("-DPAD=0",))
    assert scop.name == "k" and scop.statements[0].line == 7
    with pytest.raises(ScopError, match=r"k.c: preprocessor must succeed, got .*sizes.h"):
        parse_c(path, cpp=("-include", "missing/sizes.h"))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ScopError, match="none.c: source must be a readable text file, got "):
        parse_c(tmp_path / "none.c")
    (tmp_path / "none.c").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScopError, match="none.c: source must be a readable text file, got "):
        parse_c(tmp_path / "none.c")


# What is refused: the scop's text, then line and sentence.
REFUSED = [
    ("for (int i = 0; i < n; i++)\nB[i * i] = 0;", "6: subscript must be affine in loop iterators and parameters, got i * i"),
    ("for (int i = 0; i < n; i++)\nB[i] = A[i][n * m + 1];",
     "6: subscript must be affine in loop iterators and parameters, got n * m in (n * m) + 1"),
    ("B[(int) s] = 0;", "5: subscript must be affine in loop iterators and parameters, got s in (int) s"),
    ("B[B[0]] = 0;", "5: subscript must be affine in loop iterators and parameters, got B[0]"),
    ("k = 3;\nB[k] = 0;", "6: subscript must be affine in loop iterators and parameters, got k"),
    ("B[n % m] = 0;", "5: subscript must be affine in loop iterators and parameters, got n % m"),
    ("for (int i = 0; i < s; i++) B[i] = 0;", "5: loop condition must be affine in loop iterators and parameters, got s"),
    ("for (int i = B[0]; i < n; i++) B[i] = 0;", "5: loop bound must be affine in loop iterators and parameters, got B[0]"),
    ("for (int i = 0; i > n; i++) B[i] = 0;", "5: loop condition must bound i in the direction of its step, got i > n"),
    ("for (int i = 0; m < n; i++) B[i] = 0;", "5: loop condition must bound i in the direction of its step, got m < n"),
    ("for (int i = n; i < m; i--) B[i] = 0;", "5: loop condition must bound i in the direction of its step, got i < m"),
    ("for (int i = 0; ; i++) B[i] = 0;", "5: loop condition must bound i, got none"),
    ("for (int i = 1; i < n; i *= 2) B[i] = 0;", "5: loop step must be a constant other than 0, got i *= 2"),
    ("for (int i = 1; i < n; i += m) B[i] = 0;", "5: loop step must be a constant other than 0, got i += m"),
    ("for (int i = 1; i < n; i += 0) B[i] = 0;", "5: loop step must be a constant other than 0, got i += 0"),
    ("for (int i = 1; i < n; ) B[i] = 0;", "5: loop step must be a constant other than 0, got none"),
    ("for (int i = 0, j = 0; i < n; i++) B[i] = 0;", "5: loop must start with one integer assignment, got int i = 0, j = 0"),
    ("for (; k < n; k++) B[k] = 0;", "5: loop must start with one integer assignment, got none"),
    ("for (float i = 0; i < n; i++) B[0] = 0;", "5: loop must start with one integer assignment, got float i = 0"),
    ("for (s = 0; s < n; s++) B[0] = 0;", "5: loop iterator must be an integer variable, got s"),
    ("for (q = 0; q < n; q++) B[q] = 0;", "5: loop iterator must be declared, got q"),
    ("for (int i = 0; i < n; i++)\nfor (int i = 0; i < n; i++)\nB[i] = 0;",
     "6: loop iterator must differ from those of the enclosing loops, got i"),
    ("for (k = 0; k < n; k++)\nk += 1;", "5: loop iterator must not be assigned in the scop outside of its for, got k"),
    ("for (int i = 0; i < n; i++)\nB[i] = k;\nfor (k = 0; k < n; k++)\nB[k + i] = 0;",
     "8: subscript must be affine in loop iterators and parameters, got i in k + i"),
    ("while (s > 0) s -= 1;", "5: statement must be an assignment, a for loop or an if, got while"),
    ("for (int i = 0; i < n; i++) {\nif (i > 2)\nbreak;\nB[i] = 0;\n}",
     "7: statement must be an assignment, a for loop or an if, got break"),
    ("s = 1;\nreturn;", "6: statement must be an assignment, a for loop or an if, got return"),
    ("print(s);", "5: statement must be an assignment, a for loop or an if, got print(s)"),
    ("s = q + 1;", "5: name must be declared, got q"),
    ("s = Q[0];", "5: array must be declared, got Q[0]"),
    ("s = A[0];", "5: A must have 2 subscripts, got A[0]"),
    ("s = p[0][1];", "5: array must have extents, got pointers to pointers in p[0][1]"),
    ("for (k = 0; k < n; k++) B[k] = 0;\ns = k;", "4: loop iterator must not be read outside of its loop, got k"),
    ("B[k] = 0;\nfor (k = 0; k < n; k++) B[k] = 0;", "4: loop iterator must not be read outside of its loop, got k"),
    ("s = f(B);", "5: array must have 1 subscripts, got B"),
    ("s = *(&B[0]);", "5: expression must have no side effects and no pointers, got *(&B[0])"),
    ("s = k++;", "5: expression must have no side effects and no pointers, got k++"),
    ("*(&B[0]) = 1;", "5: assignment must be to a variable or an element, got *(&B[0])"),
    ("s = S0(1);", "5: function must not have the name of a statement, got S0(1)"),
    ("double t = 1;\ndouble t = 2;", "6: t must be declared once, got a second declaration in the scop"),
    ("", "4: scop must hold a statement, got none"),
    ("if (n > n)\ns = 0;", "4: scop must execute a statement, got conditions that never hold"),
    ("for (int i = 0; i < n; i++\nB[i] = 0;", "6: source must be C, got before: B"),
    ("s = 1;\ns = ;", "6: source must be C, got invalid expression"),
    ("B[0] = @;", "5: source must be C, got illegal character '@'"),
]


@pytest.mark.parametrize(("body", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_refused(body, sentence, tmp_path):
    path = tmp_path / "k.c"
    path.write_text(scop_text(body, head="void f(int n, int m, int k, double A[n][m], double B[n], double s, double **p)"))
    with pytest.raises(ScopError) as caught:
        parse_c(path)
    assert str(caught.value) == f"{path}:{sentence}"


def test_the_last_value_of_an_iterator_is_left_behind():
    text = scop_text("for (k = 0; k < n; k++) B[k] = 0;", before="int k;")
    after = "endscop\nfor (k = 0; k < 3; k++) B[k] = k;\n"
    assert parse_c(text.replace("endscop\n", after)).tail == ()
    assert parse_c(text.replace("endscop\n", "endscop\nB[0] = k;\n")).tail == ("for (k = 0; k < n; k++);",)


@pytest.mark.parametrize(("text", "sentence"), [
    ("void f() {\n}\n", "<text>: source must hold #pragma scop, got none"),
    ("void f() {\n#pragma endscop\n}\n", "<text>:2: #pragma endscop must follow #pragma scop, got none"),
    ("void f() {\n#pragma scop\n}\n", "<text>:2: #pragma scop must end with #pragma endscop in f, got none"),
    ("#pragma scop\n#pragma endscop\n", "<text>:1: #pragma scop must stand in a function, got it outside"),
    ("void f() {\n{\n#pragma scop\n;}\n#pragma endscop\n}\n",
     "<text>:3: #pragma scop must end with #pragma endscop in the same block, got none"),
    (scop_text("s = 0;\n#pragma endscop\n#pragma scop"), "<text>:7: function must hold one scop, got a second in f"),
    (scop_text("s = 0;").replace("pragma scop", "pragma scop fast"),
     "<text>:4: #pragma scop must have no clause but live_out(names), got fast"),
    (scop_text("s = 0;").replace("pragma scop", "pragma scop live_out(B)"),
     "<text>:4: live_out must name arrays of the scop, got B"),
    ("void f() {\n/* open\n", "<text>:2: comment must end with */, got the end of the file"),
    ("#if 1\n" + scop_text("s = 0;"), "<text>:9: #if must end with #endif, got the end of the file"),
    ("#endif\n" + scop_text("s = 0;"), "<text>:1: #endif must follow #if, got none"),
    ("#if f(x)\n#endif\n" + scop_text("s = 0;"), "<text>:1: condition of #if must be an integer constant, got '0(0)'"),
    ("#error no\n" + scop_text("s = 0;"), "<text>:1: #error must not be reached, got 'no'"),
    ("#define M(a) a\n" + scop_text("s = M(1, 2);"), "<text>:6: M must have 1 arguments, got 2"),
    ("void f() {\n{\n#pragma scop\n", "<text>:1: braces must match, got { without an end"),
    ("void f() {\n}\n}\n#pragma scop\n", "<text>:3: braces must match, got an extra }"),
])
def test_malformed_file(text, sentence):
    with pytest.raises(ScopError) as caught:
        parse_c(text)
    assert str(caught.value) == sentence


def test_code_that_is_nested_too_deeply():
    with pytest.raises(ScopError, match="<text>: code must be nested less deeply, got too many levels"):
        parse_c(scop_text(f"s = {'(' * 5000}1{')' * 5000};"))


@pytest.mark.parametrize(("expression", "value"), [
    ("-7 / 2", -3), ("-7 % 2", -1), ("7 / -2", -3), ("7 % -2", 1), ("-8 / -4", 2), ("017 + 0x1F + 3UL", 49), ("2 * (3 - 5)", -4),
    ("!3", 0), ("!0 && 2 > 1 || 0", 1), ("3 != 3", 0),
])
def test_integer_constants_are_those_of_c(expression, value):
    scop = parse_c(f"#if ({expression}) != ({value})\n#error no\n#endif\n" + scop_text(f"B[0] = 0;\nB[({expression}) + 9] = 1;"))
    assert str(scop.statements[1].writes[0].relation) == f"{{ S1[] -> B[{value + 9}] }}".replace("{ S", "[n] -> { S")
