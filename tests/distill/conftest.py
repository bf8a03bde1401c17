import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from npu_sparse.distill import DistillConfig, run_distill
from npu_sparse.testing import tiny_model, tiny_tokenizer

WORDS = "river hill stone cloud ember willow lantern harbor meadow copper velvet thunder".split()
PROMPTS = [
    "Some special magic numbers are hidden within the following text. Make sure to memorize it.",
    "A special magic number is hidden within the following text. I will quiz you about the number afterwards.",
    "One of the special magic numbers for one key is: 12345. What is the special magic number for one key mentioned in "
    "the provided text? The special magic number for one key mentioned in the provided text is",
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that begins raw text with one token of its own."""
    return tiny_tokenizer([" ".join(WORDS), *PROMPTS], bos_token="<bos>", eos_token="<bos>")


@pytest.fixture(scope="session")
def bare_tokenizer() -> PreTrainedTokenizerFast:
    """The same, but raw text begins with nothing."""
    return tiny_tokenizer([" ".join(WORDS), *PROMPTS], begins=False, bos_token="<bos>", eos_token="<bos>")


@pytest.fixture(scope="session")
def model(tokenizer) -> LlamaForCausalLM:
    return tiny_model(
        "llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16,
        max_position_embeddings=1024, initializer_range=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, model, tokenizer):
    """The tiny model and its tokenizer as a directory."""
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Ten text files of words in changing order; every sentence names its file."""
    folder = tmp_path_factory.mktemp("texts")
    generator = torch.Generator().manual_seed(1)
    for n in range(10):
        choice = torch.randint(len(WORDS), (150, 8), generator=generator).tolist()
        lines = [f"File {n:02d} line {i:03d}: {' '.join(WORDS[j] for j in row)}." for i, row in enumerate(choice)]
        (folder / f"{n:02d}.txt").write_text("\\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def make_config(folder, checkpoint):
    """A DistillConfig of the tiny checkpoint on the tiny texts, with changes."""

    def make(**changes) -> DistillConfig:
        options = dict(
            model=str(checkpoint), texts=(str(folder),), tasks=(), task_fraction=0.0, lengths=(64, 96), tokens=192,
            micro_batch=2, rows=32, segment=16, steps=6, warmup=2, dim=64, budgets=(4, 16), validation_length=80,
            validation_prompts=2, save_every=2, validate_every=4, dtype="float32",
        )  # fmt: skip
        return DistillConfig(**options | changes)

    return make


@pytest.fixture(scope="session")
def finished(tmp_path_factory, make_config, model, tokenizer):
    """`(config, run directory, report)` of one run that nothing disturbed."""
    config, output = make_config(), tmp_path_factory.mktemp("runs") / "finished"
    return config, output, run_distill(config, output, model=model, tokenizer=tokenizer, progress=False)


def weights(output) -> dict[str, bytes]:
    """The bits of a run's adapter, by tensor; the order of a safetensors file's metadata is left to chance."""
    tensors = load_file(output / "adapter" / "model.safetensors")
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def curve(output) -> list[dict]:
    """The records of a run's metrics.jsonl without their timings."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@pytest.fixture(scope="session")
def curve_of():
    return curve


@pytest.fixture(scope="session")
def weights_of():
    return weights
