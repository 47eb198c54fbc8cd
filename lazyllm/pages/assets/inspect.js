const CLASSES = 8;
const [PROTECTED, QUERY] = [1, 2];
const MOST_CHIPS = 40;
const tokens = data.pieces.length;
const marks = numbers(data.marks, Uint8Array);
const depths = numbers(data.depths, Uint16Array).slice();
const cuts = data.cuts.map((cut) => ({
  ...cut,
  scores: numbers(cut.scores, Float32Array),
  ranks: numbers(cut.ranks, Uint32Array),
  entered: numbers(cut.entered, Uint8Array),
}));
const atDepth = new Uint32Array(data.layers + 1);
depths.forEach((depth) => atDepth[depth]++);
const afterPrefill = atDepth.slice();
const reached = new Set(Array.from(atDepth.keys()).filter((depth) => atDepth[depth]));
data.steps.forEach((step) => step.changes.forEach(([, , depth]) => reached.add(depth)));
let step = 0;
let active = -1;

// -- the text ---------------------------------------------------------------------------------------

/** Colour class of a depth: 0 for none, 8 for all layers. */
function shade(depth) {
  if (depth === 0 || depth >= data.layers) return depth && CLASSES;
  return Math.max(1, Math.min(CLASSES - 1, Math.round((CLASSES * depth) / data.layers)));
}

function className(token) {
  const mark = marks[token] & QUERY ? " query" : marks[token] & PROTECTED ? " protected" : "";
  return `d${shade(depths[token])}${mark}`;
}

function label(token) {
  return shown(data.pieces[token]) || "·";
}

const spans = data.pieces.map((piece, token) => {
  const span = element("span", { className: className(token), textContent: label(token), id: `t${token}`, role: "option" });
  if (!piece) span.classList.add("strange");
  return span;
});
$("text").append(...spans);

function tokenOf(node) {
  return node.parentNode === $("text") ? Number(node.id.slice(1)) : -1;
}

// -- steps ------------------------------------------------------------------------------------------

function setDepth(token, depth) {
  atDepth[depths[token]]--;
  atDepth[depth]++;
  depths[token] = depth;
  spans[token].className = className(token) + (data.pieces[token] ? "" : " strange");
}

/** Goes to a step; only tokens whose depth differs are touched. */
function go(to) {
  const touched = new Set(data.steps[step].revived);
  for (; step < to; step++) data.steps[step + 1].changes.forEach(([token, , after]) => (setDepth(token, after), touched.add(token)));
  for (; step > to; step--) data.steps[step].changes.forEach(([token, before]) => (setDepth(token, before), touched.add(token)));
  touched.forEach((token) => spans[token].classList.remove("revived"));
  data.steps[to].revived.forEach((token) => spans[token].classList.add("revived"));
  if (active >= 0) spans[active].classList.add("active");
  show();
}

function show() {
  const found = data.steps[step].revived;
  const last = data.steps.length - 1;
  $("step").value = step;
  $("back").disabled = step === 0;
  $("forth").disabled = step === last;
  $("happened").textContent = step === 0
    ? `after the prefill, ${count(last, "step")} to come`
    : `step ${step} of ${last}: ${found.length ? `${count(found.length, "token")} revived` : "nothing revived"}`;
  $("step").ariaValueText = $("happened").textContent;
  $("kv").textContent = size(data.steps[step].kv);
  $("aux").textContent = size(data.steps[step].aux);
  showReply();
  showRevived(found);
  showBars();
  showLegend();
  draw(found);
  if (active >= 0) describe(active);
}

function showReply() {
  const before = data.reply.slice(0, step).join("");
  const newest = element("b", { textContent: shown(data.reply[step] ?? "") });
  $("reply").replaceChildren(shown(before), newest);
}

function showRevived(found) {
  const chips = found.slice(0, MOST_CHIPS).map((token) => {
    const chip = element("button", { type: "button", textContent: label(token).trim() || "⏎", title: `token ${token}` });
    chip.addEventListener("click", () => pick(token, true));
    return chip;
  });
  const more = found.length - chips.length;
  const rest = more > 0 ? `and ${more.toLocaleString("en")} more` : "";
  const none = found.length ? rest : step ? "none" : "none yet: this is the prefill";
  $("revived").replaceChildren(...chips, element("span", { className: "quiet", textContent: none }));
}

// -- figures ----------------------------------------------------------------------------------------

