// Forward and backward pass of the attention stem on the CPU: attention inside aligned 4x4 blocks of the image, and its
// 4x4 max pool. The definition is AttentionStem in ../../models/layers.py; ../stem.py calls this code.
//
// Method: each vector lane holds one block. V blocks ("a group") are processed in lockstep, head by head, and all
// intermediate values stay in the L1 cache. The scores can be computed without queries and keys: with q_i = W_Q x_i and
// k_j = W_K x_j,
//
//   q_i . (k_j + r_ij) = x_i . (M x_j + row[a' - a] + col[b' - b]),   M = W_Q^T W_K,  row = rel_height W_Q, col alike,
//
// where i is position (a, b), j is (a', b') and x has 3 values instead of a head's 16. stem.py computes M, row and col
// from the weights, and W_V of each position from the mixture. All other steps are products of small matrices of
// vectors:
//
//   forward    U = x M^T,  S = x U^T + row + col,  P = softmax(S),  V_j = W_V(j) x_j,  Y = P V
//   backward   forward again;   T = dY V^T,  dS = P (T - sum P T),  dV = P^T dY,  dU = dS^T x,
//              dM = dU^T x,  drow, dcol = sums of dS times x,  dW_V(j) = dV_j x_j^T;  dx if requested.
//
// There are two kinds of output. The map contains all positions, [B, H, W, C], and is streamed to memory. The pooled
// output relies on batch norm being an affine map of each channel and on the pool's windows being the blocks. It needs
// only the maximum of each block (the minimum if the channel's weight is negative) with its position, and the mean and
// variance of each channel, so the full map, 100 MB for a batch of 8 at 224 pixels, is never written. In the backward
// pass, dL/dy = (g at picked positions) + dmean / n + dvar 2 (y - mean) / n.
//
// Sums over positions: the variance is computed relative to the lane's first value, summed in float32 over a run of
// groups, then over lanes and runs in float64 (Chan's formula). Weight gradients are summed in float32 per lane over a
// run, then over lanes and runs in float64. All runs have the same length and are added in order for any number of
// threads, so the results do not depend on the number of threads.
//
// Cost: each position and head needs 2 (backward: 4 more) products of 16 D multiply-adds, and one exponential for each
// of its 16 scores. At D = 16, these are about 750 vector instructions forward and 1,400 backward. For B = 8, 224
// pixels and 4 heads on 16 lanes, the total is 216 million, at most two per cycle. Two cores took 12 + 28 ms, which is
// about half of that speed. dW_V has 16 C C_in values per lane (200 KB), so dV of GROUPS groups is kept, and dW_V is
// read and written once for all of them.

#include "vectors.h"

#ifndef IN_CHANNELS
#define IN_CHANNELS 3  // cpu.py builds one library for each
#endif

constexpr int CI = IN_CHANNELS;
constexpr int SIDE = 4, PLACES = SIDE * SIDE, OFFSETS = 2 * SIDE - 1;
constexpr int GROUPS = 8;
// There are about RUNS runs, each of one to MAX_RUN times GROUPS groups. Changing these values affects only rounding.
constexpr int RUNS = 96;
constexpr int MAX_RUN = 4;
constexpr float LN_2 = 0.6931471805599453f;

extern "C" {

// A [B, C, H, W] tensor with strides in elements.
struct Image {
    float* data;
    int64_t b, c, h, w;
};

// stem.py mirrors this struct field by field.
struct Problem {
    int64_t batch, height, width, num_heads, head_dim, num_threads;
    Image x, grad_x;              // grad_x.data is null if it is not requested
    const float* tables;          // M [N, CI, CI], row [N, 7, CI], col [N, 7, CI], all times log2(e); W_V [N, 16, D, CI]
    float* grad_tables;           // gradients of M, row, col (without the factor) and W_V
    float* map;                   // [B, H, W, C], or null; backward: its gradient
    float* pooled;                // [B, C, H/4, W/4] with the strides below (p: along H/4 * W/4); backward: its gradient
    int64_t pooled_b, pooled_c, pooled_p;
    uint8_t* places;              // [C, B * H/4 * W/4]: index of the picked position, 0 to 15
    const float* sign;            // [C]: sign of batch norm's weight; for 0 all positions are equal and the first is picked
    float *mean, *variance;       // [C], biased; backward reads the mean
    const float *grad_mean, *grad_variance;
    void* workspace;              // sasa_forward_bytes() or sasa_backward_bytes(), any alignment
};
}

