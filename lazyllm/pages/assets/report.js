const PAGE = 20;
const KEPT_BLOCKS = 24;
const itemTasks = numbers(data.itemTasks, Uint16Array);
const itemNumbers = numbers(data.itemNumbers, Uint32Array);
const axes = Object.entries(data.axes);
let sorting = { at: -1, down: false };
let cell = Math.min(1, data.cells.length - 1);
let found = [];
let from = 0;

// -- packed blocks ------------------------------------------------------------------------------------

const blocks = new Map();

/** The content of a packed block; the latest ones are remembered. */
function block(name) {
  const known = blocks.get(name) ?? unpack($(name).textContent);
  blocks.delete(name);
  blocks.set(name, known);
  if (blocks.size > KEPT_BLOCKS) blocks.delete(blocks.keys().next().value);
  return known;
}

async function unpack(text) {
  const stream = new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

async function repliesTo(item) {
  return (await block(`replies-${Math.floor(item / data.chunk)}`))[item % data.chunk];
}

// -- the table of cells -------------------------------------------------------------------------------

const heads = [
  { name: "cell", number: false },
  ...axes.map(([name]) => ({ name, number: false })),
  { name: "task", number: false },
  { name: "n", number: true, meaning: "items" },
  ...data.columns.map((column, at) => ({ ...column, number: data.rows.some((row) => typeof row.values[at] !== "string" && row.values[at] !== null) })),
];
const rows = data.rows.map((row) => {
  const values = [row.cell, ...row.axes, row.task, row.items, ...row.values];
  return { ...row, sorts: values.map((value) => (Array.isArray(value) ? value[0] : value)), line: element("tr", {}, ...values.map(tableCell)) };
});

function tableCell(value, at) {
  const { number, digits = 0 } = heads[at];
  const made = element("td", { className: number ? "number" : "" });
  if (at === 0) {
    const link = element("button", { type: "button", className: "link", textContent: shown(value), title: "show its items" });
    link.addEventListener("click", () => choose(data.cells.indexOf(value)));
    made.append(link);
  } else if (Array.isArray(value)) {
    const [middle, low, high] = value.map((part) => (part === null ? null : part.toFixed(digits)));
    made.append(middle);
    if (low !== null && high !== null) made.append(element("span", { className: "interval", textContent: ` (${low} to ${high})` }));
  } else {
    made.append(value === null ? "–" : typeof value === "number" ? value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }) : shown(value));
  }
  return made;
}

heads.forEach(({ name, number, meaning }, at) => {
  const button = element("button", { type: "button", textContent: shown(name), title: meaning ?? "" });
  button.addEventListener("click", () => sort(at));
  $("cells").tHead.rows[0].append(element("th", { scope: "col", className: number ? "number" : "", ariaSort: "none" }, button));
});

/** Sorts by a column; a second call turns the order. What has no value stays at the end. */
function sort(at) {
  sorting = { at, down: sorting.at === at && !sorting.down };
  [...$("cells").tHead.rows[0].cells].forEach((head, index) => {
    head.ariaSort = index !== at ? "none" : sorting.down ? "descending" : "ascending";
  });
  const sign = sorting.down ? -1 : 1;
  rows.sort(({ sorts: a }, { sorts: b }) => {
    if (a[at] === null || b[at] === null) return (a[at] === null) - (b[at] === null);
    return sign * (typeof a[at] === "number" && typeof b[at] === "number" ? a[at] - b[at] : String(a[at]).localeCompare(String(b[at]), "en", { numeric: true }));
  });
  $("cells").tBodies[0].replaceChildren(...rows.map((row) => row.line));
}

function choice(name, values, onchange) {
  const options = values.map(([value, text]) => element("option", { value, textContent: shown(text) }));
  const select = element("select", { name }, ...options);
  select.addEventListener("change", onchange);
  return { select, label: element("label", {}, name, select) };
}

const wanted = [...axes, ["task", data.tasks]].map(([name, values]) =>
  choice(name, [["", "all"], ...values.map((value) => [value, value])], filterRows));
const matching = element("span", { className: "quiet", role: "status" });
$("filters").append(...wanted.map(({ label }) => label), matching);

function filterRows() {
  const values = wanted.map(({ select }) => select.value);
  let left = 0;
  rows.forEach((row) => {
    const own = [...row.axes, row.task];
    row.line.hidden = values.some((value, at) => value && value !== own[at]);
    left += !row.line.hidden;
  });
  matching.textContent = `${left.toLocaleString("en")} of ${count(rows.length, "row")}`;
}

function choose(to) {
  cellChoice.select.value = to;
  list();
  $("items-section").scrollIntoView({ block: "start" });
}

// -- the list of items --------------------------------------------------------------------------------

const OUTCOMES = {
  all: () => true,
  won: ([before], [after]) => before !== null && after !== null && after > before,
  lost: ([before], [after]) => before !== null && after !== null && after < before,
  "same score": ([before], [after]) => before !== null && before === after,
  "without a result": (_, [score, loss]) => score === null && loss === null,
};
const cellChoice = choice("cell", data.cells.map((name, at) => [at, name]), () => list());
const taskChoice = choice("task", [["", "all"], ...data.tasks.map((name, at) => [at, name])], () => list());
const outcomeChoice = choice("outcome", Object.keys(OUTCOMES).map((name) => [name, name]), () => list());
const orderChoice = choice("order", [["run", "as run"], ["worse", "loss rose most"], ["better", "loss fell most"]], () => list());
const search = element("input", { type: "search", placeholder: data.prompts ? "in prompts and replies" : "in replies" });
search.addEventListener("input", () => (clearTimeout(search.timer), (search.timer = setTimeout(list, 250))));
cellChoice.select.value = cell;
$("item-filters").append(
  cellChoice.label, taskChoice.label, outcomeChoice.label, orderChoice.label, element("label", {}, "search", search),
);

