"""The command line: parse, then call one function.

Options are the fields of each stage's config, so that they cannot drift apart. Nothing heavy is imported before a
command is known: `--help` has to be quick.
"""

import dataclasses
import inspect
import os
import re
import sys
import typing
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from . import cann
from .budget import FORMER
from .errors import FAILURE, UNFINISHED, USER_ERROR, ActionableError, full_device_error

RUN_OPTIONS = {  # options of a stage's function that its config does not have, because they change no figure
    "workers": (int, 0, "Processes that prepare batches ahead."),
    "shard": (str, "0/1", "I/N: compute every N-th cell, beginning with the I-th (from 0)."),
    "budget_s": (float | None, None, "Seconds: stop after a length where the next would end later, with exit status 3."),
    "profile": (Path | None, None, "Directory for a chrome trace of one prefill of every variant and length."),
    "crossover": (Path | None, None, "File of measured lengths for dense_below=auto to add to."),
}
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
INTERRUPTED = 130  # typer's exit status of a command that Ctrl-C ended


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand: what it says of itself, and where its config and its function live."""

    help: str
    module: str = ""
    config: str = ""
    run: str = ""


COMMANDS = {
    "doctor": Command("What this machine can run, and the command that gets the rest."),
    "demo": Command("The whole story on a real checkpoint, in minutes: oracle, indexer, sparse prefill, one report."),
    "oracle": Command(
        "How much dense attention a checkpoint needs: top-k of its own attention mass, by budget and sharing.",
        "npu_sparse.oracle", "OracleConfig", "run_oracle",
    ),
    "distill": Command(
        "Train an indexer from the model's own dense attention, backbone frozen; resumes where it was killed.",
        "npu_sparse.distill", "DistillConfig", "run_distill",
    ),
    "eval": Command(
        "Score dense, oracle, indexer and controls on the same prompts, with the three gaps.",
        "npu_sparse.measure.quality", "EvalConfig", "run_eval",
    ),
    "ttft": Command(
        "Time to first token of dense and sparse prefill, interleaved, with the stage breakdown.",
        "npu_sparse.measure.ttft", "TtftConfig", "run_ttft",
    ),
    "frontier": Command(
        "Quality against TTFT for the same model, length, budget, indexer and path: one table, one figure.",
        "npu_sparse.measure.frontier", "FrontierConfig", "run_frontier",
    ),
    "fit": Command(
        "Fit a budget to a checkpoint: more keys for the layers, or the lengths, that lose attention without them.",
        "npu_sparse.measure.fit", "FitConfig", "run_fit",
    ),
    "lm-eval": Command("Lm-eval's own command line, with the model npu-sparse; its help: npu-sparse lm-eval run --help."),
    "lm-eval-tasks": Command(
        "Write long-context tasks as a folder for lm-eval's --include_path.",
        "npu_sparse.integrations.lm_eval_tasks", "LmEvalTasksConfig", "write_lm_eval_tasks",
    ),
    "schedule": Command("Reorder, tile and parallelise the loops of a C file: a configurable polyhedral scheduler."),
    "build": Command("Compile the AscendC kernels, for the host emulation or for the card."),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 could not be done, 2 a mistake in what was asked for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = _app(arguments)(arguments, prog_name="npu-sparse", standalone_mode=True)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            return _failed("interrupted: the same command goes on where it can", FAILURE)
        return stop.code if isinstance(stop.code, int) else FAILURE
    except KeyboardInterrupt:  # before the command began; later typer makes it an exit of its own
        return _failed("interrupted", FAILURE)
    except Exception as error:  # a user's mistake is one sentence; anything else is a bug and keeps its traceback
        status = _status(error)
        if status is None or os.environ.get("NPU_SPARSE_TRACEBACK"):
            raise
        return _failed(cann.explained(error) or str(error).strip() or type(error).__name__, status)
    return status or 0


def _app(arguments: list[str]) -> typer.Typer:
    """The application. Only the command that `arguments` ask for is built."""
    wanted = next((a for a in arguments if not a.startswith("-")), None)
    app = typer.Typer(
        help="Oracle-guided sparse prefill for existing long-context checkpoints.",
        no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    app.callback()(_root)
    for name, command in COMMANDS.items():
        handed_on = PASSED_ON if name == "lm-eval" else None
        app.command(name, help=command.help, context_settings=handed_on)(_function(name, command) if name == wanted else _unbuilt)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from npu_sparse import __version__

        typer.echo(f"npu-sparse {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Takes the options that stand before a command."""


def _unbuilt() -> None:
    """Stands for a command that was not asked for."""


def _function(name: str, command: Command):
    if name == "doctor":
        return _doctor
    if name == "demo":
        return _demo
    if name == "lm-eval":
        return _lm_eval
    if name == "schedule":
        return _schedule
    if name == "build":
        return _build
    return _stage(name, command)


