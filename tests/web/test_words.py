"""The panels speak the language that is set, and ComfyUI's search finds the nodes by what people call them, in both
renderers. test_hosts.py starts it for every host."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import Page, expect
from test_nodes import ADVANCED, BASIC, BUILD, PANELS, UNKNOWN, plot

from comfy_server import PACK

LOCALES = PACK / "locales"
LANGUAGES = sorted(path.name for path in LOCALES.iterdir())
MAIN = {
    language: json.loads((LOCALES / language / "main.json").read_text(encoding="utf-8"))["pladis"]
    for language in LANGUAGES
}
# the panels of the narrowest node; every sentence that can be in the picker's foot
MEASURE = """async ([language, texts, sentences]) => {
    const { learnWords } = await import("/pladis_words.js");
    const { blockPicker } = await import("/pladis_picker.js");
    const { weightsPlot } = await import("/pladis_plot.js");
    const { layoutNamedBy } = await import("/pladis_blocks.js");
    learnWords(() => language, { [language]: { pladis: texts } });
    const measured = { labels: [], foots: {}, rows: 0 };
    const picker = blockPicker(() => {});
    const plot = weightsPlot();
    for (const { root } of [picker, plot]) Object.assign(root.style, { width: "304px", height: "148px" });
    document.body.replaceChildren(picker.root, plot.root);
    const state = { id: 0, blocks: "d0-1,m0,u0-3,b0", text: "d0", layers: "custom", linked: false };
    for (const sentence of sentences) {
        picker.draw({ ...state, origin: sentence });
        measured.foots[sentence] = picker.root.shadowRoot.querySelector(".foot").offsetHeight;
    }
    for (const label of picker.root.shadowRoot.querySelectorAll("label"))
        measured.labels.push([label.textContent, label.scrollWidth, label.clientWidth]);
    plot.draw({ scale: 2, alpha: 1.5, receipt: "" });
    const spans = [...plot.root.shadowRoot.querySelectorAll(".legend span")];
    measured.rows = new Set(spans.map((span) => span.offsetTop)).size;
    return measured;
}"""
# what people type, and the node that must come first
FIRST = {
    "prompt adherence": "Apply PLADIS",
    "follow prompt": "Apply PLADIS",
    "entmax": "Apply PLADIS",
    "apply pladis": "Apply PLADIS",
    "block list": "Apply PLADIS (Advanced)",
    "attention map": "PLADIS Attention Map",
    "heatmap": "PLADIS Attention Map",
    "daam": "PLADIS Attention Map",
    "xy plot": "PLADIS Sweep",
}
# what others are called as well, such as a node of a newer ComfyUI: Model Sparse Attention
FOUND = {
    "sparse attention": "Apply PLADIS",
    "schedule": "Apply PLADIS (Advanced)",
    "layers": "Apply PLADIS (Advanced)",
    "grid": "PLADIS Sweep",
    "compare": "PLADIS Sweep",
    "demo": "Load PLADIS Demo Model",
    "test model": "Load PLADIS Demo Model",
    "example": "Load PLADIS Demo Model",
}


@pytest.fixture(scope="module")
def english(modules) -> dict[str, str]:
    return modules.evaluate("async () => (await import('/pladis_words.js')).ENGLISH")


@pytest.fixture
def page(opened) -> Page:
    opened.errors.clear()
    # in the workflow: ComfyUI opens it again when the language changes
    kind, position, _, links = PANELS[ADVANCED]
    opened.evaluate(BUILD, {**PANELS, ADVANCED: (kind, position, {"layers": "custom", "blocks": "d0,d9"}, links)})
    expect(plot(opened, BASIC).locator("rect.dense")).to_have_count(12)
    yield opened
    speak(opened, "en")
    assert opened.errors == []


def speak(page: Page, language: str) -> None:
    page.evaluate("(language) => app.extensionManager.setting.set('Comfy.Locale', language)", language)


def assert_shown(page: Page, node: int, panel: str, *texts: str) -> None:
    """In words or as tooltips; looked up each time, as ComfyUI makes the nodes anew."""
    page.wait_for_function(
        """([id, panel, texts]) => {
            const root = app.graph.getNodeById(id)?.widgets.find(({ name }) => name === panel).element;
            if (!root?.isConnected) return false;
            const titles = [root, ...root.shadowRoot.querySelectorAll("[title]")].map(({ title }) => title);
            return texts.every((text) => titles.includes(text) || root.shadowRoot.textContent.includes(text));
        }""",
        arg=[node, panel, texts],
    )


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_has_every_text_of_the_panels(language, english):
    texts = MAIN[language]
    assert list(texts) == list(english)
    for key, text in texts.items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", english[key])), key
        assert text.strip() == text != "" and not re.search("[<>&\u200e\u200f]", text), key
        # dense, in French, and what is a value alone
        assert text != english[key] or len(text.split()) == 1, key


def test_the_presets_are_those_of_the_help_page(english, modules):
    presets = modules.evaluate("async () => (await import('/pladis_presets.js')).PRESETS")
    page = (PACK / "web" / "docs" / "PLADISApply.md").read_text(encoding="utf-8")
    table = page.split("## Presets", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| (.+?) \|$", table, re.MULTILINE)
    assert len(rows) == len(presets)
    for (kind, scale, source), (key, values) in zip(rows, presets.items(), strict=True):
        assert float(scale) == values.get("scale", 2) and values.keys() <= {"scale"}
        label = english[key].format(scale=scale)
        assert label.startswith(kind) and f"scale {scale} (" in label
        # the label's source in short
        named = re.search("paper|authors' code|[Uu]sers|[Nn]o source|[Mm]easured", source)[0].lower()
        assert named in label.rsplit("(", 1)[1].lower()


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_the_words_have_room(language, english, modules):
    texts = MAIN.get(language, english)
    sentences = [
        texts[key].format(layers="down + up", model="SDXL")
        for key in ("linked", "unused", "empty", "lastRun", "unknown", "demo", "guessed")
    ]
    measured = modules.evaluate(MEASURE, [language, texts, sentences])
    assert [label for label in measured["labels"] if label[1] > label[2]] == []
    # two lines: a node whose height changed with its hint would make an undo step of its own
    assert {sentence: height for sentence, height in measured["foots"].items() if height > 29} == {}
    assert measured["rows"] == 1


@pytest.fixture
def search(opened):
    """What ComfyUI's node search lists for a text, the best first."""
    opened.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    box = opened.get_by_role("dialog").get_by_role("combobox").first

    def found(text: str) -> list[str]:
        box.fill(text)
        # the list follows what is typed with a delay
        opened.wait_for_timeout(400)
        return [item.splitlines()[0] for item in opened.get_by_test_id("result-item").all_inner_texts()]

    yield found
    opened.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    expect(box).to_be_hidden()


def test_the_node_search_finds_the_nodes(search):
    # before the test of the languages: the list stays in one for a while
    found = {text: search(text) for text in (*FIRST, *FOUND)}
    assert {text: names[:2] for text, names in found.items() if text in FIRST and names[:1] != [FIRST[text]]} == {}
    assert {text: names for text, names in found.items() if text in FOUND and FOUND[text] not in names} == {}
    assert len([name for name in search("pladis") if "PLADIS" in name]) == 5


def test_the_panels_speak_the_language_that_is_set(page):
    for language in ("ja", "pt-BR", "ar"):
        speak(page, language)
        texts = MAIN[language]
        assert_shown(page, BASIC, "pladis_plot", texts["dense"], texts["example"])
        blocks = [texts["noBlock"].format(block="d9"), texts["block"].format(block="d1")]
        assert_shown(page, ADVANCED, "pladis_blocks", *blocks)
        assert_shown(page, UNKNOWN, "pladis_blocks", texts["unknown"])
    speak(page, "en")
    assert_shown(page, BASIC, "pladis_plot", "dense")
    assert_shown(page, ADVANCED, "pladis_blocks", "no block d9.", "Block d1")
