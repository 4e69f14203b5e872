// The list of streams, and one of them as a bar of its cache.
import { by, show } from "./elements.js";
import { label, now, rate, streams } from "./streams.js";

function row(id, choose) {
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

/** Rows are changed in place, so that the focus stays where it is. `choose` gets the id of one that is clicked. */
export function drawList(chosen, choose) {
  const rows = [...streams.values()].map((stream) => {
    const line = row(stream.id, choose);
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

const share = (id, tokens) => (by(id).style.flexGrow = String(Math.max(tokens, 0)));

/** `mine`: this page has begun the turn that is in progress. */
export function drawStream(chosen, mine) {
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

  by("send").disabled = stream.busy || mine;
  by("forget").disabled = stream.busy || mine;
  by("stop").disabled = !mine;
}

function flash(element) {
  element.classList.remove("flash");
  void element.offsetWidth; // so that the animation begins anew
  element.classList.add("flash");
}
