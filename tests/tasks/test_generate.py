import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from npu_sparse import tasks
from npu_sparse.tasks.catalogue import TASKS
from npu_sparse.tasks.words import ADJECTIVES, NOUNS

ROOT = Path(__file__).parents[2]
WITHOUT_FILE = tasks.task_names(runnable_without="qa_file")
LONG_ENOUGH = 2600  # tokens of the tiny tokenizer, for every task at its smallest
LONG_ENOUGH_FROM_4096 = 6500  # from there on the word lists of cwe are longer
UNIT_TOKENS = 160  # more than one unit of any task takes with the tiny tokenizer


@pytest.fixture(scope="module")
def qa_files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("qa")
    paragraphs = [
        {
            "context": f"The mayor of town {i} is called Mr {chr(65 + i)}orbury.",
            "qas": [
                {"question": f"Who is mayor of town {i}?", "answers": [{"text": f"{chr(65 + i)}orbury"}] * 2},
                {"question": "Who is nobody?", "answers": [], "is_impossible": True},
            ],
        }
        for i in range(20)
    ]
    squad = {
        "data": [{"title": "Towns", "paragraphs": paragraphs[:10]}, {"title": "More", "paragraphs": paragraphs[10:]}]
    }
    hotpot = [
        {
            "question": f"Where does the owner of cat {i} live?",
            "answer": f"Quay {i}",
            "context": [[f"Cat {i}", [f"Cat {i} is Ann's.", " It sleeps."]], [f"Ann {i}", [f"Ann lives at Quay {i}."]]]
            + [[f"Dog {i} {j}", ["A dog barks."]] for j in range(3)],
            "supporting_facts": [[f"Cat {i}", 0], [f"Ann {i}", 0]],
        }
        for i in range(12)
    ]
    files = {"qa_1": folder / "squad.json", "qa_2": folder / "hotpot.json"}
    files["qa_1"].write_text(json.dumps(squad))
    files["qa_2"].write_text(json.dumps(hotpot))
    return files


def context_and_question(prompt: str) -> tuple[str, str]:
    """The prompt before its last question, and that question with the answer prefix."""
    place = max(prompt.rfind(start) for start in ("\nWhat is the", "\nWhat are all", "\nQuestion:"))
    return prompt[:place], prompt[place:]


@pytest.mark.parametrize("task", TASKS)
def test_example_i_does_not_depend_on_count(task, tokenizer, haystack, qa_files):
    options = dict(length=LONG_ENOUGH, seed=5, haystack=haystack, qa_file=qa_files.get(task))
    three = tasks.generate(task, tokenizer, count=3, **options)
    assert tasks.generate(task, tokenizer, count=2, **options) == three[:2]
    assert [example.index for example in three] == [0, 1, 2]
    assert len({example.prompt for example in three}) == 3
    other_seed = {**options, "seed": 6}
    assert tasks.generate(task, tokenizer, count=1, **other_seed)[0].prompt != three[0].prompt


