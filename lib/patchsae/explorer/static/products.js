// Matrix products in WebAssembly SIMD: the module's bytes are written here, so that there is no binary to trust.
// First of the worker's files; followed, in one script, by unpacking.js, transformer.js, latentcode.js, words.js,
// framing.js and worker.js.

/** Return numbers in LEB128, as the format has them. */
function leb(value, signed = false) {
  const bytes = [];
  for (;;) {
    const low = value & 127;
    value = signed ? value >> 7 : value >>> 7;
    const done = signed ? (value === 0 && !(low & 64)) || (value === -1 && (low & 64)) : value === 0;
    bytes.push(done ? low : low | 128);
    if (done) return bytes;
  }
}

/**
 * Assemble gemm(a, b, bias, c, M, K, N, lda, ldb, ldc): C [M, N] = A [M, K] · B [K, N] + bias [N], float32.
 *
 * Pointers and row strides are in bytes; M and K are multiples of 4, N of 8. Four rows by eight columns stay in
 * registers, and B is read along its rows.
 */
function gemmModule() {
  const [A, B, BIAS, C, M, K, N, LDA, LDB, LDC] = Array(10).keys();
  const [I, J, L, PB, PC] = [10, 11, 12, 13, 14], PA = [15, 16, 17, 18], sums = [19, 20, 21, 22, 23, 24, 25, 26];
  const [B0, B1, ONE] = [27, 28, 29];
  const get = (x) => [0x20, ...leb(x)], set = (x) => [0x21, ...leb(x)], constant = (n) => [0x41, ...leb(n, true)];
  const add = [0x6a], multiply = [0x6c], less = [0x48];
  const more = (x, n) => [...get(x), ...constant(n), ...add, ...set(x)];
  const simd = (code, ...rest) => [0xfd, ...leb(code), ...rest];
  const load = (at, offset) => [...get(at), ...simd(0x00, 0, ...leb(offset))]; // aligned to nothing in particular
  const spread = (at, offset) => [...get(at), ...simd(0x09, 0, ...leb(offset))];
  const store = (at, value, offset) => [...get(at), ...get(value), ...simd(0x0b, 0, ...leb(offset))];
  const loop = (counter, step, limit, body) => [
    ...constant(0), ...set(counter), 0x03, 0x40, ...body, ...more(counter, step), ...get(counter), ...get(limit), ...less,
    0x0d, 0, 0x0b,
  ];
  const times = (to, by) => [...get(to), ...get(ONE), ...get(by), ...simd(0xe6), ...simd(0xe4), ...set(to)];
  const step = (k) => [
    ...load(PB, 0), ...set(B0), ...load(PB, 16), ...set(B1),
    ...PA.flatMap((row, r) => [...spread(row, 4 * k), ...set(ONE), ...times(sums[2 * r], B0), ...times(sums[2 * r + 1], B1)]),
    ...get(PB), ...get(LDB), ...add, ...set(PB),
  ];
  const block = [
    ...get(A), ...get(I), ...get(LDA), ...multiply, ...add, ...set(PA[0]),
    ...[1, 2, 3].flatMap((r) => [...get(PA[r - 1]), ...get(LDA), ...add, ...set(PA[r])]),
    ...get(B), ...get(J), ...constant(4), ...multiply, ...add, ...set(PB),
    ...get(BIAS), ...get(J), ...constant(4), ...multiply, ...add, ...set(PC),
    ...sums.flatMap((sum, s) => [...load(PC, s % 2 ? 16 : 0), ...set(sum)]),
    ...loop(L, 4, K, [...[0, 1, 2, 3].flatMap(step), ...PA.flatMap((row) => more(row, 16))]),
    ...get(C), ...get(I), ...get(LDC), ...multiply, ...add, ...get(J), ...constant(4), ...multiply, ...add, ...set(PC),
    ...[0, 1, 2, 3].flatMap((r) => [
      ...store(PC, sums[2 * r], 0), ...store(PC, sums[2 * r + 1], 16), ...get(PC), ...get(LDC), ...add, ...set(PC),
    ]),
  ];
  const body = [2, ...leb(9), 0x7f, ...leb(11), 0x7b, ...loop(J, 8, N, loop(I, 4, M, block)), 0x0b];
  const text = (name) => [name.length, ...[...name].map((c) => c.charCodeAt(0))];
  const section = (id, ...content) => [id, ...leb(content.length), ...content];
  return new Uint8Array([
    0, 0x61, 0x73, 0x6d, 1, 0, 0, 0,
    ...section(1, 1, 0x60, 10, ...Array(10).fill(0x7f), 0),
    ...section(2, 1, ...text("m"), ...text("m"), 2, 0, 1),
    ...section(3, 1, 0),
    ...section(7, 1, ...text("gemm"), 0, 0),
    ...section(10, 1, ...leb(body.length), ...body),
  ]);
}

const PAGE = 65536;

/** Memory from which arrays are taken, and products of them. */
class Products {
  constructor() {
    this.memory = new WebAssembly.Memory({ initial: 64 });
    this.used = 16;
    const instance = new WebAssembly.Instance(new WebAssembly.Module(gemmModule()), { m: { m: this.memory } });
    this.gemm = instance.exports.gemm;
    this.zeros = this.take(4096);
  }

  /** Return the place of `count` floats, all 0. Arrays seen before are seen anew after it. */
  take(count) {
    const at = this.used;
    this.used += 4 * Math.ceil(count / 4 + 1) * 4;
    const lacking = Math.ceil((this.used - this.memory.buffer.byteLength) / PAGE);
    if (lacking > 0) this.memory.grow(Math.max(lacking, 32));
    return at;
  }

  /** See `count` floats. */
  at(place, count) {
    return new Float32Array(this.memory.buffer, place, count);
  }

  put(values) {
    const place = this.take(values.length);
    this.at(place, values.length).set(values);
    return place;
  }

  /** Write C [M, N] = A [M, K] · B [K, N] + bias; strides in floats. Rows up to the next four of M are written too. */
  multiply(a, lda, b, ldb, c, ldc, M, K, N, bias = this.zeros) {
    this.gemm(a, b, bias, c, (M + 3) & ~3, K, N, 4 * lda, 4 * ldb, 4 * ldc);
  }
}
