/** The server, as the page speaks with it. */

/** What went wrong with a request, in words for a reader; `wait` is how many seconds the server wants to be left alone. */
export class Problem extends Error {
  constructor(message, { status = 0, wait = 0 } = {}) {
    super(message);
    Object.assign(this, { status, wait });
  }
}

const OPENINGS = {
  401: "The server wants an API key that it knows",
  404: "The server does not have that",
  413: "That is more than the server reads",
  429: "The server has as much to do as it takes on",
  503: "The server takes nothing on",
  504: "That took the server too long",
};

/** The answer to a request; GET without a body, POST with one. */
async function send(path, { body, key, signal } = {}) {
  if (key && !/^[\x21-\x7e]+$/.test(key)) throw new Problem("An API key has letters, digits and signs of ASCII only.");
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" };
  const response = await fetch(path, options).catch((error) => {
    throw signal?.aborted ? error : new Problem("The server cannot be reached. Is it running, and is the network up?");
  });
  if (!response.ok) throw await problemOf(response);
  return response;
}

async function problemOf(response) {
  const { status, statusText } = response;
  const said = await response.json().then(({ error }) => String(error.message)).catch(() => statusText);
  const opening = OPENINGS[status] ?? (status < 500 ? "The server refuses that" : "The server failed");
  return new Problem(`${opening} (${status})${said ? `: ${said}` : "."}`, { status, wait: waitOf(response) });
}

/** Seconds that Retry-After asks for, as a number or a date; 0 without one. */
function waitOf(response) {
  const said = response.headers.get("Retry-After");
  if (!said) return 0;
  const wait = /^\d+$/.test(said) ? Number(said) : (Date.parse(said) - Date.now()) / 1000;
  return Math.max(0, Math.ceil(wait)) || 0;
}

/** The models, each with the policy that it stands for: the default one first, whose id is the model's own name. */
export async function models(options) {
  const response = await send("v1/models", options);
  const { data } = await response.json();
  return data.map(({ id, lazyllm }) => ({ id, policy: lazyllm?.policy ?? id.slice(data[0].id.length + 1) }));
}

/** Loads texts as one document: its id, and what it took. */
export async function load(body, options) {
  const response = await send("v1/documents", { ...options, body });
  return response.json();
}

/** What a chat request streams, event by event. */
export async function* chat(body, options) {
  const response = await send("v1/chat/completions", { ...options, body });
  const lost = () => new Problem("The connection was lost before the answer was complete.");
  for await (const data of dataOf(response.body, options.signal, lost)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Problem(`The server gave up: ${event.error.message}`);
    yield event;
  }
  throw lost();
}

/** The data of server-sent events. */
async function* dataOf(body, signal, lost) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let lines = [];
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw signal?.aborted ? error : lost();
      });
      if (done) return;
      const found = (rest + value).split(/\r\n|\r|\n/);
      rest = found.pop();
      for (const line of found) {
        if (line.startsWith("data:")) lines.push(line.slice(5).replace(/^ /, ""));
        if (line || !lines.length) continue;
        yield lines.join("\n");
        lines = [];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
