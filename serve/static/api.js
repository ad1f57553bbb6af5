// The endpoint's HTTP side as the page needs it. Every failure is a Problem.

import { events } from "./sse.js";

const HOME = new URL("../v1/", import.meta.url); // the page may be served under a prefix
const KIND_OF_STATUS = {
  // of answers that come from a proxy in between
  401: "unauthorized",
  408: "timeout",
  413: "too-large",
  429: "rate-limited",
  502: "overloaded",
  503: "overloaded",
  504: "deadline",
};

/**
 * What went wrong. `kind` is the last part of the problem's type, or "network" (no answer at all) or "cut" (an answer
 * that stopped before its end); `retryAfter` is in seconds, or null.
 */
export class Problem extends Error {
  constructor(kind, { title = "", detail = "", retryAfter = null, requestId = "", errors = [] } = {}) {
    super(detail || title || kind);
    Object.assign(this, { kind, title, detail, retryAfter, requestId, errors });
  }
}

export class Api {
  constructor() {
    this.key = "";
  }

  limits() {
    return this.#json("limits");
  }

  async model() {
    return (await this.#json("models")).models[0];
  }

  /** The faces of a photo: {width, height, faces}. */
  faces(photo, signal) {
    return this.#json("faces", { method: "POST", ...upload(photo), signal });
  }

  /** The events of a restoration, {event: "preview" | "result", data}; it ends with the result or throws. */
  async *restore(photo, options, signal) {
    const asked = { method: "POST", ...upload(photo), signal, accept: "text/event-stream" };
    const response = await this.#ask(`restorations/stream?${queryOf(options)}`, asked);
    try {
      for await (const { event, data } of events(response.body)) {
        const values = JSON.parse(data);
        if (event === "error") throw problemOf(values, null);
        yield { event, data: values };
        if (event === "result") return;
      }
    } catch (error) {
      if (error instanceof Problem || signal.aborted) throw error;
      throw new Problem("cut", { detail: String(error.message) });
    }
    throw new Problem("cut");
  }

  async #json(path, options) {
    const response = await this.#ask(path, options);
    try {
      return await response.json();
    } catch (error) {
      if (options?.signal?.aborted) throw error;
      throw new Problem("cut", { detail: String(error.message) });
    }
  }

  async #ask(path, { method = "GET", body, type, signal, accept = "application/json" } = {}) {
    const headers = { Accept: accept };
    if (type) headers["Content-Type"] = type;
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    let response;
    try {
      response = await fetch(new URL(path, HOME), { method, body, headers, signal, cache: "no-store" });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new Problem("network", { detail: String(error.message) });
    }
    if (response.ok) return response;
    const values = await response.json().catch(() => ({})); // a proxy in between answers with a page of its own
    throw problemOf({ status: response.status, ...values }, response.headers);
  }
}

function upload({ file, type }) {
  return { body: file, type };
}

function queryOf(options) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(options)) {
    for (const one of Array.isArray(value) ? value : [value]) query.append(name, one);
  }
  return query;
}

function problemOf(values, headers) {
  const named = String(values.type ?? "").split("/problems/")[1];
  return new Problem(named || KIND_OF_STATUS[values.status] || "internal", {
    title: values.title,
    detail: values.detail,
    retryAfter: secondsOf(headers?.get("Retry-After") ?? values.retry_after),
    requestId: values.request_id ?? headers?.get("X-Request-Id") ?? "",
    errors: values.errors,
  });
}

/** Retry-After has seconds or a date. */
function secondsOf(text) {
  if (text === undefined || text === null || text === "") return null;
  const seconds = Number.isNaN(Number(text)) ? (Date.parse(text) - Date.now()) / 1000 : Number(text);
  return Number.isFinite(seconds) ? Math.max(0, seconds) : null;
}
