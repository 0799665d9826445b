// What the Apply nodes show besides their inputs: a plot of the weights with what the last run did beneath it, a picker of
// blocks, and two entries in their menu. What a workflow saves and what runs are the inputs alone.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { IN_NODES_2 } from "./pladis_colors.js";
import { addComparison } from "./pladis_compare.js";
import { blocksAt, reportBlocks } from "./pladis_models.js";
import { blockPicker, PICKER_PADDING } from "./pladis_picker.js";
import { weightsPlot } from "./pladis_plot.js";
import { keepReceipt, receiptOf } from "./pladis_receipt.js";
import { PRESETS, presetValues } from "./pladis_presets.js";
import { language, learnWords, words } from "./pladis_words.js";

// with two lines of words: they must not change the node's height, which would be an undo step of its own
const PLOT_HEIGHT = 148;
// a long list of blocks scrolls
const MOST_PICKER_HEIGHT = 240;
const LEAST_WIDTH = 320;
// around a panel, on the classic canvas
const MARGIN = 8;

app.registerExtension({
  name: "pladis.panels",
  nodeCreated(node) {
    if (!isApply(node)) return;
    // last, so that the widgets that a workflow saves keep their places
    if (node.comfyClass === "PLADISApplyAdvanced") addPicker(node);
    addPlot(node);
    node.setSize([Math.max(node.size[0], LEAST_WIDTH), node.computeSize()[1]]);
  },
  getNodeMenuItems(node) {
    if (!isApply(node)) return [];
    const presets = Object.keys(PRESETS).map((preset) => {
      const values = presetValues(preset, node.widgets.map(({ name }) => name));
      return { content: words(preset, values), callback: () => setValues(node, values) };
    });
    return [
      { content: words("presets"), has_submenu: true, submenu: { options: presets } },
      { content: words("compare"), callback: () => compare(node) },
    ];
  },
});

document.head.append(Object.assign(document.createElement("style"), { textContent: IN_NODES_2 }));

// server.send_sync in nodes/hosting/receipt.py
api.addEventListener("pladis.receipt", ({ detail }) => keepReceipt(app.rootGraph, detail));

// where it cannot be had, the panels speak English
api.fetchApi("/i18n").then((answer) => answer.json()).then((served) =>
  learnWords(() => app.extensionManager.setting.get("Comfy.Locale"), served), () => {});

function isApply(node) {
  return ["PLADISApply", "PLADISApplyAdvanced"].includes(node.comfyClass);
}

function compare(node) {
  const { sweep, missing, leftOut } = inOneStep(() => addComparison(node, (type) => LiteGraph.createNode(type)));
  if (sweep) app.canvas.centerOnNode(sweep);
  const detail = missing ? words(missing === "vae" ? "noVae" : "noSampler")
    : leftOut.length ? words("leftOut", { inputs: leftOut.join(", ") }) : "";
  if (detail) app.extensionManager.toast.add({ severity: "warn", summary: words("compare"), detail, life: 12_000 });
}

function addPlot(node) {
  const plot = weightsPlot();
  plot.root.style.minHeight = `${PLOT_HEIGHT}px`;
  addPanel(node, "pladis_plot", plot.root, { getMinHeight: () => PLOT_HEIGHT + 2 * MARGIN });
  follow(node, plot, () => ({
    scale: valueOf(node, "scale"), alpha: valueOf(node, "alpha"), receipt: receiptOf(app.rootGraph, node),
  }));
}

