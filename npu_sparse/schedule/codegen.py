"""C with OpenMP and SIMD pragmas from a schedule tree, through isl's AST builder.

Marks on the tree say how a loop runs; each stands directly above the band whose first member it describes:
`parallel` (OpenMP threads), `vector` (SIMD), `unroll` or `unroll(4)` (the compiler unrolls). A band below `unroll` whose members
have the AST loop type "unroll" is written out wherever it is full; strips of outer loops placed below a loop are unroll-and-jam.

`parallel` and `vector` are promises that generation checks: a loop that carries a value from one iteration to another is refused
with CodegenError; one that only reuses the storage of a temporary gets the temporary private to each iteration.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce

import islpy as isl

from npu_sparse.schedule.scop import Scop

SEPARATION, UNROLLING, OPERATIONS = 1_000_000, 3_000_000, 30_000_000  # isl operations per attempt: about a second a million
PARALLEL_WORK = 60_000  # statement instances below which waking the threads costs more than they save
UNROLLED = 64  # longest loop that is written out
NODE = isl.schedule_node_type
MARK = re.compile(r"(?:(parallel|vector)|unroll(?:\((\d+)\))?)$")


class CodegenError(ValueError):
    """A tree that cannot become a correct program: a mark that a dependence contradicts, or one that is not known."""


@dataclass(frozen=True)
class Hint:
    """How the loops below one mark run: what the AST printer needs to know, keyed by the mark's name."""

    kind: str
    depth: int  # of the loop in the schedule: isl leaves out loops of one iteration, a mark then stands above another one
    factor: int = 0
    private: tuple[str, ...] = ()
    complete: int = 0  # nested loops to write out where their extent is constant


@dataclass
class _Names:
    """Names that the surrounding program does not use."""

    iterator: str
    minimum: str
    maximum: str
    floor: str
    function: str
    macros: dict[str, str] = field(default_factory=dict)


def generate(scop: Scop, tree: isl.Schedule, *, separate: bool = False, reserved: Iterable[str] = ()) -> str:
    """C text that computes what `scop` computes, in the order of `tree`: it replaces the text of the SCoP.

    `separate` splits full tiles from partial ones. Where that exceeds the operation budget, simpler code is generated and a
    comment says so. `reserved` are identifiers of the surrounding program that generated names must not capture.
    """
    functions, text = _generate(scop, tree, separate, reserved, outline=False)
    return functions + text


def generate_file(scop: Scop, source: str, tree: isl.Schedule, *, separate: bool = False) -> str:
    """The C program `source` with its SCoP in the order of `tree`.

    Loop nests become static functions in front of the one that holds the SCoP: their `restrict` parameters tell the compiler
    that arrays do not overlap, which is what a SCoP assumes, and what OpenMP regions otherwise hide from it.
    """
    place = _function_start(source, scop.function)
    functions, text = _generate(scop, tree, separate, identifiers(source), outline=place is not None)
    if place is None:
        return replace_scop(source, functions + text)
    return source[:place] + functions + replace_scop(source[place:], text)


def _generate(scop: Scop, tree: isl.Schedule, separate: bool, reserved: Iterable[str], outline: bool) -> tuple[str, str]:
    tree, hints = _resolve_marks(scop, tree)
    attempts = [(lambda t: isolate_unrolled(isolate_full_tiles(t)), SEPARATION, "")] if separate else []
    attempts += [(isolate_unrolled, UNROLLING, "without separation of full tiles")]
    attempts += [(_drop_options, OPERATIONS, "without separation and unrolling")]
    names = _names(scop, reserved)
    for n, (prepare, budget, note) in enumerate(attempts):
        try:
            ast = _within_budget(budget, lambda prepare=prepare: build_ast(scop.context, prepare(tree), names.iterator))
        except isl.Error as error:
            if n + 1 == len(attempts):
                raise CodegenError(f"{scop.name}: generation must take at most {OPERATIONS} isl operations ({error})") from error
            continue
        simpler = f"/* generated {note}: the operation budget was exceeded */" if n else ""
        return _print(scop, ast, hints, names, simpler, outline)
    raise AssertionError


