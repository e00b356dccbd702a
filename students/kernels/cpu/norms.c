// RMS norms and rotary embeddings in one pass over their input, with the same bits as torch's own operators.
//
// Compiled with flags that forbid reordering sums and fusing products into sums (see toolchain.py).

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "numbers.h"

// Returns the sum of x[D]^2 in the order in which torch sums a contiguous row: four vectors of 8 numbers side by side,
// with partial sums of partial sums, which keep rounding errors small; numbers that fill no vector are added first.
#define SUM_SQUARES(S, T)                                                                                     \
    static float sum_squares_##S(const T *x, int64_t D) {                                                     \
        int64_t vectors = D / 8, steps = vectors / 4, bits = 0, i = 0;                                        \
        while (((int64_t)1 << bits) < steps) bits++;                                                          \
        int64_t power = bits / 4 > 4 ? bits / 4 : 4, each = (int64_t)1 << power;                              \
        float sum[4][32] = {{0}}, last = 0;                                                                   \
        while (i + each <= steps) {                                                                           \
            for (int64_t end = i + each; i < end; i++)                                                        \
                for (int64_t j = 0; j < 32; j++) sum[0][j] += SQUARE(S, x[i * 32 + j]);                       \
            for (int64_t level = 1; level < 4; level++) {                                                     \
                for (int64_t j = 0; j < 32; j++) sum[level][j] += sum[level - 1][j], sum[level - 1][j] = 0;   \
                if (i & ((each - 1) << (level * power))) break;                                               \
            }                                                                                                 \
        }                                                                                                     \
        for (; i < steps; i++)                                                                                \
            for (int64_t j = 0; j < 32; j++) sum[0][j] += SQUARE(S, x[i * 32 + j]);                           \
        for (int64_t level = 1; level < 4; level++)                                                           \
            for (int64_t j = 0; j < 32; j++) sum[0][j] += sum[level][j];                                      \
        for (int64_t v = steps * 4; v < vectors; v++)                                                         \
            for (int64_t j = 0; j < 8; j++) sum[0][j] += SQUARE(S, x[v * 8 + j]);                             \
        for (int64_t k = 1; k < 4; k++)                                                                       \
            for (int64_t j = 0; j < 8; j++) sum[0][j] += sum[0][k * 8 + j];                                   \
        for (int64_t d = vectors * 8; d < D; d++) last += SQUARE(S, x[d]);                                    \
        for (int64_t j = 0; j < 8; j++) last += sum[0][j];                                                    \
        return last;                                                                                          \
    }
#define SQUARE(S, v) (up_##S(v) * up_##S(v))

// Writes to out [N, D] x / sqrt(mean(x^2) + epsilon), times weight [D]. kind: 0 if the quotient is rounded to T before
// it is multiplied by the weight, 1 if it is not, 2 if it is not and the factor is 1 + weight.
#define RMS_NORM(S, T)                                                                                        \
    void rms_norm_##S(const T *x, int64_t N, int64_t D, const T *weight, float epsilon, int64_t kind, T *out, \
                      int threads) {                                                                          \
        _Pragma("omp parallel for num_threads(N * D > 65536 ? threads : 1)") for (int64_t n = 0; n < N; n++) { \
            const T *from = x + n * D;                                                                        \
            T *to = out + n * D;                                                                              \
            float scale = 1 / sqrtf(sum_squares_##S(from, D) / D + epsilon);                                  \
            if (kind == 0)                                                                                    \
                for (int64_t d = 0; d < D; d++)                                                               \
                    to[d] = down_##S(up_##S(weight[d]) * up_##S(down_##S(up_##S(from[d]) * scale)));          \
            else                                                                                              \
                for (int64_t d = 0; d < D; d++)                                                               \
                    to[d] = down_##S(up_##S(from[d]) * scale * ((kind == 2 ? 1 : 0) + up_##S(weight[d])));    \
        }                                                                                                     \
    }

// Writes to out [B, L, H, D] x [B, H, L, D], of strides `batch`, `head` and `token`, with the first r of D channels
// rotated by cos and sin [*, L, r], whose stride from row to row of the batch is `each`. Every step rounds.
#define ROTARY(S, T)                                                                                          \
    static inline T turned_##S(T v, T cos, float w, T sin) {                                                  \
        float straight = up_##S(down_##S(up_##S(v) * up_##S(cos)));                                           \
        return down_##S(straight + up_##S(down_##S(w * up_##S(sin))));                                        \
    }                                                                                                         \
    void rotary_##S(T *out, const T *x, int64_t B, int64_t H, int64_t L, int64_t D, int64_t batch,            \
                    int64_t head, int64_t token, const T *cos, const T *sin, int64_t r, int64_t each,         \
                    int threads) {                                                                            \
        _Pragma("omp parallel for num_threads(B * H * L * D > 65536 ? threads : 1)")                          \
        for (int64_t n = 0; n < B * H * L; n++) {                                                             \
            int64_t b = n / (H * L), l = n / H % L, h = n % H, half = r / 2;                                  \
            const T *from = x + b * batch + h * head + l * token, *c = cos + b * each + l * r;                \
            const T *s = sin + b * each + l * r;                                                              \
            T *restrict to = out + n * D;                                                                     \
            for (int64_t i = 0; i < half; i++) to[i] = turned_##S(from[i], c[i], -up_##S(from[half + i]), s[i]); \
            for (int64_t i = half; i < r; i++) to[i] = turned_##S(from[i], c[i], up_##S(from[i - half]), s[i]); \
            memcpy(to + r, from + r, sizeof(T) * (D - r));                                                    \
        }                                                                                                     \
    }

// Writes key [N, K] and value [N, V] of one token to slot *slot of keys [N, L, K] and values [N, L, V].
#define WRITE_SLOT(S, T)                                                                                      \
    void write_slot_##S(T *keys, T *values, const T *key, const T *value, int64_t N, int64_t L, int64_t K,    \
                        int64_t V, const int64_t *slot, int threads) {                                        \
        for (int64_t n = 0; n < N; n++) {                                                                     \
            memcpy(keys + (n * L + *slot) * K, key + n * K, sizeof(T) * K);                                   \
            memcpy(values + (n * L + *slot) * V, value + n * V, sizeof(T) * V);                               \
        }                                                                                                     \
    }

#define KERNELS(S, T) SUM_SQUARES(S, T) RMS_NORM(S, T) ROTARY(S, T) WRITE_SLOT(S, T)

KERNELS(f32, float)
KERNELS(bf16, uint16_t)
