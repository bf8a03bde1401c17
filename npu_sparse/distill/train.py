"""The distillation loop: resumable at any moment, the same alone or under torchrun."""

import hashlib
import json
import os
import statistics
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import distributed

from .. import checkpoints
from ..budget import Budget
from ..indexer import Indexer
from ..models.architectures import describe
from ..runs.figures import new_figure, write_figure
from ..runs.machine import machine, machine_line
from ..runs.page import markdown_table
from ..runs.store import RunError, check, open_stage, write_bytes, write_json, write_text
from .config import DistillConfig
from .data import Contexts, batches, row_segments
from .language import language_loss
from .loss import DistillLoss
from .partition import fit_partition, partition_residuals
from .teacher import tap
from .validate import validate

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
PROJECTED = 1e8  # tokens: what an adapter's distillation is said to cost for
RECOMMENDED = Budget(k=512, block=64, dense_below=1024)
WITH_HEADS = dict(k=1024, reduce="softmax_max", exact_last=128)  # hard retrieval with shared supports wants this
BACKENDS = {"cuda": "nccl", "npu": "hccl"}


def run_distill(
    config: DistillConfig, output, *, model=None, tokenizer=None, workers: int = 0, progress: bool = True
) -> dict:
    """Distils an indexer and returns its report.

    `output` then holds adapter/, metrics.jsonl, report.json, report.md and a plot. Killed at any moment and called
    again, it goes on from its last checkpoint to the same loss curve. Under torchrun every process calls it and gets
    an equal share of every step's sequences, so that their number changes the loss curve by rounding only; rank 0
    writes, the others return {}. `workers` processes prepare batches ahead. Raises RunError, ValueError,
    CheckpointError, UnsupportedArchitectureError, or FloatingPointError where the gradients stop being finite.
    """
    with _processes(config) as (rank, world, device):
        return _run(config, Path(output), model, tokenizer, workers, progress and rank == 0, rank, world, device)


