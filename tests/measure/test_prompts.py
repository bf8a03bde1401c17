import pytest

from npu_sparse.measure.prompts import text_prompts
from npu_sparse.tasks import Document
from npu_sparse.testing import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE that begins raw text with one token of its own."""
    return tiny_tokenizer(["a0 a1 a2 b0 b1 b2 c0 c1 c2"], size=400, bos_token="<bos>", eos_token="<bos>")


def numbered(name: str, words: int) -> Document:
    return Document(name, " ".join(f"{name}{i}" for i in range(words)))


@pytest.mark.parametrize("length", [2, 37, 64])
def test_prompts_have_exactly_the_length_and_begin_as_the_tokenizer_begins(tokenizer, length):
    prompts = text_prompts(tokenizer, [numbered(n, 50) for n in "abc"], length=length, count=3, seed=0)
    assert [len(ids) for _, ids in prompts] == [length] * 3
    assert all(ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:] for _, ids in prompts)


def test_each_prompt_starts_another_document_while_there_are_enough(tokenizer):
    prompts = text_prompts(tokenizer, [numbered(n, 50) for n in "abcd"], length=20, count=4, seed=0)
    assert sorted(name for name, _ in prompts) == ["a", "b", "c", "d"]


def test_short_documents_are_continued_by_the_next(tokenizer):
    documents = [numbered(n, 5) for n in "abcdef"]
    ((name, ids),) = text_prompts(tokenizer, documents, length=40, count=1, seed=0)
    assert " + " in name and len(ids) == 40


def test_one_document_serves_several_prompts_without_overlap(tokenizer):
    document = numbered("a", 200)
    prompts = text_prompts(tokenizer, [document], length=21, count=3, seed=0)
    text = "".join(tokenizer.decode(ids[1:]) for _, ids in prompts)
    assert document.text.startswith(text)


def test_too_little_text_is_refused_with_what_there_is(tokenizer):
    with pytest.raises(ValueError, match="texts must hold 9 prompts of 100 tokens, got enough for"):
        text_prompts(tokenizer, [numbered("a", 60)], length=100, count=9, seed=0)


def test_seed_chooses_the_documents(tokenizer):
    documents = [numbered(chr(97 + n), 50) for n in range(20)]
    chosen = {text_prompts(tokenizer, documents, length=20, count=1, seed=seed)[0][0] for seed in range(8)}
    assert len(chosen) > 2
