// What the last run did, in the words of nodes/hosting/receipt.py. Kept in this page alone and by a node's place: undo and
// a change of workflow make nodes anew, and a copy has a place of its own.

/** @type {Map<string, {run: ?string, texts: string[]}>} */
const said = new Map();

/** Takes what the server sends to the browser that queued a run: once for every sampler that a node's MODEL goes to. */
export function keepReceipt(root, { node: executionId, text, run = null }) {
  const node = nodeAt(root, executionId);
  if (!node) return;
  const place = placeOf(root, node), before = said.get(place);
  const texts = run !== null && before?.run === run ? before.texts : [];
  said.set(place, { run, texts: [...texts, text] });
}

/** The words for a node; empty before the first run of this page, and of a node that is muted or bypassed. */
export function receiptOf(root, node) {
  const texts = (!node.mode && said.get(placeOf(root, node))?.texts) || [];
  if (texts.length < 3) return texts.join(" | next sampler: ");
  return `${texts[0]} | ${texts.length - 2} more | last sampler: ${texts.at(-1)}`;
}

/** As ComfyUI finds a node that was executed: 12:5 is node 5 in the subgraph that node 12 stands for. */
function nodeAt(root, executionId) {
  const path = executionId.split(":");
  const id = path.pop();
  return path.reduce((graph, outer) => graph?.getNodeById(outer)?.subgraph, root)?.getNodeById(id);
}

function placeOf(root, node) {
  return `${root.id} ${node.graph.id} ${node.id}`;
}
