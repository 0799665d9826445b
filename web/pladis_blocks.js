// Block lists (d2.2-9,m0,u0.4,b0-11), read and written. The spelling is that of nodes/hosting/models/layers.py, which
// decides; tests/web compares both. A layout is the number of layers of every block: {d: [2, 2], m: [1], u: [2, 2],
// b: []}. A choice is a set of layers, each as "d2.3".

import { words } from "./pladis_words.js";

const ENTRY = /^([dmub])(\d{1,4})(?:-\1?(\d{1,4}))?(?:\.(\d{1,4})(?:-(\d{1,4}))?)?$/;
// what a list without a known model may name, else a typing error would draw thousands of chips
const MOST_BLOCKS = 128;
const MOST_LAYERS = 32;

/** @typedef {{ d: number[], m: number[], u: number[], b: number[] }} Layout */

/** @returns {Layout} */
export function emptyLayout() {
  return { d: [], m: [], u: [], b: [] };
}

/** The layers that a list names, and the entries that this layout has no meaning for, with the reason. */
export function readBlocks(text, layout) {
  const chosen = new Set();
  const wrong = [];
  for (const entry of entriesOf(text)) {
    const { problem, keys } = readEntry(entry, layout);
    if (problem) wrong.push({ entry, problem });
    else keys.forEach((key) => chosen.add(key));
  }
  return { chosen, wrong };
}

/** The shortest list that names a choice; entries that could not be read stay as they are, at the end. */
export function writeBlocks(chosen, layout, wrong = []) {
  const entries = [];
  for (const [prefix, depths] of Object.entries(layout)) {
    const picked = depths.map((depth, number) => range(depth).filter((i) => chosen.has(`${prefix}${number}.${i}`)));
    const whole = picked.map((indices, number) => indices.length === depths[number]);
    for (let number = 0; number < depths.length; number++) {
      if (whole[number]) {
        const first = number;
        while (whole[number + 1]) number++;
        entries.push(prefix + span(first, number));
      } else {
        runs(picked[number]).forEach(([first, last]) => entries.push(`${prefix}${number}.${span(first, last)}`));
      }
    }
  }
  return [...entries, ...wrong.map(({ entry }) => entry)].join(",");
}

/** The smallest layout in which a list has a meaning: all that is known without a model. */
export function layoutNamedBy(text, layout = emptyLayout()) {
  for (const entry of entriesOf(text)) {
    const { problem, prefix, first, last, lastIndex } = parse(entry);
    if (problem || last >= MOST_BLOCKS || lastIndex >= MOST_LAYERS) continue;
    const depths = layout[prefix];
    while (depths.length <= last) depths.push(1);
    for (let number = first; number <= last; number++) depths[number] = Math.max(depths[number], lastIndex + 1);
  }
  return layout;
}

/** A layout from the blocks that a node reports: ["d0.0-1", "m0.0"], or ["b0-18.0-1"] for blocks that are alike. */
export function layoutFrom(blocks) {
  return layoutNamedBy(blocks.join(","));
}

export function keysOf(prefix, number, depth) {
  return range(depth).map((index) => `${prefix}${number}.${index}`);
}

function entriesOf(text) {
  // as nodes/hosting/lists.py
  return text.split(/[,;，、；\s]+/).filter(Boolean);
}

/**
 * @returns {{ problem?: string, prefix?: string, first?: number, last?: number, firstIndex?: number, lastIndex?: number,
 *   whole?: boolean }}
 */
function parse(entry) {
  const match = ENTRY.exec(entry.toLowerCase());
  if (!match) return { problem: words("notABlock", { entry }) };
  const [, prefix, ...numbers] = match;
  const [first, last = first, firstIndex, lastIndex = firstIndex] = numbers
    .map((n) => (n === undefined ? undefined : Number(n)));
  if (first > last || firstIndex > lastIndex) return { problem: words("backwards", { entry }) };
  return { prefix, first, last, firstIndex, lastIndex: lastIndex ?? 0, whole: firstIndex === undefined };
}

function readEntry(entry, layout) {
  const { problem, prefix, first, last, firstIndex, lastIndex, whole } = parse(entry);
  if (problem) return { problem };
  const depths = layout[prefix];
  if (last >= depths.length) return { problem: words("noBlock", { block: `${prefix}${last}` }) };
  const keys = [];
  for (let number = first; number <= last; number++) {
    if (!whole && lastIndex >= depths[number]) {
      return { problem: words("noLayer", { layer: lastIndex, block: `${prefix}${number}` }) };
    }
    const layers = keysOf(prefix, number, depths[number]);
    keys.push(...(whole ? layers : layers.slice(firstIndex, lastIndex + 1)));
  }
  return { keys };
}

function range(count) {
  return Array.from({ length: count }, (_, i) => i);
}

/** Sorted numbers as [first, last] of what is consecutive. */
function runs(numbers) {
  const found = [];
  for (const number of numbers) {
    if (found.length && number === found.at(-1)[1] + 1) found.at(-1)[1] = number;
    else found.push([number, number]);
  }
  return found;
}

function span(first, last) {
  return first === last ? `${first}` : `${first}-${last}`;
}
