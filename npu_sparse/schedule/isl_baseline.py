"""isl's own scheduler: the fallback of a strategy as a plan, and the baseline of comparisons as a schedule tree."""

from collections.abc import Iterable

import islpy as isl

from npu_sparse.schedule.c.marks import NODE, CodegenError
from npu_sparse.schedule.loop_analysis import Dependences, flow, storage
from npu_sparse.schedule.plan import Band, Leaf, Loop, Node, Plan, Sequence
from npu_sparse.schedule.scop import Scop
from npu_sparse.schedule.solve.farkas import Dependence
from npu_sparse.schedule.solve.rows import Form, text


def from_isl(scop: Scop, active: Iterable[Dependence]) -> Plan | None:
    """The plan of isl's own scheduler; None where it finds none, or one with rows that are not plain affine forms."""
    relation = isl.UnionMap.empty(scop.context.get_space())
    for d in active:
        relation = relation.union(isl.UnionMap.from_basic_map(d.relation))
    constraints = isl.ScheduleConstraints.on_domain(scop.domain().intersect_params(scop.context))
    constraints = constraints.set_validity(relation).set_proximity(relation).set_coincidence(relation)
    names = tuple(statement.name for statement in scop.statements)
    try:
        schedule = constraints.compute_schedule()
    except isl.Error:  # it cannot carry every dependence
        return None
    root = _from_node(schedule.get_root(), names, scop)
    return None if root is None else Plan(scop, root, "isl's scheduler")


def _from_node(node: isl.ScheduleNode, names: tuple[str, ...], scop: Scop) -> Node | None:
    kind = node.get_type()
    if kind == isl.schedule_node_type.leaf:
        return Leaf() if len(names) == 1 else Sequence(tuple(((name,), Leaf()) for name in names))
    if kind in (isl.schedule_node_type.domain, isl.schedule_node_type.filter):
        return _from_node(node.child(0), names, scop)
    if kind in (isl.schedule_node_type.sequence, isl.schedule_node_type.set):
        children = []
        for place in range(node.n_children()):
            points = node.child(place).filter_get_filter()
            present: list[str] = []
            points.foreach_set(lambda piece, present=present: present.append(piece.get_tuple_name()))
            group = tuple(name for name in names if name in present)
            children.append((group, _from_node(node.child(place), group, scop)))
        return None if any(child is None for _, child in children) else Sequence(tuple(children))
    if kind != isl.schedule_node_type.band:
        return None
    partial = node.band_get_partial_schedule()
    child = _from_node(node.child(0), names, scop)
    loops = []
    for place in range(partial.dim(isl.dim_type.out)):
        exprs = _exprs(partial.get_union_pw_aff(place), scop)
        if exprs is None or not set(names) <= set(exprs):
            return None
        flag = bool(node.band_member_get_coincident(place))
        loops.append(Loop({name: exprs[name] for name in names}, flag, flag))
    return None if child is None else Band(tuple(loops), child, bool(node.band_get_permutable()) and len(loops) > 1)


def _exprs(rows: isl.UnionPwAff, scop: Scop) -> dict[str, str] | None:
    exprs: dict[str, str] = {}
    pieces: list[isl.PwAff] = []
    rows.foreach_pw_aff(pieces.append)
    for piece in pieces:
        affs: list[isl.Aff] = []
        piece.foreach_piece(lambda _, aff, affs=affs: affs.append(aff))
        if len(affs) != 1 or affs[0].dim(isl.dim_type.div):
            return None
        name = piece.get_tuple_id(isl.dim_type.in_).get_name()
        statement = scop.statement(name)
        aff = affs[0].align_params(scop.context.get_space())
        values = [
            tuple(aff.get_coefficient_val(kind, k).to_python() for k in range(size))
            for kind, size in ((isl.dim_type.in_, len(statement.iterators)), (isl.dim_type.param, len(scop.parameters)))
        ]
        form = Form(values[0], values[1], aff.get_constant_val().to_python())
        exprs[name] = text(form, statement.iterators, scop.parameters)
    return exprs


def isl_tree(scop: Scop, tile: int | tuple[int, ...] = 0) -> isl.Schedule:
    """What isl's own scheduler makes of `scop`, with its outermost coincident loops marked parallel.

    `tile` > 0 tiles every permutable band of two or more members.
    """
    values = flow(scop)
    validity = values.union(storage(scop))
    constraints = isl.ScheduleConstraints.on_domain(scop.domain()).set_context(scop.context)
    constraints = constraints.set_validity(validity).set_coincidence(validity).set_proximity(values)
    try:
        tree = constraints.compute_schedule()
    except isl.Error as error:
        raise CodegenError(f"{scop.name}: isl's scheduler must find a schedule, got: {error}") from error
    return mark_parallel(scop, tile_bands(tree, tile) if tile else tree)


def tile_bands(tree: isl.Schedule, sizes: int | tuple[int, ...]) -> isl.Schedule:
    """Every innermost permutable band of two or more members tiled; the last of `sizes` serves the remaining members."""
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)

    def tile(node):
        if node.get_type() != NODE.band or node.band_n_member() < 2 or not node.band_get_permutable():
            return node
        values = isl.MultiVal.zero(node.band_get_space())
        for n in range(node.band_n_member()):
            values = values.set_val(n, isl.Val(sizes[min(n, len(sizes) - 1)]))
        return node.band_tile(values)

    context = isl.DEFAULT_CONTEXT
    scale, shift = context.get_tile_scale_tile_loops(), context.get_tile_shift_point_loops()
    context.set_tile_scale_tile_loops(0), context.set_tile_shift_point_loops(0)
    try:
        return tree.map_schedule_node_bottom_up(tile)
    finally:
        context.set_tile_scale_tile_loops(scale), context.set_tile_shift_point_loops(shift)


def mark_parallel(scop: Scop, tree: isl.Schedule) -> isl.Schedule:
    """`tree` with the outermost parallel loop of each nest marked, temporaries made private where that is what it takes."""
    check = Dependences(scop)

    def visit(node):
        """`node`, marked below; the node is at the same place on return."""
        kind = node.get_type()
        if kind == NODE.mark and node.mark_get_id().get_name().startswith("parallel"):
            return node
        if kind == NODE.band:
            for member in range(node.band_n_member()):
                if not check.loop(node, member)[0]:
                    if member:
                        return node.band_split(member).child(0).insert_mark(isl.Id("parallel")).parent()
                    return node.insert_mark(isl.Id("parallel"))
        for n in range(node.n_children()):
            node = visit(node.child(n)).parent()
        return node

    return visit(tree.get_root()).get_schedule()
