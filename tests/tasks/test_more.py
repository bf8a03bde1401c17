import re
from collections import Counter

import pytest

from npu_sparse import tasks
from npu_sparse.tasks import MORE, TASKS, rules
from npu_sparse.tasks.catalogue import task_named

LENGTH = 4000  # tokens of the tiny tokenizer: a few hundred units
GRAPHS, TALLIES = ("graph_search", "graph_parents"), ("tally_count", "tally_most", "tally_user")
every_task = pytest.mark.parametrize("task", MORE)


@pytest.fixture
def make(tokenizer, haystack):
    def make(task, **options):
        if MORE[task].needs == "haystack":
            options = {"haystack": haystack, **options}
        return tasks.generate(task, tokenizer, **{"length": LENGTH, "count": 3, "seed": 0, "max_new_tokens": 300, **options})

    return make


@every_task
def test_prompts_fill_their_length_and_are_the_same_again(make, tokenizer, task):
    examples = make(task)
    for example in examples:
        assert len(tasks.encode(tokenizer, example)) == example.length <= LENGTH - 300
        assert example.length > LENGTH - 300 - 400 and not example.comparable
    assert make(task) == examples and make(task, count=2) == examples[:2]
    assert make(task, seed=1)[0].prompt != examples[0].prompt and examples[0].prompt != examples[1].prompt


@every_task
def test_the_reference_answer_scores_full_marks_and_nothing_scores_none(make, task):
    for example in make(task):
        reference = tasks.reference_answer(example)
        assert tasks.score(example, reference.text) == 1.0
        assert tasks.score(example, "") == 0.0
        assert reference.spans and all(reference.text[start:end].strip() for start, end in reference.spans)


@every_task
def test_names_and_labels_say_what_a_task_follows(task):
    assert task_named(task).label == f"after {MORE[task].after}" and task not in TASKS and task not in tasks.task_names()
    with pytest.raises(ValueError, match=f"task must be a known name, got '{task}s': did you mean {task}"):
        task_named(task + "s")


def graph(example):
    edges = re.findall(r"^(\w{8}) -> (\w{8})$", example.prompt, re.M)
    root = re.search(r"from node (\w{8}) in|to node (\w{8})\?", example.prompt)
    return edges, root[1] or root[2]


@pytest.mark.parametrize("length", [900, 4000])
def test_the_answer_of_a_search_is_what_breadth_first_search_finds(make, length):
    for example in make("graph_search", length=length, count=5):
        edges, root = graph(example)
        assert len(edges) == len(set(edges)) > 8
        levels, seen = [{root}], {root}
        for _ in range(2):
            reached = {b for a, b in edges if a in levels[-1]} - seen
            seen |= reached
            levels.append(reached)
        assert set(example.answers) == levels[2] and len(example.answers) == 4


def test_the_parents_are_all_nodes_with_an_edge_to_the_node(make):
    for example in make("graph_parents", count=5):
        edges, root = graph(example)
        assert Counter(example.answers) == Counter(a for a, b in edges if b == root)
        assert len({node for edge in edges for node in edge}) > len(edges) / 3  # a graph, not a star


def notes(example):
    return re.findall(r"^Note \d+, writer (\d): (\w+)$", example.prompt, re.M)


def test_tallies_are_what_counting_the_notes_gives(make):
    for task in TALLIES:
        for example in make(task, count=6):
            listed = notes(example)
            assert len(listed) >= 40
            if task == "tally_count":
                label = re.search(r"about (\w+)\?", example.prompt)[1]
                assert example.answers == (str(sum(subject == label for _, subject in listed)),)
                continue
            user = re.search(r"of writer (\d) have", example.prompt)
            counts = Counter(subject for writer, subject in listed if user is None or writer == user[1])
            assert set(example.answers) == {label for label, n in counts.items() if n == max(counts.values())}


def test_an_answer_grows_with_the_number_of_notes(make):
    short, long = (int(make("tally_count", length=length, count=1)[0].answers[0]) for length in (1500, 6000))
    assert long > 2 * short


def test_facts_lead_to_the_place_that_is_asked_for(make):
    """Replays the facts of the prompt, which stand in their order."""
    for facts in (1, 2, 3):
        for example in make(f"facts_{facts}", count=6):
            at, held, been = {}, {}, {}
            pattern = r"(Alma|Boris|Clara|Edgar) (walked to|picked up|put down) the (\w+)\."
            events = re.findall(pattern, example.prompt)
            assert len(events) == 12
            for person, verb, what in events:
                if verb == "walked to":
                    at[person] = what
                    for thing in (thing for thing, holder in held.items() if holder == person):
                        been[thing].append(what)
                elif verb == "picked up":
                    assert what not in held and been.get(what, [at[person]])[-1] == at[person]
                    held[what] = person
                    been.setdefault(what, [at[person]])
                else:
                    assert held.pop(what) == person
            question = example.prompt.rpartition("Question: ")[2]
            if facts == 1:
                expected = at[re.match(r"Where is (\w+)\?", question)[1]]
            elif facts == 2:
                expected = been[re.match(r"Where is the (\w+)\?", question)[1]][-1]
            else:
                thing, place = re.match(r"Where was the (\w+) before it came to the (\w+)\?", question).groups()
                assert been[thing].count(place) == 1 and been[thing][-1] == place
                expected = been[thing][-2]
            assert example.answers[0] == expected and len(set(example.answers)) == 6


