import importlib.util
import json
import sys
from pathlib import Path

import pytest

from npu_sparse.schedule.c.run import run as run_variants
from npu_sparse.schedule.frontend.c import parse_c

ROOT = Path(__file__).resolve().parents[2]
SCALE = """
void init_scale(int n, double x[n]) { for (int i = 0; i < n; i++) x[i] = i + 1; }
void kernel_scale(int n, double x[n]) {
#pragma scop
  for (int i = 0; i < n; i++) x[i] *= 1.5;
#pragma endscop
}
"""
POLYBENCH = {
    "utilities/polybench.h": """
#include <stdlib.h>
#define POLYBENCH_PADDING_FACTOR 0
#ifdef POLYBENCH_USE_C99_PROTO
# define POLYBENCH_C99_SELECT(x, y) y
#else
# define POLYBENCH_C99_SELECT(x, y) x
#endif
#define POLYBENCH_1D(v, d1, dd1) v[POLYBENCH_C99_SELECT(d1, dd1) + POLYBENCH_PADDING_FACTOR]
#define POLYBENCH_LOOP_BOUND(x, y) POLYBENCH_C99_SELECT(x, y)
""",
    "linear-algebra/scale-up/scale-up.h": """
#ifdef SMALL_DATASET
# define N 40
#endif
#ifdef MEDIUM_DATASET
# define N 400
#endif
#ifdef LARGE_DATASET
# define N 4000
#endif
#define _PB_N POLYBENCH_LOOP_BOUND(N,n)
#define DATA_TYPE double
#define SCALAR_VAL(x) x
""",
    "linear-algebra/scale-up/scale-up.c": """
#include <stdio.h>
#include <math.h>
#include <polybench.h>
#include "scale-up.h"
static
void init_array(int n,
\t\tDATA_TYPE *alpha,
\t\tDATA_TYPE POLYBENCH_1D(x,N,n))
{
  int i;
  *alpha = 1.5;
  for (i = 0; i < n; i++)
    x[i] = (DATA_TYPE) (i % 7) / n;
}
static
void print_array(int n, DATA_TYPE POLYBENCH_1D(y,N,n)) { fprintf(stderr, "%d", n); }
static
void kernel_scale_up(int n, DATA_TYPE alpha, DATA_TYPE POLYBENCH_1D(x,N,n), DATA_TYPE POLYBENCH_1D(y,N,n))
{
  int i;
#pragma scop
  for (i = 0; i < _PB_N; i++)
    y[i] = alpha * x[i] + SCALAR_VAL(2.0);
#pragma endscop
}
int main(int argc, char** argv) { return 0; }
""",
}


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_polybench", ROOT / "scripts" / "bench_polybench.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_polybench"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_polybench"]


