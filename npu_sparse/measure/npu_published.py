"""The published lightning_indexer's instruction stream, reconstructed from its public tiling, for `npu_cost.simulate`.

`npu_cost` says how long our kernels would take, and no card has run them. This checks it against a kernel with published
timings. Tile-lang's comparison (tile-ai/tilelang-ascend, pull request 1476: 910B3,
`msprof op` task durations) gives four shapes of the vendor's lightning_indexer, and the vendor's own repository
(ops-transformer, attention/lightning_indexer, 910B) its tiling: base blocks of 8 queries x 512 keys, dealt to the cores in
order; products of 128 x 128 x 128 with keys of 256 rows in L1; scores in a workspace, two blocks deep; 16 heads at a time
weighted and added in UB; a sort of 512 per query and block, merged into a list of 2048; lists of a query whose keys were
dealt to several cores merged after SyncAll. The stream here has those instructions, sizes and waits. It computes nothing, and
no line of it is the vendor's.

Left out, because they are not public or no instructions: scalar arithmetic of the tiling, instruction cache misses, the order
in which cores start.
"""

import math
from dataclasses import dataclass

from . import npu_cost as cost

COLUMNS = ["step", "pipe", "opcode", "line", "id", "repeats", "m", "n", "k", "bursts", "burst_bytes", "read", "written", "after"]
SPACES = ["UB", "L1", "L0A", "L0B", "L0C", "BT", "FB", "GM", "WORKSPACE"]
DIM = 128  # of an index head, in 16-bit
BLOCK_QUERIES, BLOCK_KEYS = 8, 512
KEYS_L1, TILE, HEADS_UB = 256, 128, 16
LIST = 2048  # pairs of score and position that a query keeps, whatever k is
PAIR = 8  # bytes of one
LANES = 64  # fp32 of a vector instruction's repeat


@dataclass(frozen=True)
class Published:
    """One shape of a published timing: `microseconds` is what the task took on the card, launch included."""

    name: str
    batch: int
    queries: int  # of a sequence
    keys: int
    heads: int
    k: int
    microseconds: float


CHIP = cost.CHIPS["910B3"]
LIGHTNING_INDEXER = (
    Published("16 x 5 queries, 3072 keys, 64 heads, k 2048", 16, 5, 3072, 64, 2048, 75.86),
    Published("8 x 5 queries, 3072 keys, 24 heads, k 2048", 8, 5, 3072, 24, 2048, 42.42),
    Published("20 x 3 queries, 512 keys, 64 heads, k 315", 20, 3, 512, 64, 315, 30.08),
    Published("2 x 1 query, 2048 keys, 8 heads, k 2048", 2, 1, 2048, 8, 2048, 20.72),
)

FITTED = LIGHTNING_INDEXER[-1]  # almost nothing but a launch: `Rates.launch_us` is what its stream leaves of it


def against_published(rates: cost.Rates | None = None) -> list[dict]:
    """What the model says of every published shape: `name`, `published_us`, `modelled_us`, `error` (0.1 = 10 % too long) and
    `fitted`, True for the one shape that `launch_us` is fitted to. Queries and keys come from HBM, scores from L2."""
    rates = rates or cost.Rates()
    rows = []
    for shape in LIGHTNING_INDEXER:
        cycles = cost.simulate(lightning_indexer(shape, CHIP.cores), rates).cycles
        modelled = rates.launch_us + cycles / CHIP.ghz / 1e3
        rows.append({
            "name": shape.name, "published_us": shape.microseconds, "modelled_us": modelled,
            "error": modelled / shape.microseconds - 1, "fitted": shape is FITTED,
        })  # fmt: skip
    return rows


def error_sentence(rows: list[dict]) -> str:
    """The model's error in one sentence, to stand beside every modelled time."""
    held_out = sorted(row["error"] for row in rows if not row["fitted"])
    return (
        f"The model's error: {100 * held_out[0]:+.0f} % to {100 * held_out[-1]:+.0f} % of the {len(held_out)} published "
        f"timings of the\nvendor's lightning_indexer on {CHIP.name} that nothing was fitted to"
    )


