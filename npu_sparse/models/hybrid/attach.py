"""FastHybrid: the layers around full attention without their plumbing, on the same weights, caches and modules."""

import importlib.metadata
import importlib.util
from contextlib import nullcontext
from functools import cache
from types import MethodType

import torch
from torch.nn.functional import pad

from ...ops import hybrid
from ...ops.dispatch import KernelUnavailableError, uses_kernel
from ..architectures import delta_net, delta_net_modules, gated_mlp_modules, norm_modules, project

LEAST_FLA = (0, 6)


class FastHybrid:
    """A hybrid model whose Gated DeltaNet layers, norms and feed-forward run fused, from `attach` to `detach`.

        with FastHybrid.attach(model):
            model.generate(...)

    Works on dense models and together with SparsePrefill, attached before or after it. Results are those of transformers up to
    rounding in the model's dtype. Decode steps of the Gated DeltaNet layers, packed sequences and caches that record their past
    (assisted decoding) run transformers' own forward.

    Attributes:
        model: as attached.
    """

    def __init__(self, model, impl, stage):
        self.model, self.impl, self.stage = model, impl, stage
        self._replaced = []

    @classmethod
    def attach(cls, model, *, impl: str = "auto", stage=None) -> "FastHybrid":
        """Makes the layers of `model` fast until `detach()` (or the end of a with block).

        Args:
            model: Qwen3.5 (text or wrapper) or Qwen3-Next.
            impl: "kernel" (Triton and flash-linear-attention), "reference" (plain PyTorch, slow: the formulas) or "auto": the
                kernels on CUDA, the reference elsewhere.
            stage: `stage(name)` gives a context manager around "gdn projections", "gdn convolution", "gdn gates",
                "gdn delta rule", "gdn norm" and "gdn output", for timing.

        Raises KernelUnavailableError where CUDA, Triton or flash-linear-attention is missing, ValueError for other models, for a
        model attached already, and where another tool has replaced a layer's forward.
        """
        attached = cls(model, _implementation(impl, model.device.type), stage or (lambda name: nullcontext()))
        attached._patch()
        return attached

    def detach(self) -> None:
        """Restores the model bit for bit. Detaching twice does nothing."""
        for module in self._replaced:
            del module.forward
        self._replaced.clear()

    def __enter__(self) -> "FastHybrid":
        return self

    def __exit__(self, *exception) -> None:
        self.detach()

    def _patch(self) -> None:
        nets = delta_net_modules(self.model)
        if not nets:
            raise ValueError(f"model must have Gated DeltaNet layers (Qwen3.5, Qwen3-Next), got {self.model.config.model_type!r}")
        norms, mlps = norm_modules(self.model), gated_mlp_modules(self.model)
        for module in [*nets.values(), *norms, *mlps]:
            for part in module.modules():
                if "forward" in vars(part):
                    raise ValueError(
                        f"model must have the forward of its own classes, got another in {type(part).__name__}: detach() "
                        "the first FastHybrid, or load the model whole on one device where accelerate offloads it"
                    )
        forwards = [(module, self._delta_net_forward(module)) for module in nets.values()]
        forwards += [(module, self._norm_forward()) for module in norms]
        forwards += [(module, self._mlp_forward()) for module in mlps]
        for module, forward in forwards:
            module.forward = MethodType(forward, module)  # on the instance, and a copy of the module gets its own
            self._replaced.append(module)

    def _delta_net_forward(self, module):
        net, impl, stage = delta_net(module), self.impl, self.stage
        heads = dict(key_heads=net.key_heads, value_heads=net.value_heads, key_dim=net.key_dim, value_dim=net.value_dim)
        if module.conv1d.bias is not None or module.activation not in ("silu", "swish"):
            raise ValueError(f"a Gated DeltaNet layer must convolve without bias and with SiLU, got {module.activation!r}")
        eps = module.norm.variance_epsilon if hasattr(module.norm, "variance_epsilon") else module.norm.eps
        tables = cache(lambda device: _tables(net, device))

        def forward(module, hidden_states, cache=None, attention_mask=None, *, cache_params=None, past_key_values=None, **kwargs):
            held = next((one for one in (cache, cache_params, past_key_values) if one is not None), None)
            layer = module.layer_idx
            inputs, state = _states(held, layer)
            packed = kwargs.get("cu_seq_lens_q") is not None or kwargs.get("seq_idx") is not None
            if packed or _records_past(held, layer) or (inputs is not None and hidden_states.shape[1] == 1):
                return type(module).forward(module, hidden_states, held, attention_mask, **kwargs)
            _refuse_gradients(hidden_states, module)
            if attention_mask is not None:
                hidden_states = (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)
            channels, gate, gates, order = tables(hidden_states.device)
            with stage("gdn projections"):
                mixed, z, raw = project(module, hidden_states)
            with stage("gdn convolution"):
                weight = module.conv1d.weight.squeeze(1)
                q, k, v = hybrid.short_convolution(mixed, weight, inputs, channels, **heads, impl=impl)
            if held is not None:
                newest = mixed[:, -net.kernel :, order].transpose(1, 2)  # [B, C, up to W]
                if inputs is None:
                    newest = pad(newest, (net.kernel - newest.shape[-1], 0))
                held.update_conv_state(newest, layer)
            del mixed
            with stage("gdn gates"):
                g, beta = hybrid.delta_gates(raw, gates, module.A_log, module.dt_bias, impl=impl)
            with stage("gdn delta rule"):
                out, state = hybrid.delta_rule(q, k, v, g, beta, state, held is not None, impl=impl)
            if held is not None:
                held.update_recurrent_state(state, layer)
            del q, k, v
            with stage("gdn norm"):
                out = hybrid.gated_norm(out, z, gate, module.norm.weight, eps, impl=impl)
            del z
            with stage("gdn output"):
                return module.out_proj(out)

        return forward

    def _norm_forward(self):
        impl = self.impl

        def forward(module, x):
            _refuse_gradients(x, module)
            return hybrid.rms_norm(x, module.weight, module.eps, impl=impl)

        return forward

    def _mlp_forward(self):
        impl = self.impl

        def forward(module, x):
            _refuse_gradients(x, module)
            return module.down_proj(hybrid.swiglu(module.gate_proj(x), module.up_proj(x), impl=impl))

        return forward


