// Forward and backward pass of local self-attention on the CPU. ../reference.py contains the definition; cpu.py builds
// and calls this code.
//
// Method: each vector lane holds one plane (one head of one image). V planes are processed in lockstep, so that all
// lanes are at the same pixel. All lanes then share the loop bounds at the borders, any height and width fills the
// lanes, no load is unaligned or masked, and small maps need no special case. A row of V planes is packed into scratch
// memory as [channel][column] vectors with K/2 zero columns on either side ("band"). It is read directly from the
// strided tensors, transposed V x V in registers and converted from bfloat16 in the process.
//
//   forward, a query row i:  S[dy][x][dx] = q.k + q.r        band_product: 3 queries x K keys, all in registers
//                            E = exp(S - max)                one polynomial, K*K vectors per position
//                            out[x] = sum E v / sum E        band_apply: 3 queries x 8 channels in registers
//   backward, a query row i: S again,  P = exp(S - max) / sum E,  T = g.v,  dS = P (T - sum P T),  and with band_apply
//                            dq[x]  += dS k,    dk[y][x'] += dS q,    dv[y][x'] += P g.
//
// The 2 x 2 queries of a pool are processed together: the products with v and g, which they share, are computed once for
// the (K + 1) x (K + 1) keys that they see, instead of 4 K*K times.
//
// The forward pass saves max and 1 / sum E of each position, but nothing of size K*K. dk and dv of the key rows in
// reach are kept in a ring buffer. A row is written out when the last query row that sees it is done, so there are no
// atomics, and the order of summation is the same for any number of threads. q.r is
// q[:D/2].rel_height[dy] + q[D/2:].rel_width[dx], i.e. 2K values per position instead of K*K. Its gradients are summed
// in float32 over BLOCK_ROWS rows, then in order and in float64 over these blocks, planes and images.
//
// Cost: each position and head needs 7 products of K*K*D multiply-adds (2 forward, 5 backward) and 2 K*K exponentials
// of 10 instructions. At K = 7 and D = 8, on 16 lanes with two multiply-add units, these take 1,372 + 490 cycles for 16
// planes. The measured speed is about half of this, because rows and scores come from the L2 cache (a key row of 16
// planes takes 64 W D bytes; K rows of keys, values and their two gradients take 460 KB at W = 32, D = 8). In addition
// to its multiply-adds, a core reads 0.6 vectors per cycle from this cache and writes 0.26. For this reason, each key
// that is read is used for three adjacent queries, and the backward pass never writes a score twice. A quarter of the
// time is spent reading and writing the tensors.

#include "planes.h"

#ifndef KERNEL_SIZE
#define KERNEL_SIZE 7  // cpu.py builds one library per kernel_size, since building all of them would take a minute
#endif

// This size suits the caches. The results do not depend on it.
//
// MAX_TILE is the number of query columns processed at a time, with K*K scores each, forward and backward. It is larger
// for the backward pass, because a tile's margins are gathered twice.
constexpr int MAX_TILE[2] = {12, 32};

