"""Damaged C files: each is scheduled, or refused in one sentence that begins with the file's name; none takes long."""

import random
import re
import time
from pathlib import Path

import pytest

import npu_sparse.schedule
from npu_sparse.schedule import config
from npu_sparse.schedule.command import schedule_file

KERNELS = sorted((Path(npu_sparse.schedule.__file__).parent / "kernels").glob("*.c"))
SECONDS = 10  # processor time of one file on one thread
STRATEGY = config.load("cpu-vector")
PASSED = set()  # texts that were checked: different faults make the same file of some
WRITTEN = [
    """typedef unsigned idx;
enum { A = 3, B };
void f(idx n, double a[n][n], const float *b) {
  const int m = -3;
#pragma scop
  for (idx i = 0; i < n; i += 2) {
    double t = a[i][A] * m;
    if (i > 2 && t > 0) a[i][i % 3] = b[i / 2] ? t : -t;
    else a[i][0] += sqrt(t);
  }
#pragma endscop
}
""",
    """#include <math.h>
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define N 20
#if defined(N) && N > 3
static
__attribute__((noinline)) int f(int n, int u[N][N], int *restrict v)
{
  int i, j;
  for (int r = 0; r < 3; r++) {
#pragma scop live_out(u)
    for (i = n - 1; i >= 0; i--)
      for (j = MIN(i, 4); j != N; ++j)
        u[i][j] = v[i == 0 ? n - 1 : i - 1] = (uint8_t)j >> 1 & 7;
#pragma endscop
  }
  return u[0][0];
}
#endif
""",
    """double g(double) __attribute__((const));
void f(size_t n, double x[n], double y[n], long s) {
  double sum = 0, *p = x;
  /* sum */
#pragma scop
  for (size_t i = 1; i < n; i++) {
    sum += g(x[i - 1]) * 2e-3f;
    y[i] = sum, x[i] = 0x10u + (int)i;
  }
#pragma endscop
  y[0] = sum + *p;
}
""",
]
WRITTEN.append("""struct s { int x; };
static double total;
void f(int n, int m, double *a, int (*b)[8], struct s *p) {
  double *row = a, w[8];
#pragma scop
  int k;
  for (k = 0; k < n; k++)
    for (int j = 0; j < m; ++j) {
      const int l = j + 1, v = k;
      row[k * m + j] += *(*(b + v) + 3) * (l > 4 ? w[j % 8] : total);
    }
  for (k = m; k >= 1; k -= 2) { w[k & 7] = k / -3; total = w[0] = 2; }
#pragma endscop
  for (k = 0; k < 8; k++) total += w[k];
}
""".replace("  int k;\n", "", 1).replace("  double *row", "  int k;\n  double *row"))
WRITTEN.append(WRITTEN[-1].replace("  int k;\n", "", 1).replace("#pragma scop\n", "#pragma scop\n  int k;\n"))
TOKENS = """( ) { } [ ] ; , + - * / % < > <= >= == != = += -= ++ -- & && | || ! ~ ? : << >> . -> # ## \\ " ' /* */ // 0 1 -1
0x 1e9 1.5f "s" n i for if else while return goto break int unsigned char
short long size_t uint8_t double float void const static volatile struct enum typedef
sizeof restrict min max abs rand() sqrt f a x #pragma\\ scop #pragma\\ endscop #define #if #endif #else \t \x00 é
__attribute__ _Bool mod floor exists""".split()
NUMBERS = "0 1 -1 2 3 7 100 2147483647 2147483648u 9223372036854775807 18446744073709551616 08 0x1F 1e9 1.5f 3u 5L 'a'".split()
OPERATORS = "+ - * / % < > <= >= == != && || & | ^ << >> = += -= , ?".split()
WORD = re.compile(r"[A-Za-z_]\w*|\d[\w.]*|[-+*/%<>=!&|]+|\S")
TYPES = "int|unsigned|long|size_t|uint8_t|short|char|double|idx|void *|struct s|_Bool|volatile int".split("|")
NESTED = ["(", "[", "{", "-", "!", "a[", "f(", "if (1) "]


def mutated(seed: int) -> str:
    """A C file with one to three faults."""
    chance = random.Random(seed)
    text = chance.choice([path.read_text() for path in KERNELS] + 10 * WRITTEN)
    for _ in range(chance.choice([1, 1, 2, 3])):
        words = list(WORD.finditer(text))
        if not words:
            break
        begin = max(0, text.find("#pragma scop") - 200)
        near = [word for word in words if word.start() >= begin] or words
        first, second = chance.choice(near), chance.choice(words)
        kind = chance.randrange(48)
        if kind >= 12:  # something of the same kind
            near = [word for word in near if "pragma" not in word[0]] or near
            first = chance.choice(near)
            alike = [word[0] for word in words if word[0][0].isidentifier() == first[0][0].isidentifier()]
            new = chance.choice(NUMBERS if first[0][0].isdigit() else OPERATORS if first[0] in OPERATORS else alike)
            text = text[:first.start()] + (new if first[0] not in "()[]{};#" else first[0]) + text[first.end():]
        elif kind <= 3:
            new = chance.choice(TOKENS).replace("\\ ", " ")
            new = f"\n{new}\n" if new.startswith("#") else new
            text = text[:first.start()] + new + text[first.end() if kind else first.start():]
        elif kind <= 5:
            text = text[:first.start()] + second[0] + text[first.end():]
        elif kind == 6:
            text = text[:first.start()] + text[first.end():]
        elif kind == 7:
            lines = text.splitlines(keepends=True)
            at = chance.randrange(len(lines))
            lines[at:at + 1] = chance.choice([[], [lines[at]] * 2, [lines[chance.randrange(len(lines))]]])
            text = "".join(lines)
        elif kind == 8:
            text = re.sub(r"\b(int|double|idx|size_t|long)\b", lambda m: chance.choice([m[0], chance.choice(TYPES)]), text)
        elif kind == 9:
            text = text[:first.start()] + chance.choice(NESTED) * 3000 + text[first.start():]
        elif kind == 10:
            text = text[:chance.randrange(len(text))] + text[chance.randrange(len(text)):]
        else:
            text = text[:chance.randrange(len(text))]
    return text


def check(seed: int, directory: Path) -> None:
    path = directory / f"m{seed}.c"
    text = mutated(seed)
    if text in PASSED:
        return
    path.write_text(text)
    start = time.process_time()
    try:
        schedule_file(path, STRATEGY, output=directory / "out.c")
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error), (seed, str(error))
        assert "cannot be read" not in str(error), (seed, str(error))  # refused by a rule, and not by an accident
    assert time.process_time() - start < SECONDS, seed
    PASSED.add(text)


@pytest.mark.parametrize("part", range(6))
def test_a_damaged_file_is_one_sentence(part, tmp_path):
    for seed in range(10 * part, 10 * part + 10):
        check(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_two_thousand_damaged_files(part, tmp_path):
    for seed in range(100 * part, 100 * part + 100):
        check(seed, tmp_path)
