import itertools

import pytest

isl = pytest.importorskip("islpy")

from npu_sparse.schedule.solve import farkas  # noqa: E402


@pytest.mark.parametrize(
    "text",
    [
        "{ [i, j] : 0 <= i <= 4 and 0 <= j <= i }",
        "{ [i, j] : 1 <= i <= 5 and j = i + 2 }",
        "{ [i, j] : exists e : i = 2e and 0 <= i <= 6 and 1 <= j <= 3 }",
    ],
)
def test_cone_holds_exactly_the_forms_that_are_nowhere_negative(text):
    points = isl.BasicSet(text)
    cone = farkas.cone(points)
    inside = []
    isl.Set.from_basic_set(points).foreach_point(
        lambda point: inside.append([point.get_coordinate_val(isl.dim_type.set, k).to_python() for k in range(2)])
    )
    assert inside
    for c0, c1, c2 in itertools.product(range(-6, 7), range(-2, 3), range(-2, 3)):
        nowhere_negative = all(c0 + c1 * i + c2 * j >= 0 for i, j in inside)
        assert cone.contains((c0, c1, c2)) == nowhere_negative


def test_lifted_constants_hold_for_the_constant():
    points = isl.BasicSet("{ [i, j] : 0 <= i < 16 and j = i + 1 and j <= 15 }")
    lifted = farkas.lift_constants(points, (16,))
    assert lifted.dim(isl.dim_type.param) == 1
    sliced = isl.Set.from_basic_set(lifted).fix_val(isl.dim_type.param, 0, isl.Val(16)).project_out(isl.dim_type.param, 0, 1)
    assert sliced.is_equal(isl.Set.from_basic_set(points))
    cone = farkas.cone(points, (16,))
    assert farkas.cone(points).contains((15, -1, 0)), "15 - i is nowhere negative"
    assert not cone.contains((15, 0, -1, 0)), "but uses the constant as if it were a coefficient"
    assert cone.contains((-1, 1, -1, 0)), "extent16 - 1 - i does not"
