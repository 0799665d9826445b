"""What holds for every input: any shape, layout, dtype, mask and magnitude that hypothesis can think of."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pladis_core import entmax, pladis_attention, pladis_correction

ALPHAS = st.one_of(st.sampled_from((1.0, 1.5, 2.0)), st.floats(1.0, 2.0))
LAMBDAS = st.one_of(st.sampled_from((0.0, 1.0, 2.0)), st.floats(-3.0, 10.0))
DTYPES = st.sampled_from((torch.float32, torch.float16, torch.bfloat16, torch.float64))
FAST = st.sampled_from(("eager", "portable"))
USUAL = st.sampled_from((0.0, 1e-3, 1.0, 5.0))
EXTREME = st.sampled_from((1e-30, 1e4, 1e15, 1e30, 1e38, 1e300))
thorough = settings(max_examples=120, deadline=None, derandomize=True)


@st.composite
def tensors(draw, shape: tuple[int, ...], dtype: torch.dtype, magnitudes=USUAL):
    """A tensor of `shape` in one of many layouts: contiguous, transposed, sliced, expanded, offset."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    magnitude = min(draw(magnitudes), float(torch.finfo(dtype).max))

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).clamp(-1, 1).mul(magnitude).to(dtype)

    batch, heads, length, width = shape
    layout = draw(st.sampled_from(("contiguous", "host", "sliced", "expanded", "transposed", "strided width")))
    if layout == "host":
        return random(batch, length, heads * width).unflatten(-1, (heads, width)).transpose(1, 2)
    if layout == "sliced":
        return random(batch, heads, length + 2, width + 1)[:, :, 1:-1, 1:]
    if layout == "expanded":
        return random(1, heads, length, width).expand(shape)
    if layout == "transposed":
        return random(batch, heads, width, length).mT
    if layout == "strided width":
        return random(batch, heads, length, 2 * width)[..., ::2]
    return random(*shape)


@st.composite
def problems(draw, magnitudes=USUAL):
    """query, key, value and a mask; sizes from 0 (batch) or 1 on, heads grouped or not."""
    dtype = draw(DTYPES)
    batch, kv_heads, groups = draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(1, 60)), draw(st.integers(1, 90))
    width, value_width = draw(st.integers(1, 33)), draw(st.integers(1, 33))
    query = draw(tensors((batch, kv_heads * groups, queries, width), dtype, magnitudes))
    key = draw(tensors((batch, kv_heads, keys, width), dtype, magnitudes))
    value = draw(tensors((batch, kv_heads, keys, value_width), dtype, magnitudes))
    shape = draw(st.sampled_from(((keys,), (queries, keys), (batch, 1, 1, keys), (batch, kv_heads * groups, 1, keys))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    keep = torch.rand(shape, generator=generator) < draw(st.sampled_from((0.0, 0.5, 0.9)))
    kind = draw(st.sampled_from(("none", "boolean", "infinite", "lowest", "bias")))
    mask = {
        "none": None,
        "boolean": keep,
        "infinite": torch.zeros(shape).masked_fill(~keep, -torch.inf),
        "lowest": torch.zeros(shape).masked_fill(~keep, torch.finfo(torch.float32).min),
        "bias": torch.randn(shape, generator=generator) * 3,
    }[kind]
    return query, key, value, mask


@thorough
@given(problems(), ALPHAS, LAMBDAS, FAST)
def test_the_fast_backends_are_the_reference(problem, alpha, lam, backend):
    *inputs, mask = problem
    exact = [t.double() for t in inputs]
    options = {"lam": lam, "alpha": alpha, "enable_gqa": True}
    for function in (pladis_attention, pladis_correction):
        out = function(*inputs, mask, **options, backend=backend)
        expected = function(*exact, mask, **options, backend="reference")
        dtype = problem[0].dtype
        assert out.dtype == dtype
        assert out.shape == expected.shape
        weight = 1 + 2 * abs(lam)
        # one rounding of the result, and scores and thresholds in float32
        value = float(problem[2].abs().max()) if problem[2].numel() else 0.0
        tolerance = weight * value * max(2e-5, float(torch.finfo(dtype).eps))
        assert (out.double() - expected.double()).abs().max() <= tolerance if out.numel() else True


@thorough
@given(problems(EXTREME), ALPHAS, LAMBDAS, FAST)
def test_finite_inputs_give_finite_outputs(problem, alpha, lam, backend):
    for function in (pladis_attention, pladis_correction):
        assert function(*problem, lam=lam, alpha=alpha, enable_gqa=True, backend=backend).isfinite().all()


@thorough
@given(problems(), ALPHAS, FAST)
def test_a_key_that_is_masked_might_as_well_not_be_there(problem, alpha, backend):
    query, key, value, _ = problem
    keys = key.shape[2]
    mask = torch.arange(keys) < max(1, keys // 2)
    part = slice(0, max(1, keys // 2))
    out = pladis_attention(query, key, value, mask, alpha=alpha, enable_gqa=True, backend=backend)
    alone = pladis_attention(query, key[:, :, part], value[:, :, part], alpha=alpha, enable_gqa=True, backend=backend)
    scale = max(1.0, float(value.abs().max()) if value.numel() else 0.0)
    tolerance = scale * max(1e-5, 4 * float(torch.finfo(query.dtype).eps))
    torch.testing.assert_close(out, alone, atol=tolerance, rtol=0)


@thorough
@given(
    st.lists(
        st.one_of(st.floats(allow_nan=False, allow_infinity=False, width=32), st.just(-torch.inf)),
        min_size=1,
        max_size=200,
    ),
    ALPHAS,
)
def test_entmax_of_any_row(row, alpha):
    scores = torch.tensor(row)
    weights = entmax(scores, alpha)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    possible = scores > -torch.inf
    if not possible.any():
        assert (weights == 0).all()
        return
    assert abs(float(weights.double().sum()) - 1) <= 1e-5
    assert (weights[~possible] == 0).all()
    # larger scores never get less
    order = scores.argsort()
    assert (weights[order].diff() >= -1e-6).all()