def _function_start(source: str, function: str) -> int | None:
    """Where the definition of `function` begins in `source`, at the start of a line."""
    region = re.search(r"^[ \t]*#[ \t]*pragma[ \t]+scop\b", source, re.M)
    pattern = rf"^[A-Za-z_][\w \t*]*\b{re.escape(function)}[ \t\n]*\(" if function else r"(?!)"
    starts = [found.start() for found in re.finditer(pattern, source, re.M) if region and found.start() < region.start()]
    return starts[-1] if starts else None


def replace_scop(source: str, text: str) -> str:
    """C source with everything from `#pragma scop` to `#pragma endscop` replaced by `text`."""
    pattern = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+scop\b.*?^[ \t]*#[ \t]*pragma[ \t]+endscop\b[^\n]*\n?", re.M | re.S)
    found = pattern.findall(source)
    if len(found) != 1:
        raise CodegenError(f"the source must have one region between #pragma scop and #pragma endscop, got {len(found)}")
    return pattern.sub(lambda _: text, source)


def identifiers(text: str) -> set[str]:
    """All C identifiers of `text`, keywords and macro names included."""
    return set(re.findall(r"[A-Za-z_]\w*", text))


# ---- trees ------------------------------------------------------------------------------------------------------------------


def isl_tree(scop: Scop, tile: int | tuple[int, ...] = 0) -> isl.Schedule:
    """What isl's own scheduler makes of `scop`, with its outermost coincident loops marked parallel.

    `tile` > 0 tiles every permutable band of two or more members.
    """
    values = flow(scop)
    validity = values.union(_storage(scop))
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


def _node_map(tree: isl.Schedule, transform) -> isl.Schedule:
    """`transform(node)` at every node, parents first; it may insert nodes below itself."""

    def visit(node):
        node = transform(node)
        for n in range(node.n_children()):
            node = visit(node.child(n)).parent()
        return node

    return visit(tree.get_root()).get_schedule()


# ---- what may run in parallel -----------------------------------------------------------------------------------------------


def union(maps: Iterable[isl.Map]) -> isl.UnionMap:
    """All of the maps together."""
    found = isl.UnionMap.read_from_str(isl.DEFAULT_CONTEXT, "{ }")
    for m in maps:
        found = found.union(isl.UnionMap.from_map(m))
    return found


def _reads(scop: Scop, array: str = "") -> list[isl.Map]:
    return [a.relation.intersect_domain(s.domain) for s in scop.statements for a in s.reads if array in ("", a.array)]


def _writes(scop: Scop, array: str = "", may: bool = False) -> list[isl.Map]:
    """The writes that surely happen, or with `may` those that perhaps do."""
    found = [(s, a) for s in scop.statements for a in s.writes if array in ("", a.array) and a.may == may]
    return [a.relation.intersect_domain(s.domain) for s, a in found]


def flow(scop: Scop) -> isl.UnionMap:
    """Each write to the reads of the values it leaves."""
    return _flow(scop, union(_reads(scop)))


def _flow(scop: Scop, sinks: isl.UnionMap, array: str = "") -> isl.UnionMap:
    """From the write that left its value to each access of `sinks`; where a write only may happen, from earlier ones too."""
    sure, perhaps = union(_writes(scop, array)), union(_writes(scop, array, may=True))
    info = isl.UnionAccessInfo.from_sink(sinks).set_schedule_map(scop.original())
    try:
        return info.set_must_source(sure).set_may_source(perhaps).compute_flow().get_may_dependence()
    except isl.Error:  # isl's analysis gives up on some strides and divisions: every earlier write then counts
        return _earlier(scop, sure.union(perhaps), sinks)


def _storage(scop: Scop) -> isl.UnionMap:
    """From every access to every later write of the same element."""
    writes = union(_writes(scop) + _writes(scop, may=True))
    return _earlier(scop, writes.union(union(_reads(scop))), writes)