def _implementation(impl: str, device_type: str) -> str:
    """"kernel" or "reference": what the operators run for an `impl` on a device."""
    if impl == "auto" and device_type != "cuda":
        impl = "reference"
    if not uses_kernel(impl, device_type):
        return "reference"
    if device_type != "cuda":
        raise KernelUnavailableError(f"FastHybrid has kernels for cuda, got {device_type!r}: pass impl='reference'")
    for module, package in (("triton", "triton"), ("fla.ops.gated_delta_rule", "'flash-linear-attention>=0.6'")):
        if _missing(module):
            raise KernelUnavailableError(
                f"FastHybrid's kernels need {module.partition('.')[0]}: run `pip install {package}`, or pass impl='reference'"
            )
    try:
        version = importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:  # one package until 0.3
        version = "0.0"
    if tuple(int(part) for part in version.split(".")[:2]) < LEAST_FLA:
        raise KernelUnavailableError(f"FastHybrid's kernels need fla-core 0.6 or newer, got {version}: pip install -U fla-core")
    return "kernel"


def _missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:
        return True


def _tables(net, device) -> tuple:
    """Where channels, output gates, beta and decay begin, int32; and the column of every channel of the convolution."""
    widths = [net.key_dim] * (2 * net.key_heads) + [net.value_dim] * net.value_heads
    order = [start + n for start, width in zip(net.channels, widths) for n in range(width)]
    starts = (torch.tensor(columns, dtype=torch.int32) for columns in (net.channels, net.gate, net.beta + net.decay))
    return tuple(table.to(device) for table in (*starts, torch.tensor(order)))


def _states(cache, layer: int) -> tuple:
    """`(inputs of the convolution [B, C, W], recurrent state [B, Hv, K, V])` after the tokens so far, or two None."""
    if cache is None or not cache.has_previous_state(layer):
        return None, None
    held = cache.layers[layer]
    pair = held.conv_states, held.recurrent_states
    return tuple(states[0] if isinstance(states, dict) else states for states in pair)  # a dict since transformers 5.13


def _records_past(cache, layer: int) -> bool:
    return cache is not None and getattr(cache.layers[layer], "record_past", False)


def _refuse_gradients(x, module) -> None:
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
        raise ValueError("a model with FastHybrid must run without gradients: use torch.no_grad(), or detach() to train")
