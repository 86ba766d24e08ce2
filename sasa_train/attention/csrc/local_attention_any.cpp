// Forward and backward pass of local self-attention on the CPU, with every option: windows of any rows x columns,
// border=shift, values with another head_dim than queries. No size is known when it is compiled. ../reference.py
// contains the definition; cpu.py builds and calls this code for the options that local_attention.cpp lacks.
//
// Method: as in local_attention.cpp, each vector lane holds one plane, V planes are processed in lockstep, and rows are
// packed into scratch memory as [channel][column] vectors. A tile of adjacent queries is processed at a time. For each
// of them the window's scores lie next to one another, row by row. `Span` says which keys a position sees along one
// axis and with which rows of the table, so that the three borders differ nowhere else: with border=zero, a span
// reaches beyond the image, to columns of zeros and to rows that are skipped.
//
//   forward, a query row:    S = q.k + q.r,  E = exp(S - max),  out = sum E v / sum E
//   backward, a query row:   S again,  P = exp(S - max) / sum E,  T = g.v,  dS = P (T - sum P T),
//                            dq += dS k + dS r,  dk += dS q,  dv += P g,  dr += dS q
//
// dk and dv of the key rows in reach are kept in a ring buffer, to which the query rows are added in order. A row is
// written out when the last query row that sees it is done. A thread that computes some of the rows recomputes the
// other query rows that see its keys. So there are no atomics, and the order of summation is the same for any number of
// threads.

#include "planes.h"

namespace {

// Number of scores of a tile, unless it has fewer than MIN_TILE or more than MAX_TILE queries. It suits the caches; the
// results do not depend on it.
constexpr int64_t TILE_SCORES = 2048, MIN_TILE = 4, MAX_TILE = 32;
constexpr int KEYS_AT_ONCE = NUM_REGISTERS == 32 ? 12 : 8;
constexpr int CHANNELS_AT_ONCE = NUM_REGISTERS == 32 ? 8 : 4;

// The keys begin .. end - 1 that a position sees along one axis, and the row of the table for the first of them.
struct Span {
    int64_t begin, end, table;
    Span(int64_t place, int64_t size, int64_t keys, int64_t border) {
        int64_t first = place - keys / 2, last = first + keys;
        if (border == SHIFT) {
            begin = most(0, least(first, size - keys)), end = begin + keys, table = begin - place + keys - 1;
        } else if (border == ZERO) {
            begin = first, end = last, table = 0;
        } else {
            begin = most(0, first), end = least(size, last), table = begin - first;
        }
    }
    int64_t count() const { return end - begin; }
};

// The positions begin .. end - 1 that see a key of the image.
struct Seers {
    int64_t begin, end;
    Seers(int64_t key, int64_t size, int64_t keys, int64_t border) {
        bool shift = border == SHIFT;
        begin = shift && key < keys ? 0 : most(0, key - keys / 2);
        end = shift && key >= size - keys ? size : least(size, key + keys / 2 + 1);
    }
};

struct Sizes {
    int64_t H, W, D, DV, half, pad, pitch, row, value_row, out_width, rows, columns, window, ring, tile;
    bool stream;  // whether the results bypass the caches
    Sizes(const Problem& p, bool backward) : H(p.height), W(p.width), D(p.head_dim), DV(p.value_dim) {
        bool zero = p.border == ZERO;
        half = p.rel_height ? D / 2 : 0;
        pad = zero ? p.columns / 2 : 0;
        pitch = (W + 2 * pad) | 1;  // odd, so that channels do not share cache sets
        row = pitch * D, value_row = pitch * DV;
        out_width = ceil_div(W, p.stride);
        rows = zero ? p.rows : least(p.rows, H), columns = zero ? p.columns : least(p.columns, W);
        window = rows * columns;
        ring = least(p.rows, H);
        tile = least(W, most(MIN_TILE, least(MAX_TILE, TILE_SCORES / window)));
        int64_t positions = p.batch * p.num_heads * H * W;
        stream = positions * (backward ? 2 * D + DV : DV / (p.stride * p.stride)) > STREAM_NUMBERS;
    }
};

// Computes to[j] += sum_c a[c][0] * b[c][j] for j < count.
template <typename Vec>
INLINE void add_products(Vec* to, const Vec* a, int64_t a_pitch, const Vec* b, int64_t b_pitch, int64_t channels,
                         int64_t count) {
    in_groups<KEYS_AT_ONCE>(0, count, [&](auto N, int64_t j) {
        Vec acc[N];
        UNROLL
        for (int k = 0; k < N; ++k) acc[k] = to[j + k];
        const Vec *a_c = a, *b_c = b + j;
        for (int64_t c = 0; c < channels; ++c, a_c += a_pitch, b_c += b_pitch) {
            Vec a_here = loaded(*a_c);
            UNROLL
            for (int k = 0; k < N; ++k) acc[k] += a_here * b_c[k];
        }
        UNROLL
        for (int k = 0; k < N; ++k) to[j + k] = acc[k];
    });
}

// Computes acc[c] += sum_j weights[j] * b[c][j] for j < count.
template <int C, typename Vec>
INLINE void add_weighted(Vec (&acc)[C], const Vec* weights, const Vec* b, int64_t pitch, int64_t count) {
    for (int64_t j = 0; j < count; ++j, ++b) {
        Vec weight = loaded(weights[j]);
        UNROLL
        for (int c = 0; c < C; ++c) acc[c] += weight * b[c * pitch];
    }
}

// ---- one thread's work ----------------------------------------------------------------------------------------------

template <int V>
class Worker {
   public:
    typedef F<V> Vec;
    static constexpr int LANES = V;

