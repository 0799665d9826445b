"""pladis_attention and pladis_correction: every backend against the definition, written out in float64."""

from __future__ import annotations

import entmax as entmax_package
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pladis_core import pladis_attention, pladis_correction
from pladis_core.impl import eager

BACKENDS = ("reference", "portable", "eager")
# (B, H, Hkv, Lq, Lk, D, Dv): odd sizes, one key, one query, grouped heads, another value width, many keys
SHAPES = {
    "sd15": (2, 8, 8, 256, 77, 40, 40),
    "odd": (1, 3, 3, 63, 7, 5, 9),
    "one-key": (2, 2, 2, 10, 1, 16, 16),
    "one-query": (1, 4, 4, 1, 77, 64, 64),
    "grouped": (2, 6, 2, 33, 100, 24, 24),
    "long": (1, 1, 1, 130, 4096, 32, 16),
}


def definition(query, key, value, mask=None, scale=None, lam=2.0, alpha=1.5, correction=False):
    """eq. 11, in float64, on the entmax package; mask additive or boolean."""
    query, key, value = (t.double() for t in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e5) if mask.dtype == torch.bool else scores + mask.double()
    dense = scores.softmax(-1)
    sparse = entmax_package.entmax_bisect(scores, alpha, -1, n_iter=100) if alpha > 1 else dense
    return ((-lam if correction else 1 - lam) * dense + lam * sparse) @ value


