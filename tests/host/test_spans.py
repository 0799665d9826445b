"""What joint attention rows are made of: every row that arrives adds up, and text and image are where `place` says."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import comfy_extras.nodes_flux
import pytest
import torch
from comfy.model_base import BaseModel

import families
from attention_trace import AttentionCall, Trace, Tracer, changed
from families import JOINT, Family, pooled
from pladis_pack.nodes.hosting.models.families import find_family
from pladis_pack.nodes.hosting.models.spans import Inserted, Places, Row, Span, image_tokens, place

# the fixtures' columns are those that change with the prompt; pads are text too, and left to the host's mask
COLUMNS = {"Flux.2": "0:512", "Flux.2 edit": "0:512", "Ideogram 4 masked": "0:7"}
# references mix with the noise before the first joint attention, and are not image
ROWS = {"Z-Image Omni": "160:192", "Ming-Image edit": "16:32"}
NOTHING = Inserted()
Found = list[tuple[AttentionCall, Places]]


@pytest.fixture(scope="module", params=JOINT, ids=lambda family: family.name)
def family(request) -> Family:
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return families.patcher(family)


@pytest.fixture(autouse=True)
def every_conditioning_in_a_model_call_of_its_own(monkeypatch):
    monkeypatch.setattr(BaseModel, "memory_required", lambda self, *args, **kwargs: float("inf"))


def find_places(model, evaluation: Trace, inserted: Inserted = NOTHING) -> Found:
    """The text's attention calls with where text and image are, in order; every layer has one, and no call an error."""
    network = model.model.diffusion_model
    family = find_family(model.model, network)
    row = family.row(network, evaluation.arguments)
    pattern = "|".join(re.escape(path).replace(r"\*", r"\d+") for path in family.modules)
    layers = {path for path, _ in network.named_modules() if re.fullmatch(pattern, path)}
    found, placed = [], set()
    for call in evaluation.calls:
        layer = re.match(rf"({pattern})(\.|$)", call.module)
        if layer is None:
            continue
        places = place(row, inserted, call.q_length, call.k_length)
        if places is not None:
            found.append((call, places))
            placed.add(layer[1])
    assert placed == layers
    return found


def columns(places: Places) -> list[int]:
    text = places.text
    return list(range(text.start, text.stop)) if isinstance(text, slice) else text.tolist()


def rows(places: Places, queries: int) -> list[int]:
    image = slice(None) if places.image is None else places.image
    return list(range(*image.indices(queries))) if isinstance(image, slice) else image.tolist()


def indices(spans: str) -> list[int]:
    return [i for span in spans.split() for i in range(*map(int, span.split(":")))]


def evaluations(model, family: Family, **options) -> list[Trace]:
    tracer = Tracer()
    families.sample(tracer.attach(model), family, **options)
    return tracer.evaluations


@pytest.mark.parametrize("options", ({"cfg": 1.0}, {"batch": 2}), ids=("one", "guided batch"))
def test_fixtures(family, model, options):
    if family.no_batch:
        options = {**options, "batch": 1}
    text, image = (indices(known.get(family.name, given))
                   for known, given in ((COLUMNS, family.columns), (ROWS, family.rows)))  # fmt: skip
    for evaluation in evaluations(model, family, **options):
        for call, places in find_places(model, evaluation):
            # at the lower levels of Stable Cascade there is less image in front of the text
            shift = call.q_length - len(image) if family.config.startswith("Stable_Cascade") else 0
            assert columns(places) == [column + shift for column in text]
            assert rows(places, call.q_length) == image[: len(image) + shift]


def test_a_second_attention_over_the_image_alone_is_not_the_texts():
    family = families.BY_NAME["SD3.5 medium"]
    model = families.patcher(family)
    (evaluation,) = evaluations(model, family, cfg=1.0)
    placed = {id(call) for call, _ in find_places(model, evaluation)}
    others = [(call.module, call.q_length, call.k_length) for call in evaluation.calls if id(call) not in placed]
    assert others == [("joint_blocks.0", 16, 16)]


