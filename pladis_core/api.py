"""Public functions: validate, choose a backend, call it. Imports no optional backend.

PLADIS (K. Kim, B. Sim, ICCV 2025, https://arxiv.org/abs/2503.07677) replaces, in a text cross-attention layer,
softmax(S) by (1 - lam) * softmax(S) + lam * entmax_alpha(S), S the scaled scores.
"""

from __future__ import annotations

import math
import os
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch

from . import operators
from .impl import cpu, eager, gradient, trial
from .impl.common import wants_grad

# far beyond any use, and far from where weights would overflow
MAX_LAM = 1e6
NEARLY_SPARSEMAX = 2.0 - 1e-6
MASK_DTYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def entmax(scores: torch.Tensor, alpha: float = 1.5, dim: int = -1) -> torch.Tensor:
    """alpha-entmax of `scores` over `dim` (Peters, Niculae, Martins 2019, eq. 10).

    Args:
        scores: any shape, a floating dtype; -inf marks a masked entry.
        alpha: 1 is softmax, 1.5 entmax-1.5, 2 sparsemax. Going higher gives more exact zeros.
        dim: the axis that sums to 1.

    Returns:
        Weights of the shape of `scores`, float32 (float64 for float64 scores). Masked entries are exactly 0, and a
        slice whose entries are all masked is all 0.

    Raises:
        ValueError: alpha outside [1, 2], `dim` out of range, scores not floating point.
    """
    return pladis_weights(scores, lam=1.0, alpha=alpha, dim=dim)


