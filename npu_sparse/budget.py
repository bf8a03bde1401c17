"""Budget: how many keys a query may read, and how queries share them."""

import inspect
import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace

BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128)
KEY_BLOCKS = (16, 32, 64, 128)
REDUCTIONS = ("max", "mean", "softmax_max")
MASS_REDUCTIONS = ("max", "mean")  # attention mass is each query's own softmax, so there is no raw score to normalise
PARTITIONS = ("auto", "exact", "learned")
# what configs spelled as fields of their own in version 0.1; options of the command line still do
FORMER = ("k", "block", "reduce", "sink", "recent", "share_layers", "candidates", "key_block", "tail")


@dataclass(frozen=True)
class Budget:
    """How much of dense attention a prefill may spend.

    One spelling everywhere, `Budget.parse("k=1024,block=64")` and `str(budget)`: FIELD=VALUE joined by commas; fields left out
    keep their default. Tiers of k and layers of per_layer are joined by plus: `k=0:512+65536:1024`, `per_layer=3:256+7:512`.

    Attributes:
        k: keys per support row, sinks and recent keys included. An int, or a mapping `{from_length: k}` whose entry with
            the largest `from_length <= length` applies (`{0: 512, 65536: 1024}`).
        block: queries that share one support (`b_sel`), a power of two up to 128; 1 = every query selects for itself.
        reduce: how the scores of a block's queries become one row: "max" (the paper), "mean" (of normalised weights) or
            "softmax_max", the maximum of each query's scores less its own log-partition, so that a query with large scores does
            not outvote the others. For attention mass, which is normalised already, "softmax_max" equals "max"; so it does where
            every query selects for itself, because the log-partition changes no order within a row.
        partition: how "softmax_max" gets an indexer's log-partitions: "exact" (a pass over all scores), "learned" (the adapter's
            partition head) or "auto", which is learned where the adapter has such a head. `candidates` need "learned".
        sink: the first `sink` valid keys are always kept.
        recent: the last `recent` keys of every query of the block are always kept.
        per_layer: `{layer index: k}` overrides.
        anchors: the full-attention layers that select, the first of them included; every other reads the support of the last
            anchor before it (`anchors=0+4+9`). () = `share_layers` says.
        tail: the keys outside a support are read as one: their number times a running mean of keys and values
            (`ops.sparse_attention_with_tail`). False = they are dropped and the support is renormalised (the paper).
        share_layers: full-attention layers in a row that read the support of the first of them; 1 = every layer selects.
        dense_below: a forward whose context is shorter than this many tokens runs dense, bit for bit. "auto" = the length from
            which this budget is measured to be no slower, decided when attaching (`calibration.dense_below`, once per device and
            model; on a CPU and in vLLM `crossover.dense_below`, from a table).
        exact_last: the last `exact_last` queries of a prompt, whichever chunk holds them, read every key (`ops.dense_rows`). A
            prompt of so few tokens is dense altogether. 0 = none.
        candidates: an indexer's scores in two levels: whole blocks of keys are ranked first, and only the keys of the best
            blocks, at least this many, are scored one by one; 0 = every key is scored (one level).
        key_block: keys of such a block, a power of two from 16 to 128.
    """

    k: int | Mapping[int, int] = 512
    block: int = 64
    reduce: str = "max"
    sink: int = 0
    recent: int = 0
    per_layer: Mapping[int, int] = field(default_factory=dict)
    dense_below: int | str = 0
    share_layers: int = 1
    anchors: tuple[int, ...] = ()
    tail: bool = False
    exact_last: int = 0
    candidates: int = 0
    key_block: int = 64
    partition: str = "auto"

    def __post_init__(self):
        tiers = self.k if isinstance(self.k, Mapping) else {0: self.k}
        if not tiers:
            raise ValueError("k must name at least one tier, got {}")
        tiers = {_whole("k: from_length", length, 0): _whole("k", k, 1) for length, k in tiers.items()}
        if 0 not in tiers:
            raise ValueError(f"k must have a tier that starts at length 0, got {sorted(tiers)}")
        per_layer = {_whole("per_layer: layer", n, 0): _whole("per_layer: k", k, 1) for n, k in self.per_layer.items()}
        if self.block not in BLOCKS or isinstance(self.block, bool):
            raise ValueError(f"block (b_sel) must be one of {', '.join(map(str, BLOCKS))}, got {self.block!r}")
        if self.reduce not in REDUCTIONS:
            raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {self.reduce!r}")
        if self.partition not in PARTITIONS:
            raise ValueError(f"partition must be one of {', '.join(PARTITIONS)}, got {self.partition!r}")
        if self.key_block not in KEY_BLOCKS or isinstance(self.key_block, bool):
            raise ValueError(f"key_block must be one of {', '.join(map(str, KEY_BLOCKS))}, got {self.key_block!r}")
        for name in ("sink", "recent", "exact_last", "candidates"):
            _whole(name, getattr(self, name), 0)
        if self.dense_below != "auto":
            _whole("dense_below", self.dense_below, 0)
        _whole("share_layers", self.share_layers, 1)
        object.__setattr__(self, "anchors", tuple(_whole("anchors", layer, 0) for layer in self.anchors))
        if list(self.anchors) != sorted(set(self.anchors)):
            raise ValueError(f"anchors must be layers in ascending order, none twice, got {list(self.anchors)}")
        if self.anchors and self.share_layers > 1:
            raise ValueError(f"share_layers must be 1 where anchors say which layers select, got {self.share_layers}")
        if not isinstance(self.tail, bool):
            raise TypeError(f"tail must be True or False, got {self.tail!r}")
        # a block's recent keys are the union over its queries
        kept = self.sink + (self.recent + self.block - 1 if self.recent else 0)
        smallest = min([*tiers.values(), *per_layer.values()])
        if kept > smallest:
            raise ValueError(
                f"k must hold the keys that are always kept (sink {self.sink} + recent {self.recent} of every query of a "
                f"block of {self.block} = {kept}), got {smallest}"
            )
        largest = max([*tiers.values(), *per_layer.values()])
        if self.candidates and self.candidates < largest:
            raise ValueError(f"candidates must be 0 or hold the k keys chosen of them ({largest}), got {self.candidates}")
        object.__setattr__(self, "k", self.k if not isinstance(self.k, Mapping) else tiers)
        object.__setattr__(self, "per_layer", per_layer)

    def k_for(self, length: int, layer: int | None = None) -> int:
        """The k of one layer at a context of `length` tokens."""
        if layer is not None and layer in self.per_layer:
            return self.per_layer[layer]
        if not isinstance(self.k, Mapping):
            return self.k
        return self.k[max(start for start in self.k if start <= length)]

    def check_length(self, length: int) -> None:
        """Raises ValueError where this budget asks for more keys than a context of `length` tokens has."""
        k = max([self.k_for(length), *self.per_layer.values()])
        if k > length:
            raise ValueError(f"k must not exceed the context, got k = {k} for {length} tokens: lower k or run dense")

    @classmethod
    def parse(cls, text: str, base: "Budget | None" = None) -> "Budget":
        """The Budget that `text` spells: `base` (None = the defaults) with the fields named there changed.

        Raises ValueError with one sentence that names the field; TypeError where `text` is no string.
        """
        return replace(base if base is not None else cls(), **cls.changes(text))

    @classmethod
    def changes(cls, text: str) -> dict[str, object]:
        """The fields that `text` names, with their values. Only a Budget made of them checks whether they fit together.

        Errors as in `parse`.
        """
        _check_text(text)
        known = {f.name: f for f in fields(cls)}
        changes: dict[str, object] = {}
        for item in text.split(",") if text.strip() else ():
            name, equals, value = (part.strip() for part in item.partition("="))
            if not name:
                raise ValueError(f"budget must be FIELD=VALUE joined by commas, such as 'k=1024,block=64', got {text!r}")
            if name not in known:
                raise ValueError(f"budget must name fields among {', '.join(known)}, got {name!r}")
            if name in changes:
                raise ValueError(f"{name} must be given once, got {text!r}")
            default = known[name].default
            changes[name] = _flag(name, value, equals) if isinstance(default, bool) else _value(name, value, default)
        return changes

    @classmethod
    def grid(cls, text: str, axes: Collection[str]) -> tuple[dict[str, tuple], str]:
        """`({axis: its values}, the rest as `str` spells it)` of a grid such as `k=256|512,block=1|64,sink=4`.

        axes: the fields that may have several values, joined by |. Errors as in `parse`.
        """
        _check_text(text)
        grids: dict[str, tuple] = {}
        rest = []
        for item in text.split(",") if text.strip() else ():
            name, _, values = (part.strip() for part in item.partition("="))
            if name not in axes:
                rest += [_spelled(*change) for change in cls.changes(item).items()]
                continue
            if name in grids:
                raise ValueError(f"{name} must be given once, got {text!r}")
            grids[name] = tuple(cls.changes(f"{name}={value}")[name] for value in values.split("|"))
            if any(isinstance(value, Mapping) for value in grids[name]):
                raise ValueError(f"{name} of a grid must be whole numbers joined by |, got {values!r}")
        return grids, ",".join(rest)

    @classmethod
    def of(cls, value) -> "Budget":
        """The Budget of a stored or given value: one already, its spelling, or what `to_dict` wrote."""
        if isinstance(value, cls):
            return value
        return cls.from_dict(value) if isinstance(value, Mapping) else cls.parse(value)

    def __str__(self) -> str:
        """The shortest text that `parse` reads back: the fields that differ from their defaults; "" where none does."""
        return ",".join(_spelled(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != _default(f))

    @classmethod
    def field_help(cls) -> dict[str, str]:
        """What every field does, in the words of this class's documentation."""
        section = inspect.getdoc(cls).partition("Attributes:")[2]
        entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", section, re.M)
        return {name: " ".join(words.split()) for name, words in entries}

    def replace(self, **changes) -> "Budget":
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)

    def to_dict(self) -> dict:
        """Plain JSON types; `Budget.from_dict` reads them back."""
        out = asdict(self)
        if isinstance(self.k, Mapping):
            out["k"] = {str(start): k for start, k in self.k.items()}
        out["anchors"] = list(self.anchors)
        out["per_layer"] = {str(layer): k for layer, k in self.per_layer.items()}
        return out

    @classmethod
    def from_dict(cls, data: Mapping) -> "Budget":
        """The Budget that `to_dict` wrote; unknown fields are refused."""
        unknown = set(data) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"budget has unknown fields {sorted(unknown)}, known are {sorted(cls.__dataclass_fields__)}")
        data = dict(data)
        for name in ("k", "per_layer"):
            if isinstance(data.get(name), Mapping):
                data[name] = {int(key): value for key, value in data[name].items()}
        return cls(**data)


