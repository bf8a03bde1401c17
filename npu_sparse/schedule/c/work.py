"""Whether a parallel loop is worth its threads: C that estimates the statement instances in it, evaluated before it runs."""

import re
from collections import Counter

import islpy as isl

from npu_sparse.schedule.c.expressions import Expressions, users
from npu_sparse.schedule.scop import Scop

PARALLEL_WORK = 60_000  # statement instances below which waking the threads costs more than they save


def work_guard(scop: Scop, node: isl.AstNode, order: isl.UnionMap, expressions: Expressions) -> tuple[list[str], str]:
    """`(declarations, if clause)` that keep the threads asleep where a parallel loop is small.

    `order` gives the place of every instance in the loops around the parallel one and in that itself. The estimate is the
    number of its iterations times the instances of the iteration in the middle, whose inner loops are taken at the middle of
    the ranges around them; declarations compute these. It is a double: the product of a few extents does not fit into an int.
    """
    count = _Count(expressions)
    outside = dict(expressions.substituted)
    iterations = count.range(node)
    inside = count.sum([count.instances(nest) for nest in _nests(scop, node, order, expressions.names.iterator)])
    expressions.substituted = outside
    text = count.product(iterations, inside)
    used, declarations = set(re.findall(r"\w+", text)), []
    for name, value in reversed(count.middles.items()):
        if name in used:
            used |= set(re.findall(r"\w+", value))
            declarations.insert(0, f"const long {name} = {value};")
    return declarations, f" if({text} >= {PARALLEL_WORK})"


def _nests(scop: Scop, node: isl.AstNode, order: isl.UnionMap, stem: str) -> list[isl.AstNode]:
    """For each statement below the node the loops over its instances in one iteration, in the order of the source."""
    domains = []
    for name in dict.fromkeys(users(node)):
        statement = scop.statement(name)
        places = isl.Map.from_union_map(order.intersect_domain(isl.UnionSet.from_set(statement.domain)))
        depth = places.dim(isl.dim_type.out)
        first = places.dim(isl.dim_type.param)
        places = places.add_dims(isl.dim_type.param, depth)
        for n in range(depth):  # the iterators of the loops around are known values
            places = places.set_dim_name(isl.dim_type.param, first + n, f"{stem}{n}")
            places = places.equate(isl.dim_type.param, first + n, isl.dim_type.out, n)
        domains.append(places.domain().remove_divs().simple_hull())
    if not domains:
        return []
    somewhere = isl.Set.from_basic_set(domains[0].params())
    for domain in domains[1:]:
        somewhere = somewhere.union(isl.Set.from_basic_set(domain.params()))
    somewhere = isl.Set.from_basic_set(somewhere.simple_hull()).intersect_params(scop.context)
    iterators = isl.IdList.alloc(isl.DEFAULT_CONTEXT, 64)
    for n in range(64):
        iterators = iterators.add(isl.Id(f"{stem}{depth + n}"))
    build = isl.AstBuild.from_context(somewhere).set_iterators(iterators)
    return [
        build.node_from_schedule_map(isl.UnionMap.from_map(isl.Map.identity(d.get_space().map_from_set()).intersect_domain(d)
                                                           .reset_tuple_id(isl.dim_type.out)))
        for d in (isl.Set.from_basic_set(domain) for domain in domains)
    ]  # fmt: skip


class _Count:
    """Counts the statement instances below a node. A text of several terms is in parentheses."""

    def __init__(self, expressions: Expressions):
        self.expressions = expressions
        self.middles: dict[str, str] = {}

    def instances(self, node: isl.AstNode) -> str:
        kind, types = node.get_type(), isl.ast_node_type
        if kind == types.for_:
            extent = self.range(node)
            return self.product(extent, self.instances(node.for_get_body()))
        if kind == types.if_:
            inside = self.instances(node.if_get_then_node())
            return f"({self.expressions.text(node.if_get_cond(), 9)} ? {inside} : 0)"
        if kind == types.block:
            children = node.block_get_children()
            return self.sum([self.instances(children.get_at(n)) for n in range(children.n_ast_node())])
        return "1"

    def range(self, node: isl.AstNode) -> str:
        """The iterations of a loop, whose iterator is in its middle from here on."""
        iterator, text = node.for_get_iterator().get_id().get_name(), self.expressions.text
        first = text(node.for_get_init(), 6)
        if node.for_is_degenerate():
            middle, extent = first, "1"
        else:
            condition, step = node.for_get_cond(), node.for_get_inc().get_val().to_python()
            last = text(condition.get_op_arg(1), 6)
            more = "" if condition.get_op_type() == isl.ast_expr_op_type.lt else " + 1"
            start = "" if first == "0" else f" - {first}"
            extent = f"((double){last}{start}{more})" if start or more else f"(double){last}"
            extent += f" / {step}" if step > 1 else ""
            middle = f"({first} + (long){last}) / 2" if start else f"{last} / 2"
        self.expressions.substituted[iterator] = self.named(iterator, middle)
        return extent

    def product(self, extent: str, inside: str) -> str:
        return inside if extent == "1" else extent if inside == "1" else f"{extent} * {inside}"

    def sum(self, terms: list[str]) -> str:
        """The sum, of which an empty loop, whose extent here may be negative, takes nothing away."""
        plain = sum(int(term) for term in terms if term.isdecimal())
        others = Counter(term for term in terms if not term.isdecimal())
        parts = [f"{times} * {term}" if times > 1 else term for term, times in others.items()]
        if len(parts) + bool(plain) == 1:
            return parts[0] if parts else str(plain)
        maximum = self.expressions.names.maximum
        parts = [f"{maximum}(0, {part})" if "(double)" in part else part for part in parts] + [str(plain)] * bool(plain)
        return f"({' + '.join(parts)})"

    def named(self, iterator: str, middle: str) -> str:
        """A name for the middle of a loop: isl calls the iterators of one depth the same, whatever their ranges are."""
        names = [f"{iterator}m", *(f"{iterator}m{number}" for number in range(2, len(self.middles) + 3))]
        name = next(name for name in names if self.middles.get(name, middle) == middle)
        self.middles[name] = middle
        return name
