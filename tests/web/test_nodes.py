"""What the Apply nodes show in a real browser, in both renderers of ComfyUI. test_hosts.py starts it for every host."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Locator, Page, expect

from comfy_server import PACK_FOLDER
from pladis_core import entmax, pladis_weights

SCREENSHOTS = Path(__file__).parents[2] / "docs" / "screenshots"
DEMO, BASIC, ADVANCED, CHECKPOINT, UNKNOWN = 1, 2, 3, 4, 5
BLOCKS = ["d0", "d1", "m0", "u0", "u1", "u2"]
VALUES = {BASIC: [2, 1.5, 0, 1], ADVANCED: [2, 1.5, 0, 1, "all", "", "both", False, "constant", 0, 0, "all", ""]}
# node id: class, position, values, {input: [node, output]}
PANELS = {
    DEMO: ("PLADISDemoCheckpoint", (80, 130), {}, {}),
    BASIC: ("PLADISApply", (440, 130), {}, {"model": (DEMO, 0)}),
    ADVANCED: ("PLADISApplyAdvanced", (820, 130), {}, {"model": (BASIC, 0)}),
    CHECKPOINT: ("CheckpointLoaderSimple", (80, 500), {}, {}),
    UNKNOWN: ("PLADISApplyAdvanced", (1200, 130), {}, {"model": (CHECKPOINT, 0)}),
}
# Text to image
SAMPLING = {
    DEMO: ("PLADISDemoCheckpoint", (80, 130), {}, {}),
    10: ("CLIPTextEncode", (80, 320), {"text": "a red circle left of a blue square"}, {"clip": (DEMO, 1)}),
    11: ("CLIPTextEncode", (80, 560), {"text": ""}, {"clip": (DEMO, 1)}),
    12: ("EmptyLatentImage", (440, 760), {"width": 64, "height": 64}, {}),
    ADVANCED: ("PLADISApplyAdvanced", (440, 130), {}, {"model": (DEMO, 0)}),
    13: (
        "KSampler", (820, 130), {"seed": 1, "steps": 20, "cfg": 3, "sampler_name": "euler", "scheduler": "simple"},
        {"model": (ADVANCED, 0), "positive": (10, 0), "negative": (11, 0), "latent_image": (12, 0)},
    ),
    14: ("VAEDecode", (820, 560), {}, {"samples": (13, 0), "vae": (DEMO, 2)}),
    15: ("SaveImage", (1200, 130), {"filename_prefix": "pladis"}, {"images": (14, 0)}),
}  # fmt: skip
# two samplers in a row, each with an Apply node of its own
RECEIPTS = {
    **SAMPLING,
    BASIC: ("PLADISApply", (1200, 400), {}, {"model": (DEMO, 0)}),
    20: (
        "KSampler", (820, 700), {"seed": 1, "steps": 2, "cfg": 3, "sampler_name": "euler", "scheduler": "simple"},
        {"model": (BASIC, 0), "positive": (10, 0), "negative": (11, 0), "latent_image": (12, 0)},
    ),
    13: (
        "KSampler", (820, 130), {"seed": 1, "steps": 3, "cfg": 3, "sampler_name": "euler", "scheduler": "simple"},
        {"model": (ADVANCED, 0), "positive": (10, 0), "negative": (11, 0), "latent_image": (20, 0)},
    ),
}  # fmt: skip
BUILD = """async (nodes) => {
    app.graph.clear();
    const made = {};
    for (const [id, [type, pos, values]] of Object.entries(nodes)) {
        const node = made[id] = LiteGraph.createNode(type);
        [node.id, node.pos] = [Number(id), pos];
        app.graph.add(node);
        for (const [name, value] of Object.entries(values)) node.widgets.find((w) => w.name === name).value = value;
    }
    for (const [id, [, , , links]] of Object.entries(nodes))
        for (const [name, [from, slot]] of Object.entries(links))
            made[from].connect(slot, made[id], made[id].findInputSlot(name));
    // as a file that is opened: where undo starts from
    await app.loadGraphData(JSON.parse(JSON.stringify(app.graph.serialize())));
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [0, 0];
    app.canvas.setDirty(true, true);
}"""


@pytest.fixture
def page(opened) -> Page:
    """With every Apply node, before and after a loader that the pack knows and one that it does not."""
    opened.errors.clear()
    opened.evaluate(BUILD, PANELS)
    expect(plot(opened, BASIC).locator("rect.dense")).to_have_count(12)
    yield opened
    assert opened.errors == []


def panel(page: Page, node: int, name: str) -> Locator:
    """The element of a node's panel, which undo and loading make anew."""
    mark = f"{name}-{node}"
    page.evaluate(
        """([id, name, mark]) => {
            document.getElementById(mark)?.removeAttribute("id");
            app.canvas.graph.getNodeById(id).widgets.find((widget) => widget.name === name).element.id = mark;
        }""",
        [node, name, mark],
    )
    return page.locator(f"#{mark}")


