// What the last run did, in the words of nodes/hosting/receipt.py. Kept in this page alone and by a node's place: undo and
// a change of workflow make nodes anew, and a copy has a place of its own.

const said = new Map();

/** Takes what the server sends to the browser that queued a run. */
export function keepReceipt(root, { node: executionId, text }) {
  const node = nodeAt(root, executionId);
  if (node) said.set(placeOf(root, node), text);
}

/** The words for a node; empty before the first run of this page. */
export function receiptOf(root, node) {
  return said.get(placeOf(root, node)) ?? "";
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
