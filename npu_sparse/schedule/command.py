"""What `npu-sparse schedule` does: one C file in, the scheduled C file and what was asked for beside it out."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from npu_sparse.schedule import config, legality, openscop, render
from npu_sparse.schedule.c.print import generate_file
from npu_sparse.schedule.c.run import FLAGS, run
from npu_sparse.schedule.frontend.c import parse_c, read_c
from npu_sparse.schedule.frontend.preprocess import run_cpp
from npu_sparse.schedule.frontend.regions import count_regions
from npu_sparse.schedule.scheduler import schedule
from npu_sparse.schedule.scop import Scop, ScopError

from ..runs.store import write_text


def schedule_file(
    source: Path,
    strategy: str | config.Config,
    *,
    function: str = "",
    output: Path | None = None,
    separate: bool = False,
    tree: bool = False,
    draw: Path | None = None,
    export: Path | None = None,
    sizes: dict[str, float] | None = None,
    time_limit_s: float = 300,
    pure: Collection[str] = (),
    cpp: Collection[str] = (),
) -> str:
    """Schedules the SCoPs of a function of a C file by a shipped strategy, a YAML file or a Config; returns what to print.

    That is the generated C without `output`, the schedule tree with `tree`, and with `sizes` (a value for every scalar argument
    of the function) a comparison of the original and the generated program, run with 1, 2 and 4 threads within `time_limit_s`
    seconds. `pure` names functions whose calls may move, and `cpp` are options for gcc's preprocessor (see parse_c).

    Raises ValueError in one sentence for any mistake; nothing is written then.
    """
    settings = strategy if isinstance(strategy, config.Config) else config.load(strategy)
    options = {"function": function or None, "cpp": tuple(cpp) or None, "pure": pure}
    text = generated = read_c(source)
    count = count_regions(text if not cpp else run_cpp(source, tuple(cpp)), str(source), function or None)
    if count > 1 and (draw or export):
        raise ScopError(f"{source}: a picture and an OpenScop text must be of one region, got {count}")
    plans = []
    for number in range(count, 0, -1):  # from the last: the lines of those before it stay where they are
        scop = parse_c(source, **options, number=number, text=generated)
        plan = schedule(scop, settings)
        violations = legality.check(scop, plan.union_map(), settings.relax_reductions)
        if violations:
            raise ScopError(f"{source}: {violations[0]}")
        generated = generate_file(scop, generated, plan.tree(), separate=separate)
        plans.insert(0, plan)
    shown = list(dict.fromkeys(f"note: {note}" for plan in plans for note in plan.notes))
    if sizes is not None:
        results = run(_whole([plan.scop for plan in plans]), {"original": text, "generated": generated}, dict(sizes),
                      threads=(1, 2, 4), timeout_s=time_limit_s, flags=(*FLAGS, f"-I{source.resolve().parent}", *cpp))
        shown.append(_compared(results, exact=not settings.relax_reductions))
    if draw:
        render.draw(plans[0], draw)
    if export:
        write_text(export, openscop.export(plans[0].scop, plans[0].union_map()))
    if output:
        write_text(output, generated)
    if tree:
        shown += [render.show_tree(plan.tree()) for plan in plans]
    elif not output:
        shown.append(generated)
    return "\n".join(shown).rstrip("\n")


def _whole(scops: list[Scop]) -> Scop:
    """The first of the SCoPs of a function, with the arrays of all of them: what runs and compares them needs no more."""
    arrays, passed = {}, {a.name for a in scops[0].arguments}
    for scop in scops:
        for name, array in scop.arrays.items():  # what is no argument, and a later region reads, shows in the results of that one
            if name not in arrays or array.live_out or name not in passed:
                arrays[name] = array
    return replace(scops[0], arrays=arrays)


def _compared(results, exact: bool) -> str:
    """One line for each number of threads; RuntimeError where programs that must be `exact` differ, a bug of this package."""
    lines = []
    for result in results:
        if result.difference and exact:
            raise RuntimeError(f"generated code differs from the original with {result.threads} threads: {result.difference}")
        outcome = result.difference or "bitwise equal"
        lines.append(f"{result.variant:10s} {result.threads} threads: {result.wall * 1e3:9.3f} ms, {outcome}")
    return "\n".join(lines)