def plot(page: Page, node: int) -> Locator:
    return panel(page, node, "pladis_plot")


def picker(page: Page, node: int) -> Locator:
    return panel(page, node, "pladis_blocks")


def chip(page: Page, node: int, title: str) -> Locator:
    return picker(page, node).get_by_title(title, exact=True)


def pressed(page: Page, node: int) -> list[str]:
    """The blocks and, in blocks of several layers, the layers that show as chosen."""
    return picker(page, node).locator("button[aria-pressed='true']").evaluate_all("found => found.map(b => b.title)")


def set_value(page: Page, node: int, **values) -> None:
    page.evaluate(
        """([id, values]) => app.graph.getNodeById(id).widgets.forEach((widget) => {
            if (widget.name in values) widget.value = values[widget.name];
            app.canvas.setDirty(true, true);
        })""",
        [node, values],
    )
    settle(page)


def value(page: Page, node: int, name: str):
    return page.evaluate(
        "([id, name]) => app.graph.getNodeById(id).widgets.find((widget) => widget.name === name).value", [node, name]
    )


def settle(page: Page) -> None:
    """Two frames: in one of them the panels look at their node."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def plotted(page: Page, node: int) -> dict[str, torch.Tensor]:
    """The weights that the shapes of a plot stand for."""
    return {
        kind: torch.tensor(found, dtype=torch.float64)
        for kind, found in plot(page, node).evaluate("""(root) => {
            const all = (selector, read) => [...root.shadowRoot.querySelectorAll(selector)].map(read);
            const number = (shape, name) => Number(shape.getAttribute(name));
            const bar = (shape) => number(shape, "y") < 0 ? -number(shape, "y") : -number(shape, "height");
            return {
                dense: all("rect.dense", bar),
                sparse: all("line.sparse", (line) => -number(line, "y1")),
                mixed: all("rect.mixed", bar),
            };
        }""").items()
    }


def assert_plotted(page: Page, node: int, scale: float, alpha: float) -> None:
    scores = page.evaluate(f"async () => (await import('/extensions/{PACK_FOLDER}/pladis_plot.js')).SCORES")
    scores = torch.tensor(scores, dtype=torch.float64)
    mixed = pladis_weights(scores, scale, alpha)
    found = plotted(page, node)
    for kind, weights in {"dense": scores.softmax(-1), "sparse": entmax(scores, alpha), "mixed": mixed}.items():
        torch.testing.assert_close(found[kind], weights, rtol=0, atol=1e-6, msg=kind)


def saved(page: Page) -> dict:
    return page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize()))")


def drag_scale(page: Page, node: int) -> None:
    """Takes hold of the scale widget, and moves without letting go."""
    if page.renderer == "classic":
        x, y = page.evaluate(
            """(id) => {
                const node = app.graph.getNodeById(id);
                const { top, left } = app.canvas.canvas.getBoundingClientRect();
                const y = node.widgets.find(({ name }) => name === "scale").last_y + 12;
                return [left + node.pos[0] + node.size[0] / 2, top + node.pos[1] + y];
            }""",
            node,
        )
    else:
        box = page.locator(f"[data-node-id='{node}'] input[inputmode='decimal']").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    for step in range(1, 6):
        page.mouse.move(x + 20 * step, y)


def queue(page: Page) -> None:
    """Runs the workflow, to its end."""
    page.evaluate("""() => new Promise((done, failed) => {
        app.api.addEventListener("execution_success", () => done(), { once: true });
        app.api.addEventListener("execution_error", ({ detail }) => failed(detail.exception_message), { once: true });
        app.queuePrompt(0);
    })""")


def inside(inner: dict, outer: dict) -> bool:
    """Within a pixel."""
    return all(
        inner[start] >= outer[start] - 1 and inner[start] + inner[size] <= outer[start] + outer[size] + 1
        for start, size in (("x", "width"), ("y", "height"))
    )


def node_box(page: Page, node: int) -> dict:
    if page.renderer == "nodes-2":
        return page.locator(f"[data-node-id='{node}']").bounding_box()
    return page.evaluate(
        """(id) => {
            const { pos: [x, y], size: [width, height] } = app.canvas.graph.getNodeById(id);
            const { top, left } = app.canvas.canvas.getBoundingClientRect();
            return { x: left + x, y: top + y, width, height };
        }""",
        node,
    )


def test_the_panels_lie_inside_their_nodes_one_below_the_other(page):
    for node, panels in {BASIC: [plot], ADVANCED: [picker, plot], UNKNOWN: [picker, plot]}.items():
        found = [at(page, node) for at in panels]
        for element in found:
            expect(element).to_be_visible()
        page.wait_for_timeout(300)
        boxes = [element.bounding_box() for element in found]
        assert all(inside(box, node_box(page, node)) for box in boxes), (boxes, node_box(page, node))
        assert all(upper["y"] + upper["height"] <= lower["y"] + 1 for upper, lower in pairwise(boxes))
        assert all(box["width"] > 250 and box["height"] > 20 for box in boxes)
        assert boxes[-1]["height"] >= 100
    if "PLADIS_SCREENSHOTS" in os.environ and os.environ["PLADIS_HOST"] == "newest":
        set_value(page, ADVANCED, layers="custom", blocks="d1,u0-2", scale=3)
        tell(page, BASIC, "2 of 2 chosen text layers in 20 of 20 steps, lambda 2, alpha 1.5")
        tell(page, ADVANCED, "4 of 4 chosen text layers in 20 of 20 steps, lambda 3, alpha 1.5")
        page.wait_for_timeout(500)
        boxes = [node_box(page, node) for node in (BASIC, ADVANCED)]
        right, bottom = (max(box[at] + box[size] for box in boxes) for at, size in (("x", "width"), ("y", "height")))
        x, y = boxes[0]["x"] - 20, boxes[0]["y"] - 60
        SCREENSHOTS.mkdir(exist_ok=True)
        clip = {"x": x, "y": y, "width": right + 20 - x, "height": bottom + 30 - y}
        page.screenshot(path=SCREENSHOTS / f"{page.renderer}.png", clip=clip)


@pytest.mark.parametrize(("scale", "alpha"), ((2, 1.5), (0, 1.5), (1, 2), (5.35, 1.25), (10, 1)))
def test_the_plot_shows_the_weights_of_the_nodes_values(page, scale, alpha):
    for node in (BASIC, ADVANCED):
        set_value(page, node, scale=scale, alpha=alpha)
        assert_plotted(page, node, scale, alpha)


def test_negative_weights_hang_below_the_line(page):
    set_value(page, BASIC, scale=3)
    line = plot(page, BASIC).locator("line.zero").bounding_box()["y"]
    bars = [bar.bounding_box() for bar in plot(page, BASIC).locator("rect.negative").all()]
    assert len(bars) > 3
    assert all(bar["y"] >= line - 1 for bar in bars) and max(bar["height"] for bar in bars) > 5
    assert all(inside(bar, plot(page, BASIC).bounding_box()) for bar in bars)


def test_the_plot_follows_while_the_mouse_drags(page):
    drag_scale(page, BASIC)
    settle(page)
    scale = value(page, BASIC, "scale")
    assert scale != 2
    assert_plotted(page, BASIC, scale, 1.5)
    page.mouse.up()


def test_a_click_writes_the_list_and_makes_it_the_choice(page):
    chip(page, ADVANCED, "Block d1").click()
    assert (value(page, ADVANCED, "layers"), value(page, ADVANCED, "blocks")) == ("custom", "d1")
    chip(page, ADVANCED, "Block u0").click()
    chip(page, ADVANCED, "Block u1").click()
    chip(page, ADVANCED, "Block d1").click()
    assert value(page, ADVANCED, "blocks") == "u0-1"
    settle(page)
    assert pressed(page, ADVANCED) == ["Block u0", "Block u1"]
    picker(page, ADVANCED).get_by_text("all", exact=True).click()
    assert value(page, ADVANCED, "blocks") == "d0-1,m0,u0-2"
    picker(page, ADVANCED).get_by_text("none", exact=True).click()
    assert value(page, ADVANCED, "blocks") == ""
    expect(picker(page, ADVANCED)).to_contain_text("Choose at least one block")


def test_a_click_shows_in_the_text_field(page):
    page.wait_for_timeout(500)
    box = node_box(page, ADVANCED)
    # the inputs alone, above the picker
    box["height"] = picker(page, ADVANCED).bounding_box()["y"] - box["y"]
    # the mouse is where it will click, so that nothing but the values changes
    chip(page, ADVANCED, "Block d1").hover()
    page.wait_for_timeout(300)
    before = page.screenshot(clip=box)
    page.mouse.down()
    page.mouse.up()
    page.wait_for_timeout(300)
    assert page.screenshot(clip=box) != before


def test_the_text_field_moves_the_chips(page):
    set_value(page, ADVANCED, layers="custom", blocks="M0, u1-2,d9,x")
    assert pressed(page, ADVANCED) == ["Block m0", "Block u1", "Block u2"]
    expect(picker(page, ADVANCED)).to_contain_text("no block d9; 'x' is not a block.")
    # what it cannot read stays the user's
    chip(page, ADVANCED, "Block m0").click()
    assert value(page, ADVANCED, "blocks") == "u1-2,d9,x"


def test_layers_inside_a_block_are_chips_of_their_own(page):
    set_value(page, CHECKPOINT, ckpt_name="sd_xl_base_1.0.safetensors")
    set_value(page, UNKNOWN, layers="custom", blocks="d2.2-9")
    expect(chip(page, UNKNOWN, "Block d2")).to_have_attribute("aria-pressed", "mixed")
    chip(page, UNKNOWN, "Layer d2.5").click()
    assert value(page, UNKNOWN, "blocks") == "d2.2-4,d2.6-9"
    chip(page, UNKNOWN, "Block d2").click()
    assert value(page, UNKNOWN, "blocks") == "d2"
    chip(page, UNKNOWN, "Layer u0.4").click()
    assert value(page, UNKNOWN, "blocks") == "d2,u0.4"


def test_a_model_that_is_not_known_has_the_chips_of_its_list(page):
    set_value(page, CHECKPOINT, ckpt_name="something.safetensors")
    expect(picker(page, UNKNOWN).locator("button")).to_have_count(0)
    set_value(page, UNKNOWN, layers="custom", blocks="b0-2,d999999")
    expect(picker(page, UNKNOWN).locator("button.block")).to_have_count(3)
    chip(page, UNKNOWN, "Block b2").click()
    assert value(page, UNKNOWN, "blocks") == "b0-1,d999999"
    settle(page)
    # the chip is still there to click it back
    chip(page, UNKNOWN, "Block b2").click()
    assert value(page, UNKNOWN, "blocks") == "b0-2,d999999"


def test_the_wheel_zooms_over_a_panel_and_scrolls_a_long_list(page):
    zoom = "app.canvas.ds.scale"
    for node in (plot(page, BASIC), picker(page, ADVANCED)):
        before = page.evaluate(zoom)
        node.hover()
        page.mouse.wheel(0, -100)
        page.wait_for_function(f"{zoom} > {before}")
    set_value(page, UNKNOWN, layers="custom", blocks="b0-99")
    expect(picker(page, UNKNOWN)).to_have_attribute("data-capture-wheel", "true")
    # Nodes 2.0 leaves the wheel to an element that has the focus
    chip(page, UNKNOWN, "Block b0").click()
    before = page.evaluate(zoom)
    page.mouse.wheel(0, 100)
    page.wait_for_function("(list) => list.scrollTop > 0", arg=picker(page, UNKNOWN).element_handle())
    assert page.evaluate(zoom) == before


def test_undo_takes_back_one_click(page):
    chip(page, ADVANCED, "Block d1").click()
    chip(page, ADVANCED, "Block m0").click()
    settle(page)
    assert pressed(page, ADVANCED) == ["Block d1", "Block m0"]
    for blocks, layers, chips in (("d1", "custom", ["Block d1"]), ("", "all", [])):
        page.keyboard.press("Control+z")
        page.wait_for_function(f"app.graph.getNodeById({ADVANCED})?.widgets.some((w) => w.value === '{layers}')")
        page.wait_for_function(
            f"app.graph.getNodeById({ADVANCED})?.widgets.some((w) => w.name === 'blocks' && w.value === '{blocks}')"
        )
        # the values are there before ComfyUI is ready for the next one
        page.wait_for_timeout(700)
        assert pressed(page, ADVANCED) == chips


def test_a_linked_list_cannot_be_clicked(page):
    page.evaluate(
        """(id) => {
            const [source, node] = [LiteGraph.createNode("PrimitiveString"), app.graph.getNodeById(id)];
            source.pos = [80, 700];
            app.graph.add(source);
            source.connect(0, node, node.findInputSlot("blocks"));
        }""",
        ADVANCED,
    )
    expect(picker(page, ADVANCED)).to_contain_text("comes from a link")
    box = chip(page, ADVANCED, "Block d1").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert (value(page, ADVANCED, "layers"), value(page, ADVANCED, "blocks")) == ("all", "")
    page.evaluate(
        """(id) => {
            const node = app.graph.getNodeById(id);
            node.disconnectInput(node.findInputSlot("blocks"));
        }""",
        ADVANCED,
    )
    expect(picker(page, ADVANCED)).not_to_contain_text("comes from a link")
    chip(page, ADVANCED, "Block d1").click()
    assert value(page, ADVANCED, "blocks") == "d1"


def test_a_saved_workflow_holds_the_inputs_alone_and_loads_as_it_was(page):
    before = saved(page)
    assert {n["id"]: n["widgets_values"] for n in before["nodes"] if n["id"] in VALUES} == VALUES
    chip(page, ADVANCED, "Block u2").click()
    set_value(page, BASIC, scale=3.5)
    first = saved(page)
    assert "pladis_plot" not in json.dumps(first) and "pladis_blocks" not in json.dumps(first)
    page.evaluate("(workflow) => app.loadGraphData(workflow)", first)
    settle(page)
    assert saved(page) == first
    assert pressed(page, ADVANCED) == ["Block u2"]
    assert_plotted(page, BASIC, 3.5, 1.5)
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    assert set(prompt[str(BASIC)]["inputs"]) == {"model", "scale", "alpha", "start_percent", "end_percent"}
    assert set(prompt[str(ADVANCED)]["inputs"]) == {
        *prompt[str(BASIC)]["inputs"], "layers", "blocks", "apply_to", "force_unknown",
        "scale_schedule", "end_scale", "norm_cap", "tokens", "prompt",
    }  # fmt: skip


def test_a_workflow_from_before_the_panels_gets_room_for_them(page):
    workflow = saved(page)
    for node in workflow["nodes"]:
        if node["id"] in VALUES:
            node["size"] = [270, 60]
    page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
    settle(page)
    page.wait_for_timeout(500)
    for node in VALUES:
        assert inside(plot(page, node).bounding_box(), node_box(page, node))


def test_a_queued_workflow_shows_its_picture_and_the_models_own_blocks(page):
    page.evaluate(BUILD, SAMPLING)
    expect(picker(page, ADVANCED)).to_contain_text("layers is all")
    set_value(page, ADVANCED, layers="custom", blocks="d0-1,u0-2")
    expect(picker(page, ADVANCED)).to_contain_text("The blocks of the demo model.")
    page.evaluate("app.queuePrompt(0)")
    page.wait_for_function("app.graph.getNodeById(15).imgs?.[0]?.naturalWidth === 64", timeout=60_000)
    if page.renderer == "nodes-2":
        picture = page.locator("[data-node-id='15'] img")
        expect(picture).to_be_visible()
        assert picture.evaluate("(image) => image.naturalWidth") == 64
    expect(picker(page, ADVANCED)).to_contain_text("The blocks at the last run.")
    assert picker(page, ADVANCED).locator("button.block").all_text_contents() == BLOCKS


def receipt(page: Page, node: int) -> Locator:
    return plot(page, node).locator(".receipt")


def assert_it_has_its_own_room(page: Page, node: int) -> None:
    """The receipt lies beneath the plot and its legend, inside the panel, which lies inside the node."""
    expect(receipt(page, node)).to_be_visible()
    # for a node to grow, as in the other tests
    page.wait_for_timeout(300)
    parts = [plot(page, node).locator(part).bounding_box() for part in ("svg", ".legend", ".receipt")]
    outer = plot(page, node).bounding_box()
    assert all(inside(part, outer) for part in parts) and inside(outer, node_box(page, node)), (parts, outer)
    assert all(upper["y"] + upper["height"] <= lower["y"] + 1 for upper, lower in pairwise(parts)), parts
    assert parts[0]["height"] >= 23 and parts[2]["height"] > 10, parts


def tell(page: Page, node: int | str, text: str, **more: str) -> None:
    """As the server does after a run."""
    page.evaluate(
        "(detail) => app.api.dispatchEvent(new CustomEvent('pladis.receipt', { detail }))",
        {"node": str(node), "text": text, **more},
    )
    settle(page)


def steps_to_undo(page: Page) -> int:
    return page.evaluate("""() => {
        const { changeTracker } = app.extensionManager.workflow.activeWorkflow;
        changeTracker.checkState();
        return changeTracker.undoQueue.length;
    }""")


def test_the_nodes_say_what_the_last_run_did(page, server):
    page.evaluate(BUILD, RECEIPTS)
    set_value(page, ADVANCED, scale=3)
    page.evaluate("""() => {
        window.told = [];
        app.api.addEventListener("pladis.receipt", ({ detail }) => told.push(detail));
    }""")
    # a run that no browser queued: its nodes are not those of this page
    stranger = page.evaluate("async () => (await app.graphToPrompt()).output")
    for node in (BASIC, ADVANCED):
        stranger[str(node)]["inputs"]["scale"] = 5
    assert server.run(stranger)["status"]["status_str"] == "success"
    expect(receipt(page, BASIC)).to_be_hidden()

    def words(node: int, text: str) -> None:
        expect(receipt(page, node)).to_have_text(text)
        assert_it_has_its_own_room(page, node)

    before = saved(page)
    queue(page)
    words(BASIC, "6 of 6 text layers in 2 of 2 steps, lambda 2, alpha 1.5")
    words(ADVANCED, "6 of 6 text layers in 3 of 3 steps, lambda 3, alpha 1.5")
    assert sorted(detail["node"] for detail in page.evaluate("told")) == [str(BASIC), str(ADVANCED)]
    after, prompt = saved(page), page.evaluate("async () => (await app.graphToPrompt()).output")
    nodes = [{n["id"]: n for n in workflow["nodes"] if n["id"] in VALUES} for workflow in (before, after)]
    # their sizes with them
    assert nodes[0] == nodes[1]
    assert nodes[1][ADVANCED]["widgets_values"] == [3, *VALUES[ADVANCED][1:]]
    assert not any("6 of 6" in json.dumps(kept) for kept in (after, prompt))
    # the panels go on
    set_value(page, BASIC, scale=3.5)
    assert_plotted(page, BASIC, 3.5, 1.5)
    chip(page, ADVANCED, "Block d1").click()
    settle(page)
    assert pressed(page, ADVANCED) == ["Block d1"]
    queue(page)
    words(BASIC, "6 of 6 text layers in 2 of 2 steps, lambda 3.5, alpha 1.5")
    words(ADVANCED, "1 of 1 chosen text layers in 3 of 3 steps, lambda 3, alpha 1.5")


def test_what_the_last_run_did_is_no_change_of_the_workflow(page):
    # ComfyUI's own first steps with a workflow
    page.wait_for_timeout(500)
    steps, before = steps_to_undo(page), saved(page)
    tell(page, BASIC, "6 of 6 text layers in 2 of 2 steps, lambda 2, alpha 1.5")
    assert_it_has_its_own_room(page, BASIC)
    # also where it takes more room than there is
    long = f"1 of 70 text layers in 20 of 20 steps. Not reached: {', '.join(['d2.0'] * 100)}"
    tell(page, ADVANCED, long)
    assert_it_has_its_own_room(page, ADVANCED)
    expect(receipt(page, ADVANCED)).to_have_attribute("title", long)
    assert saved(page) == before
    assert steps_to_undo(page) == steps


def test_every_sampler_of_a_run_is_told_and_none_of_the_run_before(page):
    for run, texts, shown in (
        ("a", ("4 of 8 steps", "0 of 8 steps"), "4 of 8 steps | next sampler: 0 of 8 steps"),
        ("b", ("1", "2", "3", "4"), "1 | 2 more | last sampler: 4"),
        ("c", ("8 of 8 steps",), "8 of 8 steps"),
    ):
        for text in texts:
            tell(page, BASIC, text, run=run)
        expect(receipt(page, BASIC)).to_have_text(shown)


def test_a_node_that_is_bypassed_does_not_tell_of_runs_without_it(page):
    tell(page, BASIC, "6 of 6 text layers in 2 of 2 steps")
    expect(receipt(page, BASIC)).to_be_visible()
    for mode, is_there in ((4, False), (0, True), (2, False)):
        page.evaluate(f"app.graph.getNodeById({BASIC}).mode = {mode}; app.graph.setDirtyCanvas(true, true)")
        settle(page)
        expect(receipt(page, BASIC)).to_be_visible(visible=is_there)


def test_what_the_last_run_did_stays_on_its_node(page):
    text = "6 of 6 text layers in 2 of 2 steps, <b>lambda</b> 2, alpha 1.5"
    chip(page, ADVANCED, "Block d1").click()
    settle(page)
    tell(page, ADVANCED, text)
    for other in (BASIC, UNKNOWN):
        expect(receipt(page, other)).to_be_hidden()
    # of a node that is not there, or not ours
    for unknown in (99, CHECKPOINT, f"{BASIC}:1", f"99:{BASIC}"):
        tell(page, unknown, "nobody's")
    expect(page.get_by_text("nobody's")).to_have_count(0)

    page.keyboard.press("Control+z")
    page.wait_for_function(f"app.graph.getNodeById({ADVANCED})?.widgets.some((w) => w.value === 'all')")
    page.wait_for_timeout(700)
    assert pressed(page, ADVANCED) == []
    expect(receipt(page, ADVANCED)).to_have_text(text)
    assert_it_has_its_own_room(page, ADVANCED)

    # behind the undo: the front end may take it for a step of its own
    collapse = f"app.graph.getNodeById({ADVANCED}).collapse(true)"
    page.evaluate(collapse)
    page.wait_for_timeout(300)
    expect(receipt(page, ADVANCED)).to_be_hidden()
    page.evaluate(collapse)
    expect(receipt(page, ADVANCED)).to_have_text(text)
    assert_it_has_its_own_room(page, ADVANCED)

    copy = page.evaluate(
        """(id) => {
            app.canvas.copyToClipboard(new Set([app.graph.getNodeById(id)]));
            app.canvas.pasteFromClipboard();
            return Math.max(...app.graph.nodes.map((node) => Number(node.id)));
        }""",
        ADVANCED,
    )
    assert copy not in PANELS
    expect(plot(page, copy).locator("rect.dense")).to_have_count(12)
    expect(receipt(page, copy)).to_be_hidden()


def test_what_the_last_run_did_stays_in_the_other_renderer(page):
    text = "6 of 6 text layers in 2 of 2 steps, lambda 2, alpha 1.5"
    tell(page, BASIC, text)
    own = page.renderer
    switch = "(on) => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    try:
        for renderer in ("classic" if own == "nodes-2" else "nodes-2", own):
            page.evaluate(switch, renderer == "nodes-2")
            page.renderer = renderer
            page.wait_for_timeout(1000)
            expect(receipt(page, BASIC)).to_have_text(text)
            assert_it_has_its_own_room(page, BASIC)
    finally:
        page.evaluate(switch, own == "nodes-2")
        page.renderer = own


def test_a_node_in_a_subgraph_says_what_the_last_run_did(page):
    page.evaluate(BUILD, SAMPLING)
    # not what the host has in its cache from the other renderer
    alpha = 1.25 if page.renderer == "classic" else 1.75
    set_value(page, ADVANCED, alpha=alpha)
    page.evaluate(
        "(id) => window.made = app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)])).node.id", ADVANCED
    )
    page.wait_for_timeout(500)
    # as a double click does
    page.evaluate("app.canvas.openSubgraph(app.graph.getNodeById(made).subgraph, app.graph.getNodeById(made))")
    # it moves the view, too
    page.wait_for_timeout(500)
    node = page.evaluate("""() => {
        app.canvas.ds.scale = 1;
        app.canvas.ds.offset = [0, 0];
        app.canvas.setDirty(true, true);
        return app.canvas.graph.nodes[0].id;
    }""")
    expect(plot(page, node).locator("rect.dense")).to_have_count(12)
    expect(receipt(page, node)).to_be_hidden()
    queue(page)
    expect(receipt(page, node)).to_have_text(f"6 of 6 text layers in 20 of 20 steps, lambda 2, alpha {alpha}")
    assert_it_has_its_own_room(page, node)


def choose(page: Page, node: int, *entries: str) -> None:
    """What a click in the menu of the right mouse button does."""
    page.evaluate(
        """([id, entries]) => {
            let found = { submenu: { options: app.collectNodeMenuItems(app.graph.getNodeById(id)) } };
            for (const entry of entries)
                found = found.submenu.options.find(({ content }) => content.startsWith(entry));
            found.callback(found.value, {}, undefined, undefined, app.graph.getNodeById(id));
        }""",
        [node, entries],
    )
    settle(page)


def test_a_preset_sets_the_inputs_in_one_step_of_undo(page):
    before = saved(page)
    set_value(page, ADVANCED, scale=3, layers="custom", blocks="d1", norm_cap=2, end_percent=0.4, start_percent=0.1,
              tokens="words only")
    steps = steps_to_undo(page)
    choose(page, ADVANCED, "PLADIS presets", "Flux.1")
    # not the list of blocks, which is the user's
    expected = {"scale": 1.5, "alpha": 1.5, "start_percent": 0, "end_percent": 1, "layers": "all", "blocks": "d1",
                "apply_to": "both", "scale_schedule": "constant", "norm_cap": 0, "tokens": "all"}  # fmt: skip
    assert {name: value(page, ADVANCED, name) for name in expected} == expected
    assert_plotted(page, ADVANCED, 1.5, 1.5)
    assert steps_to_undo(page) == steps + 1
    choose(page, BASIC, "PLADIS presets", "Gentle")
    assert [value(page, BASIC, name) for name in ("scale", "alpha", "start_percent", "end_percent")] == [0.5, 1.5, 0, 1]
    # nothing but values has changed
    own, after = ({node["id"]: node for node in graph["nodes"]} for graph in (before, saved(page)))
    assert own.keys() == after.keys()
    for node, one in own.items():
        assert one.keys() == after[node].keys() and one["properties"] == after[node]["properties"]


def test_only_the_apply_nodes_have_our_entries(page):
    box = node_box(page, ADVANCED)
    page.wait_for_timeout(500)
    title = box["y"] + (12 if page.renderer == "nodes-2" else -18)
    page.mouse.click(box["x"] + box["width"] - 40, title, button="right")
    for entry in ("PLADIS presets", "Compare with scale 0"):
        expect(page.get_by_text(entry).first).to_be_visible()
    entries = "(id) => app.collectNodeMenuItems(app.graph.getNodeById(id)).map((item) => item?.content)"
    ours = ["PLADIS presets", "Compare with scale 0 (PLADIS Sweep)"]
    assert all(set(ours) <= set(page.evaluate(entries, node)) for node in (BASIC, ADVANCED))
    assert not set(ours) & {*page.evaluate(entries, DEMO), *page.evaluate(entries, CHECKPOINT)}


def made_by_comparing(page: Page) -> dict:
    """The inputs of the sweep, as they would be queued."""
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    (sweep,) = [node["inputs"] for node in prompt.values() if node["class_type"] == "PLADISSweep"]
    (grid,) = [node["inputs"]["images"] for node in prompt.values() if node["class_type"] == "PreviewImage"]
    assert prompt[grid[0]]["class_type"] == "PLADISSweep" and grid[1] == 1
    return sweep


def test_comparing_with_scale_0_makes_the_sweep_of_the_users_graph(page):
    page.evaluate(BUILD, SAMPLING)
    set_value(page, ADVANCED, scale=1.25, norm_cap=2, layers="custom", blocks="d0,m0")
    # not what the host has in its cache from the other renderer
    steps = 3 if page.renderer == "classic" else 4
    set_value(page, 13, steps=steps)
    before, undone = saved(page), steps_to_undo(page)
    choose(page, ADVANCED, "Compare with scale 0")
    links = {"model": [str(ADVANCED), 0], "positive": ["10", 0], "negative": ["11", 0], "latent_image": ["12", 0],
             "vae": [str(DEMO), 2]}  # fmt: skip
    values = {"seed": 1, "steps": steps, "cfg": 3, "sampler_name": "euler", "scheduler": "simple", "denoise": 1,
              "scales": "0, 1.25", "alphas": "1.5", "seeds": "", "end_percents": "", "norm_caps": "2",
              "layers": "d0,m0"}  # fmt: skip
    assert made_by_comparing(page) == {**links, **values}
    assert steps_to_undo(page) == undone + 1
    page.keyboard.press("Control+z")
    page.wait_for_function("app.graph.nodes.every(({ type }) => type !== 'PLADISSweep')")
    assert {node["id"] for node in saved(page)["nodes"]} == {node["id"] for node in before["nodes"]}
    # the values are there before ComfyUI is ready for the next
    page.wait_for_timeout(700)
    choose(page, ADVANCED, "Compare with scale 0")
    # once more it makes no second one
    choose(page, ADVANCED, "Compare with scale 0")
    sweeps = "app.graph.nodes.filter(({ type }) => type === 'PLADISSweep')"
    assert page.evaluate(f"{sweeps}.length") == 1
    # but where the node has no cap any more it does; that one is taken away again
    set_value(page, ADVANCED, norm_cap=0)
    choose(page, ADVANCED, "Compare with scale 0")
    caps = f"{sweeps}.map((sweep) => sweep.widgets.find(({{ name }}) => name === 'norm_caps').value)"
    assert page.evaluate(caps) == ["2", ""]
    page.evaluate(f"""() => {{
        const [, other] = {sweeps};
        const previews = other.outputs.flatMap((_, slot) => other.getOutputNodes(slot) ?? []);
        previews.forEach((preview) => app.graph.remove(preview));
        app.graph.remove(other);
    }}""")
    settle(page)

    # the picture on the node grows with every cell
    sweep = page.evaluate("app.graph.nodes.find(({ type }) => type === 'PLADISSweep').id")
    page.evaluate(
        """(id) => {
            window.shown = [];
            app.api.addEventListener("executed", ({ detail }) => {
                if (String(detail.display_node) === String(id) && detail.output?.images) shown.push(detail.node);
            });
        }""",
        sweep,
    )
    queue(page)
    assert len(set(page.evaluate("shown"))) == 2
    page.wait_for_function("(id) => app.nodeOutputs[id]?.images?.length === 1", arg=sweep)
    if page.renderer == "nodes-2":
        expect(page.locator(f"[data-node-id='{sweep}'] img")).to_be_visible()
    else:
        page.wait_for_function("(id) => app.graph.getNodeById(id).imgs?.[0].naturalWidth > 100", arg=sweep)


def test_a_comparison_that_cannot_be_made_or_is_not_whole_says_so(page):
    choose(page, BASIC, "Compare with scale 0")
    expect(page.get_by_text("No KSampler takes this node's model").first).to_be_visible()
    assert page.evaluate("app.graph.nodes.every(({ type }) => type !== 'PLADISSweep')")
    page.evaluate(BUILD, {node: made for node, made in SAMPLING.items() if node not in (14, 15)})
    set_value(page, ADVANCED, scale_schedule="cosine", start_percent=0.1, end_percent=0.5)
    choose(page, ADVANCED, "Compare with scale 0")
    expect(page.get_by_text("settings of the node: start_percent, scale_schedule.").first).to_be_visible()
    # without a node that decodes, the VAE of the loader
    sweep = made_by_comparing(page)
    assert sweep["vae"] == [str(DEMO), 2] and sweep["end_percents"] == "0.5" and sweep["layers"] == ""


def test_comparing_inside_a_subgraph_takes_what_comes_from_outside(page):
    page.evaluate(BUILD, SAMPLING)
    page.evaluate(
        """(ids) => {
            const { node } = app.graph.convertToSubgraph(new Set(ids.map((id) => app.graph.getNodeById(id))));
            app.canvas.openSubgraph(node.subgraph, node);
        }""",
        [ADVANCED, 13, 14],
    )
    page.wait_for_timeout(500)
    page.evaluate(
        """() => {
            const apply = app.canvas.graph.nodes.find(({ type }) => type === "PLADISApplyAdvanced");
            app.collectNodeMenuItems(apply).at(-1).callback();
        }"""
    )
    settle(page)
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    (sweep,) = [node["inputs"] for node in prompt.values() if node["class_type"] == "PLADISSweep"]
    (apply,) = [name for name, node in prompt.items() if node["class_type"] == "PLADISApplyAdvanced"]
    links = {"model": [apply, 0], "positive": ["10", 0], "negative": ["11", 0], "latent_image": ["12", 0],
             "vae": [str(DEMO), 2]}  # fmt: skip
    assert {name: sweep[name] for name in links} == links
    page.evaluate("app.canvas.setGraph(app.graph)")
    settle(page)
