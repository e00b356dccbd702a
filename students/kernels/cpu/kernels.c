// Matrix-vector products of decoding that read only selected rows of a weight, without copying them.
//
// Compiled once for this machine by toolchain.py, for float32 and bfloat16 (see numbers.h). Accumulation is in float32.
// Every thread processes a contiguous part of the selected rows.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#define omp_get_num_threads() 1
#endif

#include "numbers.h"

// Returns memory of the calling thread, 64-byte aligned, valid until the thread's next call of this function. It is
// kept because fresh memory would have to be mapped every time.
static void *scratch(size_t size) {
    static _Thread_local void *kept;
    static _Thread_local size_t held;
    if (size > held) free(kept), held = (size + 63) / 64 * 64, kept = aligned_alloc(64, held);
    return kept;
}

// How many bytes of each of several rows are prefetched while the bytes before are multiplied: 8 KiB in all, which is
// what one core can have in flight. Of shorter rows, the whole next row is prefetched.
#define AHEAD(rows) (8192 / (rows) / 64 * 64)

// Rows that are multiplied together are adjacent ones of the selection, or one of each of so many equal parts. The latter
// on CPUs with AMX: the prefetcher of Intel's cores follows several rising streams of reads, of which adjacent short rows
// are but one.
#ifdef __AMX_TILE__
enum { DISTANT = 1 };
#else
enum { DISTANT = 0 };
#endif

// Returns where in a selection the i-th row of a group of `each` is.
static inline int64_t place_of(int64_t group, int64_t i, int64_t groups, int64_t each) {
    return DISTANT ? i * groups + group : group * each + i;
}

#define OF_SIX(S) (v[0] * up_##S(r[0][j]) + v[1] * up_##S(r[1][j]) + v[2] * up_##S(r[2][j])  \
                 + v[3] * up_##S(r[3][j]) + v[4] * up_##S(r[4][j]) + v[5] * up_##S(r[5][j]))

// acc[width] += sum of value[k] * w[row[k], :] over n rows of w, which are `stride` apart; six rows at a time, and of
// each a cache line
#define ADD_ROWS(S, T)                                                                                           \
    static void add_rows_##S(const T *w, int64_t stride, int64_t width, const int64_t *row, const float *value,  \
                             int64_t n, float *restrict acc) {                                                   \
        enum { line = 64 / sizeof(T) };                                                                          \
        int64_t groups = n / 6, whole = width / line * line, ahead = AHEAD(6) / sizeof(T);                       \
        if (ahead > whole) ahead = whole;                                                                        \
        for (int64_t g = 0; g < groups; g++) {                                                                   \
            const T *r[6], *next[6];                                                                             \
            float v[6];                                                                                          \
            for (int i = 0; i < 6; i++) {                                                                        \
                int64_t at = place_of(g, i, groups, 6);                                                          \
                r[i] = w + row[at] * stride, v[i] = value[at];                                                   \
                next[i] = g + 1 < groups ? w + row[place_of(g + 1, i, groups, 6)] * stride : r[i];               \
            }                                                                                                    \
            for (int64_t from = 0; from < whole; from += line) {                                                 \
                int64_t at = from + ahead;                                                                       \
                for (int i = 0; i < 6; i++) __builtin_prefetch(at < width ? r[i] + at : next[i] + (at - width)); \
                for (int64_t j = from; j < from + line; j++) acc[j] += OF_SIX(S);                                \
            }                                                                                                    \
            for (int64_t j = whole; j < width; j++) acc[j] += OF_SIX(S);                                         \
        }                                                                                                        \
        for (int64_t k = 6 * groups; k < n; k++)                                                                 \
            for (int64_t j = 0; j < width; j++) acc[j] += value[k] * up_##S(w[row[k] * stride + j]);             \
    }

#define DOT(S, T)                                                                                         \
    static inline float dot_##S(const T *a, const float *b, int64_t n) {                                  \
        float sum = 0;                                                                                    \
        for (int64_t j = 0; j < n; j++) sum += up_##S(a[j]) * b[j];                                       \
        return sum;                                                                                       \
    }