/** By layer, the share of tokens that it has computed, given how many have each depth. */
function computed(histogram) {
  let left = tokens;
  return Array.from({ length: data.layers }, (_, layer) => (left -= histogram[layer]) / tokens);
}

const bars = Array.from({ length: data.layers }, () => element("div", {}, element("i")));
$("bars").append(...bars);
const first = computed(afterPrefill);

function showBars() {
  const now = computed(atDepth);
  bars.forEach((bar, layer) => {
    const since = Math.max(0, now[layer] - first[layer]);
    bar.style.height = `${100 * now[layer]}%`;
    bar.firstChild.style.height = now[layer] ? `${(100 * since) / now[layer]}%` : 0;
    bar.title = `layer ${layer}: ${share(now[layer])} of the prompt` + (since ? `, ${share(since)} since the prefill` : "");
  });
  const mean = now.reduce((sum, part) => sum + part, 0) / data.layers;
  $("total").textContent = `${share(mean)} of all`;
  $("bars").ariaLabel = `Share of the prompt that each layer has computed: ${runs(now)}; ${share(mean)} of all`;
}

/** Shares layer by layer, equal neighbours as one. */
function runs(shares) {
  const parts = [];
  shares.forEach((part, layer) => {
    const same = parts.at(-1);
    if (same && same.text === share(part)) same.to = layer;
    else parts.push({ from: layer, to: layer, text: share(part) });
  });
  return parts.map(({ from, to, text }) => `layer${from === to ? ` ${from}` : `s ${from} to ${to}`} ${text}`).join(", ");
}

function showLegend() {
  const groups = new Map();
  [...reached].sort((a, b) => a - b).forEach((depth) => {
    const group = groups.get(shade(depth)) ?? groups.set(shade(depth), { from: depth, number: 0 }).get(shade(depth));
    Object.assign(group, { to: depth, number: group.number + atDepth[depth] });
  });
  const depthsOf = ({ from, to }) => (from === to ? from : `${from}–${to}`);
  const entries = [...groups].map(([shade, group]) => {
    const layers = `${depthsOf(group)} layer${group.to === 1 ? "" : "s"}`;
    return entry(`d${shade}`, `${layers}: ${group.number.toLocaleString("en")}`);
  });
  $("legend").replaceChildren(
    ...entries, entry("revived", "revived in this step"), entry("protected", "protected"), entry("query", "question"),
  );
}

function entry(className, text) {
  return element("span", {}, element("span", { className: `sample ${className}`, textContent: "ab" }), text);
}

/** The whole prompt as a strip: each column is as dark as its tokens are deep on average, revived ones stand out. */
function draw(found) {
  const canvas = $("overview");
  const [width, height] = [canvas.clientWidth * devicePixelRatio, 34 * devicePixelRatio];
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, width, height);
  context.fillStyle = getComputedStyle($("bars").firstChild).backgroundColor;
  const columns = Math.max(1, Math.min(tokens, Math.floor(width)));
  for (let column = 0; column < columns; column++) {
    const [from, to] = [column, column + 1].map((at) => Math.floor((at * tokens) / columns));
    let sum = 0;
    for (let token = from; token < to; token++) sum += depths[token] && 0.15 + (0.85 * depths[token]) / data.layers;
    context.globalAlpha = sum / Math.max(1, to - from);
    context.fillRect((column * width) / columns, 0, width / columns + 0.5, height);
  }
  context.globalAlpha = 1;
  context.fillStyle = getComputedStyle($("bars").querySelector("i")).backgroundColor;
  found.forEach((token) => context.fillRect((token * width) / tokens - devicePixelRatio / 2, 0, 2 * devicePixelRatio, height));
  canvas.ariaLabel = `The prompt from its first to its last token, darker where tokens are deeper; ${count(found.length, "token")} revived`;
}

// -- one token --------------------------------------------------------------------------------------

function describe(token) {
  const mark = [marks[token] & PROTECTED && "protected", marks[token] & QUERY && "of the question"].filter(Boolean);
  const facts = [`id ${data.ids[token]}`, `position ${token.toLocaleString("en")}`, `${depths[token]} of ${count(data.layers, "layer")}`, ...mark];
  const word = element("span", { className: "word", textContent: data.pieces[token] ? JSON.stringify(shown(data.pieces[token])) : "no text of its own" });
  $("token").replaceChildren(word, element("p", { textContent: facts.join(" · ") }), scoreTable(token));
}

