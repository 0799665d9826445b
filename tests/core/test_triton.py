"""The fused kernel against the definition in float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import logging

import entmax as entmax_package
import pytest
import torch
from test_attention import definition
from test_entmax import cliffs, edges, oracle

from pladis_core import api, pladis_attention, pladis_correction
from pladis_core.impl import eager, trial

triton_backend = pytest.importorskip("pladis_core.impl.triton", reason="no Triton on this system")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALPHAS = (1.0, 1.001, 1.25, 1.5, 1.9, 2.0)
# (B, H, Hkv, Lq, Lk, D, Dv): every head width of the hosts' models, tails of tiles, one key, one query, many keys
SHAPES = {
    "sd15 40": (2, 1, 1, 20, 77, 40, 40),
    "sdxl 64": (1, 1, 1, 20, 77, 64, 64),
    "pixart 72": (1, 1, 1, 12, 300, 72, 72),
    "sliced 104": (1, 2, 1, 10, 300, 104, 72),
    "sd15 80": (1, 1, 1, 33, 154, 80, 80),
    "hunyuan 88": (1, 1, 1, 12, 333, 88, 88),
    "lumina 96": (1, 1, 1, 40, 63, 96, 96),
    "wan 128": (1, 1, 1, 12, 512, 128, 128),
    "sd15 160": (1, 1, 1, 16, 77, 160, 160),
    "aura 256": (1, 1, 1, 20, 100, 256, 256),
    "odd": (1, 2, 2, 20, 7, 5, 9),
    "one key": (2, 2, 2, 10, 1, 16, 16),
    "one query": (1, 4, 4, 1, 77, 64, 64),
    "grouped": (1, 4, 2, 17, 100, 24, 24),
    "streaming": (1, 1, 1, 10, 530, 32, 16),
    "mixed 231": (2, 2, 2, 10, 231, 24, 24),
    "mixed 600": (2, 1, 1, 10, 600, 16, 16),
    "streaming 160": (1, 2, 1, 10, 600, 160, 160),
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN: whatever the kernel does not write shows. The interpreter gains nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def tensors(shape, dtype=torch.float32):
    batch, heads, kv_heads, queries, keys, width, value_width = SHAPES[shape]
    return tuple(
        torch.randn(size, device=DEVICE).to(dtype)
        for size in (
            (batch, heads, queries, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, value_width)
        )
    )  # fmt: skip


def naive(query, key, value, mask=None, alpha=1.5, lam=2.0):
    """The formula as people write it, scores and products in the inputs' dtype."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    scores = scores if mask is None else scores + mask.to(scores.dtype)
    dense = scores.softmax(-1)
    sparse = entmax_package.entmax_bisect(scores.float(), alpha, -1) if alpha > 1 else dense
    return ((1 - lam) * dense + lam * sparse.to(dense.dtype)) @ value


def assert_as_good_as_naive(out, query, key, value, mask=None, **mix):
    assert out.dtype == query.dtype
    expected = definition(query, key, value, mask, **mix)
    error = (out.double() - expected).abs().max()
    # a GPU's library adds products in another order than the kernel, which adds one after another
    allowed = (4 if DEVICE == "cuda" else 2) * (naive(query, key, value, mask, **mix).double() - expected).abs().max()
    # below it both are rounding of a last bit
    assert error <= max(float(allowed), 4 * torch.finfo(query.dtype).eps), (float(error), float(allowed))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape):
    query, key, value = tensors(shape)
    out = pladis_attention(query, key, value, enable_gqa=True, backend="triton")
    assert_as_good_as_naive(out, query, key, value)


@pytest.mark.parametrize(
    ("shape", "dtype", "alpha"),
    [("sd15 40", dtype, alpha) for dtype in (torch.float16, torch.bfloat16, torch.float32) for alpha in ALPHAS]
    + [("streaming", torch.bfloat16, alpha) for alpha in (1.25, 1.5, 2.0)] + [("sd15 40", torch.float16, 1.004)]
    + [("pixart 72", torch.bfloat16, 1.5), ("sliced 104", torch.float16, 2.0), ("sliced 104", torch.bfloat16, 1.25)],
)
def test_every_alpha_and_dtype_with_a_mask(shape, alpha, dtype):
    query, key, value = tensors(shape, dtype)
    mask = torch.randn(key.shape[0], 1, 1, key.shape[2], device=DEVICE)
    mask[..., ::5] = -1e4
    out = pladis_attention(query, key, value, mask, alpha=alpha, enable_gqa=True, backend="triton")
    assert_as_good_as_naive(out, query, key, value, mask, alpha=alpha)