namespace {

// ---- products of matrices of vectors ----------------------------------------------------------------------------

template <int V>
struct View {
    F<V>* data;
    int64_t row, col;
    INLINE F<V>& at(int64_t r, int64_t c) const { return data[r * row + c * col]; }
    INLINE View from(int64_t r, int64_t c) const { return {data + r * row + c * col, row, col}; }
};

template <int V, bool ADD, int R, int S>
INLINE void multiply_block(View<V> c, View<V> a, View<V> b, int64_t steps) {
    F<V> acc[R][S];
    UNROLL
    for (int r = 0; r < R; ++r) {
        UNROLL
        for (int s = 0; s < S; ++s) acc[r][s] = ADD ? c.at(r, s) : F<V>{};
    }
    for (int64_t l = 0; l < steps; ++l) {
        F<V> b_here[S];
        UNROLL
        for (int s = 0; s < S; ++s) b_here[s] = loaded(b.at(l, s));
        UNROLL
        for (int r = 0; r < R; ++r) {
            F<V> a_here = loaded(a.at(r, l));
            UNROLL
            for (int s = 0; s < S; ++s) acc[r][s] += a_here * b_here[s];
        }
    }
    UNROLL
    for (int r = 0; r < R; ++r) {
        UNROLL
        for (int s = 0; s < S; ++s) c.at(r, s) = acc[r][s];
    }
}

constexpr int ROWS_AT_ONCE = NUM_REGISTERS == 32 ? 4 : 2;

// c = a b, or c += a b; a is [rows, steps], b is [steps, cols].
template <int V, bool ADD>
INLINE void multiply(View<V> c, View<V> a, View<V> b, int64_t rows, int64_t cols, int64_t steps) {
    in_groups<ROWS_AT_ONCE>(0, rows, [&](auto R, int64_t r) {
        in_groups<4>(0, cols, [&](auto S, int64_t s) {
            multiply_block<V, ADD, R, S>(c.from(r, s), a.from(r, 0), b.from(0, s), steps);
        });
    });
}

// ---- the blocks of a group ----------------------------------------------------------------------------------------

struct Sizes {
    int64_t N, D, C, rows, cols, num_blocks, num_groups, run, num_runs, num_tables;
    bool stream;
    template <int V>
    static Sizes of(const Problem& p) {
        Sizes s;
        s.N = p.num_heads, s.D = p.head_dim, s.C = s.N * s.D;
        s.rows = p.height / SIDE, s.cols = p.width / SIDE, s.num_blocks = p.batch * s.rows * s.cols;
        s.num_groups = ceil_div(s.num_blocks, V);
        s.run = GROUPS * most(1, least(MAX_RUN, s.num_groups / (GROUPS * RUNS)));
        s.num_runs = ceil_div(s.num_groups, s.run);
        s.num_tables = s.N * (CI * CI + 2 * OFFSETS * CI) + PLACES * s.C * CI;
        s.stream = s.num_blocks * PLACES * s.C > STREAM_NUMBERS;
        return s;
    }
};

// Positions in the batch of the V blocks of a group. Lanes beyond the last block repeat it and are ignored.
template <int V>
struct Blocks {
    int64_t first, batch[V], y[V], x[V];
    int count;
    bool one_image;  // all V blocks exist and are in one image, so they are contiguous
    Blocks() = default;
    Blocks(const Sizes& s, int64_t group) : first(group * V), count(int(least(V, s.num_blocks - group * V))) {
        for (int l = 0; l < V; ++l) {
            int64_t block = first + least(l, count - 1);
            batch[l] = block / (s.rows * s.cols), y[l] = block / s.cols % s.rows, x[l] = block % s.cols;
        }
        one_image = count == V && batch[0] == batch[V - 1];
    }
    float* in_image(const Image& t, int l) const { return t.data + batch[l] * t.b + y[l] * SIDE * t.h + x[l] * SIDE * t.w; }
};

// ---- one thread's work ----------------------------------------------------------------------------------------------

template <int V>
class Worker {
    typedef F<V> Vec;
    typedef typename Lanes<V>::i Ints;
    typedef uint8_t Bytes __attribute__((vector_size(V)));
    const Problem& p;
    const Sizes s;
    Vec *x;                          // [16][CI]; in the backward pass for GROUPS groups
    Vec *form, *row, *col;           // M [CI][CI], row and col [7][CI]
    Vec *keys, *value;               // U [16][CI], V [16][D]
    Vec *bias_height, *bias_width;   // for 4 queries: x_i . row [4][4] and x_i . col [4][4]; backward: then their gradients
    Vec *weights;                    // for 4 queries: S, then P [4][16]
    Vec *output;                     // Y [16][D]
    Vec *shift, *sum, *square;       // [C]: sums of y - shift and of its square
    Vec *grad_output, *grad_scores;  // dY [16][D]; for 4 queries dS [4][16]
    Vec *grad_keys, *grad_values;    // dU [16][CI]; dV [GROUPS][16][D]
    Vec *grad_x, *grad_x_scores;     // [GROUPS][16][CI]; its part from the scores [16][CI]
    Vec *picked;                     // gradients of the pooled values [D]
    Vec *grads;                      // gradients of the tables