// sum[i] = r[i][:] . x[i][:] for eight rows of n numbers, read as in add_rows; the rows `next` are prefetched meanwhile
#define EIGHT_DOTS(S, T)                                                                                               \
    static void eight_dots_##S(const T *const *r, const T *const *next, const float *const *x, int64_t n, float *sum) { \
        enum { line = 64 / sizeof(T) };                                                                                \
        float sums[8][line] = {0};                                                                                     \
        int64_t whole = n / line * line, ahead = AHEAD(8) / sizeof(T);                                                  \
        if (ahead > whole) ahead = whole;                                                                              \
        for (int64_t from = 0; from < whole; from += line) {                                                           \
            int64_t at = from + ahead;                                                                                 \
            for (int i = 0; i < 8; i++) __builtin_prefetch(at < n ? r[i] + at : next[i] + (at - n));                   \
            for (int i = 0; i < 8; i++)                                                                                \
                for (int j = 0; j < line; j++) sums[i][j] += up_##S(r[i][from + j]) * x[i][from + j];                  \
        }                                                                                                              \
        for (int i = 0; i < 8; i++) {                                                                                  \
            sum[i] = dot_##S(r[i] + whole, x[i] + whole, n - whole);                                                   \
            for (int j = 0; j < line; j++) sum[i] += sums[i][j];                                                       \
        }                                                                                                              \
    }

// Several linear layers side by side with the same input x [I]: out[O] = bias + sum of x[k] * w[k, :] over the channels
// with |x[k]| >= limit[k], plus low-rank corrections that read every channel. w [I, O], its rows `stride` apart; down
// [parts * r, I] and up [r, O], where layer p writes outputs ends[p - 1] to ends[p]. bias, down and up may be NULL.
// Returns the number of channels read.
#define READ_CHANNELS(S, T)                                                                                       \
    int64_t read_channels_##S(const T *x, const float *limit, const T *w, int64_t stride, int64_t I, int64_t O,   \
                              const T *bias, const T *down, const T *up, int64_t r, const int64_t *ends,          \
                              int64_t parts, T *out, int threads) {                                               \
        int64_t lane = (O + 15) / 16 * 16, *rows, *each, n = 0;                                                   \
        float *sums = scratch(sizeof(float) * (threads * lane + 2 * I + parts * r) + sizeof(int64_t) * (I + r + 1));\
        float *values = sums + threads * lane, *kept = values + I, *low = kept + I;                               \
        rows = (int64_t *)(((uintptr_t)(low + parts * r) + 7) / 8 * 8), each = rows + I;                          \
        for (int64_t i = 0; i < I; i++) values[i] = up_##S(x[i]);                                                 \
        for (int64_t i = 0; i < I; i++) {                                                                         \
            rows[n] = i, kept[n] = values[i];                                                                     \
            n += fabsf(values[i]) >= limit[i];                                                                    \
        }                                                                                                         \
        for (int64_t i = 0; i < r; i++) each[i] = i;                                                              \
        _Pragma("omp parallel num_threads(threads)") {                                                            \
            int64_t me = omp_get_thread_num(), team = omp_get_num_threads();                                      \
            int64_t from = me * n / team, to = (me + 1) * n / team;                                               \
            memset(sums + me * lane, 0, sizeof(float) * O);                                                       \
            add_rows_##S(w, stride, O, rows + from, kept + from, to - from, sums + me * lane);                    \
            for (int64_t i = me * parts * r / team; i < (me + 1) * parts * r / team; i++)                         \
                low[i] = dot_##S(down + i * I, values, I);                                                        \
            _Pragma("omp barrier")                                                                                \
            from = me * O / team, to = (me + 1) * O / team;                                                       \
            for (int64_t t = 1; t < team; t++)                                                                    \
                for (int64_t j = from; j < to; j++) sums[j] += sums[t * lane + j];                                \
            for (int64_t p = 0; r && p < parts; p++) {                                                            \
                int64_t a = p ? ends[p - 1] : 0, b = ends[p];                                                     \
                if (a < from) a = from;                                                                           \
                if (b > to) b = to;                                                                               \
                if (a < b) add_rows_##S(up + a, O, b - a, each, low + p * r, r, sums + a);                        \
            }                                                                                                     \
            for (int64_t j = from; j < to; j++) out[j] = down_##S(sums[j] + (bias ? up_##S(bias[j]) : 0));        \
        }                                                                                                         \
        return n;                                                                                                 \
    }