@pytest.mark.parametrize("alpha", (1.0 + 1e-9, 1.0 + 1e-5))
def test_alpha_just_above_one_is_softmax(alpha):
    query, key, value = tensors("sd15 40")
    out = pladis_attention(query * 3, key, value, alpha=alpha, backend="triton")
    torch.testing.assert_close(out.double(), definition(query * 3, key, value, lam=0.0), atol=5e-4, rtol=0)


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
@pytest.mark.parametrize("shape", ("sdxl 64",))
def test_rows_on_which_the_solver_has_it_hard(shape, alpha):
    """Plateaus under a peak, equal keys, one key far ahead, wide ladders."""
    query, key, value = tensors(shape)
    query, key = query.zero_(), key.zero_()
    rows = query.shape[2]
    query[..., 0] = torch.linspace(0, 40, rows, device=DEVICE)
    query[..., 1] = 1.0
    key[..., 0] = -(torch.rand(key.shape[:3], device=DEVICE) ** 3)
    key[..., ::2, 0] = -0.5
    key[..., 3, :2] = torch.tensor([0.0, 4.0], device=DEVICE)
    out = pladis_attention(query, key, value, scale=1.0, alpha=alpha, enable_gqa=True, backend="triton")
    expected = definition(query, key, value, scale=1.0, alpha=alpha)
    assert (out.double() - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("alpha", (1.99, 2.0))
def test_a_cluster_where_entmax_prunes(alpha):
    scores = cliffs(alpha, 77).to(DEVICE)
    identity = torch.eye(77, device=DEVICE)[None, None]
    mix = {"scale": 1.0, "lam": 1.0, "alpha": alpha}
    weights = pladis_attention(scores[None, None], identity, identity, **mix, backend="triton")[0, 0]
    assert (weights.cpu() - oracle(scores.cpu(), alpha)).abs().max() <= 77 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("keys", (77, 256, 300))
@pytest.mark.parametrize("peaks", (1, 5, 17))
def test_ties_at_the_edge_of_sparsemax_come_in_by_no_more_than_their_weight(peaks, keys):
    """The weights of the peaks, of all ties but one, and of that one."""
    scores = edges(keys, peaks)[::2].to(DEVICE)
    query = torch.cat([scores[:, :peaks], scores[:, -1:]], 1)
    key = torch.eye(peaks + 2, device=DEVICE)[torch.arange(keys).clamp(max=peaks)]
    value = key.clone()
    value[-1] = value[-1].roll(1)
    mix = {"scale": 1.0, "lam": 1.0, "alpha": 2.0}
    inputs = (t[None, None] for t in (query, key[:, :-1], value))
    weights = pladis_attention(*inputs, **mix, backend="triton")[0, 0].cpu()
    error = (weights - oracle(scores.cpu(), 2.0) @ value.double().cpu()).abs().amax(0)
    if triton_backend.is_resident(keys, torch.float32):
        assert error.max() <= 4e-6
    else:
        # nobody sums the weights of a longer row, which would be one more pass: all ties may be off together
        error[peaks] /= keys
        assert error.max() <= 2.5e-7


@pytest.mark.parametrize(("shape", "alpha"), [("odd", 1.25), ("odd", 1.5), ("odd", 2.0), ("streaming", 1.5)])
def test_masks_of_every_kind(shape, alpha):
    query, key, value = tensors(shape)
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    keep = torch.rand(batch, heads, rows, keys, device=DEVICE) < 0.6
    keep[..., 0] = True
    expected = definition(query, key, value, keep, alpha=alpha)
    lowest = torch.zeros(keep.shape, device=DEVICE)
    for mask in (
        keep,
        lowest.masked_fill(~keep, -torch.inf),
        lowest.masked_fill(~keep, torch.finfo(torch.float32).min),
        lowest.bfloat16().masked_fill(~keep, torch.finfo(torch.bfloat16).min),
    ):
        out = pladis_attention(query, key, value, mask, alpha=alpha, enable_gqa=True, backend="triton")
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("shape", "alpha"), [("odd", alpha) for alpha in (1.0, 1.25, 1.5, 2.0)] + [("streaming", 1.5)])
def test_a_query_with_every_key_masked_gets_zero(shape, alpha):
    query, key, value = tensors(shape)
    mask = torch.zeros(query.shape[2], key.shape[2], device=DEVICE)
    mask[5] = -torch.inf
    out = pladis_attention(query, key, value, mask, alpha=alpha, enable_gqa=True, backend="triton")
    assert (out[:, :, 5] == 0).all()
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [("odd", torch.float32), ("odd", torch.bfloat16), ("odd", torch.float16), ("streaming", torch.bfloat16)],
)
def test_finite_inputs_give_finite_outputs(shape, dtype):
    top = torch.finfo(dtype).max
    for magnitude in (1e-30, top):
        query, key, value = (t.clamp(-1, 1).mul(min(magnitude, top)).to(dtype) for t in tensors(shape))
        for mask in (None, torch.full((query.shape[2], key.shape[2]), -3e38, device=DEVICE)):
            # in the streaming form, which the interpreter takes longest for, each once
            pairs = [(1.25, pladis_correction), (1.5, pladis_attention)]
            pairs += [(1.25, pladis_attention), (1.5, pladis_correction)] * (shape == "odd")
            for alpha, function in pairs:
                out = function(query, key, value, mask, alpha=alpha, enable_gqa=True, backend="triton")
                assert out.isfinite().all(), (magnitude, alpha, function)


