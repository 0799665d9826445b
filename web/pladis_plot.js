// A small plot of what scale and alpha do to one row of attention weights, and beneath it what the last run did.

import { COLORS } from "./pladis_colors.js";
import { entmax, mix, softmax } from "./pladis_math.js";
import { words } from "./pladis_words.js";

// illustrative: sorted scores of twelve words at one place of a picture, not those of the user's prompt
export const SCORES = [3.2, 2.8, 2.3, 1.9, 1.5, 1.1, 0.8, 0.4, 0.1, -0.4, -1.0, -1.8];
// keeps small weights small; larger ones stretch the axis
const LEAST_TOP = 0.45;

const STYLE = `
  :host { ${COLORS} display: flex; flex-direction: column; gap: 4px; height: 100%; min-height: 110px;
    box-sizing: border-box; contain: size; padding: 6px 8px; border-radius: 6px;
    font: 11px/1.3 system-ui, sans-serif; user-select: none; }
  svg { flex: 1 0 24px; width: 100%; overflow: visible; }
  .dense { fill: var(--grey); }
  .mixed { fill: var(--accent); }
  .mixed.negative { fill: var(--error); }
  line, .mixed { vector-effect: non-scaling-stroke; }
  .sparse { stroke: var(--text); stroke-width: 2px; }
  .zero { stroke: var(--grey); stroke-width: 1px; }
  /* a seam of the panel's colour: side by side the shapes would hardly differ in lightness */
  .mixed { stroke: var(--panel); stroke-width: 2px; paint-order: stroke; }
  .seam { stroke: var(--panel); stroke-width: 4px; }
  .legend { flex: none; display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 10px; }
  i { display: inline-block; width: 9px; height: 9px; margin-right: 4px; border-radius: 2px; }
  i.dense { background: var(--grey); }
  i.sparse { height: 2px; vertical-align: 3px; background: var(--text); }
  i.mixed { background: var(--accent); }
  i.negative { background: var(--error); }
  /* takes its room from the plot; what is longer has a scroll bar, and the tooltip shows all of it */
  .receipt { flex: 0 1 auto; min-height: 0; overflow-y: auto; scrollbar-width: thin; overflow-wrap: anywhere;
    color: var(--text); }
  .receipt:empty { display: none; }
`;

/** An element, and how to draw the weights for a scale and an alpha, and the words of a receipt, into it. */
export function weightsPlot() {
  const root = document.createElement("div");
  const shadow = root.attachShadow({ mode: "open" });

  function draw({ scale, alpha, receipt }) {
    const dense = softmax(SCORES);
    const sparse = entmax(SCORES, alpha);
    const mixed = mix(dense, sparse, scale);
    const kept = sparse.filter((weight) => weight > 0).length;
    root.title = words("example");
    shadow.innerHTML = `
      <style>${STYLE}</style>
      ${bars(dense, sparse, mixed)}
      <div class="legend">
        <span><i class="dense"></i>${words("dense")}</span>
        <span><i class="sparse"></i>${words("sparse", { kept, count: SCORES.length })}</span>
        <span><i class="mixed"></i><i class="mixed negative"></i>${words("mixed")}</span>
      </div>
      <div class="receipt"></div>`;
    /** @type {HTMLElement} */
    const said = shadow.querySelector(".receipt");
    said.textContent = said.title = receipt;
  }
  return { root, draw };
}

function bars(dense, sparse, mixed) {
  const top = Math.max(LEAST_TOP, ...dense, ...sparse, ...mixed);
  const bottom = Math.min(0, ...mixed);
  const shapes = dense.map((_, i) => `
    ${bar("dense", i + 0.1, 0.8, dense[i])}
    ${bar(mixed[i] < 0 ? "mixed negative" : "mixed", i + 0.28, 0.44, mixed[i])}`);
  const levels = sparse.map((weight, i) => level("seam", i, weight) + level("sparse", i, weight));
  // y grows downwards; the stretched picture fills whatever size the node has
  return `<svg viewBox="0 ${-top} ${dense.length} ${top - bottom}" preserveAspectRatio="none">
    ${shapes.join("")}<line class="zero" x1="0" x2="${dense.length}" y1="0" y2="0"/>${levels.join("")}</svg>`;
}

function bar(kind, x, width, weight) {
  return `<rect class="${kind}" x="${x}" width="${width}" y="${-Math.max(weight, 0)}" height="${Math.abs(weight)}"/>`;
}

function level(kind, x, weight) {
  return `<line class="${kind}" x1="${x + 0.1}" x2="${x + 0.9}" y1="${-weight}" y2="${-weight}"/>`;
}
