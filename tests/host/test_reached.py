"""It ran, or it says so: stand-ins for what other packs do to a model, a dozen lines each, in both orders of the nodes.

The real packs are in test_peers.py and test_more_peers.py, where checkouts are given.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import sys
import threading
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import comfy.ldm.pixart.blocks
import comfy.ldm.wan.model
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from function_calls import functions_called

import families
import tiny
from graph import run_node
from pladis_pack.nodes.hosting import find_target, receipt, running, wrappers
from pladis_pack.nodes.hosting.handed import Handed
from pladis_pack.nodes.hosting.roads import unet as unet_road
from pladis_pack.nodes.hosting.settings import Settings
from pladis_pack.nodes.hosting.suspects import advice, pack_of
from tiny import apply

SAME, CHANGED = 1e-4, 1e-3
FLUX, WAN = families.BY_NAME["Flux.1"], families.BY_NAME["Wan 2.1 T2V"]
SMALL = {"num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1], "transformer_depth_middle": 1,
         "transformer_depth_output": [1, 1]}  # fmt: skip


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture
def unet():
    """Each test swaps parts of its own."""
    return tiny.patcher(**SMALL)


@pytest.fixture
def flux():
    return families.patcher(FLUX)


@pytest.fixture
def wan():
    return families.patcher(WAN)


def both_orders(model, patch, **settings):
    return {"node first": patch(apply(model, **settings)), "pack first": apply(patch(model), **settings)}


# ---- taken hold of


class Wrapped(torch.nn.Module):
    """A network inside a module of a pack, under a name of that pack's."""

    def __init__(self, network):
        super().__init__()
        self.inner_thing = network

    def forward(self, *args, **kwargs):
        return self.inner_thing(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner_thing"), name)


def wrap_network(model):
    model = model.clone()
    model.add_object_patch("diffusion_model", Wrapped(model.model.diffusion_model))
    return model


@pytest.mark.parametrize("name", ("unet", "flux", "wan"))
@pytest.mark.parametrize("order", ("node first", "pack first"))
@pytest.mark.parametrize("force_unknown", (False, True))
def test_a_network_inside_another_module(request, name, order, force_unknown):
    """force_unknown never sees a network that the table knows, whatever it is wrapped in."""
    model = request.getfixturevalue(name)
    sample = tiny.sample if name == "unet" else lambda m: families.sample(m, FLUX if name == "flux" else WAN)
    expected = sample(apply(model))
    patched = both_orders(model, wrap_network, force_unknown=force_unknown)[order]
    assert relative(sample(patched), expected) < SAME


def test_a_class_that_is_swapped_after_the_node(flux):
    """As RES4LYF does when the model is loaded; the pack's class tells nothing of the host's."""
    network = flux.model.diffusion_model
    expected = families.sample(apply(flux), FLUX)
    unheard = type("Unheard", (torch.nn.Module,), {
        k: v
        for c in reversed(Flux.__mro__[:-2])
        for k, v in vars(c).items()
        if k not in ("__dict__", "__weakref__")
    })  # fmt: skip
    model = apply(flux)
    network.__class__ = unheard
    assert torch.equal(families.sample(model, FLUX), expected)
    # and wired again while the class is another
    assert torch.equal(families.sample(apply(flux, scale=2.0), FLUX), expected)


def test_a_packs_subclass_and_a_copy_of_a_host_class_are_known():
    for name in ("some_pack.nodes.MyFlux", "custom_nodes/Some-Pack.comfy.ldm.flux.model.Flux"):
        model = families.patcher(FLUX)
        expected = families.sample(apply(model), FLUX)
        module, _, qualified = name.rpartition(".")
        copy_of = name.endswith("comfy.ldm.flux.model.Flux")
        bases = (torch.nn.Module,) if copy_of else (Flux,)
        body = {k: v for k, v in vars(Flux).items() if copy_of and k not in ("__dict__", "__weakref__")}
        model.model.diffusion_model.__class__ = type(qualified, bases, {**body, "__module__": module})
        assert torch.equal(families.sample(apply(model), FLUX), expected)


def swap_blocks(model):
    """As WaveSpeed does around each model call: the block lists become one module that runs the old blocks."""

    def wrapper(apply_model, args):
        network = model.model.diffusion_model
        double, single = network.double_blocks, network.single_blocks

        class All(torch.nn.Module):
            def forward(self, img, txt, vec, pe, attn_mask=None, transformer_options=None, **kwargs):
                for block in double:
                    img, txt = block(img=img, txt=txt, vec=vec, pe=pe, attn_mask=attn_mask,
                                     transformer_options=transformer_options)  # fmt: skip
                return img, txt

        network.double_blocks = torch.nn.ModuleList([All()])
        try:
            return apply_model(args["input"], args["timestep"], **args["c"])
        finally:
            network.double_blocks, network.single_blocks = double, single

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


@pytest.mark.parametrize("order", ("node first", "pack first"))
def test_block_lists_that_are_swapped_before_the_model_call(flux, order):
    expected = families.sample(apply(flux), FLUX)
    assert relative(families.sample(both_orders(flux, swap_blocks)[order], FLUX), expected) < SAME


def drop_wrappers(*kinds):
    """As BrushNet does with `wrappers.update`: what other packs had there is gone."""

    def patch(model):
        model = model.clone()
        model.wrappers.update({kind: {None: [lambda executor, *a, **k: executor(*a, **k)]} for kind in kinds})
        return model

    return patch


@pytest.mark.parametrize("kinds", (
    (WrappersMP.APPLY_MODEL,), (WrappersMP.APPLY_MODEL, WrappersMP.OUTER_SAMPLE), (WrappersMP.CALC_COND_BATCH,),
    (WrappersMP.APPLY_MODEL, WrappersMP.CALC_COND_BATCH),
))  # fmt: skip
@pytest.mark.parametrize("order", ("node first", "pack first"))
def test_wrappers_that_another_pack_drops(unet, kinds, order, said):
    expected = tiny.sample(apply(unet))
    for times in (1, 2):
        said.clear()
        assert relative(tiny.sample(both_orders(unet, drop_wrappers(*kinds))[order]), expected) < SAME
        # the steps are the sampler's only where the outermost wrapper is there
        drop = drop_wrappers(*kinds)
        tiny.sample(drop(with_id(unet)) if order == "node first" else with_id(drop(unet)))
        ((_, words),) = said
        counted = order == "node first" and WrappersMP.OUTER_SAMPLE in kinds
        assert words.startswith("4 of 4 text layers in 2 of 2 " + ("model calls" if counted else "steps")), times


def test_nothing_reached_is_an_error_without_the_outermost_wrapper_too(wan):
    patched = drop_wrappers(WrappersMP.APPLY_MODEL, WrappersMP.OUTER_SAMPLE)(apply(attend_past_everything(wan)))
    with pytest.raises(RuntimeError, match="none of its 2 text layers"):
        families.sample(patched, WAN, steps=4, cfg=1.0)


def test_all_wrappers_dropped_stops_the_run(unet):
    kinds = (WrappersMP.APPLY_MODEL, WrappersMP.CALC_COND_BATCH, WrappersMP.OUTER_SAMPLE)
    with pytest.raises(RuntimeError, match="took Apply PLADIS off this model.*next to the sampler"):
        tiny.sample(drop_wrappers(*kinds)(apply(unet)))
    assert tiny.sample(apply(drop_wrappers(*kinds)(unet))).isfinite().all()


# ---- handed nothing


def forget_options(model):
    """As TeaCache does: a forward of the pack's hands the blocks no transformer_options."""

    def forward_orig(self, x, t, context, *args, **kwargs):
        kept = [block.forward for block in self.blocks]
        for block in self.blocks:
            block.forward = lambda *a, _f=block.forward, transformer_options=None, **k: _f(*a, **k)
        try:
            return type(self).forward_orig(self, x, t, context, *args, **kwargs)
        finally:
            for block, forward in zip(self.blocks, kept, strict=True):
                block.forward = forward

    model = model.clone()
    model.add_object_patch("diffusion_model.forward_orig", forward_orig.__get__(model.model.diffusion_model))
    return model


@pytest.mark.parametrize("order", ("node first", "pack first"))
def test_blocks_that_get_no_options(wan, order):
    expected = families.sample(apply(wan), WAN)
    assert relative(families.sample(both_orders(wan, forget_options)[order], WAN), expected) < SAME


class DirectAttention(torch.nn.Module):
    """A cross-attention of a pack that takes no options and calls the host's function by its own name for it."""

    def __init__(self, host):
        super().__init__()
        self.host = host

    def forward(self, x, context, **kwargs):
        q, k = self.host.norm_q(self.host.q(x)), self.host.norm_k(self.host.k(context))
        return self.host.o(my_attention(q, k, self.host.v(context), heads=self.host.num_heads))


my_attention = optimized_attention


class TorchAttention(DirectAttention):
    """One that calls torch itself: out of reach of every hook of the host's, so the node must say it."""

    def forward(self, x, context, **kwargs):
        q, k, v = self.host.norm_q(self.host.q(x)), self.host.norm_k(self.host.k(context)), self.host.v(context)
        q, k, v = (t.unflatten(-1, (self.host.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.host.o(out.transpose(1, 2).flatten(2))


def attend_with(attention):
    """The class of the text attention is swapped for the run, as RES4LYF does by object patches."""

    def patch(model):
        model = model.clone()
        for i in range(2):
            module = model.model.diffusion_model.blocks[i].cross_attn
            forward = attention(module).forward
            swapped = type(attention.__name__, (type(module),), {
                "forward": lambda self, x, context, _forward=forward, context_img_len=None: _forward(x, context),
                "__module__": __name__,
            })  # fmt: skip
            model.add_object_patch(f"diffusion_model.blocks.{i}.cross_attn.__class__", swapped)
        return model

    return patch


@pytest.mark.parametrize("attention", (DirectAttention,))
@pytest.mark.parametrize("order", ("node first", "pack first"))
def test_text_attention_of_a_pack_that_calls_the_hosts_function(wan, monkeypatch, attention, order):
    # the host's block hands options over; a pack's class does not take them
    block = comfy.ldm.wan.model.WanAttentionBlock
    original = block.forward

    def forward(self, *args, **kwargs):
        module, taken = self.cross_attn, type(self.cross_attn)
        if taken.__module__ != __name__:
            return original(self, *args, **kwargs)
        inner = module.forward
        module.forward = lambda *a, transformer_options=None, **k: inner(*a, **k)
        try:
            return original(self, *args, **kwargs)
        finally:
            del module.forward

    monkeypatch.setattr(block, "forward", forward)
    expected = families.sample(apply(wan), WAN)
    assert relative(families.sample(both_orders(wan, attend_with(attention))[order], WAN), expected) < SAME


# ---- rows that add up


def put_tokens(front: int, behind: int, image: int = 0, change: float = 1.0):
    """As USOStyleReference does: tokens around the prompt's, and references behind the image."""

    def patch(model):
        def post_input(args):
            random = torch.Generator().manual_seed(3)
            txt, ids = args["txt"] * change, args["txt_ids"]

            def style(count, like):
                return torch.randn(len(like), count, like.shape[2], generator=random)

            args["txt"] = torch.cat([style(front, txt), txt, style(behind, txt)], 1)
            args["txt_ids"] = torch.cat([ids[:, :1].expand(-1, front, -1), ids, ids[:, :1].expand(-1, behind, -1)], 1)
            args["img"] = torch.cat([args["img"], style(image, args["img"])], 1)
            args["img_ids"] = torch.cat([args["img_ids"], args["img_ids"][:, :1].expand(-1, image, -1)], 1)
            return args

        model = model.clone()
        model.set_model_post_input_patch(post_input)
        return model

    return patch


def by_hand(model, columns: range, rows: range):
    """PLADIS as an attention override: these queries on these keys, their softmax mass kept."""
    import entmax

    def override(function, q, k, v, heads, *args, **kwargs):
        q, k, v = (t.double() for t in (q, k, v))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        weights, text = scores.softmax(-1), scores[:, :, rows][..., columns]
        mass = weights[:, :, rows][..., columns].sum(-1, keepdim=True)
        mixed = mass * (2 * entmax.entmax15(text, -1) - text.softmax(-1))
        weights[:, :, rows.start : rows.stop, columns.start : columns.stop] = mixed
        return (weights @ v).float().transpose(1, 2).flatten(2)

    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


@pytest.mark.parametrize(("front", "behind", "image"), ((5, 0, 0), (0, 3, 0), (2, 4, 6), (0, 0, 3)))
@pytest.mark.parametrize("order", ("node first", "pack first"))
def test_tokens_that_a_patch_puts_into_the_streams(flux, front, behind, image, order):
    patch, text = put_tokens(front, behind, image), families.TOKENS
    start = front + text + behind
    expected = families.sample(by_hand(patch(flux), range(front, front + text), range(start, start + 16)), FLUX)
    out = families.sample(both_orders(flux, patch)[order], FLUX)
    assert relative(out, expected) < SAME
    assert relative(out, families.sample(patch(flux), FLUX)) > CHANGED


def test_a_prompt_that_is_changed_and_moved_is_refused(flux):
    with pytest.raises(RuntimeError, match="made 9 tokens of the 7 of the text.*cannot be told"):
        families.sample(apply(put_tokens(2, 0, change=1.5)(flux)), FLUX)
    # changed where it was is still the prompt
    assert families.sample(apply(put_tokens(0, 0, change=1.5)(flux)), FLUX).isfinite().all()


@pytest.mark.parametrize("order", ("node first", "pack first"))
def test_a_row_that_does_not_add_up_is_an_error_with_the_numbers(flux, order):
    """A block replacement hands the block style tokens that nobody saw before."""

    def replacement(args, extra):
        txt = torch.cat([args["txt"][:, :4], args["txt"]], 1)
        out = extra["original_block"]({**args, "txt": txt, "pe": None})
        return {**out, "txt": out["txt"][:, 4:]}

    def patch(model):
        model = model.clone()
        model.set_model_patch_replace(replacement, "dit", "double_block", 1)
        return model

    with pytest.raises(RuntimeError, match="text has 11 tokens, but text 7 = 7"):
        families.sample(both_orders(flux, patch)[order], FLUX)


def test_keys_that_nobody_accounts_for_are_an_error_with_the_numbers(flux):
    def attn1_patch(q, k, v, **kwargs):
        return {"q": q, "k": torch.cat([k, k[:, :, :3]], 2), "v": torch.cat([v, v[:, :, :3]], 2), "pe": None}

    model = flux.clone()
    model.set_model_attn1_patch(attn1_patch)
    with pytest.raises(RuntimeError, match="text 7 \\+ image 16 = 23 keys, but the attention row has 26"):
        families.sample(apply(model), FLUX)


def test_the_image_and_the_text_call_of_one_module_are_told_by_their_keys():
    """Of Wan's image-to-video attention, also where both have as many keys."""
    family, lengths = families.BY_NAME["Wan 2.1 I2V"], []
    model, original = families.patcher(family), running.ModelCall.__init__

    def record(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.watch = lambda layer, q, k, *rest, **known: lengths.append((layer.path, k))

    # the picture has 5 tokens
    for tokens in (5, 9):
        lengths.clear()
        text = families.prompt(family, 11, tokens)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(running.ModelCall, "__init__", record)
            families.sample(apply(model), family, text, cfg=1.0)
        assert [path for path, _ in lengths] == ["blocks.0.cross_attn", "blocks.1.cross_attn"]
        key = lengths[0][1].transpose(1, 2).flatten(2)
        assert key.shape[1] == tokens
        assert relative(key, text_keys_of_first_block(model, family, text)) < SAME


def text_keys_of_first_block(model, family, text) -> torch.Tensor:
    keys = []
    module = model.model.diffusion_model.blocks[0].cross_attn.norm_k
    handle = module.register_forward_hook(lambda *args: keys.append(args[-1]))
    families.sample(model, family, text, cfg=1.0)
    handle.remove()
    return keys[0]


# ---- torch's own attention: the paper's transformer


class FlatCrossAttention(torch.nn.Module):
    """As SANA's in ComfyUI_ExtraModels: the batch in one row, with a mask of blocks."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.q_linear, self.kv_linear = torch.nn.Linear(width, width), torch.nn.Linear(width, 2 * width)
        self.proj, self.heads = torch.nn.Linear(width, width), heads

    def forward(self, x, cond, mask=None):
        rows, _, width = x.shape
        q = self.q_linear(x).view(1, -1, self.heads, width // self.heads)
        k, v = self.kv_linear(cond).view(1, -1, 2, self.heads, width // self.heads).unbind(2)
        blocks = torch.ones(q.shape[1] // rows, k.shape[1] // rows, dtype=torch.bool)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=torch.block_diag(*[blocks] * rows))
        return self.proj(out.transpose(1, 2).reshape(rows, -1, width))


class FlatBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cross_attn = FlatCrossAttention()


class FlatNetwork(torch.nn.Module):
    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.enter, self.leave = torch.nn.Linear(4, 16), torch.nn.Linear(16, 4)
        self.blocks = torch.nn.ModuleList([FlatBlock(), FlatBlock()])

    def forward(self, x, timesteps, context, **kwargs):
        tokens = self.enter(x.flatten(2).mT)
        for block in self.blocks:
            tokens = tokens + 2 * block.cross_attn(tokens, context.reshape(1, -1, 16))
        return self.leave(tokens).mT.reshape(x.shape)


FlatNetwork.__module__, FlatNetwork.__qualname__ = "some_pack.Sana.models.sana_multi_scale", "SanaMS"


def flat_model():
    torch.manual_seed(1)
    model = tiny.patcher(**SMALL)
    model.model.diffusion_model = FlatNetwork().requires_grad_(False)
    model.model.adm_channels = 0
    return model


@pytest.mark.parametrize("batch", (1, 2))
def test_text_attention_that_calls_torch_itself(batch):
    import entmax

    def oracle(module):
        def forward(x, cond, mask=None):
            rows, _, width = x.shape
            q = module.q_linear(x).unflatten(-1, (module.heads, -1)).transpose(1, 2).double()
            k, v = module.kv_linear(cond).view(rows, -1, 2, module.heads, width // module.heads).unbind(2)
            k, v = (t.transpose(1, 2).double() for t in (k, v))
            scores = q @ k.mT * q.shape[-1] ** -0.5
            out = (2 * entmax.entmax15(scores, -1) - scores.softmax(-1)) @ v
            return module.proj(out.float().transpose(1, 2).flatten(2))

        return forward

    def text(seed):
        return [[torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(seed)) * 3, {}]]

    model = flat_model()
    plain = tiny.sample(model, text(1), text(2), batch=batch)
    out = tiny.sample(apply(model), text(1), text(2), batch=batch)
    positive = tiny.sample(apply(model, apply_to="positive"), text(1), text(2), batch=batch)
    for block in model.model.diffusion_model.blocks:
        block.cross_attn.forward = oracle(block.cross_attn)
    assert relative(out, tiny.sample(model, text(1), text(2), batch=batch)) < SAME
    assert relative(out, plain) > CHANGED
    assert relative(positive, plain) > CHANGED and relative(positive, out) > CHANGED
    assert not torch.overrides._get_current_function_mode_stack()


# ---- the receipt


@pytest.fixture
def said(monkeypatch):
    """What would be shown on nodes."""
    words = []
    monkeypatch.setattr(wrappers, "show_on_node", lambda node, text: words.append((node, text)))
    return words


def test_the_words_go_to_the_browser_that_queued_the_run_alone(monkeypatch):
    sent = []
    server = SimpleNamespace(client_id="browser", send_sync=lambda *message: sent.append(message))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    receipt.show_on_node("12:5", "words")
    server.last_prompt_id = "of one run"
    receipt.show_on_node("12:5", "words")
    told = {"node": "12:5", "text": "words"}
    assert sent == [("pladis.receipt", told | {"run": run}, "browser") for run in (None, "of one run")]
    # of a run over the API, or without a server, as here
    server.client_id = None
    receipt.show_on_node("12:5", "words")
    monkeypatch.setitem(sys.modules, "server", None)
    receipt.show_on_node("12:5", "words")
    assert len(sent) == 2


def with_id(model, **options):
    """MODEL through an Apply node, the advanced one where that is asked for, that a graph runs as node 7."""
    return apply(model, **options, unique_id="7")


def test_the_receipt_of_a_whole_run(unet, said, caplog):
    counts = []
    for block in unet.model.diffusion_model.modules():
        if hasattr(block, "attn2"):
            block.register_forward_hook(lambda *_: counts.append(1))
    with caplog.at_level(logging.INFO):
        tiny.sample(with_id(unet, scale=1.5), steps=5)
    assert len(counts) == 4 * 5
    words = "4 of 4 text layers in 5 of 5 steps, lambda 1.5, alpha 1.5"
    assert said == [("7", words)]
    assert sum(record.getMessage() == f"PLADIS: {words}" and record.levelno == logging.INFO
               for record in caplog.records) == 1  # fmt: skip


@pytest.mark.parametrize("sampler", ("euler", "heun", "dpmpp_2m", "dpmpp_sde", "uni_pc", "lcm", "euler_ancestral"))
def test_steps_are_the_samplers(unet, said, sampler):
    tiny.sample(with_id(unet), steps=6, sampler=sampler)
    ((_, words),) = said
    assert words.startswith("4 of 4 text layers in 6 of 6 steps")


def test_the_receipt_of_a_window(unet, said):
    ran = []
    original = running.ModelCall.__init__

    def record(self, *args, **kwargs):
        ran.append(1)
        original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(running.ModelCall, "__init__", record)
        tiny.sample(with_id(unet, end_percent=0.5), steps=8, cfg=1.0)
    assert 0 < len(ran) < 8
    assert said[0][1] == (
        f"4 of 4 text layers in {len(ran)} of 8 steps, lambda 2, alpha 1.5; "
        f"{8 - len(ran)} outside its range"
    )


@pytest.mark.parametrize(
    ("options", "sampling", "counted", "why"),
    [
        ({"end_percent": 0.3}, {"denoise": 0.3}, "3 outside its range", "raise end_percent (with denoise below 1"),
        ({"start_percent": 0.99}, {"scheduler": "simple"}, "3 outside its range", "0.99 to end_percent 1. To have it "),
        ({"apply_to": "negative"}, {"cfg": 1.0}, "3 without its prompt", "no step had a negative prompt (at CFG 1"),
    ],
)
def test_a_run_in_which_its_settings_leave_nothing_to_do_says_why(
    unet, said, caplog, options, sampling, counted, why
):
    # fewer steps than KSampler would take, at the end of the schedule
    model = with_id(unet, **options)
    tiny.sample(model, steps=3, **sampling)
    ((_, words),) = said
    assert words.startswith(f"0 of 4 text layers in 0 of 3 steps, lambda 2, alpha 1.5; {counted}. PLADIS did nothing: ")
    assert why in words
    assert [r.levelno for r in caplog.records if words in r.getMessage()] == [logging.WARNING]


def test_a_schedule_that_is_at_zero_is_a_cause_of_its_own():
    whole = Settings(frozenset(), 0.0, schedule="linear", end_lam=2.0)
    assert "scale was 0 in every step. Raise scale" in whole.why_it_did_nothing(False)
    part = replace(whole, end_percent=0.5)
    assert "outside start_percent 0 to end_percent 0.5, or has scale 0. To have" in part.why_it_did_nothing(False)
    assert "given no text" in replace(whole, schedule="constant").why_it_did_nothing(False)


def test_a_run_of_sweep_or_map_says_nothing_on_a_node_before_them(unet, said):
    tiny.sample(apply(with_id(unet)), steps=2)
    tiny.sample(apply(with_id(unet), layers="custom", blocks="m0"), steps=2)
    assert {node for node, _ in said} == {None} or not said


@pytest.mark.parametrize("node", ("EasyCacheNode", "LazyCacheNode"))
@pytest.mark.parametrize("order", ("node first", "pack first"))
def test_steps_that_a_cache_answered_are_counted_as_such(unet, said, caplog, node, order):
    ran = []
    unet.model.diffusion_model.time_embed.register_forward_hook(lambda *_: ran.append(1))

    def cache(model):
        return run_node("comfy_extras.nodes_easycache", node, model=model, reuse_threshold=3.0)

    model = with_id(cache(unet)) if order == "pack first" else cache(with_id(unet))
    tiny.sample(model, steps=10, cfg=1.0)
    assert 0 < len(ran) < 10
    assert said[0][1] == (
        f"4 of 4 text layers in {len(ran)} of 10 steps, lambda 2, alpha 1.5; {10 - len(ran)} answered from a cache"
    )
    assert not [record for record in caplog.records if "PLADIS" in record.message]


def test_layers_that_are_not_reached_are_a_warning_in_every_run(wan, said, caplog):
    """One block attends in a way of its own, on which nothing of the host's has a hold."""
    module = wan.model.diffusion_model.blocks[1].cross_attn
    forward = TorchAttention(module).forward
    wan.add_object_patch(
        "diffusion_model.blocks.1.cross_attn.forward",
        lambda x, context, context_img_len=None, transformer_options=None: forward(x, context),
    )
    for _ in range(2):
        said.clear()
        caplog.clear()
        families.sample(with_id(wan), WAN, steps=3)
        ((_, words),) = said
        assert words.startswith("1 of 2 text layers in 3 of 3 steps")
        assert "Not reached: b1.0. Likely test_reached" in words
        assert [r.levelno for r in caplog.records if words in r.getMessage()] == [logging.WARNING]


def attend_past_everything(model, calls=None):
    """Every block attends in a way of its own, on which nothing of the host's has a hold."""
    model, calls = model.clone(), [] if calls is None else calls
    for i in range(2):
        forward = TorchAttention(model.model.diffusion_model.blocks[i].cross_attn).forward
        model.add_object_patch(
            f"diffusion_model.blocks.{i}.cross_attn.forward",
            lambda x, context, context_img_len=None, transformer_options=None, _forward=forward: (
                calls.append(1) or _forward(x, context)
            ),
        )
    return model


@pytest.mark.parametrize("order", ("node first", "pack first"))
def test_nothing_reached_stops_the_run_in_its_first_step(wan, order):
    calls = []
    patch = partial(attend_past_everything, calls=calls)
    with pytest.raises(RuntimeError, match="none of its 2 text layers \\(b0.0, b1.0\\).*Likely test_reached.*Remove"):
        families.sample(both_orders(wan, patch)[order], WAN, steps=4, cfg=1.0)
    assert len(calls) == 2


def go_past(model, when=lambda call: True):
    """A way around everything: some conditionings are evaluated with options of the pack's own."""
    calls = []

    def calc_cond_batch(args):
        calls.append(1)
        options = {"transformer_options": {}} if when(len(calls)) else args["model_options"]
        return comfy.samplers.calc_cond_batch(args["model"], args["conds"], args["input"], args["sigma"], options)

    model = model.clone()
    model.model_options["sampler_calc_cond_batch_function"] = calc_cond_batch
    return model


@pytest.mark.parametrize("order", ("node first", "pack first"))
def test_evaluations_past_every_wrapper_stop_the_run_in_its_first_step(unet, order):
    evaluated = []
    unet.model.diffusion_model.time_embed.register_forward_hook(lambda *_: evaluated.append(1))
    with pytest.raises(RuntimeError, match="reached none of its 4 text layers.*Likely test_reached"):
        tiny.sample(both_orders(unet, go_past)[order], steps=4, cfg=1.0)
    assert len(evaluated) == 1


def test_a_run_that_never_evaluates_is_a_warning(unet, said, caplog):
    """Whatever computed the picture, it was not this network."""
    model = with_id(unet)
    model.model_options["sampler_calc_cond_batch_function"] = lambda args: [args["input"]] * len(args["conds"])
    tiny.sample(model, steps=3, cfg=1.0)
    ((_, words),) = said
    assert words.startswith("0 of 4 text layers in 0 of 3 steps")
    assert [r.levelno for r in caplog.records if words in r.getMessage()] == [logging.WARNING]


def test_evaluations_that_go_past_later_are_a_warning(unet, said, caplog):
    tiny.sample(go_past(with_id(unet), lambda call: call > 2), steps=5, cfg=1.0)
    ((_, words),) = said
    assert words.startswith(
        "4 of 4 text layers in 2 of 5 steps, lambda 2, alpha 1.5; 3 in which something went past it"
    )
    assert [r.levelno for r in caplog.records if words in r.getMessage()] == [logging.WARNING]


@pytest.mark.parametrize("name", ("unet", "Flux.1", "Wan 2.1 T2V"))
@pytest.mark.parametrize("where", ("around the block", "in the block"))
def test_options_that_a_pack_keeps(name, where, unet):
    """Blocks that get the options of the first step in every step, and after the node is gone."""
    family = None if name == "unet" else families.BY_NAME[name]
    model = unet if family is None else families.patcher(family)
    blocks = [find_target(model).found[layer]() for layer in find_target(model).layers]
    settings = {"scale": 3.0, "scale_schedule": "linear", "end_scale": 0.5, "end_percent": 0.7}
    kept = {}

    def sample(model):
        return tiny.sample(model, steps=3) if family is None else families.sample(model, family, steps=3)

    def keep(block, args, kwargs):
        kwargs["transformer_options"] = kept.setdefault(block, kwargs["transformer_options"])
        return args, kwargs

    def keep_inside(block):
        forward = type(block).forward.__get__(block)
        block.forward = lambda *args, **kwargs: forward(*keep(block, args, kwargs)[0], **kwargs)

    expected, plain = sample(apply(model, **settings)), sample(model)
    if where == "around the block":
        # before ours: PLADIS gives the block its hook all the same
        handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
        assert relative(sample(apply(model, **settings)), expected) < SAME
        assert relative(sample(apply(model, **settings)), expected) < SAME
        assert relative(sample(model), plain) < SAME
        for handle in handles:
            handle.remove()
        return
    for block in blocks:
        keep_inside(block)
    # what they kept is the first call's, and acts no more when that is over
    sample(apply(model, **settings))
    with pytest.raises(RuntimeError, match="reached none"):
        sample(apply(model, **settings))
    assert relative(sample(model), plain) < SAME


def test_hooks_that_another_pack_removes_are_an_error_and_nothing_stays():
    model = flat_model()
    text = [[torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(1)) * 3, {}]]

    def clear(*_):
        for block in model.model.diffusion_model.blocks:
            block.cross_attn._forward_hooks.clear()

    handle = model.model.diffusion_model.blocks[0].cross_attn.q_linear.register_forward_hook(clear)
    with pytest.raises(RuntimeError, match="took the hooks of Apply PLADIS off"):
        tiny.sample(apply(model), text, text)
    handle.remove()
    assert not torch.overrides._get_current_function_mode_stack()
    q = torch.randn(1, 2, 5, 8)
    assert torch.nn.functional.scaled_dot_product_attention(q, q, q).isfinite().all()


def test_rows_that_a_function_around_the_model_call_reorders(unet):
    def flipped(apply_model, args):
        c = {k: v.flip(0) if isinstance(v, torch.Tensor) else v for k, v in args["c"].items()}
        return apply_model(args["input"].flip(0), args["timestep"].flip(0), **c).flip(0)

    model = unet.clone()
    model.set_model_unet_function_wrapper(flipped)
    long = tiny.prompt(21, 154)
    for role in ("both", "positive", "negative"):
        expected = tiny.sample(apply(unet, apply_to=role), positive=long)
        assert relative(tiny.sample(apply(model, apply_to=role), positive=long), expected) < SAME


def test_a_network_that_is_held_twice_and_two_networks(unet, flux):
    class Twice(Wrapped):
        def __init__(self, network, other):
            super().__init__(network)
            self.other = other

    expected = tiny.sample(apply(unet))
    model = unet.clone()
    model.add_object_patch("diffusion_model", Twice(Wrapped(unet.model.diffusion_model), unet.model.diffusion_model))
    assert relative(tiny.sample(apply(model)), expected) < SAME
    model = unet.clone()
    model.add_object_patch("diffusion_model", Twice(unet.model.diffusion_model, flux.model.diffusion_model))
    for force_unknown in (False, True):
        with pytest.raises(ValueError, match="finds 2 networks in Twice"):
            apply(model, force_unknown=force_unknown)


def test_options_can_be_copied_deeply(flux):
    def copying(executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
        return executor(x, t, c_concat, c_crossattn, control, copy.deepcopy(options), **kwargs)

    model = flux.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "copies", copying)
    assert torch.equal(families.sample(apply(model), FLUX), families.sample(apply(flux), FLUX))


def test_a_sampler_that_reuses_keys_is_no_cache(said, caplog):
    """Wan CausalAR's own runs every block in every step, in most of them past its text attention."""
    family = families.BY_NAME["Wan CausalAR"]
    model = with_id(families.patcher(family))
    noise = families.noise(family)
    with torch.inference_mode():
        comfy.sample.sample_custom(
            model, noise, 1.0, comfy.samplers.ksampler("ar_video", {"num_frame_per_block": 1}),
            torch.tensor([1.0, 0.8, 0.5, 0.0]), families.prompt(family, 11), families.prompt(family, 12), noise * 0.0,
            disable_pbar=True, seed=5,
        )  # fmt: skip
    ((_, words),) = said
    assert "cache" not in words and "Not reached: b0.0, b1.0" in words
    assert [r.levelno for r in caplog.records if words in r.getMessage()] == [logging.WARNING]


def test_off_is_said(unet, said, caplog):
    with caplog.at_level(logging.INFO):
        tiny.sample(with_id(unet, scale=0.0))
    assert said == [("7", "off, lambda 0, alpha 1.5")]
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.INFO and "PLADIS" in r.getMessage()] == [
        "PLADIS: off, lambda 0, alpha 1.5"
    ]


def test_two_nodes_have_a_receipt_each(unet, said):
    model = with_id(apply(unet, scale=1.0, layers="custom", blocks="d0,u0"), scale=1.0)
    tiny.sample(model, steps=2)
    assert [words.split(",")[0] for _, words in said] == ["4 of 4 text layers in 2 of 2 steps"]
    said.clear()
    tiny.sample(with_id(with_id(unet), scale=1.0), steps=2)
    assert said[0] == ("7", "replaced by an Apply node behind this one")


def test_the_way_out_is_named():
    for pack, way in (
        ("ComfyUI-TeaCache", "EasyCache"), ("Comfy-WaveSpeed", "EasyCache"), ("ComfyUI-nunchaku", "fp8 or GGUF"),
        ("ComfyUI-WanVideoWrapper", "own Wan nodes"), ("ComfyUI-NAG", "Normalized Attention Guidance"),
    ):  # fmt: skip
        function = type("Thing", (), {"__module__": f"/somewhere/custom_nodes/{pack}.nodes"})()
        name = pack_of(function)
        assert not advice("a manager of packs")
        words = receipt.Receipt((), None, partial(list, (name,)))._blame()
        assert name == pack and pack in words and way in words


# ---- threads


def arguments_of_a_call(model, sample) -> dict:
    """What apply_model is given in a run, without anybody's wrappers."""
    seen = {}

    def record(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **extra):
        options = {k: v for k, v in transformer_options.items() if k not in ("wrappers", "callbacks")}
        seen.update(x=x, t=t, c_concat=c_concat, c_crossattn=c_crossattn, transformer_options=options, **extra)
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **extra)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "record", record)
    sample(model)
    return seen


@pytest.mark.parametrize("name", ("unet", "PixArt Sigma", "Flux.1", "Wan 2.1 I2V"))
def test_one_network_in_several_threads_gives_each_its_own_picture(name, unet):
    """With the node, with other settings and without it, at the same time on the very same modules.

    Model calls alone: the host's own sampler unloads the model under another thread's feet.
    """
    family = None if name == "unet" else families.BY_NAME[name]
    model = unet if family is None else families.patcher(family)
    arguments = arguments_of_a_call(
        model, tiny.sample if family is None else lambda m: families.sample(m, family)
    )
    models = (apply(model), model.clone(), apply(model, scale=0.7, alpha=2.0))

    @torch.inference_mode()
    def evaluate(patched):
        options = {**arguments["transformer_options"], "wrappers": patched.wrappers}
        return model.model.apply_model(**{**arguments, "transformer_options": options})

    expected = [evaluate(m) for m in models]
    assert all(relative(expected[i], expected[j]) > 1e-6 for i in range(3) for j in range(i))
    wrong, together = [], threading.Barrier(len(models))

    def work(i):
        together.wait()
        for _ in range(30):
            if not torch.equal(evaluate(models[i]), expected[i]):
                wrong.append(i)
        done.append(i)

    done = []
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2] and not wrong
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.diffusion_model.modules())
    assert comfy.ldm.pixart.blocks.optimized_attention is optimized_attention


