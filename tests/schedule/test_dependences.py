"""Dependences, against memory traces."""

from pathlib import Path

import islpy as isl
import pytest

import npu_sparse.schedule
from npu_sparse.schedule import testing
from npu_sparse.schedule.dependences import dependences
from npu_sparse.schedule.frontend import builder
from npu_sparse.schedule.frontend.c import parse_c
from npu_sparse.schedule.scop import ScopError

KERNELS = sorted((Path(npu_sparse.schedule.__file__).parent / "kernels").glob("*.c"))


def pairs(scop, sizes, relax=False):
    """(kind, array, source, source iteration, sink, sink iteration) of all dependences."""
    ordered = set()
    for d in dependences(scop, relax):
        depth = len(scop.statement(d.source).iterators)
        points = testing.points(isl.Map.from_basic_map(d.relation).wrap(), sizes)
        ordered |= {(d.kind, d.array, d.source, point[:depth], d.sink, point[depth:]) for point in points}
    return ordered


def implied(ordered):
    """Pairs without kind and array, and what follows from them by chains."""
    after = {}
    for _, _, *pair in ordered:
        after.setdefault(tuple(pair[:2]), set()).add(tuple(pair[2:]))
    closed = set()
    for start in after:
        todo, seen = list(after[start]), set()
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += after.get(node, ())
        closed |= {(start, node) for node in seen}
    return closed


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernel_dependences_are_those_of_its_trace(path):
    scop = parse_c(path)
    sizes = {p: 3 if p.startswith("t") else 5 + k % 2 for k, p in enumerate(scop.parameters)}
    trace = testing.instances(scop, sizes)
    ordered, true = pairs(scop, sizes), testing.flow(trace)
    assert {p for p in ordered if p[0] != "WAR"} == {p for p in true if p[0] != "WAR"}
    # A read of a then overwritten element may remain beside the WAW that orders the same two instances.
    extra = ordered - true
    assert not true - ordered and {p[1:] for p in extra} <= {p[1:] for p in true if p[0] == "WAW"}


@pytest.mark.parametrize("seed", range(60))
def test_random_dependences_are_those_of_the_trace(seed):
    text = testing.random_scop(seed, strides=False)
    sizes = {"n": 4, "m": 3 + seed % 3}
    try:
        scop = parse_c(text)
    except ScopError as error:
        assert "conditions that never hold" in str(error)
        return
    trace = testing.instances(scop, sizes)
    ordered, true = pairs(scop, sizes), testing.flow(trace)
    assert not true - ordered
    extra = {p[1:] for p in ordered - true}
    assert {p[0] for p in ordered - true} <= {"WAR"} and extra <= {p[1:] for p in true if p[0] == "WAW"}


@pytest.mark.parametrize("seed", range(1000, 1060))
def test_random_strided_dependences_order_every_conflict_and_nothing_else(seed):
    text = testing.random_scop(seed)
    sizes = {"n": 4, "m": 3 + seed % 2}
    try:
        scop = parse_c(text)
    except ScopError as error:
        assert "conditions that never hold" in str(error)
        return
    trace = testing.instances(scop, sizes)
    ordered, conflicts = pairs(scop, sizes), set(testing.conflicts(trace))
    assert not testing.flow(trace) - ordered
    assert conflicts <= implied(ordered) and conflicts_only(scop, sizes)


def test_a_stride_with_two_upper_bounds():
    """Where isl's dataflow analysis alone names i = 0 as the last write."""
    scop = parse_c("""void f(int n, int m, int e0, double C[n], double x)
{
#pragma scop
    for (int i = e0; i < m; i += 2)
        for (int j = n - 1; j >= i; j--) {
            C[1] = j;
            C[j] += C[1];
        }
    for (int i = 0; i < 4; i++)
        x += C[2 * i + 1];
#pragma endscop
}
""")
    sizes = {"n": 4, "m": 5, "e0": 0}
    trace = testing.instances(scop, sizes)
    assert ("RAW", "C", "S0", (2, 2), "S2", (0,)) in testing.flow(trace)
    assert not testing.flow(trace) - pairs(scop, sizes) and conflicts_only(scop, sizes)


def conflicts_only(scop, sizes):
    conflicts = set(testing.conflicts(testing.instances(scop, sizes)))
    return {((source, i), (sink, j)) for _, _, source, i, sink, j in pairs(scop, sizes)} <= conflicts


def test_loops_with_the_same_stride_keep_exact_last_writes():
    scop = parse_c("""void f(int n, int first, double A[n], double B[n])
{
#pragma scop
    for (int t = 0; t < n; t++) {
        for (int i = first; i < n - 1; i += 2)
            A[i] = A[i - 1] + A[i + 1];
        for (int i = n - 1; i >= first; i -= 3) {
            B[i] = A[i];
            A[i] = B[i];
        }
    }
#pragma endscop
}
""")
    sizes = {"n": 7, "first": 1}
    assert pairs(scop, sizes) == testing.flow(testing.instances(scop, sizes))


