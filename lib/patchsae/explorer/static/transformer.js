// Blocks of a transformer as open_clip has them: x + attention(norm(x)), then x + mlp(norm(x)).

const up = (n, step) => Math.ceil(n / step) * step;

/** The error function to 1.2e-7 (Abramowitz & Stegun 7.1.26). */
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const y = 1 - ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t * Math.exp(-x * x);
  return x < 0 ? -y : y;
}

const ACTIVATIONS = {
  gelu: (x) => 0.5 * x * (1 + erf(x * Math.SQRT1_2)),
  quick: (x) => x / (1 + Math.exp(-1.702 * x)),
};

/** Write the layer norm of rows of x into y; both may be one. */
function normalise(x, y, rows, width, gain, shift) {
  for (let r = 0, o = 0; r < rows; r++, o += width) {
    let mean = 0, square = 0;
    for (let k = 0; k < width; k++) mean += x[o + k];
    mean /= width;
    for (let k = 0; k < width; k++) square += (x[o + k] - mean) ** 2;
    const scale = 1 / Math.sqrt(square / width + 1e-5);
    for (let k = 0; k < width; k++) y[o + k] = (x[o + k] - mean) * scale * gain[k] + shift[k];
  }
}

/** Blocks of one width, with room for `most` tokens. */
class Transformer {
  constructor(products, weights, prefix, { layers, width, heads, activation }, most) {
    Object.assign(this, { products, width, heads, layers, act: ACTIVATIONS[activation] });
    const rows = up(most, 8) + 8, hidden = weights.shape(`${prefix}0.fc.w`)[0], take = (n) => products.take(n);
    this.hidden = hidden;
    // products read whole rows of B: what torch keeps as [out, in] is turned over
    this.blocks = [...Array(layers).keys()].map((l) => {
      const name = (part) => `${prefix}${l}.${part}`, matrix = (part) => products.put(weights.turned(name(part)));
      const vector = (part) => products.put(weights.get(name(part)));
      return {
        n1: [weights.get(name("n1.w")), weights.get(name("n1.b"))], n2: [weights.get(name("n2.w")), weights.get(name("n2.b"))],
        qkv: matrix("qkv.w"), qkvb: vector("qkv.b"), out: matrix("out.w"), outb: vector("out.b"),
        fc: matrix("fc.w"), fcb: vector("fc.b"), proj: matrix("proj.w"), projb: vector("proj.b"),
      };
    });
    this.room = {
      x: take(rows * width), normed: take(rows * width), qkv: take(rows * 3 * width), mixed: take(rows * width),
      wide: take(rows * hidden), keys: take((width / heads) * rows), scores: take(rows * rows), added: take(rows * width),
    };
  }

  /** The tokens that `run` reads and writes: float32 [tokens, width]. */
  stream(tokens) {
    return this.products.at(this.room.x, tokens * this.width);
  }

  /**
   * Send the stream's tokens through blocks from … to. `enter(block, x)` may change what a block gets. Of the last
   * block, the tokens from `first` on, `wanted` of them, are enough where they are all that is read; they keep their place.
   */
  run(tokens, from, to, { causal = false, enter, first = 0, wanted = tokens } = {}) {
    for (let block = from; block < to; block++) {
      enter?.(block, this.stream(tokens));
      const last = block === to - 1;
      this.block(this.blocks[block], tokens, causal, last ? first : 0, last ? wanted : tokens);
    }
  }

  block(w, tokens, causal, first, wanted) {
    const { products: p, width: d, hidden, room } = this, side = d / this.heads;
    const x = this.stream(tokens), normed = p.at(room.normed, tokens * d), columns = up(tokens, 8);
    normalise(x, normed, tokens, d, ...w.n1);
    p.multiply(room.normed, d, w.qkv, 3 * d, room.qkv, 3 * d, tokens, d, 3 * d, w.qkvb);
    const qkv = p.at(room.qkv, tokens * 3 * d), keys = p.at(room.keys, side * columns);
    const scores = p.at(room.scores, up(wanted, 4) * columns), scale = 1 / Math.sqrt(side);
    for (let h = 0; h < this.heads; h++) {
      for (let k = 0; k < side; k++) {
        for (let t = 0; t < tokens; t++) keys[k * columns + t] = qkv[t * 3 * d + d + h * side + k] * scale;
        keys.fill(0, k * columns + tokens, (k + 1) * columns);
      }
      p.multiply(room.qkv + 4 * (first * 3 * d + h * side), 3 * d, room.keys, columns, room.scores, columns, wanted, side, columns);
      for (let t = 0; t < wanted; t++) soften(scores, t * columns, causal ? first + t + 1 : tokens, columns);
      p.multiply(room.scores, columns, room.qkv + 4 * (2 * d + h * side), 3 * d, room.mixed + 4 * h * side, d, wanted, columns, side);
    }
    p.multiply(room.mixed, d, w.out, d, room.added, d, wanted, d, d, w.outb);
    const some = x.subarray(first * d, (first + wanted) * d), added = p.at(room.added, wanted * d);
    for (let e = 0; e < some.length; e++) some[e] += added[e];
    normalise(some, normed, wanted, d, ...w.n2);
    p.multiply(room.normed, d, w.fc, hidden, room.wide, hidden, wanted, d, hidden, w.fcb);
    const wide = p.at(room.wide, wanted * hidden), act = this.act;
    for (let e = 0; e < wide.length; e++) wide[e] = act(wide[e]);
    p.multiply(room.wide, hidden, w.proj, d, room.added, d, wanted, hidden, d, w.projb);
    for (let e = 0; e < some.length; e++) some[e] += added[e];
  }
}

/** Turn the first `seen` scores of a row into shares, and the others into 0. */
function soften(scores, at, seen, columns) {
  let top = -Infinity, sum = 0;
  for (let k = at; k < at + seen; k++) if (scores[k] > top) top = scores[k];
  for (let k = at; k < at + seen; k++) sum += scores[k] = Math.exp(scores[k] - top);
  for (let k = at; k < at + seen; k++) scores[k] /= sum;
  scores.fill(0, at + seen, at + columns);
}

/** Return x [width] · matrix [width, e]. */
function projected(x, matrix) {
  if (!matrix) return Float32Array.from(x);
  const size = matrix.length / x.length, out = new Float64Array(size);
  for (let k = 0; k < x.length; k++) for (let e = 0; e < size; e++) out[e] += x[k] * matrix[k * size + e];
  return Float32Array.from(out);
}

function unit(x) {
  const length = Math.max(1e-12, Math.hypot(...x));
  return x.map((v) => v / length);
}
