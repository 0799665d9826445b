"""How the panels of the Apply nodes look: they can be read in both themes, stand close, and their chips line up.
test_hosts.py starts it for every host."""

from __future__ import annotations

from itertools import pairwise

import pytest
from playwright.sync_api import Page, expect
from test_nodes import (
    ADVANCED,
    BASIC,
    BUILD,
    CHECKPOINT,
    PANELS,
    UNKNOWN,
    chip,
    node_box,
    panel,
    picker,
    plot,
    set_value,
    settle,
    tell,
)

# WCAG 2.1, AA: 1.4.3 for text, 1.4.11 for shapes that say something
TEXT, SHAPE = 4.5, 3
# between two widgets of ComfyUI: in Nodes 2.0 the grid's gap, on the canvas the margins of two text areas
SPACING = {"nodes-2": 4, "classic": 20}
SDXL = "sd_xl_base_1.0.safetensors"
# every text and every shape of a panel: what it is, its colour and what is behind it
MEASURE = """(root) => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const pixel = (color) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = "#f0f";
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
        return [red, green, blue, alpha / 255];
    };
    const over = ([...top], bottom, alpha = top.pop()) =>
        [...top.map((part, i) => alpha * part + (1 - alpha) * bottom[i]), 1];
    const outer = (element) => element.parentElement ?? element.getRootNode().host;
    const behind = (element) => {
        if (!element) return [255, 255, 255, 1];
        const own = pixel(getComputedStyle(element).backgroundColor);
        return own[3] === 1 ? own : over(own, behind(outer(element)));
    };
    const opacity = (element) => element ? getComputedStyle(element).opacity * opacity(outer(element)) : 1;
    const luminance = (color) => {
        const linear = color.slice(0, 3).map((part) => part / 255)
            .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    };
    const ratio = (element, color, ground) => {
        const [red, green, blue, alpha] = pixel(color);
        const seen = over([red, green, blue, alpha * opacity(element)], ground);
        const [low, high] = [luminance(seen), luminance(ground)].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    };
    const shown = (element) => element.checkVisibility() && element.getClientRects().length;
    const found = [];
    const look = (element, color, ground) => {
        const { localName, ariaPressed, textContent } = element;
        const what = [`${localName}.${element.getAttribute("class")}`, ariaPressed, textContent].filter(Boolean);
        found.push([what.join(" "), ratio(element, color, ground)]);
    };
    const all = (selector) => [...root.shadowRoot.querySelectorAll(selector)].filter(shown);
    const shadow = (style) => style.boxShadow.match(/^.*\\)/)?.[0] ?? "transparent";
    const panel = behind(root);
    for (const element of all(":not(style)")) {
        const words = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
        if (words) look(element, getComputedStyle(element).color, behind(element));
    }
    const texts = found.splice(0);
    for (const rect of all("rect")) look(rect, getComputedStyle(rect).fill, panel);
    for (const line of all("line:not(.seam)")) look(line, getComputedStyle(line).stroke, panel);
    for (const sample of all("i")) look(sample, getComputedStyle(sample).backgroundColor, panel);
    for (const button of all("button[aria-pressed='true'], .layer")) {
        const style = getComputedStyle(button);
        const edge = shadow(style);
        // a button is told by its edge where it has one
        look(button, edge === "transparent" ? style.backgroundColor : edge, panel);
    }
    for (const button of all("button[aria-pressed='mixed']"))
        look(button, shadow(getComputedStyle(button)), behind(button));
    return { texts, shapes: found };
}"""


@pytest.fixture
def page(opened) -> Page:
    opened.errors.clear()
    opened.evaluate(BUILD, PANELS)
    expect(plot(opened, BASIC).locator("rect.dense")).to_have_count(12)
    opened.wait_for_timeout(500)
    yield opened
    assert opened.errors == []


@pytest.fixture(params=("dark", "light"))
def theme(request, page) -> str:
    dress = "(palette) => app.extensionManager.setting.set('Comfy.ColorPalette', palette)"
    page.evaluate(dress, request.param)
    background = {"dark": "#222", "light": "#C9C9C9"}[request.param]
    page.wait_for_function(
        "(color) => getComputedStyle(document.documentElement).getPropertyValue('--comfy-input-bg').trim() === color",
        arg=background,
    )
    yield request.param
    page.evaluate(dress, "dark")


