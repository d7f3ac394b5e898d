// Numbers: of one request while it runs and when it has ended, and of the server.

import { getJson } from "./api.js";

const POLL_MS = 500;
const NOTHING_DRAFTED =
  "Nothing was drafted: the planner expected no gain, or no drafter had a guess.";

/** A number as people read it; nothing known is a dash. */
export function fixed(value, digits = 2) {
  return Number.isFinite(value) ? value.toFixed(digits) : "–";
}

export function percent(share) {
  return Number.isFinite(share) ? `${Math.round(100 * share)} %` : "–";
}

/** Fill a definition list from [[name, value], ...]. */
export function showNumbers(list, rows) {
  const parts = rows.flatMap(([name, value]) => [part("dt", name), part("dd", value)]);
  list.replaceChildren(...parts);
}

/** What is known of a request while its text arrives. */
export function runningRows({ numTokens, numSteps, firstMs, lastMs }) {
  return [
    ["Tokens", numTokens],
    ["Passes of the target", numSteps],
    ["Tokens per step", fixed(numTokens / numSteps)],
    ["Tokens/s here", fixed((1000 * numTokens) / lastMs, 0)],
    ["First token after", `${fixed(firstMs, 1)} ms`],
    ["Last token after", `${fixed(lastMs, 1)} ms`],
  ];
}

/** What the server says of a request that has ended. */
export function finishedRows(foretoken) {
  const stats = foretoken.stats[0];
  return [
    ["Draft tokens scored", stats.num_draft_tokens],
    ["of these accepted", `${stats.num_accepted} (${percent(stats.num_accepted / stats.num_draft_tokens)})`],
    ["Prefill on the server", `${fixed(1000 * stats.prefill_s, 1)} ms`],
    ["Decoding on the server", `${fixed(1000 * stats.decode_s, 1)} ms`],
    ["Tokens/s on the server", fixed(stats.tokens_per_s, 0)],
    ["Exactness", foretoken.exactness],
  ];
}

/** A sentence on a request that was to be speculative and was not; empty if it was. */
export function whyPlain(request, foretoken) {
  const wanted = request.body.speculation.enabled;
  return wanted && foretoken?.stats[0].num_draft_tokens === 0 ? NOTHING_DRAFTED : "";
}

/** Shows GET /stats, again and again while something runs. */
export class ServerNumbers {
  constructor(list, bars) {
    this.list = list;
    this.bars = bars;
    this.timer = null;
  }

  start() {
    this.stop();
    this.timer = setInterval(() => this.show(), POLL_MS);
  }

  /** Stop asking; the last answer stays. */
  stop() {
    clearInterval(this.timer);
    this.timer = null;
  }

  async show() {
    let stats;
    try {
      stats = await getJson("stats");
    } catch (error) {
      this.stop(); // what is wrong is said by the request itself
      showNumbers(this.list, [["No numbers", error.message]]);
      return;
    }
    showNumbers(this.list, [
      ["Speed-up over plain decoding", fixed(stats.speedup)],
      ["Tokens per step", fixed(stats.tokens_per_step)],
      ["Tokens/s, all requests", fixed(stats.tokens_per_s, 0)],
      ["Time spent drafting", percent(stats.drafter_share)],
      ["Rows scored in vain", percent(stats.wasted_row_share)],
      ["KV cache in use", percent(stats.kv_used_share)],
      ["Requests running, waiting", `${stats.num_running}, ${stats.num_waiting}`],
    ]);
    this.showDepths(stats.acceptance_by_depth ?? []);
  }

  showDepths(shares) {
    const words = shares.map((share, place) => `depth ${place + 1}: ${percent(share)}`).join(", ");
    this.bars.setAttribute("aria-label", words || "no draft tokens yet");
    this.bars.replaceChildren(...shares.map(depthBar));
    if (!words) this.bars.append(part("span", "No draft tokens yet."));
  }
}

function depthBar(share, place) {
  const bar = part("div", "");
  bar.className = "bar";
  bar.style.height = `${60 * (share || 0)}%`;
  const column = part("div", "");
  column.className = "depth";
  column.title = `${percent(share)} of the draft tokens at depth ${place + 1} were accepted`;
  column.append(part("span", percent(share)), bar, part("span", place + 1));
  return column;
}

function part(tag, content) {
  const element = document.createElement(tag);
  element.textContent = content;
  return element;
}
