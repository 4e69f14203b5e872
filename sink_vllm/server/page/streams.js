// What the server has said of its streams, and what follows from it.
import { show } from "./elements.js";

const RATE_OVER = 3; // seconds

/** What the server said last, by id, in the order of the list. */
export const streams = new Map();
const rates = new Map(); // id: what was generated when, newest last

/** Position, evicted and cached as they are now, also in the middle of a turn. */
export const now = (stream) => stream.turn ?? stream;

export function observe(stream) {
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

export function rate(stream) {
  if (!stream.busy) return "–";
  const seen = rates.get(stream.id);
  if (!seen?.length) return "computing";
  const last = seen.at(-1);
  const first = seen.length > 1 ? seen[0] : { seconds: 0, tokens: 0 };
  const seconds = last.seconds - first.seconds;
  return seconds > 0 ? show(Math.round((last.tokens - first.tokens) / seconds)) : "…";
}

export function drop(id) {
  streams.delete(id);
  rates.delete(id);
}

export const label = (stream) =>
  stream.metadata.name ?? `${stream.id.slice(0, 13)}…${stream.id.slice(-4)}`;
