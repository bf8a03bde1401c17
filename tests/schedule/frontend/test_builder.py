"""SCoPs built in Python, and what the operators compute."""

import math
import re

import numpy as np
import pytest

from npu_sparse.schedule import testing
from npu_sparse.schedule.frontend import builder
from npu_sparse.schedule.frontend.builder import ScopBuilder
from npu_sparse.schedule.scop import ScopError


def evaluate(scop, arrays, sizes):
    """Runs the statements' bodies, translated to Python, in the order that the scop describes."""
    names = {**sizes, **arrays, "INFINITY": math.inf, "fmaxf": max, "expf": np.exp, "sqrtf": np.sqrt}
    for name, array in scop.arrays.items():
        if name not in arrays:
            names[name] = np.full([eval(extent, {}, sizes) for extent in array.shape], np.nan)
    code = {}
    for statement in scop.statements:
        text = re.sub(r"(\d)f\b", r"\1", statement.body.rstrip(";").replace("(float) ", "1.0 * "))
        code[statement.name] = compile(text, statement.name, "exec")
    for name, instance in testing.instances(scop, sizes):
        exec(code[name], {}, names | dict(zip(scop.statement(name).iterators, instance.iteration)))
    return names


@pytest.fixture
def normal():
    return np.random.default_rng(3).standard_normal


def test_softmax(normal):
    x = normal((3, 7))
    x[1] -= 2000  # exponentials without the maximum taken off are zero here
    y = evaluate(builder.softmax(), {"x": x}, {"R": 3, "C": 7})["y"]
    power = np.exp(x - x.max(1, keepdims=True))
    np.testing.assert_allclose(y, power / power.sum(1, keepdims=True))


def test_rms_norm_residual(normal):
    x, residual, weight = normal((3, 6)), normal((3, 6)), normal(6)
    out = evaluate(builder.rms_norm_residual(columns=6),
                   {"x": x, "residual": residual, "weight": weight, "epsilon": 1e-6}, {"R": 3})
    h = x + residual
    np.testing.assert_allclose(out["h"], h)
    np.testing.assert_allclose(out["y"], h / np.sqrt((h * h).mean(1, keepdims=True) + 1e-6) * weight)


def test_rope(normal):
    x, angle = normal((2, 5, 8)), normal((5, 4))
    y = evaluate(builder.rope(), {"x": x, "cosine": np.cos(angle), "sine": np.sin(angle)}, {"H": 2, "T": 5, "D": 4})["y"]
    rotated = np.concatenate([-x[..., 4:], x[..., :4]], -1)
    cos, sin = (np.concatenate([f(angle)] * 2, -1) for f in (np.cos, np.sin))
    np.testing.assert_allclose(y, x * cos + rotated * sin)


def test_indexer(normal):
    dot, w = normal((3, 2, 4, 5)), normal((2, 4, 3))
    best = evaluate(builder.indexer(block=4), {"dot": dot, "w": w}, {"H": 3, "N": 2, "T": 5})["best"]
    np.testing.assert_allclose(best, np.einsum("hnuk,nuh->nuk", np.maximum(dot, 0), w).max(1))


def test_lu_decomp(normal):
    a = normal((6, 6)) + 6 * np.eye(6)
    lu = evaluate(builder.lu_decomp(6), {"a": a.copy()}, {})["a"]
    np.testing.assert_allclose((np.tril(lu, -1) + np.eye(6)) @ np.triu(lu), a)


def test_triangular_solves(normal):
    a, b = normal((6, 6)) + 6 * np.eye(6), normal((6, 9))
    x = evaluate(builder.trsmL(9, 6), {"a": a, "b": b.copy()}, {})["b"]
    np.testing.assert_allclose(np.tril(a) @ x, b)
    x = evaluate(builder.trsmL_off_diag(9, 6), {"a": a, "b": b.copy()}, {})["b"]
    np.testing.assert_allclose((np.tril(a, -1) + np.eye(6)) @ x, b)
    x = evaluate(builder.trsmU_T(9, 6), {"a": a, "b": b.T.copy()}, {})["b"]
    np.testing.assert_allclose(x @ np.triu(a), b.T)


def test_add(normal):
    a, b = normal((4, 3)), normal((4, 3))
    np.testing.assert_array_equal(evaluate(builder.add(4, 3), {"a": a, "b": b}, {})["y"], a + b)


