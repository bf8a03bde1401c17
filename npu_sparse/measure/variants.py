"""What is compared: dense attention, oracle and indexer at two granularities, and controls, all at one budget.

A variant may differ from the common budget: `indexer-shared:candidates=2048,key_block=32` is `indexer-shared` with these fields
of the Budget changed, and `indexer:block=16` shares supports among 16 queries. A plus in place of colon and comma says the same.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType

from ..budget import FORMER, Budget
from ..runs.machine import chosen_dtype

LOCAL_SINK = 4
EVIDENCE = {"dense", "oracle", "distilled", "untrained", "control", "training-free"}
_FLAGS_LAST = sorted(fields(Budget), key=lambda f: isinstance(f.default, bool))
WHERE = ("dense_below", "per_layer")  # of a device and of a model's layers: spelled by a colon only
OPTIONS = tuple(f.name for f in _FLAGS_LAST if f.name not in WHERE)  # of variants
INDEX_OPTIONS = ("candidates", "key_block", "partition")  # these say how an indexer works


@dataclass(frozen=True)
class Variant:
    """One way to run a prefill: `chooser` picks the keys, `shared` says whether a block of queries shares them, `options` are the
    fields of the common Budget that it changes."""

    name: str
    label: str
    chooser: str  # "dense", "oracle", "indexer", "local", "random" or a training-free peer
    shared: bool = False
    options: Mapping = field(default_factory=lambda: MappingProxyType({}))

    @property
    def base(self) -> str:
        """The name of the variant without options."""
        return re.split("[+:]", self.name, maxsplit=1)[0]


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("dense", "dense", "dense"),
        Variant("oracle", "oracle, per query", "oracle"),
        Variant("oracle-shared", "oracle, shared", "oracle", shared=True),
        Variant("indexer", "indexer, per query", "indexer"),
        Variant("indexer-shared", "indexer, shared", "indexer", shared=True),
        Variant("local", f"{LOCAL_SINK} sinks + recent", "local"),
        Variant("random", "random keys", "random"),
        Variant("pooled", "pooled blocks (FlexPrefill's)", "pooled", shared=True),
        Variant("antidiagonal", "antidiagonal blocks (XAttention's)", "antidiagonal", shared=True),
        Variant("vertical-slash", "vertical-slash (MInference's)", "vertical-slash", shared=True),
    )
}


@dataclass(frozen=True)
class Subject:
    """What is measured: a loaded model with its tokenizer and indexer, either of which may be None where nobody needs
    it."""

    model: object
    tokenizer: object
    indexer: object

    def base(self) -> dict:
        """`checkpoints.identity` of the model."""
        from ..checkpoints import identity

        return identity(self.model)

    def inputs(self) -> dict:
        """`{"base", "adapter"}`: what all records of a run must agree in; "adapter" is `adapter_fingerprint` or None."""
        return {"base": self.base(), "adapter": None if self.indexer is None else adapter_fingerprint(self.indexer)}


def variant_named(name: str) -> Variant:
    """The Variant of a name such as "oracle" or "indexer-shared:candidates=2048"; ValueError where there is none."""
    base, *changes = re.split(r",|[:+](?=[a-z])", name)  # before a number, either is within a value
    if base not in VARIANTS:
        raise ValueError(f"variants must be among {', '.join(VARIANTS)}, got {name!r}")
    known = VARIANTS[base]
    options = {}
    for change in changes:
        option = change.partition("=")[0]
        allowed = [
            o for o in (*OPTIONS, *(WHERE if ":" in name else ()))
            if (known.shared or ":" in name or o not in ("block", "reduce"))
            and (known.chooser == "indexer" or o not in INDEX_OPTIONS)
        ] if known.chooser != "dense" else []  # fmt: skip
        if option not in allowed or option in options:
            raise ValueError(f"options of {base} must be among {', '.join(allowed) or 'none'}, each once, got {change!r}")
        options |= Budget.changes(change)
    label = ", ".join([known.label, *(f"{option} {value}" for option, value in options.items())])
    shared = known.shared or options.get("block", 1) > 1
    return replace(known, name=name, label=label, shared=shared, options=MappingProxyType(options))


def in_order(names) -> list[str]:
    """Names in the order of VARIANTS, those with options after their base."""
    order = list(VARIANTS)
    return sorted(names, key=lambda name: (order.index(variant_named(name).base), bool(variant_named(name).options)))


def split_names(text: str) -> tuple[str, ...]:
    """The variants that a comma-separated list names; the fields of a variant's Budget are separated by commas, too."""
    names: list[str] = []
    for part in filter(None, text.split(",")):
        begins = re.split("[+:]", part, maxsplit=1)[0] in VARIANTS
        if begins or not names or ":" not in names[-1]:
            names.append(part)
        else:
            names[-1] += f",{part}"
    return tuple(names)


