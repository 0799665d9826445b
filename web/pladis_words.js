// The words of the panels, in the language that ComfyUI is set to. English is here; the others are in
// locales/<language>/main.json, which ComfyUI serves with all translations. {name} stands for a value.

export const ENGLISH = {
  example: "An example row of twelve words, not your prompt: attention weights with softmax (dense), alpha-entmax "
    + "(sparse), and mixed as scale says. What is below the line pushes away.",
  dense: "dense",
  sparse: "sparse: {kept} of {count} words",
  mixed: "mixed",
  d: "Down",
  m: "Middle",
  u: "Up",
  b: "Blocks",
  block: "Block {block}",
  layer: "Layer {layer}",
  all: "all",
  none: "none",
  linked: "The list comes from a link.",
  unused: "Not used: layers is {layers}. A click on a block sets it to custom.",
  empty: "Choose at least one block.",
  problems: "{problems}.",
  notABlock: "'{entry}' is not a block",
  backwards: "the range in '{entry}' runs backwards",
  noBlock: "no block {block}",
  noLayer: "no layer {layer} in block {block}",
  lastRun: "The blocks at the last run.",
  unknown: "Queue once: then the blocks of this model are here.",
  demo: "The blocks of the demo model.",
  guessed: "The blocks of {model}, going by the file name; a run tells for sure.",
};

let chosen = () => "en";
let translations = {};

/** Takes how to ask for the language that is set, and what ComfyUI serves: {ja: {pladis: {dense: "密"}}}. */
export function learnWords(askLanguage, served) {
  [chosen, translations] = [askLanguage, served];
}

/** The language that `words` speaks; English where there is none of the one that is set. */
export function language() {
  const set = chosen();
  return translations[set]?.pladis ? set : "en";
}

export function words(key, values = {}) {
  const text = translations[language()]?.pladis?.[key] ?? ENGLISH[key];
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}
