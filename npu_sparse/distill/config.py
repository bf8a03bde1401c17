"""The config of a distillation run."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ..budget import Budget
from ..indexer import DIMS
from ..ops.dispatch import IMPLEMENTATIONS
from ..runs.machine import chosen_dtype
from ..tasks.catalogue import task_named

LOSSES = ("kl", "sparse", "both", "shared")
SHARED_BLOCK = 64  # queries that share a support at the recommended budget
SHORTEST = 64
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DistillConfig:
    """Everything that decides the outcome of a run; it is written first, and a run is resumed only by the same one.

    Lists become tuples; a field that breaks a rule raises ValueError or TypeError with one sentence.

    Attributes:
        model: hub id, directory, GGUF file or demo name.
        texts: text sources (folders, files, installed packages); see `tasks.documents`.
        tasks: RULER-style tasks whose prompts, answers included, are mixed in; seeds differ from those of evaluation.
        task_fraction: share of steps that train on task prompts.
        lengths: context lengths in tokens, one drawn per step.
        tokens: tokens per step over all processes: tokens // length sequences, which the processes share evenly.
        micro_batch: sequences that go through the model together; their gradients add up over a step.
        rows, segment: query rows per layer and sequence that are supervised, in whole segments of `segment` rows, at
            least one; 0 = every row.
        steps, lr, warmup, min_lr: optimizer steps; lr rises linearly over `warmup` and falls by cosine to `min_lr`.
        weight_decay, clip: of AdamW, and the largest norm of a step's gradients.
        heads, dim: geometry of the indexer.
        loss, sparse_k: "kl" over all causal keys, "sparse" (restricted to the union of the oracle's and the indexer's
            own top `sparse_k`, both renormalised), "both": their sum, or "shared": over all keys, of what 64 queries in a row
            share at the runtime, the largest mass against the largest score less its query's log-partition.
        lm_steps: steps after these with the language-model loss through a soft selection of `sparse_k` keys, on contexts of the
            shortest length, at the last learning rate; in one process.
        budgets: budgets at which validation measures recall.
        budget: the same, as `Budget.grid` spells it, in place of budgets: k=64|128|256.
        partition_steps: steps after training whose batches fit the partition heads, which predict every query's log-partition for
            Budget(reduce="softmax_max"); forward passes only, by least squares. 0 = an indexer without such heads.
        validation_fraction: share of the text that is held out, by document.
        validation_length, validation_prompts: held-out contexts for validation, text and tasks alternating.
        save_every, validate_every: steps between checkpoints, and between validations (the last step always).
        seed: of the indexer's first weights, of batches, rows and the split into training and validation.
        dtype, device: of the model; dtype "auto" = bfloat16, or float32 on a processor that is not faster in bfloat16. Under
            torchrun every process takes the device of its local rank.
        impl: of the operator behind loss "kl": "auto" (the kernel on cuda), "reference" or "kernel". The others are eager.
    """

    model: str
    texts: tuple[str, ...] = ("builtin",)
    tasks: tuple[str, ...] = ("niah_single_2", "niah_multikey_1", "niah_multikey_2", "vt")
    task_fraction: float = 0.5
    lengths: tuple[int, ...] = (1024, 2048)
    tokens: int = 8192
    micro_batch: int = 1
    rows: int = 512
    segment: int = 64
    steps: int = 300
    lr: float = 1e-3
    min_lr: float = 5e-5
    warmup: int = 30
    weight_decay: float = 0.1
    clip: float = 1.0
    heads: int = 1
    dim: int = 128
    loss: str = "kl"
    sparse_k: int = 512
    lm_steps: int = 0
    partition_steps: int = 16
    budgets: tuple[int, ...] = (64, 128, 256, 512)
    budget: str = ""
    validation_fraction: float = 0.1
    validation_length: int = 2048
    validation_prompts: int = 8
    save_every: int = 25
    validate_every: int = 100
    seed: int = 0
    dtype: str = "auto"
    device: str = "cpu"
    impl: str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "dtype", chosen_dtype(self.dtype, self.device))
        axes, rest = Budget.grid(self.budget, ("k",))
        if rest:
            raise ValueError(f"budget must name k only, at which recall is measured per query, got {rest!r}")
        object.__setattr__(self, "budgets", axes.get("k", self.budgets))
        object.__setattr__(self, "budget", "")
        for name in ("texts", "tasks", "lengths", "budgets"):
            value = getattr(self, name)
            if isinstance(value, str) or not hasattr(value, "__iter__"):
                raise TypeError(f"{name} must be a list, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name, least in (
            ("tokens", 1), ("micro_batch", 1), ("rows", 0), ("segment", 1), ("steps", 1), ("warmup", 0), ("heads", 1),
            ("sparse_k", 1), ("validation_prompts", 1), ("save_every", 1), ("validate_every", 1), ("seed", 0),
            ("partition_steps", 0), ("lm_steps", 0),
        ):  # fmt: skip
            _whole(name, getattr(self, name), least)
        for length in (*self.lengths, self.validation_length):
            _whole("lengths" if length in self.lengths else "validation_length", length, SHORTEST)
        for name in ("texts", "lengths", "budgets"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one value, got none")
        if self.tokens < max(self.lengths):
            raise ValueError(f"tokens must hold the longest of lengths, {max(self.lengths)}, got {self.tokens}")
        for k in self.budgets:
            if _whole("budgets", k, 1) >= self.validation_length:
                raise ValueError(f"budgets must be below validation_length = {self.validation_length}, got {k}")
        for name, allowed in (("loss", LOSSES), ("dim", DIMS), ("dtype", DTYPES), ("impl", IMPLEMENTATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        if self.impl == "kernel" and self.loss != "kl":
            raise ValueError(f"impl must be auto or reference for loss {self.loss!r}, which has no kernel, got kernel")
        if self.heads > 64:
            raise ValueError(f"heads must be <= 64, got {self.heads}")
        for task in self.tasks:
            if task_named(task).needs == "qa_file":
                raise ValueError(f"tasks must run without a question file, got {task}")
        if not 0 <= self.task_fraction <= 1 or (self.task_fraction and not self.tasks):
            raise ValueError(f"task_fraction must be in [0, 1], and 0 without tasks, got {self.task_fraction}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")
        if not 0 < self.lr < math.inf or not 0 < self.clip:
            raise ValueError(f"lr and clip must be positive, got {self.lr} and {self.clip}")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr must be in [0, lr = {self.lr}], got {self.min_lr}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be >= 0, got {self.weight_decay}")

    @property
    def all_steps(self) -> int:
        """Optimizer steps of both stages."""
        return self.steps + self.lm_steps

    def lr_at(self, step: int) -> float:
        """Learning rate of 0-based `step`: linear warm-up, then cosine down to min_lr."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))

    def to_dict(self) -> dict:
        """Plain JSON types; `from_dict` reads them back."""
        return {name: value for name, value in asdict(self).items() if name != "budget"}  # budgets has it

    @classmethod
    def from_dict(cls, data: Mapping) -> "DistillConfig":
        """The DistillConfig that `to_dict` wrote; unknown fields are refused."""
        if unknown := set(data) - set(cls.__dataclass_fields__):
            raise ValueError(f"a distill config must have known fields only, got {', '.join(sorted(unknown))}")
        return cls(**data)


def _whole(name: str, value, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return value
