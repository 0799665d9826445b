"""The example workflows in a real browser, in both renderers of ComfyUI. test_hosts.py starts it for every host."""

from __future__ import annotations

import json
from itertools import combinations

import pytest

from workflows import NAMES, RUN_HERE, THIRD_PARTY, inputs_of, read, to_prompt

# of a node: its title bar is above its position
TITLE = 30
# a collapsed node is its title bar
RECTANGLES = """() => app.graph.nodes.map(({ title, pos, size, flags }) =>
    [title, ...pos, ...flags.collapsed ? [225, 0] : size])"""


@pytest.fixture(scope="module")
def object_info(server) -> dict:
    known = json.loads(server.get("/object_info"))
    return {**known, **{kind: info for pack in THIRD_PARTY.values() for kind, info in pack.items()}}


@pytest.fixture(params=NAMES)
def loaded(request, opened) -> dict:
    """A workflow that the page has opened."""
    opened.errors.clear()
    workflow = read(request.param)
    opened.evaluate("async (workflow) => { await app.loadGraphData(workflow); }", workflow)
    opened.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    yield workflow
    assert opened.errors == []


def test_it_opens_with_every_node_of_ours_and_of_comfyui(opened, loaded):
    missing = set(opened.evaluate("() => app.graph.nodes.map(({ type }) => type)"))
    missing -= set(opened.evaluate("() => Object.keys(LiteGraph.registered_node_types)"))
    assert missing == {node["type"] for node in loaded["nodes"]} & {kind for p in THIRD_PARTY.values() for kind in p}
    assert opened.evaluate("() => app.graph.nodes.length") == len(loaded["nodes"])


def test_no_node_lies_over_another(opened, loaded):
    """In the classic renderer: Nodes 2.0 has sizes of its own."""
    if opened.renderer != "classic":
        pytest.skip("sizes are those of the classic renderer")
    for (one, *a), (other, *b) in combinations(opened.evaluate(RECTANGLES), 2):
        apart = a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0] or a[1] + a[3] <= b[1] - TITLE or b[1] + b[3] <= a[1] - TITLE
        assert apart, (one, a, other, b)


def test_it_is_queued_as_the_file_says(opened, loaded, object_info):
    """What the front end sends is what tests/host checks on the server."""
    ours = to_prompt(loaded, object_info)
    theirs = opened.evaluate("async () => (await app.graphToPrompt()).output")
    assert ours.keys() == theirs.keys()
    others = {kind for pack in THIRD_PARTY.values() for kind in pack}
    # what the page does not know has no class there
    known = [number for number, node in ours.items() if node["class_type"] not in others]
    for number in known:
        assert theirs[number]["class_type"] == ours[number]["class_type"]
        # without what the page shows for itself: a button for uploads, a preview's text
        names = inputs_of(object_info[ours[number]["class_type"]])
        found = {name: value for name, value in theirs[number]["inputs"].items() if name in names}
        assert found == ours[number]["inputs"], ours[number]["class_type"]


@pytest.mark.parametrize("loaded", RUN_HERE, indirect=True)
def test_the_demo_models_workflows_have_their_pictures(opened, loaded):
    shows = [node["id"] for node in loaded["nodes"] if node["type"] in ("SaveImage", "PreviewImage")]
    assert opened.evaluate("(ids) => ids.every((id) => !app.nodeOutputs[id])", shows)
    opened.evaluate("app.queuePrompt(0)")
    opened.wait_for_function(
        "(ids) => ids.every((id) => app.nodeOutputs[id]?.images?.length)", arg=shows, timeout=60_000
    )


# a laptop's window; what a note's text must measure there, in pixels, after the fit that a template gets
LAPTOP, LEAST = {"width": 1366, "height": 768}, 9
NOTE_TEXT = """() => [...document.querySelectorAll("[class*=comfy-markdown] p, [class*=comfy-markdown] li")]
    .filter((element) => element.checkVisibility() && element.offsetWidth)
    .map((element) => {
        const ratio = element.getBoundingClientRect().width / element.offsetWidth;
        const box = element.closest("[class*=comfy-markdown]").getBoundingClientRect();
        const outside = element.getBoundingClientRect().bottom - box.bottom;
        return [element.textContent, parseFloat(getComputedStyle(element).fontSize) * ratio, outside];
    })"""


@pytest.mark.parametrize("name", [name for name in NAMES if name != "04_pladis_schedule"])
def test_a_note_can_be_read_at_a_laptops_first_fit(opened, name):
    """Not of the one with the advanced node, which alone is higher than that."""
    before = opened.viewport_size
    opened.set_viewport_size(LAPTOP)
    opened.wait_for_function(f"app.canvas.canvas.getBoundingClientRect().width === {LAPTOP['width']}")
    opened.evaluate(
        "async (workflow) => { await app.loadGraphData(workflow, true, true, 'first', { openSource: 'template' }); }",
        read(name),
    )
    opened.wait_for_timeout(700)
    texts = opened.evaluate(NOTE_TEXT)
    opened.set_viewport_size(before)
    assert texts
    small = [(text[:30], size) for text, size, _ in texts if size < LEAST]
    hidden = [(text[:30], outside) for text, _, outside in texts if outside > 1]
    assert (small, hidden) == ([], [])