class Stream:
    """The steps of one core in a trace; every method returns its step as `(core, index)`, for others to wait for."""

    def __init__(self, core: int, name: str, cube: bool):
        self.core, self.name, self.cube, self.steps = core, name, cube, []

    def _step(self, kind, pipe, opcode="", after=(), repeats=0, mnk=(0, 0, 0), bursts=1, read=(), written=()) -> tuple[int, int]:
        sizes = [[dict(spaces).get(space, 0) for space in SPACES] for spaces in (read, written)]
        self.steps.append([kind, pipe, opcode, 0, 0, repeats, *mnk, bursts, 0, *sizes, [list(edge) for edge in after]])
        return self.core, len(self.steps) - 1

    def load(self, to: str, size: int, bursts: int, workspace: bool = False):
        """GM to L1 or UB."""
        read = {"GM": size} | ({"WORKSPACE": size} if workspace else {})
        return self._step("instruction", "MTE2", "DataCopy", bursts=bursts, read=read, written={to: size})

    def store(self, size: int):
        """UB to GM."""
        return self._step("instruction", "MTE3", "DataCopy", read={"UB": size}, written={"GM": size})

    def to_l0(self, space: str, size: int):
        return self._step("instruction", "MTE1", "LoadData", read={"L1": size}, written={space: size})

    def mmad(self, m: int, n: int, k: int):
        return self._step("instruction", "M", "Mmad", mnk=(m, n, k))

    def fixpipe(self, rows: int, columns: int):
        size = 4 * rows * columns
        written = {"GM": size, "WORKSPACE": size}
        return self._step("instruction", "FIX", "Fixpipe", bursts=rows, read={"L0C": size}, written=written)

    def vector(self, opcode: str, elements: int, barrier: bool = True):
        """One vector instruction over fp32 elements, and the barrier that the next one needs if it depends on it."""
        step = self._step("instruction", "V", opcode, repeats=math.ceil(elements / LANES))
        return self._step("barrier", "V") if barrier else step

    def flag(self, source: str, target: str):
        """The next step of `target` waits for all earlier steps of `source`."""
        return self.wait(target, [self.set(source)])

    def set(self, pipe: str, kind: str = "set"):
        return self._step(kind, pipe)

    def wait(self, pipe: str, after, kind: str = "wait"):
        return self._step(kind, pipe, after=after)


@dataclass(frozen=True)
class _Block:
    sequence: int
    key_block: int


def dealt(shape: Published, cores: int) -> list[list[_Block]]:
    """Base blocks of every core: in order, as many for each, one more for the first ones."""
    blocks = [_Block(s, b) for s in range(shape.batch) for b in range(math.ceil(shape.keys / BLOCK_KEYS))]
    least, more = divmod(len(blocks), cores)
    shares, at = [], 0
    for core in range(cores if least else more):
        count = least + (core < more)
        shares.append(blocks[at : at + count])
        at += count
    return shares