// out[k] = w[rows[k], :] . x + bias[rows[k]] for n rows of w [*, I]; bias may be NULL, rows NULL means the first n
#define DOT_ROWS(S, T)                                                                                          \
    void dot_rows_##S(const T *x, const T *w, const T *bias, const int64_t *rows, int64_t n, int64_t I, T *out, \
                      int threads) {                                                                            \
        float *values = scratch(sizeof(float) * I);                                                             \
        for (int64_t i = 0; i < I; i++) values[i] = up_##S(x[i]);                                               \
        _Pragma("omp parallel num_threads(threads)") {                                                          \
            int64_t me = omp_get_thread_num(), team = omp_get_num_threads();                                    \
            int64_t from = me * n / team, to = (me + 1) * n / team, groups = (to - from + 7) / 8;               \
            for (int64_t g = 0; g < groups; g++) {                                                              \
                const T *r[8], *next[8];                                                                        \
                const float *with[8];                                                                           \
                int64_t k[8], row[8];                                                                           \
                float sum[8];                                                                                   \
                for (int64_t i = 0; i < 8; i++) { /* a short group repeats its last row */                      \
                    int64_t at = from + place_of(g, i, groups, 8), then = from + place_of(g + 1, i, groups, 8); \
                    k[i] = at < to ? at : to - 1, then = then < to ? then : to - 1;                             \
                    row[i] = rows ? rows[k[i]] : k[i];                                                          \
                    r[i] = w + row[i] * I, next[i] = w + (rows ? rows[then] : then) * I, with[i] = values;      \
                }                                                                                               \
                eight_dots_##S(r, next, with, I, sum);                                                          \
                for (int i = 0; i < 8; i++) out[k[i]] = down_##S(sum[i] + (bias ? up_##S(bias[row[i]]) : 0));   \
            }                                                                                                   \
        }                                                                                                       \
    }

// WALKS: whether `walk` supports rows of D numbers. `walk` writes the products of all inputs with rows from .. to of
// head [V, D] to out [B, V], where preview reaches the limit. It reads the rows one after the other, once for all
// inputs.
#ifdef __AVX512BF16__
#include <immintrin.h>
#define WALKS_bf16(D) ((D) % 32 == 0)
#define WALKS_f32(D) 0
#define walk_f32(...) (void)0

// sum[i, b] = r[i, :] . x[b, :] for four adjacent rows r [4, D] and inputs x [n, D]; inlined, so that n is a constant
static inline __attribute__((always_inline)) void four_rows(const uint16_t *r, const uint16_t *x, int64_t D, int n, float *sum) {
    __m512 sums[4][4];
    for (int i = 0; i < 4; i++)
        for (int b = 0; b < n; b++) sums[i][b] = _mm512_setzero_ps();
    for (int64_t j = 0; j < D; j += 32) {
        __m512bh v[4];
        for (int i = 0; i < 4; i++) {
            v[i] = (__m512bh)_mm512_loadu_si512(r + i * D + j);
            __builtin_prefetch(r + (4 + i) * D + j);
        }
        for (int b = 0; b < n; b++) {
            __m512bh with = (__m512bh)_mm512_loadu_si512(x + b * D + j);
            for (int i = 0; i < 4; i++) sums[i][b] = _mm512_dpbf16_ps(sums[i][b], v[i], with);
        }
    }
    for (int i = 0; i < 4; i++)
        for (int b = 0; b < n; b++) sum[i * n + b] = _mm512_reduce_add_ps(sums[i][b]);
}

