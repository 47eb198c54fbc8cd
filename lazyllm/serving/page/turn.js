/** A question and its answer, as they stand in the conversation. */

import { $, count, element, flush, inFrame, seconds, share, shown } from "./dom.js";

const TICK_MS = 100;
const NEAR_PIXELS = 40;
const MOST_SPOKEN = 600;

export class Turn {
  answer = "";
  isComplete = false; // whether the answer came to its end
  #waiting = ""; // what is written in the next frame
  #notes = [];
  #ttft = 0;
  #clock = 0;

  /** @param isAlone whether it is no part of the conversation. */
  constructor(question, isAlone) {
    Object.assign(this, { question, isAlone });
    this.reply = element("p", { className: "answer", ariaBusy: "true" });
    this.facts = element("p", { className: "facts quiet" });
    this.node = element("li", {}, element("h3", { className: "question", textContent: shown(question) }), this.reply, this.facts);
    $("turns").append(this.node);
    this.#scrollToEnd();
  }

  /** Says what is done before there is an answer. */
  say(text) {
    this.facts.textContent = text;
    $("status").textContent = text;
  }

  /** Counts the seconds to the first token. */
  wait() {
    const start = performance.now();
    const tick = () => {
      this.#ttft = (performance.now() - start) / 1000;
      $("figure-ttft").textContent = seconds(this.#ttft);
    };
    clearInterval(this.#clock);
    this.#clock = setInterval(tick, TICK_MS);
    tick();
  }

  goOn(text) {
    if (!this.answer) {
      clearInterval(this.#clock);
      this.facts.textContent = "answering…";
    }
    this.answer += text;
    this.#waiting += text;
    inFrame(this.#write);
  }

  /** Writes what has come since the last frame; the end stays in view if it was. */
  #write = () => {
    const isSeen = this.facts.getBoundingClientRect().bottom < $("ask").getBoundingClientRect().top + NEAR_PIXELS;
    this.reply.append(shown(this.#waiting));
    this.#waiting = "";
    if (isSeen) this.#scrollToEnd();
  };

  /** Brings the end of the answer above the field for questions, which covers what is behind it. */
  #scrollToEnd() {
    this.facts.style.scrollMarginBottom = `${$("ask").offsetHeight}px`;
    this.facts.scrollIntoView({ block: "nearest" });
  }

  /** Notes how the answer ended, where that is not as it should. */
  note(text) {
    this.#notes.push(text);
  }

  /** Notes what the server says the answer has cost. */
  account({ completion_tokens: tokens, lazyllm }) {
    if (!lazyllm) return;
    const { computed_fraction, queued_seconds, revived_tokens, ttft_seconds, seconds: whole } = lazyllm;
    const queued = queued_seconds > 0.1 ? `, ${seconds(queued_seconds)} of it in the queue` : "";
    this.#ttft = ttft_seconds;
    this.#notes.unshift(
      `first token after ${seconds(ttft_seconds)}${queued}`,
      `${share(computed_fraction)} computed in the prefill`,
      `${revived_tokens.toLocaleString("en")} revived`,
      `${count(tokens, "token")} in ${seconds(whole)}`,
    );
  }

  /** Nothing more comes; the answer is read out, once. */
  end() {
    clearInterval(this.#clock);
    flush();
    if (!this.node.isConnected) return; // its conversation was left meanwhile
    this.reply.ariaBusy = "false";
    this.facts.textContent = [...this.#notes, ...(this.isComplete ? [] : ["not complete"])].join(" · ");
    $("figure-ttft").textContent = this.answer ? seconds(this.#ttft) : "–";
    const spoken = this.answer.length > MOST_SPOKEN ? `${this.answer.slice(0, MOST_SPOKEN)}…` : this.answer;
    $("status").textContent = spoken ? `Answer: ${shown(spoken)}` : "";
  }
}