namespace {

// ---- the two basic operations -------------------------------------------------------------------------------------

// Fill with zeros, and store, what is to stay in registers; for a whole array, compilers use slow string instructions.
template <typename Vec, int R, int N>
INLINE void fill(Vec (&acc)[R][N]) {
    UNROLL
    for (int r = 0; r < R; ++r) {
        UNROLL
        for (int j = 0; j < N; ++j) acc[r][j] = Vec{};
    }
}
template <typename Vec, int R, int N>
INLINE void store_all(Vec* to, const Vec (&acc)[R][N]) {
    UNROLL
    for (int r = 0; r < R; ++r) {
        UNROLL
        for (int j = 0; j < N; ++j) to[r * N + j] = acc[r][j];
    }
}

// Whether R adjacent queries begin at the image's first column, or end at its last. There, the first or last (K - 1) / 2
// columns of their band are outside the image and contain zeros, whose products are skipped.
struct AtEdge {
    bool first, last;
};

// Computes acc[r][j] += a[r] * b[STRIDE r + j] for the columns FROM .. END - 1 of b.
template <int V, int K, int R, int STRIDE, int FROM, int END>
INLINE void product_of_columns(F<V> (&acc)[R][K], const F<V> (&a)[R], const F<V>* b) {
    UNROLL
    for (int j = FROM; j < END; ++j) {
        F<V> b_here = loaded(b[j]);
        UNROLL
        for (int r = 0; r < R; ++r)
            if (j - STRIDE * r >= 0 && j - STRIDE * r < K) acc[r][j - STRIDE * r] += a[r] * b_here;
    }
}

// Computes acc[r][j] += sum_c a[c][r] * b[c][STRIDE r + j] for R adjacent queries, each with its K keys of one row.
template <int V, int K, int R, int STRIDE = 1>
INLINE void band_product(F<V> (&acc)[R][K], const F<V>* a, const F<V>* b, int64_t head_dim, int64_t pitch, AtEdge edge) {
    constexpr int OUTSIDE = (K - 1) / 2, COLUMNS = K + STRIDE * (R - 1);
    for (int64_t c = 0; c < head_dim; ++c, a += pitch, b += pitch) {
        F<V> a_here[R];
        UNROLL
        for (int r = 0; r < R; ++r) a_here[r] = loaded(a[r]);
        if (!edge.first) product_of_columns<V, K, R, STRIDE, 0, OUTSIDE>(acc, a_here, b);
        product_of_columns<V, K, R, STRIDE, OUTSIDE, COLUMNS - OUTSIDE>(acc, a_here, b);
        if (!edge.last) product_of_columns<V, K, R, STRIDE, COLUMNS - OUTSIDE, COLUMNS>(acc, a_here, b);
    }
}

// The part of band_apply that the columns FROM .. END - 1 of b give.
template <int V, int K, int R, int C, bool REVERSED, int STRIDE, int FROM, int END>
INLINE void apply_columns(F<V> (&acc)[R][C], const F<V>* weights, const F<V>* b, int64_t pitch) {
    UNROLL
    for (int j = FROM; j < END; ++j) {
        F<V> weight[R];
        UNROLL
        for (int r = 0; r < R; ++r)
            if (j - STRIDE * r >= 0 && j - STRIDE * r < K)
                weight[r] = loaded(REVERSED ? weights[j * K + K - 1 - (j - r)] : weights[r * K + j - STRIDE * r]);
        UNROLL
        for (int c = 0; c < C; ++c) {
            F<V> b_here = loaded(b[c * pitch + j]);
            UNROLL
            for (int r = 0; r < R; ++r)
                if (j - STRIDE * r >= 0 && j - STRIDE * r < K) acc[r][c] += weight[r] * b_here;
        }
    }
}

// Computes acc[r][c] += sum_j weight(r, j) * b[c][STRIDE r + j] with weight(r, j) = weights[r][j]. If REVERSED, it uses
// the weight that position r + j - K/2 assigns to r, weights[r + j][K - 1 - j].
template <int V, int K, int R, int C, bool REVERSED, int STRIDE = 1>
INLINE void band_apply(F<V> (&acc)[R][C], const F<V>* weights, const F<V>* b, int64_t pitch, AtEdge edge) {
    constexpr int OUTSIDE = (K - 1) / 2, COLUMNS = K + STRIDE * (R - 1);
    if (!edge.first) apply_columns<V, K, R, C, REVERSED, STRIDE, 0, OUTSIDE>(acc, weights, b, pitch);
    apply_columns<V, K, R, C, REVERSED, STRIDE, OUTSIDE, COLUMNS - OUTSIDE>(acc, weights, b, pitch);
    if (!edge.last) apply_columns<V, K, R, C, REVERSED, STRIDE, COLUMNS - OUTSIDE, COLUMNS>(acc, weights, b, pitch);
}

// The number of adjacent queries that fit in the registers.
constexpr int queries_at_once(int K) {
    if (NUM_REGISTERS == 32) return K <= 3 ? 4 : K <= 7 ? 3 : K <= 13 ? 2 : 1;
    return K <= 5 ? 2 : 1;
}
// The number of adjacent pools, of which each sees K + 1 columns.
constexpr int pools_at_once(int K) {
    int fitting = (NUM_REGISTERS - 1) / (K + 2);
    return fitting > 4 ? 4 : fitting < 1 ? 1 : fitting;
}
constexpr int APPLIED_AT_ONCE = NUM_REGISTERS == 32 ? 3 : 2;
constexpr int CHANNELS_AT_ONCE = NUM_REGISTERS == 32 ? 8 : 4;
constexpr int PAIRS_AT_ONCE = NUM_REGISTERS == 32 ? 2 : 1;  // of columns whose gradients are gathered from pools

// ---- one thread's work ----------------------------------------------------------------------------------------------

struct Sizes {
    int64_t H, W, D, half, pitch, row, tile, tile_pitch, out_width;
    bool stream;  // whether the results bypass the caches
    template <int K>
    static Sizes of(const Problem& p, bool backward) {
        Sizes s;
        s.H = p.height, s.W = p.width, s.D = p.head_dim, s.half = p.head_dim / 2;
        s.out_width = ceil_div(s.W, p.stride);
        // Number of columns that the windows of one row, or of a pool's two rows, can reach. It is odd, so that
        // channels do not share cache sets.
        s.pitch = (s.W + K - 2 + p.stride) | 1;
        s.row = s.pitch * s.D;
        s.tile = ceil_div(ceil_div(s.W, ceil_div(s.W, MAX_TILE[backward])), p.stride) * p.stride;
        s.tile_pitch = s.tile + 2 * (K - 1);  // gathering reads K - 1 queries beyond the tile, which are zero
        int64_t numbers = p.batch * p.num_heads * s.H * s.W * s.D;  // in one tensor at the queries' resolution
        s.stream = (backward ? 3 * numbers : numbers / (p.stride * p.stride)) > STREAM_NUMBERS;
        return s;
    }
};

template <int V, int K>
class Worker {
   public:
    typedef F<V> Vec;
    static constexpr int LANES = V;

   private:
    static constexpr int HALF = K / 2, R = queries_at_once(K), C = CHANNELS_AT_ONCE;
    const Problem& p;
    const Sizes s;
    const int64_t group;
    const Planes<V> planes;
    // Ring buffers of K + 1 rows, which is the number of rows that the windows of a pool's two query rows can reach.
    Vec *key_rows, *value_rows, *grad_key_rows, *grad_value_rows;
    Vec *query_rows, *grad_query_rows;       // ring buffers of HALF + 2 rows
    Vec *query_row, *grad_query_row;         // the current row of these ring buffers
    Vec *output_row, *grad_output_row;
    Vec *weights, *grad_scores;              // [K][tile_pitch][K]: the tile's scores or weights, and their gradients
    Vec *tiles[2], *pooled;                  // with a pool: the weights of its two query rows, and their combination
    Vec *pooled_grads;                       // [K + 1][tile / 2][K + 1]: g.v of a pool, which is T of its queries
    Vec *bias_height, *bias_width;           // [tile][K]: q.rel_height[dy] and q.rel_width[dx]; then their gradients
    Vec *top, *inverse_sum;                  // [W]: maximum score and 1 / sum E of the current query row
    Vec *statistic_rows;                     // top and inverse_sum of a pool's rows: [stride][2][W]
    Vec *delta;                              // [W]: sum P T
    Vec *rel_height, *rel_width;             // [D/2][K]
    Vec *grad_rel_height, *grad_rel_width;   // [D/2][K], over the current block of rows

