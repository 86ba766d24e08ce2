"""Triton kernels of local self-attention for windows up to 7 x 7 and heads of 8, 16, 32 or 64 channels.

One program computes two rows of eight positions, for several heads of one image, one head after the other. With K <= 7,
the windows of the tile fit in K + 1 rows and 16 columns, and a position reaches at most one of the columns x and x + 8.
Therefore the scores of a key row, a product [16 positions, 16 columns], are *folded* to [16, 8] within each thread: of
each pair, the larger is kept, after the columns out of reach have been set to -inf. This halves the work per score,
which is what limits these kernels (`scripts/kernel_counts.py` counts it). All K + 1 rows of folded scores stay in
registers, so the softmax needs no rescaling:

  forward, query tiles:     S = fold(q k^T + q.rel); weights = softmax(S); out = unfold(weights) v
  backward 1, query tiles:  dS = weights (fold(dout v^T) - delta), delta = sum(dout out); dq, the embeddings' gradients
  backward 2, key tiles:    the same for the queries that reach a tile of keys: dv += weights^T dout, dk += dS^T q

Products have operands in the inputs' dtype (float32: three TF32 products) and float32 sums, so with half precision the
weights, dS and the embeddings are rounded before they are multiplied, as in FlashAttention. Each result is written by a
single program, without atomics and with a fixed order of summation. A NaN or an infinite value affects all queries of
every tile that reads it, i.e. slightly more queries than those whose window contains it.

Channels are handled in pieces of 16, the depth of a tensor core's product. Heads of 8 channels fill a piece with a copy
of themselves, and the other operand has zeros there. Positions outside the image are read from its edge and masked
afterwards, because a clamped address costs less than a masked load.
"""

# Tuples grow by concatenation, because Triton's language lacks starred expressions.
# ruff: noqa: RUF005
# mypy: disable-error-code=assignment

import os

import triton
import triton.language as tl

CAST = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # the interpreter computes wrong bfloat16 products
LOG2_E = tl.constexpr(1.4426950408889634)  # 2^x is one instruction
FAR = tl.constexpr(-1e38)  # unlike -inf, zero times this is zero
SIZES = ["num_heads", "height", "width", "heads_per_program"]  # a kernel is compiled once for all their values

# The embeddings of a head, as triton_kernels.py arranges them: EDGE_ROWS rows of 16 N channels (a row of zeros, 8 rows
# of rel_height in the first half of the channels, 8 rows of rel_width in the second; rows from K on are zero); then,
# for each of the K + 1 key rows that two query rows reach, its embedding for the upper row beside that for the lower.
EDGE_ROWS = tl.constexpr(17)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _fold(x):
    """Fold [16, 16] to [16, 8] by the larger of columns x and x + 8; both are in one thread."""
    return tl.reduce(x.reshape(16, 2, 8), 1, _larger)


@triton.jit
def _twice(x, dtype: tl.constexpr):
    """Repeat [16, 8] to [16, 16]."""
    return tl.broadcast_to(x.to(dtype)[:, None, :], [16, 2, 8]).reshape(16, 16)


@triton.jit
def _times(a, b):
    if CAST:
        return (a.to(tl.float32) * b.to(tl.float32)).to(a.dtype)
    return a * b


@triton.jit
def _unfold(x, in_reach):
    """Spread [16, 8] over the 16 columns, zero out of reach; `in_reach` is [16, 16] of ones and zeros."""
    return _times(_twice(x, in_reach.dtype), in_reach)


@triton.jit
def _both_rows(x):
    """Repeat [8, 8] for the two rows of the tile."""
    return tl.broadcast_to(x[None, :, :], [2, 8, 8]).reshape(16, 8)


@triton.jit
def _dot(a, b, start, PRECISION: tl.constexpr):
    if CAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, start, input_precision=PRECISION)


@triton.jit
def _zeros(N: tl.constexpr):
    """Return sums [16, 16 N], in pieces, that are zero."""
    sums = ()
    for _ in tl.static_range(N):
        sums = sums + (tl.zeros([16, 16], tl.float32),)
    return sums


@triton.jit
def _add_products(sums, a, pieces, N: tl.constexpr, PRECISION: tl.constexpr):
    """Return sums + a b for b [16, 16 N] in pieces."""
    added = ()
    for i in tl.static_range(N):
        added = added + (_dot(a, pieces[i], sums[i], PRECISION),)
    return added


