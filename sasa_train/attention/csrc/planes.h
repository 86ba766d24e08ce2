// What both kernels of local attention need: the arguments, rows of V planes in and out of scratch memory, threads.
//
// Each vector lane holds one plane (one head of one image). A source includes this file and defines a class Worker,
// which computes some rows of V planes, and `dispatch`, which chooses V.

#pragma once

#include "vectors.h"

// Query rows summed in float32 for the embeddings' gradients; work is split at multiples. Changing it affects only
// rounding.
constexpr int BLOCK_ROWS = 8;
constexpr int64_t PIXELS_AHEAD = 3;  // number of pixels that are prefetched

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1 };
enum Border { MASK = 0, ZERO = 1, SHIFT = 2 };

extern "C" {

// A [B, N, H, W, D] tensor with strides in elements.
struct Strided {
    void* data;
    int64_t b, n, h, w, d;
};

// cpu.py mirrors this struct field by field.
struct Problem {
    int64_t batch, num_heads, height, width, head_dim, value_dim;
    int64_t rows, columns, border;  // of a window
    double scale;
    int64_t null_key;
    int64_t dtype, num_threads, rel_per_head, rel_height_rows, rel_width_rows, stride;
    Strided query, key, value, output;  // key.data is null without content; output and its gradient are after pooling
    Strided grad_output, grad_query, grad_key, grad_value;
    float* statistics;                          // forward to backward: [B N rounded up to 16][H][2][W], lanes innermost
    const float *rel_height, *rel_width;        // [K, D/2] or [N, K, D/2], contiguous; null without embeddings. K is
                                                // rel_height_rows or rel_width_rows
    float *grad_rel_height, *grad_rel_width;    // same shapes
    void* workspace;                            // sasa_forward_bytes() or sasa_backward_bytes(), any alignment
};
}

namespace {

// V planes of a tensor: the position of each plane, and the number of existing planes. Further lanes repeat the last
// plane and are not written.
template <int V>
struct Planes {
    int64_t batch_index[V], head[V];
    int count;
    Planes(const Problem& p, int64_t group) {
        int64_t total = p.batch * p.num_heads;
        count = int(least(V, total - group * V));
        for (int l = 0; l < V; ++l) {
            int64_t plane = group * V + least(l, count - 1);
            batch_index[l] = plane / p.num_heads;
            head[l] = plane % p.num_heads;
        }
    }
};

// Returns a maximum over no scores, or over that of the null key alone.
template <int V>
INLINE F<V> least_top(const Problem& p) {
    return F<V>{} - (p.null_key ? 0.0f : __builtin_inff());
}

// Copies one image row of V planes between a tensor and scratch memory, [D][pitch] vectors.
template <int V, typename E>
struct RowCopy {
    E* line[V];
    int64_t w, d;
    int count;
    bool stream;
    RowCopy() = default;
    RowCopy(const Planes<V>& planes, const Strided& t, int64_t y, bool stream = false)
        : w(t.w), d(t.d), count(planes.count), stream(stream) {
        for (int l = 0; l < V; ++l)
            line[l] = (E*)t.data + planes.batch_index[l] * t.b + planes.head[l] * t.n + y * t.h;
    }

    // Copies V values of each plane at (x, c) in runs of P, which are `step` apart in memory and `run_pitch` apart in
    // scratch, with a stride of `pitch` inside a run.
    template <int P, bool OUT>
    INLINE void block(F<V>* row, int64_t x, int64_t c, int64_t step, int64_t run_pitch, int64_t pitch) const {
        F<V> t[V];
        int64_t offset = x * w + c * d;
        if constexpr (!OUT) {
            UNROLL
            for (int l = 0; l < V; ++l) t[l] = load_runs<V, P>(line[l] + offset, step);
            transpose<V>(t);
        }
        UNROLL
        for (int k = 0; k < V; ++k) {
            F<V>& place = row[k / P * run_pitch + k % P * pitch];
            if constexpr (OUT)
                t[k] = place;
            else
                place = t[k];
        }
        if constexpr (OUT) {
            transpose<V>(t);
            UNROLL
            for (int l = 0; l < V; ++l) {
                if (l >= count) break;
                if constexpr (P * 2 == V) {
                    if (l + 1 < count && line[l + 1] == line[l] + P) {  // two adjacent heads form one vector
                        F<V> other = t[l + 1];
                        store<V>(line[l] + offset, join(half_of(t[l], false), half_of(other, false)), stream);
                        store<V>(line[l] + offset + step, join(half_of(t[l], true), half_of(other, true)), stream);
                        ++l;
                        continue;
                    }
                }
                store_runs<V, P>(line[l] + offset, step, t[l], stream);
            }
        }
    }

