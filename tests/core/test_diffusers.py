"""PLADIS in diffusers' own networks, against the equation, written in the place of every text attention."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.nn import functional

pytest.importorskip("diffusers")
import entmax as entmax_package  # noqa: E402

from diffusers_models import CASES, IMAGE, TEXT, network, of_flux, places, unet  # noqa: E402
from pladis_core.diffusers import apply_pladis  # noqa: E402

DENSE = functional.scaled_dot_product_attention


def equation(query, key, value, mask, scale, text, image, lam, alpha) -> torch.Tensor:
    """eq. 11 in float64, on the text's keys, whose softmax mass stays; rows that are not the image's are dense."""
    query, key, value = (t.double() for t in (query, key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9) if mask.dtype == torch.bool else scores + mask.double()
    dense = scores.softmax(-1)
    of_text = scores.masked_fill(~text, -1e9)
    sparse = entmax_package.entmax_bisect(of_text, alpha, -1, n_iter=100)
    mixed = ((1 - lam) * of_text.softmax(-1) + lam * sparse) * (dense * text).sum(-1, keepdim=True)
    return torch.where(text & image, mixed, dense) @ value


class ByHand:
    """torch's attention, but the equation where text is; counts those."""

    def __init__(self, row: str | None, lam: float, alpha: float, cap: float = 0.0, mixed: torch.Tensor | None = None):
        self.row, self.lam, self.alpha, self.cap, self.mixed, self.texts = row, lam, alpha, cap, mixed, 0

    def __call__(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **others):
        dense = DENSE(query, key, value, attn_mask, scale=scale, **others)
        place = places(self.row, query.shape[0], query.shape[2], key.shape[2])
        if place is None:
            return dense
        self.texts += 1
        text, image = place
        if self.mixed is not None:
            # (B, 1, 1, Lk): what is not mixed is as any key that is no text
            of_text = text[0, 0, 0]
            text = torch.zeros(text.shape, dtype=torch.bool)
            text[:, 0, 0, of_text] = self.mixed
        out = equation(query, key, value, attn_mask, scale, text, image, self.lam, self.alpha)
        if self.cap:
            length = self.cap * dense.norm(dim=-1, keepdim=True).double()
            capped = out * (length / out.norm(dim=-1, keepdim=True)).clamp(max=1.0)
            out = torch.where(place[1], capped, out)
        return out.to(query.dtype)


@torch.no_grad()
def run(model, inputs) -> torch.Tensor:
    torch.manual_seed(1)
    return model(**inputs, return_dict=False)[0]


def by_hand(
    monkeypatch, model, inputs, row=None, lam=2.0, alpha=1.5, cap=0.0, mixed=None
) -> tuple[torch.Tensor, int]:
    with monkeypatch.context() as patch:
        attention = ByHand(row, lam, alpha, cap, mixed)
        patch.setattr(functional, "scaled_dot_product_attention", attention)
        return run(model, inputs), attention.texts


@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("name", CASES)
def test_every_text_attention_is_the_equation(name, batch, monkeypatch):
    model, case = network(name), CASES[name]
    inputs = case.inputs(batch)
    dense = run(model, inputs)
    expected, texts = by_hand(monkeypatch, model, inputs, case.row)
    assert texts == case.texts
    with apply_pladis(model) as handle:
        out = run(model, inputs)
        handle.lam = 0.0
        assert torch.equal(run(model, inputs), dense)
    assert len(handle.layers) == texts
    changed = (out - dense).abs().max()
    assert (out - expected).abs().max() <= 1e-3 * changed
    assert changed > 1e-3 * dense.abs().max()
    assert torch.equal(run(model, inputs), dense)


