// A chat that shows, token by token, what speculative decoding did. No library, no build step.

const $ = (id) => document.getElementById(id);
const AUTO = 0; // position of the draft-length slider that leaves the length to the server
const history = [];
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
    $("model").textContent = draft ? `${model}, drafted for by ${draft} (length ${draft_length})` : `${model}, no draft`;
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
  $("welcome")?.remove();
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

function live(count) {
  const seconds = (performance.now() - count.first) / 1000;
  $("rate").textContent = count.tokens > 1 && seconds > 0 ? ((count.tokens - 1) / seconds).toFixed(1) : "–";
  $("share").textContent = percent(count.drafted, count.tokens);
}

function final(metrics) {
  const choice = metrics.choices[0];
  const seconds = metrics.seconds - metrics.seconds_to_first_token;
  $("rate").textContent = choice.tokens > 1 && seconds > 0 ? ((choice.tokens - 1) / seconds).toFixed(1) : "–";
  $("share").textContent = percent(choice.accepted, choice.tokens);
  $("accepted").textContent = choice.drafted ? `${percent(choice.accepted, choice.drafted)} of ${choice.drafted}` : "no drafts";
  $("per-step").textContent = metrics.tokens_per_target_step?.toFixed(2) ?? "–";
  $("first").textContent = `${Math.round(1000 * metrics.seconds_to_first_token)} ms`;
  $("positions").replaceChildren(...choice.drafted_by_position.map((drafted, i) => {
    const item = document.createElement("li");
    const meter = document.createElement("meter");
    meter.max = drafted || 1;
    meter.value = choice.accepted_by_position[i];
    meter.title = `${choice.accepted_by_position[i]} of ${drafted}`;
    item.append(`${i + 1}`, meter, percent(choice.accepted_by_position[i], drafted));
    return item;
  }));
  $("status").textContent =
    `Done: ${choice.tokens} tokens, ${$("rate").textContent} a second, ${percent(choice.accepted, choice.tokens)} from the draft`;
}

function busy(now) {
  $("send").disabled = now;
  $("stop").disabled = !now;
  $("log").setAttribute("aria-busy", String(now));
}

// ---------------------------------------------------------------- one answer

async function ask(text) {
  if (!model) await connect();
  show("user", text);
  history.push({ role: "user", content: text });
  const message = show("assistant");
  const count = { tokens: 0, drafted: 0, first: 0 };
  running = new AbortController();
  busy(true);
  let answer = "";
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: running.signal,
      body: JSON.stringify({
        model, messages: history, stream: true, metrics: true, temperature: Number($("temperature").value),
        max_completion_tokens: Number($("tokens").value) || 256, ...draftLength(),
      }),
    });
    if (!response.ok) throw new Error(await describe(response));
    for await (const chunk of chunks(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.metrics) final(chunk.metrics);
      for (const choice of chunk.choices ?? []) {
        count.first ||= performance.now();
        count.tokens += 1;
        count.drafted += choice.from_draft ? 1 : 0;
        const piece = choice.delta.content ?? "";
        if (piece) append(message, piece, choice.from_draft);
        answer += piece;
        live(count);
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  } finally {
    running = null;
    busy(false);
    if (answer) history.push({ role: "assistant", content: answer });
    else { history.pop(); message.remove(); }
    $("prompt").focus();
  }
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
  history.length = 0;
  $("log").replaceChildren();
  $("prompt").focus();
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