def contrasts(page: Page, nodes: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Of every text and every shape in the panels of these nodes, the least where several are called alike."""
    settle(page)
    found = {"texts": {}, "shapes": {}}
    for node in nodes:
        for name in ("pladis_plot", *(["pladis_blocks"] if node != BASIC else [])):
            for kind, measured in panel(page, node, name).evaluate(MEASURE).items():
                for what, ratio in measured:
                    found[kind][what] = min(ratio, found[kind].get(what, ratio))
    return found


def assert_readable(page: Page, *nodes: int) -> dict[str, dict[str, float]]:
    found = contrasts(page, nodes)
    for kind, least in (("texts", TEXT), ("shapes", SHAPE)):
        assert len(found[kind]) > 3
        poor = {what: round(ratio, 2) for what, ratio in found[kind].items() if ratio < least}
        assert not poor, (kind, poor)
    return found


def test_the_panels_can_be_read_in_both_themes(page, theme):
    set_value(page, CHECKPOINT, ckpt_name=SDXL)
    set_value(page, UNKNOWN, layers="custom", blocks="d2.2-9,u0")
    set_value(page, BASIC, scale=3)
    set_value(page, ADVANCED, layers="custom", blocks="d1,u0-2")
    for node in (BASIC, ADVANCED, UNKNOWN):
        tell(page, node, "4 of 4 chosen text layers in 20 of 20 steps, lambda 3, alpha 1.5")
    found = assert_readable(page, BASIC, ADVANCED, UNKNOWN)
    seen = " ".join([*found["texts"], *found["shapes"]])
    for part in ("rect.mixed negative", "line.zero", "button.block true", "button.block false", "button.block mixed",
                 "button.layer true", "button.layer false", "chosen text layers"):  # fmt: skip
        assert part in seen, seen
    for title in ("Block d0", "Block d1"):
        chip(page, ADVANCED, title).hover()
        assert_readable(page, ADVANCED)


def test_what_the_picker_says_can_be_read_in_both_themes(page, theme):
    set_value(page, CHECKPOINT, ckpt_name=SDXL)

    def says(words: str, **values) -> None:
        set_value(page, UNKNOWN, **values)
        expect(picker(page, UNKNOWN)).to_contain_text(words)
        assert_readable(page, UNKNOWN)

    says("no block d9", layers="custom", blocks="d2,d3.1,d9")
    says("Choose at least one block", blocks="")
    says("layers is all", layers="all", blocks="d2,d3.1")
    page.evaluate(
        """(id) => {
            const [source, node] = [LiteGraph.createNode("PrimitiveString"), app.graph.getNodeById(id)];
            source.pos = [80, 700];
            app.graph.add(source);
            source.connect(0, node, node.findInputSlot("blocks"));
        }""",
        UNKNOWN,
    )
    says("comes from a link")


def assert_no_gap(page: Page, node: int) -> None:
    page.wait_for_timeout(500)
    upper, lower = picker(page, node).bounding_box(), plot(page, node).bounding_box()
    gap = lower["y"] - upper["y"] - upper["height"]
    assert 0 <= gap <= SPACING[page.renderer] + 0.5, (gap, upper, lower)
    content = picker(page, node).locator(".content").bounding_box()
    assert upper["height"] - content["height"] <= 13, (upper, content)
    outer = node_box(page, node)
    assert lower["y"] + lower["height"] <= outer["y"] + outer["height"] + 1


def test_no_empty_band_stands_between_picker_and_plot(page):
    assert_no_gap(page, ADVANCED)
    set_value(page, ADVANCED, layers="custom", blocks="d1,u0-2")
    assert_no_gap(page, ADVANCED)
    set_value(page, CHECKPOINT, ckpt_name=SDXL)
    assert_no_gap(page, UNKNOWN)
    # what a person adds to the node is the plot's
    before = plot(page, ADVANCED).bounding_box()["height"]
    page.evaluate(
        """(id) => {
            const node = app.graph.getNodeById(id);
            node.setSize([node.size[0], node.size[1] + 150]);
            node.setDirtyCanvas(true, true);
        }""",
        ADVANCED,
    )
    assert_no_gap(page, ADVANCED)
    assert plot(page, ADVANCED).bounding_box()["height"] >= before + 100


def places(page: Page, selector: str) -> list[dict]:
    return [box.bounding_box() for box in picker(page, UNKNOWN).locator(selector).all()]


@pytest.mark.parametrize(
    ("blocks", "name", "least"),
    (("d0-3,u0-5,m0", SDXL, 2), ("d0-5,m0,u0-8", "v1-5-pruned.safetensors", 5), ("b0-56", "other.safetensors", 5)),
)
def test_the_chips_line_up(page, blocks, name, least):
    set_value(page, CHECKPOINT, ckpt_name=name)
    set_value(page, UNKNOWN, layers="custom", blocks=blocks)
    page.wait_for_timeout(300)
    chips = places(page, ".chip")
    lines: dict[tuple, list[dict]] = {}
    for row, inside in enumerate(picker(page, UNKNOWN).locator(".chips").all()):
        for box in (found.bounding_box() for found in inside.locator(".chip").all()):
            lines.setdefault((row, round(box["y"])), []).append(box)
    columns = max(([box["x"] for box in line] for line in lines.values()), key=len)
    assert len(columns) >= least
    for (row, _), line in lines.items():
        assert all(abs(box["x"] - column) < 1 for box, column in zip(line, columns, strict=False)), (line, columns)
        # only a row's last line is short
        rest = [other for other in lines if other[0] == row]
        assert len(line) == len(columns) or line is lines[rest[-1]], (row, line)
    assert max(box["width"] for box in chips) - min(box["width"] for box in chips) < 1
    assert all(right["x"] - left["x"] - left["width"] > 2 for left, right in pairwise(columns_of(lines)))
    layers = places(page, ".layer")
    assert all(box["width"] > 5 for box in layers)
    frame = picker(page, UNKNOWN).bounding_box()
    assert all(box["x"] + box["width"] <= frame["x"] + frame["width"] - 6 for box in [*chips, *layers])


def columns_of(lines: dict[tuple, list[dict]]) -> list[dict]:
    return max(lines.values(), key=len)
