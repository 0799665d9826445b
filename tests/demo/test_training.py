"""The training runs, for a few steps: each goes on after a crash as if there had been none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from demo.train import autoencoder, auxiliary, common, diffusion, export, student
from demo.train.options import Options


class Crash(Exception):
    pass


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(autoencoder, "BATCH", 2)
    monkeypatch.setattr(diffusion, "BATCH", 4)
    monkeypatch.setattr(student, "BATCH", 4)
    monkeypatch.setattr(diffusion, "SCENES", 20)
    # every kind of batch
    monkeypatch.setattr(diffusion, "SHAPES_UNTIL", 1)
    monkeypatch.setattr(diffusion, "RELATIONS_UNTIL", 3)
    for module in (diffusion, student):
        monkeypatch.setattr(module, "sample", lambda options, *_, **__: options.picture("sample", []))
    monkeypatch.setattr(Options, "picture", lambda *_: None)


def options(folder: Path) -> Options:
    return Options(folder, steps=4, seed=3, every=2, device="cpu")


def crash_at_the_first_samples(monkeypatch, run, folder: Path) -> None:
    def crash(*_):
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Options, "picture", crash)
        run(options(folder))


def same(one: Path, other: Path) -> bool:
    saved, again = (torch.load(file, weights_only=True) for file in (one, other))
    assert saved["step"] == again["step"] == 4
    return all(torch.equal(saved["average"][key], again["average"][key]) for key in saved["average"])


@pytest.fixture
def trained(tmp_path) -> Path:
    """A folder with a finished, tiny autoencoder and diffusion run."""
    autoencoder.train(options(tmp_path))
    diffusion.train(options(tmp_path))
    return tmp_path


def test_the_autoencoder_resumes(monkeypatch, tmp_path):
    autoencoder.train(options(tmp_path / "whole"))
    crash_at_the_first_samples(monkeypatch, autoencoder.train, tmp_path / "crashed")
    autoencoder.train(options(tmp_path / "crashed"))
    assert same(tmp_path / "whole" / "autoencoder.pt", tmp_path / "crashed" / "autoencoder.pt")


@pytest.mark.parametrize("name", ["diffusion", "student"])
def test_diffusion_and_student_resume(monkeypatch, trained, name):
    run = {"diffusion": diffusion, "student": student}[name].train
    checkpoint = trained / f"{name}.pt"
    run(options(trained))
    checkpoint.rename(trained / "whole.pt")
    crash_at_the_first_samples(monkeypatch, run, trained)
    run(options(trained))
    assert same(trained / "whole.pt", checkpoint)


def test_normalised_latents_leave_the_pictures_alone(tmp_path):
    torch.manual_seed(0)
    model = autoencoder.autoencoder().eval().requires_grad_(False)
    pictures, _ = common.random_batch(0, 0, 8)
    before = model.decode(model.encode(pictures).latent_dist.mean).sample
    latents = model.encode(pictures).latent_dist
    deviation = latents.std / latents.mean.std((0, 2, 3), keepdim=True)
    autoencoder.normalised(model, options(tmp_path))
    latents = model.encode(pictures).latent_dist
    torch.testing.assert_close(model.decode(latents.mean).sample, before, atol=1e-4, rtol=1e-4)
    assert (latents.mean.std((0, 2, 3)) - 1).abs().max() < 0.2
    torch.testing.assert_close(latents.std.mean(), deviation.mean(), rtol=0.2, atol=0.1)


def test_export_writes_what_the_pipeline_loads(monkeypatch, trained, tmp_path):
    from demo import config
    from demo.pipeline import Pipeline
    from demo.sampling import noise

    student.train(options(trained))
    monkeypatch.setattr(config, "WEIGHTS", tmp_path / "weights")
    export.export(trained)
    for variant in ("standard", "few-step"):
        pipeline = Pipeline(variant)
        assert pipeline.decode(pipeline.latents(["a red ring"], noise(0, 1), steps=2)).shape == (1, 64, 64, 3)


def test_a_batch_depends_on_seed_and_step_alone():
    one, two = common.random_batch(1, 5, 3), common.random_batch(1, 5, 3)
    assert torch.equal(one[0], two[0]) and one[1] == two[1]
    assert not torch.equal(one[0], common.random_batch(1, 6, 3)[0])


def test_the_learning_rate_rises_and_falls_to_0():
    rates = [common.learning_rate(step, 100, 1.0, warm_up=10) for step in range(101)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == 1.0 and rates[-1] < 1e-9
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_directions_are_at_the_words_that_follow_a_relation():
    found = auxiliary.directions("a drawing of a red circle left of a blue square and a green ring")
    named = {number: tuple(row) for number, row in enumerate(found.tolist()) if any(row)}
    # start, a, drawing, of, a, red, circle, left, of, a, blue, square
    assert named == {10: (1.0, 0.0), 11: (1.0, 0.0)}
    assert auxiliary.directions("a red circle above a blue square")[6].tolist() == [0.0, 1.0]
    assert not auxiliary.directions("").any()


def test_the_probes_read_every_text_attention():
    from demo.model import unet

    network = unet()
    probes = auxiliary.Probes(network, 96)
    probes.watch(network)
    captions, text = ["a red circle left of a blue square", ""], torch.randn(2, 24, 96)
    network(torch.randn(2, 4, 16, 16), torch.ones(2), text)
    assert len(probes.entering) == len(probes.leaving) == 7
    assert all(probes.entering[n].shape == probes.leaving[n].shape for n in range(7))
    loss = probes.loss(text, captions)
    loss.backward()
    # the network is taught, not the probes alone
    assert loss > 0 and network.conv_in.weight.grad.abs().sum() > 0


def test_the_side_is_where_the_second_object_lies():
    """x grows to the right, y down: "left of" puts the second object to the right."""
    where = auxiliary._coordinates(torch.zeros(1, 1, 4, 4))
    right = torch.einsum("i,iyx->yx", auxiliary.directions("a red ring left of a blue ring").sum(0) / 2, where)
    below = torch.einsum("i,iyx->yx", auxiliary.directions("a red ring above a blue ring").sum(0) / 2, where)
    assert (right[:, 3] == 1).all() and (right[:, 0] == -1).all()
    assert (below[3] == 1).all() and (below[0] == -1).all()
