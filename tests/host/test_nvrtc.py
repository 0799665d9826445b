"""rows.cu in the compiler that it is meant for, which comes with the host's torch; it needs no GPU."""

from __future__ import annotations

import pytest
import torch

from pladis_core.impl import nvrtc

if torch.version.cuda is None:
    pytest.skip("this torch comes without NVRTC", allow_module_level=True)


@pytest.mark.parametrize("capability", ((7, 5), (8, 6), (8, 9), (9, 0), (12, 0)))
def test_it_compiles_for_every_gpu(capability):
    code = nvrtc.compiled(nvrtc.Variant.of(77, 1.5, torch.float16, False, False), capability)
    # an ELF file with both kernels
    assert code.startswith(b"\x7fELF") and b"pladis_rows" in code and b"pladis_scale" in code


@pytest.mark.parametrize(
    ("keys", "alpha", "dtype", "mask", "mix"),
    [
        (1, 1.5, torch.float32, True, True), (77, 2.0, torch.bfloat16, False, False),
        (77, 1.02, torch.float16, False, True), (231, 1.25, torch.bfloat16, True, False),
        (512, 1.5, torch.bfloat16, False, True), (1024, 2.0, torch.float16, True, True),
    ],
)  # fmt: skip
def test_every_variant_compiles(keys, alpha, dtype, mask, mix):
    assert nvrtc.compiled(nvrtc.Variant.of(keys, alpha, dtype, mask, mix), (8, 9)).startswith(b"\x7fELF")


def test_a_compiler_that_does_not_know_the_gpu_says_so():
    with pytest.raises(RuntimeError, match="NVRTC: .*"):
        nvrtc.compiled(nvrtc.Variant.of(77, 1.5, torch.float16, False, False), (99, 9))
