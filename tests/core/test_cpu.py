"""The compiled loop: its weights on the rows of test_entmax, and machines on which it cannot be compiled."""

from __future__ import annotations

import logging
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_attention import definition
from test_entmax import ALPHAS, cliffs, clusters, edges, hard_scores, oracle

from pladis_core import pladis_attention, prepare
from pladis_core.impl import cpu

pytestmark = pytest.mark.skipif(cpu.compiled_loop() is None, reason="no GCC here: the portable backend serves")


@pytest.fixture
def not_compiled_yet(monkeypatch, tmp_path):
    """The place where it is to be kept."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    cpu.compiled_loop.cache_clear()
    yield tmp_path / "pladis"
    cpu.compiled_loop.cache_clear()


def weights_of(scores: torch.Tensor, alpha: float, lam: float = 1.0) -> torch.Tensor:
    """What the loop does to rows of scores: unit keys and values let them through."""
    identity = torch.eye(scores.shape[-1])[None, None]
    return pladis_attention(scores[None, None], identity, identity, scale=1.0, lam=lam, alpha=alpha, backend="eager")[
        0, 0
    ]


@pytest.mark.parametrize("keys", (1, 2, 7, 63, 77, 154, 600))
@pytest.mark.parametrize("alpha", (*ALPHAS, 1.0025, 1.03, 1.051, 1.4, 1.6, 1.9, 1.999))
def test_weights_match_the_entmax_package(alpha, keys):
    scores = hard_scores(240, keys)
    assert (weights_of(scores, alpha) - oracle(scores, alpha)).abs().max() <= 1e-6
    mixed = 2 * oracle(scores, alpha) - scores.double().softmax(-1)
    assert (weights_of(scores, alpha, 2.0) - mixed).abs().max() <= 2e-6


@pytest.mark.parametrize("keys", (20, 77, 600))
@pytest.mark.parametrize("alpha", (1.03, 1.06, 1.25, 1.5, 1.7, 1.95, 2.0))
def test_one_peak_over_a_cluster_of_nearly_equal_scores(alpha, keys):
    for scores in clusters(alpha, keys):
        assert (weights_of(scores, alpha) - oracle(scores, alpha)).abs().max() <= 1e-6


@pytest.mark.parametrize("keys", (20, 77, 300))
@pytest.mark.parametrize("alpha", (1.5, 1.9, 1.99, 2.0))
def test_a_cluster_where_entmax_prunes(alpha, keys):
    """A last step is not solved more finely than to two roundings, which every key may err by."""
    scores = cliffs(alpha, keys)
    assert (weights_of(scores, alpha) - oracle(scores, alpha)).abs().max() <= 2 * keys * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("keys", (40, 77, 300))
@pytest.mark.parametrize("peaks", (1, 2, 5, 17))
def test_ties_at_the_edge_of_sparsemax_come_in_by_no_more_than_their_weight(peaks, keys):
    scores = edges(keys, peaks)
    assert (weights_of(scores, 2.0) - oracle(scores, 2.0)).abs().max() <= 2e-6


@pytest.mark.parametrize("alpha", (1.36, 1.4, 1.45, 1.49))
def test_a_long_row_just_above_where_entmax_prunes(alpha):
    """There the polynomial of the first steps is below 0, and its sum over so many keys too."""
    scores = torch.full((8, 3000), -(1 - 1e-4) / (alpha - 1))
    scores[:, :2] = torch.tensor([0.0, -0.5])
    assert (weights_of(scores, alpha) - oracle(scores, alpha)).abs().max() <= 2e-6


@pytest.mark.parametrize("alpha", ALPHAS)
def test_pruned_keys_get_exactly_nothing(alpha):
    scores = hard_scores(240, 77)
    weights = weights_of(scores, alpha)
    assert (weights >= 0).all()
    if alpha >= 1.5:
        assert (weights == 0).any()


@pytest.mark.parametrize("queries", (1, 5, 23, 24, 25, 48, 49, 1000))
@pytest.mark.parametrize("keys", (1, 3, 4, 5, 127, 128, 129, 513))
def test_edges_of_tiles_and_slabs(queries, keys):
    query, key, value = torch.randn(1, 2, queries, 20), torch.randn(1, 2, keys, 20), torch.randn(1, 2, keys, 33)
    out = pladis_attention(query, key, value, backend="eager")
    torch.testing.assert_close(out.double(), definition(query, key, value), atol=1e-5, rtol=0)


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_nan_is_not_hidden(alpha):
    """A black image says that something overflowed; a plausible one would not."""
    query, key, value = (torch.randn(1, 1, n, 16) for n in (40, 77, 77))
    query[0, 0, 7, 3] = torch.nan
    out = pladis_attention(query, key, value, alpha=alpha, backend="eager")
    assert out[0, 0, 7].isnan().all()
    assert out[0, 0, :7].isfinite().all()
    assert out[0, 0, 8:].isfinite().all()


@pytest.mark.parametrize("alpha", (1.003, 1.03, 1.1, 1.25, 1.3, 1.6, 1.9))
def test_the_polynomial_of_the_first_steps_is_near_the_power(alpha):
    squarings, coefficients = cpu.solver(alpha, 77)[-2:]
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)
    power = x * sum(c * x ** (2**squarings * i) for i, c in enumerate(reversed(coefficients)))
    assert (power - x ** (1 / (alpha - 1))).abs().max() <= 1e-3


def test_threads_do_not_change_a_bit():
    query, key, value = (torch.randn(2, 3, n, 40) for n in (500, 77, 77))
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(pladis_attention(query, key, value, backend="eager"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_compiler_with_options(not_compiled_yet, monkeypatch):
    monkeypatch.setenv("CXX", "env g++ -w")
    assert cpu.compiled_loop() is not None


def test_without_a_compiler_nothing_is_said(not_compiled_yet, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    inputs = [torch.randn(1, 2, n, 16) for n in (40, 77, 77)]
    out = pladis_attention(*inputs, backend="eager")
    assert cpu.compiled_loop() is None
    assert torch.equal(out, pladis_attention(*inputs, backend="portable"))
    assert not caplog.records


def test_a_compiler_that_fails_is_reported_once(not_compiled_yet, monkeypatch, caplog, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'cannot find as' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    inputs = [torch.randn(1, 2, n, 16) for n in (40, 77, 77)]
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            out = pladis_attention(*inputs)
    assert torch.equal(out, pladis_attention(*inputs, backend="portable"))
    assert [record.message for record in caplog.records] == [
        f"PLADIS: {compiler} cannot compile its CPU loop (cannot find as): same images, slower."
    ]


def test_without_any_folder(not_compiled_yet, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(cpu.tempfile, "TemporaryDirectory", full)
    inputs = [torch.randn(1, 2, n, 16) for n in (40, 77, 77)]
    out = pladis_attention(*inputs, backend="eager")
    assert torch.equal(out, pladis_attention(*inputs, backend="portable"))
    assert "No usable temporary directory" in caplog.text


@pytest.fixture
def compilations(monkeypatch):
    """The commands that made a library."""
    made, run = [], subprocess.run

    def counted(command, **options):
        made.extend([command] * (str(cpu.SOURCE) in command))
        return run(command, **options)

    monkeypatch.setattr(cpu.subprocess, "run", counted)
    return made


@pytest.fixture
def small_source(monkeypatch, tmp_path):
    """Compiled in a moment."""
    source = tmp_path / "small.cpp"
    functions = ("long pladis_columns() { return 7; }", "int pladis_attend(void *) { return 1; }")
    source.write_text("\n".join(f'extern "C" {function}' for function in functions))
    monkeypatch.setattr(cpu, "SOURCE", source)


def start_again():
    cpu.compiled_loop.cache_clear()
    return cpu.compiled_loop()


def test_the_next_start_finds_it_again_and_says_where(
    not_compiled_yet, small_source, compilations, caplog, monkeypatch
):
    with caplog.at_level(logging.INFO):
        assert cpu.compiled_loop() is not None
        assert start_again() is not None
    (kept,) = not_compiled_yet.iterdir()
    assert len(compilations) == 1
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert f"kept in {kept} (PLADIS_CPU_LOOP=0 turns it off)" in caplog.records[1].message
    # another compiler, another processor
    monkeypatch.setenv("CXX", "g++ -w")
    assert start_again() is not None
    monkeypatch.setattr(cpu, "_processor", lambda: "another")
    assert start_again() is not None
    assert len(compilations) == len(list(not_compiled_yet.iterdir())) == 3


def test_what_is_kept_and_broken_is_made_again(not_compiled_yet, small_source, compilations):
    assert cpu.compiled_loop() is not None
    (kept,) = not_compiled_yet.iterdir()
    kept.unlink()
    kept.write_text("half a library")
    assert start_again() is not None
    assert len(compilations) == 2


def test_several_at_once_do_not_disturb_each_other(not_compiled_yet, small_source):
    command = cpu._compiler()
    with ThreadPoolExecutor(3) as pool:
        loops = list(pool.map(lambda _: cpu._kept_or_compiled(command)[0], range(3)))
    assert [loop.pladis_columns() for loop in loops] == [7, 7, 7]
    assert [path.suffix for path in not_compiled_yet.iterdir()] == [".so"]


def test_a_folder_that_cannot_be_written_to(not_compiled_yet, small_source, caplog):
    not_compiled_yet.write_text("a file in its place")
    with caplog.at_level(logging.INFO):
        assert cpu.compiled_loop() is not None
    assert "not kept, as" in caplog.text


def test_it_can_be_turned_off(not_compiled_yet, monkeypatch, caplog, compilations):
    monkeypatch.setenv("PLADIS_CPU_LOOP", "0")
    inputs = [torch.randn(1, 2, n, 16) for n in (40, 77, 77)]
    with caplog.at_level(logging.INFO):
        out = pladis_attention(*inputs)
    assert torch.equal(out, pladis_attention(*inputs, backend="portable"))
    assert not compilations
    assert [record.message for record in caplog.records] == [
        "PLADIS: its CPU loop is off (PLADIS_CPU_LOOP=0): same images, slower."
    ]


def test_a_command_with_an_open_quotation(not_compiled_yet, monkeypatch, caplog):
    monkeypatch.setenv("CXX", 'g++ "-w')
    assert cpu.compiled_loop() is None
    (record,) = caplog.records
    assert 'CXX=g++ "-w cannot compile its CPU loop (No closing quotation)' in record.message


def test_it_is_compiled_before_the_first_step(not_compiled_yet, compilations):
    prepare(torch.device("cuda"))
    assert not compilations
    prepare("cpu")
    assert len(compilations) == 1
    pladis_attention(*(torch.randn(1, 2, n, 16) for n in (40, 77, 77)))
    assert len(compilations) == 1


@pytest.mark.parametrize("alpha", (1 + 1e-12, 1 + 1e-9, 1 + 1e-8, 1 + 1e-7, 1 + 1e-5))
def test_alpha_just_above_one_is_softmax(alpha):
    scores = torch.randn(50, 77) * 3
    assert (weights_of(scores, alpha, 2.0) - scores.double().softmax(-1)).abs().max() <= 1e-4


def test_inside_torch_compile_the_portable_backend_serves():
    inputs = [torch.randn(1, 2, n, 16) for n in (40, 77, 77)]
    compiled = torch.compile(lambda q, k, v: pladis_attention(q * 1, k, v, backend="eager") * 2, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(*inputs), pladis_attention(*inputs, backend="portable") * 2)


def test_tensors_without_storage_go_another_way():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        out = pladis_attention(*(torch.randn(1, 2, n, 16) for n in (40, 77, 77)), backend="eager")
    assert out.shape == (1, 2, 40, 16)


def test_a_compiler_that_hangs_is_given_up(not_compiled_yet, monkeypatch, caplog):
    def hang(*args, **kwargs):
        raise subprocess.TimeoutExpired("g++", 120)

    monkeypatch.setattr(cpu.subprocess, "run", hang)
    with caplog.at_level(logging.WARNING):
        assert cpu.compiled_loop() is None
    assert "timed out" in caplog.text
