
// Drawing on canvases: everything here is given what it draws, in CSS pixels.

const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const HOT = "#ffc400";
const FONT = "11px system-ui, sans-serif";

/** Make a canvas sharp at this size in CSS pixels; returns its context, cleared. */
function sized(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.font = FONT;
  context.imageSmoothingQuality = "high";
  return context;
}

/** Where a patch lies in a square picture: left, top, width, height, in whole pixels. */
function patchBox(patch, [rows, columns], side) {
  const edge = (n, cells) => Math.round((n * side) / cells);
  const row = Math.floor(patch / columns), column = patch % columns;
  const left = edge(column, columns), top = edge(row, rows);
  return [left, top, edge(column + 1, columns) - left, edge(row + 1, rows) - top];
}

/**
 * Lay weights (0 … 1 of each patch) over a picture: grey where they are 0, towards HOT where they are 1. The grey is
 * dim and narrow, so that HOT stands out from a black object as from a white ground; the square root keeps weak
 * patches visible. Opacity 0 leaves the picture as it is.
 */
function overlay(context, weights, grid, side, opacity) {
  context.save();
  context.globalAlpha = opacity;
  context.globalCompositeOperation = "saturation"; // a grey source takes the colours away
  context.fillStyle = "#808080";
  context.fillRect(0, 0, side, side);
  context.globalCompositeOperation = "source-over";
  context.globalAlpha = 0.7 * opacity;
  context.fillStyle = "#3c3e44";
  context.fillRect(0, 0, side, side);
  context.fillStyle = HOT;
  weights.forEach((weight, patch) => {
    context.globalAlpha = 0.8 * opacity * Math.sqrt(weight);
    context.fillRect(...patchBox(patch, grid, side));
  });
  context.restore();
}

function framePatch(context, patch, grid, side) {
  const box = patchBox(patch, grid, side);
  for (const [colour, width] of [["#fff", 4], ["#d00", 2]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect(...box);
  }
}

/** A colour of the scale, a fifth of the way to the text's colour, so that both ends stand out from the ground. */
function shade(share, text) {
  const x = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1), i = Math.min(Math.floor(x), VIRIDIS.length - 2);
  const ground = text.match(/[0-9a-f]{2}/gi).map((pair) => parseInt(pair, 16));
  const mixed = VIRIDIS[i].map((c, k) => Math.round(0.8 * (c + (x - i) * (VIRIDIS[i + 1][k] - c)) + 0.2 * ground[k]));
  return `rgb(${mixed})`;
}

const barsHeight = (models) => (models > 1 ? 156 : 98);

/** Draw one bar per latent, of one model upwards and of a second downwards; returns the latent near a place. */
function drawBars(canvas, { values, groups, chosen, names, colours, width }) {
  const height = barsHeight(values.length), middle = 78, reach = 58, latents = values[0].length;
  const peak = Math.max(...values.map((v) => v.reduce((a, b) => Math.max(a, b), 0)));
  const context = sized(canvas, width, height), right = width - 4;
  const left = Math.ceil(context.measureText(format(peak)).width) + 10;
  const x = (s) => left + ((s + 0.5) * (right - left)) / latents;
  const bar = (s, wide) => values.forEach((v, down) => {
    const long = (v[s] / (peak || 1)) * reach;
    if (long > 0) context.fillRect(x(s) - wide / 2, down ? middle : middle - long, wide, long);
  });
  context.fillStyle = colours.text;
  if (names.length > 1) {
    context.fillText(`↑ ${names[0]}`, left, 12);
    context.fillText(`↓ ${names[1]}`, left, height - 5, right - left);
  }
  context.textAlign = "right";
  [[format(peak), -reach], ["0", 0], [format(peak), reach]].slice(0, names.length + 1).forEach(([text, y]) => {
    context.fillStyle = colours.text;
    context.fillText(text, left - 6, middle + y + 4);
    context.fillStyle = colours.line;
    context.fillRect(left - 4, middle + y, right - left + 4, 1);
  });
  context.fillStyle = colours.muted;
  for (let s = 0; s < latents; s++) bar(s, 1);
  GROUPS.forEach((g) => groups[g].forEach(([s]) => {
    context.fillStyle = colours[g];
    bar(s, s === chosen ? 5 : 3);
  }));
  if (chosen !== null) {
    context.fillStyle = colours.text;
    context.textAlign = "center";
    context.font = `bold ${FONT}`;
    const at = Math.max(left + (names.length > 1 ? 90 : 34), Math.min(x(chosen), right - 34));
    context.fillText(`latent ${chosen}`, at, 12);
    context.fillRect(x(chosen) - 0.5, 15, 1, 4);
  }
  return (place) => {
    let near = null, best = 0;
    for (let s = 0; s < latents; s++) {
      const far = Math.abs(x(s) - place), value = Math.max(...values.map((v) => v[s]));
      if (far < 6 && value / (1 + far) > best) [near, best] = [s, value / (1 + far)];
    }
    return near;
  };
}

