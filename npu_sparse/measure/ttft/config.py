"""The config of a timing run, and its stages by name."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...budget import Budget
from ...ops import workspace
from ...ops.dispatch import IMPLEMENTATIONS
from ..variants import check_budgets, check_names, former_fields_as_budget, settle, spelled, variant_named
from .shapes import SHAPES

STAGES = ("projection", "scoring", "top-k", "attention", "exact", "rest")
PARTS = ("gdn", "feed-forward", "norms")  # stages of a run with `parts`
ATTACHED = "attached"
PROMPTS = ("text", "random")
LAYERS = ("stock", "fast")


@dataclass(frozen=True)
class Way:
    """One prefill that is timed.

    Attributes:
        name: of its figures in records and reports.
        variant: of `VARIANTS`, with options; or ATTACHED.
        baseline: the dense implementation that it runs with; None = the model's own.
        layers: "stock" or "fast".
    """

    name: str
    variant: str
    baseline: str | None
    layers: str

    @property
    def dense(self) -> bool:
        """Whether speed-ups may be measured against it."""
        return self.variant == "dense"

    @property
    def label(self) -> str:
        """Its name in a table."""
        if self.dense:
            return self.name
        label = "attached, runs dense" if self.variant == ATTACHED else variant_named(self.variant).label
        return label + self.name.removeprefix(self.variant)


@dataclass(frozen=True)
class TtftConfig:
    """What one timing run compares, and on what.

    Attributes:
        model: hub id, directory, GGUF file or demo name; none where `shape` is given.
        shape: random weights of a true shape in place of a model, such as qwen3.5-0.8b, qwen3.5-9b or qwen2.5-0.5b. Times are
            those of the checkpoint, quality is not; the prompt is random.
        adapter: directory of the indexer; None = an untrained one (evidence: untrained, runtime only).
        heads: index heads of an untrained indexer.
        dim: d_idx of an untrained indexer.
        lengths: prompt lengths in tokens.
        budget: the Budget of all sparse variants, as `Budget.parse` spells it; per-query variants run at block 1, and only
            indexers have candidates.
        variants: names of `VARIANTS`; "dense" must be among them. A colon and fields of its Budget may follow a name:
            indexer:block=16,k=2048 or indexer-shared:share_layers=2.
        baselines: implementations of dense attention, a row each: fa2, cudnn, fa3 (CUDA), or a name of transformers, which on an
            NPU has torch_npu's fused attention as flash_attention_2. Sparse variants run with the first. None = the model's own.
        layers: the layers around attention, of dense and sparse alike: stock (transformers'), fast (`FastHybrid`) or both.
        chunk: tokens per forward; 0 = the whole prompt at once.
        runs: timed rounds; a number, or one by length, from each length on: 4096=10,131072=5.
        warmup: rounds before them, given like runs.
        stage_runs: rounds with stage clocks, after them.
        parts: stage clocks around Gated DeltaNet layers, feed-forward and norms, too.
        prompt: "text" (real text from `texts`), "random" (uniform token ids) or "auto": text where there is a tokenizer.
        texts: sources of the text, see `tasks.texts.documents`.
        overhead: also times "attached": the indexer attached, but `dense_below` above the length, so that dense runs.
        seed: of prompts, order and bootstrap.
        dtype: of weights and activations; "auto" = bfloat16, or float32 on a processor that is not faster in bfloat16.
        device: "cpu", "cuda", "cuda:1", "npu", ...; its index is not part of the run's identity.
        impl: which operators run: "auto", "reference" or "kernel".
        workspace_mib: MiB of a slice of scores, as in `SparsePrefill.attach`: smaller where memory is short.
    """

    model: str = ""
    adapter: str | None = None
    shape: str | None = None
    heads: int = 1
    dim: int = 128
    lengths: tuple[int, ...] = (4096,)
    budget: Budget = Budget()
    variants: tuple[str, ...] = ("dense", "indexer", "indexer-shared")
    baselines: tuple[str, ...] = ()
    layers: tuple[str, ...] = ("stock",)
    chunk: int = 0
    runs: int | str = 10
    warmup: int | str = 2
    stage_runs: int = 3
    parts: bool = False
    prompt: str = "auto"
    texts: tuple[str, ...] = ("builtin",)
    overhead: bool = False
    seed: int = 0
    dtype: str = "auto"
    device: str = "cpu"
    impl: str = "auto"
    workspace_mib: int = workspace.DEFAULT_MIB

    def __post_init__(self):
        settle(self, "variants", "texts", "baselines", "layers")
        object.__setattr__(self, "budget", Budget.of(self.budget))
        lengths = (self.lengths,) if isinstance(self.lengths, int) else tuple(self.lengths)
        object.__setattr__(self, "lengths", lengths)
        if not lengths or len(set(lengths)) != len(lengths):
            raise ValueError(f"lengths must name at least one length and none twice, got {lengths}")
        if bool(self.model) == (self.shape is not None):
            raise ValueError(f"a run must have a model or a shape, and not both, got {self.model!r} and {self.shape!r}")
        if self.shape is not None and self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {self.shape!r}")
        if self.prompt == "auto":
            object.__setattr__(self, "prompt", "text" if self.shape is None else "random")
        if self.prompt == "text" and self.shape is not None:
            raise ValueError("prompt must be random where a shape has no tokenizer, got 'text'")
        check_names(self.variants)
        if "dense" not in self.variants:
            raise ValueError(
                f"variants must include 'dense', which speed-ups are measured against, got {self.variants}"
            )
        if not self.layers or len(set(self.layers)) != len(self.layers) or not set(self.layers) <= set(LAYERS):
            raise ValueError(f"layers must be {', '.join(LAYERS)} or both, got {self.layers}")
        if len(set(self.baselines)) != len(self.baselines):
            raise ValueError(f"baselines must not be named twice, got {', '.join(self.baselines)}")
        whole = {name: getattr(self, name) for name in ("heads", "dim", "stage_runs")} | {f"length {n}": n for n in lengths}
        for name, value in whole.items():
            _count(name.split()[0], value)
        if isinstance(self.chunk, bool) or not isinstance(self.chunk, int) or self.chunk < 0:
            raise ValueError(f"chunk must be a whole number of tokens, got {self.chunk!r}")
        for name, least in (("runs", 1), ("warmup", 0)):
            value = getattr(self, name)
            if isinstance(value, str) and value.strip().isdigit():
                object.__setattr__(self, name, int(value))
            for length in lengths:
                by_length(name, value, length, least)
        if self.prompt not in PROMPTS:
            raise ValueError(f"prompt must be one of {', '.join(PROMPTS)}, got {self.prompt!r}")
        if self.impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {self.impl!r}")
        workspace.check(self.workspace_mib)
        check_budgets(self.variants, min(lengths), self.budget)

    def ways(self) -> dict[str, Way]:
        """Every prefill that is timed, by name."""
        listed = []
        for layers in self.layers:
            which = f" ({layers} layers)" if len(self.layers) > 1 else ""
            native = self.baselines[0] if self.baselines else None
            for variant in (*self.variants, *((ATTACHED,) if self.overhead else ())):
                if variant == "dense" and self.baselines:
                    listed += [Way(f"dense {baseline}{which}", variant, baseline, layers) for baseline in self.baselines]
                else:
                    listed.append(Way(variant + which, variant, native, layers))
        return {way.name: way for way in listed}

    def rounds(self, length: int) -> tuple[int, int]:
        """`(warmup, runs)` at a length."""
        return by_length("warmup", self.warmup, length, 0), by_length("runs", self.runs, length, 1)

    def weights(self) -> str:
        """What was loaded or drawn, for a heading."""
        return f"random weights of {self.shape}'s shape" if self.shape else Path(self.model).name

    def to_dict(self) -> dict:
        """Plain JSON types; `from_dict` reads them back."""
        out = {**asdict(replace(self, device=self.device.partition(":")[0])), "budget": spelled(self.budget)}
        return json.loads(json.dumps(out))

    @classmethod
    def from_dict(cls, data: Mapping) -> "TtftConfig":
        """The TtftConfig that `to_dict` wrote, now or in version 0.1; unknown fields are refused."""
        data = former_fields_as_budget(data)
        if unknown := set(data) - set(cls.__dataclass_fields__):
            raise ValueError(f"a ttft config must have known fields only, got {', '.join(sorted(unknown))}")
        return cls(**data)


def by_length(name: str, value: int | str, length: int, least: int) -> int:
    """The number that 3, "3" or "4096=10,131072=3" gives a length: that of the last start up to it, or of the first."""
    if not isinstance(value, str) or "=" not in value:
        return _count(name, int(value) if isinstance(value, str) and value.strip().isdigit() else value, least)
    steps = []
    for part in value.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*=\s*(\d{1,18})\s*", part)
        if not match:
            raise ValueError(f"{name} must be a number, or LENGTH=NUMBER joined by commas, got {value!r}")
        steps.append((int(match[1]), _count(name, int(match[2]), least)))
    return next((number for start, number in sorted(steps, reverse=True) if start <= length), min(steps)[1])


def _count(name: str, value, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be {'a positive integer' if least else '>= 0'}, got {value!r}")
    return value
