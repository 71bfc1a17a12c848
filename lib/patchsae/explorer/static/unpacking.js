// Weights as they come from disk: text of 16-bit units, of which each part says its length and its checksum.
// weights.py writes what is read here.

const ESCAPE = 1, TURN = 0x4000;
const DAMAGED = "The model's data beside this page is damaged: save the page again, or bring the whole folder that was saved with it.";

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

function crc32(bytes) {
  let c = -1;
  for (let i = 0; i < bytes.length; i++) c = CRC[(c ^ bytes[i]) & 255] ^ (c >>> 8);
  return (c ^ -1) >>> 0;
}

/** Decode the text of one part: units that a script cannot hold come turned, after an escape. */
function bytesOf(text, { bytes, crc }) {
  const units = new Uint16Array(Math.ceil(bytes / 2));
  let n = 0;
  for (let i = 0; i < text.length && n < units.length; i++) {
    const unit = text.charCodeAt(i);
    units[n++] = unit === ESCAPE ? text.charCodeAt(++i) ^ TURN : unit;
  }
  const found = new Uint8Array(units.buffer, 0, bytes);
  if (n !== units.length || crc32(found) !== crc) throw new Error(DAMAGED);
  return found;
}

async function inflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

/** Tensors by name, of one file's low and high bytes. */
class Weights {
  static async read(texts, facts) {
    const parts = texts.map((text, i) => bytesOf(text, facts.parts[i]));
    const streams = [];
    let rest = await new Blob(parts).arrayBuffer(), at = 0;
    for (const length of facts.streams) streams.push(await inflated(new Uint8Array(rest, at, length))), (at += length);
    return new Weights(facts.tensors, ...streams);
  }

  constructor(tensors, low, high) {
    Object.assign(this, { low, high, known: new Map() });
    const halves = Float32Array.from({ length: 65536 }, (_, bits) => half(bits));
    let at = 0;
    for (const [name, kind, ...shape] of tensors) {
      const size = shape.reduce((a, b) => a * b, 1), values = new Float32Array(size), from = at;
      const unit = (e) => low[from + e] | (high[from + e] << 8);
      if (kind === "half") {
        for (let e = 0; e < size; e++) values[e] = halves[unit(e)];
        at += size;
      } else if (kind === "single") {
        const bits = new Uint32Array(values.buffer);
        for (let e = 0; e < size; e++) bits[e] = unit(2 * e) | (unit(2 * e + 1) << 16);
        at += 2 * size;
      } else if (kind === "bytes") {
        this.known.set(name, { values: low.slice(at, at + size), shape });
        at += size;
        continue;
      } else { // whole steps, a step per row
        const rows = shape[0], columns = size / rows;
        for (let r = 0; r < rows; r++) {
          const step = halves[unit(r)];
          for (let c = 0; c < columns; c++) {
            const zigzag = unit(rows + r * columns + c);
            values[r * columns + c] = step * (zigzag & 1 ? -(zigzag + 1) / 2 : zigzag / 2);
          }
        }
        at += rows + size;
      }
      this.known.set(name, { values, shape });
    }
    if (at !== low.length || at !== high.length) throw new Error(DAMAGED);
    this.low = this.high = null;
  }

  has(name) {
    return this.known.has(name);
  }
  get(name) {
    return this.known.get(name).values;
  }
  shape(name) {
    return this.known.get(name).shape;
  }

  /** Return [out, in] as [in, out], and forget the original, which is then in memory no more. */
  turned(name) {
    const { values, shape } = this.known.get(name), rows = shape[0], columns = values.length / rows;
    const turned = new Float32Array(values.length);
    for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) turned[c * rows + r] = values[r * columns + c];
    this.known.get(name).values = null;
    return turned;
  }
}
