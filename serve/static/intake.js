// The ways in which a photo comes: chosen, dropped, pasted, or one of the samples.

import { Problem } from "./api.js";

/** `take(file, mode)` gets every photo, `mode` is set for samples alone; `fail(problem)` is told what went wrong. */
export function takeFiles(take, fail) {
  const input = document.getElementById("file");
  for (const id of ["choose", "choose-another"]) {
    document.getElementById(id).addEventListener("click", () => input.click());
  }
  input.addEventListener("change", () => {
    const [file] = input.files;
    input.value = ""; // so that the same file can be chosen again
    if (file) take(file);
  });
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData?.files ?? [];
    if (!file) return;
    event.preventDefault();
    take(file);
  });
  takeDrops(take);
  for (const button of document.querySelectorAll(".sample")) {
    button.addEventListener("click", () => sample(button).then((file) => take(file, button.dataset.mode), fail));
  }
}

function takeDrops(take) {
  const veil = document.getElementById("dropping");
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    veil.classList.add("shown");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) veil.classList.remove("shown"); // it left the window
  });
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    veil.classList.remove("shown");
    const [file] = event.dataTransfer.files;
    if (file) take(file);
  });
}

async function sample(button) {
  const { src } = button.querySelector("img");
  try {
    const response = await fetch(src);
    if (!response.ok) throw new Problem("not-found", { detail: `${src} is not there.` });
    return new File([await response.blob()], src.split("/").pop());
  } catch (error) {
    if (error instanceof Problem) throw error;
    throw new Problem("network", { detail: error.message });
  }
}
