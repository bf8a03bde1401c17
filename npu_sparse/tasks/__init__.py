"""RULER-style long-context tasks (arXiv 2404.06654), written anew: generators for any length and RULER's scoring.

```python
from npu_sparse import tasks

examples = tasks.generate("niah_multikey_2", tokenizer, length=4096, count=50, seed=0)
outputs = [...]  # at most example.max_new_tokens new tokens after tasks.encode(tokenizer, example)
accuracy = sum(map(tasks.score, examples, outputs)) / len(examples)
```

Six tasks need nothing, five need a haystack of ordinary text and are labelled "substitute haystack" because published
figures use another text, two need the user's own question file: see `TASKS` and `task_names`. Templates, needle counts,
frequencies and new tokens are RULER's; key words come from a list of our own, and sentences are split by a simple rule.

`MORE` has tasks that are not needles, after other benchmarks and with words of our own: graph walks, facts in text, co-reference,
code retrieval and aggregation. Each is scored by its published rule (`rules`).

Any length works from a minimum on, which depends on the tokenizer and the new tokens and which the ValueError for a
shorter one states. With a vocabulary of 49K, 1024 is enough for every task (cwe needs 820, the others 220 to 420).
A needle's value is a few dozen tokens at most, so for `niah_single_*` a smaller `max_new_tokens` (16 for numbers, 40 for UUIDs)
gives the same scores and leaves more room. A model that repeats itself does no harm, since a score looks for the answer anywhere.
"""

from npu_sparse.tasks.catalogue import MORE, TASKS, Task, task_names
from npu_sparse.tasks.generate import Example, encode, generate
from npu_sparse.tasks.scoring import Reference, never_falls, reference_answer, score
from npu_sparse.tasks.texts import Document, documents, split

__all__ = [
    "MORE", "TASKS", "Document", "Example", "Reference", "Task", "documents", "encode", "generate", "never_falls",
    "reference_answer", "score", "split", "task_names",
]  # fmt: skip
