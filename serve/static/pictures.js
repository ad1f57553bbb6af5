// Files, base64 and pixels.

import { Problem } from "./api.js";

const SIGNATURES = [
  ["image/png", [0x89, 0x50, 0x4e, 0x47]],
  ["image/jpeg", [0xff, 0xd8, 0xff]],
  ["image/webp", [0x52, 0x49, 0x46, 0x46]],
  ["image/bmp", [0x42, 0x4d]],
];
const SUFFIXES = { "image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp" };
const HEAT = [255, 106, 0];
const LEAST_SPREAD = 16; // grey levels that are drawn in full colour at least, so that noise does not look like doubt

/**
 * A chosen file as a photo: {file, name, type, width, height, url}, its sides those of the upright picture.
 * Throws a Problem for what is no image, or more than the server takes.
 */
export async function photoOf(file, limits) {
  const name = file.name || "pasted.png";
  if (limits && file.size > limits.max_body_bytes) {
    const most = megabytes(limits.max_body_bytes);
    const detail = `${name} has ${megabytes(file.size)}; this server takes up to ${most}.`;
    throw new Problem("too-large", { detail: `${detail} Save it as a JPEG, or make it smaller.` });
  }
  const start = new Uint8Array(await file.slice(0, 4).arrayBuffer());
  const type = SIGNATURES.find(([, bytes]) => bytes.every((byte, place) => start[place] === byte))?.[0];
  if (!type) throw new Problem("not-an-image", { detail: `${name} is no PNG, JPEG or WebP file. Choose one that is.` });
  const url = URL.createObjectURL(file);
  try {
    const { naturalWidth: width, naturalHeight: height } = await loaded(url);
    if (limits && width * height > limits.max_pixels) {
      const most = megapixels(limits.max_pixels);
      const detail = `${name} has ${width} × ${height} px; this server takes up to ${most}.`;
      throw new Problem("too-large", { detail: `${detail} Make it smaller, or cut out the part with the faces.` });
    }
    return { file, name, type, width, height, url };
  } catch (error) {
    URL.revokeObjectURL(url);
    if (error instanceof Problem) throw error;
    throw new Problem("bad-image", { detail: `${name} is damaged: it cannot be decoded.` });
  }
}

/** An image element whose pixels are there. */
export async function loaded(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

export function blobOf(base64, type) {
  if (Uint8Array.fromBase64) return new Blob([Uint8Array.fromBase64(base64)], { type });
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type });
}

/** The input's name, marked, with the suffix of what it is now. */
export function downloadName(name, type) {
  return `${name.replace(/\.[^.]*$/, "") || "photo"}-restored${SUFFIXES[type] ?? ""}`;
}

/** Draw a grey map in one colour, opaque where it is largest. */
export async function drawMap(canvas, url) {
  const image = await loaded(url);
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  const { data } = pixels;
  let largest = LEAST_SPREAD;
  for (let at = 0; at < data.length; at += 4) largest = Math.max(largest, data[at]);
  for (let at = 0; at < data.length; at += 4) {
    data[at + 3] = (data[at] / largest) ** 1.5 * 255;
    data.set(HEAT, at);
  }
  context.putImageData(pixels, 0, 0);
}

export function megabytes(bytes) {
  return bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${rounded(bytes / 1e6)} MB`;
}

export function megapixels(pixels) {
  return pixels < 1e5 ? `${pixels} px` : `${rounded(pixels / 1e6)} megapixels`;
}

function rounded(value) {
  return value < 10 ? value.toFixed(1).replace(/\.0$/, "") : Math.floor(value);
}