def run(bench, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_polybench.py", "--tuning", "1", "--repeats", "2", *map(str, arguments)])
    bench.main()


def test_report_of_polybench_sources(bench, monkeypatch, tmp_path, capsys):
    for name, text in POLYBENCH.items():
        (tmp_path / "sources" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sources" / name).write_text(text)
    kernels = bench.polybench(tmp_path / "sources", "small")
    assert {name: kernel.values for name, kernel in kernels.items()} == {"scale_up": {"n": 40, "alpha": 1.5}}
    options = ["--polybench", tmp_path / "sources", "--size", "small", "--strategies", "pluto", "--tiles", "0 32"]
    run(bench, monkeypatch, "--output", tmp_path / "runs", *options)
    report = json.loads((tmp_path / "runs" / "report.json").read_text())
    assert report["failures"] == [] and (tmp_path / "runs" / "report.png").stat().st_size > 1000
    [record] = report["kernels"]
    assert record["kernel"] == "scale_up" and set(record["speedup"]) == {"pluto", bench.PARALLEL, bench.ISL, "tuned"}
    assert all(len(times["wall_s"]) == 2 for times in record["times"].values())
    expected = record["times"]["original"]["wall"] / record["times"][record["chosen"]["pluto"]]["wall"]
    assert record["speedup"]["pluto"] == expected and report["means"]["pluto"]["geomean"] == pytest.approx(expected)
    cpu = record["times"]["original"]["cpu"] / record["times"][record["chosen"]["pluto"]]["cpu"]
    assert report["means"]["pluto"]["cpu_geomean"] == pytest.approx(cpu)
    assert "| scale_up |" in capsys.readouterr().out
    assert "| geomean |" in (tmp_path / "runs" / "report.md").read_text()


def test_stock_polybench_sources_keep_their_types_and_allocations(bench, tmp_path):
    kernel = POLYBENCH["linear-algebra/scale-up/scale-up.c"]
    own = "typedef char base;\n#define match(a) ((a) == 3 ? 2 : 1)\nstatic"
    kernel = kernel.replace("static", own, 1)
    work = "base *w = (base *)polybench_alloc_data(n, sizeof(base));\n  w[0] = 1;"
    kernel = kernel.replace("  int i;\n#pragma", f"  int i;\n  {work}\n#pragma")
    kernel = kernel.replace("y[i] = alpha * x[i]", "y[i] = x[i] = match(i) * alpha * x[i]")
    files = {**POLYBENCH, "linear-algebra/scale-up/scale-up.c": kernel, "utilities/template-for-new-benchmark.c": kernel,
             "linear-algebra/scale-up/scale-up.orig.c": kernel}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for size, n in (("small", 40), ("medium", 400)):
        [parsed] = bench.polybench(tmp_path, size).values()
        assert parsed.values == {"n": n, "alpha": 1.5}
        scop = parse_c(parsed.text)
        new = bench.candidate(scop, parsed.text, "cpu-vector", "0")
        results = run_variants(scop, {"original": parsed.text, "new": new}, parsed.values, repeats=1, threads=(2,))
        assert [result.difference for result in results] == ["", ""]


def test_wrong_and_broken_candidates_win_nothing(bench, monkeypatch):
    kernel = bench.Kernel("scale", SCALE, {"n": 30})

    def candidate(scop, text, scheduler, tile):
        if scheduler == bench.ISL:
            raise ValueError("no schedule")
        if scheduler == "pluto":
            return text.replace("1.5;", "2.5;")
        return text if scheduler == bench.PARALLEL else text.replace("x[i] *=", "__builtin_trap(); x[i] *=")

    monkeypatch.setattr(bench, "candidate", candidate)
    monkeypatch.setattr(sys, "argv", ["x", "--strategies", "pluto,feautrier", "--tiles", "0", "--tuning", "1", "--repeats", "1"])
    record = bench.measure(kernel, bench._arguments())
    failed = {failure.split(":")[0] for failure in record["failures"]}
    assert {"pluto 0", "feautrier 0", "isl's scheduler 0"} <= failed and "original, parallel 0" not in failed
    assert record["speedup"]["pluto"] is record["speedup"]["feautrier"] is record["speedup"][bench.ISL] is None
    assert record["chosen"]["tuned"] in ("original", "original, parallel 0")


def test_unknown_kernel_and_empty_directory_are_refused(bench, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="--kernels must be of .* got gem$"):
        run(bench, monkeypatch, "--output", tmp_path / "runs", "--kernels", "gem")
    with pytest.raises(SystemExit, match="--polybench must be a directory of PolyBench/C sources"):
        run(bench, monkeypatch, "--output", tmp_path / "runs", "--polybench", tmp_path)
    assert not list(tmp_path.iterdir())


FAKE_POLYCC = """#!{python}
import pathlib, sys
arguments = sys.argv[1:]
text = pathlib.Path(arguments[0]).read_text()
output = pathlib.Path(arguments[arguments.index("-o") + 1])
sizes = pathlib.Path("tile.sizes")
with open({log!r}, "a") as log:
    print(*[a for a in arguments if a.startswith("--")], sizes.read_text().split()[:4] if sizes.exists() else "", file=log)
if "--innerpar" in arguments:
    sys.exit("no schedule for this one")
if "--lastwriter" in arguments:
    sys.exit(0)  # and no output
if "--maxfuse" in arguments:
    text = text.replace("1.5;", "1.25;")
if "--notile" in arguments:
    text = text.replace("x[i] *=", "for (volatile int on = 1; on;) x[i] *=")
text = text.replace("#pragma scop", "#pragma ivdep\\n#pragma vector always").replace("#pragma endscop", "")
output.write_text(text)
"""
FAKE_CLANG = """#!{python}
import os, sys
kept = [a for n, a in enumerate(sys.argv[1:], 1) if a != "-mllvm" and sys.argv[n - 1] != "-mllvm"]
with open({log!r}, "a") as log:
    print("-polly" in sys.argv, "-ffp-contract=off" in kept, file=log)
os.execvp("gcc", ["gcc", *kept])
"""


def program(path, text: str):
    path.write_text(text.format(python=sys.executable, log=str(path.with_suffix(".log"))))
    path.chmod(0o755)
    return path


def test_others_run_beside_and_what_is_wrong_of_them_is_named(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "shipped", lambda size: {"scale": bench.Kernel("scale", SCALE, {"n": 3000})})
    polycc, clang = program(tmp_path / "polycc", FAKE_POLYCC), program(tmp_path / "clang", FAKE_CLANG)
    options = ["--output", tmp_path / "runs", "--strategies", "pluto", "--presets", "cpu-vector", "--tiles", "0"]
    options += ["--timeout", "2", "--pluto", polycc, "--polly", clang]
    run(bench, monkeypatch, *options)
    report = json.loads((tmp_path / "runs" / "report.json").read_text())
    [record] = report["kernels"]
    failures = {failure.split(":")[0].removesuffix(" (one thread)"): failure for failure in record["failures"]}
    assert set(failures) == {f"polycc {name}" for name in ("notile", "maxfuse", "innerpar", "lastwriter")}
    assert "no schedule for this one" in failures["polycc innerpar"] and "exit status 0" in failures["polycc lastwriter"]
    assert "element 0 of x" in failures["polycc maxfuse"] and "within 2 s" in failures["polycc notile"]
    assert record["chosen"]["polycc"] in ("polycc default", "polycc 32,32,256") and record["chosen"]["Polly"] == "Polly 0"
    assert set(record["times"]) == set(record["times_one"]) == {"original", *filter(None, record["chosen"].values())}
    assert {"clang", "polycc default", "cpu-vector preset"} <= set(record["speedup"])
    for name in ("cpu-vector preset over polycc", "tuned over polycc default", "tuned over Polly"):
        ours, theirs = (record["times"][record["chosen"][column]] for column in name.split(" over "))
        assert report["means"][name]["cpu_geomean"] == pytest.approx(theirs["cpu"] / ours["cpu"])
    asked = (tmp_path / "polycc.log").read_text()
    assert "--tile --parallel ['32', '32', '256', '256']" in asked and "--notile --parallel --nounrolljam" in asked
    assert set((tmp_path / "clang.log").read_text().splitlines()) == {"True True", "False True"}
    shown = capsys.readouterr().out
    assert all(f"## {title}\n" in shown for title in ("Wall", "CPU time of the busiest thread", "One thread, CPU time"))

    again = len(asked.splitlines())  # a finished kernel is not measured again: polycc is only asked whether it works
    run(bench, monkeypatch, *options)
    assert len((tmp_path / "polycc.log").read_text().splitlines()) == again + 1


def test_short_measures_the_original_the_preset_and_plutos_default_once(bench, monkeypatch, tmp_path):
    odd = bench.Kernel("odd", SCALE.replace("x[i] *=", "x[i*i] *="), {"n": 30})
    monkeypatch.setattr(bench, "shipped", lambda size: {"scale": bench.Kernel("scale", SCALE, {"n": 30}), "odd": odd})
    run(bench, monkeypatch, "--output", tmp_path / "runs", "--short", "--pluto", program(tmp_path / "polycc", FAKE_POLYCC))
    report = json.loads((tmp_path / "runs" / "report.json").read_text())
    record, refused = report["kernels"]
    assert set(record["chosen"].values()) == {"cpu-vector preset", "polycc default"} and record["tuning"] == {}
    assert set(record["times"]) == {"original", "cpu-vector preset", "polycc default"} and record["failures"] == []
    assert all(len(times["wall_s"]) == 2 for times in record["times"].values())
    assert refused["speedup"] == {} and "i*i" in refused["failures"][0].replace(" ", "")  # and the others went on
    assert report["means"]["cpu-vector preset over polycc default"]["kernels"] == 1


def test_what_breaks_in_one_candidate_is_left_out_and_the_rest_stays_interleaved(bench, monkeypatch, tmp_path):
    sources = {"original": SCALE, "good": SCALE, "traps": SCALE.replace("x[i] *=", "__builtin_trap(), x[i] *=")}
    sources |= {"polycc writes elsewhere": SCALE.replace("x[i] *= 1.5", "x[i] *= i ? 2.5 : 1.5"), "does not compile": "int"}
    monkeypatch.setattr(sys, "argv", ["x", "--timeout", "5"])
    timings, failures = bench._timed(parse_c(SCALE), sources, {"n": 30}, bench._arguments(), 3)
    assert set(timings) == {"original", "good"} and all(len(times["wall_s"]) == 3 for times in timings.values())
    assert {failure.split(":")[0] for failure in failures} == set(sources) - set(timings)
    with pytest.raises(ValueError, match="in original"):
        bench._timed(parse_c(SCALE), {"original": sources["traps"], "good": SCALE}, {"n": 30}, bench._arguments(), 1)


@pytest.mark.parametrize("option", ["--pluto", "--polly"])
def test_others_that_are_not_there_or_do_not_work_are_refused_first(bench, monkeypatch, tmp_path, capsys, option):
    broken = program(tmp_path / "false", "#!/bin/false")
    for name, problem in ((tmp_path / "none", "must be the path of a program"), (broken, "must be a")):
        with pytest.raises(SystemExit):
            run(bench, monkeypatch, "--output", tmp_path / "runs", option, name)
        assert f"{option} {problem}" in capsys.readouterr().err and not (tmp_path / "runs").exists()
