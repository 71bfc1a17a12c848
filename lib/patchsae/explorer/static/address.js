
// What is looked at as the part of an address after '#', so that back, forward, reload and copied links work.

const UNCHANGED = { gains: {}, keep: "", k: 5, here: false };

/** Write a state: only what differs from a fresh page, rows and columns counted from 1 as the page says them. */
function addressOf(state, columns) {
  const parts = new URLSearchParams(), off = [], turned = [];
  parts.set("image", state.image);
  if (state.adapted > 1) parts.set("model", state.adapted);
  if (state.patch !== null)
    parts.set("patch", [Math.floor(state.patch / columns) + 1, (state.patch % columns) + 1].join());
  if (state.latent !== null) parts.set("latent", state.latent);
  for (const [s, gain] of Object.entries(state.gains)) (gain === 0 ? off : turned).push(gain === 0 ? s : `${s}:${gain}`);
  if (off.length) parts.set("off", off.join());
  if (turned.length) parts.set("turned", turned.join());
  if (state.here) parts.set("only", "patch");
  if (state.keep) parts.set("top", `${state.k}:${state.keep}`);
  if (state.classes.length) parts.set("classes", state.classes.join());
  if (!state.mask) parts.set("mask", 0);
  if (state.opacity !== 0.9) parts.set("strength", state.opacity);
  return parts.toString().replaceAll("%2C", ",").replaceAll("%3A", ":");
}

/** Read what `addressOf` wrote; what is of no use is left out, and null is no address of the explorer's. */
function readAddress(text, { grid: [rows, columns], latents, pictures, models }) {
  const parts = new URLSearchParams(text.replace(/^#/, "")), found = {};
  if (!parts.has("image") && !parts.has("latent")) return null;
  const whole = (value, below) => (/^\d+$/.test(value ?? "") && Number(value) < below ? Number(value) : null);
  const list = (name) => (parts.get(name) ?? "").split(",").filter(Boolean);
  found.image = whole(parts.get("image"), pictures) ?? 0;
  found.adapted = models > 1 ? whole(parts.get("model"), models) || 1 : 0;
  found.latent = whole(parts.get("latent"), latents);
  const [row, column] = list("patch").map((n, i) => whole(n, [rows, columns][i] + 1));
  found.patch = row && column ? (row - 1) * columns + column - 1 : null;
  found.gains = {};
  for (const s of list("off")) if (whole(s, latents) !== null) found.gains[Number(s)] = 0;
  for (const pair of list("turned")) {
    const [s, gain] = pair.split(":");
    if (whole(s, latents) !== null && gain && Number(gain) >= 0 && Number(gain) <= MOST) found.gains[Number(s)] = Number(gain);
  }
  found.here = parts.get("only") === "patch";
  const [k, keep] = (parts.get("top") ?? "").split(":");
  [found.k, found.keep] = whole(k, 101) && ["on", "off"].includes(keep) ? [Number(k), keep] : [UNCHANGED.k, ""];
  found.classes = list("classes");
  found.mask = parts.get("mask") !== "0";
  const strength = Number(parts.get("strength") ?? 0.9);
  found.opacity = strength >= 0 && strength <= 1 ? strength : 0.9;
  return found;
}