# ---- the batch


def predictions(model, sample):
    seen = {}

    def record(args):
        seen.update(positive=args["cond_denoised"], negative=args["uncond_denoised"])
        return args["denoised"]

    model = model.clone()
    model.set_model_sampler_post_cfg_function(record)
    sample(model)
    return seen


def windows(model):
    """A pack's own way through calc_cond_batch, a window of the batch at a time (AnimateDiff-Evolved)."""

    def calc_cond_batch(args):
        out = [torch.zeros_like(args["input"]) for _ in args["conds"]]
        for start in range(0, len(args["input"]), 2):
            part = slice(start, start + 2)
            parts = comfy.samplers.calc_cond_batch(
                args["model"], args["conds"], args["input"][part], args["sigma"][part], args["model_options"]
            )
            for whole, piece in zip(out, parts, strict=True):
                whole[part] = piece
        return out

    model = model.clone()
    model.model_options["sampler_calc_cond_batch_function"] = calc_cond_batch
    return model


def windows_inside(model):
    """The same as a wrapper, so that the order of the nodes decides who is outside."""

    def wrapper(executor, model, conds, x_in, timestep, model_options):
        halves = [executor(model, conds, x_in[p], timestep[p], model_options) for p in (slice(0, 2), slice(2, None))]
        return [torch.cat(parts) for parts in zip(*halves, strict=True)]

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "windows", wrapper)
    return model


