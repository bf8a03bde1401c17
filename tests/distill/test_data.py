import random
from dataclasses import replace

import pytest
import torch

from npu_sparse.distill.data import Contexts, batches, row_segments

TASKS = {
    "tasks": ("niah_single_2", "niah_multikey_1"), "task_fraction": 0.5, "lengths": (640, 704), "tokens": 1408,
    "validation_length": 640,
}  # fmt: skip


@pytest.fixture(scope="module")
def contexts(make_config, tokenizer) -> Contexts:
    return Contexts(make_config(tokens=768), tokenizer)


@pytest.fixture(scope="module")
def task_contexts(make_config, tokenizer) -> Contexts:
    return Contexts(make_config(**TASKS, validation_prompts=4), tokenizer)


def test_a_batch_is_a_function_of_seed_and_step(contexts, make_config, tokenizer):
    again = Contexts(make_config(tokens=768), tokenizer)
    for step in (5, 0, 3):
        random.seed(step)  # whatever else uses the global generators
        torch.manual_seed(step)
        assert torch.equal(again.batch(step), contexts.batch(step))
    other = Contexts(make_config(tokens=768, seed=1), tokenizer)
    assert not any(torch.equal(other.batch(step), contexts.batch(step)) for step in range(3))
    assert not torch.equal(contexts.batch(0)[:, :64], contexts.batch(1)[:, :64])


@pytest.mark.parametrize("world", [2, 4])
def test_the_processes_together_see_what_one_would(contexts, world):
    for step in range(4):
        alone = contexts.batch(step)
        shares = [contexts.batch(step, rank, world) for rank in range(world)]
        assert alone.shape[0] == 768 // alone.shape[1]
        for j, ids in enumerate(alone):
            assert torch.equal(shares[j % world][j // world], ids)
        assert len({tuple(ids.tolist()) for ids in alone}) == len(alone)


def test_task_prompts_do_not_depend_on_the_number_of_processes(task_contexts):
    for step in range(4):
        alone = task_contexts.batch(step)
        assert torch.equal(torch.cat([task_contexts.batch(step, rank, 2) for rank in range(2)]), alone)


def test_lengths_and_kinds_are_those_of_the_config(task_contexts, tokenizer):
    texts, prompts, lengths = 0, 0, set()
    for step in range(16):
        batch = task_contexts.batch(step)
        lengths.add(batch.shape[1])
        assert batch.dtype == torch.int64 and batch.shape[0] * batch.shape[1] <= 1408
        assert batch[:, 0].eq(0).all() and not batch[:, 1:].eq(0).any()  # begins as raw text does, once
        asks = ["special magic number" in text for text in tokenizer.batch_decode(batch)]
        assert all(asks) or not any(asks)
        prompts += all(asks)
        texts += not any(asks)
    assert lengths == {640, 704}
    assert 3 <= prompts <= 13 and texts + prompts == 16


def test_a_prompt_ends_with_its_answer(task_contexts, tokenizer):
    ids = task_contexts._prompt("niah_single_2", 700, task_contexts.training, 7)
    text = tokenizer.decode(ids)
    question, answer = text.rstrip(".\n").rsplit(" ", 1)
    assert ids.shape == (700,) and text.endswith(".\n")
    assert f"is: {answer}." in question


def test_a_tokenizer_without_a_first_token_gets_none(make_config, bare_tokenizer):
    contexts = Contexts(make_config(**TASKS), bare_tokenizer)
    assert contexts.start == []
    window = bare_tokenizer.decode(contexts._window(64, contexts.training, random.Random(0)))
    assert "<bos>" not in window
    prompt = bare_tokenizer.decode(contexts._prompt("niah_single_2", 700, contexts.training, 7))
    assert "<bos>" not in prompt
    assert "A special magic number is hidden within" in prompt or "Some special magic numbers are hidden" in prompt


def test_text_without_spaces_fills_a_window(make_config, tokenizer, tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.txt").write_text(f"{n}" * 90)
    contexts = Contexts(make_config(texts=(str(tmp_path),)), tokenizer)
    calls = []

    def limited(text, **options):
        calls.append(text)
        assert len(calls) < 100  # in place of a loop without end
        return tokenizer(text, **options)

    contexts.tokenizer = limited
    assert contexts.batch(0).shape[0] >= 2


def test_a_length_too_short_for_a_task_is_refused_before_training(make_config, tokenizer):
    config = make_config(tasks=("niah_single_2",), task_fraction=0.5)
    with pytest.raises(ValueError, match=r"length must be >= \d+ for niah_single_2") as caught:
        Contexts(config, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_from_any_step(contexts, workers):
    for step, batch in enumerate(batches(contexts, 3, 0, 1, workers), start=3):
        assert torch.equal(batch, contexts.batch(step))
    assert step == contexts.config.steps - 1


# Training and validation


def files_in(texts, tokenizer) -> set[str]:
    words = [word.partition(" ")[0] for ids in texts for word in tokenizer.decode(ids).split("File ")[1:]]
    return {word for word in words if len(word) == 2 and word.isdigit()}


@pytest.mark.parametrize("seed", [0, 1])
def test_training_documents_never_occur_in_validation(make_config, tokenizer, seed):
    contexts = Contexts(make_config(**TASKS, validation_prompts=4, seed=seed), tokenizer)
    trained = files_in([ids for step in range(12) for ids in contexts.batch(step)], tokenizer)
    held_out = files_in([ids[0] for _, ids in contexts.held_out()], tokenizer)
    assert len(trained) >= 5 and held_out
    assert not trained & held_out


def test_held_out_contexts_are_the_same_every_time(task_contexts):
    first, second = task_contexts.held_out(), task_contexts.held_out()
    assert [kind for kind, _ in first] == ["text", "tasks", "text", "tasks"]
    assert all(ids.shape == (1, 640) for _, ids in first)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second))


# Supervised rows


@pytest.mark.parametrize("length", [1, 7, 16, 37, 64, 96])
@pytest.mark.parametrize("segment", [1, 16, 40, 128])
@pytest.mark.parametrize("rows", [0, 8, 32, 64, 1000])
def test_row_segments_cover_the_last_row_without_overlap(make_config, rows, segment, length):
    config = make_config(rows=rows, segment=segment)
    covered = set()
    for step in range(40):
        segments = row_segments(config, length, step)
        taken = [row for start, stop in segments for row in range(start, stop)]
        assert taken == sorted(set(taken)) and taken[0] >= 0 and taken[-1] == length - 1
        assert all(0 < stop - start <= segment for start, stop in segments)
        if not rows or rows >= length:
            assert len(taken) == length
        else:
            assert len(taken) <= max(rows, segment)
        covered.update(taken)
    if rows >= 2 * segment and length <= 96 and segment > 1:
        assert covered == set(range(length))  # no row is out of reach


def test_row_segments_are_a_function_of_seed_and_step(make_config):
    config = make_config()
    drawn = [row_segments(config, 96, step) for step in range(8)]
    assert drawn == [row_segments(config, 96, step) for step in range(8)]
    assert len({tuple(segments) for segments in drawn}) > 1
    assert drawn != [row_segments(replace(config, seed=1), 96, step) for step in range(8)]
