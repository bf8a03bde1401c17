import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from npu_sparse import Budget, SparsePrefill, selectors, tasks
from npu_sparse.measure.teacher_forced import (
    Forced,
    answer_states,
    forced,
    judge,
    read_states,
    score_forced,
    stressed_states,
    write_states,
)
from npu_sparse.tasks import Example
from npu_sparse.testing import TINY_MODELS, tiny_model, tiny_tokenizer

EVERY_KEY = Budget(k=64, block=8)
FEW = Budget(k=4, block=8)
P, A = 43, 5


def asked(prompt: int = P, answer: int = A, seed: int = 0) -> Forced:
    drawn = torch.randint(1, 95, (prompt + answer,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Forced(tuple(drawn[:prompt]), tuple(drawn[prompt:]))


def attaching(model, budget, **options):
    return lambda: SparsePrefill.attach(model, selectors.Oracle(), budget, impl="reference", **options)


def logits_of(model, states):
    return model.get_output_embeddings()(states)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_dense_rows_are_those_of_one_forward_over_prompt_and_answer(name):
    model, question = tiny_model(name), asked()
    with torch.no_grad():
        expected = model(torch.tensor([[*question.prompt, *question.answer]])).logits[0, P - 1 : -1]
    actual = logits_of(model, answer_states(model, question))
    assert actual.shape == expected.shape == (A, 100)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits_of(model, stressed_states(model, question)), expected, atol=1e-4, rtol=1e-4)


def test_dense_against_itself_has_no_divergence():
    samples, states = score_forced(tiny_model("qwen2"), [asked(seed=n) for n in range(3)], stress=True)
    assert [sample["kl"] for sample in samples] == [0.0] * 3
    assert all(sample["stress_kl"] < 1e-6 for sample in samples)
    assert [len(rows) for rows in states] == [A] * 3


def test_what_the_model_says_itself_is_right_and_anything_else_is_not():
    model, question = tiny_model("llama"), asked(answer=1)
    for _ in range(4):  # the greedy answer, a token at a time
        token = int(logits_of(model, answer_states(model, question))[-1].argmax())
        question = Forced(question.prompt, (*question.answer[:-1], token, 1))
    greedy = Forced(question.prompt, question.answer[:-1])
    assert len(greedy.answer) == 4
    (sample,), _ = score_forced(model, [greedy])
    assert sample == {"right": 1.0, "tokens": 1.0, "kl": 0.0}
    other = Forced(greedy.prompt, (*greedy.answer[:3], (greedy.answer[3] + 1) % 95))
    (sample,), _ = score_forced(model, [other])
    assert sample == {"right": 0.0, "tokens": 0.75, "kl": 0.0}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_budget_of_every_key_is_dense(name):
    model, question = tiny_model(name), asked()
    _, dense = score_forced(model, [question])
    (sample,), _ = score_forced(model, [question], attaching(model, EVERY_KEY), dense, stress=True)
    assert sample["kl"] < 1e-6 and sample["stress_kl"] < 1e-6


@pytest.mark.parametrize("chunk", [None, 16])
def test_supports_belong_to_the_prompt_alone(chunk):
    model, question, seen = tiny_model("llama"), asked(), []
    observe = lambda inputs, support, out: seen.append((inputs.q.shape[2], inputs.k.shape[2]))  # noqa: E731
    answer_states(model, question, attaching(model, FEW, observe=observe), chunk)
    layers = 3
    assert seen == ([(P, P)] * layers if chunk is None else [(16, 16)] * 3 + [(16, 32)] * 3 + [(11, P)] * 3)
    seen.clear()
    stressed_states(model, question, attaching(model, FEW, observe=observe))
    assert seen == [(P + A - 1, P + A - 1)] * layers


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "qwen3_5"])
def test_answer_rows_are_a_dense_decode_on_the_cache_of_a_sparse_prefill(name):
    model, question = tiny_model(name), asked()
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        with attaching(model, FEW)():
            out = model(torch.tensor([question.prompt]), past_key_values=cache, use_cache=True)
        expected = [out.logits[0, -1]]
        for token in question.answer[:-1]:
            out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            expected.append(out.logits[0, -1])
    actual = answer_states(model, question, attaching(model, FEW))
    torch.testing.assert_close(logits_of(model, actual), torch.stack(expected), atol=1e-4, rtol=1e-4)
    dense, stressed = answer_states(model, question), stressed_states(model, question, attaching(model, FEW))
    assert not torch.allclose(actual, dense, atol=1e-2) and not torch.allclose(actual, stressed, atol=1e-2)


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_the_exact_end_is_the_prompts_and_the_same_in_chunks(name):
    model, question = tiny_model(name), asked()
    budget = FEW.replace(exact_last=6)
    whole = answer_states(model, question, attaching(model, budget))
    chunked = answer_states(model, question, attaching(model, budget), 16)
    torch.testing.assert_close(chunked, whole, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(whole, answer_states(model, question, attaching(model, FEW)), atol=1e-2)


def test_divergence_is_the_mean_over_the_answer_of_kl_from_dense():
    head = nn.Linear(2, 2, bias=True)
    with torch.no_grad():
        head.weight.copy_(torch.eye(2))
        head.bias.copy_(torch.tensor([0.0, math.log(2.0)]))
    model = SimpleNamespace(get_output_embeddings=lambda: head)
    dense = torch.tensor([[0.0, 0.0], [math.log(2.0), 0.0]])  # probabilities 1/3, 2/3 and, from 2 : 2, 1/2, 1/2
    other = torch.tensor([[0.0, 0.0], [math.log(6.0), 0.0]])  # the same, and 6 : 2
    sample = judge(model, Forced((1,), (1, 0)), other, dense)
    expected = (0.0 + 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) / 2
    assert sample == {"right": 1.0, "tokens": 1.0, "kl": pytest.approx(expected, rel=1e-5)}
    assert judge(model, Forced((1,), (0, 0)), other, dense)["tokens"] == 0.5


def test_only_tokens_that_count_have_to_be_the_most_likely():
    head = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(3))
    model = SimpleNamespace(get_output_embeddings=lambda: head)
    rows = torch.eye(3)
    assert judge(model, Forced((1,), (2, 1, 2), (False, True, True)), rows, rows)["right"] == 1.0
    assert judge(model, Forced((1,), (2, 1, 1), (False, True, True)), rows, rows) == {"right": 0.0, "tokens": 0.5, "kl": 0.0}
    for counts in ((False, False), (True,)):
        with pytest.raises(ValueError, match="counts must say of 2 tokens which count, one at least"):
            Forced((1,), (2, 1), counts)