static void walk_bf16(const uint16_t *x, int64_t B, const uint16_t *head, const uint16_t *bias, int64_t V, int64_t D,
                      const uint16_t *preview, const float *limit, uint16_t *out, int64_t from, int64_t to) {
    for (int64_t v = from; v < to; v += 4) {
        int64_t at = v + 4 <= V ? v : V - 4; // fewer than four rows left: start earlier, with some rows again
        for (int64_t b = 0; b < B; b += 4) {
            int n = B - b < 4 ? (int)(B - b) : 4;
            float sum[16];
            if (n == 1) four_rows(head + at * D, x + b * D, D, 1, sum);
            if (n == 2) four_rows(head + at * D, x + b * D, D, 2, sum);
            if (n == 3) four_rows(head + at * D, x + b * D, D, 3, sum);
            if (n == 4) four_rows(head + at * D, x + b * D, D, 4, sum);
            for (int i = 0; i < 4; i++)
                for (int k = 0; k < n && at + i >= v && at + i < to; k++) {
                    int64_t place = (b + k) * V + at + i;
                    if (up_bf16(preview[place]) >= limit[b + k])
                        out[place] = down_bf16(sum[i * n + k] + (bias ? up_bf16(bias[at + i]) : 0));
                }
        }
    }
}
#else
#define WALKS_bf16(D) 0
#define WALKS_f32(D) 0
#define walk_bf16(...) (void)0
#define walk_f32(...) (void)0
#endif

// out[b][v] = head[v, :] . x[b] + bias[v] where preview[b][v] reaches limit[b], else preview + tail; head [V, D],
// x [B, D], preview and out [B, V]; bias may be NULL. count[b]: the number of exact logits.
#define EXACT_ROWS(S, T)                                                                                         \
    void exact_rows_##S(const T *x, int64_t B, const T *head, const T *bias, int64_t V, int64_t D,               \
                        const T *preview, const float *limit, const float *tail, T *out, int64_t *count,         \
                        int threads) {                                                                           \
        enum { near = DISTANT ? 8 : 64 }; /* rows that stay in the cache until all inputs have read them */      \
        int64_t total = 0, *chosen = scratch(sizeof(int64_t) * V * B + sizeof(float) * B * D); /* b << 32 | v */ \
        float *values = (float *)(chosen + V * B);                                                               \
        for (int64_t i = 0; i < B * D; i++) values[i] = up_##S(x[i]);                                            \
        for (int64_t b = 0; b < B; b++) count[b] = 0;                                                            \
        _Pragma("omp parallel num_threads(threads)") {                                                           \
            int64_t me = omp_get_thread_num(), team = omp_get_num_threads(), n = 0;                              \
            int64_t from = me * V / team, to = (me + 1) * V / team, *mine = chosen + from * B;                   \
            for (int64_t first = from; first < to; first += near)                                                \
                for (int64_t b = 0; b < B; b++) {                                                                \
                    const T *guess = preview + b * V;                                                            \
                    for (int64_t v = first; v < first + near && v < to; v++) {                                   \
                        mine[n] = b << 32 | v;                                                                   \
                        n += up_##S(guess[v]) >= limit[b];                                                       \
                    }                                                                                            \
                }                                                                                                \
            for (int64_t b = 0; b < B; b++) {                                                                    \
                int64_t exact = 0;                                                                               \
                for (int64_t v = from; v < to; v++) {                                                            \
                    float guess = up_##S(preview[b * V + v]);                                                    \
                    out[b * V + v] = down_##S(guess + *tail);                                                    \
                    exact += guess >= limit[b];                                                                  \
                }                                                                                                \
                _Pragma("omp atomic") count[b] += exact;                                                         \
            }                                                                                                    \
            _Pragma("omp atomic") total += n;                                                                    \
            _Pragma("omp barrier")                                                                               \
            if (WALKS_##S(D) && V >= 4 && 5 * total > 6 * V) { /* measured: then faster than the list */         \
                walk_##S(x, B, head, bias, V, D, preview, limit, out, from, to);                                 \
                n = 0;                                                                                           \
            }                                                                                                    \
            for (int64_t g = 0, groups = (n + 7) / 8; g < groups; g++) {                                         \
                const T *r[8], *next[8];                                                                         \
                const float *with[8];                                                                            \
                int64_t v[8], b[8];                                                                              \
                float sum[8];                                                                                    \
                for (int64_t i = 0; i < 8; i++) { /* a short group repeats its last row */                       \
                    int64_t at = place_of(g, i, groups, 8), then = place_of(g + 1, i, groups, 8);                \
                    at = mine[at < n ? at : n - 1], then = mine[then < n ? then : n - 1];                        \
                    v[i] = (uint32_t)at, b[i] = at >> 32;                                                        \
                    r[i] = head + v[i] * D, next[i] = head + (uint32_t)then * D, with[i] = values + b[i] * D;    \
                }                                                                                                \
                eight_dots_##S(r, next, with, D, sum);                                                           \
                for (int i = 0; i < 8; i++)                                                                      \
                    out[b[i] * V + v[i]] = down_##S(sum[i] + (bias ? up_##S(bias[v[i]]) : 0));                   \
            }                                                                                                    \
        }                                                                                                        \
    }

