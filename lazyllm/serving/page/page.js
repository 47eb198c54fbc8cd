/** Questions and answers: what is sent, and what is done with what streams back. */

import "./theme.js";
import * as api from "./api.js";
import * as documents from "./documents.js";
import * as problems from "./problems.js";
import * as reading from "./reading.js";
import { $, count, element, seconds, share, shown, size } from "./dom.js";
import { Turn } from "./turn.js";

const KEY = "lazyllm.key";
const isNarrow = matchMedia("(max-width: 63.99rem)"); // as in the style sheet
let turns = [];
let models = [];
let loaded = null; // the document that the server holds, and what it was made of
let running = null; // stops the request that is under way

// -- settings ---------------------------------------------------------------------------------------

const options = (signal) => ({ key: $("key").value.trim(), signal });

/** The number in a field; undefined where there is none. */
function number(field) {
  const { valueAsNumber } = $(field);
  return Number.isNaN(valueAsNumber) ? undefined : valueAsNumber;
}

async function readModels(signal) {
  const chosen = $("policy").value;
  models = await api.models(options(signal));
  const name = ({ policy }) => shown(policy || "default");
  $("policy").replaceChildren(...models.map((model) => element("option", { value: model.id, textContent: name(model) })));
  if (models.some(({ id }) => id === chosen)) $("policy").value = chosen;
  $("model").textContent = shown(models[0].id);
}

/** Asks the server what it has, and says so where it does not tell. */
function greet() {
  readModels().then(() => problems.tell(null), problems.tell);
}

// -- documents that are loaded first ------------------------------------------------------------------

/** What a loaded document is made of. */
const recipe = () => JSON.stringify([$("policy").value, documents.texts()]);

function showLoaded() {
  const isLoaded = loaded?.recipe === recipe();
  $("loading").hidden = !documents.texts().length;
  $("load").hidden = !$("first").checked || isLoaded;
  $("load-status").textContent = !$("first").checked ? "" : isLoaded ? waiting(loaded) : "not loaded yet";
}

function waiting({ tokens, depth, layers, seconds: took, bytes }) {
  return `${count(tokens, "token")} wait behind ${depth} of ${count(layers, "layer")}: ${seconds(took)}, ${size(bytes)}`;
}

/** Id of the documents on the server; they are loaded if they are not. */
async function load(signal) {
  const made = recipe();
  if (loaded?.recipe !== made) {
    $("load-status").textContent = "loading…";
    const { policy } = models[$("policy").selectedIndex];
    const body = { texts: documents.texts(), policy: policy || undefined };
    loaded = { recipe: made, ...(await api.load(body, options(signal))) };
  }
  showLoaded();
  return loaded.id;
}

// -- asking -----------------------------------------------------------------------------------------

/** Does what may be stopped; says what fails. */
async function run(work) {
  problems.tell(null);
  running = new AbortController();
  $("send").textContent = "Stop";
  try {
    if (!models.length) await readModels(running.signal);
    await work(running.signal);
  } catch (error) {
    if (!running.signal.aborted) problems.tell(error);
  } finally {
    running = null;
    $("send").textContent = "Ask";
    showLoaded();
  }
}

async function ask() {
  const question = $("question").value.trim();
  if (!question || running || problems.mustWait()) return;
  $("question").value = "";
  documents.collect();
  const isAlone = $("first").checked && documents.texts().length > 0;
  if (isNarrow.matches) $("texts").open = false;
  const turn = new Turn(question, isAlone);
  const messages = isAlone ? [{ role: "user", content: question }] : conversation(question);
  turns.push(turn);
  await run((signal) => (isAlone ? answerAlone(turn, messages, signal) : answer(turn, messages, { query: question }, signal)));
  turn.end();
  if (!turn.answer && !turn.isComplete && turns.includes(turn)) takeBack(turn);
}

/** What was said so far and the question; the documents stand before the first one. */
function conversation(question) {
  const said = turns.filter(({ isAlone }) => !isAlone).flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: turn.answer },
  ]);
  const [first, ...later] = [...said, { role: "user", content: question }];
  return [{ ...first, content: [...documents.texts(), first.content].join("\n\n") }, ...later];
}

/** Answers from the loaded documents; ones that the server has let go meanwhile are loaded again. */
async function answerAlone(turn, messages, signal) {
  const attempt = async () => {
    turn.say("loading the documents…");
    await answer(turn, messages, { document: await load(signal) }, signal);
  };
  const before = loaded;
  try {
    await attempt();
  } catch (error) {
    if (error.status !== 404 || !before || before !== loaded) throw error;
    loaded = null;
    await attempt();
  }
}

async function answer(turn, messages, extension, signal) {
  const body = {
    model: $("policy").value,
    messages,
    max_tokens: number("max-tokens"),
    temperature: number("temperature"),
    stream: true,
    stream_options: { include_usage: true },
    lazyllm: { ...extension, trace: true },
  };
  turn.say("reading the prompt…");
  turn.wait();
  for await (const event of api.chat(body, options(signal))) take(turn, event);
  turn.isComplete = true;
}

/** Takes over what an event says. */
function take(turn, { choices = [], usage, lazyllm = {} }) {
  if (lazyllm.prompt) beginReading(lazyllm.prompt);
  if (lazyllm.depths) reading.take(lazyllm.depths);
  for (const { delta, finish_reason: reason } of choices) {
    if (delta?.content) turn.goOn(delta.content);
    if (reason === "length") turn.note("cut off at max tokens");
  }
  if (!usage) return;
  turn.account(usage);
  showUsage(usage);
}

function beginReading(pieces) {
  reading.begin(pieces);
  $("figure-cached").textContent = $("figure-prefill").textContent = "–";
}

function showUsage({ prompt_tokens_details: details, lazyllm }) {
  $("figure-cached").textContent = (details?.cached_tokens ?? 0).toLocaleString("en");
  if (lazyllm) $("figure-prefill").textContent = share(lazyllm.computed_fraction);
}

/** A question without an answer may be asked again. */
function takeBack(turn) {
  turns = turns.filter((other) => other !== turn);
  turn.node.remove();
  $("question").value ||= turn.question;
}

function startAnew() {
  running?.abort();
  turns = [];
  $("turns").replaceChildren();
  beginReading([]);
  $("figure-ttft").textContent = "–";
  problems.tell(null);
  $("question").focus();
}

// -- what a reader does -----------------------------------------------------------------------------

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else ask();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("load").addEventListener("click", () => {
  documents.collect();
  if (!running && !problems.mustWait()) run(load);
});
$("fresh").addEventListener("click", startAnew);
$("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, $("key").value.trim());
  greet();
});
$("first").addEventListener("change", showLoaded);
$("policy").addEventListener("change", showLoaded);
document.addEventListener("documents", showLoaded);
$("key").value = sessionStorage.getItem(KEY) ?? "";
showLoaded();
greet();
