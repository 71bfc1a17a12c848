// A picture as the model takes it: resized as Pillow does, to the last bit, and cropped or padded (images/files.py).

const MEGAPIXELS = 25, LONGEST = 100, STRIP = 128;
const FILTERS = {
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, (x) => {
    x = Math.abs(x);
    return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
  }],
};

/** Round a half to the even neighbour, as Python does. */
function even(x) {
  const low = Math.floor(x), rest = x - low;
  return rest > 0.5 || (rest === 0.5 && low % 2) ? low + 1 : low;
}

/** For each of `to` pixels: the first of `from` that it is made of, and whole weights, 2^22 in sum. */
function taps(from, to, [reach, filter]) {
  const scale = from / to, wide = Math.max(1, scale), support = reach * wide;
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale, first = Math.max(0, Math.trunc(centre - support + 0.5));
    const last = Math.min(from, Math.trunc(centre + support + 0.5));
    const weights = Array.from({ length: last - first }, (_, k) => filter((k + first - centre + 0.5) / wide));
    const sum = weights.reduce((a, b) => a + b, 0);
    return { first, weights: Int32Array.from(weights, (w) => Math.trunc((w / sum) * 2 ** 22 + (w < 0 ? -0.5 : 0.5))) };
  });
}

const clipped = (sum) => Math.max(0, Math.min(255, (sum + 2 ** 21) >> 22));

/** Where each side goes: its length after resizing. */
function resizedTo(width, height, { size, resize }) {
  const short = Math.min(width, height), long = Math.max(width, height);
  if (resize === "squash") return [size, size];
  if (resize === "longest") return [width, height].map((side) => Math.max(1, even(side / (long / size))));
  return [width, height].map((side) => Math.floor((side * size) / short));
}

/** Frame a picture, of which `rows(from, count)` gives RGBA; returns RGBA [size, size]. */
function framed(width, height, frame, rows) {
  const [across, down] = resizedTo(width, height, frame), { size } = frame, filter = FILTERS[frame.interpolation];
  const narrow = new Uint8Array(3 * across * height), horizontal = taps(width, across, filter);
  for (let top = 0; top < height; top += STRIP) {
    const count = Math.min(STRIP, height - top), strip = rows(top, count);
    for (let y = 0; y < count; y++)
      for (let x = 0, to = 3 * across * (top + y); x < across; x++, to += 3) {
        const { first, weights } = horizontal[x];
        if (width === across) for (let c = 0; c < 3; c++) narrow[to + c] = strip[4 * (y * width + x) + c];
        else {
          let r = 0, g = 0, b = 0;
          for (let k = 0, from = 4 * (y * width + first); k < weights.length; k++, from += 4) {
            r += strip[from] * weights[k], g += strip[from + 1] * weights[k], b += strip[from + 2] * weights[k];
          }
          narrow[to] = clipped(r), narrow[to + 1] = clipped(g), narrow[to + 2] = clipped(b);
        }
      }
  }
  const vertical = taps(height, down, filter), pixels = new Uint8ClampedArray(4 * size * size).fill(255);
  const padded = frame.resize === "longest";
  const left = padded ? -Math.floor((size - across) / 2) : even((across - size) / 2);
  const top = padded ? -Math.floor((size - down) / 2) : even((down - size) / 2);
  for (let y = 0; y < size; y++)
    for (let x = 0; x < size; x++)
      for (let c = 0; c < 3; c++) {
        const column = x + left, row = y + top, to = 4 * (y * size + x) + c;
        if (column < 0 || row < 0 || column >= across || row >= down) pixels[to] = frame.fill;
        else if (height === down) pixels[to] = narrow[3 * (row * across + column) + c];
        else {
          const { first, weights } = vertical[row];
          let sum = 0;
          for (let k = 0; k < weights.length; k++) sum += narrow[3 * ((first + k) * across + column) + c] * weights[k];
          pixels[to] = clipped(sum);
        }
      }
  return pixels;
}

function checkSize(width, height, name) {
  const pixels = width * height, short = Math.min(width, height), long = Math.max(width, height);
  if (pixels > MEGAPIXELS * 1e6)
    throw new Error(`${name} has ${Math.round(pixels / 1e6)} megapixels, more than ${MEGAPIXELS}: make it smaller.`);
  if (long > LONGEST * short) throw new Error(`${name} is ${long} pixels long and ${short} wide, more than ${LONGEST} times: cut out a part.`);
}

/** Read from a file's first bytes how large its picture is, before anything is decoded, and whether it moves. */
function announced(bytes) {
  const view = new DataView(bytes.buffer), text = (at, n) => String.fromCharCode(...bytes.subarray(at, at + n));
  const inside = (word) => text(0, Math.min(bytes.length, 4096)).includes(word);
  if (text(1, 3) === "PNG") return [view.getUint32(16), view.getUint32(20), inside("acTL")];
  if (text(0, 3) === "GIF") return [view.getUint16(6, true), view.getUint16(8, true), inside("NETSCAPE2.0") || inside("ANIMEXTS1.0")];
  if (text(0, 2) === "BM") return [Math.abs(view.getInt32(18, true)), Math.abs(view.getInt32(22, true)), false];
  if (text(8, 8) === "WEBPVP8X") return [24, 27].map((at) => 1 + view.getUint16(at, true) + 65536 * bytes[at + 2]).concat((bytes[20] & 2) > 0);
  if (view.getUint16(0) === 0xffd8)
    for (let at = 2; at + 9 < bytes.length && bytes[at] === 0xff; at += 2 + view.getUint16(at + 2)) {
      const mark = bytes[at + 1];
      if (mark >= 0xc0 && mark <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(mark)) return [view.getUint16(at + 7), view.getUint16(at + 5), false];
    }
  return null;
}

/** Decode a Blob or take pixels, and frame them: {pixels, width, height, note}. */
async function seen(source, frame, name) {
  if (!(source instanceof Blob)) {
    const { data, width, height } = source;
    checkSize(width, height, name);
    const rows = (from, count) => data.subarray(4 * width * from, 4 * width * (from + count));
    return { pixels: framed(width, height, frame, rows), width, height, note: "" };
  }
  const unreadable = () => new Error(`${name} is no picture that can be read: choose a PNG or JPEG file.`);
  if (source.size < 16) throw unreadable();
  let size = null, bitmap;
  try {
    size = announced(new Uint8Array(await source.slice(0, 1 << 20).arrayBuffer()));
  } catch {
    throw unreadable();
  }
  if (size) checkSize(size[0], size[1], name);
  try {
    bitmap = await createImageBitmap(source, { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw unreadable();
  }
  const { width, height } = bitmap;
  try {
    checkSize(width, height, name);
    const canvas = new OffscreenCanvas(width, Math.min(STRIP, height));
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const rows = (from, count) => {
      context.clearRect(0, 0, width, STRIP);
      context.drawImage(bitmap, 0, -from);
      return context.getImageData(0, 0, width, count).data;
    };
    const note = size?.[2] ? `${name} moves: its first picture is taken.` : "";
    return { pixels: framed(width, height, frame, rows), width, height, note };
  } finally {
    bitmap.close();
  }
}
