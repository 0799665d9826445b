"""The fused kernel: scores, softmax, entmax threshold, mix and product with V in one pass over the queries.

A program owns a tile of queries of one head. Against a short context (`RESIDENT_KEYS`) all scores of the tile stay in
registers; against a longer one they are recomputed tile by tile, once per step of the solver. The threshold is solved
by Newton's method on the p-norm, as in `impl/eager.py`, from the left of the root, in a number of steps known
beforehand (`newton_steps`), so no row waits for another and nothing is read back.

With b = alpha - 1, p = 1 / b, scores c <= 0 whose maximum is 0, and r_i = [1 + b (c_i - u)]_+, entmax is r^p for the u
at which sum r^p = 1. The last step is applied to r, not to u, which would round it.

Runs where Triton does: NVIDIA, AMD and Intel GPUs, and on the CPU in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import contextlib
import math
import os

import torch
import triton
import triton.language as tl

from .common import newton_steps

# keys whose scores a tile of queries can hold in registers; float32 products need some of those registers
RESIDENT_KEYS = 512
RESIDENT_KEYS_FLOAT32 = 256
MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# scores beyond it count as equal: overflow saturates instead of turning into NaN
LARGEST_SCORE = tl.constexpr(1e30)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# below it 1 + x forgets the digits of x that entmax near softmax needs
SMALL_B = 0.05


def unusable(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why the kernel cannot take these tensors; None if it can."""
    dtypes = {query.dtype, key.dtype, value.dtype}
    if len(dtypes) > 1 or query.dtype not in DTYPES:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"it takes float16, bfloat16 or float32, the same for query, key and value, not {names}"
    if max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        return f"it takes a head_dim of at most {MAX_HEAD_DIM}, not {max(query.shape[-1], value.shape[-1])}"
    if query.device.type not in ("cuda", "xpu") and not INTERPRETED.value:
        return f"Triton has no backend for {query.device.type} tensors"
    if query.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "Triton uses the tensor cores of compute capability 8.0 and newer only"
    return None


@triton.jit
def _dot(a, b, acc):
    """acc + a @ b, float32 accumulation."""
    if INTERPRETED:
        # it multiplies bfloat16 as if the bits were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _log1p(x, SMALL: tl.constexpr):
    """log(1 + x) for x >= -1; with SMALL, to full relative precision near 0 (Kahan)."""
    w = 1.0 + x
    if SMALL:
        d = w - 1.0
        return tl.where(d == 0.0, x, tl.log(w) * (x / tl.where(d == 0.0, 1.0, d)))
    return tl.log(w)


@triton.jit
def _expm1(y):
    """exp(y) - 1, to full relative precision near 0 (Kahan)."""
    w = tl.exp(y)
    usual = (w != 1.0) & (w > 0.0)
    safe = tl.where(usual, w, 2.0)
    return tl.where(usual, (safe - 1.0) * (y / tl.log(safe)), tl.where(w == 1.0, y, -1.0))


@triton.jit
def _powers(c, u, b, ALPHA: tl.constexpr, SMALL: tl.constexpr):
    """r and r^(p - 1) of one tile of centred scores. ALPHA is 1.5, 2 or 0 for any other."""
    if ALPHA == 0:
        x = tl.maximum(b * (c - u[:, None]), -1.0)
        return 1.0 + x, tl.exp(_log1p(x, SMALL) * ((1.0 - b) / b))
    r = tl.maximum(tl.fma(c, b, (1.0 - b * u)[:, None]), 0.0)
    if ALPHA == 1.5:
        return r, r
    return r, tl.where(r > 0.0, 1.0, 0.0)


@triton.jit
def _moments(c, u, b, ALPHA: tl.constexpr, SMALL: tl.constexpr):
    """Row sums of r^p and r^(p - 1)."""
    r, slope = _powers(c, u, b, ALPHA, SMALL)
    return tl.sum(r * slope, 1), tl.sum(slope, 1)


