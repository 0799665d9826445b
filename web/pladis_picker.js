// Chips for the blocks of a model. What is chosen is the text of a block list and nothing else.

import { emptyLayout, keysOf, layoutNamedBy, readBlocks, writeBlocks } from "./pladis_blocks.js";
import { COLORS } from "./pladis_colors.js";
import { words } from "./pladis_words.js";

// above and below the content
export const PICKER_PADDING = 12;

const STYLE = `
  :host { ${COLORS} display: block; height: 100%; box-sizing: border-box; overflow-y: auto; scrollbar-width: thin;
    padding: ${PICKER_PADDING / 2}px 8px; border-radius: 6px; font: 11px/1.3 system-ui, sans-serif; user-select: none; }
  /* as wide as the longest label of the language */
  .rows { display: grid; grid-template-columns: auto 1fr; gap: 4px 6px; margin-bottom: 4px; }
  .rows > label { line-height: 18px; }
  /* every row has the same columns, as wide as the widest chip */
  .chips { display: grid; gap: 4px;
    grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--name) + var(--layers) * 7px), 1fr)); }
  .chip { display: flex; gap: 1px; height: 18px; }
  button { all: unset; box-sizing: border-box; cursor: pointer; background: var(--button); color: var(--button-text); }
  button:hover { background: var(--button-hovered); }
  /* the fill carries the text, the edge stands out from the panel */
  button[aria-pressed="true"] { background: var(--chosen); color: #fff; box-shadow: inset 0 0 0 1px var(--accent); }
  button[aria-pressed="true"]:hover { box-shadow: inset 0 0 0 1px var(--text); }
  button[aria-pressed="mixed"] { box-shadow: inset 0 -3px var(--accent); }
  button:focus-visible { outline: 1px solid var(--text); outline-offset: -1px; }
  .block { flex: 1 0 var(--name); line-height: 18px; text-align: center; }
  .block:not(:last-child) { flex: none; width: var(--name); }
  .layer { flex: 1; }
  .chip > :first-child { border-radius: 4px 0 0 4px; }
  .chip > :last-child { border-radius: 0 4px 4px 0; }
  .chip > :only-child { border-radius: 4px; }
  /* nothing in it tells it from the panel */
  .layer[aria-pressed="false"] { box-shadow: inset 0 0 0 1px var(--grey); }
  /* not what runs, or not to be clicked; fainter text could not be read */
  .idle button[aria-pressed="true"], .off button[aria-pressed="true"] { background: var(--button);
    color: var(--button-text); }
  .off { pointer-events: none; }
  .off button, .off button[aria-pressed="true"] { background: none; color: inherit; }
  /* two lines: a node whose height changed with its hint would make an undo step of its own */
  .foot { display: flex; align-items: center; gap: 6px; min-height: 29px; }
  .foot span { flex: 1; unicode-bidi: plaintext; }
  .foot .wrong { color: var(--error); }
  .foot button { padding: 0 6px; border-radius: 4px; line-height: 16px; }
`;

/**
 * An element, how to draw a state into it, and the height that its content wants.
 *
 * `edit` is called with the new text of the block list when a chip is clicked.
 */
export function blockPicker(edit) {
  const root = document.createElement("div");
  const shadow = root.attachShadow({ mode: "open" });
  shadow.innerHTML = `<style>${STYLE}</style><div class="content"></div>`;
  /** @type {HTMLElement} */
  const content = shadow.querySelector(".content");
  /** @type {any} */
  let current;
  // of a model that is not known, chips stay when a click takes them out of the text
  let named = { id: null, layout: emptyLayout() };

  function layoutOf({ id, blocks, text }) {
    if (blocks) return layoutNamedBy(blocks);
    if (named.id !== id) named = { id, layout: emptyLayout() };
    return layoutNamedBy(text, named.layout);
  }

  function draw(state) {
    const layout = layoutOf(state);
    const { chosen, wrong } = readBlocks(state.text, layout);
    const everything = Object.entries(layout)
      .flatMap(([prefix, depths]) => depths.flatMap((depth, number) => keysOf(prefix, number, depth)));
    current = { layout, everything, chosen, wrong };
    const focused = /** @type {HTMLElement} */ (shadow.activeElement)?.dataset.keys;
    content.className = state.linked ? "content off" : state.layers === "custom" ? "content" : "content idle";
    content.replaceChildren(rows(layout, chosen), foot(everything, hint(state, current)));
    /** @type {HTMLElement} */
    const again = focused && content.querySelector(`[data-keys="${focused}"]`);
    again?.focus();
  }

  content.addEventListener("click", (event) => {
    const target = /** @type {HTMLElement} */ (event.target);
    const keys = target.closest("button")?.dataset.keys.split(" ").filter(Boolean);
    if (!keys) return;
    const { layout, wrong } = current;
    const chosen = new Set(current.chosen);
    const remove = target.dataset.set === "none" || (target.dataset.set !== "all" && keys.every((key) => chosen.has(key)));
    keys.forEach((key) => (remove ? chosen.delete(key) : chosen.add(key)));
    edit(writeBlocks(chosen, layout, wrong));
  });
  return { root, draw, content };
}

function rows(layout, chosen) {
  const shown = Object.entries(layout).filter(([, depths]) => depths.length);
  const made = element("div", { className: "rows" }, ...shown.flatMap(([prefix, depths]) => [
    element("label", { textContent: words(prefix) }),
    element("div", { className: "chips" }, ...depths.map((depth, number) => chip(prefix, number, depth, chosen))),
  ]));
  const deepest = Math.max(0, ...shown.flatMap(([, depths]) => depths));
  const longest = Math.max(0, ...shown.map(([prefix, depths]) => `${prefix}${depths.length - 1}`.length));
  made.style.setProperty("--layers", deepest > 1 ? deepest : 0);
  made.style.setProperty("--name", `${10 + 7 * longest}px`);
  return made;
}

function chip(prefix, number, depth, chosen) {
  const name = `${prefix}${number}`;
  const keys = keysOf(prefix, number, depth);
  const layers = depth > 1 ? keys.map((key) => toggle([key], chosen, "layer", "", words("layer", { layer: key }))) : [];
  const block = toggle(keys, chosen, "block", name, words("block", { block: name }));
  return element("span", { className: "chip" }, block, ...layers);
}

function toggle(keys, chosen, className, textContent, title) {
  const count = keys.filter((key) => chosen.has(key)).length;
  const button = element("button", { className, textContent, title });
  button.dataset.keys = keys.join(" ");
  button.setAttribute("aria-pressed", count === 0 ? "false" : count === keys.length ? "true" : "mixed");
  return button;
}

function foot(everything, { text, wrong = false }) {
  const buttons = everything.length ? ["all", "none"].map((set) => {
    const button = element("button", { textContent: words(set) });
    Object.assign(button.dataset, { keys: everything.join(" "), set });
    return button;
  }) : [];
  return element("div", { className: "foot" },
    element("span", { className: wrong ? "wrong" : "", textContent: text }), ...buttons);
}

/** @returns {{ text: string, wrong?: boolean }} */
function hint({ layers, linked, origin }, { everything, chosen, wrong }) {
  if (linked) return { text: words("linked") };
  const problems = wrong.map(({ problem }) => problem).join("; ");
  if (problems) return { text: words("problems", { problems }), wrong: true };
  if (!everything.length) return { text: origin };
  if (layers !== "custom") return { text: words("unused", { layers }) };
  if (!chosen.size) return { text: words("empty"), wrong: true };
  return { text: origin };
}

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
