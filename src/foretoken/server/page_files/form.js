// The request form: what the user asked, as the body of an API request.

import { Failure } from "./api.js";

const $ = (id) => document.getElementById(id);
let config = { model: "", chat: false, drafters: [] };

/** Show the choices that the server's model has. */
export function offer(serverConfig) {
  config = serverConfig;
  $("chat-choice").hidden = !config.chat;
  $("drafters").replaceChildren(...config.drafters.map(drafterChoice));
  $("max-tokens").max = config.max_new_tokens;
  $("max-tokens").value = Math.min(number("max-tokens"), config.max_new_tokens);
  $("speculate").disabled = config.drafters.length === 0;
  if (config.drafters.length === 0) {
    $("speculate").checked = false;
    $("drafters").textContent = "This server has no drafters.";
  }
}

function drafterChoice({ name, source }) {
  const box = document.createElement("input");
  Object.assign(box, { type: "checkbox", checked: true, value: name });
  const label = document.createElement("label");
  label.className = "check";
  label.title = source;
  label.append(box, name);
  return label;
}

/** Whether every field has a value it can have; if not, the browser shows which has not. */
export function isComplete() {
  return $("request").reportValidity();
}

/** The text that stands before the output: the prompt, unless it is a chat message. */
export function shownPrompt() {
  return isChat() ? "" : $("prompt").value;
}

/** The seed of the form, or a new one: every run can be repeated. */
export function seed() {
  return $("seed").value === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : number("seed");
}

/**
 * What is to be sent: {path, body}.
 * `speculate` false decodes plainly; by default the form says which.
 */
export function apiRequest({ seed, speculate = $("speculate").checked }) {
  const prompt = $("prompt").value;
  const body = {
    model: config.model,
    ...(isChat() ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    max_tokens: number("max-tokens"),
    temperature: number("temperature"),
    top_p: number("top-p"),
    seed,
    stream: true,
    stream_options: { include_usage: true },
    speculation: { details: true, ...speculation(speculate) },
  };
  return { path: isChat() ? "v1/chat/completions" : "v1/completions", body };
}

function speculation(speculate) {
  if (!speculate) return { enabled: false };
  const boxes = [...$("drafters").querySelectorAll("input")];
  const chosen = boxes.filter((box) => box.checked).map((box) => box.value);
  if (chosen.length === 0) {
    throw new Failure("Nobody could draft: choose at least one drafter, or switch speculation off.");
  }
  return {
    enabled: true,
    ...(chosen.length < boxes.length && { drafters: chosen }),
    ...($("max-nodes").value !== "" && { max_nodes: number("max-nodes") }),
  };
}

function isChat() {
  return config.chat && $("chat").checked;
}

function number(id) {
  return $(id).valueAsNumber;
}