@pytest.mark.parametrize("name", ("SDXL", "PixArt", "Flux", "Lumina 2"))
@pytest.mark.parametrize("lam, alpha, cap", ((1.0, 2.0, 0.0), (-1.5, 1.25, 0.0), (3.0, 1.5, 1.1)))
def test_other_settings(name, lam, alpha, cap, monkeypatch):
    model, case = network(name), CASES[name]
    inputs = case.inputs(2)
    expected, _ = by_hand(monkeypatch, model, inputs, case.row, lam, alpha, cap)
    with apply_pladis(model, lam, alpha, norm_cap=cap):
        torch.testing.assert_close(run(model, inputs), expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("cap", (0.0, 1.1))
@pytest.mark.parametrize("name", ("SDXL", "PixArt", "Flux", "SD3"))
def test_some_of_the_texts_tokens(name, cap, monkeypatch):
    model, case = network(name), CASES[name]
    inputs = case.inputs(2)
    mixed = torch.tensor([[0, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    expected, _ = by_hand(monkeypatch, model, inputs, case.row, cap=cap, mixed=mixed)
    with apply_pladis(model, norm_cap=cap) as handle:
        of_all = run(model, inputs)
        handle.mix_mask = mixed
        tolerance = 1e-3 * float((of_all - expected).abs().max())
        assert tolerance > 1e-7
        torch.testing.assert_close(run(model, inputs), expected, atol=tolerance, rtol=0)
        handle.mix_mask = None
        assert torch.equal(run(model, inputs), of_all)
        for wrong in (mixed.float(), mixed[0]):
            with pytest.raises(ValueError, match="mix_mask must be boolean"):
                handle.mix_mask = wrong
        handle.mix_mask = mixed[:, 1:]
        with pytest.raises(ValueError, match="mix_mask"):
            run(model, inputs)


@pytest.mark.parametrize("name", ("PixArt", "Qwen-Image", "Lumina 2"))
def test_a_prompt_does_not_feel_the_other_ones_length(name):
    model = network(name)
    both = CASES[name].inputs(2)
    alone = {key: value[:1] if isinstance(value, (torch.Tensor, list)) else value for key, value in both.items()}
    with apply_pladis(model):
        torch.testing.assert_close(run(model, both)[:1], run(model, alone), atol=2e-4, rtol=1e-4)


def test_lam_may_be_set_between_steps(monkeypatch):
    model, inputs = network("SD 1.x"), CASES["SD 1.x"].inputs(2)
    handle = apply_pladis(model)
    for lam in (2.0, 0.5, 0.0):
        handle.lam = lam
        expected, _ = by_hand_without(handle, monkeypatch, model, inputs, lam)
        torch.testing.assert_close(run(model, inputs), expected, atol=1e-4, rtol=1e-4)
    handle.remove()
    handle.remove()


def by_hand_without(handle, monkeypatch, model, inputs, lam):
    """PLADIS takes the function that its own module imported, so that both can be there."""
    now, handle.lam = handle.lam, 0.0
    try:
        return by_hand(monkeypatch, model, inputs, None, lam)
    finally:
        handle.lam = now


def test_layers_are_chosen_by_pattern():
    model = network("SD 1.x")
    of_all = apply_pladis(model)
    of_all.remove()
    with apply_pladis(model, layers="down + up") as handle:
        assert handle.layers == [path for path in of_all.layers if not path.startswith("mid_block")]
    with apply_pladis(model, layers=["mid_block.*", "up_blocks.*"]) as handle:
        assert {path.split(".")[0] for path in handle.layers} == {"mid_block", "up_blocks"}
    with pytest.raises(ValueError, match="fits none of the text attentions"):
        apply_pladis(model, layers="middle")


@torch.no_grad()
def test_an_ip_adapters_pictures_stay_as_they_are(monkeypatch):
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

    model, inputs = network("SD 1.x"), CASES["SD 1.x"].inputs(2)
    processors = {}
    for path in model.attn_processors:
        attention = model.get_submodule(path.removesuffix(".processor"))
        width = attention.to_q.in_features
        # as many tokens as the text has
        adapter = IPAdapterAttnProcessor2_0(width, 12, num_tokens=(TEXT,), scale=0.7)
        processors[path] = adapter if ".attn2." in path else AttnProcessor2_0()
    model.set_attn_processor(processors)
    texts = inputs["encoder_hidden_states"]
    model.encoder_hid_proj, model.config.encoder_hid_dim_type = lambda images: images, "ip_image_proj"
    inputs["added_cond_kwargs"] = {"image_embeds": [torch.randn(2, TEXT, 12)]}

    class First(ByHand):
        """The first of two calls with the same keys."""

        def __call__(self, query, key, value, *args, **kwargs):
            if key.shape[2] == TEXT:
                self.seen = getattr(self, "seen", 0) + 1
                if self.seen % 2 == 0:
                    return DENSE(query, key, value, **kwargs)
            return super().__call__(query, key, value, *args, **kwargs)

    with monkeypatch.context() as patch:
        attention = First(None, 2.0, 1.5)
        patch.setattr(functional, "scaled_dot_product_attention", attention)
        expected = run(model, inputs)
    assert attention.texts == 4 and attention.seen == 8 and texts.shape[1] == TEXT
    with apply_pladis(model):
        torch.testing.assert_close(run(model, inputs), expected, atol=1e-4, rtol=1e-4)


def test_perturbed_attention_guidance_keeps_its_processors(monkeypatch):
    """Both its ordinary and its perturbed rows, which have a mask, hold text."""
    from diffusers.models.attention_processor import PAGJointAttnProcessor2_0

    model, inputs = network("SD3"), CASES["SD3"].inputs(2)
    ordinary = model.attn_processors
    model.set_attn_processor(
        {path: PAGJointAttnProcessor2_0() if ".attn." in path else own for path, own in ordinary.items()}
    )
    expected, texts = by_hand(monkeypatch, model, inputs, CASES["SD3"].row)
    assert texts == 4
    with apply_pladis(model):
        torch.testing.assert_close(run(model, inputs), expected, atol=1e-4, rtol=1e-4)


def test_other_threads_and_functions_notice_nothing():
    model, inputs = network("Flux"), CASES["Flux"].inputs(1)
    dense, inside, outside = run(model, inputs), [], []
    attention = next(module for path, module in model.named_modules() if path.endswith(".to_q"))
    other = network("SD 1.x")
    of_other = CASES["SD 1.x"].inputs(1)
    expected = run(other, of_other)

    def meanwhile(module, args):
        if not inside:
            inside.append(functional.scaled_dot_product_attention is DENSE)
            thread = threading.Thread(target=lambda: outside.append(run(other, of_other)))
            thread.start()
            thread.join()

    attention.register_forward_pre_hook(meanwhile)
    with apply_pladis(model):
        assert not torch.equal(run(model, inputs), dense)
    assert inside == [True] and torch.equal(outside[0], expected)


def test_an_error_inside_leaves_nothing_behind():
    model, inputs = network("Flux"), CASES["Flux"].inputs(1)
    dense = run(model, inputs)

    def fail(*_):
        raise KeyError("broken")

    with apply_pladis(model):
        hook = model.single_transformer_blocks[1].attn.to_k.register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            run(model, inputs)
        hook.remove()
        assert torch._C._len_torch_function_stack() == 0
        assert not torch.equal(run(model, inputs), dense)
    assert torch.equal(run(model, inputs), dense)


def test_what_is_not_known_is_an_error_that_names_it():
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.models.attention_processor import SlicedAttnProcessor

    with pytest.raises(ValueError, match="does not know where a AutoencoderKL attends to text"):
        apply_pladis(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4))
    model = unet()
    model.set_attention_slice("max")
    with pytest.raises(ValueError, match="SlicedAttnProcessor of down_blocks.*disable_attention_slicing"):
        apply_pladis(model)
    model = unet()
    with apply_pladis(model):
        model.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(SlicedAttnProcessor(1))
        with pytest.raises(ValueError, match="SlicedAttnProcessor of mid_block"):
            run(model, CASES["SD 1.x"].inputs(1))
    added = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=12, attention_head_dim=4,
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )  # fmt: skip
    with pytest.raises(ValueError, match="no text attention of its own"):
        apply_pladis(added)
    with pytest.raises(ValueError, match="what a object has"):
        apply_pladis(object())
    for options, message in (({"alpha": 3}, "alpha must"), ({"lam": torch.inf}, "lam must"), ({"norm_cap": -1}, "cap")):
        with pytest.raises(ValueError, match=message):
            apply_pladis(unet(), **options)


def test_twice_is_an_error_once_removed_it_is_not():
    model = unet()
    with apply_pladis(model), pytest.raises(ValueError, match="PLADIS is on this UNet2DConditionModel already"):
        apply_pladis(model)
    apply_pladis(model).remove()


def test_an_attention_backend_that_goes_past_torch_is_an_error(monkeypatch):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    def elsewhere(query, key, value, **_):
        return query

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName.SAGE, elsewhere)
    monkeypatch.setitem(_AttentionBackendRegistry._constraints, AttentionBackendName.SAGE, [])
    model, inputs = network("Wan"), CASES["Wan"].inputs(1)
    for module in model.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = AttentionBackendName.SAGE
    with apply_pladis(model) as handle:
        with pytest.raises(RuntimeError, match="WanAttnProcessor of blocks.0.attn2 did not call.*backend: sage"):
            run(model, inputs)
        handle.lam = 0.0
        run(model, inputs)


def test_a_row_that_does_not_add_up_is_an_error():
    model = network("Flux")
    inputs = of_flux(1, pooled_projections=torch.randn(1, 8))
    block = model.transformer_blocks[0]

    def lengthen(module, args, kwargs):
        kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"].repeat(1, 2, 1)
        kwargs["image_rotary_emb"] = None
        return args, kwargs

    block.register_forward_pre_hook(lengthen, with_kwargs=True)
    with apply_pladis(model), pytest.raises(RuntimeError, match=f"Rows of {TEXT + IMAGE} tokens were expected"):
        run(model, inputs)


def test_a_gradient_goes_through():
    model, inputs = network("SD3"), CASES["SD3"].inputs(1)
    inputs["encoder_hidden_states"].requires_grad_()
    with apply_pladis(model):
        model(**inputs, return_dict=False)[0].square().sum().backward()
    assert inputs["encoder_hidden_states"].grad.abs().sum() > 0


def test_a_compiled_network_is_not_left_behind():
    """Compiled code does not look at hooks: PLADIS must be seen by what was compiled before, too."""
    model, inputs = network("Flux"), CASES["Flux"].inputs(1)
    dense = run(model, inputs)
    with apply_pladis(model):
        expected = run(model, inputs)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(run(compiled, inputs), dense)
    with apply_pladis(model) as handle:
        torch.testing.assert_close(run(compiled, inputs), expected)
        handle.lam = 0.0
        torch.testing.assert_close(run(compiled, inputs), dense)
    torch.testing.assert_close(run(compiled, inputs), dense)
    with apply_pladis(compiled) as handle:
        assert len(handle.layers) == 3


def sdxl_pipeline():
    import diffusers

    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=vae, unet=network("SDXL"), scheduler=diffusers.EulerDiscreteScheduler(), **parts
    )
    pooled = {f"{sign}pooled_prompt_embeds": torch.randn(1, 12) for sign in ("", "negative_")}
    return pipeline, {**pooled, **{f"{sign}prompt_embeds": torch.randn(1, TEXT, 12) for sign in ("", "negative_")}}