   public:
    static int64_t num_vectors(const Problem& p, bool backward) {
        Sizes s = Sizes::of<V>(p);
        int64_t forward = 2 * PLACES * CI + CI * CI + 2 * OFFSETS * CI + 2 * PLACES + SIDE * PLACES + 2 * PLACES * s.D + 3 * s.C;
        int64_t more = PLACES * s.D + SIDE * PLACES + 2 * PLACES * CI + GROUPS * PLACES * (s.D + 2 * CI) + s.D + s.num_tables;
        return forward + backward * more;
    }

    Worker(const Problem& problem, Vec* memory, bool backward) : p(problem), s(Sizes::of<V>(problem)) {
        auto take = [&](int64_t n) { return (memory += n) - n; };
        form = take(CI * CI), row = take(OFFSETS * CI), col = take(OFFSETS * CI);
        keys = take(PLACES * CI), value = take(PLACES * s.D);
        bias_height = take(PLACES), bias_width = take(PLACES), weights = take(SIDE * PLACES);
        output = take(PLACES * s.D);
        shift = take(s.C), sum = take(s.C), square = take(s.C);
        x = take((backward ? GROUPS : 1) * PLACES * CI);
        if (!backward) return;
        grad_output = take(PLACES * s.D), grad_scores = take(SIDE * PLACES), grad_keys = take(PLACES * CI);
        grad_values = take(GROUPS * PLACES * s.D);
        grad_x = take(GROUPS * PLACES * CI), grad_x_scores = take(PLACES * CI);
        picked = take(s.D), grads = take(s.num_tables);
    }

    // `statistics` is [C][2]: for each channel, the mean over this run and the sum of squared deviations from it.
    void forward(int64_t first, int64_t end, double* statistics) {
        Blocks<V> blocks;
        for (int64_t group = first; group < end; ++group) {
            blocks = Blocks<V>(s, group);
            load_image(x, blocks);
            for (int64_t n = 0; n < s.N; ++n) {
                load_tables(n);
                prepare(x, n);
                for (int a = 0; a < SIDE; ++a) attend(x, a);
                if (p.places) pool(blocks, n, group == first);
                else copy_map<true>(output, blocks, n);
            }
        }
        if (p.places) finish_statistics(end - first, blocks.count, statistics);
    }

