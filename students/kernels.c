// Decoding one token reads only what is selected: matrix-vector products over some rows of a weight, no copies made.
//
// Compiled once for this machine by kernels.py, for float32 and bfloat16 (held in uint16_t: the upper half of a
// float32). Accumulation is in float32. Every thread takes a contiguous part of the selected rows.

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

static inline float up_f32(float v) { return v; }
static inline float down_f32(float v) { return v; }
static inline float up_bf16(uint16_t v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static inline uint16_t down_bf16(float f) {  // to nearest even
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// acc[width] += sum of value[k] * w[row[k], :] over n rows of w, which are `stride` apart; eight rows at a time, a cache
// line of each, while the same line of the next eight is on its way
#define ADD_ROWS(S, T)                                                                                                 \
    static void add_rows_##S(const T *w, int64_t stride, int64_t width, const int64_t *row, const float *value,        \
                             int64_t n, float *restrict acc) {                                                         \
        int64_t k = 0, line = 64 / sizeof(T);                                                                          \
        for (; k + 8 <= n; k += 8) {                                                                                   \
            const T *r[8], *next[8];                                                                                   \
            for (int i = 0; i < 8; i++) {                                                                              \
                r[i] = w + row[k + i] * stride;                                                                        \
                next[i] = k + 8 + i < n ? w + row[k + 8 + i] * stride : r[i];                                          \
            }                                                                                                          \
            const float *v = value + k;                                                                                \
            for (int64_t from = 0; from < width; from += line) {                                                       \
                int64_t to = from + line < width ? from + line : width;                                                \
                for (int i = 0; i < 8; i++) __builtin_prefetch(next[i] + from);                                        \
                for (int64_t j = from; j < to; j++)                                                                    \
                    acc[j] += v[0] * up_##S(r[0][j]) + v[1] * up_##S(r[1][j]) + v[2] * up_##S(r[2][j])                 \
                            + v[3] * up_##S(r[3][j]) + v[4] * up_##S(r[4][j]) + v[5] * up_##S(r[5][j])                 \
                            + v[6] * up_##S(r[6][j]) + v[7] * up_##S(r[7][j]);                                         \
            }                                                                                                          \
        }                                                                                                              \
        for (; k < n; k++)                                                                                             \
            for (int64_t j = 0; j < width; j++) acc[j] += value[k] * up_##S(w[row[k] * stride + j]);                   \
    }

#define DOT(S, T)                                                        \
    static inline float dot_##S(const T *a, const float *b, int64_t n) { \
        float sum = 0;                                                   \
        for (int64_t j = 0; j < n; j++) sum += up_##S(a[j]) * b[j];      \
        return sum;                                                      \
    }

// Several linear layers that read one input x [I], side by side: out[O] = bias + sum of x[k] * w[k, :] over the
// channels with |x| >= limit[k], plus low-rank corrections that read every channel. w [I, O], its rows `stride` apart; down [parts * r, I] and
// up [r, O], where layer p writes outputs ends[p - 1] to ends[p]. bias, down and up may be NULL. Returns how many
// channels were read.
#define READ_CHANNELS(S, T)                                                                                       \
    int64_t read_channels_##S(const T *x, const float *limit, const T *w, int64_t stride, int64_t I, int64_t O,    \
                              const T *bias, const T *down, const T *up, int64_t r, const int64_t *ends,           \
                              int64_t parts, T *out, int threads) {                                               \
        float *values = malloc(sizeof(float) * (2 * I + parts * r + threads * O));                                \
        int64_t *rows = malloc(sizeof(int64_t) * (I + r)), *each = rows + I, n = 0;                               \
        float *kept = values + I, *low = kept + I, *sums = low + parts * r;                                       \
        for (int64_t i = 0; i < I; i++) values[i] = up_##S(x[i]);                                                 \
        for (int64_t i = 0; i < I; i++)                                                                           \
            if (fabsf(values[i]) >= limit[i]) { rows[n] = i; kept[n++] = values[i]; }                             \
        for (int64_t i = 0; i < r; i++) each[i] = i;                                                              \
        _Pragma("omp parallel num_threads(threads)") {                                                            \
            int64_t me = omp_get_thread_num(), team = omp_get_num_threads();                                      \
            int64_t from = me * n / team, to = (me + 1) * n / team;                                               \
            memset(sums + me * O, 0, sizeof(float) * O);                                                          \
            add_rows_##S(w, stride, O, rows + from, kept + from, to - from, sums + me * O);                       \
            for (int64_t i = me * parts * r / team; i < (me + 1) * parts * r / team; i++)                         \
                low[i] = dot_##S(down + i * I, values, I);                                                        \
            _Pragma("omp barrier")                                                                                \
            from = me * O / team, to = (me + 1) * O / team;                                                       \
            for (int64_t t = 1; t < team; t++)                                                                    \
                for (int64_t j = from; j < to; j++) sums[j] += sums[t * O + j];                                   \
            for (int64_t p = 0; r && p < parts; p++) {                                                            \
                int64_t a = p ? ends[p - 1] : 0, b = ends[p];                                                     \
                if (a < from) a = from;                                                                           \
                if (b > to) b = to;                                                                               \
                if (a < b) add_rows_##S(up + a, O, b - a, each, low + p * r, r, sums + a);                        \
            }                                                                                                     \
            for (int64_t j = from; j < to; j++) out[j] = down_##S(sums[j] + (bias ? up_##S(bias[j]) : 0));        \
        }                                                                                                         \
        free(values);                                                                                             \
        free(rows);                                                                                               \
        return n;                                                                                                 \
    }