   public:
    static int64_t num_vectors(const Problem& p, bool backward) {
        Sizes s = Sizes::of<K>(p, backward);
        int64_t rows = 2 * (K + 1) + HALF + 2 + 1, scores = K * K * s.tile_pitch;
        int64_t pooling = (p.stride - 1) * (scores + (K + 1) * (K + 1) * s.tile + 2 * s.W);  // weights and gradients
        int64_t forward = rows * s.row + scores + 2 * K * s.tile + 2 * s.W + 2 * K * s.half + pooling;
        return forward + backward * (rows * s.row + scores + s.W + 2 * K * s.half);
    }

    Worker(const Problem& problem, int64_t group, Vec* memory, bool backward)
        : p(problem), s(Sizes::of<K>(problem, backward)), group(group), planes(problem, group) {
        auto take = [&](int64_t n) { return (memory += n) - n; };
        key_rows = take((K + 1) * s.row), value_rows = take((K + 1) * s.row);
        query_rows = take((HALF + 2) * s.row), output_row = take(s.row);
        for (int64_t r = 0; r < p.stride; ++r) tiles[r] = take(K * K * s.tile_pitch);
        weights = tiles[0], pooled = take((p.stride - 1) * (K + 1) * (K + 1) * s.tile);
        pooled_grads = pooled + (K + 1) * (K + 1) * (s.tile / 2);
        bias_height = take(K * s.tile), bias_width = take(K * s.tile);
        top = statistic_rows = take(2 * p.stride * s.W), inverse_sum = top + s.W;
        rel_height = take(K * s.half), rel_width = take(K * s.half);
        if (p.rel_height) {
            load_rel(rel_height, p.rel_height);
            load_rel(rel_width, p.rel_width);
        }
        clear_pads(key_rows, 2 * (K + 1) + HALF + 2);  // keys, values and queries are contiguous
        if (!backward) return;
        grad_key_rows = take((K + 1) * s.row), grad_value_rows = take((K + 1) * s.row);
        grad_query_rows = take((HALF + 2) * s.row), grad_output_row = take(s.row);
        grad_scores = take(K * K * s.tile_pitch);
        delta = take(s.W);
        grad_rel_height = take(K * s.half), grad_rel_width = take(K * s.half);
        clear_pads(grad_output_row, 1);
        memset(grad_rel_height, 0, 2 * K * s.half * sizeof(Vec));
        for (int64_t dy = 0; dy < K; ++dy) {
            clear_margins(weights, dy);
            clear_margins(grad_scores, dy);
        }
    }

    template <typename E>
    void forward(int64_t first, int64_t end) {
        int64_t next_key = most(0, first - HALF);
        for (int64_t i = first; i < end; ++i) {
            for (; next_key < least(s.H, i + HALF + 1); ++next_key) load<E>(next_key, next_key >= first && next_key < end);
            // With a pool, two query rows are processed together, once the second row or the end of the image is
            // reached.
            if (p.stride == 2 && i % 2 == 0 && i + 1 < s.H) continue;
            int64_t i0 = p.stride == 2 ? i / 2 * 2 : i;
            for (int64_t x0 = 0; x0 < s.W; x0 += s.tile) {
                int64_t width = least(s.tile, s.W - x0);
                for (int64_t row = i0; row <= i; ++row) {
                    take_query_row(row, row - i0);
                    attend(row, x0, width);
                }
                if (p.stride == 2) {
                    pool<true>(i0, i, x0, width);
                    apply_pooled(i0, x0, width);
                } else {
                    apply(output_row, value_rows, weights, i, x0, width);
                    scale(output_row, x0, width);
                }
            }
            copy_rows<true, E>({output_row}, {&p.output}, i / p.stride, s.out_width);
            for (int64_t row = i0; row <= i; ++row) {
                take_query_row(row, row - i0);
                memcpy(statistics(row), top, 2 * s.W * sizeof(Vec));
            }
            take_query_row(i0, 0);
        }
    }

    // Computes the gradients of the query rows and key rows first .. end - 1. These key rows are also in reach of the
    // HALF query rows on either side, which are therefore recomputed. `partial`, [num_blocks][2][D/2][K], receives the
    // embeddings' gradients per block.
    template <typename E>
    void backward(int64_t first, int64_t end, Vec* partial) {
        int64_t query_first = most(0, first - HALF), query_end = least(s.H, end + HALF);
        int64_t next_key = most(0, query_first - HALF), done_key = first;
        for (int64_t i = query_first; i < query_end; ++i) {
            for (; next_key < least(s.H, i + HALF + 1); ++next_key) {
                load<E>(next_key, next_key >= query_first && next_key < query_end);
                memset(grad_key_rows + slot(next_key), 0, s.row * sizeof(Vec));
                memset(grad_value_rows + slot(next_key), 0, s.row * sizeof(Vec));
            }
            if (p.stride == 2 && i % 2 == 0 && i + 1 < query_end) continue;
            int64_t i0 = p.stride == 2 ? most(query_first, i / 2 * 2) : i;  // the first query row of this step
            copy_rows<false, E>({grad_output_row}, {&p.grad_output}, i / p.stride, s.out_width);
            if (p.stride == 2) share_among_pool(i);
            for (int64_t row = i0; row <= i; ++row) {
                take_query_row(row, row - i0);
                memcpy(top, statistics(row), 2 * s.W * sizeof(Vec));
            }
            for (int64_t x0 = 0; x0 < s.W; x0 += s.tile) {
                int64_t width = least(s.tile, s.W - x0);
                if (p.stride == 2) grad_weights_of_pools(i0, i, x0, width);
                for (int64_t row = i0; row <= i; ++row) {
                    take_query_row(row, row - i0);
                    bool own = row >= first && row < end;
                    backward_tile(row, x0, width, own, most(first, row - HALF), least(end, row + HALF + 1));
                }
                if (p.stride == 2) grad_values_of_pools(i0, i, x0, width, most(first, i0 - HALF), least(end, i + HALF + 1));
            }
            bool own = i >= first && i < end;
            if (own && p.rel_height && ((i + 1) % BLOCK_ROWS == 0 || i + 1 == s.H)) store_block(partial, i / BLOCK_ROWS);
            for (; done_key < least(end, i + 1 - HALF); ++done_key) store<E>(done_key);
        }
        for (; done_key < end; ++done_key) store<E>(done_key);
    }

