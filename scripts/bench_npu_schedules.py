#!/usr/bin/env python3
"""How many cycles would the NPU operators take under strategy npu-vector, Pluto's and isl's schedule? Modelled, never measured.

    python scripts/bench_npu_schedules.py --output docs/results/npu-schedules

Every schedule goes through the same generator (npu_sparse.schedule.ascend.kernel), runs on the host emulation of AscendC, is
compared with fp64 there, and its instruction streams are replayed on the pipes of an Ascend 910B
(npu_sparse.measure.npu_cost), on --cores vector cores and on one. There is no card here. Scalar arithmetic and loop control
cost nothing in that model, which favours schedules that run on the scalar unit.

* npu-vector: the strategy's plan; a turn of a core takes as many rows as leave every core one turn.
* pluto: without its tiles, whose sizes are for the caches of a CPU.
* isl: what isl's own scheduler returns. A loop is parallel where the schedule's loop is, with all of its statements.
* isl, re-examined: the same, but a generated loop is parallel where the statements left in it after code generation are.

GM bytes are those of one core, against every live-in element read once and every live-out element written once. AKG's set is
lu_decomp, trsmL_off_diag and trsmU_T over their sizes, trsmL, and add.
"""

import argparse
import math
import re
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path

import islpy as isl

from npu_sparse.measure import npu_cost as cost
from npu_sparse.measure.npu_published import against_published, error_sentence
from npu_sparse.runs.figures import new_figure, write_figure
from npu_sparse.runs.machine import machine, machine_line
from npu_sparse.runs.page import markdown_table
from npu_sparse.runs.store import open_run, write_json, write_text
from npu_sparse.schedule import config, operator_reference
from npu_sparse.schedule.ascend import emulate, memory
from npu_sparse.schedule.ascend.kernel import Kernel, compile_plan, compile_tree, generate
from npu_sparse.schedule.c.isolate import sets
from npu_sparse.schedule.frontend import builder
from npu_sparse.schedule.isl_baseline import isl_tree
from npu_sparse.schedule.loop_analysis import Dependences, union
from npu_sparse.schedule.operator_reference import REFERENCES
from npu_sparse.schedule.plan import Band, Plan
from npu_sparse.schedule.scheduler import schedule
from npu_sparse.schedule.scop import Scop

EMULATION = Path(__file__).resolve().parent.parent / "ops/emulation"
SCHEDULES = ("npu-vector", "pluto", "isl", "isl, re-examined")
AKG_BAR, GM_BAR, ACCURACY = 5.0, 1.05, 1e-5
WIDTHS = range(16, 113, 16)


@dataclass(frozen=True)
class Case:
    """An operator at one size; `akg` for those of AKG's set."""

    name: str
    scop: Scop
    sizes: dict[str, int]
    akg: bool = True
    scalars: tuple[float, ...] = ()


def cases() -> list[Case]:
    solvers = [Case("lu_decomp 16", builder.lu_decomp(), {})]
    solvers += [Case(f"trsmL_off_diag {n}", builder.trsmL_off_diag(n), {}) for n in WIDTHS]
    solvers += [Case(f"trsmU_T {n}", builder.trsmU_T(n), {}) for n in WIDTHS]
    solvers += [Case("trsmL 16", builder.trsmL(), {}), Case("add 1024x32", builder.add(), {})]
    return [
        Case("softmax 80x256", builder.softmax(), {"R": 80, "C": 256}, False),
        Case("rms_norm_residual 80x256", builder.rms_norm_residual(), {"R": 80, "C": 256}, False, (1e-5,)),
        Case("rope 4x80x128", builder.rope(), {"H": 4, "T": 80, "D": 64}, False),
        Case("indexer 2x4x16x256", builder.indexer(block=16), {"H": 2, "N": 4, "T": 256}, False),
        *solvers,
    ]


def kernels(case: Case, cores: int) -> dict[str, Kernel]:
    """The case's kernel under every schedule."""
    untiled = replace(config.load("pluto"), tiling=config.Tiling())
    tree = isl_tree(case.scop)
    return {
        "npu-vector": compile_plan(schedule(case.scop, "npu-vector"), case.sizes, cores),
        "pluto": compile_tree(case.scop, schedule(case.scop, untiled).tree(), case.sizes, "pluto"),
        "isl": compile_tree(case.scop, tree, case.sizes, "isl"),
        "isl, re-examined": compile_tree(case.scop, tree, case.sizes, "isl", per_loop=True),
    }