def _doctor(json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    from npu_sparse import doctor

    raise typer.Exit(doctor.main(["--json"] if json else []))


def _demo(
    output: Annotated[Path, typer.Option(help="Directory of the report.")] = Path("runs/demo"),
    model: Annotated[str, typer.Option(help="Demo checkpoint: smollm2-135m or gemma3-270m.")] = "smollm2-135m",
) -> None:
    from npu_sparse.demo import run_demo

    run_demo(output, model)


def _lm_eval(context: typer.Context) -> None:
    from npu_sparse.integrations.harness import run_harness

    run_harness(context.args)


def _schedule(
    source: Annotated[Path, typer.Argument(help="C file with the loops between #pragma scop and #pragma endscop.")],
    strategy: Annotated[str, typer.Option(help="A shipped strategy, such as pluto or feautrier, or a YAML file.")] = "cpu-vector",
    output: Annotated[Path | None, typer.Option(help="Where the new C file goes; without it, it is printed.")] = None,
    function: Annotated[str, typer.Option(help="Whose loops; needed where several functions have a scop.")] = "",
    separate: Annotated[bool, typer.Option("--separate", help="Own code for full tiles.")] = False,
    tree: Annotated[bool, typer.Option("--tree", help="Print the schedule instead of code.")] = False,
    draw: Annotated[Path | None, typer.Option(help="Picture of the iterations before and after, .png or .svg.")] = None,
    openscop: Annotated[Path | None, typer.Option(help="Where an OpenScop text for other tools goes.")] = None,
    sizes: Annotated[str, typer.Option(help="ni=100,alpha=1.5: compile, run both programs and compare them.")] = "",
    time_limit: Annotated[float, typer.Option(help="Seconds that the runs of --sizes may take.", min=0.1)] = 300,
    include: Annotated[list[str] | None, typer.Option("-I", help="Directory of headers: gcc preprocesses the file.")] = None,
    define: Annotated[list[str] | None, typer.Option("-D", help="NAME or NAME=VALUE: gcc preprocesses the file.")] = None,
    pure: Annotated[str, typer.Option(help="g,h: functions without state and side effects that the loops may call.")] = "",
    tuned: Annotated[Path | None, typer.Option(help="File of the fastest schedules found: not the strategy.")] = None,
    search: Annotated[float, typer.Option(help="Seconds to look for the fastest schedule at --sizes.", min=0)] = 0,
) -> None:
    try:
        from npu_sparse.schedule.command import schedule_file
    except ModuleNotFoundError as error:
        raise ValueError(f"scheduling needs {error.name}: pip install -e '.[schedule]' in a clone of npu-sparse") from error
    try:
        values = {name.strip(): float(value) for name, value in _pairs(sizes).items()} if sizes else None
    except ValueError as error:
        raise ValueError(f"sizes must be numbers, such as n=100,alpha=1.5, got {sizes!r}") from error
    text = schedule_file(
        source, strategy, output=output, function=function, separate=separate, tree=tree, draw=draw, export=openscop,
        sizes=values, time_limit_s=time_limit, tuned=tuned, search_s=search,
        pure=[name.strip() for name in pure.split(",") if name.strip()],
        cpp=[*(f"-I{path}" for path in include or ()), *(f"-D{macro}" for macro in define or ())],
    )  # fmt: skip
    if text:
        typer.echo(text)


def _build(
    target: Annotated[str, typer.Argument(help="emulated: g++, for this machine's CPU; npu: CANN's bisheng, for Ascend 910B/C.")],
) -> None:
    from npu_sparse import ascendc

    ascendc.build(target, report=typer.echo)


def _stage(name: str, command: Command):
    """A function whose signature is the stage's config: `model` as argument, the other fields as options."""
    module = import_module(command.module)
    config_class, run = getattr(module, command.config), getattr(module, command.run)
    help_of = _attribute_help(config_class)
    hints = typing.get_type_hints(config_class)

    def stage(**options) -> None:
        output = options.pop("output") or Path("runs") / f"{name}-{Path(options['model'] or options.get('shape') or '').name}"
        extra = {key: options.pop(key) for key in RUN_OPTIONS if key in options and key not in hints}
        if "shard" in extra:
            extra["shard"] = _shard(extra["shard"])
        former = {key: options.pop(key) for key in list(options) if key in FORMER and key not in hints}
        changes = ",".join(f"{key}={str(value).lower()}" for key, value in former.items() if value is not None)
        if changes:
            base = options["budget"]
            options["budget"] = f"{base},{changes}".strip(",") if isinstance(base, str) else _budget(changes, base)
        config = config_class(**options)
        result = run(config, output, **extra)
        if result:  # of several processes only the first has a report
            _show(output)
            if "budget_s" in extra and result["missing"]:
                raise typer.Exit(UNFINISHED)

    parameters = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY,
            annotation=_annotation(field, hints[field.name], help_of.get(field.name, "")),
            default=_default(field),
        )
        for field in dataclasses.fields(config_class)
    ]  # fmt: skip
    if "budget" in hints:  # the options of version 0.1 for the fields of the Budget
        grids = ("k", "block") if "ks" in hints else ("k", "block", "reduce", "recent") if "budgets" in hints else ()
        for former in FORMER:
            if former not in hints and former not in grids:
                kind = bool if former == "tail" else str
                hidden = Annotated[kind | None, typer.Option(hidden=True)]
                parameters.append(inspect.Parameter(former, inspect.Parameter.KEYWORD_ONLY, annotation=hidden, default=None))
    output = Annotated[Path | None, typer.Option(help=f"Run directory; default runs/{name}-MODEL.")]
    parameters.append(inspect.Parameter("output", inspect.Parameter.KEYWORD_ONLY, annotation=output, default=None))
    accepted = inspect.signature(run).parameters
    for option, (kind, default, text) in RUN_OPTIONS.items():
        if option in accepted:
            hint = Annotated[kind, typer.Option(help=text)]
            parameters.append(inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, annotation=hint, default=default))
    stage.__signature__ = inspect.Signature(parameters)
    stage.__annotations__ = {p.name: p.annotation for p in parameters}
    return stage