def test_rows_of_another_answer_are_refused():
    model, question = tiny_model("llama"), asked()
    _, (dense,) = score_forced(model, [question])
    with pytest.raises(ValueError, match="states must have 5 rows, one a token, got 4 and 5 dense ones"):
        judge(model, question, dense[:4], dense)


def test_logits_that_change_after_the_output_embedding_are_refused():
    model = tiny_model("gemma3", final_logit_softcapping=0.1)
    with pytest.raises(ValueError, match="Gemma3ForCausalLM changes its logits after the output embedding"):
        answer_states(model, asked())


def test_the_model_is_as_it_was_after_an_error_in_the_prefill():
    model, question = tiny_model("llama"), asked()
    before = answer_states(model, question)
    with torch.no_grad():
        kept = model.model.embed_tokens.weight.clone()
        model.model.embed_tokens.weight[question.prompt[0]] = math.nan
        with pytest.raises(FloatingPointError):
            answer_states(model, question, attaching(model, FEW))
        model.model.embed_tokens.weight.copy_(kept)
    assert torch.equal(answer_states(model, question), before)


def test_an_empty_prompt_or_answer_is_refused():
    for name, parts in (("prompt", ((), (1,))), ("answer", ((1,), ()))):
        with pytest.raises(ValueError, match=f"{name} must hold at least one token, got none"):
            Forced(*parts)


def test_rows_survive_their_file(tmp_path):
    rows = [torch.randn(n, 7, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(1, 13)]
    write_states(tmp_path / "rows.safetensors", rows)
    stored = read_states(tmp_path / "rows.safetensors")
    assert len(stored) == 12 and all(torch.equal(a, b) for a, b in zip(rows, stored))


def example(prompt: str, *answers: str, task: str = "niah_multivalue", new: int = 40) -> Example:
    return Example(task, 3, prompt, answers, length=1, max_new_tokens=new, seed=0, comparable=True)


@pytest.mark.parametrize("begins", [True, False])
def test_all_answers_follow_the_prompt_as_tokens(begins):
    prompt = "The numbers are 11, 22, 33, 44. They are"
    tokenizer = tiny_tokenizer([prompt, "The numbers are 11, 22, 33, and 44"], size=300, begins=begins)
    question = forced(tokenizer, example(prompt, "33", "11", "44", "22"))
    assert list(question.prompt) == tasks.encode(tokenizer, example(prompt, "33"))
    assert tokenizer.decode(question.prompt, skip_special_tokens=True) == prompt
    assert tokenizer.decode(question.answer) == " 11, 22, 33, and 44"
    pieces = [tokenizer.decode([token]) for token in question.answer]
    assert question.counts == tuple(any(c.isdigit() for c in piece) for piece in pieces) and not all(question.counts)


def test_an_answer_that_would_run_into_the_prompt_is_tokenized_alone():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["a", "r", "e", " ", "1", "are", "are "]
    merges = [("a", "r"), ("ar", "e"), ("are", " ")]
    vocabulary = {piece: n for n, piece in enumerate([*pieces, "ar"])}
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.decoder = decoders.Fuse()
    question = forced(PreTrainedTokenizerFast(tokenizer_object=inner), example("are", "1", task="niah_single_1"))
    assert question == Forced((vocabulary["are"],), (vocabulary[" "], vocabulary["1"]), (False, True))


def test_an_answer_that_does_not_fit_is_refused():
    tokenizer = tiny_tokenizer(["one"], size=300)
    with pytest.raises(ValueError, match=r"max_new_tokens must hold the answer of vt example 3 \(12 tokens\), got 11"):
        forced(tokenizer, example("VAR", "ABCDE", "FGHIJ", task="vt", new=11))
