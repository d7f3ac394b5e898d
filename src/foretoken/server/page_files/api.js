// The server's API: requests with the key, streams with arrival times, failures as sentences.

let key = ""; // in this module alone, never stored

/** Something went wrong, said in a sentence for the reader of the page. */
export class Failure extends Error {
  constructor(sentence, { needsKey = false } = {}) {
    super(sentence);
    this.needsKey = needsKey;
  }
}

/** Use a key from now on; one that no header can carry is refused. */
export function useKey(text) {
  if (!/^[\x21-\x7e]+$/.test(text)) {
    throw new Failure("An API key is made of letters, digits and signs without spaces.", {
      needsKey: true,
    });
  }
  key = text;
}

export async function getJson(path) {
  return (await call(path)).json();
}

/**
 * Run a completion and yield what arrives:
 * {atMs, text, tokens: [{id, text, source}], foretoken, usage, finishReason}, of which only atMs
 * (milliseconds since the request was sent) and text are always there.
 */
export async function* complete({ path, body }, signal) {
  const sentAt = performance.now();
  const response = await call(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const { data, at } of serverEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = parse(data);
    if (chunk.error) throw new Failure(`The server broke off: ${chunk.error.message}`);
    const choice = chunk.choices?.[0] ?? {};
    yield {
      atMs: at - sentAt,
      text: choice.text ?? choice.delta?.content ?? "",
      tokens: choice.foretoken?.tokens ?? [],
      finishReason: choice.finish_reason,
      foretoken: chunk.foretoken,
      usage: chunk.usage,
    };
  }
  throw new Failure("The connection was lost before the text was complete. Try again.");
}

/** Whether an error is only that the user pressed Stop. */
export function isStop(error) {
  return error.name === "AbortError";
}

async function call(path, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (isStop(error)) throw error;
    throw new Failure("The server cannot be reached: the connection failed. Does it still run?");
  }
  if (!response.ok) throw await failureOf(response);
  return response;
}

async function failureOf(response) {
  const { status } = response;
  let message = response.statusText || "it did not say why";
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not the API's own error, perhaps one of a proxy: the status says what there is to say.
  }
  if (status === 401) {
    return new Failure("This server wants an API key, or another one than was given.", {
      needsKey: true,
    });
  }
  if (status === 429) {
    const seconds = response.headers.get("Retry-After");
    const when = seconds ? `Try again in ${seconds} s.` : "Try again in a while.";
    return new Failure(`The server is busy (429): ${message}. ${when}`);
  }
  const what = status < 500 ? "The server refused the request" : "The server failed";
  return new Failure(`${what} (${status}): ${message}`);
}

/** Yield {data, at} of each server-sent event; `at` is when its last byte was read. */
async function* serverEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await read(reader);
      if (done) return;
      const at = performance.now();
      const events = (pending + value).split(/\r?\n\r?\n/);
      pending = events.pop();
      for (const event of events) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield { data: lines.map((line) => line.slice(5).trim()).join("\n"), at };
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // there may be nothing left to cancel
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (isStop(error)) throw error;
    throw new Failure("The connection was lost before the text was complete. Try again.");
  }
}

function parse(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Failure("The server sent something that is not JSON; is a proxy in between?");
  }
}
