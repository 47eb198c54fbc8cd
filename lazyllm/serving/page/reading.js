/** The prompt as it was read: its text on grounds of depth, a strip of all of it, the legend. */

import { $, count, element, inFrame, share } from "./dom.js";
import { FLASH_MS, PromptTrace } from "./prompt.js";

const STRIP_PIXELS = 34;
let trace = new PromptTrace([]);
let nodes = [];
const changed = new Set();

/** Shows another prompt, of which nothing has been computed yet. */
export function begin(pieces) {
  trace = new PromptTrace(pieces);
  nodes = trace.blocks.map(() => element("div", { className: "block" }));
  $("text").replaceChildren(...nodes);
  $("reading").classList.toggle("empty", !pieces.length);
  changed.clear();
  nodes.forEach((_, block) => changed.add(block));
  inFrame(draw);
}

/** Takes over what an event says of depths. */
export function take(depths) {
  trace.take(depths, performance.now()).forEach((block) => changed.add(block));
  inFrame(draw);
}

function draw() {
  const now = performance.now();
  changed.forEach((block) => nodes[block].replaceChildren(...runNodes(block, now)));
  changed.clear();
  drawStrip();
  drawLegend();
  $("figure-prompt").textContent = trace.tokens ? trace.tokens.toLocaleString("en") : "–";
  $("figure-computed").textContent = trace.layers ? share(trace.computed) : "–";
  $("figure-revived").textContent = trace.layers ? trace.revivals.toLocaleString("en") : "–";
}

function* runNodes(block, now) {
  for (const { text, depth, age } of trace.runs(block, now)) if (text) yield runNode(text, depth, age);
}

/** A run; one that was revived a moment ago goes on flashing where it was, also when its block is drawn again. */
function runNode(text, depth, age) {
  const isRevived = age >= 0;
  const className = `d${trace.shade(depth)}${isRevived ? " revived" : ""}`;
  const node = element(isRevived ? "mark" : "span", { className, textContent: text });
  if (trace.layers) node.title = `${depth} of ${count(trace.layers, "layer")}${isRevived ? ", revived" : ""}`;
  if (isRevived && age < FLASH_MS) {
    node.classList.add("fresh");
    node.style.animationDelay = `${-age}ms`;
  }
  return node;
}

// -- all of it at a glance --------------------------------------------------------------------------

/** A strip whose columns are as dark as their tokens are deep on average; revived ones stand out in full height. */
function drawStrip() {
  const canvas = $("strip");
  const [width, height] = [canvas.clientWidth, STRIP_PIXELS].map((length) => Math.round(length * devicePixelRatio));
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const { fill, stroke } = getComputedStyle(canvas);
  context.clearRect(0, 0, width, height);
  context.fillStyle = fill;
  const columns = Math.max(1, Math.min(trace.tokens, width));
  for (let column = 0; column < columns; column++) {
    context.globalAlpha = darkness(...[column, column + 1].map((at) => Math.floor((at * trace.tokens) / columns)));
    context.fillRect((column * width) / columns, 0, width / columns + 0.5, height);
  }
  context.globalAlpha = 1;
  context.fillStyle = stroke;
  trace.revivedAt.forEach((time, token) => {
    if (time) context.fillRect((token * width) / trace.tokens, 0, Math.max(width / trace.tokens, 1.5 * devicePixelRatio), height);
  });
  canvas.ariaLabel = `The prompt from its first to its last token, darker where more layers have computed it; ${count(trace.revivals, "token")} revived`;
}

function darkness(from, to) {
  let sum = 0;
  for (let token = from; token < to; token++) {
    const depth = trace.depths[token];
    sum += depth && 0.15 + (0.85 * depth) / trace.layers;
  }
  return sum / Math.max(1, to - from);
}

function drawLegend() {
  const entries = [...trace.shades()].map(([shade, { from, to, tokens }]) => {
    const depths = from === to ? from : `${from}–${to}`;
    return entry(`d${shade}`, `${depths} of ${count(trace.layers, "layer")}: ${tokens.toLocaleString("en")}`);
  });
  const revived = entry("revived", "revived for the answer");
  $("legend").replaceChildren(...(trace.layers ? [...entries, revived] : []));
}

function entry(className, text) {
  const sample = element("span", { className: `sample ${className}`, textContent: "ab", ariaHidden: "true" });
  return element("span", {}, sample, text);
}

// -- what a reader does -----------------------------------------------------------------------------

$("strip").addEventListener("click", ({ offsetX, target }) => {
  const token = Math.floor((offsetX / target.clientWidth) * trace.tokens);
  nodes[trace.blockOf[token]]?.scrollIntoView({ block: "center" });
});
document.querySelectorAll("input[name=show]").forEach((choice) => {
  choice.addEventListener("change", () => ($("text").dataset.show = choice.value));
});
new ResizeObserver(() => inFrame(drawStrip)).observe($("strip"));
document.addEventListener("theme", () => inFrame(drawStrip));
