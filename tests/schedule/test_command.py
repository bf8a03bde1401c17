import dataclasses
import re
from pathlib import Path

import pytest

from npu_sparse import cli
from npu_sparse.schedule import command, config
from npu_sparse.schedule.c.run import Result

ROOT = Path(__file__).resolve().parents[2]
SCALE = """
void f(int n, double a, double x[n]) {
#pragma scop
  for (int i = 0; i < n; i++) x[i] *= a;
#pragma endscop
}
"""


@pytest.fixture
def kernel(tmp_path) -> Path:
    path = tmp_path / "kernel.c"
    path.write_text(SCALE)
    return path


def refusal(capsys, *arguments) -> str:
    assert cli.main(["schedule", *map(str, arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and not shown.out
    return shown.err.removeprefix("error: ").strip()


def test_code_is_printed(kernel, capsys):
    assert cli.main(["schedule", str(kernel), "--strategy", "pluto"]) == 0
    shown = capsys.readouterr().out
    assert "#pragma omp parallel for" in shown and "#pragma scop" not in shown and shown.count("void f(") == 1


def test_everything_is_written(kernel, tmp_path, capsys):
    files = {"--output": "out.c", "--draw": "domains.svg", "--openscop": "kernel.scop"}
    options = [word for option, name in files.items() for word in (option, str(tmp_path / name))]
    assert cli.main(["schedule", str(kernel), "--tree", "--sizes", "n=100,a=2", *options]) == 0
    shown = capsys.readouterr().out
    assert "statements S0\nband" in shown and shown.count("bitwise equal") == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*files.values(), "kernel.c"])
    assert "#pragma omp" in (tmp_path / "out.c").read_text() and (tmp_path / "kernel.scop").read_text().startswith("<OpenScop>")


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("int x;\n", "scop"),
        (SCALE.replace("x[i]", "x[i * i]"), "affine"),
        (SCALE.replace("i++)", "i++"), "kernel.c"),
        ("", "scop"),
    ],
)
def test_bad_source_is_one_sentence(text, sentence, kernel, capsys):
    kernel.write_text(text)
    assert sentence in refusal(capsys, kernel)


def test_missing_files_and_bad_values_are_one_sentence(kernel, tmp_path, capsys):
    assert "none.c" in refusal(capsys, tmp_path / "none.c")
    assert "strategy must be one of" in refusal(capsys, kernel, "--strategy", "plutoo")
    assert "picture must be a .png or .svg file" in refusal(capsys, kernel, "--draw", tmp_path / "x.gif")
    assert "sizes must give a value for a" in refusal(capsys, kernel, "--sizes", "n=3")
    assert "sizes must be numbers" in refusal(capsys, kernel, "--sizes", "n=3,a=two")
    assert "sizes must be whole numbers for parameters of loops, got n=50.7" in refusal(capsys, kernel, "--sizes", "n=50.7,a=1")
    assert "sizes must satisfy n > 0" in refusal(capsys, kernel, "--sizes", "n=-1,a=1")
    assert "scalar arguments of f (n, a), got m" in refusal(capsys, kernel, "--sizes", "n=3,a=1,m=2")
    strategy = tmp_path / "mine.yaml"
    strategy.write_text("tiling:\n  size: [4]\n")
    assert re.match(r".*mine.yaml:2: key of tiling must be one of", refusal(capsys, kernel, "--strategy", strategy))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kernel.c", "mine.yaml"]


def test_program_that_leaves_at_once_is_no_success(kernel, capsys):
    text = SCALE.replace("void f", "void kernel_f")
    kernel.write_text("#include <stdlib.h>\nvoid init_f(int n, double a, double x[n]) { exit(0); }\n" + text)
    message = refusal(capsys, kernel, "--sizes", "n=9,a=2")
    assert message == "kernel_f must return from all 30 runs, got 0: the program ends itself in original"


def test_endless_program_is_stopped_after_the_time_limit(kernel, capsys):
    kernel.write_text(SCALE.replace("void f", "static __attribute__((constructor)) void stay(void) { for (;;) ; }\nvoid f"))
    assert refusal(capsys, kernel, "--sizes", "n=9,a=2", "--time-limit", "1") == "f must end within 1 s, and did not"


