"""The day on a GPU, as far as it goes without one: every stage runs, and finds a kernel that is wrong."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu

ARGS = SimpleNamespace(small=True, repeats=2, shapes=None, jobs=1)
CPU = torch.device("cpu")


def test_every_stage_runs_and_is_written(tmp_path, monkeypatch):
    file = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "CASES", gpu.CASES[:4])
    monkeypatch.setattr(sys, "argv", ["gpu", *gpu.STAGES, "--small", "--repeats", "2", "--json", str(file)])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    torch.set_grad_enabled(True)
    assert end.value.code == 0
    found = json.loads(file.read_text())
    assert found["small"] and found["machine"]["device"].startswith("cpu")
    stages = found["stages"]
    assert list(stages) == ["correct", "calls", "operator", "tiles", "joint"]
    assert all(stage["rows"] for stage in stages.values())
    assert not any(row.get("wrong") for stage in stages.values() for row in stage["rows"])
    baselines = [row for row in stages["operator"]["rows"] if row["what"] == "sdpa"]
    assert len(baselines) == 2 * len(gpu.SMALL) and all(row["to sdpa"] == [1.0, 1.0, 1.0] for row in baselines)


def test_other_tiles_than_the_tables_are_launched_and_the_table_is_put_back():
    backend = pytest.importorskip("pladis_core.impl.triton", reason="no Triton on this system")
    problem = (4096, 512, 128, torch.bfloat16)
    candidates = gpu.tile_candidates(*problem, CPU)
    assert len(set(candidates.values())) == len(candidates) > 5
    before = backend.configuration(*problem)
    for tile, warps in candidates.values():
        with gpu.tiled(tile, warps):
            equation = 0.1, 1.5, -1.0, 2.0, None, False, 0
            chosen = backend.plan(*problem[:3], 128, torch.bfloat16, *equation, 90, 0, False, True)
            assert chosen.tile == tile and chosen.options["num_warps"] == warps
    assert backend.configuration(*problem) == before == candidates["table"]


def test_its_own_oracle_is_the_packages():
    from entmax import entmax_bisect, sparsemax

    scores = torch.randn(20, 77, dtype=torch.float64) * 3
    torch.testing.assert_close(gpu.entmax64(scores, 2.0), sparsemax(scores, -1))
    torch.testing.assert_close(gpu.entmax64(scores, 1.5), entmax_bisect(scores, 1.5, n_iter=80))
    assert (gpu.entmax64(torch.full((1, 5), -torch.inf, dtype=torch.float64), 1.5) == 0).all()


@pytest.mark.parametrize("how", ("off by a hundredth", "masked rows", "raises"))
def test_a_kernel_that_is_wrong_is_called_so(monkeypatch, how):
    exact = gpu.pladis_attention

    def wrong(query, key, value, mask, **options):
        if how == "raises":
            raise RuntimeError("an illegal instruction")
        out = exact(query, key, value, mask, **options)
        if how == "masked rows":
            out[:, :, 5] = 1e-3
        return out * 1.01 if how.startswith("off") else out

    monkeypatch.setattr(gpu, "pladis_attention", wrong)
    monkeypatch.setattr(gpu, "CASES", [(77, 64, "float32", 1.5, "boolean")])
    assert [row["wrong"] for row in gpu.correct(CPU, ARGS)] == [True]
