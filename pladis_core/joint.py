"""PLADIS on a part of longer attention rows (joint attention): text columns are remixed, their softmax mass stays.

With m the mass that a row's softmax puts on its text keys, their weights become
m * [(1 - lam) * softmax(S_text) + lam * entmax(S_text)], and every other weight stays. So the dense output needs only

    lam * m * (entmax(S_text) - softmax(S_text)) @ V_text,      m = exp(LSE(S_text) - LSE(S))

added. LSE(S) comes free with a kernel that returns it beside its output (`attention_with_lse`); beside any other
attention it costs a pass over the scores (`log_sum_exp`).
"""

from __future__ import annotations

import logging
import math

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from .api import pladis_correction
from .impl.common import additive_mask, compute_dtype, wants_grad
from .impl.trial import is_broken

LOGGER = logging.getLogger(__name__)

# scores of one chunk of the portable pass
CHUNK_ELEMENTS = 1 << 22
# columns of the value that the CUDA kernel carries along where only the log-sum-exp is wanted
NARROW = 8
# NVIDIA's major compute capabilities (Hopper, data-centre Blackwell) whose products of matrices are of a kind that the
# memory-efficient kernel does not use
WIDE_PRODUCTS = (9, 10)


def joint_correction(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    row_lse: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    *,
    lam: float = 2.0,
    alpha: float = 1.5,
    copies: int = 1,
    mix_mask: torch.Tensor | None = None,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """What to add onto the dense output of rows that hold more than these keys.

    Args:
        query: (B, H, Lq, D), the rows to change.
        key, value: (B, Hkv, Lt, D[v]), the text columns alone.
        row_lse: (B, H, Lq, 1), log-sum-exp of the whole row's scaled and masked scores.
        attn_mask: the mask of these columns, broadcastable to (B, H, Lq, Lt).
        copies: how often the row holds these columns, one after the other (hosts pad by repeating).
        Others: as in `pladis_attention`.

    Returns:
        (B, H, Lq, Dv) in query's dtype.
    """
    return pladis_correction(
        query, key, value, attn_mask, scale, lam=lam, alpha=alpha, row_lse=row_lse - math.log(copies),
        mix_mask=mix_mask, enable_gqa=enable_gqa, backend=backend,
    )  # fmt: skip


def attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    *,
    enable_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What `scaled_dot_product_attention` computes, by the kernel that it would pick, and the rows' log-sum-exp.

    Returns:
        (B, H, Lq, D) in query's dtype and (B, H, Lq, 1) in float32 or wider, both differentiable; None where that
        kernel returns no log-sum-exp (another device, its mathematical fallback) or no gradient (of a mask).
    """
    if wants_grad(attn_mask):
        return None
    key, value = _repeated(query, key, value) if enable_gqa else (key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    attn_mask = _kernel_mask(attn_mask, query, key)
    result = _by_kernel(query, key, value, attn_mask, scale)
    if result is None or not wants_grad(query, key, value):
        return result
    # the kernel keeps its output for the backward pass, and callers write into theirs
    return result[0].clone(), _with_gradient(result[1], query, key, attn_mask, scale)


def _by_kernel(query, key, value, attn_mask, scale) -> tuple[torch.Tensor, torch.Tensor] | None:
    if query.device.type == "cpu":
        if not query.shape[-1] == key.shape[-1] == value.shape[-1]:
            return None
        return _flash_for_cpu(query, key, value, attn_mask, scale)
    if query.device.type != "cuda":
        return None
    kernel = _CUDA_KERNELS.get(torch._fused_sdp_choice(query, key, value, attn_mask, 0.0, False, scale=scale))
    return None if kernel is None else kernel(query, key, value, attn_mask, scale)


def _flash_for_cpu(query, key, value, attn_mask, scale) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=attn_mask, scale=scale
    )
    return out, lse.unsqueeze(-1)


def log_sum_exp(
    query: torch.Tensor,
    key: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    *,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """log sum exp of every row's scaled and masked scores: (B, H, Lq, 1), float32 or wider.

    CPU: the flash kernel on the keys as values. CUDA: so too where it has instructions that the memory-efficient kernel
    does not use, elsewhere that one with `NARROW` value columns, which is about the half of its attention. Other
    devices, and where a mask wants a gradient: chunked scores.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    (key,) = _repeated(query, key) if enable_gqa else (key,)
    if wants_grad(attn_mask):
        return _chunked_lse(query, key, attn_mask, scale)
    with torch.no_grad():
        if query.device.type == "cpu":
            lse = _flash_for_cpu(query, key, key, _kernel_mask(attn_mask, query, key), scale)[1]
        elif query.device.type == "cuda" and query.dtype != torch.float64:
            lse = _lse_on_cuda(query, key, attn_mask, scale)
        else:
            lse = _chunked_lse(query, key, attn_mask, scale)
    return _with_gradient(lse, query, key, attn_mask, scale)


def _lse_on_cuda(query, key, attn_mask, scale) -> torch.Tensor:
    # measured on an H200: the narrow kernel takes 3.5 times as long as the whole attention that cuDNN computes
    wide = torch.version.hip is None and torch.cuda.get_device_capability(query.device)[0] in WIDE_PRODUCTS
    if wide and query.dtype != torch.float32:
        whole = _by_kernel(query, key, key, _kernel_mask(attn_mask, query, key), scale)
        if whole is not None:
            return whole[1]
    return _narrow_lse(query, key, attn_mask, scale)


def _narrow_lse(query, key, attn_mask, scale) -> torch.Tensor:
    """By the memory-efficient kernel with `NARROW` value columns; in chunks on devices where it refuses them, as
    AMD's or an old card's may."""
    if query.device not in _no_narrow_kernel:
        try:
            return _efficient(query, key, key[..., :NARROW], _kernel_mask(attn_mask, query, key), scale)[1]
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if is_broken(error):
                raise
            _no_narrow_kernel.add(query.device)
            LOGGER.warning(
                "PLADIS: no attention kernel of torch gives %s its log-sum-exp (%s): same images, slower.",
                query.device, next(iter(str(error).splitlines()), ""),
            )  # fmt: skip
    return _chunked_lse(query, key, attn_mask, scale)


_no_narrow_kernel: set[torch.device] = set()


def _with_gradient(lse, query, key, mask, scale) -> torch.Tensor:
    """lse with its gradient in query and key: kernels return it without one."""
    if not wants_grad(query, key):
        return lse
    return _LogSumExp.apply(lse, query, key, _kernel_mask(mask, query, key), scale)


class _LogSumExp(torch.autograd.Function):
    """d lse / dS is softmax(S), and attention kernels multiply by that, and by its transpose on their way back."""

    @staticmethod
    def forward(ctx, lse, query, key, mask, scale):
        ctx.save_for_backward(query, key, mask)
        ctx.scale = scale
        return lse.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, mask = ctx.saved_tensors
        values = key.detach().requires_grad_()
        grad = (grad * ctx.scale).to(query.dtype)
        with torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
            average = scaled_dot_product_attention(query.detach(), key.detach(), values, mask, scale=ctx.scale)
            (of_key,) = torch.autograd.grad(average, values, grad * query)
        return None, grad * average.detach(), of_key, None, None


def _chunked_lse(query, key, attn_mask, scale) -> torch.Tensor:
    dtype = compute_dtype(query.dtype)
    batch, heads, rows, _ = query.shape
    step = max(1, CHUNK_ELEMENTS // (batch * heads * max(key.shape[-2], 1)))
    mask = None if attn_mask is None else attn_mask.expand(batch, heads, rows, key.shape[-2])
    parts = []
    for start in range(0, rows, step):
        part = slice(start, start + step)
        scores = query[:, :, part].to(dtype) @ key.to(dtype).mT * scale
        if mask is not None:
            scores += additive_mask(mask[:, :, part], dtype)
            # the log-sum-exp of nothing but -inf has no slope
            scores.clamp_(min=torch.finfo(dtype).min)
        parts.append(scores.logsumexp(-1, keepdim=True))
    return torch.cat(parts, -2)


def _repeated(query, *tensors):
    """Each key head once for every query head of its group."""
    groups = query.shape[1] // tensors[0].shape[1]
    return tuple(t.repeat_interleave(groups, 1) if groups > 1 else t for t in tensors)


def _kernel_mask(mask, query, key):
    """An additive mask in query's dtype, broadcastable with four dimensions."""
    if mask is None:
        return None
    mask = additive_mask(mask, query.dtype) if mask.dtype == torch.bool else mask.to(query.dtype)
    mask = mask[(None,) * (4 - mask.ndim)]
    if query.device.type == "cpu":
        return mask
    # the memory-efficient kernel reads rows that are aligned to 16 elements
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 16))
    return padded[..., : mask.shape[-1]].expand(*query.shape[:3], key.shape[-2])


def _flash(query, key, value, mask, scale):
    if query.shape[-1] % 8:
        return None
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, False, scale=scale)
    return out, lse[:, :, : query.shape[2], None]


def _efficient(query, key, value, mask, scale):
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, True, 0.0, False, scale=scale
    )
    return out, lse[:, :, : query.shape[2], None]


def _cudnn(query, key, value, mask, scale):
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, mask, True, 0.0, False, False, scale=scale
    )
    return out, lse.reshape(*query.shape[:3], 1)


# torch.nn.attention.SDPBackend, as torch._fused_sdp_choice counts
_CUDA_KERNELS = {1: _flash, 2: _efficient, 3: _cudnn}
