"""Triton kernels of local self-attention for the windows and heads that triton_fold.py does not serve.

One program computes a tile of `tile_h` x `tile_w` positions of one head of one image, flattened to the P rows of a
matrix (16 to 64; position p is row p // tile_w, column p % tile_w). All windows of the tile fit in `tile_w + K - 1`
columns, padded to W = 16, and `tile_h + K - 1` rows. The program *walks* over these rows one at a time, so that every
product is a small matrix product for the tensor cores, [P, D] x [D, W] or [P, W] x [W, D]:

  forward, query tiles:     S = q k^T + q.r, masked to the windows; online softmax; out += exp(S - max) v
  backward 1, query tiles:  delta = sum(dout out); dS = weight (dout v^T - delta), dq += dS k, the embeddings' gradients
  backward 2, key tiles:    a loop over the query rows in reach uses pass 1's results: dv += weight^T dout, dk += dS^T q

Each result is written by a single program, without atomics and with a fixed order of summation. Nothing of size K*K is
stored. A NaN affects all queries of every tile that reads it, i.e. slightly more queries than those whose window
contains it.

Small tiles are faster for the following reason. Each query computes W (tile_h + K - 1) P / (tile_h tile_w) scores, of
which K K are used. At K = 11 and 6 columns, these are 121 of 256 with two query rows and of 299 with four, while each
key is read 12 and 7 times. The bottleneck is the work of a warp per score outside the products, about 10 instructions,
which small tiles and a single warp minimise. With many channels, more warps are needed, because the values fill the
registers of a single warp.
"""

import triton
import triton.language as tl

from sasa_train.attention.triton_fold import CAST, LOG2_E

TABLE_ROWS = tl.constexpr(16)


# ---- pieces of the kernels
#
# Relative terms: q.r is by_height[p, dy] + by_width[p, dx], i.e. 2K values per query, which two products with the
# tables compute before the loop. For a key row, each position needs one column of by_height, which is selected by
# comparison. by_width[p, x - column(p)] is the same for every key row, so it is gathered once into [P, W]. The backward
# pass does the reverse: dS summed along a key row is added to the matching column of by_height's gradient, and dS
# summed over the key rows is gathered back to offsets. Pass 1 stores the 2K values for pass 2, whose positions are keys
# and which reads the values by address.


@triton.jit
def _place(num_heads, height, width, tile_h, tile_w, P: tl.constexpr):
    """Return this program's image, head, first row and column, and the rows, columns and mask of its positions."""
    tiles_w = tl.cdiv(width, tile_w)
    num_tiles = tiles_w * tl.cdiv(height, tile_h)
    pid = tl.program_id(0)
    # The heads of a tile run together, because they share cache lines in channels_last memory.
    n = pid % num_heads
    tile = pid // num_heads % num_tiles
    b = pid // num_heads // num_tiles
    row0, column0 = tile // tiles_w * tile_h, tile % tiles_w * tile_w
    p = tl.arange(0, P)
    rows, columns = row0 + p // tile_w, column0 + p % tile_w
    exists = (p < tile_h * tile_w) & (rows < height) & (columns < width)
    return b.to(tl.int64), n.to(tl.int64), row0, column0, rows, columns, exists


@triton.jit
def _reach(row0, column0, height, width, tile_h, K: tl.constexpr, W: tl.constexpr, CLIP: tl.constexpr):
    """Return the first row that a tile reaches, the row after the last, the columns [W] it reaches, and their mask."""
    first, last = row0 - K // 2, tl.minimum(row0 + tile_h, height) + K // 2
    if CLIP:
        first, last = tl.maximum(first, 0), tl.minimum(last, height)
    columns = column0 - K // 2 + tl.arange(0, W)
    return first, last, columns, (columns >= 0) & (columns < width)


@triton.jit
def _head(pointer, strides, b, n, ALIGN: tl.constexpr):
    """Return the address of the head's first element."""
    # All strides except the channel stride are in units of ALIGN elements, so that the compiler can vectorise loads.
    return pointer + (b * strides[0] + n * strides[1]) * ALIGN


