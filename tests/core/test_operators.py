"""Whoever looks at operators and not at numbers: torch.compile and export, meta and fake tensors, torch.func."""

from __future__ import annotations

import pytest
import torch
from torch import library
from torch.autograd import forward_ad

from pladis_core import pladis_attention, pladis_correction, pladis_weights


def attention(query, key, value):
    # older exports refuse tensors that are global
    keys = torch.arange(21, device=query.device)
    return pladis_attention(query, key, value, keys % 3 > 0, mix_mask=keys[None] > 1)


def inputs() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, 3, n, 8) for n in (10, 21, 21))


def derived(function, *tensors):
    """The gradients of the sum of squares, by autograd, outside of any transformation."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves).square().sum(), leaves)


def assert_all_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ("auto", "portable", "reference"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_meta_tensors_have_shape_type_and_layout(dtype, backend):
    tensors = [t.to(dtype) for t in inputs()]
    real = pladis_attention(*tensors, backend=backend)
    made = pladis_attention(*(t.to("meta") for t in tensors), backend=backend)
    assert made.is_meta and made.shape == real.shape and made.dtype == dtype
    assert pladis_weights(tensors[0].to("meta")).dtype == torch.float32


def test_functionalize_and_export_and_compile():
    tensors = inputs()
    expected = attention(*tensors)
    assert_all_close([torch.func.functionalize(attention)(*tensors)], [expected])

    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return attention(*tensors)

    program = torch.export.export(Layer(), tensors)
    assert "pladis.attend" in program.graph_module.code
    assert_all_close([program.module()(*tensors)], [expected])
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert_all_close([compiled(*tensors)], [expected])
    assert_all_close(derived(compiled, *tensors), derived(attention, *tensors))


def test_grad_and_vmap_and_gradients_of_every_sample():
    query, key, value = inputs()
    loss = torch.func.grad(lambda *tensors: attention(*tensors).square().sum(), (0, 1, 2))
    assert_all_close(loss(query, key, value), derived(attention, query, key, value))
    queries = torch.randn(4, *query.shape)
    mapped = torch.vmap(attention, (1, None, None), 1)(queries.transpose(0, 1), key, value)
    assert_all_close(mapped.unbind(1), [attention(one, key, value) for one in queries])
    of_samples = torch.vmap(loss, (0, None, None))(queries, key, value)
    for index, one in enumerate(queries):
        assert_all_close([gradient[index] for gradient in of_samples], derived(attention, one, key, value))


def test_grad_of_a_part_of_a_longer_row():
    query, key, value = inputs()
    row_lse = torch.randn(2, 3, 10, 1) + 4

    def correction(query, row_lse):
        return pladis_correction(query, key, value, row_lse=row_lse)

    found = torch.func.grad(lambda *tensors: correction(*tensors).square().sum(), (0, 1))(query, row_lse)
    assert_all_close(found, derived(correction, query, row_lse))


def test_weights_under_grad_and_vmap():
    scores = torch.randn(4, 5, 6)

    def weights(scores):
        return pladis_weights(scores, dim=0)

    loss = torch.func.grad(lambda scores: weights(scores).square().sum())
    assert_all_close([loss(scores)], derived(weights, scores))
    assert_all_close(torch.vmap(weights, 1)(scores), [weights(one) for one in scores.unbind(1)])
    assert_all_close(torch.vmap(loss)(scores), [derived(weights, one)[0] for one in scores])


def test_forward_mode_and_second_derivatives_say_no():
    query, key, value = inputs()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda query: attention(query, key, value), (query,), (query,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        attention(forward_ad.make_dual(query, query), key, value)
    first = torch.func.grad(lambda query: attention(query, key, value).square().sum())
    with pytest.raises(RuntimeError, match="first derivatives, and a second one was asked for"):
        torch.func.grad(lambda query: first(query).sum())(query)


def test_torchs_own_check_of_operators():
    query, key, value = inputs()
    mask = (torch.arange(21) % 3 > 0).expand(2, 3, 10, 21)
    for leaf in (query, query.clone().requires_grad_()):
        for mixed in (None, torch.arange(21).expand(2, 21) > 0):
            arguments = (leaf, key, value, mask, None, None, mixed, 0.3, 1.5, -1.0, 2.0, "auto")
            library.opcheck(torch.ops.pladis.attend.default, arguments)
        for mixed in (None, torch.arange(8).expand(2, 3, 10, 8) > 0):
            library.opcheck(torch.ops.pladis.weights.default, (leaf, mixed, 1.5, -1, -1.0, 2.0))
