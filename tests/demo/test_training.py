"""The training runs, for a few steps: each goes on after a stop or a crash as if there had been none."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from demo import config
from demo.model import autoencoder as new_autoencoder
from demo.model import text_encoder as new_text_encoder
from demo.model import unet
from demo.scenes import draw, random_scene
from demo.train import __main__ as command
from demo.train import autoencoder, checks, common, diffusion, export, sink, student, text
from demo.train.options import NOISES, Options
from demo.vocabulary import END, TOKENS

PHASES = {
    "autoencoder": (autoencoder.train, "autoencoder.pt"),
    "text_encoder": (text.train, "text_encoder.pt"),
    "base": (diffusion.train_base, "base.pt"),
    "noise": (lambda options: diffusion.train_noise(options, 0.15), "noise15-3.pt"),
    "sink": (lambda options: diffusion.train_sink(options, 0.15), "sink-3.pt"),
    "student": (student.train, "student-3.pt"),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(autoencoder, "BATCH", 2)
    monkeypatch.setattr(text, "BATCH", 5)
    monkeypatch.setattr(diffusion, "BATCH", {"small": 4})
    monkeypatch.setattr(diffusion, "SCENES", 20)
    for module in (diffusion, student):
        monkeypatch.setattr(module, "sample", lambda options, *_, **__: options.picture("sample", []))
    monkeypatch.setattr(Options, "picture", lambda *_: None)


def options(folder: Path, steps: int = 4, seed: int = 3) -> Options:
    return Options(folder, steps=steps, seed=seed, every=2, device="cpu")


@pytest.fixture
def trained(tmp_path) -> Path:
    """A folder with what the later phases begin with, hardly trained."""
    torch.manual_seed(0)
    save_file(new_autoencoder().state_dict(), tmp_path / "autoencoder.safetensors")
    save_file(new_text_encoder().state_dict(), tmp_path / "text_encoder.safetensors")
    for phase in ("base", "noise"):
        PHASES[phase][0](options(tmp_path))
    return tmp_path


def same(one: Path, other: Path) -> bool:
    saved, again = (torch.load(file, weights_only=True) for file in (one, other))
    assert saved["step"] == again["step"] == 4
    return all(torch.equal(saved["average"][key], again["average"][key]) for key in saved["average"])


@pytest.mark.parametrize("phase", PHASES)
def test_a_stopped_phase_goes_on_as_if_it_had_not_been(monkeypatch, trained, phase):
    run, name = PHASES[phase]
    (trained / name).unlink(missing_ok=True)
    run(options(trained))
    (trained / name).rename(trained / "whole.pt")
    descend = common.Run.descend

    def told_to_stop(self, step, *others, **shown):
        descend(self, step, *others, **shown)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="after step 3 of 4"):
        patch.setattr(common.Run, "descend", told_to_stop)
        run(options(trained))
    assert torch.load(trained / name, weights_only=True)["step"] == 3
    run(options(trained))
    assert same(trained / "whole.pt", trained / name)


def test_a_crashed_phase_goes_on_from_its_last_samples(monkeypatch, trained):
    run, name = PHASES["student"]
    run(options(trained))
    (trained / name).rename(trained / "whole.pt")

    def crash(*_):
        raise RuntimeError

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(Options, "picture", crash)
        run(options(trained))
    run(options(trained))
    assert same(trained / "whole.pt", trained / name)


def test_a_file_ends_a_run_too(trained):
    (trained / "STOP").touch()
    (trained / "base.pt").unlink()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="after step 1 of 4"):
        diffusion.train_base(options(trained))
    # the program's own handlers are back
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_dial_is_turned_from_the_finished_base_alone(trained):
    (trained / "base.pt").unlink()
    diffusion.train_base(options(trained, steps=2))
    saved = torch.load(trained / "base.pt", weights_only=True)
    torch.save(saved | {"steps": 4}, trained / "base.pt")
    with pytest.raises(ValueError, match="base.pt is at step 2 of 4"):
        diffusion.train_noise(options(trained, seed=4), 0.3)


def test_one_command_runs_every_phase_in_order(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(command, "run", lambda phase, options: ran.append((phase, options.seed, options.steps)))
    monkeypatch.setattr("sys.argv", ["demo.train", "--seeds", "0", "1", "--folder", str(tmp_path)])
    command.main()
    assert [phase for phase, seed, _ in ran if seed == 0] == list(command.PHASES)
    assert ran[-1][:2] == ("export", 1) and all(steps for phase, _, steps in ran if phase not in ("checks", "export"))


def test_an_unknown_phase_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo.train", "dreaming"])
    with pytest.raises(SystemExit):
        command.main()
    assert "no phase is called dreaming" in capsys.readouterr().err


def test_normalised_latents_leave_the_pictures_alone(tmp_path):
    torch.manual_seed(0)
    model = new_autoencoder().eval().requires_grad_(False)
    pictures = autoencoder.pictures(0, 0)
    before = model.decode(model.encode(pictures).latent_dist.mean).sample
    latents = model.encode(pictures).latent_dist
    deviation = latents.std / latents.mean.std((0, 2, 3), keepdim=True)
    autoencoder.normalised(model, options(tmp_path))
    latents = model.encode(pictures).latent_dist
    torch.testing.assert_close(model.decode(latents.mean).sample, before, atol=1e-4, rtol=1e-4)
    assert (latents.mean.std((0, 2, 3)) - 1).abs().max() < 0.3
    torch.testing.assert_close(latents.std.mean(), deviation.mean(), rtol=0.3, atol=0.1)


def test_export_writes_what_the_pipeline_loads(monkeypatch, trained, tmp_path):
    from demo.pipeline import Pipeline
    from demo.sampling import noise

    for phase in ("base", "noise", "student"):
        for file in trained.glob("*-3.pt"):
            file.rename(file.with_name(file.name.replace("-3", "-0")))
        PHASES[phase][0](options(trained, seed=0))
    monkeypatch.setattr(config, "WEIGHTS", tmp_path / "weights")
    export.export(options(trained, seed=1))
    assert not config.WEIGHTS.exists()
    export.export(options(trained, seed=0))
    for variant in ("standard", "few-step"):
        pipeline = Pipeline(variant)
        assert pipeline.decode(pipeline.latents(["a red bar"], noise(0, 1), steps=2)).shape == (1, 64, 64, 3)


def test_a_batch_depends_on_stream_and_step_alone(trained):
    scenes = diffusion.Scenes(options(trained), 0.15)
    one, two, other = (scenes.batch(*place) for place in (((1, 4), 5), ((1, 4), 5), ((1, 4), 6)))
    assert torch.equal(one[0], two[0]) and one[1] == two[1] and not torch.equal(one[0], other[0])
    assert torch.equal(torch.randn(3, generator=one[2]), torch.randn(3, generator=two[2]))


def test_every_share_of_mistakes_differs_in_its_captions_alone(monkeypatch, trained):
    monkeypatch.setattr(diffusion, "BATCH", {"small": 32})
    batches = [diffusion.Scenes(options(trained), noise).batch((0, 4), 0) for noise in NOISES]
    assert all(torch.equal(batch[0], batches[0][0]) for batch in batches)
    assert len({float(torch.rand((), generator=batch[2])) for batch in batches}) == 1
    assert len({tuple(batch[1]) for batch in batches}) == len(NOISES)


def test_the_learning_rate_rises_and_falls_to_0():
    rates = [common.learning_rate(step, 100, 1.0, warm_up=10) for step in range(101)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == 1.0 and rates[-1] < 1e-9
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_the_text_encoder_learns_which_picture_a_caption_is_of(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BATCH", 10)
    torch.manual_seed(0)
    model = text.Contrast("small")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    tokens, pictures = text.batch(0, 0)
    losses = []
    for _ in range(100):
        loss = torch.nn.functional.cross_entropy(model(tokens, pictures), torch.arange(10))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    # what is cut off behind the longest caption changes nothing: attention is causal
    padding = torch.full((10, config.TEXT_ENCODER["max_position_embeddings"] - tokens.shape[1]), TOKENS[END])
    whole = model.text(torch.cat((tokens, padding), 1))
    assert whole.last_hidden_state.shape == (10, 77, 96)
    torch.testing.assert_close(whole.pooler_output, model.text(tokens).pooler_output)


def test_the_oracle_is_checked_attribute_by_attribute():
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(40)]
    pictures = [draw(scene) for scene in scenes]
    assert set(checks.accuracy(scenes, pictures).values()) <= {1.0, 0.0}
    # black ink where another colour was
    black = [np.where((picture < 255).any(-1, keepdims=True), np.uint8(25), picture) for picture in pictures]
    shares = checks.accuracy(scenes, black)
    assert shares["colour"] < 0.3 and shares["seen"] > 0.8


def test_masses_of_the_text_attention_add_up():
    torch.manual_seed(0)
    network, encoder = unet().eval(), new_text_encoder().eval()
    before = network.attn_processors
    masses = sink.sink(network, encoder, count=3, steps=1)
    assert len(masses) == 6 and network.attn_processors == before
    for parts in masses.values():
        assert 1 < parts.pop("effective tokens") <= 77
        assert sum(parts.values()) == pytest.approx(1, abs=1e-4)


def test_the_penalty_makes_the_start_token_a_sink():
    torch.manual_seed(0)
    network = unet()
    penalty = sink.Penalty(network)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    latents, text_states = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 96)
    missed = []
    for _ in range(25):
        network(latents, torch.ones(2), text_states)
        loss = penalty.take()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        missed.append(loss.item())
    assert missed[0] == pytest.approx((sink.MASS - 1 / 77) ** 2, abs=0.05) and missed[-1] < 0.2 * missed[0]
