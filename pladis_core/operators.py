"""PLADIS as operators that torch knows, for whoever looks at operators and not at numbers: torch.compile and export,
meta and fake tensors, torch.func.

`api.py` calls them where one of these looks on; elsewhere it calls the backend itself, without torch's way there.
Forward and backward are opaque: a trace has one node for either, and a compiled model runs the loop or the kernel that
one which is not compiled runs. Derivatives are first ones, in reverse mode.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import library
from torch.autograd import forward_ad

from .impl import eager, gradient
from .impl.common import compute_dtype

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? mass, Tensor? row_lse, Tensor? mix_mask"
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_OPTIONS = "float scale, float alpha, float dense, float sparse"


def looked_on(*tensors: torch.Tensor | None) -> bool:
    """Whether somebody traces or transforms what is done to these tensors, or they hold no numbers."""
    if torch.compiler.is_compiling() or _is_transformed() or torch._C._len_torch_dispatch_stack():
        return True
    # a list: every layer asks, and a generator takes twice as long
    return any([t is not None and (type(t) not in _PLAIN or t.is_meta or _is_functional(t)) for t in tensors])


def _is_transformed() -> bool:
    """By torch.func, or by forward-mode derivatives."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_functional(tensor: torch.Tensor) -> bool:
    return torch._is_functional_tensor(tensor)


