"""Language-model loss through a soft selection: the stage after the divergences, in which what is selected is what is trained.

Every key keeps its place in a query's softmax, weighted by how far its index score stands above those that the query's k best
keys leave out: `softmax(<q, k> * scale + log sigmoid((z - z_k) / temperature))`, z_k between the k-th best score and the next.
Keys far above are read as they are and keys far below are not read, as at the runtime; the gradient reaches the indexer through
those in between, and nothing else is trained.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..indexer import Indexer
from .loss import index_logits
from .teacher import Tap, tapped

TEMPERATURE = 0.25  # of index scores, which spread over some nats


def soft_attention(tap: Tap, v: Tensor, z: Tensor, k: int) -> Tensor:
    """`[B, T, Hq, Dv]`: attention of `tap` weighted by the soft selection of index scores z `[B, T, T]`, -inf ahead."""
    G, T = tap.q.shape[1] // tap.k.shape[1], z.shape[1]
    ranked = functional.pad(z.detach(), (0, 1), value=float("-inf")).topk(min(k, T) + 1, -1).values
    between = ranked[..., -2:].mean(-1, keepdim=True)  # of the last that is selected and the first that is not; -inf: all are
    gate = functional.logsigmoid((z - between.clamp(min=torch.finfo(z.dtype).min)) / TEMPERATURE)
    scores = (tap.q @ tap.k.repeat_interleave(G, 1).mT).float() * tap.scale + gate[:, None]  # [B, Hq, T, T]
    return (scores.softmax(-1).to(v.dtype) @ v.repeat_interleave(G, 1)).transpose(1, 2)


def language_loss(model, indexer: Indexer, ids: Tensor, k: int) -> Tensor:
    """Mean cross-entropy, in nats, of every token of `ids` `[B, T]` after the first, differentiable in the indexer alone."""

    def attend(dense, seen: Tap, v, **kwargs):
        head = indexer.layers[str(seen.layer)]

        def layer(hidden, q, key, v):
            whole = Tap(seen.layer, hidden, seen.cos, seen.sin, q, key, seen.scale)
            (z,) = index_logits(head, whole, [(0, q.shape[2])])
            return soft_attention(whole, v, z, k)

        # hidden states are given: what a layer selects does not train the layers before it through its scores
        return checkpoint(layer, seen.hidden.detach(), seen.q, seen.k, v, use_reentrant=False), None

    with tapped(model, attend):
        logits = model(ids, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