def _earlier(scop: Scop, sources: isl.UnionMap, sinks: isl.UnionMap) -> isl.UnionMap:
    order = scop.original()
    return sources.apply_range(sinks.reverse()).intersect(order.lex_lt_union_map(order))


class Dependences:
    """Answers, loop by loop, what an iteration takes from another one."""

    def __init__(self, scop: Scop):
        self.scop = scop
        self.written = {}  # array -> (its writes, for each read of it (elements, flow into it), whether it may be private)
        for name, array in scop.arrays.items():
            sure, perhaps = _writes(scop, name), _writes(scop, name, may=True)
            if sure or perhaps:
                reads = [(isl.UnionMap.from_map(r), _flow(scop, isl.UnionMap.from_map(r), name)) for r in _reads(scop, name)]
                simple = all(r.is_single_valued() for r in [*sure, *_reads(scop, name)])
                self.written[name] = (union(sure + perhaps), reads, simple and not perhaps and not array.live_out)

    def loop(self, band, member: int = 0, statements: set[str] | None = None) -> tuple[str, tuple[str, ...]]:
        """`(why the member is not parallel or "", arrays that each of its iterations needs a copy of)`.

        `statements`: the answer where the loop holds no others.
        """
        domain = band.get_domain()
        if statements is not None:
            kept = [isl.UnionSet.from_set(s.domain) for s in self.scop.statements if s.name in statements]
            domain = domain.intersect(reduce(isl.UnionSet.union, kept))
        outer = band.get_prefix_schedule_union_map().intersect_domain(domain)
        schedule = band.band_get_partial_schedule()
        for n in range(member):
            outer = outer.flat_range_product(isl.UnionMap.from_union_pw_aff(schedule.get_at(n)))
        here = isl.UnionMap.from_union_pw_aff(schedule.get_at(member)).intersect_domain(domain)
        beside = outer.apply_range(outer.reverse())  # instances in the same outer iteration
        later = here.lex_lt_union_map(here).intersect(beside)
        same = here.apply_range(here.reverse()).intersect(beside)
        private = []
        for name, (writes, reads, may_be_private) in self.written.items():
            writes = accesses = writes.intersect_domain(domain)
            for read, _ in reads:
                accesses = accesses.union(read.intersect_domain(domain))
            conflict = writes.apply_range(accesses.reverse()).union(accesses.apply_range(writes.reverse())).intersect(later)
            if conflict.is_empty():
                continue
            for read, flow in reads:
                carried = flow.intersect(later)
                if not carried.is_empty():
                    return f"a value of {name} from {_witness(carried)}", ()
                inside = flow.intersect(same)
                own = read.intersect_domain(domain).domain().is_subset(inside.range())
                may_be_private &= own and flow.intersect_domain(domain).is_subset(inside)
            if not may_be_private:
                return f"writes to the same element of {name} from {_witness(conflict)}", ()
            private.append(name)
        return "", tuple(private)


def _witness(pairs: isl.UnionMap) -> str:
    """A pair of statement instances, as "S0[1, 2] to S1[3]"."""
    found: list[isl.Map] = []
    pairs.foreach_map(found.append)
    source = found[0].domain().sample_point()
    sink = found[0].intersect_domain(isl.Set.from_point(source)).range().sample_point()
    return " to ".join(re.search(r"\w+\[[^\]]*\]", re.sub(r"^.*->", "", str(point)))[0] for point in (source, sink))


