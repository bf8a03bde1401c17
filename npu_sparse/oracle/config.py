"""The config of an oracle study, and the variants that follow from it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from ..budget import BLOCKS, MASS_REDUCTIONS, Budget
from ..ops import workspace
from ..ops.dispatch import IMPLEMENTATIONS
from ..runs.machine import chosen_dtype

HEADS = ("all", "kv")
CONTROLS = ("local", "random")
DTYPES = ("float32", "bfloat16", "float16")
AXES = {"k": "budgets", "block": "blocks", "reduce": "reduces", "share_layers": "share_layers"}  # of a Budget, and here
SERVED = ("sink", "recent", "anchors", "tail")


@dataclass(frozen=True)
class OracleConfig:
    """An oracle study. Lists become tuples; a field that breaks a rule raises ValueError or TypeError with one
    sentence.

    Attributes:
        model: what `checkpoints.load` takes: a demo name, a directory, a GGUF file or a hub id.
        length: tokens per prompt.
        budgets: k, keys per support row, each below `length`.
        texts: what `tasks.documents` takes: files, folders or named sources.
        prompts: how many prompts of real text.
        heads: "all" = one support for all heads, "kv" = one per KV group.
        blocks: queries that share a support (b_sel), 1 = every query has its own.
        reduces: how a block's queries become one row, "max" or "mean"; without meaning for block 1.
        share_layers: full-attention layers in a row that read the support of the first of them; 1 = every layer has its own.
            End to end only: layer by layer, every layer is measured on its own.
        budget: what the Budgets of all rows have in common, as `Budget.parse` spells it: tail, and end to end
            only sink, recent and anchors. The grid can be spelled here, too, in place of budgets, blocks, reduces and
            share_layers: `k=64|128,block=1|64,reduce=max,share_layers=1|2,tail`.
        controls: "local" (`sink` first keys and the most recent) and "random", per query and at the same budgets.
        sink: sinks of the "local" control alone.
        tasks: RULER-style tasks to score, by name; may be empty.
        task_count: examples per task.
        task_new_tokens: most new tokens per example; the task's own number where that is smaller.
        qa_file: question file of the tasks that need one.
        chat: put tasks into the model's chat template.
        layer_prompts: how many of the prompts are also measured layer by layer on the dense trajectory.
        position_stride: next-token distributions are compared at every n-th position.
        noise_dtype: dense in this dtype against dense in `dtype` is the noise floor; "auto" = float32, or bfloat16
            beside float32; "none" = no such row.
        dtype, device: of the model; dtype "auto" = bfloat16, or float32 on a processor that is not faster in bfloat16.
        impl: which operators run, "reference", "auto" or "kernel".
        workspace_mib: MiB of a slice of scores, as in `SparsePrefill.attach`: smaller where memory is short.
        seed: of the choice of texts, of the tasks, of the random control and of the bootstrap.
    """

    model: str
    length: int = 1024
    budgets: tuple[int, ...] = (64, 128, 256)
    texts: tuple[str, ...] = ("builtin",)
    prompts: int = 4
    heads: tuple[str, ...] = HEADS
    blocks: tuple[int, ...] = (1, 16, 64)
    reduces: tuple[str, ...] = MASS_REDUCTIONS
    share_layers: tuple[int, ...] = (1,)
    budget: str = ""
    controls: tuple[str, ...] = CONTROLS
    sink: int = 4
    tasks: tuple[str, ...] = ()
    task_count: int = 8
    task_new_tokens: int = 32
    qa_file: str | None = None
    chat: bool = False
    layer_prompts: int = 1
    position_stride: int = 1
    noise_dtype: str = "auto"
    dtype: str = "float32"
    device: str = "cpu"
    impl: str = "reference"
    workspace_mib: int = workspace.DEFAULT_MIB
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "dtype", chosen_dtype(self.dtype, self.device))
        axes, rest = Budget.grid(self.budget, AXES)
        for axis, values in axes.items():
            object.__setattr__(self, AXES[axis], values)
        object.__setattr__(self, "budget", rest)
        for name in ("budgets", "texts", "heads", "blocks", "reduces", "share_layers", "controls", "tasks"):
            value = getattr(self, name)
            if isinstance(value, str) or not hasattr(value, "__iter__"):
                raise TypeError(f"{name} must be a list, got {value!r}")
            if len(set(value)) < len(tuple(value)):
                raise ValueError(f"{name} must name each value once, got {list(value)}")
            object.__setattr__(self, name, tuple(value))
        for name in ("budgets", "texts", "heads", "blocks", "reduces", "share_layers"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one value, got none")
        for name, least in (
            ("length", 2), ("prompts", 1), ("sink", 0), ("task_count", 1), ("task_new_tokens", 1),
            ("layer_prompts", 0), ("position_stride", 1), ("seed", 0),
        ):  # fmt: skip
            _whole(name, getattr(self, name), least)
        for k in self.budgets:
            if _whole("budgets", k, 1) >= self.length:
                raise ValueError(f"budgets must be below the length of {self.length} tokens, got {k}")
        for layers in self.share_layers:
            _whole("share_layers", layers, 1)
        for name, allowed in (("heads", HEADS), ("blocks", BLOCKS), ("reduces", MASS_REDUCTIONS), ("controls", CONTROLS)):
            for value in getattr(self, name):
                _one_of(name, value, allowed)
        for text in self.texts:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"texts must name files, folders or sources, got {text!r}")
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("impl", self.impl, IMPLEMENTATIONS)
        _one_of("noise_dtype", self.noise_dtype, ["auto", "none", *(dtype for dtype in DTYPES if dtype != self.dtype)])
        workspace.check(self.workspace_mib)
        if "local" in self.controls and self.sink >= min(self.budgets):
            raise ValueError(f"sink must be below every budget, got {self.sink} and a budget of {min(self.budgets)}")
        if self.layer_prompts > self.prompts:
            raise ValueError(f"layer_prompts must be at most prompts = {self.prompts}, got {self.layer_prompts}")
        for name in Budget.changes(self.budget):
            _one_of("budget: field", name, (*AXES, *SERVED))
        for variant in variants(self, kv_heads=2):
            self.budget_of(variant)

    def budget_of(self, variant: "Variant") -> Budget:
        """The Budget of one variant, end to end."""
        own = Budget(variant.k, variant.block, variant.reduce or "max", share_layers=variant.share_layers)
        return Budget.parse(self.budget, own)

    @property
    def tail(self) -> bool:
        """As in Budget: whether keys outside a support are read as one, or dropped."""
        return Budget.changes(self.budget).get("tail", False)

    @property
    def floor_dtype(self) -> str | None:
        """The dtype of the noise floor, or None."""
        if self.noise_dtype == "auto":
            return "bfloat16" if self.dtype == "float32" else "float32"
        return None if self.noise_dtype == "none" else self.noise_dtype

    def to_dict(self) -> dict:
        """Plain JSON types; `OracleConfig.from_dict` reads them back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping) -> "OracleConfig":
        """The OracleConfig that `to_dict` wrote, now or in version 0.1; unknown fields are refused."""
        if "tail" in data:
            data = {**data, "budget": data.get("budget", "tail" if data["tail"] else "")}
            del data["tail"]
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(data) - set(known)):
            raise ValueError(f"oracle config has unknown fields {unknown}, known are {known}")
        return cls(**data)


