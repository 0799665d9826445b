"""The fused kernel: scores, softmax, entmax threshold, mix and product with V in one pass over the queries.

A program owns a tile of queries of one head. In the resident form all scores of the tile stay in registers; in the
streaming form they are recomputed tile by tile, once per step of the solver. The threshold is solved by Newton's method
on the p-norm, as in `impl/eager.py`, until every row of the tile is within `tolerance` or `steps` are done. For 16-bit
weights that is asked of the p-norm before a step, for float32, and of sparsemax, of the step. Nothing is read back by
the host.

With b = alpha - 1, p = 1 / b, scores c <= 0 whose maximum is 0, and r_i = [1 + b (c_i - u)]_+, entmax is r^p for the u
at which sum r^p = 1. As u >= 0, r never exceeds 1: saturation, which GPUs give with a product and sum, is all that
keeps it in range. The resident form starts left of the root, at u = 0, where the first step is exact for equal scores,
and for alpha 2 counts the keys within p of the maximum. A step of the streaming form costs a pass over the keys: it
starts near the root, at a guess that its first pass makes from tile to tile, and 16-bit weights below alpha 2 take the
bend between two passes into the step, which leaves an error of third order. That is two passes at alpha 1.5; more where
scores are nearly equal, of which the guess leads far past the root.

What a score costs decides: tensor cores wait for the instructions that centre, saturate and sum. So c is kept as an
exponent of 2, without a mask the softmax scale is a factor of the constants that multiply a score anyway, and nothing
is selected or counted.

Arguments come in the groups below. Triton specialises every member by itself, as it would a parameter of its own. The
members of HOW and TILE are `tl.constexpr`, each of them: up to Triton 3.6 those of a group that is one itself are plain
numbers, of which no shape can be made. A shape beside a line is that of what it makes.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import triton
import triton.language as tl

# how far below a row's maximum, as an exponent of 2, keys have no softmax mass
FAR = tl.constexpr(120.0)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
# by how much a step goes back where it does so by rounding
ROUNDING = tl.constexpr(1.2e-7)


class Tensor(NamedTuple):
    """A tensor (batch, head, row, column): its first element and its strides, in elements; 0 where it is expanded."""

    at: Any
    batch: Any
    head: Any
    row: Any
    column: Any


class Sizes(NamedTuple):
    queries: Any
    keys: Any
    groups: Any  # query heads to a head of key and value


class Scale(NamedTuple):
    """Of scores."""

    scale: Any  # the softmax scale, where How.FOLD does not leave it to the gain
    gain: Any  # from a score to an exponent of 2
    limit: Any  # scores beyond it count as equal
    mask_min: Any  # an additive mask of that, or less, masks


class Solver(NamedTuple):
    """Newton's method, whose p is 1 / b."""

    steps: Any  # at most
    least: Any  # of which the resident form takes so many without asking
    start: Any  # u, at least
    most: Any  # u of equal scores, beyond which no root lies
    b: Any  # alpha - 1
    tolerance: Any  # after a step below it a row is done; with How.NORM after one from where the p-norm is so near 1
    right: Any  # how many times as near it has to be where it is below 1


class Weights(NamedTuple):
    """factor * (dense * softmax + sparse * entmax)"""

    dense: Any
    sparse: Any
    factor: Any
    largest: Any  # of the output's dtype


class How(NamedTuple):
    """What the kernel is compiled for."""

    D: int  # columns of query and key
    DV: int  # columns of the value
    ALPHA: float  # 1.5, 2, or 0 for any other ...
    POWER: int  # ... whose r^(p - 1) is: 0 in the hardware's logarithm and exponential, 1 in exact ones, 2 near alpha 1
    #             or, from 3 on, in products, where p is this whole number
    EXACT: bool  # float32
    FOLD: bool  # the gain has the softmax scale in it
    MASK: int  # 0 none, 1 boolean, 2 additive
    MIX: bool  # entmax takes part in some keys alone
    MASS: int  # of a row: 0 is 1, 1 given as such, 2 from the log-sum-exp of a longer row
    UNIT: bool  # Weights.sparse is 1
    NEGATIVE: bool  # Weights.dense is below 0
    AGAIN: bool  # an exponential for the mix is another one than for the sum
    NORM: bool  # a row is done by what its p-norm is beside 1, not by its last step
    NORMALISE: bool  # divide by the sum of the rounded weights
    PTX: int  # NVIDIA's compute capability as two digits, or 0
    WIDE: bool  # offsets exceed 32 bits
    ALIGNED: int  # what batches, heads and rows of query, key, value and output are multiples of: 16 bytes, or 1
    WHOLE: bool  # the last tile of keys is full: only the streaming form asks


class Tile(NamedTuple):
    """Sizes of tiles."""

    BLOCK_Q: int  # queries
    BLOCK_K: int  # keys
    N: int  # tiles of keys that are resident; 0 in the streaming form
    BLOCK_D: int  # columns of query and key that a product takes at once
    BLOCK_V: int  # columns of the value
    STAGES: int  # of the loop over tiles of BLOCK_D
    AHEAD: int  # tiles of the value that are loaded before the first is needed; 0: those of the key neither
    SLICED: bool = False  # all weights are made before a loop over tiles of the value's columns: fewer registers


