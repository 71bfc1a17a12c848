// The worker: a CLIP cut in two after a block, an autoencoder between the halves, and what is asked of them.

const KEPT = 48; // pictures' tokens at hand

class Vision {
  constructor(facts, weights) {
    Object.assign(this, { facts, weights, config: facts.vision });
    const { vision, sae } = facts, products = (this.products = new Products());
    this.most = vision.tokens + Math.max(0, ...facts.models.map((m) => m?.prompts?.[1] ?? 0));
    this.tower = new Transformer(products, weights, "image.", vision, this.most);
    this.sae = new Autoencoder(products, weights, sae, vision.tokens);
    this.filter = products.put(weights.turned("image.conv"));
    const inside = 3 * vision.patch ** 2;
    this.patches = products.take(up(vision.tokens, 8) * inside);
    this.embedded = products.take(up(vision.tokens, 8) * vision.width);
    this.proj = weights.has("image.proj") ? weights.get("image.proj") : null;
    this.streams = new Map();
    this.pictures = new Map();
  }

  prompts(m) {
    const shape = this.facts.models[m].prompts;
    return shape && { depth: shape[0], n: shape[1], values: this.weights.get(`prompts.${m}`) };
  }

  enter(m) {
    const prompts = this.prompts(m), d = this.config.width;
    if (!prompts) return undefined;
    return (block, x) => {
      if (block > 0 && block < prompts.depth)
        x.set(prompts.values.subarray(block * prompts.n * d, (block + 1) * prompts.n * d), this.config.tokens * d);
    };
  }

  count(m) {
    return this.config.tokens + (this.prompts(m)?.n ?? 0);
  }

  /** Return the residual stream of a picture after the hooked block: float32 [tokens, width]. */
  residual(key, m) {
    const { size, patch, width: d, tokens, mean, std, hook } = this.config, name = `${key} ${m}`;
    const known = this.streams.get(name);
    if (known) return known;
    const pixels = this.pictures.get(key);
    if (!pixels) throw new Error("This picture has not been given to the model.");
    const side = size / patch, inside = 3 * patch * patch, cells = this.products.at(this.patches, (tokens - 1) * inside);
    for (let row = 0, to = 0; row < side; row++)
      for (let column = 0; column < side; column++)
        for (let c = 0; c < 3; c++)
          for (let y = 0; y < patch; y++)
            for (let x = 0; x < patch; x++)
              cells[to++] = (pixels[4 * ((row * patch + y) * size + column * patch + x) + c] / 255 - mean[c]) / std[c];
    this.products.multiply(this.patches, inside, this.filter, d, this.embedded, d, tokens - 1, inside, d);
    const count = this.count(m), x = this.tower.stream(count), pos = this.weights.get("image.pos"), prompts = this.prompts(m);
    x.set(this.weights.get("image.cls"));
    x.set(this.products.at(this.embedded, (tokens - 1) * d), d);
    for (let e = 0; e < tokens * d; e++) x[e] += pos[e];
    if (prompts) x.set(prompts.values.subarray(0, prompts.n * d), tokens * d);
    if (this.weights.has("image.pre.w")) normalise(x, x, count, d, this.weights.get("image.pre.w"), this.weights.get("image.pre.b"));
    this.tower.run(count, 0, hook, { enter: this.enter(m) });
    const stream = { x: this.tower.stream(count).slice(), code: null };
    if (this.streams.size >= KEPT) this.streams.delete(this.streams.keys().next().value);
    this.streams.set(name, stream);
    return stream;
  }

  code(key, m) {
    const stream = this.residual(key, m);
    return (stream.code ??= this.sae.encode(stream.x, this.config.tokens));
  }

  /** Return what the rest of the tower makes of a picture's tokens after a change. */
  embedding(key, m, change) {
    const { x } = this.residual(key, m), { width: d, layers, hook } = this.config, count = this.count(m);
    const changed = change ? this.sae.turned(x, this.code(key, m), change) : x;
    this.tower.stream(count).set(changed);
    this.tower.run(count, hook, layers, { enter: this.enter(m), first: 0, wanted: 1 });
    const cls = this.tower.stream(1).slice();
    normalise(cls, cls, 1, d, this.weights.get("image.post.w"), this.weights.get("image.post.b"));
    return projected(cls, this.proj);
  }

  forget(key) {
    this.pictures.delete(key);
    this.facts.models.forEach((_, m) => this.streams.delete(`${key} ${m}`));
  }
}

/** Return probabilities of classes, of which each row of vectors is one. */
function shares(embedding, vectors, { scale, bias }) {
  const image = unit(embedding), e = image.length, logits = new Float64Array(vectors.length / e);
  for (let c = 0; c < logits.length; c++) {
    for (let k = 0; k < e; k++) logits[c] += image[k] * vectors[c * e + k];
    logits[c] = scale * logits[c] + bias;
  }
  const top = logits.reduce((a, b) => Math.max(a, b), -Infinity), powers = logits.map((v) => Math.exp(v - top));
  const sum = powers.reduce((a, b) => a + b, 0), share = Float32Array.from(powers, (v) => v / sum);
  if (!Number.isFinite(sum)) throw new Error("What the model answers is not finite: turn the latents by less.");
  const first = [...logits.keys()].sort((a, b) => logits[b] - logits[a] || a - b).slice(0, 3);
  return { share, first };
}

const parts = { tower: [], words: [] };
let facts, vision, text, named = new Map();

const calls = {
  begin(given) {
    facts = given;
  },
  part(kind, number, content) {
    parts[kind][number] = content;
  },
  async open(kind) {
    const weights = await Weights.read(parts[kind].splice(0), facts.files[kind]);
    if (kind === "tower") vision = new Vision(facts, weights);
    else {
      const merges = await new Response(new Blob([weights.get("text.merges")]).stream()).text();
      text = new TextTower(new Products(), weights, { ...facts.text, merges });
    }
  },
  async picture(key, source, name) {
    vision.forget(key);
    const found = await seen(source, facts.frame, name);
    vision.pictures.set(key, found.pixels);
    return { ...found, size: facts.frame.size };
  },
  activations: (key, m) => vision.sae.byLatent(vision.code(key, m)),
  residual: (key, m) => ({ tokens: vision.residual(key, m).x, count: vision.count(m), width: facts.vision.width }),
  embedding: (key, m, change) => vision.embedding(key, m, change),
  answer(key, m, change, vectors) {
    const began = performance.now(), found = shares(vision.embedding(key, m, change), vectors, facts.logits);
    return { ...found, ms: performance.now() - began };
  },
  async texts(m, names, templates, told) {
    const name = JSON.stringify([m, names, templates]), { words, template } = facts.models[m];
    if (!named.has(name)) {
      const learned = words && { values: text.weights.get(`words.${m}`), shape: words };
      if (named.size > KEPT) named = new Map();
      named.set(name, await text.classes(names, template ? [template] : templates, learned, told));
    }
    return named.get(name);
  },
  forget: (key) => vision?.forget(key),
};

let turn = Promise.resolve();
onmessage = ({ data: { id, call, given } }) => {
  const told = async (share) => {
    postMessage({ id, share });
    await new Promise((done) => setTimeout(done));
  };
  turn = turn.then(async () => {
    try {
      postMessage({ id, found: await calls[call](...given, told) });
    } catch (error) {
      const known = error instanceof Error && error.constructor === Error;
      const fatal = call === "open" || call === "begin";
      postMessage({ id, failed: known ? error.message : fatal ? DAMAGED : `The model in this page stopped (${error}): load the page again.` });
    }
  });
};
