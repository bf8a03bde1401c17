"""FastHybrid on tiny hybrid models: the layers are transformers' up to rounding, and leave no trace."""

import copy
import os
from importlib import import_module

import pytest
import torch
from transformers import DynamicCache

from npu_sparse import Budget, FastHybrid, Indexer, SparsePrefill
from npu_sparse.models.architectures import delta_net_modules, gated_mlp_modules, norm_modules
from npu_sparse.models.hybrid import attach
from npu_sparse.ops import KernelUnavailableError, dispatch
from npu_sparse.testing import tiny_model, tokens

T = 75
HYBRIDS = ["qwen3_5", "qwen3_5_wrapper", "qwen3_next"]
GROUPED = {"linear_num_value_heads": 4, "linear_value_head_dim": 24}
every_hybrid = pytest.mark.parametrize("name", HYBRIDS)
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def fast():
    """Attaches with plain PyTorch."""
    return FastHybrid.attach


@pytest.fixture
def interpreted(monkeypatch):
    """Attaches with the Triton kernels in the interpreter, around the reference's delta rule."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton interprets its kernels on the CPU only under TRITON_INTERPRET=1: run `make test-triton`")
    dispatch.register_triton("cpu")
    delta_rule = import_module("npu_sparse.ops.hybrid.reference").delta_rule
    monkeypatch.setitem(dispatch._KERNELS, ("delta_rule", "cpu"), delta_rule)
    monkeypatch.setattr(attach, "_implementation", lambda impl, device_type: "kernel")
    return FastHybrid.attach


def close(a, b, tolerance=1e-3):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def fed(model, ids, bounds, **options):
    """Logits of all positions and the cache, of `ids` fed in the pieces between `bounds`."""
    cache = DynamicCache(config=model.config)
    pieces = zip((0, *bounds), (*bounds, ids.shape[1]))
    parts = [model(ids[:, start:stop], past_key_values=cache, use_cache=True, **options).logits for start, stop in pieces]
    return torch.cat(parts, 1), cache


def states(cache):
    """Every tensor of the linear-attention layers of a cache."""
    held = [layer for layer in cache.layers if hasattr(layer, "conv_states")]
    return [(layer.conv_states[0], layer.recurrent_states[0]) for layer in held]


@every_hybrid
@pytest.mark.parametrize("changes", [{}, GROUPED], ids=["one to one", "grouped"])
def test_logits_and_states_are_those_of_transformers(fast, name, changes):
    model, ids = tiny_model(name, **changes), tokens()
    expected, cache = fed(model, ids, ())
    with fast(model):
        actual, fast_cache = fed(model, ids, ())
        close(model(ids).logits, expected)
    close(actual, expected)
    for mine, theirs in zip(states(fast_cache), states(cache)):
        for a, b in zip(mine, theirs):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            close(a, b)


@every_hybrid
def test_pieces_shorter_and_longer_than_the_convolution_are_the_whole(fast, name):
    model, ids = tiny_model(name), tokens()
    whole = model(ids).logits
    with fast(model):
        for bounds in ((1,), (2, 3, 5), (40, 41, 42, 43), (3, 64)):
            close(fed(model, ids, bounds)[0], whole)


@every_hybrid
def test_a_prefill_goes_on_without_it_and_with_it(fast, name, require_continuing):
    """What a cache holds is the same to both: either may write it, either may read it."""
    model, ids = tiny_model(name), tokens()
    require_continuing(model)
    whole = model(ids).logits
    with fast(model):
        _, cache = fed(model, ids[:, :50], ())
    close(model(ids[:, 50:], past_key_values=cache, use_cache=True).logits, whole[:, 50:])
    _, cache = fed(model, ids[:, :50], ())
    with fast(model):
        close(model(ids[:, 50:], past_key_values=cache, use_cache=True).logits, whole[:, 50:])


@every_hybrid
def test_generation_is_that_of_transformers(fast, name):
    model, ids = tiny_model(name), tokens(1)
    options = dict(max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
    expected = model.generate(ids, **options)
    with fast(model):
        assert torch.equal(model.generate(ids, **options), expected)


@every_hybrid
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(fast, name, side):
    model, ids = tiny_model(name), tokens()
    mask = torch.ones_like(ids)
    mask[(0, slice(None, 20)) if side == "left" else (1, slice(-9, None))] = 0
    expected = model(ids, attention_mask=mask).logits
    with fast(model):
        actual = model(ids, attention_mask=mask).logits
    close(actual[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_differs_by_no_more_than_transformers_does(fast, dtype):
    exact, ids = tiny_model("qwen3_5"), tokens()
    model = copy.deepcopy(exact).to(dtype)
    exact = copy.deepcopy(model).float()  # with the same rounded weights
    whole = exact(ids).logits
    theirs = (model(ids).logits.float() - whole).square().mean().sqrt()
    with fast(model):
        mine = (model(ids).logits.float() - whole).square().mean().sqrt()
    assert mine <= 1.3 * theirs


@pytest.mark.parametrize("name, changes", [("qwen3_5", GROUPED), ("qwen3_next", {})], ids=["qwen3_5", "qwen3_next"])
def test_interpreted_kernels_give_the_logits_and_states_of_transformers(interpreted, name, changes):
    model, ids = tiny_model(name, **changes), tokens(2, 37)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    whole, cache = fed(model, ids, ())
    padded = model(ids, attention_mask=mask).logits
    with interpreted(model):
        actual, fast_cache = fed(model, ids, (2, 34))
        close(actual, whole)
        close(model(ids, attention_mask=mask).logits[mask.bool()], padded[mask.bool()])
    for mine, theirs in zip(states(fast_cache), states(cache)):
        close(mine[0], theirs[0])
        close(mine[1], theirs[1])


@every_hybrid
def test_every_part_is_replaced_and_restored(fast, name):
    model, ids = tiny_model(name), tokens()
    before, logits = {key: value.clone() for key, value in model.state_dict().items()}, model(ids).logits
    parts = [*delta_net_modules(model).values(), *norm_modules(model), *gated_mlp_modules(model)]
    assert len(delta_net_modules(model)) == 2 and len(norm_modules(model)) == 2 * 4 + 2 * 2 + 1
    assert len(gated_mlp_modules(model)) >= 4
    with fast(model) as attached:
        assert all("forward" in vars(part) for part in parts)
        assert list(model.state_dict()) == list(before)
    assert not any("forward" in vars(part) for part in model.modules())
    attached.detach()
    assert torch.equal(model(ids).logits, logits)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("order", ["fast first", "sparse first"])
def test_sparse_prefill_works_with_it_in_either_order(fast, order, require_continuing):
    model, ids = tiny_model("qwen3_5"), tokens()
    require_continuing(model)
    indexer, budget = Indexer.for_model(model, dim=64, heads=2), Budget(k=24, block=8)
    with SparsePrefill.attach(model, indexer, budget):
        expected, _ = fed(model, ids, (40,))
    attaching = [lambda: fast(model), lambda: SparsePrefill.attach(model, indexer, budget)]
    first, second = attaching if order == "fast first" else reversed(attaching)
    with first():
        with second():
            close(fed(model, ids, (40,))[0], expected)
    close(model(ids).logits, tiny_model("qwen3_5")(ids).logits, tolerance=0)


def test_an_odd_kernel_width_and_odd_heads(fast):
    changes = dict(linear_conv_kernel_dim=3, linear_key_head_dim=24, linear_value_head_dim=40, linear_num_value_heads=6)
    model, ids = tiny_model("qwen3_next", **changes), tokens()
    whole = model(ids).logits
    with fast(model):
        close(fed(model, ids, (1, 33))[0], whole)


def test_a_copy_of_an_attached_model_runs_on_its_own_weights(fast):
    model, ids = tiny_model("qwen3_5"), tokens()
    with fast(model):
        other = copy.deepcopy(model)
        expected = other(ids).logits
        for parameter in model.parameters():
            parameter.zero_()
        close(other(ids).logits, expected, tolerance=0)


def test_beams_reorder_the_states(fast):
    model, ids = tiny_model("qwen3_5"), tokens(1)
    options = dict(max_new_tokens=5, num_beams=3, do_sample=False, attention_mask=torch.ones_like(ids))
    expected = model.generate(ids, **options)
    with fast(model):
        assert torch.equal(model.generate(ids, **options), expected)


def test_stages_are_named_and_cover_the_layer(fast):
    seen = []

    class Stage:
        def __init__(self, name):
            seen.append(name)

        def __enter__(self): ...

        def __exit__(self, *exception): ...

    with fast(model := tiny_model("qwen3_5"), stage=Stage):
        model(tokens())
    assert seen == ["gdn projections", "gdn convolution", "gdn gates", "gdn delta rule", "gdn norm", "gdn output"] * 2


def test_gradients_are_refused_and_possible_again_after_detach(fast):
    model, ids = tiny_model("qwen3_5"), tokens()
    with torch.enable_grad(), fast(model):
        with pytest.raises(ValueError, match="must run without gradients"):
            model(ids)
    with torch.enable_grad():
        model(ids).logits.sum().backward()
    frozen = tiny_model("qwen3_5").requires_grad_(False)
    with torch.enable_grad(), fast(frozen):
        frozen(ids)


def test_what_it_cannot_serve_is_refused_by_name():
    with pytest.raises(ValueError, match="must have Gated DeltaNet layers .* got 'llama'"):
        FastHybrid.attach(tiny_model("llama"))
    model = tiny_model("qwen3_5")
    with FastHybrid.attach(model), pytest.raises(ValueError, match="must have the forward of its own classes"):
        FastHybrid.attach(model)
    FastHybrid.attach(model).detach()
    with pytest.raises(KernelUnavailableError, match="kernels for cuda, got 'cpu'"):
        FastHybrid.attach(model, impl="kernel")
    with pytest.raises(ValueError, match="impl must be one of"):
        FastHybrid.attach(model, impl="fast")
    assert not any("forward" in vars(part) for part in model.modules())


@pytest.mark.parametrize("missing", ["triton", "fla"])
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, missing):
    monkeypatch.setattr(attach, "_missing", lambda module: module.startswith(missing))
    package = {"triton": "triton", "fla": "'flash-linear-attention>=0.6'"}[missing]
    with pytest.raises(KernelUnavailableError, match=f"need {missing}: run `pip install {package}`"):
        attach._implementation("kernel", "cuda")


@pytest.mark.parametrize("version, served", [("0.5.1", False), ("0.6.0", True), ("1.0", True), (None, False)])
def test_an_old_flash_linear_attention_is_refused(monkeypatch, version, served):
    import importlib.metadata

    def version_of(package):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(attach, "_missing", lambda module: False)
    monkeypatch.setattr(attach.importlib.metadata, "version", version_of)
    if served:
        assert attach._implementation("kernel", "cuda") == "kernel"
    else:
        with pytest.raises(KernelUnavailableError, match="need fla-core 0.6 or newer"):
            attach._implementation("kernel", "cuda")


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_cuda_kernels_are_transformers_layers(length):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("fla")
    changes = dict(linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64)
    exact, ids = tiny_model("qwen3_5", **changes).to("cuda", torch.bfloat16).float(), tokens(2, length).cuda()
    model = copy.deepcopy(exact).bfloat16()
    with FastHybrid.attach(exact, impl="reference"):  # flash-linear-attention multiplies fp32 as TF32
        whole = exact(ids).logits
    theirs = (model(ids).logits.float() - whole).square().mean().sqrt()
    with FastHybrid.attach(model):
        mine = (model(ids).logits.float() - whole).square().mean().sqrt()
        parts = fed(model, ids, (length // 2,) if length > 1 else ())[0]
    assert mine <= 1.3 * theirs and (parts.float() - whole).square().mean().sqrt() <= 1.5 * theirs