@pytest.mark.parametrize("shape", ("grouped", "streaming"))
def test_correction_and_mass(shape):
    query, key, value = tensors(shape)
    mass = torch.rand(query.shape[0], 1, query.shape[2], 1, device=DEVICE)
    out = pladis_correction(query, key, value, mass=mass, lam=1.7, enable_gqa=True, backend="triton")
    expected = mass.double() * definition(query, key, value, lam=1.7, correction=True)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", ("grouped", "streaming"))
def test_mass_from_the_log_sum_exp_of_a_longer_row(shape):
    query, key, value = tensors(shape)
    row_lse = 2 + 3 * torch.rand(query.shape[0], 1, query.shape[2], 1, device=DEVICE)
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=DEVICE)
    mask[3] = False
    given, own = (
        pladis_correction(query, key, value, mask, row_lse=row_lse, enable_gqa=True, backend=backend)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(given, own, atol=1e-5, rtol=0)
    assert (given[:, :, 3] == 0).all()


def test_lambda_zero_and_alpha_one_are_softmax_attention():
    query, key, value = tensors("sdxl 64")
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    for options in ({"lam": 0.0}, {"alpha": 1.0}):
        out = pladis_attention(query, key, value, **options, backend="triton")
        torch.testing.assert_close(out, dense, atol=2e-6, rtol=0)


def test_strided_inputs_in_the_hosts_layout():
    q, k, v = (torch.randn(2, n, 2 * 16, device=DEVICE) for n in (20, 77, 77))
    strided = [t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (q, k, v)]
    expanded = [t[:1].expand(2, -1, -1, -1) for t in strided]
    reversed_width = [t.flip(-1).mT.contiguous().mT for t in strided]
    for case in (strided, expanded, reversed_width):
        out = pladis_attention(*case, backend="triton")
        contiguous = pladis_attention(*(t.contiguous() for t in case), backend="triton")
        torch.testing.assert_close(out, contiguous, atol=1e-6, rtol=0)
    # merging the heads again needs no copy
    assert pladis_attention(*strided, backend="triton").transpose(1, 2).flatten(2).is_contiguous()


def test_addresses_beyond_2_to_the_31():
    """Rows 2**27 elements apart, in memory of which only those rows are touched."""
    apart, rows, width = 2**27, 20, 16
    try:
        storage = torch.UntypedStorage(2 * (apart * (rows - 1) + width), device=DEVICE)
    except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
        pytest.skip(f"not enough memory: {error}")
    far = torch.empty(0, dtype=torch.float16, device=DEVICE).set_(storage, 0, (1, 1, rows, width), (0, 0, apart, 1))
    query, key, value = torch.randn(3, 1, 1, rows, width, device=DEVICE).half()
    expected = pladis_attention(query, key, value, backend="triton")
    for position in range(3):
        inputs = [query, key, value]
        inputs[position] = far.copy_(inputs[position])
        torch.testing.assert_close(pladis_attention(*inputs, backend="triton"), expected, atol=1e-6, rtol=0)


def test_zero_sizes():
    for batch, queries, keys in ((0, 5, 7), (1, 0, 7), (1, 5, 0)):
        sizes = (batch, 2, queries, 8), (batch, 2, keys, 8), (batch, 2, keys, 6)
        out = pladis_attention(*(torch.randn(size, device=DEVICE) for size in sizes), backend="triton")
        assert out.shape == (batch, 2, queries, 6)
        assert (out == 0).all()


@pytest.mark.parametrize("keys", (1, 16, 17, 48, 49, 77, 97, 128, 129, 154, 231, 257, 300, 333, 385, 512))
def test_tiles_cover_the_keys_and_little_more(keys):
    for gpu in ({"ptx": 90}, {"ptx": 89}, {"wave": 64}):
        tile, _ = triton_backend.configuration(4096, keys, 64, torch.bfloat16, **gpu)
        if tile.N:
            assert keys <= tile.BLOCK_K * tile.N <= max(16, 1.25 * keys + 15)
        assert tile.BLOCK_K >= 16 and tile.BLOCK_K & (tile.BLOCK_K - 1) == 0


def test_scores_and_outputs_that_do_not_fit_registers_together_are_sliced():
    for keys, width, ptx, sliced in ((300, 72, 89, True), (300, 72, 90, False), (77, 160, 89, False)):
        tile, _ = triton_backend.configuration(4096, keys, width, torch.bfloat16, ptx=ptx)
        assert tile.SLICED is sliced


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda q, k, v: (q.double(), k.double(), v.double()), "float64"),
        (lambda q, k, v: (q, k.half(), v), "float16, float32"),
        (lambda q, k, v: (q.repeat(1, 1, 1, 5), k.repeat(1, 1, 1, 5), v), "320"),
        (lambda q, k, v: (q.requires_grad_(), k, v), "no gradient"),
    ),
)
def test_what_it_cannot_take_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        pladis_attention(*change(*tensors("sdxl 64")), backend="triton")