def _resolve_marks(scop: Scop, tree: isl.Schedule) -> tuple[isl.Schedule, dict[str, Hint]]:
    """`tree` with its marks checked and renamed, and what each new name means."""
    loops: dict[str, Hint] = {}
    check = None

    def resolve(node):
        nonlocal check
        if node.get_type() != NODE.mark:
            return node
        text = node.mark_get_id().get_name()
        kind, factor = _parse_mark(text)
        below = _below_marks(node)
        if below.get_type() != NODE.band:
            raise CodegenError(f"mark {text!r} must stand above a band, got {below.get_type().name}")
        private = ()
        if kind in ("parallel", "vector"):
            check = check or Dependences(scop)
            obstacle, private = check.loop(below)
            if obstacle:
                raise CodegenError(f"{scop.name}: a {kind} loop must carry nothing from one iteration to another, got {obstacle}")
        name = f"{kind}_{len(loops)}"
        complete = below.band_n_member() if kind == "unroll" and _unrolled(below) else 0
        loops[name] = Hint(kind, below.get_schedule_depth(), factor, private, complete)
        return node.delete().insert_mark(isl.Id(name))

    return _node_map(tree, resolve), loops


def _parse_mark(text: str) -> tuple[str, int]:
    found = MARK.match(text)
    if not found:
        raise CodegenError(f"mark must be one of parallel, vector, unroll and unroll(n), got {text!r}")
    return found[1] or "unroll", int(found[2] or 0)


# ---- separation -------------------------------------------------------------------------------------------------------------


def isolate_full_tiles(tree: isl.Schedule) -> isl.Schedule:
    """`tree` with the full tiles of every innermost tile band (a band directly over a band) separated from the partial ones."""

    def isolate(node):
        if node.get_type() == NODE.band:
            points = _below_marks(node.child(0))
            if points.get_type() == NODE.band and _below_marks(points.child(0)).get_type() != NODE.band and not _unrolled(points):
                return _isolate(node, points)
        return node

    return _node_map(tree, isolate)


def isolate_unrolled(tree: isl.Schedule) -> isl.Schedule:
    """`tree` with every completely unrolled band unrolled only where each of its statements has all or none of its instances."""

    def isolate(node):
        if node.get_type() != NODE.band:
            return node
        points = _below_marks(node.child(0))
        if points.get_type() != NODE.band or not _unrolled(points):
            return node
        path = points.get_tree_depth() - node.get_tree_depth()
        for n in range(points.band_n_member()):  # the printer writes them out: isl knows isolation in one band only
            points = points.band_member_set_ast_loop_type(n, isl.ast_loop_type.default)
        return _isolate(points.ancestor(path), points)

    return _node_map(tree, isolate)


def sets(domain: isl.UnionSet) -> list[isl.Set]:
    """The sets of a union, one per statement."""
    found = []
    domain.foreach_set(found.append)
    return found


def _below_marks(node):
    while node.get_type() == NODE.mark:
        node = node.child(0)
    return node


def _unrolled(band) -> bool:
    return any(band.band_member_get_ast_loop_type(n) == isl.ast_loop_type.unroll for n in range(band.band_n_member()))


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


def _drop_options(tree: isl.Schedule) -> isl.Schedule:
    def drop(node):
        if node.get_type() == NODE.band:
            return node.band_set_ast_build_options(isl.UnionSet.read_from_str(isl.DEFAULT_CONTEXT, "{ }"))
        return node

    return tree.map_schedule_node_bottom_up(drop)


def _within_budget(operations: int, function):
    context = isl.DEFAULT_CONTEXT
    before = context.get_max_operations()
    context.reset_operations()
    context.set_max_operations(operations)
    try:
        return function()
    finally:
        context.set_max_operations(before)
        context.reset_operations()


# ---- C ----------------------------------------------------------------------------------------------------------------------


def _names(scop: Scop, reserved: Iterable[str]) -> _Names:
    used = set(reserved) | set(scop.parameters) | set(scop.arrays)
    for s in scop.statements:
        used |= identifiers(s.body) | set(s.iterators)
    for array in scop.arrays.values():
        used |= identifiers(array.ctype) | identifiers(" ".join(array.shape))

    def free(stem: str, numbered: bool = False) -> str:
        pattern = re.compile(re.escape(stem) + (r"\d+m?$" if numbered else "$"))
        return stem if not any(pattern.match(name) for name in used) else free(stem + "_", numbered)

    names = _Names(free("t", True), free("min"), free("max"), free("floord"), free("nest", True))
    names.macros = {s.name: free(s.name) for s in scop.statements}
    return names


