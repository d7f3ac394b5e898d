// The race: plain and speculative decoding of one prompt, measured in turn, shown side by side.

import { complete, getJson, isStop } from "./api.js";
import { apiRequest, isComplete, seed, shownPrompt } from "./form.js";
import { fixed, whyPlain } from "./numbers.js";
import { TokenText, recallers, showLegend } from "./tokens.js";

const $ = (id) => document.getElementById(id);
const SHOWN_MS = 6000; // how long a replay takes if the user does not say
const WARM_UP_TOKENS = 4; // few: drafters that keep past outputs learn from them

export class Race {
  constructor(report) {
    this.report = report;
    this.lanes = { plain: new Lane($("lane-plain")), speculative: new Lane($("lane-speculative")) };
    this.aborter = null;
    this.restart();
    $("start").addEventListener("click", () => this.run({ anew: true }));
    $("repeat").addEventListener("click", () => this.run({ anew: false }));
    $("replay").addEventListener("click", () => this.showAgain());
    $("race-stop").addEventListener("click", () => this.aborter?.abort());
    // Rounds of another request would not be rounds of one measurement.
    for (const type of ["input", "change"]) {
      $("request").addEventListener(type, () => {
        this.isStale = true;
        $("repeat").disabled = true;
      });
    }
  }

  restart() {
    this.rounds = [];
    this.requests = null;
    this.prompt = "";
    this.isStale = false;
  }

  /** Measure as many rounds as the field says, then show the last. */
  async run({ anew }) {
    if (this.aborter || !isComplete() || !$("rounds").reportValidity()) return;
    this.report(null);
    this.begin();
    $("verdict").className = "verdict";
    $("verdict").textContent = "";
    $("caution").hidden = true;
    try {
      if (anew) await this.prepare();
      const numRounds = $("rounds").valueAsNumber;
      for (let count = 1; count <= numRounds; count += 1) {
        await this.measure(numRounds > 1 ? `Round ${count} of ${numRounds}` : "Measuring");
      }
      await this.show(this.rounds.at(-1));
    } catch (error) {
      $("race-status").textContent = isStop(error) ? "Stopped." : "";
      if (!isStop(error)) this.report(error);
    } finally {
      this.end();
    }
  }

  async showAgain() {
    if (this.aborter) return;
    this.begin();
    await this.show(this.rounds.at(-1));
    this.end();
  }

  /** Forget earlier rounds; let both find the prompt as known to the server as the other does. */
  async prepare() {
    this.restart();
    const firstSeed = seed();
    this.requests = {
      plain: apiRequest({ seed: firstSeed, speculate: false }),
      speculative: apiRequest({ seed: firstSeed, speculate: true }),
    };
    this.prompt = shownPrompt();
    this.showTable();
    $("race-status").textContent = "Warming up …";
    for (const request of Object.values(this.requests)) {
      const max_tokens = Math.min(request.body.max_tokens, WARM_UP_TOKENS);
      await this.record(request, { max_tokens });
    }
  }

  /** One round: each alone, who starts alternates. */
  async measure(words) {
    const firstSeed = this.requests.plain.body.seed;
    const roundSeed = (firstSeed + this.rounds.length) % Number.MAX_SAFE_INTEGER;
    const order = this.rounds.length % 2 ? ["speculative", "plain"] : ["plain", "speculative"];
    const { num_running: numOthers } = await getJson("stats");
    const round = { seed: roundSeed, first: order[0], isDisturbed: numOthers > 0 };
    for (const name of order) {
      const kind = name === "plain" ? "plain decoding" : "speculation";
      $("race-status").textContent = `${words}: ${kind} …`;
      round[name] = await this.record(this.requests[name], { seed: roundSeed });
    }
    round.ratio = round.plain.totalMs / round.speculative.totalMs;
    round.differsAt = firstDifference(round.plain.ids, round.speculative.ids);
    this.rounds.push(round);
    this.showTable();
  }

  async record({ path, body }, changes) {
    const events = [];
    let final = null;
    const request = { path, body: { ...body, ...changes } };
    for await (const event of complete(request, this.aborter.signal)) {
      if (event.tokens.length || event.text) events.push(event);
      final = event.foretoken ?? final;
    }
    const ids = events.flatMap((event) => event.tokens.map((token) => token.id));
    const totalMs = events.at(-1)?.atMs ?? NaN;
    return { events, ids, totalMs, exactness: final?.exactness, remark: whyPlain(request, final) };
  }

