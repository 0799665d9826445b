"""The help panel of a real browser shows our pages. test_hosts.py starts it for every host."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import expect

from comfy_server import PACK_FOLDER

PAGES = sorted((Path(__file__).parents[2] / "web" / "docs").glob("*.md"))
# opened as a file: a node that a script adds is not one that the panels know at once
OPEN = """async (type) => {
    app.graph.clear();
    const node = LiteGraph.createNode(type);
    node.pos = [200, 200];
    app.graph.add(node);
    await app.loadGraphData(JSON.parse(JSON.stringify(app.graph.serialize())));
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [0, 0];
    app.canvas.setDirty(true, true);
}"""


@pytest.fixture(params=PAGES, ids=lambda path: path.stem)
def help_of(request, opened) -> Path:
    if opened.renderer != "classic":
        pytest.skip("the panel is the same in both renderers")
    opened.errors.clear()
    opened.evaluate(OPEN, request.param.stem)
    yield request.param
    assert opened.errors == []


def test_the_panel_shows_the_page_and_its_pictures(opened, help_of):
    button = opened.get_by_test_id("info-button")
    # the page's first clicks can come before its canvas takes them
    for _ in range(5):
        opened.wait_for_timeout(1000)
        if button.is_visible():
            break
        # the title bar
        opened.mouse.click(300, 188)
    button.click()
    title = help_of.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    expect(opened.get_by_role("heading", name=title, exact=True, level=1)).to_be_visible()
    expect(opened.get_by_role("heading", name="Limits", exact=True)).to_have_count(1)
    picture = opened.locator(f"img[src*='/extensions/{PACK_FOLDER}/docs/images/']").first
    opened.wait_for_function("(image) => image.naturalWidth > 100", arg=picture.element_handle())
    # nothing has to be scrolled sideways, the formulas least of all
    wide = "(found) => found.filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent)"
    formulas = opened.locator("pre", has_text="scale")
    assert formulas.evaluate_all(wide) == []
    assert formulas.count() == (help_of.stem in ("PLADISApply", "PLADISApplyAdvanced", "PLADISAttentionMap"))
    # closes the panel
    button.click()