def _run(config: DistillConfig, output: Path, model, tokenizer, workers, progress, rank, world, device) -> dict:
    if model is None:
        model, tokenizer = checkpoints.load(config.model, dtype=config.dtype, device=device, progress=progress)
    model.requires_grad_(False).eval()
    limit = describe(model.config).max_positions
    longest = max(*config.lengths, config.validation_length)
    if longest > limit:
        raise ValueError(f"lengths and validation_length must fit the model's {limit} positions, got {longest}")
    contexts = Contexts(config, tokenizer)
    if rank == 0:
        open_stage(output, "distill", config, processes=world)
    _barrier(world)
    indexer = Indexer.for_model(
        model, heads=config.heads, dim=config.dim, partition=config.partition_steps > 0, seed=config.seed
    )
    loss_module = DistillLoss(indexer, config)
    learned = [parameter for parameter in indexer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learned, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    inputs = {"base weights": checkpoints.weights_fingerprint(model), "texts": contexts.digest()}
    state = _resume(output, indexer, optimizer)
    _check_curve(state, output, config)
    _require_same_inputs(state, output, inputs)
    _require_same_step(state["step"], output, world)
    if rank == 0:
        write_text(output / METRICS, "".join(json.dumps(record) + "\n" for record in state["metrics"]))
    if world > 1:
        loss_module = torch.nn.parallel.DistributedDataParallel(loss_module)
    with _progress(config.all_steps, state["step"], progress) as advance:
        ahead = batches(contexts, state["step"], rank, world, workers)
        for step, batch in enumerate(ahead, start=state["step"]):
            began = time.perf_counter()
            loss, per_layer = _step(model, loss_module, optimizer, batch.to(model.device), config, step, world)
            last = step + 1 == config.all_steps
            record = {"step": step, "loss": loss, "lr": config.lr_at(step), "by_layer": per_layer}
            record["tokens"] = batch.numel() * world
            record["seconds"] = time.perf_counter() - began
            if rank == 0 and (last or (step + 1) % config.validate_every == 0):
                record["validation"] = validate(model, indexer, contexts.held_out(), config.budgets)
            state["metrics"].append(record)
            state["step"] = step + 1
            if rank == 0:
                _append(output / METRICS, record)
                if last or (step + 1) % config.save_every == 0:
                    _save(output, indexer, optimizer, state)
            advance(loss)
    if rank > 0:
        return {}
    residuals = None
    if indexer.config.partition:
        fit_partition(model, indexer, contexts)
        residuals = partition_residuals(model, indexer, contexts.held_out())
    return _finish(output, config, indexer, state, residuals, device)


def _step(model, loss_module, optimizer, batch, config, step: int, world: int) -> tuple[float, list[float]]:
    segments = row_segments(config, batch.shape[1], step)
    for group in optimizer.param_groups:
        group["lr"] = config.lr_at(step)
    optimizer.zero_grad(set_to_none=True)
    total, layers = 0.0, 0.0
    language = step >= config.steps
    parts = batch.split(1 if language else config.micro_batch)  # its forward keeps every layer's activations
    for n, part in enumerate(parts):
        share = part.shape[0] / batch.shape[0]
        if language:
            loss = language_loss(model, loss_module.indexer, part, config.sparse_k)
            (loss * share).backward()
            total = total + loss.detach() * share
            continue
        taps = []
        tap(model, part, taps.append)
        waiting = world > 1 and n + 1 < len(parts)
        with loss_module.no_sync() if waiting else nullcontext():
            with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
                loss, per_layer = loss_module(taps, segments)
            (loss * share).backward()
        total = total + loss.detach() * share
        layers = layers + per_layer * share
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
    if not bool(norm.isfinite()):
        raise FloatingPointError(
            f"gradients must be finite, got a norm of {float(norm)} at step {step}: try a smaller lr"
        )
    optimizer.step()
    if language:
        return float(total), []
    if world > 1:
        distributed.all_reduce(total)
        distributed.all_reduce(layers)
        total, layers = total / world, layers / world
    return float(total), layers.tolist()


def _save(output: Path, indexer: Indexer, optimizer, state: dict) -> None:
    """Replaces one file atomically, so that weights, optimizer moments and the loss curve always belong together."""
    from safetensors.torch import save

    tensors = {f"indexer.{name}": tensor.detach().cpu().contiguous() for name, tensor in indexer.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{name}": value.detach().cpu() for name, value in moments.items()})
    curve = json.dumps({name: state[name] for name in ("step", "metrics", "inputs")})
    metadata = {"curve": curve, "sha256": _digest(tensors, curve)}
    write_bytes(output / CHECKPOINT, save(tensors, metadata=metadata))


def _digest(tensors: dict, curve: str = "") -> str:
    digest = hashlib.sha256(curve.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _append(path: Path, record: dict) -> None:
    """Appends a line for people who watch the run. If a kill cuts it short, it is rewritten from the checkpoint."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with open(descriptor, "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise RunError(f"{path} could not be written ({error.strerror})") from error


def _resume(output: Path, indexer: Indexer, optimizer) -> dict:
    """Where the run resumes: `{"step", "metrics"}` and, once something was trained, its "inputs"."""
    from safetensors import SafetensorError, safe_open

    path = output / CHECKPOINT
    if not path.exists():
        return {"step": 0, "metrics": []}
    try:
        with safe_open(path, "pt", device="cpu") as file:
            metadata = file.metadata()
            state = json.loads(metadata["curve"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        # checkpoints of version 0.1 do not say what they were trained on, and their digest is that of the tensors
        told = "inputs" in state
        if metadata["sha256"] != _digest(tensors, metadata["curve"] if told else ""):
            raise ValueError("its sha256 differs")
        _restore(indexer, optimizer, tensors)
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise RunError(f"{path} is damaged ({reason}): delete it to begin again") from error
    return state


def _check_curve(state, output: Path, config: DistillConfig) -> None:
    """Raises RunError unless `state` holds all that the report reads."""
    try:
        _check_metrics(state, config)
    except ValueError as error:
        raise RunError(f"{output / CHECKPOINT} is damaged ({error}): delete it to begin again") from error


def _require_same_inputs(state: dict, output: Path, inputs: dict[str, str]) -> None:
    """Records what is trained on, or raises RunError where the checkpoint was trained on something else."""
    told = state.setdefault("inputs", inputs)
    if changed := [name for name in inputs if told.get(name) != inputs[name]]:
        raise RunError(f"{output} was trained with other {' and '.join(changed)} than there are now: choose another directory")


def _check_metrics(state, config: DistillConfig) -> None:
    recall = {str(k): float for k in config.budgets}
    part = {"kl": float, "mass_recall": recall, "support_recall": recall}
    check(state, {"step": int, "metrics": [{"step": int, "loss": float, "lr": float}]})
    check(state.get("inputs", {}), {str: str})
    validations = [record["validation"] for record in state["metrics"] if "validation" in record]
    check(validations, [{**part, "by_kind": {str: part}, "by_layer": [{"layer": int, **part}]}])
    ended = state["step"] == config.all_steps
    whole = 0 <= state["step"] == len(state["metrics"]) <= config.all_steps
    if not whole or (ended and "validation" not in state["metrics"][-1]):
        raise ValueError(f"its curve must have a record for each of {state['step']} steps, got {len(state['metrics'])}")


def _restore(indexer: Indexer, optimizer, tensors: dict) -> None:
    indexer.load_state_dict({n.removeprefix("indexer."): t for n, t in tensors.items() if n.startswith("indexer.")})
    moments: dict[int, dict] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def _finish(
    output: Path, config: DistillConfig, indexer: Indexer, state: dict, residuals: dict | None, device: str
) -> dict:
    last = state["metrics"][-1]["validation"]
    divergences, language = state["metrics"][: config.steps], state["metrics"][config.steps :]
    timed = [m["tokens"] / m["seconds"] for m in divergences[1:] if "tokens" in m]  # the first compiles; 0.1 did not count
    result = {
        "stage": "distill",
        "evidence": "distilled",
        "config": config.to_dict(),
        "machine": machine(device),
        "parameters": sum(p.numel() for p in indexer.parameters()),
        "final_loss": divergences[-1]["loss"],
        "tokens_per_s": statistics.median(timed) if timed else None,
        "validation": last,
        "partition": residuals,
        "curve": [{"step": m["step"], "loss": m["loss"]} for m in divergences],
        "language_curve": [{"step": m["step"], "loss": m["loss"]} for m in language],
        "validations": [{"step": m["step"], **m["validation"]} for m in state["metrics"] if "validation" in m],
    }
    indexer.evidence = "distilled"
    indexer.budget = RECOMMENDED.replace(**WITH_HEADS if indexer.config.partition else {}).to_dict()
    text = _markdown(result)
    indexer.save_pretrained(output / "adapter", card=text)
    write_json(output / "report.json", result)
    write_text(output / "report.md", text)
    write_figure(output / "curve.png", _figure(result))
    return result


def _markdown(result: dict) -> str:
    config, last = result["config"], result["validation"]
    rows = [
        {"k": k} | {
            f"{kind} {what}": part[f"{what}_recall"][k] for kind, part in _kinds(last) for what in ("mass", "support")
        }
        for k in last["mass_recall"]
    ]
    return (
        f"# npu-sparse indexer for {config['model']} (evidence: distilled)\n\n"
        f"{config['heads']} index head(s) x {config['dim']}, {result['parameters']:,} parameters, distilled from the "
        f"model's own dense attention with a frozen backbone: {config['steps']} steps of {config['tokens']} tokens, "
        f"lengths {', '.join(map(str, config['lengths']))}, loss {config['loss']}{_language_words(result)}, "
        f"seed {config['seed']}. Texts: "
        f"{', '.join(config['texts'])}; tasks mixed in ({config['task_fraction']:.0%} of steps): "
        f"{', '.join(config['tasks']) or 'none'} (other seeds and documents than evaluation).\n\n"
        f"Validation at {config['validation_length']} tokens on held-out documents, measured: KL {last['kl']:.4f} "
        "nats; recall of the oracle's top k, per query, as attention mass and as share of its keys:\n\n"
        f"{markdown_table(rows)}{_partition_words(result)}\n{_speed_words(result)}Machine: {machine_line(result['machine'])}.\n"
    )


def _language_words(result: dict) -> str:
    curve = result["language_curve"]
    if not curve:
        return ""
    return (
        f", then {len(curve)} steps of language-model loss through a soft selection ({curve[0]['loss']:.3f} to "
        f"{curve[-1]['loss']:.3f} nats a token)"
    )


def _partition_words(result: dict) -> str:
    partition = result["partition"]
    if partition is None:
        return "\nIt has no partition heads.\n"
    return (
        f"\nPartition heads, by least squares over {result['config']['partition_steps']} more steps' batches: on the same "
        f"held-out documents they miss the exact log-partition by {partition['residual']:.3f} nats (root mean square; "
        f"{partition['residual_in_block']:.3f} within 64 neighbouring queries), which varies by {partition['spread']:.3f}.\n"
    )


def _speed_words(result: dict) -> str:
    rate = result["tokens_per_s"]
    if rate is None:
        return ""
    hours = PROJECTED / rate / 3600
    said = f"{PROJECTED / 1e6:.0f}M tokens project to {hours:.2g} hours"
    return f"Median {rate:,.0f} tokens of context a second in training; {said}.\n\n"


def _kinds(validation: dict) -> list[tuple[str, dict]]:
    return [("all", validation), *sorted(validation["by_kind"].items())]


def _figure(result: dict):
    figure, axes = new_figure(2)
    loss_axis, recall_axis = axes[0]
    loss_axis.plot([m["step"] for m in result["curve"]], [m["loss"] for m in result["curve"]], lw=0.8, label="training")
    steps = [m["step"] for m in result["validations"]]
    loss_axis.plot(steps, [m["kl"] for m in result["validations"]], "o-", label="held-out KL")
    loss_axis.set(xlabel="step", ylabel="loss (nats)", yscale="log", title="Does the indexer learn?")
    loss_axis.legend()
    for k in result["validation"]["mass_recall"]:
        recall_axis.plot(steps, [m["mass_recall"][k] for m in result["validations"]], "o-", label=f"k = {k}")
    recall_axis.set(xlabel="step", ylabel="share of the oracle's mass", title="How much of the oracle does it find?")
    recall_axis.legend()
    return figure


@contextmanager
def _processes(config: DistillConfig):
    """Joins the processes that torchrun started, if it did: gives `(rank, world, device of this process)`."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield 0, 1, config.device
        return
    if config.lm_steps:
        raise ValueError(f"lm_steps must be 0 under torchrun, got {config.lm_steps}: run that stage in one process")
    uneven = [length for length in config.lengths if config.tokens // length % world]
    if uneven:
        raise ValueError(
            f"tokens must give each of {world} processes the same number of sequences, got {config.tokens}: "
            f"{config.tokens // uneven[0]} of length {uneven[0]}"
        )
    device = config.device
    if device != "cpu":
        if ":" in device:
            raise ValueError(f"device must have no index under torchrun, got {device!r}")
        device = f"{device}:{os.environ['LOCAL_RANK']}"
        torch.get_device_module(config.device).set_device(device)
    joined = not distributed.is_initialized()
    if joined:
        distributed.init_process_group(BACKENDS.get(config.device, "gloo"))
    yield distributed.get_rank(), world, device
    if joined:  # not reached after an error, when the others may be waiting: the end of this process ends them
        distributed.barrier()  # a process that ends while its last collective is being freed is aborted by the interpreter
        distributed.destroy_process_group()


def _barrier(world: int) -> None:
    if world > 1:
        distributed.barrier()


def _require_same_step(step: int, output: Path, world: int) -> None:
    if world == 1:
        return
    steps = [0] * world
    distributed.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise RunError(
            f"{output} must be one directory that all processes see, got checkpoints of steps {steps}"
        )


@contextmanager
def _progress(steps: int, done: int, shown: bool):
    """Gives `advance(loss)`, to be called after every step."""
    if not shown:
        yield lambda loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("distil"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as shower:
        task = shower.add_task("distil", total=steps, completed=done, loss="")
        yield lambda loss: shower.update(task, advance=1, loss=f"loss {loss:.4f}")