def build_ast(context: isl.Set, tree: isl.Schedule, stem: str) -> isl.AstNode:
    """isl's AST of a schedule tree; the loop of schedule dimension n runs over an iterator called `<stem>n`."""
    iterators = isl.IdList.alloc(isl.DEFAULT_CONTEXT, 64)
    for n in range(64):
        iterators = iterators.add(isl.Id(f"{stem}{n}"))
    return isl.AstBuild.from_context(context).set_iterators(iterators).node_from_schedule(tree)


def _print(scop: Scop, ast, hints, names: _Names, note: str, outline: bool) -> tuple[str, str]:
    """`(macros and functions that come first, text for the place of the SCoP)`."""
    printer = _Printer(scop, hints, names, outline)
    local = [f"  {a.ctype} {a.name}{''.join(f'[{extent}]' for extent in a.shape)};" for a in scop.arrays.values() if a.local]
    body = local + printer.outlined(printer.node(ast, 1), 1)
    macros = {
        names.minimum: (f"{names.minimum}(a, b)", "((a) < (b) ? (a) : (b))"),
        names.maximum: (f"{names.maximum}(a, b)", "((a) > (b) ? (a) : (b))"),
        names.floor: (f"{names.floor}(a, b)", "((a) < 0 ? -((-(a) + (b) - 1) / (b)) : (a) / (b))"),
    }
    text = "\n".join([*printer.functions, *body])
    needed = [head_body for name, head_body in macros.items() if re.search(rf"\b{name}\(", text)]
    needed += [
        (f"{names.macros[s.name]}({', '.join(s.iterators)})", "do { " + s.body.replace("\n", " ").strip() + " } while (0)")
        for s in scop.statements
    ]
    first = [note] if note else []
    first += [f"#define {head} {definition}" for head, definition in needed]
    last = [f"#undef {head.partition('(')[0]}" for head, _ in needed]
    return "\n".join([*first, *printer.functions]) + "\n", "\n".join(["{", *body, "}", *last]) + "\n"


