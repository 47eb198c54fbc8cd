/** Questions and answers: what is sent, what streams back, and what is said when that fails. */

import "./theme.js";
import * as api from "./api.js";
import * as documents from "./documents.js";
import * as reading from "./reading.js";
import { $, count, element, flush, inFrame, seconds, share, shown, size } from "./dom.js";

const KEY = "lazyllm.key";
const TICK_MS = 100;
const MOST_SPOKEN = 600;
let turns = [];
let models = [];
let loaded = null; // the document that the server holds, and what it was made of
let running = null; // stops the request that is under way
let countdown = 0;

// -- settings ---------------------------------------------------------------------------------------

const options = (signal) => ({ key: $("key").value.trim(), signal });

/** Name of the chosen policy; undefined for the default one. */
function policy() {
  const [standard] = models;
  return $("policy").value === standard ? undefined : $("policy").value.slice(standard.length + 1);
}

async function readModels(signal) {
  const chosen = $("policy").value;
  models = await api.models(options(signal));
  const [standard] = models;
  const name = (id) => (id === standard ? "default" : id.startsWith(`${standard}:`) ? id.slice(standard.length + 1) : id);
  $("policy").replaceChildren(...models.map((id) => element("option", { value: id, textContent: shown(name(id)) })));
  if (models.includes(chosen)) $("policy").value = chosen;
  $("model").textContent = shown(standard);
}

/** Reads the models where that is still to be done, and says why it cannot be. */
function greet() {
  readModels().then(() => problem(null), problem);
}

// -- problems ---------------------------------------------------------------------------------------

/** Says what went wrong, and counts down to when the server may be asked again; null takes it back. */
function problem(error) {
  clearInterval(countdown);
  countdown = 0;
  $("problem").hidden = !error;
  $("problem-text").textContent = error ? error.message : "";
  $("countdown").textContent = "";
  if (error?.status === 401) {
    document.querySelector("#ask .settings").open = true;
    $("key").focus();
  }
  if (error?.wait) countDown(error.wait);
  $("send").ariaDisabled = String(countdown > 0);
}

function countDown(wait) {
  const end = performance.now() + 1000 * wait;
  const tick = () => {
    const left = Math.ceil((end - performance.now()) / 1000);
    $("countdown").textContent = `It may be asked again in ${left} s.`;
    if (left <= 0) problem(new api.Problem("The server may be asked again."));
  };
  countdown = setInterval(tick, TICK_MS);
  tick();
}

// -- documents that are loaded first ------------------------------------------------------------------

/** What a loaded document is made of. */
const recipe = (texts) => JSON.stringify([$("policy").value, texts]);

function showLoaded() {
  const texts = documents.texts();
  const isLoaded = loaded?.recipe === recipe(texts);
  $("loading").hidden = !texts.length;
  $("load").hidden = !$("first").checked || isLoaded;
  const { tokens, depth, layers, seconds: took, bytes } = isLoaded ? loaded : {};
  const facts = isLoaded ? `${count(tokens, "token")} wait behind ${depth} of ${count(layers, "layer")}: ${seconds(took)}, ${size(bytes)}` : "";
  $("load-status").textContent = $("first").checked ? facts || "not loaded yet" : "";
}

/** Id of the documents on the server; they are loaded if they are not. */
async function load(signal) {
  const texts = documents.texts();
  const made = recipe(texts);
  if (loaded?.recipe !== made) {
    $("load-status").textContent = "loading…";
    loaded = { recipe: made, ...(await api.load({ texts, policy: policy() }, options(signal))) };
  }
  showLoaded();
  return loaded.id;
}

// -- asking -----------------------------------------------------------------------------------------

/** Does what may be stopped; says what fails. */
async function run(work) {
  problem(null);
  running = new AbortController();
  $("send").textContent = "Stop";
  try {
    if (!models.length) await readModels(running.signal);
    await work(running.signal);
  } catch (error) {
    if (!running.signal.aborted) problem(error);
  } finally {
    running = null;
    $("send").textContent = "Ask";
    showLoaded();
  }
}

async function ask() {
  const question = $("question").value.trim();
  if (!question || running || countdown) return;
  $("question").value = "";
  const texts = documents.texts();
  const alone = $("first").checked && texts.length > 0;
  const turn = newTurn(question, alone);
  await run((signal) => (alone ? answerAlone(turn, signal) : answer(turn, { messages: messages(texts) }, signal)));
  settle(turn);
}

/** The conversation so far: the documents stand before the first question. */
function messages(texts) {
  const said = turns.filter(({ alone }) => !alone).flatMap(({ question, answer }) => [
    { role: "user", content: question },
    { role: "assistant", content: answer },
  ]);
  said.pop(); // of the question that was just asked, the answer is still to come
  said[0].content = [...texts, said[0].content].join("\n\n");
  return said;
}

/** Answers from the loaded documents; ones that the server has let go meanwhile are loaded again. */
async function answerAlone(turn, signal) {
  const body = async () => ({ messages: [{ role: "user", content: turn.question }], lazyllm: { document: await load(signal) } });
  const wasLoaded = loaded;
  try {
    await answer(turn, await body(), signal);
  } catch (error) {
    if (error.status !== 404 || !wasLoaded || wasLoaded !== loaded) throw error;
    loaded = null;
    await answer(turn, await body(), signal);
  }
}

