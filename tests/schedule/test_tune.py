import json
from pathlib import Path

import pytest

from npu_sparse import cli
from npu_sparse.schedule import candidates, kernels, legality, tune
from npu_sparse.schedule.c.run import FLAGS, RunError, run
from npu_sparse.schedule.candidates import FEATURES, ISL, PARALLEL, Choice, features, ranked
from npu_sparse.schedule.frontend.c import parse_c
from npu_sparse.schedule.plan import original
from npu_sparse.schedule.scop import ScopError

KERNELS = Path(next(iter(kernels.__path__)))
QUICK = ("-O1", *FLAGS[1:])
PRODUCT = """
void kernel_product(int n, double c[n][n], double a[n][n], double b[n][n]) {
#pragma scop
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++)
      for (int k = 0; k < n; k++)
        c[i][j] += a[i][k] * b[k][j];
#pragma endscop
}
"""


@pytest.fixture(scope="module")
def product():
    return parse_c(PRODUCT)


@pytest.fixture(scope="module")
def ranking(product):
    return ranked(product)


@pytest.fixture
def few(monkeypatch, ranking):
    """A model that knows six choices of the product."""
    monkeypatch.setattr(tune, "ranked", lambda scop: ranking[:6])
    return [str(choice) for choice, _ in ranking[:6]]


@pytest.mark.parametrize("text", ["pluto 0", "pluto 32,32,256/4", "cpu-vector preset", f"{ISL} 32", f"{PARALLEL} 0",
                                  "pluto-plus 32/2 fusion=max"])  # fmt: skip
def test_choices_are_spelled_as_they_are_read(text):
    assert str(Choice.parse(text)) == text


@pytest.mark.parametrize("text", ["pluto", "plut 0", "pluto x", "pluto 32/", "pluto 32 fusion=some", ""])
def test_other_choices_are_refused(text):
    if text == "pluto 32/":
        assert Choice.parse(text) == Choice.parse("pluto 32")
        return
    with pytest.raises(ScopError, match="choice must be a strategy and tiles"):
        Choice.parse(text)


def test_ranked_choices_differ_and_are_legal(product, ranking):
    trees = [str(tree) for _, tree in ranking]
    assert len(trees) == len(set(trees)) > 6
    assert all(legality.check(product, tree.get_map()) == [] for _, tree in ranking)


def test_features_say_what_a_tree_looks_like(product):
    def features_of(text):
        return {name for name, value in zip(FEATURES, features(product, Choice.parse(text).tree(product))) if value == 1}

    assert features_of("cpu-vector 0") == {"parallel outermost", "vector", "along memory"}
    assert features_of("cpu-vector 32,32,256/4") == {"parallel outermost", "vector", "along memory", "jammed", "tiles of three"}
    assert features_of(f"{PARALLEL} 0") == {"parallel outermost"}  # k, the innermost, runs along a but across b
    assert features(product, original(product).tree()) == [0.0] * len(FEATURES)


def test_the_model_follows_its_weights(product, monkeypatch):
    weights = {"features": dict.fromkeys(FEATURES, 0.0) | {"jammed": 1.0}, "choices": {"pluto 0": 0.1, "pluto 32/4": 0.0}}
    monkeypatch.setattr(candidates, "_weights", lambda: weights)
    assert [str(choice) for choice, _ in ranked(product)] == ["pluto 32/4", "pluto 0"]
    weights["features"]["jammed"] = 0.0
    assert [str(choice) for choice, _ in ranked(product)] == ["pluto 0", "pluto 32/4"]


def test_shipped_weights_are_for_these_features_and_choices():
    weights = candidates._weights()
    assert tuple(weights["features"]) == FEATURES
    assert all(str(Choice.parse(text)) == text for text in weights["choices"]) and len(weights["choices"]) > 10


def test_search_measures_the_first_six_then_neighbours_and_finds_the_fastest(product, few):
    tuned = tune.search(product, PRODUCT, {"n": 40}, budget_s=6, threads=2, flags=QUICK)
    assert tuned.failures == {} and {tune.ORIGINAL, *few} <= set(tuned.tried)
    assert tuned.choice in tuned.tried and tuned.speedup > 0
    if tuned.choice != tune.ORIGINAL:
        tree = Choice.parse(tuned.choice).tree(product)
        assert legality.check(product, tree.get_map()) == []
        new = tune.generate_file(product, PRODUCT, tree)
        assert not any(r.difference for r in run(product, {"old": PRODUCT, "new": new}, {"n": 40}, threads=(1, 2), repeats=1))


