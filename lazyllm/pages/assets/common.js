"use strict";

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);

/** Bytes that were written as base64. */
function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/** Numbers that were written as base64 of little-endian values. */
function numbers(text, Kind) {
  return new Kind(bytes(text).buffer);
}

const STRANGE = /(?![\t\n\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;

/** A text in which characters that cannot be seen, or that turn the direction of others, have their number. */
function shown(text) {
  return text.replace(STRANGE, (letter) => `⟨U+${letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

function size(bytes) {
  const unit = bytes >= 1e9 ? [1e9, "GB"] : bytes >= 1e6 ? [1e6, "MB"] : [1e3, "kB"];
  return `${(bytes / unit[0]).toFixed(1)} ${unit[1]}`;
}

function share(part) {
  return `${(100 * part).toFixed(part > 0 && part < 0.1 ? 1 : 0)} %`;
}

const THEMES = [["", "system"], ["light", "light"], ["dark", "dark"]];
let theme = 0;
$("theme").addEventListener("click", () => {
  theme = (theme + 1) % THEMES.length;
  const [value, name] = THEMES[theme];
  document.documentElement.dataset.theme = value;
  $("theme").querySelector("span").textContent = name;
  $("theme").ariaLabel = `colours: ${name === "system" ? "as the system has them" : name}`;
  document.dispatchEvent(new Event("theme"));
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new Event("theme")));
