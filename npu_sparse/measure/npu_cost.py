"""Modelled time of the AscendC operators on Ascend 910B, from the instruction streams that the host emulation executes.

Nothing here is measured on a card of ours. A trace (`ops/emulation/emulation/trace.h`) lists, per core, every instruction
with its pipe and sizes and every flag, barrier and cross-core wait; `simulate` queues them on the pipes of a chip, in order,
and reports when each pipe is busy. The constants are public figures where there are any, and assumptions otherwise:

* chips, L2 and L0 bandwidths per core: the vendor's public product tables;
* cycles and latencies of vector instructions, GM latencies, L0C's 128 and GM's 86 (87) bytes per cycle that bound Fixpipe:
  the public cost model of hicann/pypto (A2/A3); the vendor's asc-devkit, too, gives 32 fp32 of L0C per cycle;
* measured by others on 910B3 (microbenchmarks of shane-kshongmo/vTriton, `perfbound/calibration`): Fixpipe of 128 x 128 fp32
  to GM at 143.5 GB/s, which those two bounds give within 1 %; 77.0 GB/s of HBM for each of 20 cores that read at once
  (`Rates.hbm`); 28 to 30 cycles from one vector instruction of two repeats to the next (`Rates.vector_issue`);
* `Rates.launch_us`: what the stream of the smallest published timing leaves of it (`npu_published`);
* `Rates.dma`, `Rates.burst`, `Rates.issue`: assumptions, chosen so that 16 KB copies run near full rate and 512 B gathers do
  not, as the vendor's guides say. `scripts/model_npu.py` reports how much the result moves when they are halved and doubled.

Contention of cores for L2 banks, instruction cache misses, clock throttling and the scalar unit's arithmetic are not modelled.
Times are therefore too short, for dense and sparse alike. `npu_published.against_published` says by how much for a kernel that
was timed, and no modelled time is published without it.
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

PIPES = ("S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX")


@dataclass(frozen=True)
class Chip:
    """One Ascend processor: cores (each AIC has two AIVs), clock in GHz, HBM bytes per second, L2 bytes."""

    name: str
    cores: int
    ghz: float
    hbm: float
    l2: int

    @property
    def peak_flops(self) -> float:
        """fp16 / bf16 FLOP/s of the cubes: 16 x 16 x 16 multiply-adds per cycle and core."""
        return 2 * 16**3 * self.cores * self.ghz * 1e9


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("910B1", 24, 1.85, 1.6e12, 192 << 20),
        Chip("910B2", 24, 1.8, 1.6e12, 192 << 20),
        Chip("910B3", 20, 1.8, 1.6e12, 192 << 20),
        Chip("910B4", 20, 1.5, 0.8e12, 96 << 20),
    )
}


@dataclass(frozen=True)
class Rates:
    """Bytes and cycles of one core: `dma`, `burst` and `issue` are assumptions, `launch_us` is fitted, others are public."""

    hbm: float = 42.8  # bytes per cycle and core: 77.0 GB/s at 1.8 GHz, measured with all cores reading
    l2_read: float = 110.0
    l2_write: float = 86.0
    l0a: float = 256.0
    l0b: float = 128.0
    l0c: float = 128.0
    read_latency: float = 307.0  # cycles, GM
    write_latency: float = 153.0
    load_latency: float = 40.0  # L1 to L0
    cube_latency: float = 24.0
    flag_latency: float = 8.0
    cross_latency: float = 100.0  # a flag between AIC and AIV
    dma: float = 64.0  # cycles that a copy instruction holds its queue besides its bytes
    burst: float = 4.0
    issue: float = 4.0  # scalar cycles to issue one instruction
    vector_issue: float = 28.0  # the same of a vector instruction, whose mask and count are set for it
    scalar: float = 12.0  # GetValue / SetValue on a local buffer, or in the scalar unit's data cache
    launch_us: float = 12.8  # of a kernel, besides its stream

    def scaled(self, factor: float) -> "Rates":
        """The same with every assumption times `factor`."""
        return replace(self, dma=self.dma * factor, burst=self.burst * factor, issue=self.issue * factor)


# bytes per cycle where it is not 256, and latency in cycles
_SLOW = {
    "Exp": (128, 12), "Ln": (128, 14), "Sqrt": (128, 13), "Div": (128, 13), "Reciprocal": (256, 5), "Sort32": (64, 18),
    "MrgSort": (64, 18), "GatherMask": (128, 4), "Gather": (32, 12), "Copy": (128, 4), "Brcb": (128, 4), "Cast": (128, 7),
    "WholeReduceSum": (256, 20), "WholeReduceMax": (256, 8), "WholeReduceMin": (256, 8), "ReduceSum": (256, 20),
    "ReduceMax": (256, 8), "BlockReduceSum": (256, 12), "BlockReduceMax": (256, 5), "BlockReduceMin": (256, 5),
    "Transpose": (64, 12),
}  # fmt: skip
VECTOR_LATENCY = 7
VECTOR_HEAD = 8  # cycles from a barrier to the first result, besides the instruction's own latency


@dataclass(frozen=True)
class Timing:
    """When a launch ends, and how long each pipe of the busiest core of its kind was busy; cycles."""

    cycles: float
    busy: dict[str, float]  # "M", "FIX", ... of the AIC; "V", ... of an AIV, with the kind in front: "AIC.M"
    gm_read: int
    workspace_read: int  # the part of gm_read that comes from workspaces
    gm_written: int
    mac: int

    @property
    def bound(self) -> str:
        """The pipe that is busy the longest."""
        return max(self.busy, key=self.busy.get) if self.busy else "none"

    def utilisation(self, pipe: str) -> float:
        """The share of the launch's cycles in which `pipe` ("AIC.M") worked."""
        return self.busy.get(pipe, 0.0) / self.cycles if self.cycles else 0.0


