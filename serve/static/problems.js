// Problems in words: what happened, and what to do next.

const ACTIONS = { again: "Try again", choose: "Choose another photo" };

/** {title, text, errors, action: [name, label] or null} for a Problem; `limits` are the server's, or null. */
export function wordsFor({ kind, title, detail, retryAfter, errors }, limits) {
  const deadline = limits?.deadline_seconds ? ` after ${limits.deadline_seconds} s` : "";
  const known = {
    "not-an-image": ["This is not an image", detail, "choose"],
    "bad-image": ["This image cannot be used", detail || "It may be damaged.", "choose"],
    "unsupported-media": ["This kind of file is not supported", detail || "Use PNG, JPEG or WebP.", "choose"],
    "too-large": ["This photo is too large", detail || "Make it smaller.", "choose"],
    "bad-options": ["These settings cannot be used", errors?.length ? "" : detail, null],
    unauthorized: ["This server needs an API key", "Enter yours above. It is kept in this tab only.", null],
    refused: ["The server does not know this API key", "Check it for missing characters, and enter it again.", null],
    forbidden: ["This is not allowed", detail, null],
    "rate-limited": ["Too many requests", later(retryAfter), "again"],
    overloaded: ["The server is busy", later(retryAfter), "again"],
    "not-ready": ["The server is starting", "Its model is being loaded.", "again"],
    deadline: ["This took too long", `The server stops${deadline}. Use fewer steps, or a smaller photo.`, "again"],
    timeout: ["The upload was too slow", "The server gave up waiting for it. A smaller file may do.", "again"],
    network: ["The server cannot be reached", "Check your connection.", "again"],
    cut: ["The connection was cut", "The server stopped answering before the result was there.", "again"],
  };
  const other = [title || "Something went wrong", detail || "The server could not finish.", "again"];
  const [heading, text, action] = known[kind] ?? other;
  return { title: heading, text, errors: errors ?? [], action: action && [action, ACTIONS[action]] };
}

function later(seconds) {
  if (!seconds) return "Try again in a moment.";
  return `Try again in ${seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.ceil(seconds / 60)} minutes`}.`;
}

/** A problem where it is read out: a heading, a text, and one button at most. `act(name)` runs when it is pressed. */
export function showProblem(box, problem, limits, act) {
  const { title, text, errors, action } = wordsFor(problem, limits);
  const parts = [element("h2", title)];
  if (text) parts.push(element("p", text));
  if (errors.length) {
    const list = document.createElement("ul");
    list.append(...errors.map(({ field, message }) => element("li", field ? `${field}: ${message}` : message)));
    parts.push(list);
  }
  if (problem.requestId) parts.push(element("p", `Request ${problem.requestId}`, "hint"));
  if (action) {
    const button = element("button", action[1], "button");
    button.type = "button";
    button.addEventListener("click", () => act(action[0]));
    parts.push(button);
  }
  box.replaceChildren(...parts);
  box.hidden = false;
}

function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}