@pytest.fixture
def failing(monkeypatch):
    """`auto` takes the kernel, which raises what `failing.error` gives for its arguments, or runs; calls are kept."""

    class Failing:
        calls: list = []

        @staticmethod
        def error(query, key, *rest):
            return None

        def attend(self, *args):
            self.calls.append(args)
            error = self.error(*args)
            if error is not None:
                raise error
            return eager.attend(*args)

    fake = Failing()
    fake.calls = []
    monkeypatch.setattr(api, "_trials", [trial.Trials("triton", "Triton")])
    monkeypatch.setattr(api, "_has_gpu_compiler", lambda device: True)
    monkeypatch.setattr(triton_backend, "unusable", lambda *tensors: None)
    monkeypatch.setattr(triton_backend, "attend", fake.attend)
    return fake


def test_a_kernel_that_fails_is_reported_once_and_not_tried_again(failing, caplog):
    failing.error = lambda *args: OSError("no C compiler\nmany more lines")
    inputs = tensors("sdxl 64")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            torch.testing.assert_close(pladis_attention(*inputs), pladis_attention(*inputs, backend="eager"))
    assert len(failing.calls) == 1
    assert [record.message for record in caplog.records] == [
        f"PLADIS: Triton fails on {inputs[0].device} (OSError: no C compiler). From now on without its kernel there: "
        "same images, slower."
    ]


def test_one_problem_that_fails_does_not_turn_the_kernel_off_for_the_others(failing, caplog):
    failing.error = lambda query, key, *rest: (
        RuntimeError("out of resource: shared memory") if key.shape[2] > 100 else None
    )
    small, large = tensors("sdxl 64"), tensors("sd15 80")
    with caplog.at_level(logging.WARNING):
        for inputs in (small, large, small, large, small):
            torch.testing.assert_close(pladis_attention(*inputs), pladis_attention(*inputs, backend="eager"))
    assert [args[1].shape[2] for args in failing.calls] == [77, 154, 77, 77]
    assert len(caplog.records) == 1
    assert "154 keys of width 80 in torch.float32" in caplog.records[0].message