@triton.jit
def _at(strides, rows, columns, D_PADDED: tl.constexpr, ALIGN: tl.constexpr):
    """Return offsets [positions, channels] within a head."""
    # The offsets have 64 bits, because a large image has more elements than 32 bits can count.
    positions = (rows.to(tl.int64) * strides[2] + columns.to(tl.int64) * strides[3]) * ALIGN
    return positions[:, None] + tl.arange(0, D_PADDED).to(tl.int64)[None, :] * strides[4]


@triton.jit
def _load(head, strides, rows, columns, exists, D: tl.constexpr, D_PADDED: tl.constexpr, ALIGN: tl.constexpr):
    """Load [positions, channels] in their own dtype, with zeros for positions and channels that do not exist."""
    mask = exists[:, None] & (tl.arange(0, D_PADDED) < D)[None, :]
    return tl.load(head + _at(strides, rows, columns, D_PADDED, ALIGN), mask=mask, other=0.0)


@triton.jit
def _store(head, strides, rows, columns, exists, x, D: tl.constexpr, D_PADDED: tl.constexpr, ALIGN: tl.constexpr):
    mask = exists[:, None] & (tl.arange(0, D_PADDED) < D)[None, :]
    tl.store(head + _at(strides, rows, columns, D_PADDED, ALIGN), x.to(head.dtype.element_ty), mask=mask)


