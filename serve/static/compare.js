// Before and after on one stage, with a divider that pointer, touch and keyboard move.

const DRAG = 4; // px from which a press is a drag, and no click on what lies under it

export class Compare {
  #stage;
  #before;
  #after;
  #split;
  #shown = 0;

  constructor(stage) {
    this.#stage = stage;
    this.#before = stage.querySelector("#before");
    this.#after = stage.querySelector("#after");
    this.#split = stage.querySelector("#split");
    this.#split.addEventListener("input", () => this.#moved());
    stage.addEventListener("pointerdown", (down) => this.#pressed(down));
    stage.addEventListener("dragstart", (event) => event.preventDefault());
    this.clear();
  }

  /** Show a photo alone. */
  open({ url, width, height, name }) {
    this.clear();
    this.#before.src = url;
    this.#before.alt = `${name}, before the restoration`;
    this.#stage.style.setProperty("--ratio", width / height);
    this.#stage.style.setProperty("--natural", `${width}px`);
  }

  /** Take the restored side away. */
  clear() {
    this.#shown++;
    this.#after.hidden = true;
    this.#after.removeAttribute("src");
    this.#stage.classList.remove("comparing");
    this.#split.disabled = true;
  }

  /** Put a picture on the restored side; one that was asked for earlier never replaces a later one. */
  async show(image, description) {
    const turn = ++this.#shown;
    await image.decode();
    if (turn !== this.#shown) return;
    this.#after.src = image.src;
    this.#after.alt = description;
    if (!this.#after.hidden) return;
    this.#after.hidden = false;
    this.#stage.classList.add("comparing");
    this.#split.disabled = false;
    this.#split.value = 50;
    this.#moved();
  }

  #moved() {
    const value = Number(this.#split.value);
    this.#stage.style.setProperty("--split", `${value}%`);
    this.#split.setAttribute("aria-valuetext", `${value} % before, ${100 - value} % after`);
  }

  #pressed(down) {
    if (this.#split.disabled || down.button !== 0) return;
    const stop = new AbortController();
    const on = (name, listener) => this.#stage.addEventListener(name, listener, { signal: stop.signal });
    const onButton = down.target.closest("button");
    const follow = (event) => {
      const { left, width } = this.#stage.getBoundingClientRect();
      this.#split.value = Math.round(((event.clientX - left) / width) * 100);
      this.#moved();
    };
    let dragging = false;
    on("pointermove", (move) => {
      if (move.pointerId !== down.pointerId) return;
      if (!dragging && Math.abs(move.clientX - down.clientX) >= DRAG) {
        dragging = true;
        this.#stage.classList.add("dragging");
        this.#stage.setPointerCapture(down.pointerId); // so that no button gets the click that ends it
      }
      if (dragging) follow(move);
    });
    const end = (event) => {
      if (event.pointerId !== down.pointerId) return;
      stop.abort();
      this.#stage.classList.remove("dragging");
      if (event.type === "pointerup" && !dragging && !onButton) follow(event);
      if (event.type === "pointerup" && !onButton) this.#split.focus({ preventScroll: true });
    };
    on("pointerup", end);
    on("pointercancel", end);
  }
}