    // `partial` receives the tables' gradients over this run. GROUPS groups are processed at a time, head by head, so
    // that the gradients of a head's W_V, which exceed the L1 cache, are accessed once for all these groups.
    void backward(int64_t first, int64_t end, double* partial) {
        memset(grads, 0, s.num_tables * sizeof(Vec));
        Blocks<V> blocks[GROUPS];
        for (; first < end; first += GROUPS) {
            int64_t num_groups = least(GROUPS, end - first);
            for (int64_t g = 0; g < num_groups; ++g) {
                blocks[g] = Blocks<V>(s, first + g);
                load_image(x + g * PLACES * CI, blocks[g]);
            }
            if (p.grad_x.data) memset(grad_x, 0, num_groups * PLACES * CI * sizeof(Vec));
            for (int64_t n = 0; n < s.N; ++n) {
                load_tables(n);
                for (int64_t g = 0; g < num_groups; ++g)
                    head_backward(blocks[g], x + g * PLACES * CI, grad_values + g * PLACES * s.D, grad_x + g * PLACES * CI, n);
                for (int j = 0; j < PLACES; ++j)
                    multiply<V, true>({grad_table(3, n) + j * s.D * CI, CI, 1}, {grad_values + j * s.D, 1, PLACES * s.D},
                                      {x + j * CI, PLACES * CI, 1}, s.D, CI, num_groups);
            }
            for (int64_t g = 0; g < num_groups; ++g)
                if (p.grad_x.data) store_grad_image(grad_x + g * PLACES * CI, blocks[g]);
        }
        for (int64_t e = 0; e < s.num_tables; ++e) {
            double total = 0;
            for (int l = 0; l < V; ++l) total += grads[e][l];
            partial[e] = total;
        }
    }

   private:
    // ---- tables and images

    // Returns the start index of table `which` (M, row, col, W_V) of head n.
    int64_t table_begin(int which, int64_t n) const {
        const int64_t size[4] = {CI * CI, OFFSETS * CI, OFFSETS * CI, PLACES * s.D * CI};
        int64_t begin = n * size[which];
        for (int t = 0; t < which; ++t) begin += s.N * size[t];
        return begin;
    }
    const float* table(int which, int64_t n) const { return p.tables + table_begin(which, n); }
    Vec* grad_table(int which, int64_t n) const { return grads + table_begin(which, n); }

    void load_tables(int64_t n) {
        for (int e = 0; e < CI * CI; ++e) form[e] = Vec{} + table(0, n)[e];
        for (int e = 0; e < OFFSETS * CI; ++e) row[e] = Vec{} + table(1, n)[e], col[e] = Vec{} + table(2, n)[e];
    }

    void load_image(Vec* to, const Blocks<V>& blocks) const {
        for (int l = 0; l < V; ++l) {
            const float* from = blocks.in_image(p.x, l);
            for (int i = 0; i < PLACES; ++i)
                for (int c = 0; c < CI; ++c) to[i * CI + c][l] = from[i / SIDE * p.x.h + i % SIDE * p.x.w + c * p.x.c];
        }
    }
    void store_grad_image(const Vec* from, const Blocks<V>& blocks) const {
        const Image& t = p.grad_x;
        for (int l = 0; l < blocks.count; ++l) {
            float* to = blocks.in_image(t, l);
            for (int i = 0; i < PLACES; ++i)
                for (int c = 0; c < CI; ++c) to[i / SIDE * t.h + i % SIDE * t.w + c * t.c] = from[i * CI + c][l];
        }
    }

    // Copies [16][D] of head n to the map or from its gradient, P channels and therefore V / P neighbours at a time.
    template <bool OUT>
    void copy_map(Vec* rows, const Blocks<V>& blocks, int64_t n) const {
        if (s.D % V == 0) return copy_runs<V, OUT>(rows, blocks, n);
        if constexpr (V > 4)
            if (s.D % (V / 2) == 0) return copy_runs<V / 2, OUT>(rows, blocks, n);
        if constexpr (V > 8)
            if (s.D % (V / 4) == 0) return copy_runs<V / 4, OUT>(rows, blocks, n);
        for (int l = 0; l < blocks.count; ++l)
            for (int i = 0; i < PLACES; ++i)
                for (int64_t c = 0; c < s.D; ++c) {
                    float& number = in_map(blocks, l, i, n)[c];
                    if constexpr (OUT) number = rows[i * s.D + c][l];
                    else rows[i * s.D + c][l] = number;
                }
    }
    template <int P, bool OUT>
    __attribute__((noinline)) void copy_runs(Vec* rows, const Blocks<V>& blocks, int64_t n) const {
        for (int i = 0; i < PLACES; i += V / P)
            for (int64_t c = 0; c < s.D; c += P) {
                Vec t[V], *place = rows + i * s.D + c;
                UNROLL
                for (int k = 0; k < V; ++k)
                    if constexpr (OUT) t[k] = place[k / P * s.D + k % P];
                    else t[k] = load_runs<V, P>(in_map(blocks, k, i, n) + c, s.C);
                transpose<V>(t);
                UNROLL
                for (int k = 0; k < V; ++k)
                    if constexpr (!OUT) place[k / P * s.D + k % P] = t[k];
                    else if (k < blocks.count) store_runs<V, P>(in_map(blocks, k, i, n) + c, s.C, t[k], s.stream);
            }
    }
    INLINE float* in_map(const Blocks<V>& b, int l, int i, int64_t n) const {
        int64_t pixel = (b.batch[l] * p.height + b.y[l] * SIDE + i / SIDE) * p.width + b.x[l] * SIDE + i % SIDE;
        return p.map + pixel * s.C + n * s.D;
    }