def test_where_the_driver_has_no_memory_left_it_is_tried_once_more(failing, caplog):
    errors = [RuntimeError("Triton Error [CUDA]: out of memory"), None, None]
    failing.error = lambda *args: errors.pop(0)
    inputs = tensors("sdxl 64")
    for _ in range(2):
        torch.testing.assert_close(pladis_attention(*inputs), pladis_attention(*inputs, backend="eager"))
    assert len(failing.calls) == 3
    assert not caplog.records


@pytest.mark.parametrize(
    "error", (torch.cuda.OutOfMemoryError("full"), RuntimeError("Triton Error [CUDA]: out of memory"))
)
def test_running_out_of_memory_says_nothing_about_the_kernel(failing, error):
    failing.error = lambda *args: error
    for _ in range(2):
        with pytest.raises(torch.cuda.OutOfMemoryError):
            pladis_attention(*tensors("sdxl 64"))
    # each once more after memory was given back, and the next call tries again
    assert len(failing.calls) == 4


def test_a_device_that_is_beyond_use_is_not_called_slower(failing, caplog):
    failing.error = lambda *args: RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        pladis_attention(*tensors("sdxl 64"))
    assert "slower" not in caplog.text and "PLADIS_WITHOUT=triton" in caplog.text


def test_without_triton_nothing_is_said(monkeypatch, caplog):
    monkeypatch.setattr(api, "_trials", [trial.Trials("nvrtc", "NVRTC")])
    monkeypatch.setattr(api, "_has_gpu_compiler", lambda device: True)
    inputs = tensors("sdxl 64")
    torch.testing.assert_close(pladis_attention(*inputs), pladis_attention(*inputs, backend="eager"))
    assert not caplog.records


@pytest.mark.parametrize("alpha", (1.25, 1.5, 1.75, 2.0))
@pytest.mark.parametrize(("keys", "spread"), [(77, 0.03), (320, 0.1), (512, 0.03), (512, 0.1), (512, 0.3), (1024, 0.1)])
def test_scores_that_are_nearly_equal(keys, spread, alpha):
    """As of padding: the root lies where most keys are about to drop out, and the sum of all counts what is off."""
    query, key, value = (torch.randn(1, 1, rows, 32, device=DEVICE) for rows in (16, keys, keys))
    inputs = [t.half() for t in (query * spread, key, value)]
    expected = definition(*inputs, alpha=alpha)
    error = pladis_attention(*inputs, alpha=alpha, backend="triton").double() - expected
    # weights are rounded, too
    assert error.square().mean() <= 1.8**2 * (expected.half().double() - expected).square().mean()


def with_scores(scores, queries, dtype):
    """Queries that all have these scores (keys,), in `dtype`, and random values."""
    query, key = torch.zeros(1, 1, queries, 16, device=DEVICE), torch.zeros(1, 1, len(scores), 16, device=DEVICE)
    query[..., 0], key[0, 0, :, 0] = 4.0, scores
    return [t.to(dtype) for t in (query, key, torch.randn(1, 1, len(scores), 16, device=DEVICE))]