   private:
    const Problem& p;
    const Sizes s;
    const int64_t group;
    const Planes<V> planes;
    Vec *key_rows, *value_rows, *grad_key_rows, *grad_value_rows;  // ring buffers
    Vec *query_row, *output_row, *pooled_row;                      // pooled_row: the output's or its gradient's
    Vec *grad_query_row, *grad_output_row;
    Vec *weights, *grad_scores;             // [tile][window]: scores, then weights; T, then dS
    Vec *bias_height, *bias_width;          // [tile][rows], [tile][columns]: q.rel_height, q.rel_width; then gradients
    Vec *top, *inverse_sum;                 // [W]: maximum score and 1 / sum E of the current query row
    Vec *rel_height, *rel_width;            // [D/2][K]
    Vec *grad_rel_height, *grad_rel_width;  // [D/2][K], over the current block of rows

   public:
    static int64_t num_vectors(const Problem& p, bool backward) {
        Sizes s(p, backward);
        int64_t rel = s.half * (p.rel_height_rows + p.rel_width_rows), scores = s.tile * s.window;
        int64_t rows = s.ring * (s.row + s.value_row) + s.row + 2 * s.value_row;
        int64_t forward = rows + scores + s.tile * (s.rows + s.columns) + 2 * s.W + rel;
        return forward + backward * (rows + scores + rel);
    }

    Worker(const Problem& problem, int64_t group, Vec* memory, bool backward)
        : p(problem), s(problem, backward), group(group), planes(problem, group) {
        auto take = [&](int64_t n) { return (memory += n) - n; };
        key_rows = take(s.ring * s.row), value_rows = take(s.ring * s.value_row);
        query_row = take(s.row), output_row = take(s.value_row), pooled_row = take(s.value_row);
        weights = take(s.tile * s.window);
        bias_height = take(s.tile * s.rows), bias_width = take(s.tile * s.columns);
        top = take(s.W), inverse_sum = take(s.W);
        rel_height = take(s.half * p.rel_height_rows), rel_width = take(s.half * p.rel_width_rows);
        if (p.rel_height) {
            load_rel(rel_height, p.rel_height, p.rel_height_rows);
            load_rel(rel_width, p.rel_width, p.rel_width_rows);
        }
        clear_pads(key_rows, s.ring * s.D);
        clear_pads(value_rows, s.ring * s.DV);
        if (!backward) return;
        grad_key_rows = take(s.ring * s.row), grad_value_rows = take(s.ring * s.value_row);
        grad_query_row = take(s.row), grad_output_row = take(s.value_row);
        grad_scores = take(s.tile * s.window);
        grad_rel_height = take(s.half * p.rel_height_rows), grad_rel_width = take(s.half * p.rel_width_rows);
        clear_grad_rel();
    }

