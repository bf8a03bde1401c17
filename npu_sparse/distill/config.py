"""What a distillation run is made of."""

from dataclasses import asdict, dataclass

LOSSES = ("kl", "sparse", "both")


@dataclass(frozen=True)
class DistillConfig:
    """Everything that decides the outcome of a run; it is written first, and a run is resumed only by the same one.

    Attributes:
        model: hub id, directory, GGUF file or demo name.
        texts: text sources (folders, files, installed packages); see `tasks.documents`.
        tasks: RULER-style tasks whose prompts, answers included, are mixed in; seeds differ from those of evaluation.
        task_fraction: share of steps that train on task prompts.
        lengths: context lengths in tokens, one drawn per step.
        tokens: tokens per step over all processes (sequences per step = tokens // length, at least one per process).
        micro_batch: sequences that go through the model together; their gradients add up over a step.
        rows: query rows per layer and sequence that are supervised, in segments of `segment`; 0 = every row.
        steps, warmup: optimizer steps; lr rises linearly over `warmup` and falls by cosine to `min_lr`.
        heads, dim: geometry of the indexer.
        loss: "kl" over all causal keys, "sparse" (restricted to the union of the oracle's and the indexer's own top
            `sparse_k`, both renormalised), or "both": their sum.
        budgets: budgets at which validation measures recall.
        validation_length, validation_prompts: held-out contexts for validation, text and tasks alternating.
        save_every, validate_every: steps between checkpoints, and between validations (the last step always).
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
    budgets: tuple[int, ...] = (64, 128, 256, 512)
    validation_fraction: float = 0.1
    validation_length: int = 2048
    validation_prompts: int = 8
    save_every: int = 25
    validate_every: int = 100
    seed: int = 0
    dtype: str = "bfloat16"
    device: str = "cpu"

    def __post_init__(self):
        for name in ("texts", "tasks", "lengths", "budgets"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("tokens", "micro_batch", "segment", "steps", "sparse_k", "validation_length", "validation_prompts", "save_every",
                     "validate_every"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("rows", "warmup", "weight_decay", "min_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if not self.lengths or min(self.lengths) < 64:
            raise ValueError(f"lengths must be at least 64 tokens each, got {self.lengths}")
        if not 0 <= self.task_fraction <= 1 or (self.task_fraction and not self.tasks):
            raise ValueError(f"task_fraction must be in [0, 1], and 0 without tasks, got {self.task_fraction}")
        if not self.budgets or min(self.budgets) < 1 or max(self.budgets) >= self.validation_length:
            raise ValueError(
                f"budgets must lie in [1, validation_length), got {self.budgets} for {self.validation_length} tokens"
            )
        if not self.lr > 0 or not self.clip > 0:
            raise ValueError(f"lr and clip must be positive, got {self.lr} and {self.clip}")

    def lr_at(self, step: int) -> float:
        """Learning rate of 0-based `step`: linear warm-up, then cosine down to min_lr."""
        import math

        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return asdict(self)