def tensors(shape, dtype=torch.float32):
    batch, heads, kv_heads, queries, keys, width, value_width = SHAPES[shape]
    return (
        torch.randn(batch, heads, queries, width, dtype=dtype),
        torch.randn(batch, kv_heads, keys, width, dtype=dtype),
        torch.randn(batch, kv_heads, keys, value_width, dtype=dtype),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", (1.0, 1.25, 1.5, 2.0))
def test_matches_the_definition(shape, alpha, backend):
    query, key, value = tensors(shape)
    out = pladis_attention(query, key, value, alpha=alpha, enable_gqa=True, backend=backend)
    torch.testing.assert_close(out.double(), definition(query, key, value, alpha=alpha), atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", (1.1, 1.5, 2.0))
def test_the_fast_ones_match_the_reference(shape, alpha):
    query, key, value = tensors(shape)
    for function in (pladis_attention, pladis_correction):
        portable, out, expected = (
            function(query, key, value, alpha=alpha, enable_gqa=True, backend=b)
            for b in ("portable", "eager", "reference")
        )
        torch.testing.assert_close(portable, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_exact(backend):
    query, key, value = tensors("odd", torch.float64)
    out = pladis_attention(query, key, value, backend=backend)
    torch.testing.assert_close(out, definition(query, key, value), atol=1e-7, rtol=0)


@pytest.mark.parametrize("backend", ("portable", "eager"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("shape", ("sd15", "odd", "grouped"))
def test_low_precision_error_is_at_most_twice_the_naive_one(shape, dtype, backend):
    query, key, value = tensors(shape, dtype)
    expected = definition(query, key, value)
    groups = query.shape[1] // key.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ k.mT * query.shape[-1] ** -0.5
    naive = (2 * entmax_package.entmax15(scores.float(), -1).to(dtype) - scores.softmax(-1)) @ v
    out = pladis_attention(query, key, value, enable_gqa=True, backend=backend)
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max() <= 2 * (naive.double() - expected).abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_lambda_zero_and_alpha_one_are_softmax_attention(backend):
    query, key, value = tensors("sd15")
    dense = scaled_dot_product_attention(query, key, value)
    for options in ({"lam": 0.0}, {"alpha": 1.0}):
        out = pladis_attention(query, key, value, **options, backend=backend)
        # two orders of adding, with and without fused multiply-add
        torch.testing.assert_close(out, dense, atol=2e-6, rtol=0)
        assert pladis_correction(query, key, value, **options, backend=backend).abs().max() <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_correction_turns_dense_into_pladis(backend):
    query, key, value = tensors("sd15")
    dense = scaled_dot_product_attention(query, key, value)
    out = dense + pladis_correction(query, key, value, lam=1.7, backend=backend)
    torch.testing.assert_close(out, pladis_attention(query, key, value, lam=1.7, backend=backend), atol=5e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mass_keeps_the_text_share_of_a_joint_row(backend):
    """Joint attention: the row over [text, image] keeps its mass on the text, and its image weights."""
    query, text, text_value = tensors("odd")
    image, image_value = torch.randn(1, 3, 50, 5), torch.randn(1, 3, 50, 9)
    scores = torch.cat([query @ text.mT, query @ image.mT], -1).double() * 5**-0.5
    weights = scores.softmax(-1)
    on_text, on_image = weights[..., :7], weights[..., 7:]
    mass = on_text.sum(-1, keepdim=True)
    lse = scores.logsumexp(-1, keepdim=True)
    mixed = mass * (2 * entmax_package.entmax15(scores[..., :7], -1) - scores[..., :7].softmax(-1))
    expected = mixed @ text_value.double() + on_image @ image_value.double()
    dense = weights @ torch.cat([text_value, image_value], -2).double()
    for share in ({"mass": mass.float()}, {"row_lse": lse.float()}):
        correction = pladis_correction(query, text, text_value, **share, backend=backend)
        torch.testing.assert_close(dense + correction, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask_shape", ((77,), (40, 77), (2, 1, 1, 77), (2, 1, 40, 77), (2, 4, 40, 77)))
def test_masks_of_every_shape_and_kind(mask_shape, backend):
    query, key, value = torch.randn(2, 4, 40, 16), torch.randn(2, 4, 77, 16), torch.randn(2, 4, 77, 16)
    keep = torch.rand(mask_shape) < 0.6
    keep[..., 0] = True
    bias = torch.randn(mask_shape)
    expected = definition(query, key, value, keep.expand(2, 4, 40, 77))
    lowest = torch.zeros(mask_shape)
    for kind in (
        keep,
        lowest.masked_fill(~keep, -torch.inf),
        lowest.masked_fill(~keep, torch.finfo(torch.float32).min),
        lowest.bfloat16().masked_fill(~keep, torch.finfo(torch.bfloat16).min),
        lowest.half().masked_fill(~keep, torch.finfo(torch.float16).min),
    ):
        out = pladis_attention(query, key, value, kind, backend=backend)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
    out = pladis_attention(query, key, value, bias, backend=backend)
    torch.testing.assert_close(out.double(), definition(query, key, value, bias), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", (1.0, 1.25, 1.5, 2.0))
@pytest.mark.parametrize("low", (False, -torch.inf, torch.finfo(torch.float32).min))
def test_a_query_with_every_key_masked_gets_zero(low, alpha, backend):
    query, key, value = tensors("odd")
    mask = torch.zeros(63, 7) if low is not False else torch.ones(63, 7, dtype=torch.bool)
    mask[5] = low
    for lam in (2.0, -3.0, 1e6):
        out = pladis_attention(query, key, value, mask, lam=lam, alpha=alpha, backend=backend)
        assert (out[:, :, 5] == 0).all()
        assert out.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", (1.0, 1.25, 1.5, 2.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_finite_inputs_give_finite_outputs(dtype, alpha, backend):
    top = torch.finfo(dtype).max
    for magnitude in (1e-30, 1e3, 1e15, 1e25, top):
        query, key, value = (t.clamp(-1, 1).mul(min(magnitude, top)).to(dtype) for t in tensors("odd"))
        for mask in (None, torch.randn(63, 7) * 1e4, torch.full((63, 7), -3e38)):
            for function in (pladis_attention, pladis_correction):
                out = function(query, key, value, mask, alpha=alpha, backend=backend)
                assert out.isfinite().all(), (magnitude, mask, function)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_top_of_float64_is_finite_too(backend):
    for dtypes in ((torch.float64,) * 3, (torch.float32, torch.float64, torch.float32)):
        query, key, value = (t.clamp(-1, 1).to(d) for t, d in zip(tensors("odd"), dtypes, strict=True))
        for scale in (None, 0.0):
            out = pladis_attention(query, key * 1.5e308, value, scale=scale, backend=backend)
            assert out.isfinite().all()
    query, key, value = tensors("odd")
    mass = torch.full((1, 1, 63, 1), 1e38)
    assert pladis_correction(query, key, value * 1e38, mass=mass, backend=backend).isfinite().all()


def test_huge_scores_pick_the_best_key():
    query, key = torch.randn(1, 1, 20, 8) * 1e20, torch.randn(1, 1, 7, 8) * 1e20
    value = torch.randn(1, 1, 7, 4)
    best = (query.double() @ key.double().mT).argmax(-1)
    torch.testing.assert_close(pladis_attention(query, key, value)[0, 0], value[0, 0, best[0, 0]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", (0.0, 1e-12, 0.3, -0.5, 20.0))
def test_any_scale(scale, backend):
    query, key, value = tensors("odd")
    out = pladis_attention(query, key, value, scale=scale, backend=backend)
    torch.testing.assert_close(out.double(), definition(query, key, value, scale=scale), atol=1e-4, rtol=0)


def test_strided_inputs_in_the_hosts_layout():
    q, k, v = torch.randn(2, 60, 4 * 16), torch.randn(2, 77, 4 * 16), torch.randn(2, 77, 4 * 16)
    strided = [t.unflatten(-1, (4, 16)).transpose(1, 2) for t in (q, k, v)]
    expanded = [t[:1].expand(2, -1, -1, -1) for t in strided]
    for case in (strided, expanded):
        torch.testing.assert_close(
            pladis_attention(*case), pladis_attention(*(t.contiguous() for t in case)), atol=1e-6, rtol=0
        )


def test_chunk_sizes_do_not_change_the_result(monkeypatch):
    query, key, value = tensors("sd15")
    mask, mass = torch.randn(2, 1, 256, 77), torch.rand(2, 8, 256, 1)
    whole = pladis_correction(query, key, value, mask, mass=mass, backend="portable")
    for size in (1, 5000, 50_000, 200_000):
        monkeypatch.setattr(eager, "CPU_BUFFER_BYTES", size)
        torch.testing.assert_close(
            pladis_correction(query, key, value, mask, mass=mass, backend="portable"), whole, atol=1e-5, rtol=0
        )


def test_where_memory_runs_out_smaller_chunks_are_tried(monkeypatch):
    """An allocator that has room for 5000 scores, then for fewer than one row's."""
    query, key, value = tensors("sd15")
    whole = pladis_attention(query, key, value, backend="portable")
    asked, scratch = [], eager.Scratch

    def allocate(elements, *args):
        asked.append(elements)
        if elements > room:
            raise torch.cuda.OutOfMemoryError("full")
        return scratch(elements, *args)

    monkeypatch.setattr(eager, "Scratch", allocate)
    room = 5000
    out = pladis_attention(query, key, value, backend="portable")
    torch.testing.assert_close(out, whole, atol=1e-5, rtol=0)
    assert asked[-1] <= room < asked[-2]
    room = 76
    with pytest.raises(torch.cuda.OutOfMemoryError):
        pladis_attention(query, key, value, backend="portable")
    assert asked[-1] == 77


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_sizes(backend):
    for batch, queries, keys in ((0, 5, 7), (1, 0, 7), (1, 5, 0)):
        out = pladis_attention(
            torch.randn(batch, 2, queries, 8), torch.randn(batch, 2, keys, 8), torch.randn(batch, 2, keys, 6),
            backend=backend,
        )  # fmt: skip
        assert out.shape == (batch, 2, queries, 6)
        assert (out == 0).all()


def test_autocast_does_not_lower_the_precision():
    query, key, value = tensors("sd15")
    plain = pladis_attention(query, key, value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pladis_attention(query, key, value), plain)


def test_inputs_are_left_alone():
    query, key, value = tensors("sd15")
    before = [t.clone() for t in (query, key, value)]
    pladis_attention(query, key, value)
    assert all(torch.equal(a, b) for a, b in zip(before, (query, key, value), strict=True))


def test_no_map_of_a_whole_layer_is_kept():
    """Peak memory on 4096 queries x 10 heads x 77 keys, beyond inputs and output: under a tenth of the reference's."""
    query, key, value = torch.randn(1, 10, 4096, 64), torch.randn(1, 10, 77, 64), torch.randn(1, 10, 77, 64)
    out_bytes = query.nelement() * 4
    peaks = {b: peak_bytes(lambda b=b: pladis_attention(query, key, value, backend=b)) - out_bytes for b in BACKENDS}
    assert max(peaks["eager"], peaks["portable"]) < peaks["reference"] / 10, peaks


def peak_bytes(function) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    current = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


def bad(**changes):
    arguments = {"query": torch.randn(1, 2, 5, 8), "key": torch.randn(1, 2, 7, 8), "value": torch.randn(1, 2, 7, 8)}
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (bad(query=torch.randn(2, 5, 8)), r"\(2, 5, 8\)"),
        (bad(key=torch.randn(1, 2, 7, 9)), "head_dim 9"),
        (bad(value=torch.randn(1, 2, 6, 8)), "differ"),
        (bad(query=torch.randn(3, 2, 5, 8)), "batch 3"),
        (bad(query=torch.randn(1, 4, 5, 8)), "enable_gqa"),
        (bad(query=torch.randn(1, 3, 5, 8), enable_gqa=True), "multiple"),
        (bad(query=torch.ones(1, 2, 5, 8, dtype=torch.long)), "int64"),
        (bad(attn_mask=torch.zeros(5, 6)), r"\(5, 6\)"),
        (bad(attn_mask=torch.zeros(3, 1, 2, 5, 7)), "attn_mask"),
        (bad(attn_mask=torch.zeros(5, 7, dtype=torch.int32)), "int32"),
        (bad(scale=float("nan")), "scale"),
        (bad(alpha=2.5), "2.5"),
        (bad(lam=float("nan")), "lam"),
        (bad(backend="fast"), "'fast'"),
    ),
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        pladis_attention(**arguments)


@pytest.mark.parametrize("above", (1e-12, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5))
def test_the_reference_is_exact_just_above_alpha_one(above):
    query, key, value = tensors("sd15")
    out = pladis_attention(query, key, value, alpha=1.0 + above, backend="reference")
    # the first order of entmax in alpha - 1: softmax and as much of scores^2
    torch.testing.assert_close(out.double(), definition(query, key, value, alpha=1.0), atol=2e-6 + 30 * above, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("boolean", "additive", "of some heads"))
def test_a_masked_key_changes_nothing_however_large(kind, backend):
    query, key, value = tensors("grouped")
    keep = torch.rand(2, 6 if kind == "of some heads" else 1, 1, 100) > 0.3
    keep[..., 17] = False
    mask = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min) if kind == "additive" else keep
    options = {"attn_mask": mask, "enable_gqa": True, "backend": backend}
    expected = pladis_attention(query, key, value, **options)
    key[:, :, 17] = torch.where(torch.rand(2, 2, 24) > 0.5, 1e38, -1e38)
    assert torch.equal(pladis_attention(query, key, value, **options), expected)
    leaf = key.clone().requires_grad_()
    pladis_attention(query, leaf, value, **options).sum().backward()
    assert (leaf.grad[:, :, 17] == 0).all() and leaf.grad.abs().sum() > 1e-3 and leaf.grad.isfinite().all()
