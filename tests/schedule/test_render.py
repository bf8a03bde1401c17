import pytest

from npu_sparse.schedule import config, render
from npu_sparse.schedule.frontend.c import parse_c
from npu_sparse.schedule.isl_baseline import isl_tree
from npu_sparse.schedule.loop_analysis import flow
from npu_sparse.schedule.scheduler import schedule

CHAIN = """
void f(int n, double a[n], double b[n], double c[n]) {
#pragma scop
  for (int i = 0; i < n; i++) b[i] = 2 * a[i];
  for (int i = 0; i < n; i++) c[i] = 3 * b[n - 1 - i];
#pragma endscop
}
"""
PRODUCT = """
void f(int n, double C[n][n], double A[n][n], double B[n][n]) {
#pragma scop
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++)
      for (int k = 0; k < n; k++)
        C[i][j] += A[i][k] * B[k][j];
#pragma endscop
}
"""


def test_tree_shows_loops_marks_and_order():
    scop = parse_c(CHAIN)
    assert render.show_tree(isl_tree(scop)).splitlines()[0] == "statements S0, S1"
    shown = render.show_tree(schedule(scop, "pluto").tree())
    assert shown.splitlines() == [
        "statements S0, S1", "one after the other", "  S0", "    band", "      S0: i   [parallel, carries nothing]",
        "  S1", "    band", "      S1: i   [parallel, carries nothing]",
    ]  # fmt: skip


def test_tree_shows_tiles():
    scop = parse_c(PRODUCT)
    shown = render.show_tree(isl_tree(scop, (4, 8)))
    assert "S0: i / 4   [parallel, carries nothing]" in shown and "S0: j / 8" in shown and "S0: k / 8" in shown
    assert shown.count("band, permutable") == 2


@pytest.mark.parametrize("suffix, start", [("png", b"\x89PNG"), ("svg", b"<?xml")])
@pytest.mark.parametrize("text, strategy", [(CHAIN, "pluto-plus"), (PRODUCT, "feautrier")])
def test_picture_is_written(text, strategy, suffix, start, tmp_path):
    path = tmp_path / f"picture.{suffix}"
    render.draw(schedule(parse_c(text), strategy), path, {"n": 4})
    assert path.read_bytes().startswith(start) and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_points_arrows_and_ranks_are_the_programs():
    scop = parse_c(CHAIN)
    plan = schedule(scop, "pluto-plus")
    values = {"n": 4}
    points, labels, _ = render._places(scop, values, render._original_rows(scop))
    assert points == {(name, (i,)): (i, 0) for name in ("S0", "S1") for i in range(4)} and labels == ("i", "")
    arrows = render._pairs(flow(scop).intersect_params(render._fixed(scop, values)))
    assert sorted(arrows) == [(("S0", (i,)), ("S1", (3 - i,))) for i in range(4)]
    before, after = render._ranks(scop.original(), scop, values), render._ranks(plan.union_map(), scop, values)
    assert [before["S0", (i,)] for i in range(4)] == [0, 1, 2, 3] and [before["S1", (i,)] for i in range(4)] == [4, 5, 6, 7]
    assert all(after["S0", (i,)] < after["S1", (3 - i,)] for i in range(4))
    assert after["S1", (3,)] - after["S0", (0,)] == 1, "fused: a value is used at once"


def test_bad_pictures_are_refused(tmp_path):
    plan = schedule(parse_c(CHAIN), "pluto")
    with pytest.raises(ValueError, match="picture must be a .png or .svg file, got"):
        render.draw(plan, tmp_path / "picture.pdf")
    with pytest.raises(ValueError, match="sizes must be of n, got m"):
        render.draw(plan, tmp_path / "picture.png", {"m": 3})
    with pytest.raises(ValueError, match="sizes must satisfy"):
        render.draw(plan, tmp_path / "picture.png", {"n": -1})
    assert not list(tmp_path.iterdir())


def test_every_parameter_gets_a_size_that_shows_something():
    sizes = render._sizes(parse_c(PRODUCT), {})
    assert 3 <= sizes["n"] and sizes["n"] ** 3 <= render.INSTANCES


def test_every_strategy_can_be_drawn():
    for name in config.shipped():
        assert render.show_tree(schedule(parse_c(PRODUCT), name).tree()).startswith("statements S0\nband")
