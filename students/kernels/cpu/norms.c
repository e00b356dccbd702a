// RMS norms in one pass over their input, with the bits that torch's own operators give.
//
// Compiled without leave to reorder sums or to fuse products into them (see toolchain.py).

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "numbers.h"

// The sum of x[D]^2 in the order in which torch sums a contiguous row: vectors of 8 numbers, four of them side by side,
// and partial sums of partial sums so that rounding errors stay small; the numbers that fill no vector come first.
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

// out [N, D]: x / sqrt(mean(x^2) + epsilon), times weight [D]. kind: 0 where the quotient is rounded to T before that
// product, 1 where it is not, 2 where it is not and the factor is 1 + weight.
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

#define KERNELS(S, T) SUM_SQUARES(S, T) RMS_NORM(S, T)

KERNELS(f32, float)
KERNELS(bf16, uint16_t)