@dataclass(frozen=True)
class Variant:
    """One way of choosing supports at one budget.

    `evidence` is "oracle" or "control"; `heads`, `block`, `reduce` and `share_layers` are as in OracleConfig (`reduce` is
    None for block 1).
    """

    evidence: str
    selector: str
    k: int
    heads: str = "all"
    block: int = 1
    reduce: str | None = None
    sink: int = 0
    share_layers: int = 1

    @property
    def cell(self) -> str:
        """The name of its file, without suffix."""
        if self.evidence == "control":
            return f"{self.selector}-k{self.k}"
        shared = "" if self.block == 1 else f"-{self.reduce}"
        layers = "" if self.share_layers == 1 else f"-l{self.share_layers}"
        return f"oracle-{self.heads}-b{self.block}{shared}{layers}-k{self.k}"

    @property
    def label(self) -> str:
        """How it chooses, in words, without its budget."""
        if self.selector == "local":
            return f"sink {self.sink} + recent"
        if self.selector == "random":
            return "random keys"
        granularity = "per query" if self.block == 1 else f"{self.block} queries share, {self.reduce}"
        layers = "" if self.share_layers == 1 else f", {self.share_layers} layers share"
        return granularity + (", per KV group" if self.heads == "kv" else "") + layers


def variants(config: OracleConfig, kv_heads: int) -> list[Variant]:
    """Every variant of a study, budgets in the outer loop. With one KV head, "kv" is "all" and is left out."""
    chosen = []
    for k in config.budgets:
        for layers in config.share_layers:
            for heads, block, reduce in granularities(config, kv_heads):
                chosen.append(Variant("oracle", "oracle", k, heads, block, reduce, share_layers=layers))
        for control in config.controls:
            chosen.append(Variant("control", control, k, sink=config.sink if control == "local" else 0))
    return chosen


def granularities(config: OracleConfig, kv_heads: int) -> list[tuple[str, int, str | None]]:
    """`(heads, block, reduce)` of every oracle of a study."""
    heads = config.heads if kv_heads > 1 else ("all",)
    return [
        (h, block, reduce) for h in heads for block in config.blocks
        for reduce in (config.reduces if block > 1 else (None,))
    ]  # fmt: skip


def sparsity(k: int, length: int) -> float:
    """The share of causal (query, key) pairs that a budget of k keys per query skips.

    `1 - (k S - k (k - 1) / 2) / (S (S + 1) / 2)`: the first k queries read all they see, the others k (arXiv
    2606.07703).
    """
    k = min(k, length)
    return 1 - (k * length - k * (k - 1) / 2) / (length * (length + 1) / 2)


def _whole(name: str, value, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return value


def _one_of(name: str, value, allowed) -> None:
    if value not in allowed or isinstance(value, bool):
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
