// Which blocks the model at a node has, as far as the browser can know.

import { words } from "./pladis_words.js";

// in the spelling of block lists; tests/web compares them with the host's models
export const KNOWN = {
  "the demo model": "d0-1,m0,u0-2",
  "SD 1.x": "d0-5,m0,u0-8",
  "SDXL": "d0-1.0-1,d2-3.0-9,m0.0-9,u0-2.0-9,u3-5.0-1",
};
/** @type {[RegExp, string][]} */
const FILE_NAMES = [
  [/sd[-_ ]?xl|xl[-_ .v\d]|pony|illustrious|noob/i, "SDXL"],
  [/(sd|v|stable[-_ ]diffusion[-_ ]?v?)[-_ ]?1[-_. ]?[45]/i, "SD 1.x"],
];

// what Apply nodes said after a run, by the loader that their model came from
const reported = new Map();

export function reportBlocks(node, blocks) {
  reported.set(identity(node, loaderOf(node)), blocks);
}

/** `blocks` in the spelling of block lists, null when unknown, and `origin`, which says in words how they are known. */
export function blocksAt(node) {
  const loader = loaderOf(node);
  const id = identity(node, loader);
  if (reported.has(id)) return { id, blocks: reported.get(id).join(","), origin: words("lastRun") };
  const name = loader && nameOf(loader);
  if (!name) return { id, blocks: null, origin: words("unknown") };
  const origin = loader.comfyClass === "PLADISDemoCheckpoint" ? words("demo") : words("guessed", { model: name });
  return { id, blocks: KNOWN[name], origin };
}

function nameOf(loader) {
  if (loader.comfyClass === "PLADISDemoCheckpoint") return "the demo model";
  const file = loader.widgets?.find(({ name }) => name === "ckpt_name" || name === "unet_name")?.value;
  return FILE_NAMES.find(([pattern]) => pattern.test(file ?? ""))?.[1];
}

/** The first node of the chain of MODEL links that ends at `node`; undefined where it begins outside, as in a subgraph. */
function loaderOf(node) {
  const seen = new Set();
  for (let next = modelSource(node); next && !seen.has(next); next = modelSource(next)) seen.add(next);
  const first = [...seen].at(-1);
  return first?.inputs?.some(({ type }) => type === "MODEL") ? undefined : first;
}

function modelSource(node) {
  // a reroute's input is of any type
  const slot = node.inputs?.findIndex(({ type }, i) => (type === "MODEL" || type === "*") && node.isInputConnected(i));
  return slot >= 0 ? node.getInputNode(slot) : null;
}

/** What a loader loads, so that other nodes and workflows profit; without one, as inside a subgraph, the node itself. */
function identity(node, loader) {
  if (!loader) return `${node.graph?.id} ${node.id}`;
  const values = loader.widgets?.filter(({ serialize }) => serialize !== false).map(({ value }) => value) ?? [];
  return JSON.stringify([loader.comfyClass, ...values]);
}
