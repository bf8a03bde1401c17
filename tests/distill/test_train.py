import errno
import json
import os
import socket
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from npu_sparse import Indexer, IndexerConfig
from npu_sparse.distill import run_distill, train
from npu_sparse.distill.data import Contexts
from npu_sparse.distill.validate import validate
from npu_sparse.runs.store import RunError


def curve_file(output):
    return output / "metrics.jsonl"


class Stopped(BaseException):
    """Ends a run at a chosen step, as Ctrl-C would."""


@pytest.fixture
def run(model, tokenizer):
    def run(config, output):
        return run_distill(config, output, model=model, tokenizer=tokenizer, progress=False)

    return run


@pytest.fixture
def stop_at(monkeypatch):
    """`stop_at(step, error)` makes the training of that step raise; `stop_at(None)` lets it go on."""
    step_of, plan = train._step, {}

    def stopping(model, loss_module, optimizer, batch, config, step, world):
        if step == plan.get("step"):
            raise plan["error"]
        return step_of(model, loss_module, optimizer, batch, config, step, world)

    monkeypatch.setattr(train, "_step", stopping)
    return lambda step, error=Stopped: plan.update(step=step, error=error)


# What a run gives


def test_a_run_leaves_its_files(finished, curve_of):
    config, output, result = finished
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter", "checkpoint.safetensors", "config.json", "curve.png", "metrics.jsonl", "report.json", "report.md",
    ]  # fmt: skip
    assert json.loads((output / "config.json").read_text())["steps"] == config.steps
    assert json.loads((output / "report.json").read_text()) == json.loads(json.dumps(result))
    records = curve_of(output)
    assert [record["step"] for record in records] == list(range(6))
    assert [record["step"] for record in records if "validation" in record] == [3, 5]
    assert [record["lr"] for record in records] == [config.lr_at(step) for step in range(6)]
    for record in records:
        assert record["loss"] == pytest.approx(sum(record["by_layer"]) / 2, rel=1e-5)
    assert result["evidence"] == "distilled" and result["final_loss"] == records[-1]["loss"]
    assert set(records[-1]["validation"]["mass_recall"]) == {"4", "16"}


def test_the_adapter_serves_the_model_it_was_made_for(finished, model):
    _, output, result = finished
    indexer = Indexer.from_pretrained(output / "adapter")
    indexer.check_base(model)
    assert indexer.evidence == "distilled" and indexer.budget["k"] > 0
    assert sum(p.numel() for p in indexer.parameters()) == result["parameters"]
    assert (output / "adapter" / "README.md").read_text() == (output / "report.md").read_text()


def test_the_loss_falls_and_recall_rises_above_an_untrained_indexers(make_config, run, model, tokenizer, tmp_path):
    config = make_config(steps=60, warmup=5, lr=3e-3, rows=0, lengths=(64,), tokens=256, validate_every=60)
    untrained = validate(
        model, Indexer.for_model(model, dim=64), Contexts(config, tokenizer).held_out(), config.budgets
    )
    result = run(config, tmp_path)
    losses = [record["loss"] for record in result["curve"]]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert result["validation"]["kl"] < 0.8 * untrained["kl"]
    for k in ("4", "16"):
        assert result["validation"]["mass_recall"][k] > untrained["mass_recall"][k] + 0.02
        assert result["validation"]["support_recall"][k] > untrained["support_recall"][k] + 0.02


