// The API key: asked for where the server wants one, and kept for this tab alone.

const NAME = "ldbfr-key";

export class KeyField {
  #api;
  #form = document.getElementById("key-form");
  #field = document.getElementById("key");
  #known = document.getElementById("key-known");

  /** Give `api` the tab's key; `changed()` runs when another is given or this one forgotten. */
  constructor(api, changed) {
    this.#api = api;
    api.key = kept();
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#set(this.#field.value.trim());
      this.#field.value = "";
      changed();
    });
    document.getElementById("forget-key").addEventListener("click", () => {
      this.#set("");
      this.#field.focus();
      changed();
    });
  }

  /** Show the field, or that there is a key, where keys matter. */
  show(isWanted) {
    this.#form.hidden = !isWanted || this.#api.key !== "";
    this.#known.hidden = !isWanted || this.#api.key === "";
  }

  /** Show the field and go there, whatever key there is. */
  ask() {
    this.#form.hidden = false;
    this.#known.hidden = true;
    this.#field.focus();
  }

  #set(key) {
    this.#api.key = key;
    keep(key);
    this.show(true);
  }
}

// A browser that blocks storage throws; the key then lasts as long as the page.

function kept() {
  try {
    return sessionStorage.getItem(NAME) ?? "";
  } catch {
    return "";
  }
}

function keep(key) {
  try {
    if (key) sessionStorage.setItem(NAME, key);
    else sessionStorage.removeItem(NAME);
  } catch {
    // see above
  }
}
