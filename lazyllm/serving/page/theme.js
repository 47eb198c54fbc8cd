/** The button that chooses between the colours of the system, light ones and dark ones. */

import { $ } from "./dom.js";

const THEMES = [["", "system"], ["light", "light"], ["dark", "dark"]];
const changed = () => document.dispatchEvent(new Event("theme"));
let theme = 0;

$("theme").addEventListener("click", () => {
  theme = (theme + 1) % THEMES.length;
  const [value, name] = THEMES[theme];
  document.documentElement.dataset.theme = value;
  $("theme").querySelector("span").textContent = name;
  $("theme").ariaLabel = `colours: ${name === "system" ? "as the system has them" : name}`;
  changed();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
