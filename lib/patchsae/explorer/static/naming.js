
// Names of latents with their proof, the search by word, and the latents near to one.

function readLabels(block) {
  const { words = [], leading } = block, read = (name) => block[name] && unpack(block[name]);
  return { words, leading: leading.map(unpack), word: read("word"), auroc: read("auroc"), others: read("others"), proven: read("proven") };
}

/** What a latent is called: null without a name, and `proven` tells whether anything speaks for it. */
function nameOf(labels, s) {
  if (s === null || !labels.word?.[s]) return null;
  return { word: labels.words[labels.word[s] - 1], auroc: labels.auroc[s], others: labels.others[s], proven: !!labels.proven[s] };
}

function proofOf(name) {
  if (!name) return "It has no name: nothing it fires on was there to name it by.";
  if (Number.isNaN(name.auroc)) return `Called “${name.word}”, without proof: too few pictures of known content show it.`;
  const numbers = `the latent tells pictures that show it from others with an AUROC of ${name.auroc.toFixed(2)} ` +
    `(0.50 is chance; of other words 95 % lie below ${name.others.toFixed(2)})`;
  return name.proven ? `Called “${name.word}”, and proven: ${numbers}.` : `Called “${name.word}”, without proof: ${numbers}.`;
}

const nameShort = (name) => (name ? (name.proven ? name.word : `${name.word}?`) : "");

/** Latents whose name holds what was typed, the proven first. */
function searchNames(labels, typed, most = 24) {
  const wanted = typed.trim().toLowerCase(), found = [];
  if (!wanted || !labels.word) return found;
  labels.word.forEach((w, s) => w && labels.words[w - 1].toLowerCase().includes(wanted) && found.push(s));
  const rank = (s) => labels.proven[s] * 2 + (Number.isNaN(labels.auroc[s]) ? 0 : labels.auroc[s]);
  return found.sort((a, b) => rank(b) - rank(a) || a - b).slice(0, most);
}

/** The next latent whose references are mostly of a class, after `s` and around. */
function nextOfClass(labels, names, index, caption, s) {
  const own = index.sets.findIndex((set) => set.title === caption.set);
  for (const d of own < 0 ? [0] : [own, 0]) {
    const label = names[d]?.indexOf(caption.title) ?? -1;
    if (label < 0) continue;
    const found = [];
    labels.leading[d].forEach((c, latent) => c === label + 1 && found.push(latent));
    if (found.length) return { latent: found.find((other) => other > (s ?? -1)) ?? found[0], of: found.length, set: index.sets[d].title };
  }
  return null;
}

const readNear = (block) => Object.fromEntries(Object.entries(block).map(([kind, part]) => [kind, unpackAll(part)]));

/** The latents nearest to one, `[latent, likeness]` each. */
function nearest(near, kind, s, chunk, chunks) {
  const part = near[kind], wide = part ? part.latent.length / Math.min(chunk, chunks - Math.floor(s / chunk) * chunk) : 0;
  const from = (s % chunk) * wide;
  return [...Array(wide).keys()].map((i) => [part.latent[from + i], part.value[from + i]]).filter(([, v]) => v > 0);
}