def test_gemm():
    scop = parse_c(next(path for path in KERNELS if path.stem == "gemm"))
    edges = {(d.kind, d.source, d.sink, d.reduction) for d in dependences(scop)}
    assert edges == {("RAW", "S0", "S1", False), ("WAW", "S0", "S1", False), ("RAW", "S1", "S1", True), ("WAW", "S1", "S1", True)}
    assert all(isinstance(d.relation, isl.BasicMap) for d in dependences(scop))
    carried = next(d for d in dependences(scop) if d.kind == "RAW" and d.reduction)
    expected = "[ni, nj, nk] -> { S1[i, k, j] -> S1[i, k + 1, j] : 0 <= i < ni and 0 <= j < nj and 0 <= k < nk - 1 }"
    assert isl.Map.from_basic_map(carried.relation).is_equal(isl.Map(expected))


def test_relaxed_updates_are_unordered_but_stay_between_what_precedes_and_follows():
    scop = parse_c("""void f(int n, double B[n], double s, double r)
{
#pragma scop
    s = 1;
    for (int i = 0; i < n; i++)
        s += B[i];
    r = s;
    s = 0;
#pragma endscop
}
""")
    ordered = implied(pairs(scop, {"n": 4}, relax=True))
    for i in range(4):
        assert (("S0", ()), ("S1", (i,))) in ordered and (("S1", (i,)), ("S2", ())) in ordered
        assert (("S1", (i,)), ("S3", ())) in ordered
        assert not any((("S1", (i,)), ("S1", (j,))) in ordered for j in range(4))
    assert (("S1", (0,)), ("S1", (1,))) in implied(pairs(scop, {"n": 4}))


def test_relaxed_updates_of_lu_still_wait_for_the_elements_they_use():
    scop = parse_c(next(path for path in KERNELS if path.stem == "lu"))
    ordered = implied(pairs(scop, {"n": 4}, relax=True))
    assert (("S1", (2, 0)), ("S0", (2, 1, 0))) in ordered  # A[2][0] is divided before the update of A[2][1] uses it
    assert (("S2", (2, 3, 0)), ("S2", (2, 3, 1))) not in ordered
    assert (("S2", (2, 3, 0)), ("S2", (2, 3, 1))) in implied(pairs(scop, {"n": 4}))


def test_updates_of_two_statements_stay_ordered():
    scop = parse_c("""void f(int n, double B[n], double s)
{
#pragma scop
    for (int i = 0; i < n; i++) {
        s += B[i];
        s *= 2;
    }
#pragma endscop
}
""")
    ordered = implied(pairs(scop, {"n": 3}, relax=True))
    assert (("S0", (0,)), ("S1", (0,))) in ordered and (("S1", (0,)), ("S0", (1,))) in ordered


def opaque(**writes):
    b = builder.ScopBuilder("f", "n")
    b.array("a", "n", live_out=True)
    b.array("s", live_out=True)
    with b.loop("i", 0, "n"):
        b.statement("a[i] = 1")
    b.opaque("sort(a)", reads=("a[k]",), **writes)
    with b.loop("i", 0, "n"):
        b.statement("s += a[i]")
    return b.build()


def test_an_opaque_write_hides_what_was_there_before():
    ordered = pairs(opaque(writes=("a[k]",)), {"n": 3})
    assert {p[2] for p in ordered if p[0] == "RAW" and p[4] == "S2" and p[1] == "a"} == {"S1"}
    assert ("RAW", "a", "S0", (2,), "S1", ()) in ordered and ("WAW", "a", "S0", (2,), "S1", ()) in ordered


def test_a_write_that_may_happen_hides_nothing():
    ordered = pairs(opaque(may_write=("a[k]",)), {"n": 3})
    assert {p[2] for p in ordered if p[0] == "RAW" and p[4] == "S2" and p[1] == "a"} == {"S0", "S1"}


def test_a_scop_without_conflicts_has_no_dependences():
    assert dependences(builder.add()) == [] and dependences(builder.rope()) == []


def test_statements_of_one_loop_with_different_strides():
    scop = parse_c("""void f(int n, double B[n], double s)
{
#pragma scop
    for (int i = 0; i < n; i++) {
        if (i % 2 == 0)
            B[0] = i;
        if (i % 3 == 0)
            s += B[0];
    }
#pragma endscop
}
""")
    for n in (4, 7, 11):
        trace = testing.instances(scop, {"n": n})
        ordered = pairs(scop, {"n": n})
        assert not testing.flow(trace) - ordered and conflicts_only(scop, {"n": n})
        assert set(testing.conflicts(trace)) <= implied(ordered)


def test_a_stride_that_only_one_of_two_statements_has():
    """Also a case that isl's dataflow analysis gets wrong, and that counting without gaps does not cure."""
    scop = parse_c("""void f(int n, int m, double B[n], double x)
{
#pragma scop
    for (int i = 0; i < m + 9; i++)
        for (int j = n + 9; j >= 0; j--) {
            if (m - i > 0 && i % 2 == 0 && j <= n - 1 && j >= i)
                B[1] = j;
            x += 1;
        }
    for (int k = 0; k < 4; k++)
        x += B[2 * k + 1];
#pragma endscop
}
""")
    sizes = {"n": 4, "m": 5}
    true, ordered = testing.flow(testing.instances(scop, sizes)), pairs(scop, sizes)
    assert ("RAW", "B", "S0", (2, 2), "S2", (0,)) in true and not true - ordered and conflicts_only(scop, sizes)
