"""Schedules for people: a tree as indented text, and iteration domains with dependences before and after as a picture."""

import re
from io import BytesIO
from pathlib import Path

import islpy as isl

from npu_sparse.schedule.c.marks import NODE
from npu_sparse.schedule.loop_analysis import flow
from npu_sparse.schedule.plan import Plan
from npu_sparse.schedule.scop import Scop

from ..runs.figures import new_figure
from ..runs.store import write_bytes

INSTANCES = 700  # a picture with more points says nothing
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")


def show_tree(tree: isl.Schedule) -> str:
    """A schedule tree, one line for each loop: marks in front, what is known of the loop behind."""
    lines: list[str] = []

    def visit(node, level: int, marks: tuple[str, ...]):
        kind, pad = node.get_type(), "  " * level
        if kind == NODE.mark:
            return visit(node.child(0), level, (*marks, node.mark_get_id().get_name()))
        if kind == NODE.filter:
            lines.append(pad + ", ".join(_names(node.filter_get_filter())))
        elif kind in (NODE.sequence, NODE.set):
            lines.append(pad + ("one after the other" if kind == NODE.sequence else "in any order"))
        elif kind == NODE.band:
            schedule = node.band_get_partial_schedule()
            tilable = node.band_get_permutable() and node.band_n_member() > 1
            lines.append(f"{pad}band{', permutable' if tilable else ''}")
            for n in range(node.band_n_member()):
                unrolled = node.band_member_get_ast_loop_type(n) == isl.ast_loop_type.unroll
                notes = [*(marks if n == 0 else ()), *(["unrolled"] if unrolled else [])]
                notes += ["carries nothing"] if node.band_member_get_coincident(n) else []
                lines.append(f"{pad}  {_expressions(schedule.get_at(n))}" + (f"   [{', '.join(notes)}]" if notes else ""))
        for n in range(node.n_children()):
            visit(node.child(n), level + 1, ())

    root = tree.get_root()
    lines.append("statements " + ", ".join(_names(root.domain_get_domain())))
    visit(root.child(0), 0, ())
    return "\n".join(lines) + "\n"


def _names(domain: isl.UnionSet) -> list[str]:
    sets: list[isl.Set] = []
    domain.foreach_set(sets.append)
    return sorted((s.get_tuple_name() for s in sets), key=lambda name: (len(name), name))


def _expressions(row: isl.UnionPwAff) -> str:
    """The loop of each statement, those with the same text together: "S0, S1: i"."""
    pieces: list[isl.PwAff] = []
    row.foreach_pw_aff(pieces.append)
    texts: dict[str, list[str]] = {}
    for piece in pieces:
        text = re.sub(r"^(\[[^\]]*\] -> )?\{ \w+\[[^\]]*\] -> \[\((.*)\)\] \}$", r"\2", str(piece))
        text = re.sub(r"floor\(\((\w+)\)/(\d+)\)", r"\1 / \2", re.sub(r"^\((floor\(.*\))\)$", r"\1", text))
        texts.setdefault(text, []).append(piece.get_tuple_id(isl.dim_type.in_).get_name())
    groups = sorted((sorted(names, key=lambda name: (len(name), name)), text) for text, names in texts.items())
    return "; ".join(f"{', '.join(names)}: {text}" for names, text in groups)