@triton.jit
def _newton_step(total, slope, b, ALPHA: tl.constexpr):
    """How far u moves: (1 - total^-b) total / (b slope), Newton on the p-norm. About 0 where every key is masked."""
    slope = tl.maximum(slope, 1e-30)
    # back by rounding alone: impl/eager.py
    if ALPHA == 1.5:
        norm = tl.sqrt(total)
        return tl.maximum(2.0 * (norm - 1.0) * norm / slope, -1.2e-7)
    if ALPHA == 2:
        return tl.maximum((total - 1.0) / slope, -1.2e-7)
    total = tl.maximum(total, 1e-30)
    return -_expm1(-b * tl.log(total)) * total / (b * slope)


@triton.jit
def _entmax(c, u, step, total, slope, b, ALPHA: tl.constexpr, SMALL: tl.constexpr):
    """Entmax weights of one tile, after the last step, whose sums were `total` and `slope`."""
    if ALPHA == 0:
        r, power = _powers(c, u, b, ALPHA, SMALL)
        return power * tl.maximum(r + ((1.0 - total) / tl.maximum(slope, 1e-30))[:, None], 0.0)
    r = tl.maximum(tl.fma(c, b, (1.0 - b * u)[:, None]) - (b * step)[:, None], 0.0)
    return r * r if ALPHA == 1.5 else r


@triton.jit
def _finished_scores(
    s, Mask, rows, cols, n_queries, n_keys, stride_mq, stride_mk, scale, mask_min, MASK: tl.constexpr
):  # fmt: skip
    """scale * s + mask of one tile, -inf where masked or past the last key. MASK: 0 none, 1 boolean, 2 additive."""
    s *= scale
    # NaN (inf - inf inside the dot) fails the comparison
    s = tl.minimum(tl.where(s > -LARGEST_SCORE, s, -LARGEST_SCORE), LARGEST_SCORE)
    inside = (cols < n_keys)[None, :]
    if MASK != 0:
        at = Mask + rows[:, None] * stride_mq + cols[None, :] * stride_mk
        mask = tl.load(at, mask=inside & (rows < n_queries)[:, None], other=0)
        if MASK == 1:
            inside = inside & (mask != 0)
        else:
            mask = mask.to(tl.float32)
            inside = inside & (mask > mask_min)
            s += mask
    return tl.where(inside, s, -float("inf"))


@triton.jit
def _start(centred_sum, count, b):
    """u left of the root, exact for equal scores: mean(c) + p (1 - n^-b), or 0 (the largest score alone)."""
    count = tl.maximum(count, 1.0)
    return tl.maximum(centred_sum / count - _expm1(-b * tl.log(count)) / b, 0.0)


@triton.jit
def _row_sum(c):
    """Sum and number of the scores that are not masked."""
    kept = c > -float("inf")
    return tl.sum(tl.where(kept, c, 0.0), 1), tl.sum(tl.where(kept, 1.0, 0.0), 1)


@triton.jit
def _mass(Mass, rows, n_queries, stride_sq, peak, dense_sum, MASS: tl.constexpr):
    """The factor of every row. MASS: 0 is 1, 1 given as such, 2 from the log-sum-exp of a longer row."""
    if MASS == 0:
        return tl.full(peak.shape, 1.0, tl.float32)
    given = tl.load(Mass + rows * stride_sq, mask=rows < n_queries, other=0.0).to(tl.float32)
    if MASS == 1:
        return given
    part = tl.exp(peak + tl.log(tl.maximum(dense_sum, 1e-30)) - given)
    return tl.where(dense_sum > 0.0, tl.minimum(part, 1.0), 0.0)


