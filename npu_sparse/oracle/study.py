"""Runs an oracle study: refuses what cannot be measured, measures cell by cell, and writes the report.

Every cell - a variant at a budget, a prompt's layers, the noise floor - is kept in its own file as soon as it is
measured, so an interrupted study loses the cell it was in and no other.
"""

import copy
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoints, tasks
from ..budget import Budget
from ..measure.prompts import text_prompts
from ..models.architectures import Architecture, describe
from ..ops.dispatch import require_kernels, uses_kernel
from ..runs.figures import write_figure
from ..runs.machine import machine
from ..runs.page import say
from ..runs.store import Cells, RunError, check_shard, open_stage, write_json, write_text
from ..selectors import Local, Oracle, Random, Selector
from ..tasks.catalogue import task_named
from . import figures, page, quality
from .config import OracleConfig, Variant, granularities, variants
from .layers import measure_layers
from .summary import summarise


def run_oracle(config: OracleConfig, output, *, model=None, tokenizer=None, shard: tuple[int, int] = (0, 1)) -> dict:
    """The report of an oracle study, also written to `output` as report.json, report.md and PNG figures.

    `output` gets config.json first and every finished cell in cells/; running the same config again measures what is
    missing and writes the report anew. While other shards have cells to finish, it is
    `{"complete": False, "missing": [...]}`.

    Args:
        model, tokenizer: used in place of loading `config.model`; both or none.
        shard: `(i, n)`: this process measures cells i, i + n, i + 2n, ...; n processes may share one directory.

    Raises ValueError (RunError for the directory) before anything is measured: texts that are empty or too
    short, an unknown task, a model that is not supported, a used directory. CheckpointError and KernelUnavailableError
    as their modules do.
    """
    if not isinstance(config, OracleConfig):
        raise TypeError(f"config must be an OracleConfig, got {type(config).__name__}")
    check_shard(shard)
    output = Path(output)
    if output.is_file():
        raise RunError(f"output must be a directory, got the file {output}")
    if output.is_dir() and any(not entry.name.startswith(".") for entry in output.iterdir()):
        open_stage(output, "oracle", config)  # refuses a used directory before a model is loaded, and writes nothing
    study = _prepare(config, model, tokenizer)
    open_stage(output, "oracle", config)
    cells = _cells(study, output / "cells")
    _measure(study, cells, shard)
    if missing := cells.missing():
        return {"complete": False, "missing": missing}
    return _write(study, _records(study, cells), output)


@dataclass
class Study:
    """Everything a study measures with: `prompts` are `(name, int64 [T])`, `examples` are by task."""

    config: OracleConfig
    model: torch.nn.Module
    tokenizer: object
    architecture: Architecture
    prompts: list[tuple[str, Tensor]]
    examples: dict[str, list[tasks.Example]]

    @cached_property
    def inputs(self) -> str:
        """16 hex digits of the weights, prompts and examples: cells of other inputs are never mixed in."""
        digest = hashlib.sha256(checkpoints.weights_fingerprint(self.model).encode())
        for _, ids in self.prompts:
            digest.update(ids.numpy().tobytes())
        for example in self.all_examples:
            digest.update(example.prompt.encode())
        return digest.hexdigest()[:16]

    @property
    def all_examples(self) -> list[tasks.Example]:
        return [example for examples in self.examples.values() for example in examples]

    @property
    def ids(self) -> list[Tensor]:
        return [ids for _, ids in self.prompts]

    @cached_property
    def dense(self) -> list[Tensor]:
        """`hidden_states` of every prompt under the model's own attention."""
        return [quality.hidden_states(self.model, ids, self.config.position_stride) for ids in self.ids]