    // ---- forward

    // Computes U and V of a head.
    void prepare(const Vec* x, int64_t n) {
        multiply<V, false>({keys, CI, 1}, {const_cast<Vec*>(x), CI, 1}, {form, 1, CI}, PLACES, CI, CI);
        const float* weight = table(3, n);
        for (int j = 0; j < PLACES; ++j) {
            Vec here[CI];
            UNROLL
            for (int ci = 0; ci < CI; ++ci) here[ci] = x[j * CI + ci];
            for (int64_t c = 0; c < s.D; ++c, weight += CI) {
                Vec v = here[0] * weight[0];
                UNROLL
                for (int ci = 1; ci < CI; ++ci) v += here[ci] * weight[ci];
                value[j * s.D + c] = v;
            }
        }
    }

    // Computes P and Y of the 4 queries in row a of their block.
    INLINE void attend(Vec* x, int a) {
        View<V> queries = {x + a * SIDE * CI, CI, 1};
        multiply<V, false>({bias_height, SIDE, 1}, queries, {row + (SIDE - 1 - a) * CI, 1, CI}, SIDE, SIDE, CI);
        for (int b = 0; b < SIDE; ++b)
            multiply<V, false>({bias_width + b * SIDE, SIDE, 1}, queries.from(b, 0), {col + (SIDE - 1 - b) * CI, 1, CI}, 1, SIDE, CI);
        for (int q = 0; q < SIDE; ++q) {
            UNROLL
            for (int j = 0; j < PLACES; ++j)
                weights[q * PLACES + j] = bias_height[q * SIDE + j / SIDE] + bias_width[q * SIDE + j % SIDE];
        }
        multiply<V, true>({weights, PLACES, 1}, queries, {keys, 1, CI}, SIDE, PLACES, CI);
        for (int q = 0; q < SIDE; ++q) softmax(weights + q * PLACES);
        multiply<V, false>({output + a * SIDE * s.D, s.D, 1}, {weights, PLACES, 1}, {value, s.D, 1}, SIDE, s.D, PLACES);
    }

    // Computes the base-2 softmax of 16 scores. The maximum is subtracted first, so that no exponential overflows. Four
    // sums are used, so that an addition need not wait for the previous one.
    static INLINE void softmax(Vec* scores) {
        Vec top = scores[0], sums[4] = {};
        UNROLL
        for (int j = 1; j < PLACES; ++j) top = larger<V>(scores[j], top);
        UNROLL
        for (int j = 0; j < PLACES; ++j) {
            scores[j] = fast_exp2<V>(scores[j] - top);
            sums[j % 4] += scores[j];
        }
        Vec inverse = 1.0f / (sums[0] + sums[1] + (sums[2] + sums[3]));
        UNROLL
        for (int j = 0; j < PLACES; ++j) scores[j] *= inverse;
    }

    // Stores the picked values and their positions for the channels of head n, and updates the sums for mean and
    // variance.
    void pool(const Blocks<V>& blocks, int64_t n, bool first) {
        Vec valid;  // 0 in lanes beyond the last block
        for (int l = 0; l < V; ++l) valid[l] = l < blocks.count;
        for (int64_t d = 0; d < s.D; ++d) {
            int64_t c = n * s.D + d;
            const Vec* y = output + d;
            // Squares are relative to the lane's first value; relative to 0, a large mean would swamp the variance.
            if (first) shift[c] = y[0], sum[c] = square[c] = Vec{};
            Vec of_y = {}, of_square = {}, origin = shift[c];
            UNROLL
            for (int i = 0; i < PLACES; ++i) {
                Vec difference = y[i * s.D] - origin;
                of_y += difference;
                of_square += difference * difference;
            }
            sum[c] += of_y * valid;
            square[c] += of_square * valid;
            Vec best = y[0];
            Ints place = {};
            if (p.sign[c] > 0) pick(y, best, place, [](Vec a, Vec b) { return a <= b; });
            if (p.sign[c] < 0) pick(y, best, place, [](Vec a, Vec b) { return a >= b; });
            store_pooled(blocks, c, best, place);
        }
    }