@triton.jit
def _over_channels(a, b, start, N: tl.constexpr, PRECISION: tl.constexpr):
    """Return start + a b^T for a and b [16, 16 N] in pieces."""
    for i in tl.static_range(N):
        start = _dot(a[i], tl.trans(b[i]), start, PRECISION)
    return start


@triton.jit
def _clamp(x, size):
    return tl.minimum(tl.maximum(x, 0), size - 1)


@triton.jit
def _place(num_heads, height, width, heads_per_program):
    """Return this program's image, first head, first row and first column."""
    tiles_w = tl.cdiv(width, 8)
    num_tiles = tiles_w * tl.cdiv(height, 2)
    groups = num_heads // heads_per_program
    pid = tl.program_id(0)
    tile = pid // groups % num_tiles
    b = pid // groups // num_tiles
    return b.to(tl.int64), pid % groups * heads_per_program, tile // tiles_w * 2, tile % tiles_w * 8


@triton.jit
def _positions(row0, column0, height, width):
    """Return, for the tile's 16 positions: row in the tile, row, column, existence, and the nearest row and column."""
    p = tl.arange(0, 16)
    rows, columns = row0 + p // 8, column0 + p % 8
    exists = (rows < height) & (columns < width)
    return p // 8, rows, columns, exists, _clamp(rows, height), _clamp(columns, width)


@triton.jit
def _head(pointer, strides, b, n, ALIGN: tl.constexpr):
    """Return the address of the head's first element."""
    # All strides except the channel stride are in units of ALIGN elements, so that the compiler can vectorise loads.
    return pointer + (b * strides[0] + n * strides[1]) * ALIGN


@triton.jit
def _at(strides, rows, columns, channels, ALIGN: tl.constexpr):
    """Return offsets [positions, channels] within a head."""
    return ((rows * strides[2] + columns * strides[3]) * ALIGN)[:, None] + (channels * strides[4])[None, :]


@triton.jit
def _pieces(pointer, strides, offsets, zero_from, N: tl.constexpr):
    """Load [16, 16 N] in pieces, with zeros in each piece from channel `zero_from` on."""
    pieces = ()
    for i in tl.static_range(N):
        piece = tl.load(pointer + i * 16 * strides[4] + offsets)
        if zero_from < 16:
            piece = tl.where((tl.arange(0, 16) < zero_from)[None, :], piece, 0.0)
        pieces = pieces + (piece,)
    return pieces


@triton.jit
def _keys(
    head, strides, offsets, row, height, columns_exist, N: tl.constexpr, ALIGN: tl.constexpr, ZERO_BORDER: tl.constexpr
):
    """Load 16 positions of a row in pieces: outside the image zeros or, unless ZERO_BORDER, what is at its edge."""
    pieces = ()
    for i in tl.static_range(N):
        at = head + _clamp(row, height) * strides[2] * ALIGN + i * 16 * strides[4] + offsets
        if ZERO_BORDER:
            exists = columns_exist & (row >= 0) & (row < height)
            pieces = pieces + (tl.load(at, mask=exists[:, None], other=0.0),)
        else:
            pieces = pieces + (tl.load(at),)
    return pieces


