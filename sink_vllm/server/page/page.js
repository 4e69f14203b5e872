// The page at /streams: looks at the server's streams again and again, and appends to one of them.
import * as api from "./api.js";

const LOOK_EVERY = 1000; // ms; the stream on display more often while it generates
const LOOK_CLOSELY_EVERY = 300;
const LOOK_HIDDEN_EVERY = 10000;
const SAY_EVERY = 50;
const WORK_AT_MOST = 20; // ms on what arrives, before the browser has its turn
const RATE_OVER = 3; // seconds
const MOST_CHARACTERS = 20000; // of one text on display
const MOST_TEXTS = 40;

const by = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");
const show = (count) => number.format(count);

const streams = new Map(); // what the server said last, by id, in the order of the list
const made = new Set(JSON.parse(sessionStorage.getItem("made") ?? "[]"));
const rates = new Map(); // id: what was generated when, newest last
const saying = new Map(); // id: the nodes of what was said
const running = new Map(); // id: how to stop the turn that this page has begun
let chosen = null;
let listed = null; // whether the server lists its streams; null before it was asked

// -- numbers ------------------------------------------------------------------------------------

/** Position, evicted and cached as they are now, also in the middle of a turn. */
const now = (stream) => stream.turn ?? stream;

function observe(stream) {
  streams.set(stream.id, stream);
  const turn = stream.turn;
  if (!turn) return void rates.delete(stream.id);
  const seen = rates.get(stream.id) ?? [];
  const last = seen.at(-1);
  if (last && turn.generated_tokens < last.tokens) seen.length = 0; // another turn
  if (!last || turn.seconds > last.seconds)
    seen.push({ seconds: turn.seconds, tokens: turn.generated_tokens });
  while (seen.length > 2 && turn.seconds - seen[1].seconds > RATE_OVER) seen.shift();
  rates.set(stream.id, seen);
}

function rate(stream) {
  if (!stream.busy) return "–";
  const seen = rates.get(stream.id);
  if (!seen?.length) return "computing";
  const last = seen.at(-1);
  const first = seen.length > 1 ? seen[0] : { seconds: 0, tokens: 0 };
  const seconds = last.seconds - first.seconds;
  return seconds > 0 ? show(Math.round((last.tokens - first.tokens) / seconds)) : "…";
}

// -- the list -----------------------------------------------------------------------------------

const label = (stream) =>
  stream.metadata.name ?? `${stream.id.slice(0, 13)}…${stream.id.slice(-4)}`;

function row(id) {
  const found = document.querySelector(`tr[data-id="${CSS.escape(id)}"]`);
  if (found) return found;
  const made = document.createElement("tr");
  made.dataset.id = id;
  const name = document.createElement("th");
  name.scope = "row";
  const button = document.createElement("button");
  button.type = "button";
  button.className = "link";
  button.title = id;
  button.addEventListener("click", () => choose(id));
  name.append(button);
  made.append(name);
  for (let i = 0; i < 4; i++) made.insertCell().className = "number";
  return made;
}

/** Rows are changed in place, so that the focus stays where it is. */
function drawList() {
  const rows = [...streams.values()].map((stream) => {
    const line = row(stream.id);
    const { position, evicted, cached } = now(stream);
    const button = line.querySelector("button");
    button.textContent = label(stream);
    button.setAttribute("aria-current", String(stream.id === chosen));
    line.classList.toggle("chosen", stream.id === chosen);
    line.classList.toggle("busy", stream.busy);
    const texts = [show(position), show(evicted), show(cached), rate(stream)];
    texts.forEach((text, i) => (line.cells[i + 1].textContent = text));
    return line;
  });
  const body = by("rows");
  const before = [...body.rows];
  if (!rows.length) {
    if (before.length === 1 && !before[0].dataset.id) return;
    const none = document.createElement("tr");
    const cell = none.insertCell();
    cell.colSpan = 5;
    cell.className = "hint";
    cell.textContent = "None yet.";
    return void body.replaceChildren(none);
  }
  // Moving a row takes the focus out of it: only if the order has changed.
  if (rows.length !== before.length || rows.some((line, i) => line !== before[i])) {
    const focused = document.activeElement;
    body.replaceChildren(...rows);
    if (rows.some((line) => line.contains(focused))) focused.focus({ preventScroll: true });
  }
}

// -- one stream ---------------------------------------------------------------------------------

const share = (id, tokens) => (by(id).style.flexGrow = String(Math.max(tokens, 0)));