def _prepare(config: OracleConfig, model, tokenizer) -> Study:
    if (model is None) != (tokenizer is None):
        raise ValueError("model and tokenizer must be given together")
    for task in config.tasks:
        if task_named(task).needs == "qa_file" and config.qa_file is None:
            raise ValueError(f"{task} needs qa_file: the path of a question file")
    _check_device(config)
    try:
        documents = tasks.documents(config.texts)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    if model is None:
        model, tokenizer = checkpoints.load(config.model, dtype=config.dtype, device=config.device)
    architecture = describe(model.config)
    if model.dtype != getattr(torch, config.dtype) or model.device.type != torch.device(config.device).type:
        raise ValueError(
            f"model must be {config.dtype} on {config.device}, as the config says, got {model.dtype} on {model.device}"
        )
    if config.length > architecture.max_positions:
        raise ValueError(f"length must fit the model's {architecture.max_positions} positions, got {config.length}")
    prompts = text_prompts(tokenizer, documents, length=config.length, count=config.prompts, seed=config.seed)
    examples = {task: _examples(config, task, tokenizer, documents) for task in config.tasks}
    return Study(config, model.eval(), tokenizer, architecture, prompts, examples)


def _check_device(config: OracleConfig) -> None:
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ValueError(f"device must be a torch device such as cpu or cuda, got {config.device!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that this torch has, got {config.device!r}: torch.cuda is not available")
    if uses_kernel(config.impl, device.type):
        require_kernels(device.type)


def _examples(config: OracleConfig, task: str, tokenizer, documents) -> list[tasks.Example]:
    try:
        return tasks.generate(
            task, tokenizer, length=config.length, count=config.task_count, seed=config.seed, haystack=documents,
            qa_file=config.qa_file, chat=config.chat,
            max_new_tokens=min(task_named(task).max_new_tokens, config.task_new_tokens),
        )  # fmt: skip
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error


SCORE_FORM = {"kl": float, "agreement": float, "kl_second_half": float, "agreement_second_half": float}
LAYER_FORM = {
    "layer": int, "heads": {"all", "kv"}, "block": int, "reduce": (str, None), "k": int, "retained_mean": float,
    "retained_p5": float, "relative_mean": float, "relative_p5": float, "doubled_mean": float, "doubled_p5": float,
    "output_error": float, str: float,
}  # fmt: skip
OVERLAP_FORM = {"layer": int, "heads": {"all", "kv"}, "k": int, "jaccard": float, str: float}


def _measures(study: Study) -> dict[str, Callable[[], dict]]:
    """What measures each cell, by name, the floor and the layers first."""
    config = study.config
    measures: dict[str, Callable[[], dict]] = {}
    if config.tasks:
        measures["dense"] = lambda: {"scores": _scores(study, study.model)}
    if config.floor_dtype:
        measures[f"noise-{config.floor_dtype}"] = lambda: _noise_floor(study)
    for n in range(config.layer_prompts):
        measures[f"layers-{n}"] = lambda n=n: _layers(study, n)
    for variant in variants(config, study.architecture.kv_heads):
        measures[variant.cell] = lambda variant=variant: _end_to_end(study, variant)
    return measures


def _cells(study: Study, directory: Path) -> Cells:
    config, layers = study.config, len(study.architecture.layers)
    scores = {task: [float, config.task_count] for task in config.tasks}
    retained = [float, layers]
    rows = len(granularities(config, study.architecture.kv_heads)) * len(config.budgets) * layers
    overlaps = len(config.heads if study.architecture.kv_heads > 1 else ("all",)) * len(config.budgets) * layers

    def form(name: str) -> dict:
        common = {"inputs": str, "seconds": float}
        if name == "dense":
            return {**common, "scores": scores}
        if name.startswith("layers-"):
            return {**common, "layers": [LAYER_FORM, rows], "overlap": [OVERLAP_FORM, overlaps], "path": SCORE_FORM}
        kept = None if name.startswith("noise-") else retained
        return {**common, "prompts": [{**SCORE_FORM, "retained_by_layer": kept}, config.prompts], "scores": scores}

    def upgrade(name: str, record: dict) -> dict:
        return {"cell": name, **record}

    return Cells(directory, {name: {"cell": name} for name in _measures(study)}, form, upgrade)