def tiles(model):
    """Whole copies of the batch one after the other, under the options of one copy (TiledDiffusion)."""

    def wrapper(apply_model, args):
        c = {k: torch.cat([v] * 3) if isinstance(v, torch.Tensor) else v for k, v in args["c"].items()}
        out = apply_model(torch.cat([args["input"]] * 3), torch.cat([args["timestep"]] * 3), **c)
        return out.chunk(3)[1]

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    model.model_options["tiled_diffusion"] = True
    return model


@pytest.mark.parametrize("patch", (windows, windows_inside, tiles))
@pytest.mark.parametrize("order", ("node first", "pack first"))
@pytest.mark.parametrize("lengths", ((77, 77), (154, 77)))
def test_whose_a_row_is_when_the_batch_was_cut(unet, patch, order, lengths):
    positive, negative = tiny.prompt(11, lengths[0]), tiny.prompt(12, lengths[1])

    def sample(model):
        return predictions(model, lambda m: tiny.sample(m, positive, negative, batch=4, steps=1))

    plain, whole = sample(unet), sample(apply(unet))
    for role, other in (("positive", "negative"), ("negative", "positive")):
        out = sample(both_orders(unet, patch, apply_to=role)[order])
        assert relative(out[role], whole[role]) < SAME
        assert relative(out[other], plain[other]) < SAME
        assert relative(whole[role], plain[role]) > CHANGED


