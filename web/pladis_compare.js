// "Compare with scale 0": the PLADIS Sweep that samples as the sampler behind an Apply node does, without PLADIS and with
// it. What is said here of nodes and links is LiteGraph's.

const LINKS = ["positive", "negative", "latent_image"];
const VALUES = ["seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"];
// what the cells of a sweep cannot have, and what it is where it does nothing
const LEFT_OUT = {
  start_percent: 0, apply_to: "both", force_unknown: false, scale_schedule: "constant", tokens: "all",
};
const GAP = 60;

/**
 * Puts the sweep and a preview of its grid beneath the graph of `apply`, an Apply node; once: a sweep that is there
 * already, with these settings and this sampling, is that.
 *
 * Returns the sweep and the names of the inputs of `apply` that it leaves out, or which part was not found.
 * @returns {{ sweep?: any, leftOut?: string[], missing?: "sampler" | "vae" }}
 */
export function addComparison(apply, create) {
  const sampler = downstream(apply, "MODEL").find(samples);
  if (!sampler) return { missing: "sampler" };
  const decoder = downstream(sampler, "LATENT").find((node) => slotOfType(node.inputs, "VAE") >= 0);
  const loader = apply.graph.nodes.find((node) => slotOfType(node.outputs, "VAE") >= 0);
  const decodes = decoder?.isInputConnected(slotOfType(decoder.inputs, "VAE"));
  if (!decodes && !loader) return { missing: "vae" };

  const { graph } = apply, lists = listsOf(apply);
  const leftOut = Object.keys(LEFT_OUT).filter((name) => LEFT_OUT[name] !== (valueOf(apply, name) ?? LEFT_OUT[name]));
  const before = graph.nodes.find((node) => node.type === "PLADISSweep" && compares(node, sampler, lists));
  if (before) return { sweep: before, leftOut };
  const [sweep, preview] = [create("PLADISSweep"), create("PreviewImage")];
  const below = Math.max(...graph.nodes.map((node) => node.pos[1] + node.size[1])) + GAP;
  graph.add(sweep);
  graph.add(preview);
  // the model as the sampler has it, with all that comes after the Apply node
  ["model", ...LINKS].forEach((name) => copyLink(sampler, name, sweep));
  for (const name of VALUES) {
    const from = widgetOf(sampler, name);
    if (from && widgetOf(sweep, name)) setValue(sweep, name, from.value);
    if (isLinked(sampler, name)) copyLink(sampler, name, sweep);
  }
  if (decodes) copyLink(decoder, decoder.inputs[slotOfType(decoder.inputs, "VAE")].name, sweep, "vae");
  else loader.connect(slotOfType(loader.outputs, "VAE"), sweep, sweep.findInputSlot("vae"));
  sweep.connect(slotOfType(sweep.outputs, "IMAGE"), preview, preview.findInputSlot("images"));
  Object.entries(lists).forEach(([name, text]) => setValue(sweep, name, text));
  // or its next run would be of another seed than the picture that the sampler shows
  if (widgetOf(sweep, "control_after_generate")) setValue(sweep, "control_after_generate", "fixed");
  sweep.pos = [apply.pos[0], below];
  preview.pos = [sweep.pos[0] + sweep.size[0] + GAP, below];
  // as queueing does, which would be a step of undo of its own
  graph.updateExecutionOrder();
  return { sweep, leftOut };
}

/** The lists of a sweep that has one setting besides the baseline. */
function listsOf(apply) {
  const value = (name, otherwise) => valueOf(apply, name) ?? otherwise;
  // without PLADIS on the node, with the paper's value
  const lists = { scales: `0, ${value("scale") || 2}`, alphas: `${value("alpha")}` };
  if (value("end_percent") !== 1) lists.end_percents = `${value("end_percent")}`;
  if (value("norm_cap", 0) !== 0) lists.norm_caps = `${value("norm_cap")}`;
  if (value("layers", "all") !== "all") lists.layers = value("layers") === "custom" ? value("blocks") : value("layers");
  return lists;
}

/** Whether a sweep has the sampler's links and values, and these lists and no others. */
function compares(sweep, sampler, lists) {
  const source = (node, name) => {
    const link = node.getInputLink(node.findInputSlot(name));
    return link && `${link.origin_id} ${link.origin_slot}`;
  };
  if (!["model", ...LINKS].every((name) => source(sweep, name) === source(sampler, name))) return false;
  const none = Object.fromEntries(["seeds", "end_percents", "norm_caps", "layers"].map((name) => [name, ""]));
  const values = VALUES.filter((name) => widgetOf(sampler, name)).map((name) => [name, valueOf(sampler, name)]);
  return [...values, ...Object.entries({ ...none, ...lists })].every(([name, value]) => valueOf(sweep, name) === value);
}

/** Whether a node samples as KSampler does, by the names of its inputs. */
function samples(node) {
  const links = ["model", ...LINKS].every((name) => node.findInputSlot(name) >= 0);
  return links && VALUES.filter((name) => name !== "denoise").every((name) => widgetOf(node, name));
}

/** The nodes behind a node along links of a type, the nearest first. */
function downstream(node, type) {
  const found = [node];
  for (const next of found) {
    next.outputs?.forEach((output, slot) => {
      // a reroute's output is of any type
      if (output.type !== type && output.type !== "*") return;
      for (const reached of next.getOutputNodes(slot) ?? []) if (!found.includes(reached)) found.push(reached);
    });
  }
  return found.slice(1);
}

function copyLink(from, name, to, as = name) {
  const slot = from.findInputSlot(name);
  const target = to.findInputSlot(as);
  const link = from.getInputLink(slot);
  if (!link || target < 0) return;
  const source = from.graph.getNodeById(link.origin_id);
  if (source) source.connect(link.origin_slot, to, target);
  // it comes from outside of a subgraph
  else from.graph.inputNode?.slots[link.origin_slot]?.connect(to.inputs[target], to);
}

function slotOfType(slots, type) {
  return slots?.findIndex((slot) => slot.type === type) ?? -1;
}

function isLinked(node, name) {
  const slot = node.findInputSlot(name);
  return slot >= 0 && node.isInputConnected(slot);
}

function widgetOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

function valueOf(node, name) {
  return widgetOf(node, name)?.value;
}

function setValue(node, name, value) {
  const widget = widgetOf(node, name);
  widget.value = value;
  widget.callback?.(value);
}