let latest = 0;

/** Finds the items that pass the filters, and shows the first page of them. */
async function list() {
  const asked = ++latest;
  cell = Number(cellChoice.select.value);
  rows.forEach((row) => row.line.classList.toggle("chosen", row.cell === data.cells[cell]));
  const [before, after] = await Promise.all([block("scores-0"), block(`scores-${cell}`)]);
  const passes = OUTCOMES[outcomeChoice.select.value];
  const task = taskChoice.select.value;
  const left = [...itemTasks.keys()].filter((item) => (!task || itemTasks[item] === Number(task)) && passes(before[item], after[item]));
  const sought = search.value.trim().toLowerCase();
  const matches = sought ? await containing(sought, left, () => asked === latest) : left;
  if (asked !== latest) return;
  const rise = (item) => (before[item][1] === null || after[item][1] === null ? null : after[item][1] - before[item][1]);
  const sign = { worse: -1, better: 1 }[orderChoice.select.value];
  if (sign) matches.sort((a, b) => (rise(a) === null) - (rise(b) === null) || sign * (rise(a) - rise(b)));
  [found, from] = [matches, 0];
  await turn();
}

/** Those of the items whose texts hold what is sought; gives up when something else is asked for. */
async function containing(sought, items, wanted) {
  const matches = [];
  for (const item of items) {
    if (!wanted()) break;
    if (item % data.chunk === 0) $("place").textContent = `searching, ${count(matches.length, "item")} so far`;
    const { reference, answers, replies } = await repliesTo(item);
    const prompt = data.prompts ? await promptOf(item) : "";
    const texts = [prompt, reference, ...answers, ...replies.filter(Boolean).map(([text]) => text)];
    if (texts.some((text) => text.toLowerCase().includes(sought))) matches.push(item);
  }
  return matches;
}

async function promptOf(item) {
  return (await block(`prompts-${Math.floor(item / data.chunk)}`))[item % data.chunk];
}

/** Shows the page of items that begins at `from`. */
async function turn() {
  const asked = latest;
  const page = found.slice(from, from + PAGE);
  const lines = await Promise.all(page.map(async (item) => line(item, await repliesTo(item))));
  if (asked !== latest) return;
  $("items").replaceChildren(...(lines.length ? lines : [element("li", { className: "none quiet", textContent: "No item passes." })]));
  const end = Math.min(from + PAGE, found.length);
  $("place").textContent = found.length ? `${(from + 1).toLocaleString("en")} to ${end.toLocaleString("en")} of ${count(found.length, "item")}` : "";
  $("previous").disabled = from === 0;
  $("next").disabled = end === found.length;
}

function line(item, { reference, answers, replies }) {
  const details = element("details", {}, element("summary", {},
    element("span", {}, `${shown(data.tasks[itemTasks[item]])} ${itemNumbers[item]}`),
    field("reference", reference),
    field(data.cells[0], said(replies[0]), ...measures(replies[0])),
    field(data.cells[cell], said(replies[cell]), ...measures(replies[cell], replies[0])),
  ));
  details.addEventListener("toggle", () => details.open && details.childElementCount === 1 && open(details, item, answers, replies));
  return element("li", {}, details);
}

function said(reply) {
  const [text, error] = reply ?? ["", "no result"];
  return error ? `error: ${error}` : text;
}

function field(name, text, ...measured) {
  return element("span", {}, element("span", { className: "key" }, shown(name), ...measured), shown(text));
}

/** Score and loss as text; a score that differs from the one it is compared with stands out. */
function measures(reply, compared) {
  const [score, loss] = reply?.slice(2) ?? [null, null];
  const parts = [];
  if (score !== null) {
    const verdict = verdictOn(reply, compared);
    parts.push(element("span", { className: verdict, textContent: ` · score ${Number(score.toFixed(3))}${verdict && `, ${verdict}`}` }));
  }
  if (loss !== null) parts.push(` · loss ${loss.toFixed(2)}`);
  return parts;
}

function verdictOn(reply, compared) {
  const [score, against] = [reply, compared].map((one) => one?.[2] ?? null);
  if (score === null || against === null) return "";
  return score > against ? "won" : score < against ? "lost" : "";
}

async function open(details, item, answers, replies) {
  const parts = element("div", { className: "opened" });
  details.append(parts);
  if (answers.length) parts.append(element("p", { className: "quiet", textContent: `right answers: ${answers.map(shown).join(" | ")}` }));
  if (data.prompts) parts.append(element("pre", { textContent: shown(await promptOf(item)), tabIndex: 0 }));
  const heads = element("tr", {}, ...["cell", "score", "loss", "reply"].map((text, at) => element("th", { scope: "col", textContent: text, className: at % 3 ? "number" : "" })));
  const lines = replies.map((reply, at) => reply && element("tr", {},
    element("td", { textContent: shown(data.cells[at]) }),
    element("td", { className: `number ${verdictOn(reply, replies[0])}`, textContent: reply[2] === null ? "–" : Number(reply[2].toFixed(3)) }),
    element("td", { className: "number", textContent: reply[3]?.toFixed(2) ?? "–" }),
    element("td", { className: "said", textContent: shown(said(reply)) }),
  ));
  parts.append(element("table", {}, element("thead", {}, heads), element("tbody", {}, ...lines.filter(Boolean))));
}

$("previous").addEventListener("click", () => ((from -= PAGE), turn()));
$("next").addEventListener("click", () => ((from += PAGE), turn()));
$("cells").tBodies[0].append(...rows.map((row) => row.line));
filterRows();
if (itemTasks.length) list();
else $("items-section").hidden = true;
