"""C programs as people write them: the scheduled program prints what the original prints, or one sentence refuses it."""

from dataclasses import dataclass

import islpy as isl
import pytest

from npu_sparse.schedule import testing
from npu_sparse.schedule.c.print import generate_file
from npu_sparse.schedule.frontend.c import parse_c
from npu_sparse.schedule.isl_baseline import mark_parallel
from npu_sparse.schedule.plan import original
from npu_sparse.schedule.scop import ScopError
from npu_sparse.schedule.testing import generated, output

MAIN = """
int main(void) {
  static double a[40], b[40]; static int u[40];
  for (int i = 0; i < 40; i++) a[i] = i % 7 - 2.5, b[i] = i, u[i] = 3 * i - 20;
  f(12, a + 4, b + 4, u + 4);
  for (int i = 0; i < 40; i++) printf("%.17g %.17g %d\\n", a[i], b[i], u[i]);
}
"""
SIGNATURE = "void f(int n, double a[n], double b[n], int u[n])"


def function(body: str, head: str = SIGNATURE, before: str = "", after: str = "", file: str = "") -> str:
    return testing.function(body, head, before, after, file)


def agree(text: str, directory, main: str = MAIN, strategies=("cpu-vector",), **options) -> None:
    testing.agree(text, directory, main, strategies, **options)


@dataclass(frozen=True)
class Case:
    """A region, what stands around it, and what the caller does."""

    body: str
    before: str = ""
    after: str = ""
    file: str = ""
    head: str = SIGNATURE
    main: str = MAIN


TYPES = {
    "unsigned operand": Case("for (int i = 0; i < n; i++) b[i] = (i - 5) % 8u;"),
    "unsigned iterator": Case("for (unsigned i = 0; i < n; i++) b[i] = i - 2;"),
    "unsigned long iterator": Case("for (size_t i = 0; i < n; i++) b[i] = i - 2;"),
    "range check by a cast": Case("for (int i = 0; i < n; i++) if ((unsigned)(i - 1) < (unsigned)(n - 1)) b[i] = a[i - 1];"),
    "narrow subscript": Case("for (int i = 0; i < 600; i++) ring[(uint8_t)i] += i;", before="static int ring[256];",
                             after="for (int i = 0; i < n; i++) b[i] = ring[i];"),
    "narrow signed subscript": Case("for (int i = 0; i < 600; i++) ring[(int8_t)i + 128] += i;", before="static int ring[256];",
                                    after="for (int i = 0; i < n; i++) b[i] = ring[i] + ring[i + 128];"),
    "long constant": Case("for (int i = 0; i < n; i++) b[i] = s * 100000;", before="const long s = 100000;"),
    "negative constant": Case("for (int i = 0; i < n; i++) b[i] = -m * a[i];", before="const int m = -3;"),
    "unsigned constant": Case("for (int i = 0; i < n; i++) b[i] = m / 2 + i;", before="const unsigned m = -1;"),
    "short constant": Case("for (int i = 0; i < n; i++) b[i] = m * i;", before="const short m = 70000;"),
    "smallest int": Case("for (int i = 0; i < n; i++) b[i] = m + i;", before="const int m = -2147483647 - 1;"),
    "shifted iterator": Case("for (int i = 0; i < n; i++) b[i] = (i - 6) >> 1u | ~i;"),
    "iterator divided by unsigned": Case("for (int i = 0; i < n; i++) b[i] = (i - 5) / 8u;"),
    "unsigned product": Case("for (unsigned i = 0; i < n; i++) b[i] = i * 500000000u;"),
    "comparison as unsigned": Case("for (int i = 0; i < n; i++) b[i] = i - 5 < 3u;"),
    "unsigned division in a subscript": Case("for (int i = 0; i < n; i++) u[i] = v[(i - 5) % 8u];", before="int v[8]; "
                                             "for (int i = 0; i < 8; i++) v[i] = i * i;"),
    "division of an iterator": Case("for (int i = 0; i < n; i++) b[i] = (i - 6) / 4 + (i - 6) % 4;"),
    "short iterator": Case("for (short i = 0; i < n; i++) b[i] = i * 3000;"),
    "compound assignment to an integer": Case("for (int i = 0; i < n; i++) u[i] /= (i - 20) | 1u;"),
    "unsigned global parameter": Case("for (int i = 0; i < k; i++) b[i] = i - k;", file="unsigned k = 9;"),
    "unsigned parameter in a skewed nest": Case(
        "for (int t = 0; t < 4; t++) for (int i = 1; i + 1 < m; i++) b[i] = b[i - 1] + b[i + 1];",
        head="void f(size_t m, double *restrict a, double *restrict b, int *u)"),
    "global that another function sets": Case("for (int i = 0; i < n; i++) b[i] = K * i;", "set();",
                                              file="int K = 3;\nvoid set(void) { K = 5; }"),
    "typedef": Case("for (index_t i = 0; i < n; i++) b[i] = i - 2;",
                    file="typedef unsigned int uint_32;\ntypedef uint_32 index_t;"),
    "typedef in a function": Case("for (index_t i = 0; i < n; i++) { real x = a[i]; b[i] = x * x + i - 2; }",
                                  before="typedef unsigned index_t; typedef float real;"),
    "enumerator": Case("for (int i = 0; i < LAST; i++) b[i] = SIZE - i;", file="enum { SIZE = 10, LAST };"),
    "sum with an iterator of its type": Case("for (unsigned i = 0; i < n; i++) b[i] = (i - 3) / 2 + 0.5;"),
    "local integer": Case("for (int i = 0; i < n; i++) { int k = n - 1 - i; b[k] = a[i] + k % 3u; }"),
    "local unsigned": Case("for (int i = 0; i < n; i++) { const unsigned k = i - 3; b[i] = k; }"),
    "iterator that hides an extent": Case("for (int n = 0; n < 5; n++) b[n] = a[n] + 1;\nb[n - 1] = 9;"),
}