def check(
    model, family: Family, *, tokens: int = 11, early: bool = False, inserted: Inserted = NOTHING, **options
) -> Found:
    """Text columns are those that change with the prompt and pads, image rows those that change with the noise.

    `early`: references mix with the noise before.
    """
    runs = [
        evaluations(model, family, positive=families.prompt(family, text, tokens), cfg=1.0, seed=noise, **options)
        for text, noise in ((11, 5), (13, 5), (11, 6))
    ]
    for evaluation, other_text, other_noise in zip(*runs, strict=True):
        found = find_places(model, evaluation, inserted)
        (call, places), *_ = found
        first = next(i for i, other in enumerate(evaluation.calls) if other is call)
        text = changed(call, other_text.calls[first], "k")
        image = changed(call, other_noise.calls[first], "q")
        assert text and set(text) <= set(columns(places))
        assert len(columns(places)) - len(text) == PADS.get(family.name, 0)
        ours = rows(places, call.q_length)
        assert ours in (image[: len(ours)], image[-len(ours) :]) if early else ours == image
    return found


# latents (height, width); the second is no whole number of patches
SIZES = ((12, 6), (7, 9))
# an attention mask of the fixture's size, reference latents that must fit, streams of their own: below
FIXED = ("Flux.1 Redux", "HunyuanCustom", "HiDream E1", "MiniMax H3")
# the host fails on half patches
WHOLE = (
    "Stable Cascade B", "Stable Cascade C", "Chroma Radiance", "Z-Image pixel", "PixelDiT", "HunyuanVideo",
    "HunyuanVideo masked", "HunyuanVideo I2V", "HunyuanVideo I2V replace", "SkyReels I2V", "Mochi",
)  # fmt: skip
# text columns that do not change with a prompt of 11 tokens
PADS = {"Flux.2": 512 - 11, "Flux.2 edit": 512 - 11, "Ideogram 4 masked": 2}