@pytest.mark.parametrize("options", ({"apply_to": "positive"}, {"norm_cap": 0.9}, {}))
def test_sparse_extra_options_are_no_crash(unet, options):
    """Blocks of other packs that fill in only some of what the host's do (Advanced-ControlNet's reference)."""
    block_class = type(unet.model.diffusion_model.middle_block[1].transformer_blocks[0])
    expected = tiny.sample(apply(unet, **options))
    original = block_class.forward

    def forward(self, x, context=None, transformer_options=None):
        slots = transformer_options.get("patches_replace", {}).get("attn2", {})
        sparse = {
            key: lambda q, k, v, o, _hook=hook: _hook(q, k, v, {"cond_or_uncond": o["cond_or_uncond"]})
            for key, hook in slots.items()
        }
        options = {**transformer_options, "patches_replace": {"attn2": sparse}}
        return original(self, x, context, options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(block_class, "forward", forward)
        assert relative(tiny.sample(apply(unet, **options)), expected) < SAME


# ---- gradients, copies


# the rotary embeddings of the others have no gradient on the host
@pytest.mark.parametrize("name", ("unet", "SD3", "PixArt Sigma"))
@pytest.mark.parametrize("depth", (0, 1, 2))
def test_a_gradient_through_a_run_needs_no_package(name, depth, unet, monkeypatch):
    """As TrainLoraNode computes it, with and without gradient checkpoints, whose recomputation comes after the call."""
    import comfy_extras.nodes_train as train

    monkeypatch.setitem(sys.modules, "entmax", None)
    family = None if name == "unet" else families.BY_NAME[name]
    model = unet if family is None else families.patcher(family)
    network = model.model.diffusion_model
    ends = ("attn2.to_k.weight", "qkv.weight", "cross_attn.kv_linear.weight")
    weights = next(p for n, p in network.named_parameters() if n.endswith(ends))
    weights.requires_grad_(True)

    class Trainer(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            with torch.inference_mode(False), torch.enable_grad():
                x = noise.clone()
                denoised = model_wrap(x, sigmas[:1].expand(len(x)).clone(), **extra_args)
                denoised.float().square().mean().backward()
            return denoised.detach()

        def max_denoise(self, *args):
            return False

    def gradient(model, depth):
        weights.grad = None
        patched = train.find_modules_at_depth(network, depth=depth) if depth else []
        for module in patched:
            train.patch(module)
        guider = comfy.samplers.CFGGuider(model)
        if family is None:
            guider.set_conds(tiny.POSITIVE, tiny.NEGATIVE)
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        else:
            guider.set_conds(families.prompt(family, 11), families.prompt(family, 12))
            noise = families.noise(family)
        guider.set_cfg(1.0)
        try:
            guider.sample(noise, noise * 0, Trainer(), torch.tensor([0.7, 0.0]), disable_pbar=True, seed=1)
        finally:
            for module in patched:
                train.unpatch(module)
        return weights.grad.clone()

    plain, ours = gradient(model, 0), gradient(apply(model), 0)
    assert ours.isfinite().all() and relative(ours, plain) > CHANGED
    if depth:
        assert relative(gradient(apply(model), depth), ours) < 1e-3
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@pytest.mark.parametrize("depth", (1, 3))
def test_the_hosts_training_node(monkeypatch, said, depth):
    """TrainLoraNode behind the node, on a deep copy of the model, with the package gone that users do not have."""
    monkeypatch.setitem(sys.modules, "entmax", None)

    def small(**_):
        return tiny.patcher(**SMALL, dtype=torch.float32)

    def loss(patch) -> list[float]:
        model = small()
        model.cached_patcher_init = (small, ())
        latents = {"samples": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))}
        options = {
            "batch_size": 1, "steps": 3, "grad_accumulation_steps": 1, "learning_rate": 1e-3, "rank": 2,
            "optimizer": "AdamW", "loss_function": "MSE", "seed": 7, "training_dtype": "fp32", "lora_dtype": "fp32",
            "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": True, "checkpoint_depth": depth,
            "offloading": False, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False,
        }  # fmt: skip
        torch.manual_seed(0)
        _, losses, _ = train.TrainLoraNode.execute(
            model=[patch(model)], latents=[latents], positive=[tiny.POSITIVE],
            **{name: [value] for name, value in options.items()},
        ).result  # fmt: skip
        return losses["loss"]

    train = pytest.importorskip("comfy_extras.nodes_train")
    if "bypass_mode" not in inspect.signature(train.TrainLoraNode.execute).parameters:
        pytest.skip("this ComfyUI trains with other inputs")
    plain, ours = loss(lambda model: model), loss(with_id)
    assert len(ours) == 3 and all(math.isfinite(value) for value in ours)
    assert abs(ours[0] - plain[0]) > 1e-4 * abs(plain[0])
    assert said[-1][1].startswith("4 of 4 text layers in 3 of 3")


