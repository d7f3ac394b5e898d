// The playground: one request, its text coloured by who found each token, its numbers.

import { complete, isStop } from "./api.js";
import { apiRequest, isComplete, seed, shownPrompt } from "./form.js";
import { ServerNumbers, finishedRows, runningRows, showNumbers, whyPlain } from "./numbers.js";
import { TokenText, explain, showLegend } from "./tokens.js";

const $ = (id) => document.getElementById(id);

export class Playground {
  /** `report` shows an error, or hides the last one when called with null. */
  constructor(report) {
    this.report = report;
    this.text = new TokenText($("output"));
    this.server = new ServerNumbers($("server-numbers"), $("depths"));
    this.aborter = null;
    explain(this.text, $("token-note"));
    $("stop").addEventListener("click", () => this.aborter?.abort());
  }

  async generate() {
    if (this.aborter || !isComplete()) return;
    this.report(null);
    this.begin();
    try {
      const ownSeed = seed();
      const request = apiRequest({ seed: ownSeed });
      this.text.clear(shownPrompt());
      await this.receive(request, ownSeed);
    } catch (error) {
      $("status").textContent = isStop(error) ? `Stopped after ${this.text.numTokens} tokens.` : "";
      if (!isStop(error)) this.report(error);
    } finally {
      this.end();
    }
  }

  async receive(request, ownSeed) {
    const times = {};
    let final = null;
    for await (const event of complete(request, this.aborter.signal)) {
      this.text.add(event);
      final = event.foretoken ?? final;
      if (event.tokens.length) {
        times.firstMs ??= event.atMs;
        times.lastMs = event.atMs;
        this.showProgress(times);
      }
    }
    const rows = [...this.rows(times), ...(final ? finishedRows(final) : []), ["Seed", ownSeed]];
    showNumbers($("request-numbers"), rows);
    $("status").textContent = `${this.text.counted} of the target. ${whyPlain(request, final)}`.trim();
  }

  showProgress(times) {
    showNumbers($("request-numbers"), this.rows(times));
    showLegend($("legend"), this.text.counts);
  }

  rows(times) {
    const { numTokens, numSteps } = this.text;
    return runningRows({ numTokens, numSteps, ...times });
  }

  begin() {
    this.aborter = new AbortController();
    $("generate").disabled = true;
    $("stop").disabled = false;
    $("output").setAttribute("aria-busy", "true");
    $("status").textContent = "Generating …";
    showNumbers($("request-numbers"), []);
    showLegend($("legend"), new Map());
    this.server.start();
  }

  end() {
    this.aborter = null;
    $("generate").disabled = false;
    $("stop").disabled = true;
    $("output").setAttribute("aria-busy", "false");
    this.server.stop();
    this.server.show();
  }
}