def _annotation(field, hint, text: str):
    if field.name == "model":
        return Annotated[str, typer.Argument(help=text)]
    if field.name == "budget":
        from npu_sparse.budget import Budget

        told = f"{text} {' '.join(f'{name}: {words}' for name, words in Budget.field_help().items())}"
        parser = _budget if hint is Budget else str
        return Annotated[str, typer.Option(help=told, parser=parser, metavar="FIELD=VALUE,...", show_default=False)]
    if hint == int | str:  # checked by the config
        return Annotated[str, typer.Option(help=text, metavar="N or LENGTH=N,...")]
    if field.name == "variants":
        return Annotated[tuple, typer.Option(help=text, parser=_variants, metavar="A,B,...", show_default=False)]
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        option = typer.Option(
            help=text, parser=lambda value: _items(value, item), metavar="A,B,...", show_default=False
        )
        return Annotated[tuple, option]
    if typing.get_origin(hint) not in (None, typing.Union) and "Mapping" in str(hint):
        return Annotated[dict, typer.Option(help=text, parser=_pairs, metavar="A=B,...", show_default=False)]
    return Annotated[hint, typer.Option(help=text)]


def _default(field):
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return inspect.Parameter.empty
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if isinstance(value, dict):
        return ",".join(f"{key}={item}" for key, item in value.items())
    if field.name == "budget":
        return str(value)
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def _budget(value, base=None):
    from npu_sparse.budget import Budget

    if isinstance(value, Budget):
        return value
    try:
        return Budget.parse(value, base)
    except ValueError as error:
        raise typer.BadParameter(str(error)) if base is None else error from error


def _variants(value) -> tuple:
    from npu_sparse.measure.variants import split_names

    return value if isinstance(value, tuple) else split_names(value)


def _items(value, item: type) -> tuple:
    if isinstance(value, tuple):
        return value
    try:
        return tuple(item(part) for part in str(value).split(",") if part)
    except ValueError as error:
        raise typer.BadParameter(f"must be a comma-separated list of {item.__name__}, got {value!r}") from error


def _pairs(value) -> dict:
    if isinstance(value, dict):
        return value
    pairs = [part.partition("=") for part in str(value).split(",") if part]
    if any(not mark for _, mark, _ in pairs):
        raise typer.BadParameter(f"must be a comma-separated list of NAME=VALUE, got {value!r}")
    names = [key.strip() for key, _, _ in pairs]
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"must have each name once, got {value!r}")
    return {key: item for key, _, item in pairs}


def _shard(value: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", value)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"shard must be I/N with 0 <= I < N, got {value!r}")
    return int(match[1]), int(match[2])


def _attribute_help(config_class) -> dict[str, str]:
    """The sentences of the docstring's Attributes section, by field name."""
    section = inspect.getdoc(config_class).partition("Attributes:")[2]
    sentences: dict[str, str] = {}
    for entry in re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {8,}.*)*)", section, re.M):
        for name in entry[0].split(","):
            sentences[name.strip()] = " ".join(entry[1].split())
    return sentences


def _show(output: Path) -> None:
    path = Path(output) / "report.md"
    if path.exists():
        typer.echo(path.read_text())
        typer.echo(f"Report: {path}")


def _status(error: Exception) -> int | None:
    """The exit status of an error that a user can act on, None for a bug."""
    if isinstance(error, ActionableError):
        return error.exit_status
    if isinstance(error, (ValueError, TypeError, FileNotFoundError, NotADirectoryError)):
        return USER_ERROR
    if isinstance(error, (OSError, FloatingPointError, full_device_error())) or type(error) is RuntimeError:
        return FAILURE
    return None


def _failed(message: str, status: int) -> int:
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    return status