async function answer(turn, { messages, lazyllm }, signal) {
  const body = {
    model: $("policy").value,
    messages,
    max_tokens: $("max-tokens").valueAsNumber || undefined,
    temperature: $("temperature").valueAsNumber || 0,
    stream: true,
    stream_options: { include_usage: true },
    lazyllm: { trace: true, ...(lazyllm ?? { query: turn.question }) },
  };
  $("figure-cached").textContent = $("figure-prefill").textContent = "–";
  for await (const event of api.chat(body, options(signal))) take(turn, event);
}

/** Takes over what an event says. */
function take(turn, { choices = [], usage, lazyllm = {} }) {
  if (lazyllm.prompt) reading.begin(lazyllm.prompt);
  if (lazyllm.depths) reading.take(lazyllm.depths);
  for (const { delta, finish_reason: reason } of choices) {
    if (delta?.content) goOn(turn, delta.content);
    if (reason === "length") turn.notes.push("cut off at the most tokens");
  }
  if (usage) account(turn, usage);
}

function account(turn, { prompt_tokens, completion_tokens, prompt_tokens_details, lazyllm }) {
  $("figure-cached").textContent = `${(prompt_tokens_details?.cached_tokens ?? 0).toLocaleString("en")} of ${prompt_tokens.toLocaleString("en")}`;
  if (!lazyllm) return;
  const { computed_fraction, queued_seconds, ttft_seconds, seconds: whole, revived_tokens } = lazyllm;
  turn.ttft = ttft_seconds;
  $("figure-prefill").textContent = share(computed_fraction);
  turn.notes.unshift(
    `first token after ${seconds(ttft_seconds)}${queued_seconds > 0.1 ? `, ${seconds(queued_seconds)} of it in the queue` : ""}`,
    `${share(computed_fraction)} computed in the prefill`,
    `${revived_tokens.toLocaleString("en")} revived`,
    `${count(completion_tokens, "token")} in ${seconds(whole)}`,
  );
}

// -- turns ------------------------------------------------------------------------------------------

function newTurn(question, alone) {
  const reply = element("p", { className: "answer" });
  const facts = element("p", { className: "facts quiet", textContent: "reading the prompt…" });
  const node = element("li", {}, element("p", { className: "question", textContent: shown(question) }), reply, facts);
  const turn = { question, alone, node, reply, facts, answer: "", waiting: "", notes: [], ttft: 0 };
  turn.write = () => write(turn);
  turn.clock = waitFor(turn);
  turns.push(turn);
  reply.ariaBusy = "true";
  document.body.classList.remove("empty");
  reading.begin([]);
  $("turns").append(node);
  node.scrollIntoView({ block: "nearest" });
  $("status").textContent = "The model reads the prompt.";
  return turn;
}

/** Counts the seconds to the first token. */
function waitFor(turn) {
  const start = performance.now();
  const tick = () => {
    turn.ttft = (performance.now() - start) / 1000;
    $("figure-ttft").textContent = seconds(turn.ttft);
  };
  tick();
  return setInterval(tick, TICK_MS);
}

function goOn(turn, text) {
  if (!turn.answer) {
    clearInterval(turn.clock);
    turn.facts.textContent = "answering…";
  }
  turn.answer += text;
  turn.waiting += text;
  inFrame(turn.write);
}

/** Writes what has come since the last frame; the end stays in view if it was. */
function write(turn) {
  const { scrollHeight, scrollTop, clientHeight } = $("talk");
  const isAtEnd = scrollHeight - scrollTop - clientHeight < 40;
  turn.reply.append(shown(turn.waiting));
  turn.waiting = "";
  if (isAtEnd) $("talk").scrollTop = $("talk").scrollHeight;
}

/** Ends a turn. One without an answer is taken back, and its question may be asked again. */
function settle(turn) {
  clearInterval(turn.clock);
  flush();
  turn.reply.ariaBusy = "false";
  const isComplete = turn.notes.length > 0;
  if (!turn.answer && !isComplete) return takeBack(turn);
  if (!isComplete) turn.notes.push("the answer was cut short");
  turn.facts.textContent = turn.notes.join(" · ");
  $("figure-ttft").textContent = turn.answer ? seconds(turn.ttft) : "–";
  const spoken = turn.answer.length > MOST_SPOKEN ? `${turn.answer.slice(0, MOST_SPOKEN)}…` : turn.answer;
  $("status").textContent = `Answer: ${shown(spoken)}`;
}

function takeBack(turn) {
  turns = turns.filter((other) => other !== turn);
  turn.node.remove();
  document.body.classList.toggle("empty", !turns.length);
  $("figure-ttft").textContent = "–";
  $("question").value ||= turn.question;
  $("status").textContent = "";
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
  if (!running && !countdown) run(load);
});
$("fresh").addEventListener("click", () => {
  running?.abort();
  turns = [];
  $("turns").replaceChildren();
  document.body.classList.add("empty");
  reading.begin([]);
  problem(null);
  $("question").focus();
});
$("key").value = sessionStorage.getItem(KEY) ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, $("key").value.trim());
  greet();
});
$("first").addEventListener("change", showLoaded);
$("policy").addEventListener("change", showLoaded);
document.addEventListener("documents", showLoaded);
showLoaded();
greet();
