"""C with OpenMP and SIMD pragmas from a schedule tree, through isl's AST builder.

Marks on the tree say how a loop runs; each stands directly above the band whose first member it describes:
`parallel` (OpenMP threads), `vector` (SIMD), `unroll` or `unroll(4)` (the compiler unrolls). A band below `unroll` whose members
have the AST loop type "unroll" is written out wherever it is full; strips of outer loops placed below a loop are unroll-and-jam.

`parallel` and `vector` are promises that generation checks: a loop that carries a value from one iteration to another is refused
with CodegenError; one that only reuses the storage of a temporary gets the temporary private to each iteration.
"""

import re
from collections.abc import Iterable

import islpy as isl

from npu_sparse.schedule.c.expressions import Expressions, Names, constant_extent, loops_below, split_constant, users
from npu_sparse.schedule.c.isolate import drop_options, isolate_full_tiles, isolate_unrolled
from npu_sparse.schedule.c.marks import CodegenError, Hint, resolve_marks
from npu_sparse.schedule.c.work import work_guard
from npu_sparse.schedule.frontend.preprocess import TOKEN
from npu_sparse.schedule.scop import Scop, accumulation

SEPARATION, UNROLLING, OPERATIONS = 1_000_000, 3_000_000, 30_000_000  # isl operations per attempt: about a second a million
UNROLLED = 64  # longest loop that is written out


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
    place = _line(source, scop.start) if scop.start else None
    functions, text = _generate(scop, tree, separate, identifiers(source), outline=place is not None)
    if "malloc(" in functions + text and not re.search(r"^[ \t]*#[ \t]*include[ \t]*<stdlib.h>", source, re.M):
        functions = "#include <stdlib.h>\n" + functions
    if place is None:
        return replace_scop(source, functions + text, scop.region)
    rest = (scop.region[0] - scop.start + 1, scop.region[1] - scop.start + 1)
    return source[:place] + functions + replace_scop(source[place:], text, rest)


def _generate(scop: Scop, tree: isl.Schedule, separate: bool, reserved: Iterable[str], outline: bool) -> tuple[str, str]:
    tree, hints = resolve_marks(scop, tree)
    attempts = [(lambda t: isolate_unrolled(isolate_full_tiles(t)), SEPARATION, "")] if separate else []
    attempts += [(isolate_unrolled, UNROLLING, "without separation of full tiles")]
    attempts += [(drop_options, OPERATIONS, "without separation and unrolling")]
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


def _line(source: str, number: int) -> int | None:
    """Where a line begins, or None where text before it goes on in it."""
    place = len("".join(source.splitlines(keepends=True)[: number - 1]))
    inside = any(match.start() < place < match.end() for match in TOKEN.finditer(source))
    return None if inside or source[:place].rstrip("\r\n").endswith("\\") else place


def replace_scop(source: str, text: str, region: tuple[int, int] = (0, 0)) -> str:
    """C source with the lines of its region, from `#pragma scop` to `#pragma endscop`, replaced by `text`.

    Without the numbers of these lines, counted from 1, the source must have one region.
    """
    pattern = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+scop\b.*?^[ \t]*#[ \t]*pragma[ \t]+endscop\b[^\n]*\n?", re.M | re.S)
    if region != (0, 0):
        lines = source.splitlines(keepends=True)
        if pattern.fullmatch("".join(lines[region[0] - 1 : region[1]])):
            return "".join([*lines[: region[0] - 1], text, *lines[region[1] :]])
    found = pattern.findall(source)
    if len(found) != 1:
        raise CodegenError(f"the source must have one region between #pragma scop and #pragma endscop, got {len(found)}")
    return pattern.sub(lambda _: text, source)


def identifiers(text: str) -> set[str]:
    """All C identifiers of `text`, keywords and macro names included."""
    return set(re.findall(r"[A-Za-z_]\w*", text))


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


