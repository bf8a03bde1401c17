"""index_kl in Triton. Every kernel streams: it computes the attention mass and the index scores of a tile of queries and keys,
uses them and drops them. Every program owns its output and partial sums are added in a fixed order, so gradients are the same
on every run.

There is one pass for the normalisers, one for the loss, and one each for the gradients of queries and of keys. Queries are named
by their positions (`rows`), so that nothing is gathered; a tile of rows may span two segments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
ROWS, COLS = 64, 64
PROGRAMS = 256  # at least this many: with few rows the keys are split into shares, whose partial sums are added
SHARE = 1024  # a share has at least this many keys


@triton.jit
def _positions(rows, first, R, T, ROWS: tl.constexpr):
    """Positions of a tile of rows, T for those beyond the last, and one more than the last key that any of them sees."""
    row = first + tl.arange(0, ROWS)
    token = tl.load(rows + row, mask=row < R, other=T)
    return row, token, tl.max(tl.where(row < R, token, -1), 0) + 1


@triton.jit
def _sees(token, key, T):
    return (token < T)[:, None] & (key[None, :] <= token[:, None])


@triton.jit
def _products(q, k, token, key, T, q_t, q_d, k_t, k_d, D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr):
    """Products of one head's queries and keys, `[ROWS, COLS]`; q and k point at the head."""
    d = tl.arange(0, DP)
    queries = tl.load(
        q + token[:, None].to(tl.int64) * q_t + d[None, :] * q_d, mask=(token < T)[:, None] & (d < D)[None, :], other=0.0
    )
    keys = tl.load(
        k + key[None, :].to(tl.int64) * k_t + d[:, None] * k_d, mask=(key < T)[None, :] & (d < D)[:, None], other=0.0
    )
    return tl.dot(queries, keys, input_precision=PRECISION)