   private:
    int64_t slot(int64_t y) const { return y % (K + 1) * s.row; }
    int64_t query_slot(int64_t y) const { return y % (HALF + 2) * s.row; }

    void take_query_row(int64_t i, int64_t which) {
        query_row = query_rows + query_slot(i), grad_query_row = grad_query_rows + query_slot(i);
        weights = tiles[which];
        top = statistic_rows + 2 * which * s.W, inverse_sum = top + s.W;
    }
    int64_t first_dy(int64_t i) const { return most(0, HALF - i); }
    int64_t end_dy(int64_t i) const { return least(K, s.H + HALF - i); }
    Vec* tile_row(Vec* tile, int64_t dy) const { return tile + (dy * s.tile_pitch + K - 1) * K; }

    static AtEdge at_edge(int64_t x, int64_t num, int64_t width) { return {x == 0, x + num == width}; }

    // Clears the columns that no load writes: those outside the image, and the one that makes the pitch odd.
    void clear_pads(Vec* rows, int64_t num_rows) const {
        for (int64_t c = 0; c < num_rows * s.D; ++c, rows += s.pitch) {
            memset(rows, 0, HALF * sizeof(Vec));
            memset(rows + HALF + s.W, 0, (s.pitch - HALF - s.W) * sizeof(Vec));
        }
    }

    // Clears the weights of the K - 1 queries on either side of a tile, which gathering reads.
    void clear_margins(Vec* tile, int64_t dy) const {
        memset(tile_row(tile, dy) - (K - 1) * K, 0, (K - 1) * K * sizeof(Vec));
        memset(tile_row(tile, dy) + s.tile * K, 0, (K - 1) * K * sizeof(Vec));
    }

    // Copies row y of N tensors. Queries, keys and values are usually parts of one tensor and adjacent at every pixel,
    // so they are copied together to access memory sequentially.
    template <bool OUT, typename E, int N>
    void copy_rows(Vec* const (&rows)[N], const Strided* const (&tensors)[N], int64_t y, int64_t width) const {
        RowCopy<V, E> copies[N];
        int64_t step = most(1, 32 / s.D);
        for (int n = 0; n < N; ++n) {
            copies[n] = RowCopy<V, E>(planes, *tensors[n], y, s.stream);
            if (tensors[n]->w == 1) step = width;
        }
        for (int64_t x = 0; x < width; x += step)
            for (int n = 0; n < N; ++n) {
                if (!rows[n]) continue;
                if constexpr (!OUT) copies[n].prefetch(x + PIXELS_AHEAD, step, s.D);
                copies[n].template run<OUT>(rows[n] + HALF, x, least(x + step, width), s.D, s.pitch);
            }
    }

    template <typename E>
    void load(int64_t y, bool with_query) {
        copy_rows<false, E>(
            {with_query ? query_rows + query_slot(y) : nullptr, p.key.data ? key_rows + slot(y) : nullptr, value_rows + slot(y)},
            {&p.query, &p.key, &p.value}, y, s.W);
        if (with_query) scale_query(query_rows + query_slot(y));
    }
    template <typename E>
    void store(int64_t y) {
        scale_query(grad_query_rows + query_slot(y));
        copy_rows<true, E>({grad_query_rows + query_slot(y), p.key.data ? grad_key_rows + slot(y) : nullptr, grad_value_rows + slot(y)},
                           {&p.grad_query, &p.grad_key, &p.grad_value}, y, s.W);
    }

    // A factor on the scores is one on the queries, and on their gradients.
    void scale_query(Vec* row) const {
        if (p.scale == 1) return;
        for (int64_t e = 0; e < s.row; ++e) row[e] *= float(p.scale);
    }

    // Returns row y of the statistics, which consists of two rows of vectors.
    float* statistics(int64_t y) const { return p.statistics + (group * s.H + y) * 2 * s.W * V; }

    void load_rel(Vec* rel, const float* table) const {
        for (int l = 0; l < V; ++l)
            for (int64_t dy = 0; dy < K; ++dy)
                for (int64_t c = 0; c < s.half; ++c)
                    rel[c * K + dy][l] = table[((p.rel_per_head ? planes.head[l] : 0) * K + dy) * s.half + c];
    }

    void store_block(Vec* partial, int64_t block) {
        int64_t size = s.half * K * sizeof(Vec);
        memcpy(partial + block * 2 * s.half * K, grad_rel_height, size);
        memcpy(partial + (block * 2 + 1) * s.half * K, grad_rel_width, size);
        memset(grad_rel_height, 0, size);
        memset(grad_rel_width, 0, size);
    }

    // Computes the tile's weights E (1 for the maximum of a window), top and inverse_sum from query_row.
    void attend(int64_t i, int64_t x0, int64_t width) {
        in_groups<R>(0, width, [&](auto Q, int64_t x) { bias<Q>(x0, x); });
        for (int64_t x = 0; x < width; ++x) top[x0 + x] = least_top<V>(p);
        int64_t begin = p.border == ZERO ? 0 : first_dy(i), end = p.border == ZERO ? K : end_dy(i);
        for (int64_t dy = begin; dy < end; ++dy) {
            const Vec* keys = p.key.data ? row_in_reach(key_rows, i, dy) : nullptr;
            in_groups<R>(0, width, [&](auto Q, int64_t x) { score<Q>(keys, x0, x, dy); });
        }
        for (int64_t x = 0; x < width; ++x) exponentials(x0, x, begin, end);
    }

    // Returns the row of a ring buffer at window row dy, or null outside the image.
    const Vec* row_in_reach(const Vec* rows, int64_t i, int64_t dy) const {
        return dy >= first_dy(i) && dy < end_dy(i) ? rows + slot(i + dy - HALF) : nullptr;
    }