def load_trace(path) -> dict:
    """A trace file of the emulation, `{"kernel", "workspace", "columns", "spaces", "cores"}`."""
    return json.loads(Path(path).read_text())


def simulate(trace: dict, rates: Rates = Rates(), *, l2_hit: float = 0.0) -> Timing:
    """The Timing of a trace. `l2_hit`: the share of the bytes of tensors that L2 serves, in [0, 1]; a workspace is in L2.

    Every pipe runs its instructions in order; the scalar unit issues them in program order; waits and barriers hold a pipe (or
    the issue) until the steps they name are done. Raises ValueError where waits form a cycle.
    """
    if not 0.0 <= l2_hit <= 1.0:
        raise ValueError(f"l2_hit must lie in [0, 1], got {l2_hit}")
    columns = {name: place for place, name in enumerate(trace["columns"])}
    spaces = {name: place for place, name in enumerate(trace["spaces"])}
    cores = [_Core(core, columns, spaces, rates, l2_hit) for core in trace["cores"]]
    moving = True
    while moving:
        moving = False
        for core in cores:
            moving |= core.advance(cores)
    if stuck := [core.name for core in cores if core.at < len(core.steps)]:
        raise ValueError(f"waits of a trace must not form a cycle, got one among {', '.join(stuck[:4])}")
    busy: dict[str, float] = defaultdict(float)
    for core in cores:
        for pipe, cycles in core.busy.items():
            name = f"{'AIC' if core.cube else 'AIV'}.{pipe}"
            busy[name] = max(busy[name], cycles)
    return Timing(
        max((core.end for core in cores), default=0.0), dict(busy), sum(core.gm_read for core in cores),
        sum(core.workspace_read for core in cores), sum(core.gm_written for core in cores), sum(core.mac for core in cores),
    )  # fmt: skip