@pytest.mark.parametrize("name", TYPES)
def test_types_keep_their_meaning(name, tmp_path):
    case = TYPES[name]
    strategies = ("pluto",) if "skewed" in name else ("cpu-vector",)
    agree(function(case.body, case.head, case.before, case.after, case.file), tmp_path, case.main, strategies)


@pytest.mark.parametrize("cast, element", [("(uint8_t)i", "0"), ("(int8_t)i + 128", "128"), ("(unsigned short)(i + 65280)", "0")])
def test_a_narrow_subscript_comes_back_to_its_element(cast, element):
    scop = parse_c(function(f"for (int i = 0; i < 600; i++) ring[{cast}] = a[i];", before="static double ring[65536];"))
    turn = scop.statements[0].writes[0].relation.intersect_domain(isl.Set("{ S0[256] }")).range()
    assert turn.is_equal(isl.Set(f"{{ ring[{element}] }}"))


REFUSED = {
    "for (unsigned i = 0; i < m; i++) p[i] = i;": "unsigned value must be known to lie between 0 and 4294967295, got m",
    "for (size_t i = 0; i < m; i++) p[i] = i;": "unsigned value must be known to lie between 0 and 18446744073709551615, got m",
    "for (unsigned i = 0; i < w - 1; i++) p[i] = i;": "unsigned value must be known to lie between 0 and 4294967295, got w - 1",
    "for (unsigned i = w; i >= 0; i--) p[i] = i;": "loop must end before its iterator of type unsigned wraps around, got i >= 0",
    "for (uint8_t i = 250; i > 0; i += 3) p[i] = i;": "loop condition must bound i in the direction of its step, got i > 0",
    "for (int i = l; i > 0; i--) p[i] = i;": "value must be known to fit int, got l",
    "for (int i = 0; i < 9; i++) p[(int)l] = i;": "value must be known to fit int, got (int) l",
    "for (int i = 0; i < 9; i++) p[(unsigned)(m + i)] = i;":
        "unsigned value must be known not to wrap around, got one that may in p[(unsigned) (m + i)] = i",
    "for (int i = 0; i < 9; i++) p[i] = v;": "variable must not be volatile or of one thread, got v",
    "for (char c = 0; c < 9; c++) p[c] = 1;": "loop must start with one integer assignment, got char c = 0",
}