#define KERNELS(S, T) ADD_ROWS(S, T) DOT(S, T) EIGHT_DOTS(S, T) READ_CHANNELS(S, T) DOT_ROWS(S, T) EXACT_ROWS(S, T)

KERNELS(f32, float)
KERNELS(bf16, uint16_t)

#ifdef __AVX512BF16__

// sums[b][O] += sum of value[b][k] * w[row[k], :] for B inputs: n rows (a multiple of 16) are read once for all inputs.
// pairs[b][n / 2]: two adjacent values in 32 bits. Within 32 outputs, sums stay in the order in which unpacking leaves
// them.
static void add_rows_few(const uint16_t *w, int64_t stride, int64_t O, const int64_t *row, int64_t n,
                         const uint32_t *pairs, int64_t wide, int64_t B, float *sums) {
    int64_t ahead = AHEAD(16) / sizeof(uint16_t) < O ? AHEAD(16) / sizeof(uint16_t) : O;
    for (int64_t g = 0, groups = n / 16; g < groups; g++) { // of four times four adjacent rows
        const uint16_t *r[16], *next[16];
        int64_t fours[4];
        for (int i = 0; i < 16; i++) {
            int64_t then = 4 * place_of(g + 1, i / 4, groups, 4) + i % 4;
            fours[i / 4] = 4 * place_of(g, i / 4, groups, 4);
            r[i] = w + row[fours[i / 4] + i % 4] * stride;
            next[i] = g + 1 < groups ? w + row[then] * stride : r[i];
        }
        for (int64_t from = 0; from < O; from += 32) {
            __m512i low[8], high[8];
            int64_t at = from + ahead;
            for (int i = 0; i < 16; i++) __builtin_prefetch(at < O ? r[i] + at : next[i] + (at - O));
            for (int i = 0; i < 8; i++) {
                __m512i a = _mm512_loadu_si512(r[2 * i] + from), b = _mm512_loadu_si512(r[2 * i + 1] + from);
                low[i] = _mm512_unpacklo_epi16(a, b), high[i] = _mm512_unpackhi_epi16(a, b);
            }
            for (int64_t b = 0; b < B; b++) {
                float *at = sums + b * O + from;
                __m512 first = _mm512_loadu_ps(at), second = _mm512_loadu_ps(at + 16);
                __m512 third = _mm512_setzero_ps(), fourth = _mm512_setzero_ps();
                for (int i = 0; i < 8; i += 2) {
                    const uint32_t *pair = pairs + b * wide + fours[i / 2] / 2;
                    __m512bh x = (__m512bh)_mm512_set1_epi32((int)pair[0]), y = (__m512bh)_mm512_set1_epi32((int)pair[1]);
                    first = _mm512_dpbf16_ps(first, (__m512bh)low[i], x);
                    second = _mm512_dpbf16_ps(second, (__m512bh)high[i], x);
                    third = _mm512_dpbf16_ps(third, (__m512bh)low[i + 1], y);
                    fourth = _mm512_dpbf16_ps(fourth, (__m512bh)high[i + 1], y);
                }
                _mm512_storeu_ps(at, _mm512_add_ps(first, third)), _mm512_storeu_ps(at + 16, _mm512_add_ps(second, fourth));
            }
        }
    }
}