def test_size_given_twice_is_refused(kernel, capsys):
    assert cli.main(["schedule", str(kernel), "--sizes", "n=9,n=8,a=2"]) == 2
    assert "must have each name once" in capsys.readouterr().err


def test_difference_is_a_failure_of_the_package_and_nothing_is_written(kernel, tmp_path, capsys, monkeypatch):
    wrong = [Result("generated", 2, "element 3 of x is 1, expected 2", (0.1,), (0.1,))]
    monkeypatch.setattr(command, "run", lambda *args, **kwargs: wrong)
    assert cli.main(["schedule", str(kernel), "--sizes", "n=9,a=2", "--output", str(tmp_path / "out.c")]) == 1
    assert "element 3 of x" in capsys.readouterr().err and not (tmp_path / "out.c").exists()


def test_missing_package_is_named(kernel, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "npu_sparse.schedule.command", None)
    assert "pip install -e '.[schedule]' in a clone of npu-sparse" in refusal(capsys, kernel)


def test_page_names_every_key():
    page = "".join((ROOT / "docs" / name).read_text() for name in ("scheduler.md", "scheduler-keys.md"))
    keys = {f.name for part in (config.Config, config.Tiling, config.Dimension, config.Fusion) for f in dataclasses.fields(part)}
    keys -= {"name", "source", "where", "dimensions"}  # not written in a file, or under another name
    keys |= {"ILP_construction", "scheduling_dimension", *config.COST_FUNCTIONS, *config.DIRECTIVES, *config.HEURISTICS}
    keys |= set(config.shipped())
    assert [key for key in sorted(keys) if not re.search(rf"(?<![\w-]){re.escape(key)}(?![\w-])", page)] == []


def test_macros_of_headers_and_of_the_command_line(tmp_path, capsys):
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "size.h").write_text("#define LAST(n) (n - REST)\n")
    (tmp_path / "local.h").write_text("#define FACTOR 2\n")
    path = tmp_path / "kernel.c"
    text = SCALE.replace("i < n", "i < LAST(n)").replace("= a", "= FACTOR * a")
    path.write_text('#include "size.h"\n#include "local.h"\n' + text)
    options = ["-I", str(tmp_path / "include"), "-D", "REST=3"]
    assert cli.main(["schedule", str(path), *options, "--sizes", "n=100,a=2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("bitwise equal") == 6 and "x[(i)] *= 2 * a" in shown and "(n - 3)" in shown.replace("n - 3", "(n - 3)")
    assert "loop condition must be affine" in refusal(capsys, path)


SEVERAL = """
void init_f(int n, double x[n], double y[n]) { for (int i = 0; i < n; i++) x[i] = i, y[i] = 0; }
void kernel_f(int n, double x[n], double y[n]) {
  double sum = 1;
  #pragma scop
  for (int i = 0; i < n; i++) x[i] = 2 * x[i] + sum;
  #pragma endscop
  if (n > 3) {
#pragma scop
    for (int i = 1; i < n; i++) { double t = x[i - 1]; sum += t; y[i] = t * t; }
#pragma endscop
  }
#pragma scop
  for (int i = 0; i < n; i++) for (int j = 0; j < 3; j++) y[i] += sum * j;
#pragma endscop
}
"""


@pytest.mark.parametrize("options", [[], ["-D", "UNUSED"]])
def test_all_regions_of_a_function_are_scheduled(options, kernel, tmp_path, capsys):
    kernel.write_text(SEVERAL)
    out = tmp_path / "out.c"
    assert cli.main(["schedule", str(kernel), *options, "--tree", "--sizes", "n=90", "--output", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("bitwise equal") == 6 and shown.count("statements S0") == 3
    assert "#pragma scop" not in out.read_text() and out.read_text().count("void kernel_f(") == 1
    assert "must be of one region, got 3" in refusal(capsys, kernel, "--draw", tmp_path / "x.svg")
    kernel.write_text(SEVERAL.replace("#pragma endscop\n  if", "  if"))
    assert re.search(r":5: #pragma scop must end with #pragma endscop in kernel_f, got none", refusal(capsys, kernel))
