// What the last run did, in words that nodes/hosting/receipt.py sends to the browser that queued it. Kept in this page
// alone and by the node's place: undo and a change of workflow make nodes anew, a copy has a place of its own.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const said = new Map();

api.addEventListener("pladis.receipt", ({ detail }) => {
  const node = nodeAt(String(detail.node));
  if (node) said.set(placeOf(node), detail.text);
});

/** Empty when no run of this page has reported on the node. */
export function receiptOf(node) {
  return said.get(placeOf(node)) ?? "";
}

/** As ComfyUI finds what has executed: 12:5 is node 5 inside the subgraph that node 12 stands for. */
function nodeAt(executionId) {
  const path = executionId.split(":");
  const id = path.pop();
  const graph = path.reduce((outer, step) => outer?.getNodeById(step)?.subgraph, app.rootGraph);
  return graph?.getNodeById(id);
}

function placeOf(node) {
  return `${app.rootGraph.id} ${node.graph.id} ${node.id}`;
}
