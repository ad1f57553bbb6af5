// The strip of pictures under the stage: every step as it comes, then the result and its samples.

export class Film {
  #list;
  #chosen;
  #held = false;

  /** `chosen(frame)` runs when a picture is to be shown on the stage. */
  constructor(list, chosen) {
    this.#list = list;
    this.#chosen = chosen;
    this.clear();
  }

  clear() {
    for (const image of this.#list.querySelectorAll("img")) URL.revokeObjectURL(image.src);
    this.#list.replaceChildren();
    this.#list.hidden = true;
    this.#held = false;
  }

  /**
   * Add a picture, {blob, label, description} and what else the caller wants to find in its frame. With `show` "always"
   * it goes on the stage, with "unless-picked" where the user has picked no earlier one, with "never" it waits.
   */
  add(picture, show = "unless-picked") {
    const image = new Image();
    image.src = URL.createObjectURL(picture.blob);
    image.alt = "";
    const caption = document.createElement("span");
    caption.textContent = picture.label;
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", picture.description);
    button.setAttribute("aria-pressed", "false");
    button.append(image, caption);
    const frame = { ...picture, image, button };
    button.addEventListener("click", () => {
      this.#held = true;
      this.#show(frame);
    });
    const item = document.createElement("li");
    item.append(button);
    this.#list.append(item);
    this.#list.hidden = false;
    if (show === "always") this.#held = false;
    if (show === "always" || (show === "unless-picked" && !this.#held)) this.#show(frame);
    return frame;
  }

  #show(frame) {
    for (const button of this.#list.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", button === frame.button);
    }
    const { offsetLeft, offsetWidth } = frame.button;
    this.#list.scrollLeft = offsetLeft + offsetWidth / 2 - this.#list.clientWidth / 2; // never the page itself
    this.#chosen(frame);
  }
}