@pytest.mark.parametrize("body", REFUSED)
def test_what_may_wrap_around_is_refused(body):
    text = function(body, head="void f(int m, unsigned w, long l, double *p)", before="volatile double v;")
    with pytest.raises(ScopError) as caught:
        parse_c(text)
    assert str(caught.value) == f"<text>:9: {REFUSED[body]}"


EXTENTS = {
    "n = n - 1": (Case("for (int i = 0; i < n; i++) a[i][i] = 1;", "n = n - 1;", head="void f(int n, double a[n][n])"),
                  "7: extent of a must not change after its declaration, got n = n - 1"),
    "a loop that changes n": (Case("for (int i = 0; i < 3; i++) a[i][i] = 1;", "for (; n > 2; n--)",
                                   head="void f(int n, double a[n][n])"),
                              "extent of a must not change after its declaration, got n--"),
    "an inner n": (Case("for (int i = 0; i < n; i++) a[i][i] = 1;", "int k = n; { int n = k - 1;", "}",
                        head="void f(int n, double a[n][n])"),
                   "8: extent of a must name what is visible at the scop, got another n"),
    "a local array": (Case("for (int i = 0; i < n; i++) v[i][i] = 1;", "double v[n][n]; n--;", "b[0] = v[0][0];",
                           head="void f(int n, double b[9])"),
                      "7: extent of v must not change after its declaration, got n--"),
    "a global that a call may change": (Case("for (int i = 0; i < 3; i++) a[i][i] = 1;", "g();", file="int N; void g(void);",
                                             head="void f(double a[N][N])"),
                                        "7: extent of a must not change after its declaration, got g()"),
    "a local extent": (Case("for (int i = 1; i < n; i++) { double v[i][i]; v[0][0] = 1; b[i] = v[0][0]; }"),
                       "9: extent of v must not change in the scop, got i"),
}


@pytest.mark.parametrize("name", EXTENTS)
def test_an_extent_that_changes_is_refused(name):
    case, sentence = EXTENTS[name]
    body = f"{{ {case.body} }}" if "loop" in name else case.body
    text = function(body, case.head, case.before, case.after, case.file)
    if "loop" in name:
        text = text.replace("n--)", "n--) {").replace("#pragma endscop\n", "#pragma endscop\n}\n")
    with pytest.raises(ScopError) as caught:
        parse_c(text)
    assert str(caught.value).endswith(sentence)


@pytest.mark.parametrize("before", ["double v[n][n]; for (int i = 0; i < n; i++) v[i][0] = v[i][i] = i;",
                                    "int n0 = n; { int n = n0 - 3; n--; } double v[n0][n0];"])
def test_an_extent_that_only_others_change_is_kept(before, tmp_path):
    body = "for (int i = 0; i < n; i++) v[i][i] = a[i];\nfor (int i = 0; i < n; i++) b[i] = v[n - 1 - i][n - 1 - i];"
    agree(function(body, before=before, after="b[1] = v[3][3]; n = 0;"), tmp_path)


@pytest.mark.parametrize("declaration, body, sentence", [
    ("struct s { int x; } v, w;", "v = w;", "variable must hold numbers, got v of type struct s"),
    ("typedef struct { int x; } T; T v[9], w;", "v[2] = w;", "variable must hold numbers, got v of type T"),
    ("union { int x; } v;", "v = v;", "variable must hold numbers, got v of type union"),
    ("union { int x; } v;", "v.x = 1;", "field must be a number or an array of a struct, got v.x, a union"),
    ("void *v = a;", "v = 0;", "array must have 1 subscripts, got v"),
])
def test_what_holds_no_numbers_is_refused(declaration, body, sentence):
    with pytest.raises(ScopError) as caught:
        parse_c(function(body, before=declaration))
    assert str(caught.value) == f"<text>:9: {sentence}"


def test_an_enumeration_holds_numbers(tmp_path):
    text = function("for (int i = 0; i < n; i++) { v[i] = i % 2 ? RED : BLUE; b[i] = v[i] + 1; }", before="enum colour v[40];",
                    after="a[0] = v[3] + v[4];", file="enum colour { RED, BLUE = 5 };")
    agree(text, tmp_path)


