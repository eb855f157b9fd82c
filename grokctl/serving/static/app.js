import { EventParser, History, asCurl, asPython, bodyOf, branch, groups, inWords, perplexity, percent, shade, shown, stopTexts } from "./core.js";

const field = (id) => document.getElementById(id);
const text = field("text");
const EXAMPLES = {
  "a few-shot list": "Country: capital\nFrance: Paris\nJapan: Tokyo\nKenya: Nairobi\nBrazil:",
  "a file header": '"""Compute the nth Fibonacci number, by doubling."""\n\n\ndef fibonacci(n: int) -> int:\n',
  "question and answer": "Q: Why is the sky blue?\nA: Because air scatters short waves of light more than long ones.\n\nQ: Why is the sea salty?\nA:",
};
const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "seed"];
const history = new History();
let model = "";
let step = null; // the newest completion: {base, text, promptIds, tokens, offsets}
let running = null; // an AbortController
let chosen = null;
let drawn = 0; // groups of the strip that are drawn already

// --- what is kept in this browser

function kept(store, name) {
  try { return store.getItem(`grokctl-${name}`); } catch { return null; }
}
function keep(store, name, value) {
  try { store.setItem(`grokctl-${name}`, value); } catch { /* then it is not kept */ }
}
function saveDraft() {
  keep(localStorage, "text", text.value);
  const values = Object.fromEntries([...NUMBERS, "stop_texts"].map((name) => [name, field(name).value]));
  keep(localStorage, "settings", JSON.stringify(values));
}
function loadDraft() {
  text.value = kept(localStorage, "text") ?? "";
  field("key").value = kept(sessionStorage, "key") ?? "";
  try {
    for (const [name, value] of Object.entries(JSON.parse(kept(localStorage, "settings") ?? "{}"))) {
      if ([...NUMBERS, "stop_texts"].includes(name)) field(name).value = value;
    }
  } catch { /* of another version */ }
}

// --- the server

const say = (words) => { field("state").textContent = words; };
const headers = () => {
  const key = field("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
};
const settings = () => {
  const numbers = NUMBERS.map((name) => [name, field(name).value === "" ? null : Number(field(name).value)]);
  return { ...Object.fromEntries(numbers), stop: stopTexts(field("stop_texts").value) };
};

async function connect() {
  for (;;) {
    try {
      const health = await fetch("health");
      if (health.ok) break;
      say(`${(await health.json()).error.message} …`);
    } catch {
      say("No answer from the server; trying again …");
    }
    await new Promise((done) => setTimeout(done, 2000));
  }
  await greet();
}

async function greet() {
  const response = await fetch("v1/models", { headers: headers() });
  const needsKey = response.status === 401;
  if (needsKey) field("key_field").hidden = false;
  if (!response.ok) {
    say(needsKey ? "This server needs a key: type it below." : "The server is not ready.");
    return;
  }
  const card = (await response.json()).data[0];
  model = card.id;
  document.title = model;
  say(`${model}, context ${card.max_model_len} tokens: ready.`);
}

/** The words of an answer that is an error; a full queue is waited for. */
async function refused(response) {
  let words = `error ${response.status}`;
  try { words = (await response.json()).error.message; } catch { /* a proxy's page */ }
  if (response.status === 401) field("key_field").hidden = false;
  if (response.status === 429 || response.status === 503) {
    for (let left = Number(response.headers.get("Retry-After") ?? 0); left > 0; left -= 1) {
      say(`${words}; again in ${left} s`);
      await new Promise((done) => setTimeout(done, 1000));
    }
    say(`${words}: try again now.`);
  } else say(words);
}

// --- completing

async function complete(prompt, base) {
  if (running !== null || (typeof prompt === "string" ? prompt === "" : prompt.length === 0)) return;
  const before = { text: text.value, step };
  step = { base, text: base, promptIds: typeof prompt === "string" ? [] : prompt, tokens: [], offsets: null };
  const mine = step;
  running = new AbortController();
  const began = performance.now();
  clearStrip();
  history.add(before);
  enable();
  say("Waiting …");
  try {
    const response = await fetch("v1/completions", {
      method: "POST", headers: headers(), signal: running.signal, body: JSON.stringify(bodyOf(prompt, settings())),
    });
    if (!response.ok) await refused(response);
    else await follow(response, mine, began);
  } catch (error) {
    if (error.name === "AbortError") say(`Stopped after ${mine.tokens.length} tokens.`);
    else say("The connection was lost; the text is kept. Complete goes on from it.");
  } finally {
    running = null;
    draw();
    saveDraft();
    enable();
  }
}

async function follow(response, mine, began) {
  const parser = new EventParser((comment) => say(inWords(comment)));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let usage = null;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    for (const event of parser.push(value)) {
      if (event === "[DONE]") continue;
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      for (const choice of event.choices) take(choice, mine);
    }
    const seconds = (performance.now() - began) / 1000;
    say(`${mine.tokens.length} tokens, ${(mine.tokens.length / seconds).toFixed(1)} a second`);
    requestAnimationFrame(draw);
  }
  if (usage) say(`${usage.completion_tokens} tokens after ${usage.prompt_tokens} (${usage.prompt_tokens_details.cached_tokens} of them kept), ${(usage.completion_tokens / ((performance.now() - began) / 1000)).toFixed(1)} a second`);
}