def flux_pipeline():
    import diffusers

    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = diffusers.FluxPipeline(
        transformer=network("Flux"), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **parts
    )
    prompt = {"prompt_embeds": torch.randn(1, TEXT, 12), "pooled_prompt_embeds": torch.randn(1, 8)}
    return pipeline, {**prompt, "height": 64, "width": 64}


def sana_pipeline():
    import diffusers

    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipeline = diffusers.SanaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=network("SANA"), scheduler=scheduler
    )
    mask = torch.tensor([[1] * 4 + [0] * 3])
    masks = {f"{sign}prompt_attention_mask": mask for sign in ("", "negative_")}
    prompts = {f"{sign}prompt_embeds": torch.randn(1, TEXT, 12) for sign in ("", "negative_")}
    return pipeline, {**masks, **prompts, "negative_prompt": None, "use_resolution_binning": False,
                      "height": 256, "width": 256}  # fmt: skip


def wan_pipeline():
    import diffusers

    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipeline = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, boundary_ratio=0.5,
        transformer=network("Wan"), transformer_2=network("Wan"),
    )  # fmt: skip
    prompts = {f"{sign}prompt_embeds": torch.randn(1, TEXT, 12) for sign in ("", "negative_")}
    return pipeline, {**prompts, "height": 64, "width": 64, "num_frames": 5}


@pytest.mark.parametrize("made", (sdxl_pipeline, flux_pipeline, sana_pipeline, wan_pipeline))
def test_in_a_pipeline_and_a_callback_turns_it_off(made):
    pipeline, inputs = made()
    pipeline.set_progress_bar_config(disable=True)
    lams = []

    def generate(**options):
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            **inputs, **options, num_inference_steps=3, output_type="latent", generator=generator, return_dict=False
        )[0]

    def turn_off(pipeline, step, timestep, tensors):
        lams.append(handle.lam)
        handle.lam = 0.0 if step else handle.lam
        return tensors

    dense = generate()
    with apply_pladis(pipeline) as handle:
        whole = generate()
        two_steps = generate(callback_on_step_end=turn_off)
        assert torch.equal(generate(), dense)
    assert lams == [2.0, 2.0, 0.0]
    assert not torch.equal(whole, dense) and not torch.equal(two_steps, dense) and not torch.equal(whole, two_steps)
    assert torch.equal(generate(), dense)
