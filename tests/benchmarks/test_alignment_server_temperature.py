"""The temperature control against the equation written out here. This file runs itself again in ComfyUI's Python."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def module(name: str, file: Path):
    spec = importlib.util.spec_from_file_location(name, file)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


if "PLADIS_HOST" not in os.environ:
    import test_hosts

    def test_on_a_host(record_property):
        path = test_hosts.host_path("newest")
        ours = "\n".join(p for p in sys.path if "site-packages" in p)
        command = [test_hosts.host_python("newest", path), "-c", test_hosts.BOOTSTRAP, ours]
        test_hosts.run(command, "newest", path, [Path(__file__)], record_property)

else:
    sys.path.insert(0, str(ROOT / "tests" / "host"))
    module("host_conftest", ROOT / "tests" / "host" / "conftest.py")
    import test_families
    import torch
    from comfy.ldm.modules.attention import BasicTransformerBlock

    import families
    import tiny

    T = 1.7
    FAMILIES = {family.name: family for family in families.FAMILIES}

    @functools.cache
    def control():
        """The node's module, on the pack as the tests import it."""
        host = types.ModuleType("nodes")
        host.NODE_CLASS_MAPPINGS = {"PLADISApplyAdvanced": tiny.PLADISApplyAdvanced}
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "nodes", host)
            return module("temperature_node", ROOT / "benchmarks" / "temperature_node" / "__init__.py")

    def apply(model, **options):
        given = {"temperature": T, "start_percent": 0.0, "end_percent": 1.0, **options}
        return control().PLADISTemperatureControl.execute(model, **given).result[0]

    def weights_at_t(scores, columns) -> torch.Tensor:
        """Softmax, but the mass of `columns` is shared out by softmax of T times their scores."""
        weights = scores.softmax(-1)
        weights[..., columns] = weights[..., columns].sum(-1, keepdim=True) * (T * scores[..., columns]).softmax(-1)
        return weights

    def written_in(first: int):
        """A U-Net whose text attention is that, on all tokens from `first` on."""

        def forward_of(attention):
            def forward(x, context=None, value=None, mask=None, transformer_options=None):
                q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
                q, k, v = (t.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in (q, k, v))
                weights = weights_at_t(q @ k.mT * attention.dim_head**-0.5, slice(first, None))
                return attention.to_out((weights @ v).transpose(1, 2).flatten(2))

            return forward

        model = tiny.patcher("SD15")
        for block in model.model.diffusion_model.modules():
            if isinstance(block, BasicTransformerBlock):
                block.attn2.forward = forward_of(block.attn2)
        return model

    @pytest.mark.parametrize(("options", "first"), [
        ({}, 0), ({"norm_cap": 10.0}, 0), ({"tokens": "without start token"}, 1),
        ({"tokens": "without start token", "norm_cap": 10.0}, 1),
    ], ids=str)  # fmt: skip
    def test_unet(options, first):
        out = tiny.sample(apply(tiny.patcher("SD15"), **options))
        torch.testing.assert_close(out, tiny.sample(written_in(first)), rtol=0, atol=1e-6)
        assert (out - tiny.sample(written_in(1 - first))).abs().max() > 1e-3

    @pytest.mark.parametrize("name", ("Flux.1", "Wan 2.1 T2V", "Lumina 2", "Flux.1 Redux"))
    def test_transformers(name):
        """Of joint rows the text alone, its mass kept. Redux adds to scores."""
        family = FAMILIES[name]
        model = families.patcher(family)
        (calls, *_) = test_families.plain_calls(model, family, cfg=1.0)
        text = test_families.text_calls(family, calls)

        def answer(index, call, compute):
            if index not in text:
                return compute()
            columns, rows = text[index]
            q, k, v = (t.double() for t in (call.q, call.k, call.v))
            if not call.options.get("skip_reshape"):
                q, k, v = (t.flatten(2).unflatten(-1, (-1, q.flatten(2).shape[-1] // call.heads)).transpose(1, 2)
                           for t in (q, k, v))  # fmt: skip
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
            scores = q @ k.mT * (call.options.get("scale") or q.shape[-1] ** -0.5)
            if call.mask is not None:
                scores = scores + test_families.additive(call.mask).double().clamp(min=-1e6)
            weights = scores.softmax(-1)
            weights[:, :, rows] = weights_at_t(scores, columns)[:, :, rows]
            out = (weights @ v).to(call.q.dtype)
            return out if call.options.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)

        expected = families.sample(test_families.Watching(answer).attach(model), family, cfg=1.0)
        ours, plain = (families.sample(m, family, cfg=1.0) for m in (apply(model), model))
        assert test_families.relative(ours, expected) < 2e-4
        assert test_families.relative(plain, expected) > 20 * test_families.relative(ours, expected)

    def test_apply_pladis_stays_what_it_is():
        model = tiny.patcher("SD15")
        before = tiny.sample(tiny.apply(model, norm_cap=1.0)), tiny.sample(tiny.apply(model))
        tiny.sample(apply(model))
        after = tiny.sample(tiny.apply(model, norm_cap=1.0)), tiny.sample(tiny.apply(model))
        assert all(map(torch.equal, before, after))

    def test_rows_without_a_word():
        """Of the empty prompt nothing is mixed: no number that is none."""
        core = sys.modules["pladis_pack.pladis_core"]
        q, k, v = torch.randn(3, 2, 1, 4, 8)
        for mask in (None, torch.ones(1, 1, 1, 4, dtype=torch.bool), torch.zeros(1, 1, 1, 4)):
            out = control().attention(core, T, q, k, v, mask, mix_mask=torch.zeros(2, 4, dtype=torch.bool))
            torch.testing.assert_close(out, core.pladis_attention(q, k, v, mask, lam=0.0))

    def test_a_road_that_was_not_taught_refuses(monkeypatch):
        """Else it would compute some PLADIS in silence."""
        monkeypatch.setattr(control(), "teach", lambda pack: None)
        for road in control().TAUGHT:
            taught = sys.modules[f"pladis_pack.nodes.hosting.roads.{road}"]
            monkeypatch.setattr(taught, "pladis_attention", sys.modules["pladis_pack.pladis_core"].pladis_attention)
        with pytest.raises(ValueError, match="lam must lie within"):
            tiny.sample(apply(tiny.patcher("SD15")))

    def test_the_log_says_which(caplog):
        with caplog.at_level("INFO"):
            tiny.sample(apply(tiny.patcher("SD15")))
        assert "16 of 16 text layers in 2 of 2 steps, lambda none, temperature 1.7, alpha 1.5" in caplog.text