    // Computes the part of the scores that is given by K + K values per position. A row's is not added to its scores S,
    // but when they become E or P. Columns outside the image are set to
    // -infinity here, which the product with a zero key does not change.
    template <int Q>
    INLINE void bias(int64_t x0, int64_t x) {
        rel_product<Q>(bias_height + x * K, query_row + HALF + x0 + x, rel_height);
        rel_product<Q>(bias_width + x * K, query_row + s.half * s.pitch + HALF + x0 + x, rel_width);
        for (int r = 0; r < Q; ++r) {
            if (p.border == ZERO) continue;
            int64_t column = x0 + x + r;
            for (int64_t dx = 0; dx < HALF - column; ++dx) bias_width[(x + r) * K + dx] = Vec{} - __builtin_inff();
            for (int64_t dx = s.W + HALF - column; dx < K; ++dx) bias_width[(x + r) * K + dx] = Vec{} - __builtin_inff();
        }
    }

    // Computes to[r][d] = sum_c q[c][r] * rel[c][d]; without embeddings, zeros.
    template <int Q>
    INLINE void rel_product(Vec* to, const Vec* q, const Vec* rel) {
        Vec acc[Q][K];
        fill(acc);
        for (int64_t c = 0; c < (p.rel_height ? s.half : 0); ++c, q += s.pitch, rel += K) {
            UNROLL
            for (int dy = 0; dy < K; ++dy) {
                UNROLL
                for (int r = 0; r < Q; ++r) acc[r][dy] += q[r] * rel[dy];
            }
        }
        store_all(to, acc);
    }

    template <int Q>
    INLINE void score_row(Vec (&acc)[Q][K], const Vec* keys, int64_t x0, int64_t x) const {
        UNROLL
        for (int r = 0; r < Q; ++r) {
            UNROLL
            for (int dx = 0; dx < K; ++dx) acc[r][dx] = bias_width[(x + r) * K + dx];
        }
        if (keys) band_product<V, K, Q>(acc, query_row + HALF + x0 + x, keys + x0 + x, s.D, s.pitch, at_edge(x0 + x, Q, s.W));
    }

    template <int Q>
    INLINE void score(const Vec* keys, int64_t x0, int64_t x, int64_t dy) {
        Vec acc[Q][K];
        score_row<Q>(acc, keys, x0, x);
        Vec* out = tile_row(weights, dy) + x * K;
        UNROLL
        for (int r = 0; r < Q; ++r) {
            Vec largest = acc[r][0];
            UNROLL
            for (int dx = 0; dx < K; ++dx) {
                out[r * K + dx] = acc[r][dx];
                largest = larger<V>(acc[r][dx], largest);
            }
            top[x0 + x + r] = larger<V>(largest + bias_height[(x + r) * K + dy], top[x0 + x + r]);
        }
    }

    // Computes exp(S - max) of position x over window rows begin .. end - 1, in place. K sums are used, so that no
    // addition waits for another.
    INLINE void exponentials(int64_t x0, int64_t x, int64_t begin, int64_t end) {
        Vec largest = top[x0 + x], sums[K] = {};
        for (int64_t dy = begin; dy < end; ++dy) {
            Vec *row = tile_row(weights, dy) + x * K, shift = (largest - bias_height[x * K + dy]) * LOG2_E;
            UNROLL
            for (int dx = 0; dx < K; ++dx) {
                Vec e = fast_exp2<V>(row[dx] * LOG2_E - shift);
                row[dx] = e;
                sums[dx] += e;
            }
        }
        if (p.null_key) sums[0] += fast_exp2<V>(Vec{} - largest * LOG2_E);
        inverse_sum[x0 + x] = 1.0f / total(sums);
    }

    static INLINE Vec total(const Vec (&sums)[K]) {
        Vec sum = sums[0];
        UNROLL
        for (int dx = 1; dx < K; ++dx) sum += sums[dx];
        return sum;
    }

    // Returns the key row at window row 0 of a pool, whose window has size K + 1, and one of whose query rows is i.
    int64_t pool_start(int64_t i) const { return i / 2 * 2 - HALF; }

    // Computes pooled[dy][x / 2][dx], the sum of the weights of those of the 2 x 2 queries in rows i0 and i1 and columns
    // x and x + 1 that are inside the image; if MEAN, the weights are E, and become the mean of P.
    template <bool MEAN>
    void pool(int64_t i0, int64_t i1, int64_t x0, int64_t width) {
        int64_t start = pool_start(i1);
        for (int64_t dy = most(0, -start); dy < least(K + 1, s.H - start); ++dy)
            for (int64_t x = 0; x < width; x += 2) {
                Vec acc[1][K + 1];
                fill(acc);
                int64_t num_columns = least(2, width - x);
                for (int64_t r = 0; r <= i1 - i0; ++r) {
                    int64_t of_row = dy - (i0 + r - HALF - start);
                    if (of_row < 0 || of_row >= K) continue;
                    const Vec* weight = tile_row(tiles[r], of_row) + x * K;
                    const Vec* share = statistic_rows + (2 * r + 1) * s.W + x0 + x;
                    float part = 1.0f / float(num_columns * (i1 - i0 + 1));
                    for (int64_t q = 0; q < num_columns; ++q) {
                        Vec scale = MEAN ? share[q] * part : Vec{} + 1.0f;
                        if (q == 0) {
                            UNROLL
                            for (int dx = 0; dx < K; ++dx) acc[0][dx] += weight[dx] * scale;
                        } else {
                            UNROLL
                            for (int dx = 0; dx < K; ++dx) acc[0][dx + 1] += weight[K + dx] * scale;
                        }
                    }
                }
                store_all(pooled_row(dy) + x / 2 * (K + 1), acc);
            }
    }

    Vec* pooled_row(int64_t dy) const { return pooled + dy * (K + 1) * (s.tile / 2); }

