"""The C program around the variants of a kernel: makes the arguments, runs the variants in turn, compares and times them."""

from npu_sparse.schedule.scop import Array, Scop

CALLER = "NPU_SPARSE_CALLER"  # in the environment: the process that waits for the program
INITIAL = 0x3F  # every byte of an array before its own initialisation: what that leaves out has the same values in every run
HEAD = """\
#define _GNU_SOURCE
#include <omp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif
#ifdef __linux__
__attribute__((constructor(101))) static void end_with_the_caller_(void) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != atoi(getenv("{CALLER}"))) _exit(1);
}
#endif
static FILE *records_;
static double busy_[256];
static double seconds_(clockid_t clock_) {
  struct timespec t_; clock_gettime(clock_, &t_); return t_.tv_sec + 1e-9 * t_.tv_nsec;
}
static void refuse_(const char *what_, int argument_, int dimension_, double value_) {
  fprintf(records_, "{\\"refused\\": \\"%s\\", \\"argument\\": %d, \\"dimension\\": %d, \\"value\\": \\"%.17g\\"}\\n",
          what_, argument_, dimension_, value_);
  exit(fclose(records_) != 0);
}
"""
START = """\
int main(int argc_, char **argv_) {
  records_ = fopen(argv_[1], "w");
  if (!records_) return 1;
  const int repeats_ = atoi(argv_[2]), limit_ = atoi(argv_[3]);
  double bytes_ = 0;
"""
RUN = """\
  int known_ = 0;
  for (int p_ = 4; p_ < argc_; p_++) for (int r_ = 0; r_ < repeats_; r_++) {{
    const int threads_ = atoi(argv_[p_]);
    omp_set_num_threads(threads_);
    for (int v_ = 0; v_ < {variants}; v_++) {{
      {fill}
      #pragma omp parallel
      busy_[omp_get_thread_num()] = -seconds_(CLOCK_THREAD_CPUTIME_ID);
      alarm(limit_);
      double start_ = seconds_(CLOCK_MONOTONIC);
      switch (v_) {{
        {calls}
      }}
      double wall_ = seconds_(CLOCK_MONOTONIC) - start_, cpu_ = 0;
      alarm(0);
      #pragma omp parallel
      busy_[omp_get_thread_num()] += seconds_(CLOCK_THREAD_CPUTIME_ID);
      for (int n_ = 0; n_ < threads_ && n_ < 256; n_++) cpu_ = busy_[n_] > cpu_ ? busy_[n_] : cpu_;
      char difference_[200] = "";
      {compare}
      known_ = 1;
      fprintf(records_, "{{\\"threads\\": %d, \\"variant\\": %d, ", threads_, v_);
      fprintf(records_, "\\"wall_s\\": %.9g, \\"cpu_s\\": %.9g, \\"difference\\": \\"%s\\"}}\\n", wall_, cpu_, difference_);
      fflush(records_);
    }}
  }}
  return fclose(records_) != 0;
}}
"""


