// The routes of /v1/streams, as the page asks for them.

/** An answer that is none: its status (0: no answer at all) and one sentence. */
export class Failure extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let key = sessionStorage.getItem("key") ?? "";

export function useKey(value) {
  key = value;
  sessionStorage.setItem("key", value);
}

export const hasKey = () => key !== "";

async function ask(method, path, body, signal) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, "The server does not answer.");
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  throw new Failure(answer.status, said.error?.message ?? `The server answers ${answer.status}.`);
}

const json = async (...request) => (await ask(...request)).json();
const at = (id) => `v1/streams/${encodeURIComponent(id)}`;

export const list = () => json("GET", "v1/streams?limit=100");
export const get = (id) => json("GET", at(id));
export const create = (body) => json("POST", "v1/streams", body);
export const forget = (id) => json("DELETE", at(id));

/** Append; yields the events of the answer as they arrive, the account of the turn last. */
export async function* append(id, body, signal) {
  const answer = await ask("POST", `${at(id)}/append`, { ...body, stream: true }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Failure(0, "The connection has ended before the answer did.");
    });
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: {")) continue; // a sign of life, or the end
      const parsed = JSON.parse(event.slice("data: ".length));
      if (parsed.error) throw new Failure(parsed.error.code, parsed.error.message);
      yield parsed;
    }
  }
}
