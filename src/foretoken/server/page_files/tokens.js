// Text on the page, token by token: who found each is a colour, an underline and a title.

const NUM_COLOURS = 6;
const NUM_LINES = 5;
const sources = new Map(); // source -> {index, description, recalls}: one look, everywhere

/** Fix the drafters' looks before the first token, and remember what they are. */
export function introduce(drafters) {
  sources.clear();
  for (const { name, source, recalls } of drafters) {
    Object.assign(lookOf(name), { description: source, recalls });
  }
}

function lookOf(source) {
  if (!sources.has(source)) sources.set(source, { index: sources.size, description: "", recalls: false });
  return sources.get(source);
}

function dress(element, source) {
  if (source === "") return;
  const { index } = lookOf(source);
  element.classList.add(
    "drafted", `colour-${index % NUM_COLOURS}`, `line-${index % NUM_LINES}`,
  );
}

/** The drafters among those that found tokens that may know a text from an earlier request. */
export function recallers(found) {
  const names = [...found].flatMap((source) => source.split("+"));
  return [...new Set(names)].filter((name) => sources.get(name)?.recalls);
}

/** A source in words; several drafters that agreed are joined by "+". */
export function finder(source) {
  return source === "" ? "the target itself" : source.split("+").join(" and ");
}

/**
 * Share a chunk's text among its tokens.
 * The API's text is what counts: tokens whose own text does not fit (part of a character, held
 * back for a stop text) give theirs to the next one, the last takes what is left.
 */
export function share(text, tokens) {
  let start = 0;
  return tokens.map((token, place) => {
    const isLast = place === tokens.length - 1;
    const fits = text.startsWith(token.text, start);
    const end = isLast ? text.length : start + (fits ? token.text.length : 0);
    const part = text.slice(start, end);
    start = end;
    return { ...token, part };
  });
}

/** A text that grows by chunks. Everything is put in as text, never as markup. */
export class TokenText {
  constructor(element) {
    this.element = element;
    this.clear("");
  }

  clear(prompt) {
    this.tokens = [];
    this.step = 1;
    this.counts = new Map();
    this.element.replaceChildren();
    if (prompt) this.element.append(span("prompt", prompt));
  }

  add({ text, tokens }) {
    if (tokens.length === 0 && text) this.element.append(span("rest", text));
    for (const { id, source, part } of share(text, tokens)) {
      const element = span("token", part);
      element.title = `${finder(source)}, step ${this.step}`;
      element.dataset.place = this.tokens.length;
      dress(element, source);
      this.element.append(element);
      this.tokens.push({ id, source, step: this.step, element });
      this.counts.set(source, (this.counts.get(source) ?? 0) + 1);
      if (source === "") this.step += 1; // the target's own token is the last of its step
    }
  }

  get numTokens() {
    return this.tokens.length;
  }

  /** Both in words. */
  get counted() {
    const tokens = this.numTokens === 1 ? "token" : "tokens";
    return `${this.numTokens} ${tokens} in ${this.numSteps} ${this.numSteps === 1 ? "pass" : "passes"}`;
  }

  /** Passes of the target so far; one without a token of its own was cut short at the end. */
  get numSteps() {
    const last = this.tokens.at(-1);
    return last ? last.step : 0;
  }
}

/** Say who found a token when it is pointed at, or reached with the arrow keys. */
export function explain(tokenText, note) {
  let current = null;
  const show = (place) => {
    const token = tokenText.tokens[place];
    if (!token) return;
    current?.classList.remove("current");
    current = token.element;
    current.classList.add("current");
    const text = JSON.stringify(current.textContent);
    note.textContent =
      `Token ${place + 1}, ${text} (id ${token.id}): found by ${finder(token.source)} ` +
      `in step ${token.step}.`;
  };
  const { element } = tokenText;
  element.addEventListener("pointerover", (event) => {
    if (event.target.dataset.place !== undefined) show(Number(event.target.dataset.place));
  });
  element.addEventListener("keydown", (event) => {
    const last = tokenText.numTokens - 1;
    const place = current?.isConnected ? Number(current.dataset.place) : -1;
    const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: last }[event.key];
    if (next === undefined || last < 0) return;
    event.preventDefault();
    show(Math.min(Math.max(next, 0), last));
  });
}

/** List who found how many tokens, each in its look. */
export function showLegend(list, counts) {
  const items = [...counts].sort(([, a], [, b]) => b - a).map(([source, count]) => {
    const sample = span("sample", finder(source));
    dress(sample, source);
    const item = document.createElement("li");
    item.title = sources.get(source)?.description ?? "";
    item.append(sample, ` ${count} ${count === 1 ? "token" : "tokens"}`);
    return item;
  });
  list.replaceChildren(...items);
}

function span(className, text) {
  const element = document.createElement("span");
  element.className = className;
  element.textContent = text;
  return element;
}
