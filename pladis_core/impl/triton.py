"""The fused kernel: scores, softmax, entmax threshold, mix and product with V in one pass over the queries.

A program owns a tile of queries of one head. Against a short context (`RESIDENT_KEYS`) all scores of the tile stay in
registers; against a longer one they are recomputed tile by tile, once per step of the solver. The threshold is solved
by Newton's method on the p-norm, as in `impl/eager.py`, from the left of the root, until no row of the tile moves by
more than `enough` or `newton_steps` are done. Nothing is read back by the host.

With b = alpha - 1, p = 1 / b, scores c <= 0 whose maximum is 0, and r_i = [1 + b (c_i - u)]_+, entmax is r^p for the u
at which sum r^p = 1. As u >= 0, r never exceeds 1: saturation, which GPUs give with a product and sum, is all that
keeps it in range. The start is u = 0, where the first step is exact for equal scores, and for alpha 2 counts the keys
within p of the maximum.

What a score costs decides: tensor cores wait for the instructions that centre, saturate and sum. So without a mask
the softmax scale is a factor of the constants that multiply a score anyway, and nothing is selected or counted.

Runs where Triton does: NVIDIA, AMD and Intel GPUs, and on the CPU in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

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
LARGEST_SCORE = 1e30
# with 16-bit weights, whose scores are centred in one rounding, so do those whose exponents of 2 are beyond this one
LARGEST_EXPONENT = 2.0**20
# how far below a row's maximum, as an exponent of 2, keys have no softmax mass
FAR = tl.constexpr(120.0)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
# below it 1 + x forgets the digits of x that entmax near softmax needs
SMALL_B = 0.05
# `newton_steps` counts from a start that also knows the mean
STEPS_FROM_THE_PEAK = 2
# a sum of rounded weights divides only where rounding cannot make it vanish
LARGEST_CANCELLATION = 16.0
# rows and columns that a tile may have past the last one
MAX_TILE = 512
NO_STRIDES = (0, 0, 0, 0)
# of programs, in the second and third dimension
LARGEST_GRID = 65535


def unusable(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why the kernel cannot take these tensors; None if it can."""
    dtypes = {query.dtype, key.dtype, value.dtype}
    if len(dtypes) > 1 or query.dtype not in DTYPES:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"it takes float16, bfloat16 or float32, the same for query, key and value, not {names}"
    if max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        return f"it takes a head_dim of at most {MAX_HEAD_DIM}, not {max(query.shape[-1], value.shape[-1])}"
    if max(query.shape[:2]) > LARGEST_GRID:
        return f"it takes at most {LARGEST_GRID} rows of a batch, not {max(query.shape[:2])}"
    if query.device.type not in ("cuda", "xpu") and not INTERPRETED.value:
        return f"Triton has no backend for {query.device.type} tensors"
    capability, wave = _target(query.device)
    if 0 < capability < 80:
        return "Triton uses the tensor cores of compute capability 8.0 and newer only"
    if wave and spills_on_amd(key.shape[-2], max(query.shape[-1], value.shape[-1]), query.dtype, wave):
        return f"{key.shape[-2]} keys of width {query.shape[-1]} in {query.dtype} leave AMD's registers"
    return None


def spills_on_amd(keys: int, width: int, dtype: torch.dtype, wave: int) -> bool:
    """Where the code for AMD does not fit into registers: left to `portable`."""
    streamed = wave == 32 and width > 64 and not is_resident(keys, dtype)
    return streamed or (dtype == torch.float32 and keys > 112) or (width > 128 and keys > 160)


@triton.jit
def _dot(a, b, acc):
    """acc + a @ b, float32 accumulation."""
    if INTERPRETED:
        # it multiplies bfloat16 as if the bits were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _exp2(x, PTX: tl.constexpr):
    """2^x. PTX: NVIDIA's instruction alone, Triton's function also scales for the sake of results below 1e-38."""
    if PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.exp2(x)


@triton.jit
def _log2(x, PTX: tl.constexpr):
    """log2(x), to an absolute error of 2^-22."""
    if PTX:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.log2(x)


