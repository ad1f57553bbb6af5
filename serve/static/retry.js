// Asking again where the server says that it has no room now.

import { Problem } from "./api.js";

const WORTH_IT = new Set(["rate-limited", "overloaded", "not-ready"]);
const TRIES = 6;
const LONGEST = 120; // seconds: who has to wait longer is told so at once

/**
 * Run `work` until it succeeds or fails for good. Before another try `wait(problem, seconds)` is awaited.
 */
export async function persist(work, wait, signal) {
  for (let tries = 1; ; tries++) {
    try {
      return await work();
    } catch (problem) {
      const again = problem instanceof Problem && WORTH_IT.has(problem.kind) && tries < TRIES;
      if (!again || (problem.retryAfter ?? 0) > LONGEST || signal.aborted) throw problem;
      await wait(problem, Math.max(1, Math.ceil(problem.retryAfter ?? 2 ** (tries - 1))));
      signal.throwIfAborted();
    }
  }
}

/** Count seconds down to zero: `tell(left)` at once and every second. `skip` is a signal that ends the wait. */
export async function countdown(seconds, tell, skip) {
  const end = performance.now() + seconds * 1000;
  for (let left = seconds; left > 0 && !skip.aborted; left = Math.ceil((end - performance.now()) / 1000)) {
    tell(left);
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, Math.min(1000, Math.max(0, end - performance.now())));
      skip.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
    });
  }
}
