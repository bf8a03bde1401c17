"""docs/vllm.md says of versions, options and refusals what the code does, and its commands are what vLLM's parser takes."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from npu_sparse.integrations.vllm import refusals, versions
from npu_sparse.integrations.vllm.options import Options

PAGE = (Path(__file__).parents[3] / "docs" / "vllm.md").read_text()


def section(title: str) -> str:
    return re.search(rf"^#+ {title}\n(.*?)(?=^#+ |\Z)", PAGE, re.M | re.S)[1]


def column(text: str) -> list[str]:
    """The first cells of a table, without its head."""
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][2:]


def commands() -> list[list[str]]:
    """The arguments of every `vllm serve` and api_server of the page, shell variables replaced."""
    sparse = ["--load-format", "npu_sparse", "--model-loader-extra-config", '{"adapter": "a", "budget": "k=64"}']
    expanded = []
    for line in PAGE.splitlines():
        words = shlex.split(line, comments=True) if re.search(r"vllm serve |openai.api_server ", line) and "|" not in line else []
        begin = next((n + 1 for n, word in enumerate(words) if word in ("serve", "vllm.entrypoints.openai.api_server")), None)
        if begin is not None and words[0] != "-":
            words = [word for word in words[begin:] if word != "&"]
            expanded.append([one for word in words for one in (sparse if word == "${SPARSE[@]}" else [word])])
    return expanded


def test_versions_are_those_that_the_plugin_takes():
    said = {cell.split()[0] for cell in column(section("Versions"))}
    assert said == set(versions.TESTED) | set(versions.READ)


def test_options_are_those_that_are_parsed():
    said = {name for cell in column(section("Options")) for name in re.findall(r"`(\w+)`", cell)}
    assert said == {field.name for field in fields(Options)}


def test_every_setting_that_is_refused_is_on_the_page():
    source = Path(refusals.__file__).read_text()
    named = set(re.findall(r"f?\"(?:compilation pass )?([a-z]+[-_][a-z_-]+) must be", source))
    assert len(named) >= 7
    missing = {name for name in named if f"`{name}`" not in section("What is refused")}
    assert not missing


@pytest.mark.vllm
def test_commands_are_parsed_by_vllm():
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    assert len(commands()) >= 10
    for arguments in commands():
        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
        assert parsed.load_format == "npu_sparse"
        Options.parse(parsed.model_loader_extra_config)


@pytest.mark.vllm
def test_what_the_plugin_says_is_in_the_servers_log():
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
    from npu_sparse.integrations.vllm import attach

    assert attach.logger.name.startswith("vllm."), "vLLM gives a handler and a level to its own name only"
