"""The kernel for NVIDIA's tensor cores, with no GPU: fused.cu compiled by g++, its threads as fibers of a CPU.

What a CPU cannot show: NVIDIA's own instructions (tensor_cores.cuh), the driver's launch.
"""

from __future__ import annotations

import logging
import mmap
from functools import cache
from itertools import pairwise

import pytest
import torch
from test_attention import definition
from test_entmax import clusters, oracle
from test_triton import assert_as_good_as_naive, mixed_in_part
from warps_on_cpu import built, needs_gcc, nothing_in_new_tensors, run  # noqa: F401

from pladis_core import api, pladis_attention, pladis_correction
from pladis_core.impl import cuda, eager, trial

LOOP = """
extern "C" bool attention_on_cpu(int blocks, const half_t* query, const half_t* key, const half_t* value, half_t* out,
                                 const float* mask, const unsigned char* mixed, const float* mass, Problem sizes) {
    kernel = [=] { pladis_attention(query, key, value, out, mask, mixed, mass, sizes); };
    for (int block = 0; block < blocks; ++block)
        if (!run_block(block, WARPS * 32)) return false;
    return true;
}
"""
# (B, H, Hkv, Lq, Lk, D, Dv)
SHAPES = {
    "sdxl": (2, 2, 2, 20, 77, 64, 64),
    "sd15": (1, 2, 2, 35, 77, 40, 40),
    "sd15 wide": (1, 1, 1, 17, 77, 160, 160),
    "grouped": (1, 4, 2, 17, 7, 8, 24),
    "one key": (2, 1, 1, 3, 1, 16, 16),
    "sixteen keys": (1, 1, 1, 33, 16, 16, 16),
    "two prompts": (1, 2, 2, 33, 154, 40, 40),
    "pixart": (1, 1, 1, 65, 300, 72, 72),
    "flux": (1, 1, 1, 40, 512, 128, 128),
    "ltx": (1, 1, 1, 20, 1000, 64, 64),
}

pytestmark = needs_gcc


class OnCpu(cuda.Kernel):
    """A variant, on CPU tensors."""

    def __init__(self, variant: cuda.Variant, folder) -> None:
        name = "-".join(map(str, variant))
        self._loops = built(folder, name, variant.definitions, cuda.SOURCES[-1].read_text(), LOOP)

    def launch(self, blocks, tensors, problem) -> None:
        run(self._loops.attention_on_cpu, blocks, tensors, problem)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")

    @cache
    def made(device, variant):
        return OnCpu(variant, folder)

    return made


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch, kernels):
    """The backend takes CPU tensors."""
    monkeypatch.setattr(cuda, "kernel_of", kernels)
    taken = cuda.unusable

    def unusable(query, key, value):
        reason = taken(query, key, value)
        return None if reason == "it is for NVIDIA GPUs, not for cpu tensors" else reason

    monkeypatch.setattr(cuda, "unusable", unusable)


def tensors(shape, dtype=torch.float16):
    """As hosts lay them out: heads behind positions."""
    batch, heads, kv_heads, queries, keys, width, value_width = SHAPES[shape]
    sizes = (queries, heads, width), (keys, kv_heads, width), (keys, kv_heads, value_width)
    return tuple(torch.randn(batch, *size).to(dtype).transpose(1, 2) for size in sizes)


def attend(query, key, value, mask=None, part=None, alpha=1.5, dense=-1.0, sparse=2.0, mass=None, row_lse=None):
    assert cuda.unusable(query, key, value) is None
    return cuda.attend(
        query, key, value, mask, part, query.shape[-1] ** -0.5, alpha, dense, sparse, mass, row_lse
    )


def assert_close(out, expected, roundings=4.0):
    """To within so many roundings of the largest value."""
    allowed = roundings * torch.finfo(out.dtype).eps * expected.abs().max().item()
    assert (out.double() - expected).abs().max() <= allowed


@pytest.mark.parametrize(
    ("shape", "alpha", "dtype"),
    [
        ("sdxl", 1.0, "float16"), ("sdxl", 1.002, "bfloat16"), ("sdxl", 1.0001, "float16"), ("sdxl", 1.02, "float16"),
        ("sdxl", 1.25, "float16"), ("sdxl", 1.9, "bfloat16"), ("sdxl", 1.5, "float16"), ("sdxl", 1.5, "bfloat16"),
        ("sdxl", 2.0, "float16"), ("sdxl", 2.0, "bfloat16"), ("sd15", 1.5, "float16"), ("sd15 wide", 1.5, "float16"),
        ("grouped", 1.5, "float16"), ("one key", 1.5, "float16"), ("sixteen keys", 2.0, "float16"),
        ("two prompts", 1.5, "bfloat16"), ("pixart", 1.5, "bfloat16"), ("flux", 1.5, "bfloat16"),
        ("flux", 2.0, "float16"), ("ltx", 1.5, "bfloat16"),
    ],
)  # fmt: skip
def test_every_alpha_shape_and_dtype(shape, alpha, dtype):
    query, key, value = tensors(shape, getattr(torch, dtype))
    out = pladis_attention(query, key, value, alpha=alpha, enable_gqa=True, backend="cuda")
    assert_as_good_as_naive(out, query, key, value, alpha=alpha)