    template <typename E>
    void forward(int64_t first, int64_t end) {
        int64_t next_key = most(0, row_span(first).begin);
        for (int64_t i = first; i < end; ++i) {
            for (; next_key < least(s.H, row_span(i).end); ++next_key) load_keys<E>(next_key);
            load_query<E>(i);
            for (int64_t x0 = 0; x0 < s.W; x0 += s.tile) {
                int64_t width = least(s.tile, s.W - x0);
                scores(i, x0, width);
                for (int64_t x = 0; x < width; ++x) exponentials(i, x0, x);
                apply(output_row, s.DV, value_rows, s.value_row, weights, i, x0, width);
                for (int64_t c = 0; c < s.DV; ++c)
                    for (int64_t x = x0; x < x0 + width; ++x) output_row[c * s.pitch + s.pad + x] *= inverse_sum[x];
            }
            memcpy(statistics(i), top, 2 * s.W * sizeof(Vec));
            if (p.stride == 1) copy<true, E>(output_row, p.output, i, s.W, s.DV);
            else if (pool(i)) copy<true, E>(pooled_row, p.output, i / 2, s.out_width, s.DV);
        }
    }

    // Computes the gradients of the query rows and key rows first .. end - 1. `partial`, [num_blocks][D/2 (K + K)],
    // receives the embeddings' gradients per block.
    template <typename E>
    void backward(int64_t first, int64_t end, Vec* partial) {
        int64_t query_first = seers_of_row(first).begin, query_end = seers_of_row(end - 1).end;
        int64_t next_key = most(0, row_span(query_first).begin), done_key = first;
        for (int64_t i = query_first; i < query_end; ++i) {
            Span reach = row_span(i);
            for (; done_key < least(end, reach.begin); ++done_key) store_keys<E>(done_key);
            for (; next_key < least(s.H, reach.end); ++next_key) {
                load_keys<E>(next_key);
                memset(grad_key_rows + slot(next_key) * s.row, 0, s.row * sizeof(Vec));
                memset(grad_value_rows + slot(next_key) * s.value_row, 0, s.value_row * sizeof(Vec));
            }
            load_query<E>(i);
            load_grad_output<E>(i);
            memcpy(top, statistics(i), 2 * s.W * sizeof(Vec));
            bool own = i >= first && i < end;
            for (int64_t x0 = 0; x0 < s.W; x0 += s.tile)
                backward_tile(i, x0, least(s.tile, s.W - x0), own, most(first, reach.begin), least(end, reach.end));
            if (!own) continue;
            scale(grad_query_row);
            copy<true, E>(grad_query_row, p.grad_query, i, s.W, s.D);
            if (s.half && ((i + 1) % BLOCK_ROWS == 0 || i + 1 == s.H)) store_block(partial, i / BLOCK_ROWS);
        }
        for (; done_key < end; ++done_key) store_keys<E>(done_key);
    }

   private:
    Span row_span(int64_t i) const { return Span(i, s.H, p.rows, p.border); }
    Span column_span(int64_t x) const { return Span(x, s.W, p.columns, p.border); }
    Seers seers_of_row(int64_t y) const { return Seers(y, s.H, p.rows, p.border); }
    Seers seers_of_column(int64_t x) const { return Seers(x, s.W, p.columns, p.border); }
    int64_t slot(int64_t y) const { return y % s.ring; }
    bool inside(int64_t y) const { return y >= 0 && y < s.H; }

    // ---- rows in and out of scratch memory

    template <bool OUT, typename E>
    void copy(Vec* row, const Strided& tensor, int64_t y, int64_t width, int64_t channels) const {
        RowCopy<V, E> rows(planes, tensor, y, s.stream);
        int64_t step = tensor.w == 1 ? width : most(1, 32 / most(1, channels));
        for (int64_t x = 0; x < width; x += step) {
            if constexpr (!OUT) rows.prefetch(x + PIXELS_AHEAD, step, channels);
            rows.template run<OUT>(row + s.pad, x, least(x + step, width), channels, s.pitch);
        }
    }
    template <typename E>
    void load_keys(int64_t y) {
        if (p.key.data) copy<false, E>(key_rows + slot(y) * s.row, p.key, y, s.W, s.D);
        copy<false, E>(value_rows + slot(y) * s.value_row, p.value, y, s.W, s.DV);
    }
    template <typename E>
    void store_keys(int64_t y) {
        if (p.key.data) copy<true, E>(grad_key_rows + slot(y) * s.row, p.grad_key, y, s.W, s.D);
        copy<true, E>(grad_value_rows + slot(y) * s.value_row, p.grad_value, y, s.W, s.DV);
    }
    template <typename E>
    void load_query(int64_t i) {
        copy<false, E>(query_row, p.query, i, s.W, s.D);
        scale(query_row);
    }
    void scale(Vec* row) const {
        if (p.scale == 1) return;
        for (int64_t c = 0; c < s.D; ++c)
            for (int64_t x = 0; x < s.W; ++x) row[c * s.pitch + s.pad + x] *= float(p.scale);
    }

