// The texts of a stream that this page has seen.
import { by } from "./elements.js";

const SAY_EVERY = 50; // ms
const MOST_CHARACTERS = 20000; // of one text on display
const MOST_TEXTS = 40;

const said = by("said");
const saying = new Map(); // id: the nodes of what was said
let shown = null;

/** Show the texts of a stream instead of another's. */
export function showSaid(id) {
  shown = id;
  said.replaceChildren(...(saying.get(id) ?? []));
}

export const forgetSaid = (id) => saying.delete(id);

/** A text on display; returns what adds to it, at once or with what comes within `SAY_EVERY`: a
 *  layout per token would leave the browser no time for anything else. */
export function say(id, who, text) {
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
  if (id === shown) said.replaceChildren(...saying.get(id));
  let coming = text;
  const display = () => {
    const atEnd = said.scrollHeight - said.scrollTop - said.clientHeight < 40;
    node.appendData(coming);
    coming = "";
    if (node.length > MOST_CHARACTERS) {
      node.deleteData(0, node.length - MOST_CHARACTERS);
      name.textContent = `${title} (its end)`;
    }
    if (atEnd && id === shown) said.scrollTop = said.scrollHeight;
  };
  display();
  return (more) => {
    if (more && !coming) setTimeout(display, SAY_EVERY);
    coming += more;
  };
}