def pladis_weights(
    scores: torch.Tensor, lam: float = 2.0, alpha: float = 1.5, dim: int = -1, mix_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """(1 - lam) * softmax(scores) + lam * entmax_alpha(scores) over `dim` (PLADIS, eq. 11).

    Args:
        scores: any shape, a floating dtype; -inf marks a masked entry.
        lam: 0 is softmax, 1 is entmax, above 1 extrapolates past it: the keys that entmax prunes get negative weight.
        alpha: as in `entmax`.
        dim: the axis that sums to 1.
        mix_mask: boolean, broadcastable to `scores`: False leaves an entry at its softmax weight, and the others are
            mixed among themselves, their sum as softmax has it.

    Returns:
        Weights of the shape of `scores`, float32 (float64 for float64 scores). Differentiable once.

    Raises:
        ValueError: alpha outside [1, 2], lam beyond 1e6, `dim` out of range, scores not floating point, a mix_mask
            that is not boolean or does not broadcast.
    """
    _check_mix(lam, alpha)
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point, not {scores.dtype}: convert them with .float()")
    if not -scores.ndim <= dim < scores.ndim:
        raise ValueError(f"dim {dim} is out of range for scores of shape {tuple(scores.shape)}")
    mixed = _mix_mask(mix_mask, scores.shape, scores.device)
    if operators.looked_on(scores):
        return operators.transformed_weights(scores, mixed, alpha, dim, 1.0 - lam, lam)
    mix = gradient.mix_weights if wants_grad(scores) else eager.mix_weights
    return mix(scores, mixed, alpha, dim, 1.0 - lam, lam)


def pladis_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    *,
    lam: float = 2.0,
    alpha: float = 1.5,
    mix_mask: torch.Tensor | None = None,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """PLADIS attention (eq. 11); reads like `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: (B, H, Lq, D).
        key: (B, Hkv, Lk, D).
        value: (B, Hkv, Lk, Dv).
        attn_mask: broadcastable to (B, H, Lq, Lk). Boolean (True takes part) or additive; -inf or the lowest finite
            value of its dtype means masked.
        scale: factor on query @ key^T; D ** -0.5 when None.
        lam: 0 is the dense layer, 1 the purely sparse one, 2 the paper's choice. Going higher pushes further away from
            what entmax prunes.
        alpha: 1 <= alpha <= 2. Going higher prunes more keys.
        mix_mask: boolean, broadcastable to (B, Lk): the keys that are mixed, for instance without the start token or
            padding. All others keep their softmax weight, and so does the sum of these. None: all keys.
        enable_gqa: H may be a multiple of Hkv; consecutive query heads share a key head.
        backend: "triton" (the fused kernel for GPUs), "cuda" (the same for NVIDIA GPUs without Triton, 16-bit), "nvrtc"
            (there, for what "cuda" cannot take: a kernel between two products of torch's), "eager" (on a CPU with a
            compiler a fused loop, elsewhere "portable"), "portable" (PyTorch in chunks, on any device) or "reference"
            (materialised, on the `entmax` package). "auto" is the first of triton, cuda, nvrtc and eager that works.
            All but an explicit "triton", "cuda" or "nvrtc" have a first derivative, in every floating input
            (`impl/gradient.py`).

    Returns:
        (B, H, Lq, Dv) in query's dtype. Scores and weights are float32 or wider whatever the input dtype. A query whose
        keys are all masked gets 0. Finite inputs give finite outputs.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, alpha outside [1, 2], lam beyond 1e6, scale not finite,
            an unknown backend, a gradient asked of the triton, cuda or nvrtc backend, or tensors that they cannot take.
        ImportError: the reference backend without the `entmax` package, the triton backend without Triton.
    """
    _check_mix(lam, alpha)
    return _attend(
        query, key, value, attn_mask, mix_mask, scale, alpha, 1.0 - lam, lam, None, None, enable_gqa, backend
    )


def pladis_correction(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    *,
    lam: float = 2.0,
    alpha: float = 1.5,
    mass: torch.Tensor | None = None,
    row_lse: torch.Tensor | None = None,
    mix_mask: torch.Tensor | None = None,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """lam * mass * (entmax_alpha(S) - softmax(S)) @ value: what turns a dense attention output into PLADIS.

    Add it onto an output that somebody else computed. When these keys are only a part of a longer row (joint
    attention), `mass` is the dense attention mass that the row puts on them; the sum then keeps that mass.

    Args:
        mass: broadcastable to (B, H, Lq, 1); 1 when None.
        row_lse: instead of the mass, the log-sum-exp of the longer row's scaled and masked scores, broadcastable to
            (B, H, Lq, 1). The mass is then min(1, exp(LSE(S) - row_lse)), at no extra pass over the scores.
        Others: as in `pladis_attention`.

    Returns:
        (B, H, Lq, Dv) in query's dtype. Differentiable as in `pladis_attention`, in mass and row_lse too.

    Raises:
        ValueError, ImportError: as in `pladis_attention`; also a mass or row_lse that does not broadcast, or both.
    """
    _check_mix(lam, alpha)
    if mass is not None and row_lse is not None:
        raise ValueError("give mass or row_lse, not both: row_lse says what the mass is")
    return _attend(query, key, value, attn_mask, mix_mask, scale, alpha, -lam, lam, mass, row_lse, enable_gqa, backend)


def prepare(device: torch.device | str) -> None:
    """Makes ready what attention on `device` needs, so that a first step does not wait: on a CPU, its compiled loop."""
    if torch.device(device).type == "cpu":
        cpu.compiled_loop()


def _attend(
    query, key, value, attn_mask, mix_mask, scale, alpha, dense, sparse, mass, row_lse, enable_gqa, backend
) -> torch.Tensor:
    """mass * (dense * softmax(S) + sparse * entmax_alpha(S)) @ value on the chosen backend."""
    _check_tensors(query, key, value, enable_gqa)
    if alpha > NEARLY_SPARSEMAX:
        # kernels take alpha - 1 as float32, which is 1 there, to code for alphas below 2
        alpha = 2.0
    scale = max(query.shape[3], 1) ** -0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, not {scale}")
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if attn_mask is not None and attn_mask.dtype not in MASK_DTYPES:
        raise ValueError(f"attn_mask must be boolean or floating point, not {attn_mask.dtype}")
    device = query.device
    attn_mask = _broadcast("attn_mask", attn_mask, (batch, heads, queries, keys), device)
    mix_mask = _mix_mask(mix_mask, (batch, keys), device)
    mass = _broadcast("mass", mass, (batch, heads, queries, 1), device)
    row_lse = _broadcast("row_lse", row_lse, (batch, heads, queries, 1), device)
    tensors = query, key, value, attn_mask, mass, row_lse
    implementation = _backend(backend, wants_grad(*tensors))
    if operators.looked_on(*tensors):
        return operators.transformed_attend(*tensors, mix_mask, scale, alpha, dense, sparse, backend)
    return implementation(query, key, value, attn_mask, mix_mask, scale, alpha, dense, sparse, mass, row_lse)


def _backend(name: str, with_gradient: bool):
    """The `attend` function of a backend."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    attend = _ATTEND[name]
    # autograd goes through the reference by itself
    if not with_gradient or name == "reference":
        return attend
    if name in ("cuda", "nvrtc", "triton"):
        raise ValueError(f"backend {name!r} has no gradient: use backend='auto', or torch.no_grad()")
    return partial(gradient.attend, attend)


def _reference(*args) -> torch.Tensor:
    from .impl import reference

    return reference.attend(*args)


def _eager(query, key, value, *rest) -> torch.Tensor:
    return (cpu if cpu.usable(query, key, value) else eager).attend(query, key, value, *rest)


def _fused(query, key, value, *rest) -> torch.Tensor:
    if find_spec("triton") is None:
        raise ImportError(
            "backend 'triton' needs Triton: pip install triton, on Windows triton-windows. The other backends do "
            "without it."
        )
    return _demanded("triton", query, key, value, *rest)


def _demanded(name: str, query, key, value, *rest) -> torch.Tensor:
    backend = import_module(f".impl.{name}", __package__)
    reason = backend.unusable(query, key, value)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot take these tensors: {reason}. backend='eager' can.")
    return backend.attend(query, key, value, *rest)


def _fastest(query, key, value, *rest) -> torch.Tensor:
    """The fused kernels where they work, then the one between two products, eager elsewhere."""
    if _has_gpu_compiler(query.device):
        for trials in _trials:
            out = trials.attend(query, key, value, *rest)
            if out is not None:
                return out
    return _eager(query, key, value, *rest)


def _has_gpu_compiler(device: torch.device) -> bool:
    return device.type in ("cuda", "xpu")


# ComfyUI on Windows often comes without Triton: nothing to report
_trials = [trial.Trials("triton", "Triton")] if find_spec("triton") is not None else []
_trials += [trial.Trials("cuda", "NVRTC (cuda)"), trial.Trials("nvrtc", "NVRTC (nvrtc)")]
_trials = [trials for trials in _trials if trials.backend not in os.environ.get(trial.LEFT_OUT, "")]

_ATTEND = {
    "auto": _fastest, "reference": _reference, "portable": eager.attend, "eager": _eager,
    "cuda": partial(_demanded, "cuda"), "nvrtc": partial(_demanded, "nvrtc"), "triton": _fused,
}  # fmt: skip
BACKENDS = tuple(_ATTEND)


def _check_mix(lam: float, alpha: float) -> None:
    if not 1.0 <= alpha <= 2.0:
        raise ValueError(f"alpha must lie in [1, 2] (1 is softmax, 2 is sparsemax), not {alpha}")
    if not abs(lam) <= MAX_LAM:
        raise ValueError(f"lam must lie within {-MAX_LAM:g} and {MAX_LAM:g}, not {lam}. The paper uses 2.")


def _check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool) -> None:
    device = query.device
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (batch, heads, length, head_dim), not of shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and query on {device}: move them to one device")
    batch, heads, _, width = query.shape
    key_batch, kv_heads, keys, key_width = key.shape
    if value.shape[:3] != (key_batch, kv_heads, keys):
        raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} differ in batch, heads or length")
    if batch != key_batch:
        raise ValueError(f"query has batch {batch} and key has batch {key_batch}")
    if width != key_width:
        raise ValueError(f"query has head_dim {width} and key has head_dim {key_width}")
    if heads == kv_heads:
        return
    if not enable_gqa:
        raise ValueError(f"query has {heads} heads and key has {kv_heads}: pass enable_gqa=True for grouped heads")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key heads")


def _mix_mask(
    mix_mask: torch.Tensor | None, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor | None:
    if mix_mask is not None and mix_mask.dtype != torch.bool:
        raise ValueError(f"mix_mask must be boolean (True is mixed), not {mix_mask.dtype}")
    return _broadcast("mix_mask", mix_mask, shape, device)


def _broadcast(
    name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor | None:
    if tensor is None:
        return None
    if tensor.device != device:
        # a kernel would read its address, whatever lies there
        raise ValueError(f"{name} is on {tensor.device} and query on {device}: move them to one device")
    try:
        return tensor.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} does not broadcast to {tuple(shape)}") from None
