"""What cannot be served ends in a sentence before the first token, in vLLM itself."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from npu_sparse.integrations.vllm import versions
from npu_sparse.integrations.vllm.refusals import check_engine

pytestmark = pytest.mark.vllm


def refused(engine, sentence, name="llama", budget="k=32,block=16", error=Exception, **options):
    with pytest.raises(error, match=sentence):
        engine(name, budget, **options)


def test_a_version_that_was_not_tested(engine, vllm, monkeypatch):
    versions.check(vllm.__version__)
    monkeypatch.setattr(vllm, "__version__", "0.40.0")
    refused(engine, r"vllm must be one of the versions that npu-sparse is tested with, 0\.32\.0 .* got 0\.40\.0")


def test_an_adapter_of_another_geometry(engine, checkpoints, monkeypatch):
    monkeypatch.setattr(checkpoints("llama"), "adapter", checkpoints("qwen2").adapter)
    refused(engine, r"adapter must have the model's geometry .* = \(64, \(0, 1, 2\), 32\), got \(128, ")


def test_an_adapter_of_other_weights_of_the_same_geometry(engine, checkpoints, monkeypatch, tmp_path):
    """One matrix of the last layer differs in the checkpoint's file, as after merging a LoRA."""
    shutil.copytree(checkpoints("llama").path, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.2.self_attn.v_proj.weight"] *= 1.1
    save_file(weights, file, metadata={"format": "pt"})
    monkeypatch.setattr(checkpoints("llama"), "path", str(tmp_path / "model"))
    refused(engine, "adapter was distilled from another base: backbone_fingerprint must be .*: a matrix was changed")


def test_a_budget_that_the_layers_do_not_have(engine):
    refused(engine, r"per_layer must name full-attention layers \[0, 1, 2\], got \[7\]", budget="k=32,per_layer=7:16")


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"kv_cache_dtype": "fp8"}, "kv-cache-dtype must be auto .* got fp8$"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}},
            "speculative-config must be absent .* got ngram$",
        ),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "kv-transfer-config must be absent .* got ExampleConnector$",
        ),
        ({"enable_lora": True}, "enable-lora must be off .* got on$"),
        ({"tensor_parallel_size": 4, "decode_context_parallel_size": 2}, "decode-context-parallel-size must be 1 .* got 2$"),
    ],
)
def test_an_engine_configuration_as_vllm_has_it(options, sentence, vllm, checkpoints):
    """The fields that refusals read are those of this version's own configuration."""
    from vllm.engine.arg_utils import EngineArgs

    plain = dict(model=checkpoints("llama").path, dtype="float32", skip_tokenizer_init=True, max_model_len=512)
    check_engine(EngineArgs(**plain).create_engine_config())
    with pytest.raises(ValueError, match=sentence):
        check_engine(EngineArgs(**plain, **options).create_engine_config())