def test_examples_are_the_same_in_another_process(tokenizer, haystack):
    """Another hash seed and another global random state give the same examples."""
    code = (
        "import json, random, sys, dataclasses; random.seed(int(sys.argv[1])); sys.path.insert(0, 'tests/tasks')\n"
        "from conftest import byte_level_bpe; from npu_sparse import tasks\n"
        "texts = json.load(sys.stdin)\n"
        f"names, length = {WITHOUT_FILE!r}, {LONG_ENOUGH}\n"
        "tokenizer = byte_level_bpe()\n"
        "found = [tasks.generate(n, tokenizer, length=length, count=1, seed=3, haystack=texts)[0] for n in names]\n"
        "print(json.dumps([dataclasses.astuple(e) for e in found]))"
    )
    outputs = []
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, hash_seed],
            input=json.dumps(haystack),
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(json.loads(done.stdout))
    here = [
        tasks.generate(name, tokenizer, length=LONG_ENOUGH, count=1, seed=3, haystack=haystack)[0]
        for name in WITHOUT_FILE
    ]
    assert outputs[0] == outputs[1] == json.loads(json.dumps([dataclasses.astuple(example) for example in here]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    task=st.sampled_from(WITHOUT_FILE),
    length=st.integers(LONG_ENOUGH, 9000),
    seed=st.integers(0, 2**40),
    chat=st.booleans(),
    new_tokens=st.none() | st.integers(1, 200),
)
def test_prompt_fills_its_room_and_never_exceeds_it(task, length, seed, chat, new_tokens, tokenizer, haystack):
    assume(task != "cwe" or not 4096 <= length < LONG_ENOUGH_FROM_4096)
    [example] = tasks.generate(
        task, tokenizer, length=length, count=1, seed=seed, haystack=haystack, chat=chat, max_new_tokens=new_tokens
    )
    assert len(tasks.encode(tokenizer, example)) == example.length
    assert length - UNIT_TOKENS < example.length + example.max_new_tokens <= length
    assert example.max_new_tokens == (new_tokens or TASKS[task].max_new_tokens)


@pytest.mark.parametrize("task", WITHOUT_FILE)
def test_length_is_filled_when_every_word_is_one_token(task, word_tokenizer, haystack):
    for example in tasks.generate(task, word_tokenizer, length=1500, count=2, seed=0, haystack=haystack):
        assert 1500 - 30 < example.length + example.max_new_tokens <= 1500


@pytest.mark.parametrize("length", [LONG_ENOUGH, 6000])
@pytest.mark.parametrize("task", [name for name in WITHOUT_FILE if name.startswith("niah")])
def test_needles_are_in_the_context_once_and_not_in_the_question(task, length, tokenizer, haystack):
    for example in tasks.generate(task, tokenizer, length=length, count=8, seed=1, haystack=haystack):
        context, question = context_and_question(example.prompt)
        expected = 4 if task in ("niah_multivalue", "niah_multiquery") else 1
        assert len(set(example.answers)) == len(example.answers) == expected
        for answer in example.answers:
            assert example.prompt.count(answer) == 1
            assert re.search(rf"One of the special magic (number|uuid)s for (\S+) is: {answer}\.", context)
            assert answer not in question
        for key in re.findall(rf"for (\S+) is: (?:{'|'.join(example.answers)})\.", context):
            assert key in question


def test_a_value_that_the_haystack_holds_by_chance_is_not_used(tokenizer, haystack):
    options = dict(length=2000, count=1, seed=0)
    [before] = tasks.generate("niah_single_2", tokenizer, haystack=haystack, **options)
    [after] = tasks.generate("niah_single_2", tokenizer, haystack=[f"{before.answers[0]} it is. "], **options)
    assert after.answers != before.answers
    assert after.prompt.count(after.answers[0]) == 1


def test_multikey_1_hides_three_needles_of_other_keys(tokenizer, haystack):
    for example in tasks.generate("niah_multikey_1", tokenizer, length=2000, count=5, seed=0, haystack=haystack):
        assert len(set(re.findall(r"magic numbers for (\S+) is: \d{7}\.", example.prompt))) == 4


def test_multikey_2_haystack_is_needles_with_other_keys(tokenizer):
    [example] = tasks.generate("niah_multikey_2", tokenizer, length=4000, count=1, seed=0)
    needles = re.findall(r"magic numbers for (\S+) is: (\d{7})\.", example.prompt)
    [asked] = [key for key, value in needles if value == example.answers[0]]
    assert len(needles) > 50
    assert [key for key, _ in needles].count(asked) == 1


def test_needles_stay_while_the_length_grows(tokenizer, haystack):
    for task in ("niah_multiquery", "niah_multikey_2", "vt"):
        short, long = (
            tasks.generate(task, tokenizer, length=length, count=1, seed=4, haystack=haystack)[0]
            for length in (3000, 6000)
        )
        assert short.answers == long.answers


def test_needle_depths_cover_the_haystack(tokenizer):
    examples = tasks.generate("niah_single_1", tokenizer, length=3000, count=60, seed=0)
    depths = [example.prompt.index(example.answers[0]) / len(example.prompt) for example in examples]
    assert min(depths) < 0.2 and max(depths) > 0.75


def test_variable_chain_leads_to_every_answer_in_order(tokenizer):
    for example in tasks.generate("vt", tokenizer, length=4000, count=8, seed=2):
        task_text = example.prompt[example.prompt.rindex("Memorize and track") :]
        context, question = context_and_question(task_text)
        value = re.search(r"assigned the value (\d{5})", question).group(1)
        chain = []
        for name, origin in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", context, flags=re.M):
            assert origin == (chain[-1] if chain else value)
            chain.append(name)
        assert tuple(chain) == example.answers and len(set(chain)) == 5
        assert not any(answer in question for answer in example.answers)
        assert f"5 variables are assgined the value {value}" in question


@pytest.mark.parametrize("length, often, rarely", [(LONG_ENOUGH, 6, 1), (9000, 30, 3)])
def test_common_words_are_the_ten_most_common(length, often, rarely, tokenizer):
    for example in tasks.generate("cwe", tokenizer, length=length, count=3, seed=0):
        start = example.prompt.rindex("Below is a numbered list")
        context, question = context_and_question(example.prompt[start:])
        words = re.findall(r"\d+\. (\S+)", context)
        counts = {word: words.count(word) for word in words}
        assert {word for word, count in counts.items() if count == often} == set(example.answers)
        assert set(counts.values()) == {often, rarely} and len(example.answers) == 10
        assert not any(answer in question for answer in example.answers)
        solved = example.prompt[:start]
        assert not any(re.search(rf"\b{answer}\b", solved) for answer in example.answers)


def test_common_words_continue_with_pairs_when_the_list_is_used_up(word_tokenizer):
    [example] = tasks.generate("cwe", word_tokenizer, length=9000, count=1, seed=0)
    pairs = set(re.findall(r"\d+\. (\S+-\S+)", example.prompt))
    assert len(pairs) > 100
    assert not any(answer in pair for answer in example.answers for pair in pairs)


def frequencies(example: tasks.Example) -> list[tuple[int, str]]:
    """The coded words of an fwe prompt with their counts, most frequent first."""
    start, end = example.prompt.index("coded words. "), example.prompt.index("\nQuestion")
    words = example.prompt[start:end].split()[2:]
    return sorted(((words.count(word), word) for word in set(words)), reverse=True)


@pytest.mark.parametrize("length", [540, 600, 700, LONG_ENOUGH, 9000])
def test_frequent_words_are_strictly_the_three_most_frequent(length, tokenizer):
    for example in tasks.generate("fwe", tokenizer, length=length, count=3, seed=0):
        (_, dots), *_, (third, _), (fourth, _) = frequencies(example)[:5]
        assert dots == "..." and third > fourth
        assert {word for _, word in frequencies(example)[1:4]} == set(example.answers)


def test_frequent_words_follow_zipfs_law(tokenizer):
    [example] = tasks.generate("fwe", tokenizer, length=9000, count=1, seed=0)
    counts = [count for count, _ in frequencies(example)]
    assert counts[0] / counts[1] == pytest.approx(4, rel=0.05)
    assert counts[1] / counts[3] == pytest.approx(4, rel=0.15)


def test_lengths_that_would_tie_frequent_words_are_refused(tokenizer):
    for length in range(300, 533, 10):
        with pytest.raises(ValueError, match="length must be >= 533"):
            tasks.generate("fwe", tokenizer, length=length, count=1, seed=0)


def test_chat_wraps_the_question_and_begins_the_answer(tokenizer):
    [raw] = tasks.generate("niah_single_1", tokenizer, length=1500, count=1, seed=0)
    [chat] = tasks.generate("niah_single_1", tokenizer, length=1500, count=1, seed=0, chat=True)
    assert chat.prompt.startswith("<bos><|user|>A special magic number")
    assert chat.prompt.endswith(
        "mentioned in the provided text?<|end|><|assistant|>" + raw.prompt[raw.prompt.rindex("The special magic") :]
    )
    assert tasks.encode(tokenizer, chat).count(0) == tasks.encode(tokenizer, raw).count(0) == 1
    assert chat.answers == raw.answers


def test_text_haystack_wraps_around_and_keeps_its_sentences(tokenizer):
    texts = tasks.Document("only", "First things come first. Second things follow. ")
    [example] = tasks.generate("niah_single_2", tokenizer, length=1500, count=1, seed=0, haystack=[texts])
    assert example.prompt.count("Second things follow.") > 20
    before = example.prompt[: example.prompt.index("One of the special")].rstrip()
    assert before.endswith((".", "afterwards."))


def test_substitute_haystacks_are_labelled(tokenizer, haystack):
    labelled = {name for name, task in TASKS.items() if task.label == "substitute haystack"}
    text = {"niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"}
    assert labelled == text
    for name in WITHOUT_FILE:
        [example] = tasks.generate(name, tokenizer, length=LONG_ENOUGH, count=1, seed=0, haystack=haystack)
        assert example.comparable == TASKS[name].comparable_with_published == (name not in text)


def test_questions_come_with_their_documents(tokenizer, qa_files):
    for task, unit in (("qa_1", "orbury."), ("qa_2", "Quay")):
        for example in tasks.generate(task, tokenizer, length=1400, count=6, seed=0, qa_file=qa_files[task]):
            assert example.prompt.count("Document ") > 5
            assert f"{example.answers[0]}" in example.prompt and unit in example.prompt
            assert len(tasks.encode(tokenizer, example)) + example.max_new_tokens <= 1400
            numbers = re.findall(r"^Document (\d+):", example.prompt, flags=re.M)
            assert numbers == [str(i + 1) for i in range(len(numbers))]


def test_hotpot_shows_supporting_documents_first_when_room_is_short(tokenizer, qa_files):
    for example in tasks.generate("qa_2", tokenizer, length=240, count=4, seed=0, qa_file=qa_files["qa_2"]):
        assert 2 <= example.prompt.count("\nDocument ") <= 4
        assert "is Ann's" in example.prompt and f"Ann lives at {example.answers[0]}" in example.prompt


def test_the_seed_orders_the_questions(tokenizer, qa_files):
    orders = [
        [e.answers for e in tasks.generate("qa_1", tokenizer, length=1400, count=20, seed=s, qa_file=qa_files["qa_1"])]
        for s in (0, 1)
    ]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_unanswerable_questions_are_left_out(tokenizer, qa_files):
    examples = tasks.generate("qa_1", tokenizer, length=1400, count=20, seed=0, qa_file=qa_files["qa_1"])
    assert len({example.answers for example in examples}) == 20
    assert not any("nobody" in example.prompt for example in examples)
    with pytest.raises(ValueError, match="count must be <= 20, .* got 21"):
        tasks.generate("qa_1", tokenizer, length=1400, count=21, seed=0, qa_file=qa_files["qa_1"])


@pytest.mark.parametrize("task", WITHOUT_FILE)
def test_too_short_a_length_says_the_length_that_works(task, tokenizer, haystack):
    with pytest.raises(ValueError, match=rf"length must be >= \d+ for {task} example 0 .* got 40") as caught:
        tasks.generate(task, tokenizer, length=40, count=1, seed=0, haystack=haystack)
    least = int(re.search(r">= (\d+)", str(caught.value)).group(1))
    [example] = tasks.generate(task, tokenizer, length=least, count=1, seed=0, haystack=haystack)
    assert example.length + example.max_new_tokens <= least
    with pytest.raises(ValueError, match="length must be >="):
        tasks.generate(task, tokenizer, length=least - 1, count=1, seed=0, haystack=haystack)


def test_unknown_task_suggests_near_names(tokenizer):
    with pytest.raises(ValueError, match="got 'niah_mutlikey_2': did you mean .*niah_multikey_2"):
        tasks.generate("niah_mutlikey_2", tokenizer, length=1000, count=1, seed=0)
    with pytest.raises(ValueError, match="the tasks are niah_single_1, "):
        tasks.generate("zzz", tokenizer, length=1000, count=1, seed=0)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(task="niah_single_2"), "niah_single_2 needs haystack"),
        (dict(task="niah_single_2", haystack=[]), "haystack must hold text, got none"),
        (dict(task="niah_single_2", haystack=["  \n"]), "haystack must hold text, got none"),
        (dict(task="qa_1"), "qa_1 needs qa_file: the path of a JSON file in SQuAD v2 form"),
        (dict(task="qa_2"), "qa_2 needs qa_file: the path of a JSON file in HotpotQA form"),
        (dict(count=-1), "count must be >= 0, got -1"),
        (dict(length=0), "length must be >= 1, got 0"),
        (dict(max_new_tokens=0), "max_new_tokens must be >= 1, got 0"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(changes, sentence, tokenizer):
    options = {**dict(task="niah_single_1", length=1000, count=1, seed=0), **changes}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        tasks.generate(options.pop("task"), tokenizer, **options)


def test_question_files_are_checked(tokenizer, qa_files, tmp_path):
    with pytest.raises(FileNotFoundError, match="qa_file must be an existing file"):
        tasks.generate("qa_1", tokenizer, length=1000, count=1, seed=0, qa_file=tmp_path / "absent.json")
    with pytest.raises(ValueError, match="qa_file for qa_2 must be JSON in HotpotQA form"):
        tasks.generate("qa_2", tokenizer, length=1000, count=1, seed=0, qa_file=qa_files["qa_1"])
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match="qa_file for qa_1 must be JSON in SQuAD v2 form"):
        tasks.generate("qa_1", tokenizer, length=1000, count=1, seed=0, qa_file=broken)


def test_chat_without_a_template_is_refused(word_tokenizer):
    with pytest.raises(ValueError, match="without a chat template"):
        tasks.generate("fwe", word_tokenizer, length=1000, count=1, seed=0, chat=True)


def test_task_names_by_what_they_need():
    assert len(tasks.task_names()) == 13
    six = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
    assert tasks.task_names(runnable_without=("haystack", "qa_file")) == six
    assert set(tasks.task_names()) - set(tasks.task_names(runnable_without="qa_file")) == {"qa_1", "qa_2"}
    with pytest.raises(ValueError, match="runnable_without must name only haystack and qa_file, got network"):
        tasks.task_names(runnable_without=["network"])


def test_key_words_are_many_and_distinct():
    for words, least in ((NOUNS, 300), (ADJECTIVES, 200)):
        assert len(words) >= least and len(set(words)) == len(words)
        assert all(re.fullmatch("[a-z]{3,12}", word) for word in words)
