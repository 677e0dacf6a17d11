"""The Triton kernel of :mod:`snnkernels.kernels.fused_conv`; imported by what launches it.

Rows of a tile of the matrix product are ``TC`` time steps of ``BP`` output positions (row ``r`` is
step ``r // BP`` of position ``r % BP``), columns are output channels, and the inner loop runs over
the taps of the convolution and blocks of ``BK`` input channels. So there are as many tiles as the
unfused product has, and a thread block holds all it needs for ``TC`` steps of its neurons: the
accumulator is split along time and the neurons step through it in registers, membranes staying
there from one chunk of ``TC`` steps to the next.
"""

import triton
import triton.language as tl

__all__ = ["fused_conv_kernel"]


@triton.jit
def _step(v, x, theta, STRICT: tl.constexpr):
    m = v + x
    fired = m > theta if STRICT else m >= theta
    return tl.where(fired, m - theta, m), fired.to(tl.int32)


@triton.jit
def _step_if(v, x, theta, live, STRICT: tl.constexpr, EVEN_T: tl.constexpr):
    """A step that is none (spike 0, the same membrane) behind the last one."""
    after, fired = _step(v, x, theta, STRICT)
    if not EVEN_T:
        after = tl.where(live, after, v)
        fired = tl.where(live, fired, 0)
    return after, fired


@triton.jit
def _scan4(v, x0, x1, x2, x3, theta, left, t: tl.constexpr,
           STRICT: tl.constexpr, EVEN_T: tl.constexpr):  # fmt: skip
    v, s0 = _step_if(v, x0, theta, left > t, STRICT, EVEN_T)
    v, s1 = _step_if(v, x1, theta, left > t + 1, STRICT, EVEN_T)
    v, s2 = _step_if(v, x2, theta, left > t + 2, STRICT, EVEN_T)
    v, s3 = _step_if(v, x3, theta, left > t + 3, STRICT, EVEN_T)
    return v, s0 | (s1 << 1) | (s2 << 2) | (s3 << 3)