class _Printer:
    """Walks isl's AST and gives lines of C."""

    def __init__(self, scop: Scop, hints: dict[str, Hint], names: _Names, outline: bool):
        self.scop, self.hints, self.names, self.outline = scop, hints, names, outline
        self.functions: list[str] = []
        self.iterators: list[str] = []  # of the loops around the current node
        self.sequential = 0  # loops around the current node
        self.substituted: dict[str, str] = {}  # iterators of loops that are written out

    def node(self, node, level: int, loop: tuple[Hint, ...] = ()) -> list[str]:
        kind, pad = node.get_type(), "  " * level
        types = isl.ast_node_type
        if kind == types.block:
            children = node.block_get_children()
            return [x for n in range(children.n_ast_node()) for x in self.node(children.get_at(n), level, loop)]
        if kind == types.mark:
            name = node.mark_get_id().get_name()
            return self.node(node.mark_get_node(), level, (*loop, self.hints[name]))
        if kind == types.if_:
            lines = [f"{pad}if ({self.text(node.if_get_cond())}) {{", *self.node(node.if_get_then_node(), level + 1, loop)]
            if node.if_has_else_node():
                lines += [f"{pad}}} else {{", *self.node(node.if_get_else_node(), level + 1, loop)]
            return [*lines, pad + "}"]
        if kind == types.user:
            expr = node.user_get_expr()
            arguments = [self.text(expr.get_op_arg(n)) for n in range(1, expr.get_op_n_arg())]
            arguments = [a if re.fullmatch(r"\w+", a) else f"({a})" for a in arguments]
            return [f"{pad}{self.names.macros[expr.get_op_arg(0).get_id().get_name()]}({', '.join(arguments)});"]
        return self._for(node, level, loop)

    def _for(self, node, level: int, loop: tuple[Hint, ...]) -> list[str]:
        pad = "  " * level
        iterator = node.for_get_iterator().get_id().get_name()
        start = self.text(node.for_get_init())
        if node.for_is_degenerate():
            self.iterators.append(iterator)
            body = self.node(node.for_get_body(), level + 1, loop)
            self.iterators.pop()
            return [f"{pad}{{", f"{pad}  const long {iterator} = {start};", *body, pad + "}"]
        depth = int(iterator[len(self.names.iterator) :])
        written_out = next((hint for hint in loop if hint.depth <= depth < hint.depth + hint.complete), None)
        loop, below = tuple(hint for hint in loop if hint.depth == depth and not hint.complete), ()
        if written_out:
            below, extent = (written_out,), _constant_extent(node)
            if 0 < extent <= UNROLLED:
                return self._written_out(node, iterator, extent, level, below)
        before, after = self._pragmas(node, loop, pad)
        step = node.for_get_inc().get_val().to_python()
        increment = f"{iterator}++" if step == 1 else f"{iterator} += {step}"
        self.sequential += 1
        self.iterators.append(iterator)
        body = self.node(node.for_get_body(), level + 1, below)
        parallel = next((hint for hint in loop if hint.kind == "parallel"), None)
        if parallel and _loops_below(node) > 1:
            body = self.outlined(body, level + 1, parallel.private)
        self.iterators.pop()
        self.sequential -= 1
        head = f"{pad}for (long {iterator} = {start}; {self.text(node.for_get_cond())}; {increment}) {{"
        return [*before, head, *body, pad + "}", *after]

    def _written_out(self, node, iterator: str, extent: int, level: int, loop) -> list[str]:
        lines, base, first = [], *_split_constant(node.for_get_init())
        for n in range(first, first + extent):
            expr = base.add(isl.AstExpr.from_val(isl.Val(n))) if n else base
            self.substituted[iterator] = self.text(expr)
            lines += self.node(node.for_get_body(), level, loop)
        del self.substituted[iterator]
        return lines

    def outlined(self, lines: list[str], level: int, private: tuple[str, ...] = ()) -> list[str]:
        """A call of a new function that holds `lines`, or `lines` where they write scalars that matter outside."""
        if not self.outline:
            return lines
        text = "\n".join(lines)
        statements = [s for s in self.scop.statements if re.search(rf"\b{self.names.macros[s.name]}\(", text)]
        written = {a.array for s in statements for a in s.writes if not self.scop.arrays[a.array].shape}
        inside = {name for name in private if not self.scop.arrays[name].shape}  # the function's own
        if any(self.scop.arrays[name].live_out for name in written) or self.iterators and not written <= inside:
            return lines
        used = identifiers(text).union(*(identifiers(s.body) for s in statements))
        arrays = [a for a in self.scop.arrays.values() if a.name in used and a.name not in inside]
        used |= {name for a in arrays for extent in a.shape for name in identifiers(extent)}
        taken = inside | {a.name for a in arrays}
        known = {a.name: a.ctype for a in self.scop.arguments if not a.shape}
        values = {name: known.get(name, "long") for name in [*self.scop.parameters, *known] if name in used and name not in taken}
        values |= {name: "long" for name in self.iterators if name in used}
        parameters = [f"{ctype} {name}" for name, ctype in values.items()] + [_restricted(a) for a in arrays]
        name = f"{self.names.function}{len([f for f in self.functions if f.startswith('static')])}"
        # inlining would lose `restrict`; gcc 12 may take such a function for one without effects and drop its call, hence noipa
        head = f"static __attribute__((noinline, noipa)) void {name}({', '.join(parameters)}) {{"
        own = [f"  {self.scop.arrays[n].ctype} {n};" for n in sorted(inside & used)]
        self.functions += [head, *own, *(line[2 * level - 2 :] for line in lines), "}"]
        return [f"{'  ' * level}{name}({', '.join([*values, *(a.name for a in arrays)])});"]

    def _pragmas(self, node, loops: tuple[Hint, ...], pad: str) -> tuple[list[str], list[str]]:
        """Lines before and after a loop with these marks."""
        parallel = next((loop for loop in loops if loop.kind == "parallel"), None)
        vector = next((loop for loop in loops if loop.kind == "vector"), None)
        unroll = next((loop for loop in loops if loop.kind == "unroll"), None)
        before, after = [], []
        if vector and any(self.scop.arrays[name].shape for name in vector.private):
            vector = None  # a private array in each lane is no gain
        if parallel:
            scalars = [name for name in parallel.private if not self.scop.arrays[name].shape]
            arrays = [self.scop.arrays[name] for name in parallel.private if self.scop.arrays[name].shape]
            middles, guard = self._guard(node)
            if middles:
                before += [pad + "{", *(pad + line for line in middles)]
                after += [pad + "}"]
            simd = " simd" if vector else ""
            private = f" private({', '.join(scalars)})" if scalars else ""
            if arrays:
                before += [f"{pad}#pragma omp parallel{guard}", pad + "{", *(pad + _allocate(a) for a in arrays)]
                before += [f"{pad}#pragma omp for{simd}{private}"]
                after = [*(pad + f"free({a.name});" for a in arrays), pad + "}", *after]
            else:
                before += [f"{pad}#pragma omp parallel for{simd}{guard}{private}"]
        elif vector:
            private = f" private({', '.join(vector.private)})" if vector.private else ""
            before += [f"{pad}#pragma omp simd{private}"]
        elif unroll:
            before += [f"{pad}#pragma GCC unroll {unroll.factor or 4}"]
        return before, after

    def _guard(self, node) -> tuple[list[str], str]:
        """`(declarations, if clause)` that keep the threads asleep for a small loop inside a sequential one."""
        if not self.sequential:
            return [], ""
        middles, factors = self._work(node)
        used, declarations = identifiers(" ".join(factors)), []
        for name, value in reversed(middles.items()):
            if name in used:
                used |= identifiers(value)
                declarations.insert(0, f"const long {name} = {value};")
        return declarations, f" if({' * '.join(factors)} >= {PARALLEL_WORK})"

    def _work(self, node) -> tuple[dict[str, str], list[str]]:
        """C text of the extents of a loop and those in it, and of the middle of each range: inner extents are taken there."""
        middles, factors, outside = {}, [], dict(self.substituted)
        while node is not None:
            if node.get_type() == isl.ast_node_type.for_:
                iterator, condition = node.for_get_iterator().get_id().get_name(), node.for_get_cond()
                first, last = self.text(node.for_get_init(), 6), self.text(condition.get_op_arg(1), 5)
                middle = f"{iterator}m"
                if node.for_is_degenerate():
                    middles[middle] = first
                else:
                    more = "" if condition.get_op_type() == isl.ast_expr_op_type.lt else " + 1"
                    step = node.for_get_inc().get_val().to_python()
                    factors.append(f"({last} - {first}{more})" + (f" / {step}" if step > 1 else ""))
                    middles[middle] = f"({last} + {first}) / 2"
                self.substituted[iterator] = middle
            node = _deepest(node)
        self.substituted = outside
        return middles, factors

    def text(self, expr, outer: int = 0) -> str:
        """C of an expression; `outer` is the precedence around it."""
        if expr.get_type() == isl.ast_expr_type.id:
            name = expr.get_id().get_name()
            text = self.substituted.get(name, name)
            return f"({text})" if outer and not re.fullmatch(r"\w+", text) else text
        if expr.get_type() == isl.ast_expr_type.int:
            value = expr.get_val().to_str()
            return f"({value})" if value.startswith("-") and outer else value
        op, ops = expr.get_op_type(), isl.ast_expr_op_type
        args = [expr.get_op_arg(n) for n in range(expr.get_op_n_arg())]
        if op in (ops.min, ops.max, ops.fdiv_q):
            name = {ops.min: self.names.minimum, ops.max: self.names.maximum, ops.fdiv_q: self.names.floor}[op]
            text = self.text(args[0])
            for a in args[1:]:
                text = f"{name}({text}, {self.text(a)})"
            return text
        if op in (ops.cond, ops.select):
            return "(" + f"{self.text(args[0], 9)} ? {self.text(args[1], 9)} : {self.text(args[2], 9)}" + ")"
        if op == ops.minus:
            return f"(-{self.text(args[0], 9)})"
        symbol, level = {
            ops.or_: ("||", 1), ops.or_else: ("||", 1), ops.and_: ("&&", 2), ops.and_then: ("&&", 2),
            ops.eq: ("==", 3), ops.le: ("<=", 4), ops.lt: ("<", 4), ops.ge: (">=", 4), ops.gt: (">", 4),
            ops.add: ("+", 5), ops.sub: ("-", 5), ops.mul: ("*", 6), ops.div: ("/", 6),
            ops.pdiv_q: ("/", 6), ops.pdiv_r: ("%", 6), ops.zdiv_r: ("%", 6),
        }[op]  # fmt: skip
        text = f"{self.text(args[0], level)} {symbol} {self.text(args[1], level + 1)}"
        return f"({text})" if level < outer or (outer and level <= 2) else text