    // A pool's gradient is divided among its positions, of which there are fewer at the end of an odd dimension.
    template <typename E>
    void load_grad_output(int64_t i) {
        copy<false, E>(p.stride == 1 ? grad_output_row : pooled_row, p.grad_output, i / p.stride, s.out_width, s.DV);
        if (p.stride == 1) return;
        for (int64_t c = 0; c < s.DV; ++c)
            for (int64_t x = 0; x < s.W; ++x)
                grad_output_row[c * s.pitch + s.pad + x] = pooled_row[c * s.pitch + s.pad + x / 2] * share(i, x);
    }
    float share(int64_t i, int64_t x) const {
        return 1.0f / ((i / 2 * 2 + 1 < s.H ? 2 : 1) * (x / 2 * 2 + 1 < s.W ? 2 : 1));
    }

    // Adds query row i to the pooled row; returns whether this is complete.
    bool pool(int64_t i) {
        for (int64_t c = 0; c < s.DV; ++c)
            for (int64_t x = 0; x < s.W; ++x) {
                Vec& to = pooled_row[c * s.pitch + s.pad + x / 2];
                Vec part = output_row[c * s.pitch + s.pad + x] * share(i, x);
                to = i % 2 == 0 && x % 2 == 0 ? part : to + part;
            }
        return i % 2 == 1 || i + 1 == s.H;
    }

    void clear_pads(Vec* rows, int64_t num_rows) const {
        for (int64_t r = 0; r < num_rows; ++r, rows += s.pitch) {
            memset(rows, 0, s.pad * sizeof(Vec));
            memset(rows + s.pad + s.W, 0, (s.pitch - s.pad - s.W) * sizeof(Vec));
        }
    }

    // Returns row y of the statistics, which consists of two rows of vectors.
    float* statistics(int64_t y) const { return p.statistics + (group * s.H + y) * 2 * s.W * V; }

    void load_rel(Vec* rel, const float* table, int64_t num_rows) const {
        for (int l = 0; l < V; ++l)
            for (int64_t d = 0; d < num_rows; ++d)
                for (int64_t c = 0; c < s.half; ++c) {
                    int64_t head = p.rel_per_head ? planes.head[l] : 0;
                    rel[c * num_rows + d][l] = table[(head * num_rows + d) * s.half + c];
                }
    }

    // The gradients of both tables are adjacent.
    int64_t rel_size() const { return s.half * (p.rel_height_rows + p.rel_width_rows); }
    void clear_grad_rel() { memset(grad_rel_height, 0, rel_size() * sizeof(Vec)); }
    void store_block(Vec* partial, int64_t block) {
        memcpy(partial + block * rel_size(), grad_rel_height, rel_size() * sizeof(Vec));
        clear_grad_rel();
    }

    // ---- scores and weights

    // Computes the tile's scores from query_row.
    void scores(int64_t i, int64_t x0, int64_t width) {
        Span reach = row_span(i);
        memset(bias_height, 0, width * s.rows * sizeof(Vec));
        memset(bias_width, 0, width * s.columns * sizeof(Vec));
        for (int64_t x = 0; x < width && s.half; ++x) {
            const Vec* q = query_row + s.pad + x0 + x;
            Span span = column_span(x0 + x);
            add_products(bias_height + x * s.rows, q, s.pitch, rel_height + reach.table, p.rel_height_rows, s.half,
                         reach.count());
            add_products(bias_width + x * s.columns, q + s.half * s.pitch, s.pitch, rel_width + span.table,
                         p.rel_width_rows, s.half, span.count());
        }
        for (int64_t y = reach.begin; y < reach.end; ++y)
            for (int64_t x = 0; x < width; ++x) {
                Span span = column_span(x0 + x);
                Vec* to = weights + x * s.window + (y - reach.begin) * span.count();
                Vec of_row = bias_height[x * s.rows + y - reach.begin];
                for (int64_t j = 0; j < span.count(); ++j) to[j] = of_row + bias_width[x * s.columns + j];
                if (p.key.data && inside(y))
                    add_products(to, query_row + s.pad + x0 + x, s.pitch,
                                 key_rows + slot(y) * s.row + s.pad + span.begin, s.pitch, s.D, span.count());
            }
    }

