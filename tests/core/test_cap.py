from __future__ import annotations

import pytest
import torch

from pladis_core import add_capped


@pytest.mark.parametrize("cap", (1.0, 1.2, 1.5))
def test_rows_keep_their_direction_and_stay_below_the_cap(cap):
    dense, correction = (torch.randn(2, 3, 50, 16, dtype=torch.float64) for _ in range(2))
    correction *= torch.linspace(0, 3, 50).unsqueeze(-1)
    out, free = add_capped(dense, correction, cap), dense + correction
    length, limit = out.norm(dim=-1), cap * dense.norm(dim=-1)
    assert (length <= limit * (1 + 1e-12)).all()
    beyond = free.norm(dim=-1) > limit
    assert beyond.any()
    assert not beyond.all()
    assert torch.equal(out[~beyond], free[~beyond])
    torch.testing.assert_close(length[beyond], limit[beyond])
    torch.testing.assert_close(torch.cosine_similarity(out, free, dim=-1), torch.ones(2, 3, 50, dtype=torch.float64))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_any_magnitude_is_finite(dtype):
    top = torch.finfo(dtype).max
    for magnitude in (0.0, torch.finfo(dtype).tiny, 1.0, top):
        dense = torch.randn(9, 8).clamp(-1, 1).mul(magnitude).to(dtype)
        for correction in (dense, -dense, torch.full_like(dense, top), torch.zeros_like(dense)):
            out = add_capped(dense, correction, 1.5)
            assert out.dtype == dtype
            assert out.isfinite().all(), (magnitude, correction)


def test_no_dense_output_is_no_output():
    assert (add_capped(torch.zeros(3, 4), torch.randn(3, 4), 2.0) == 0).all()
