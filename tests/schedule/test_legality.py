"""The legality checker, against enumeration of all conflicting pairs."""

import random
from pathlib import Path

import islpy as isl
import pytest

import npu_sparse.schedule
from npu_sparse.schedule import testing
from npu_sparse.schedule.frontend import builder
from npu_sparse.schedule.frontend.c import parse_c
from npu_sparse.schedule.legality import check
from npu_sparse.schedule.scop import ScopError

KERNELS = {path.stem: path for path in (Path(npu_sparse.schedule.__file__).parent / "kernels").glob("*.c")}


def original(scop):
    """Statement -> expressions of its place, the same number for all."""
    width = max(len(statement.position) for statement in scop.statements)
    return {s.name: [str(entry) for entry in s.position] + ["0"] * (width - len(s.position)) for s in scop.statements}


def union_map(scop, places):
    parts = [f"{s.name}[{', '.join(s.iterators)}] -> [{', '.join(places[s.name])}]" for s in scop.statements]
    return isl.UnionMap(f"[{', '.join(scop.parameters)}] -> {{ {'; '.join(parts)} }}")


def mutate(scop, chance):
    """Places with one to three random changes, which may be legal or not."""
    places = original(scop)
    for _ in range(chance.randint(1, 3)):
        statement = chance.choice(scop.statements)
        row = places[statement.name]
        at, other = chance.randrange(len(row)), chance.randrange(len(row))
        kind = chance.choice(["negate", "swap", "skew", "shift", "constant", "collapse"])
        if kind == "negate":
            row[at] = f"-({row[at]})"
        elif kind == "swap":
            row[at], row[other] = row[other], row[at]
        elif kind == "skew" and at != other:
            row[at] = f"({row[at]}) {chance.choice('+-')} ({row[other]})"
        elif kind == "shift":
            row[at] = f"({row[at]}) + {chance.choice([-1, 1, 2])}"
        elif kind == "constant":
            row[at] = str(chance.randint(-1, 2))
        else:
            row[at] = "0"
    return places


def wrong_pairs(scop, places, sizes):
    """Conflicting pairs that the places put in the wrong order or at the same place, by evaluation of every instance."""
    trace = testing.instances(scop, sizes)
    when = {}
    for name, instance in trace:
        values = {**sizes, **dict(zip(scop.statement(name).iterators, instance.iteration))}
        when[name, instance.iteration] = [eval(entry, {}, values) for entry in places[name]]
    return {(first, second) for first, second in testing.conflicts(trace) if not when[first] < when[second]}


def assert_genuine(scop, places, violation):
    """The witness is a conflicting pair in the wrong order, for the parameters that it names."""
    wrong = wrong_pairs(scop, places, violation.parameters)
    pair = ((violation.source, violation.source_iteration), (violation.sink, violation.sink_iteration))
    assert pair in wrong, violation


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_original_order_is_legal(name):
    scop = parse_c(KERNELS[name])
    assert check(scop, scop.original()) == []
    assert check(scop, union_map(scop, original(scop))) == []  # also where it is defined beyond the instances


@pytest.mark.parametrize("name", sorted(builder.OPERATORS))
def test_original_order_of_an_operator_is_legal(name):
    scop = builder.OPERATORS[name]()
    assert check(scop, scop.original()) == []


def test_catches_100_of_100_mutated_schedules():
    chance, caught, legal = random.Random(7), 0, 0
    small = "gemm atax trisolv jacobi_1d seidel_2d lu durbin floyd_warshall trmm symm gesummv bicg".split()
    scops = {name: parse_c(KERNELS[name]) for name in small}
    while caught < 100:
        scop = scops[chance.choice(small)]
        places = mutate(scop, chance)
        sizes = {p: chance.choice([3, 4]) for p in scop.parameters}
        violations = check(scop, union_map(scop, places))
        if wrong_pairs(scop, places, sizes):
            assert violations, places
            caught += 1
        legal += not violations
        for violation in violations[:1]:
            assert_genuine(scop, places, violation)
    assert legal >= 5  # and it does not refuse everything


@pytest.mark.parametrize("seed", range(50))
def test_random_schedules_of_random_scops(seed):
    chance = random.Random(seed)
    try:
        scop = parse_c(testing.random_scop(seed))
    except ScopError as error:
        assert "conditions that never hold" in str(error)
        return
    for places in (original(scop), mutate(scop, chance), mutate(scop, chance)):
        violations = check(scop, union_map(scop, places))
        if not violations:
            assert not any(wrong_pairs(scop, places, {"n": n, "m": m}) for n, m in ((4, 4), (3, 5), (5, 2)))
        for violation in violations[:2]:
            assert_genuine(scop, places, violation)
        if places == original(scop):
            assert not violations


