"""The Triton kernels of the exact sparse step; gpu.py launches them and explains the whole."""

import triton
import triton.language as tl


@triton.jit
def round_kernel(
    rows, high, norm, lost, COUNT, D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    exists = row < COUNT
    live = exists[:, None] & (column < D)[None, :]
    value = tl.load(rows + row[:, None] * D + column[None, :], mask=live, other=0.0)
    rounded = value.to(tl.bfloat16)
    rest = value - rounded.to(tl.float32)
    inside = exists[:, None] & (column < K)[None, :]
    tl.store(high + row[:, None] * K + column[None, :], rounded, mask=inside)  # columns D to K become 0
    # 1e-30 keeps squares that underflow from hiding a non-zero length
    tl.store(norm + row, tl.sqrt(tl.sum(value * value, 1) + 1e-30), mask=exists)
    tl.store(lost + row, tl.sqrt(tl.sum(rest * rest, 1) + 1e-30), mask=exists)


@triton.jit
def mask_kernel(
    w, x, w_more, x_more, words, M, N, K, WORDS,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, MORE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # WIDTH row tiles share a column tile while it is in L2, and the other way round
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    first = program // (WIDTH * tiles_n) * WIDTH
    width = tl.minimum(tiles_m - first, WIDTH)
    tile_m = first + program % (WIDTH * tiles_n) % width
    tile_n = program % (WIDTH * tiles_n) // width
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in, column_in = (row % M).to(tl.int64), (column % N).to(tl.int64)  # spares masks in the tail
    k = tl.arange(0, BLOCK_K)
    w_at = w + row_in[:, None] * K + k[None, :]
    x_at = x + column_in[None, :] * K + k[:, None]
    z = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN:
            left, right = tl.load(w_at), tl.load(x_at)
        else:
            left = tl.load(w_at, mask=(start + k)[None, :] < K, other=0.0)
            right = tl.load(x_at, mask=(start + k)[:, None] < K, other=0.0)
        z = tl.dot(left, right, z, input_precision=PRECISION)
        w_at += BLOCK_K
        x_at += BLOCK_K
    # Bias and bound come last and through the tensor cores: as vectors they would fill the registers
    more = tl.arange(0, MORE)
    left = tl.load(w_more + row_in[:, None] * MORE + more[None, :])
    right = tl.load(x_more + column_in[None, :] * MORE + more[:, None])
    z = tl.dot(left, right, z)
    bits = ((z > 0) & (column < N)[None, :]).to(tl.uint32)
    bits = tl.reshape(bits, (BLOCK_M, BLOCK_N // 32, 32))
    word = tl.sum(bits << tl.arange(0, 32).to(tl.uint32)[None, None, :], axis=2)
    at = row.to(tl.int64)[:, None] * WORDS + tile_n * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)[None, :]
    tl.store(words + at, word.to(tl.int32, bitcast=True), mask=(row < M)[:, None])


@triton.jit
def _ones(word):
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def count_kernel(words, count, M, WORDS, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.int32)
    for first in range(0, WORDS, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = (row < M)[:, None] & (at < WORDS)[None, :]
        word = tl.load(words + row[:, None] * WORDS + at[None, :], mask=inside, other=0)
        total += _ones(word.to(tl.uint32, bitcast=True))
    tl.store(count + row, tl.sum(total, 1), mask=row < M)


@triton.jit
def expand_kernel(words, start, token, M, WORDS, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    base = tl.load(start + row, mask=row < M, other=0)
    for first in range(0, WORDS, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = (row < M)[:, None] & (at < WORDS)[None, :]
        word = tl.load(words + row[:, None] * WORDS + at[None, :], mask=inside, other=0)
        word = word.to(tl.uint32, bitcast=True)
        count = _ones(word)
        slot = base[:, None] + tl.cumsum(count, 1) - count
        base += tl.sum(count, 1)
        # Words are mostly empty: as many rounds as the fullest word has bits, instead of 32
        while tl.max(word) > 0:
            rest = word & (word - 1)
            lowest = (word ^ rest).to(tl.float32)  # a power of two; its exponent is the bit's number
            bit = (lowest.to(tl.int32, bitcast=True) >> 23) - 127
            tl.store(token + slot, at[None, :] * 32 + bit, mask=word != 0)
            slot += (word != 0).to(tl.int64)
            word = rest


@triton.jit
def dot_kernel(
    rows, latent, vectors, token, bias, value, SIZE,
    D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = entry < SIZE
    i = tl.load(latent + entry, mask=inside, other=0).to(tl.int64)
    j = tl.load(token + entry, mask=inside, other=0).to(tl.int64)
    products = tl.zeros((BLOCK_E, BLOCK_D), dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        live = inside[:, None] & (column < D)[None, :]
        row = tl.load(rows + i[:, None] * D + column[None, :], mask=live, other=0.0)
        products += row * tl.load(vectors + j[:, None] * D + column[None, :], mask=live, other=0.0)
    b = tl.load(bias + i, mask=inside, other=0.0)
    tl.store(value + entry, tl.sum(products, 1) + b, mask=inside)


@triton.jit
def decode_kernel(
    x, b_dec, W_dec, start, latent, value, weight, x_hat, g, error, tokens,
    OVER_NORM: tl.constexpr, WEIGHTED: tl.constexpr,
    D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    live = column < D
    out = tl.load(b_dec + column, mask=live, other=0.0)
    last = tl.load(start + j + 1)
    # Latents ascend for every token, so programs that run together read nearby rows of W_dec
    for first in range(tl.load(start + j), last, BLOCK_E):
        entry = first + tl.arange(0, BLOCK_E)
        inside = entry < last
        i = tl.load(latent + entry, mask=inside, other=0).to(tl.int64)
        f = tl.load(value + entry, mask=inside, other=0.0)
        at = W_dec + i[:, None] * D + column[None, :]
        rows = tl.load(at, mask=inside[:, None] & live[None, :], other=0.0)
        out += tl.sum(f[:, None] * rows, 0)
    target = tl.load(x + j * D + column, mask=live, other=0.0)
    scale = 1.0
    if OVER_NORM:
        scale = 1.0 / (tl.maximum(tl.sqrt(tl.sum(target * target, 0)), 1e-8) * D)
    if WEIGHTED:
        scale = scale * tl.load(weight + j)
    residual = out - target
    tl.store(x_hat + j * D + column, out, mask=live)
    tl.store(g + j * D + column, residual * (2.0 * scale / tokens), mask=live)
    tl.store(error + j, tl.sum(residual * residual, 0) * scale)


@triton.jit
def _accumulate(
    first, last, row, x, g, token, value, l1,
    D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_D)
    live = column < D
    to_dec = tl.zeros((BLOCK_D,), dtype=tl.float32)
    to_enc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    to_bias = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for begin in range(first, last, BLOCK_E):
        entry = begin + tl.arange(0, BLOCK_E)
        inside = entry < last
        j = tl.load(token + entry, mask=inside, other=0).to(tl.int64)
        f = tl.load(value + entry, mask=inside, other=0.0)
        at = j[:, None] * D + column[None, :]
        both = inside[:, None] & live[None, :]
        g_rows = tl.load(g + at, mask=both, other=0.0)  # one load serves dz and the decoder's gradient
        x_rows = tl.load(x + at, mask=both, other=0.0)
        dz = tl.where(inside, tl.sum(g_rows * row[None, :], 1) + l1, 0.0)
        to_dec += tl.sum(f[:, None] * g_rows, 0)
        to_enc += tl.sum(dz[:, None] * x_rows, 0)
        to_bias += dz
    return to_dec, to_enc, tl.sum(to_bias, 0)


@triton.jit
def split_kernel(
    x, g, token, value, start, split, owner, W_dec, part_dec, part_enc, part_bias, l1, M,
    D: tl.constexpr, CAP: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    i = tl.load(owner + part)
    if i >= M:  # the grid is an upper bound: the number of parts is known on the device only
        return
    column = tl.arange(0, BLOCK_D)
    live = column < D
    row = tl.load(W_dec + i * D + column, mask=live, other=0.0)
    first = tl.load(start + i) + (part - tl.load(split + i)) * CAP
    last = tl.minimum(first + CAP, tl.load(start + i + 1))
    to_dec, to_enc, to_bias = _accumulate(first, last, row, x, g, token, value, l1, D, BLOCK_E, BLOCK_D)
    tl.store(part_dec + part * D + column, to_dec, mask=live)
    tl.store(part_enc + part * D + column, to_enc, mask=live)
    tl.store(part_bias + part, to_bias)


@triton.jit
def _adam(p, grad, m, v, pace, root, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr):
    m = m + (grad - m) * (1 - BETA1)
    v = v * BETA2 + grad * grad * (1 - BETA2)
    return p - pace * m / (tl.sqrt(v) / root + EPS), m, v


@triton.jit
def update_kernel(
    x, g, token, value, start, split, part_dec, part_enc, part_bias,
    slot, ghost_enc, ghost_bias, ghost_dec,
    W_enc, b_enc, W_dec, enc_m, enc_v, bias_m, bias_v, dec_m, dec_v, to_b_dec,
    M, l1, pace, root,
    UPDATE: tl.constexpr, GHOST: tl.constexpr, CENTRED: tl.constexpr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    D: tl.constexpr, GROUP: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    live = column < D
    back = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for i in range(group * GROUP, tl.minimum(group * GROUP + GROUP, M)):
        at = i * D + column
        dec = tl.load(W_dec + at, mask=live, other=0.0)
        part, end = tl.load(split + i), tl.load(split + i + 1)
        first, last = tl.load(start + i), tl.load(start + i + 1)
        first = tl.where(part < end, last, first)  # the entries of a split latent are summed already
        to_dec, to_enc, to_bias = _accumulate(first, last, dec, x, g, token, value, l1, D, BLOCK_E, BLOCK_D)
        for p in range(part, end):
            to_dec += tl.load(part_dec + p * D + column, mask=live, other=0.0)
            to_enc += tl.load(part_enc + p * D + column, mask=live, other=0.0)
            to_bias += tl.load(part_bias + p)
        if GHOST:
            k = tl.load(slot + i)
            dead = live & (k >= 0)
            to_dec += tl.load(ghost_dec + k * D + column, mask=dead, other=0.0)
            to_enc += tl.load(ghost_enc + k * D + column, mask=dead, other=0.0)
            to_bias += tl.load(ghost_bias + k, mask=k >= 0, other=0.0)
        enc = tl.load(W_enc + at, mask=live, other=0.0)
        if CENTRED:
            back -= to_bias * enc  # z sees x - b_dec through the row as it was before the step
        if UPDATE:
            to_dec -= tl.sum(to_dec * dec, 0) * dec
            # All loads before the first store, so that they wait together
            em, ev = tl.load(enc_m + at, mask=live, other=0.0), tl.load(enc_v + at, mask=live, other=0.0)
            dm, dv = tl.load(dec_m + at, mask=live, other=0.0), tl.load(dec_v + at, mask=live, other=0.0)
            bias, bm, bv = tl.load(b_enc + i), tl.load(bias_m + i), tl.load(bias_v + i)
            enc, em, ev = _adam(enc, to_enc, em, ev, pace, root, BETA1, BETA2, EPS)
            dec, dm, dv = _adam(dec, to_dec, dm, dv, pace, root, BETA1, BETA2, EPS)
            bias, bm, bv = _adam(bias, to_bias, bm, bv, pace, root, BETA1, BETA2, EPS)
            length = tl.maximum(tl.sqrt(tl.sum(dec * dec, 0)), 1e-12)
            tl.store(W_enc + at, enc, mask=live)
            tl.store(enc_m + at, em, mask=live)
            tl.store(enc_v + at, ev, mask=live)
            tl.store(W_dec + at, dec / length, mask=live)
            tl.store(dec_m + at, dm, mask=live)
            tl.store(dec_v + at, dv, mask=live)
            tl.store(b_enc + i, bias)
            tl.store(bias_m + i, bm)
            tl.store(bias_v + i, bv)
        else:  # gradients take the place of the first moments
            tl.store(enc_m + at, to_enc, mask=live)
            tl.store(dec_m + at, to_dec, mask=live)
            tl.store(bias_m + i, to_bias)
    tl.store(to_b_dec + group * D + column, back, mask=live)