@triton.jit
def _sqrt(x, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.sqrt(x)


@triton.jit
def _over(x, y, PTX: tl.constexpr):
    """x / y for 1e-38 < y < 1e38, to two units of the last place."""
    if PTX:
        return tl.inline_asm_elementwise("div.approx.ftz.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, True, 1)
    return x / y


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= -1, to full relative precision near 0 (Kahan)."""
    w = 1.0 + x
    d = w - 1.0
    return tl.where(d == 0.0, x, tl.log(w) * (x / tl.where(d == 0.0, 1.0, d)))


@triton.jit
def _expm1(y):
    """exp(y) - 1, to full relative precision near 0 (Kahan)."""
    w = tl.exp(y)
    usual = (w != 1.0) & (w > 0.0)
    safe = tl.where(usual, w, 2.0)
    return tl.where(usual, (safe - 1.0) * (y / tl.log(safe)), tl.where(w == 1.0, y, -1.0))


@triton.jit
def _powers(c, u, b, part, ALPHA: tl.constexpr, POWER: tl.constexpr, MIX: tl.constexpr, PTX: tl.constexpr):
    """r and r^(p - 1) of one tile of centred scores; with MIX both are 0 outside the columns `part`.

    ALPHA is 1.5, 2 or 0 for any other, whose powers are computed as POWER says: `power_kind`.
    """
    if POWER == 2:
        x = tl.maximum(b * (c * LN_2 - u[:, None]), -1.0)
        if MIX:
            x = tl.where(part, x, -1.0)
        return 1.0 + x, tl.exp(_log1p(x) * ((1.0 - b) / b))
    r = tl.minimum(tl.maximum(tl.fma(c, b * LN_2, (1.0 - b * u)[:, None]), 0.0), 1.0)
    if MIX:
        r = tl.where(part, r, 0.0)
    if ALPHA == 1.5:
        return r, r
    if ALPHA == 2:
        return r, tl.where(r > 0.0, 1.0, 0.0)
    if POWER == 1:
        return r, tl.exp(tl.log(r) * ((1.0 - b) / b))
    return r, _exp2(_log2(r, PTX) * ((1.0 - b) / b), PTX)


@triton.jit
def _terms(c, u, b, part, ALPHA: tl.constexpr, POWER: tl.constexpr, MIX: tl.constexpr, PTX: tl.constexpr):
    """r^p and r^(p - 1)."""
    r, slope = _powers(c, u, b, part, ALPHA, POWER, MIX, PTX)
    return r if ALPHA == 2 else r * slope, slope


@triton.jit
def _added(a, b, c, d):
    return a + c, b + d


@triton.jit
def _two_sums(a, b):
    """Row sums of both, which meet once where the warps of a program share a row."""
    return tl.reduce((a, b), 1, _added)


@triton.jit
def _sum_over(tiles, N: tl.constexpr):
    total = tiles[0]
    for i in tl.static_range(1, N):
        total += tiles[i]
    return tl.sum(total, 1)


@triton.jit
def _newton_step(total, slope, b, ALPHA: tl.constexpr, PTX: tl.constexpr):
    """How far u moves: (1 - total^-b) total / (b slope), Newton on the p-norm. About 0 where every key is masked."""
    slope = tl.maximum(slope, 1e-30)
    # back by rounding alone: impl/eager.py
    if ALPHA == 1.5:
        norm = _sqrt(total, PTX)
        return tl.maximum(_over(2.0 * (norm - 1.0) * norm, slope, PTX), -1.2e-7)
    if ALPHA == 2:
        return tl.maximum(_over(total - 1.0, slope, PTX), -1.2e-7)
    total = tl.maximum(total, 1e-30)
    return -_expm1(-b * tl.log(total)) * total / (b * slope)


@triton.jit
def _farthest(step, ALPHA: tl.constexpr, EXACT: tl.constexpr):
    """The largest step of a tile. For exact sparsemax also one back by more than a last digit: where the first sums,
    large and rounded, led so far right of the root that a cluster of keys dropped out, it takes another to count them.
    """
    if EXACT and ALPHA == 2:
        step = tl.maximum(step, -3.0 * step)
    return tl.max(step, 0)


@triton.jit
def _entmax(
    c, u, step, total, slope, b, part,
    ALPHA: tl.constexpr, POWER: tl.constexpr, EXACT: tl.constexpr, MIX: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """A quarter of the entmax weights of one tile, after the last step, whose sums were `total` and `slope`.

    EXACT applies the step to r: added to u it would be rounded, by less than 16-bit weights show. A quarter keeps
    sums of values that are near the end of float32 within it.
    """
    if EXACT and ALPHA == 0:
        r, power = _powers(c, u, b, part, ALPHA, POWER, MIX, PTX)
        return 0.25 * power * tl.maximum(r + ((1.0 - total) / tl.maximum(slope, 1e-30))[:, None], 0.0)
    if POWER == 2:
        r, power = _powers(c, u + step, b, part, ALPHA, POWER, MIX, PTX)
        return 0.25 * power * r
    SHRINK: tl.constexpr = 0.5 if ALPHA == 1.5 else 0.25 if ALPHA == 2 else 1.0
    if EXACT:
        r = tl.fma(c, b * (LN_2 * SHRINK), ((1.0 - b * u) * SHRINK)[:, None]) - (b * step * SHRINK)[:, None]
    else:
        r = tl.fma(c, b * (LN_2 * SHRINK), ((1.0 - b * (u + step)) * SHRINK)[:, None])
    r = tl.minimum(tl.maximum(r, 0.0), 1.0)
    if MIX:
        r = tl.where(part, r, 0.0)
    if ALPHA == 1.5:
        return r * r
    if ALPHA == 2:
        return r
    return _exp2(tl.fma(_log2(r, PTX), 1.0 / b, -2.0), PTX)


@triton.jit
def _within(x, limit, PTX: tl.constexpr):
    """x within -limit and limit; NaN, of infinite products of both signs, becomes a number too. In one instruction
    from compute capability 8.6 on.
    """
    if PTX >= 86:
        return tl.inline_asm_elementwise("min.xorsign.abs.f32 $0, $1, $2;", "=f,f,f", [x, limit], tl.float32, True, 1)
    return tl.minimum(tl.maximum(x, -limit), limit)


@triton.jit
def _finished_scores(
    s, Mask, rows, cols, n_queries, n_keys, stride_mq, stride_mk, scale, limit, mask_min,
    FOLD: tl.constexpr, MASK: tl.constexpr, FULL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Scores of one tile, those beyond `limit` as if equal, -inf where masked or past the last key.

    FOLD: not scaled. MASK: 0 none, 1 boolean, 2 additive. FULL: no column is past the last key.
    """
    if not FOLD:
        s *= scale
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
    s = _within(s, limit, PTX)
    return s if FULL and MASK == 0 else tl.where(inside, s, -float("inf"))


@triton.jit
def _columns(Mix, cols, n_keys, stride_xk):
    """(1, columns): the keys of a tile that entmax takes part in."""
    return (tl.load(Mix + cols * stride_xk, mask=cols < n_keys, other=0) != 0)[None, :]


@triton.jit
def _highest(s, peak, part, MIX: tl.constexpr):
    """Each row's largest score among the columns `part`; without MIX the `peak` of all."""
    return tl.max(tl.where(part, s, -float("inf")), 1) if MIX else peak


@triton.jit
def _centred(s, centre, gain, EXACT: tl.constexpr):
    """gain * (s - centre). Without EXACT in one rounding, a little above it by the same amount along a row."""
    if EXACT:
        return (s - centre[:, None]) * gain
    offset = centre * gain
    return tl.fma(s, gain, (tl.abs(offset) * 2.4e-7 - offset)[:, None])


@triton.jit
def _sparse_factor(sparse, sparse_sum, part_sum, dense_sum, EXACT: tl.constexpr, UNIT: tl.constexpr, MIX: tl.constexpr):
    """(rows, 1) factor of the quarters of entmax: `sparse`, times the softmax mass of its keys with MIX.

    16-bit weights do not show by how little a threshold, once found, misses a sum of 1. With UNIT it is 1.
    """
    factor = tl.full(dense_sum.shape, 1.0, tl.float32)
    if not UNIT:
        factor *= sparse
    if EXACT:
        factor *= 0.25 / tl.maximum(sparse_sum, 1e-30)
    if MIX:
        factor *= part_sum / tl.maximum(dense_sum, 1e-30)
    return factor[:, None]


@triton.jit
def _mixed(
    entmax, c, rise, part, dense, sparse, sparse_factor, dense_sum,
    EXACT: tl.constexpr, UNIT: tl.constexpr, NEGATIVE: tl.constexpr, AGAIN: tl.constexpr, MIX: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """A quarter of the weights of one tile, from that of entmax and the scores.

    AGAIN takes the sum into the exponential, which makes it another one than what was summed: that would be kept in
    registers meanwhile.
    """
    dense_sum = tl.maximum(dense_sum, 1e-30)
    if AGAIN:
        if not MIX:
            p = _exp2(c + tl.log2(0.25 * tl.abs(dense) / dense_sum)[:, None], PTX)
            entmax = entmax if UNIT and not EXACT else entmax * sparse_factor
            return entmax - p if NEGATIVE else entmax + p
        p = _exp2(c + (rise - tl.log2(4.0 * dense_sum))[:, None], PTX) * tl.where(part, dense, dense + sparse)
    else:
        p = _exp2(c + rise[:, None] if MIX else c, PTX)
        p *= (
            (0.25 / dense_sum)[:, None] * tl.where(part, dense, dense + sparse)
            if MIX
            else (0.25 * dense / dense_sum)[:, None]
        )
    return p + entmax if UNIT and not EXACT and not MIX else tl.fma(entmax, sparse_factor, p)


@triton.jit
def _saturated(x, Out, largest, PTX: tl.constexpr):
    """x in the output's dtype, its largest value where x is beyond."""
    if PTX and Out.dtype.element_ty == tl.bfloat16:
        return tl.inline_asm_elementwise("cvt.rn.satfinite.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.bfloat16, True, 2)
    if PTX and Out.dtype.element_ty == tl.float16:
        return tl.inline_asm_elementwise("cvt.rn.satfinite.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.float16, True, 2)
    return tl.minimum(tl.maximum(x, -largest), largest).to(Out.dtype.element_ty)


@triton.jit
def _row_factor(
    Mass, rows, n_queries, stride_sq, peak, dense_sum, weight_sum, whole, factor,
    MASS: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """What every row's product is multiplied by.

    With NORMALISE, its rounded weights sum to `weight_sum` in place of `whole`. MASS: 0 is 1, 1 given as such, 2 from
    the log-sum-exp of a longer row.
    """
    factor = tl.full(peak.shape, 4.0, tl.float32) * factor
    if NORMALISE:
        sound = weight_sum != 0.0
        factor *= tl.where(sound, (0.25 * whole) / tl.where(sound, weight_sum, 1.0), 0.0)
    if MASS == 0:
        return factor
    mass = tl.load(Mass + rows * stride_sq, mask=rows < n_queries, other=0.0).to(tl.float32)
    if MASS == 2:
        mass = tl.exp(peak + tl.log(tl.maximum(dense_sum, 1e-30)) - mass)
        mass = tl.where(dense_sum > 0.0, tl.minimum(mass, 1.0), 0.0)
    return factor * mass


@triton.jit
def _store(Out, factor, acc, rows, dims, n_queries, stride_oq, largest, DV, PTX: tl.constexpr):
    """Write factor * acc."""
    at = Out + rows[:, None] * stride_oq + dims[None, :]
    out = _saturated(acc * factor[:, None], Out, largest, PTX)
    tl.store(at, out, mask=(rows < n_queries)[:, None] & (dims < DV)[None, :])


@triton.jit
def _row_moments(
    c, u, b, part, N: tl.constexpr, ALPHA: tl.constexpr, POWER: tl.constexpr, MIX: tl.constexpr, PTX: tl.constexpr
):
    """Row sums of r^p and r^(p - 1) over all N tiles."""
    totals, slopes = _terms(c[0], u, b, part[0], ALPHA, POWER, MIX, PTX)
    for i in tl.static_range(1, N):
        more_totals, more_slopes = _terms(c[i], u, b, part[i], ALPHA, POWER, MIX, PTX)
        totals += more_totals
        slopes += more_slopes
    return _two_sums(totals, slopes)


@triton.jit
def _entmax_sum(
    c, u, step, total, slope, b, part,
    N: tl.constexpr, ALPHA: tl.constexpr, POWER: tl.constexpr, EXACT: tl.constexpr, MIX: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Row sums of a quarter of the entmax weights over all N tiles."""
    weights = _entmax(c[0], u, step, total, slope, b, part[0], ALPHA, POWER, EXACT, MIX, PTX)
    for i in tl.static_range(1, N):
        weights += _entmax(c[i], u, step, total, slope, b, part[i], ALPHA, POWER, EXACT, MIX, PTX)
    return tl.sum(weights, 1)


@triton.jit
def _surplus(
    c, u, step, total, slope, b, part,
    N: tl.constexpr, POWER: tl.constexpr, MIX: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """What is left of every sparsemax weight to take off after the last step. impl/eager.py: _settle"""
    totals = tl.zeros(c[0].shape, tl.float32)
    counts = totals
    for i in tl.static_range(0, N):
        r = _entmax(c[i], u, step, total, slope, b, part[i], 2, POWER, True, MIX, PTX)
        totals += r
        counts += tl.where(r > 0.0, 1.0, 0.0)
    surplus = 4.0 * tl.sum(totals, 1) - 1.0
    return tl.where(surplus > 4.8e-7, surplus / tl.maximum(tl.sum(counts, 1), 1.0), 0.0)


@triton.jit
def _exp2_sum(c, rise, part, N: tl.constexpr, PARTS: tl.constexpr, MIX: tl.constexpr, PTX: tl.constexpr):
    """Row sums of 2^(c + rise), with PARTS of the columns `part` alone."""
    total = tl.zeros(c[0].shape, tl.float32)
    for i in tl.static_range(0, N):
        p = _exp2(c[i] + rise[:, None] if MIX else c[i], PTX)
        total += tl.where(part[i], p, 0.0) if PARTS else p
    return tl.sum(total, 1)


@triton.jit
def _products(
    Q, K, scores, rows, cols, d, n_queries, n_keys, stride_qq, stride_qd, stride_kk, stride_kd,
    D: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The N tiles of scores and what BLOCK_D columns from `d` on add to them."""
    dims = d + tl.arange(0, BLOCK_D)
    at = Q + rows[:, None] * stride_qq + dims[None, :] * stride_qd
    q = tl.load(at, mask=(rows < n_queries)[:, None] & (dims < D)[None, :], other=0.0)
    more = ()
    for i in tl.static_range(0, N):
        at = K + (i * BLOCK_K + cols)[None, :] * stride_kk + dims[:, None] * stride_kd
        inside = (dims < D)[:, None]
        if i == N - 1:
            inside = inside & (i * BLOCK_K + cols < n_keys)[None, :]
        more = more + (_dot(q, tl.load(at, mask=inside, other=0.0), scores[i]),)
    return more


@triton.jit
def _resident_kernel(
    Q, K, V, Mask, Mix, Mass, Out,
    stride_qb, stride_qh, stride_qq, stride_qd, stride_kb, stride_kh, stride_kk, stride_kd,
    stride_vb, stride_vh, stride_vk, stride_vd, stride_mb, stride_mh, stride_mq, stride_mk, stride_xb, stride_xk,
    stride_sb, stride_sh, stride_sq, stride_ob, stride_oh, stride_oq,
    n_queries, n_keys, groups, steps,
    scale, gain, limit, start, b, enough, dense, sparse, factor, mask_min, largest,
    D: tl.constexpr, DV: tl.constexpr, ALPHA: tl.constexpr, POWER: tl.constexpr, EXACT: tl.constexpr,
    FOLD: tl.constexpr, MASK: tl.constexpr, MIX: tl.constexpr, MASS: tl.constexpr, UNIT: tl.constexpr,
    NEGATIVE: tl.constexpr, NORMALISE: tl.constexpr, PTX: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All keys at once, in N tiles of BLOCK_K: 77 keys are 5 x 16, not 128."""
    h, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows, cols = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    if WIDE:
        rows, cols = rows.to(tl.int64), cols.to(tl.int64)
    Q += batch * stride_qb + h * stride_qh
    K += batch * stride_kb + (h // groups) * stride_kh
    V += batch * stride_vb + (h // groups) * stride_vh
    Mask += batch * stride_mb + h * stride_mh
    Mix += batch * stride_xb
    Mass += batch * stride_sb + h * stride_sh
    Out += batch * stride_ob + h * stride_oh

    scores = ()
    for _ in tl.static_range(0, N):
        scores = scores + (tl.zeros((BLOCK_Q, BLOCK_K), tl.float32),)
    if D <= BLOCK_D:
        scores = _products(
            Q, K, scores, rows, cols, 0, n_queries, n_keys, stride_qq, stride_qd, stride_kk,
            stride_kd, D, N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    else:
        # a loop: copies into shared memory run ahead of it and take no registers
        for d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            scores = _products(
                Q, K, scores, rows, cols, d, n_queries, n_keys, stride_qq, stride_qd, stride_kk,
                stride_kd, D, N, BLOCK_K, BLOCK_D,
            )  # fmt: skip
    c = ()
    part = ()
    peak = tl.full((BLOCK_Q,), -1.0, tl.float32) * limit
    centre = peak
    for i in tl.static_range(0, N):
        s = _finished_scores(
            scores[i], Mask, rows, i * BLOCK_K + cols, n_queries, n_keys, stride_mq, stride_mk, scale, limit, mask_min,
            FOLD, MASK, i < N - 1, PTX,
        )  # fmt: skip
        if MIX:
            part = part + (_columns(Mix, i * BLOCK_K + cols, n_keys, stride_xk),)
            centre = tl.maximum(centre, tl.max(tl.where(part[i], s, -float("inf")), 1))
        else:
            part = part + (True,)
        c = c + (s,)
    highest = c[0]
    for i in tl.static_range(1, N):
        highest = tl.maximum(highest, c[i])
    # where all is masked the peak stays finite, and -inf stays -inf
    peak = tl.maximum(peak, tl.max(highest, 1))
    centre = tl.where(centre < peak - FAR / gain, peak, centre) if MIX else peak
    scores = c
    c = ()
    for i in tl.static_range(0, N):
        c = c + (_centred(scores[i], centre, gain, EXACT),)

    u = tl.full((BLOCK_Q,), 1.0, tl.float32) * start
    # nobody is done after the first step
    total, slope = _row_moments(c, u, b, part, N, ALPHA, POWER, MIX, PTX)
    step = _newton_step(total, slope, b, ALPHA, PTX)
    left = steps
    while left > 0:
        u += step
        total, slope = _row_moments(c, u, b, part, N, ALPHA, POWER, MIX, PTX)
        step = _newton_step(total, slope, b, ALPHA, PTX)
        left = tl.where(_farthest(step, ALPHA, EXACT) > enough, left - 1, 0)

    # softmax is centred on the maximum of all keys
    rise = (centre - peak) * gain
    dense_sum = _exp2_sum(c, rise, part, N, False, MIX, PTX)
    part_sum = _exp2_sum(c, rise, part, N, True, MIX, PTX) if MIX else dense_sum
    sparse_sum = dense_sum
    if EXACT:
        if ALPHA == 2:
            step += _surplus(c, u, step, total, slope, b, part, N, POWER, MIX, PTX)
        sparse_sum = _entmax_sum(c, u, step, total, slope, b, part, N, ALPHA, POWER, EXACT, MIX, PTX)
    sparse_factor = _sparse_factor(sparse, sparse_sum, part_sum, dense_sum, EXACT, UNIT, MIX)
    out = ()
    for _ in tl.static_range(0, DV, BLOCK_V):
        out = out + (tl.zeros((BLOCK_Q, BLOCK_V), tl.float32),)
    weight_sums = tl.zeros((BLOCK_Q, 16), tl.float32)
    for i in tl.static_range(0, N):
        w = _entmax(c[i], u, step, total, slope, b, part[i], ALPHA, POWER, EXACT, MIX, PTX)
        w = _mixed(
            w, c[i], rise, part[i], dense, sparse, sparse_factor, dense_sum,
            EXACT, UNIT, NEGATIVE, N * BLOCK_K > 160, MIX, PTX,
        )  # fmt: skip
        w = w.to(V.dtype.element_ty)
        if NORMALISE:
            # on the tensor cores, which wait anyway; each of the columns is the sum
            weight_sums = _dot(w, tl.full((BLOCK_K, 16), 1.0, V.dtype.element_ty), weight_sums)
        more = ()
        for d in tl.static_range(0, DV, BLOCK_V):
            dims = d + tl.arange(0, BLOCK_V)
            at = V + (i * BLOCK_K + cols)[:, None] * stride_vk + dims[None, :] * stride_vd
            inside = (dims < DV)[None, :]
            if i == N - 1:
                inside = inside & (i * BLOCK_K + cols < n_keys)[:, None]
            more = more + (_dot(w, tl.load(at, mask=inside, other=0.0), out[d // BLOCK_V]),)
        out = more

    factor = _row_factor(
        Mass, rows, n_queries, stride_sq, peak * (gain * LN_2), dense_sum, tl.sum(weight_sums, 1) * 0.0625,
        dense + sparse, factor, MASS, NORMALISE,
    )  # fmt: skip
    for d in tl.static_range(0, DV, BLOCK_V):
        dims = d + tl.arange(0, BLOCK_V)
        _store(Out, factor, out[d // BLOCK_V], rows, dims, n_queries, stride_oq, largest, DV, PTX)


@triton.jit
def _tile_scores(
    q, K, Mask, Mix, rows, start, n_queries, n_keys, stride_kk, stride_kd, stride_mq, stride_mk, stride_xk,
    scale, limit, mask_min,
    D: tl.constexpr, FOLD: tl.constexpr, MASK: tl.constexpr, MIX: tl.constexpr, PTX: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of queries against the tile of keys that begins at `start`, and which columns are mixed."""
    cols = start + tl.arange(0, BLOCK_K)
    if WIDE:
        cols = cols.to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    at = K + cols[None, :] * stride_kk + dims[:, None] * stride_kd
    k = tl.load(at, mask=(cols < n_keys)[None, :] & (dims < D)[:, None], other=0.0)
    s = _dot(q, k, tl.zeros((q.shape[0], BLOCK_K), tl.float32))
    part = _columns(Mix, cols, n_keys, stride_xk) if MIX else (cols < n_keys)[None, :]
    s = _finished_scores(
        s, Mask, rows, cols, n_queries, n_keys, stride_mq, stride_mk, scale, limit, mask_min, FOLD, MASK, False, PTX
    )
    return s, part


@triton.jit
def _streaming_kernel(
    Q, K, V, Mask, Mix, Mass, Out,
    stride_qb, stride_qh, stride_qq, stride_qd, stride_kb, stride_kh, stride_kk, stride_kd,
    stride_vb, stride_vh, stride_vk, stride_vd, stride_mb, stride_mh, stride_mq, stride_mk, stride_xb, stride_xk,
    stride_sb, stride_sh, stride_sq, stride_ob, stride_oh, stride_oq,
    n_queries, n_keys, groups, steps,
    scale, gain, limit, start, b, enough, dense, sparse, factor, mask_min, largest,
    D: tl.constexpr, DV: tl.constexpr, ALPHA: tl.constexpr, POWER: tl.constexpr, EXACT: tl.constexpr,
    FOLD: tl.constexpr, MASK: tl.constexpr, MIX: tl.constexpr, MASS: tl.constexpr, UNIT: tl.constexpr,
    NEGATIVE: tl.constexpr, NORMALISE: tl.constexpr, PTX: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Any number of keys, BLOCK_K at a time: a pass for maximum and softmax sum, one a step, one for V."""
    h, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    if WIDE:
        rows = rows.to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    Q += batch * stride_qb + h * stride_qh
    K += batch * stride_kb + (h // groups) * stride_kh
    V += batch * stride_vb + (h // groups) * stride_vh
    Mask += batch * stride_mb + h * stride_mh
    Mix += batch * stride_xb
    Mass += batch * stride_sb + h * stride_sh
    Out += batch * stride_ob + h * stride_oh
    at = Q + rows[:, None] * stride_qq + dims[None, :] * stride_qd
    q = tl.load(at, mask=(rows < n_queries)[:, None] & (dims < D)[None, :], other=0.0)

    # a finite maximum: where all is masked -inf stays -inf
    peak = tl.full((BLOCK_Q,), -1.0, tl.float32) * limit
    centre = peak
    dense_sum = tl.zeros((BLOCK_Q,), tl.float32)
    part_sum = dense_sum
    for first in range(0, n_keys, BLOCK_K):
        s, part = _tile_scores(
            q, K, Mask, Mix, rows, first, n_queries, n_keys, stride_kk, stride_kd, stride_mq, stride_mk, stride_xk,
            scale, limit, mask_min, D, FOLD, MASK, MIX, PTX, WIDE, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        higher = tl.maximum(peak, tl.max(s, 1))
        p = _exp2(_centred(s, higher, gain, EXACT), PTX)
        fewer = _exp2((peak - higher) * gain, PTX)
        dense_sum = dense_sum * fewer + tl.sum(p, 1)
        if MIX:
            part_sum = part_sum * fewer + tl.sum(tl.where(part, p, 0.0), 1)
            centre = tl.maximum(centre, tl.max(tl.where(part, s, -float("inf")), 1))
        peak = higher
    centre = tl.where(centre < peak - FAR / gain, peak, centre) if MIX else peak
    part_sum = part_sum if MIX else dense_sum

    u = tl.full((BLOCK_Q,), 1.0, tl.float32) * start
    step, total, slope = u * 0.0, u, u
    left = steps
    while left > 0:
        u += step
        totals = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        slopes = totals
        for first in range(0, n_keys, BLOCK_K):
            s, part = _tile_scores(
                q, K, Mask, Mix, rows, first, n_queries, n_keys, stride_kk, stride_kd, stride_mq, stride_mk, stride_xk,
                scale, limit, mask_min, D, FOLD, MASK, MIX, PTX, WIDE, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            more_totals, more_slopes = _terms(_centred(s, centre, gain, EXACT), u, b, part, ALPHA, POWER, MIX, PTX)
            totals += more_totals
            slopes += more_slopes
        total, slope = _two_sums(totals, slopes)
        step = _newton_step(total, slope, b, ALPHA, PTX)
        left = tl.where(_farthest(step, ALPHA, EXACT) > enough, left - 1, 0)

    rise = (centre - peak) * gain
    # the sum of float32 weights would be one more pass. So they miss 1 by what each may be off, sparsemax's `_surplus`
    # among it: a rounding of the threshold, 1.2e-7 at most, for every tie at the edge of the support
    sparse_factor = _sparse_factor(sparse, 0.25, part_sum, dense_sum, EXACT, UNIT, MIX)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    weight_sums = tl.zeros((BLOCK_Q, 16), tl.float32)
    for first in range(0, n_keys, BLOCK_K):
        s, part = _tile_scores(
            q, K, Mask, Mix, rows, first, n_queries, n_keys, stride_kk, stride_kd, stride_mq, stride_mk, stride_xk,
            scale, limit, mask_min, D, FOLD, MASK, MIX, PTX, WIDE, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        c = _centred(s, centre, gain, EXACT)
        w = _entmax(c, u, step, total, slope, b, part, ALPHA, POWER, EXACT, MIX, PTX)
        w = _mixed(w, c, rise, part, dense, sparse, sparse_factor, dense_sum, EXACT, UNIT, NEGATIVE, True, MIX, PTX).to(
            V.dtype.element_ty
        )
        if NORMALISE:
            weight_sums = _dot(w, tl.full((BLOCK_K, 16), 1.0, V.dtype.element_ty), weight_sums)
        cols = first + tl.arange(0, BLOCK_K)
        if WIDE:
            cols = cols.to(tl.int64)
        v_at = V + cols[:, None] * stride_vk + dims[None, :] * stride_vd
        v = tl.load(v_at, mask=(cols < n_keys)[:, None] & (dims < DV)[None, :], other=0.0)
        acc = _dot(w, v, acc)
    factor = _row_factor(
        Mass, rows, n_queries, stride_sq, peak * (gain * LN_2), dense_sum, tl.sum(weight_sums, 1) * 0.0625,
        dense + sparse, factor, MASS, NORMALISE,
    )  # fmt: skip
    _store(Out, factor, acc, rows, dims, n_queries, stride_oq, largest, DV, PTX)


def is_resident(keys: int, dtype: torch.dtype) -> bool:
    """Whether all scores of a tile of queries stay on chip."""
    return keys <= (RESIDENT_KEYS_FLOAT32 if dtype == torch.float32 else RESIDENT_KEYS)


def key_tiles(keys: int) -> tuple[int, int]:
    """(width, number) of the resident kernel's key tiles: a power of two, at least 16, that covers `keys` closely."""
    width = 16 if keys <= 112 else 32 if keys <= 224 else 64
    return width, triton.cdiv(keys, width)


def configuration(queries: int, keys: int, width: int, dtype: torch.dtype, wave: int = 0) -> dict[str, int]:
    """Tile sizes and warps. A table, not a search: the first image must not wait for one.

    A warp owns whole rows as long as their scores fit its registers: sums over keys then never leave the warp. wave:
    the lanes of an AMD warp, 0 elsewhere.
    """
    padded = max(16, triton.next_power_of_2(width))
    if not is_resident(keys, dtype):
        block_q = 16 if dtype == torch.float32 else 32 if wave == 32 else 64
        tiles = {"BLOCK_K": 64 if padded <= 128 else 32, "BLOCK_D": padded}
        warps = 8 if wave == 32 or padded > 128 else 4
    else:
        block_k, number = key_tiles(keys)
        # slices of the width: 80 is 32 + 32 + 16, not 128; many keys leave few registers for wide ones
        block_d = padded if padded <= 64 else 64 if width % 64 == 0 else 32
        block_q, warps = (64, 4) if keys <= 160 else (32, 4) if keys <= 256 else (16, 4)
        if keys > 160:
            block_d = 32
        block_v = min(padded, 64 if keys <= 112 or keys > 160 else 32)
        if dtype == torch.float32:
            # no tensor cores: products and scores share the registers
            block_q, block_d, block_v = (
                16,
                min(block_d, 32 if keys <= 160 else 16),
                min(block_v, 32 if keys <= 160 else 16),
            )
            warps = 4 if keys <= 160 else 8
        elif wave == 32 and 112 < keys <= 256:
            # operands of its products lie in registers twice
            warps = 8
        tiles = {"BLOCK_K": block_k, "N": number, "BLOCK_D": block_d, "BLOCK_V": block_v, "STAGES": 2}
    block_q = min(block_q, max(16, triton.next_power_of_2(queries)))
    # sums of products are meant to be one rounding, which Triton 3.10 no longer takes for granted
    return {"BLOCK_Q": block_q, **tiles, "num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}


def enough(alpha: float, keys: int, dtype: torch.dtype) -> float:
    """A step below it leaves less than weights of `dtype` show: they err by its min(p, 2)th power."""
    if dtype == torch.float32:
        return max(3e-7, (8e-7 / keys) ** max(alpha - 1.0, 0.5))
    return max(1e-4, 1e-5 ** max(alpha - 1.0, 0.5))


class Mix(NamedTuple):
    """`dense` and `sparse` as the kernel takes them: weights are factor * (dense * softmax + sparse * entmax)."""

    dense: float
    sparse: float
    factor: float
    unit: bool  # sparse is 1

    @classmethod
    def of(cls, dense: float, sparse: float) -> Mix:
        if sparse != 0.0 and abs(dense) <= abs(sparse):
            return cls(dense / sparse, 1.0, sparse, True)
        # a power of two that keeps sums of weighted values in range
        bound = 2.0 ** math.ceil(math.log2(max(abs(dense) + abs(sparse), 1.0)))
        return cls(dense / bound, sparse / bound, bound, False)


class Plan(NamedTuple):
    """What a launch needs beyond tensors and their sizes."""

    kernel: triton.JITFunction
    block_q: int
    numbers: tuple[float, ...]
    constants: Mapping[str, object]


@lru_cache(maxsize=1024)
def plan(
    queries: int, keys: int, width: int, value_width: int, dtype: torch.dtype, scale: float, alpha: float,
    dense: float, sparse: float, mask: torch.dtype | None, mix: bool, mass: int, ptx: int, wave: int, wide: bool,
) -> Plan:  # fmt: skip
    """The kernel for a problem. mask: its dtype; mass: 0 none, 1 given, 2 from a log-sum-exp; ptx: the compute
    capability as two digits, 0 where it is not NVIDIA's; wave: the lanes of an AMD warp, or 0; wide: offsets within a
    head exceed 32 bits.
    """
    steps, start = newton_steps(keys, alpha, dtype) + STEPS_FROM_THE_PEAK, 0.0
    if alpha == 1.0 or sparse == 0.0:
        # softmax alone: no steps from where every entmax weight is 0
        alpha, dense, sparse, mix, steps, start = 1.5, dense + sparse, 0.0, False, 0, 2.0
    b = alpha - 1.0
    lean = dtype != torch.float32
    weights = Mix.of(dense, sparse)
    whole = dense + sparse
    folded = mask is None and scale > 0.0
    gain = (scale if folded else 1.0) * LOG2_E.value
    limit = min(LARGEST_SCORE, LARGEST_EXPONENT / gain) if lean else LARGEST_SCORE
    common = alpha in (1.5, 2.0)
    config = configuration(queries, keys, max(width, value_width), dtype, wave)
    numbers = (
        steps, scale, gain, limit, start, b, enough(alpha, keys, dtype), weights.dense, weights.sparse, weights.factor,
        0.0 if mask in (None, torch.bool) else torch.finfo(mask).min, torch.finfo(dtype).max,
    )  # fmt: skip
    constants = {
        "D": width, "DV": value_width, "ALPHA": alpha if common else 0,
        "POWER": 0 if common else 2 if b < SMALL_B else 0 if lean else 1, "EXACT": not lean, "FOLD": folded,
        "MASK": 0 if mask is None else 1 if mask == torch.bool else 2, "MIX": mix, "MASS": mass,
        "UNIT": weights.unit, "NEGATIVE": weights.dense < 0.0,
        "NORMALISE": lean and abs(dense) + abs(sparse) <= LARGEST_CANCELLATION * abs(whole), "PTX": ptx, "WIDE": wide,
        **config,
    }  # fmt: skip
    kernel = _resident_kernel if is_resident(keys, dtype) else _streaming_kernel
    return Plan(kernel, config["BLOCK_Q"], numbers, constants)


def attend(query, key, value, mask, mix_mask, scale, alpha, dense, sparse, mass, row_lse) -> torch.Tensor:
    """mass * (dense * softmax(S) + sparse * entmax_alpha(S)) @ value; shapes as in `pladis_core.api`.

    mix_mask, boolean (B, Lk): entmax takes part in the keys where it is True, with the softmax mass of these keys; the
    others weigh dense + sparse times their softmax.
    """
    batch, heads, queries, width = query.shape
    keys, value_width = value.shape[-2:]
    out = query.new_empty(batch, queries, heads, value_width).transpose(1, 2)
    if out.numel() == 0 or keys == 0 or (dense + sparse == 0.0 and alpha == 1.0):
        return out.zero_()
    # unused pointers need a tensor all the same
    factor = mass if row_lse is None else row_lse
    mask_strides = NO_STRIDES if mask is None else mask.stride()
    mix_strides = NO_STRIDES[:2] if mix_mask is None else mix_mask.stride()
    factor_strides = NO_STRIDES[:3] if factor is None else factor.stride()[:3]
    strides = query.stride(), key.stride(), value.stride()
    row = max(abs(s[2]) for s in (*strides, mask_strides)) * (max(queries, keys) + MAX_TILE)
    column = max(abs(s[3]) for s in (*strides, mask_strides)) * (max(width, value_width, keys) + MAX_TILE)
    ptx, wave = _target(query.device)
    kernel, block_q, numbers, constants = plan(
        queries, keys, width, value_width, query.dtype, scale, alpha, dense, sparse,
        None if mask is None else mask.dtype, mix_mask is not None,
        0 if factor is None else 1 if row_lse is None else 2, ptx, wave, row + column >= 2**31 or out.numel() >= 2**31,
    )  # fmt: skip
    grid = -(-queries // block_q), heads, batch
    with _on_device(query.device):
        kernel[grid](
            query, key, value, query if mask is None else mask, query if mix_mask is None else mix_mask,
            query if factor is None else factor, out,
            *strides[0], *strides[1], *strides[2], *mask_strides, *mix_strides, *factor_strides,
            queries * heads * value_width, value_width, heads * value_width,
            queries, keys, heads // key.shape[1], *numbers, **constants,
        )  # fmt: skip
    return out


@lru_cache
def _target(device: torch.device) -> tuple[int, int]:
    """NVIDIA's compute capability as two digits, and the lanes of an AMD warp; 0 where it is another's."""
    if device.type != "cuda":
        return 0, 0
    if torch.version.hip is not None:
        return 0, getattr(torch.cuda.get_device_properties(device), "warp_size", 32)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, 0


def _on_device(device: torch.device):
    """Triton launches on the current device."""
    if device.type == "cpu" or (device.type == "cuda" and device.index == torch.cuda.current_device()):
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)
