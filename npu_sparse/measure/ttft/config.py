"""What a timing run compares, and on what; its stages by name."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from ...budget import Budget
from ...ops import workspace
from ...ops.dispatch import IMPLEMENTATIONS
from ...runs.machine import chosen_dtype
from ..variants import as_budget, check_budgets, check_names, former_fields_as_budget, spelled

STAGES = ("projection", "scoring", "top-k", "attention", "exact", "rest")
ATTACHED = "attached"
PROMPTS = ("text", "random")


@dataclass(frozen=True)
class TtftConfig:
    """What one timing run compares, and on what.

    Attributes:
        model: hub id, directory, GGUF file or demo name.
        adapter: directory of the indexer; None = an untrained one (evidence: untrained, runtime only).
        lengths: prompt lengths in tokens.
        budget: the Budget of all sparse variants, as `Budget.parse` spells it; per-query variants run at block 1, and only
            indexers have candidates.
        variants: names of `VARIANTS`; "dense" must be among them. A colon and fields of its Budget may follow a name:
            indexer:block=16,k=2048 or indexer-shared:share_layers=2.
        runs: timed rounds; warmup: rounds before them; stage_runs: rounds with stage clocks, after them.
        prompt: "text" (real text from `texts`) or "random" (uniform token ids).
        texts: sources of the text, see `tasks.texts.documents`.
        overhead: also times "attached": the indexer attached, but `dense_below` above the length, so that dense runs.
        seed: of prompts, order and bootstrap.
        dtype: of weights and activations; "auto" = bfloat16, or float32 on a processor that is not faster in bfloat16.
        device: "cpu", "cuda", "cuda:1", "npu", ...; its index is not part of the run's identity.
        impl: which operators run: "auto", "reference" or "kernel".
        workspace_mib: MiB of a slice of scores, as in `SparsePrefill.attach`: smaller where memory is short.
    """

    model: str
    adapter: str | None = None
    lengths: tuple[int, ...] = (4096,)
    budget: Budget = Budget()
    variants: tuple[str, ...] = ("dense", "indexer", "indexer-shared")
    runs: int = 10
    warmup: int = 2
    stage_runs: int = 3
    prompt: str = "text"
    texts: tuple[str, ...] = ("builtin",)
    overhead: bool = False
    seed: int = 0
    dtype: str = "auto"
    device: str = "cpu"
    impl: str = "auto"
    workspace_mib: int = workspace.DEFAULT_MIB

    def __post_init__(self):
        object.__setattr__(self, "dtype", chosen_dtype(self.dtype, self.device))
        object.__setattr__(self, "budget", as_budget(self.budget))
        for name in ("variants", "texts"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(map(str, value)))
        lengths = (self.lengths,) if isinstance(self.lengths, int) else tuple(self.lengths)
        object.__setattr__(self, "lengths", lengths)
        if not lengths or len(set(lengths)) != len(lengths):
            raise ValueError(f"lengths must name at least one length and none twice, got {lengths}")
        check_names(self.variants)
        if "dense" not in self.variants:
            raise ValueError(
                f"variants must include 'dense', which speed-ups are measured against, got {self.variants}"
            )
        whole = {"runs": self.runs, "stage_runs": self.stage_runs, **{f"length {n}": n for n in lengths}}
        for name, value in whole.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name.split()[0]} must be a positive integer, got {value!r}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be >= 0, got {self.warmup}")
        if self.prompt not in PROMPTS:
            raise ValueError(f"prompt must be one of {', '.join(PROMPTS)}, got {self.prompt!r}")
        if self.impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {self.impl!r}")
        workspace.check(self.workspace_mib)
        check_budgets(self.variants, min(lengths), self.budget)

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