@triton.jit
def _store(Out, mass, acc, rows, dims, n_queries, stride_oq, bound, largest, DV, MASS: tl.constexpr):
    """Write acc * bound * mass, saturated at the largest value of the output's dtype."""
    inside = rows < n_queries
    acc = tl.minimum(tl.maximum(acc * bound, -largest), largest)
    if MASS != 0:
        acc = tl.minimum(tl.maximum(acc * mass[:, None], -largest), largest)
    at = Out + rows[:, None] * stride_oq + dims[None, :]
    tl.store(at, acc.to(Out.dtype.element_ty), mask=inside[:, None] & (dims < DV)[None, :])


@triton.jit
def _resident_kernel(
    Q, K, V, Mask, Mass, Out,
    stride_qb, stride_qh, stride_qq, stride_qd, stride_kb, stride_kh, stride_kk, stride_kd,
    stride_vb, stride_vh, stride_vk, stride_vd, stride_mb, stride_mh, stride_mq, stride_mk,
    stride_sb, stride_sh, stride_sq, stride_ob, stride_oh, stride_oq,
    n_queries, n_keys, heads, groups, scale, b, dense, sparse, bound, mask_min, largest,
    D: tl.constexpr, DV: tl.constexpr, ALPHA: tl.constexpr, SMALL: tl.constexpr, STEPS: tl.constexpr,
    MASK: tl.constexpr, MASS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All keys at once, in a tile of BLOCK_K and one of TAIL_K (0: none): 77 keys are 64 + 16, not 128."""
    tiles = tl.cdiv(n_queries, BLOCK_Q)
    pid = tl.program_id(0)
    head = pid // tiles
    batch, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    rows = (pid % tiles).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    cols = tl.arange(0, BLOCK_K)
    row_inside, col_inside = rows < n_queries, cols < n_keys
    Q += batch * stride_qb + h * stride_qh
    K += batch * stride_kb + (h // groups) * stride_kh
    V += batch * stride_vb + (h // groups) * stride_vh
    Mask += batch * stride_mb + h * stride_mh
    Mass += batch * stride_sb + h * stride_sh
    Out += batch * stride_ob + h * stride_oh

    c = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    if TAIL_K > 0:
        tail_cols = BLOCK_K + tl.arange(0, TAIL_K)
        tail_inside = tail_cols < n_keys
        tail = tl.zeros((BLOCK_Q, TAIL_K), tl.float32)
    for d in tl.static_range(0, D, BLOCK_D):
        dims = d + tl.arange(0, BLOCK_D)
        dim_inside = dims < D
        at = Q + rows[:, None] * stride_qq + dims[None, :] * stride_qd
        q = tl.load(at, mask=row_inside[:, None] & dim_inside[None, :], other=0.0)
        at = K + cols[None, :] * stride_kk + dims[:, None] * stride_kd
        k = tl.load(at, mask=col_inside[None, :] & dim_inside[:, None], other=0.0)
        c = _dot(q, k, c)
        if TAIL_K > 0:
            at = K + tail_cols[None, :] * stride_kk + dims[:, None] * stride_kd
            k = tl.load(at, mask=tail_inside[None, :] & dim_inside[:, None], other=0.0)
            tail = _dot(q, k, tail)

    c = _finished_scores(c, Mask, rows, cols, n_queries, n_keys, stride_mq, stride_mk, scale, mask_min, MASK)
    peak = tl.max(c, 1)
    if TAIL_K > 0:
        tail = _finished_scores(
            tail, Mask, rows, tail_cols, n_queries, n_keys, stride_mq, stride_mk, scale, mask_min, MASK
        )
        peak = tl.maximum(peak, tl.max(tail, 1))
    # where all is masked the peak stays finite, and -inf stays -inf
    peak = tl.maximum(peak, -3e38)
    c -= peak[:, None]
    centred_sum, count = _row_sum(c)
    if TAIL_K > 0:
        tail -= peak[:, None]
        tail_sum, tail_count = _row_sum(tail)
        centred_sum += tail_sum
        count += tail_count

    u = _start(centred_sum, count, b)
    step, total, slope = tl.zeros_like(u), tl.zeros_like(u), tl.zeros_like(u)
    for _ in tl.static_range(STEPS):
        u += step
        total, slope = _moments(c, u, b, ALPHA, SMALL)
        if TAIL_K > 0:
            tail_total, tail_slope = _moments(tail, u, b, ALPHA, SMALL)
            total += tail_total
            slope += tail_slope
        step = _newton_step(total, slope, b, ALPHA)

    weights = _entmax(c, u, step, total, slope, b, ALPHA, SMALL)
    c = tl.exp(c)
    sparse_sum, dense_sum = tl.sum(weights, 1), tl.sum(c, 1)
    if TAIL_K > 0:
        tail_weights = _entmax(tail, u, step, total, slope, b, ALPHA, SMALL)
        tail = tl.exp(tail)
        sparse_sum += tl.sum(tail_weights, 1)
        dense_sum += tl.sum(tail, 1)
    sparse_factor = (sparse / tl.maximum(sparse_sum, 1e-30))[:, None]
    dense_factor = (dense / tl.maximum(dense_sum, 1e-30))[:, None]
    weights = (weights * sparse_factor + c * dense_factor).to(V.dtype.element_ty)
    if TAIL_K > 0:
        tail_weights = (tail_weights * sparse_factor + tail * dense_factor).to(V.dtype.element_ty)

    mass = _mass(Mass, rows, n_queries, stride_sq, peak, dense_sum, MASS)
    for d in tl.static_range(0, DV, BLOCK_D):
        dims = d + tl.arange(0, BLOCK_D)
        dim_inside = dims < DV
        at = V + cols[:, None] * stride_vk + dims[None, :] * stride_vd
        v = tl.load(at, mask=col_inside[:, None] & dim_inside[None, :], other=0.0)
        acc = _dot(weights, v, tl.zeros((BLOCK_Q, BLOCK_D), tl.float32))
        if TAIL_K > 0:
            at = V + tail_cols[:, None] * stride_vk + dims[None, :] * stride_vd
            v = tl.load(at, mask=tail_inside[:, None] & dim_inside[None, :], other=0.0)
            acc = _dot(tail_weights, v, acc)
        _store(Out, mass, acc, rows, dims, n_queries, stride_oq, bound, largest, DV, MASS)


@triton.jit
def _tile_scores(
    q, K, Mask, rows, start, n_queries, n_keys, stride_kk, stride_kd, stride_mq, stride_mk, scale, mask_min,
    D: tl.constexpr, MASK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of queries against the tile of keys that begins at `start`."""
    cols = start + tl.arange(0, BLOCK_K)
    dims = tl.arange(0, BLOCK_D)
    at = K + cols[None, :].to(tl.int64) * stride_kk + dims[:, None] * stride_kd
    k = tl.load(at, mask=(cols < n_keys)[None, :] & (dims < D)[:, None], other=0.0)
    s = _dot(q, k, tl.zeros((q.shape[0], BLOCK_K), tl.float32))
    return _finished_scores(
        s, Mask, rows, cols.to(tl.int64), n_queries, n_keys, stride_mq, stride_mk, scale, mask_min, MASK
    )


@triton.jit
def _streaming_kernel(
    Q, K, V, Mask, Mass, Out,
    stride_qb, stride_qh, stride_qq, stride_qd, stride_kb, stride_kh, stride_kk, stride_kd,
    stride_vb, stride_vh, stride_vk, stride_vd, stride_mb, stride_mh, stride_mq, stride_mk,
    stride_sb, stride_sh, stride_sq, stride_ob, stride_oh, stride_oq,
    n_queries, n_keys, heads, groups, scale, b, dense, sparse, bound, mask_min, largest,
    D: tl.constexpr, DV: tl.constexpr, ALPHA: tl.constexpr, SMALL: tl.constexpr, STEPS: tl.constexpr,
    MASK: tl.constexpr, MASS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Any number of keys, BLOCK_K at a time: one pass for maximum and sums, STEPS for the threshold, one for V."""
    tiles = tl.cdiv(n_queries, BLOCK_Q)
    pid = tl.program_id(0)
    head = pid // tiles
    batch, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    rows = (pid % tiles).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, BLOCK_D)
    Q += batch * stride_qb + h * stride_qh
    K += batch * stride_kb + (h // groups) * stride_kh
    V += batch * stride_vb + (h // groups) * stride_vh
    Mask += batch * stride_mb + h * stride_mh
    Mass += batch * stride_sb + h * stride_sh
    Out += batch * stride_ob + h * stride_oh
    at = Q + rows[:, None] * stride_qq + dims[None, :] * stride_qd
    q = tl.load(at, mask=(rows < n_queries)[:, None] & (dims < D)[None, :], other=0.0)

    zeros = tl.zeros((BLOCK_Q,), tl.float32)
    peak, count, score_sum, dense_sum = zeros - 3e38, zeros, zeros, zeros
    for start in range(0, n_keys, BLOCK_K):
        s = _tile_scores(
            q, K, Mask, rows, start, n_queries, n_keys, stride_kk, stride_kd, stride_mq, stride_mk, scale, mask_min,
            D, MASK, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        higher = tl.maximum(peak, tl.max(s, 1))
        c = s - higher[:, None]
        tile_sum, tile_count = _row_sum(c)
        dense_sum = dense_sum * tl.exp(peak - higher) + tl.sum(tl.exp(c), 1)
        # the earlier scores move down with the maximum; none of them is left where the maximum was -inf
        score_sum = tl.where(count > 0.0, score_sum + count * (peak - higher), 0.0) + tile_sum
        count += tile_count
        peak = higher

    u = _start(score_sum, count, b)
    step, total, slope = zeros, zeros, zeros
    for _ in range(STEPS):
        u += step
        total, slope = zeros, zeros
        for start in range(0, n_keys, BLOCK_K):
            s = _tile_scores(
                q, K, Mask, rows, start, n_queries, n_keys, stride_kk, stride_kd, stride_mq, stride_mk, scale,
                mask_min, D, MASK, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            tile_total, tile_slope = _moments(s - peak[:, None], u, b, ALPHA, SMALL)
            total += tile_total
            slope += tile_slope
        step = _newton_step(total, slope, b, ALPHA)

    dense_factor = (dense / tl.maximum(dense_sum, 1e-30))[:, None]
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start in range(0, n_keys, BLOCK_K):
        s = _tile_scores(
            q, K, Mask, rows, start, n_queries, n_keys, stride_kk, stride_kd, stride_mq, stride_mk, scale, mask_min,
            D, MASK, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        c = s - peak[:, None]
        weights = sparse * _entmax(c, u, step, total, slope, b, ALPHA, SMALL) + dense_factor * tl.exp(c)
        cols = start + tl.arange(0, BLOCK_K)
        v_at = V + cols[:, None].to(tl.int64) * stride_vk + dims[None, :] * stride_vd
        v = tl.load(v_at, mask=(cols < n_keys)[:, None] & (dims < DV)[None, :], other=0.0)
        acc = _dot(weights.to(V.dtype.element_ty), v, acc)
    mass = _mass(Mass, rows, n_queries, stride_sq, peak, dense_sum, MASS)
    _store(Out, mass, acc, rows, dims, n_queries, stride_oq, bound, largest, DV, MASS)


def key_tiles(keys: int) -> tuple[int, int]:
    """(head, tail) tile widths of the resident kernel: powers of two, at least 16, that cover `keys` most closely."""
    head = min(max(16, triton.next_power_of_2(keys)), RESIDENT_KEYS // 2)
    half = max(16, head // 2)
    if head > half:
        for tail in (t for t in (16, 32, 64, 128) if t < half):
            if half + tail >= keys:
                return half, tail
    if head >= keys:
        return head, 0
    return head, next(t for t in (16, 32, 64, 128, 256) if head + t >= keys)


def is_resident(keys: int, dtype: torch.dtype) -> bool:
    """Whether all scores of a tile of queries stay on chip."""
    return keys <= (RESIDENT_KEYS_FLOAT32 if dtype == torch.float32 else RESIDENT_KEYS)


def configuration(queries: int, keys: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and warps. A table, not a search: the first image must not wait for one.

    A warp owns whole rows as long as their scores fit its registers: sums over keys then never leave the warp.
    """
    padded = max(16, triton.next_power_of_2(width))
    # slices of the width: 80 is 32 + 32 + 16, not 128; many keys want few, wide slices, or registers run out
    block_d = padded if padded <= 64 else 64 if width % 64 == 0 or keys > 256 else 32
    resident = is_resident(keys, dtype)
    head, tail = key_tiles(keys) if resident else (64 if padded <= 128 else 32, 0)
    if not resident:
        block_q, warps, block_d = 64, 4 if padded <= 128 else 8, padded
    elif head + tail <= 160:
        block_q, warps = 64, 4
    elif head + tail <= 256:
        block_q, warps = 64, 8
    else:
        block_q, warps = 32, 8
    if dtype == torch.float32:
        # no tensor cores: products and scores share the registers
        block_q, block_d = 16, min(block_d, 32) if resident else block_d
    block_q = min(block_q, max(16, triton.next_power_of_2(queries)))
    tiles = {"BLOCK_Q": block_q, "BLOCK_K": head, "TAIL_K": tail, "BLOCK_D": block_d}
    return {**tiles, "num_warps": warps, "num_stages": 2}


def attend(query, key, value, mask, mix_mask, scale, alpha, dense, sparse, mass, row_lse) -> torch.Tensor:
    """mass * (dense * softmax(S) + sparse * entmax_alpha(S)) @ value; shapes as in `pladis_core.api`."""
    batch, heads, queries, width = query.shape
    keys, value_width = value.shape[-2:]
    out = query.new_empty(batch, queries, heads, value_width).transpose(1, 2)
    if out.numel() == 0 or keys == 0:
        return out.zero_()
    if alpha == 1.0 or sparse == 0.0:
        # softmax alone: an entmax of weight 0 beside it
        alpha, dense, sparse = 1.5, dense + sparse, 0.0
    config = configuration(queries, keys, max(width, value_width), query.dtype)
    steps = newton_steps(keys, alpha, query.dtype)
    # a power of two that keeps sums of weighted values in range; 16-bit floats cannot leave that of float32
    weight = abs(dense) + abs(sparse)
    bound = 1.0 if query.dtype == torch.float16 else 2.0 ** math.ceil(math.log2(max(2.0 * weight, 1.0)))
    kernel = _resident_kernel if is_resident(keys, query.dtype) else _streaming_kernel
    # unused pointers need a tensor all the same
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    factor = mass if row_lse is None else row_lse
    factor_strides = (0, 0, 0) if factor is None else factor.stride()[:3]
    grid = (batch * heads * triton.cdiv(queries, config["BLOCK_Q"]),)
    with _on_device(query.device):
        kernel[grid](
            query, key, value, query if mask is None else mask, query if factor is None else factor, out,
            *query.stride(), *key.stride(), *value.stride(), *mask_strides, *factor_strides, *out.stride()[:3],
            queries, keys, heads, heads // key.shape[1], scale, alpha - 1.0, dense / bound, sparse / bound, bound,
            0.0 if mask is None or mask.dtype == torch.bool else torch.finfo(mask.dtype).min,
            torch.finfo(query.dtype).max,
            D=width, DV=value_width, ALPHA=alpha if alpha in (1.5, 2.0) else 0, SMALL=alpha - 1.0 < SMALL_B,
            STEPS=steps, MASK=0 if mask is None else 1 if mask.dtype == torch.bool else 2,
            MASS=0 if factor is None else 1 if row_lse is None else 2,
            **config,
        )  # fmt: skip
    return out


def _on_device(device: torch.device):
    """Triton launches on the current device."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