function take(choice, mine) {
  if (choice.prompt_token_ids) mine.promptIds = choice.prompt_token_ids;
  mine.text += choice.text;
  mine.tokens.push(...(choice.logprobs?.content ?? []));
}

async function score() {
  if (running !== null || text.value === "") return;
  running = new AbortController();
  enable();
  say("Scoring …");
  try {
    const body = { prompt: text.value, max_tokens: 0, echo: true, logprobs: 10, return_token_ids: true };
    const response = await fetch("v1/completions", { method: "POST", headers: headers(), signal: running.signal, body: JSON.stringify(body) });
    if (!response.ok) { await refused(response); return; }
    const { logprobs } = (await response.json()).choices[0];
    step = { base: "", text: text.value, promptIds: [], tokens: logprobs.content, offsets: logprobs.text_offset };
    clearStrip();
    draw();
    const value = perplexity(step.tokens);
    field("result").textContent = value === null ? "One token has no score." : `Perplexity ${value.toFixed(2)} over ${step.tokens.length - 1} tokens.`;
    say("Scored.");
  } catch {
    say("The connection was lost; the text is kept.");
  } finally {
    running = null;
    enable();
  }
}

/** Whether the text is as the last completion left it. */
const isAsWritten = () => step !== null && step.promptIds.length > 0 && text.value === step.text;

/** Ids, if there are any for the text: other tokens could have the same text. */
function promptNow() {
  return isAsWritten() ? [...step.promptIds, ...step.tokens.map((token) => token.id)] : text.value;
}

// --- the strip

function clearStrip() {
  field("strip").replaceChildren();
  field("details").hidden = true;
  field("result").textContent = "";
  drawn = 0;
  chosen = null;
}

function draw() {
  if (step === null) return;
  if (running !== null || text.value !== step.text) {
    const isAtEnd = text.scrollTop + text.clientHeight >= text.scrollHeight - 8;
    text.value = step.text;
    if (isAtEnd) text.scrollTop = text.scrollHeight;
  }
  const strip = field("strip");
  const all = groups(step.tokens);
  if (drawn > 0) { // the last one may have grown
    drawn -= 1;
    strip.lastChild?.remove();
  }
  let place = all.slice(0, drawn).reduce((sum, group) => sum + group.tokens.length, 0);
  const added = document.createDocumentFragment();
  for (const group of all.slice(drawn)) {
    added.append(tokenButton(group, place, strip.childElementCount + added.childElementCount === 0));
    place += group.tokens.length;
  }
  strip.append(added);
  drawn = all.length;
}

function tokenButton(group, place, isFirst) {
  const button = document.createElement("button");
  const lowest = Math.min(...group.tokens.map((token) => token.logprob ?? 0));
  const isKnown = group.tokens.some((token) => token.logprob !== null);
  button.type = "button";
  button.textContent = shown(group.text);
  button.className = `p${isKnown ? shade(lowest) : 10}${isKnown && lowest < Math.log(0.1) ? " p-rare" : ""}`;
  button.tabIndex = isFirst ? 0 : -1;
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => showDetails(button, group, place));
  button.addEventListener("focus", () => showDetails(button, group, place));
  return button;
}