    // Keeps the first of several equal values, as torch's max pool does, but always selects a NaN.
    template <typename Keep>
    INLINE void pick(const Vec* y, Vec& best, Ints& place, Keep keep) const {
        UNROLL
        for (int i = 1; i < PLACES; ++i) {
            Vec here = y[i * s.D];
            auto stay = keep(here, best);
            best = stay ? best : here;
            place = stay ? place : Ints{} + i;
        }
    }

    INLINE float* in_pooled(const Blocks<V>& b, int l, int64_t c) const {
        return p.pooled + b.batch[l] * p.pooled_b + c * p.pooled_c + (b.y[l] * s.cols + b.x[l]) * p.pooled_p;
    }
    INLINE void store_pooled(const Blocks<V>& blocks, int64_t c, Vec best, Ints place) const {
        uint8_t* places = p.places + c * s.num_blocks + blocks.first;
        if (blocks.one_image && p.pooled_p == 1) store<V>(in_pooled(blocks, 0, c), best);
        else
            for (int l = 0; l < blocks.count; ++l) *in_pooled(blocks, l, c) = best[l];
        Bytes bytes = __builtin_convertvector(place, Bytes);
        memcpy(places, &bytes, blocks.count);
    }

    void finish_statistics(int64_t num_groups, int last_count, double* statistics) const {
        for (int64_t c = 0; c < s.C; ++c) {
            double count = 0, mean = 0, squares = 0;
            for (int l = 0; l < V; ++l) {
                double n = PLACES * double(num_groups - (l >= last_count));
                if (n == 0) continue;
                double offset = double(sum[c][l]) / n;
                combine(count, mean, squares, n, shift[c][l] + offset, square[c][l] - n * offset * offset);
            }
            statistics[2 * c] = mean, statistics[2 * c + 1] = squares;
        }
    }

   public:
    // Combines two samples, each given as count, mean and sum of squared deviations (Chan, Golub, LeVeque 1979).
    static void combine(double& count, double& mean, double& squares, double n, double of_mean, double of_squares) {
        double difference = of_mean - mean, total = count + n;
        mean += difference * n / total;
        squares += of_squares + difference * difference * count * n / total;
        count = total;
    }

   private:
    // ---- backward

    void head_backward(const Blocks<V>& blocks, Vec* x, Vec* grad_value, Vec* grad_x, int64_t n) {
        int64_t D = s.D;
        prepare(x, n);
        if (p.places) load_picked(blocks, n);
        else load_grad_map(blocks, n);
        memset(grad_value, 0, PLACES * D * sizeof(Vec));
        memset(grad_keys, 0, PLACES * CI * sizeof(Vec));
        for (int a = 0; a < SIDE; ++a) {
            View<V> queries = {x + a * SIDE * CI, CI, 1}, scores = {grad_scores, PLACES, 1};
            View<V> grad = {grad_output + a * SIDE * D, D, 1};
            attend(x, a);
            if (p.places) add_statistics(blocks, a, n);
            multiply<V, false>(scores, grad, {value, 1, D}, SIDE, PLACES, D);
            for (int q = 0; q < SIDE; ++q) softmax_backward(a, q);
            multiply<V, true>({grad_value, D, 1}, {weights, 1, PLACES}, grad, PLACES, D, SIDE);
            multiply<V, true>({grad_keys, CI, 1}, {grad_scores, 1, PLACES}, queries, PLACES, CI, SIDE);
            View<V> grad_row = {grad_table(1, n) + (SIDE - 1 - a) * CI, CI, 1};
            multiply<V, true>(grad_row, {bias_height, 1, SIDE}, queries, SIDE, CI, SIDE);
            for (int b = 0; b < SIDE; ++b) {
                View<V> grad_col = {grad_table(2, n) + (SIDE - 1 - b) * CI, CI, 1};
                multiply<V, true>(grad_col, {bias_width + b * SIDE, 1, SIDE}, queries.from(b, 0), SIDE, CI, 1);
            }
            if (p.grad_x.data) queries_backward(a);
        }
        multiply<V, true>({grad_table(0, n), CI, 1}, {grad_keys, 1, CI}, {x, CI, 1}, CI, CI, PLACES);
        if (p.grad_x.data) inputs_backward(grad_x, grad_value, n);
    }