@pytest.mark.parametrize(
    ("kind", "alpha", "dtype"),
    [
        ("ramp", 1.5, torch.bfloat16), ("ramp", 1.5, torch.float16), ("ramp", 1.25, torch.float16),
        ("ramp", 1.75, torch.bfloat16), ("alternation", 1.5, torch.bfloat16), ("late", 1.5, torch.bfloat16),
        ("outlier", 1.5, torch.float16),
    ],
)  # fmt: skip
def test_rows_of_which_the_first_tiles_lead_the_start_astray(kind, alpha, dtype):
    """Similar queries, all of whose guesses lie right of the root: there all that entmax keeps may come in at once."""
    keys = 704
    place = torch.arange(keys, device=DEVICE) / keys
    scores = torch.randn(keys, device=DEVICE) * 0.1
    if kind == "ramp":
        scores -= 4.0 * place
    elif kind == "alternation":
        scores[::2] -= 2.0
    elif kind == "late":
        scores[place < 0.95] -= 1.0
    else:
        scores = 0.2 * scores
        scores[keys // 2] += 2.0
    inputs = with_scores(scores, 16, dtype)
    expected = definition(*inputs, alpha=alpha)
    error = pladis_attention(*inputs, alpha=alpha, backend="triton").double() - expected
    # most of it from rounded weights; the outlier, of which all others stand just at the support's edge, is the worst
    roundings = 4.0 if kind == "outlier" else 2.5
    assert error.square().mean() <= (roundings * torch.finfo(dtype).eps) ** 2 * expected.square().mean()


@pytest.mark.parametrize(
    ("keys", "score", "alpha"), [(77, 256.0, 1.5), (321, 16.0, 2.0), (321, 256.0, 1.5), (321, -256.0, 2.0)]
)
def test_equal_scores_far_from_zero_need_no_correction(keys, score, alpha):
    query, key, value = with_scores(torch.full((keys,), score, device=DEVICE), 16, torch.float16)
    out = pladis_correction(query, key, 1.0 + 0.1 * value, alpha=alpha, backend="triton")
    assert out.abs().max() <= 1e-3


def mixed_in_part(query, key, value, part, mask, alpha, dense, sparse):
    """float64: of the keys `part` (B, Lk), dense * p + sparse * m * entmax over them alone, with m the sum of their p;
    of the others (dense + sparse) * p.
    """
    scores = query.double() @ key.double().mT * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    p = scores.softmax(-1)
    part = part[:, None, None, :].expand_as(scores)
    alone = scores.masked_fill(~part, -torch.inf)
    alone = (alone - alone.amax(-1, keepdim=True)).nan_to_num(nan=-torch.inf)
    entmax = oracle_rows(alone, alpha) * part
    m = (p * part).sum(-1, keepdim=True)
    return torch.where(part, dense * p + sparse * m * entmax, (dense + sparse) * p) @ value.double()


def oracle_rows(scores, alpha):
    """alpha-entmax of float64 rows by bisection; 0 where all are -inf."""
    b = alpha - 1.0
    low, high = torch.full_like(scores[..., :1], -1.0), torch.zeros_like(scores[..., :1])
    for _ in range(80):
        middle = (low + high) / 2
        above = (b * scores - middle).clamp(min=0).pow(1 / b).sum(-1, keepdim=True) >= 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    weights = (b * scores - low).clamp(min=0).pow(1 / b)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)


def attend(query, key, value, mask=None, part=None, alpha=1.5, dense=-1.0, sparse=2.0, mass=None, row_lse=None):
    scale = query.shape[-1] ** -0.5
    return triton_backend.attend(query, key, value, mask, part, scale, alpha, dense, sparse, mass, row_lse)


def long_rows(keys, std, kind, dtype):
    """Random queries and keys, whose scores spread by `std`; a few keys that count double, or one far above all."""
    query, key, value = (torch.randn(1, 1, rows, 32, device=DEVICE) for rows in (16, keys, keys))
    query *= std
    if kind == "peaks":
        key[:, :, torch.randint(keys, (5,), device=DEVICE)] *= 2.0
    elif kind == "sink":
        query[..., 0], key[..., 0], key[:, :, 0, 0] = 1.0, 0.0, 4.0 * std * 32**0.5
    return [t.to(dtype) for t in (query, key, value)]


@pytest.mark.parametrize(
    ("keys", "std", "kind", "dtype", "alpha", "passes"),
    [
        (600, 1.0, "plain", torch.float16, 1.5, 2), (1000, 2.0, "sink", torch.float16, 1.5, 2),
        (1024, 1.0, "plain", torch.float16, 1.25, 2), (1024, 2.0, "plain", torch.float16, 1.75, 3),
        (2048, 4.0, "peaks", torch.float16, 1.5, 2), (4096, 1.0, "sink", torch.float16, 1.5, 2),
        (1000, 1.0, "plain", torch.float32, 1.5, 4), (1024, 1.0, "peaks", torch.float32, 1.25, 3),
        (600, 1.0, "plain", torch.float32, 2.0, 4),
    ],
)  # fmt: skip
def test_few_passes_solve_long_rows(monkeypatch, keys, std, kind, dtype, alpha, passes):
    """With no more than `passes` for the solver, where steps from the maximum would leave errors of 1e-2 and more."""
    query, key, value = long_rows(keys, std, kind, dtype)
    plan = triton_backend.plan.__wrapped__

    def capped(*args):
        chosen = plan(*args)
        return chosen._replace(solver=chosen.solver._replace(steps=passes))

    monkeypatch.setattr(triton_backend, "plan", capped)
    monkeypatch.setattr(triton_backend, "laid_out", triton_backend.laid_out.__wrapped__)
    error = pladis_attention(query, key, value, alpha=alpha, backend="triton").double()
    expected = definition(query, key, value, alpha=alpha)
    error -= expected
    if dtype == torch.float32:
        # the scores are rounded
        assert error.abs().max() <= 5e-6
    else:
        rounding = expected.to(dtype).double() - expected
        # weights are rounded, too
        assert error.square().mean() <= 1.5**2 * rounding.square().mean()