@pytest.mark.parametrize("size", SIZES)
def test_other_sizes_and_lengths(family, model, size):
    if family.name in FIXED:
        return
    height, width = size
    if family.name in WHOLE:
        # of pixels more than of latents
        height, width = (side // 2 * 2 * (family.latent[-1] // 8) for side in size)
    family = replace(family, latent=(*family.latent[:-2], height, width))
    check(model, family, early=family.name in ROWS)


def references(*shapes: tuple[int, ...], method: str | None = None):
    """Reference latents beside what the family's fixture has anyhow."""

    def extras(random):
        given = {"reference_latents": [random(1, *shape) for shape in shapes], **pooled()(random)}
        return given if method is None else {**given, "reference_latents_method": method}

    return extras


def omni(random):
    """Two references: one with a caption and vision tokens; and a caption more."""
    seen = SimpleNamespace(last_hidden_state=random(1, 6 * 7, 24), image_sizes=[(3, 6 * 16, 7 * 16)])
    return {
        "reference_latents": [random(1, 16, 8, 4), random(1, 16, 12, 14)], "clip_vision_outputs": [seen],
        "reference_latents_text_embeds": [random(1, tokens, 24) for tokens in (3, 33, 5)],
    }  # fmt: skip


FLUX_REFERENCES = (16, 8, 4), (16, 5, 7), (16, 9, 3)
QWEN_REFERENCES = (16, 1, 8, 4), (16, 2, 5, 7)
COGVIDEO_15 = {**families.COGVIDEO, "patch_size_t": 2}
# name: (fixture, changes to it)
CASES = {
    **{f"Flux.1 {method}": ("Flux.1 Kontext", {"extras": references(*FLUX_REFERENCES, method=method)})
       for method in (None, "offset", "index", "uxo")},
    "LongCat-Image": ("LongCat-Image", {"extras": references(*FLUX_REFERENCES)}),
    # as Klein: the host fails on the second with guidance, and with Flux.1
    **{f"Flux.2 {method}": ("Flux.2 edit", {
        "layout": {**families.FLUX2, "guidance_embed": False}, "latent": (128, 5, 3),
        "extras": references((128, 4, 2), (128, 3, 5), method=method)})
       for method in (None, "index_timestep_zero")},
    # it is given Flux's and does not look at them
    "Chroma": ("Chroma", {"extras": references(*FLUX_REFERENCES)}),
    **{f"Qwen-Image {method}": ("Qwen-Image-Edit", {"extras": references(*QWEN_REFERENCES, method=method)})
       for method in (None, "index", "negative_index", "offset", "index_timestep_zero")},
    "Qwen-Image of frames": ("Qwen-Image-Edit", {"extras": references(*QWEN_REFERENCES), "latent": (16, 3, 7, 9)}),
    "MageFlow": ("MageFlow", {"extras": references((128, 3, 5), (128, 4, 4))}),
    "OmniGen2": ("OmniGen2 edit", {"extras": references((16, 8, 4), (16, 5, 7)), "latent": (16, 7, 9)}),
    "Boogu": ("Boogu", {"extras": references((16, 8, 4), (16, 5, 7)), "latent": (16, 7, 9)}),
    "JoyImage": ("JoyImage edit", {"extras": references((16, 1, 5, 7), (16, 1, 4, 4)), "latent": (16, 1, 7, 9)}),
    "Krea 2 left out": ("Krea 2", {"extras": references((16, 1, 8, 4))}),
    **{f"Krea 2 {method}": ("Krea 2", {"extras": references((16, 1, 5, 7), (16, 8, 4), method=method)})
       for method in ("index", "index_timestep_zero")},
    "Z-Image": ("Z-Image", {"extras": references((16, 8, 4), (16, 12, 14))}),
    "Z-Image Omni": ("Z-Image Omni", {
        "extras": omni, "latent": (16, 13, 11), "no_batch": "a caption without a reference is not repeated"}),
    # the host's direct context is longer than the prompt; the pads of Layer are behind the references
    "Ming-Image": ("Ming-Image edit", {
        "latent": (16, 1, 7, 9), "text": lambda random, tokens: {"direct_context": random(1, 20, 256)},
        "extras": references((16, 2, 5, 7), (16, 1, 6, 10))}),
    "Ming-Image without direct context": ("Ming-Image edit", {"text": lambda random, tokens: {}}),
    "Ming-Image Layer": ("Ming-Image Layer", {"latent": (16, 3, 7, 9), "extras": references((16, 2, 5, 7))}),
    # two in one place, at either end, and more references than slots
    **{f"Qwen-Image 2.1, {slots}": ("Qwen-Image 2.1 edit", {
        "latent": (64, 3, 5), "extras": lambda random, slots=slots: {
            "reference_latents": [random(1, 64, 2, 3), random(1, 64, 5, 1), random(1, 64, 1, 1)],
            "image_slots": slots}})
       for slots in ([3, 3, 9], [0, 4, 11], [2], [])},
    "HunyuanCustom": ("HunyuanCustom", {"extras": pooled(ref_latent=(1, 16, 1, 6, 10)), "latent": (16, 3, 6, 4)}),
    "HunyuanVideo 1.5": ("HunyuanVideo 1.5", {
        "latent": (32, 3, 5, 3), "text": lambda random, tokens: {"conditioning_byt5small": random(1, 6, 1472)},
        "extras": lambda random: {"pooled_output": None,
                                  "clip_vision_output": SimpleNamespace(last_hidden_state=random(1, 9, 20))}}),
    "Lumina 2": ("Lumina 2", {
        "latent": (16, 6, 10), "extras": lambda random: {
            "reference_latents": [random(1, 16, 8, 4), random(1, 16, 6, 10)],
            "reference_latents_text_embeds": [random(1, 3, 24), random(1, 9, 24)]}}),
    # without a reference the host leaves them out
    "Z-Image Omni, vision alone": ("Z-Image Omni", {"extras": lambda random: {
        name: value for name, value in omni(random).items() if name == "clip_vision_outputs"}}),
    "Z-Image Omni, more vision than references": ("Z-Image Omni", {"extras": lambda random: {
        **omni(random), "clip_vision_outputs": 3 * omni(random)["clip_vision_outputs"]}, "no_batch": "as above"}),
    # its host counts the tokens of all masks together
    "Mochi": ("Mochi", {"text": lambda random, tokens: {"attention_mask": torch.ones(2, tokens, dtype=torch.long)}}),
    # two frames are one; the host fills up an odd one
    "CogVideoX 1.5": ("CogVideoX", {"layout": COGVIDEO_15, "latent": (16, 4, 8, 10)}),
    "CogVideoX 1.5 odd": ("CogVideoX", {"layout": COGVIDEO_15, "latent": (16, 3, 7, 9)}),
    "glyphs left out": ("HunyuanImage 2.1", {"layout": {**families.HUNYUAN_IMAGE, "byt5": False}}),
    "HiDream E1": ("HiDream E1", {"extras": pooled(concat_latent_image=(1, 16, 7, 9)), "latent": (16, 7, 9)}),
    "SD3 registers": ("SD3", {"layout": {**families.SD3, "register_length": 3}}),
    "PixelDiT": ("PixelDiT", {"layout": {**families.PIXELDIT, "txt_max_length": 9}}),
    "Stable Cascade C": ("Stable Cascade C", {
        "layout": {**families.CASCADE_C, "switch_level": [True]}, "latent": (16, 9, 6),
        "extras": lambda random: {**pooled()(random), "unclip_conditioning": [
            {"strength": 1.0, "clip_vision_output": SimpleNamespace(image_embeds=random(1, 768))}] * 2}}),
    "Stable Cascade B": ("Stable Cascade B", {
        "latent": (4, 36, 44), "text": lambda random, tokens: {"pooled_output": random(1, 2, 16)}}),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(request):
    fixture, changes = CASES[request.param]
    family = replace(families.BY_NAME[fixture], **changes)
    return families.patcher(family), family


@pytest.mark.parametrize("batch", (1, 2))
def test_references_and_what_else_is_in_a_row(case, batch):
    model, family = case
    if batch == 1 or not family.no_batch:
        check(model, family, early=family.config in ("ZImage", "Lumina2", "MingImage"), batch=batch)


def minimax_conditions(random):
    sound, moving = random(1, 32, 2, 3), random(1, 24, 2, 4, 6)
    shape = {"latent_h": 4, "latent_w": 6}
    return {
        # else they get some of the noise
        "minimax_visual_cond_noise_aug": 1.0,
        # on the grid of the video, which the host pads to 8 by 10
        "minimax_keyframes": [
            {"resolved_frame_index": 0, "latent": random(1, 24, 1, 8, 10)},
            {"resolved_frame_index": 5, "latent": random(1, 24, 2, 8, 10), "audio_latent": sound},
            {"resolved_frame_index": 9, "audio_latent": sound},
        ],
        "minimax_refs": [
            {"kind": "image", **shape, "latent": random(1, 24, 1, 4, 6)},
            {"kind": "video_audio", "latent_t": 2, **shape, "ref_audio_t": 3, "latent": moving, "audio_latent": sound},
            {"kind": "video", "latent_t": 2, **shape, "ref_audio_t": 0, "latent": moving, "audio_latent": None},
            {"kind": "audio", "ref_audio_t": 3, "audio_latent": sound},
        ],
    }


@pytest.mark.parametrize("extras", (lambda random: {}, minimax_conditions), ids=("plain", "conditions"))
def test_minimax(extras):
    family = replace(families.BY_NAME["MiniMax H3"], latent=((24, 3, 7, 9), (32, 2, 5)), extras=extras)
    check(families.patcher(family), family)


def test_a_mask_over_text_and_image():
    family = replace(families.BY_NAME["Flux.1 Redux"], latent=(16, 12, 6))
    check(families.patcher(family), family, tokens=7)


def test_as_many_registers_as_the_network_has():
    family = families.BY_NAME["AuraFlow"]
    model = families.patcher(family)
    model.model.diffusion_model.register_tokens = torch.nn.Parameter(torch.randn(1, 5, 32))
    *_, (_, places) = check(model, family)
    assert places.text == slice(5, 16)


def test_prompts_of_unequal_length_in_one_batch(monkeypatch):
    """The host repeats them to one length."""
    monkeypatch.undo()
    family = families.BY_NAME["Stable Cascade C"]
    model = families.patcher(family)
    prompts = {"positive": families.prompt(family, 11, 9), "negative": families.prompt(family, 12, 6)}
    (evaluation,) = evaluations(model, family, **prompts)
    (call, places), *_ = find_places(model, evaluation)
    assert len(call.q) == 2
    assert places == (slice(64, 64 + 18), None)


@pytest.mark.parametrize("name", ("Flux.1 Kontext", "Qwen-Image-Edit", "MageFlow", "Krea 2"))
def test_tokens_that_a_patch_puts_around_the_streams(name):
    inserted = Inserted(text=(3, 2), image=(1, 2))

    def around(stream, front, behind):
        before, after = (stream.new_ones(len(stream), count, stream.shape[-1]) for count in (front, behind))
        return torch.cat((before, stream, after), 1)

    def patch(given):
        counts = {"txt": inserted.text, "txt_ids": inserted.text, "img": inserted.image, "img_ids": inserted.image}
        return {**given, **{name: around(given[name], *count) for name, count in counts.items()}}

    family = families.BY_NAME[name]
    model = families.patcher(family)
    model.set_model_post_input_patch(patch)
    *_, (_, places) = check(model, family, inserted=inserted)
    assert places == (slice(3, 14), slice(17, 33))


@pytest.mark.parametrize("name", ("Flux.2 edit", "Qwen-Image-Edit", "MageFlow", "Krea 2"))
def test_references_whose_keys_come_from_a_cache(name):
    added = {"MageFlow": references((128, 4, 2)), "Krea 2": references((16, 1, 8, 4), method="index_timestep_zero")}
    family = families.BY_NAME[name]
    family = replace(family, extras=added.get(name, family.extras))
    model = comfy_extras.nodes_flux.FluxKVCache.execute(families.patcher(family)).result[0]
    text = 512 if name == "Flux.2 edit" else 7
    filling, cached = evaluations(model, family, cfg=1.0, steps=2)
    for call, places in find_places(model, filling):
        assert call.q_length == call.k_length == text + 24
        assert places == (slice(0, text), slice(text, text + 16))
    for call, places in find_places(model, cached, Inserted(removed=8)):
        assert (call.q_length, call.k_length) == (text + 16, text + 24)
        assert places == (slice(0, text), slice(text, text + 16))
    assert find_places(model, cached)


def row(*spans: tuple[str, int], **options) -> Row:
    return Row(tuple(Span(*span) for span in spans), **options)


EDIT = row(("text", 7), ("image", 16), ("references", 8))


def test_place():
    assert place(EDIT, Inserted(), 31, 31) == (slice(0, 7), slice(7, 23))
    last = row(("image", 16), ("references", 8), ("text", 7))
    assert place(last, Inserted(), 31, 31) == (slice(24, 31), slice(0, 16))


def test_adjacent_text_is_one_text_and_other_text_is_two():
    parts = row(("vision", 2), ("text", 3), ("text", 4), ("image", 16), ("image", 5))
    assert place(parts, Inserted(), 30, 30) == (slice(2, 9), slice(9, 30))
    text, image = place(row(("text", 3), ("image", 16), ("text", 4)), Inserted(), 23, 23)
    assert (text.tolist(), image) == ([0, 1, 2, 19, 20, 21, 22], slice(3, 19))


def test_image_rows_apart():
    beside = row(("image", 2), ("references", 3), ("image", 2), ("references", 3), ("text", 4))
    text, image = place(beside, Inserted(), 14, 14)
    assert (text, image.tolist()) == (slice(10, 14), [0, 1, 5, 6])


def test_another_attention_of_the_block():
    # SD3.5-medium's second one, and a refiner of the text
    assert place(EDIT, Inserted(), 24, 24) is None
    assert place(EDIT, Inserted(), 7, 7) is None
    assert place(EDIT, Inserted(text=(0, 2), image=(1, 0)), 9, 9) is None
    assert place(EDIT, Inserted(text=(0, 2), image=(1, 0)), 25, 25) is None
    registers = row(("registers", 8), ("text", 7), ("image", 16), text_stream=("registers", "text"))
    assert place(registers, Inserted(), 15, 15) is None
    with pytest.raises(ValueError):
        place(registers, Inserted(), 7, 7)


def test_no_text():
    assert place(row(("image", 16)), Inserted(), 16, 16) is None


def test_the_image_stream_alone_on_the_whole_row():
    assert place(EDIT, Inserted(), 24, 31) == (slice(0, 7), slice(0, 16))
    assert place(EDIT, Inserted(image=(1, 1)), 26, 33) == (slice(0, 7), slice(1, 17))
    assert place(row(("text", 7), ("image", 16)), Inserted(), 16, 23) == (slice(0, 7), None)


def test_queries_that_are_never_the_whole_row():
    cascade = row(("image", 16), ("text", 7), ("pooled", 4), queries=("image",), levels=(4,))
    assert place(cascade, Inserted(), 16, 27) == (slice(16, 23), None)
    assert place(cascade, Inserted(), 4, 15) == (slice(4, 11), None)
    for queries, keys in ((27, 27), (4, 27), (16, 15)):
        with pytest.raises(ValueError, match="image 16 [+] text 7 [+] pooled 4 = 27 or image 4 [+]"):
            place(cascade, Inserted(), queries, keys)


def test_added_tokens():
    assert place(EDIT, Inserted(text=(5, 2)), 38, 38) == (slice(5, 12), slice(14, 30))
    assert place(EDIT, Inserted(image=(5, 2)), 38, 38) == (slice(0, 7), slice(12, 28))
    last = row(("image", 16), ("text", 7))
    assert place(last, Inserted(text=(1, 0), image=(0, 3)), 27, 27) == (slice(20, 27), slice(0, 16))
    registers = row(("registers", 8), ("text", 7), ("image", 16), text_stream=("registers", "text"))
    assert place(registers, Inserted(text=(3, 0)), 34, 34) == (slice(11, 18), slice(18, 34))


def test_removed_references():
    cached = Inserted(removed=8)
    assert place(EDIT, cached, 23, 31) == (slice(0, 7), slice(7, 23))
    # lost altogether
    assert place(EDIT, cached, 23, 23) == (slice(0, 7), slice(7, 23))
    # nobody saw who removed them
    assert place(EDIT, Inserted(), 23, 31) == (slice(0, 7), slice(7, 23))
    assert place(EDIT, Inserted(text=(3, 0), removed=8), 26, 34) == (slice(3, 10), slice(10, 26))
    # a part of them
    assert place(EDIT, Inserted(removed=3), 28, 31) == (slice(0, 7), slice(7, 23))
    with pytest.raises(ValueError, match="with 23 queries, not 21 or 28"):
        place(EDIT, Inserted(removed=3), 23, 31)
    # another attention, over the image stream and the cache
    assert place(EDIT, cached, 16, 24) is None
    with pytest.raises(ValueError, match="with 31 queries, not 16 or 23"):
        place(EDIT, cached, 31, 31)
    with pytest.raises(ValueError, match="image 16 [+] references 8 = 24 tokens in the image stream, but 25 were"):
        place(EDIT, Inserted(removed=25), 6, 31)


def test_a_row_that_does_not_add_up():
    expected = "text 7 + image 16 + references 8 = 31 keys"
    with pytest.raises(ValueError, match=re.escape(f"{expected}, but the attention row has 35 (and 35 queries)")):
        place(EDIT, Inserted(), 35, 35)
    with pytest.raises(ValueError, match=re.escape(f"{expected}, as there are, but with 20 queries, not 23 or 24 or")):
        place(EDIT, Inserted(), 20, 31)
    with pytest.raises(ValueError, match=re.escape("added 2 + text 7 + image 16 + references 8 = 33 keys, but")):
        place(EDIT, Inserted(text=(2, 0)), 31, 31)
    many = row(*[("image", 2), ("references", 3)] * 20, ("text", 7))
    with pytest.raises(ValueError, match=re.escape("image 40 + references 60 + text 7 = 107 keys, but")):
        place(many, Inserted(), 99, 99)


def test_a_row_that_can_be_read_in_two_ways():
    # the row without references, or the image stream alone
    with pytest.raises(ValueError, match="24 queries on 32 keys can be read in more than one way"):
        place(row(("text", 8), ("image", 16), ("references", 8)), Inserted(), 24, 32)


def test_image_tokens():
    assert image_tokens((1, 16, 7, 9), 2) == 20
    assert image_tokens((1, 16, 3, 7, 9), 2) == 60
    assert image_tokens((1, 16, 3, 7, 9), (2, 2, 2)) == 40
    assert image_tokens((1, 16, 3, 7, 9), (2, 2)) == 20
