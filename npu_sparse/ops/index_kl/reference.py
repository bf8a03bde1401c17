"""index_kl in eager PyTorch: one tile of supervised rows at a time, everything in fp32."""

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 25  # fp32 scores alive at once: 128 MiB, and a few times that in all


def index_kl(
    q: Tensor, k: Tensor, qi: Tensor, ki: Tensor, w: Tensor | None, starts: list[int], stops: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, Hq = q.shape[:2]
    R = sum(stops) - sum(starts)
    loss = q.new_empty((B, R), dtype=torch.float32)
    teacher_norm = q.new_empty((B, Hq, R), dtype=torch.float32)
    index_norm = q.new_empty((B, R), dtype=torch.float32)
    for start, stop, rows in _tiles(starts, stops, B, Hq, qi.shape[1]):
        ahead = _ahead(start, stop, q.device)
        scores = _scores(q, k, start, stop, scale, ahead)  # [B, Hq, rows, stop]
        teacher_norm[:, :, rows] = torch.logsumexp(scores, -1)
        mass = torch.softmax(scores, -1).mean(1)  # [B, rows, stop]
        z = _weighted(_products(qi, ki, start, stop), w, start, stop).masked_fill_(ahead, float("-inf"))
        index_norm[:, rows] = torch.logsumexp(z, -1)
        log_indexer = (z - index_norm[:, rows, None]).masked_fill_(ahead, 0.0)
        loss[:, rows] = (torch.xlogy(mass, mass) - mass * log_indexer).sum(-1)
    return loss, teacher_norm, index_norm


def index_kl_backward(
    grad: Tensor, teacher_norm: Tensor, index_norm: Tensor,
    q: Tensor, k: Tensor, qi: Tensor, ki: Tensor, w: Tensor | None, starts: list[int], stops: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_qi = torch.zeros(qi.shape, dtype=torch.float32, device=qi.device)
    d_ki = torch.zeros(ki.shape, dtype=torch.float32, device=ki.device)
    B, Hi, T, Di = qi.shape
    d_w = torch.zeros((B, T, 0 if w is None else Hi), dtype=torch.float32, device=qi.device)
    for start, stop, rows in _tiles(starts, stops, B, q.shape[1], Hi):
        ahead = _ahead(start, stop, q.device)
        scores = _scores(q, k, start, stop, scale, ahead)
        mass = torch.exp(scores - teacher_norm[:, :, rows, None]).mean(1)  # [B, rows, stop]
        products = _products(qi, ki, start, stop)  # [B, Hi, rows, stop]
        z = _weighted(products, w, start, stop).masked_fill_(ahead, float("-inf"))
        d_z = grad[:, rows, None] * (torch.exp(z - index_norm[:, rows, None]) - mass)
        if w is not None:
            d_w[:, start:stop] = (d_z[:, None] * products).sum(-1).transpose(1, 2)
            d_z = d_z[:, None] * w[:, start:stop].float().transpose(1, 2)[..., None]
        else:
            d_z = d_z[:, None].expand_as(products)
        d_products = torch.where(products > 0, d_z, 0.0) * Di**-0.5
        d_qi[:, :, start:stop] = torch.matmul(d_products, ki[:, None, :stop].float())
        d_ki[:, :stop] += torch.matmul(d_products.transpose(-1, -2), qi[:, :, start:stop].float()).sum(1)
    return d_qi.to(qi.dtype), d_ki.to(ki.dtype), d_w.to(qi.dtype)


def _tiles(starts: list[int], stops: list[int], B: int, Hq: int, Hi: int):
    """`(start, stop, slice of the supervised rows)` of every tile of query rows, in order."""
    done = 0
    for first, last in zip(starts, stops):
        step = max(1, TILE_ELEMENTS // (B * max(Hq, Hi) * last))
        for start in range(first, last, step):
            stop = min(start + step, last)
            yield start, stop, slice(done, done + stop - start)
            done += stop - start


def _ahead(start: int, stop: int, device) -> Tensor:
    return torch.ones(stop - start, stop, dtype=torch.bool, device=device).triu_(start + 1)


def _scores(q: Tensor, k: Tensor, start: int, stop: int, scale: float, ahead: Tensor) -> Tensor:
    """The teacher's scores of a tile, fp32 `[B, Hq, rows, stop]`, -inf where the key lies ahead."""
    rows = q[:, :, start:stop].float().unflatten(1, (k.shape[1], -1))  # [B, Hkv, G, rows, D]
    keys = k[:, :, None, :stop].float().transpose(-1, -2)  # [B, Hkv, 1, D, stop]
    return torch.matmul(rows, keys).flatten(1, 2).mul_(scale).masked_fill_(ahead, float("-inf"))


def _products(qi: Tensor, ki: Tensor, start: int, stop: int) -> Tensor:
    """ReLU of every index head's products, fp32 `[B, Hi, rows, stop]`."""
    products = torch.matmul(qi[:, :, start:stop].float(), ki[:, None, :stop].float().transpose(-1, -2))
    return products.mul_(qi.shape[-1] ** -0.5).relu_()


def _weighted(products: Tensor, w: Tensor | None, start: int, stop: int) -> Tensor:
    if w is None:
        return products.sum(1)
    return (products * w[:, start:stop].float().transpose(1, 2)[..., None]).sum(1)  # [B, rows, stop]
