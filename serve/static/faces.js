// Boxes of the found faces: toggle buttons over the photo, pressed where a face is to be restored.

const MOST = 64; // boxes of one request

export class Faces {
  #layer;
  #changed;
  #buttons = [];
  #faces = [];

  /** `changed()` runs after every choice. */
  constructor(layer, changed) {
    this.#layer = layer;
    this.#changed = changed;
  }

  /** Draw the faces of a photo of this size; those that the server would leave alone are not chosen. */
  open({ width, height, faces }) {
    this.#faces = faces;
    this.#buttons = faces.map((face, number) => {
      const [left, top, wide, high] = face.box;
      const button = document.createElement("button");
      button.type = "button";
      button.className = "face";
      const place = { "--left": left / width, "--top": top / height, "--wide": wide / width, "--high": high / height };
      for (const [name, share] of Object.entries(place)) button.style.setProperty(name, share);
      const about = `Face ${number + 1} of ${faces.length}, ${Math.round(Math.max(wide, high))} px`;
      button.setAttribute("aria-label", face.reason ? `${about}; ${face.reason}` : about);
      button.title = face.reason ?? "";
      button.addEventListener("click", () => this.#toggle(button));
      press(button, !face.reason);
      return button;
    });
    this.#layer.replaceChildren(...this.#buttons);
  }

  clear() {
    this.open({ width: 1, height: 1, faces: [] });
  }

  get count() {
    return this.#faces.length;
  }

  get chosen() {
    return this.#faces.filter((_, number) => isPressed(this.#buttons[number]));
  }

  /** What to send: nothing where the choice is the server's own. */
  get boxes() {
    return this.#isOwn ? [] : this.chosen.map((face) => face.box.join(","));
  }

  /** Why this choice cannot be sent; empty where it can. */
  get refusal() {
    if (this.count && !this.chosen.length) return "Choose at least one face.";
    return this.#isOwn || this.chosen.length <= MOST ? "" : `Choose at most ${MOST} faces.`;
  }

  chooseAll() {
    for (const button of this.#buttons) press(button, true);
    this.#changed();
  }

  get #isOwn() {
    return this.#faces.every((face, number) => isPressed(this.#buttons[number]) === !face.reason);
  }

  #toggle(button) {
    press(button, !isPressed(button));
    this.#changed();
  }
}

function isPressed(button) {
  return button.getAttribute("aria-pressed") === "true";
}

function press(button, pressed) {
  button.setAttribute("aria-pressed", pressed);
}
