"""Instructions of a vector core, and the flags and barriers that order its scalar and its vector unit."""

from dataclasses import dataclass, field

SYNC = {
    ("S", "V"): "Order<HardEvent::S_V>();",
    ("V", "S"): "Order<HardEvent::V_S>();",
    ("V", "V"): "PipeBarrier<PIPE_V>();",
}
THROUGH = ("V", "S", "V")  # vector instructions that the scalar unit has waited for: waiting for it covers them


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

    read: dict[tuple, frozenset[str]] = field(default_factory=lambda: dict.fromkeys((*SYNC, THROUGH), frozenset()))
    written: dict[tuple, frozenset[str]] = field(default_factory=lambda: dict.fromkeys((*SYNC, THROUGH), frozenset()))

    def copy(self) -> "_Pending":
        return _Pending(dict(self.read), dict(self.written))

    def joined(self, other: "_Pending") -> "_Pending":
        read = {pair: self.read[pair] | other.read[pair] for pair in self.read}
        return _Pending(read, {pair: self.written[pair] | other.written[pair] for pair in self.written})

    def hold_up(self, item: Instruction, pair: tuple[str, str]) -> bool:
        """Whether an instruction touches what the first unit of a pair has to be done with."""
        pairs = (pair, THROUGH) if pair == ("V", "V") else (pair,)
        return item.unit == pair[1] and any(
            self.written[p] & (item.reads | item.writes) or self.read[p] & item.writes for p in pairs
        )

    def waited(self, pair: tuple[str, str]) -> None:
        """Notes that the second unit of a pair has waited for the first."""
        for tensors in (self.read, self.written):
            if pair == ("V", "S"):
                tensors[THROUGH] |= tensors["V", "V"]
                tensors["V", "V"] = frozenset()
            else:
                tensors[THROUGH] = frozenset()
            tensors[pair] = frozenset()

    def ran(self, item: Instruction) -> None:
        for pair in SYNC:
            if pair[0] == item.unit:
                self.read[pair] |= item.reads
                self.written[pair] |= item.writes


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
    for item in _loads_first(items, pending):
        if isinstance(item, Block):
            lines += _wait(list(_instructions(item)), pending, pad)  # once for all iterations
            body, pending = _repeated(item.body, pending, pad + "    ")
            lines += [f"{pad}{item.head} {{", *body, pad + "}"]
        else:
            lines += [*_wait([item], pending, pad), pad + item.text]
            pending.ran(item)
    return lines, pending


def _wait(items: list[Instruction], pending: _Pending, pad: str) -> list[str]:
    """What some instruction must wait for."""
    lines = []
    for pair in SYNC:
        if any(pending.hold_up(item, pair) for item in items):
            pending.waited(pair)
            lines.append(pad + SYNC[pair])
    return lines


def _instructions(block: Block):
    for item in block.body:
        if isinstance(item, Block):
            yield from _instructions(item)
        else:
            yield item


def _loads_first(items: list[Item], pending: _Pending):
    """The items; of neighbouring scalar loads those come first that have nothing to wait for."""
    place = 0
    while place < len(items):
        end = place
        while end < len(items) and isinstance(items[end], Instruction) and items[end].unit == "S" and not items[end].writes:
            end += 1
        yield from sorted(items[place:end], key=lambda item: pending.hold_up(item, ("V", "S")))
        if end < len(items):
            yield items[end]
        place = end + 1
