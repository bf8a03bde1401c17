import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from npu_sparse import Indexer
from npu_sparse.testing import tiny_tokenizer

LINES = [
    "Some special magic numbers are hidden within the following text. Make sure to memorize it.",
    "What are all the special magic numbers for one key mentioned in the provided text? The numbers for that key are",
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    "Memorize and track the chain(s) of variable assignment hidden in the following text. VAR ABCDE = 12345",
    "Question: Find all variables that are assigned the value 12345 in the text above. Answer:",
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 600 tokens."""
    return tiny_tokenizer(LINES, special=("<eos>",), begins=False, eos_token="<eos>")


@pytest.fixture(scope="session")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def indexer(model) -> Indexer:
    return Indexer.for_model(model, dim=64)
