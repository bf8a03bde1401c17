"""The tasks by name, RULER's thirteen and those after other benchmarks: what each asks of a model and needs from its user."""

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from npu_sparse.tasks.aggregation import common_words, frequent_words, numbered
from npu_sparse.tasks.code import body, holder
from npu_sparse.tasks.draft import Draft, Request, first, listed
from npu_sparse.tasks.facts import tracked
from npu_sparse.tasks.graphs import parents, search
from npu_sparse.tasks.retrieval import Needles, in_needles, in_noise, in_text
from npu_sparse.tasks.rounds import repeated
from npu_sparse.tasks.rules import all_found, any_found, copied, first_word, nearness, one_place, set_f1, similar
from npu_sparse.tasks.tally import tally
from npu_sparse.tasks.tracing import variable_tracking

NEEDS = ("haystack", "qa_file")


@dataclass(frozen=True)
class Task:
    """`needs` is None, "haystack" (text from the user) or "qa_file" (a question file from the user).

    `draft` makes one prompt from a Request and the text; question answering drafts from its file instead. `write` makes one text
    of the answers, which follows the prompt after `lead`; answers of a task that is not `ordered` are written in the order of
    their first occurrence in the prompt. `rule` scores an output. `after` names the benchmark that a task follows with words of
    our own, where it is not RULER.
    """

    name: str
    summary: str
    max_new_tokens: int
    draft: Callable[[Request, Any], Draft] | None
    needs: str | None = None
    write: Callable[[Sequence[str]], str] = listed
    ordered: bool = True
    lead: str = " "
    rule: Callable[[Sequence[str], str], float] = all_found
    after: str = ""

    @property
    def comparable_with_published(self) -> bool:
        """False where the benchmark's own haystack is replaced by the user's, or its words by ours."""
        return self.needs != "haystack" and not self.after

    @property
    def label(self) -> str:
        """What a table must say beside this task's scores; empty when there is nothing to say."""
        if self.after:
            return f"after {self.after}"
        return "" if self.comparable_with_published else "substitute haystack"


def _niah(name: str, summary: str, draft: Callable[..., Draft], **needles: int | str) -> Task:
    needs = "haystack" if draft is in_text else None
    hidden = Needles(**needles)
    return Task(name, summary, 128, partial(draft, hidden), needs, ordered=hidden.values == 1)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _niah("niah_single_1", "one number in repeated sentences", in_noise),
        _niah("niah_single_2", "one number in text", in_text),
        _niah("niah_single_3", "one UUID in text", in_text, value="uuid"),
        _niah("niah_multikey_1", "one number of four keys in text", in_text, keys=4),
        _niah("niah_multikey_2", "one number among other needles", in_needles),
        _niah("niah_multikey_3", "one UUID among other UUID needles", in_needles, key="uuid", value="uuid"),
        _niah("niah_multivalue", "the four numbers of one key in text", in_text, values=4),
        _niah("niah_multiquery", "the numbers of four keys in text", in_text, keys=4, queries=4),
        Task("vt", "a chain of five variables in repeated sentences", 30, variable_tracking, write=" ".join),
        Task("cwe", "the ten most common words of a list", 120, common_words, write=numbered, ordered=False),
        Task("fwe", "the three most frequent coded words", 50, frequent_words),
        Task("qa_1", "a question over SQuAD paragraphs", 32, None, needs="qa_file", write=first, rule=any_found),
        Task("qa_2", "a question over HotpotQA paragraphs", 32, None, needs="qa_file", write=first, rule=any_found),
    )
}


def _after(benchmark: str, name: str, summary: str, new: int, draft: Callable[..., Draft], rule: Callable, **fields) -> Task:
    return Task(name, summary, new, draft, rule=rule, after=benchmark, **fields)


_IDS = {"write": ", ".join, "ordered": False}
MORE: dict[str, Task] = {
    task.name: task
    for task in (
        _after("GraphWalks", "graph_search", "the nodes two steps away", 64, partial(search, 2), set_f1, **_IDS),
        _after("GraphWalks", "graph_parents", "the four parents of a node", 64, parents, set_f1, **_IDS),
        *(
            _after(
                "BABILong", f"facts_{facts}", f"a place that takes {facts} fact{'s' * (facts > 1)} in text", 16,
                partial(tracked, facts), one_place, write=first, needs="haystack",
            )
            for facts in (1, 2, 3)
        ),
        *(
            _after("MRCR", f"rounds_{n}", f"one of {n} answers to one request", 96, partial(repeated, n), copied, write=first)
            for n in (2, 4, 8)
        ),
        _after("code search", "code_holder", "the function that holds a line", 24, holder, first_word, write=first),
        _after("code completion", "code_body", "the body of a function from before", 128, body, similar, write=first, lead="\n"),
        _after("OOLONG", "tally_count", "how many notes have a subject", 8, partial(tally, "count"), nearness, write=first),
        _after("OOLONG", "tally_most", "the subject of most notes", 8, partial(tally, "most"), first_word, write=first),
        _after("OOLONG", "tally_user", "the subject of most notes of one", 8, partial(tally, "user"), first_word, write=first),
    )
}


def task_names(runnable_without: Collection[str] = ()) -> tuple[str, ...]:
    """The names of RULER's tasks in its order, or of those that run without "haystack", "qa_file" or both."""
    without = {runnable_without} if isinstance(runnable_without, str) else set(runnable_without)
    if unknown := without - set(NEEDS):
        raise ValueError(f"runnable_without must name only {' and '.join(NEEDS)}, got {', '.join(sorted(unknown))}")
    return tuple(name for name, task in TASKS.items() if task.needs not in without)


def task_named(name: str) -> Task:
    """The task of that name; ValueError with the nearest names if there is none."""
    known = {**TASKS, **MORE}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(near)}?" if near else f"the tasks are {', '.join(known)}"
    raise ValueError(f"task must be a known name, got {name!r}: {advice}")
