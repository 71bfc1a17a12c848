"""Numba kernels of the sparse step on the processor, each over a range of rows and without the GIL."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch's Adam
PREFETCH_LINES = 16  # cache lines of a row asked for ahead of its use; the hardware follows from there
FAST = {"reassoc", "contract", "nsz", "arcp"}  # sums may be reordered; NaN and infinity stay themselves


def compiled(function: Callable, **options: Any) -> Any:
    """Compile a function once and keep it on disk, or anew in every process if none can be written to."""
    try:
        return njit(function, nogil=True, cache=True, **options)
    except RuntimeError:  # numba found no folder for its cache: the installation and the home are read-only
        return njit(function, nogil=True, **options)


kernel = partial(compiled, fastmath=FAST, error_model="numpy", boundscheck=False)


@intrinsic
def bits(typingctx, value):
    """Reinterpret a float32 as uint32."""

    def build(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), build


@intrinsic
def unbits(typingctx, value):
    """Reinterpret a uint32 as float32."""

    def build(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), build


@intrinsic
def prefetch(typingctx, array, row):
    """Ask for the first lines of array[row] before they are needed."""

    def build(context, builder, signature, args):
        struct = context.make_array(signature.args[0])(context, builder, args[0])
        stride = builder.extract_value(struct.strides, 0)
        base = builder.ptrtoint(struct.data, ir.IntType(64))
        row = builder.sext(args[1], ir.IntType(64)) if args[1].type.width < 64 else args[1]
        address = builder.add(base, builder.mul(stride, row))
        byte = ir.IntType(8).as_pointer()
        word = ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        )
        for line in range(PREFETCH_LINES):
            pointer = builder.inttoptr(builder.add(address, ir.IntType(64)(64 * line)), byte)
            builder.call(function, [pointer, word(0), word(2), word(1)])
        return context.get_dummy_value()

    return types.void(array, row), build


@kernel
def round_near(value):
    """Return the bits of the nearest bf16."""
    u = bits(np.float32(value))
    return np.uint16((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@kernel
def round_up(value):
    """Return the bits of a bf16 that is not below value."""
    u = bits(np.float32(value))
    if value > 0 and (u & np.uint32(0xFFFF)):
        u += np.uint32(0x10000)
    return np.uint16(u >> np.uint32(16))


@kernel
def widen(half):
    return unbits(np.uint32(half) << np.uint32(16))


@kernel
def halve(row, out):
    """Write row's nearest bf16; return ‖row‖ and ‖row - bf16(row)‖, both rounded up."""
    whole, rest = np.float32(0), np.float32(0)
    for k in range(len(row)):
        half = round_near(row[k])
        out[k] = half
        gap = row[k] - widen(half)
        whole += row[k] * row[k]
        rest += gap * gap
    return math.sqrt(whole) * np.float32(1.001), math.sqrt(rest) * np.float32(1.001)


@kernel
def augment_tokens(x, b_dec, slack, centred, out, a, b):
    d = x.shape[1]
    for j in range(a, b):
        for k in range(d):
            centred[j, k] = x[j, k] - b_dec[k]
        if out.shape[1]:
            whole, rest = halve(centred[j], out[j])
            out[j, d] = out[j, d + 1] = round_near(1.0)
            out[j, d + 2] = round_up(rest + slack * whole)
            out[j, d + 3] = round_up(whole + rest)


@kernel
def augment_latents(W_enc, b_enc, slack, out, a, b):
    d = W_enc.shape[1]
    for i in range(a, b):
        row = out[i - a]
        whole, rest = halve(W_enc[i], row)
        row[d] = round_near(b_enc[i])
        low = b_enc[i] - widen(row[d])
        row[d + 1] = round_up(max(low, np.float32(0)) + slack * abs(b_enc[i]) + np.float32(1e-30))
        row[d + 2] = round_up(whole)
        row[d + 3] = round_up(rest)


@kernel
def dot(u, v):
    total = np.float32(0)
    for k in range(len(u)):
        total += u[k] * v[k]
    return total