    // Prefetches pixels x .. x + num - 1 into the cache. After the end of the row comes either the next row, which is
    // needed soon, or an invalid address, whose prefetch does not fault.
    INLINE void prefetch(int64_t x, int64_t num, int64_t head_dim) const {
        if (d != 1) return;
        int64_t per_cache_line = 64 / sizeof(E), heads_step = most(1, per_cache_line / head_dim);
        for (int64_t end = x + num; x < end; ++x)
            for (int64_t l = 0; l < count; l += heads_step)
                for (int64_t c = 0; c < head_dim; c += per_cache_line) __builtin_prefetch(line[l] + x * w + c);
    }

    template <bool OUT>
    INLINE void single(F<V>* place, int64_t x, int64_t c) const {
        for (int l = 0; l < count; ++l) {
            if constexpr (OUT)
                store_one(line[l] + x * w + c * d, (*place)[l]);
            else
                (*place)[l] = load_one(line[l] + x * w + c * d);
        }
        if constexpr (!OUT)
            for (int l = count; l < V; ++l) (*place)[l] = (*place)[count - 1];
    }

    // Handles heads of P < V channels, V / P pixels at a time.
    template <int P, bool OUT>
    void narrow(F<V>* row, int64_t x, int64_t end, int64_t pitch) const {
        for (; x + V / P <= end; x += V / P) block<P, OUT>(row + x, x, 0, w, 1, pitch);
        for (; x < end; ++x)
            for (int64_t c = 0; c < P; ++c) single<OUT>(row + c * pitch + x, x, c);
    }