@triton.jit
def _table_at(strides, K: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, FIRST: tl.constexpr):
    """Return offsets [TABLE_ROWS, D_PADDED] in a table [K, D/2] whose channels start at FIRST, and their mask."""
    # A product needs 16 rows and all D channels, so the rows from K on and the other half of the channels are zero.
    j, d = tl.arange(0, TABLE_ROWS), tl.arange(0, D_PADDED) - FIRST
    mask = (j < K)[:, None] & ((d >= 0) & (d < D // 2))[None, :]
    return j[:, None] * strides[1] + d[None, :] * strides[2], mask


@triton.jit
def _table(pointer, strides, n, K: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, FIRST: tl.constexpr):
    offsets, mask = _table_at(strides, K, D, D_PADDED, FIRST)
    return tl.load(pointer + n * strides[0] + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _product(a, b, start, PRECISION: tl.constexpr):
    """Return start + a b^T for inputs [positions, channels] in their own dtype."""
    if CAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, tl.trans(b), start, input_precision=PRECISION)


@triton.jit
def _per_column(by_width, dx, in_reach):
    """Gather `by_width` ([P, TABLE_ROWS] by offset, or None) into [P, W] by key column (-inf if out of reach)."""
    found = tl.zeros(dx.shape, tl.float32)
    if by_width is not None:
        found = tl.gather(by_width, tl.minimum(tl.maximum(dx, 0), TABLE_ROWS - 1), 1)
    return tl.where(in_reach, found, float("-inf"))


@triton.jit
def _bias(by_height, per_column, dy, K: tl.constexpr):
    """Return the bias [P, W] that is added to q.k for key row dy - K // 2 below each query: q.r, or -inf outside."""
    per_row = tl.zeros(dy.shape, tl.float32)
    if by_height is not None:
        per_row = tl.sum(tl.where(tl.arange(0, TABLE_ROWS)[None, :] == dy[:, None], by_height, 0.0), 1)
    return per_column + tl.where((dy >= 0) & (dy < K), per_row, float("-inf"))[:, None]


@triton.jit
def _online(s, largest, total):
    """Add a key row to the softmax; return the new maximum and total, the row's numerators and the rescaling factor."""
    larger = tl.maximum(largest, tl.max(s, 1) * LOG2_E)
    shrink = tl.exp2(largest - larger)
    e = tl.exp2(s * LOG2_E - larger[:, None])
    return larger, total * shrink + tl.sum(e, 1), e, shrink


# ---- the kernels


@triton.jit
def forward_kernel(
    query, key, value, output, logsumexp, rel_height, rel_width,
    query_strides, key_strides, value_strides, output_strides, rel_height_strides, rel_width_strides,
    num_heads, height, width, tile_h, tile_w,
    K: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
    ALIGN: tl.constexpr, ZERO_BORDER: tl.constexpr, INPUTS: tl.constexpr, COMPUTED: tl.constexpr,
    NULL_KEY: tl.constexpr,
):  # fmt: skip
    b, n, row0, column0, rows, columns, exists = _place(num_heads, height, width, tile_h, tile_w, P)
    first, last, key_columns, columns_exist = _reach(row0, column0, height, width, tile_h, K, W, not ZERO_BORDER)
    dx = key_columns[None, :] - columns[:, None] + K // 2
    in_reach = (dx >= 0) & (dx < K)
    if not ZERO_BORDER:
        in_reach &= columns_exist[None, :]
    query = _head(query, query_strides, b, n, ALIGN)
    value = _head(value, value_strides, b, n, ALIGN)
    output = _head(output, output_strides, b, n, ALIGN)
    if key is not None:
        key = _head(key, key_strides, b, n, ALIGN)

    q = _load(query, query_strides, rows, columns, exists, D, D_PADDED, ALIGN)
    by_height = None
    by_width = None
    if rel_height is not None:
        table_h = _table(rel_height, rel_height_strides, n, K, D, D_PADDED, 0)
        table_w = _table(rel_width, rel_width_strides, n, K, D, D_PADDED, D // 2)
        by_height = tl.dot(q.to(tl.float32), tl.trans(table_h), input_precision="tf32x3")
        by_width = tl.dot(q.to(tl.float32), tl.trans(table_w), input_precision="tf32x3")
    per_column = _per_column(by_width, dx, in_reach)

    # The maximum is in units of ln 2. Its initial value is finite, because -inf - (-inf) would be NaN if the first
    # key row is out of reach. The null key has a score of 0.
    largest = tl.full([P], 0.0 if NULL_KEY else -1e38, tl.float32)
    total = tl.full([P], 1.0 if NULL_KEY else 0.0, tl.float32)
    out = tl.zeros([P, D_PADDED], tl.float32)
    for y in range(first, last):
        key_rows = tl.zeros([W], tl.int32) + y
        keys_exist = columns_exist & (key_rows >= 0) & (key_rows < height)
        s = _bias(by_height, per_column, y - rows + K // 2, K)
        if key is not None:
            k = _load(key, key_strides, key_rows, key_columns, keys_exist, D, D_PADDED, ALIGN)
            s = _product(q, k, s, INPUTS)
        largest, total, e, shrink = _online(s, largest, total)
        v = _load(value, value_strides, key_rows, key_columns, keys_exist, D, D_PADDED, ALIGN)
        out = tl.dot(e, v.to(tl.float32), out * shrink[:, None], input_precision=COMPUTED)
    # Padded positions may have no key in reach; a total of 1 avoids division by zero.
    total = tl.where(exists, total, 1.0)
    position = ((b * num_heads + n) * height + rows) * width + columns
    tl.store(logsumexp + position, largest + tl.log2(total), mask=exists)
    _store(output, output_strides, rows, columns, exists, out / total[:, None], D, D_PADDED, ALIGN)


@triton.jit
def backward_queries_kernel(
    grad_output, query, key, value, output, grad_query, logsumexp, delta, relative, partial_rel, rel_height, rel_width,
    grad_output_strides, query_strides, key_strides, value_strides, output_strides, grad_query_strides,
    rel_height_strides, rel_width_strides,
    num_heads, height, width, tile_h, tile_w,
    K: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
    ALIGN: tl.constexpr, ZERO_BORDER: tl.constexpr, INPUTS: tl.constexpr, COMPUTED: tl.constexpr,
):  # fmt: skip
    b, n, row0, column0, rows, columns, exists = _place(num_heads, height, width, tile_h, tile_w, P)
    first, last, key_columns, columns_exist = _reach(row0, column0, height, width, tile_h, K, W, not ZERO_BORDER)
    dx = key_columns[None, :] - columns[:, None] + K // 2
    in_reach = (dx >= 0) & (dx < K)
    if not ZERO_BORDER:
        in_reach &= columns_exist[None, :]
    grad_output = _head(grad_output, grad_output_strides, b, n, ALIGN)
    query = _head(query, query_strides, b, n, ALIGN)
    value = _head(value, value_strides, b, n, ALIGN)
    output = _head(output, output_strides, b, n, ALIGN)
    grad_query = _head(grad_query, grad_query_strides, b, n, ALIGN)
    if key is not None:
        key = _head(key, key_strides, b, n, ALIGN)

    q = _load(query, query_strides, rows, columns, exists, D, D_PADDED, ALIGN)
    grad = _load(grad_output, grad_output_strides, rows, columns, exists, D, D_PADDED, ALIGN)
    position = ((b * num_heads + n) * height + rows) * width + columns  # index into the results for pass 2
    j = tl.arange(0, TABLE_ROWS)
    by_height = None
    by_width = None
    if rel_height is not None:
        table_h = _table(rel_height, rel_height_strides, n, K, D, D_PADDED, 0)
        table_w = _table(rel_width, rel_width_strides, n, K, D, D_PADDED, D // 2)
        by_height = tl.dot(q.to(tl.float32), tl.trans(table_h), input_precision="tf32x3")
        by_width = tl.dot(q.to(tl.float32), tl.trans(table_w), input_precision="tf32x3")
        stored = relative + position[:, None] * (2 * K) + j[None, :]
        mask = exists[:, None] & (j < K)[None, :]
        tl.store(stored, by_height, mask=mask)
        tl.store(stored + K, by_width, mask=mask)
    per_column = _per_column(by_width, dx, in_reach)

    out = _load(output, output_strides, rows, columns, exists, D, D_PADDED, ALIGN)
    mean = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(logsumexp + position, mask=exists, other=0.0)
    tl.store(delta + position, mean, mask=exists)

    # The scores are recomputed instead of stored.
    dq = tl.zeros([P, D_PADDED], tl.float32)
    grad_by_height = tl.zeros([P, TABLE_ROWS], tl.float32)
    grad_per_column = tl.zeros([P, W], tl.float32)
    for y in range(first, last):
        key_rows = tl.zeros([W], tl.int32) + y
        keys_exist = columns_exist & (key_rows >= 0) & (key_rows < height)
        dy = y - rows + K // 2
        s = _bias(by_height, per_column, dy, K)
        if key is not None:
            k = _load(key, key_strides, key_rows, key_columns, keys_exist, D, D_PADDED, ALIGN)
            s = _product(q, k, s, INPUTS)
        weights = tl.exp2(s * LOG2_E - lse[:, None])
        v = _load(value, value_strides, key_rows, key_columns, keys_exist, D, D_PADDED, ALIGN)
        grad_s = weights * _product(grad, v, tl.zeros([P, W], tl.float32) - mean[:, None], INPUTS)
        if key is not None:
            dq = tl.dot(grad_s, k.to(tl.float32), dq, input_precision=COMPUTED)
        if rel_height is not None:
            grad_by_height += tl.where(j[None, :] == dy[:, None], tl.sum(grad_s, 1)[:, None], 0.0)
            grad_per_column += grad_s

    # The tables are loaded again here, because keeping them would occupy registers during the loops.
    if rel_height is not None:
        table_h = _table(rel_height, rel_height_strides, n, K, D, D_PADDED, 0)
        table_w = _table(rel_width, rel_width_strides, n, K, D, D_PADDED, D // 2)
        from_offset = j[None, :] + (columns - column0)[:, None]  # the key column at offset j, relative to the tile
        grad_by_width = tl.gather(grad_per_column, tl.minimum(from_offset, W - 1), 1)
        grad_by_width = tl.where((j < K)[None, :], grad_by_width, 0.0)
        dq = tl.dot(grad_by_height, table_h, dq, input_precision=COMPUTED)
        dq = tl.dot(grad_by_width, table_w, dq, input_precision=COMPUTED)
        # Each program writes its own part of the tables' gradients. The parts are summed later in a fixed order,
        # without atomics.
        partial = partial_rel + tl.program_id(0).to(tl.int64) * (2 * K * (D // 2))
        q = q.to(tl.float32)
        offsets, mask = _table_at((0, D // 2, 1), K, D, D_PADDED, 0)
        tl.store(partial + offsets, tl.dot(tl.trans(grad_by_height), q, input_precision=COMPUTED), mask=mask)
        partial += K * (D // 2)
        offsets, mask = _table_at((0, D // 2, 1), K, D, D_PADDED, D // 2)
        tl.store(partial + offsets, tl.dot(tl.trans(grad_by_width), q, input_precision=COMPUTED), mask=mask)
    _store(grad_query, grad_query_strides, rows, columns, exists, dq, D, D_PADDED, ALIGN)


@triton.jit
def backward_keys_kernel(
    grad_output, query, key, value, grad_key, grad_value, logsumexp, delta, relative,
    grad_output_strides, query_strides, key_strides, value_strides, grad_key_strides, grad_value_strides,
    num_heads, height, width, tile_h, tile_w,
    K: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
    ALIGN: tl.constexpr, ZERO_BORDER: tl.constexpr, INPUTS: tl.constexpr, COMPUTED: tl.constexpr,
):  # fmt: skip
    b, n, row0, column0, rows, columns, exists = _place(num_heads, height, width, tile_h, tile_w, P)
    first, last, query_columns, columns_exist = _reach(row0, column0, height, width, tile_h, K, W, True)
    # This is [W, P], transposed, so that each thread reads the values of a single key, from addresses that differ by
    # constants.
    dx = columns[None, :] - query_columns[:, None] + K // 2
    in_reach = (dx >= 0) & (dx < K) & columns_exist[:, None]
    x = tl.arange(0, W).to(tl.int64)[:, None]
    at_height = x * (2 * K)  # offset from the row's first column in reach; dy is added
    at_width = x * (2 * K - 1) + (columns - column0 + K - 1 + K).to(tl.int64)[None, :]
    grad_output = _head(grad_output, grad_output_strides, b, n, ALIGN)
    query = _head(query, query_strides, b, n, ALIGN)
    value = _head(value, value_strides, b, n, ALIGN)
    grad_value = _head(grad_value, grad_value_strides, b, n, ALIGN)
    v = _load(value, value_strides, rows, columns, exists, D, D_PADDED, ALIGN)
    dv = tl.zeros([P, D_PADDED], tl.float32)
    if key is not None:
        key = _head(key, key_strides, b, n, ALIGN)
        grad_key = _head(grad_key, grad_key_strides, b, n, ALIGN)
        k = _load(key, key_strides, rows, columns, exists, D, D_PADDED, ALIGN)
        dk = tl.zeros([P, D_PADDED], tl.float32)

    for y in range(first, last):
        query_rows = tl.zeros([W], tl.int32) + y
        q = _load(query, query_strides, query_rows, query_columns, columns_exist, D, D_PADDED, ALIGN)
        grad = _load(grad_output, grad_output_strides, query_rows, query_columns, columns_exist, D, D_PADDED, ALIGN)
        row = ((b * num_heads + n) * height + y) * width  # start of the row in the results of pass 1
        lse = tl.load(logsumexp + row + query_columns, mask=columns_exist, other=0.0)
        mean = tl.load(delta + row + query_columns, mask=columns_exist, other=0.0)
        dy = (rows - y + K // 2)[None, :]
        near = in_reach & (dy >= 0) & (dy < K)
        bias = tl.where(near, 0.0, float("-inf"))
        if relative is not None:
            from_first = relative + (row + column0 - K // 2) * (2 * K)
            bias += tl.load(from_first + (dy.to(tl.int64) + at_height), mask=near, other=0.0)
            bias += tl.load(from_first + at_width, mask=near, other=0.0)
        s = tl.trans(bias)
        if key is not None:
            s = _product(k, q, s, INPUTS)
        weights = tl.exp2(s * LOG2_E - lse[None, :])
        dv = tl.dot(weights, grad.to(tl.float32), dv, input_precision=COMPUTED)
        if key is not None:
            grad_s = weights * _product(v, grad, tl.zeros([P, W], tl.float32) - mean[None, :], INPUTS)
            dk = tl.dot(grad_s, q.to(tl.float32), dk, input_precision=COMPUTED)
    _store(grad_value, grad_value_strides, rows, columns, exists, dv, D, D_PADDED, ALIGN)
    if key is not None:
        _store(grad_key, grad_key_strides, rows, columns, exists, dk, D, D_PADDED, ALIGN)
