"""What `--model-loader-extra-config` says to the plugin."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from ...budget import Budget
from ...indexer import recommended_budget
from ...ops import workspace
from ...ops.dispatch import IMPLEMENTATIONS


@dataclass(frozen=True)
class Options:
    """One engine's sparse prefill; every request of the engine has it.

    Attributes:
        adapter: directory of an adapter, or the name of a shipped one.
        budget: None = the adapter's recommended budget, else `Budget()`.
        impl: which operators run, "auto", "reference" or "kernel".
        workspace_mib: MiB of a slice of scores, as in `SparsePrefill.attach`.
        load_format: the load format of the checkpoint itself.
    """

    adapter: str
    budget: Budget | None = None
    impl: str = "auto"
    workspace_mib: int = workspace.DEFAULT_MIB
    load_format: str = "auto"

    @classmethod
    def parse(cls, given) -> "Options":
        """Options of a JSON object, whose budget is a text for `Budget.parse`. Raises ValueError or TypeError in one sentence."""
        if not isinstance(given, Mapping):
            raise TypeError(f"model-loader-extra-config must be a JSON object, got {given!r}")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"model-loader-extra-config must have fields among {', '.join(known)}, got {', '.join(unknown)}")
        if not isinstance(given.get("adapter"), str) or not given["adapter"]:
            raise ValueError(
                'model-loader-extra-config must name an adapter, such as {"adapter": "qwen2.5-coder-0.5b"}, '
                f"got {given.get('adapter')!r}"
            )
        impl = given.get("impl", "auto")
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
        load_format = given.get("load_format", "auto")
        if not isinstance(load_format, str) or load_format == "npu_sparse":
            raise ValueError(f"load_format must be that of the checkpoint, such as auto, got {load_format!r}")
        budget = given.get("budget")
        return cls(
            given["adapter"],
            None if budget is None else Budget.parse(budget),
            impl,
            workspace.check(given.get("workspace_mib", workspace.DEFAULT_MIB)),
            load_format,
        )


def budget_of(load_config) -> Budget:
    """The budget of an engine by its LoadConfig. Raises ValueError where the engine's prefill is not sparse."""
    if load_config.load_format != "npu_sparse":
        raise ValueError(f"load-format must be npu_sparse for AlignedScheduler, got {load_config.load_format}")
    options = Options.parse(load_config.model_loader_extra_config)
    return options.budget or recommended_budget(options.adapter) or Budget()