def draw(plan: Plan, path: str | Path, sizes: dict[str, int] | None = None) -> None:
    """A picture, PNG or SVG by the suffix of `path`: on the left the loops as written, on the right as scheduled.

    A point is a statement instance, darker the later it runs, an arrow the flow of a value, a dotted line the edge of tiles. Of
    deeper nests the first two loops that differ are drawn. Without `sizes` parameters are as large as a readable picture allows.
    """
    scop = plan.scop
    values = _sizes(scop, sizes or {})
    before = _places(scop, values, _original_rows(scop))
    after = _places(scop, values, [(row.exprs, _label(row.exprs), row.tile) for row in plan.rows if row.kind == "loop"])
    arrows = _pairs(flow(scop).intersect_params(_fixed(scop, values)))
    figure, axes = new_figure(columns=2, width=5.4, height=4.6)
    order = {"before": scop.original(), "after": plan.union_map()}
    for ax, title, places in ((axes[0, 0], "before", before), (axes[0, 1], "after", after)):
        ranks = _ranks(order[title], scop, values)
        _panel(ax, f"{title}: {'as written' if title == 'before' else plan.strategy}", places, ranks, arrows, scop)
    size = ", ".join(f"{name} = {value}" for name, value in values.items())
    figure.suptitle(f"{scop.name}{f' ({size})' if size else ''}: dark points run late, arrows are values that flow", fontsize=10)
    buffer = BytesIO()
    kind = Path(path).suffix.lstrip(".").lower()
    if kind not in ("png", "svg"):
        raise ValueError(f"picture must be a .png or .svg file, got {str(path)!r}")
    figure.savefig(buffer, format=kind, dpi=144, bbox_inches="tight")
    write_bytes(path, buffer.getvalue())


