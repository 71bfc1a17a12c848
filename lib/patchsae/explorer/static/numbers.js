// What is shown, as numbers: blocks are asked for and decoded here, and latents are grouped. Followed, in one
// module, by charts.js, elements.js, latents.js and explorer.js.

const TYPES = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };
const GROUPS = ["common", "clip", "adapted"];

const unpack = (p) => new TYPES[p.t](Uint8Array.from(atob(p.b), (c) => c.charCodeAt(0)).buffer);
const count = (n) => n.toLocaleString("en");

/** Three digits, as few characters as hold them. */
function format(v) {
  if (v === undefined || Number.isNaN(v)) return "–";
  if (v === 0) return "0";
  return v < 0.001 ? v.toExponential(1) : v < 1000 ? v.toPrecision(3) : count(Math.round(v));
}

function picture(uri) {
  return new Promise((done, failed) => {
    const image = new Image();
    image.onload = () => done(image);
    image.onerror = () => failed(new Error("a picture of the explorer's data cannot be decoded"));
    image.src = uri;
  });
}

/** Ask for blocks once each and keep what `decode` makes of them. */
function blocks(model) {
  const kept = new Map(), waiting = new Map();
  model.on("msg:custom", (message) => {
    const waits = waiting.get(message.block);
    if (!waits) return;
    waiting.delete(message.block);
    if (message.failed) waits.failed(new Error(message.failed));
    else waits.done(message.data);
  });
  return (name, decode) => {
    if (!kept.has(name)) {
      const found = new Promise((done, failed) => {
        waiting.set(name, { done, failed });
        model.send({ want: name });
      });
      kept.set(name, found.then(decode));
      kept.get(name).catch(() => kept.delete(name)); // asked for again next time
    }
    return kept.get(name);
  };
}

const unpackAll = (block) => Object.fromEntries(Object.entries(block).map(([k, p]) => [k, unpack(p)]));

/** Values of all latents: the image's, or those of one patch. */
function levels(found, patch, latents) {
  const values = new Float32Array(latents);
  if (patch === null) found.latent.forEach((s, row) => (values[s] = found.mean[row]));
  else
    found.latent.forEach((s, row) => {
      for (let e = found.start[row]; e < found.start[row + 1]; e++)
        if (found.patch[e] === patch) values[s] = found.value[e];
    });
  return values;
}

function patchMap(found, latent, patches) {
  const values = new Float32Array(patches), row = found.latent.indexOf(latent);
  if (row >= 0)
    for (let e = found.start[row]; e < found.start[row + 1]; e++) values[found.patch[e]] = found.value[e];
  return values;
}

function strongest(values, leftOut, top) {
  const active = [];
  values.forEach((v, s) => v > 0 && !leftOut[s] && active.push(s));
  return active.sort((a, b) => values[b] - values[a] || a - b).slice(0, top);
}

/** The three lists, of which one model alone fills `clip`; the rule is that of `group_latents` in data.py. */
export function groupLatents(values, leftOut, top) {
  const chosen = values.map((level) => new Set(level.flatMap((v) => strongest(v, leftOut, top))));
  const largest = (s, sides) => Math.max(...sides.flatMap((side) => values[side].map((v) => v[s])));
  const ordered = (latents, sides) =>
    latents.map((s) => [s, largest(s, sides)]).sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  const [first, second = new Set()] = chosen;
  return {
    common: ordered([...first].filter((s) => second.has(s)), [0, 1]),
    clip: ordered([...first].filter((s) => !second.has(s)), [0]),
    adapted: ordered([...second].filter((s) => !first.has(s)), [1]),
  };
}
