// Values to begin with, by kind of model, for the menu of the Apply nodes. They only set inputs that the node has. Each
// label in pladis_words.js names its source; the help pages say the same. tests/web compares both.

const PAPER = { scale: 2, alpha: 1.5, start_percent: 0, end_percent: 1 };
// so that an advanced node does what the source did; which model it is, force_unknown, stays
const ADVANCED = { layers: "all", apply_to: "both", scale_schedule: "constant", norm_cap: 0, tokens: "all" };

/** In the order of the menu: the key of the label, and what differs from the paper. */
export const PRESETS = {
  presetSdxl: {},
  presetFewStep: {},
  presetFlux: { scale: 1.5 },
  presetTags: { scale: 0.5 },
  presetVideo: { scale: 1 },
  presetGentle: { scale: 0.5 },
};

/** The values of a preset for a node that has inputs of these names. */
export function presetValues(preset, names) {
  const values = { ...PAPER, ...ADVANCED, ...PRESETS[preset] };
  return Object.fromEntries(Object.entries(values).filter(([name]) => names.includes(name)));
}