def measure(case: Case, program: emulate.Program, cores: int) -> dict:
    """Modelled cycles, GM bytes, UB bytes and the error of every schedule of a case."""
    arrays = operator_reference.inputs(case.scop, case.sizes)
    ideal, schedules = ideal_bytes(case.scop, case.sizes), {}
    for label in SCHEDULES:
        name = f"{case.name}, {label}"
        kernel = program.kernels[name]
        results = program.run(name, arrays, case.scalars, blocks=3, seed=1)  # hazards on, events in random order
        named = dict(zip(kernel.scalars, case.scalars))
        many, one = (cost.simulate(program.trace(name, arrays, case.scalars, blocks)) for blocks in (cores, 1))
        schedules[label] = {
            "cycles": many.cycles, "cycles_one_core": one.cycles, "gm_bytes": one.gm_read + one.gm_written,
            "gm_ratio": (one.gm_read + one.gm_written) / ideal, "gm_bytes_all_cores": many.gm_read + many.gm_written,
            "operand_ratio": (one.gm_read + one.gm_written) / operand_bytes(kernel),
            "ub_bytes": kernel.ub_bytes, "turns": kernel.turns, "nests": len(kernel.turns),
            "error": operator_reference.largest_error(REFERENCES[case.scop.name], arrays, results, **named),
        }  # fmt: skip
        print(f"{name}: {many.cycles:.0f} cycles", flush=True)
    return {"case": case.name, "akg": case.akg, "ideal_gm_bytes": ideal, "schedules": schedules, **properties(case)}


def ideal_bytes(scop: Scop, sizes: dict[str, int]) -> int:
    """Every element that holds a value needed from before read once, and every one written that lives on written once."""
    values = " and ".join(f"{name} = {value}" for name, value in sizes.items()) or "true"
    fixed = isl.Set(f"[{', '.join(sizes)}] -> {{ : {values} }}")
    check, elements = Dependences(scop), 0
    for name, array in scop.arrays.items():
        if not array.shape:
            continue
        reads = union(a.relation.intersect_domain(s.domain) for s in scop.statements for a in s.reads if a.array == name)
        if name in check.written:
            writes, flows, _ = check.written[name]
            fresh = [read.subtract_domain(flow.range()) for read, flow in flows]
            reads = reduce(isl.UnionMap.union, fresh) if fresh else reads
            elements += _count(writes.range(), fixed) if array.live_out else 0
        elements += _count(reads.range(), fixed)
    return 4 * elements


def operand_bytes(kernel: Kernel) -> int:
    """Every array that enters read once, every one that leaves written once, whole."""
    return 4 * sum({"read": 1, "write": 1, "readwrite": 2, "workspace": 0}[a.use] * a.floats for a in kernel.arguments)


def _count(elements: isl.UnionSet, fixed: isl.Set) -> int:
    total = 0
    for piece in sets(elements.intersect_params(fixed)):
        total += piece.project_out(isl.dim_type.param, 0, piece.dim(isl.dim_type.param)).count_val().to_python()
    return total


def properties(case: Case) -> dict:
    """What the plan of npu-vector looks like."""
    plan = schedule(case.scop, "npu-vector")
    texts = [text for _, band in plan.bands() for loop in band.loops for text in loop.exprs.values()]
    factors = [int(n) for text in texts for n in re.findall(r"\b(\d+)\w", re.sub(r"/\d+", "", text))]
    text = generate(plan, case.sizes)
    return {
        "one_nest": text.count("void Nest") == 1,
        "outer_parallel": isinstance(plan.root, Band) and plan.root.loops[0].parallel or _parallel_tile(plan),
        "largest_coefficient": max([1, *factors]),
        "scalar_statements": text.count("SetValue"),
    }


def _parallel_tile(plan: Plan) -> bool:
    """Whether the cores share chunks of a loop that runs inside."""
    return isinstance(plan.root, Band) and any(loop.parallel and loop.tile for loop in plan.root.loops)


def geomean(values) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(rows: list[dict]) -> dict:
    """Speed-ups of npu-vector, and whether each bar is met."""
    akg = [row for row in rows if row["akg"]]
    solvers = [row for row in akg if not row["case"].startswith("add")]

    def speed_up(chosen, key="cycles"):
        return {
            label: geomean(row["schedules"][label][key] / row["schedules"]["npu-vector"][key] for row in chosen)
            for label in (SCHEDULES[1:] if chosen else ())
        }

    ours = [row["schedules"]["npu-vector"] for row in rows]
    over = speed_up(akg)
    return {
        "akg_speed_up": over, "akg_speed_up_one_core": speed_up(akg, "cycles_one_core"), "solvers_speed_up": speed_up(solvers),
        "others_speed_up": speed_up([row for row in rows if not row["akg"]]),
        "bars": {
            f"modelled cycles, geomean over isl on AKG's set at least {AKG_BAR}": over.get("isl", 0) >= AKG_BAR,
            f"GM bytes at most {GM_BAR} of the ideal": max(o["gm_ratio"] for o in ours) <= GM_BAR,
            "UB within capacity": max(o["ub_bytes"] for o in ours) <= memory.UB_BYTES,
            f"results within {ACCURACY}": max(s["error"] for row in rows for s in row["schedules"].values()) <= ACCURACY,
            "one nest each": all(row["one_nest"] for row in rows),
            "cores share the outermost loop, lu_decomp excepted, which has no parallel one":
                all(row["outer_parallel"] for row in rows if not row["case"].startswith("lu_decomp")),
            "no coefficient above 1": all(row["largest_coefficient"] == 1 for row in rows),
            "innermost loops are vector instructions": all(row["scalar_statements"] <= 1 for row in rows),
        },
    }  # fmt: skip


