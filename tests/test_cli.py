import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import npu_sparse
from npu_sparse import Budget, cli
from npu_sparse.ascendc import BuildError
from npu_sparse.checkpoints import CheckpointError
from npu_sparse.indexer import AdapterError
from npu_sparse.models.architectures import UnsupportedArchitectureError
from npu_sparse.ops import KernelUnavailableError
from npu_sparse.runs.store import RunError
from npu_sparse.schedule.scop import ScopError
from npu_sparse.schedule.solve.ilp import SolverTimeoutError
from npu_sparse.testing import tiny_model

STAGES = [name for name, command in cli.COMMANDS.items() if command.config]
BESIDE_CONFIG = {"output", *cli.RUN_OPTIONS}
ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "npu_sparse", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, **options)


def config_class(name: str):
    return getattr(import_module(cli.COMMANDS[name].module), cli.COMMANDS[name].config)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer of a token per word, as a directory."""
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_model("llama").save_pretrained(directory)
    vocabulary = {"<unk>": 0, **{f"word{n}": n for n in range(1, 100)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def distillation(checkpoint, tmp_path_factory) -> list[str]:
    """The command line of the smallest distillation, without its output directory."""
    texts = tmp_path_factory.mktemp("texts")
    for n in range(4):
        (texts / f"{n}.txt").write_text(" ".join(f"word{(n * 31 + i * i) % 100}" for i in range(300)))
    return [
        "distill", str(checkpoint), "--texts", str(texts), "--tasks", "", "--task-fraction", "0", "--lengths", "64",
        "--tokens", "64", "--steps", "1", "--warmup", "0", "--dim", "64", "--rows", "32", "--segment", "16",
        "--budgets", "4", "--validation-length", "64", "--validation-prompts", "1", "--dtype", "float32",
    ]  # fmt: skip


def sentence_of(capsys) -> str:
    """The one line on stderr, after transformers' own bar."""
    shown = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("Loading weights")]
    assert len(shown) == 1 and shown[0].startswith("error: ")
    return shown[0]


@pytest.fixture
def captured(monkeypatch):
    """`captured(name, *options)` gives the config with which a stage would run."""

    def capture(name: str, *options: str):
        configs = []

        def stub(config, output):
            configs.append(config)

        monkeypatch.setattr(import_module(cli.COMMANDS[name].module), cli.COMMANDS[name].run, stub)
        assert cli.main([name, "tiny", *options]) == 0
        return configs[0]

    return capture


# Help and version


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from npu_sparse.cli import main; status = main(['--help']);"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'rich', 'safetensors'} & set(sys.modules);"
        "sys.exit(status or ', '.join(heavy) or 0)"
    )
    took = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        took.append(time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in cli.COMMANDS)
    assert min(took) < 0.6


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    assert cli.main([name, "--help"]) == 0
    shown = capsys.readouterr()
    assert f"npu-sparse {name}" in shown.out and not shown.err
    assert cli.COMMANDS[name].help.split()[0] in shown.out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"npu-sparse {npu_sparse.__version__}\n"


def test_without_arguments_the_commands_are_listed(capsys):
    assert cli.main([]) == cli.USER_ERROR
    shown = capsys.readouterr()
    assert all(name in shown.out + shown.err for name in cli.COMMANDS)


def test_doctor_says_what_runs_here(capsys):
    assert cli.main(["doctor"]) in (0, 1)
    assert "torch" in capsys.readouterr().out
    cli.main(["doctor", "--json"])
    assert isinstance(json.loads(capsys.readouterr().out), (dict, list))


@pytest.mark.parametrize("name", STAGES)
def test_options_are_the_fields_of_the_config(name):
    command = typer.main.get_command(cli._app([name])).commands[name]
    fields = {field.name for field in dataclasses.fields(config_class(name))}
    parameters = {parameter.name: parameter for parameter in command.params}
    hidden = {parameter.name for parameter in command.params if getattr(parameter, "hidden", False)}
    assert hidden <= set(cli.FORMER) and not hidden & fields  # the former options of a Budget's fields
    assert fields <= set(parameters) - hidden <= fields | BESIDE_CONFIG
    assert [parameter.name for parameter in command.params if parameter.param_type_name == "argument"] == ["model"]