/** Every choice that the token was part of, up to this step. */
function scoreTable(token) {
  const rows = cuts.filter((cut) => cut.ranks[token]).map((cut) => {
    const fate = cut.entered[token] ? "kept" : "left out";
    return scoreRow("prefill", cut.layer, cut.scores[token], cut.ranks[token], cut.candidates, fate);
  });
  for (let at = 1; at <= step; at++) {
    const found = data.steps[at].revivals.filter(([revived]) => revived === token);
    rows.push(...found.map(([, layer, score, rank, candidates]) => scoreRow(`step ${at}`, layer, score, rank, candidates, "revived")));
  }
  if (!rows.length) return element("p", { textContent: "Never scored: nothing was chosen here." });
  const heads = ["when", "layer", "score", "rank", ""].map((text, at) => element("th", { textContent: text, scope: "col", className: at > 0 && at < 4 ? "number" : "" }));
  return element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows));
}

function scoreRow(when, layer, score, rank, candidates, fate) {
  const better = candidates > 1 ? (candidates - rank) / (candidates - 1) : 1;
  const inner = element("i");
  inner.style.width = `${100 * better}%`;
  const bar = element("span", { className: `better ${fate === "left out" ? "left" : ""}`, title: `scores higher than ${share(better)} of ${candidates.toLocaleString("en")} candidates` }, inner);
  const cells = [layer, Number(score.toPrecision(3)), rank.toLocaleString("en")].map((text) => element("td", { textContent: text, className: "number" }));
  return element("tr", {}, element("td", { textContent: when }), ...cells, element("td", {}, fate, bar));
}

function pick(token, scroll) {
  if (token < 0 || token >= tokens) return;
  if (active >= 0) {
    spans[active].classList.remove("active");
    spans[active].removeAttribute("aria-selected");
  }
  active = token;
  spans[token].classList.add("active");
  spans[token].ariaSelected = "true";
  $("text").setAttribute("aria-activedescendant", spans[token].id);
  describe(token);
  if (scroll) spans[token].scrollIntoView({ block: "center" });
}

/** The token above (-1) or below (1) the active one. */
function beside(direction) {
  const { offsetTop, offsetLeft } = spans[active];
  let best = active;
  for (let token = active + direction; token >= 0 && token < tokens; token += direction) {
    const line = (spans[token].offsetTop - offsetTop) * direction;
    if (line <= 0) continue;
    if (best !== active && spans[token].offsetTop !== spans[best].offsetTop) break;
    if (best === active || Math.abs(spans[token].offsetLeft - offsetLeft) < Math.abs(spans[best].offsetLeft - offsetLeft)) best = token;
  }
  return best;
}

// -- what a reader does -----------------------------------------------------------------------------

const MOVES = {
  ArrowRight: () => active + 1,
  ArrowLeft: () => Math.max(0, active - 1),
  ArrowDown: () => (active < 0 ? 0 : beside(1)),
  ArrowUp: () => (active < 0 ? 0 : beside(-1)),
  Home: () => 0,
  End: () => tokens - 1,
};

$("text").addEventListener("keydown", (event) => {
  const move = MOVES[event.key];
  if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  pick(move(), false);
  spans[active].scrollIntoView({ block: "nearest" });
});
// a text that scrolls under a pointer at rest is not pointed at
let pointer = [];
$("text").addEventListener("mouseover", (event) => {
  if (event.clientX !== pointer[0] || event.clientY !== pointer[1]) pick(tokenOf(event.target), false);
});
document.addEventListener("mousemove", (event) => (pointer = [event.clientX, event.clientY]));
$("text").addEventListener("click", (event) => pick(tokenOf(event.target), false));
$("overview").addEventListener("click", (event) => pick(Math.floor((event.offsetX / event.target.clientWidth) * tokens), true));
$("step").max = data.steps.length - 1;
$("step").addEventListener("input", () => go(Number($("step").value)));
$("back").addEventListener("click", () => go(step - 1));
$("forth").addEventListener("click", () => go(step + 1));
document.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.target !== document.body || !by) return;
  go(Math.max(0, Math.min(data.steps.length - 1, step + by)));
});
document.addEventListener("theme", () => draw(data.steps[step].revived));
addEventListener("resize", () => draw(data.steps[step].revived));
show();
