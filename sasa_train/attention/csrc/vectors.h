// Vectors of V floats, one per lane: arithmetic, exponential, transposition in registers, loads and stores.
//
// They use the vector extension of GCC and clang, so that a single source supports every instruction set. The flags are
// -O3 -fno-math-errno -ffp-contract=fast; -ffast-math would break the rounding in fast_exp2.

#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
#define MAX_LANES 16
#elif defined(__AVX2__)
#define MAX_LANES 8
#else
#define MAX_LANES 4
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
#define NUM_REGISTERS 32
#else
#define NUM_REGISTERS 16
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define HAS_SHUFFLE 1  // __builtin_shufflevector; older GCCs move single values, which is correct but slower
#else
#define HAS_SHUFFLE 0
#endif
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

constexpr int64_t STREAM_NUMBERS = 1 << 20;  // results larger than this do not stay in a core's caches
constexpr float LOG2_E = 1.4426950408889634f;

namespace {

template <int V>
struct Lanes {
    typedef float f __attribute__((vector_size(V * 4)));
    typedef int32_t i __attribute__((vector_size(V * 4)));
    typedef uint32_t u __attribute__((vector_size(V * 4)));
    typedef uint16_t half __attribute__((vector_size(V * 2)));
};
template <int V>
using F = typename Lanes<V>::f;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t bytes) { return (bytes + 127) / 128 * 128; }

// Calls body(Q, x) for x = from .. end - 1 in groups of Q: MOST as long as that many are left, then fewer.
template <int MOST, typename Body>
INLINE void in_groups(int64_t from, int64_t end, Body body) {
    for (; from + MOST <= end; from += MOST) body(std::integral_constant<int, MOST>{}, from);
    if constexpr (MOST > 1) in_groups<MOST - 1>(from, end, body);
}

// ---- arithmetic on vectors -------------------------------------------------------------------------------------

// Returns the larger of a and b, or b if either is NaN.
template <int V>
INLINE F<V> larger(F<V> a, F<V> b) {
#if defined(__AVX512F__)
    if constexpr (V == 16) return (F<V>)_mm512_max_ps((__m512)a, (__m512)b);
#endif
#if defined(__AVX2__)
    if constexpr (V == 8) return (F<V>)_mm256_max_ps((__m256)a, (__m256)b);
#endif
#if defined(__x86_64__)
    if constexpr (V == 4) return (F<V>)_mm_max_ps((__m128)a, (__m128)b);
#endif
    return a > b ? a : b;
}

// Returns 2^t for t <= 0, accurate to 2 units in the last place and exact at 0. Below t = -100 the result is 2^-100,
// because denormal numbers would slow down all subsequent operations. The polynomials have the smallest relative error
// among those of degree 5 that are 1 at 0.
template <int V>
INLINE F<V> fast_exp2(F<V> t) {
    t = larger<V>(F<V>{} - 100.0f, t);
#if defined(__AVX512DQ__)
    if constexpr (V == 16) {
        F<V> f = (F<V>)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // t - floor(t)
        F<V> p = f * 1.867130827085239e-3f + 9.017028675408394e-3f;
        p = p * f + 5.579991433027992e-2f;
        p = p * f + 2.401644497956514e-1f;
        p = p * f + 6.931513118378996e-1f;
        p = p * f + 1.0f;
        return (F<V>)_mm512_scalef_ps((__m512)p, (__m512)t);  // p * 2^floor(t)
    }
#endif
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    F<V> shifted = t + ROUND;
    F<V> f = t - (shifted - ROUND);  // in [-1/2, 1/2]
    F<V> p = f * 1.326472689178992e-3f + 9.671512910236633e-3f;
    p = p * f + 5.550733746587757e-2f;
    p = p * f + 2.402224208100560e-1f;
    p = p * f + 6.931469775957917e-1f;
    p = p * f + 1.0f;
    return (F<V>)((typename Lanes<V>::i)p + (((typename Lanes<V>::i)shifted) << 23));
}

// Keeps a value that is used several times in a register; otherwise GCC would fold the load into each use.
template <typename T>
INLINE T loaded(T x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(__x86_64__)
    asm("" : "+x"(x));
#endif
    return x;
}

// ---- rows in and out of scratch: transposition of V planes ------------------------------------------------------