def test_the_answer_of_a_round_is_the_ith_to_that_request(make):
    for needles in (2, 4, 8):
        for example in make(f"rounds_{needles}"):
            question = re.search(r"the (\w+) (\w+) about the (\S+), word .* code (\w+) and", example.prompt)
            ordinal, form, topic, code = question.groups()
            given = re.findall(rf"User: Write a {form} about the {topic}\.\nAssistant: (.*)", example.prompt)
            which = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth").index(ordinal)
            assert len(given) == needles == len(set(given)) and example.answers == (f"{code} {given[which]}",)
            assert example.prompt.count("User: ") > 2 * needles
            assert tasks.score(example, " " + code + " " + given[which - 1]) < 0.95


def test_only_one_function_of_the_prompt_holds_the_line(make):
    for example in make("code_holder", count=4):
        context, line = re.match(r"(?s).*?\n\n(.*)\n\nQuestion: .*?only\.\n(.*)\n Answer:", example.prompt).groups()
        functions = re.split(r"\n\n(?=(?:async )?def |@)", context)
        holding = [text for text in functions if line in [part.strip() for part in text.split("\n")]]
        assert len(holding) == 1 and re.match(r"def (\w+)", holding[0])[1] == example.answers[0]
        assert len(functions) > 3


def test_the_body_stands_in_the_prompt_behind_its_signature(make):
    for example in make("code_body", count=4):
        signature = example.prompt.rpartition("\n")[2]
        assert signature.startswith("def ") and example.prompt.count(f"{signature}\n{example.answers[0]}") == 1
        assert tasks.reference_answer(example).text == "\n" + example.answers[0]


@pytest.mark.parametrize(
    "rule, answers, output, expected",
    [
        (rules.set_f1, ("abcdef01", "b2345678"), " abcdef01, b2345678.", 1.0),
        (rules.set_f1, ("abcdef01", "b2345678"), "\n abcdef01 and c0000000\nb2345678", 0.5),
        (rules.set_f1, ("abcdef01",), "the nodes abcdef012", 0.0),
        (rules.nearness, ("12",), " 12 notes", 1.0),
        (rules.nearness, ("12",), " about 10 or 12", 0.75**2),
        (rules.nearness, ("12",), " a dozen", 0.0),
        (rules.first_word, ("music", "travel"), " Travel, I think", 1.0),
        (rules.first_word, ("music",), " not music", 0.0),
        (rules.one_place, ("garden", "hall", "shed"), " the garden. Then the hall", 1.0),
        (rules.one_place, ("garden", "hall", "shed"), " the garden or the hall", 0.0),
        (rules.one_place, ("garden", "hall", "shed"), " the gardens", 0.0),
        (rules.copied, ("k7q one two",), " k7q one two", 1.0),
        (rules.copied, ("k7q one two",), " one two", 0.0),
        (rules.copied, ("k7q abcd",), "k7q abxd", 0.75),
        (rules.similar, ("a = 1\nb = 2",), "    a = 1\n    b = 2\nc = 3", 1.0 * 2 * 11 / (11 + 15)),
    ],
)
def test_rules_are_the_published_ones(rule, answers, output, expected):
    assert rule(answers, output) == pytest.approx(expected)


def test_generating_stops_early_only_where_more_output_cannot_lower_the_score(make):
    assert not any(tasks.never_falls(make(task, count=1)[0]) for task in MORE)
    assert tasks.never_falls(tasks.Example("vt", 0, "", ("A",), 1, 1, 0, True))


MOVABLE = ["niah_single_1", "niah_multikey_1", "niah_multikey_2", "niah_multivalue", *GRAPHS, *TALLIES, "facts_2", "rounds_4"]


@pytest.mark.parametrize("where", ["front", "middle"])
@pytest.mark.parametrize("task", MOVABLE)
def test_a_question_that_is_not_last_stands_once_where_it_was_asked_to(tokenizer, haystack, task, where):
    options = dict(length=LENGTH, count=3, seed=0, max_new_tokens=300, haystack=haystack)
    last = tasks.generate(task, tokenizer, **options)
    for example, usual in zip(tasks.generate(task, tokenizer, question=where, **options), last):
        asked = re.search(r"\n(Question: .+ (?:else|word|only)\.|What (?:is|are all) the special magic .+\?)", usual.prompt)[1]
        assert example.prompt.count(asked) == 1 and asked in usual.prompt
        place = example.prompt.index(asked)
        assert place == 0 if where == "front" else 0.4 < place / len(example.prompt) < 0.6
        assert example.prompt.endswith("\nAnswer:") and example.length == len(tasks.encode(tokenizer, example))
        assert LENGTH - 300 - 400 < example.length <= LENGTH - 300
        assert tasks.score(example, tasks.reference_answer(example).text) == 1.0
        if task not in TALLIES:  # how many notes there are follows from the room
            assert set(example.answers) == set(usual.answers)
        if task.startswith("niah"):
            assert all(f" is: {answer}." in example.prompt for answer in example.answers)


def test_a_question_stands_nowhere_else(tokenizer):
    options = dict(length=LENGTH, count=1, seed=0)
    with pytest.raises(ValueError, match="question must be one of end, front, middle, got 'last'"):
        tasks.generate("niah_single_1", tokenizer, question="last", **options)
    with pytest.raises(ValueError, match="question must be at the end for vt, got 'front'"):
        tasks.generate("vt", tokenizer, question="front", **options)