function addPicker(node) {
  const picker = blockPicker((text) => setValues(node, { blocks: text, layers: "custom" }));
  let height = 60;
  const room = () => height + 2 * MARGIN;
  const widget = addPanel(node, "pladis_blocks", picker.root, { getMinHeight: room, getMaxHeight: room });
  // of a fixed height: Nodes 2.0 shares what is left of the node among the widgets that have a computeLayoutSize, and
  // beneath this one its share would stay empty; the canvas adds 4 to a computeSize
  widget.computeLayoutSize = undefined;
  widget.computeSize = () => [0, room() - 4];
  new ResizeObserver(() => {
    // 0 while it is not on screen
    if (!picker.content.offsetHeight) return;
    height = Math.min(picker.content.offsetHeight + PICKER_PADDING, MOST_PICKER_HEIGHT);
    // then the wheel scrolls the list instead of zooming, in Nodes 2.0 after a click into it
    picker.root.dataset.captureWheel = String(height === MOST_PICKER_HEIGHT);
    picker.root.style.minHeight = picker.root.style.maxHeight = `${height}px`;
    node.setDirtyCanvas(true, true);
  }).observe(picker.content);
  follow(node, picker, () => {
    const linked = node.isInputConnected(node.findInputSlot("blocks"));
    return { text: valueOf(node, "blocks"), layers: valueOf(node, "layers"), linked, ...blocksAt(node) };
  });
  chain(node, "onExecuted", (output) => output?.pladis_blocks && reportBlocks(node, output.pladis_blocks));
}

function addPanel(node, name, root, options) {
  // a type of its own: of a type that core knows, Nodes 2.0 would draw its own component
  root.dataset.panel = name;
  const widget = node.addDOMWidget(name, name.toUpperCase(), root, {
    serialize: false,
    hideOnZoom: false,
    // a side panel would take the element out of the node
    hideInPanel: true,
    margin: MARGIN,
    ...options,
  });
  // of the workflow; the option is for the prompt
  widget.serialize = false;
  root.addEventListener("wheel", (event) => {
    // Nodes 2.0 sees to it itself
    if (!LiteGraph.vueNodesMode && root.dataset.captureWheel !== "true") app.canvas.processMouseWheel(event);
  });
  return widget;
}

const followed = new Map();
let frame = 0;

/**
 * Draws into a panel what `read` returns whenever it differs, while the node is in a graph.
 *
 * A widget's value changes by hand, by undo, by a loaded workflow, by other packs and by links further up, with no event
 * that covers all of them in both renderers; a look per frame does.
 */
function follow(node, { root, draw }, read) {
  let drawn;
  const look = () => {
    const state = JSON.stringify({ ...read(), language: language() });
    if (state === drawn) return;
    if (!drawn) takePlace(node, root);
    drawn = state;
    draw(JSON.parse(state));
  };
  chain(node, "onAdded", () => {
    followed.set(root, look);
    frame ||= requestAnimationFrame(lookAtAll);
  });
  chain(node, "onRemoved", () => followed.delete(root));
}

/** Undo makes a node anew, but Nodes 2.0 goes on showing the element of the node that was there before. */
function takePlace(node, root) {
  const place = `${root.dataset.panel} ${node.graph.id} ${node.id}`;
  if (!root.isConnected) document.querySelector(`[data-place="${CSS.escape(place)}"]`)?.replaceWith(root);
  root.dataset.place = place;
}

function lookAtAll() {
  followed.forEach((look, root) => {
    try {
      look();
    } catch (error) {
      // the other panels go on
      console.error("PLADIS: a panel stopped", error);
      followed.delete(root);
    }
  });
  frame = followed.size && requestAnimationFrame(lookAtAll);
}

function chain(node, name, after) {
  const before = node[name];
  node[name] = function (...values) {
    const result = before?.apply(this, values);
    after(...values);
    return result;
  };
}

function valueOf(node, name) {
  return node.widgets.find((widget) => widget.name === name).value;
}

function setValues(node, values) {
  inOneStep(() => Object.entries(values).forEach(([name, value]) => setValue(node, name, value)));
  node.setDirtyCanvas(true, true);
}

/**
 * One step for undo. Returns what `change` does.
 * @template T
 * @param {() => T} change
 */
function inOneStep(change) {
  app.canvas.emitBeforeChange();
  const made = change();
  app.canvas.emitAfterChange();
  return made;
}

function setValue(node, name, value) {
  const widget = node.widgets.find((widget) => widget.name === name);
  widget.value = value;
  widget.callback?.(value);
}
