import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from npu_sparse.oracle import OracleConfig
from npu_sparse.testing import tiny_model, tiny_tokenizer

WORDS = "river hill stone cloud ember willow lantern harbor meadow copper velvet thunder".split()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that begins raw text with one token of its own."""
    return tiny_tokenizer([" ".join(WORDS)], size=400, bos_token="<bos>", eos_token="<bos>")


@pytest.fixture(scope="session")
def model(tokenizer) -> LlamaForCausalLM:
    return tiny_model(
        "llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        max_position_embeddings=2048, initializer_range=0.24, bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Three text files of words in changing order."""
    folder = tmp_path_factory.mktemp("texts")
    generator = torch.Generator().manual_seed(1)
    for n in range(3):
        choice = torch.randint(len(WORDS), (1500,), generator=generator).tolist()
        (folder / f"{n}.txt").write_text(" ".join(WORDS[i] for i in choice))
    return folder


@pytest.fixture
def config(folder) -> OracleConfig:
    return OracleConfig(
        "tiny", length=100, budgets=(8, 40), texts=(str(folder),), prompts=3, blocks=(1, 16), layer_prompts=2
    )