def _laid_out(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(B, H, Lq, Dv), as the backends lay it out: heads behind queries."""
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)


@library.custom_op("pladis::attend", mutates_args=(), schema=f"({_TENSORS}, {_OPTIONS}, str backend) -> Tensor")
def attend(query, key, value, mask, mass, row_lse, mix_mask, scale, alpha, dense, sparse, backend):
    """mass * (dense * softmax(S) + sparse * entmax_alpha(S)) @ value; shapes as in `pladis_core.api`, all expanded."""
    from .api import _backend

    out = _backend(backend, False)(query, key, value, mask, mix_mask, scale, alpha, dense, sparse, mass, row_lse)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@attend.register_fake
def _(query, key, value, mask, mass, row_lse, mix_mask, scale, alpha, dense, sparse, backend):
    return _laid_out(query, value)


@library.custom_op(
    "pladis::attend_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_TENSORS}, {_OPTIONS}, bool[] wanted) -> Tensor[]",
)
def attend_backward(grad, query, key, value, mask, mass, row_lse, mix_mask, scale, alpha, dense, sparse, wanted):
    """The gradients of the tensors that are wanted, in their order."""
    saved = (mix_mask, query, key, value, mask, mass, row_lse)
    ctx = SimpleNamespace(
        saved_tensors=saved, options=(scale, alpha, dense, sparse), needs_input_grad=(False, False, False, *wanted)
    )
    with _autograd_again():
        found = gradient._Attention.backward(ctx, grad)[3:]
    return [t.contiguous() for t in found if t is not None]


@attend_backward.register_fake
def _(grad, query, key, value, mask, mass, row_lse, mix_mask, scale, alpha, dense, sparse, wanted):
    tensors = (query, key, value, mask, mass, row_lse)
    return [t.new_empty(t.shape) for t, want in zip(tensors, wanted, strict=True) if want]


@library.custom_op(
    "pladis::weights",
    mutates_args=(),
    schema="(Tensor scores, Tensor? mixed, float alpha, int dim, float dense, float sparse) -> Tensor",
)
def weights(scores, mixed, alpha, dim, dense, sparse):
    """dense * softmax(scores) + sparse * entmax_alpha(scores) over `dim`, in float32 or wider."""
    return eager.mix_weights(scores, mixed, alpha, dim, dense, sparse).contiguous()


@weights.register_fake
def _(scores, mixed, alpha, dim, dense, sparse):
    return scores.new_empty(scores.shape, dtype=compute_dtype(scores.dtype))


@library.custom_op(
    "pladis::weights_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor scores, Tensor? mixed, float alpha, int dim, float dense, float sparse) -> Tensor",
)
def weights_backward(grad, scores, mixed, alpha, dim, dense, sparse):
    """The gradient of the scores."""
    with _autograd_again():
        leaf = scores.detach().requires_grad_()
        out = gradient.mix_weights(leaf, mixed, alpha, dim, dense, sparse)
        return torch.autograd.grad(out, leaf, grad)[0].contiguous()


@weights_backward.register_fake
def _(grad, scores, mixed, alpha, dim, dense, sparse):
    return scores.new_empty(scores.shape)


def _autograd_again():
    """Operators run below autograd, and their gradients are found by it."""
    guard = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    return _Both(guard, torch.enable_grad())


class _Both:
    def __init__(self, *contexts):
        self._contexts = contexts

    def __enter__(self):
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error):
        for context in reversed(self._contexts):
            context.__exit__(*error)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:11]


def _attend_gradients(ctx, grad):
    # all but the mix_mask
    saved = ctx.saved_tensors[:6]
    wanted = [need and t is not None for need, t in zip(ctx.needs_input_grad[:6], saved, strict=True)]
    found = iter(_choice(attend_backward, _AttendBackward, (grad, *ctx.saved_tensors, *ctx.options, wanted)))
    return *(next(found) if want else None for want in wanted), *(None,) * 6


def _keep_scores(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _weights_gradient(ctx, grad):
    arguments = (grad, *ctx.saved_tensors, *ctx.options)
    return _choice(weights_backward, _WeightsBackward, arguments), *(None,) * 5


attend.register_autograd(_attend_gradients, setup_context=_keep)
weights.register_autograd(_weights_gradient, setup_context=_keep_scores)


class _Attend(torch.autograd.Function):
    """The operator for torch.func, which does not see the derivatives that are registered."""

    generate_vmap_rule = True
    forward = staticmethod(attend)
    setup_context = staticmethod(_keep)
    backward = staticmethod(_attend_gradients)


class _Weights(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(weights)
    setup_context = staticmethod(_keep_scores)
    backward = staticmethod(_weights_gradient)


class _Once(torch.autograd.Function):
    """A gradient, which has none itself."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("PLADIS has first derivatives, and a second one was asked for")


class _AttendBackward(_Once):
    @staticmethod
    def forward(*args):
        return tuple(attend_backward(*args))


class _WeightsBackward(_Once):
    forward = staticmethod(weights_backward)


def _choice(operator, function: type[torch.autograd.Function], args):
    """The operator, or where torch.func derives, the function that it can derive."""
    if torch.compiler.is_compiling() or not _is_transformed():
        return operator(*args)
    functional = any(isinstance(t, torch.Tensor) and _is_functional(t) for t in args)
    return (operator if functional else function.apply)(*args)


def transformed_attend(*args) -> torch.Tensor:
    """`attend`, as whoever looks on needs it."""
    return _choice(attend, _Attend, args)


def transformed_weights(*args) -> torch.Tensor:
    """`weights`, as whoever looks on needs it."""
    return _choice(weights, _Weights, args)


def _mapped(info, in_dims, tensors):
    """Every tensor with the mapped dimension in front."""

    def moved(tensor, at):
        if tensor is None:
            return None
        return tensor.expand(info.batch_size, *tensor.shape) if at is None else tensor.movedim(at, 0)

    return [moved(*pair) for pair in zip(tensors, in_dims, strict=True)]


def _as_one_batch(info, in_dims, tensors):
    """Every tensor with the mapped dimension folded into its first, N * B."""
    return [None if t is None else t.flatten(0, 1) for t in _mapped(info, in_dims, tensors)]


@attend.register_vmap
def _(info, in_dims, *args):
    out = attend(*_as_one_batch(info, in_dims[:7], args[:7]), *args[7:])
    return out.unflatten(0, (info.batch_size, -1)), 0


@attend_backward.register_vmap
def _(info, in_dims, *args):
    found = attend_backward(*_as_one_batch(info, in_dims[:8], args[:8]), *args[8:])
    return [t.unflatten(0, (info.batch_size, -1)) for t in found], [0] * len(found)


@weights.register_vmap
def _(info, in_dims, scores, mixed, alpha, dim, dense, sparse):
    # mixed is of the shape of the scores
    dim = dim % (scores.ndim if in_dims[0] is None else scores.ndim - 1)
    scores, mixed = _mapped(info, in_dims[:2], (scores, mixed))
    return weights(scores, mixed, alpha, dim + 1, dense, sparse), 0


@weights_backward.register_vmap
def _(info, in_dims, grad, scores, mixed, alpha, dim, dense, sparse):
    dim = dim % (scores.ndim if in_dims[1] is None else scores.ndim - 1)
    grad, scores, mixed = _mapped(info, in_dims[:3], (grad, scores, mixed))
    return weights_backward(grad, scores, mixed, alpha, dim + 1, dense, sparse), 0