def _measure(study: Study, cells: Cells, shard: tuple[int, int]) -> None:
    """Measures the unfinished cells of this shard."""
    measures = _measures(study)
    if there := _records(study, cells):
        say(f"oracle: {len(there)} of {len(measures)} cells are there already")

    def measure(name: str) -> dict:
        started = time.perf_counter()
        cell = {"inputs": study.inputs, **measures[name](), "seconds": round(time.perf_counter() - started, 3)}
        number = list(measures).index(name) + 1
        say(f"oracle: [{number}/{len(measures)}] {name}{_first_figures(cell)}, {cell['seconds']:.1f} s")
        return cell

    cells.compute(measure, shard)


def _records(study: Study, cells: Cells) -> dict[str, dict]:
    records = cells.records()
    if any(record["inputs"] != study.inputs for record in records.values()):
        raise RunError(
            f"{cells.directory.parent} was measured with other weights or texts than there are now: choose another directory"
        )
    return records


def _first_figures(cell: dict) -> str:
    if "prompts" not in cell:
        return ""
    kl = sum(prompt["kl"] for prompt in cell["prompts"]) / len(cell["prompts"])
    agreement = sum(prompt["agreement"] for prompt in cell["prompts"]) / len(cell["prompts"])
    return f": KL {kl:.4g} nats, agreement {agreement:.1%}"


def _end_to_end(study: Study, variant: Variant) -> dict:
    config = study.config
    selector = _selector(variant, config)
    budget = config.budget_of(variant)
    prompts = quality.measure(
        study.model, study.ids, study.dense, study.model, selector=selector, budget=budget, impl=config.impl,
        stride=config.position_stride, workspace_mib=config.workspace_mib,
    )  # fmt: skip
    return {"prompts": prompts, "scores": _scores(study, study.model, selector, budget)}


def _selector(variant: Variant, config: OracleConfig) -> Selector:
    if variant.selector == "local":
        return Local(variant.sink)
    if variant.selector == "random":
        return Random(config.seed)
    return Oracle(per_kv=variant.heads == "kv")


def _noise_floor(study: Study) -> dict:
    dense = study.dense
    other = copy.deepcopy(study.model)
    dtype = getattr(torch, study.config.floor_dtype)
    for parameter in other.parameters():  # buffers stay: rotary frequencies are fp32 in a model of any dtype
        parameter.data = parameter.data.to(dtype)
    prompts = quality.measure(other, study.ids, dense, study.model, stride=study.config.position_stride)
    return {"prompts": prompts, "scores": _scores(study, other)}


def _scores(study: Study, model, selector: Selector | None = None, budget: Budget | None = None) -> dict:
    return {
        task: quality.task_scores(
            model, study.tokenizer, examples, selector=selector, budget=budget, impl=study.config.impl,
            workspace_mib=study.config.workspace_mib,
        )
        for task, examples in study.examples.items()
    }


def _layers(study: Study, n: int) -> dict:
    config = study.config
    return measure_layers(
        study.model, study.ids[n], study.dense[n], granularities(config, study.architecture.kv_heads), config.budgets,
        impl=config.impl, stride=config.position_stride, tail=config.tail, workspace_mib=config.workspace_mib,
    )  # fmt: skip


def _write(study: Study, cells: dict[str, dict], output: Path) -> dict:
    report = {
        "stage": "oracle",
        "config": study.config.to_dict(),
        "model": {**checkpoints.identity(study.model), **study.architecture.to_dict()},
        "machine": machine(study.config.device),
        "prompts": [name for name, _ in study.prompts],
        "inputs": study.inputs,
        "seconds": round(sum(cell["seconds"] for cell in cells.values()), 1),
        **summarise(study.config, study.architecture.kv_heads, cells),
    }
    write_json(output / "report.json", report)
    drawn = figures.draw(report)
    for name, figure in drawn.items():
        write_figure(output / name, figure)
    write_text(output / "report.md", page.markdown(report, list(drawn)))
    say(f"oracle: wrote {output / 'report.md'}")
    return report
