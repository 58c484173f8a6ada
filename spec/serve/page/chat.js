// A chat that shows, token by token, what speculative decoding did. No library, no build step.

const $ = (id) => document.getElementById(id);
const AUTO = 0; // position of the draft-length slider that leaves the length to the server
let history = []; // of the chat that is shown; an answer keeps the one it was asked in
const welcome = $("welcome");
let model = null;
let running = null; // AbortController of the answer that is being written

// ---------------------------------------------------------------- talking to the server

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function describe(response) {
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `the server answered ${response.status}`;
}

async function connect() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await describe(response));
    const card = (await response.json()).data[0];
    model = card.id;
    const { draft, draft_length } = card.draft;
    const name = draft?.split("/").slice(-2).join("/"); // of a path, what tells drafts apart
    $("model").textContent = draft ? `${model}, drafted for by ${name} (length ${draft_length})` : `${model}, no draft`;
    $("model").title = draft ?? "";
  } catch (error) {
    model = null;
    $("model").textContent = `not connected: ${error.message}`;
  }
}

function draftLength() {
  if (!$("speculative").checked) return { draft_length: 0 };
  const length = Number($("length").value);
  return length === AUTO ? {} : { draft_length: length };
}

async function* chunks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// ---------------------------------------------------------------- what is shown

function show(who, text = "") {
  welcome.remove();
  const message = document.createElement("div");
  message.className = `message ${who}`;
  message.dataset.who = { user: "You", assistant: "Model", error: "Error" }[who];
  message.textContent = text;
  $("log").append(message);
  $("log").scrollTop = $("log").scrollHeight;
  return message;
}

/** Adds a token's text; neighbours of the same origin share a span. */
function append(message, text, fromDraft) {
  const origin = fromDraft ? "draft" : "target";
  let span = message.lastElementChild;
  if (span?.className !== origin) {
    span = document.createElement("span");
    span.className = origin;
    message.append(span);
  }
  const below = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 80;
  span.append(text);
  if (below) $("log").scrollTop = $("log").scrollHeight;
}

const percent = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");

/** What speculation did so far: tokens, drafted, accepted, target_steps. ``seconds`` since the first of its steps, which
 * brought the ``burst`` of tokens that the rate leaves out. */
function figures(count, burst, seconds) {
  const after = count.tokens - burst;
  $("rate").textContent = after > 0 && seconds > 0 ? (after / seconds).toFixed(1) : "–";
  $("share").textContent = percent(count.accepted, count.tokens);
  $("accepted").textContent = count.drafted ? `${percent(count.accepted, count.drafted)} of ${count.drafted}` : "no drafts";
  $("per-step").textContent = count.target_steps ? (count.tokens / count.target_steps).toFixed(2) : "–";
}

function final(metrics, burst) {
  const choice = metrics.choices[0];
  figures(choice, burst, metrics.seconds - metrics.seconds_to_first_token);
  $("positions").replaceChildren(...choice.drafted_by_position.map((drafted, i) => {
    const item = document.createElement("li");
    const meter = document.createElement("meter");
    meter.max = drafted || 1;
    meter.value = choice.accepted_by_position[i];
    meter.title = `${choice.accepted_by_position[i]} of ${drafted}`;
    meter.setAttribute("aria-label", `Accepted at position ${i + 1}: ${meter.title}`);
    item.append(`${i + 1}`, meter, percent(choice.accepted_by_position[i], drafted));
    return item;
  }));
  $("status").textContent =
    `Done: ${choice.tokens} tokens, ${$("rate").textContent} a second, ${percent(choice.accepted, choice.tokens)} from the draft`;
}

/** Nothing of the last answer may pass for the next one's. */
function reset() {
  for (const id of ["rate", "share", "accepted", "per-step", "first"]) $(id).textContent = "–";
  $("positions").replaceChildren();
  $("status").textContent = "";
}

function busy(now) {
  $("send").disabled = now;
  $("stop").disabled = !now;
  $("log").setAttribute("aria-busy", String(now));
}

// ---------------------------------------------------------------- one answer

async function ask(text) {
  const mine = history;
  const controller = new AbortController();
  running = controller;
  busy(true);
  reset();
  show("user", text);
  const message = show("assistant");
  mine.push({ role: "user", content: text });
  let answer = "";
  try {
    if (!model) await connect();
    const sent = performance.now();
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: controller.signal,
      body: JSON.stringify({
        model, messages: mine, stream: true, metrics: true, temperature: Number($("temperature").value),
        max_completion_tokens: Number($("tokens").value) || 256, ...draftLength(),
      }),
    });
    if (!response.ok) throw new Error(await describe(response));
    let [first, burst] = [0, 0];
    for await (const chunk of chunks(response)) {
      if (controller.signal.aborted) break;
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.metrics) final(chunk.metrics, burst);
      for (const choice of chunk.choices ?? []) {
        if (!first) {
          first = performance.now();
          $("first").textContent = `${Math.round(first - sent)} ms`;
        }
        const piece = choice.delta.content ?? "";
        if (piece) append(message, piece, choice.from_draft);
        answer += piece;
        if (choice.so_far.target_steps === 1) burst = choice.so_far.tokens;
        figures(choice.so_far, burst, (performance.now() - first) / 1000);
      }
    }
  } catch (error) {
    if (!controller.signal.aborted) show("error", error.message);
  } finally {
    if (answer) mine.push({ role: "assistant", content: answer });
    else { mine.pop(); message.remove(); }
    if (running === controller) idle();
  }
}

function idle() {
  running = null;
  busy(false);
  $("prompt").focus();
}

// ---------------------------------------------------------------- wiring

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  ask(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  history = [];
  $("log").replaceChildren(welcome);
  reset();
  idle();
});
$("key").addEventListener("change", connect);
$("temperature").addEventListener("input", () => {
  $("temperature-shown").value = Number($("temperature").value).toFixed(1);
});
function showLength() {
  const length = Number($("length").value);
  const text = !$("speculative").checked ? "plain" : length === AUTO ? "auto" : String(length);
  $("length-shown").value = text;
  $("length").setAttribute("aria-valuetext", text);
  $("length").disabled = !$("speculative").checked;
}
$("length").addEventListener("input", showLength);
$("speculative").addEventListener("change", showLength);

showLength();
connect();
