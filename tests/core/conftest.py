from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # before Triton is imported: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
