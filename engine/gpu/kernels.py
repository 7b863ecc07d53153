# mypy: ignore-errors
"""The kernels. Sums run in float32, in an order that depends on a row's own keys and on the tile sizes, never on other rows.

What differs from step to step is a plain argument and not a constant, so that serving compiles few kernels.
"""

from engine.gpu.triton import jit, tl


@jit("split", "splits")
def attend_kernel(
    query, keys, values, out, sums, stats, slots, bits, order, reach, positions, first, queries, offset, start, count, base, sinks,
    scale, softcap, window, split, splits, query_token,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, FOLD: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile's queries over one split of its keys, for one key head. Base-2 logarithms throughout."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    total = tl.load(count + tile)
    low = part * split
    if low < total:
        high = tl.minimum(low + split, total)
        row = tl.load(offset + tile) + tl.arange(0, TILE)
        real = row // FOLD < tl.load(queries + tile)
        token = tl.load(order + tl.load(first + tile) + row // FOLD, mask=real, other=0).to(tl.int64)
        head = kv_head * FOLD + row % FOLD
        dim = tl.arange(0, WIDE)
        inside = dim < DIM
        q = tl.load(
            query + token[:, None] * query_token + head[:, None] * DIM + dim[None, :], mask=real[:, None] & inside[None, :], other=0.0
        )
        last = tl.load(reach + token, mask=real, other=-1)
        seen = tl.load(bits + token, mask=real, other=0)
        position = tl.load(positions + token, mask=real, other=0)
        branch = tl.load(base + tile)
        list_of = slots + tl.load(start + tile)
        top = tl.full([TILE], float("-inf"), tl.float32)
        total_weight = tl.zeros([TILE], tl.float32)
        mixed = tl.zeros([TILE, WIDE], tl.float32)
        for at in range(low, high, BLOCK):
            key = at + tl.arange(0, BLOCK)
            there = key < high
            slot = tl.load(list_of + key, mask=there, other=0).to(tl.int64)
            place = (slot[:, None] * KV_HEADS + kv_head) * DIM + dim[None, :]
            k = tl.load(keys + place, mask=there[:, None] & inside[None, :], other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if SOFTCAP:
                score = softcap * (2.0 / (1.0 + tl.exp(-2.0 * score / softcap)) - 1.0)
            bit = tl.minimum(tl.maximum(key - branch, 0), 63).to(tl.int64)
            drafted = ((seen[:, None] >> bit[None, :]) & 1) != 0
            chained = key[None, :] <= last[:, None]
            if WINDOW:
                chained = chained & (key[None, :] > position[:, None] - window)
            visible = tl.where(key[None, :] < branch, chained, drafted) & there[None, :] & real[:, None]
            score = tl.where(visible, score * 1.4426950408889634, float("-inf"))
            high_score = tl.maximum(top, tl.max(score, 1))
            safe = tl.where(high_score == float("-inf"), 0.0, high_score)
            weight = tl.exp2(score - safe[:, None])
            fade = tl.exp2(top - safe)
            v = tl.load(values + place, mask=there[:, None] & inside[None, :], other=0.0)
            total_weight = total_weight * fade + tl.sum(weight, 1)
            mixed = mixed * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
            top = high_score
        spot = token * HEADS + head
        if SINGLE:
            if SINKS:
                sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
                most = tl.maximum(top, sink)
                fade = tl.exp2(top - most)
                mixed = mixed * fade[:, None]
                total_weight = total_weight * fade + tl.exp2(sink - most)
            mixed = mixed / tl.where(total_weight == 0.0, 1.0, total_weight)[:, None]
            tl.store(out + spot[:, None] * DIM + dim[None, :], mixed.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])
        else:
            cell = spot * splits + part
            tl.store(sums + cell[:, None] * DIM + dim[None, :], mixed, mask=real[:, None] & inside[None, :])
            tl.store(stats + cell * 2, top, mask=real)
            tl.store(stats + cell * 2 + 1, total_weight, mask=real)


@jit("split", "splits")
def combine_kernel(
    sums, stats, out, keys_of, sinks, split, splits,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query head, in order."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    parts = (tl.load(keys_of + token) + split - 1) // split
    dim = tl.arange(0, WIDE)
    inside = dim < DIM
    cell = (token.to(tl.int64) * HEADS + head) * splits
    most = tl.full([1], float("-inf"), tl.float32)
    for part in range(parts):
        most = tl.maximum(most, tl.load(stats + (cell + part) * 2))
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        most = tl.maximum(most, sink)
    safe = tl.where(most == float("-inf"), 0.0, most)
    weight = tl.zeros([1], tl.float32)
    mixed = tl.zeros([WIDE], tl.float32)
    for part in range(parts):
        fade = tl.exp2(tl.load(stats + (cell + part) * 2) - safe)
        weight += fade * tl.load(stats + (cell + part) * 2 + 1)
        mixed += fade * tl.load(sums + (cell + part) * DIM + dim, mask=inside, other=0.0)
    if SINKS:
        weight += tl.exp2(sink - safe)
    mixed = mixed / tl.where(weight == 0.0, 1.0, weight)
    tl.store(out + (token.to(tl.int64) * HEADS + head) * DIM + dim, mixed.to(out.dtype.element_ty), mask=inside)


@jit()
def scatter_kernel(
    mixed, query, keys, values, write, positions, cos, sin,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """One head of one token out of [q | k | v]: queries and keys turned by their position, keys and values written to their slots.

    A slot below 0 is a padded token's: nothing is written.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, HALF)
    inside = dim < DIM // 2
    source = mixed + (token * (HEADS + 2 * KV_HEADS) + head) * DIM + dim
    left = tl.load(source, mask=inside, other=0.0)
    right = tl.load(source + DIM // 2, mask=inside, other=0.0)
    slot = tl.load(write + token).to(tl.int64)
    if ROTARY:  # noqa: SIM102, known when the kernel is compiled
        if head < HEADS + KV_HEADS:
            angle = tl.load(positions + token).to(tl.int64) * DIM + dim
            c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
            a, b = left.to(tl.float32), right.to(tl.float32)
            left = (a * c - b * s).to(left.dtype)
            right = (b * c + a * s).to(right.dtype)
    if head < HEADS:
        target = query + (token * HEADS + head) * DIM + dim
        tl.store(target, left, mask=inside)
        tl.store(target + DIM // 2, right, mask=inside)
    elif (head < HEADS + KV_HEADS) & (slot >= 0):
        target = keys + (slot * KV_HEADS + head - HEADS) * DIM + dim
        tl.store(target, left, mask=inside)
        tl.store(target + DIM // 2, right, mask=inside)
    elif slot >= 0:
        target = values + (slot * KV_HEADS + head - HEADS - KV_HEADS) * DIM + dim
        tl.store(target, left, mask=inside)
        tl.store(target + DIM // 2, right, mask=inside)


@jit()
def norm_kernel(x, weight, bias, out, width, eps, WIDE: tl.constexpr, CENTRED: tl.constexpr):
    """RMS normalisation of one row, or layer normalisation when CENTRED."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDE)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0)
    if CENTRED:
        value = tl.where(inside, value - tl.sum(value, 0) / width, 0.0)
    value = value / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    if CENTRED:
        value = value * scale.to(tl.float32) + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    else:
        value = value.to(scale.dtype).to(tl.float32) * scale.to(tl.float32)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


@jit("rows")
def linear_kernel(
    x, weight, bias, residual, out, rows, columns, inner,
    TILE: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = act(x weight^T + bias) + residual. GATED: weight is [gate; up], act silu(gate) * up. Weights are read once per TILE rows."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    depth = tl.arange(0, DEPTH)
    real = row < rows
    inside = column < columns
    x_at = x + row[:, None].to(tl.int64) * inner + depth[None, :]
    w_at = weight + column[:, None].to(tl.int64) * inner + depth[None, :]
    far = columns.to(tl.int64) * inner
    total = tl.zeros([TILE, WIDTH], tl.float32)
    second = tl.zeros([TILE, WIDTH], tl.float32)
    for at in range(0, inner, DEPTH):
        if EVEN:
            a = tl.load(x_at + at, mask=real[:, None], other=0.0)
            b = tl.load(w_at + at, mask=inside[:, None], other=0.0)
        else:
            a = tl.load(x_at + at, mask=real[:, None] & (at + depth < inner)[None, :], other=0.0)
            b = tl.load(w_at + at, mask=inside[:, None] & (at + depth < inner)[None, :], other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
        if GATED:
            if EVEN:
                b = tl.load(w_at + far + at, mask=inside[:, None], other=0.0)
            else:
                b = tl.load(w_at + far + at, mask=inside[:, None] & (at + depth < inner)[None, :], other=0.0)
            second = tl.dot(a, tl.trans(b), second, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * second
    if GELU:
        total = total / (1.0 + tl.exp(-1.5957691216057308 * (total + 0.044715 * total * total * total)))
    spot = row[:, None].to(tl.int64) * columns + column[None, :]
    mask = real[:, None] & inside[None, :]
    if RESIDUAL:
        total += tl.load(residual + spot, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + spot, total.to(out.dtype.element_ty), mask=mask)


@jit()
def gate_kernel(x, out, width, BLOCK: tl.constexpr):
    """silu(gate) * up of one row of [gate | up]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)
