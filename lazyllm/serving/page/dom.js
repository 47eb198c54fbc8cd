/** What every part of the page needs: elements, texts and numbers as they are shown, and work that waits for a frame. */

export const $ = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const STRANGE = /(?![\t\n\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;

/** A text in which characters that cannot be seen, or that turn the direction of others, have their number. */
export function shown(text) {
  return text.replace(STRANGE, (letter) => `⟨U+${letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

export function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

export function size(bytes) {
  const [unit, name] = bytes >= 1e9 ? [1e9, "GB"] : bytes >= 1e6 ? [1e6, "MB"] : [1e3, "kB"];
  return `${(bytes / unit).toFixed(1)} ${name}`;
}

export function share(part) {
  return `${(100 * part).toFixed(part > 0 && part < 0.1 ? 1 : 0)} %`;
}

export function seconds(number) {
  return `${number.toFixed(number < 1 ? 2 : 1)} s`;
}

const tasks = new Set();
let frame = 0;

/** Runs a task before the next frame is painted: once, however often it was asked for. */
export function inFrame(task) {
  tasks.add(task);
  frame ||= requestAnimationFrame(flush);
}

/** Runs at once what waits for the next frame. */
export function flush() {
  cancelAnimationFrame(frame);
  frame = 0;
  const due = [...tasks];
  tasks.clear();
  due.forEach((task) => task());
}
