"""A grid of budgets, and the quality and timing run of each of its points."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from ...budget import FORMER, Budget
from ...ops import workspace
from ..quality import EvalConfig
from ..quality.config import INSTRUMENTS
from ..ttft import TtftConfig
from ..variants import settle

RUNTIME = ("seed", "dtype", "device", "impl")


@dataclass(frozen=True)
class FrontierConfig:
    """A grid of budgets on one model, task slice, length, indexer and runtime.

    Attributes:
        ks, blocks: the grid: every k with every block (b_sel).
        budget: all other fields of the Budget, as `Budget.parse` spells them. The grid can be spelled here, too, in place of ks
            and blocks: `k=256|512|1024,block=1|64,sink=4`.
        All others: as in EvalConfig and TtftConfig; tasks that dense attention does not solve are skipped.
    """

    model: str
    adapter: str | None = None
    length: int = 4096
    ks: tuple[int, ...] = (256, 512, 1024)
    blocks: tuple[int, ...] = (1, 64)
    tasks: tuple[str, ...] = EvalConfig.tasks
    count: int = 50
    seed: int = 0
    budget: str = ""
    batch: int = 10
    max_new_tokens: int | None = None
    chat: bool = False
    texts: tuple[str, ...] = ("builtin",)
    min_dense_score: float = 0.5
    instruments: tuple[str, ...] = INSTRUMENTS
    stress: bool = False
    runs: int = 10
    warmup: int = 2
    stage_runs: int = 3
    prompt: str = "text"
    dtype: str = "auto"
    device: str = "cpu"
    impl: str = "auto"
    workspace_mib: int = workspace.DEFAULT_MIB

    def __post_init__(self):
        settle(self, "tasks", "texts", "instruments")
        axes, rest = Budget.grid(self.budget, ("k", "block"))
        for name, values in axes.items():
            object.__setattr__(self, f"{name}s", values)
        object.__setattr__(self, "budget", rest)
        for name in ("ks", "blocks"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, int) else tuple(value)
            if not value or len(set(value)) != len(value):
                raise ValueError(f"{name} must name at least one value and none twice, got {value}")
            object.__setattr__(self, name, value)
        for k, block in self.points():
            self.quality_at(k, block)
            self.ttft_at(k, block)

    def points(self) -> list[tuple[int, int]]:
        """All (k, block) of the grid."""
        return [(k, block) for k in self.ks for block in self.blocks]

    def budget_at(self, k: int, block: int) -> Budget:
        """The Budget of one point."""
        return Budget.parse(self.budget, Budget(k=k, block=block))

    def quality_at(self, k: int, block: int) -> EvalConfig:
        """The quality run of one point."""
        shared = ("oracle-shared", "indexer-shared") if block > 1 else ()
        return EvalConfig(
            budget=self.budget_at(k, block),
            variants=("dense", "oracle", "indexer", *shared),
            only_solved=True,
            **self._common(EvalConfig),
        )

    def ttft_at(self, k: int, block: int) -> TtftConfig:
        """The timing run of one point."""
        return TtftConfig(
            budget=self.budget_at(k, block),
            variants=("dense", timed_variant(block)),
            lengths=(self.length,),
            **self._common(TtftConfig),
        )

    def _common(self, of) -> dict:
        shared = set(self.__dataclass_fields__) & set(of.__dataclass_fields__) - {"budget"}
        return {name: getattr(self, name) for name in shared}

    def to_dict(self) -> dict:
        """Plain JSON types; `from_dict` reads them back."""
        out = asdict(replace(self, device=self.device.partition(":")[0]))
        if self.instruments == ("generated",):  # as runs were before there was another
            del out["instruments"], out["stress"]
        return json.loads(json.dumps(out))

    @classmethod
    def from_dict(cls, data: Mapping) -> "FrontierConfig":
        """The FrontierConfig that `to_dict` wrote, now or in version 0.1; unknown fields are refused."""
        former = {name: data[name] for name in FORMER if name in data}
        if former:
            told = [f"{name}={str(value).lower()}" for name, value in former.items() if value != getattr(Budget(), name)]
            data = {**{name: value for name, value in data.items() if name not in former}, "budget": ",".join(told)}
        if unknown := set(data) - set(cls.__dataclass_fields__):
            raise ValueError(f"a frontier config must have known fields only, got {', '.join(sorted(unknown))}")
        return cls(**{"instruments": ("generated",), **data})


def timed_variant(block: int) -> str:
    """The variant whose quality and TTFT make a point at this block."""
    return "indexer-shared" if block > 1 else "indexer"
