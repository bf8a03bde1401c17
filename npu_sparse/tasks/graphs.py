"""Walks in a graph of random ids (after OpenAI's GraphWalks, 2025): a breadth-first search, and the parents of a node."""

from random import Random

from npu_sparse.tasks.draft import Draft, Request

TASK = (
    "Below is a directed graph, one edge a line. Memorize it; I will ask you about it afterwards.\n{edges}\n{question}"
)
QUESTION = "Question: {question} List their ids, separated by commas, and nothing else."
DEPTH = (
    "Which nodes are reached from node {root} in exactly {depth} steps along the edges, and in no fewer? Example: with the edges "
    "x -> y and y -> z, the node z is reached from x in exactly 2 steps."
)
PARENTS = "From which nodes does an edge lead to node {root}? Example: with the edge x -> y, x is the one for y."
PREFIX = " Answer: The nodes are"
WIDTHS = (2, 4)  # number of nodes at depths 1 and 2
NUMBER_OF_PARENTS = 4


def search(depth: int, request: Request, source: None = None) -> Draft:
    """The nodes at a depth from one node; one unit is an edge that starts at none of the nodes on the way."""
    rng = request.random("graph")
    ids = _Ids(rng)
    levels = [[ids.new()]]
    planted: list[tuple[str, str]] = []
    for width in WIDTHS[:depth]:
        below = [ids.new() for _ in range(width)]
        parents = levels[-1]
        planted += [(parents[n % len(parents)], node) for n, node in enumerate(below)]
        levels.append(below)
    inner = {node for level in levels[:-1] for node in level}
    return _draft(request, DEPTH.format(root=levels[0][0], depth=depth), planted, levels[-1], ids, starts_not_at=inner)


def parents(request: Request, source: None = None) -> Draft:
    """The nodes with an edge to one node; one unit is an edge that ends elsewhere."""
    rng = request.random("graph")
    ids = _Ids(rng)
    root = ids.new()
    nodes = [ids.new() for _ in range(NUMBER_OF_PARENTS)]
    return _draft(request, PARENTS.format(root=root), [(node, root) for node in nodes], nodes, ids, ends_not_at={root})


def _draft(request, question, planted, answers, ids, starts_not_at=frozenset(), ends_not_at=frozenset()) -> Draft:
    rng = request.random("edges")
    nodes = list(dict.fromkeys(node for edge in planted for node in edge))
    edges, seen = [], set(planted)
    question = QUESTION.format(question=question)

    def first(n: int) -> list[tuple[str, str]]:
        while len(edges) < n:
            if 2 * len(nodes) < len(edges) + 8:  # two edges a node, on average
                nodes.append(ids.new())
            edge = rng.choice(nodes), rng.choice(nodes)
            if edge[0] != edge[1] and edge not in seen and edge[0] not in starts_not_at and edge[1] not in ends_not_at:
                seen.add(edge)
                edges.append(edge)
            elif len(nodes) < 8:
                nodes.append(ids.new())
        return edges[:n]

    def body(n: int) -> str:
        shown = [*planted, *first(n)]
        request.random(f"order {n}").shuffle(shown)
        return TASK.format(edges="\n".join(f"{a} -> {b}" for a, b in shown), question=question)

    return Draft(body, PREFIX, answers=tuple(answers), least=1, question=question)


class _Ids:
    """Distinct ids of eight letters and digits, the first a letter."""

    def __init__(self, rng: Random):
        self._rng, self._seen = rng, set()

    def new(self) -> str:
        while True:
            drawn = self._rng.choice("abcdef") + f"{self._rng.getrandbits(28):07x}"
            if drawn not in self._seen:
                self._seen.add(drawn)
                return drawn
