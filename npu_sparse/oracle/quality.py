"""End to end: what sparse prefill does to next-token distributions and answers, recursively over the layers."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from .. import ops, tasks
from ..budget import Budget
from ..measure.decode import generate_texts
from ..ops import workspace
from ..prefill import SparsePrefill
from ..selectors import LayerInputs, Selector
from ..support import Support

LOGIT_ELEMENTS = 1 << 23  # fp32 logits alive at once, per model
SAMPLED_QUERIES = 16
# Samples of queries end at this share of the prompt, less this many queries: early and late ones of a block alike.
SAMPLED_PLACES = ((5 / 8, 48), (6 / 8, 32), (7 / 8, 16), (1.0, 0))


def measure(
    model,
    prompts: Sequence[Tensor],
    dense: Sequence[Tensor],
    dense_model,
    *,
    selector: Selector | None = None,
    budget: Budget | None = None,
    impl: str = "reference",
    stride: int = 1,
    workspace_mib: int = workspace.DEFAULT_MIB,
) -> list[dict]:
    """Per prompt: KL and agreement against dense, and the attention mass that the supports keep.

    `{"kl", "agreement", "kl_second_half", "agreement_second_half", "retained_by_layer"}`. KL is the mean of KL(dense
    || this) over positions in nats, agreement the share of positions with the same most likely token.
    `retained_by_layer` (None without a selector) is the mean share of attention mass within the support, over a
    sample of the prompt's second half, on the hidden states that the sparse layers before have left.

    Args:
        model: with `selector` None it runs as it is: the noise floor of another dtype.
        prompts: int64 `[T]` each.
        dense: `hidden_states` of `dense_model` for the same prompts and stride.
    """
    results = []
    for ids, reference in zip(prompts, dense):
        retained: dict[int, float] = {}

        def observe(inputs: LayerInputs, support: Support, out: Tensor, retained=retained) -> None:
            retained[inputs.layer] = sampled_retained_mass(inputs, support)

        attached = nullcontext()
        if selector is not None:
            attached = SparsePrefill.attach(
                model, selector, budget, impl=impl, observe=observe, workspace_mib=workspace_mib
            )
        with attached:
            hidden = hidden_states(model, ids, stride)
        results.append({
            **compare(dense_model, reference, model, hidden),
            "retained_by_layer": [retained[layer] for layer in sorted(retained)] if retained else None,
        })  # fmt: skip
    return results


@torch.no_grad()
def hidden_states(model, ids: Tensor, stride: int = 1) -> Tensor:
    """What the output embedding of `model` reads, `[n, hidden]`, at every stride-th position, the last one included.

    Logits of a whole prompt are never held: a vocabulary of 262,144 makes them 1 GiB per 1,024 tokens.
    """
    states: list[Tensor] = []

    def keep(module, args, output) -> None:
        states.append(output.last_hidden_state)

    handle = model.base_model.register_forward_hook(keep)
    try:
        last = model(input_ids=ids[None].to(model.device), use_cache=False, logits_to_keep=1).logits[0].float()
    finally:
        handle.remove()
    hidden = states[0][0]
    expected = model.get_output_embeddings()(hidden[-1:]).float()
    if not torch.allclose(last, expected, rtol=0.05, atol=0.05 * float(expected.abs().max())):
        raise ValueError(f"{type(model).__name__} changes its logits after the output embedding: not supported")
    return hidden[torch.arange(len(hidden) - 1, -1, -stride, device=hidden.device).flip(0)].clone()


@torch.no_grad()
def compare(dense_model, dense: Tensor, model, hidden: Tensor) -> dict[str, float]:
    """KL(dense || other) in nats and the share of equal most likely tokens, over all positions and over the second
    half.

    `dense` and `hidden` are `[n, hidden]`, see `hidden_states`.
    """
    head, other = dense_model.get_output_embeddings(), model.get_output_embeddings()
    rows = max(1, LOGIT_ELEMENTS // head.weight.shape[0])
    divergence, equal = [], []
    for start in range(0, len(dense), rows):
        p = head(dense[start : start + rows]).float()  # [rows, vocabulary]
        q = other(hidden[start : start + rows]).float()
        equal.append(p.argmax(-1) == q.argmax(-1))
        normalizers = q.logsumexp(-1) - p.logsumexp(-1)
        difference = p - q
        divergence.append(torch.linalg.vecdot(p.softmax(-1), difference) + normalizers)
    kl = torch.cat(divergence).clamp_(min=0.0)  # rounding can leave -1e-7 where the two are equal
    agreement = torch.cat(equal).float()
    half = len(kl) // 2
    return {
        "kl": float(kl.mean()),
        "agreement": float(agreement.mean()),
        "kl_second_half": float(kl[half:].mean()),
        "agreement_second_half": float(agreement[half:].mean()),
    }


def sampled_retained_mass(inputs: LayerInputs, support: Support) -> float:
    """The share of attention mass within the support: mean over heads and over 64 queries of the second half."""
    T = inputs.q.shape[2]
    samples = []
    for share, less in SAMPLED_PLACES:
        stop = max(1, round(share * T) - less)
        samples.append(retained_mass(inputs, support, max(0, stop - SAMPLED_QUERIES), stop))
    return float(torch.cat(samples, -1).mean())


def retained_mass(inputs: LayerInputs, support: Support, start: int, stop: int) -> Tensor:
    """The share of these queries' attention mass within the support, mean over heads, float32 `[B, stop - start]`."""
    mass = ops.attention_mass(
        inputs.q[:, :, start:stop], inputs.k[:, :, :stop], scale=inputs.scale, per_kv=True, impl=inputs.impl
    )  # [B, Hkv, R, stop]
    rows = torch.arange(start, stop, device=mass.device) // support.block
    indices = support.indices[:, :, rows].long()  # [B, Hs, R, K]
    slots = torch.arange(support.width, device=mass.device)
    used = (slots < support.count[:, :, rows, None]) & (indices < stop)
    indices = torch.where(used, indices, 0).expand(-1, mass.shape[1], -1, -1)
    return (mass.gather(-1, indices) * used).sum(-1).mean(1)


def task_scores(
    model, tokenizer, examples: Sequence[tasks.Example], *, selector: Selector | None = None,
    budget: Budget | None = None, impl: str = "reference", workspace_mib: int = workspace.DEFAULT_MIB,
) -> list[float]:  # fmt: skip
    """The score of each example in [0, 1]: prefill as attached (dense without a selector), greedy and dense decode."""
    attached = nullcontext()
    if selector is not None:
        attached = SparsePrefill.attach(model, selector, budget, impl=impl, workspace_mib=workspace_mib)
    with attached:
        outputs = generate_texts(model, tokenizer, examples, [tasks.encode(tokenizer, example) for example in examples], batch=1)
    return [tasks.score(example, output) for example, output in zip(examples, outputs)]