@triton.jit
def _by_row(query, strides, offsets, below, D: tl.constexpr, N: tl.constexpr):
    """Load the first half of q once for the embeddings of each of the two rows, with zeros in the other row."""
    pieces = ()
    for i in tl.static_range(N):
        owner = (tl.arange(0, 16) + i * 16) // (D // 2)  # from 2 on, channels that do not exist
        first = i * 16 % max(16, D // 2)
        mask = owner[None, :] == below[:, None]
        pieces = pieces + (tl.load(query + first * strides[4] + offsets, mask=mask, other=0.0),)
    return pieces


@triton.jit
def _table(tables, N: tl.constexpr):
    """Load the embeddings by offset, [8 + 8, 16 N] in pieces."""
    pieces = ()
    j, d = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    for i in tl.static_range(N):
        pieces = pieces + (tl.load(tables + ((1 + j) * (16 * N) + i * 16 + d)),)
    return pieces


@triton.jit
def _row_table(tables, y, D: tl.constexpr, N: tl.constexpr):
    """Load the embeddings of key row `y` for both query rows, repeated for 16 columns, [16, 16 N] in pieces."""
    pieces = ()
    column, d = tl.arange(0, 16)[:, None] * 0, tl.arange(0, 16)[None, :] % D
    for i in tl.static_range(N):
        pieces = pieces + (tl.load(tables + (EDGE_ROWS * 16 * N + y * D + i * 16 + column + d)),)
    return pieces


@triton.jit
def _reach(columns_exist, K: tl.constexpr, ZERO_BORDER: tl.constexpr):
    """Return which of 16 columns each position of the tile reaches, [16, 16]."""
    offset = tl.arange(0, 16)[None, :] - (tl.arange(0, 16) % 8)[:, None]
    reach = (offset >= 0) & (offset < K)
    if not ZERO_BORDER:
        reach &= columns_exist[None, :]
    return reach


@triton.jit
def _start(tables, by_offset, reach):
    """Return what the products for the scores start with: q . rel_width, or -inf out of reach."""
    start = tl.zeros([16, 16], tl.float32)
    if tables is not None:
        offset = tl.arange(0, 16)[None, :] - (tl.arange(0, 16) % 8)[:, None]
        start = tl.gather(by_offset, _clamp(offset, 8) + 8, 1)
    return tl.where(reach, start, float("-inf"))


@triton.jit
def _scores(
    q, by_row, start, keys, tables, row, y, height,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, ZERO_BORDER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the folded scores [16, 8] of key row `y` of the K + 1 that the tile reaches."""
    s = start
    if tables is not None:
        s = _over_channels(by_row, _row_table(tables, y, D, N), s, N, PRECISION)
    if keys is not None:
        s = _over_channels(q, keys, s, N, PRECISION)
    # The first key row is in reach of the upper query row alone, the last of the lower one.
    below = tl.arange(0, 16) // 8
    near = (y >= below) & (y - below < K)
    if not ZERO_BORDER:
        near &= (row >= 0) & (row < height)
    return tl.where(near[:, None], _fold(s), float("-inf"))


@triton.jit
def _share(row, columns, height, width):
    """Return, for positions of a row, one over the number of positions that their 2 x 2 pool averages."""
    count = tl.minimum(height - row // 2 * 2, 2) * tl.minimum(width - columns // 2 * 2, 2)
    return 1.0 / count.to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query, key, value, output, pooled, logsumexp, tables,
    query_strides, key_strides, value_strides, output_strides, pooled_strides, table_stride,
    num_heads, height, width, heads_per_program,
    K: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr, ZERO_BORDER: tl.constexpr, NULL_KEY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the output, log2(sum(exp(score))) and, if `pooled` is not None, the output's averages over 2 x 2."""
    N: tl.constexpr = max(D // 16, 1)
    b, n, row0, column0 = _place(num_heads, height, width, heads_per_program)
    p, d = tl.arange(0, 16), tl.arange(0, 16)
    below, rows, columns, exists, near_rows, near_columns = _positions(row0, column0, height, width)
    key_columns = column0 - K // 2 + tl.arange(0, 16)
    columns_exist = (key_columns >= 0) & (key_columns < width)
    reach = _reach(columns_exist, K, ZERO_BORDER)
    in_reach = reach.to(tl.float32).to(query.dtype.element_ty)

    query = _head(query, query_strides, b, n, ALIGN)
    value = _head(value, value_strides, b, n, ALIGN)
    output = _head(output, output_strides, b, n, ALIGN)
    logsumexp += (b * num_heads + n) * height * width
    query_at = _at(query_strides, near_rows, near_columns, d % D, ALIGN)
    value_at = _at(value_strides, p * 0, _clamp(key_columns, width), d % D, ALIGN)
    output_at = _at(output_strides, rows, columns, d, ALIGN)
    stored = exists[:, None] & (d < D)[None, :]
    if key is not None:
        key = _head(key, key_strides, b, n, ALIGN)
        key_at = _at(key_strides, p * 0, _clamp(key_columns, width), d % D, ALIGN)
    if tables is not None:
        tables += n * table_stride
        half_at = _at(query_strides, near_rows, near_columns, d % (D // 2), ALIGN)
    if pooled is not None:
        pooled = _head(pooled, pooled_strides, b, n, ALIGN)
        pool_columns = column0 // 2 + tl.arange(0, 4)
        pooled_at = _at(pooled_strides, row0 // 2 + tl.arange(0, 4) * 0, pool_columns, d, ALIGN)

    for _ in range(heads_per_program):
        q = _pieces(query, query_strides, query_at, D, N)
        by_row = None
        by_offset = None
        if tables is not None:
            by_row = _by_row(query, query_strides, half_at, below, D, N)
            by_offset = _over_channels(q, _table(tables, N), tl.zeros([16, 16], tl.float32), N, PRECISION)
        start = _start(tables, by_offset, reach)
        scores = ()
        # Finite, because -inf - (-inf) would be NaN.
        largest = tl.full([16, 8], 0.0 if NULL_KEY else FAR, tl.float32)
        for y in tl.static_range(K + 1):
            row = row0 - K // 2 + y
            keys = None
            if key is not None:
                keys = _keys(key, key_strides, key_at, row, height, columns_exist, N, ALIGN, ZERO_BORDER)
            s = _scores(q, by_row, start, keys, tables, row, y, height, K, D, N, ZERO_BORDER, PRECISION)
            scores = scores + (s,)
            largest = tl.maximum(largest, s)
        m = tl.max(largest, 1) * LOG2_E
        weights = ()
        sums = tl.zeros([16, 8], tl.float32)
        for y in tl.static_range(K + 1):
            w = tl.exp2(scores[y] * LOG2_E - m[:, None])
            sums += w
            weights = weights + (w.to(value.dtype.element_ty),)
        total = tl.sum(sums, 1)
        if NULL_KEY:
            total += tl.exp2(-m)
        total = tl.where(exists, total, 1.0)  # a padded position may have no key in reach
        tl.store(logsumexp + (rows * width + columns), m + tl.log2(total), mask=exists)
        for i in tl.static_range(N):
            out = tl.zeros([16, 16], tl.float32)
            for y in tl.static_range(K + 1):
                at = value + i * 16 * value_strides[4]
                row = row0 - K // 2 + y
                (v,) = _keys(at, value_strides, value_at, row, height, columns_exist, 1, ALIGN, ZERO_BORDER)
                out = _dot(_unfold(weights[y], in_reach), v, out, PRECISION)
            out *= (1.0 / total)[:, None]
            tl.store(output + i * 16 * output_strides[4] + output_at, out.to(output.dtype.element_ty), mask=stored)
            if pooled is not None:
                out = tl.where(exists[:, None], out, 0.0)
                mean = tl.sum(tl.sum(out.reshape(2, 4, 2, 16), 2), 0)
                mean *= _share(row0, _clamp(2 * pool_columns, width), height, width)[:, None]
                at = pooled + i * 16 * pooled_strides[4] + pooled_at
                mask = (2 * pool_columns < width)[:, None] & (d < D)[None, :]
                tl.store(at, mean.to(pooled.dtype.element_ty), mask=mask)

        query += query_strides[1] * ALIGN
        value += value_strides[1] * ALIGN
        output += output_strides[1] * ALIGN
        logsumexp += height * width
        if key is not None:
            key += key_strides[1] * ALIGN
        if tables is not None:
            tables += table_stride
        if pooled is not None:
            pooled += pooled_strides[1] * ALIGN


@triton.jit
def _store_sums(partial, sums, K: tl.constexpr, D: tl.constexpr, N: tl.constexpr):
    """Store sums [8 + 8 offsets, 16 N channels] in pieces as [2, K, D / 2]."""
    j = tl.arange(0, 16)[:, None]
    for i in tl.static_range(N):
        channel = tl.arange(0, 16)[None, :] + i * 16
        mask = (j // 8 == channel // (D // 2)) & (j % 8 < K)
        tl.store(partial + ((j // 8 * K + j % 8) * (D // 2) + channel % (D // 2)), sums[i], mask=mask)


@triton.jit(do_not_specialize=SIZES)
def backward_queries_kernel(
    grad_output, query, key, value, output, grad_query, logsumexp, by_key, tables, partial_rel,
    grad_output_strides, query_strides, key_strides, value_strides, output_strides, grad_query_strides, table_stride,
    num_heads, height, width, heads_per_program,
    K: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr, ZERO_BORDER: tl.constexpr, PRECISION: tl.constexpr,
    POOL: tl.constexpr, PER_HEAD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Write dq, this program's sums for the embeddings' gradients, and 8 numbers per query for the keys' kernel.

    These are q . rel_width - logsumexp for each offset, in units of ln 2, and delta in the last place.
    """
    N: tl.constexpr = max(D // 16, 1)
    b, n, row0, column0 = _place(num_heads, height, width, heads_per_program)
    p, d, j = tl.arange(0, 16), tl.arange(0, 16), tl.arange(0, 16)
    below, rows, columns, exists, near_rows, near_columns = _positions(row0, column0, height, width)
    key_columns = column0 - K // 2 + tl.arange(0, 16)
    columns_exist = (key_columns >= 0) & (key_columns < width)
    reach = _reach(columns_exist, K, ZERO_BORDER)
    in_reach = reach.to(tl.float32).to(query.dtype.element_ty)

    grad_output = _head(grad_output, grad_output_strides, b, n, ALIGN)
    query = _head(query, query_strides, b, n, ALIGN)
    value = _head(value, value_strides, b, n, ALIGN)
    output = _head(output, output_strides, b, n, ALIGN)
    grad_query = _head(grad_query, grad_query_strides, b, n, ALIGN)
    first = (b * num_heads + n) * height * width
    grad_at = _at(grad_output_strides, near_rows // POOL, near_columns // POOL, d % D, ALIGN)
    query_at = _at(query_strides, near_rows, near_columns, d % D, ALIGN)
    value_at = _at(value_strides, p * 0, _clamp(key_columns, width), d % D, ALIGN)
    output_at = _at(output_strides, near_rows, near_columns, d % D, ALIGN)
    grad_query_at = _at(grad_query_strides, rows, columns, d, ALIGN)
    stored = exists[:, None] & (d < D)[None, :]
    share = exists.to(tl.float32)  # a position that does not exist has no gradient
    if POOL == 2:
        share *= _share(row0, near_columns, height, width)
    share = tl.where((d < D)[None, :], share[:, None], 0.0).to(query.dtype.element_ty)
    if key is not None:
        key = _head(key, key_strides, b, n, ALIGN)
        key_at = _at(key_strides, p * 0, _clamp(key_columns, width), d % D, ALIGN)
    if tables is not None:
        tables += n * table_stride
        half_at = _at(query_strides, near_rows, near_columns, d % (D // 2), ALIGN)
        num_sums = heads_per_program if PER_HEAD else 1
        partial_rel += tl.program_id(0).to(tl.int64) * num_sums * (2 * K * (D // 2))
        rel_sums = _zeros(N)

    # If the rows are unrolled, the compiler must not keep their addresses over all heads, which would fill registers.
    for _ in tl.range(0, heads_per_program, disable_licm=UNROLL > 1):
        q = _pieces(query, query_strides, query_at, D, N)
        grad = ()
        delta = tl.zeros([16], tl.float32)
        for i in tl.static_range(N):
            g = _times(tl.load(grad_output + i * 16 * grad_output_strides[4] + grad_at), share)
            out = tl.load(output + i * 16 * output_strides[4] + output_at)
            delta += tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
            grad = grad + (g,)
        at = first + rows * width + columns
        lse = tl.load(logsumexp + at, mask=exists, other=float("inf"))  # a weight of zero where there is no query
        by_row = None
        by_offset = tl.zeros([16, 16], tl.float32)
        if tables is not None:
            by_row = _by_row(query, query_strides, half_at, below, D, N)
            by_offset = _over_channels(q, _table(tables, N), by_offset, N, PRECISION)
        start = _start(tables, by_offset, reach)
        kept = tl.where((j == 15)[None, :], delta[:, None], by_offset * LOG2_E - lse[:, None])
        tl.store(by_key + (at[:, None] * 8 + (j - 8)[None, :]), kept, mask=exists[:, None] & (j >= 8)[None, :])

        grad_start = tl.where(reach, -delta[:, None], FAR)
        dq = _zeros(N)
        by_dy = tl.zeros([16, 16], tl.float32)
        by_column = tl.zeros([16, 8], tl.float32)
        for y in tl.range(0, K + 1, loop_unroll_factor=UNROLL):
            row = row0 - K // 2 + y
            keys = None
            if key is not None:
                keys = _keys(key, key_strides, key_at, row, height, columns_exist, N, ALIGN, ZERO_BORDER)
            s = _scores(q, by_row, start, keys, tables, row, y, height, K, D, N, ZERO_BORDER, PRECISION)
            v = _keys(value, value_strides, value_at, row, height, columns_exist, N, ALIGN, ZERO_BORDER)
            t = _over_channels(grad, v, grad_start, N, PRECISION)
            grad_s = tl.exp2(s * LOG2_E - lse[:, None]) * _fold(t)
            wide = _unfold(grad_s, in_reach)
            if key is not None:
                dq = _add_products(dq, wide, keys, N, PRECISION)
            if tables is not None:
                by_column += grad_s
                # A product with ones sums over the columns. For the upper query row, key row y has offset y; for the
                # lower one, whose sums are in the columns from 8 on, it has offset y - 1.
                ones = ((j % 8 + j // 8)[None, :] == y + (j * 0)[:, None]).to(tl.float32).to(wide.dtype)
                by_dy = _dot(wide, ones, by_dy, PRECISION)

        if tables is not None:
            j8 = tl.arange(0, 8)[None, :]
            by_dy = tl.sum(tl.where((j // 8)[None, :] == below[:, None], by_dy, 0.0).reshape(16, 2, 8), 1)
            by_dx = tl.gather(by_column, (j8 + (p % 8)[:, None]) % 8, 1)
            by_dx = tl.where(j8 < K, by_dx, 0.0)
            grad_by_offset = tl.where((j < 8)[None, :], _twice(by_dy, q[0].dtype), _twice(by_dx, q[0].dtype))
            dq = _add_products(dq, grad_by_offset, _table(tables, N), N, PRECISION)
            if PER_HEAD:
                rel_sums = _add_products(_zeros(N), tl.trans(grad_by_offset), q, N, PRECISION)
                _store_sums(partial_rel, rel_sums, K, D, N)
                partial_rel += 2 * K * (D // 2)
            else:
                rel_sums = _add_products(rel_sums, tl.trans(grad_by_offset), q, N, PRECISION)
        for i in tl.static_range(N):
            piece = dq[i].to(grad_query.dtype.element_ty)
            tl.store(grad_query + i * 16 * grad_query_strides[4] + grad_query_at, piece, mask=stored)

        grad_output += grad_output_strides[1] * ALIGN
        query += query_strides[1] * ALIGN
        value += value_strides[1] * ALIGN
        output += output_strides[1] * ALIGN
        grad_query += grad_query_strides[1] * ALIGN
        first += height * width
        if key is not None:
            key += key_strides[1] * ALIGN
        if tables is not None:
            tables += table_stride

    if tables is not None and not PER_HEAD:
        _store_sums(partial_rel, rel_sums, K, D, N)


@triton.jit(do_not_specialize=SIZES)
def backward_keys_kernel(
    grad_output, query, key, value, grad_key, grad_value, by_key, tables,
    grad_output_strides, query_strides, key_strides, value_strides, grad_key_strides, grad_value_strides, table_stride,
    num_heads, height, width, heads_per_program,
    K: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, POOL: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of a tile of keys; products are [16 keys, 16 query columns]."""
    N: tl.constexpr = max(D // 16, 1)
    b, n, row0, column0 = _place(num_heads, height, width, heads_per_program)
    p, d = tl.arange(0, 16), tl.arange(0, 16)
    below, rows, columns, exists, near_rows, near_columns = _positions(row0, column0, height, width)
    query_columns = _clamp(column0 - K // 2 + tl.arange(0, 16), width)
    reach = _reach(None, K, True)
    in_reach = reach.to(tl.float32).to(query.dtype.element_ty)
    # After folding, column x stands for query column x or x + 8, whichever reaches the key, in both rows of keys.
    x, c = tl.arange(0, 8)[None, :], tl.arange(0, 8)[:, None]
    x = tl.where(x < c, x + 8, x)
    offset = c + K - 1 - x  # of the key in the query's window
    folded_columns = x + (column0 - K // 2)
    columns_exist = (offset >= 0) & (folded_columns >= 0) & (folded_columns < width)

    grad_output = _head(grad_output, grad_output_strides, b, n, ALIGN)
    query = _head(query, query_strides, b, n, ALIGN)
    value = _head(value, value_strides, b, n, ALIGN)
    grad_value = _head(grad_value, grad_value_strides, b, n, ALIGN)
    by_key += (b * num_heads + n) * height * width * 8
    grad_at = _at(grad_output_strides, p * 0, query_columns // POOL, d % D, ALIGN)
    query_at = _at(query_strides, p * 0, query_columns, d % D, ALIGN)
    value_at = _at(value_strides, near_rows, near_columns, d % D, ALIGN)
    grad_value_at = _at(grad_value_strides, rows, columns, d, ALIGN)
    stored = exists[:, None] & (d < D)[None, :]
    if key is not None:
        key = _head(key, key_strides, b, n, ALIGN)
        grad_key = _head(grad_key, grad_key_strides, b, n, ALIGN)
        key_at = _at(key_strides, near_rows, near_columns, d % D, ALIGN)
        grad_key_at = _at(grad_key_strides, rows, columns, d, ALIGN)
    if tables is not None:
        tables += n * table_stride

    start = tl.where(reach, tl.zeros([16, 16], tl.float32), FAR)
    for _ in range(heads_per_program):
        v = _pieces(value, value_strides, value_at, D, N)
        dv = _zeros(N)
        if key is not None:
            k = _pieces(key, key_strides, key_at, D, N)
            dk = _zeros(N)
        for y in tl.range(0, K + 1, loop_unroll_factor=UNROLL):
            row = row0 - K // 2 + y
            near_row = _clamp(row, height)
            near = columns_exist & (row >= 0) & (row < height)
            kept_at = (near_row * width + folded_columns) * 8
            bias = _both_rows(tl.load(by_key + (kept_at + offset), mask=near, other=float("-inf")))
            bias = tl.where(((y >= below) & (y - below < K))[:, None], bias, float("-inf"))
            q = ()
            grad = ()
            s = start
            for i in tl.static_range(N):
                q_piece = tl.load(query + near_row * query_strides[2] * ALIGN + i * 16 * query_strides[4] + query_at)
                at = grad_output + near_row // POOL * grad_output_strides[2] * ALIGN + i * 16 * grad_output_strides[4]
                g = tl.load(at + grad_at)
                if POOL == 2:
                    g = _times(g, _share(near_row, query_columns, height, width).to(g.dtype)[:, None])
                if tables is not None:
                    # The key has the row offset K - 1 - y + below in the query's window.
                    r = tl.load(tables + ((K - y + below)[:, None] * (16 * N) + (i * 16 + d)[None, :]))
                    s = _dot(r, tl.trans(q_piece), s, PRECISION)
                q = q + (q_piece,)
                grad = grad + (g,)
            if key is not None:
                s = _over_channels(k, q, s, N, PRECISION)
            w = tl.exp2(_fold(s) * LOG2_E + bias)
            dv = _add_products(dv, _unfold(w, in_reach), grad, N, PRECISION)
            if key is not None:
                t = _fold(_over_channels(v, grad, start, N, PRECISION))
                delta = _both_rows(tl.load(by_key + (kept_at + 7), mask=near, other=0.0))
                dk = _add_products(dk, _unfold(w * (t - delta), in_reach), q, N, PRECISION)
        for i in tl.static_range(N):
            piece = dv[i].to(grad_value.dtype.element_ty)
            tl.store(grad_value + i * 16 * grad_value_strides[4] + grad_value_at, piece, mask=stored)
            if key is not None:
                piece = dk[i].to(grad_key.dtype.element_ty)
                tl.store(grad_key + i * 16 * grad_key_strides[4] + grad_key_at, piece, mask=stored)

        grad_output += grad_output_strides[1] * ALIGN
        query += query_strides[1] * ALIGN
        value += value_strides[1] * ALIGN
        grad_value += grad_value_strides[1] * ALIGN
        by_key += height * width * 8
        if key is not None:
            key += key_strides[1] * ALIGN
            grad_key += grad_key_strides[1] * ALIGN
        if tables is not None:
            tables += table_stride