@pytest.mark.parametrize("name", STAGES)
def test_defaults_are_those_of_the_config(name, captured):
    assert captured(name) == config_class(name)("tiny")


@pytest.mark.parametrize("name", ["oracle", "distill", "eval"])
def test_every_field_has_a_sentence_of_help(name):
    explained = cli._attribute_help(config_class(name))
    fields = {field.name for field in dataclasses.fields(config_class(name))}
    assert fields <= set(explained)


def test_options_reach_the_config_with_their_types(captured):
    options = ["--lengths", "64,128", "--texts", "a,b", "--lr", "0.01", "--loss", "sparse", "--tasks", "vt"]
    config = captured("distill", *options, "--steps", "7")
    assert (config.lengths, config.texts, config.lr) == ((64, 128), ("a", "b"), 0.01)
    assert (config.loss, config.tasks, config.steps) == ("sparse", ("vt",), 7)
    gridded = captured("oracle", "--budget", "k=8|16,block=1,tail")
    assert (gridded.budgets, gridded.blocks, gridded.budget) == ((8, 16), (1,), "tail")
    assert captured("oracle", "--budgets", "8,16", "--blocks", "1", "--tail") == gridded
    assert captured("distill", "--budget", "k=8|16") == captured("distill", "--budgets", "8,16")
    oracle = captured("oracle", "--chat", "--budgets", "8", "--tasks", "", "--controls", "random")
    assert (oracle.chat, oracle.budgets, oracle.tasks, oracle.controls) == (True, (8,), (), ("random",))
    assert captured("eval", "--qa-files", "qa_1=x.json,qa_2=y.json").qa_files == {"qa_1": "x.json", "qa_2": "y.json"}


@pytest.mark.parametrize("name", ["eval", "ttft"])
def test_a_budget_has_one_option_and_the_former_ones_still_say_it(captured, name):
    spelled = captured(name, "--budget", "k=256,block=16,tail")
    assert spelled.budget == Budget(k=256, block=16, tail=True)
    assert captured(name, "--k", "256", "--block", "16", "--tail") == spelled
    assert captured(name, "--budget", "k=256,tail", "--block", "16") == spelled
    assert captured(name, "--candidates", "1024", "--key-block", "32").budget == Budget(candidates=1024, key_block=32)


def test_a_grid_takes_the_other_fields_of_a_budget(captured):
    config = captured("frontier", "--ks", "64,128", "--blocks", "1,16", "--budget", "sink=4,reduce=mean")
    assert config.budget_at(128, 16) == Budget(k=128, block=16, sink=4, reduce="mean")
    assert captured("frontier", "--sink", "4", "--reduce", "mean").budget == "reduce=mean,sink=4"


def test_variants_take_fields_of_a_budget(captured):
    config = captured("eval", "--variants", "dense,indexer:block=16,k=64,local")
    assert config.variants == ("dense", "indexer:block=16,k=64", "local")