// interleave alternates the values of the lower or upper halves of a and b; join concatenates a and b; half_of returns
// one half.
#if HAS_SHUFFLE
template <int V>
INLINE F<V> interleave(F<V> a, F<V> b, bool upper) {
    if constexpr (V == 16) {
        return upper ? __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
                     : __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    } else if constexpr (V == 8) {
        return upper ? __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
                     : __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    } else {
        return upper ? __builtin_shufflevector(a, b, 2, 6, 3, 7) : __builtin_shufflevector(a, b, 0, 4, 1, 5);
    }
}
INLINE F<16> join(F<8> a, F<8> b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
INLINE F<8> join(F<4> a, F<4> b) { return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7); }
INLINE F<8> half_of(F<16> x, bool upper) {
    return upper ? __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15)
                 : __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
}
INLINE F<4> half_of(F<8> x, bool upper) {
    return upper ? __builtin_shufflevector(x, x, 4, 5, 6, 7) : __builtin_shufflevector(x, x, 0, 1, 2, 3);
}
#else
template <int V>
INLINE F<V> interleave(F<V> a, F<V> b, bool upper) {
    F<V> x;
    for (int k = 0; k < V; ++k) x[k] = (k % 2 ? b : a)[k / 2 + (upper ? V / 2 : 0)];
    return x;
}
template <typename Half>
INLINE F<sizeof(Half) / 2> join(Half a, Half b) {
    F<sizeof(Half) / 2> x;
    memcpy(&x, &a, sizeof a);
    memcpy((char*)&x + sizeof a, &b, sizeof b);
    return x;
}
template <typename Whole>
INLINE F<sizeof(Whole) / 8> half_of(Whole x, bool upper) {
    F<sizeof(Whole) / 8> half;
    memcpy(&half, (const char*)&x + (upper ? sizeof half : 0), sizeof half);
    return half;
}
#endif

// Transposes V x V values with log2(V) perfect shuffles.
template <int V>
INLINE void transpose(F<V> (&rows)[V]) {
    UNROLL
    for (int stage = 1; stage < V; stage *= 2) {
        F<V> next[V];
        UNROLL
        for (int r = 0; r < V / 2; ++r) {
            next[2 * r] = interleave<V>(rows[r], rows[r + V / 2], false);
            next[2 * r + 1] = interleave<V>(rows[r], rows[r + V / 2], true);
        }
        UNROLL
        for (int r = 0; r < V; ++r) rows[r] = next[r];
    }
}

INLINE float load_one(const float* p) { return *p; }
INLINE float load_one(const uint16_t* p) {
    uint32_t bits = uint32_t(*p) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
INLINE void store_one(float* p, float x) { *p = x; }
INLINE void store_one(uint16_t* p, float x) {  // rounds to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *p = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

template <int V>
INLINE F<V> load(const float* p) {
    F<V> x;
    memcpy(&x, p, sizeof x);
    return x;
}
template <int V>
INLINE F<V> load(const uint16_t* p) {
    typename Lanes<V>::half bits;
    memcpy(&bits, p, sizeof bits);
    return (F<V>)(__builtin_convertvector(bits, typename Lanes<V>::u) << 16);
}
template <int V>
INLINE void store(float* p, F<V> x) {
    memcpy(p, &x, sizeof x);
}
template <int V>
INLINE void store(uint16_t* p, F<V> x) {
    typedef typename Lanes<V>::u U;
    U bits = (U)x;
    U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    U nan = (U)(x != x);
    typename Lanes<V>::half out = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), typename Lanes<V>::half);
    memcpy(p, &out, sizeof out);
}

// With `stream`, whole cache lines are written past the caches, because a result larger than the caches would be read
// into them only to be overwritten.
template <int V, typename E>
INLINE void store(E* p, F<V> x, bool stream) {
#if defined(__AVX512F__)
    if constexpr (V == 16 && sizeof(E) == 4)
        if (stream && (uintptr_t)p % 64 == 0) return _mm512_stream_ps(p, (__m512)x);
#endif
    store<V>(p, x);
}

// Loads or stores V values in V / P runs of P, `step` apart in memory, for several pixels of a head narrower than a
// vector.
template <int V, int P, typename E>
INLINE F<V> load_runs(const E* p, int64_t step) {
    if constexpr (P == V) {
        return load<V>(p);
    } else {
        return join(load_runs<V / 2, P>(p, step), load_runs<V / 2, P>(p + V / 2 / P * step, step));
    }
}
template <int V, int P, typename E>
INLINE void store_runs(E* p, int64_t step, F<V> x, bool stream) {
    if constexpr (P == V) {
        store<V>(p, x, stream);
    } else {
        store_runs<V / 2, P>(p, step, half_of(x, false), stream);
        store_runs<V / 2, P>(p + V / 2 / P * step, step, half_of(x, true), stream);
    }
}

}  // namespace
