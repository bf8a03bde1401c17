"""What `npu-sparse schedule` does: one C file in, the scheduled C file and what was asked for beside it out."""

from collections.abc import Collection
from pathlib import Path

from npu_sparse.schedule import config, legality, openscop, render
from npu_sparse.schedule.c.print import generate_file
from npu_sparse.schedule.c.run import FLAGS, run
from npu_sparse.schedule.frontend.c import parse_c
from npu_sparse.schedule.scheduler import schedule
from npu_sparse.schedule.scop import ScopError

from ..runs.store import write_text


def schedule_file(
    source: Path,
    strategy: str,
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
    """Schedules the SCoP of a C file by a shipped strategy or a YAML file; returns what is to be printed.

    That is the generated C without `output`, the schedule tree with `tree`, and with `sizes` (a value for every scalar argument
    of the function) a comparison of the original and the generated program, run with 1, 2 and 4 threads within `time_limit_s`
    seconds. `pure` names functions whose calls may move, and `cpp` are options for gcc's preprocessor (see parse_c).

    Raises ValueError in one sentence for any mistake; nothing is written then.
    """
    settings = config.load(strategy)
    scop = parse_c(source, function or None, cpp=tuple(cpp) or None, pure=pure)
    plan = schedule(scop, settings)
    violations = legality.check(scop, plan.union_map(), settings.relax_reductions)
    if violations:
        raise ScopError(f"{source}: {violations[0]}")
    text = source.read_text()
    generated = generate_file(scop, text, plan.tree(), separate=separate)
    shown = [f"note: {note}" for note in plan.notes]
    if sizes is not None:
        results = run(scop, {"original": text, "generated": generated}, dict(sizes), threads=(1, 2, 4), timeout_s=time_limit_s,
                      flags=(*FLAGS, f"-I{source.resolve().parent}", *cpp))
        shown.append(_compared(results, exact=not settings.relax_reductions))
    if draw:
        render.draw(plan, draw)
    if export:
        write_text(export, openscop.export(scop, plan.union_map()))
    if output:
        write_text(output, generated)
    if tree:
        shown.append(render.show_tree(plan.tree()))
    elif not output:
        shown.append(generated)
    return "\n".join(shown).rstrip("\n")


def _compared(results, exact: bool) -> str:
    """One line for each number of threads; RuntimeError where programs that must be `exact` differ, a bug of this package."""
    lines = []
    for result in results:
        if result.difference and exact:
            raise RuntimeError(f"generated code differs from the original with {result.threads} threads: {result.difference}")
        outcome = result.difference or "bitwise equal"
        lines.append(f"{result.variant:10s} {result.threads} threads: {result.wall * 1e3:9.3f} ms, {outcome}")
    return "\n".join(lines)
