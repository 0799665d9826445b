// The colours of the panels: ComfyUI's own where they can be read, else its hue in a lightness that suits the background.
// tests/web/test_looks.py measures the contrast.

/**
 * The hue of `color`, as light as what is on a dark panel or a light one must be.
 *
 * `none` takes the place of a component that the other colour of the mixture has.
 */
function onPanel(color, onLight, onDark, mostChroma) {
  return `color-mix(in oklch, oklch(from ${color} none min(c, ${mostChroma}) h),
    oklch(from var(--panel) clamp(${onLight}, (0.6 - l) * 1000, ${onDark}) none none))`;
}

const PRIMARY = "var(--primary-background, #0b8ce9)";

/** Declarations for the :host of a panel. */
export const COLORS = `
  --panel: var(--comfy-input-bg);
  --text: var(--input-text);
  --quiet: color-mix(in srgb, var(--descrip-text), var(--input-text) 30%);
  --grey: ${onPanel("grey", 0.52, 0.62, 0)};
  --accent: ${onPanel(PRIMARY, 0.5, 0.66, 0.16)};
  --error: ${onPanel("var(--error-text, #f44)", 0.42, 0.73, 0.17)};
  /* under white text */
  --chosen: ${onPanel(PRIMARY, 0.5, 0.55, 0.15)};
  /* as ComfyUI's buttons on nodes */
  --button: var(--component-node-widget-background, var(--secondary-background));
  --button-text: var(--component-node-foreground, var(--input-text));
  --button-hovered: color-mix(in srgb, var(--button), var(--button-text) 15%);
  background: var(--panel); color: var(--quiet);
`;

/**
 * For the page: in Nodes 2.0 a panel is as ComfyUI's inputs there, on the canvas as its text areas. Taken where the theme is
 * set, in older front ends on the body: a node with a colour of its own changes some of the colours inside.
 */
export const IN_NODES_2 = `
  :root, body { --pladis-panel: var(--component-node-widget-background); }
  .lg-node [data-panel] { --panel: var(--pladis-panel);
    --button: color-mix(in srgb, var(--panel), var(--button-text) 8%); }
`;
