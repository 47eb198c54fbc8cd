/** What goes wrong, in words under the conversation, and the time that the server wants to be left alone. */

import { $, shown } from "./dom.js";

const TICK_MS = 100;
let clock = 0;

/** Whether the server wants to be left alone. */
export function mustWait() {
  return clock !== 0;
}

/** Says what went wrong, and counts down to when the server may be asked again; null takes it back. */
export function tell(error) {
  stopClock();
  say(error?.message ?? "");
  if (error?.status === 401) askForKey();
  if (error?.wait) countDown(error.wait);
}

function say(text) {
  $("problem").classList.toggle("told", text !== "");
  $("problem-text").textContent = shown(text);
}

function askForKey() {
  $("settings").open = true;
  $("key").focus();
}

/** Counts in a text of its own, which is not read out every second. */
function countDown(wait) {
  const end = performance.now() + 1000 * wait;
  const tick = () => {
    const left = Math.ceil((end - performance.now()) / 1000);
    $("countdown").textContent = `It may be asked again in ${left} s.`;
    if (left > 0) return;
    stopClock();
    say("The server may be asked again.");
  };
  clock = setInterval(tick, TICK_MS);
  $("send").ariaDisabled = "true";
  tick();
}

function stopClock() {
  clearInterval(clock);
  clock = 0;
  $("countdown").textContent = "";
  $("send").ariaDisabled = "false";
}
