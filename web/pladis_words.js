// The words of the panels and of the menu, in the language that ComfyUI is set to. English is here; the others are in
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
  presets: "PLADIS presets",
  presetSdxl: "SDXL: scale {scale} (the paper)",
  presetFewStep: "Few-step SDXL (Turbo, Lightning, DMD2, Hyper): scale {scale} (the paper)",
  presetFlux: "Flux.1: scale {scale} (the authors' code: 1.5 to 2)",
  presetTags: "Trained on tags (Pony, Illustrious): scale {scale} (users: less than 2; the number has no source)",
  presetVideo: "Video (Wan, LTX, Hunyuan): scale {scale} (no source, not measured)",
  presetGentle: "Gentle: scale {scale} (measured on the demo model: more objects found, and extra ones)",
  compare: "Compare with scale 0 (PLADIS Sweep)",
  noSampler: "No KSampler takes this node's model, and PLADIS Sweep samples as KSampler does. Run twice with one seed, "
    + "once with scale 0.",
  noVae: "No VAE was found to decode the pictures. Add Load VAE, then try again.",
  leftOut: "PLADIS Sweep does not have these settings of the node: {inputs}. Its pictures are without them.",
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