    // Replaces the scores of query x by exp(S - max). Four sums are used, so that an addition need not wait.
    void exponentials(int64_t i, int64_t x0, int64_t x) {
        int64_t count = row_span(i).count() * column_span(x0 + x).count();
        Vec *of_x = weights + x * s.window, largest[4], sums[4] = {};
        for (Vec& each : largest) each = least_top<V>(p);
        in_groups<4>(0, count, [&](auto N, int64_t j) {
            UNROLL
            for (int k = 0; k < N; ++k) largest[k] = larger<V>(of_x[j + k], largest[k]);
        });
        Vec all = larger<V>(larger<V>(largest[0], largest[1]), larger<V>(largest[2], largest[3]));
        Vec shift = all * LOG2_E;
        in_groups<4>(0, count, [&](auto N, int64_t j) {
            UNROLL
            for (int k = 0; k < N; ++k) sums[k] += of_x[j + k] = fast_exp2<V>(of_x[j + k] * LOG2_E - shift);
        });
        if (p.null_key) sums[0] += fast_exp2<V>(Vec{} - shift);
        top[x0 + x] = all;
        inverse_sum[x0 + x] = 1.0f / ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }

    // Computes to[c][x] = sum over the window of tile[x] * rows[c].
    void apply(Vec* to, int64_t channels, const Vec* rows, int64_t row_size, const Vec* tile, int64_t i, int64_t x0,
               int64_t width) {
        Span reach = row_span(i);
        in_groups<CHANNELS_AT_ONCE>(0, channels, [&](auto C, int64_t c) {
            for (int64_t x = 0; x < width; ++x) {
                Span span = column_span(x0 + x);
                Vec acc[C] = {};
                for (int64_t y = most(0, reach.begin); y < least(s.H, reach.end); ++y)
                    add_weighted<C>(acc, tile + x * s.window + (y - reach.begin) * span.count(),
                                    rows + slot(y) * row_size + c * s.pitch + s.pad + span.begin, s.pitch,
                                    span.count());
                UNROLL
                for (int k = 0; k < C; ++k) to[(c + k) * s.pitch + s.pad + x0 + x] = acc[k];
            }
        });
    }

    // ---- backward

    // Computes the gradients of query row i if `own` is true, and adds to those of key rows key_first .. key_end - 1.
    void backward_tile(int64_t i, int64_t x0, int64_t width, bool own, int64_t key_first, int64_t key_end) {
        scores(i, x0, width);
        grad_weights(i, x0, width);
        for (int64_t x = 0; x < width; ++x) softmax_backward(i, x0, x);
        if (own) {
            if (p.key.data) apply(grad_query_row, s.D, key_rows, s.row, grad_scores, i, x0, width);
            else clear(grad_query_row, x0, width);
            for (int64_t x = 0; x < width && s.half; ++x) {
                Span reach = row_span(i), span = column_span(x0 + x);
                rel_backward(x0 + x, bias_height + x * s.rows, reach, rel_height, grad_rel_height, p.rel_height_rows);
                rel_backward(s.half * s.pitch + x0 + x, bias_width + x * s.columns, span, rel_width, grad_rel_width,
                             p.rel_width_rows);
            }
        }
        for (int64_t y = most(0, key_first); y < least(s.H, key_end); ++y) {
            if (p.key.data) gather(grad_key_rows + slot(y) * s.row, s.D, query_row, grad_scores, i, y, x0, width);
            gather(grad_value_rows + slot(y) * s.value_row, s.DV, grad_output_row, weights, i, y, x0, width);
        }
    }

    // Computes T = g.v, which is 0 for positions outside the image.
    void grad_weights(int64_t i, int64_t x0, int64_t width) {
        Span reach = row_span(i);
        memset(grad_scores, 0, width * s.window * sizeof(Vec));
        for (int64_t y = most(0, reach.begin); y < least(s.H, reach.end); ++y)
            for (int64_t x = 0; x < width; ++x) {
                Span span = column_span(x0 + x);
                add_products(grad_scores + x * s.window + (y - reach.begin) * span.count(),
                             grad_output_row + s.pad + x0 + x, s.pitch,
                             value_rows + slot(y) * s.value_row + s.pad + span.begin, s.pitch, s.DV, span.count());
            }
    }