@pytest.mark.parametrize("dense", (-1.0, -2.0), ids=("attention", "correction"))
@pytest.mark.parametrize(
    ("shape", "dtype", "alpha", "masked"),
    [
        ("odd", torch.float32, 1.5, True), ("odd", torch.float32, 1.25, False), ("sdxl 64", torch.bfloat16, 2.0, False),
        ("sd15 80", torch.float32, 2.0, False), ("mixed 231", torch.float16, 1.5, True),
        ("mixed 600", torch.float32, 1.5, True), ("sliced 104", torch.bfloat16, 1.5, True),
    ],
)  # fmt: skip
def test_entmax_takes_part_in_the_keys_of_a_mix_mask_alone(shape, dtype, alpha, masked, dense):
    query, key, value = tensors(shape, dtype)
    batch, heads, rows, _ = query.shape
    part = torch.rand(batch, key.shape[2], device=DEVICE) < 0.4
    part[:, 0] = True
    mask = None
    if masked:
        mask = torch.rand(batch, heads, rows, key.shape[2], device=DEVICE) < 0.7
        # of a row no key that is mixed is left
        mask[:, :, 3] = ~part[:, None]
    out = attend(query, key, value, mask, part, alpha, dense, 2.0)
    expected = mixed_in_part(query, key, value, part, mask, alpha, dense, 2.0)
    torch.testing.assert_close(out.double(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


@pytest.mark.parametrize("everywhere", (False, True))
def test_a_mix_mask_of_none_and_of_all_keys(everywhere):
    query, key, value = tensors("odd")
    # one row for all batches, as hosts expand it
    part = torch.full((1, key.shape[2]), everywhere, device=DEVICE).expand(query.shape[0], -1)
    expected = definition(query, key, value, lam=2.0 if everywhere else 0.0)
    torch.testing.assert_close(attend(query, key, value, part=part).double(), expected, atol=1e-6, rtol=0)


def test_keys_of_a_mix_mask_that_lie_far_below_the_others():
    query, key, value = tensors("odd")
    query[..., 0], key[..., 0], key[:, :, 2, 0] = 1.0, 200.0, -200.0
    part = torch.zeros(query.shape[0], key.shape[2], dtype=torch.bool, device=DEVICE)
    part[:, 2:4] = True
    out = attend(query, key, value, part=part)
    torch.testing.assert_close(
        out.double(), mixed_in_part(query, key, value, part, None, 1.5, -1.0, 2.0), atol=1e-4, rtol=0
    )


def test_rounded_weights_add_up():
    """Values of mean 10: what 16-bit weights miss of a sum of 1 was multiplied by it.

    In float16, as the interpreter cuts bfloat16 off.
    """
    for shape in ("sdxl 64", "streaming"):
        query, key, value = tensors(shape, torch.float16)
        value = (value + 10).half()
        expected = definition(query, key, value)
        error = (pladis_attention(query, key, value, enable_gqa=True, backend="triton").double() - expected).abs()
        rounding = (expected.half().double() - expected).abs()
        assert error.square().mean() <= 1.15**2 * rounding.square().mean(), shape


@pytest.mark.parametrize("lam", (1e-6, 1e-2, 1.0, 7e4, 1e6))
def test_lambda_of_every_size_in_float16(lam):
    """Weights beyond 65504 were infinite."""
    query, key, value = tensors("sdxl 64", torch.float16)
    value = value / max(lam, 1.0)
    out = pladis_attention(query, key, value, lam=lam, backend="triton")
    expected = definition(query, key, value, lam=lam)
    # the difference of two large weights is known to a rounding of either
    assert (out.double() - expected).abs().max() <= 4e-3 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_scores_far_from_zero(dtype):
    """Centring in one rounding moves a row as a whole: what its largest scores weigh stays."""
    query, key, value = tensors("odd", dtype)
    query[..., 0], key[..., 0] = 64.0, 256.0
    assert_as_good_as_naive(
        pladis_attention(query, key, value, scale=1.0, backend="triton"), query * 5**0.5, key, value
    )