def test_a_violation_reads_as_one_sentence():
    scop = parse_c(KERNELS["gemm"])
    places = original(scop) | {"S1": ["0", "i", "0", "k", "0", "j", "0"]}
    violations = check(scop, union_map(scop, places))
    assert {(v.kind, v.source, v.sink, v.array) for v in violations} == {("RAW", "S0", "S1", "C"), ("WAR", "S0", "S1", "C"),
                                                                    ("WAW", "S0", "S1", "C")}
    assert "(RAW on C), got it after or at the same place (ni = " in str(violations[0])
    assert str(violations[0]).startswith("schedule must run S0[0, ")
    assert_genuine(scop, places, violations[0])


def test_interchange_of_a_permutable_nest_is_legal():
    scop = parse_c(KERNELS["gemm"])
    assert check(scop, union_map(scop, {"S0": ["0", "i", "j", "0"], "S1": ["1", "k", "j", "i"]})) == []


def test_tiled_schedules_are_checked_with_their_floors():
    scop = parse_c(KERNELS["trisolv"])
    tiled = {"S0": ["floor(i/4)", "0", "i", "0", "0"], "S1": ["floor(i/4)", "floor(j/4)", "i", "j", "1"],
             "S2": ["floor(i/4)", "floor(i/4)", "i", "i", "2"]}
    assert check(scop, union_map(scop, tiled)) == []
    tiled["S2"][1] = "0"
    violations = check(scop, union_map(scop, tiled))
    assert ("RAW", "S1", "S2", "x") in {(v.kind, v.source, v.sink, v.array) for v in violations}


def test_instances_without_a_place():
    scop = parse_c(KERNELS["mvt"])
    violations = check(scop, isl.UnionMap("[n] -> { S0[i, j] -> [0, i, j] : j >= 1 }"))
    assert [(v.kind, v.source) for v in violations] == [("unscheduled", "S0"), ("unscheduled", "S1")]
    assert violations[0].source_iteration[1] == 0
    assert str(violations[1]).startswith("schedule must place every instance, got none for S1[")


def test_instances_with_two_places():
    scop = parse_c(KERNELS["mvt"])
    violations = check(scop, isl.UnionMap("{ S0[i, j] -> [0, i, j]; S1[i, j] -> [1, i, j]; S1[i, j] -> [2, i, j] : i = 2 }"))
    assert [(v.kind, v.source, v.source_iteration[0]) for v in violations] == [("ambiguous", "S1", 2)]
    assert "got several places for S1[2, " in str(violations[0])


def test_a_schedule_into_two_spaces_is_refused():
    scop = parse_c(KERNELS["mvt"])
    with pytest.raises(ValueError, match="schedule must map into one space, got "):
        check(scop, isl.UnionMap("{ S0[i, j] -> [0, i, j]; S1[i, j] -> [1, i] }"))


def test_only_relaxed_updates_may_change_their_order():
    scop = parse_c(KERNELS["gemm"])
    reverse = union_map(scop, {"S0": ["0", "i", "0", "j"], "S1": ["1", "i", "-k", "j"]})
    assert {v.array for v in check(scop, reverse)} == {"C"} and check(scop, reverse, relax_reductions=True) == []
    before = union_map(scop, {"S0": ["1", "i", "0", "j"], "S1": ["0", "i", "k", "j"]})
    assert {v.kind for v in check(scop, before, relax_reductions=True)} == {"RAW", "WAR", "WAW"}


def test_relaxed_updates_still_wait_for_other_elements():
    b = builder.ScopBuilder("f", "n")
    b.array("x", "n", live_out=True)
    with b.loop("i", 1, "n"):
        b.statement("x[i] += x[i - 1]")
    scop = b.build()
    assert scop.statements[0].reduction == "+"
    assert {v.kind for v in check(scop, isl.UnionMap("{ S0[i] -> [-i] }"), relax_reductions=True)} == {"RAW"}


def test_schedules_outside_of_the_context_do_not_matter():
    b = builder.ScopBuilder("f", "n", context="n <= 1")
    b.array("s", live_out=True)
    with b.loop("i", 0, "n"):
        b.statement("s = i")
    scop = b.build()
    assert check(scop, isl.UnionMap("{ S0[i] -> [-i] }")) == []