class Threshold(NamedTuple):
    """Of every row (BLOCK_Q,): u before the last step, the sums of r^p and r^(p - 1) there, and the step."""

    u: Any
    step: Any
    total: Any
    slope: Any


class Shares(NamedTuple):
    """How a row's weights are mixed. (BLOCK_Q,), the factor of entmax (BLOCK_Q, 1)."""

    rise: Any  # from the maximum of the mixed keys, on which c is centred, to that of all
    dense_sum: Any  # of the exponentials
    sparse_factor: Any


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
def _within(x, limit, PTX: tl.constexpr):
    """x within -limit and limit; NaN, of infinite products of both signs, becomes a number too. In one instruction
    from compute capability 8.6 on.
    """
    if PTX >= 86:
        return tl.inline_asm_elementwise("min.xorsign.abs.f32 $0, $1, $2;", "=f,f,f", [x, limit], tl.float32, True, 1)
    return tl.minimum(tl.maximum(x, -limit), limit)


@triton.jit
def _saturated(x, dtype: tl.constexpr, largest, PTX: tl.constexpr):
    """x in the output's dtype, its largest value where x is beyond."""
    if PTX and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("cvt.rn.satfinite.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.bfloat16, True, 2)
    if PTX and dtype == tl.float16:
        return tl.inline_asm_elementwise("cvt.rn.satfinite.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.float16, True, 2)
    return tl.minimum(tl.maximum(x, -largest), largest).to(dtype)


@triton.jit
def _added(a, b, c, d):
    return a + c, b + d


@triton.jit
def _two_sums(a, b):
    """Row sums of both, which meet once where the warps of a program share a row."""
    return tl.reduce((a, b), 1, _added)


# Where a program stands, and what it reads.


@triton.jit
def _of_head(t, batch, head, ALIGNED: tl.constexpr):
    """A tensor from the first element of one head on.

    Triton looks for multiples of 16 elements by itself, which heads of 40 or 72 columns are not: where it is not told
    of smaller ones, here and at the rows, it loads and stores each element alone.
    """
    offset = batch * t.batch + head * t.head
    if ALIGNED > 1:
        offset = tl.multiple_of(offset, ALIGNED)
    return Tensor(t.at + offset, t.batch, t.head, t.row, t.column)


@triton.jit
def _placed(Q, K, V, Mask, Mix, Mass, Out, sizes, HOW, TILE):
    """The program's rows (BLOCK_Q,), and the tensors from the first element of its head on."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = _range(tl.program_id(0) * TILE.BLOCK_Q, TILE.BLOCK_Q, HOW)
    kv = head // sizes.groups
    Q, Out = _of_head(Q, batch, head, HOW.ALIGNED), _of_head(Out, batch, head, HOW.ALIGNED)
    K, V = _of_head(K, batch, kv, HOW.ALIGNED), _of_head(V, batch, kv, HOW.ALIGNED)
    Mask, Mix, Mass = _of_head(Mask, batch, head, 1), _of_head(Mix, batch, 0, 1), _of_head(Mass, batch, head, 1)
    return rows, Q, K, V, Mask, Mix, Mass, Out


@triton.jit
def _range(first, SIZE: tl.constexpr, HOW):
    """(SIZE,): rows, or keys, from `first` on."""
    indices = first + tl.arange(0, SIZE)
    return indices.to(tl.int64) if HOW.WIDE else indices


@triton.jit
def _queries(Q, rows, dims, sizes, HOW):
    """(rows, dims), 0 outside of the tensor."""
    at = Q.at + tl.multiple_of(rows * Q.row, HOW.ALIGNED)[:, None] + dims[None, :] * Q.column
    return tl.load(at, mask=(rows < sizes.queries)[:, None] & (dims < HOW.D)[None, :], other=0.0)


@triton.jit
def _keys(K, cols, dims, sizes, FULL: tl.constexpr, HOW):
    """(dims, cols), 0 outside of the tensor. FULL: no key is past the last one."""
    at = K.at + tl.multiple_of(cols * K.row, HOW.ALIGNED)[None, :] + dims[:, None] * K.column
    inside = (dims < HOW.D)[:, None]
    if not FULL:
        inside = inside & (cols < sizes.keys)[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _values(V, cols, dims, sizes, FULL: tl.constexpr, HOW):
    """(cols, dims), 0 outside of the tensor. FULL: no key is past the last one."""
    at = V.at + tl.multiple_of(cols * V.row, HOW.ALIGNED)[:, None] + dims[None, :] * V.column
    inside = (dims < HOW.DV)[None, :]
    if not FULL:
        inside = inside & (cols < sizes.keys)[:, None]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _part(Mix, cols, sizes):
    """(1, cols): the keys of a tile that entmax takes part in."""
    return (tl.load(Mix.at + cols * Mix.column, mask=cols < sizes.keys, other=0) != 0)[None, :]


@triton.jit
def _finished_scores(s, Mask, rows, cols, sizes, scale, FULL: tl.constexpr, HOW):
    """Scores (rows, cols) of one tile, those beyond the limit as if equal, -inf where masked or past the last key.

    FULL: no key is past the last one.
    """
    if not HOW.FOLD:
        s *= scale.scale
    inside = (cols < sizes.keys)[None, :]
    if HOW.MASK != 0:
        at = Mask.at + rows[:, None] * Mask.row + cols[None, :] * Mask.column
        mask = tl.load(at, mask=inside & (rows < sizes.queries)[:, None], other=0)
        if HOW.MASK == 1:
            inside = inside & (mask != 0)
        else:
            mask = mask.to(tl.float32)
            inside = inside & (mask > scale.mask_min)
            s += mask
    s = _within(s, scale.limit, HOW.PTX)
    return s if FULL and HOW.MASK == 0 else tl.where(inside, s, -float("inf"))


@triton.jit
def _centred(s, centre, gain, EXACT: tl.constexpr):
    """gain * (s - centre). Without EXACT in one rounding, a little above it by the same amount along a row."""
    if EXACT:
        return (s - centre[:, None]) * gain
    offset = centre * gain
    return tl.fma(s, gain, (tl.abs(offset) * 2.4e-7 - offset)[:, None])


@triton.jit
def _centre(highest, peak, gain, MIX: tl.constexpr):
    """(BLOCK_Q,): on what c is centred. The maximum of the keys mixed, unless it is too far below the peak to weigh."""
    return tl.where(highest < peak - FAR / gain, peak, highest) if MIX else peak


# The solver.


@triton.jit
def _whole_power(r, N: tl.constexpr):
    """r^N"""
    power = r
    for _ in tl.static_range(1, N):
        power *= r
    return power


@triton.jit
def _powers(c, u, b, part, HOW):
    """r and r^(p - 1) of one tile; with MIX both are 0 outside the columns `part`."""
    if HOW.POWER == 2:
        x = tl.maximum(b * (c * LN_2 - u[:, None]), -1.0)
        if HOW.MIX:
            x = tl.where(part, x, -1.0)
        return 1.0 + x, tl.exp(_log1p(x) * ((1.0 - b) / b))
    r = tl.minimum(tl.maximum(tl.fma(c, b * LN_2, (1.0 - b * u)[:, None]), 0.0), 1.0)
    if HOW.MIX:
        r = tl.where(part, r, 0.0)
    slope = r
    if HOW.ALPHA == 2:
        slope = tl.where(r > 0.0, 1.0, 0.0)
    elif HOW.POWER > 2:
        slope = _whole_power(r, HOW.POWER - 1)
    elif HOW.POWER == 1:
        slope = tl.exp(tl.log(r) * ((1.0 - b) / b))
    elif HOW.ALPHA == 0:
        slope = _exp2(_log2(r, HOW.PTX) * ((1.0 - b) / b), HOW.PTX)
    return r, slope


@triton.jit
def _terms(c, u, b, part, HOW):
    """r^p and r^(p - 1)."""
    r, slope = _powers(c, u, b, part, HOW)
    return r if HOW.ALPHA == 2 else r * slope, slope


@triton.jit
def _norm(total, slope, b, HOW):
    """(BLOCK_Q,): the p-norm of r, and how far u moves for 1 of it."""
    slope = tl.maximum(slope, 1e-30)
    if HOW.ALPHA == 1.5:
        norm = _sqrt(total, HOW.PTX)
        return norm, _over(2.0 * norm, slope, HOW.PTX)
    exponent = _log2(tl.maximum(total, 1e-30), HOW.PTX)
    return _exp2(b * exponent, HOW.PTX), _over(_exp2((1.0 - b) * exponent, HOW.PTX), b * slope, HOW.PTX)


@triton.jit
def _beside(norm, slope, solver):
    """What is asked of `tolerance` with How.NORM: what the p-norm is beside 1, of which a step leaves about the square.

    Right of the root a step goes left of it, where up to all keys come in at once: there the norm has to be nearer. Of
    a row that is masked throughout the slope is 0, and it is done.
    """
    over = norm - 1.0
    return tl.where(slope > 0.0, tl.maximum(over, -solver.right * over), 0.0)


@triton.jit
def _newton_step(total, slope, u, back, solver, HOW):
    """How far u moves: (1 - total^-b) total / (b slope), Newton on the p-norm, about 0 where every key is masked; and
    what is asked of `tolerance`.

    back: how far at most, where that is not by rounding alone (impl/eager.py). A general alpha asks for no bound.
    """
    b = solver.b
    if HOW.NORM:
        norm, pace = _norm(total, slope, b, HOW)
        step = tl.maximum((norm - 1.0) * pace, -u)
        far = _beside(norm, slope, solver)
    else:
        slope = tl.maximum(slope, 1e-30)
        if HOW.ALPHA == 1.5:
            norm = _sqrt(total, HOW.PTX)
            step = tl.maximum(_over(2.0 * (norm - 1.0) * norm, slope, HOW.PTX), -back)
        elif HOW.ALPHA == 2:
            step = tl.maximum(_over(total - 1.0, slope, HOW.PTX), -back)
        else:
            total = tl.maximum(total, 1e-30)
            step = -_expm1(-b * tl.log(total)) * total / (b * slope)
        # exact sparsemax also goes on after a step back by more than a last digit: where the first sums, large and
        # rounded, led so far right of the root that a cluster of keys dropped out, it takes another step to count them
        far = tl.maximum(step, -3.0 * step) if HOW.EXACT and HOW.ALPHA == 2 else step
    return step, far


@triton.jit
def _bent_step(norm, pace, norm_before, pace_before, last, tolerance, PTX: tl.constexpr):
    """Newton's step on the p-norm, and what the bend between this pass and the one before, `last` away, adds to it.

    Of passes on both sides of the root the bend says nothing where they are far apart. There Newton's step stays short
    of the root, as the norm is convex, and the chord's goes beyond it: half way between them, up to the last step.
    """
    over = norm - 1.0
    step = over * pace
    apart = norm - norm_before
    share = _over(over, tl.where(tl.abs(apart) > 1e-6, apart, 1e30), PTX)
    bend = 0.5 * share * over * (pace_before - pace)
    bent = step + tl.minimum(tl.maximum(bend, -0.5 * tl.abs(step)), tl.abs(step))
    between = tl.where(tl.abs(over) > tolerance, 0.5 * (step - last * share), step)
    return tl.where(over * last < 0.0, between, bent)


@triton.jit
def _steps_left(far, left, solver):
    """One fewer, and none where no row of the tile moves by more than `tolerance`."""
    return tl.where(tl.max(far, 0) > solver.tolerance, left - 1, 0)


@triton.jit
def _entmax(c, found, b, part, HOW):
    """A quarter of the entmax weights of one tile, after the last step.

    EXACT applies the step to r: added to u it would be rounded, by less than 16-bit weights show. A quarter keeps
    sums of values that are near the end of float32 within it.
    """
    if HOW.EXACT and HOW.ALPHA == 0:
        r, power = _powers(c, found.u, b, part, HOW)
        return 0.25 * power * tl.maximum(r + ((1.0 - found.total) / tl.maximum(found.slope, 1e-30))[:, None], 0.0)
    if HOW.POWER == 2:
        r, power = _powers(c, found.u + found.step, b, part, HOW)
        return 0.25 * power * r
    SHRINK: tl.constexpr = 0.5 if HOW.ALPHA == 1.5 else 0.25 if HOW.ALPHA == 2 else 1.0
    if HOW.EXACT:
        r = tl.fma(c, b * (LN_2 * SHRINK), ((1.0 - b * found.u) * SHRINK)[:, None])
        r = r - (b * found.step * SHRINK)[:, None]
    else:
        r = tl.fma(c, b * (LN_2 * SHRINK), ((1.0 - b * (found.u + found.step)) * SHRINK)[:, None])
    r = tl.minimum(tl.maximum(r, 0.0), 1.0)
    if HOW.MIX:
        r = tl.where(part, r, 0.0)
    if HOW.ALPHA == 1.5:
        return r * r
    if HOW.ALPHA == 2:
        return r
    if HOW.POWER > 2:
        return 0.25 * _whole_power(r, HOW.POWER)
    return _exp2(tl.fma(_log2(r, HOW.PTX), 1.0 / b, -2.0), HOW.PTX)


# The mix.


@triton.jit
def _sparse_factor(sparse, sparse_sum, part_sum, dense_sum, HOW):
    """(BLOCK_Q, 1): of the quarters of entmax. `sparse`, times the softmax mass of its keys with MIX.

    16-bit weights do not show by how little a threshold, once found, misses a sum of 1. With UNIT it is 1.
    """
    factor = tl.full(dense_sum.shape, 1.0, tl.float32)
    if not HOW.UNIT:
        factor *= sparse
    if HOW.EXACT:
        factor *= 0.25 / tl.maximum(sparse_sum, 1e-30)
    if HOW.MIX:
        factor *= part_sum / tl.maximum(dense_sum, 1e-30)
    return factor[:, None]


@triton.jit
def _mixed(entmax, c, part, shares, weights, HOW):
    """A quarter of the weights of one tile, from that of entmax and the scores.

    AGAIN takes the sum into the exponential, which makes it another one than what was summed: that would be kept in
    registers meanwhile.
    """
    dense, sparse = weights.dense, weights.sparse
    dense_sum = tl.maximum(shares.dense_sum, 1e-30)
    if HOW.AGAIN:
        APPROXIMATE: tl.constexpr = 0 if HOW.EXACT else HOW.PTX
        lowered = _log2(dense_sum, APPROXIMATE)
        if not HOW.MIX:
            p = _exp2(c + (_log2(0.25 * tl.abs(dense), APPROXIMATE) - lowered)[:, None], HOW.PTX)
            entmax = entmax if HOW.UNIT and not HOW.EXACT else entmax * shares.sparse_factor
            return entmax - p if HOW.NEGATIVE else entmax + p
        p = _exp2(c + (shares.rise - 2.0 - lowered)[:, None], HOW.PTX)
        p *= tl.where(part, dense, dense + sparse)
    else:
        p = _exp2(c + shares.rise[:, None] if HOW.MIX else c, HOW.PTX)
        p *= (
            (0.25 / dense_sum)[:, None] * tl.where(part, dense, dense + sparse)
            if HOW.MIX
            else (0.25 * dense / dense_sum)[:, None]
        )
    return p + entmax if (HOW.UNIT and not HOW.EXACT) and not HOW.MIX else tl.fma(entmax, shares.sparse_factor, p)


@triton.jit
def _rounded(w, weight_sums, dtype: tl.constexpr, HOW, TILE):
    """The weights (BLOCK_Q, BLOCK_K) of one tile in the value's dtype; with NORMALISE their sums are added.

    On the tensor cores, which wait anyway: (BLOCK_Q, 16), each of whose columns is the sum.
    """
    w = w.to(dtype)
    if HOW.NORMALISE:
        weight_sums = _dot(w, tl.full((TILE.BLOCK_K, 16), 1.0, dtype), weight_sums)
    return w, weight_sums


@triton.jit
def _row_factor(Mass, rows, peak, dense_sum, weight_sums, sizes, weights, HOW):
    """(BLOCK_Q,): what every row's product is multiplied by.

    peak: the largest score, as an exponent of e. With NORMALISE, rounded weights have their sum in place of
    dense + sparse.
    """
    weight_sum = tl.sum(weight_sums, 1) * 0.0625
    factor = tl.full(peak.shape, 4.0, tl.float32) * weights.factor
    if HOW.NORMALISE:
        sound = weight_sum != 0.0
        whole = weights.dense + weights.sparse
        factor *= tl.where(sound, _over(0.25 * whole, tl.where(sound, weight_sum, 1.0), HOW.PTX), 0.0)
    if HOW.MASS == 0:
        return factor
    mass = tl.load(Mass.at + rows * Mass.row, mask=rows < sizes.queries, other=0.0).to(tl.float32)
    if HOW.MASS == 2:
        mass = tl.exp(peak + tl.log(tl.maximum(dense_sum, 1e-30)) - mass)
        mass = tl.where(dense_sum > 0.0, tl.minimum(mass, 1.0), 0.0)
    return factor * mass


@triton.jit
def _store(Out, rows, out, factor, sizes, weights, HOW, BLOCK_V: tl.constexpr):
    """Writes factor * out, given in tiles (BLOCK_Q, BLOCK_V)."""
    for d in tl.static_range(0, HOW.DV, BLOCK_V):
        _store_tile(Out, rows, d, out[d // BLOCK_V], factor, sizes, weights, HOW, BLOCK_V)


@triton.jit
def _store_tile(Out, rows, d, out, factor, sizes, weights, HOW, BLOCK_V: tl.constexpr):
    """BLOCK_V columns from `d` on."""
    dims = d + tl.arange(0, BLOCK_V)
    at = Out.at + tl.multiple_of(rows * Out.row, HOW.ALIGNED)[:, None] + dims[None, :] * Out.column
    x = _saturated(out * factor[:, None], Out.at.dtype.element_ty, weights.largest, HOW.PTX)
    tl.store(at, x, mask=(rows < sizes.queries)[:, None] & (dims < HOW.DV)[None, :])


# The resident form.


@triton.jit
def _products(Q, K, scores, rows, cols, d, sizes, HOW, TILE):
    """The N tiles of scores and what BLOCK_D columns from `d` on add to them."""
    dims = d + tl.arange(0, TILE.BLOCK_D)
    q = _queries(Q, rows, dims, sizes, HOW)
    keys = ()  # N x (BLOCK_D, BLOCK_K)
    more = ()
    if TILE.AHEAD > 0:
        # all before the first product: no load passes a barrier, and each product has one
        for i in tl.static_range(0, TILE.N):
            keys = keys + (_keys(K, cols + i * TILE.BLOCK_K, dims, sizes, i < TILE.N - 1, HOW),)
        for i in tl.static_range(0, TILE.N):
            more = more + (_dot(q, keys[i], scores[i]),)
    else:
        for i in tl.static_range(0, TILE.N):
            k = _keys(K, cols + i * TILE.BLOCK_K, dims, sizes, i < TILE.N - 1, HOW)  # (BLOCK_D, BLOCK_K)
            more = more + (_dot(q, k, scores[i]),)
    return more


@triton.jit
def _value_tile(V, cols, j: tl.constexpr, NV: tl.constexpr, sizes, HOW, TILE):
    """(BLOCK_K, BLOCK_V): the j-th tile of the value, those of the first keys first."""
    i: tl.constexpr = j // NV
    dims = (j - i * NV) * TILE.BLOCK_V + tl.arange(0, TILE.BLOCK_V)
    return _values(V, cols + i * TILE.BLOCK_K, dims, sizes, i < TILE.N - 1, HOW)


@triton.jit
def _row_moments(c, u, b, part, HOW, TILE):
    """(BLOCK_Q,) sums of r^p and of r^(p - 1) over all N tiles."""
    totals, slopes = _terms(c[0], u, b, part[0], HOW)
    for i in tl.static_range(1, TILE.N):
        more_totals, more_slopes = _terms(c[i], u, b, part[i], HOW)
        totals += more_totals
        slopes += more_slopes
    return _two_sums(totals, slopes)


@triton.jit
def _exp2_sum(c, rise, part, PARTS: tl.constexpr, HOW, TILE):
    """(BLOCK_Q,) sums of 2^(c + rise), with PARTS of the columns `part` alone."""
    total = tl.zeros(c[0].shape, tl.float32)
    for i in tl.static_range(0, TILE.N):
        p = _exp2(c[i] + rise[:, None] if HOW.MIX else c[i], HOW.PTX)
        total += tl.where(part[i], p, 0.0) if PARTS else p
    return tl.sum(total, 1)


@triton.jit
def _entmax_sum(c, found, b, part, HOW, TILE):
    """(BLOCK_Q,) sums of a quarter of the entmax weights."""
    weights = _entmax(c[0], found, b, part[0], HOW)
    for i in tl.static_range(1, TILE.N):
        weights += _entmax(c[i], found, b, part[i], HOW)
    return tl.sum(weights, 1)


@triton.jit
def _surplus(c, found, b, part, HOW, TILE):
    """(BLOCK_Q,): what is left of every sparsemax weight to take off after the last step. impl/eager.py: _settle"""
    totals = tl.zeros(c[0].shape, tl.float32)
    counts = totals
    for i in tl.static_range(0, TILE.N):
        r = _entmax(c[i], found, b, part[i], HOW)
        totals += r
        counts += tl.where(r > 0.0, 1.0, 0.0)
    surplus = 4.0 * tl.sum(totals, 1) - 1.0
    return tl.where(surplus > 4.8e-7, surplus / tl.maximum(tl.sum(counts, 1), 1.0), 0.0)


@triton.jit
def resident_kernel(Q, K, V, Mask, Mix, Mass, Out, sizes, scale, solver, weights, HOW, TILE):
    """All keys at once, in N tiles of BLOCK_K: 77 keys are 5 x 16, not 128."""
    rows, Q, K, V, Mask, Mix, Mass, Out = _placed(Q, K, V, Mask, Mix, Mass, Out, sizes, HOW, TILE)
    cols = _range(0, TILE.BLOCK_K, HOW)  # (BLOCK_K,), of the first tile
    b = solver.b

    scores = ()  # N x (BLOCK_Q, BLOCK_K)
    for _ in tl.static_range(0, TILE.N):
        scores = scores + (tl.zeros((TILE.BLOCK_Q, TILE.BLOCK_K), tl.float32),)
    if HOW.D <= TILE.BLOCK_D:
        scores = _products(Q, K, scores, rows, cols, 0, sizes, HOW, TILE)
    else:
        # a loop: copies into shared memory run ahead of it and take no registers
        for d in tl.range(0, HOW.D, TILE.BLOCK_D, num_stages=TILE.STAGES):
            scores = _products(Q, K, scores, rows, cols, d, sizes, HOW, TILE)
    finished = ()  # N x (BLOCK_Q, BLOCK_K)
    part = ()  # N x (1, BLOCK_K)
    peak = tl.full((TILE.BLOCK_Q,), -1.0, tl.float32) * scale.limit
    centre = peak
    for i in tl.static_range(0, TILE.N):
        here = cols + i * TILE.BLOCK_K
        s = _finished_scores(scores[i], Mask, rows, here, sizes, scale, i < TILE.N - 1, HOW)
        if HOW.MIX:
            part = part + (_part(Mix, here, sizes),)
            centre = tl.maximum(centre, tl.max(tl.where(part[i], s, -float("inf")), 1))
        else:
            part = part + (True,)
        finished = finished + (s,)
    highest = finished[0]
    for i in tl.static_range(1, TILE.N):
        highest = tl.maximum(highest, finished[i])
    # where all is masked the peak stays finite, and -inf stays -inf
    peak = tl.maximum(peak, tl.max(highest, 1))
    centre = _centre(centre, peak, scale.gain, HOW.MIX)
    c = ()  # N x (BLOCK_Q, BLOCK_K)
    for i in tl.static_range(0, TILE.N):
        c = c + (_centred(finished[i], centre, scale.gain, HOW.EXACT),)

    u = tl.full((TILE.BLOCK_Q,), 1.0, tl.float32) * solver.start  # (BLOCK_Q,), as all that is of the solver
    total, slope = _row_moments(c, u, b, part, HOW, TILE)
    step, far = _newton_step(total, slope, u, ROUNDING, solver, HOW)
    # nobody is done after the first steps: to ask is to wait for all warps
    for _ in range(solver.least):
        u += step
        total, slope = _row_moments(c, u, b, part, HOW, TILE)
        step, far = _newton_step(total, slope, u, ROUNDING, solver, HOW)
    left = solver.steps - solver.least
    while left > 0:
        u += step
        total, slope = _row_moments(c, u, b, part, HOW, TILE)
        step, far = _newton_step(total, slope, u, ROUNDING, solver, HOW)
        left = _steps_left(far, left, solver)

    # the first tiles of the value are under way meanwhile
    NV: tl.constexpr = (HOW.DV + TILE.BLOCK_V - 1) // TILE.BLOCK_V
    values = ()
    for j in tl.static_range(0, TILE.AHEAD):
        values = values + (_value_tile(V, cols, j, NV, sizes, HOW, TILE),)
    # softmax is centred on the maximum of all keys
    rise = (centre - peak) * scale.gain
    dense_sum = _exp2_sum(c, rise, part, False, HOW, TILE)
    part_sum = _exp2_sum(c, rise, part, True, HOW, TILE) if HOW.MIX else dense_sum
    sparse_sum = dense_sum
    if HOW.EXACT:
        if HOW.ALPHA == 2:
            step += _surplus(c, Threshold(u, step, total, slope), b, part, HOW, TILE)
        sparse_sum = _entmax_sum(c, Threshold(u, step, total, slope), b, part, HOW, TILE)
    found = Threshold(u, step, total, slope)
    shares = Shares(rise, dense_sum, _sparse_factor(weights.sparse, sparse_sum, part_sum, dense_sum, HOW))
    weight_sums = tl.zeros((TILE.BLOCK_Q, 16), tl.float32)
    if TILE.SLICED:
        rounded = ()  # N x (BLOCK_Q, BLOCK_K)
        for i in tl.static_range(0, TILE.N):
            w = _mixed(_entmax(c[i], found, b, part[i], HOW), c[i], part[i], shares, weights, HOW)
            w, weight_sums = _rounded(w, weight_sums, V.at.dtype.element_ty, HOW, TILE)
            rounded = rounded + (w,)
        factor = _row_factor(Mass, rows, peak * (scale.gain * LN_2), dense_sum, weight_sums, sizes, weights, HOW)
        # a loop, as that over the columns of the key
        for d in tl.range(0, HOW.DV, TILE.BLOCK_V, num_stages=TILE.STAGES):
            dims = d + tl.arange(0, TILE.BLOCK_V)
            product = tl.zeros((TILE.BLOCK_Q, TILE.BLOCK_V), tl.float32)
            for i in tl.static_range(0, TILE.N):
                v = _values(V, cols + i * TILE.BLOCK_K, dims, sizes, i < TILE.N - 1, HOW)
                product = _dot(rounded[i], v, product)
            _store_tile(Out, rows, d, product, factor, sizes, weights, HOW, TILE.BLOCK_V)
    else:
        out = ()  # DV / BLOCK_V x (BLOCK_Q, BLOCK_V)
        for _ in tl.static_range(0, HOW.DV, TILE.BLOCK_V):
            out = out + (tl.zeros((TILE.BLOCK_Q, TILE.BLOCK_V), tl.float32),)
        for i in tl.static_range(0, TILE.N):
            w = _mixed(_entmax(c[i], found, b, part[i], HOW), c[i], part[i], shares, weights, HOW)
            w, weight_sums = _rounded(w, weight_sums, V.at.dtype.element_ty, HOW, TILE)
            more = ()
            for n in tl.static_range(0, NV):
                if i * NV + n + TILE.AHEAD < TILE.N * NV:
                    values = values + (_value_tile(V, cols, i * NV + n + TILE.AHEAD, NV, sizes, HOW, TILE),)
                more = more + (_dot(w, values[i * NV + n], out[n]),)
            out = more
        factor = _row_factor(Mass, rows, peak * (scale.gain * LN_2), dense_sum, weight_sums, sizes, weights, HOW)
        _store(Out, rows, out, factor, sizes, weights, HOW, TILE.BLOCK_V)


# The streaming form.


@triton.jit
def _clamped(cols, sizes, HOW):
    """Keys of which none is past the last one, which takes their place: less than to ask for each load."""
    return cols if HOW.WHOLE else tl.minimum(cols, sizes.keys - 1)


@triton.jit
def _tile_scores(q, K, Mask, Mix, rows, first, sizes, scale, HOW, TILE):
    """(BLOCK_Q, BLOCK_K) scores against the keys from `first` on, and (1, BLOCK_K) which of these are mixed."""
    cols = _range(first, TILE.BLOCK_K, HOW)
    k = _keys(K, _clamped(cols, sizes, HOW), tl.arange(0, TILE.BLOCK_D), sizes, True, HOW)  # (BLOCK_D, BLOCK_K)
    s = _dot(q, k, tl.zeros((TILE.BLOCK_Q, TILE.BLOCK_K), tl.float32))
    part = _part(Mix, cols, sizes) if HOW.MIX else (cols < sizes.keys)[None, :]
    return _finished_scores(s, Mask, rows, cols, sizes, scale, HOW.WHOLE, HOW), part


@triton.jit
def _started(c, u, fall, rise, b, part, HOW):
    """(BLOCK_Q,): a guess at u for all keys so far, this tile's among them, and how steeply their p-norm falls there.

    rise: of the maximum, on which c is centred. Of earlier tiles no more is kept than that their p-norm is 1 at u and
    falls by `fall` over b u. Between two tiles it is taken for the square of a linear function, which keys spread
    evenly about the threshold make of it; the norm is convex, so that a linear function alone would stay below. Neither
    guess is a bound.
    """
    u -= rise
    near = tl.maximum(1.0 - 0.25 * fall * tl.maximum(-u, 0.0), 0.0)
    u = tl.maximum(u, 0.0)
    totals, slopes = _terms(c, u, b, part, HOW)
    total, slope = _two_sums(totals, slopes)
    # the maximum, or what is near 1 of earlier keys, makes it 1 at least
    total += near * near * near * near
    slope += near * near * near * fall
    root = _log2(total, HOW.PTX) * (-0.5 * b)
    ratio = _over(total, slope, HOW.PTX)
    if HOW.POWER == 2:
        lower = -_expm1(root * LN_2)
        return u + (2.0 / b) * ratio * lower, _over(1.0, ratio * (1.0 - lower), HOW.PTX)
    root = _exp2(root, HOW.PTX)
    return u + (2.0 / b) * ratio * (1.0 - root), _over(1.0, ratio * root, HOW.PTX)


@triton.jit
def streaming_kernel(Q, K, V, Mask, Mix, Mass, Out, sizes, scale, solver, weights, HOW, TILE):
    """Any number of keys, BLOCK_K at a time: a pass for maximum, softmax sum and a start of the solver, one a step, and
    one for V.
    """
    rows, Q, K, V, Mask, Mix, Mass, Out = _placed(Q, K, V, Mask, Mix, Mass, Out, sizes, HOW, TILE)
    dims = tl.arange(0, TILE.BLOCK_D)  # (BLOCK_D,)
    b, gain = solver.b, scale.gain
    q = _queries(Q, rows, dims, sizes, HOW)  # (BLOCK_Q, BLOCK_D)

    # a finite maximum: where all is masked -inf stays -inf
    peak = tl.full((TILE.BLOCK_Q,), -1.0, tl.float32) * scale.limit
    centre = peak
    dense_sum = tl.zeros((TILE.BLOCK_Q,), tl.float32)
    part_sum = dense_sum
    # as if there were one key, at that maximum
    u, fall = dense_sum, dense_sum + 1.0
    for first in range(0, sizes.keys, TILE.BLOCK_K):
        s, part = _tile_scores(q, K, Mask, Mix, rows, first, sizes, scale, HOW, TILE)
        higher = tl.maximum(peak, tl.max(s, 1))
        c = _centred(s, higher, gain, HOW.EXACT)  # (BLOCK_Q, BLOCK_K)
        p = _exp2(c, HOW.PTX)
        fewer = _exp2((peak - higher) * gain, HOW.PTX)
        dense_sum = dense_sum * fewer + tl.sum(p, 1)
        rise = higher - peak
        if HOW.MIX:
            part_sum = part_sum * fewer + tl.sum(tl.where(part, p, 0.0), 1)
            highest = tl.maximum(centre, tl.max(tl.where(part, s, -float("inf")), 1))
            c = _centred(s, highest, gain, HOW.EXACT)
            rise = highest - centre
            centre = highest
        u, fall = _started(c, u, fall, rise * (gain * LN_2), b, part, HOW)
        peak = higher
    centre = _centre(centre, peak, gain, HOW.MIX)
    part_sum = part_sum if HOW.MIX else dense_sum

    # from a guess right of the root Newton's first step leads back to the left of it; from there on they go back by
    # rounding alone
    # `_centred` puts 16-bit scores a little higher, and with them the root
    most = solver.most + (0.0 if HOW.EXACT else tl.abs(centre * gain) * (3.2e-7 * LN_2))
    u = tl.maximum(tl.minimum(u, most), solver.start)
    step, total, slope = u * 0.0, u, u
    norm, pace = u * 0.0 + 1e30, u * 0.0  # no bend follows of the first pass
    back = most
    left = solver.steps
    while left > 0:
        u += step
        totals = tl.zeros((TILE.BLOCK_Q, TILE.BLOCK_K), tl.float32)
        slopes = totals
        for first in range(0, sizes.keys, TILE.BLOCK_K):
            s, part = _tile_scores(q, K, Mask, Mix, rows, first, sizes, scale, HOW, TILE)
            more_totals, more_slopes = _terms(_centred(s, centre, gain, HOW.EXACT), u, b, part, HOW)
            totals += more_totals
            slopes += more_slopes
        total, slope = _two_sums(totals, slopes)
        if HOW.NORM:
            norm_before, pace_before = norm, pace
            norm, pace = _norm(total, slope, b, HOW)
            step = _bent_step(norm, pace, norm_before, pace_before, step, solver.tolerance, HOW.PTX)
            step = tl.minimum(tl.maximum(step, -u), most - u)
            far = _beside(norm, slope, solver)
        else:
            step, _ = _newton_step(total, slope, u, back, solver, HOW)
            step = tl.minimum(tl.maximum(step, -u), most - u)
            far = tl.maximum(step, -3.0 * step)
        left = _steps_left(far, left, solver)
        back = tl.minimum(back, ROUNDING)

    # the sum of float32 weights would be one more pass. So they miss 1 by what each may be off, sparsemax's `_surplus`
    # among it: a rounding of the threshold, 1.2e-7 at most, for every tie at the edge of the support
    sparse_factor = _sparse_factor(weights.sparse, 0.25, part_sum, dense_sum, HOW)
    found, shares = Threshold(u, step, total, slope), Shares((centre - peak) * gain, dense_sum, sparse_factor)
    out = tl.zeros((TILE.BLOCK_Q, TILE.BLOCK_D), tl.float32)
    weight_sums = tl.zeros((TILE.BLOCK_Q, 16), tl.float32)
    for first in range(0, sizes.keys, TILE.BLOCK_K):
        s, part = _tile_scores(q, K, Mask, Mix, rows, first, sizes, scale, HOW, TILE)
        c = _centred(s, centre, gain, HOW.EXACT)
        w = _mixed(_entmax(c, found, b, part, HOW), c, part, shares, weights, HOW)
        w, weight_sums = _rounded(w, weight_sums, V.at.dtype.element_ty, HOW, TILE)
        cols = _clamped(_range(first, TILE.BLOCK_K, HOW), sizes, HOW)
        v = _values(V, cols, dims, sizes, True, HOW)  # (BLOCK_K, BLOCK_D)
        out = _dot(w, v, out)
    factor = _row_factor(Mass, rows, peak * (gain * LN_2), dense_sum, weight_sums, sizes, weights, HOW)
    _store(Out, rows, (out,), factor, sizes, weights, HOW, TILE.BLOCK_D)