/** Round numbers inside a range of logarithms: decades, and with few of them also 2 and 5 of each. */
function ticks([low, high]) {
  const found = [];
  for (let decade = Math.floor(low); decade <= high; decade++)
    for (const digit of high - low < 2 ? [1, 2, 5] : [1]) {
      const log = decade + Math.log10(digit);
      if (log >= low && log <= high) found.push([log, String(Number((10 ** log).toPrecision(1)))]);
    }
  return found;
}

const span = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);

/** Draw all latents by frequency and mean activation; returns the latent near a place. */
function drawScatter(canvas, { latents: l, chosen, colours, width }) {
  const height = Math.round(Math.max(width * 0.8, 250)), context = sized(canvas, width, height);
  const left = 44, right = width - 8, top = 30, bottom = height - 36;
  const alive = [...l.image_frequency.keys()].filter((s) => l.image_frequency[s] > 0 && l.mean_activation[s] > 0);
  const axes = ["image_frequency", "mean_activation"].map((k) => {
    const [low, high] = span(alive.map((s) => Math.log10(l[k][s]))), rim = 0.04 * (high - low) || 1;
    return { log: (s) => Math.log10(l[k][s]), low: low - rim, high: high + rim };
  });
  const [fx, ay] = axes, most = span(alive.map((s) => l.entropy[s]))[1] || 1;
  const px = (log) => left + ((log - fx.low) / (fx.high - fx.low)) * (right - left);
  const py = (log) => bottom - ((log - ay.low) / (ay.high - ay.low)) * (bottom - top);
  context.fillStyle = colours.line;
  for (const [log] of ticks([fx.low, fx.high])) context.fillRect(Math.round(px(log)), top, 1, bottom - top);
  for (const [log] of ticks([ay.low, ay.high])) context.fillRect(left, Math.round(py(log)), right - left, 1);
  context.fillStyle = colours.text;
  context.textAlign = "center";
  for (const [log, text] of ticks([fx.low, fx.high])) context.fillText(text, px(log), bottom + 14);
  context.fillText("activated frequency f", (left + right) / 2, height - 6);
  context.textAlign = "right";
  for (const [log, text] of ticks([ay.low, ay.high])) context.fillText(text, left - 4, py(log) + 4);
  context.save();
  context.translate(11, (top + bottom) / 2);
  context.rotate(-Math.PI / 2);
  context.textAlign = "center";
  context.fillText("mean activation a", 0, 0);
  context.restore();
  const key = `label entropy e: 0`, start = left + context.measureText(key).width + 6;
  context.textAlign = "left";
  context.fillText(key, left, 14);
  for (let i = 0; i < 60; i++) {
    context.fillStyle = shade(i / 59, colours.text);
    context.fillRect(start + i, 5, 1.5, 11);
  }
  context.fillStyle = colours.text;
  context.fillText(`${most.toFixed(1)} nat`, start + 67, 14);
  context.strokeStyle = colours.line;
  context.strokeRect(left + 0.5, top + 0.5, right - left - 1, bottom - top - 1);
  const ramp = Array.from({ length: 65 }, (_, i) => shade(i / 64, colours.text)); // not once for each latent
  for (const s of alive) {
    context.globalAlpha = l.left_out[s] ? 0.35 : 0.9;
    context.fillStyle = ramp[Math.round((64 * l.entropy[s]) / most) || 0];
    context.fillRect(px(fx.log(s)) - 1.5, py(ay.log(s)) - 1.5, 3, 3);
  }
  context.globalAlpha = 1;
  if (alive.includes(chosen))
    for (const [colour, wide] of [[colours.back, 7], [colours.wrong, 3]]) {
      context.strokeStyle = colour;
      context.lineWidth = wide;
      context.beginPath();
      context.arc(px(fx.log(chosen)), py(ay.log(chosen)), 8, 0, 7);
      context.stroke();
    }
  return (x, y) => {
    const far = (s) => Math.hypot(px(fx.log(s)) - x, py(ay.log(s)) - y);
    const near = alive.reduce((a, b) => (far(b) < far(a) ? b : a), alive[0]);
    return near !== undefined && far(near) < 12 ? near : null;
  };
}