function showDetails(button, group, place) {
  if (chosen !== null) { chosen.setAttribute("aria-pressed", "false"); chosen.tabIndex = -1; }
  chosen = button;
  button.setAttribute("aria-pressed", "true");
  button.tabIndex = 0;
  const token = group.tokens[0];
  const facts = group.tokens.map((each) => `${each.id}${each.logprob === null ? "" : ` (${percent(each.logprob)}, ${each.logprob.toFixed(3)} nats)`}, bytes ${each.bytes.join(" ") || "none"}`);
  field("token").textContent = `${shown(group.text)}: token ${facts.join("; ")}`;
  const list = field("alternatives");
  list.replaceChildren();
  for (const other of token.top_logprobs) list.append(alternative(other, place));
  const rest = 1 - token.top_logprobs.reduce((sum, other) => sum + Math.exp(other.logprob), 0);
  field("rest").textContent = token.logprob === null ? "Nothing precedes it." : `All others: ${(100 * Math.max(0, rest)).toFixed(1)}%`;
  field("details").hidden = false;
}

function alternative(other, place) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const bar = document.createElement("meter");
  const share = document.createElement("span");
  button.type = "button";
  button.textContent = shown(other.token);
  button.setAttribute("aria-label", `go on with ${other.token}`);
  button.addEventListener("click", () => goOn(place, other));
  bar.max = 1;
  bar.value = Math.exp(other.logprob);
  share.textContent = percent(other.logprob);
  item.append(button, bar, share);
  return item;
}

function goOn(place, other) {
  if (running !== null) return;
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  const added = (tokens) => decoder.decode(Uint8Array.from(tokens.flatMap((token) => token.bytes)));
  const start = step.offsets === null ? step.base + added(step.tokens.slice(0, place)) : step.text.slice(0, step.offsets[place]);
  complete(branch(step, place, other.id), start + added([other]));
}

// --- buttons and keys

function enable() {
  const isBusy = running !== null;
  field("complete").textContent = isAsWritten() && !isBusy ? "More" : "Complete";
  for (const id of ["complete", "score", "examples"]) field(id).disabled = isBusy;
  field("stop").disabled = !isBusy;
  field("retry").disabled = isBusy || step === null || step.promptIds.length === 0;
  field("undo").disabled = isBusy || history.past.length === 0;
  field("redo").disabled = isBusy || history.future.length === 0;
}

function restore(found) {
  if (found === undefined) return;
  step = found.step;
  clearStrip();
  text.value = found.text;
  if (step !== null && step.text === found.text) draw();
  saveDraft();
  enable();
}

const start = () => complete(promptNow(), text.value);
const retry = () => step !== null && complete(step.promptIds, step.base);
const now = () => ({ text: text.value, step });
async function copy(words) {
  try {
    await navigator.clipboard.writeText(words);
    say("Copied.");
  } catch {
    say("This browser does not let a page copy.");
  }
}

field("complete").addEventListener("click", start);
field("stop").addEventListener("click", () => running?.abort());
field("retry").addEventListener("click", retry);
field("undo").addEventListener("click", () => restore(history.undo(now())));
field("redo").addEventListener("click", () => restore(history.redo(now())));
field("score").addEventListener("click", score);
field("curl").addEventListener("click", () => copy(asCurl(new URL("v1/completions", location.href), bodyOf(text.value, settings()))));
field("python").addEventListener("click", () => copy(asPython(new URL("v1", location.href), model, bodyOf(text.value, settings()))));
field("key").addEventListener("change", () => { keep(sessionStorage, "key", field("key").value); greet(); });
field("strip").addEventListener("keydown", (event) => {
  const next = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  const other = next && document.activeElement[next];
  if (other) { event.preventDefault(); other.focus(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); start(); }
  if (event.key === "Escape") running?.abort();
});
for (const name of Object.keys(EXAMPLES)) {
  const option = document.createElement("option");
  option.value = option.textContent = name;
  field("examples").append(option);
}
field("examples").addEventListener("change", () => {
  const words = EXAMPLES[field("examples").value];
  if (words) { history.add(now()); text.value = words; saveDraft(); enable(); }
});
for (const name of ["text", ...NUMBERS, "stop_texts"]) field(name).addEventListener("input", saveDraft);
text.addEventListener("input", enable);

loadDraft();
enable();
connect();
