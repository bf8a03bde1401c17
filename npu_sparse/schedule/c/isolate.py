"""Full tiles separated from partial ones, by the AST option `isolate` of isl."""

import islpy as isl

from npu_sparse.schedule.c.marks import NODE, below_marks, node_map, unrolled


def isolate_full_tiles(tree: isl.Schedule) -> isl.Schedule:
    """`tree` with the full tiles of every innermost tile band (a band directly over a band) separated from the partial ones."""

    def isolate(node):
        if node.get_type() == NODE.band:
            points = below_marks(node.child(0))
            if points.get_type() == NODE.band and below_marks(points.child(0)).get_type() != NODE.band and not unrolled(points):
                return _isolate(node, points)
        return node

    return node_map(tree, isolate)


def isolate_unrolled(tree: isl.Schedule) -> isl.Schedule:
    """`tree` with every completely unrolled band unrolled only where each of its statements has all or none of its instances."""

    def isolate(node):
        if node.get_type() != NODE.band:
            return node
        points = below_marks(node.child(0))
        if points.get_type() != NODE.band or not unrolled(points):
            return node
        path = points.get_tree_depth() - node.get_tree_depth()
        for n in range(points.band_n_member()):  # the printer writes them out: isl knows isolation in one band only
            points = points.band_member_set_ast_loop_type(n, isl.ast_loop_type.default)
        return _isolate(points.ancestor(path), points)

    return node_map(tree, isolate)


def sets(domain: isl.UnionSet) -> list[isl.Set]:
    """The sets of a union, one per statement."""
    parts = []
    domain.foreach_set(parts.append)
    return parts


def _isolate(band, points):
    """`band` with the AST option `isolate`: the iterations where each statement fills the box of `points`, or is absent."""
    depth, members = band.get_schedule_depth(), band.band_n_member()
    outer = isl.UnionMap.from_multi_union_pw_aff(band.band_get_partial_schedule())
    if depth:
        outer = band.get_prefix_schedule_union_map().gist_domain(band.get_domain()).flat_range_product(outer)
    inner = isl.UnionMap.from_multi_union_pw_aff(points.band_get_partial_schedule())
    visited, broken = None, None
    for domain in sets(band.get_domain()):
        everywhere = isl.UnionSet.from_set(isl.Set.universe(domain.get_space()))
        box = isl.Map.from_union_map(outer.intersect_domain(everywhere).reverse().apply_range(inner))
        filled = isl.Map.from_union_map(outer.intersect_domain(isl.UnionSet.from_set(domain)).reverse().apply_range(inner))
        partial = box.intersect_domain(filled.domain()).subtract(filled).domain()
        visited = filled.domain() if visited is None else visited.union(filled.domain())
        broken = partial if broken is None else broken.union(partial)
    full = visited.subtract(broken).coalesce()
    if full.is_empty():
        return band
    option = isl.Map.from_domain(full).move_dims(isl.dim_type.out, 0, isl.dim_type.in_, depth, members)
    option = isl.UnionSet.from_set(option.wrap().set_tuple_name("isolate"))
    return band.band_set_ast_build_options(band.band_get_ast_build_options().union(option))


def drop_options(tree: isl.Schedule) -> isl.Schedule:
    def drop(node):
        if node.get_type() == NODE.band:
            return node.band_set_ast_build_options(isl.UnionSet.read_from_str(isl.DEFAULT_CONTEXT, "{ }"))
        return node

    return tree.map_schedule_node_bottom_up(drop)
