// Puts the page together: tabs, the key, errors, and what the server's model offers.

import { Failure, getJson, useKey } from "./api.js";
import { offer } from "./form.js";
import { Playground } from "./playground.js";
import { Race } from "./race.js";
import { introduce } from "./tokens.js";

const $ = (id) => document.getElementById(id);

/** Show an error as a sentence, and the field for the key if that is what is missing. */
function report(error) {
  $("failure").hidden = error === null;
  $("failure").textContent = error === null ? "" : sentence(error);
  if (error?.needsKey) {
    $("key-form").hidden = false;
    $("key").focus();
  }
}

function sentence(error) {
  if (error instanceof Failure) return error.message;
  console.error(error);
  return `This page has a fault: ${error.message}`;
}

const playground = new Playground(report);
const race = new Race(report);

async function learn() {
  try {
    const config = await getJson("page/config");
    offer(config);
    introduce(config.drafters);
    $("model").textContent = `serves ${config.model}; exactness: ${config.exactness}`;
    await playground.server.show();
  } catch (error) {
    $("model").textContent = "";
    report(error);
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  report(null);
  try {
    useKey($("key").value);
  } catch (error) {
    report(error);
    return;
  }
  $("key").value = "";
  $("key-form").hidden = true;
  learn();
});

$("request").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("race").hidden) playground.generate();
  else race.run({ anew: true });
});

$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("request").requestSubmit();
});

const tabs = [...document.querySelectorAll("[role=tab]")];

function openTab(tab) {
  for (const one of tabs) {
    one.setAttribute("aria-selected", String(one === tab));
    one.tabIndex = one === tab ? 0 : -1;
    $(one.getAttribute("aria-controls")).hidden = one !== tab;
  }
  $("speculate-choice").hidden = !$("race").hidden; // a race is always run both ways
}

tabs.forEach((tab, place) => {
  tab.addEventListener("click", () => openTab(tab));
  tab.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
    const next = tabs[(place + 1) % tabs.length]; // there are two: both ways lead to the other
    next.focus();
    openTab(next);
  });
});

learn();
