import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from npu_sparse.testing import tiny_tokenizer

LINES = [
    "A special magic number is hidden within the following text. Make sure to memorize it.",
    "What are all the special magic numbers for one key mentioned in the provided text?",
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    "Memorize and track the chain(s) of variable assignment hidden in the following text. VAR ABCDE = 12345",
    "Below is a numbered list of words. 1. word 2. word 3. other. Question: what are the most common words?",
    "Answer the question based on the given documents. Only give me the answer. Document 1: Question: Answer:",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 600 tokens that puts one token before raw text, as Gemma's and Llama's do."""
    special = ("<bos>", "<|user|>", "<|assistant|>", "<|end|>")
    return tiny_tokenizer(LINES, special=special, bos_token="<bos>", chat_template=CHAT_TEMPLATE)


def one_token_a_word() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_bpe()


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    return one_token_a_word()


@pytest.fixture(scope="session")
def haystack() -> list[str]:
    """Three short documents of sentences that are all different."""
    return [
        " ".join(f"Paragraph {name} says that river number {i} meets hill {i * i}." for i in range(40))
        for name in ("one", "two", "three")
    ]
