// Thin products, and decisions of routers that read whole tokens. T: type of activations and weights; S: suffix of the
// functions for it.

#include <math.h>
#include <omp.h>

#include "numbers.h"

#define TOGETHER 4 // tokens that share one reading of the weights

// out[k][o] = w[o] . x[rows[k]] + bias[o] for N rows of x [*, I], and w [O, I]; rows NULL means the first N, bias may be
// NULL
#define THIN_PRODUCT(S, T)                                                                                          \
    void thin_product_##S(const T *x, const int64_t *rows, int64_t N, int64_t I, const T *w, const T *bias,         \
                          int64_t O, T *out, int threads) {                                                         \
        int64_t groups = (N + TOGETHER - 1) / TOGETHER;                                                             \
        _Pragma("omp parallel for num_threads(threads) if (groups > 1)") for (int64_t g = 0; g < groups; g++) {     \
            float in[TOGETHER][I];                                                                                  \
            int64_t first = g * TOGETHER, count = N - first < TOGETHER ? N - first : TOGETHER;                      \
            for (int64_t n = 0; n < TOGETHER; n++) { /* a short group repeats its last row */                       \
                int64_t k = first + (n < count ? n : count - 1);                                                    \
                const T *from = x + (rows ? rows[k] : k) * I;                                                       \
                for (int64_t i = 0; i < I; i++) in[n][i] = up_##S(from[i]);                                         \
            }                                                                                                       \
            for (int64_t o = 0; o < O; o++) {                                                                       \
                const T *row = w + o * I;                                                                           \
                float sum[TOGETHER] = {0};                                                                          \
                if (count == 1)                                                                                     \
                    for (int64_t i = 0; i < I; i++) sum[0] += up_##S(row[i]) * in[0][i];                            \
                else                                                                                                \
                    for (int64_t i = 0; i < I; i++) {                                                               \
                        float v = up_##S(row[i]);                                                                   \
                        for (int n = 0; n < TOGETHER; n++) sum[n] += v * in[n][i];                                  \
                    }                                                                                               \
                for (int64_t n = 0; n < count; n++)                                                                 \
                    out[(first + n) * O + o] = down_##S(sum[n] + (bias ? up_##S(bias[o]) : 0));                     \
            }                                                                                                       \
        }                                                                                                           \
    }

// The error function to about two parts in ten million (Abramowitz and Stegun, 7.1.26), in a form that compilers
// vectorise.
static inline float erf_(float x) {
    float size = fabsf(x), t = 1 / (1 + 0.3275911f * size);
    float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    return copysignf(1 - p * expf_(-size * size), x);
}

// open[n]: whether score + shift >= 0, or position[n] < prefix (position may be NULL), for the score low[n][0] +
// up[h] gelu(low[n][h + 1]), summed over H, of low [N, 1 + H]. order: the tokens, open ones first, both in their order;
// place[n]: where n is in `order`. Returns the number of open tokens
#define OPEN_TOKENS(S, T)                                                                                           \
    int64_t open_tokens_##S(const T *low, int64_t N, const T *up, int64_t H, const float *shift,                    \
                            const int64_t *position, int64_t prefix, uint8_t *open, int64_t *order, int64_t *place, \
                            int threads) {                                                                          \
        int64_t found = 0, next = 0;                                                                                \
        _Pragma("omp parallel for num_threads(threads) if (N > 64)") for (int64_t n = 0; n < N; n++) {              \
            const T *of = low + n * (1 + H);                                                                        \
            float score = up_##S(of[0]);                                                                            \
            for (int64_t h = 0; h < H; h++) {                                                                       \
                float v = up_##S(of[1 + h]);                                                                        \
                score += up_##S(up[h]) * 0.5f * v * (1 + erf_(v * 0.70710678f));                                    \
            }                                                                                                       \
            open[n] = score + *shift >= 0 || (position && position[n] < prefix);                                    \
        }                                                                                                           \
        for (int64_t n = 0; n < N; n++) found += open[n];                                                           \
        for (int64_t n = 0, rest = found; n < N; n++) place[n] = open[n] ? next++ : rest++, order[place[n]] = n;    \
        return found;                                                                                               \
    }

#define KERNELS(S, T) THIN_PRODUCT(S, T) OPEN_TOKENS(S, T)

KERNELS(f32, float)
KERNELS(bf16, uint16_t)