def test_nothing_begins_after_the_budget_and_neighbours_come_while_it_lasts(product, few, monkeypatch):
    rounds = []

    def measured(scop, sources, sizes, **options):
        rounds.append(list(sources))
        # tiles of 16 are fast, which no model named
        walls = {name: 1.0 if name == tune.ORIGINAL else 0.25 if " 16" in name else 0.5 for name in sources}
        return [tune_result(name, wall) for name, wall in walls.items()], {}

    def tune_result(name, wall):
        return type("Result", (), {"variant": name, "wall_s": (wall,)})

    now = [0.0]
    monkeypatch.setattr(tune, "run_right", measured)
    monkeypatch.setattr(tune, "generate_file", lambda scop, text, tree, separate: now.__setitem__(0, now[0] + 1) or "text")
    tune.search(product, PRODUCT, {"n": 40}, budget_s=6, threads=2, clock=lambda: now[0])
    assert len(rounds) == 1 and set(rounds[0]) == {tune.ORIGINAL, *few}  # a second round like the first would end at 12
    rounds.clear()
    now[0] = 0.0
    tuned = tune.search(product, PRODUCT, {"n": 40}, budget_s=1000, threads=2, clock=lambda: now[0])
    assert len(rounds) > 2 and all(round_[0] == tune.ORIGINAL for round_ in rounds)
    assert " 16" in tuned.choice and tuned.speedup == 4 and tuned.choice not in few
    first = [name for n, names in enumerate(rounds) for name in names if not n or name not in rounds[n - 1]]
    assert len(first) == len(set(first))  # only what was the fastest is measured again


def test_what_is_illegal_never_runs_and_what_is_wrong_is_never_chosen(product, few, monkeypatch):
    real, ran = tune.generate_file, []

    def generated(scop, text, tree, separate=False):
        made = real(scop, text, tree)
        return PRODUCT.replace("c[i][j] +=", "if (!i && !j && !k) c[i][j] +=") if len(ran) == 0 and not ran.append(1) else made

    monkeypatch.setattr(tune, "generate_file", generated)
    tuned = tune.search(product, PRODUCT, {"n": 60}, budget_s=3, threads=1, flags=QUICK)
    [(wrong, why)] = tuned.failures.items()
    assert wrong == few[0] and "expected" in why and tuned.choice != wrong and wrong not in tuned.tried

    monkeypatch.setattr(candidates.legality, "check", lambda scop, order: ["a violation"])
    with pytest.raises(ScopError, match="a violation"):
        Choice.parse(f"{ISL} 16").tree(product)
    monkeypatch.setattr(tune, "_neighbours", lambda name: [Choice.parse(f"{ISL} 16")])
    monkeypatch.setattr(tune, "generate_file", lambda scop, text, tree, separate: real(scop, text, tree))
    tuned = tune.search(product, PRODUCT, {"n": 60}, budget_s=20, threads=1, flags=QUICK)
    assert "a violation" in tuned.failures[f"{ISL} 16"] and f"{ISL} 16" not in tuned.tried


def test_an_original_that_fails_is_refused(product, few):
    with pytest.raises(RunError, match="original must compile"):
        tune.search(product, PRODUCT.replace("{\n#", "{ undeclared();\n#").replace("*", "**", 1), {"n": 4}, budget_s=1, threads=1)


def test_a_file_keeps_choices_of_several_regions(product, tmp_path):
    path, other = tmp_path / "tuned.json", parse_c(PRODUCT.replace("+=", "-="))
    assert tune.load(path, product) is None
    first = tune.Tuned("kernel_product", "pluto 32/4", {"n": 40.0}, 2, 1.5, {"original": 3.0, "pluto 32/4": 2.0}, {})
    tune.save(path, product, first)
    assert tune.load(path, product) == first and tune.load(path, other) is None
    tune.save(path, other, tune.Tuned("kernel_product", tune.ORIGINAL, {}, 1, 1.0, {}, {}))
    assert tune.load(path, product) == first and tune.load(path, other).choice == tune.ORIGINAL
    assert tune.load(path, parse_c("int before;\n" + PRODUCT.replace("c[i][j] +=", "c[i][j]  +="))) == first
    for text in ("no", "[]", '{"format": 2, "regions": {}}'):
        path.write_text(text)
        with pytest.raises(ScopError, match="must be a file of tuned schedules"):
            tune.load(path, product)
    path.write_text(json.dumps({"format": 1, "regions": {tune.fingerprint(product): {"choice": "pluto 0"}}}))
    with pytest.raises(ScopError, match="must be a file of tuned schedules"):
        tune.load(path, product)


def test_the_command_searches_keeps_and_reuses(tmp_path, capsys, few):
    source, file, output = tmp_path / "product.c", tmp_path / "tuned.json", tmp_path / "out.c"
    source.write_text(PRODUCT)
    arguments = ["schedule", str(source), "--tuned", str(file), "--output", str(output)]
    assert cli.main(arguments) == 2 and "must have a choice for the region of kernel_product, got none" in capsys.readouterr().err
    assert cli.main([*arguments, "--search", "4"]) == 2 and "got no sizes" in capsys.readouterr().err and not file.exists()
    assert cli.main([*arguments, "--search", "4", "--sizes", "n=30"]) == 0
    shown = capsys.readouterr().out
    [region] = json.loads(file.read_text())["regions"].values()
    assert f"note: {region['choice']}, " in shown and shown.count("bitwise equal") == 6
    for choice, marks in (("cpu-vector 32,32,256/4", True), (tune.ORIGINAL, False)):
        scop = parse_c(source)
        tune.save(file, scop, tune.Tuned("kernel_product", choice, {"n": 30.0}, 2, 1.5, {}, {}))
        assert cli.main([*arguments, "--sizes", "n=30"]) == 0
        assert ("#pragma omp" in output.read_text()) == marks and ("#pragma scop" in output.read_text()) != marks
