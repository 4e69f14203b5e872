// The page at /streams: looks at the server's streams again and again, and appends to one of them.
import * as api from "./api.js";
import * as drawing from "./draw.js";
import { by, show } from "./elements.js";
import { forgetSaid, say, showSaid } from "./said.js";
import { drop as dropStream, observe, streams } from "./streams.js";

const LOOK_EVERY = 1000; // ms; the stream on display more often while it generates
const LOOK_CLOSELY_EVERY = 300;
const LOOK_HIDDEN_EVERY = 10000;
const WORK_AT_MOST = 20; // on what arrives, before the browser has its turn

const made = new Set(JSON.parse(sessionStorage.getItem("made") ?? "[]"));
const running = new Map(); // id: how to stop the turn that this page has begun
let chosen = null;
let listed = null; // whether the server lists its streams; null before it was asked

function choose(id) {
  if (id === chosen) return;
  chosen = id;
  showSaid(id);
  by("turn").textContent = "";
  draw();
  by("stream-title").focus();
}

function draw() {
  drawing.drawList(chosen, choose);
  drawStream();
}

const drawStream = () => drawing.drawStream(chosen, running.has(chosen));

// -- looking ------------------------------------------------------------------------------------

function remember(id) {
  made.add(id);
  sessionStorage.setItem("made", JSON.stringify([...made]));
}

function drop(id) {
  dropStream(id);
  forgetSaid(id);
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
