"""Training and validation contexts.

Sequence j of a step is a function of (seed, step, j) alone, so that a resumed run and several processes see the same data.
"""

import hashlib
import json
import random

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .. import tasks
from .config import DistillConfig

CHARS_PER_TOKEN = 8  # more than the average of any text, so that a window is cut too long first and then to length
TRAINING_SEED, VALIDATION_SEED = 1_000_000, 2_000_000  # task prompts of evaluation use small seeds


class Contexts:
    """Token windows of documents, and task prompts with their answers."""

    def __init__(self, config: DistillConfig, tokenizer):
        self.config, self.tokenizer = config, tokenizer
        documents = tasks.documents(config.texts)
        self.training, self.validation = tasks.split(documents, config.validation_fraction, config.seed)
        raw, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
        self.start = raw[: raw.index(bare[0])]  # the special tokens that raw text begins with
        self._require_room_for_tasks()

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Tensor:
        """int64 `[sequences of this process, length]` of one training step: sequences rank, rank + world, ..."""
        config = self.config
        rng = random.Random(f"{config.seed}/{step}")
        length = rng.choice(config.lengths)
        if config.steps <= step < config.all_steps:  # of the language-model loss
            length = min(config.lengths)
        from_tasks = rng.random() < config.task_fraction
        task = rng.choice(config.tasks) if from_tasks else None
        sequences = range(rank, config.tokens // length, world)
        rngs = [random.Random(f"{config.seed}/{step}/{j}") for j in sequences]
        return torch.stack([
            self._prompt(task, length, self.training, TRAINING_SEED + rng.randrange(900_000)) if task
            else self._window(length, self.training, rng)
            for rng in rngs
        ])  # fmt: skip

    def held_out(self) -> list[tuple[str, Tensor]]:
        """`(kind, int64 [1, validation_length])` contexts, text and tasks in turn, from documents never trained on."""
        config = self.config
        rng = random.Random(f"{config.seed}/validation")
        contexts = []
        for n in range(config.validation_prompts):
            if n % 2 == 0 or not config.tasks:
                ids, kind = self._window(config.validation_length, self.validation, rng), "text"
            else:
                task = config.tasks[n // 2 % len(config.tasks)]
                ids, kind = self._prompt(task, config.validation_length, self.validation, VALIDATION_SEED + n), "tasks"
            contexts.append((kind, ids[None]))
        return contexts

    def digest(self) -> str:
        """16 hex digits of the documents, which of them are held out, and how the tokenizer reads the first of each kind."""
        digest = hashlib.sha256()
        for documents in (self.training, self.validation):
            for document in documents:
                digest.update(f"{document.name}\n{len(document.text)}\n{document.text}".encode("utf-8", "surrogatepass"))
            first = documents[0].text[: 64 * CHARS_PER_TOKEN] if documents else ""
            digest.update(json.dumps([self.start, self.tokenizer(first, add_special_tokens=False).input_ids]).encode())
        return digest.hexdigest()[:16]

    def _window(self, length: int, documents, rng: random.Random) -> Tensor:
        ids = list(self.start)
        while len(ids) < length:
            text = rng.choice(documents).text
            at = rng.randrange(max(1, len(text) - length * CHARS_PER_TOKEN // 2))
            piece = text[at : at + length * CHARS_PER_TOKEN]
            piece = piece.partition(" ")[2] or piece  # from a whole word on, in languages that part them
            ids += self.tokenizer(piece, add_special_tokens=False).input_ids
        return torch.tensor(ids[:length])

    def _prompt(self, task: str, length: int, documents, seed: int) -> Tensor:
        haystack = [documents[random.Random(seed).randrange(len(documents))]]
        example = tasks.generate(task, self.tokenizer, length=length, count=1, seed=seed, haystack=haystack)[0]
        ids = tasks.encode(self.tokenizer, example)
        answer = " " + ", ".join(example.answers) + ".\n"
        ids = ids + self.tokenizer(answer, add_special_tokens=False).input_ids
        missing = length - len(ids)
        if missing > 0:  # in front, so that the answer stays at the end: text of the same documents
            begin = len(self.start)
            ids = self._window(missing + begin, documents, random.Random(seed)).tolist() + ids[begin:]
        return torch.tensor(ids[-length:])

    def _require_room_for_tasks(self) -> None:
        config = self.config
        trained = [min(config.lengths)] if config.task_fraction else []
        for length in trained + [config.validation_length] * (config.validation_prompts > 1):
            for task in config.tasks:
                self._prompt(task, length, self.training, TRAINING_SEED)


class _Steps(Dataset):
    def __init__(self, contexts: Contexts, rank: int, world: int):
        self.contexts, self.rank, self.world = contexts, rank, world

    def __getitem__(self, step: int) -> Tensor:
        return self.contexts.batch(step, self.rank, self.world)


def batches(contexts: Contexts, start: int, rank: int, world: int, workers: int) -> DataLoader:
    """The batches of steps start, start + 1, ...; `workers` processes prepare them ahead."""
    steps = range(start, contexts.config.all_steps)
    return DataLoader(_Steps(contexts, rank, world), batch_size=None, sampler=steps, num_workers=workers)


def row_segments(config: DistillConfig, length: int, step: int) -> list[tuple[int, int]]:
    """`[start, stop)` query rows to supervise at one step: the last segment always, the rest at random without overlap.

    Segments are counted from the end of the context; the one at its start may be shorter.
    """
    ends = range(length, 0, -config.segment)
    slots = [(max(0, end - config.segment), end) for end in reversed(ends)]
    if not config.rows or config.rows >= length:
        return slots
    rng = random.Random(f"{config.seed}/{step}/rows")
    wanted = max(0, config.rows // config.segment - 1)
    return sorted(rng.sample(slots[:-1], min(len(slots) - 1, wanted))) + slots[-1:]