def _names(scop: Scop, reserved: Iterable[str]) -> Names:
    used = set(reserved) | set(scop.parameters) | set(scop.arrays) | set(scop.aliases.values())
    used |= identifiers(" ".join(scop.fields.values()))
    for s in scop.statements:
        used |= identifiers(s.body) | set(s.iterators)
    for array in scop.arrays.values():
        used |= identifiers(array.ctype) | identifiers(" ".join(array.shape))

    def free(stem: str, numbered: bool = False) -> str:
        pattern = re.compile(re.escape(stem) + (r"\d+(m\d*)?$" if numbered else "$"))
        return stem if not any(pattern.match(name) for name in used) else free(stem + "_", numbered)

    names = Names(free("t", True), free("min"), free("max"), free("floord"), free("nest", True), free("part", True))
    names.macros = {s.name: free(s.name) for s in scop.statements}
    names.elements = {s.name: free(f"{s.name}_element") for s in scop.statements}
    names.updates = {s.name: free(f"{s.name}_part") for s in scop.statements}
    return names


def build_ast(context: isl.Set, tree: isl.Schedule, stem: str) -> isl.AstNode:
    """isl's AST of a schedule tree; the loop of schedule dimension n runs over an iterator called `<stem>n`."""
    iterators = isl.IdList.alloc(isl.DEFAULT_CONTEXT, 64)
    for n in range(64):
        iterators = iterators.add(isl.Id(f"{stem}{n}"))
    return isl.AstBuild.from_context(context).set_iterators(iterators).node_from_schedule(tree)


def _print(scop: Scop, ast, hints, names: Names, note: str, outline: bool) -> tuple[str, str]:
    """`(macros and functions that come first, text for the place of the SCoP)`."""
    printer = _Printer(scop, hints, names, outline)
    local = [f"  {a.ctype} {a.name}{''.join(f'[{extent}]' for extent in a.shape)};" for a in scop.arrays.values() if a.local]
    body = local + printer.outlined(printer.node(ast, 1), 1) + [f"  {line}" for line in scop.tail]
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
    for s in scop.statements:
        if re.search(rf"\b{names.updates[s.name]}\(", text):
            parts = accumulation(s)
            needed += [(f"{names.elements[s.name]}({', '.join(s.iterators)})", parts.element)]
            head = f"{names.updates[s.name]}({', '.join([names.part + '0', *s.iterators])})"
            needed += [(head, f"do {{ {parts.update(names.part + '0')} }} while (0)")]
    # The functions have them as parameters.
    fields = [(name, path) for name, path in scop.fields.items() if "[]" not in path]
    first = [note] if note else []
    needed += [(alias, name) for alias, name in scop.aliases.items()]
    first += [f"#define {head} {definition}" for head, definition in needed]
    last = [f"#undef {head.partition('(')[0]}" for head, _ in [*needed, *fields]]
    before = [f"#define {name} {path}" for name, path in fields]
    return "\n".join([*first, *printer.functions]) + "\n", "\n".join([*before, "{", *body, "}", *last]) + "\n"