    // Copies columns from .. end - 1 of the row.
    template <bool OUT>
    __attribute__((noinline)) void run(F<V>* row, int64_t from, int64_t end, int64_t head_dim, int64_t pitch) const {
        if constexpr (V > 4)
            if (d == 1 && head_dim * 2 == V) return narrow<V / 2, OUT>(row, from, end, pitch);
        if constexpr (V > 8)
            if (d == 1 && head_dim * 4 == V) return narrow<V / 4, OUT>(row, from, end, pitch);
        if (w == 1) {  // planar layout: copy along the row
            for (int64_t c = 0; c < head_dim; ++c) {
                int64_t x = from;
                for (; x + V <= end; x += V) block<V, OUT>(row + c * pitch + x, x, c, 0, 0, 1);
                for (; x < end; ++x) single<OUT>(row + c * pitch + x, x, c);
            }
            return;
        }
        for (int64_t x = from; x < end; ++x) {
            int64_t c = 0;
            if (d == 1)
                for (; c + V <= head_dim; c += V) block<V, OUT>(row + c * pitch + x, x, c, 0, 0, pitch);
            for (; c < head_dim; ++c) single<OUT>(row + c * pitch + x, x, c);
        }
    }
};

// ---- the threads ----------------------------------------------------------------------------------------------------

// If there are too few groups of planes for the threads, their rows are also split, at multiples of BLOCK_ROWS. The
// result is the same.
int64_t num_chunks(int64_t num_groups, int64_t num_blocks, int64_t num_threads) {
    if (num_groups % num_threads == 0 || num_groups >= 4 * num_threads) return 1;
    return most(1, least(num_blocks, ceil_div(2 * num_threads, num_groups)));
}

// Numbers of groups of planes, of blocks of rows, and of values in the embeddings of a plane.
struct Work {
    int64_t groups, blocks, half, rel_size;
    Work(const Problem& p, int V)
        : groups(ceil_div(p.batch * p.num_heads, V)),
          blocks(ceil_div(p.height, BLOCK_ROWS)),
          half(p.head_dim / 2),
          rel_size(p.rel_height ? half * (p.rel_height_rows + p.rel_width_rows) : 0) {}
};

template <typename Worker>
int64_t workspace(const Problem& p, bool backward) {
    Work w(p, Worker::LANES);
    int64_t threads = p.num_threads * round_up(Worker::num_vectors(p, backward) * sizeof(typename Worker::Vec));
    if (!backward) return threads + 128;
    int64_t partial = w.groups * w.blocks * w.rel_size * sizeof(typename Worker::Vec);
    int64_t sums = (p.rel_per_head ? p.num_heads : 1) * w.rel_size * sizeof(double);
    return threads + round_up(partial) + round_up(sums) + 256;
}

// Transposes sums [D/2][K] into the gradient of a table, [K, D/2]; returns the end of the sums.
inline double* store_rel(float* grad, double* sums, int64_t table, int64_t num_rows, int64_t half) {
    for (int64_t c = 0; c < half; ++c)
        for (int64_t d = 0; d < num_rows; ++d) grad[(table * num_rows + d) * half + c] = float(*sums++);
    return sums;
}

// Sums the embeddings' gradients, [groups][blocks][rel_size], over blocks, planes and images, in this order and in
// float64.
template <int V>
void sum_rel(const Problem& p, const F<V>* partial, double* sums) {
    Work w(p, V);
    int64_t num_tables = p.rel_per_head ? p.num_heads : 1;
    memset(sums, 0, num_tables * w.rel_size * sizeof(double));
    for (int64_t group = 0; group < w.groups; ++group) {
        Planes<V> planes(p, group);
        for (int64_t block = 0; block < w.blocks; ++block, partial += w.rel_size)
            for (int64_t e = 0; e < w.rel_size; ++e)
                for (int l = 0; l < planes.count; ++l)
                    sums[(p.rel_per_head ? planes.head[l] : 0) * w.rel_size + e] += partial[e][l];
    }
    for (int64_t table = 0; table < num_tables; ++table) {
        sums = store_rel(p.grad_rel_height, sums, table, p.rel_height_rows, w.half);
        sums = store_rel(p.grad_rel_width, sums, table, p.rel_width_rows, w.half);
    }
}

template <typename Worker, typename E>
void compute(Worker& worker, bool backward, int64_t first, int64_t end, typename Worker::Vec* partial) {
    if (backward) worker.template backward<E>(first, end, partial);
    else worker.template forward<E>(first, end);
}

template <typename Worker>
void run(const Problem& p, bool backward) {
    typedef typename Worker::Vec Vec;
    Work w(p, Worker::LANES);
    int64_t chunks = num_chunks(w.groups, w.blocks, p.num_threads);
    char* memory = (char*)round_up((int64_t)p.workspace);
    int64_t share = round_up(Worker::num_vectors(p, backward) * sizeof(Vec));
    Vec* partials = (Vec*)(memory + p.num_threads * share);
#pragma omp parallel for schedule(dynamic) num_threads(int(p.num_threads))
    for (int64_t task = 0; task < w.groups * chunks; ++task) {
        int64_t group = task / chunks, chunk = task % chunks;
        int64_t first = least(p.height, w.blocks * chunk / chunks * BLOCK_ROWS);
        int64_t end = least(p.height, w.blocks * (chunk + 1) / chunks * BLOCK_ROWS);
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        Worker worker(p, group, (Vec*)(memory + thread * share), backward);
        Vec* partial = partials + group * w.blocks * w.rel_size;
        if (p.dtype == FLOAT32) compute<Worker, float>(worker, backward, first, end, partial);
        else compute<Worker, uint16_t>(worker, backward, first, end, partial);
#if defined(__x86_64__)
        _mm_sfence();  // streamed stores become visible before the task counts as done
#endif
    }
    if (!backward || !p.rel_height) return;
    int64_t size = w.groups * w.blocks * w.rel_size * sizeof(Vec);
    sum_rel<Worker::LANES>(p, partials, (double*)((char*)partials + round_up(size)));
}

enum Job { FORWARD, BACKWARD, FORWARD_BYTES, BACKWARD_BYTES };  // the last two: size of the workspace

template <typename Worker>
int64_t do_job(const Problem& p, Job job) {
    if (job == FORWARD_BYTES || job == BACKWARD_BYTES) return workspace<Worker>(p, job == BACKWARD_BYTES);
    run<Worker>(p, job == BACKWARD);
    return 0;
}

int64_t dispatch(const Problem& p, Job job);

}  // namespace

extern "C" {

void sasa_forward(const Problem* p) { dispatch(*p, FORWARD); }
void sasa_backward(const Problem* p) { dispatch(*p, BACKWARD); }
int64_t sasa_forward_bytes(const Problem* p) { return dispatch(*p, FORWARD_BYTES); }
int64_t sasa_backward_bytes(const Problem* p) { return dispatch(*p, BACKWARD_BYTES); }
}