def _markdown(result: dict) -> str:
    summary, rows = result["summary"], result["rows"]
    cycles, traffic = [], []
    for row in rows:
        by = row["schedules"]
        ours = by["npu-vector"]
        cycles.append({
            "operator": row["case"], **{f"{label} (cycles)": round(by[label]["cycles"]) for label in SCHEDULES},
            "over isl": f"{by['isl']['cycles'] / ours['cycles']:.2f}",
            "over isl, one core": f"{by['isl']['cycles_one_core'] / ours['cycles_one_core']:.2f}",
            "over isl, re-examined": f"{by['isl, re-examined']['cycles'] / ours['cycles']:.2f}",
        })  # fmt: skip
        traffic.append({
            "operator": row["case"], "ideal GM (B)": row["ideal_gm_bytes"], "npu-vector GM (B)": ours["gm_bytes"],
            "of the ideal": f"{ours['gm_ratio']:.3f}", "isl, of the ideal": f"{by['isl']['gm_ratio']:.3f}",
            "of whole operands": f"{ours['operand_ratio']:.3f}",
            "GM, all cores (B)": ours["gm_bytes_all_cores"], "UB (B)": ours["ub_bytes"], "turns": ours["turns"][0],
            "nests: npu-vector / pluto / isl": " / ".join(str(by[n]["nests"]) for n in SCHEDULES[:3]),
            "largest error": f"{ours['error']:.1e}",
        })  # fmt: skip
    over = [{"set": title, **{label: f"{summary[key][label]:.2f}" for label in SCHEDULES[1:]}} for title, key in (
        (f"AKG's set, {result['config']['cores']} cores", "akg_speed_up"), ("AKG's set, one core", "akg_speed_up_one_core"),
        ("AKG's solvers (without add)", "solvers_speed_up"), ("softmax, RMSNorm, RoPE, indexer", "others_speed_up"),
    ) if summary[key]]  # fmt: skip
    bars = "\n".join(f"- {'met' if met else '**missed**'}: {bar}" for bar, met in summary["bars"].items())
    return f"""# Modelled: NPU operators by schedule

**No card was used: all cycles below are modelled**, from the instruction streams of the host emulation on
{result["config"]["cores"]} vector cores of an Ascend 910B (`npu_sparse.measure.npu_cost`). Scalar arithmetic and loop control
cost nothing in the model, which favours schedules that end on the scalar unit. Every kernel ran with hazard checks first, and
was compared with fp64. All schedules go through the same generator.

{error_sentence(result["published"])}; the error
of a ratio of two schedules is not known.

Geometric means of the speed-up of npu-vector, modelled (the paper: 7.66 over isl, on hardware):

{markdown_table(over)}
{bars}

isl's loops are parallel where its schedule's are, as a backend that goes by the schedule takes them. "isl, re-examined" asks
again, loop by loop, after code generation: then lu_decomp and trsmU_T under isl become vector instructions as well; the last
column says what is left of the difference.

{markdown_table(cycles)}
GM bytes are those of one core; with all cores each core reads what they share (the triangular matrix). The ideal counts
elements that are used: a rectangle around a triangular matrix holds almost twice as many. Whole operands are arrays in and out,
every element once.

{markdown_table(traffic)}
Modelled on {machine_line(result["machine"])}.
"""


def _figure(rows: list[dict]):
    figure, axes = new_figure(1, width=11, height=4)
    axis = axes[0][0]
    for n, label in enumerate(("pluto", "isl", "isl, re-examined")):
        heights = [row["schedules"][label]["cycles"] / row["schedules"]["npu-vector"]["cycles"] for row in rows]
        axis.bar([place + 0.27 * (n - 1) for place in range(len(rows))], heights, width=0.26, label=f"over {label}")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(yscale="log", ylabel="speed-up of npu-vector, modelled", title="Modelled cycles, all cores")
    axis.set_xticks(range(len(rows)), [row["case"] for row in rows], rotation=60, ha="right", fontsize=7)
    axis.legend(fontsize=7)
    return figure


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=40, help="vector cores; 40 are those of a 910B3")
    parser.add_argument("--only", nargs="+", help="operators, by the first word of their case; default: all")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    directory = open_run(args.output, {"stage": "npu-schedules", "cores": args.cores, "only": args.only})
    chosen = [case for case in cases() if not args.only or case.name.split()[0] in args.only]
    with tempfile.TemporaryDirectory() as folder:
        built = {f"{case.name}, {label}": kernel for case in chosen for label, kernel in kernels(case, args.cores).items()}
        program = emulate.build(built, Path(folder), EMULATION)
        rows = [measure(case, program, args.cores) for case in chosen]
    result = {
        "config": {"cores": args.cores, "only": args.only}, "evidence": "modelled", "machine": machine(),
        "rates": asdict(cost.Rates()), "published": against_published(), "rows": rows, "summary": summary(rows),
    }  # fmt: skip
    write_json(directory / "report.json", result)
    write_text(directory / "report.md", _markdown(result))
    write_figure(directory / "report.png", _figure(rows))
    print((directory / "report.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