def test_a_copy_of_the_model_gets_pladis_too(unet):
    """On another GPU, without dynamic VRAM: the wrapper meets a network that was not there when the node ran."""
    expected = tiny.sample(apply(unet))
    patched = apply(unet)
    patched.model = tiny.patcher(**SMALL).model
    assert torch.equal(tiny.sample(patched), expected)
    assert find_target(unet).network() is unet.model.diffusion_model


@pytest.mark.parametrize("order", ("node first", "pack first"))
def test_a_row_of_which_nobody_says_where_its_image_is(flux, order):
    """A pack that runs the single blocks itself may have put the text elsewhere: the sum tells nothing of that."""

    def replacement(args, extra):
        options = {k: v for k, v in args["transformer_options"].items() if k != "img_slice"}
        return extra["original_block"]({**args, "transformer_options": options})

    def patch(model):
        model = model.clone()
        model.set_model_patch_replace(replacement, "dit", "single_block", 1)
        return model

    with pytest.raises(RuntimeError, match="does not say where in its row the image is"):
        families.sample(both_orders(flux, patch)[order], FLUX)


def test_off_promises_nothing(unet):
    """Wrappers that another pack drops are no matter where nothing should act."""
    kinds = (WrappersMP.APPLY_MODEL, WrappersMP.CALC_COND_BATCH, WrappersMP.OUTER_SAMPLE)
    assert torch.equal(tiny.sample(drop_wrappers(*kinds)(apply(unet, scale=0.0))), tiny.sample(unet))