// Adds up the sums of 32 outputs over the team's threads, which are `apart` from one another, and restores their order.
static void gather_32(const float *sums, int64_t apart, int64_t team, float *whole) {
    const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i back = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    __m512 first = _mm512_loadu_ps(sums), second = _mm512_loadu_ps(sums + 16);
    for (int64_t t = 1; t < team; t++) {
        first = _mm512_add_ps(first, _mm512_loadu_ps(sums + t * apart));
        second = _mm512_add_ps(second, _mm512_loadu_ps(sums + t * apart + 16));
    }
    _mm512_storeu_ps(whole, _mm512_permutex2var_ps(first, front, second));
    _mm512_storeu_ps(whole + 16, _mm512_permutex2var_ps(first, back, second));
}

// read_channels for a few inputs x [B, I]; O and all ends are multiples of 32. Returns the number of channels that some
// input needs.
int64_t few_channels_bf16(const uint16_t *x, int64_t B, const float *limit, const uint16_t *w, int64_t stride, int64_t I,
                          int64_t O, const uint16_t *bias, const uint16_t *down, const uint16_t *up, int64_t r,
                          const int64_t *ends, int64_t parts, uint16_t *out, int threads) {
    int64_t wide = (I + 17) / 2 * 2, n = 0, needed, ranks = parts * r;
    size_t floats = (B * (I + ranks) + threads * B * O + 1) / 2 * 2, shorts = 2 * B * wide + I, longs = I + 16;
    float *sums = scratch(8 * longs + 4 * floats + 2 * shorts), *values = sums + threads * B * O, *low = values + B * I;
    int64_t *rows = (int64_t *)(sums + floats);
    uint16_t *masked = (uint16_t *)(rows + longs), *kept = masked + B * wide, *open = kept + B * wide;
    memset(open, 0, sizeof(uint16_t) * I);
    for (int64_t b = 0; b < B; b++) {
        for (int64_t i = 0; i < I; i++) masked[b * wide + i] = reaches_bf16(x[b * I + i], limit[i]) ? x[b * I + i] : 0;
        for (int64_t i = 0; i < I; i++) open[i] |= masked[b * wide + i];
        for (int64_t i = 0; i < I; i++) values[b * I + i] = up_bf16(x[b * I + i]);
    }
    for (int64_t i = 0; i < I; i++) {
        rows[n] = i;
        n += open[i] != 0;
    }
    needed = n;
    for (; n % 16; n++) rows[n] = rows[0];
    for (int64_t b = 0; b < B; b++) {
        for (int64_t k = 0; k < needed; k++) kept[b * wide + k] = masked[b * wide + rows[k]];
        for (int64_t k = needed; k < n; k++) kept[b * wide + k] = 0;
    }
#pragma omp parallel num_threads(threads)
    {
        int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
        int64_t from = me * (n / 16) / team * 16, to = (me + 1) * (n / 16) / team * 16;
        float *mine = sums + me * B * O;
        memset(mine, 0, sizeof(float) * B * O);
        add_rows_few(w, stride, O, rows + from, to - from, (const uint32_t *)(kept + from), wide / 2, B, mine);
        for (int64_t i = me * ranks / team; i < (me + 1) * ranks / team; i++)
            for (int64_t b = 0; b < B; b++) low[b * ranks + i] = dot_bf16(down + i * I, values + b * I, I);
#pragma omp barrier
        for (int64_t at = me * (O / 32) / team * 32; at < (me + 1) * (O / 32) / team * 32; at += 32) {
            int64_t p = 0;
            while (r && ends[p] <= at) p++;
            for (int64_t b = 0; b < B; b++) {
                float whole[32];
                gather_32(sums + b * O + at, B * O, team, whole);
                for (int j = 0; bias && j < 32; j++) whole[j] += up_bf16(bias[at + j]);
                for (int64_t i = 0; i < r; i++) {
                    float feature = low[b * ranks + p * r + i];
                    for (int j = 0; j < 32; j++) whole[j] += feature * up_bf16(up[i * O + at + j]);
                }
                for (int j = 0; j < 32; j++) out[b * O + at + j] = down_bf16(whole[j]);
            }
        }
    }
    return needed;
}
#endif