TWICE = MAIN.replace("f(12, a + 4, b + 4, u + 4);", "for (int r = 0; r < 3; r++) f(12, a + 4, b + 4, u + 4);")
ARRAY = "for (int i = 0; i < n; i++) { t[0] = a[i] + i; b[i] = t[0] * t[0]; }"
TEMPORARY = "for (int i = 0; i < n; i++) { t = a[i] + i; b[i] = t * t; }"
LIVE = {
    "static scalar": Case(TEMPORARY, "static double t;\nb[0] += t;", main=TWICE),
    "static array": Case(ARRAY, "static double t[1];\nb[0] += t[0];", main=TWICE),
    "goto around": Case(TEMPORARY, "double t = 0; int turn = 0;\nagain: b[0] += t; a[0] = t;", "if (turn++ < 2) goto again;"),
    "pointer to a scalar": Case(TEMPORARY, "double t, *p = &t;", "a[1] = *p;"),
    "pointer to a local array": Case(ARRAY, "double t[1], *p = t;", "a[1] = *p;"),
    "local pointer": Case(ARRAY.replace("t[0]", "p[0]"), "double t, *p = &t;", "a[1] = t;"),
    "read after the enclosing block": Case(TEMPORARY, "double t = 0;\nif (n > 3) {", "}\na[1] = t;"),
    "global": Case(TEMPORARY, file="double t;", main=MAIN.replace("u + 4);", 'u + 4); printf("%g\\n", t);')),
    "switch around": Case(TEMPORARY, "double t = 0;\nswitch (n) { case 12: {", "} }\na[1] = t;"),
}


@pytest.mark.parametrize("name", LIVE)
def test_what_lives_on_is_kept(name, tmp_path):
    case = LIVE[name]
    text = function(case.body, case.head, case.before, case.after, case.file)
    expected = output(text + case.main, tmp_path)
    scop = parse_c(text)
    # The loops as they are written, every one that may run in threads doing so: a dead temporary becomes private.
    new = generate_file(scop, text, mark_parallel(scop, original(scop).tree()))
    assert output(new + case.main, tmp_path) == expected, new
    assert generated(text, "cpu-vector") and output(generated(text, "cpu-vector") + case.main, tmp_path) == expected


def test_a_temporary_that_nothing_reads_is_private():
    text = function(TEMPORARY, before="double t;")
    assert "private(t)" in generated(text, "cpu-vector")


@pytest.mark.parametrize("before, name", [("double t, *p = &t;", "t"), ("double t, *q = &t, *p; p = q + 0;", "t"),
                                          ("double t, *p = a;", "a"), ("double t; int k = 3, *p = (n > 3 ? &k : 0);", "k")])
def test_two_names_of_one_place_are_refused(before, name):
    text = function("for (int i = 0; i < n; i++) { t = a[i]; p[0] += t; }", before=before)
    text = text.replace("i < n", "i < k") if "k" in before else text
    with pytest.raises(ScopError, match=f"pointer must not lead into what the scop uses by name, got p and {name}"):
        parse_c(text)


@pytest.mark.parametrize("after, before", [("if (n > 40) i = 0;\nb[1] = i;", "int i;"), ("}\nb[1] = i;", "int i;\n{"),
                                           ("}", "int i = 0;\nfor (int r = 0; r < 2; r++) {\nb[r] = i;"),
                                           ("b[1] = *p;", "int i, *p = &i;"), ("b[1] += ++i;", "static int i;\nb[0] += i;")])
@pytest.mark.parametrize("loop", ["for (i = 0; i < n; i++)", "for (i = 0; i < n - 1 && i < 5; i += 3)",
                                  "for (i = n; i > 2; i -= 2)", "for (i = n + 3; i < n; i++)"])
def test_an_iterator_that_lives_on_has_its_last_value(loop, after, before, tmp_path):
    agree(function(f"{loop} a[i] = 0;\nb[0] += 1;", before=before, after=after), tmp_path, TWICE)


@pytest.mark.parametrize("body", ["for (int r = 0; r < n; r++) for (i = 0; i < r; i++) a[i] = 0;",
                                  "if (n > 3) for (i = 0; i < n; i++) a[i] = 0;"])