function drawStream() {
  const stream = streams.get(chosen);
  by("stream").hidden = !stream;
  if (!stream) return;
  const { position, evicted, cached } = now(stream);
  const sinksKept = stream.sink_tokens ?? 0;
  const stride = stream.sink_tokens === null ? 0 : stream.capacity - sinksKept - stream.sink_window;
  const sinks = Math.min(sinksKept, cached);
  // A token that was generated and is not computed yet counts as cached, and may be one too many.
  const free = Math.max(stream.capacity - cached, 0);
  by("stream-title").textContent = label(stream);
  by("stream-title").title = stream.id;

  share("bar-sinks", sinks);
  share("bar-evicted", evicted ? stride : 0);
  share("bar-window", cached - sinks);
  share("bar-free", free);
  const bar = by("cache");
  // New marks when something was evicted since the last look at the same stream.
  if (bar.dataset.id === stream.id && Number(bar.dataset.evicted) < evicted) flash(by("bar-evicted"));
  Object.assign(bar.dataset, { id: stream.id, evicted, position });
  const from = sinksKept + evicted - stride;
  by("cache-text").textContent =
    `The cache: ${show(sinks)} sink tokens, ${show(cached - sinks)} in the window, ` +
    `${show(free)} of ${show(stream.capacity)} free. ` +
    (evicted ? `Evicted last: tokens ${show(from)} to ${show(from + stride - 1)}.` : "Nothing is evicted yet.");

  share("whole-sinks", sinks);
  share("whole-evicted", evicted);
  share("whole-cached", cached - sinks);
  by("whole-text").textContent =
    `The stream: ${show(position)} tokens, ${(position / stream.capacity).toFixed(1)} times what ` +
    `is cached at most; ${show(evicted)} of them are evicted.`;

  const mine = running.has(chosen);
  by("send").disabled = stream.busy || mine;
  by("forget").disabled = stream.busy || mine;
  by("stop").disabled = !mine;
}

function flash(element) {
  element.classList.remove("flash");
  void element.offsetWidth; // so that the animation begins anew
  element.classList.add("flash");
}

function choose(id) {
  if (id === chosen) return;
  chosen = id;
  by("said").replaceChildren(...(saying.get(id) ?? []));
  by("turn").textContent = "";
  draw();
  by("stream-title").focus();
}

function draw() {
  drawList();
  drawStream();
}

// -- looking ------------------------------------------------------------------------------------

function remember(id) {
  made.add(id);
  sessionStorage.setItem("made", JSON.stringify([...made]));
}

function drop(id) {
  streams.delete(id);
  rates.delete(id);
  saying.delete(id);
  made.delete(id);
  sessionStorage.setItem("made", JSON.stringify([...made]));
  if (chosen === id) chosen = null;
}

async function lookAt(id) {
  try {
    observe(await api.get(id));
  } catch (failure) {
    if (failure.status !== 404) throw failure;
    drop(id);
  }
}

async function lookAtAll() {
  if (listed !== false) {
    try {
      const page = await api.list();
      const found = new Set(page.data.map((stream) => stream.id));
      const others = streams.has(chosen) && !found.has(chosen) ? streams.get(chosen) : null;
      streams.clear();
      page.data.forEach(observe);
      if (others) {
        observe(others);
        await lookAt(others.id);
      }
      listed = true;
      note(page.has_more ? "The 100 streams that were used last." : "");
      return;
    } catch (failure) {
      if (failure.status !== 403) throw failure;
      listed = false;
      note("This server checks no keys, so it lists no streams: here are those made or opened in this tab.");
    }
  }
  // One by one: what a server that lists nothing lets somebody see who knows the ids.
  for (const id of made) await lookAt(id);
}

function note(text) {
  by("list-note").textContent = text;
  by("list-note").hidden = !text;
}

/** Run what asks the server, and show what it says if it does not work. */
async function attempt(what) {
  try {
    await what();
    by("error").hidden = true;
    return true;
  } catch (failure) {
    if (!(failure instanceof api.Failure)) throw failure;
    const unknown = failure.status === 401;
    if (unknown) by("keys").hidden = false;
    if (unknown && !api.hasKey()) return false; // the field says it
    const text = unknown ? "The server does not take this key." : failure.message;
    if (by("error").textContent !== text) by("error").textContent = text;
    by("error").hidden = false;
    return false;
  }
}

let looking = null;

async function look() {
  clearTimeout(looking);
  const done = await attempt(lookAtAll);
  if (done) by("keys").hidden = true;
  const text = done ? `${streams.size === 1 ? "1 stream" : `${streams.size} streams`}` : "";
  if (by("connection").textContent !== text) by("connection").textContent = text;
  draw();
  clearTimeout(looking);
  looking = setTimeout(look, document.hidden ? LOOK_HIDDEN_EVERY : LOOK_EVERY);
}

async function lookClosely() {
  const id = chosen;
  if (id && !document.hidden && (streams.get(id)?.busy || running.has(id))) {
    const stream = await api.get(id).catch(() => null); // the list will say what is wrong
    if (stream && id === chosen) {
      observe(stream);
      draw();
    }
  }
  setTimeout(lookClosely, LOOK_CLOSELY_EVERY);
}

