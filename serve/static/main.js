// The page: one photo, its faces, and at most one restoration at a time.

import { Api, Problem } from "./api.js";
import { Compare } from "./compare.js";
import { Faces } from "./faces.js";
import { Film } from "./film.js";
import { KeyField } from "./key.js";
import { takeFiles } from "./intake.js";
import { blobOf, downloadName, drawMap, megabytes, megapixels, photoOf } from "./pictures.js";
import { showProblem, wordsFor } from "./problems.js";
import { countdown, persist } from "./retry.js";
import { Settings } from "./settings.js";

const at = (id) => document.getElementById(id);

const api = new Api();
const compare = new Compare(at("stage"));
const faces = new Faces(at("faces"), update);
const film = new Film(at("film"), shown);
const settings = new Settings(at("settings"), update);
const key = new KeyField(api, keyChanged);

let limits = null; // as the server tells them, null as long as it has not
let photo = null;
let looking = null; // AbortController of the search for the photo's faces, kept when it is over
let hasFaces = false; // whether that search is over, and went well
let run = null; // AbortController of the restoration that is going on
let result = null; // {asked, timing} of the last one
let turn = 0; // counts the photos taken: what belongs to an earlier one is dropped

// ---- the server ----

async function meetServer() {
  try {
    limits ??= await api.limits();
    settings.limit(limits);
    key.show(limits.auth);
    const most = `${megabytes(limits.max_body_bytes)} and ${megapixels(limits.max_pixels)}`;
    at("accepted").textContent = `PNG, JPEG or WebP, up to ${most}`;
  } catch (error) {
    if (!(error instanceof Problem)) throw error; // the restoration will say what is wrong
  }
  if (!(limits?.auth && !api.key)) await meetModel();
}

async function meetModel() {
  try {
    const model = await api.model();
    settings.adopt(model);
    const about = [`Model ${model.name}`, `weights ${model.weights_digest.slice(0, 12)}`, model.license];
    at("model").textContent = about.filter(Boolean).join(", ");
  } catch (error) {
    if (!(error instanceof Problem)) throw error; // the sliders keep what they show, and are not sent
  }
}

function keyChanged() {
  at("problem").hidden = true;
  if (!api.key) return;
  meetModel();
  if (photo && !run) restore();
}

// ---- a photo ----

async function take(file, mode) {
  const mine = ++turn;
  at("problem").hidden = true;
  try {
    await meeting;
    if (!limits) await meetServer();
    const taken = await photoOf(file, limits);
    if (mine !== turn) URL.revokeObjectURL(taken.url);
    else open(taken, mode);
  } catch (error) {
    if (mine === turn) fail(error);
  }
}

function open(taken, mode) {
  run?.abort();
  looking?.abort();
  if (photo) URL.revokeObjectURL(photo.url);
  photo = taken;
  looking = result = null;
  hasFaces = false;
  film.clear();
  faces.clear();
  compare.open(photo);
  clearExtras();
  settings.mode = mode ?? settings.picked ?? "photo";
  at("photo-name").textContent = photo.name;
  at("photo-size").textContent = `${photo.width.toLocaleString("en")} × ${photo.height.toLocaleString("en")} px`;
  at("start").hidden = true;
  at("work").hidden = false;
  document.body.classList.add("working");
  tell("");
  at("photo-name").focus();
  update();
  restore();
}

/** Find the faces of the photo, once, beside the restoration. */
async function find() {
  if (looking) return;
  const { signal } = (looking = new AbortController());
  const search = () => api.faces(photo, signal);
  const wait = (_, seconds) => countdown(seconds, () => {}, signal);
  try {
    const found = await persist(search, wait, signal);
    if (!signal.aborted && !hasFaces) showFaces(found); // else the result was faster, and knows them too
  } catch (error) {
    if (!signal.aborted && !(error instanceof Problem)) throw error; // the restoration meets the same and shows it
  }
}

function showFaces(found) {
  hasFaces = true;
  faces.open(found);
  update();
}

// ---- a restoration ----

async function restore() {
  if (limits?.auth && !api.key) return fail(new Problem("unauthorized"));
  run?.abort();
  at("problem").hidden = true;
  const mine = (run = new AbortController());
  const asked = wanted();
  const started = performance.now();
  tell("Sending the photo");
  announce("Restoring");
  at("progress").removeAttribute("value");
  update();
  swapFocus(at("restore"), at("cancel"));
  bringIntoView(at("stage"));
  if (asked.mode === "photo") find();
  const attempt = () => follow(asked, started, mine.signal);
  const wait = (problem, seconds) => waitFor(problem, seconds, mine.signal);
  try {
    await persist(attempt, wait, mine.signal);
  } catch (error) {
    if (!mine.signal.aborted) {
      tell("Not restored");
      fail(error);
    }
  }
  if (run !== mine) return;
  run = null;
  update();
  swapFocus(at("cancel"), at(result ? "download" : "restore"));
}

async function follow(asked, started, signal) {
  let isFirst = true;
  for await (const { event, data } of api.restore(photo, asked, signal)) {
    if (isFirst) {
      film.clear();
      clearExtras();
      result = null;
      isFirst = false;
    }
    if (event === "preview") showPreview(data);
    if (event === "result") await showResult(data, asked, (performance.now() - started) / 1000, signal);
  }
}

function showPreview({ step, steps, image }) {
  const name = step === 0 ? "First stage" : `Step ${step} of ${steps}`;
  film.add({ blob: blobOf(image, "image/jpeg"), label: step === 0 ? "First" : step, description: name });
  tell(name);
  if (step === 0 || Math.floor((step * 4) / steps) > Math.floor(((step - 1) * 4) / steps)) announce(name);
  at("progress").value = (step + 1) / (steps + 1);
  update();
}