def test_an_iterator_that_lives_on_from_inside_is_refused(body):
    sentence = "<text>:8: loop iterator that is read after the scop must have its last loop outside of others, got i"
    with pytest.raises(ScopError, match=sentence):
        parse_c(function(body, before="int i = 0;", after="b[1] = i;"))
    assert parse_c(function(body, before="int i = 0;", after="i = 2; b[1] = i;"))


ROWS = {
    "rows of an argument": "for (int i = 0; i < 3; i++) for (int j = 0; j < n / 3; j++) b[i * (n / 3) + j] = a[j];",
    "rows of a parameter":
        "for (int i = 1; i < 3; i++) for (int j = 0; j < m; j++)\n b[i * m + j] = b[(i - 1) * m + j] + b[i * m + j - m];",
    "pointers":
        "for (int i = 1; i < 3; i++) for (int j = 0; j < m; j++) *(b + i * m + j) = *(b + (i - 1) * m + j) + b[j] + *a;",
    "planes":
        "for (int i = 0; i < 2; i++) for (int j = 0; j < k2; j++) for (int k = 0; k < m; k++)\n"
        "b[(i * k2 + j) * m + k] = a[k] + i - j;",
    "last column": "if (m > 0) for (int i = 0; i < 3; i++) { b[i * m + m - 1] = 7; b[i * m] = b[i * m + m - 1] + 1; }",
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_an_array_without_them(name, tmp_path):
    before = "int m = n / 4, k2 = n / 6;"
    text = function(ROWS[name], before=before)
    if name == "rows of an argument":
        text = text.replace("(n / 3)", "m").replace("n / 3", "m")
    dimensions = {access.relation.dim(isl.dim_type.out) for s in parse_c(text).statements for access in s.writes}
    assert dimensions == {3 if name == "planes" else 2}
    agree(text, tmp_path, strategies=("cpu-vector", "pluto"))


@pytest.mark.parametrize("body, sentence", [
    ("for (int i = 0; i < n; i++) for (int j = 0; j <= m; j++) b[i * m + j] = 1;",
     "part j of the subscript must be known to lie between 0 and m - 1, got b[(i * m) + j]"),
    ("for (int i = 0; i < n; i++) for (int j = 0; j < m; j++) { b[i * m + j] = 1; b[i * n] = 1; }",
     "b must have the same strides in all of its subscripts, got b[i * n]"),
    ("for (unsigned i = 0; i < 9; i++) b[i * w] = 1;", "subscript must be affine in loop iterators and parameters, got i * w"),
    ("for (int i = 0; i < n; i++) b[i * i] = 1;", "subscript must be affine in loop iterators and parameters, got i * i"),
])
def test_rows_that_may_overlap_are_refused(body, sentence):
    with pytest.raises(ScopError) as caught:
        parse_c(function(body, head="void f(int n, int m, unsigned w, double *b)"))
    assert str(caught.value) == f"<text>:9: {sentence}"


@pytest.mark.parametrize("call", ["rand()", "next(a[i])", "erand48(s)", "printf(0)", "time(0)"])
def test_a_call_that_may_have_state_is_refused(call):
    text = function(f"for (int i = 0; i < n; i++) b[i] = {call};", head="void f(int n, double s, double a[n], double b[n])")
    with pytest.raises(ScopError) as caught:
        parse_c(text)
    assert str(caught.value).startswith(f"<text>:9: function must be known to be pure (see --pure), got {call}")


@pytest.mark.parametrize("declaration", [
    "__attribute__((const)) double g(double x);\ndouble g(double x) { return 3 * x; }",
    "static double __attribute__((noinline, __const__)) g(double x) { return 3 * x; }",
    "double g(double x) __attribute__((const));\ndouble g(double x) { return 3 * x; }",
])
def test_a_function_with_the_attribute_const_is_pure(declaration, tmp_path):
    agree(function("for (int i = 0; i < n; i++) b[i] = g(a[i]) + g(i);", file=declaration), tmp_path)
    with pytest.raises(ScopError, match="function must be known to be pure"):
        parse_c(function("for (int i = 0; i < n; i++) b[i] = g(a[i]);", file=declaration.replace("const", "cold")))


def test_a_caller_says_what_is_pure(tmp_path):
    text = function("for (int i = 0; i < n; i++) b[i] = g(a[i]);", file="double g(double x) { return 3 * x; }")
    agree(text, tmp_path, pure=("g",))


BRANCHES = {
    "a loop": "for (int i = 0; i < n; i++) if (a[i] > 0) for (int j = 0; j <= i; j++) b[j] += a[i] * j;",
    "a loop in both branches": "for (int i = 0; i < n; i++) if (a[i] > 0) { for (int j = i; j < n; j++) b[j] += 1; } else "
                               "for (int j = 0; j < i; j++) b[j] = a[j];",
    "two loops, one inside of the other": "for (int i = 0; i < n; i++) if (b[i] > 3) for (int j = 0; j < i; j++) "
                                          "for (int k = j; k < n; k += 2) { if (a[k] > 0) a[k] -= b[j]; else u[k]++; }",
    "a loop with a pragma": "for (int i = 0; i < n; i++) if (a[i] > 0) {\n#pragma GCC ivdep\n"
                            "for (int j = 0; j < n; j++) u[j] += j; }",
    "a loop that counts down": "for (int i = 0; i < n; i++) if (a[i] > 0) for (int j = n - 1; j > i; j--) b[j] = b[j - 1];",
    "a variable": "for (int i = 0; i < n; i++) if (a[i] > 0) { double x = a[i] * a[i]; b[i] = x; x += 1; b[i] *= x; }",
    "a variable in a loop": "for (int i = 0; i < n; i++) if (a[i] > 0) for (int j = 0; j < i; j++) "
                            "{ double x = a[j]; b[i] += x; }",
    "variables of both branches": "for (int i = 0; i < n; i++) if (a[i] > 0) { int x = i / 2; b[x] += x; } "
                                  "else { double x = a[i]; u[i] = x * 2; }",
    "the same names twice": "for (int i = 0; i < n; i++) { if (a[i] > 0) { int x = i; u[i] = x; } if (b[i] > 4) { double x = 2; "
                            "for (int j = 0; j < n; j++) b[j] += x; } for (int j = 0; j < n; j++) u[j] += 3; }",
    "an iterator in a type of its own": "for (unsigned char i = 0; i < 12; i++) if (a[i] > 0) "
                                        "for (short j = 0; j < i; j++) b[j] = i / 2;",
}


@pytest.mark.parametrize("name", BRANCHES)
def test_loops_and_variables_below_a_condition_on_data_belong_to_its_statement(name, tmp_path):
    agree(function(BRANCHES[name]), tmp_path, strategies=("cpu-vector", "pluto"))


def test_a_statement_with_a_loop_inside_may_touch_what_the_loop_reaches():
    [statement] = parse_c(function("for (int i = 0; i < n; i++) if (a[i] > 0) for (int j = i; j < n; j++) b[j] += 1;")).statements
    [write] = statement.writes
    expected = isl.Map("[n] -> { S0[i] -> b[j] : 0 <= i <= j < n }")
    assert write.may and write.relation.is_equal(expected) and statement.iterators == ("i",)


@pytest.mark.parametrize("body, message", [
    ("int j; for (int i = 0; i < n; i++) if (a[i] > 0) for (j = 0; j < n; j++) b[j] = i;",
     "loop below a condition on data must declare its iterator, got j = 0"),
    ("for (int i = 0; i < n; i++) { double x = 1; if (a[i] > 0) { double x = 2; b[i] = x; } b[i] += x; }",
     "must be of a variable with a name of its own, got double x = 2"),
    ("for (int i = 0; i < n; i++) if (a[i] > 0) { double x[3]; x[0] = 1; b[i] = x[0]; }",
     "must be of a variable with a name of its own, got double x[3]"),
    ("for (int i = 0; i < n; i++) if (a[i] > 0) for (int j = 0; j < u[i]; j++) b[j] = 1;", "u[i]"),
    ("for (int i = 0; i < n; i++) if (a[i] > 0) break;", "a[i] > 0"),
])  # fmt: skip
def test_what_stays_refused_below_a_condition_on_data(body, message):
    with pytest.raises(ScopError) as error:
        parse_c(function(body))
    assert message in str(error.value)
