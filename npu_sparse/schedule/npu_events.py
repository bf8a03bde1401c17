"""Instructions of a vector core, and the flags and barriers that order its scalar and its vector unit."""

from dataclasses import dataclass, field

SYNC = {
    ("V", "V"): "PipeBarrier<PIPE_V>();",
    ("V", "S"): "Order<HardEvent::V_S>();",
    ("S", "V"): "Order<HardEvent::S_V>();",
}


@dataclass(frozen=True)
class Instruction:
    """C text that runs on the unit "S" or "V", and the tensors that it touches; unit "" for text that touches none."""

    unit: str
    text: str
    reads: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Block:
    """A loop or a branch: C text before the brace, and what is inside."""

    head: str
    body: list


Item = Instruction | Block


@dataclass
class _Pending:
    """Per pair of units: tensors that the first has read and written since the second last waited for it."""

    read: dict[tuple[str, str], frozenset[str]] = field(default_factory=lambda: dict.fromkeys(SYNC, frozenset()))
    written: dict[tuple[str, str], frozenset[str]] = field(default_factory=lambda: dict.fromkeys(SYNC, frozenset()))

    def copy(self) -> "_Pending":
        return _Pending(dict(self.read), dict(self.written))

    def joined(self, other: "_Pending") -> "_Pending":
        read = {pair: self.read[pair] | other.read[pair] for pair in SYNC}
        return _Pending(read, {pair: self.written[pair] | other.written[pair] for pair in SYNC})


def ordered(items: list[Item], indent: int) -> list[str]:
    """Lines of C for the body of a loop: a flag or a barrier wherever an instruction must wait for an earlier one."""
    return _repeated(items, _Pending(), " " * indent)[0]


def _repeated(items: list[Item], pending: _Pending, pad: str) -> tuple[list[str], _Pending]:
    """The lines of items that may run again, or not at all: what they leave pending is pending where they begin, too."""
    while True:
        lines, after = _lines(items, pending.copy(), pad)
        joined = pending.joined(after)
        if joined == pending:
            return lines, pending
        pending = joined


def _lines(items: list[Item], pending: _Pending, pad: str) -> tuple[list[str], _Pending]:
    lines = []
    for item in items:
        if isinstance(item, Block):
            lines += _before(item, pending, pad)
            body, pending = _repeated(item.body, pending, pad + "    ")
            lines += [f"{pad}{item.head} {{", *body, pad + "}"]
        else:
            lines += [pad + SYNC[pair] for pair in SYNC if _conflict(item, pending, pair)]
            lines.append(pad + item.text)
    return lines, pending


def _before(block: Block, pending: _Pending, pad: str) -> list[str]:
    """What a block would wait for in every iteration though it happened before the block, waited for once."""
    lines = []
    for pair in SYNC:
        if any(_waits(item, pending, pair) for item in _instructions(block)):
            pending.read[pair] = pending.written[pair] = frozenset()
            lines.append(pad + SYNC[pair])
    return lines


def _instructions(block: Block):
    for item in block.body:
        if isinstance(item, Block):
            yield from _instructions(item)
        else:
            yield item


def _waits(item: Instruction, pending: _Pending, pair: tuple[str, str]) -> bool:
    """Whether an instruction touches what the first unit of a pair has to be done with."""
    touched = pending.written[pair] & (item.reads | item.writes) or pending.read[pair] & item.writes
    return item.unit == pair[1] and bool(touched)


def _conflict(item: Instruction, pending: _Pending, pair: tuple[str, str]) -> bool:
    """Whether an instruction must wait for the first unit of a pair; notes that it has, and what it does itself."""
    waits = _waits(item, pending, pair)
    if waits:
        pending.read[pair] = pending.written[pair] = frozenset()
    if pair[0] == item.unit:
        pending.read[pair] |= item.reads
        pending.written[pair] |= item.writes
    return waits
