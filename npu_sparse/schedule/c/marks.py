"""Marks on a schedule tree, directly above a band: `parallel`, `vector`, `unroll`, `unroll(4)`. Each is checked."""

import re
from dataclasses import dataclass

import islpy as isl

from npu_sparse.schedule.loop_analysis import Dependences
from npu_sparse.schedule.scop import Scop

from ...errors import USER_ERROR, ActionableError

NODE = isl.schedule_node_type
MARK = re.compile(r"(?:(parallel|vector)( reduction)?|unroll(?:\((\d+)\))?)$")


class CodegenError(ActionableError, ValueError):
    """A tree that cannot become a correct program: a mark that a dependence contradicts, or one that is not known."""

    exit_status = USER_ERROR


@dataclass(frozen=True)
class Hint:
    """How the loops below one mark run: what the AST printer needs to know, keyed by the mark's name."""

    kind: str
    depth: int  # of the loop in the schedule: isl leaves out loops of one iteration, a mark then stands above another one
    factor: int = 0
    private: tuple[str, ...] = ()
    combined: tuple[str, ...] = ()  # statements whose sums or products the loop makes in parts
    complete: int = 0  # nested loops to write out where their extent is constant
    order: isl.UnionMap | None = None  # the place of each instance in the loops around a parallel one, and in that


def resolve_marks(scop: Scop, tree: isl.Schedule) -> tuple[isl.Schedule, dict[str, Hint]]:
    """`tree` with its marks checked and renamed, and what each new name means."""
    loops: dict[str, Hint] = {}
    check = None

    def resolve(node):
        nonlocal check
        if node.get_type() != NODE.mark:
            return node
        text = node.mark_get_id().get_name()
        kind, combine, factor = _parse_mark(text)
        below = below_marks(node)
        if below.get_type() != NODE.band:
            raise CodegenError(f"mark {text!r} must stand above a band, got {below.get_type().name}")
        private = combined = ()
        if kind in ("parallel", "vector"):
            check = check or Dependences(scop)
            obstacle, private, combined = check.combined(below) if combine else (*check.loop(below), ())
            if obstacle:
                raise CodegenError(f"{scop.name}: a {kind} loop must carry nothing from one iteration to another, got {obstacle}")
        name = f"{kind}_{len(loops)}"
        complete = below.band_n_member() if kind == "unroll" and unrolled(below) else 0
        order = _order(below) if kind == "parallel" else None
        loops[name] = Hint(kind, below.get_schedule_depth(), factor, private, combined, complete, order)
        return node.delete().insert_mark(isl.Id(name))

    return node_map(tree, resolve), loops


def _order(band) -> isl.UnionMap:
    first = isl.UnionMap.from_union_pw_aff(band.band_get_partial_schedule().get_at(0)).intersect_domain(band.get_domain())
    if not band.get_schedule_depth():
        return first
    return band.get_prefix_schedule_union_map().intersect_domain(band.get_domain()).flat_range_product(first)


def _parse_mark(text: str) -> tuple[str, bool, int]:
    match = MARK.match(text)
    if not match:
        raise CodegenError(f"mark must be one of parallel, vector, unroll and unroll(n), got {text!r}")
    return match[1] or "unroll", bool(match[2]), int(match[3] or 0)


def node_map(tree: isl.Schedule, transform) -> isl.Schedule:
    """`transform(node)` at every node, parents first; it may insert nodes below itself."""

    def visit(node):
        node = transform(node)
        for n in range(node.n_children()):
            node = visit(node.child(n)).parent()
        return node

    return visit(tree.get_root()).get_schedule()


def below_marks(node):
    while node.get_type() == NODE.mark:
        node = node.child(0)
    return node


def unrolled(band) -> bool:
    return any(band.band_member_get_ast_loop_type(n) == isl.ast_loop_type.unroll for n in range(band.band_n_member()))
