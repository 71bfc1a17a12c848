// The autoencoder: tokens to a few latents each, and tokens with latents turned (masking/masked_tokens.py).

const KINDS = ["relu", "topk", "batchtopk", "jumprelu"]; // sae/config.py's Activation
const RELEASED_BIAS = 0.105131256516992; // minus the released code's -0.105… on every coordinate

class Autoencoder {
  constructor(products, weights, config, most) {
    Object.assign(this, { products, ...config });
    if (!KINDS.includes(this.kind)) throw new Error(`This page knows no activation "${this.kind}": make it again with this version.`);
    this.decoder = weights.get("sae.dec");
    this.bias = weights.get("sae.dec.b");
    this.threshold = weights.has("sae.threshold") ? weights.get("sae.threshold") : null;
    this.encoder = products.put(weights.turned("sae.enc"));
    this.encoderBias = products.put(weights.get("sae.enc.b"));
    this.input = products.take(up(most, 8) * this.width);
    this.output = products.take(up(most, 8) * this.latents);
  }

  /** Return the active latents of tokens [count, width], token by token, with the norm that decoding undoes. */
  encode(tokens, count) {
    const { width: d, latents, products: p, norm } = this, z = p.at(this.input, count * d);
    const mean = new Float32Array(count), scale = new Float32Array(count).fill(1);
    for (let t = 0; t < count; t++) {
      const x = tokens.subarray(t * d, t * d + d), by = t * d;
      if (norm === "layer_norm") mean[t] = x.reduce((a, b) => a + b, 0) / d;
      if (norm !== "none") scale[t] = Math.sqrt(x.reduce((a, v) => a + (v - mean[t]) ** 2, 0) / d);
      const divide = norm === "layer_norm" ? scale[t] + 1e-5 : norm === "none" ? 1 : Math.max(scale[t], 1e-12);
      for (let k = 0; k < d; k++) z[by + k] = (x[k] - mean[t]) / divide - (this.centred ? this.bias[k] : 0);
    }
    p.multiply(this.input, d, this.encoder, latents, this.output, latents, count, d, latents, this.encoderBias);
    const f = p.at(this.output, count * latents), start = new Uint32Array(count + 1), latent = [], value = [];
    for (let t = 0; t < count; t++) {
      const row = f.subarray(t * latents, (t + 1) * latents), least = this.kind === "topk" ? this.kth(row) : 0;
      let room = this.kind === "topk" ? this.k - row.reduce((n, v) => n + (v > least), 0) : Infinity;
      for (let s = 0; s < latents; s++) {
        const limit = this.threshold && this.threshold[this.threshold.length > 1 ? s : 0];
        const on = row[s] > 0 && (limit === null || row[s] > limit) && (row[s] > least || (row[s] === least && room-- > 0) || least <= 0);
        if (on) latent.push(s), value.push(row[s]);
      }
      start[t + 1] = latent.length;
    }
    return { start, latent: Uint32Array.from(latent), value: Float32Array.from(value), mean, scale };
  }

  /** Return the k-th largest of a row; what is equal to it counts in the order of the latents. */
  kth(row) {
    return Float32Array.from(row).sort()[row.length - this.k];
  }

  /**
   * Return tokens with latents turned: each active one counts its gain, `rest` where none is given. In mode
   * add_error the autoencoder's error stays, in the others the tokens become what the latents write.
   */
  turned(tokens, code, { gains = [], rest = 1, patch = null, mode = "add_error" }) {
    const { width: d } = this, out = Float32Array.from(tokens), gain = new Float32Array(this.latents).fill(rest);
    for (const [s, by] of gains) {
      if (!(s >= 0 && s < this.latents)) throw new Error(`There is no latent ${s}: choose a whole number from 0 to ${this.latents - 1}.`);
      if (!Number.isFinite(by)) throw new Error(`Latent ${s} is turned by what is no number.`);
      gain[s] = by;
    }
    const count = code.start.length - 1, kept = mode === "add_error";
    if (patch !== null && !(patch >= 0 && patch < count - 1)) throw new Error(`There is no patch ${patch}.`);
    const rows = patch === null ? [...Array(count).keys()] : [patch + 1];
    for (const t of rows) {
      const row = out.subarray(t * d, t * d + d);
      if (!kept) for (let k = 0; k < d; k++) row[k] = this.bias[k] * code.scale[t] + code.mean[t] + (mode === "replace_bias" ? RELEASED_BIAS : 0);
      for (let e = code.start[t]; e < code.start[t + 1]; e++) {
        const s = code.latent[e], by = code.value[e] * (kept ? gain[s] - 1 : gain[s]) * code.scale[t];
        if (by) for (let k = 0, o = s * d; k < d; k++) row[k] += by * this.decoder[o + k];
      }
    }
    return out;
  }

  /** Return what a block `acts-…` holds: by latent, its mean over tokens and where on the patches it fires. */
  byLatent(code) {
    const count = code.start.length - 1, sums = new Map();
    for (let t = 0; t < count; t++)
      for (let e = code.start[t]; e < code.start[t + 1]; e++) {
        const entry = sums.get(code.latent[e]) ?? sums.set(code.latent[e], { sum: 0, patch: [], value: [] }).get(code.latent[e]);
        entry.sum += code.value[e];
        if (t) entry.patch.push(t - 1), entry.value.push(code.value[e]);
      }
    const latent = Uint32Array.from(sums.keys()).sort(), start = new Uint32Array(latent.length + 1);
    const entries = [...latent].map((s) => sums.get(s));
    entries.forEach(({ patch }, i) => (start[i + 1] = start[i] + patch.length));
    return {
      latent, start, mean: Float32Array.from(entries, ({ sum }) => sum / count),
      patch: Uint32Array.from(entries.flatMap(({ patch }) => patch)), value: Float32Array.from(entries.flatMap(({ value }) => value)),
    };
  }
}
