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

/** The policy that a model's id names behind the model; undefined for the default one, whose id is the model's name. */
function policyOf(id) {
  return id.slice(models[0].length + 1) || undefined;
}

async function readModels(signal) {
  const chosen = $("policy").value;
  models = await api.models(options(signal));
  const choices = models.map((id) => element("option", { value: id, textContent: shown(policyOf(id) ?? "default") }));
  $("policy").replaceChildren(...choices);
  if (models.includes(chosen)) $("policy").value = chosen;
  $("model").textContent = shown(models[0]);
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
    loaded = { recipe: made, ...(await api.load({ texts, policy: policyOf($("policy").value) }, options(signal))) };
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
  documents.collect();
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
  const attempt = async () => {
    turn.facts.textContent = "loading the documents…";
    const document = await load(signal);
    await answer(turn, { messages: [{ role: "user", content: turn.question }], lazyllm: { document } }, signal);
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
  turn.facts.textContent = "reading the prompt…";
  turn.clock = waitFor(turn);
  for await (const event of api.chat(body, options(signal))) take(turn, event);
  turn.isComplete = true;
}

/** Takes over what an event says. */
function take(turn, { choices = [], usage, lazyllm = {} }) {
  if (lazyllm.prompt) beginReading(lazyllm.prompt);
  if (lazyllm.depths) reading.take(lazyllm.depths);
  for (const { delta, finish_reason: reason } of choices) {
    if (delta?.content) goOn(turn, delta.content);
    if (reason === "length") turn.notes.push("cut off at the most tokens");
  }
  if (usage) account(turn, usage);
}

function beginReading(pieces) {
  reading.begin(pieces);
  $("figure-cached").textContent = $("figure-prefill").textContent = "–";
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
  const facts = element("p", { className: "facts quiet" });
  const node = element("li", {}, element("p", { className: "question", textContent: shown(question) }), reply, facts);
  const turn = { question, alone, node, reply, facts, answer: "", waiting: "", notes: [], ttft: 0, isComplete: false };
  turn.write = () => write(turn);
  turns.push(turn);
  reply.ariaBusy = "true";
  $("turns").append(node);
  node.scrollIntoView({ block: "nearest" });
  $("status").textContent = "The model reads the prompt.";
  return turn;
}

/** Counts the seconds to the first token, until it is stopped. */
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
  if (!turns.includes(turn)) return; // of a conversation that was left meanwhile
  if (!turn.answer && !turn.isComplete) return takeBack(turn);
  if (!turn.isComplete) turn.notes.push("not complete");
  turn.facts.textContent = turn.notes.join(" · ");
  $("figure-ttft").textContent = turn.answer ? seconds(turn.ttft) : "–";
  const spoken = turn.answer.length > MOST_SPOKEN ? `${turn.answer.slice(0, MOST_SPOKEN)}…` : turn.answer;
  $("status").textContent = `Answer: ${shown(spoken)}`;
}

function takeBack(turn) {
  turns = turns.filter((other) => other !== turn);
  turn.node.remove();
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
  documents.collect();
  if (!running && !countdown) run(load);
});
$("fresh").addEventListener("click", () => {
  running?.abort();
  turns = [];
  $("turns").replaceChildren();
  beginReading([]);
  $("figure-ttft").textContent = "–";
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