  /** Let both texts arrive at their measured speeds, slowed down by one factor. */
  async show(round) {
    const longestMs = Math.max(round.plain.totalMs, round.speculative.totalMs);
    const chosen = Number($("pace").value);
    const slower = chosen || Math.max(1, SHOWN_MS / longestMs);
    for (const [name, lane] of Object.entries(this.lanes)) lane.load(round[name], this.prompt);
    const words = slower > 1 ? `${fixed(slower, slower < 10 ? 1 : 0)} times slower than it was` : "as fast as it was";
    $("race-status").textContent = `Shown ${words}.`;
    const lanes = Object.values(this.lanes);
    const isStill = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const startedAt = performance.now();
    let atMs = 0;
    while (!isStill && atMs < longestMs && !this.aborter.signal.aborted) {
      const now = await nextFrame();
      atMs = Math.max(0, now - startedAt) / slower;
      for (const lane of lanes) lane.showUntil(atMs);
    }
    for (const lane of lanes) lane.showUntil(Infinity);
    showLegend($("race-legend"), this.lanes.speculative.text.counts);
    this.showVerdict(round);
  }

  showVerdict(round) {
    const parted = this.rounds.findIndex((one) => one.differsAt !== null);
    const ratios = this.rounds.map((one) => one.ratio).sort((a, b) => a - b);
    const speed = ratios.length === 1
      ? `Speculation was ${fixed(round.ratio)} times as fast as plain decoding`
      : `Median of ${ratios.length} rounds: ${fixed(median(ratios))} times as fast as plain ` +
        `decoding (${fixed(ratios[0])} to ${fixed(ratios.at(-1))})`;
    const same = ratios.length === 1
      ? `both gave the same ${round.plain.ids.length} tokens`
      : "both gave the same tokens in each";
    const different = parted >= 0 &&
      `in round ${parted + 1} the texts part at token ${this.rounds[parted].differsAt + 1} ` +
        `(exactness of this model: ${this.rounds[parted].speculative.exactness || "not stated"})`;
    $("verdict").className = different ? "verdict different" : "verdict same";
    $("verdict").textContent = `${speed}; ${different || same}.`;
    const cautions = this.cautions();
    $("caution").hidden = cautions.length === 0;
    $("caution").textContent = cautions.join(" ");
  }

  /** What a reader has to know to judge the numbers. */
  cautions() {
    const found = [this.rounds.at(-1).speculative.remark].filter(Boolean);
    if (this.rounds.some((round) => round.isDisturbed)) {
      found.push("Other requests were running on the server, which slows both down unevenly.");
    }
    const names = recallers(this.lanes.speculative.text.counts.keys());
    if (names.length) {
      found.push(
        `Some tokens were found by ${names.join(" and ")}, from past outputs among other places: ` +
          "if this server has written this text before, a new text will gain less. For " +
          "new texts leave the seed empty and the temperature above 0.",
      );
    }
    return found;
  }

  showTable() {
    const rows = this.rounds.map((round, place) => {
      const row = document.createElement("tr");
      const first = round.first === "plain" ? "plain" : "speculation";
      const same = round.differsAt === null ? "✓ yes" : `✗ up to ${round.differsAt}`;
      for (const value of [
        place + 1, round.seed, first, fixed(round.plain.totalMs, 1),
        fixed(round.speculative.totalMs, 1), fixed(round.ratio), same,
      ]) {
        row.insertCell().textContent = value;
      }
      return row;
    });
    $("rounds-table").tBodies[0].replaceChildren(...rows);
    $("rounds-table").hidden = rows.length === 0;
  }

  begin() {
    this.aborter = new AbortController();
    this.setBusy(true);
  }

  end() {
    this.aborter = null;
    this.setBusy(false);
  }

  setBusy(isBusy) {
    $("start").disabled = isBusy;
    $("replay").disabled = isBusy || this.rounds.length === 0;
    $("repeat").disabled = $("replay").disabled || this.isStale;
    $("race-stop").disabled = !isBusy;
  }
}

/** One of the two columns. */
class Lane {
  constructor(section) {
    this.text = new TokenText(section.querySelector(".text"));
    this.progress = section.querySelector("progress");
    this.time = section.querySelector(".time");
  }

  load(record, prompt) {
    this.record = record;
    this.numShown = 0;
    this.text.clear(prompt);
    this.progress.max = Math.max(1, record.ids.length);
    this.progress.value = 0;
  }

  showUntil(atMs) {
    const { events, totalMs, ids } = this.record;
    while (this.numShown < events.length && events[this.numShown].atMs <= atMs) {
      this.text.add(events[this.numShown]);
      this.numShown += 1;
    }
    const isDone = this.numShown === events.length;
    this.progress.value = isDone ? this.progress.max : this.text.numTokens;
    const rate = `, ${fixed((1000 * ids.length) / totalMs, 0)} tokens/s`;
    this.time.textContent =
      `${fixed(Math.min(atMs, totalMs), 1)} ms${isDone ? rate : ""}: ${this.text.counted}`;
  }
}

function firstDifference(left, right) {
  const length = Math.max(left.length, right.length);
  for (let place = 0; place < length; place += 1) {
    if (left[place] !== right[place]) return place;
  }
  return null;
}

function median(sorted) {
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function nextFrame() {
  return new Promise((resolve) => requestAnimationFrame(resolve));
}
