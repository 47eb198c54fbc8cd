/** The texts that questions are about: pasted, dropped or chosen, in a list that can be shortened. */

import { $, count, element, shown } from "./dom.js";

const MOST_BYTES = 2 ** 25;
const documents = [];
let pasted = 0;

export function texts() {
  return documents.map(({ text }) => text);
}

/** Adds what stands in the field. */
export function collect() {
  const text = $("paste").value;
  if (!text.trim()) return;
  $("paste").value = "";
  const name = `Text ${++pasted}`;
  add(name, text);
  say(`${name} is added.`);
}

function add(name, text) {
  documents.push({ name, text: text.replace(/\r\n?/g, "\n").trim() });
  show();
}

function remove(entry) {
  const at = documents.indexOf(entry);
  documents.splice(at, 1);
  show();
  const next = $("documents").children[Math.min(at, documents.length - 1)];
  (next?.querySelector("button") ?? $("paste")).focus();
  say(`${shown(entry.name)} is removed.`);
}

function show() {
  $("documents").replaceChildren(...documents.map(line));
  $("document-count").textContent = documents.length ? `(${documents.length})` : "";
  document.dispatchEvent(new Event("documents"));
}

function line(entry) {
  const name = shown(entry.name);
  const button = element("button", { type: "button", textContent: "×", title: "remove", ariaLabel: `remove ${name}` });
  button.addEventListener("click", () => remove(entry));
  const length = element("span", { className: "quiet", textContent: count(entry.text.length, "character") });
  return element("li", {}, element("span", { className: "name", textContent: name }), length, button);
}

function say(text) {
  $("document-status").textContent = text;
}

// -- files ------------------------------------------------------------------------------------------

/** Adds files in their order; says which ones are no texts. */
async function addFiles(files) {
  const faults = [];
  for (const file of files) {
    try {
      add(file.name, await textOf(file));
    } catch (error) {
      faults.push(`${shown(file.name)} ${error.message}`);
    }
  }
  const added = files.length - faults.length;
  say([...(added ? [`${count(added, "document")} added.`] : []), ...faults].join(" "));
}

async function textOf(file) {
  if (file.size > MOST_BYTES) throw new Error(`is larger than ${MOST_BYTES / 2 ** 20} MiB.`);
  const bytes = await file.arrayBuffer().catch(() => {
    throw new Error("cannot be read.");
  });
  const text = decoded(bytes);
  if (text.includes("\0")) throw new Error("is not a text: it has a NUL byte.");
  if (!text.trim()) throw new Error("is empty.");
  return text;
}

function decoded(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new Error("is not a text in UTF-8.");
  }
}

// -- what a reader does -----------------------------------------------------------------------------

const bringsFiles = (event) => event.dataTransfer.types.includes("Files");

$("add").addEventListener("click", () => {
  collect();
  $("paste").focus();
});
$("paste").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) collect();
});
$("paste").addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  addFiles([...event.clipboardData.files]);
});
$("choose").addEventListener("click", () => $("files").click());
$("files").addEventListener("change", () => {
  addFiles([...$("files").files]);
  $("files").value = "";
});
document.addEventListener("dragover", (event) => {
  if (!bringsFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  if (!bringsFiles(event)) return;
  event.preventDefault();
  addFiles([...event.dataTransfer.files]);
});
