"""The documentation runs: its code, its commands, its links. CONTRIBUTING.md says how to write for this."""

import functools
import importlib
import inspect
import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from npu_sparse import Indexer, checkpoints, cli
from npu_sparse.ops import dispatch
from npu_sparse.schedule.c.others import PLUTO
from npu_sparse.schedule.command import schedule_file
from npu_sparse.testing import Backend, tiny_model

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    page for page in (*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md")
    if page.exists()
)  # fmt: skip
FENCE = re.compile(r"^( *)(`{3,})([\w-]*) *\n(.*?)^\1\2 *$", re.M | re.S)
NOT_RUN = re.compile(r"<!-- not run: \S.* -->\n\Z")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)")
TARGET = re.compile(r"\[[^\]]+\]: (\S+)")
BACKENDS = (Backend("reference", "reference", "cpu"), Backend("emulated", "kernel", "cpu"))


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, and whether its page says that it does not run."""

    page: Path
    line: int
    language: str
    text: str
    not_run: bool

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text()
    fenced = [
        Block(page, text.count("\n", 0, m.start()) + 1, m[3], inspect.cleandoc("\n" + m[4]) + "\n",
              bool(NOT_RUN.search(text[: m.start()])))
        for m in FENCE.finditer(text)
    ]  # fmt: skip
    return [block for block in fenced if block.language in languages]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def commands() -> list[tuple[str, list[str]]]:
    """`(place, words)` of every shell command, without variables set in front of it."""
    listed = []
    for block in itertools.chain.from_iterable(blocks(page, "console", "bash", "sh") for page in PAGES):
        text = block.text.replace("\\\n", " ")
        lines = text.splitlines()
        if block.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        for line in lines:
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                listed.append((str(block), words))
            if words[:1] == ["make"]:
                listed += [(f"{block} make {words[1]}", step) for step in recipe(words[1])]
    return listed


def recipe(target: str) -> list[list[str]]:
    """The words of every command that `make target` runs itself."""
    match = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)*)", (ROOT / "Makefile").read_text(), re.M)
    return [shlex.split(line.strip().lstrip("@-")) for line in (match[1].splitlines() if match else [])]


def arguments_of(words: list[str]) -> list[str] | None:
    """What follows `npu-sparse`, or `-m npu_sparse` after python or torchrun; None for another command."""
    program = Path(words[0]).name
    if program == "npu-sparse":
        return words[1:]
    if re.match(r"python|torchrun", program) and "npu_sparse" in words and words[words.index("npu_sparse") - 1] == "-m":
        return words[words.index("npu_sparse") + 1 :]
    return None


COMMANDS = [(place, arguments) for place, words in commands() if (arguments := arguments_of(words)) is not None]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    vocabulary = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=["input_ids", "attention_mask"])


@pytest.fixture
def stand_ins(tokenizer, monkeypatch, tmp_path):
    """A tiny model for every checkpoint, an untrained indexer for every adapter, a registry of operators to add to."""
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=4096)

    signature = inspect.signature(checkpoints.load)

    def load(*args, **kwargs):
        signature.bind(*args, **kwargs)
        return model, tokenizer

    def from_pretrained(directory, **kwargs):
        return Indexer.for_model(model, dim=64)

    monkeypatch.setattr(checkpoints, "load", load)
    monkeypatch.setattr(Indexer, "from_pretrained", from_pretrained)
    monkeypatch.setattr(dispatch, "OPERATORS", dict(dispatch.OPERATORS))
    monkeypatch.setattr(dispatch, "_KERNELS", dict(dispatch._KERNELS))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.name)
def test_code_runs(page, stand_ins):
    names = {"__name__": "docs"}
    for block in blocks(page, "python"):
        if not block.not_run:
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
    run_tests([value for name, value in names.items() if name.startswith("test_")])


def run_tests(functions) -> None:
    """Calls test functions for every parameter of their marks and every back-end that needs no device."""
    for function in functions:
        marks = [mark.args for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
        choices = [[(name, value) for value in values] for name, values in marks]
        if "backend" in inspect.signature(function).parameters:
            choices.append([("backend", backend) for backend in BACKENDS])
        for chosen in itertools.product(*choices):
            torch.compiler.reset()
            function(**dict(chosen))


@pytest.mark.parametrize("block", [b for p in PAGES for b in blocks(p, "python") if b.not_run], ids=str)
def test_code_that_does_not_run_compiles(block):
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("place, arguments", COMMANDS, ids=[f"{p} {a[0]}" for p, a in COMMANDS])
def test_commands_parse_and_their_configs_hold(place, arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    if {"-h", "--help", "--version"} & set(arguments):
        assert cli.main(arguments) == 0, capsys.readouterr().err
        return
    calls = []
    command = cli.COMMANDS[arguments[0]]
    if command.run:
        owner, name = importlib.import_module(command.module), command.run
    else:
        module, name = {
            "doctor": ("doctor", "main"),
            "demo": ("demo", "run_demo"),
            "build": ("ascendc", "build"),
            "schedule": ("schedule.command", "schedule_file"),
            "lm-eval": ("integrations.harness", "run_harness"),
        }[arguments[0]]
        owner = importlib.import_module(f"npu_sparse.{module}")

    @functools.wraps(getattr(owner, name))  # options follow from its signature
    def recorded(*args, **kwargs):
        calls.append(args)
        return 0

    monkeypatch.setattr(owner, name, recorded)
    status = cli.main(arguments)
    assert (status, len(calls)) == (0, 1), capsys.readouterr().err


def test_no_command_is_missing_from_the_quickstart():
    documented = {arguments[0] for place, arguments in COMMANDS if "quickstart" in place}
    assert documented >= set(cli.COMMANDS)


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    wanted = {(place, words[1]) for place, words in commands() if words[0] == "make"}
    wanted |= {(page.name, target) for page in PAGES for target in re.findall(r"`make ([\w-]+)", prose(page))}
    assert not [use for use in wanted if use[1] not in targets]


def test_options_in_prose_exist():
    known = {"--help", "--version", "--json", "--hypothesis-profile", "--backend", "--headers"}
    for command in cli.COMMANDS.values():
        if command.run:
            module = importlib.import_module(command.module)
            fields = getattr(module, command.config).__dataclass_fields__
            known |= {f"--{name.replace('_', '-')}" for name in (*fields, "output", "shard", "workers")}
    known |= {option for variant in PLUTO.values() for option in variant.options}  # polycc's, which the scheduler's page names
    known |= {f"--{name.replace('_', '-').removesuffix('-s')}" for name in inspect.signature(schedule_file).parameters}
    for script in (ROOT / "scripts").glob("*.py"):
        known |= set(re.findall(r"\"(--[a-z][a-z-]*)\"", script.read_text()))
    used = {(page.name, option) for page in PAGES for code in re.findall(r"`([^`\n]+)`", prose(page))
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code)}  # fmt: skip
    assert not [use for use in used if use[1] not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    broken = []
    for link in (*LINK.findall(text), *TARGET.findall(text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or not target.resolve().is_relative_to(ROOT):
            broken.append(link)
        elif anchor and anchor not in anchors(target):
            broken.append(link)
    assert not broken


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_documentation_is_there():
    names = {page.name for page in PAGES}
    assert names >= {"quickstart.md", "concepts.md", "architecture.md", "add-an-op.md", "benchmarking.md"}
    assert COMMANDS


def test_every_page_is_linked_on_the_front():
    front = {path for path in TARGET.findall(prose(ROOT / "README.md")) + LINK.findall(prose(ROOT / "README.md"))}
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} - front == set()


def test_every_shipped_adapter_is_named_in_the_quickstart():
    sentence = re.search(r"Adapters for (.+?) come with\s+the package", prose(ROOT / "docs" / "quickstart.md"), re.S)[1]
    shipped = {path.parent.name for path in (ROOT / "npu_sparse" / "adapters").glob("*/config.json")}
    assert set(re.findall(r"`([^`]+)`", sentence)) == shipped
