// Texts: CLIP's tokenizer (byte pairs, as open_clip's) and its text tower, with learned words where a model has them.

const CURLED = [[/[\u02bc\u2018-\u201b]/g, "'"], [/[\u201c-\u201f]/g, '"']];
// what open_clip's ftfy does to plain text: ligatures and wide letters apart, no control characters
const APART = /[\uFF01-\uFF5E\uFFE0-\uFFE6\u3000\uFB00-\uFB06\u0132\u0133\u0149\u01C4-\u01CC\u01F1-\u01F3]/gu;
const UNSEEN = /[\u0000-\u0008\u000B\u000E-\u001A\u001C-\u001F\u007F\u206A-\u206F\uFEFF\uFFF9-\uFFFC]/g;

class Tokenizer {
  constructor(merges, context) {
    const printable = [];
    for (const [from, to] of [[33, 126], [161, 172], [174, 255]]) for (let b = from; b <= to; b++) printable.push(b);
    const letters = new Map(printable.map((b) => [b, String.fromCharCode(b)]));
    for (let b = 0, n = 0; b < 256; b++) if (!letters.has(b)) letters.set(b, String.fromCharCode(256 + n++));
    const vocabulary = [...letters.values()], pairs = merges.split("\n").map((line) => line.split(" "));
    vocabulary.push(...vocabulary.map((letter) => letter + "</w>"), ...pairs.map((pair) => pair.join("")));
    vocabulary.push("<start_of_text>", "<end_of_text>");
    Object.assign(this, { letters, context, size: vocabulary.length, start: vocabulary.length - 2, end: vocabulary.length - 1 });
    this.ids = new Map(vocabulary.map((word, id) => [word, id]));
    this.ranks = new Map(pairs.map((pair, rank) => [pair.join(" "), rank]));
    this.words = /<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/giu;
  }

  static clean(text) {
    let plain = text.replace(APART, (c) => c.normalize("NFKC")).replace(UNSEEN, "");
    for (const [curled, straight] of CURLED) plain = plain.replace(curled, straight);
    return plain.normalize("NFC").split(/\s+/).filter(Boolean).join(" ").toLowerCase();
  }

  pieces(word) {
    if (word === "<start_of_text>" || word === "<end_of_text>") return [word];
    let parts = Array.from(new TextEncoder().encode(word), (byte) => this.letters.get(byte));
    parts[parts.length - 1] += "</w>";
    while (parts.length > 1) {
      let best = Infinity;
      for (let i = 1; i < parts.length; i++) best = Math.min(best, this.ranks.get(`${parts[i - 1]} ${parts[i]}`) ?? Infinity);
      if (best === Infinity) break;
      const merged = [];
      for (let i = 0; i < parts.length; i++) {
        const joins = i + 1 < parts.length && this.ranks.get(`${parts[i]} ${parts[i + 1]}`) === best;
        merged.push(joins ? parts[i] + parts[++i] : parts[i]);
      }
      parts = merged;
    }
    return parts;
  }

  /** Return the ids of a text, cut off where the tower's context ends. */
  encode(text) {
    const words = Tokenizer.clean(text).match(this.words) ?? [];
    const ids = [this.start, ...words.flatMap((word) => this.pieces(word)).map((piece) => this.ids.get(piece)), this.end];
    return ids.length > this.context ? { ids: [...ids.slice(0, this.context - 1), this.end], cut: true } : { ids, cut: false };
  }
}

class TextTower {
  constructor(products, weights, config) {
    Object.assign(this, { weights, config });
    this.tokenizer = new Tokenizer(config.merges, config.context);
    this.tower = new Transformer(products, weights, "text.", config, config.context);
    for (const name of ["words", "pos", "norm.w", "norm.b"]) this[name] = weights.get(`text.${name}`);
    this.projection = weights.has("text.proj") ? weights.get("text.proj") : null;
  }

  /** Return the embedding of token ids; `learned` words [depth, n, width] stand in for those after the start. */
  embed(ids, learned = null) {
    const { width: d, layers } = this.config, count = ids.length, x = this.tower.stream(count);
    const [depth, n] = learned?.shape ?? [0, 0];
    const put = (stream, block) => stream.set(learned.values.subarray(block * n * d, (block * n + Math.min(n, count - 1)) * d), d);
    ids.forEach((id, t) => x.set(this.words.subarray(id * d, id * d + d), t * d));
    if (depth) put(x, 0);
    for (let e = 0; e < count * d; e++) x[e] += this.pos[e];
    const enter = (block, stream) => block && block < depth && put(stream, block);
    this.tower.run(count, 0, layers, { causal: true, enter, first: count - 1, wanted: 1 });
    const end = this.tower.stream(count).slice((count - 1) * d);
    normalise(end, end, 1, d, this["norm.w"], this["norm.b"]);
    return projected(end, this.projection);
  }

  /** Return one vector of length 1 per class: the mean over templates, or that of the learned words. */
  async classes(names, templates, learned, told) {
    const vectors = new Float32Array(names.length * this.config.embed), tokens = [], cut = [];
    for (const [c, name] of names.entries()) {
      const sum = new Float64Array(this.config.embed), plain = name.replaceAll("_", " ");
      for (const template of templates) {
        const text = this.tokenizer.encode(template.replaceAll("{}", () => plain));
        if (text.cut) cut.push(name);
        tokens.push(text.ids);
        unit(this.embed(text.ids, learned)).forEach((v, e) => (sum[e] += v));
      }
      vectors.set(unit(sum), c * this.config.embed);
      if (c % 8 === 7) await told((c + 1) / names.length);
    }
    return { vectors, tokens, cut: [...new Set(cut)] };
  }
}