def test_sizes_are_numbers_or_parameters():
    scop = builder.softmax("R", 32)
    assert scop.parameters == ("R",) and scop.arrays["x"].shape == ("R", "32")
    assert str(scop.context) == "[R] -> {  : R > 0 }"
    assert builder.trsmL_off_diag().arrays["b"].shape == ("16", "112")


def test_scalars_conditions_and_loops_in_both_directions():
    b = ScopBuilder("f", "n m", context="n >= 4")
    b.array("x", "n", "m + 1", ctype="double")
    b.array("total", ctype="double", live_out=True)
    b.statement("total = 0;")
    with b.loop("i", "n - 1", -1, -2):
        with b.when("i < m"), b.loop("j", 0, "m"):
            b.statement("total += x[i][j]")
    scop = b.build()
    assert [s.position for s in scop.statements] == [(0,), (1, "-i", 0, "j", 0)]
    assert [(s.line, s.reduction) for s in scop.statements] == [(0, None), (0, "+")]
    assert (scop.source, scop.name, scop.region) == ("<python>", "f", (0, 0))
    assert scop.arrays["total"].live_out and scop.arrays["total"].shape == () and not scop.arrays["x"].live_out
    assert testing.points(scop.statements[1].domain, {"n": 5, "m": 3}) == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2)]
    assert scop.context.is_equal(scop.context.intersect_params(scop.context)) and "n >= 4" in str(scop.context)


def test_opaque_statements_have_footprints():
    b = ScopBuilder("f", "R N K")
    b.array("score", "R", "N")
    b.array("chosen", "R", "K", ctype="int", live_out=True)
    b.array("count", "R", ctype="int", live_out=True)
    with b.loop("r", 0, "R"):
        b.opaque("top_k(score, chosen, count, r, K)", reads=("score[r, k] : k <= r",), writes=("count[r]",),
                 may_write=("chosen[r, k]",))
    statement, = b.build().statements
    assert statement.body == "top_k(score, chosen, count, (r), K);"
    assert str(statement.reads[0].relation) == "[R, N, K] -> { S0[r] -> score[r, k] : 0 <= r < R and 0 <= k <= r and k < N }"
    assert [(a.array, a.may) for a in statement.writes] == [("count", False), ("chosen", True)]
    assert str(statement.writes[1].relation) == "[R, N, K] -> { S0[r] -> chosen[r, k] : 0 <= r < R and 0 <= k < K }"


def failing(*lines, reads=(), writes=(), arrays=()):
    b = ScopBuilder("f", "n")
    b.array("x", "n", live_out=True)
    for array in arrays:
        b.array(*array)
    with b.loop("i", 0, "n"):
        for line in lines:
            b.statement(line)
        if reads or writes:
            b.opaque("g(x)", reads=reads, writes=writes)
    return b.build()


@pytest.mark.parametrize(("arguments", "sentence"), [
    ({"lines": ["x[i * i] = 0"]}, "subscript must be affine in loop iterators and parameters, got i * i"),
    ({"lines": ["q = 0"]}, "name must be declared, got q"),
    ({"lines": ["x[i] = q"]}, "name must be declared, got q"),
    ({"writes": ["q[k]"]}, "array must be declared, got q"),
    ({"writes": ["x[i, k]"]}, "x must have 1 indices, got 2"),
    ({"writes": ["x[k] : k * k < 3"]}, "footprint must be affine in iterators and parameters, got x[k] : k * k < 3"),
    ({"writes": ["x[k] : k < q"]}, "footprint must be affine in iterators and parameters, got x[k] : k < q"),
    ({"writes": ["x[k"]}, "footprint must be like \"a[i, k] : k <= i\", got 'x[k'"),
    ({"reads": ["x[k]"]}, "opaque statement must write something, got g(x)"),
    ({"arrays": [("n", 3)]}, "n must be declared once, got a second declaration"),
    ({"arrays": [("a b", 3)]}, "name must be an identifier, got 'a b'"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_refused(arguments, sentence):
    with pytest.raises(ScopError) as caught:
        failing(*arguments.pop("lines", ()), **arguments)
    assert str(caught.value) == f"<python>: {sentence}"


def test_something_must_be_live_out():
    b = ScopBuilder("f")
    b.array("x")
    b.statement("x = 1")
    with pytest.raises(ScopError, match="<python>: f must have an array that is live out, got none"):
        b.build()
