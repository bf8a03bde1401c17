"""The indexer: a small scorer beside every full-attention layer, and the adapter that it is saved as."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .boundary import read_json, reading, reason
from .budget import Budget
from .errors import USER_ERROR, ActionableError
from .ops.index_heads.reference import rotary_for, rotate
from .runs.store import replace_files

FORMAT = 1
SHIPPED = Path(__file__).parent / "adapters"  # adapters of the demo checkpoints, by name
EVIDENCE = ("distilled", "untrained")
DIMS = (64, 128, 256)
MOST_HIDDEN, MOST_LAYERS = 1 << 17, 1 << 12  # several times what any model has: a larger number means a damaged file
DTYPES = ("F64", "F32", "F16", "BF16")  # dtypes of stored adapters, by their safetensors names


class AdapterError(ActionableError, ValueError):
    """An adapter that cannot be used: damaged, of another format, or of another base checkpoint."""

    exit_status = USER_ERROR


@dataclass(frozen=True)
class IndexerConfig:
    """The geometry of an indexer.

    Attributes:
        hidden_size: width of the hidden states it reads (after the layer's input norm).
        layers: the full-attention layers it serves.
        rotary_dim: how many dimensions the model rotates.
        heads: index heads (1 = the paper's; several get a learned weight per query).
        dim: width of an index head (d_idx): 64, 128 or 256. Dimensions beyond rotary_dim are not rotated.
        partition: every layer has a PartitionHead too.
    """

    hidden_size: int
    layers: tuple[int, ...]
    rotary_dim: int
    heads: int = 1
    dim: int = 128
    partition: bool = False

    def __post_init__(self):
        if isinstance(self.layers, (str, bytes)) or not isinstance(self.layers, Iterable):
            raise TypeError(f"layers must be integers, got {self.layers!r}")
        object.__setattr__(self, "layers", tuple(self.layers))
        _check_integers("hidden_size", [self.hidden_size], 1, MOST_HIDDEN)
        _check_integers("layers", self.layers, 0, MOST_LAYERS)
        _check_integers("rotary_dim", [self.rotary_dim], 0, MOST_HIDDEN)
        if isinstance(self.dim, bool) or self.dim not in DIMS:
            raise ValueError(f"dim (d_idx) must be one of {', '.join(map(str, DIMS))}, got {self.dim!r}")
        if isinstance(self.heads, bool) or not isinstance(self.heads, int) or not 1 <= self.heads <= 64:
            raise ValueError(f"heads must be an integer in [1, 64], got {self.heads!r}")
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers must name at least one layer and none twice, got {self.layers}")
        if not isinstance(self.partition, bool):
            raise TypeError(f"partition must be True or False, got {self.partition!r}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be a positive even number, got {self.rotary_dim}")


def _check_integers(name: str, values: Iterable[int], least: int, most: int) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be {'integers' if name == 'layers' else 'an integer'}, got {value!r}")
        if not least <= value <= most:
            raise ValueError(f"{name} must be in [{least}, {most}], got {value}")


class PartitionHead(nn.Module):
    """Predicts the log-partition of every query's index scores, `c = <a, x> + b + g log n`, from its hidden state x and from the
    number n of keys that it sees.

    It is fitted by least squares (`distill.partition`) and takes no gradient. Before that it is log n, which is exact for an
    indexer whose scores are all zero.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.direction = nn.Parameter(torch.zeros(hidden_size), requires_grad=False)  # a
        self.line = nn.Parameter(torch.tensor([0.0, 1.0]), requires_grad=False)  # b, g

    def forward(self, hidden: Tensor, seen: Tensor) -> Tensor:
        """float32 `[B, T]` of hidden states `[B, T, hidden_size]`; seen: the number of visible keys, `[B or 1, T]`."""
        bias, growth = self.line.float()
        of_length = torch.addcmul(bias, growth, seen.clamp(min=1).log())
        return hidden @ self.direction + of_length  # fp32 from here on


class IndexHead(nn.Module):
    """The index queries, keys and head weights of one layer.

    `q = W_Q x`, `k = LayerNorm(W_K x)`, both rotated with the model's own cos and sin (arXiv 2606.07703, "Indexer"); with
    several heads also `w = W_w x / sqrt(heads)` (arXiv 2606.22874). `partition` is its PartitionHead, or None.
    """

    def __init__(self, config: IndexerConfig):
        super().__init__()
        self.heads, self.dim = config.heads, config.dim
        self.q_proj = nn.Linear(config.hidden_size, config.heads * config.dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.dim, bias=False)
        self.k_norm = nn.LayerNorm(config.dim)
        self.w_proj = nn.Linear(config.hidden_size, config.heads, bias=False) if config.heads > 1 else None
        self.partition = PartitionHead(config.hidden_size) if config.partition else None

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`(qi [B, Hi, T, Di], ki [B, T, Di], w [B, T, Hi] or None)` of hidden states `[B, T, hidden_size]`.

        cos, sin: the model's, `[B, T, rotary_dim]`.
        """
        queries = self.q_proj(hidden).unflatten(-1, (self.heads, self.dim)).transpose(1, 2)  # [B, Hi, T, Di]
        weights = None if self.w_proj is None else self.w_proj(hidden) * self.heads**-0.5
        turned = rotate(queries, rotary_for(cos, self.dim)[:, None], rotary_for(sin, self.dim)[:, None])
        return turned, self.keys(hidden, cos, sin), weights

    def keys(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`ki [B, T, Di]` of hidden states `[B, T, hidden_size]`; cos and sin are the model's."""
        return rotate(self.k_norm(self.k_proj(hidden)), rotary_for(cos, self.dim), rotary_for(sin, self.dim))

    def key_maker(self) -> str:
        """A fingerprint of the weights that make index keys: the same for the same weights in the same dtype."""
        weights = (self.k_proj.weight, self.k_norm.weight, self.k_norm.bias)
        digest = hashlib.sha256(str((self.k_norm.eps, *(tensor.dtype for tensor in weights))).encode())
        for tensor in weights:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class Indexer(nn.Module):
    """One IndexHead per full-attention layer of a frozen backbone.

    Attributes:
        config: IndexerConfig.
        base: identity of the checkpoint it was made for (`checkpoints.identity`), {} where unknown.
        evidence: "distilled" after distillation, "untrained" before: untrained weights say nothing about quality.
        budget: the budget recommended with it (`Budget.to_dict()`), or None.
        checks: what `check_base` compares, in words. Adapters older than the fingerprint of all matrices notice changes in two of
            them only.
    """

    @property
    def checks(self) -> str:
        if self.base.get("backbone_fingerprint"):
            return "the geometry and every weight matrix"
        if self.base.get("weights_fingerprint"):
            return "the geometry, the embedding and one query projection"
        return "the geometry"

    def __init__(self, config: IndexerConfig, base: dict | None = None, evidence: str = "untrained", budget=None):
        super().__init__()
        self.config, self.base, self.evidence, self.budget = config, dict(base or {}), evidence, budget
        self.layers = nn.ModuleDict({str(layer): IndexHead(config) for layer in config.layers})

    @classmethod
    def for_model(cls, model, *, heads: int = 1, dim: int = 128, partition: bool = False, seed: int = 0) -> "Indexer":
        """An untrained Indexer of the model's geometry, on its device, in fp32, with seeded weights."""
        from .checkpoints import identity
        from .models.architectures import describe

        a = describe(model.config)
        config = IndexerConfig(a.hidden_size, a.layers, a.rotary_dim, heads, dim, partition)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            indexer = cls(config, base=identity(model))
        return indexer.to(model.device)

    def copy_for(self, model) -> "Indexer":
        """A frozen copy with the model's dtype and device: what serves it.

        Raises AdapterError naming the layer where a weight is not finite in that dtype.
        """
        copy = Indexer(self.config, self.base, self.evidence, self.budget)
        copy.load_state_dict(self.state_dict())
        copy = copy.to(device=model.device, dtype=model.dtype).requires_grad_(False)  # weights in few bits are not its dtype
        _check_finite(copy, f"an indexer in {str(model.dtype).removeprefix('torch.')}")
        return copy

    def forward(self, layer: int, hidden: Tensor, cos: Tensor, sin: Tensor):
        """`IndexHead.forward` of one layer."""
        return self.layers[str(layer)](hidden, cos, sin)

    def check_base(self, model) -> None:
        """Raises AdapterError where the model's geometry or weights are not those this indexer was made for: see `checks`."""
        from .checkpoints import identity
        from .models.architectures import describe

        self.check_geometry(describe(model.config))
        if self.base:
            self.check_identity(identity(model))

    def check_geometry(self, architecture) -> None:
        """Raises AdapterError where an Architecture is not of the geometry this indexer was made for."""
        ours = (self.config.hidden_size, self.config.layers, self.config.rotary_dim)
        theirs = (architecture.hidden_size, architecture.layers, architecture.rotary_dim)
        if ours != theirs:
            raise AdapterError(
                "adapter must have the model's geometry (hidden_size, full-attention layers, rotary_dim) = "
                f"{theirs}, got {ours}"
            )

    def check_identity(self, identity: dict) -> None:
        """Raises AdapterError where `identity` (of `checkpoints.identity`) is not that of this adapter's base checkpoint.

        Fields that are None or absent on either side are not compared.
        """
        for name, value in self.base.items():
            known = value is not None and identity.get(name) is not None
            if name != "architectures" and known and identity[name] != value:
                raise AdapterError(
                    f"adapter was distilled from another base: {name} must be {value!r}, the model has {identity[name]!r}"
                    f"{_CHANGED if name == 'backbone_fingerprint' else ''}"
                )

    def save_pretrained(self, directory, *, card: str = "") -> Path:
        """Writes config.json, model.safetensors (bf16) and README.md, each atomically. Returns the directory."""
        from safetensors.torch import save

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in self.state_dict().items()}
        data = save(weights, metadata={"format": "pt"})
        config = {
            "format": FORMAT,
            "indexer": asdict(self.config),
            "base": self.base,
            "evidence": self.evidence,
            "budget": self.budget,
            "weights_sha256": hashlib.sha256(data).hexdigest(),
        }
        replace_files({
            directory / "README.md": (card or _card(config)).encode(),
            directory / "model.safetensors": data,
            directory / "config.json": (json.dumps(config, indent=2) + "\n").encode(),
        })  # fmt: skip
        return directory

    @classmethod
    def from_pretrained(cls, directory, *, device="cpu", dtype=torch.float32) -> "Indexer":
        """The Indexer saved in a directory, or shipped with this package under the name of a demo checkpoint.

        Its geometry is read and compared with the file before anything is allocated. Raises AdapterError with one sentence
        naming what is wrong with it: damaged, of another geometry than it says, not stored in a floating dtype, not finite.
        """
        directory = _located(directory)
        with reading(directory, AdapterError, "the adapter"):
            config = _read_config(directory)
            indexer = _built(directory, config)
            indexer = indexer.to(device=device, dtype=dtype).requires_grad_(False)
            _check_finite(indexer, f"adapter {directory}")
        return indexer


_CHANGED = ": a matrix was changed, as by merging a LoRA into it"


def shipped() -> list[str]:
    """The names of the adapters that come with this package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def recommended_budget(directory) -> Budget | None:
    """The budget that an adapter recommends; `directory` as in `Indexer.from_pretrained`. Reads no weights."""
    stored = _read_config(_located(directory))["budget"]
    return None if stored is None else Budget.of(stored)


def _located(directory) -> Path:
    path = Path(directory)
    return SHIPPED / path if not path.exists() and str(directory) in shipped() else path


def _read_config(directory: Path) -> dict:
    try:
        config = read_json(directory / "config.json", AdapterError, object)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AdapterError(
            f"adapter {directory} must be a directory with config.json, or one of {', '.join(shipped())}"
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        stored_format = config.get("format") if isinstance(config, dict) else None
        raise AdapterError(
            f"adapter {directory}: format must be {FORMAT}, got {repr(stored_format)[:40]}; distil it again or update "
            "npu-sparse"
        )
    missing = {"indexer", "base", "evidence", "budget", "weights_sha256"} - set(config)
    if missing:
        raise AdapterError(f"adapter {directory}: config.json must have {', '.join(sorted(missing))}")
    return config


def _built(directory: Path, config: dict) -> Indexer:
    """The Indexer that an adapter's config.json describes, with the weights beside it."""
    from safetensors import safe_open

    try:
        if not isinstance(config["base"], dict):
            raise TypeError(f"base must be an object, got {config['base']!r}")
        if config["evidence"] not in EVIDENCE:
            raise ValueError(f"evidence must be one of {', '.join(EVIDENCE)}, got {config['evidence']!r}")
        budget = None if config["budget"] is None else Budget.of(config["budget"]).to_dict()
        with torch.device("meta"):  # names and shapes, without the memory
            indexer = Indexer(IndexerConfig(**config["indexer"]), config["base"], config["evidence"], budget)
        expected = {name: tuple(tensor.shape) for name, tensor in indexer.state_dict().items()}
    except Exception as error:
        raise AdapterError(f"adapter {directory}: weights do not fit config.json ({reason(error)})") from error
    path = directory / "model.safetensors"
    if not path.is_file():
        raise AdapterError(f"adapter {directory} must contain model.safetensors")
    if _sha256(path) != config["weights_sha256"]:
        raise AdapterError(f"adapter {directory}: model.safetensors is truncated or changed (its sha256 differs)")
    with safe_open(path, framework="pt") as file:
        stored = {name: file.get_slice(name) for name in file.keys()}
        shapes = {name: tuple(tensor.get_shape()) for name, tensor in stored.items()}
        if shapes != expected:
            first = sorted(name for name in {**shapes, **expected} if shapes.get(name) != expected.get(name))[0]
            raise AdapterError(
                f"adapter {directory}: weights do not fit config.json ({first} must have shape {expected.get(first)}, "
                f"got {shapes.get(first)})"
            )
        for name, tensor in stored.items():
            if tensor.get_dtype() not in DTYPES:
                raise AdapterError(
                    f"adapter {directory}: {name} must be stored in one of {', '.join(DTYPES)}, got {tensor.get_dtype()}"
                )
        indexer.load_state_dict({name: file.get_tensor(name) for name in stored}, assign=True)
    return indexer


def _check_finite(indexer: Indexer, what: str) -> None:
    named = list(indexer.named_parameters())
    finite = torch.stack([parameter.detach().isfinite().all() for _, parameter in named]).tolist()  # one wait for the device
    for (name, _), is_finite in zip(named, finite):
        if not is_finite:
            raise AdapterError(f"{what} must have finite weights, and layer {name.split('.')[1]} has not ({name})")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _card(config: dict) -> str:
    indexer = config["indexer"]
    return (
        f"# npu-sparse indexer ({config['evidence']})\n\n{indexer['heads']} index head(s) x {indexer['dim']} for layers "
        f"{list(indexer['layers'])}; base: {config['base'].get('model_type', 'unknown')}.\n"
    )