    // Computes dY from the picked positions. The parts from mean and variance require Y, so add_statistics adds them
    // later.
    void load_picked(const Blocks<V>& blocks, int64_t n) {
        for (int64_t d = 0; d < s.D; ++d) {
            int64_t c = n * s.D + d;
            Vec g = {};
            if (blocks.one_image && p.pooled_p == 1) g = load<V>(in_pooled(blocks, 0, c));
            else
                for (int l = 0; l < blocks.count; ++l) g[l] = *in_pooled(blocks, l, c);
            Bytes bytes = {};
            memcpy(&bytes, p.places + c * s.num_blocks + blocks.first, blocks.count);
            Ints place = __builtin_convertvector(bytes, Ints);
            UNROLL
            for (int i = 0; i < PLACES; ++i) grad_output[i * s.D + d] = place == i ? g : Vec{};
        }
    }
    void add_statistics(const Blocks<V>& blocks, int a, int64_t n) {
        Vec valid;
        for (int l = 0; l < V; ++l) valid[l] = l < blocks.count;
        float inverse_count = float(1.0 / (double(s.num_blocks) * PLACES));
        for (int64_t d = 0; d < s.D; ++d) {
            int64_t c = n * s.D + d;
            Vec offset = valid * (p.grad_mean[c] * inverse_count), slope = valid * (2 * p.grad_variance[c] * inverse_count);
            Vec mean = Vec{} + p.mean[c];
            UNROLL
            for (int q = 0; q < SIDE; ++q) {
                int64_t e = (a * SIDE + q) * s.D + d;
                grad_output[e] += offset + slope * (output[e] - mean);
            }
        }
    }
    void load_grad_map(const Blocks<V>& blocks, int64_t n) {
        copy_map<false>(grad_output, blocks, n);
        if (blocks.count == V) return;
        for (int64_t e = 0; e < PLACES * s.D; ++e)
            for (int l = blocks.count; l < V; ++l) grad_output[e][l] = 0;
    }

    // Overwrites T with dS = P (T - sum P T), where sum P T = dY . Y, and computes its sums over the rows and columns
    // of the keys.
    INLINE void softmax_backward(int a, int q) {
        const Vec *weight = weights + q * PLACES, *y = output + (a * SIDE + q) * s.D, *dy = grad_output + (a * SIDE + q) * s.D;
        Vec *grad = grad_scores + q * PLACES, mean = {};
        for (int64_t d = 0; d < s.D; ++d) mean += dy[d] * y[d];
        Vec of_column[SIDE] = {};
        UNROLL
        for (int r = 0; r < SIDE; ++r) {
            Vec of_row = {};
            UNROLL
            for (int b = 0; b < SIDE; ++b) {
                int j = r * SIDE + b;
                grad[j] = weight[j] * (grad[j] - mean);
                of_row += grad[j];
                of_column[b] += grad[j];
            }
            bias_height[q * SIDE + r] = of_row;
        }
        UNROLL
        for (int b = 0; b < SIDE; ++b) bias_width[q * SIDE + b] = of_column[b];
    }