@kernel
def survivors(product, W_enc, b_enc, x, count, token, value, a, b):
    """Recompute in float32 where the bf16 product is positive; keep what is positive then."""
    lanes = np.uint64(0x8000800080008000)
    n = 0
    found = np.empty(product.shape[1] * 4, np.int32)
    for i in range(a, b):
        before, candidates = n, 0
        words = product[i - a]
        for c in range(len(words)):
            if words[c] & lanes != lanes:
                word = words[c]
                for lane in range(4):
                    half = np.uint16(word >> np.uint64(16 * lane))
                    if half != 0 and half < 0x8000:
                        found[candidates] = 4 * c + lane
                        candidates += 1
        for c in range(candidates):
            if c + 1 < candidates:
                prefetch(x, found[c + 1])
            z = dot(W_enc[i], x[found[c]]) + b_enc[i]
            if z > 0:
                token[n] = found[c]
                value[n] = z
                n += 1
        count[i] = n - before
    return n


@kernel
def compress(product, b_enc, count, token, value, a, b):
    n = 0
    for i in range(a, b):
        before, bias = n, b_enc[i]
        row = product[i - a]
        for c in range(0, len(row), 64):
            hits = np.int32(len(row) - c < 64)
            if not hits:
                for j in range(64):  # a few vector comparisons: most stretches hold nothing
                    hits += np.int32(row[c + j] > -bias)
            if hits:
                for j in range(c, min(c + 64, len(row))):
                    if row[j] + bias > 0:
                        token[n] = j
                        value[n] = row[j] + bias
                        n += 1
        count[i] = n - before
    return n


@kernel
def strongest(z, k, count, latent, value, a, b):
    for j in range(a, b):
        row, found, least = z[j - a], 0, 0
        for i in range(len(row)):
            v = row[i]
            if found < k:
                if v > 0:
                    latent[j, found], value[j, found] = i, v
                    found += 1
            elif v > value[j, least]:
                latent[j, least], value[j, least] = i, v
            else:
                continue
            if found == k:  # few get here: a row of 1,024 in random order replaces k·ln(1024/k) times
                least = 0
                for e in range(1, k):
                    if value[j, e] < value[j, least]:
                        least = e
        count[j] = found


@kernel
def by_token(start, token, value, n):
    begin = np.zeros(n + 1, np.int64)
    for e in range(len(token)):
        begin[token[e] + 1] += 1
    for j in range(n):
        begin[j + 1] += begin[j]
    place = begin[:-1].copy()
    latent, moved = np.empty(len(token), np.int32), np.empty(len(token), np.float32)
    for i in range(len(start) - 1):
        for e in range(start[i], start[i + 1]):
            to = place[token[e]]
            latent[to] = i
            moved[to] = value[e]
            place[token[e]] = to + 1
    return begin, latent, moved


@kernel
def decode(start, latent, value, W_dec, b_dec, out, a, b):
    for j in range(a, b):
        row = out[j]
        for k in range(len(row)):
            row[k] = b_dec[k]
        e, stop = start[j], start[j + 1]
        while e + 4 <= stop:  # four rows at a time: the sum is then read and written a quarter as often
            for ahead in range(e + 4, min(e + 8, stop)):
                prefetch(W_dec, latent[ahead])
            f0, f1, f2, f3 = value[e], value[e + 1], value[e + 2], value[e + 3]
            w0, w1 = W_dec[latent[e]], W_dec[latent[e + 1]]
            w2, w3 = W_dec[latent[e + 2]], W_dec[latent[e + 3]]
            for k in range(len(row)):
                row[k] += f0 * w0[k] + f1 * w1[k] + f2 * w2[k] + f3 * w3[k]
            e += 4
        for last in range(e, stop):
            f0, w0 = value[last], W_dec[latent[last]]
            for k in range(len(row)):
                row[k] += f0 * w0[k]


@kernel
def slopes(x, x_hat, weight, over_norm, loss, slope, a, b):
    n, d = x.shape
    for j in range(a, b):
        length, error = np.float32(0), np.float32(0)
        for k in range(d):
            gap = x_hat[j, k] - x[j, k]
            error += gap * gap
            length += x[j, k] * x[j, k]
        scale = weight[j] if len(weight) else np.float32(1)
        if over_norm:
            scale /= max(math.sqrt(length), np.float32(1e-8)) * d
        loss[j] = error * scale
        scale *= np.float32(2) / n
        for k in range(d):
            slope[j, k] = scale * (x_hat[j, k] - x[j, k])