def lightning_indexer(shape: Published, cores: int) -> dict:
    """The trace of a launch of the published kernel: `cores` AICs with two AIVs each, those without work left out.

    At most 8 queries a sequence (one row of base blocks), which all published shapes have.
    """
    if not 1 <= shape.queries <= BLOCK_QUERIES:
        raise ValueError(f"queries must lie in [1, {BLOCK_QUERIES}], got {shape.queries}")
    work = dealt(shape, cores)
    streams = []
    for core, blocks in enumerate(work):
        aic = Stream(3 * core, f"AIC {core}", True)
        aivs = [Stream(3 * core + 1 + sub, f"AIV {core}.{sub}", False) for sub in range(2)]
        taken = [_start(aiv) for aiv in aivs]
        free: list[list] = [[None, None], [None, None]]  # for each AIV, the steps that free its two buffers of scores
        cube = _Cube(aic, shape)
        for number, block in enumerate(blocks):
            aic.wait("S", [each[number] for each in taken], "cross_wait")
            cube.score(block, number)
            ready = aic.set("FIX", "cross_set")
            for sub, aiv in enumerate(aivs):
                aiv.wait("S", [ready], "cross_wait")
                _reduce(aiv, shape, blocks, number, _queries_of(shape, sub), free[sub])
                taken[sub].append(aiv.set("MTE2", "cross_set"))
        streams.append((aic, aivs))
    _merge_between_cores(streams, work, shape)
    named = [each for aic, aivs in streams for each in (aic, *aivs)]
    return {
        "kernel": "lightning_indexer (published)", "columns": COLUMNS, "spaces": SPACES,
        "cores": [
            {"name": s.name, "cube": s.cube, "block": s.core // 3, "sub": max(0, s.core % 3 - 1), "steps": s.steps}
            for s in named
        ],
    }  # fmt: skip


def _queries_of(shape: Published, sub: int) -> int:
    return (shape.queries + 1 - sub) // 2


class _Cube:
    """One AIC: buffers and the steps that hold them."""

    def __init__(self, stream: Stream, shape: Published):
        self.stream, self.rows = stream, shape.queries * shape.heads
        self.keys_free, self.l0_free, self.l0c_free = [], [], []  # who frees the buffer of three, two and two turns ago

    def score(self, block: _Block, number: int) -> None:
        s = self.stream
        for at in range(0, BLOCK_KEYS, KEYS_L1):
            if len(self.keys_free) >= 3:
                s.wait("MTE2", [self.keys_free[-3]])
            for _ in range(KEYS_L1 // TILE):
                s.load("L1", TILE * DIM * 2, TILE)
            s.flag("MTE2", "MTE1")
            for first in range(0, self.rows, KEYS_L1):
                rows = min(KEYS_L1, self.rows - first)
                if at == 0 and (number == 0 or block.key_block == 0):
                    s.load("L1", rows * DIM * 2, rows)
                    s.flag("MTE2", "MTE1")
                for _ in range(KEYS_L1 // TILE):
                    for tile in range(0, rows, TILE):
                        self._tile(min(TILE, rows - tile))
            self.keys_free.append(s.set("MTE1"))

    def _tile(self, rows: int) -> None:
        s, padded = self.stream, math.ceil(rows / 16) * 16
        if len(self.l0_free) >= 2:
            s.wait("MTE1", [self.l0_free[-2]])
        s.to_l0("L0A", padded * DIM * 2)
        s.to_l0("L0B", TILE * DIM * 2)
        s.flag("MTE1", "M")
        if len(self.l0c_free) >= 2:
            s.wait("M", [self.l0c_free[-2]])
        s.mmad(padded, TILE, DIM)
        self.l0_free.append(s.set("M"))
        s.flag("M", "FIX")
        s.fixpipe(padded, TILE)
        self.l0c_free.append(s.set("FIX"))


def _start(aiv: Stream) -> list[tuple[int, int]]:
    """Lists of -inf, positions, and the two slots given to the cube."""
    aiv.vector("ArithProgression", BLOCK_KEYS)
    _clear_lists(aiv)
    aiv.vector("Duplicate", BLOCK_QUERIES * 64)
    aiv.flag("V", "MTE3")
    aiv.store(BLOCK_QUERIES * 16 * 8)
    return [aiv.set("MTE2", "cross_set") for _ in range(2)]


def _clear_lists(aiv: Stream) -> None:
    for _ in range(2):  # scores, then positions, under a mask
        aiv.vector("Duplicate", BLOCK_QUERIES // 2 * 2 * LIST, barrier=False)
    aiv.vector("Duplicate", 0)


def _reduce(aiv: Stream, shape: Published, blocks: list[_Block], number: int, queries: int, free: list) -> None:
    block = blocks[number]
    if number and block.key_block == 0:
        _clear_lists(aiv)
    row = min(HEADS_UB, shape.heads)
    ends = block.key_block + 1 == math.ceil(shape.keys / BLOCK_KEYS)
    first = next(b.key_block for b in blocks if b.sequence == block.sequence)
    for _ in range(queries):
        for turn, head in enumerate(range(0, shape.heads, HEADS_UB)):
            heads = min(HEADS_UB, shape.heads - head)
            if free[turn % 2]:
                aiv.wait("MTE2", [free[turn % 2]])
            aiv.load("UB", heads * BLOCK_KEYS * 4, heads, workspace=True)
            aiv.load("UB", heads * 2, 1)
            aiv.flag("MTE2", "V")
            aiv.vector("Cast", heads)
            aiv.vector("Brcb", heads * 8)
            for _ in range(heads):
                aiv.vector("Mul", BLOCK_KEYS, barrier=False)
            aiv.vector("Add", heads * BLOCK_KEYS if head else 0)
            free[turn % 2] = aiv.set("V")
        while row > 1:
            row = math.ceil(row / 2)
            aiv.vector("Add", row * BLOCK_KEYS)
        row = min(HEADS_UB, shape.heads)
        for opcode in ("Duplicate", "Adds", "Duplicate", "Adds"):
            aiv.vector(opcode, BLOCK_KEYS)
        _sort(aiv, BLOCK_KEYS)
        if shape.queries > 4:
            _merge(aiv, LIST + BLOCK_KEYS)
            aiv.vector("DataCopy", 2 * LIST)
        elif block.key_block - first == 3 or ends or number + 1 == len(blocks):
            waiting = (block.key_block - first) % 4 + 1
            _merge(aiv, waiting * BLOCK_KEYS) if waiting > 1 else aiv.vector("DataCopy", 2 * BLOCK_KEYS)
        if ends and first == 0:
            _extract(aiv, shape.k)
        elif ends or number + 1 == len(blocks):
            aiv.flag("V", "MTE3")
            aiv.store(128)
            aiv.store(LIST * PAIR)
            aiv.flag("MTE3", "V")


def _sort(aiv: Stream, elements: int) -> None:
    aiv._step("instruction", "V", "Sort32", repeats=elements // 32)
    aiv._step("barrier", "V")
    run = 32
    while run < elements:
        _merge(aiv, elements)
        run *= 4
    aiv.vector("DataCopy", 2 * elements)


def _merge(aiv: Stream, elements: int) -> None:
    """MrgSort that gives `elements` pairs; repeats count 256 bytes of them, as the emulation does."""
    aiv._step("instruction", "V", "MrgSort", repeats=math.ceil(elements * PAIR / 256))
    aiv._step("barrier", "V")


def _extract(aiv: Stream, k: int) -> None:
    aiv._step("instruction", "V", "GatherMask", repeats=LIST * PAIR // 256)
    aiv._step("instruction", "V", "GatherMask", repeats=LIST * PAIR // 256)
    aiv._step("barrier", "V")
    aiv.flag("V", "MTE3")
    aiv.store(k * 4)


def _merge_between_cores(streams, work: list[list[_Block]], shape: Published) -> None:
    """SyncAll of the AIVs; a sequence whose blocks lie on several cores is merged by the first of them."""
    arrived = []
    for _, aivs in streams:
        for aiv in aivs:
            aiv.wait("S", [aiv.set("ALL")])
            arrived.append(aiv.set("MTE3", "cross_set"))
    for core, (_, aivs) in enumerate(streams):
        last = work[core][-1].sequence
        lists = sum(any(b.sequence == last for b in blocks) for blocks in work[core:])
        starts_here = any(b.sequence == last and b.key_block == 0 for b in work[core])
        for sub, aiv in enumerate(aivs):
            aiv.wait("S", arrived, "cross_wait")
            if lists == 1 or not starts_here:
                continue
            for _ in range(_queries_of(shape, sub)):
                for _ in range(lists):
                    aiv._step("instruction", "S", "GetValue", read={"GM": 32}, bursts=4)
                    aiv.flag("V", "MTE2")
                    aiv.load("UB", LIST * PAIR, 1, workspace=True)
                aiv.flag("MTE2", "V")
                _merge(aiv, lists * LIST)
                aiv.vector("DataCopy", 2 * LIST)
                _extract(aiv, shape.k)
