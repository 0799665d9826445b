"""rows.cu and fused.cu in the compiler that they are meant for, which comes with the host's torch; it needs no GPU."""

from __future__ import annotations

import json

import ptx
import pytest
import torch

from pladis_core.impl import cuda, nvrtc
from pladis_pack.benchmarks import nvrtc_cost

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


RECORD = json.loads(nvrtc_cost.RECORD.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((8, 6), torch.float16), ((8, 9), torch.bfloat16),
     ((9, 0), torch.bfloat16), ((10, 0), torch.float16), ((12, 0), torch.bfloat16)],
)  # fmt: skip
def test_the_fused_kernel_compiles_for_every_gpu(capability, dtype):
    variant = fused_variant(77, 64, dtype, 1.5)
    code = cuda.compiled(variant, capability)
    assert code.startswith(b"\x7fELF") and cuda.KERNEL.encode() in code


@pytest.mark.parametrize(
    ("keys", "width", "dtype", "alpha", "options"),
    [
        (1, 8, torch.float16, 1.0, {}), (77, 40, torch.float16, 2.0, {"mask": True, "mass": 1}),
        (154, 128, torch.bfloat16, 1.25, {"mix": True}), (300, 72, torch.bfloat16, 1.5, {"mask": True, "mix": True}),
        (512, 128, torch.bfloat16, 1.002, {"mass": 2}), (1000, 128, torch.float16, 2.0, {"mask": True, "mix": True}),
        (400, 16, torch.float16, 1.5, {}),
    ],
)  # fmt: skip
def test_every_variant_of_the_fused_kernel_compiles(keys, width, dtype, alpha, options):
    variant = fused_variant(keys, width, dtype, alpha, **options)
    assert cuda.compiled(variant, (8, 9)).startswith(b"\x7fELF")


def fused_variant(keys, width, dtype, alpha, mask=False, mix=False, mass=0):
    shapes = torch.Size((1, 1, 64, width)), torch.Size((1, 1, keys, width))
    return cuda.variant_of(*shapes, dtype, width**-0.5, alpha, -1.0, 2.0, mask, mix, mass)


class Interpreted(cuda.Kernel):
    """What NVRTC makes of a variant, instruction by instruction, on CPU tensors."""

    def __init__(self, variant: cuda.Variant, architecture: int) -> None:
        text = variant.definitions + "".join(source.read_text() for source in cuda.SOURCES)
        self._code = ptx.instructions(ptx.ptx_of(text, "fused.cu", architecture, cuda.OPTIONS))
        self._variant, self.shared_bytes = variant, variant.shared_bytes

    def launch(self, blocks, tensors, problem) -> None:
        threads = self._variant.warps * cuda.LANES
        ptx.launch(*self._code, blocks, threads, tensors, bytes(problem), self.shared_bytes)


# of a scale below 0 and of lambdas that make another kernel
TURNED, BETWEEN = {"flip": True}, {"unit": False}


@pytest.mark.parametrize(
    ("architecture", "keys", "width", "alpha", "options", "changes"),
    [
        # the RTX 20 series, whose products are smaller and whose copies wait
        (75, 77, 64, 1.5, {}, {}), (75, 77, 40, 2.0, {"mask": True}, {}), (75, 512, 128, 1.5, {"mix": True}, {}),
        (80, 77, 64, 1.5, {}, {}), (80, 77, 64, 2.0, {}, BETWEEN), (80, 77, 64, 1.25, {}, {}),
        (80, 77, 64, 1.002, {}, {}), (80, 77, 40, 1.5, {"mask": True, "mass": 1}, {}), (80, 77, 160, 1.5, {}, TURNED),
        (80, 1, 8, 1.5, {"mass": 2}, {}), (80, 154, 64, 1.5, {"mix": True, "mass": 2}, {}),
        (80, 300, 72, 1.5, {"mask": True, "mix": True}, {}), (80, 512, 128, 1.5, {}, {}),
        (80, 400, 16, 2.0, {}, {}), (80, 1000, 64, 1.5, {"mask": True}, {}), (90, 77, 64, 1.5, {}, {}),
    ],
)  # fmt: skip
def test_its_instructions_come_to_the_equation(architecture, keys, width, alpha, options, changes):
    """As before the first use on a GPU; and no address is outside of the tensors, or of the shared memory asked for."""
    dtype = torch.float16 if architecture == 75 else torch.bfloat16
    variant = fused_variant(keys, width, dtype, alpha, **options)._replace(**changes)
    cuda.check(Interpreted(variant, architecture), torch.device("cpu"), variant)


def test_what_a_gpu_would_fault_at_is_found():
    variant = fused_variant(77, 64, torch.bfloat16, 1.5)
    kernel = Interpreted(variant, 80)
    # the last 16 are of columns that keep banks apart
    kernel.shared_bytes -= 32
    with pytest.raises(ptx.Fault, match="outside of shared memory"):
        cuda.check(kernel, torch.device("cpu"), variant)
    kernel = Interpreted(variant, 80)
    tensors = [torch.zeros(1, 2, rows, 64).bfloat16() for rows in (20, 77, 77, 20)]
    launch = kernel.launch

    def with_one_key_fewer(blocks, tensors, problem):
        query, key, *rest = tensors
        launch(blocks, (query, key[:, :, :-1].clone(), *rest), problem)

    kernel.launch = with_one_key_fewer
    with pytest.raises(ptx.Fault, match="outside of tensor 2"):
        cuda._attend(lambda *_: kernel, *tensors[:3], None, None, 0.125, 1.5, -1.0, 2.0, None, None)


@pytest.mark.skipif(torch.version.cuda != RECORD["cuda"], reason=f"recorded with CUDA {RECORD['cuda']}")
@pytest.mark.parametrize("name", ("sm_75 77x64 fp16 1.5", "sm_90 77x64 bf16 1.5", "sm_90 512x128 bf16 1.5"))
def test_no_row_of_the_fused_kernel_is_worse_than_recorded(name):
    case = next(case for case in nvrtc_cost.cases() if str(case) == f"fused {name}")
    assert nvrtc_cost.worse(nvrtc_cost.measure(case), RECORD["rows"][str(case)]) is None


def test_what_is_recorded_is_every_row_and_none_of_them_spills():
    fused = {str(case): case for case in nvrtc_cost.cases() if case.kernel == "fused"}
    assert set(RECORD["rows"]) == set(fused)
    assert [name for name, row in RECORD["rows"].items() if row["stack_bytes"]] == []