    // Computes the part of dx that comes from the scores through x as queries, times log2(e).
    void queries_backward(int a) {
        View<V> to = {grad_x_scores + a * SIDE * CI, CI, 1};
        multiply<V, false>(to, {grad_scores, PLACES, 1}, {keys, CI, 1}, SIDE, CI, PLACES);
        multiply<V, true>(to, {bias_height, SIDE, 1}, {row + (SIDE - 1 - a) * CI, CI, 1}, SIDE, CI, SIDE);
        for (int b = 0; b < SIDE; ++b)
            multiply<V, true>(to.from(b, 0), {bias_width + b * SIDE, SIDE, 1}, {col + (SIDE - 1 - b) * CI, CI, 1}, 1, CI, SIDE);
    }
    // Computes the part of dx through x as keys, and the part from the values.
    void inputs_backward(Vec* grad_x, const Vec* grad_value, int64_t n) {
        multiply<V, true>({grad_x_scores, CI, 1}, {grad_keys, CI, 1}, {form, CI, 1}, PLACES, CI, CI);
        const float* weight = table(3, n);
        for (int j = 0; j < PLACES; ++j) {
            Vec total[CI];
            for (int ci = 0; ci < CI; ++ci) total[ci] = grad_x_scores[j * CI + ci] * LN_2;
            for (int64_t c = 0; c < s.D; ++c, weight += CI)
                for (int ci = 0; ci < CI; ++ci) total[ci] += grad_value[j * s.D + c] * weight[ci];
            for (int ci = 0; ci < CI; ++ci) grad_x[j * CI + ci] += total[ci];
        }
    }
};

// ---- the threads -----------------------------------------------------------------------------------------------------

template <int V>
int64_t share(const Problem& p, bool backward) {
    return round_up(Worker<V>::num_vectors(p, backward) * sizeof(F<V>));
}

// Returns the number of doubles that a run stores: two per channel, or the tables' gradients.
template <int V>
int64_t num_partial(const Problem& p, bool backward) {
    Sizes s = Sizes::of<V>(p);
    return backward ? s.num_tables : 2 * s.C;
}

template <int V>
int64_t workspace(const Problem& p, bool backward) {
    return p.num_threads * share<V>(p, backward) + Sizes::of<V>(p).num_runs * num_partial<V>(p, backward) * 8 + 256;
}

template <int V>
void finish_forward(const Problem& p, const Sizes& s, const double* partial) {
    for (int64_t c = 0; c < s.C; ++c) {
        double count = 0, mean = 0, squares = 0;
        for (int64_t run = 0; run < s.num_runs; ++run) {
            const double* of_run = partial + (run * s.C + c) * 2;
            double n = PLACES * double(least(s.run * V, s.num_blocks - run * s.run * V));
            Worker<V>::combine(count, mean, squares, n, of_run[0], of_run[1]);
        }
        p.mean[c] = float(mean), p.variance[c] = float(squares / count);
    }
}

void finish_backward(const Problem& p, const Sizes& s, double* partial) {
    for (int64_t run = 1; run < s.num_runs; ++run)
        for (int64_t e = 0; e < s.num_tables; ++e) partial[e] += partial[run * s.num_tables + e];
    for (int64_t e = 0; e < s.num_tables; ++e) p.grad_tables[e] = float(partial[e]);
}

template <int V>
void run(const Problem& p, bool backward) {
    Sizes s = Sizes::of<V>(p);
    // Runs are assigned to threads dynamically and write to separate parts of `partial`, which are added in order
    // afterwards.
    char* memory = (char*)round_up((int64_t)p.workspace);
    double* partial = (double*)(memory + p.num_threads * share<V>(p, backward));
    int64_t size = num_partial<V>(p, backward);
#pragma omp parallel for schedule(dynamic) num_threads(int(p.num_threads))
    for (int64_t run = 0; run < s.num_runs; ++run) {
        int64_t first = run * s.run, end = least(s.num_groups, first + s.run);
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        Worker<V> worker(p, (F<V>*)(memory + thread * share<V>(p, backward)), backward);
        if (backward) worker.backward(first, end, partial + run * size);
        else worker.forward(first, end, partial + run * size);
#if defined(__x86_64__)
        _mm_sfence();  // streamed stores become visible before the run counts as done
#endif
    }
    if (backward) finish_backward(p, s, partial);
    else if (p.places) finish_forward<V>(p, s, partial);
}

}  // namespace

extern "C" {

void sasa_forward(const Problem* p) { run<MAX_LANES>(*p, false); }
void sasa_backward(const Problem* p) { run<MAX_LANES>(*p, true); }
int64_t sasa_forward_bytes(const Problem* p) { return workspace<MAX_LANES>(*p, false); }
int64_t sasa_backward_bytes(const Problem* p) { return workspace<MAX_LANES>(*p, true); }
}
