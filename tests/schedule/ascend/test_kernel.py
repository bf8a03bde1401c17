import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from npu_sparse.schedule import config
from npu_sparse.schedule.ascend import emulate, memory
from npu_sparse.schedule.ascend.kernel import compile_tree, generate
from npu_sparse.schedule.frontend import builder
from npu_sparse.schedule.isl_baseline import isl_tree
from npu_sparse.schedule.operator_reference import REFERENCES, inputs, largest_error
from npu_sparse.schedule.scheduler import schedule
from npu_sparse.schedule.scop import ScopError

EMULATION = Path(__file__).resolve().parents[3] / "ops/emulation"


def gate(x, z, bias, limit):
    return {"y": (2 - x) / (1 + np.exp(-z)) + np.maximum(x * bias, limit) - 3 * abs(x) / 7}


def gate_scop():
    b = builder.ScopBuilder("gate", "R C", "R >= 1 and C >= 1")
    for name in ("x", "z"):
        b.array(name, "R", "C")
    b.array("bias", "C")
    b.array("limit")
    b.array("y", "R", "C", live_out=True)
    with b.loop("i", 0, "R"), b.loop("j", 0, "C"):
        swish = "(2.0f - x[i][j]) / (1.0f + expf(-z[i][j]))"
        b.statement(f"y[i][j] = {swish} + fmaxf(x[i][j] * bias[j], limit) - 3.0f * fabsf(x[i][j]) / 7.0f")
    return b.build()


def shifted_scop():
    """A row that reads its neighbour: its operands begin at different offsets, which no vector instruction takes."""
    b = builder.ScopBuilder("shifted", "R C", "R >= 1 and C >= 1")
    b.array("x", "R", "C + 1")
    b.array("y", "R", "C", live_out=True)
    with b.loop("i", 0, "R"), b.loop("j", 0, "C"):
        b.statement("y[i][j] = x[i][j + 1] - x[i][j]")
    return b.build()


def shifted(x):
    return {"y": np.diff(x, axis=1)}


def case(scop, sizes=None, scalars=(), tree=None, reference=None):
    return scop, sizes or {}, scalars, tree or npu_vector_tree, reference or REFERENCES[scop.name]


def npu_vector_tree(scop):
    return schedule(scop, "npu-vector").tree()


def untiled_pluto(scop):
    return schedule(scop, replace(config.load("pluto"), tiling=config.Tiling())).tree()


def directed(kind, iterator):
    """A tree of npu-vector with one directive, as an annotated operator has it."""

    def tree(scop):
        directives = (config.Directive(kind, (0,), iterator),)
        return schedule(scop, replace(config.load("npu-vector"), directives=directives)).tree()

    return tree


def row_sum_scop():
    b = builder.ScopBuilder("row_sum", "R C", "R >= 1 and C >= 1")
    b.array("x", "R", "C")
    b.array("y", "R", live_out=True)
    with b.loop("i", 0, "R"), b.loop("j", 0, "C"):
        b.statement("y[i] += x[i][j]")
    return b.build()


def row_sum(x, y):
    return {"y": y + x.sum(1)}


