/** The tokens of one prompt: how many layers have computed each, and which ones were revived. */

import { shown } from "./dom.js";

export const FLASH_MS = 1400;
const DEEPEST_SHADE = 8;
const ENOUGH_TOKENS = 50;
const MOST_TOKENS = 1000;

export class PromptTrace {
  /** @param pieces what each token adds to the text; "" for one that adds nothing. */
  constructor(pieces) {
    this.texts = pieces.map(shown);
    this.depths = new Uint16Array(pieces.length);
    this.revivedAt = new Float64Array(pieces.length); // milliseconds, 0 = never
    this.atDepth = new Map([[0, pieces.length]]);
    this.layers = 0; // not known before the prefill is through
    this.revivals = 0;
    this.blocks = blocksOf(this.texts);
    this.blockOf = new Uint32Array(pieces.length);
    this.blocks.forEach(({ from, to }, block) => this.blockOf.fill(block, from, to));
  }

  get tokens() {
    return this.texts.length;
  }

  /** Layer-tokens that have been computed, of all. */
  get computed() {
    let sum = 0;
    this.atDepth.forEach((tokens, depth) => (sum += tokens * depth));
    return sum / Math.max(1, this.layers * this.tokens);
  }

  /** Takes depths over: of all tokens after the prefill, later of those that were revived. Returns the blocks they are in. */
  take({ layers, tokens, depths }, now) {
    const isPrefill = this.layers === 0;
    this.layers = layers;
    tokens.forEach((token, at) => {
      this.#setDepth(token, depths[at]);
      if (!isPrefill) this.revivedAt[token] = now;
    });
    if (!isPrefill) this.revivals += tokens.length;
    return new Set(tokens.map((token) => this.blockOf[token]));
  }

  #setDepth(token, depth) {
    const before = this.depths[token];
    this.atDepth.set(before, this.atDepth.get(before) - 1);
    this.atDepth.set(depth, (this.atDepth.get(depth) ?? 0) + 1);
    this.depths[token] = depth;
  }

  /** Milliseconds since a token was revived, as far as that is seen; -1 = it never was. */
  #age(token, now) {
    return this.revivedAt[token] ? Math.min(FLASH_MS, now - this.revivedAt[token]) : -1;
  }

  /** Neighbouring tokens of a block that look the same, as one. */
  *runs(block, now) {
    const { from, to } = this.blocks[block];
    let start = from;
    for (let token = from + 1; token <= to; token++) {
      const [depth, age] = [this.depths[start], this.#age(start, now)];
      if (token < to && this.depths[token] === depth && this.#age(token, now) === age) continue;
      yield { text: this.texts.slice(start, token).join(""), depth, age };
      start = token;
    }
  }

  /** Colour class of a depth: 0 for none, 8 for all layers. */
  shade(depth) {
    if (depth === 0 || depth >= this.layers) return depth && DEEPEST_SHADE;
    return Math.max(1, Math.min(DEEPEST_SHADE - 1, Math.round((DEEPEST_SHADE * depth) / this.layers)));
  }

  /** By shade that occurs, its least and greatest depth and how many tokens have it. */
  shades() {
    const found = new Map();
    [...this.atDepth].filter(([, tokens]) => tokens).sort(([a], [b]) => a - b).forEach(([depth, tokens]) => {
      const group = found.get(this.shade(depth)) ?? { from: depth, tokens: 0 };
      found.set(this.shade(depth), { ...group, to: depth, tokens: group.tokens + tokens });
    });
    return found;
  }
}

/**
 * Where a text may be cut into blocks that are laid out by themselves: behind a line. A very long line is cut before a
 * space, and one without spaces somewhere.
 */
function blocksOf(texts) {
  const starts = [0];
  let before = "";
  texts.forEach((text, token) => {
    const length = token - starts.at(-1);
    const isLine = length >= ENOUGH_TOKENS && before.endsWith("\n");
    const isTooLong = length >= MOST_TOKENS && (/^\s/.test(text) || length >= 2 * MOST_TOKENS);
    if (isLine || isTooLong) starts.push(token);
    before = text || before;
  });
  return starts.map((from, at) => ({ from, to: starts[at + 1] ?? texts.length }));
}