    void apply_pooled(int64_t i0, int64_t x0, int64_t width) {
        int64_t c = 0;
        for (; c + C <= s.D; c += C) apply_pooled_channels<C>(i0, x0, width, c);
        for (; c < s.D; ++c) apply_pooled_channels<1>(i0, x0, width, c);
    }

    template <int CH>
    void apply_pooled_channels(int64_t i0, int64_t x0, int64_t width, int64_t c) {
        in_groups<APPLIED_AT_ONCE>(0, ceil_div(width, 2), [&](auto Q, int64_t x) {
            Vec acc[Q][CH];
            fill(acc);
            for (int64_t dy = first_dy(i0); dy < least(K + 1, s.H + HALF - i0); ++dy)
                band_apply<V, K + 1, Q, CH, false, 2>(acc, pooled_row(dy) + x * (K + 1),
                                                      value_rows + slot(i0 + dy - HALF) + c * s.pitch + x0 + 2 * x, s.pitch,
                                                      at_edge(x0 / 2 + x, Q, s.out_width));
            store_acc<Q, CH>(output_row + c * s.pitch + HALF + x0 / 2 + x, acc);
        });
    }

    // Computes row[x] *= inverse_sum[x].
    void scale(Vec* row, int64_t x0, int64_t width) const {
        for (int64_t c = 0; c < s.D; ++c)
            for (int64_t x = 0; x < width; ++x) row[c * s.pitch + HALF + x0 + x] *= inverse_sum[x0 + x];
    }

    // Computes to[x] = sum over the window of tile[dy][x][dx] * rows[dy][x + dx].
    void apply(Vec* to, const Vec* rows, Vec* tile, int64_t i, int64_t x0, int64_t width) {
        int64_t c = 0;
        for (; c + C <= s.D; c += C) apply_channels<C>(to, rows, tile, i, x0, width, c);
        for (; c + 2 <= s.D; c += 2) apply_channels<2>(to, rows, tile, i, x0, width, c);
        for (; c < s.D; ++c) apply_channels<1>(to, rows, tile, i, x0, width, c);
    }

    template <int CH>
    void apply_channels(Vec* to, const Vec* rows, Vec* tile, int64_t i, int64_t x0, int64_t width, int64_t c) {
        in_groups<APPLIED_AT_ONCE>(0, width, [&](auto Q, int64_t x) { apply_block<Q, CH>(to, rows, tile, i, x0, x, c); });
    }

    template <int Q, int CH>
    INLINE void apply_block(Vec* to, const Vec* rows, Vec* tile, int64_t i, int64_t x0, int64_t x, int64_t c) {
        Vec acc[Q][CH];
        fill(acc);
        const AtEdge edge = at_edge(x0 + x, Q, s.W);
        for (int64_t dy = first_dy(i); dy < end_dy(i); ++dy)
            band_apply<V, K, Q, CH, false>(acc, tile_row(tile, dy) + x * K,
                                           rows + slot(i + dy - HALF) + c * s.pitch + x0 + x, s.pitch, edge);
        store_acc<Q, CH>(to + c * s.pitch + HALF + x0 + x, acc);
    }

    template <int Q, int CH>
    INLINE void store_acc(Vec* to, const Vec (&acc)[Q][CH]) const {
        UNROLL
        for (int r = 0; r < Q; ++r) {
            UNROLL
            for (int c = 0; c < CH; ++c) to[c * s.pitch + r] = acc[r][c];
        }
    }
    template <int Q, int CH>
    INLINE void load_acc(const Vec* from, Vec (&acc)[Q][CH]) const {
        UNROLL
        for (int r = 0; r < Q; ++r) {
            UNROLL
            for (int c = 0; c < CH; ++c) acc[r][c] = from[c * s.pitch + r];
        }
    }

    // Computes the gradients of query row i if `own` is true, and adds to those of key rows key_first .. key_end - 1.
    void backward_tile(int64_t i, int64_t x0, int64_t width, bool own, int64_t key_first, int64_t key_end) {
        memset(delta + x0, 0, width * sizeof(Vec));
        in_groups<R>(0, width, [&](auto Q, int64_t x) { bias<Q>(x0, x); });
        int64_t begin = p.border == ZERO ? 0 : first_dy(i), end = p.border == ZERO ? K : end_dy(i);
        for (int64_t dy = begin; dy < end; ++dy) {
            const Vec* keys = p.key.data ? row_in_reach(key_rows, i, dy) : nullptr;
            const Vec* values = row_in_reach(value_rows, i, dy);
            const Vec* of_pools = p.stride == 2 ? pooled_grad_row(i - HALF - pool_start(i) + dy) : nullptr;
            in_groups<R>(0, width, [&](auto Q, int64_t x) { grad_weight<Q>(keys, values, of_pools, x0, x, dy); });
        }
        if (p.stride == 2) grad_scores_of_tile<true>(i, x0, width, begin, end);
        else grad_scores_of_tile<false>(i, x0, width, begin, end);
        clear_beyond(width);
        if (own) {
            if (p.key.data) apply(grad_query_row, key_rows, grad_scores, i, x0, width);
            else clear(grad_query_row, x0, width);
            if (p.rel_height) {
                grad_rel(grad_query_row, query_row, rel_height, grad_rel_height, bias_height, x0, width);
                int64_t lower = s.half * s.pitch;
                grad_rel(grad_query_row + lower, query_row + lower, rel_width, grad_rel_width, bias_width, x0, width);
            }
        }
        int64_t from = most(0, x0 - HALF), to = least(s.W, x0 + width + HALF);
        for (int64_t y = most(0, key_first); y < least(s.H, key_end); ++y) {
            int64_t dy = y - i + HALF;
            if (p.key.data) gather(grad_key_rows + slot(y), query_row, tile_row(grad_scores, dy), x0, from, to);
            if (p.stride == 1) gather(grad_value_rows + slot(y), grad_output_row, tile_row(weights, dy), x0, from, to);
        }
    }

