"""The config of a quality run, and its gaps by name."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from ...budget import Budget
from ...ops import workspace
from ...ops.dispatch import IMPLEMENTATIONS
from ...tasks import task_names
from ...tasks.catalogue import task_named
from ...tasks.generate import check_question
from ..variants import check_budgets, check_names, former_fields_as_budget, settle, spelled

GAPS = {
    "oracle gap": ("dense", "oracle"),
    "indexer gap": ("oracle", "indexer"),
    "realization gap": ("indexer", "indexer-shared"),
}
TOTAL = {"total": ("dense", "indexer-shared")}
MACRO = "macro average"
INSTRUMENTS = ("generated", "forced")


@dataclass(frozen=True)
class EvalConfig:
    """What one quality run compares, and on what.

    Attributes:
        model: hub id, directory, GGUF file or demo name.
        adapter: directory of the indexer, or None.
        tasks: RULER tasks; those that need a question file need it in `qa_files`.
        length: tokens of prompt and answer together.
        count: prompts per task.
        seed: of prompts and bootstrap.
        budget: the Budget of all sparse variants, as `Budget.parse` spells it; per-query variants run at block 1, and only
            indexers have candidates.
        variants: names of `VARIANTS`; "dense" must be among them. A colon and fields of its Budget may follow a name:
            indexer:block=16,k=2048 or indexer-shared:share_layers=2.
        batch: prompts generated together with dense prefill; sparse ones are generated one by one.
        max_new_tokens: for all tasks in place of RULER's, or None.
        chat: whether questions go through the tokenizer's chat template.
        question: where in a prompt the question stands: "end", "front" or "middle"; not every task has one that can be moved.
        texts: sources of the haystacks, see `tasks.texts.documents`.
        qa_files: `{"qa_1": path, "qa_2": path}`.
        min_dense_score: in [0, 1]; a task that dense attention solves less well is listed, but not in the macro
            average.
        instruments: how prompts are scored: "generated" (greedy, scored as RULER does), "forced" (the reference answer on the
            cache of the prefill, beside dense logits: see `measure.teacher_forced`), or both.
        stress: teacher-forced scores of prompt and answer in one sparse forward as well, a prefill more a prompt.
        only_solved: sparse variants skip the tasks that are not in the macro average.
        dtype: of weights and activations; "auto" = bfloat16, or float32 on a processor that is not faster in bfloat16.
        device: "cpu", "cuda", "cuda:1", "npu", ...; its index is not part of the run's identity.
        impl: which operators run: "reference", "kernel" or "auto".
        workspace_mib: MiB of a slice of scores, as in `SparsePrefill.attach`: smaller where memory is short.
    """

    model: str
    adapter: str | None = None
    tasks: tuple[str, ...] = task_names("qa_file")
    length: int = 4096
    count: int = 50
    seed: int = 0
    budget: Budget = Budget()
    variants: tuple[str, ...] = ("dense", "oracle", "oracle-shared", "indexer", "indexer-shared", "local")
    batch: int = 10
    max_new_tokens: int | None = None
    chat: bool = False
    question: str = "end"
    texts: tuple[str, ...] = ("builtin",)
    qa_files: Mapping[str, str] = field(default_factory=dict)
    min_dense_score: float = 0.5
    instruments: tuple[str, ...] = INSTRUMENTS
    stress: bool = True
    only_solved: bool = False
    dtype: str = "auto"
    device: str = "cpu"
    impl: str = "reference"
    workspace_mib: int = workspace.DEFAULT_MIB

    def __post_init__(self):
        settle(self, "tasks", "variants", "texts", "instruments")
        object.__setattr__(self, "budget", Budget.of(self.budget))
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks must name at least one task and none twice, got {', '.join(self.tasks) or 'none'}")
        for task in self.tasks:
            if task_named(task).needs == "qa_file" and task not in self.qa_files:
                raise ValueError(f"{task} needs a question file: set qa_files[{task!r}] to its path")
        check_names(self.variants)
        if "dense" not in self.variants:
            raise ValueError(
                f"variants must include 'dense', which the others are measured against, got {self.variants}"
            )
        for name in ("length", "count", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        check_question(self.question)
        if self.max_new_tokens is not None and not 1 <= self.max_new_tokens < self.length:
            raise ValueError(f"max_new_tokens must lie in [1, length), got {self.max_new_tokens}")
        if not 0 <= self.min_dense_score <= 1:
            raise ValueError(f"min_dense_score must lie in [0, 1], got {self.min_dense_score}")
        chosen = set(self.instruments)
        if not chosen or chosen - set(INSTRUMENTS) or len(chosen) < len(self.instruments):
            got = ", ".join(self.instruments) or "none"
            raise ValueError(f"instruments must name {' or '.join(INSTRUMENTS)} or both, got {got}")
        if self.impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {self.impl!r}")
        workspace.check(self.workspace_mib)
        check_budgets(self.variants, self.length, self.budget)

    def to_dict(self) -> dict:
        """Plain JSON types; `from_dict` reads them back."""
        out = {**asdict(replace(self, device=self.device.partition(":")[0])), "budget": spelled(self.budget)}
        if self.instruments == ("generated",):  # as runs were before there was another
            del out["instruments"], out["stress"]
        return json.loads(json.dumps(out))

    @classmethod
    def from_dict(cls, data: Mapping) -> "EvalConfig":
        """The EvalConfig that `to_dict` wrote, now or in version 0.1; unknown fields are refused."""
        data = former_fields_as_budget(data)
        if unknown := set(data) - set(cls.__dataclass_fields__):
            raise ValueError(f"an eval config must have known fields only, got {', '.join(sorted(unknown))}")
        return cls(**{"instruments": ("generated",), **data})