// out[n][k] = x[n][k] where |x[n][k]| >= limit[k], else 0; then r low-rank features: down [r, I] times the whole x[n].
// x [N, I], out [N, I + r]
#define MASK_CHANNELS(S, T)                                                                                          \
    void mask_channels_##S(const T *x, int64_t N, int64_t I, const float *limit, const T *down, int64_t r, T *out,    \
                           int threads) {                                                                            \
        int64_t parts = r + 1, wide = I + r;                                                                         \
        float *values = malloc(sizeof(float) * (r ? N * I : 1));                                                     \
        for (int64_t i = 0; r && i < N * I; i++) values[i] = up_##S(x[i]);                                           \
        _Pragma("omp parallel for num_threads(N * I * parts > 262144 ? threads : 1)") for (int64_t k = 0; k < N * parts; k++) { \
            int64_t n = k / parts, part = k % parts;                                                                 \
            if (part < r) {                                                                                          \
                out[n * wide + I + part] = down_##S(dot_##S(down + part * I, values + n * I, I));                    \
                continue;                                                                                            \
            }                                                                                                        \
            for (int64_t i = 0; i < I; i++)                                                                          \
                out[n * wide + i] = fabsf(up_##S(x[n * I + i])) >= limit[i] ? x[n * I + i] : 0;                      \
        }                                                                                                            \
        free(values);                                                                                                \
    }

// out[k] = w[rows[k], :] . x + bias[rows[k]] for n rows of w [*, I]; bias may be NULL, rows NULL means the first n
#define DOT_ROWS(S, T)                                                                                         \
    void dot_rows_##S(const T *x, const T *w, const T *bias, const int64_t *rows, int64_t n, int64_t I, T *out, \
                      int threads) {                                                                           \
        float *values = malloc(sizeof(float) * I);                                                             \
        for (int64_t i = 0; i < I; i++) values[i] = up_##S(x[i]);                                              \
        _Pragma("omp parallel num_threads(threads)") {                                                         \
            int64_t me = omp_get_thread_num(), team = omp_get_num_threads();                                   \
            for (int64_t k = me * n / team; k < (me + 1) * n / team; k++) {                                    \
                int64_t row = rows ? rows[k] : k;                                                              \
                out[k] = down_##S(dot_##S(w + row * I, values, I) + (bias ? up_##S(bias[row]) : 0));           \
            }                                                                                                  \
        }                                                                                                      \
        free(values);                                                                                          \
    }

// out[b][v] = head[v, :] . x[b] + bias[v] where preview[b][v] reaches limit[b], else preview + tail; head [V, D],
// x [B, D], preview and out [B, V]; bias may be NULL. count[b]: how many rows were exact.
#define EXACT_ROWS(S, T)                                                                                        \
    void exact_rows_##S(const T *x, int64_t B, const T *head, const T *bias, int64_t V, int64_t D,               \
                        const T *preview, const float *limit, float tail, T *out, int64_t *count, int threads) { \
        float *values = malloc(sizeof(float) * B * D);                                                          \
        int64_t *chosen = malloc(sizeof(int64_t) * V);                                                          \
        for (int64_t i = 0; i < B * D; i++) values[i] = up_##S(x[i]);                                           \
        for (int64_t b = 0; b < B; b++) {                                                                       \
            const T *guess = preview + b * V;                                                                   \
            T *o = out + b * V;                                                                                 \
            int64_t exact = 0;                                                                                  \
            _Pragma("omp parallel num_threads(threads) reduction(+ : exact)") {                                 \
                int64_t me = omp_get_thread_num(), team = omp_get_num_threads(), n = 0;                         \
                int64_t from = me * V / team, to = (me + 1) * V / team, *mine = chosen + from;                  \
                for (int64_t v = from; v < to; v++) {                                                           \
                    float this = up_##S(guess[v]);                                                              \
                    o[v] = down_##S(this + tail);                                                               \
                    mine[n] = v;                                                                                \
                    n += this >= limit[b];                                                                      \
                }                                                                                               \
                for (int64_t k = 0; k < n; k++) {                                                               \
                    const T *next = head + mine[k + 2 < n ? k + 2 : k] * D;                                     \
                    for (int64_t j = 0; j < D; j += 64 / sizeof(T)) __builtin_prefetch(next + j);               \
                    float sum = dot_##S(head + mine[k] * D, values + b * D, D);                                 \
                    o[mine[k]] = down_##S(sum + (bias ? up_##S(bias[mine[k]]) : 0));                            \
                }                                                                                               \
                exact += n;                                                                                     \
            }                                                                                                   \
            count[b] = exact;                                                                                   \
        }                                                                                                       \
        free(values);                                                                                           \
        free(chosen);                                                                                           \
    }

#define KERNELS(S, T) ADD_ROWS(S, T) DOT(S, T) READ_CHANNELS(S, T) MASK_CHANNELS(S, T) DOT_ROWS(S, T) EXACT_ROWS(S, T)

KERNELS(f32, float)
KERNELS(bf16, uint16_t)