def driver(scop: Scop, variants: int, values: dict[str, float], init: bool) -> str:
    """A program with arguments (file of records, repetitions, seconds that one run may take or 0, numbers of threads ...).

    It writes one JSON record for each run, or a single one that says which value, extent or amount of memory cannot be.
    """
    arguments = list(enumerate(scop.arguments))
    arrays = [(n, a) for n, a in arguments if a.shape]
    compared = [a for _, a in arrays if a.name in scop.arrays and scop.arrays[a.name].live_out]
    parameters = ", ".join(parameter(a) for a in scop.arguments)
    call = ", ".join(a.name for a in scop.arguments)
    lines = [f"void variant_{n}({parameters});" for n in range(variants)] + [f"void init_0({parameters});"] * init
    lines += [START.rstrip("\n")]
    for n, a in arguments:
        if not a.shape:
            lines += _scalar(n, a, values[a.name])
    for n, a in arrays:
        lines += _extents(n, a, copies=1 + (a in compared))
    lines += ['  if (bytes_ > (double)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE)) refuse_("memory", 0, 0, bytes_);']
    for _, a in arrays:
        lines += [f"  {a.ctype} {_pointer(a)} = aligned_alloc(64, ({_size(a)} + 63) / 64 * 64 + 64);"]
        lines += [f'  if (!{a.name}) refuse_("memory", 0, 0, bytes_);']
    for a in compared:
        lines += [f"  {a.ctype} *expected_{a.name} = malloc({_size(a)});"]
        lines += [f'  if (!expected_{a.name}) refuse_("memory", 0, 0, bytes_);']
    fill = [_values(a, n) for n, (_, a) in enumerate(arrays)]
    if init:  # the C library's random numbers, too, are those of the first run
        fill = [f"memset({a.name}, {INITIAL}, {_size(a)});" for _, a in arrays] + [f"srand(1), srand48(1), init_0({call});"]
    calls = [f"case {n}: variant_{n}({call}); break;" for n in range(variants)]
    compare = [line for a in compared for line in _compare(a)]
    parts = {"fill": fill, "calls": calls, "compare": compare}
    text = RUN.format(variants=variants, **{name: _indented(RUN, name, part) for name, part in parts.items()})
    return HEAD.replace("{CALLER}", CALLER) + "\n".join(lines) + "\n" + text


def _indented(text: str, name: str, lines: list[str]) -> str:
    """The lines in the place of {name}, at its indentation."""
    line = next(line for line in text.splitlines() if line.strip() == f"{{{name}}}")
    return ("\n" + line[: line.index("{")]).join(lines)


def _scalar(n: int, a: Array, value: float) -> list[str]:
    literal = f"{value}" if isinstance(value, int) and abs(value) < 2**63 else repr(float(value))
    wrong = f"!(({a.ctype})0.5 != 0) && (long double){a.name} != (long double)({literal})"
    return [f"  {a.ctype} {a.name} = ({a.ctype})({literal});", f'  if ({wrong}) refuse_("value", {n}, 0, {literal});']


def _extents(n: int, a: Array, copies: int) -> list[str]:
    checks = [f'  if (({text}) <= 0) refuse_("extent", {n}, {d}, ({text}));' for d, text in enumerate(a.shape)]
    product = " * ".join([f"{copies}. * sizeof({a.ctype})", *(f"(double)({text})" for text in a.shape)])
    return [*checks, f"  bytes_ += {product};"]


def _values(a: Array, n: int) -> str:
    value = f"({a.ctype})((e_ * 37 + {n}) % 101) / 7 + 1"
    return f"for (size_t e_ = 0; e_ < {_size(a)} / sizeof({a.ctype}); e_++) (({a.ctype} *){a.name})[e_] = {value};"


def _compare(a: Array) -> list[str]:
    element = f"(({a.ctype} *){a.name})"
    return [
        f"if (!known_) memcpy(expected_{a.name}, {a.name}, {_size(a)});",
        f"else if (!difference_[0] && memcmp(expected_{a.name}, {a.name}, {_size(a)}))",
        f"  for (size_t e_ = 0; e_ < {_size(a)} / sizeof({a.ctype}); e_++)",
        f"    if (memcmp(expected_{a.name} + e_, {element} + e_, sizeof({a.ctype}))) {{",
        f'      snprintf(difference_, 200, "element %zu of {a.name} is %.17g, expected %.17g", e_,',
        f"               (double){element}[e_], (double)expected_{a.name}[e_]);",
        "      break;",
        "    }",
    ]


def parameter(a: Array) -> str:
    return f"{a.ctype} {a.name}" + "".join(f"[{extent}]" for extent in a.shape)


def _pointer(a: Array) -> str:
    inner = "".join(f"[{extent}]" for extent in a.shape[1:])
    return f"(*{a.name}){inner}" if inner else f"*{a.name}"


def _size(a: Array) -> str:
    return " * ".join([f"sizeof({a.ctype})", *(f"(size_t)({extent})" for extent in a.shape)])