class _Printer:
    """Walks isl's AST and gives lines of C."""

    def __init__(self, scop: Scop, hints: dict[str, Hint], names: Names, outline: bool):
        self.scop, self.hints, self.names, self.outline = scop, hints, names, outline
        self.functions: list[str] = []
        self.iterators: list[str] = []  # of the loops around the current node
        self.parts: dict[str, str] = {}  # statement -> the variable that has its sum or product so far
        self.elements: dict[str, set[str]] = {}  # statement -> of what, as it was printed
        self.expressions = Expressions(names)
        # Beside an unsigned parameter, a negative value would become a large one.
        self.expressions.substituted = {name: f"((long){name})" for name, kind in scop.types.items() if "unsigned" in kind}

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
            condition = self.expressions.text(node.if_get_cond())
            lines = [f"{pad}if ({condition}) {{", *self.node(node.if_get_then_node(), level + 1, loop)]
            if node.if_has_else_node():
                lines += [f"{pad}}} else {{", *self.node(node.if_get_else_node(), level + 1, loop)]
            return [*lines, pad + "}"]
        if kind == types.user:
            expr = node.user_get_expr()
            arguments = [self.expressions.text(expr.get_op_arg(n)) for n in range(1, expr.get_op_n_arg())]
            arguments = [a if re.fullmatch(r"\w+", a) else f"({a})" for a in arguments]
            name = expr.get_op_arg(0).get_id().get_name()
            if name in self.parts:
                statement = self.scop.statement(name)
                kept = identifiers(accumulation(statement).element)
                used = [a if i in kept else "0" for a, i in zip(arguments, statement.iterators)]
                self.elements.setdefault(name, set()).add(f"{self.names.elements[name]}({', '.join(used)})")
                return [f"{pad}{self.names.updates[name]}({', '.join([self.parts[name], *arguments])});"]
            return [f"{pad}{self.names.macros[name]}({', '.join(arguments)});"]
        return self._for(node, level, loop)

    def _for(self, node, level: int, loop: tuple[Hint, ...]) -> list[str]:
        pad = "  " * level
        iterator = node.for_get_iterator().get_id().get_name()
        start = self.expressions.text(node.for_get_init())
        if node.for_is_degenerate():
            self.iterators.append(iterator)
            body = self.node(node.for_get_body(), level + 1, loop)
            self.iterators.pop()
            return [f"{pad}{{", f"{pad}  const long {iterator} = {start};", *body, pad + "}"]
        depth = int(iterator[len(self.names.iterator) :])
        written_out = next((hint for hint in loop if hint.depth <= depth < hint.depth + hint.complete), None)
        loop, below = tuple(hint for hint in loop if hint.depth == depth and not hint.complete), ()
        if written_out:
            below, extent = (written_out,), constant_extent(node)
            if 0 < extent <= UNROLLED:
                return self._written_out(node, iterator, extent, level, below)
        if any(hint.combined for hint in loop):
            return self._in_parts(node, level, loop, below)
        return self._loop(node, level, loop, below)

    def _in_parts(self, node, level: int, loop: tuple[Hint, ...], below: tuple[Hint, ...]) -> list[str]:
        """A loop that makes sums or products in parts, which are put together after it; as it is where that cannot be written."""
        pad, outside = "  " * level, dict(self.parts)
        present = set(users(node))
        new = [name for hint in loop for name in hint.combined if name in present and name not in outside]
        self.parts |= {name: f"{self.names.part}{len(self.parts) + n}" for n, name in enumerate(dict.fromkeys(new))}
        functions = len(self.functions)
        lines = self._loop(node, level + bool(new), loop, below)
        parts, self.parts = self.parts, outside
        elements = {name: self.elements.pop(name) for name in new}
        depth = int(node.for_get_iterator().get_id().get_name()[len(self.names.iterator) :])
        inner = re.compile(rf"\b{self.names.iterator}(\d+)\b")
        if any(len(found) > 1 or any(int(n) >= depth for n in inner.findall(*found)) for found in elements.values()):
            del self.functions[functions:]
            return self._loop(node, level, tuple(hint for hint in loop if not hint.combined), below)
        if not new:
            return lines
        first, last = [], []
        for name in new:
            statement, [element] = self.scop.statement(name), elements[name]
            kept = accumulation(statement)
            array = self.scop.arrays[statement.writes[0].array]
            first.append(f"{pad}  {array.ctype} {parts[name]} = {kept.start};")
            last.append(f"{pad}  {kept.join(element, parts[name])}")
        return [pad + "{", *first, *lines, *last, pad + "}"]

    def _loop(self, node, level: int, loop: tuple[Hint, ...], below: tuple[Hint, ...]) -> list[str]:
        pad = "  " * level
        iterator = node.for_get_iterator().get_id().get_name()
        start = self.expressions.text(node.for_get_init())
        before, after = self._pragmas(node, loop, pad)
        step = node.for_get_inc().get_val().to_python()
        increment = f"{iterator}++" if step == 1 else f"{iterator} += {step}"
        self.iterators.append(iterator)
        body = self.node(node.for_get_body(), level + 1, below)
        parallel = next((hint for hint in loop if hint.kind == "parallel"), None)
        if parallel and loops_below(node) > 1 and not parallel.combined:
            body = self.outlined(body, level + 1, parallel.private)
        self.iterators.pop()
        head = f"{pad}for (long {iterator} = {start}; {self.expressions.text(node.for_get_cond())}; {increment}) {{"
        return [*before, head, *body, pad + "}", *after]

    def _written_out(self, node, iterator: str, extent: int, level: int, loop) -> list[str]:
        lines, base, first = [], *split_constant(node.for_get_init())
        for n in range(first, first + extent):
            expr = base.add(isl.AstExpr.from_val(isl.Val(n))) if n else base
            self.expressions.substituted[iterator] = self.expressions.text(expr)
            lines += self.node(node.for_get_body(), level, loop)
        del self.expressions.substituted[iterator]
        return lines

    def outlined(self, lines: list[str], level: int, private: tuple[str, ...] = ()) -> list[str]:
        """A call of a new function that holds `lines`, or `lines` where they write scalars that matter outside."""
        if not self.outline:
            return lines
        text = "\n".join(lines)
        macros = {s.name: (self.names.macros[s.name], self.names.updates[s.name]) for s in self.scop.statements}
        statements = [s for s in self.scop.statements if re.search(rf"\b({'|'.join(macros[s.name])})\(", text)]
        if any("[]" in self.scop.fields.get(a.array, "") for s in statements for a in (*s.reads, *s.writes)):
            return lines  # no parameter has the name that these have
        written = {a.array for s in statements for a in s.writes if not self.scop.arrays[a.array].shape}
        inside = {name for name in private if not self.scop.arrays[name].shape}  # the function's own
        if any(self.scop.arrays[name].live_out for name in written) or self.iterators and not written <= inside:
            return lines
        used = identifiers(text).union(*(identifiers(s.body) for s in statements))
        arrays = [a for a in self.scop.arrays.values() if a.name in used and a.name not in inside]
        used |= {name for a in arrays for extent in a.shape for name in identifiers(extent)}
        taken = inside | {a.name for a in arrays}
        known = {**self.scop.types, **{a.name: a.ctype for a in self.scop.arguments if not a.shape}}
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
        combined = self._combined((hint for hint in (parallel, vector) if hint), node)
        if vector and any(self.scop.arrays[name].shape for name in vector.private):
            vector = None  # a private array in each lane is no gain
        if parallel:
            scalars = [name for name in parallel.private if not self.scop.arrays[name].shape]
            arrays = [self.scop.arrays[name] for name in parallel.private if self.scop.arrays[name].shape]
            middles, guard = work_guard(self.scop, node, parallel.order, self.expressions)
            if middles:
                before += [pad + "{", *(pad + line for line in middles)]
                after += [pad + "}"]
            simd = " simd" if vector or combined and loops_below(node) == 1 else ""
            private = combined + (f" private({', '.join(scalars)})" if scalars else "")
            if arrays:
                before += [f"{pad}#pragma omp parallel{guard}", pad + "{", *(pad + _allocate(a) for a in arrays)]
                before += [f"{pad}#pragma omp for{simd}{private}"]
                after = [*(pad + f"__builtin_free({a.name});" for a in arrays), pad + "}", *after]
            else:
                before += [f"{pad}#pragma omp parallel for{simd}{guard}{private}"]
        elif vector:
            private = combined + (f" private({', '.join(vector.private)})" if vector.private else "")
            before += [f"{pad}#pragma omp simd{private}"]
        elif unroll:
            before += [f"{pad}#pragma GCC unroll {unroll.factor or 4}"]
        return before, after

    def _combined(self, hints: Iterable[Hint], node) -> str:
        """The clauses for the sums and products that a loop makes in parts."""
        clauses: dict[str, list[str]] = {}
        present = set(users(node))
        for name in dict.fromkeys(name for hint in hints for name in hint.combined if name in present):
            clauses.setdefault(accumulation(self.scop.statement(name)).operator, []).append(self.parts[name])
        return "".join(f" reduction({operator}:{', '.join(names)})" for operator, names in clauses.items())


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
    return f"{array.ctype} {pointer} = __builtin_malloc({size});"
