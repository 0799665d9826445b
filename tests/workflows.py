"""The example workflows, and their API format, as ComfyUI's front end makes it from the saved one."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "example_workflows"
# need no download
RUN_HERE = ("01_pladis_demo", "02_pladis_sweep", "03_pladis_attention_map", "04_pladis_schedule")
NAMES = (
    *RUN_HERE, "sd15_text_to_image", "sdxl_text_to_image", "sdxl_few_step", "sd35_text_to_image", "flux_text_to_image",
    "qwen_image_text_to_image", "z_image_turbo_text_to_image", "krea2_turbo_text_to_image", "wan_text_to_video",
    "ipadapter_sdxl",
)  # fmt: skip
# nodes of other packs: their inputs, in the format of /object_info
THIRD_PARTY = {
    "comfyui_ipadapter_plus": {
        "IPAdapterModelLoader": {
            "input": {"required": {"ipadapter_file": [[]]}},
            "output": ["IPADAPTER"],
        },
        "IPAdapterAdvanced": {
            "input": {
                "required": {
                    "model": ["MODEL"],
                    "ipadapter": ["IPADAPTER"],
                    "image": ["IMAGE"],
                    "weight": ["FLOAT"],
                    "weight_type": [["linear"]],
                    "combine_embeds": [["concat"]],
                    "start_at": ["FLOAT"],
                    "end_at": ["FLOAT"],
                    "embeds_scaling": [["V only"]],
                },
                "optional": {"image_negative": ["IMAGE"], "attn_mask": ["MASK"], "clip_vision": ["CLIP_VISION"]},
            },
            "output": ["MODEL"],
        },
    },
}
NOTES = ("MarkdownNote",)
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def working(workflow: dict) -> list[dict]:
    """Its nodes without the notes."""
    return [node for node in workflow["nodes"] if node["type"] not in NOTES]


def inputs_of(info: dict) -> dict[str, list]:
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def widget_names(info: dict) -> list[str | None]:
    """What the values of a saved node stand for, in their order; None for those that the front end keeps to itself."""
    names: list[str | None] = []
    for name, (kind, *options) in inputs_of(info).items():
        if not isinstance(kind, list) and kind not in WIDGETS:
            continue
        names.append(name)
        options = options[0] if options else {}
        if options.get("control_after_generate") or (kind == "INT" and name in ("seed", "noise_seed")):
            names.append(None)
        if options.get("image_upload"):
            names.append(None)
    return names


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """The API format. Inputs that a node has got since the file was saved, its last ones, are at their defaults."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in working(workflow):
        names = widget_names(object_info[node["type"]])
        values = node.get("widgets_values", [])
        since = [object_info[node["type"]]["input"].get("optional", {}).get(name) for name in names[len(values) :]]
        assert len(values) <= len(names) and all(since), f"{node['type']}: {values} for {names}"
        values = [*values, *(options["default"] for _, options in since)]
        inputs = {name: value for name, value in zip(names, values, strict=True) if name is not None}
        inputs.update({slot["name"]: sources[slot["link"]] for slot in node["inputs"] if slot["link"] is not None})
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def lacks(workflow: dict, object_info: dict) -> str:
    """What a ComfyUI is too old for: a kind of text encoder."""
    kinds = object_info["CLIPLoader"]["input"]["required"]["type"][0]
    wanted = {n["widgets_values_named"]["type"] for n in workflow["nodes"] if n["type"] == "CLIPLoader"}
    return ", ".join(sorted(wanted - set(kinds)))
