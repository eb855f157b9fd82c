// What the page computes, apart from the page: streams, tokens, requests, history.

/** Splits a stream of text into the values of its events; comments go to `onComment`. */
export class EventParser {
  constructor(onComment = () => {}) {
    this.rest = "";
    this.onComment = onComment;
  }

  /** Adds text as it came; returns the values of the events that are complete, "[DONE]" included. */
  push(text) {
    const blocks = (this.rest + text).split("\n\n");
    this.rest = blocks.pop();
    const values = [];
    for (const line of blocks.flatMap((block) => block.split("\n"))) {
      if (line.startsWith(":")) this.onComment(line.slice(1).trim());
      else if (line.startsWith("data: ")) {
        const data = line.slice(6);
        values.push(data === "[DONE]" ? data : JSON.parse(data));
      }
    }
    return values;
  }
}

/** A comment of a stream in words: how long the queue is, or how much was read. */
export function inWords(comment) {
  const [, queued] = /^queued (\d+)$/.exec(comment) ?? [];
  if (queued !== undefined) return queued === "0" ? "Next in the queue …" : `${queued} in the queue before …`;
  const [, done, total] = /^reading (\d+)\/(\d+)$/.exec(comment) ?? [];
  if (done !== undefined) return `Reading: ${done} of ${total} tokens …`;
  return comment === "writing" ? "Writing …" : "Waiting …";
}

/** The class of a token's background: 0 for the least likely, 10 for the most. */
export function shade(logprob) {
  return logprob === null ? 10 : Math.max(0, Math.min(10, Math.floor(Math.exp(logprob) * 10)));
}

/** A probability for people. */
export function percent(logprob) {
  const share = Math.min(1, Math.exp(logprob)) * 100;
  return share >= 0.1 ? `${share.toFixed(1)}%` : share > 0 ? `${share.toExponential(1)}%` : "0%";
}

/** Tokens as the strip shows them: those inside of one character are joined, with its text. */
export function groups(tokens) {
  const found = [];
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  for (const token of tokens) {
    const last = found.at(-1);
    const isOpen = last !== undefined && last.isOpen;
    const group = isOpen ? last : { tokens: [], text: "", isOpen: false };
    if (!isOpen) found.push(group);
    group.tokens.push(token);
    const bytes = Uint8Array.from(group.tokens.flatMap((each) => each.bytes));
    group.isOpen = isHalf(bytes);
    group.text = token.bytes.length === 0 && group.tokens.length === 1 ? token.token : decoder.decode(bytes);
  }
  return found;
}

/** Whether bytes end in a character that is not complete. */
export function isHalf(bytes) {
  for (let back = 1; back <= Math.min(3, bytes.length); back += 1) {
    const byte = bytes[bytes.length - back];
    if (byte >= 0xc2 && byte <= 0xf4) return back < (byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2);
    if ((byte & 0xc0) !== 0x80) return false;
  }
  return false;
}

/** Visible marks for what nobody would see. */
export function shown(text) {
  return text.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t").replace(/[\u0000-\u0008\u000b-\u001f\u007f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "␦") || "∅";
}

/** The body of a request. `prompt` is a text, or token ids. */
export function bodyOf(prompt, settings) {
  const body = { prompt, stream: true, logprobs: 10, return_token_ids: true, stream_options: { include_usage: true } };
  for (const [name, value] of Object.entries(settings)) {
    if (value !== null && value !== "" && !(Array.isArray(value) && value.length === 0)) body[name] = value;
  }
  return body;
}

/** Stop texts, one a line. */
export function stopTexts(text) {
  return text.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
}

/** The ids to go on from when the token at `place` is replaced: all before it, and the other one. */
export function branch(step, place, id) {
  return [...step.promptIds, ...step.tokens.slice(0, place).map((token) => token.id), id];
}

/** Perplexity of scored tokens; null without any. */
export function perplexity(tokens) {
  const known = tokens.map((token) => token.logprob).filter((value) => value !== null);
  if (known.length === 0) return null;
  return Math.exp(-known.reduce((sum, value) => sum + value, 0) / known.length);
}

/** Steps that can be undone, the newest last. */
export class History {
  constructor(limit = 100) {
    this.limit = limit;
    this.past = [];
    this.future = [];
  }

  add(step) {
    this.past = [...this.past, step].slice(-this.limit);
    this.future = [];
  }

  undo(now) {
    const step = this.past.pop();
    if (step !== undefined) this.future.push(now);
    return step;
  }

  redo(now) {
    const step = this.future.pop();
    if (step !== undefined) this.past.push(now);
    return step;
  }
}

/** The request as a command; the key is never in it. */
export function asCurl(url, body) {
  const { stream_options: _, ...plain } = body;
  const data = JSON.stringify({ ...plain, stream: false, logprobs: null, return_token_ids: null });
  return `curl ${url} -H 'Content-Type: application/json' -d '${data.replaceAll("'", "'\\''")}'`;
}

/** The same for the openai package. */
export function asPython(base, model, body) {
  const { stream_options: _, stream: __, return_token_ids: ___, logprobs: ____, top_k, min_p, ...plain } = body;
  const named = { model, ...plain };
  const lines = Object.entries(named).map(([name, value]) => `    ${name}=${literal(value)},`);
  const extra = Object.entries({ top_k, min_p }).filter(([, value]) => value !== undefined);
  if (extra.length > 0) lines.push(`    extra_body={${extra.map(([name, value]) => `"${name}": ${literal(value)}`).join(", ")}},`);
  return `import openai\n\nclient = openai.OpenAI(base_url=${literal(base)}, api_key="none")\nanswer = client.completions.create(\n${lines.join("\n")}\n)\nprint(answer.choices[0].text)\n`;
}

function literal(value) {
  return JSON.stringify(value);
}