def check_names(names: tuple[str, ...]) -> None:
    """Raises ValueError unless `names` are known variants, none twice."""
    if not names:
        raise ValueError(f"variants must name at least one of {', '.join(VARIANTS)}, got none")
    for name in names:
        variant_named(name)
    if len(set(names)) != len(names):
        raise ValueError(f"variants must not be named twice, got {', '.join(names)}")


def check_budgets(names: tuple[str, ...], length: int, budget: Budget) -> None:
    """Raises ValueError where a variant's budget is inconsistent or larger than a context of `length` tokens."""
    for name in names:
        if (own := budget_of(name, budget)) is not None:
            own.check_length(length)
        if variant_named(name).chooser == "local":
            own.replace(sink=LOCAL_SINK, recent=0)


def budget_words(budget: Budget) -> str:
    """What a table must say of its common budget beside k and b_sel: a sentence that names every other field that is not the
    default, and one of its tail, each with a space before it, or nothing."""
    usual = Budget()
    told = {name: getattr(budget, name) for name in OPTIONS if name not in ("k", "block", "tail")}
    told = {name: value for name, value in told.items() if value != getattr(usual, name)}
    if not budget.candidates:
        told.pop("key_block", None)
    words = f" All sparse rows: {', '.join(f'{name} {value}' for name, value in told.items())}." if told else ""
    return tail_note(budget.tail) + words


def settle(config, *names: str, kind: type = str) -> None:
    """Makes tuples of a config's fields of these names, of one value or any sequence, and says which dtype "auto" is."""
    object.__setattr__(config, "dtype", chosen_dtype(config.dtype, config.device))
    for name in names:
        value = getattr(config, name)
        object.__setattr__(config, name, (value,) if isinstance(value, kind) else tuple(map(kind, value)))


def spelled(budget: Budget) -> str:
    """`str(budget)` that always names k and b_sel, for records and headings."""
    parts = {part.partition("=")[0]: part for part in str(budget).split(",") if part}
    return ",".join(({"k": f"k={budget.k}", "block": f"block={budget.block}"} | parts).values())


def budgets_of(text: str) -> list[Budget]:
    """The budgets of a script's option: spelled as `Budget.parse` does, separated by semicolons.

    What scripts took before still serves: `k:b_sel[:candidates][:field=value...]`, separated by commas.
    """
    if not re.match(r"\s*\d+\s*:", text):
        return [Budget.parse(part) for part in text.split(";")]
    budgets = []
    for part in text.split(","):
        k, block, *rest = part.split(":")
        fields = [f"candidates={field}" if field.isdigit() else field for field in rest]
        budgets.append(Budget.parse(",".join([f"k={k}", f"block={block}", *fields])))
    return budgets


def former_fields_as_budget(config: Mapping) -> dict:
    """A config as it is written now, of one that had the Budget's fields beside its own, as version 0.1 wrote it."""
    former = {name: config[name] for name in FORMER if name in config}
    if not former:
        return dict(config)
    rest = {name: value for name, value in config.items() if name not in FORMER}
    return {**rest, "budget": spelled(Budget.of(rest.get("budget", Budget())).replace(**former))}


def budget_in(config: Mapping) -> Budget:
    """The Budget of a written config; of a grid that of its first point."""
    if "ks" in config:
        return Budget.parse(config["budget"], Budget(k=config["ks"][0], block=config["blocks"][0]))
    return Budget.of(former_fields_as_budget(config)["budget"])