def test_the_backbone_gets_no_gradient_and_does_not_change(make_config, run, model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(make_config(steps=2), tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_every_step_runs_at_its_own_learning_rate(make_config, run, monkeypatch, tmp_path):
    rates, step_of = [], torch.optim.AdamW.step

    def step(optimizer, *args, **kwargs):
        rates.extend(group["lr"] for group in optimizer.param_groups)
        return step_of(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    config = make_config(steps=4)
    run(config, tmp_path)
    assert rates == [config.lr_at(step) for step in range(4)]


def test_gradients_are_clipped(make_config, run, monkeypatch, tmp_path):
    norms, step_of = [], torch.optim.AdamW.step

    def step(optimizer, *args, **kwargs):
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.cat(gradients).norm()))
        return step_of(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run(make_config(steps=2, clip=1e-3), tmp_path)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_the_same_config_gives_the_same_run(finished, run, tmp_path, curve_of, weights_of):
    config, output, _ = finished
    run(config, tmp_path)
    assert curve_of(tmp_path) == curve_of(output)
    assert weights_of(tmp_path) == weights_of(output)


def test_micro_batches_change_the_curve_by_rounding_only(make_config, run, tmp_path):
    losses = []
    for size in (1, 2, 3):  # three sequences, or two: 3 as 1 + 1 + 1, 2 + 1 and 3
        result = run(make_config(micro_batch=size, loss="both", sparse_k=8), tmp_path / str(size))
        losses.append([record["loss"] for record in result["curve"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    "changes", [{"heads": 4}, {"dim": 128}, {"loss": "sparse", "sparse_k": 8}, {"loss": "shared"}, {"rows": 0}]
)
def test_every_geometry_and_loss_trains(make_config, run, tmp_path, changes):
    result = run(make_config(steps=3, **changes), tmp_path)
    assert all(0 < record["loss"] < 20 for record in result["curve"])
    assert Indexer.from_pretrained(tmp_path / "adapter").config.heads == changes.get("heads", 1)


def test_a_bfloat16_model_is_distilled_in_float32(make_config, model, tokenizer, tmp_path):
    config = make_config(steps=3, dtype="bfloat16")
    result = run_distill(config, tmp_path, model=deepcopy(model).bfloat16(), tokenizer=tokenizer, progress=False)
    assert all(0 < record["loss"] < 20 for record in result["curve"])
    with safe_open(tmp_path / train.CHECKPOINT, "pt") as file:
        assert all(file.get_tensor(name).dtype == torch.float32 for name in file.keys())


def test_progress_is_shown_on_stderr(make_config, model, tokenizer, tmp_path, capsys):
    run_distill(make_config(steps=2), tmp_path, model=model, tokenizer=tokenizer)
    shown = capsys.readouterr()
    assert "2/2" in shown.err and "loss" in shown.err and not shown.out


# Stopped and resumed


def test_metrics_grow_as_it_runs(make_config, run, stop_at, tmp_path, curve_of):
    stop_at(3)
    with pytest.raises(Stopped):
        run(make_config(save_every=100), tmp_path)
    assert [record["step"] for record in curve_of(tmp_path)] == [0, 1, 2]
    assert not (tmp_path / train.CHECKPOINT).exists()


@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_a_stopped_run_goes_on_to_the_same_curve(finished, run, stop_at, tmp_path, curve_of, weights_of, step):
    config, output, _ = finished
    stop_at(step, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path)
    stop_at(None)
    run(config, tmp_path)
    assert curve_of(tmp_path) == curve_of(output)
    assert weights_of(tmp_path) == weights_of(output)


def test_a_line_cut_short_by_a_kill_is_written_again(finished, run, stop_at, tmp_path, curve_of):
    config, output, _ = finished
    stop_at(5)
    with pytest.raises(Stopped):
        run(config, tmp_path)
    whole = curve_file(tmp_path).read_text()
    curve_file(tmp_path).write_text(whole[:-20])
    stop_at(None)
    run(config, tmp_path)
    assert curve_of(tmp_path) == curve_of(output)


def test_a_finished_run_is_not_trained_again(make_config, run, stop_at, tmp_path, weights_of):
    config = make_config(steps=2)
    first = run(config, tmp_path)
    weights = weights_of(tmp_path)
    curve_file(tmp_path).unlink()
    stop_at(0)
    assert run(config, tmp_path)["curve"] == first["curve"]
    assert weights_of(tmp_path) == weights
    assert len(curve_file(tmp_path).read_text().splitlines()) == 2


def test_another_config_is_refused(finished, run, make_config):
    _, output, _ = finished
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    with pytest.raises(RunError, match=r"holds another run \(lr = 0.001 there, 0.002 now\): choose another directory"):
        run(make_config(lr=2e-3), output)
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()} == before


def test_a_directory_of_something_else_is_refused(make_config, run, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="must be empty or hold an earlier run, found 'thesis.tex'"):
        run(make_config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def empty(data: bytes) -> bytes:
    return b""


def flipped(data: bytes) -> bytes:
    place = len(data) - 1000
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def header_only(data: bytes) -> bytes:
    return data.replace(b'"curve"', b'"curse"')


def short_of_a_tensor(data: bytes) -> bytes:
    tensors = load(data)
    tensors.pop("indexer.layers.0.k_norm.bias")
    return save(tensors, metadata={"curve": '{"step": 2, "metrics": []}', "sha256": train._digest(tensors)})


@pytest.mark.parametrize("damage", [truncated, empty, flipped, header_only, short_of_a_tensor])
def test_a_damaged_checkpoint_is_one_sentence(make_config, run, stop_at, tmp_path, damage):
    config = make_config()
    stop_at(3)
    with pytest.raises(Stopped):
        run(config, tmp_path)
    stop_at(None)
    path = tmp_path / train.CHECKPOINT
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=r"checkpoint.safetensors is damaged \(.+\): delete it to begin again") as caught:
        run(config, tmp_path)
    assert "\n" not in str(caught.value)
    path.unlink()
    assert len(run(config, tmp_path)["curve"]) == 6


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_previous_checkpoint_usable(finished, run, monkeypatch, tmp_path, curve_of, call):
    config, output, _ = finished
    works, checkpoints = getattr(os, call), []

    def full(first, *rest):
        name = str(rest[0]) if rest else os.readlink(f"/proc/self/fd/{first}")
        checkpoints.append(name) if train.CHECKPOINT in name else None
        if len(checkpoints) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return works(first, *rest)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(RunError, match="checkpoint.safetensors could not be written .No space left on device."):
        run(config, tmp_path)
    monkeypatch.setattr(os, call, works)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert train._resume(tmp_path, *fresh(config))["step"] == 2
    run(config, tmp_path)
    assert curve_of(tmp_path) == curve_of(output)


def fresh(config):
    """An untrained indexer of the tiny model's geometry and its optimizer."""
    indexer = Indexer(IndexerConfig(32, (0, 1), 16, config.heads, config.dim, partition=True))
    return indexer, torch.optim.AdamW([p for p in indexer.parameters() if p.requires_grad])


def test_other_base_weights_or_texts_are_refused_and_change_nothing(make_config, run, stop_at, model, tokenizer, tmp_path):
    """The same config, but what its names stand for has changed: one curve would mix two runs."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(10):
        (folder / f"{n}.txt").write_text(f"text {n} " + "river hill stone cloud ember " * 400)
    config, output = make_config(texts=(str(folder),)), tmp_path / "run"
    stop_at(4)
    with pytest.raises(Stopped):
        run(config, output)
    stop_at(None)
    before = (output / train.CHECKPOINT).read_bytes()
    other = deepcopy(model)
    other.model.embed_tokens.weight.data.add_(0.25)
    with pytest.raises(RunError, match="was trained with other base weights than there are now: choose another directory"):
        run_distill(config, output, model=other, tokenizer=tokenizer, progress=False)
    (folder / "3.txt").write_text("another text 3 " + "willow lantern harbor " * 600)
    with pytest.raises(RunError, match="was trained with other texts than there are now: choose another directory"):
        run(config, output)
    assert (output / train.CHECKPOINT).read_bytes() == before


def without_a_validation(state: dict) -> None:
    del state["metrics"][-1]["validation"]


def with_a_text_for_a_loss(state: dict) -> None:
    state["metrics"][1]["loss"] = "low"


def a_step_behind(state: dict) -> None:
    state["metrics"].pop()


def of_no_such_inputs(state: dict) -> None:
    state["inputs"] = ["weights"]


def nested(state: dict) -> None:
    for _ in range(900):
        state["metrics"] = [state["metrics"]]


@pytest.mark.parametrize("damage", [without_a_validation, with_a_text_for_a_loss, a_step_behind, of_no_such_inputs, nested])
def test_a_curve_that_lacks_what_the_report_reads_is_one_sentence(make_config, run, tmp_path, damage):
    config, path = make_config(steps=3, validate_every=2), tmp_path / train.CHECKPOINT
    run(config, tmp_path)
    with safe_open(path, "pt") as file:
        state = json.loads(file.metadata()["curve"])
    tensors = load(path.read_bytes())
    damage(state)
    curve = json.dumps(state)
    path.write_bytes(save(tensors, metadata={"curve": curve, "sha256": train._digest(tensors, curve)}))
    with pytest.raises(RunError, match=r"checkpoint.safetensors is damaged \(.+\): delete it to begin again") as caught:
        run(config, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_version_0_1_goes_on(finished, run, stop_at, tmp_path, curve_of):
    """It does not say what it was trained on, and its digest is that of its tensors alone."""
    config, output, _ = finished
    stop_at(4)
    with pytest.raises(Stopped):
        run(config, tmp_path)
    stop_at(None)
    path = tmp_path / train.CHECKPOINT
    with safe_open(path, "pt") as file:
        state = json.loads(file.metadata()["curve"])
    tensors = load(path.read_bytes())
    del state["inputs"]
    path.write_bytes(save(tensors, metadata={"curve": json.dumps(state), "sha256": train._digest(tensors)}))
    run(config, tmp_path)
    assert curve_of(tmp_path) == curve_of(output)


def test_a_loss_that_is_not_finite_ends_the_run(make_config, model, tokenizer, tmp_path):
    broken = deepcopy(model)
    broken.model.layers[1].input_layernorm.weight.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match="gradients must be finite, got a norm of nan at step 0"):
        run_distill(make_config(), tmp_path, model=broken, tokenizer=tokenizer, progress=False)
    assert not (tmp_path / train.CHECKPOINT).exists()


def test_lengths_beyond_the_models_positions_are_refused(make_config, run, tmp_path):
    with pytest.raises(ValueError, match="must fit the model's 1024 positions, got 1025"):
        run(make_config(validation_length=1025), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Several processes


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_give_the_curve_of_one(make_config, run, tmp_path):
    config = make_config(tokens=384, loss="both", sparse_k=8, heads=2, save_every=4)  # 3 or 2 sequences for each
    options = []
    for name, value in config.to_dict().items():
        if name != "model":
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            options += [f"--{name.replace('_', '-')}", text]
    local = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]  # needs no host name
    command = [sys.executable, "-m", "torch.distributed.run", *local]
    command += ["-m", "npu_sparse", "distill", config.model, "--output", str(tmp_path / "two"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Report: ") == 1
    alone = run(config, tmp_path / "one")
    together = json.loads((tmp_path / "two" / "report.json").read_text())
    assert [record["loss"] for record in together["curve"]] == pytest.approx(
        [record["loss"] for record in alone["curve"]], rel=1e-4
    )
    assert together["validation"]["kl"] == pytest.approx(alone["validation"]["kl"], rel=1e-3)
    ours, theirs = (Indexer.from_pretrained(tmp_path / name / "adapter").state_dict() for name in ("one", "two"))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0.02, atol=2e-3)  # the adapter is bf16
    assert json.loads((tmp_path / "two" / "config.json").read_text())["processes"] == 2


def test_sequences_that_cannot_be_shared_evenly_are_refused(make_config, run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    rule = "tokens must give each of 2 processes the same number of sequences, got 192: 3 of length 64"
    with pytest.raises(ValueError, match=rule):
        run(make_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
