"""Fields of structs, as scalars, arrays and parameters: scheduled programs print what the originals print."""

import pytest

from npu_sparse.schedule.c.run import RunError, run
from npu_sparse.schedule.frontend.c import parse_c
from npu_sparse.schedule.scop import ScopError
from npu_sparse.schedule.testing import agree, function, generated

TYPES = """
enum { SIDE = 12 };
typedef double real;
struct point { int tag; real x, v[3]; };
typedef struct grid {
  int n; unsigned m; real a[40], b[SIDE][SIDE + 1], *w, sum; struct point at; volatile int raw; int bit : 3;
} Grid;
typedef struct node { real x; struct node *next; } Node;
union both { int i; float f; };
struct grid g;
"""
MAIN = """
int main(void) {
  static struct grid s, t; static real w[60]; static struct point q[20];
  s.n = 12, s.m = 5, s.w = w, t = s, t.w = w + 30, g = s;
  for (int i = 0; i < 40; i++) s.a[i] = t.a[i] = g.a[i] = i % 7 - 2.5, w[i] = i % 5;
  for (int i = 0; i < 144; i++) s.b[i / 12][i % 12] = t.b[i / 12][i % 12] = i % 11;
  for (int i = 0; i < 20; i++) q[i].tag = i, q[i].x = i * .5, q[i].v[2] = -i;
  f(12, &s, &t, q, w + 45);
  struct grid *all[] = {&s, &t, &g};
  for (int k = 0; k < 3; k++) {
    printf("%d %u %.17g %d %.17g\\n", all[k]->n, all[k]->m, all[k]->sum, all[k]->at.tag, all[k]->at.x);
    for (int i = 0; i < 40; i++) printf("%.17g ", all[k]->a[i]);
    for (int i = 0; i < 144; i++) printf("%.17g ", all[k]->b[i / 12][i % 12]);
  }
  for (int i = 0; i < 60; i++) printf("%.17g ", w[i]);
  for (int i = 0; i < 20; i++) printf("%d %.17g %.17g %.17g\\n", q[i].tag, q[i].x, q[i].v[0], q[i].v[2]);
}
"""
HEAD = "void f(int n, struct grid *p, Grid *r, struct point *q, double *c)"
FIELDS = {
    "array behind a pointer": "for (int i = 0; i < n; i++) p->a[i] = 2 * p->a[i] + i;",
    "array of a struct": ("for (int i = 1; i < n; i++) s.a[i] = s.a[i - 1] + 1;", "struct grid s = *p;", "*p = s;"),
    "rows": "for (int i = 0; i < n; i++) for (int j = 1; j < n; j++) p->b[i][j] += p->b[i][j - 1] * p->a[j];",
    "pointer in a struct": "for (int i = 0; i < n; i++) { p->w[i] += 1; r->w[i] = p->w[i] * p->a[i]; }",
    "rows of a pointer": "for (int i = 1; i < 4; i++) for (int j = 0; j < p->n; j++)\n"
                         "p->w[i * p->n + j] = p->w[(i - 1) * p->n + j] + 1;",
    "scalars": "r->sum = 0; for (int i = 0; i < n; i++) r->sum += p->a[i]; p->at.x = r->sum / 2;",
    "temporary": "for (int i = 0; i < n; i++) { p->sum = p->a[i] * 2; r->a[i] = p->sum * p->sum; }",
    "temporary of a struct that lives on": (
        "for (int i = 0; i < n; i++) { s.sum = s.a[i] * 2; r->a[i] = s.sum * s.sum; }", "struct grid s = *p;", "*p = s;"),
    "bounds": "for (int i = 0; i < p->n; i++) for (unsigned j = 0; j < r->m; j++) p->b[i][j] = i - j;",
    "two structs": "for (int i = 0; i < p->n; i++) for (int j = 0; j < r->n; j++) p->b[i][j] += r->b[j][i];",
    "struct in a struct": "for (int i = 0; i < 3; i++) { p->at.v[i] = i; p->a[i] = p->at.v[i]; } p->at.tag = n;",
    "dereferenced": "for (int i = 0; i < (*p).n; i++) { (*p).a[i] += p->at.x; p[0].sum = i; }",
    "global": "for (int i = 0; i < g.n; i++) g.a[i] += 1; g.sum = g.a[3];",
    "elements of an array": "for (int i = 0; i < n; i++) { q[i].x += 1; q[i].v[2] = q[i].x * 2; q[i].tag = i + 3; }",
    "neighbours in an array": "for (int t = 0; t < 3; t++) for (int i = 1; i < n; i++) q[i].x = q[i - 1].x + q[i + 1].v[2];",
    "elements below a condition": "for (int i = 0; i < n; i++) if (q[i].x > 2) { q[i].x -= p->a[i]; p->sum += i; }",
    "local array of structs": ("for (int i = 0; i < n; i++) { z[i].x = i; c[i] = z[n - 1 - i].v[1]; }",
                               "struct point z[20] = {{0}};", "c[0] += z[3].x;"),
    "names that are taken": ("for (int i = 0; i < n; i++) p_a += p->a[i];", "double p_a = 3;", "p->sum = p_a;"),
    "a macro of that name": ("for (int i = 0; i < n; i++) r->a[i] = p->a[i] + i;", "\n#define r_a 3\n", "p->sum = r_a;"),
    "a struct of isl's name": ("for (int i = 0; i < n; i++) max.a[i] += max.at.x;", "struct grid max = *p;", "*p = max;"),
    "a chain": "for (int i = 0; i < n; i++) p->a[i] = r->sum = i;",
    "pointer that was made for it": ("for (int i = 0; i < n; i++) r->w[i] = p->a[i];", "r->w = malloc(n * sizeof *r->w);",
                                     "for (int i = 0; i < n; i++) c[i] = r->w[i];"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_are_variables_and_arrays(name, tmp_path):
    body, before, after = FIELDS[name] if isinstance(FIELDS[name], tuple) else (FIELDS[name], "", "")
    agree(function(body, HEAD, before, after, TYPES), tmp_path, MAIN, ("cpu-vector", "pluto"))


def test_no_thread_has_a_field_of_its_own():
    body, before, after = FIELDS["temporary of a struct that lives on"]
    text = function(body, HEAD, before, after, TYPES)
    assert "#pragma omp parallel for" not in generated(text, "cpu-vector")


def test_elements_of_different_fields_are_apart():
    text = function("for (int i = 1; i < n; i++) q[i].x = q[i - 1].v[2];", HEAD, file=TYPES)
    scop = parse_c(text)
    assert set(scop.fields.values()) == {"q[].x", "q[].v"} and scop.arrays["q_v"].shape == ("", "3")
    assert "#pragma omp parallel for" in generated(text, "cpu-vector")


REFUSED = {
    "for (int i = 0; i < n; i++) v.i = i;": "field must be a number or an array of a struct, got v.i, a union",
    "for (int i = 0; i < n; i++) p->bit = i;": "field must be a number or an array of a struct, got p->bit, a bit-field",
    "for (int i = 0; i < n; i++) p->raw = i;": "variable must not be volatile or of one thread, got p->raw",
    "for (int i = 0; i < n; i++) l->next->x = i;":
        "field must be a number or an array of a struct, got l->next->x, a pointer behind a pointer",
    "for (int i = 0; i < n; i++) p->none[i] = 1;":
        "field must be a number or an array of a struct, got p->none, what no struct of the file declares",
    "for (int i = 0; i < n; i++) n.x = 1;":
        "field must be a number or an array of a struct, got n.x, what no struct of the file declares",
    "for (p->n = 0; p->n < n; p->n++) p->a[p->n] = 1;": "loop iterator must be an integer variable, got p->n",
    "for (int i = 0; i < n; i++) n->x = 1;": "field must be a number or an array of a struct, got n->x, what is no pointer",
    "for (int i = 0; i < n; i++) p->at = q[i];": "variable must hold numbers, got p->at of type struct point",
    "for (int i = 0; i < n; i++) { struct point z; z.x = 1; p->a[i] = z.x; }":
        "struct must be declared before the scop, got struct point z",
    "for (int i = 0; i < p->n; i++) p->n = i;": "loop condition must be affine in loop iterators and parameters, got p->n",
    "for (int i = 0; i < n; i++) z.x = 1;": "name must be declared, got z.x",
}


@pytest.mark.parametrize("body", REFUSED)
def test_what_no_field_can_be_is_refused(body):
    with pytest.raises(ScopError) as caught:
        parse_c(function(body, HEAD.replace("double *c", "Node *l"), "union both v;", file=TYPES))
    assert str(caught.value).partition(": ")[2] == REFUSED[body]


ALIASES = {
    "a struct and its address": ("for (int i = 0; i < n; i++) t->a[i] = s.a[n - 1 - i];", "struct grid s, *t = &s;"),
    "a scalar and its address": ("for (int i = 0; i < n; i++) { t->sum = i; c[i] = s.sum; }", "struct grid s, *t = &s;"),
    "a parameter and its address": ("for (int i = 0; i < s.n; i++) { t->at.x = i; t->n = 3; }", "struct grid s, *t = &s;"),
    "a field and what it was set to": ("for (int i = 0; i < n; i++) s.w[i] = c[n - 1 - i];", "struct grid s; s.w = c;"),
    "a field of a first value": ("for (int i = 0; i < n; i++) s.w[i] = c[n - 1 - i];", "Grid s = {.w = c};"),
    "two pointers to one": ("for (int i = 0; i < n; i++) t->a[i] = p->a[n - 1 - i];", "struct grid *t = p;"),
    "one by another": ("for (int i = 0; i < n; i++) t->w[i] = c[i];", "struct grid s, *t = &s; s.w = c;"),
    "a pointer to a field": ("for (int i = 0; i < n; i++) t[i] = p->a[n - 1 - i];", "double *t = p->a + 2;"),
    "a pointer to a scalar": ("for (int i = 0; i < n; i++) { *t = i; c[i] = p->sum; }", "double *t = &p->sum;"),
    "fields of one struct": ("for (int i = 0; i < n; i++) p->w[i] = p->a[n - 1 - i];", "p->w = p->a;"),
}


@pytest.mark.parametrize("name", ALIASES)
def test_what_a_pointer_leads_to_has_one_name(name):
    with pytest.raises(ScopError, match="pointer must not lead into what the scop uses by name"):
        parse_c(function(*ALIASES[name][:1], HEAD, ALIASES[name][1], file=TYPES))


def test_a_pointer_is_one_struct_or_an_array():
    with pytest.raises(ScopError, match="struct must be used as one or as elements of an array, got q->x and q\\[\\].x"):
        parse_c(function("for (int i = 0; i < n; i++) q->x += q[i].x;", HEAD, file=TYPES))


def test_a_pointer_may_be_set_to_what_the_region_leaves_alone(tmp_path):
    body = "for (int i = 0; i < t->n; i++) t->w[i] = c[n - 1 - i];"
    before = "struct grid *t = p; t->w = malloc(t->n * sizeof(double));"
    agree(function(body, HEAD, before, "r->sum = t->w[2];", TYPES), tmp_path, MAIN, ("cpu-vector",))


def test_a_run_says_that_it_makes_no_structs():
    text = function(FIELDS["array behind a pointer"], HEAD, file=TYPES)
    with pytest.raises(RunError) as caught:
        run(parse_c(text), {"original": text}, {"n": 9})
    assert str(caught.value) == "f must take numbers and arrays of numbers to be run, got p->a"