def test_every_field_of_the_budget_is_explained_once(capsys):
    assert cli.main(["eval", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(f" {name}: " in shown for name in Budget.__dataclass_fields__)


@pytest.mark.parametrize(
    "option, message",
    [("k=three", "k must be a whole number"), ("colour=3", "budget must name fields among"), ("k=8,k=9", "k must be given once")],
)
def test_a_budget_that_is_none_is_a_sentence(capsys, option, message):
    assert cli.main(["eval", "tiny", "--budget", option]) == cli.USER_ERROR
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


# Exit statuses


def test_a_stage_runs_and_shows_its_report(distillation, tmp_path, capsys):
    output = tmp_path / "run"
    assert cli.main([*distillation, "--output", str(output)]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{(output / 'report.md').read_text()}\nReport: {output / 'report.md'}\n"
    assert (output / "adapter" / "model.safetensors").exists()
    assert cli.main([*distillation, "--seed", "1", "--output", str(output)]) == cli.USER_ERROR
    assert sentence_of(capsys).endswith("holds another run (seed = 0 there, 1 now): choose another directory")


@pytest.mark.parametrize(
    "arguments, status, sentence",
    [
        (["distill", "./no/such/model"], 1, "no checkpoint at ./no/such/model"),
        (["oracle", "./no/such/model"], 1, "no checkpoint at ./no/such/model"),
        (["eval", "./no/such/model", "--variants", "dense,oracle"], 1, "no checkpoint at ./no/such/model"),
        (["ttft", "./no/such/model"], 1, "no checkpoint at ./no/such/model"),
        (["eval", "tiny"], 2, "adapter must name an indexer's directory"),
        (["distill", "tiny", "--lengths", "64,many"], 2, "must be a comma-separated list of int, got '64,many'"),
        (["distill", "tiny", "--steps", "many"], 2, "Invalid value for '--steps'"),
        (["distill", "tiny", "--steps", "0"], 2, "steps must be >= 1, got 0"),
        (["distill", "tiny", "--loss", "mse"], 2, "loss must be one of kl, sparse, both, shared, got 'mse'"),
        (["distill", "tiny", "--tasks", "niah_singel_1"], 2, "task must be a known name, got 'niah_singel_1'"),
        (["eval", "tiny", "--tasks", "niah_singel_1"], 2, "niah_singel_1"),
        (["eval", "tiny", "--qa-files", "qa_1"], 2, "must be a comma-separated list of NAME=VALUE, got 'qa_1'"),
        (["oracle", "tiny", "--budgets", "8,8"], 2, "budgets must name each value once, got [8, 8]"),
        (["eval", "tiny", "--shard", "3/2"], 2, "shard must be I/N with 0 <= I < N, got '3/2'"),
        (["distill", "tiny", "--stepz", "3"], 2, "No such option"),
        (["distil", "tiny"], 2, "No such command"),
        (["distill"], 2, "Missing argument"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, status, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == status
    shown = capsys.readouterr()
    assert sentence.lower() in shown.err.lower() and "Traceback" not in shown.err and not shown.out
    lines = [line for line in shown.err.splitlines() if line.strip() and not line.startswith(("Usage:", "Try "))]
    assert len(lines) == 1


@pytest.mark.parametrize("name", ["eval", "ttft"])
def test_an_adapter_that_is_none_is_one_sentence(name, checkpoint, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    command = [name, str(checkpoint), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "run")]
    length = ["--length", "256", "--count", "1"] if name == "eval" else ["--lengths", "256"]
    assert cli.main([*command, *length, "--k", "16", "--block", "16"]) == cli.USER_ERROR
    assert f"adapter {tmp_path / 'adapter'} must be a directory with config.json" in sentence_of(capsys)


def test_texts_that_do_not_exist_are_one_sentence(distillation, tmp_path, capsys):
    assert cli.main([*distillation, "--texts", "no-such-texts", "--output", str(tmp_path / "run")]) == cli.USER_ERROR
    assert sentence_of(capsys).endswith("got 'no-such-texts'")
    assert not (tmp_path / "run").exists()


class Fault(Exception):
    """What no user can act on."""


def failing(monkeypatch, error: BaseException) -> list[str]:
    def stub(config, output):
        raise error

    monkeypatch.setattr(import_module("npu_sparse.distill"), "run_distill", stub)
    return ["distill", "tiny"]


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error, status",
    [
        (ValueError("k must be >= 1, got 0"), 2),
        (FileNotFoundError(2, "No such file or directory", "x.json"), 2),
        (PermissionError(13, "Permission denied", "x.json"), 1),
        (RuntimeError("out of luck"), 1),
        (FloatingPointError("hidden states of layer 3 must be finite"), 1),
        (RunError("output directory x holds another run"), 2),
        (caused(RunError("x could not be written (No space left on device)"), OSError(28, "full")), 1),
        (KeyboardInterrupt(), 1),
    ],
)
def test_the_status_tells_mistakes_from_failures(error, status, monkeypatch, capsys):
    assert cli.main(failing(monkeypatch, error)) == status
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and len(shown.splitlines()) == 1
    assert (str(error) or "interrupted") in shown


@pytest.mark.parametrize(
    "error, status",
    [
        (CheckpointError("x could not be fetched"), 1),
        (KernelUnavailableError("op has no kernel on 'cpu'"), 1),
        (BuildError("g++ must be installed"), 1),
        (SolverTimeoutError("no schedule within 5 s"), 1),
        (AdapterError("adapter x must have format 1"), 2),
        (UnsupportedArchitectureError("model type 'gpt2' is not supported"), 2),
        (ScopError("a.c:3: no loop"), 2),
        (torch.OutOfMemoryError("attach with workspace_mib=64"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_errors_own_their_status(error, status, monkeypatch, capsys):
    assert cli.main(failing(monkeypatch, error)) == status
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_error_is_not_known_by_its_name(monkeypatch):
    for name in ("KernelUnavailableError", "OutOfMemoryError", "RuntimeError", "BuildError"):
        with pytest.raises(Exception, match="a bug") as raised:
            cli.main(failing(monkeypatch, type(name, (Exception,), {})("a bug")))
        assert type(raised.value).__name__ == name


@pytest.mark.parametrize("error", [RecursionError("a bug"), NotImplementedError("a bug"), KeyError("a bug")], ids=repr)
def test_a_bug_of_a_builtin_kind_keeps_its_traceback(error, monkeypatch):
    with pytest.raises(type(error), match="a bug"):
        cli.main(failing(monkeypatch, error))


def test_a_bug_keeps_its_traceback(monkeypatch):
    with pytest.raises(Fault):
        cli.main(failing(monkeypatch, Fault("bug")))


def test_a_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("NPU_SPARSE_TRACEBACK", "1")
    with pytest.raises(ValueError):
        cli.main(["distill", "tiny", "--steps", "0"])


def test_interrupting_while_a_command_is_loaded_is_one_sentence(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupted)
    assert cli.main(["distill", "tiny"]) == 1
    assert capsys.readouterr().err == "error: interrupted\n"


def test_ctrl_c_ends_a_running_command_with_one_sentence(distillation, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "npu_sparse", *distillation, "--steps", "100000", "--output", str(output)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            while not (output / "metrics.jsonl").exists() and process.poll() is None:
                time.sleep(0.02)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            _, shown = process.communicate(timeout=300)  # a busy disk may hold up the checkpoint that it is writing
        finally:
            process.kill()
    assert process.returncode == 1
    assert "error: interrupted: the same command goes on where it can" in shown
    assert "Traceback" not in shown


def test_a_mistake_ends_the_process_with_status_2():
    done = run("distill", "tiny", "--steps", "0", env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: steps must be >= 1, got 0\n")


def test_a_shape_needs_no_model_and_a_time_budget_says_that_lengths_are_left(tmp_path, capsys):
    options = ["--shape", "qwen3.5-tiny", "--lengths", "40,64", "--budget", "k=16,block=8", "--runs", "40=2,64=1"]
    command = ["ttft", *options, "--warmup", "0", "--stage-runs", "1", "--dtype", "float32", "--output", str(tmp_path)]
    assert cli.main([*command, "--budget-s", "0"]) == 3
    shown = capsys.readouterr()
    assert "stopped for --budget-s before 64 tokens" in shown.err and "Not measured yet: 64 tokens" in shown.out
    first = (tmp_path / "records/40.json").read_text()
    assert cli.main(command) == 0
    assert (tmp_path / "records/40.json").read_text() == first and (tmp_path / "records/64.json").exists()
    assert cli.main([*command, "--runs", "3"]) == cli.USER_ERROR  # another run
