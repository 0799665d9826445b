"""PLADIS in the attention calls that a text module makes while it runs, in this thread alone.

A torch function mode sees every call of scaled_dot_product_attention between entering and leaving the module: those of
its own processor, with their masks. Modes belong to a thread, and nothing is put in any function's place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ..api import pladis_attention, pladis_correction
from ..cap import add_capped
from ..impl.common import additive_mask
from ..joint import attention_with_lse, joint_correction, log_sum_exp
from .families import Row


class Settings(NamedTuple):
    lam: float
    alpha: float
    norm_cap: float
    mix_mask: torch.Tensor | None = None


class TextAttention(TorchFunctionMode):
    """While it is entered, the text attention among this thread's attention calls is PLADIS.

    Args:
        row: what joint rows are made of; None where text has an attention of its own.
        text_call: of cross-attention, which of the module's calls attends to text; the others are to pictures.
    """

    def __init__(self, settings: Settings, row: Row | None = None, text_call: int = 0):
        super().__init__()
        self.settings, self.row, self.text_call = settings, row, text_call
        self.calls = self.reached = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        return self._attention(*args, **kwargs)

    def _attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ) -> torch.Tensor:
        """query (B, H, Lq, D), key and value (B, Hkv, Lk, D[v]), as torch's."""
        others = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}

        def dense():
            return scaled_dot_product_attention(query, key, value, attn_mask, **others)

        if not self._is_text(query.shape[2], key.shape[2]):
            return dense()
        if is_causal or dropout_p:
            raise ValueError(f"PLADIS: a text attention is causal ({is_causal}) or has dropout ({dropout_p})")
        self.reached += 1
        if attn_mask is not None:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
        arguments = (dense, query, key, value, attn_mask, scale, enable_gqa)
        return self._whole_rows(*arguments) if self.row is None else self._joint(self.row, *arguments)

    def _is_text(self, queries: int, keys: int) -> bool:
        if self.row is None:
            return self.calls == self.text_call + 1
        # an attention of the image alone, or to a picture's keys, is shorter
        return queries == keys == self.row.length

    def _whole_rows(self, dense, query, key, value, mask, scale, gqa) -> torch.Tensor:
        lam, alpha, cap, _ = self.settings
        options = {"lam": lam, "alpha": alpha, "mix_mask": self._mix_mask(key), "enable_gqa": gqa}
        if not cap:
            return pladis_attention(query, key, value, mask, scale, **options)
        return add_capped(dense(), pladis_correction(query, key, value, mask, scale, **options), cap)

    def _joint(self, row: Row, dense, query, key, value, mask, scale, gqa) -> torch.Tensor:
        lam, alpha, cap, _ = self.settings
        text, image = row.text, row.image
        lengths = None if row.lengths is None else row.lengths.to(query.device)[:, None, None, None]
        with_lse = attention_with_lse(query, key, value, mask, scale, enable_gqa=gqa)
        queries, rows_mask = query[:, :, image], _rows_of(mask, image)
        if with_lse is None:
            out, lse = dense(), log_sum_exp(queries, key, rows_mask, scale, enable_gqa=gqa)
        else:
            out, lse = with_lse[0], with_lse[1][:, :, image]
        text_mask = None if rows_mask is None else rows_mask[..., text]
        if lengths is not None:
            text_mask = _and(text_mask, _text_columns(row, lengths), query.dtype)
        correction = joint_correction(
            queries, key[:, :, text], value[:, :, text], lse, text_mask, scale, lam=lam, alpha=alpha,
            mix_mask=self._mix_mask(key), enable_gqa=gqa,
        )  # fmt: skip
        if lengths is not None:
            # the longer prompts' text is not the image's
            correction = correction.masked_fill(~_image_rows(row, lengths), 0.0)
        kept = out[:, :, image]
        out[:, :, image] = add_capped(kept, correction, cap) if cap else kept + correction
        return out

    def _mix_mask(self, key: torch.Tensor) -> torch.Tensor | None:
        """On the keys' device, where it stays."""
        mix_mask = self.settings.mix_mask
        if mix_mask is not None and mix_mask.device != key.device:
            self.settings = self.settings._replace(mix_mask=mix_mask.to(key.device))
        return self.settings.mix_mask


def _text_columns(row: Row, lengths: torch.Tensor) -> torch.Tensor:
    """(B, 1, 1, Lt): which columns are text of this prompt; lengths (B, 1, 1, 1)."""
    return torch.arange(row.text.stop, device=lengths.device) < lengths


def _image_rows(row: Row, lengths: torch.Tensor) -> torch.Tensor:
    """(B, 1, Lq, 1): which of the rows in `image` are not text of this prompt; lengths (B, 1, 1, 1)."""
    return torch.arange(row.image.start, row.length, device=lengths.device)[:, None] >= lengths


def _rows_of(mask: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]


def _and(mask: torch.Tensor | None, columns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask is None:
        return columns
    return mask & columns if mask.dtype == torch.bool else mask + additive_mask(columns, dtype)