async function showResult(data, asked, seconds, signal) {
  const picture = (base64, number) => {
    const label = number === 1 ? "Result" : `Sample ${number}`;
    const name = number === 1 ? photo.name : photo.name.replace(/(\.[^.]*)?$/, `-sample-${number}$1`);
    const blob = blobOf(base64, data.media_type);
    return { blob, label, description: label, download: downloadName(name, data.media_type) };
  };
  film.add(picture(data.image, 1), "always");
  for (const [place, sample] of data.samples.slice(1).entries()) film.add(picture(sample, place + 2), "never");
  if (data.uncertainty) await showUncertainty(data.uncertainty);
  if (signal.aborted) return;
  result = { asked: JSON.stringify(asked) };
  if (!hasFaces && asked.mode === "photo") showFaces({ ...photo, faces: data.faces });
  at("notes").textContent = data.notes ?? "";
  at("notes").hidden = !data.notes;
  const restored = data.faces.filter((face) => face.outcome === "restored").length;
  const count = asked.mode === "photo" ? `, ${restored} of ${plural(data.faces.length, "face")}` : "";
  tell(`Restored in ${seconds.toFixed(1)} s${count}`);
  announce(`Restored in ${seconds.toFixed(1)} seconds${count}`);
}

async function showUncertainty(base64) {
  const url = URL.createObjectURL(blobOf(base64, "image/png"));
  try {
    await drawMap(at("uncertainty"), url);
  } finally {
    URL.revokeObjectURL(url);
  }
  at("show-uncertainty").hidden = false;
}

async function waitFor(problem, seconds, signal) {
  const { title } = wordsFor(problem, limits);
  const skip = new AbortController();
  signal.addEventListener("abort", () => skip.abort(), { once: true });
  at("try-now").onclick = () => skip.abort();
  at("try-now").hidden = false;
  at("progress").removeAttribute("value");
  announce(`${title}. Trying again in ${seconds} seconds.`);
  await countdown(seconds, (left) => tell(`${title}. Trying again in ${left} s.`), skip.signal);
  swapFocus(at("try-now"), at("cancel"));
  at("try-now").hidden = true;
  if (!signal.aborted) tell("Sending the photo");
}

function cancel() {
  run?.abort();
  tell("Cancelled");
  announce("Cancelled");
}

// ---- what is shown ----

function wanted() {
  const options = settings.options;
  const boxes = options.mode === "photo" ? faces.boxes : [];
  return boxes.length ? { ...options, boxes } : options;
}

/** A picture of the strip goes on the stage. */
function shown(frame) {
  compare.show(frame.image, `${frame.description} of ${photo.name}`);
  if (!frame.download) return;
  at("download").href = frame.image.src;
  at("download").download = frame.download;
}

function update() {
  const isPhoto = settings.mode === "photo";
  if (isPhoto && photo && !(limits?.auth && !api.key)) find();
  const chosen = faces.chosen.length;
  const isStale = result !== null && result.asked !== JSON.stringify(wanted());
  const refusal = isPhoto ? faces.refusal : "";

  at("faces").hidden = !isPhoto || !faces.count || at("show-faces").getAttribute("aria-pressed") !== "true";
  at("show-faces").hidden = !isPhoto || !faces.count;
  at("face-line").hidden = !isPhoto || !hasFaces;
  at("face-count").textContent = faces.count
    ? `${chosen} of ${plural(faces.count, "face")} chosen`
    : "No face was found.";
  at("all-faces").hidden = chosen === faces.count;
  at("as-aligned").hidden = faces.count > 0;

  at("download").hidden = run !== null || result === null;
  at("cancel").hidden = at("progress").hidden = run === null;
  at("restore").disabled = run !== null || refusal !== "";
  at("restore").textContent = run ? "Restoring" : result ? "Restore again" : "Restore";
  at("restore").classList.toggle("primary", !result || isStale);
  at("download").classList.toggle("primary", !isStale);
  at("stale").textContent = refusal || (isStale ? "Changed since this result." : "");
  at("stale").hidden = !at("stale").textContent;
}

function clearExtras() {
  for (const id of ["show-uncertainty", "uncertainty", "legend", "notes"]) at(id).hidden = true;
  at("show-uncertainty").setAttribute("aria-pressed", "false");
}

function fail(error) {
  if (!(error instanceof Problem)) throw error;
  const asksForKey = error.kind === "unauthorized";
  if (asksForKey && api.key) error.kind = "refused";
  const acts = { again: restore, choose: () => at("file").click() };
  showProblem(at("problem"), error, limits, (action) => acts[action]());
  if (asksForKey) key.ask();
  bringIntoView(at("problem"));
}

function tell(text) {
  at("state").textContent = text;
}

function announce(text) {
  at("announcement").textContent = text;
}

function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/** A button that goes away hands the focus on. */
function swapFocus(from, to) {
  if (document.activeElement === from || document.activeElement === document.body) to.focus({ preventScroll: true });
}

function bringIntoView(element) {
  element.scrollIntoView({ block: "nearest" });
}

function toggle(button, changed) {
  button.addEventListener("click", () => {
    const isPressed = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", isPressed);
    changed(isPressed);
  });
}

// ---- start ----

at("settings").addEventListener("submit", (event) => {
  event.preventDefault();
  restore();
});
at("cancel").addEventListener("click", cancel);
at("all-faces").addEventListener("click", () => faces.chooseAll());
at("as-aligned").addEventListener("click", () => {
  settings.mode = "aligned";
  restore();
});
toggle(at("show-faces"), update);
toggle(at("show-uncertainty"), (isPressed) => {
  at("uncertainty").hidden = at("legend").hidden = !isPressed;
});
takeFiles(take, fail);
const meeting = meetServer();