class _Core:
    """One core's queues while a trace is replayed."""

    def __init__(self, core: dict, columns: dict, spaces: dict, rates: Rates, l2_hit: float):
        self.name, self.cube, self.steps = core["name"], core["cube"], core["steps"]
        self.columns, self.gm, self.rates = columns, spaces["GM"], rates
        self.l0b, self.workspace = spaces["L0B"], spaces["WORKSPACE"]
        self.read_rate = 1 / (l2_hit / rates.l2_read + (1 - l2_hit) / rates.hbm)
        self.at = 0
        self.scalar = 0.0  # when the scalar unit can issue next
        self.free = dict.fromkeys(PIPES, 0.0)  # when a pipe takes its next instruction
        self.last = dict.fromkeys(PIPES, 0.0)  # when all of a pipe's instructions are done
        self.busy: dict[str, float] = defaultdict(float)
        self.done: list[float] = []
        self.end = 0.0
        self.gm_read = self.workspace_read = self.gm_written = self.mac = 0

    def advance(self, cores: list["_Core"]) -> bool:
        """Replays steps until one waits for another core's step that has no time yet; True if any step was replayed."""
        started = self.at
        while self.at < len(self.steps):
            step = self.steps[self.at]
            after = step[self.columns["after"]]
            if any(index >= cores[core].at for core, index in after if cores[core] is not self):
                break
            ready = max((cores[core].done[index] for core, index in after), default=0.0)
            self.done.append(self._replay(step, ready))
            self.end = max(self.end, self.done[-1])
            self.at += 1
        return self.at > started

    def _replay(self, step: list, ready: float) -> float:
        kind, pipe = step[self.columns["step"]], step[self.columns["pipe"]]
        self.scalar += self.rates.vector_issue if kind == "instruction" and pipe == "V" else self.rates.issue
        if kind in ("set", "cross_set"):
            return max(self.scalar, self.last[pipe]) if pipe in self.last else max(self.scalar, *self.last.values())
        if kind in ("wait", "cross_wait"):
            until = ready + (self.rates.flag_latency if kind == "wait" else self.rates.cross_latency)
            if pipe in self.free and pipe != "S":
                self.free[pipe] = max(self.free[pipe], until)
            else:
                self.scalar = max(self.scalar, until)
            return until
        if kind == "barrier":
            if pipe in self.free and pipe != "S":
                self.free[pipe] = max(self.free[pipe], self.last[pipe] + (VECTOR_HEAD if pipe == "V" else 0))
                return self.free[pipe]
            self.scalar = max(self.scalar, *self.last.values())
            return self.scalar
        occupied, latency = self._cycles(step, pipe)
        if pipe == "S":
            self.scalar += occupied + latency
            self.busy["S"] += occupied + latency
            self.last["S"] = self.scalar
            return self.scalar
        start = max(self.scalar, self.free[pipe], ready)
        self.free[pipe] = start + occupied
        self.last[pipe] = max(self.last[pipe], start + occupied + latency)
        self.busy[pipe] += occupied
        return start + occupied + latency

    def _cycles(self, step: list, pipe: str) -> tuple[float, float]:
        """`(cycles that the pipe is held, latency after them)`."""
        rates, opcode = self.rates, step[self.columns["opcode"]]
        read, written = step[self.columns["read"]], step[self.columns["written"]]
        bursts, repeats = step[self.columns["bursts"]], step[self.columns["repeats"]]
        self.gm_read += read[self.gm]
        self.workspace_read += read[self.workspace]
        self.gm_written += written[self.gm]
        if pipe == "M":
            m, n, k = (step[self.columns[axis]] for axis in "mnk")
            self.mac += m * n * k
            return math.ceil(m / 16) * math.ceil(n / 16) * math.ceil(k / 16), rates.cube_latency
        if pipe == "V":
            rate, latency = _SLOW.get(opcode, (256, VECTOR_LATENCY))
            return max(1, repeats) * 256 / rate, latency
        if pipe == "MTE1":
            return sum(written) / (rates.l0b if written[self.l0b] else rates.l0a), rates.load_latency
        if pipe == "MTE2":
            passed_on = read[self.workspace]  # what another core has just written is in L2
            transfer = (read[self.gm] - passed_on) / self.read_rate + passed_on / rates.l2_read
            return rates.dma + max(transfer, bursts * rates.burst), rates.read_latency
        if pipe == "MTE3":
            if not written[self.gm]:
                return sum(written) / rates.l0a, rates.load_latency
            return rates.dma + max(written[self.gm] / rates.l2_write, bursts * rates.burst), rates.write_latency
        if pipe == "FIX":
            return rates.dma + max(sum(read) / rates.l0c, written[self.gm] / rates.l2_write), rates.write_latency
        return rates.scalar + bursts * rates.read_latency, 0.0  # bursts: misses of the scalar unit's data cache


def dense_seconds(chip: Chip, length: int, query_heads: int, head_dim: int, efficiency: float) -> float:
    """Modelled seconds of causal dense attention over `length` tokens, one layer: 2 S^2 Hq D FLOPs at a share of the peak."""
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency must lie in (0, 1], got {efficiency}")
    return 2.0 * length**2 * query_heads * head_dim / (efficiency * chip.peak_flops)