    // Turns the pooled gradient in grad_output_row into that of each query of a pool, one of whose query rows is i.
    void share_among_pool(int64_t i) {
        float rows = i / 2 * 2 + 1 < s.H ? 2.0f : 1.0f;
        for (int64_t c = 0; c < s.D; ++c) {
            Vec* row = grad_output_row + c * s.pitch + HALF;
            for (int64_t x = 0; x < s.out_width; ++x) row[x] *= 1.0f / (2 * x + 1 < s.W ? 2 * rows : rows);
        }
    }

    Vec* pooled_grad_row(int64_t dy) const { return pooled_grads + dy * (K + 1) * (s.tile / 2); }

    // Computes pooled_grads for the key rows in reach of query rows i0 .. i1 of a pool.
    void grad_weights_of_pools(int64_t i0, int64_t i1, int64_t x0, int64_t width) {
        int64_t start = pool_start(i1);
        for (int64_t y = most(0, i0 - HALF); y < least(s.H, i1 + HALF + 1); ++y)
            in_groups<pools_at_once(K)>(0, ceil_div(width, 2), [&](auto Q, int64_t x) {
                Vec acc[Q][K + 1];
                fill(acc);
                band_product<V, K + 1, Q, 2>(acc, grad_output_row + HALF + x0 / 2 + x, value_rows + slot(y) + x0 + 2 * x, s.D,
                                             s.pitch, at_edge(x0 / 2 + x, Q, s.out_width));
                store_all(pooled_grad_row(y - start) + x * (K + 1), acc);
            });
    }

    // Adds what query rows i0 .. i1 of a pool give to the gradients of value rows key_first .. key_end - 1.
    void grad_values_of_pools(int64_t i0, int64_t i1, int64_t x0, int64_t width, int64_t key_first, int64_t key_end) {
        pool<false>(i0, i1, x0, width);
        int64_t from = most(0, x0 - HALF) / 2, end = ceil_div(least(s.W, x0 + width + HALF), 2), num_pools = ceil_div(width, 2);
        for (int64_t y = most(0, key_first); y < least(s.H, key_end); ++y) {
            Vec* to = grad_value_rows + slot(y);
            const Vec* of_pools = pooled_row(y - pool_start(i1));
            int64_t c = 0;
            for (; c + 4 <= s.D; c += 4) gather_pools<4>(to, of_pools, x0, num_pools, from, end, c);
            for (; c < s.D; ++c) gather_pools<1>(to, of_pools, x0, num_pools, from, end, c);
        }
    }

    // Computes to[2 m + e] += sum over the tile's pools x in reach of of_pools[x][2 (m - x) + e + HALF] * gradient[x] for
    // m = from .. end - 1 and e = 0 and 1.
    template <int CH>
    void gather_pools(Vec* to, const Vec* of_pools, int64_t x0, int64_t num_pools, int64_t from, int64_t end, int64_t c) {
        in_groups<PAIRS_AT_ONCE>(from, end, [&](auto N, int64_t m) {
            constexpr int REACH = (HALF + 1) / 2;
            Vec acc[2 * N][CH], *place = to + c * s.pitch + HALF + 2 * m;
            load_acc<2 * N, CH>(place, acc);
            UNROLL
            for (int t = -REACH; t < REACH + N; ++t) {
                int64_t x = m + t - x0 / 2;
                if (x < 0 || x >= num_pools) continue;
                const Vec* gradient = grad_output_row + c * s.pitch + HALF + x0 / 2 + x;
                Vec weight[2 * N];
                UNROLL
                for (int n = 0; n < 2 * N; ++n) {
                    int j = HALF + n - 2 * t;
                    if (j >= 0 && j <= K) weight[n] = loaded(of_pools[x * (K + 1) + j]);
                }
                UNROLL
                for (int channel = 0; channel < CH; ++channel) {
                    Vec here = loaded(gradient[channel * s.pitch]);
                    UNROLL
                    for (int n = 0; n < 2 * N; ++n) {
                        int j = HALF + n - 2 * t;
                        if (j >= 0 && j <= K) acc[n][channel] += weight[n] * here;
                    }
                }
            }
            store_acc<2 * N, CH>(place, acc);
        });
    }

    void clear(Vec* row, int64_t x0, int64_t width) const {
        for (int64_t c = 0; c < s.D; ++c) memset(row + c * s.pitch + HALF + x0, 0, width * sizeof(Vec));
    }

    // If the last tile is narrower, the previous tile's weights on its right are cleared, because gathering must read
    // zeros there.
    void clear_beyond(int64_t width) const {
        if (width == s.tile) return;
        for (int64_t dy = 0; dy < K; ++dy) {
            memset(tile_row(weights, dy) + width * K, 0, (s.tile - width) * K * sizeof(Vec));
            memset(tile_row(grad_scores, dy) + width * K, 0, (s.tile - width) * K * sizeof(Vec));
        }
    }

    // Computes P and T of Q queries and one key row, and adds their contribution to delta.
    template <int Q>
    INLINE void grad_weight(const Vec* keys, const Vec* values, const Vec* of_pools, int64_t x0, int64_t x, int64_t dy) {
        Vec acc[Q][K];
        score_row<Q>(acc, keys, x0, x);
        Vec *weight = tile_row(weights, dy) + x * K, *grad = tile_row(grad_scores, dy) + x * K;
        UNROLL
        for (int r = 0; r < Q; ++r) {
            Vec shift = (top[x0 + x + r] - bias_height[(x + r) * K + dy]) * LOG2_E, inverse = inverse_sum[x0 + x + r];
            UNROLL
            for (int dx = 0; dx < K; ++dx) {
                weight[r * K + dx] = fast_exp2<V>(acc[r][dx] * LOG2_E - shift) * inverse;
                acc[r][dx] = Vec{};
            }
        }
        if (values && of_pools) {
            UNROLL
            for (int r = 0; r < Q; ++r) {
                const Vec* of_pool = of_pools + (x + r) / 2 * (K + 1) + (x + r) % 2;
                UNROLL
                for (int dx = 0; dx < K; ++dx) acc[r][dx] = of_pool[dx];
            }
        } else if (values) {
            band_product<V, K, Q>(acc, grad_output_row + HALF + x0 + x, values + x0 + x, s.D, s.pitch, at_edge(x0 + x, Q, s.W));
        }
        UNROLL
        for (int r = 0; r < Q; ++r) {
            Vec sum = {};
            UNROLL
            for (int dx = 0; dx < K; ++dx) {
                if (!of_pools) grad[r * K + dx] = acc[r][dx];
                sum += weight[r * K + dx] * acc[r][dx];
            }
            delta[x0 + x + r] += sum;
        }
    }