def _panel(ax, title: str, places, ranks, arrows, scop: Scop) -> None:
    from matplotlib.colors import to_rgb

    points, labels, tiles = places
    last = max(ranks.values(), default=1) or 1
    shift = 0.5 / max(len(scop.statements), 1)
    at = {key: (x + shift * key[1], y + shift * key[1]) for key, (x, y) in _indexed(points, scop).items()}
    for source, sink in arrows:
        start, end = at.get(_key(source, scop)), at.get(_key(sink, scop))
        if start and end and start != end:
            style = {"arrowstyle": "-|>", "color": "0.45", "lw": 0.6, "mutation_scale": 7, "shrinkA": 3, "shrinkB": 3}
            ax.annotate("", end, start, arrowprops=style, zorder=1)
    for n, statement in enumerate(scop.statements):
        mine = [(at[key], ranks[key[0], key[2]] / last) for key in at if key[1] == n]
        base = to_rgb(COLOURS[n % len(COLOURS)])
        shades = [tuple(1 - (1 - c) * (0.35 + 0.65 * share) if share < 1 else c for c in base) for _, share in mine]
        ax.scatter([p[0] for p, _ in mine], [p[1] for p, _ in mine], s=26, c=shades, zorder=2, label=statement.name)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(labels[0], fontsize=8)
    ax.set_ylabel(labels[1], fontsize=8)
    for axis, tile, lines in ((0, tiles[0], ax.axvline), (1, tiles[1], ax.axhline)):
        edges = [at[key][axis] for key in at]
        for edge in range(int(min(edges)) // tile * tile, int(max(edges)) + 2, tile) if tile > 1 else ():
            lines(edge - (0.5 - shift * (len(scop.statements) - 1) / 2), color="#a463f2", linewidth=0.8, linestyle=":", zorder=0)
    for axis, label in ((ax.xaxis, labels[0]), (ax.yaxis, labels[1])):
        axis.set_visible(bool(label))
    if len(scop.statements) > 1 and title.startswith("after"):
        ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _key(instance, scop: Scop):
    name, point = instance
    return name, scop.statement(name).index, point


def _indexed(points, scop: Scop):
    return {_key(instance, scop): place for instance, place in points.items()}


def _original_rows(scop: Scop) -> list[tuple[dict[str, str], str, int]]:
    """Rows of the loops as written, outermost first: statement -> iterator, a label, and no tile size."""
    depth = max((len(s.iterators) for s in scop.statements), default=0)
    rows = [{s.name: s.iterators[n] if n < len(s.iterators) else "0" for s in scop.statements} for n in range(depth)]
    return [(row, _label(row), 0) for row in rows]


def _label(row: dict[str, str]) -> str:
    texts: dict[str, list[str]] = {}
    for name, text in row.items():
        if text != "0":
            texts.setdefault(text, []).append(name)
    if len(texts) == 1:
        return next(iter(texts))
    label = "; ".join(f"{', '.join(names)}: {text}" for text, names in texts.items())
    return label if len(label) < 70 else label[:67] + "..."


def _places(scop: Scop, values: dict[str, int], rows):
    """`(instance -> (x, y), labels, tile sizes)` by the first two rows that take more than one value, the outer one as x."""
    columns = []
    for exprs, label, tile in rows:
        column = {}
        for s in scop.statements:
            text = f"{{ {s.name}[{', '.join(s.iterators)}] -> [{exprs.get(s.name, '0')}] }}"
            row = isl.Map(f"[{', '.join(scop.parameters)}] -> {text}")
            inside = row.intersect_domain(s.domain.intersect_params(_fixed(scop, values)))
            column |= {(s.name, point[:-1]): point[-1] for point in _points(inside.wrap())}
        if len(set(column.values())) > 1:
            columns.append((column, label, tile))
    while len(columns) < 2:
        columns.append((dict.fromkeys(column, 0), "", 0))
    (x, *first), (y, *second) = columns[:2]
    return {instance: (x[instance], y[instance]) for instance in x}, *zip(first, second)


def _sizes(scop: Scop, given: dict[str, int]) -> dict[str, int]:
    unknown = set(given) - set(scop.parameters)
    if unknown:
        raise ValueError(f"sizes must be of {', '.join(scop.parameters)}, got {', '.join(sorted(unknown))}")
    best = None
    for n in range(1, 10):
        values = {name: given.get(name, n) for name in scop.parameters}
        if _fixed(scop, values).is_empty():
            continue
        count = sum(len(_points(s.domain.intersect_params(_fixed(scop, values)))) for s in scop.statements)
        if best and count > INSTANCES:
            break
        best = values
    if best is None:
        raise ValueError(f"sizes must satisfy {scop.context}, got {given or 'none'}")
    return best


def _fixed(scop: Scop, values: dict[str, int]) -> isl.Set:
    constraints = " and ".join(f"{name} = {value}" for name, value in values.items()) or "true"
    return isl.Set(f"[{', '.join(values)}] -> {{ : {constraints} }}").intersect(scop.context)


def _points(domain: isl.Set) -> list[tuple[int, ...]]:
    points: list[isl.Point] = []
    domain.foreach_point(points.append)
    dims = range(domain.dim(isl.dim_type.set))
    return sorted(tuple(p.get_coordinate_val(isl.dim_type.set, k).to_python() for k in dims) for p in points)


def _pairs(relation: isl.UnionMap) -> list[tuple[tuple, tuple]]:
    maps: list[isl.Map] = []
    relation.foreach_map(maps.append)
    pairs = []
    for m in maps:
        inputs = m.dim(isl.dim_type.in_)
        names = m.get_tuple_name(isl.dim_type.in_), m.get_tuple_name(isl.dim_type.out)
        pairs += [((names[0], p[:inputs]), (names[1], p[inputs:])) for p in _points(m.wrap())]
    return pairs


def _ranks(order: isl.UnionMap, scop: Scop, values: dict[str, int]) -> dict[tuple, int]:
    """Instance -> how many places in the order come before it."""
    fixed = _fixed(scop, values)
    times = {}
    for s in scop.statements:
        schedule = isl.Map.from_union_map(order.intersect_domain(isl.UnionSet.from_set(s.domain.intersect_params(fixed))))
        inputs = schedule.dim(isl.dim_type.in_)
        times |= {(s.name, p[:inputs]): p[inputs:] for p in _points(schedule.wrap())}
    width = max(map(len, times.values()), default=0)
    places = {instance: (*time, *[0] * (width - len(time))) for instance, time in times.items()}
    ranks = {place: n for n, place in enumerate(sorted(set(places.values())))}
    return {instance: ranks[place] for instance, place in places.items()}
