// Chips for the blocks of a model. What is chosen is the text of a block list and nothing else.

import { emptyLayout, keysOf, layoutNamedBy, readBlocks, writeBlocks } from "./pladis_blocks.js";

const ROWS = { d: "Down", m: "Middle", u: "Up", b: "Blocks" };

// above and below the content
export const PICKER_PADDING = 12;

const STYLE = `
  :host { display: block; height: 100%; box-sizing: border-box; overflow-y: auto; scrollbar-width: thin;
    padding: ${PICKER_PADDING / 2}px 8px; border-radius: 6px; background: var(--comfy-input-bg); color: var(--descrip-text);
    font: 11px/1.3 system-ui, sans-serif; user-select: none; }
  .off { opacity: 0.4; pointer-events: none; }
  .idle { opacity: 0.6; }
  .row { display: flex; gap: 6px; margin-bottom: 4px; }
  .row > label { flex: none; width: 40px; line-height: 18px; }
  .chips { display: flex; flex-wrap: wrap; gap: 4px; }
  .chip { display: inline-flex; align-items: stretch; gap: 1px; height: 18px; border-radius: 4px; overflow: hidden; }
  button { all: unset; box-sizing: border-box; cursor: pointer; background: var(--border-color); color: var(--input-text); }
  button:hover { filter: brightness(1.25); }
  button:focus-visible { outline: 1px solid var(--input-text); outline-offset: -1px; }
  button[aria-pressed="true"] { background: var(--primary-background, #0b8ce9); color: #fff; }
  button[aria-pressed="mixed"] { box-shadow: inset 0 -3px var(--primary-background, #0b8ce9); }
  .block { min-width: 24px; padding: 0 5px; line-height: 18px; text-align: center; }
  .layer { width: 8px; }
  /* two lines: a node whose height changed with its hint would make an undo step of its own */
  .foot { display: flex; align-items: flex-start; gap: 6px; min-height: 29px; }
  .foot span { flex: 1; }
  .foot .wrong { color: var(--error-text); }
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
  const content = shadow.querySelector(".content");
  let current;
  // of a model that is not known, chips stay when a click takes them out of the text
  let named = { id: null, layout: null };

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
    const focused = shadow.activeElement?.dataset.keys;
    content.className = state.linked ? "content off" : state.layers === "custom" ? "content" : "content idle";
    content.replaceChildren(...rows(layout, chosen), foot(everything, hint(state, current)));
    if (focused) content.querySelector(`[data-keys="${focused}"]`)?.focus();
  }

  content.addEventListener("click", ({ target }) => {
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
  return Object.entries(ROWS).filter(([prefix]) => layout[prefix].length).map(([prefix, label]) => {
    const chips = layout[prefix].map((depth, number) => {
      const keys = keysOf(prefix, number, depth);
      const layers = depth > 1 ? keys.map((key) => toggle([key], chosen, "layer", "", `Layer ${key}`)) : [];
      const block = toggle(keys, chosen, "block", `${prefix}${number}`, `Block ${prefix}${number}`);
      return element("span", { className: "chip" }, block, ...layers);
    });
    return element("div", { className: "row" },
      element("label", { textContent: label }), element("div", { className: "chips" }, ...chips));
  });
}

function toggle(keys, chosen, className, textContent, title) {
  const count = keys.filter((key) => chosen.has(key)).length;
  const button = element("button", { className, textContent, title });
  button.dataset.keys = keys.join(" ");
  button.setAttribute("aria-pressed", count === 0 ? "false" : count === keys.length ? "true" : "mixed");
  return button;
}

function foot(everything, { text, wrong }) {
  const buttons = everything.length ? ["all", "none"].map((set) => {
    const button = element("button", { textContent: set });
    Object.assign(button.dataset, { keys: everything.join(" "), set });
    return button;
  }) : [];
  return element("div", { className: "foot" },
    element("span", { className: wrong ? "wrong" : "", textContent: text }), ...buttons);
}

function hint({ layers, linked, origin }, { everything, chosen, wrong }) {
  if (linked) return { text: "The list comes from a link." };
  if (wrong.length) return { text: `${wrong.map(({ problem }) => problem).join("; ")}.`, wrong: true };
  if (!everything.length) return { text: origin };
  if (layers !== "custom") return { text: `Not used: layers is ${layers}. A click on a block sets it to custom.` };
  if (!chosen.size) return { text: "Choose at least one block.", wrong: true };
  return { text: origin };
}

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