@kernel
def entries(start, token, value, W_dec, x, g, penalty, i, for_enc, for_dec):
    """Add latent i's gradients to for_enc and for_dec; return those of its bias and along its row."""
    bias, along = np.float32(0), np.float32(0)
    row = W_dec[i]
    e, stop = start[i], start[i + 1]
    while e + 2 <= stop:  # two at a time: the sums are then read and written half as often
        for ahead in range(e + 2, min(e + 4, stop)):
            prefetch(g, token[ahead])
            prefetch(x, token[ahead])
        g0, x0, f0 = g[token[e]], x[token[e]], value[e]
        g1, x1, f1 = g[token[e + 1]], x[token[e + 1]], value[e + 1]
        q0, q1 = dot(g0, row), dot(g1, row)
        z0, z1 = q0 + penalty, q1 + penalty
        bias += z0 + z1
        along += f0 * q0 + f1 * q1
        for k in range(len(row)):
            for_enc[k] += z0 * x0[k] + z1 * x1[k]
            for_dec[k] += f0 * g0[k] + f1 * g1[k]
        e += 2
    if e < stop:
        g0, x0, f0 = g[token[e]], x[token[e]], value[e]
        q0 = dot(g0, row)
        bias += q0 + penalty
        along += f0 * q0
        for k in range(len(row)):
            for_enc[k] += (q0 + penalty) * x0[k]
            for_dec[k] += f0 * g0[k]
    return bias, along


@kernel
def adam(p, m, v, g, rate, root):
    """Take torch's Adam step on a row: rate is lr / (1 - β1^t), root is 1 / √(1 - β2^t)."""
    for k in range(len(p)):
        m[k] = np.float32(BETA1) * m[k] + np.float32(1 - BETA1) * g[k]
        v[k] = np.float32(BETA2) * v[k] + np.float32(1 - BETA2) * g[k] * g[k]
        p[k] -= rate * m[k] / (np.sqrt(v[k]) * root + np.float32(EPS))


@kernel
def gradient(lists, x, g, penalty, W_dec, ghost, i, for_enc, for_dec):
    """Write latent i's gradients; return that of its bias and the decoder's component along the row."""
    start, token, value = lists
    index, ghost_enc, ghost_bias, ghost_dec = ghost
    for_enc[:] = 0
    for_dec[:] = 0
    slope, along = entries(start, token, value, W_dec, x, g, penalty, i, for_enc, for_dec)
    if len(index) and index[i] >= 0:
        extra = index[i]
        slope += ghost_bias[extra]
        along += dot(ghost_dec[extra], W_dec[i])
        for k in range(len(for_enc)):
            for_enc[k] += ghost_enc[extra, k]
            for_dec[k] += ghost_dec[extra, k]
    return slope, along


@kernel
def gradients(lists, x, g, penalty, W_dec, ghost, for_enc, for_bias, for_dec, a, b):
    for i in range(a, b):
        for_bias[i], _ = gradient(lists, x, g, penalty, W_dec, ghost, i, for_enc[i], for_dec[i])


@kernel
def update(lists, x, g, penalty, enc, bias, dec, ghost, rate, root, pull, a, b):
    (W_enc, m_enc, v_enc), (b_enc, m_bias, v_bias), (W_dec, m_dec, v_dec) = enc, bias, dec
    d = W_enc.shape[1]
    for_enc, for_dec, for_bias = np.empty(d, np.float32), np.empty(d, np.float32), np.empty(1, np.float32)
    for i in range(a, b):
        row = W_dec[i]
        slope, along = gradient(lists, x, g, penalty, W_dec, ghost, i, for_enc, for_dec)
        for k in range(d):
            for_dec[k] -= along * row[k]
            pull[k] += slope * W_enc[i, k]
        for_bias[0] = slope
        adam(W_enc[i], m_enc[i], v_enc[i], for_enc, rate, root)
        adam(b_enc[i : i + 1], m_bias[i : i + 1], v_bias[i : i + 1], for_bias, rate, root)
        adam(row, m_dec[i], v_dec[i], for_dec, rate, root)
        scale = 1 / max(math.sqrt(dot(row, row)), np.float32(1e-12))
        for k in range(d):
            row[k] *= scale