class Hiding(torch.nn.Module):
    """A module of a pack that holds the network where nobody finds it."""

    def __init__(self, network):
        super().__init__()
        self.__dict__["box"] = [network]

    def forward(self, *args, **kwargs):
        return self.box[0](*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.__dict__["box"][0], name)


def test_a_network_that_is_hidden_after_the_node(unet):
    expected = tiny.sample(apply(unet))
    model = apply(unet)
    model.add_object_patch("diffusion_model", Hiding(unet.model.diffusion_model))
    assert relative(tiny.sample(model), expected) < SAME


def test_tokens_behind_the_prompt_of_krea_2():
    """Its host says where the image begins before the patches put tokens in."""
    family = families.BY_NAME["Krea 2"]
    model = families.patcher(family)
    patch = put_tokens(0, 4)
    out = families.sample(apply(patch(model)), family)
    assert out.isfinite().all() and relative(out, families.sample(patch(model), family)) > CHANGED


def test_the_forward_that_a_pack_put_on_a_module_counts():
    class Host(torch.nn.Module):
        def forward(self, x, transformer_options=None):
            return x

    module = Host()
    assert Handed(module, (1,), {}).takes("transformer_options")
    module.forward = lambda *args, **kwargs: args
    assert Handed(module, (1,), {}).takes("transformer_options")
    module.forward = lambda x: x
    assert not Handed(module, (1,), {}).takes("transformer_options")