CASES = {
    "softmax": case(builder.softmax(), {"R": 5, "C": 100}),
    "softmax, one short row": case(builder.softmax(), {"R": 1, "C": 8}),
    "softmax, long rows": case(builder.softmax(), {"R": 7, "C": 1001}),
    "softmax, isl": case(builder.softmax(), {"R": 5, "C": 37}, tree=isl_tree),
    "softmax, pluto": case(builder.softmax(), {"R": 5, "C": 37}, tree=untiled_pluto),
    "rms_norm_residual": case(builder.rms_norm_residual(), {"R": 6, "C": 200}, (1e-5,)),
    "rope": case(builder.rope(), {"H": 3, "T": 5, "D": 16}),
    "rope, halves between blocks": case(builder.rope(), {"H": 2, "T": 3, "D": 20}),
    "indexer": case(builder.indexer(), {"H": 2, "N": 3, "T": 100}),
    "indexer, one head": case(builder.indexer(block=16), {"H": 1, "N": 2, "T": 37}),
    "indexer, isl": case(builder.indexer(block=4), {"H": 2, "N": 2, "T": 9}, tree=isl_tree),
    "lu_decomp": case(builder.lu_decomp()),
    "lu_decomp, isl": case(builder.lu_decomp(), tree=isl_tree),
    "lu_decomp, wide": case(builder.lu_decomp(75)),
    "trsmL_off_diag": case(builder.trsmL_off_diag(112)),
    "trsmL_off_diag, narrow": case(builder.trsmL_off_diag(20)),
    "trsmL_off_diag, isl": case(builder.trsmL_off_diag(16), tree=isl_tree),
    "trsmL": case(builder.trsmL()),
    "trsmL, isl": case(builder.trsmL(), tree=isl_tree),
    "trsmU_T": case(builder.trsmU_T(48)),
    "trsmU_T, pluto": case(builder.trsmU_T(16), tree=untiled_pluto),
    "add": case(builder.add(40, 32)),
    "add, along the rows": case(builder.add(12, 16), tree=directed("vectorize", 0)),
    "add, columns shared": case(builder.add(12, 16), tree=directed("parallel", 1)),
    "add, rows in sequence": case(builder.add(12, 16), tree=directed("sequential", 0)),
    "row_sum": case(row_sum_scop(), {"R": 5, "C": 70}, reference=row_sum),
    "gate": case(gate_scop(), {"R": 4, "C": 37}, (0.25,), reference=gate),
    "shifted": case(shifted_scop(), {"R": 3, "C": 21}, reference=shifted),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ compiles the emulation")
    kernels = {
        name: compile_tree(scop, tree(scop), sizes, name.partition(", ")[2] or "npu-vector")
        for name, (scop, sizes, _, tree, _) in CASES.items()
    }
    return emulate.build(kernels, tmp_path_factory.mktemp("generated"), EMULATION)


@pytest.mark.parametrize("name", CASES)
def test_results_on_the_emulation(name, program):
    """Within 1e-5 of fp64, without a hazard, and the same bits for every number of cores and every order of events."""
    scop, sizes, scalars, _, reference = CASES[name]
    arrays = inputs(scop, sizes)
    named = dict(zip(program.kernels[name].scalars, scalars))
    first = None
    for blocks, seed in [(1, 0), (1, 1), (3, 2), (3, 3)]:
        results = program.run(name, arrays, scalars, blocks, seed)
        first = first or results
        assert largest_error(reference, arrays, results, **named) <= 1e-5, (blocks, seed)
        assert all(np.array_equal(results[array], first[array]) for array in first), (blocks, seed)


def generated(operator: str, **sizes) -> str:
    return generate(schedule(builder.OPERATORS[operator](), "npu-vector"), sizes)


def test_the_innermost_loops_of_every_operator_are_vector_instructions():
    for operator in builder.OPERATORS:
        sizes = {name: 16 for name in builder.OPERATORS[operator]().parameters}
        text = generated(operator, **sizes)
        updates = re.findall(r"SetValue", text)
        assert len(updates) == {"lu_decomp": 1, "trsmU_T": 1}.get(operator, 0), operator  # a division of one column's element
        assert "turn < turns" in text and text.count("void Nest") == 1, operator


@pytest.mark.parametrize("operator", ["trsmL_off_diag", "trsmL"])
def test_a_column_of_updates_is_one_instruction_whose_repeats_are_rows(operator):
    text = generated(operator)
    assert text.count("MulAddDst(") == text.count("Brcb(") == 1 and "Axpy(" not in text


def test_isl_leaves_no_parallel_innermost_loop_in_small_solvers():
    for operator in ("lu_decomp", "trsmL_off_diag", "trsmL", "trsmU_T"):
        scop = builder.OPERATORS[operator]()
        kernel = compile_tree(scop, isl_tree(scop), {}, "isl")
        assert "Axpy" not in kernel.text and "SetValue" in kernel.text


def test_a_loop_is_judged_by_what_is_left_in_it_where_that_is_asked_for():
    scop = builder.lu_decomp()
    assert "Axpy" in compile_tree(scop, isl_tree(scop), {}, "isl", per_loop=True).text


def test_columns_are_split_between_turns_where_they_do_not_fit():
    scop = builder.indexer()
    tree = schedule(scop, "npu-vector").tree()
    assert compile_tree(scop, tree, {"H": 2, "N": 3, "T": 64}, "npu-vector").turns == (3,)
    kernel = compile_tree(scop, tree, {"H": 2, "N": 3, "T": 1024}, "npu-vector")
    assert kernel.turns == (3 * 1024 // 64,) and kernel.ub_bytes <= memory.UB_BYTES


def test_rows_that_do_not_fit_are_refused():
    generated("softmax", R=2, C=5000)
    with pytest.raises(ScopError, match=r"softmax: what one turn of a core uses must fit in \d+ bytes of UB, got \d+"):
        generated("softmax", R=2, C=10000)


def test_missing_sizes_reserved_names_and_other_types_are_refused():
    with pytest.raises(ScopError, match="sizes must give C$"):
        generated("softmax", R=2)
    refused = [("work", "float", "a name that generated code uses, got work"), ("x", "double", "fp32, got double x")]
    for name, ctype, message in refused:
        b = builder.ScopBuilder("copy", "n", "n >= 1")
        b.array(name, "n", ctype=ctype)
        b.array("y", "n", live_out=True)
        with b.loop("i", 0, "n"):
            b.statement(f"y[i] = {name}[i]")
        with pytest.raises(ScopError, match=message):
            generate(schedule(b.build(), "npu-vector"), {"n": 8})


def test_what_no_instruction_computes_is_refused_by_name():
    b = builder.ScopBuilder("wave", "n", "n >= 1")
    b.array("x", "n")
    b.array("y", "n", live_out=True)
    with b.loop("i", 0, "n"):
        b.statement("y[i] = sinf(x[i])")
    with pytest.raises(ScopError, match="wave: S0 must use .*, got sinf"):
        generate(schedule(b.build(), "npu-vector"), {"n": 8})