def _check_text(text) -> None:
    if not isinstance(text, str):
        raise TypeError(f"budget must be a text such as 'k=1024,block=64', got {type(text).__name__}")


def _whole(name: str, value, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return value


def _default(f):
    return f.default if f.default is not MISSING else f.default_factory()


def _spelled(name: str, value) -> str:
    if isinstance(value, bool):
        return name if value else f"{name}=false"
    if isinstance(value, tuple):
        value = "+".join(map(str, value))
    if isinstance(value, Mapping):
        value = "+".join(f"{key}:{value[key]}" for key in sorted(value))
    return f"{name}={value}"


def _flag(name: str, value: str, equals: str) -> bool:
    if not equals:
        return True
    if value not in ("true", "false"):
        raise ValueError(f"{name} must stand alone or be true or false, got {value!r}")
    return value == "true"


def _value(name: str, value: str, default):
    """The value of a field that is no flag; its rules are checked by the Budget that is made of it."""
    if not value:
        raise ValueError(f"{name} must have a value, such as {name}={_EXAMPLES.get(name, default)}, got none")
    if name == "per_layer" or (name == "k" and ":" in value):
        return _table(name, value)
    if isinstance(default, str) or (name == "dense_below" and value == "auto"):
        return value
    if isinstance(default, tuple):
        numbers = [_number(part) for part in value.split("+")]
        if not all(numbers):
            raise ValueError(f"{name} must be whole numbers joined by plus, such as {_EXAMPLES[name]}, got {value!r}")
        return tuple(map(int, numbers))
    if not (number := _number(value)):
        example = "0:512+65536:1024" if name == "k" else '"auto"' if name == "dense_below" else None
        raise ValueError(f"{name} must be a whole number{f' or {example}' if example else ''}, got {value!r}")
    return int(number)


def _table(name: str, value: str) -> dict[int, int]:
    entries: dict[int, int] = {}
    for item in value.split("+"):
        key, _, k = (_number(part) for part in item.partition(":"))
        if not key or not k:
            rule = "FROM:K, such as 0:512+65536:1024" if name == "k" else "LAYER:K, such as 3:256+7:512"
            raise ValueError(f"{name} must be whole numbers {rule}, got {value!r}")
        if int(key) in entries:
            raise ValueError(f"{name} must name {key} once, got {value!r}")
        entries[int(key)] = int(k)
    return entries


def _number(text: str) -> str | None:
    """`text` without spaces where it is a whole number of at most 18 digits."""
    return text.strip() if re.fullmatch(r"\s*-?[0-9]{1,18}\s*", text) else None


_EXAMPLES = {"per_layer": "3:256+7:512", "anchors": "0+4+9"}
