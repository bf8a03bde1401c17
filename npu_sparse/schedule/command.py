"""What `npu-sparse schedule` does: one C file in, the scheduled C file and what was asked for beside it out."""

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import islpy as isl

from npu_sparse.schedule import config, legality, openscop, render, tune
from npu_sparse.schedule.c.print import generate_file
from npu_sparse.schedule.c.run import FLAGS, run
from npu_sparse.schedule.candidates import Choice
from npu_sparse.schedule.frontend.c import parse_c, read_c
from npu_sparse.schedule.frontend.preprocess import run_cpp
from npu_sparse.schedule.frontend.regions import count_regions
from npu_sparse.schedule.plan import Plan, original
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
    tuned: Path | None = None,
    search_s: float = 0,
) -> str:
    """Schedules the SCoPs of a function of a C file by a shipped strategy, a YAML file or a Config; returns what to print.

    That is the generated C without `output`, the schedule tree with `tree`, and with `sizes` (a value for every scalar argument
    of the function) a comparison of the original and the generated program, run with 1, 2 and 4 threads within `time_limit_s`
    seconds. `pure` names functions whose calls may move, and `cpp` are options for gcc's preprocessor (see parse_c).

    With `tuned`, a file, each region is scheduled by the choice that the file has for it, and not by the strategy. With
    `search_s` a choice is searched for in that many seconds, at `sizes`, and written to the file.

    Raises ValueError in one sentence for any mistake; nothing is written then.
    """
    settings = strategy if isinstance(strategy, config.Config) else config.load(strategy)
    options = {"function": function or None, "cpp": tuple(cpp) or None, "pure": pure}
    text = generated = read_c(source)
    count = count_regions(text if not cpp else run_cpp(source, tuple(cpp)), str(source), function or None)
    if count > 1 and (draw or export):
        raise ScopError(f"{source}: a picture and an OpenScop text must be of one region, got {count}")
    if search_s and (sizes is None or tuned is None or count > 1):
        got = f"{count} regions" if count > 1 else "no sizes" if sizes is None else "no file"
        raise ScopError(f"{source}: a search must have sizes, a file for what it finds, and one region, got {got}")
    flags = (*FLAGS, f"-I{source.resolve().parent}", *cpp)
    made: list[_Made] = []
    for number in range(count, 0, -1):  # from the last: the lines of those before it stay where they are
        scop = parse_c(source, **options, number=number, text=generated)
        if search_s:
            known = tune.load(tuned, scop)
            fastest = tune.search(scop, generated, dict(sizes), budget_s=search_s, threads=os.cpu_count() or 1, flags=flags,
                                separate=separate, start=known.choice if known else "")  # fmt: skip
            tune.save(tuned, scop, fastest)
        new = _by_choice(scop, tuned) if tuned else _by_strategy(scop, settings)
        violations = legality.check(scop, new.tree.get_map(), settings.relax_reductions and not tuned)
        if violations:
            raise ScopError(f"{source}: {violations[0]}")
        if not new.unchanged:
            generated = generate_file(scop, generated, new.tree, separate=separate)
        made.insert(0, new)
    shown = list(dict.fromkeys(f"note: {note}" for each in made for note in each.notes))
    if sizes is not None:
        results = run(_whole([each.scop for each in made]), {"original": text, "generated": generated}, dict(sizes),
                      threads=(1, 2, 4), timeout_s=time_limit_s, flags=flags)  # fmt: skip
        shown.append(_compared(results, exact=not settings.relax_reductions or tuned is not None))
    if draw:
        if made[0].plan is None:
            raise ScopError(f"{source}: a picture must be of a strategy's plan, got a tuned choice")
        render.draw(made[0].plan, draw)
    if export:
        write_text(export, openscop.export(made[0].scop, made[0].tree.get_map()))
    if output:
        write_text(output, generated)
    if tree:
        shown += [render.show_tree(each.tree) for each in made]
    elif not output:
        shown.append(generated)
    return "\n".join(shown).rstrip("\n")


@dataclass(frozen=True)
class _Made:
    """How one region is scheduled."""

    scop: Scop
    tree: isl.Schedule
    notes: tuple[str, ...]
    plan: Plan | None = None
    unchanged: bool = False


def _by_strategy(scop: Scop, settings: config.Config) -> _Made:
    plan = schedule(scop, settings)
    return _Made(scop, plan.tree(), plan.notes, plan)


def _by_choice(scop: Scop, tuned: Path) -> _Made:
    fastest = tune.load(tuned, scop)
    if fastest is None:
        where = scop.function or scop.source
        raise ScopError(f"{tuned} must have a choice for the region of {where}, got none: --search finds one")
    sizes = ", ".join(f"{name} = {value:g}" for name, value in fastest.sizes.items())
    note = f"{fastest.choice}, {fastest.speedup:.3g}x of the original with {fastest.threads} threads at {sizes}"
    failed = tuple(f"{name} was left out: {why[:200]}" for name, why in fastest.failures.items())
    if fastest.choice == tune.ORIGINAL:
        plan = original(scop)
        return _Made(scop, plan.tree(), (note, *failed), plan, unchanged=True)
    return _Made(scop, Choice.parse(fastest.choice).tree(scop), (note, *failed))


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