    // Computes dS = P (T - delta), in place of T unless a pool shares it, over window rows begin .. end - 1, and in
    // place of the bias terms of the scores, the sums of dS over the window's rows and columns. It is not inlined, so
    // that its pointers stay in registers.
    template <bool POOLED>
    __attribute__((noinline)) void grad_scores_of_tile(int64_t i, int64_t x0, int64_t width, int64_t begin, int64_t end) {
        const int64_t step = s.tile_pitch * K, pooled_step = (K + 1) * (s.tile / 2);
        const Vec *weight_row = tile_row(weights, begin), *of_pools = nullptr;
        if (POOLED) of_pools = pooled_grad_row(i - HALF - pool_start(i) + begin);
        const int64_t inside_begin = first_dy(i), inside_end = end_dy(i);
        Vec *grad_row = tile_row(grad_scores, begin), *by_row = bias_height, *by_column = bias_width;
        for (int64_t x = 0; x < width; ++x, by_row += K, by_column += K) {
            const Vec *weight = weight_row + x * K, mean = delta[x0 + x];
            Vec *grad = grad_row + x * K, sums[1][K];
            const Vec* t = POOLED ? of_pools + x / 2 * (K + 1) + x % 2 : grad;
            fill(sums);
            for (int64_t dy = 0; dy < begin; ++dy) by_row[dy] = Vec{};
            for (int64_t dy = begin; dy < end; ++dy) {
                Vec of_row = {};
                bool is_zero = POOLED && (dy < inside_begin || dy >= inside_end);
                UNROLL
                for (int dx = 0; dx < K; ++dx) {
                    Vec g = weight[dx] * ((is_zero ? Vec{} : t[dx]) - mean);
                    grad[dx] = g;
                    of_row += g;
                    sums[0][dx] += g;
                }
                by_row[dy] = of_row;
                weight += step, grad += step, t += POOLED ? pooled_step : step;
            }
            for (int64_t dy = end; dy < K; ++dy) by_row[dy] = Vec{};
            store_all(by_column, sums);
        }
    }

    // For one half of the channels, computes grad_q += sum_d grad_bias[x][d] rel[d] and
    // grad_rel[d] += sum_x grad_bias[x][d] q[x].
    void grad_rel(Vec* grad_q, const Vec* q, const Vec* rel, Vec* grad_rel, const Vec* grad_bias, int64_t x0, int64_t width) {
        for (int64_t c = 0; c < s.half; ++c, rel += K, grad_rel += K) {
            const Vec* q_here = q + c * s.pitch + HALF + x0;
            Vec* grad_here = grad_q + c * s.pitch + HALF + x0;
            Vec acc[K], table[K];
            UNROLL
            for (int d = 0; d < K; ++d) acc[d] = grad_rel[d], table[d] = rel[d];
            for (int64_t x = 0; x < width; ++x) {
                Vec sum = grad_here[x], q_x = q_here[x];
                UNROLL
                for (int d = 0; d < K; ++d) {
                    Vec g = grad_bias[x * K + d];
                    acc[d] += g * q_x;
                    sum += g * table[d];
                }
                grad_here[x] = sum;
            }
            UNROLL
            for (int d = 0; d < K; ++d) grad_rel[d] = acc[d];
        }
    }

    // Computes to[x'] += sum over the tile's queries x in reach of tile[x][x' - x] * from_row[x], for
    // x' = from .. end - 1.
    void gather(Vec* to, const Vec* source, const Vec* tile, int64_t x0, int64_t from, int64_t end) {
        int64_t c = 0;
        for (; c + C <= s.D; c += C) gather_channels<C>(to, source, tile, x0, from, end, c);
        for (; c + 2 <= s.D; c += 2) gather_channels<2>(to, source, tile, x0, from, end, c);
        for (; c < s.D; ++c) gather_channels<1>(to, source, tile, x0, from, end, c);
    }

    template <int CH>
    void gather_channels(Vec* to, const Vec* source, const Vec* tile, int64_t x0, int64_t from, int64_t end, int64_t c) {
        in_groups<APPLIED_AT_ONCE>(from, end, [&](auto Q, int64_t x) { gather_block<Q, CH>(to, source, tile, x0, x, c); });
    }

    template <int Q, int CH>
    INLINE void gather_block(Vec* to, const Vec* source, const Vec* tile, int64_t x0, int64_t x, int64_t c) {
        Vec acc[Q][CH];
        Vec* place = to + c * s.pitch + HALF + x;
        load_acc<Q, CH>(place, acc);
        // source column x - HALF is at index x of the padded row
        band_apply<V, K, Q, CH, true>(acc, tile + (x - HALF - x0) * K, source + c * s.pitch + x, s.pitch, at_edge(x, Q, s.W));
        store_acc<Q, CH>(place, acc);
    }
};

// With few planes (e.g. a single image), most lanes of a wide vector would be idle, so narrower vectors are used.
int64_t dispatch(const Problem& p, Job job) {
#if MAX_LANES == 16
    if (p.batch * p.num_heads <= 8) return do_job<Worker<8, KERNEL_SIZE>>(p, job);
#endif
    return do_job<Worker<MAX_LANES, KERNEL_SIZE>>(p, job);
}

}  // namespace
