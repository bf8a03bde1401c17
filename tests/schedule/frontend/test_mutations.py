"""Damaged C files: each is scheduled, or refused in one sentence that begins with the file's name; none takes long."""

import random
import re
import time
from pathlib import Path

import pytest

import npu_sparse.schedule
from npu_sparse.schedule.command import schedule_file

KERNELS = sorted((Path(npu_sparse.schedule.__file__).parent / "kernels").glob("*.c"))
SECONDS = 10  # of one thread, for one file
WRITTEN = [
    "typedef unsigned idx;\nenum { A = 3, B };\nvoid f(idx n, double a[n][n], const float *b) {\n  const int m = -3;\n#pragma scop\n"
    "  for (idx i = 0; i < n; i += 2) {\n    double t = a[i][A] * m;\n    if (i > 2 && t > 0) a[i][i % 3] = b[i / 2] ? t : -t;\n"
    "    else a[i][0] += sqrt(t);\n  }\n#pragma endscop\n}\n",
    "#include <math.h>\n#define MIN(a, b) ((a) < (b) ? (a) : (b))\n#define N 20\n#if defined(N) && N > 3\nstatic\n"
    "__attribute__((noinline)) int f(int n, int u[N][N], int *restrict v)\n{\n  int i, j;\n  for (int r = 0; r < 3; r++) {\n"
    "#pragma scop live_out(u)\n    for (i = n - 1; i >= 0; i--)\n      for (j = MIN(i, 4); j != N; ++j)\n"
    "        u[i][j] = v[i == 0 ? n - 1 : i - 1] = (uint8_t)j >> 1 & 7;\n#pragma endscop\n  }\n  return u[0][0];\n}\n#endif\n",
    "double g(double) __attribute__((const));\nvoid f(size_t n, double x[n], double y[n], long s) {\n  double sum = 0, *p = x;\n"
    "  /* sum */\n#pragma scop\n  for (size_t i = 1; i < n; i++) {\n    sum += g(x[i - 1]) * 2e-3f;\n    y[i] = sum, x[i] = 0x10u + (int)i;\n"
    "  }\n#pragma endscop\n  y[0] = sum + *p;\n}\n",
]
TOKENS = """( ) { } [ ] ; , + - * / % < > <= >= == != = += -= ++ -- & && | || ! ~ ? : << >> . -> # ## \\ " ' /* */ // 0 1 -1 2147483647
2147483648u 9223372036854775807 18446744073709551616 08 0x 1e9 1.5f 'a' "s" n i for if else while return goto break int unsigned char
short long size_t uint8_t double float void const static volatile struct enum typedef sizeof restrict min max abs rand() sqrt f a x
#pragma\\ scop #pragma\\ endscop #define #if #endif #else \t \x00 é __attribute__ _Bool mod floor exists""".split()
WORD = re.compile(r"[A-Za-z_]\w*|\d[\w.]*|[-+*/%<>=!&|]+|\S")
TYPES = ["int", "unsigned", "long", "size_t", "uint8_t", "short", "char", "double", "idx", "void *", "struct s", "_Bool", "volatile int"]


def mutated(seed: int) -> str:
    """A C file with one to five faults."""
    chance = random.Random(seed)
    text = chance.choice([path.read_text() for path in KERNELS] + 10 * WRITTEN)
    for _ in range(chance.choice([1, 1, 2, 3, 5])):
        words = list(WORD.finditer(text))
        if not words:
            break
        begin = max(0, text.find("#pragma scop") - 200)
        near = [word for word in words if word.start() >= begin] or words
        first, second = chance.choice(near), chance.choice(words)
        kind = chance.randrange(12)
        if kind <= 3:
            new = chance.choice(TOKENS).replace("\\ ", " ")
            text = text[:first.start()] + (f"\n{new}\n" if new.startswith("#") else new) + text[first.end() if kind else first.start():]
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
            text = text[:first.start()] + chance.choice(["(", "[", "{", "-", "!", "a[", "f(", "if (1) "]) * 3000 + text[first.start():]
        elif kind == 10:
            text = text[:chance.randrange(len(text))] + text[chance.randrange(len(text)):]
        else:
            text = text[:chance.randrange(len(text))]
    return text


def check(seed: int, directory: Path) -> None:
    path = directory / f"m{seed}.c"
    path.write_text(mutated(seed))
    start = time.process_time()
    try:
        schedule_file(path, "cpu-vector", output=directory / "out.c")
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error), (seed, str(error))
    assert time.process_time() - start < SECONDS, seed


@pytest.mark.parametrize("part", range(6))
def test_a_damaged_file_is_one_sentence(part, tmp_path):
    for seed in range(10 * part, 10 * part + 10):
        check(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_two_thousand_damaged_files(part, tmp_path):
    for seed in range(100 * part, 100 * part + 100):
        check(seed, tmp_path)
