"""OpenScop text of a scop and a schedule, for CLooG and other polyhedral tools."""

import islpy as isl

from npu_sparse.schedule.scop import Scop, Statement

DIM = isl.dim_type


def export(scop: Scop, schedule: isl.UnionMap) -> str:
    """OpenScop 1 text: domains, `schedule` as scattering, accesses, and statement bodies.

    Locals of relations (div dimensions) keep their definitions as inequalities. Arrays are numbered in the order of
    `scop.arrays`, from 1; the scattering has as many dimensions for every statement.
    """
    scatterings = {s.name: _scattering(s, schedule, scop) for s in scop.statements}
    width = max((m.dim(DIM.out) for m in scatterings.values()), default=0)
    identifiers = {name: n for n, name in enumerate(scop.arrays, 1)}
    lines = ["<OpenScop>", "", "# Language", "C", "", "# Context", *_relation("CONTEXT", _context(scop), scop)]
    lines += ["", "# Parameters are provided", "1" if scop.parameters else "0"]
    if scop.parameters:
        lines += ["<strings>", " ".join(scop.parameters), "</strings>"]
    lines += ["", "# Number of statements", str(len(scop.statements))]
    for statement in scop.statements:
        accesses = [("READ", a) for a in statement.reads] + [("MAY_WRITE" if a.may else "WRITE", a) for a in statement.writes]
        lines += ["", f"# Statement {statement.name}", "# Number of relations", str(2 + len(accesses)), ""]
        lines += _relation("DOMAIN", isl.Map.from_range(statement.domain.reset_tuple_id()), scop)
        lines += ["", *_relation("SCATTERING", _padded(scatterings[statement.name], width), scop)]
        for kind, access in accesses:
            relation = access.relation.gist_domain(statement.domain)
            lines += ["", *_relation(kind, relation, scop, identifiers[access.array])]
        lines += ["", "# Number of statement extensions", "1", "<body>", "# Number of original iterators"]
        lines += [str(len(statement.iterators)), "# Original iterators", " ".join(statement.iterators)]
        lines += ["# Statement body expression", " ".join(statement.body.split()), "</body>"]
    lines += ["", "<arrays>", "# Number of arrays", str(len(identifiers))]
    lines += [f"{n} {name}" for name, n in identifiers.items()]
    return "\n".join([*lines, "</arrays>", "", "</OpenScop>"]) + "\n"


def _context(scop: Scop) -> isl.Map:
    domain = isl.Set.universe(scop.context.get_space().set_from_params())
    return isl.Map.from_range(domain.intersect_params(scop.context))


def _scattering(statement: Statement, schedule: isl.UnionMap, scop: Scop) -> isl.Map:
    scattering = isl.Map.from_union_map(schedule.intersect_domain(isl.UnionSet.from_set(statement.domain)))
    return scattering.gist_domain(statement.domain.intersect_params(scop.context)).coalesce()


def _padded(relation: isl.Map, width: int) -> isl.Map:
    dims = relation.dim(DIM.out)
    relation = relation.add_dims(DIM.out, width - dims)
    for n in range(dims, width):
        relation = relation.fix_val(DIM.out, n, isl.Val(0))
    return relation


def _relation(kind: str, relation: isl.Map, scop: Scop, array: int = 0) -> list[str]:
    """Lines of one OpenScop relation. `array` > 0 is written as a first output dimension, as accesses have it."""
    relation = relation.align_params(_parameters(scop))
    pieces = relation.compute_divs().get_basic_maps()
    lines = [kind, *([str(len(pieces))] if len(pieces) != 1 else [])]
    for piece in pieces:
        lines += _basic(piece, array)
    return lines


def _parameters(scop: Scop) -> isl.Space:
    space = isl.Space.params_alloc(isl.DEFAULT_CONTEXT, len(scop.parameters))
    for n, name in enumerate(scop.parameters):
        space = space.set_dim_name(DIM.param, n, name)
    return space


def _basic(piece: isl.BasicMap, array: int) -> list[str]:
    order = (DIM.out, DIM.in_, DIM.div, DIM.param, DIM.cst)
    rows = [[0, *row] for row in _matrix(piece.equalities_matrix(*order))]
    rows += [[1, *row] for row in _matrix(piece.inequalities_matrix(*order))]
    sizes = [piece.dim(kind) for kind in order[:4]]
    if array:
        rows = [[row[0], 0, *row[1:]] for row in rows]
        rows.insert(0, [0, -1, *[0] * sum(sizes), array])
        sizes[0] += 1
    header = f"{len(rows)} {2 + sum(sizes)} {' '.join(map(str, sizes))}"
    return [header, *(" ".join(f"{value:4d}" for value in row) for row in rows)]


def _matrix(matrix: isl.Mat) -> list[list[int]]:
    return [[matrix.get_element_val(r, c).to_python() for c in range(matrix.cols())] for r in range(matrix.rows())]