def needs_indexer(names) -> bool:
    """Whether any of these variants selects by an indexer."""
    return any(variant_named(name).chooser == "indexer" for name in names)


def budget_of(name: str, budget: Budget) -> Budget | None:
    """The Budget one variant runs at, of the common `budget`: with its own options, block 1 where every query selects, and no
    candidates without an indexer; None for dense."""
    variant = variant_named(name)
    if variant.chooser == "dense":
        return None
    changes = dict(variant.options)
    if not variant.shared:
        changes["block"] = 1
    if variant.chooser != "indexer":
        changes["candidates"] = 0
    return budget.replace(**changes)


def selector_of(name: str, indexer=None, seed: int = 0):
    """The Selector of a sparse variant."""
    from .. import peers, selectors

    chooser = variant_named(name).chooser
    if chooser == "indexer":
        return selectors.ByIndexer(indexer)
    if chooser == "local":
        return selectors.Local(LOCAL_SINK)
    return {
        "oracle": selectors.Oracle, "random": lambda: selectors.Random(seed), "pooled": peers.PooledBlocks,
        "antidiagonal": peers.Antidiagonal, "vertical-slash": peers.VerticalSlash,
    }[chooser]()  # fmt: skip


def evidence_of(name: str, indexer=None) -> str:
    """The evidence type of a variant's figures: "dense", "oracle", "distilled", "untrained", "training-free" or
    "control"."""
    return "dense" if variant_named(name).chooser == "dense" else selector_of(name, indexer).evidence


def tail_note(tail: bool) -> str:
    """What a report says of its sparse rows where keys outside a support are not dropped, beginning with a space."""
    return " Sparse rows read the keys outside a support as one, a running mean (`tail`)." if tail else ""


def load_subject(config, names, model=None, tokenizer=None, indexer=None) -> Subject:
    """The Subject of a config with `model`, `adapter`, `dtype` and `device`; what is passed in is not loaded again."""
    if indexer is None and config.adapter is not None and needs_indexer(names):
        from ..indexer import Indexer

        indexer = Indexer.from_pretrained(config.adapter)
    if model is None:
        from ..checkpoints import load

        device_ready(config.device)
        model, loaded = load(config.model, dtype=config.dtype, device=config.device)
        tokenizer = tokenizer or loaded
    return Subject(model, tokenizer, indexer)


def device_ready(device: str) -> None:
    """Registers an Ascend card with torch where it does not do that by itself. RuntimeError where it cannot be used."""
    if device.startswith("npu"):
        try:
            import torch_npu  # noqa: F401
        except ImportError as error:
            raise RuntimeError(f"device {device!r} must have torch_npu and CANN ({error}): see docs/ascend.md") from error


def with_tokenizer(subject: Subject, config) -> Subject:
    """The same Subject with the tokenizer of `config.model`, where the model was passed in without one."""
    if subject.tokenizer is not None:
        return subject
    from ..checkpoints import load_tokenizer

    return replace(subject, tokenizer=load_tokenizer(config.model))


def adapter_fingerprint(indexer) -> str:
    """16 hex digits of an indexer's weights in the form they are saved in."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(indexer.state_dict().items()):
        stored = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name} {tuple(stored.shape)}".encode() + stored.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def attachable(subject: Subject, names, budget: Budget, impl: str) -> None:
    """Attaches and detaches every sparse variant, so that what cannot run is refused before anything is computed.

    Raises AdapterError, KernelUnavailableError, UnsupportedArchitectureError or ValueError.
    """
    from ..prefill import SparsePrefill

    for name in names:
        if (own := budget_of(name, budget)) is not None:
            SparsePrefill.attach(subject.model, selector_of(name, subject.indexer), own, impl=impl).detach()


def check_context(model, length: int) -> None:
    """Raises ValueError where `length` tokens do not fit the model."""
    from ..models.architectures import describe

    limit = describe(model.config).max_positions
    if length > limit:
        raise ValueError(f"length must fit the model's {limit} positions, got {length}")