def _constant_extent(node) -> int:
    """Iterations of an AST loop of step 1 where its bounds tell, otherwise 0."""
    condition, step = node.for_get_cond(), node.for_get_inc().get_val()
    (base, first), (end, last) = _split_constant(node.for_get_init()), _split_constant(condition.get_op_arg(1))
    strict = condition.get_op_type() == isl.ast_expr_op_type.lt
    return last - first + (0 if strict else 1) if step.is_one() and base.is_equal(end) else 0


def _split_constant(expr):
    """`(base, n)` with expr = base + n."""
    ops, integer = isl.ast_expr_op_type, isl.ast_expr_type.int
    if expr.get_type() == integer:
        return isl.AstExpr.from_val(isl.Val(0)), expr.get_val().to_python()
    if expr.get_type() == isl.ast_expr_type.op and expr.get_op_type() in (ops.add, ops.sub):
        first, second = expr.get_op_arg(0), expr.get_op_arg(1)
        if second.get_type() == integer:
            n = second.get_val().to_python()
            return first, n if expr.get_op_type() == ops.add else -n
    return expr, 0


def _deepest(node):
    """The child of an AST node that leads to the deepest loop, or None."""
    types = isl.ast_node_type
    kind = node.get_type()
    if kind == types.for_:
        return node.for_get_body()
    if kind == types.mark:
        return node.mark_get_node()
    if kind == types.if_:
        return node.if_get_then_node()
    if kind == types.block:
        children = node.block_get_children()
        return max((children.get_at(n) for n in range(children.n_ast_node())), key=_loops_below)
    return None


def _loops_below(node) -> int:
    deepest = _deepest(node)
    return (node.get_type() == isl.ast_node_type.for_) + (_loops_below(deepest) if deepest is not None else 0)


def _restricted(array) -> str:
    """C parameter for an array that no other name in the function overlaps, or for a scalar."""
    if not array.shape:
        return f"{array.ctype} {array.name}"
    inner = "".join(f"[{extent}]" for extent in array.shape[1:])
    return f"{array.ctype} (*restrict {array.name}){inner}" if inner else f"{array.ctype} *restrict {array.name}"


def _allocate(array) -> str:
    """C declaration of a thread's own copy of an array."""
    inner = "".join(f"[{extent}]" for extent in array.shape[1:])
    size = " * ".join([f"sizeof({array.ctype})", *(f"({extent})" for extent in array.shape)])
    pointer = f"(*{array.name}){inner}" if inner else f"*{array.name}"
    return f"{array.ctype} {pointer} = malloc({size});"
