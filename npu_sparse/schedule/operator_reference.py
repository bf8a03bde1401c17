"""Inputs and fp64 results, in numpy, of the operators in `builder.OPERATORS`: what generated code is compared with."""

import inspect

import numpy as np

from npu_sparse.schedule.scop import Scop


def softmax(x):
    power = np.exp(x - x.max(1, keepdims=True))
    return {"y": power / power.sum(1, keepdims=True)}


def rms_norm_residual(x, residual, weight, epsilon):
    h = x + residual
    return {"h": h, "y": h / np.sqrt(np.mean(h**2, 1, keepdims=True) + epsilon) * weight}


def rope(x, cosine, sine):
    first, second = np.split(x, 2, -1)
    return {"y": np.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)}


def indexer(dot, w):
    return {"best": np.einsum("hnuk,nuh->nuk", np.maximum(dot, 0), w).max(1)}


def lu_decomp(a):
    a = a.copy()
    for k in range(len(a)):
        a[k + 1 :, k] /= a[k, k]
        a[k + 1 :, k + 1 :] -= np.outer(a[k + 1 :, k], a[k, k + 1 :])
    return {"a": a}


def trsmL_off_diag(a, b):
    return {"b": np.linalg.solve(np.tril(a, -1) + np.eye(len(a)), b)}


def trsmL(a, b):
    return {"b": np.linalg.solve(np.tril(a), b)}


def trsmU_T(a, b):
    return {"b": np.linalg.solve(np.triu(a).T, b.T).T}


def add(a, b):
    return {"y": a + b}


REFERENCES = {f.__name__: f for f in (softmax, rms_norm_residual, rope, indexer, lu_decomp, trsmL_off_diag, trsmL, trsmU_T, add)}


def inputs(scop: Scop, sizes: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Random fp32 arrays of the scop's shapes, in fp64. Square arrays called a, the solvers' matrices, are well conditioned."""
    random, arrays = np.random.default_rng(seed), {}
    for array in scop.arrays.values():
        if array.shape:
            shape = tuple(eval(extent, {}, dict(sizes)) for extent in array.shape)
            values = random.standard_normal(shape)
            if array.name == "a" and shape == shape[:1] * 2:
                values = 0.1 * values + 4 * np.eye(len(values))
            arrays[array.name] = values.astype(np.float32).astype(np.float64)
    return arrays


def largest_error(reference, arrays: dict[str, np.ndarray], results: dict[str, np.ndarray], **scalars: float) -> float:
    """The largest difference of a result from `reference(arrays, scalars)`, relative to the largest element of that array."""
    given = {name: {**arrays, **scalars}[name] for name in inspect.signature(reference).parameters}
    expected = reference(**given)
    return max(float(np.abs(results[name] - array).max() / np.abs(array).max()) for name, array in expected.items())