// -- appending ----------------------------------------------------------------------------------

/** A text on display; returns what adds to it, at once or with what comes within `SAY_EVERY`: a
 *  layout per token would leave the browser no time for anything else. */
function say(id, who, text) {
  const part = document.createElement("article");
  part.className = who;
  const name = document.createElement("h4");
  const title = who === "you" ? "Appended" : "Generated";
  name.textContent = title;
  const body = document.createElement("pre");
  const node = document.createTextNode("");
  body.append(node);
  part.append(name, body);
  const parts = saying.get(id) ?? [];
  saying.set(id, [...parts, part].slice(-MOST_TEXTS));
  const said = by("said");
  if (id === chosen) said.replaceChildren(...saying.get(id));
  let coming = text;
  const display = () => {
    const atEnd = said.scrollHeight - said.scrollTop - said.clientHeight < 40;
    node.appendData(coming);
    coming = "";
    if (node.length > MOST_CHARACTERS) {
      node.deleteData(0, node.length - MOST_CHARACTERS);
      name.textContent = `${title} (its end)`;
    }
    if (atEnd && id === chosen) said.scrollTop = said.scrollHeight;
  };
  display();
  return (more) => {
    if (more && !coming) setTimeout(display, SAY_EVERY);
    coming += more;
  };
}

function asked() {
  const content = by("content").value;
  const body = {};
  if (content && new FormData(by("append-form")).get("as") === "text") body.text = content;
  else if (content) body.messages = [{ role: "user", content }];
  if (by("generate").checked) {
    body.generate = { ignore_eos: by("ignore-end").checked };
    if (by("most").value) body.generate.max_tokens = by("most").valueAsNumber;
  }
  return body;
}

async function send() {
  const id = chosen;
  if (!id || running.has(id)) return;
  const body = asked();
  const stop = new AbortController();
  running.set(id, stop);
  const tell = (text) => id === chosen && (by("turn").textContent = text);
  tell("Appending …");
  drawStream();
  const content = by("content").value;
  const done = await attempt(async () => {
    try {
      let add = null;
      let since = performance.now();
      for await (const event of api.append(id, body, stop.signal)) {
        if (!add) {
          if (content) say(id, "you", content);
          if (id === chosen && by("content").value === content) by("content").value = "";
          tell(body.generate ? "The answer arrives …" : "Computing …");
          if (body.generate) add = say(id, "model", "");
          else add = () => {};
        }
        if (event.object === "stream.delta") add(event.text);
        else tell(account(event));
        if (performance.now() - since > WORK_AT_MOST) {
          await new Promise((resume) => setTimeout(resume));
          since = performance.now();
        }
      }
    } catch (error) {
      if (error.name !== "AbortError") throw error;
      tell("Stopped; what had arrived is part of the stream.");
    }
  });
  if (!done) tell("");
  running.delete(id);
  await look();
}

const account = ({ finish_reason, usage, stream }) =>
  `${show(usage.appended_tokens)} tokens appended` +
  (finish_reason ? `, ${show(usage.generated_tokens)} generated (${finish_reason})` : "") +
  `; ${show(stream.evicted)} of the stream's ${show(stream.position)} are evicted.`;

// -- what the user does -------------------------------------------------------------------------

const on = (id, event, what) =>
  by(id).addEventListener(event, (given) => {
    given.preventDefault();
    what();
  });

on("key-form", "submit", () => {
  api.useKey(by("key").value);
  by("key").value = "";
  listed = null;
  look();
});

on("new-form", "submit", () =>
  attempt(async () => {
    const system = by("system").value;
    const body = system ? { system } : {};
    if (system && by("pin").checked) body.sink_pin = "system";
    const stream = await api.create(body);
    remember(stream.id);
    observe(stream);
    choose(stream.id);
    by("making").open = false;
    by("content").focus();
  }),
);

on("open-form", "submit", () =>
  attempt(async () => {
    const stream = await api.get(by("open-id").value.trim());
    remember(stream.id);
    observe(stream);
    choose(stream.id);
    by("open-id").value = "";
  }),
);

on("append-form", "submit", send);
by("content").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    by("append-form").requestSubmit();
  }
});
on("stop", "click", () => running.get(chosen)?.abort());
on("forget", "click", async () => {
  if (!confirm("Forget this stream? It cannot be had back.")) return;
  const id = chosen;
  if (await attempt(() => api.forget(id))) drop(id);
  await look();
  by("list-title").scrollIntoView();
});
document.addEventListener("visibilitychange", () => document.hidden || look());

// A key behind the address (#key=…) is taken over, and leaves the address bar.
const given = new URLSearchParams(location.hash.slice(1)).get("key");
if (given) {
  api.useKey(given);
  history.replaceState(null, "", location.pathname);
}
look();
lookClosely();