@triton.jit
def _split4(x, BP: tl.constexpr, BN: tl.constexpr):
    """The four [BP, BN] of x [BP, BN, 4]."""
    even, odd = tl.split(tl.reshape(x, (BP, BN, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _scan(v, acc, theta, left, TC: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
          STRICT: tl.constexpr, EVEN_T: tl.constexpr):  # fmt: skip
    """TC steps of the neurons [BP, BN] on currents [TC * BP, BN]; bit t of the word is spike t."""
    if TC == 1:
        v, word = _step_if(v, acc, theta, left > 0, STRICT, EVEN_T)
    else:
        x = tl.permute(tl.reshape(acc, (TC, BP, BN)), (1, 2, 0))
        if TC == 2:
            x0, x1 = tl.split(x)
            v, s0 = _step_if(v, x0, theta, left > 0, STRICT, EVEN_T)
            v, s1 = _step_if(v, x1, theta, left > 1, STRICT, EVEN_T)
            word = s0 | (s1 << 1)
        elif TC == 4:
            x0, x1, x2, x3 = _split4(x, BP, BN)
            v, word = _scan4(v, x0, x1, x2, x3, theta, left, 0, STRICT, EVEN_T)
        else:
            tl.static_assert(TC == 8)
            even, odd = tl.split(tl.reshape(x, (BP, BN, 4, 2)))
            x0, x2, x4, x6 = _split4(even, BP, BN)
            x1, x3, x5, x7 = _split4(odd, BP, BN)
            v, low = _scan4(v, x0, x1, x2, x3, theta, left, 0, STRICT, EVEN_T)
            v, high = _scan4(v, x4, x5, x6, x7, theta, left, 4, STRICT, EVEN_T)
            word = low | (high << 4)
    return v, word


@triton.jit
def _start(v_ptr, neuron, stored, column, dtype: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
           FULL_V: tl.constexpr):  # fmt: skip
    """The membranes [BP, BN] before the first step."""
    if FULL_V:
        v = tl.load(v_ptr + neuron, mask=stored, other=0)
    else:
        v = tl.zeros((BP, BN), dtype) + tl.load(v_ptr + column)[None, :]
    return v


@triton.jit
def _sum_of_4(a, b, c, d, QUADS: tl.constexpr):
    """Of spikes: at most 4, exact in every type."""
    if a.dtype.is_fp8():  # which have no sums of their own
        total = a.to(tl.float16) + b.to(tl.float16) + (c.to(tl.float16) + d.to(tl.float16))
    elif QUADS and a.dtype.primitive_bitwidth == 8:
        # Four bytes a register: nothing carries over. The interpreter has no assembly.
        total = tl.inline_asm_elementwise(
            "{ .reg .b32 s; add.u32 s, $1, $2; add.u32 $0, $3, $4; add.u32 $0, $0, s; }",
            "=r,r,r,r,r", [a, b, c, d], dtype=a.dtype, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        total = a + b + (c + d)
    return total


@triton.jit
def _as_spikes(word, t, dtype: tl.constexpr):
    bit = (word >> t) & 1
    # There is no way from integers to 8-bit floats.
    return bit.to(tl.float32).to(dtype) if dtype.is_floating() else bit.to(dtype)


# Of the sizes only those of channels decide how wide a load is: the rest makes no more kernels.
@triton.jit(do_not_specialize=["T", "B", "H", "W", "OH", "OW", "r_step"])
def fused_conv_kernel(
    a_ptr, w_ptr, bias_ptr, theta_ptr, v_ptr, r_ptr, scale_ptr, o_ptr, count_ptr, v_out_ptr,
    T, B, H, W, C, OH, OW, N, r_step,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    POOL: tl.constexpr,  # 1, or 2: sums of 2 x 2 spikes
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr, STRICT: tl.constexpr,
    FULL_V: tl.constexpr,  # v is [B, OH, OW, N], not [N]
    OUTPUT: tl.constexpr,  # 0 nothing, 1 a value for each spike, 2 words of up to 32 steps
    COUNT: tl.constexpr, V_OUT: tl.constexpr,
    ONE: tl.constexpr,  # T <= TC
    QUADS: tl.constexpr,  # compiled, not interpreted
    EVEN_T: tl.constexpr, EVEN_C: tl.constexpr,  # T is a multiple of TC, C of BK
    TC: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile: BP positions, BN channels, all T steps.

    a [T, B, H, W, C] and w [N, KH, KW, C]; r [T, B, OH, OW, N] or, with r_step 0, [B, OH, OW, N];
    bias, theta and scale [N]; outputs [.., B, OH, OW, N]. All contiguous.
    """
    BM: tl.constexpr = TC * BP
    ACC: tl.constexpr = tl.int32 if w_ptr.dtype.element_ty == tl.int8 else tl.float32
    # Positions are fewer than 2**31, offsets are not: divisions of 64 bits would take as many
    # instructions as a part of the product.
    M = B * OH * OW
    blocks_m = tl.cdiv(M, BP)
    blocks_n = tl.cdiv(N, BN)
    # Neighbours in time share rows and columns in the L2 cache: GROUP row blocks per column block.
    pid = tl.program_id(0)
    group = pid // (GROUP * blocks_n)
    size = tl.minimum(blocks_m - group * GROUP, GROUP)
    inside = pid % (GROUP * blocks_n)
    block_m = group * GROUP + inside % size
    block_n = inside // size

    rows = tl.arange(0, BM)
    step = rows // BP
    position = block_m * BP + rows % BP
    in_map = position < M
    line = position // OW
    ow = position - line * OW
    image = line // OH
    oh = line - image * OH
    iy0 = oh * SH - PH
    ix0 = ow * SW - PW
    LH = H // POOL
    LW = W // POOL
    pixel = (image.to(tl.int64) * H + iy0 * POOL) * W + ix0 * POOL

    channels = tl.arange(0, BK)
    columns = block_n * BN + tl.arange(0, BN)
    # Columns behind the last one compute the last one again, and are not stored.
    column = tl.minimum(columns, N - 1)
    w_tile = w_ptr + (column.to(tl.int64) * (KH * KW) * C)[None, :] + channels[:, None]

    places = block_m * BP + tl.arange(0, BP)
    stored = (places < M)[:, None] & (columns < N)[None, :]
    neuron = places.to(tl.int64)[:, None] * N + columns[None, :]
    if not ONE:
        v = _start(v_ptr, neuron, stored, column, ACC, BP, BN, FULL_V)
    count = tl.zeros((BP, BN), tl.int32)
    words = tl.zeros((BP, BN), tl.int32)

    blocks_c = tl.cdiv(C, BK)
    chunks = tl.cdiv(T, TC)
    if ONE:
        chunks = 1
    for chunk in range(0, chunks):
        first = chunk * TC
        t = first + step
        alive = in_map
        if not EVEN_T:
            alive = alive & (t < T)
        # What is added once is what the sum starts from.
        acc = tl.zeros((BM, BN), ACC)
        if BIAS:
            acc += tl.load(bias_ptr + column)[None, :]
        if RESIDUAL:
            at = (t.to(tl.int64) * r_step + position.to(tl.int64) * N)[:, None] + columns[None, :]
            inside_r = alive[:, None] & (columns < N)[None, :]
            r = tl.load(r_ptr + at, mask=inside_r, other=0).to(ACC)
            if SCALED:
                r = r * tl.load(scale_ptr + column)[None, :]
            acc += r
        a_row = ((t.to(tl.int64) * B * H * W + pixel) * C)[:, None]
        a_tile = a_ptr + a_row + channels[None, :]
        for k in range(0, KH * KW * blocks_c):
            tap = k // blocks_c
            c0 = (k - tap * blocks_c) * BK
            ky = tap // KW * DH
            kx = tap % KW * DW
            ok = alive
            if PH > 0 or PW > 0:
                iy = iy0 + ky
                ix = ix0 + kx
                ok = ok & (iy >= 0) & (iy < LH) & (ix >= 0) & (ix < LW)
            mask = ok[:, None]
            if not EVEN_C:
                mask = mask & (c0 + channels < C)[None, :]
            here = a_tile + ((ky * W + kx) * POOL * C + c0)
            a = tl.load(here, mask=mask, other=0.0)
            if POOL == 2:
                below = here + W * C
                b = tl.load(here + C, mask=mask, other=0.0)
                c = tl.load(below, mask=mask, other=0.0)
                d = tl.load(below + C, mask=mask, other=0.0)
                a = _sum_of_4(a, b, c, d, QUADS)
            if EVEN_C:
                w = tl.load(w_tile + (tap * C + c0))
            else:
                w = tl.load(w_tile + (tap * C + c0), mask=(c0 + channels < C)[:, None], other=0.0)
            a = a.to(w.dtype)
            acc = tl.dot(a, w, acc, out_dtype=ACC)
        theta = tl.load(theta_ptr + column)[None, :]
        if ONE:  # only now: no registers for it during the product
            v = _start(v_ptr, neuron, stored, column, ACC, BP, BN, FULL_V)
        v, word = _scan(v, acc, theta, T - first, TC, BP, BN, STRICT, EVEN_T)
        if OUTPUT == 1:
            # A loop, not unrolled: with one store alone Triton runs the neurons in its layout, with
            # one for each step it takes every step's spikes across the threads on their own.
            for i in range(0, tl.minimum(T - first, TC)):
                o = o_ptr + (first + i).to(tl.int64) * M * N + neuron
                tl.store(o, _as_spikes(word, i, o_ptr.dtype.element_ty), mask=stored)
        if COUNT:
            for i in tl.static_range(TC):
                count += (word >> i) & 1
        if OUTPUT == 2:
            words |= word << (first % 32)
            if (first % 32 + TC >= 32) | (first + TC >= T):
                o = o_ptr + (first // 32).to(tl.int64) * M * N + neuron
                tl.store(o, words.to(o_ptr.dtype.element_ty), mask=stored)
                words = tl.zeros((BP, BN), tl.int32)
        if V_OUT:  # noqa: SIM102 - one is known when compiling, the other is not
            if first + TC >= T:
                tl.store(v_out_ptr + neuron, v, mask=stored)
    if COUNT:
        tl.store(count_ptr + neuron, count, mask=stored)