@triton.jit
def _mass(q, k, norm, b, row, token, key, R, T, scale_log2, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d,
          Hq: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """P of a tile, the mean over the teacher's heads; 0 where the query does not see the key."""
    sees = _sees(token, key, T)
    mass = tl.zeros(sees.shape, tl.float32)
    for h in range(0, Hq):
        scores = _products(q + b * q_b + h * q_h, k + b * k_b + (h // G) * k_h, token, key, T, q_t, q_d, k_t, k_d,
                           D, DP, PRECISION) * scale_log2  # fmt: skip
        high = tl.load(norm + (b * Hq + h) * R + row, mask=row < R, other=0.0)
        mass += tl.exp2(tl.where(sees, scores - high[:, None], float("-inf")))
    return mass / Hq


@triton.jit
def _z(qi, ki, w, b, token, key, T, scale, qi_b, qi_h, qi_t, qi_d, ki_b, ki_t, ki_d, w_b, w_t, w_h,
       HI: tl.constexpr, DI: tl.constexpr, DIP: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """z of a tile, -inf where the query does not see the key."""
    sees = _sees(token, key, T)
    z = tl.zeros(sees.shape, tl.float32)
    for h in range(0, HI):
        products = _products(qi + b * qi_b + h * qi_h, ki + b * ki_b, token, key, T, qi_t, qi_d, ki_t, ki_d, DI, DIP, PRECISION)
        products = tl.maximum(products * scale, 0.0)
        if WEIGHTED:
            weight = tl.load(w + b * w_b + token.to(tl.int64) * w_t + h * w_h, mask=token < T, other=0.0)
            products *= weight.to(tl.float32)[:, None]
        z += products
    return tl.where(sees, z, float("-inf"))


@triton.jit
def _log_sum(high, total, scores):
    """The running maximum and sum of exp2 after one more tile of scores in units of log 2."""
    higher = tl.maximum(high, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp2(high - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)


@triton.jit
def _teacher_norms(q, k, rows, norm, R, T, scale_log2, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d,
                   Hq: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
                   COLS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """log2 sum exp of every row and head, float32 `[B, Hq, R]`."""
    b, h = (tl.program_id(1) // Hq).to(tl.int64), tl.program_id(1) % Hq
    row, token, end = _positions(rows, tl.program_id(0) * ROWS, R, T, ROWS)
    high = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, end, COLS):
        key = start + tl.arange(0, COLS)
        scores = _products(q + b * q_b + h * q_h, k + b * k_b + (h // G) * k_h, token, key, T, q_t, q_d, k_t, k_d,
                           D, DP, PRECISION) * scale_log2  # fmt: skip
        high, total = _log_sum(high, total, tl.where(_sees(token, key, T), scores, float("-inf")))
    tl.store(norm + (b * Hq + h) * R + row, high + tl.log2(total), mask=row < R)


@triton.jit
def _index_norms(qi, ki, w, rows, norm, R, T, scale, qi_b, qi_h, qi_t, qi_d, ki_b, ki_t, ki_d, w_b, w_t, w_h,
                 HI: tl.constexpr, DI: tl.constexpr, DIP: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr,
                 COLS: tl.constexpr, LOG2_E: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """log2 sum exp of every row's z, float32 `[B, R]`."""
    b = tl.program_id(1).to(tl.int64)
    row, token, end = _positions(rows, tl.program_id(0) * ROWS, R, T, ROWS)
    high = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, end, COLS):
        key = start + tl.arange(0, COLS)
        z = _z(qi, ki, w, b, token, key, T, scale, qi_b, qi_h, qi_t, qi_d, ki_b, ki_t, ki_d, w_b, w_t, w_h,
               HI, DI, DIP, WEIGHTED, PRECISION)  # fmt: skip
        high, total = _log_sum(high, total, z * LOG2_E)
    tl.store(norm + b * R + row, high + tl.log2(total), mask=row < R)


@triton.jit
def _losses(q, k, teacher_norm, qi, ki, w, index_norm, rows, out, R, T, share, scale_log2, scale,
            q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, qi_b, qi_h, qi_t, qi_d, ki_b, ki_t, ki_d, w_b, w_t, w_h,
            Hq: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HI: tl.constexpr, DI: tl.constexpr,
            DIP: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LOG2_E: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """`sum P (log2 P - log2 softmax(z))` of every row over one share of the keys, float32 `[shares, B, R]`."""
    b = tl.program_id(1).to(tl.int64)
    row, token, end = _positions(rows, tl.program_id(0) * ROWS, R, T, ROWS)
    normal = tl.load(index_norm + b * R + row, mask=row < R, other=0.0)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(tl.program_id(2) * share, tl.minimum(end, (tl.program_id(2) + 1) * share), COLS):
        key = start + tl.arange(0, COLS)
        mass = _mass(q, k, teacher_norm, b, row, token, key, R, T, scale_log2, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d,
                     Hq, G, D, DP, PRECISION)  # fmt: skip
        z = _z(qi, ki, w, b, token, key, T, scale, qi_b, qi_h, qi_t, qi_d, ki_b, ki_t, ki_d, w_b, w_t, w_h,
               HI, DI, DIP, WEIGHTED, PRECISION)  # fmt: skip
        difference = tl.log2(tl.where(mass > 0, mass, 1.0)) - (z * LOG2_E - normal[:, None])
        total += tl.sum(tl.where(mass > 0, mass * difference, 0.0), 1)
    tl.store(out + (tl.program_id(2) * tl.num_programs(1) + b) * R + row, total, mask=row < R)


@triton.jit
def _query_gradients(
    q, k, teacher_norm, qi, ki, w, index_norm, rows, d_qi, d_w, R, T, share, scale_log2, scale,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, qi_b, qi_h, qi_t, qi_d, ki_b, ki_t, ki_d, w_b, w_t, w_h,
    Hq: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HI: tl.constexpr, DI: tl.constexpr, DIP: tl.constexpr,
    WEIGHTED: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LOG2_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and weights of GROUP index heads over one share of the keys, for a gradient of 1 in every row.

    The heads of the group lie one after the other along the rows of a tile: float32 `[shares, B, HI, R, DI]`, `[.., HI, R]`.
    """
    GROUPS: tl.constexpr = (HI + GROUP - 1) // GROUP
    b, group = (tl.program_id(1) // GROUPS).to(tl.int64), tl.program_id(1) % GROUPS
    row, token, end = _positions(rows, tl.program_id(0) * ROWS, R, T, ROWS)
    normal = tl.load(index_norm + b * R + row, mask=row < R, other=0.0)
    d = tl.arange(0, DIP)
    h = group * GROUP + tl.arange(0, GROUP * ROWS) // ROWS
    inner = tl.program_id(0) * ROWS + tl.arange(0, GROUP * ROWS) % ROWS
    live = (h < HI) & (inner < R)
    own = tl.load(rows + inner, mask=live, other=0).to(tl.int64)
    queries = tl.load(qi + b * qi_b + h[:, None] * qi_h + own[:, None] * qi_t + d[None, :] * qi_d,
                      mask=live[:, None] & (d < DI)[None, :], other=0.0)  # fmt: skip
    weight = tl.full([GROUP * ROWS], 1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(w + b * w_b + own * w_t + h * w_h, mask=live, other=0.0).to(tl.float32)
    of_queries = tl.zeros([GROUP * ROWS, DIP], tl.float32)
    of_weights = tl.zeros([GROUP * ROWS], tl.float32)
    for start in range(tl.program_id(2) * share, tl.minimum(end, (tl.program_id(2) + 1) * share), COLS):
        key = start + tl.arange(0, COLS)
        mass = _mass(q, k, teacher_norm, b, row, token, key, R, T, scale_log2, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d,
                     Hq, G, D, DP, PRECISION)  # fmt: skip
        z = _z(qi, ki, w, b, token, key, T, scale, qi_b, qi_h, qi_t, qi_d, ki_b, ki_t, ki_d, w_b, w_t, w_h,
               HI, DI, DIP, WEIGHTED, PRECISION)  # fmt: skip
        d_z = tl.exp2(z * LOG2_E - normal[:, None]) - mass  # 0 where the query does not see the key
        d_z = tl.reshape(tl.broadcast_to(d_z[None], [GROUP, ROWS, COLS]), [GROUP * ROWS, COLS])
        keys = tl.load(ki + b * ki_b + key[:, None].to(tl.int64) * ki_t + d[None, :] * ki_d,
                       mask=(key < T)[:, None] & (d < DI)[None, :], other=0.0)  # [COLS, DIP]  # fmt: skip
        products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if WEIGHTED:
            of_weights += tl.sum(d_z * tl.maximum(products * scale, 0.0), 1)
        d_products = tl.where(products > 0, d_z * weight[:, None] * scale, 0.0)
        of_queries += tl.dot(d_products.to(keys.dtype), keys, input_precision=PRECISION)
    place = ((tl.program_id(2) * (tl.num_programs(1) // GROUPS) + b) * HI + h) * R + inner
    tl.store(d_qi + place[:, None] * DI + d[None, :], of_queries, mask=live[:, None] & (d < DI)[None, :])
    if WEIGHTED:
        tl.store(d_w + place, of_weights, mask=live)


@triton.jit
def _key_gradients(q, k, teacher_norm, qi, ki, w, index_norm, rows, first, grad, d_ki, R, T, scale_log2, scale,
                   q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, qi_b, qi_h, qi_t, qi_d, ki_b, ki_t, ki_d, w_b, w_t, w_h,
                   Hq: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HI: tl.constexpr, DI: tl.constexpr,
                   DIP: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LOG2_E: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """Gradients of one tile of keys, float32 `[B, T, DI]`, from all rows that see any of it: those from `first` on."""
    b = tl.program_id(1).to(tl.int64)
    key = tl.program_id(0) * COLS + tl.arange(0, COLS)
    d = tl.arange(0, DIP)
    inside = (d < DI)[None, :]
    keys = tl.load(ki + b * ki_b + key[:, None].to(tl.int64) * ki_t + d[None, :] * ki_d,
                   mask=(key < T)[:, None] & inside, other=0.0)  # [COLS, DIP]  # fmt: skip
    of_keys = tl.zeros([COLS, DIP], tl.float32)
    for start in range(tl.load(first + tl.program_id(0)), R, ROWS):
        row, token, _ = _positions(rows, start, R, T, ROWS)
        mass = _mass(q, k, teacher_norm, b, row, token, key, R, T, scale_log2, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d,
                     Hq, G, D, DP, PRECISION)  # fmt: skip
        z = _z(qi, ki, w, b, token, key, T, scale, qi_b, qi_h, qi_t, qi_d, ki_b, ki_t, ki_d, w_b, w_t, w_h,
               HI, DI, DIP, WEIGHTED, PRECISION)  # fmt: skip
        normal = tl.load(index_norm + b * R + row, mask=row < R, other=0.0)
        share = tl.load(grad + b * R + row, mask=row < R, other=0.0)
        d_z = (tl.exp2(z * LOG2_E - normal[:, None]) - mass) * (share * scale)[:, None]
        for h in range(0, HI):
            queries = tl.load(qi + b * qi_b + h * qi_h + token[:, None].to(tl.int64) * qi_t + d[None, :] * qi_d,
                              mask=(token < T)[:, None] & inside, other=0.0)  # [ROWS, DIP]  # fmt: skip
            products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            d_products = tl.where(products > 0, d_z, 0.0)
            if WEIGHTED:
                weight = tl.load(w + b * w_b + token.to(tl.int64) * w_t + h * w_h, mask=token < T, other=0.0)
                d_products *= weight.to(tl.float32)[:, None]
            of_keys += tl.dot(tl.trans(d_products.to(queries.dtype)), queries, input_precision=PRECISION)
    tl.store(d_ki + (b * T + key[:, None].to(tl.int64)) * DI + d[None, :], of_keys, mask=(key < T)[:, None] & inside)


def index_kl(
    q: Tensor, k: Tensor, qi: Tensor, ki: Tensor, w: Tensor | None, starts: list[int], stops: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, Hq, T, _ = q.shape
    rows, R = _rows(starts, stops, q.device)
    teacher, index = _teacher(q, k), _indexer(qi, ki, w)
    tiles = triton.cdiv(R, ROWS)
    teacher_norm = q.new_empty((B, Hq, R), dtype=torch.float32)
    _teacher_norms[(tiles, B * Hq)](
        q, k, rows, teacher_norm, R, T, scale * LOG2_E, *q.stride(), *k.stride(), **teacher, **_launch(q, qi)
    )
    index_norm = q.new_empty((B, R), dtype=torch.float32)
    _index_norms[(tiles, B)](
        *_inputs(qi, ki, w), rows, index_norm, R, T, qi.shape[-1] ** -0.5, *_strides(qi, ki, w), LOG2_E=LOG2_E, **index,
        **_launch(q, qi),
    )  # fmt: skip
    share, shares = _shares(T, tiles * B)
    loss = q.new_zeros((shares, B, R), dtype=torch.float32)
    _losses[(tiles, B, shares)](
        q, k, teacher_norm, *_inputs(qi, ki, w), index_norm, rows, loss, R, T, share, scale * LOG2_E, qi.shape[-1] ** -0.5,
        *q.stride(), *k.stride(), *_strides(qi, ki, w), LOG2_E=LOG2_E, **teacher, **index, **_launch(q, qi),
    )  # fmt: skip
    return loss.sum(0).div_(LOG2_E), teacher_norm, index_norm


def index_kl_backward(
    grad: Tensor, teacher_norm: Tensor, index_norm: Tensor,
    q: Tensor, k: Tensor, qi: Tensor, ki: Tensor, w: Tensor | None, starts: list[int], stops: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, Hi, T, Di = qi.shape
    rows, R = _rows(starts, stops, q.device)
    inputs = (q, k, teacher_norm, *_inputs(qi, ki, w), index_norm, rows)
    scales = (scale * LOG2_E, Di**-0.5)
    strides = (*q.stride(), *k.stride(), *_strides(qi, ki, w))
    options = dict(LOG2_E=LOG2_E, **_teacher(q, k), **_indexer(qi, ki, w), **_launch(q, qi))

    group = max(1, min(triton.next_power_of_2(Hi), 256 // options["DIP"]))  # what fits in registers as fp32
    tiles, groups = triton.cdiv(R, ROWS), triton.cdiv(Hi, group)
    share, shares = _shares(T, tiles * B * groups)
    d_rows = qi.new_empty((shares, B, Hi, R, Di), dtype=torch.float32)
    d_weights = qi.new_empty((shares, B, Hi, R if w is not None else 0), dtype=torch.float32)
    _query_gradients[(tiles, B * groups, shares)](
        *inputs, d_rows, d_weights, R, T, share, *scales, *strides, GROUP=group, **options
    )
    positions = rows.long()
    d_qi = torch.zeros_like(qi, memory_format=torch.contiguous_format)
    d_qi[:, :, positions] = (d_rows.sum(0) * grad[:, None, :, None]).to(qi.dtype)
    d_w = qi.new_zeros((B, T, 0 if w is None else Hi))
    if w is not None:
        d_w[:, positions] = (d_weights.sum(0) * grad[:, None]).transpose(1, 2).to(qi.dtype)

    key_tiles = torch.arange(0, T, COLS, device=q.device, dtype=torch.int32)
    first = (torch.searchsorted(rows, key_tiles) // ROWS * ROWS).int()
    d_ki = ki.new_empty((B, T, Di), dtype=torch.float32)
    size = grad.abs().amax()  # gradients of a mean over many rows are small: fp16 holds them at unit size
    unit = grad / torch.where(size > 0, size, 1.0)
    _key_gradients[(len(key_tiles), B)](*inputs, first, unit, d_ki, R, T, *scales, *strides, **options)
    return d_qi, d_ki.mul_(size).to(ki.dtype), d_w


def _rows(starts: list[int], stops: list[int], device) -> tuple[Tensor, int]:
    rows = torch.cat([torch.arange(start, stop, dtype=torch.int32) for start, stop in zip(starts, stops)])
    return rows.to(device, non_blocking=True), len(rows)


def _inputs(qi: Tensor, ki: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return qi, ki, qi if w is None else w


def _strides(qi: Tensor, ki: Tensor, w: Tensor | None) -> tuple[int, ...]:
    return (*qi.stride(), *ki.stride(), *((0, 0, 0) if w is None else w.stride()))


def _teacher(q: Tensor, k: Tensor) -> dict:
    Hq, D = q.shape[1], q.shape[3]
    return dict(Hq=Hq, G=Hq // k.shape[1], D=D, DP=max(16, triton.next_power_of_2(D)))


def _indexer(qi: Tensor, ki: Tensor, w: Tensor | None) -> dict:
    Hi, Di = qi.shape[1], qi.shape[3]
    return dict(HI=Hi, DI=Di, DIP=max(16, triton.next_power_of_2(Di)), WEIGHTED=w is not None)


def _launch(q: Tensor, qi: Tensor) -> dict:
    wide = max(q.shape[-1], qi.shape[-1], qi.shape[1] * min(qi.shape[-1], 64)) > 128
    exact = torch.float32 in (q.dtype, qi.dtype)
    return dict(
        ROWS=ROWS, COLS=COLS, PRECISION="ieee" if exact else "tf32", num_warps=8 if wide else 4,
        num_stages=2,
    )  # fmt: skip


def _shares(T: int, programs: int) -> tuple[int, int]:
    """The keys of one share, in whole tiles, and the number of shares: enough programs, each with enough work."""
    wanted = max(1, min(triton.cdiv(PROGRAMS, programs), T // SHARE))
    share = triton.cdiv(triton.cdiv(T, wanted), COLS) * COLS
    return share, triton.cdiv(T, share)