    // Overwrites S with P, T with dS = P (T - sum P T), and the bias terms of the scores with the sums of dS over the
    // window's rows and columns.
    void softmax_backward(int64_t i, int64_t x0, int64_t x) {
        int64_t num_rows = row_span(i).count(), num_columns = column_span(x0 + x).count();
        Vec *weight = weights + x * s.window, *grad = grad_scores + x * s.window, sums[4] = {};
        Vec shift = top[x0 + x] * LOG2_E, inverse = inverse_sum[x0 + x];
        in_groups<4>(0, num_rows * num_columns, [&](auto N, int64_t j) {
            UNROLL
            for (int k = 0; k < N; ++k) {
                weight[j + k] = fast_exp2<V>(weight[j + k] * LOG2_E - shift) * inverse;
                sums[k] += weight[j + k] * grad[j + k];
            }
        });
        Vec mean = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        Vec *by_row = bias_height + x * s.rows, *by_column = bias_width + x * s.columns;
        memset(by_column, 0, num_columns * sizeof(Vec));
        for (int64_t r = 0; r < num_rows; ++r, weight += num_columns, grad += num_columns) {
            Vec of_row = {};
            for (int64_t j = 0; j < num_columns; ++j) {
                grad[j] = weight[j] * (grad[j] - mean);
                of_row += grad[j];
                by_column[j] += grad[j];
            }
            by_row[r] = of_row;
        }
    }

    void clear(Vec* row, int64_t x0, int64_t width) const {
        for (int64_t c = 0; c < s.D; ++c) memset(row + c * s.pitch + s.pad + x0, 0, width * sizeof(Vec));
    }

    // For half of the channels of a query, computes dq += sum_d grad_bias[d] rel[d] and grad_rel[d] += grad_bias[d] q.
    void rel_backward(int64_t place, const Vec* grad_bias, const Span& span, const Vec* rel, Vec* grad_rel,
                      int64_t num_rows) {
        rel += span.table, grad_rel += span.table, place += s.pad;
        for (int64_t c = 0; c < s.half; ++c, rel += num_rows, grad_rel += num_rows, place += s.pitch) {
            Vec q = query_row[place], sum = {};
            for (int64_t d = 0; d < span.count(); ++d) {
                sum += grad_bias[d] * rel[d];
                grad_rel[d] += grad_bias[d] * q;
            }
            grad_query_row[place] += sum;
        }
    }

    // Computes to[c][x'] += sum over the tile's queries x that see key (y, x') of tile[x] * source[c][x].
    void gather(Vec* to, int64_t channels, const Vec* source, const Vec* tile, int64_t i, int64_t y, int64_t x0,
                int64_t width) {
        int64_t begin = most(0, column_span(x0).begin), end = least(s.W, column_span(x0 + width - 1).end);
        in_groups<CHANNELS_AT_ONCE>(0, channels, [&](auto C, int64_t c) {
            for (int64_t key = begin; key < end; ++key) {
                Seers seers = seers_of_column(key);
                int64_t from = most(x0, seers.begin), until = least(x0 + width, seers.end);
                Vec acc[C], *place = to + c * s.pitch + s.pad + key;
                UNROLL
                for (int k = 0; k < C; ++k) acc[k] = place[k * s.pitch];
                for (int64_t x = from; x < until; ++x) {
                    Span span = column_span(x);
                    int64_t place_in_window = (y - row_span(i).begin) * span.count() + key - span.begin;
                    add_weighted<C>(acc, tile + (x - x0) * s.window + place_in_window,
                                    source + c * s.pitch + s.pad + x, s.pitch, 1);
                }
                UNROLL
                for (int k = 0; k < C; ++k) place[k * s.pitch] = acc[k];
            }
        });
    }
};

// With few planes (e.g. a single image), most lanes of a wide vector would be idle, so narrower vectors are used.
int64_t dispatch(const Problem& p, Job job) {
#if MAX_LANES == 16
    if (p.batch * p.num_heads <= 8) return do_job<Worker<8>>(p, job);
#endif
    return do_job<Worker<MAX_LANES>>(p, job);
}

}  // namespace
