// The form of settings, and the options that it stands for.

const SEEDS = 2 ** 31;
const DEFAULTS = { steps: 8, condition_scale: 1 }; // what the sliders show until the server tells its own

export class Settings {
  #form;
  #defaults = DEFAULTS;
  #touched = new Set();
  picked; // the mode that the user chose, if any; samples bring one of their own

  /** `changed()` runs after every change. */
  constructor(form, changed) {
    this.#form = form;
    this.#write();
    form.addEventListener("input", (event) => {
      if (event.target.name === "mode") this.picked = this.mode;
      else this.#touched.add(event.target.id);
      this.#label();
      changed();
    });
    this.#field("another-seed").addEventListener("click", () => {
      this.#field("seed").value = Math.floor(Math.random() * SEEDS);
      this.#touched.add("seed");
      changed();
    });
  }

  /** Take the server's own defaults, where nothing was changed yet. */
  adopt({ defaults }) {
    this.#defaults = { ...DEFAULTS, ...known(defaults) };
    this.#write();
  }

  limit({ max_samples, max_steps }) {
    if (max_steps) this.#field("steps").max = max_steps;
    this.#field("samples-wanted").max = max_samples;
    this.#field("samples-wanted").closest(".field").hidden = max_samples < 2;
    this.#label();
  }

  get mode() {
    return this.#form.elements.mode.value;
  }

  set mode(mode) {
    this.#form.elements.mode.value = mode;
    this.#label();
  }

  /** The options of a request; what is the server's default is left to it. */
  get options() {
    const number = (id) => Number(this.#field(id).value);
    const options = { mode: this.mode, seed: number("seed") };
    if (this.#touched.has("steps")) options.steps = number("steps");
    if (this.#touched.has("fidelity")) options.condition_scale = number("fidelity");
    if (this.mode === "photo" && number("strength") !== 100) options.strength = number("strength") / 100;
    if (number("samples-wanted") > 1 && number("steps") > 0) options.samples = number("samples-wanted");
    return options;
  }

  #field(id) {
    return this.#form.querySelector(`#${id}`);
  }

  #write() {
    const { steps, condition_scale: fidelity } = this.#defaults;
    const values = { steps, fidelity, strength: 100, "samples-wanted": 1, seed: 0 };
    for (const [id, value] of Object.entries(values)) if (!this.#touched.has(id)) this.#field(id).value = value;
    this.#label();
  }

  #label() {
    const texts = {
      steps: (value) => (value === 0 ? "none, the first stage alone" : value),
      fidelity: (value) => value.toFixed(1),
      strength: (value) => `${value} %`,
      "samples-wanted": (value) => value,
    };
    for (const [id, text] of Object.entries(texts)) {
      const field = this.#field(id);
      const value = Number(field.value);
      this.#field(`${id}-value`).textContent = text(value);
      field.setAttribute("aria-valuetext", text(value));
      field.style.setProperty("--filled", (value - field.min) / (field.max - field.min || 1));
    }
    this.#field("strength-field").hidden = this.mode !== "photo";
  }
}

function known(values) {
  return Object.fromEntries(Object.entries(values ?? {}).filter(([, value]) => value !== null && value !== undefined));
}