def test_prompts_of_other_lengths_in_tiles_of_a_transformer():
    """The host repeats the shorter prompt; whose a row is, and so how often, its text tells."""
    family = families.BY_NAME["Stable Cascade C"]
    model = families.patcher(family)
    prompts = families.prompt(family, 11, 14), families.prompt(family, 12, 7)
    expected = families.sample(apply(model), family, *prompts)
    assert relative(families.sample(apply(tiles(model)), family, *prompts), expected) < SAME


def test_a_text_layer_costs_the_cpu_no_more_than_the_hosts(monkeypatch):
    """In calls of Python's and C's functions, attention itself left out: what it costs, whatever else the machine does.
    A U-Net has up to seventy such layers, and a fast GPU waits for them.
    """
    monkeypatch.setattr(unet_road, "pladis_attention", lambda q, *_, **__: q)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, *_, **__: q)

    def in_a_step(model) -> float:
        tiny.sample(model)
        six, two = (functions_called(partial(tiny.sample, model, steps=steps)) for steps in (6, 2))
        return (six - two) / 4

    plain = tiny.patcher("SD15")
    layers = len(find_target(plain).layers)
    more = (in_a_step(tiny.apply(plain)) - in_a_step(plain)) / layers
    assert more < 10, more


@pytest.mark.parametrize("name", ("unet", "SD3", "PixArt Sigma"))
def test_hooks_that_another_pack_takes_off_between_steps_are_put_on_again(name, unet, caplog):
    """Steps without them would look as if a cache had answered."""
    family = None if name == "unet" else families.BY_NAME[name]
    model = unet if family is None else families.patcher(family)

    def take_off(args):
        for module in model.model.diffusion_model.modules():
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
        return args["denoised"]

    def run(model):
        return tiny.sample(model, steps=3) if family is None else families.sample(model, family, steps=3)

    expected = run(apply(model))
    taken = apply(model)
    taken.set_model_sampler_post_cfg_function(take_off)
    with caplog.at_level("INFO"):
        assert torch.equal(run(taken), expected)
    assert "in 3 of 3 steps" in caplog.text


@pytest.mark.parametrize("name", ("unet", "SD3"))
def test_ours_see_what_a_module_gets_behind_a_hook_that_another_pack_puts_on_between_steps(name, unet):
    """It hands each text module options of its own, as one that was there from the beginning may."""
    family = None if name == "unet" else families.BY_NAME[name]
    model = unet if family is None else families.patcher(family)
    modules = [m() for m in find_target(model).found.values()]
    handles = []

    def bare(module, args, kwargs):
        options = kwargs.get("transformer_options") or {}
        kept = {k: v for k, v in options.items() if k not in ("optimized_attention_override", "patches_replace")}
        return args, {**kwargs, "transformer_options": kept}

    def put_on(args):
        while handles:
            handles.pop().remove()
        handles.extend(m.register_forward_pre_hook(bare, with_kwargs=True) for m in modules)
        return args["denoised"]

    def run(model):
        return tiny.sample(model, steps=3) if family is None else families.sample(model, family, steps=3)

    expected = run(apply(model))
    beside = apply(model)
    beside.set_model_sampler_post_cfg_function(put_on)
    try:
        assert torch.equal(run(beside), expected)
    finally:
        put_on({"denoised": None})
        while handles:
            handles.pop().remove()
