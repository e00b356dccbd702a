// Attention of one new token to a cache. Keys and values are read once for all heads that share them, multiplied with
// the CPU's bfloat16 instructions, and never stored in float32.
//
// Compiled with kernels.c (see toolchain.py), on CPUs with AVX512-BF16. A task owns a key head and a range of the
// slots, and keeps an online softmax of this range (arXiv 2205.14135); the ranges are added up in order.

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "numbers.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

enum { BLOCK = 64, MOST = 32 };  // slots per step; maximum heads that share a key head

// Returns a vector whose lane j is the sum of the lanes of x[j].
static inline __m512 sums_of_16(const __m512 *x) {
    __m512 two[8], four[4];
    for (int i = 0; i < 8; i++)
        two[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x44), _mm512_shuffle_f32x4(four[0], four[1], 0xee));
    __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x44), _mm512_shuffle_f32x4(four[2], four[3], 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// Writes score[g][c], the products of G queries q [G, d] with n keys [n, d], four by four. Where n or G is no multiple
// of four, the last row is repeated.
static void products_with_keys(const uint16_t *q, int64_t G, const uint16_t *keys, int64_t n, int64_t d,
                               float (*score)[BLOCK]) {
    for (int64_t g = 0; g < G; g += 4)
        for (int64_t c = 0; c < n; c += 4) {
            const uint16_t *a[4], *b[4];
            __m512 sum[16];
            for (int i = 0; i < 4; i++) {
                a[i] = q + (g + i < G ? g + i : G - 1) * d;
                b[i] = keys + (c + i < n ? c + i : n - 1) * d;
            }
            for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_ps();
            for (int64_t j = 0; j < d; j += 32) {
                __m512bh key[4];
                for (int i = 0; i < 4; i++) key[i] = (__m512bh)_mm512_loadu_si512(b[i] + j);
                for (int h = 0; h < 4; h++) {
                    __m512bh one = (__m512bh)_mm512_loadu_si512(a[h] + j);
                    for (int i = 0; i < 4; i++) sum[4 * h + i] = _mm512_dpbf16_ps(sum[4 * h + i], one, key[i]);
                }
            }
            float found[16];
            _mm512_storeu_ps(found, sums_of_16(sum));
            for (int h = 0; h < 4 && g + h < G; h++) memcpy(score[g + h] + c, found + 4 * h, 4 * sizeof(float));
        }
}

// sums[g][v] = shrink[g] * sums[g][v] + products of weights [G][n] with values [n, v]. pair: two adjacent weights in 32
// bits; if n is odd, the last value is read twice, the second time with weight 0. Within 32 outputs, sums stay in the
// order in which unpacking leaves them.
static void add_values(uint32_t (*pair)[BLOCK / 2], int64_t G, const uint16_t *values, int64_t n, int64_t v,
                       const float *shrink, float *sums) {
    for (int64_t g = 0; g < G; g += 4)
        for (int64_t from = 0; from < v; from += 32) {
            __m512 low[4], high[4];
            for (int h = 0; h < 4; h++) {
                int64_t own = g + h < G ? g + h : G - 1;
                __m512 by = _mm512_set1_ps(shrink[own]);
                low[h] = _mm512_mul_ps(by, _mm512_loadu_ps(sums + own * v + from));
                high[h] = _mm512_mul_ps(by, _mm512_loadu_ps(sums + own * v + from + 16));
            }
            for (int64_t c = 0; c < n; c += 2) {
                const uint16_t *row = values + c * v + from;
                __m512i a = _mm512_loadu_si512(row), b = _mm512_loadu_si512(c + 1 < n ? row + v : row);
                __m512bh first = (__m512bh)_mm512_unpacklo_epi16(a, b), second = (__m512bh)_mm512_unpackhi_epi16(a, b);
                for (int h = 0; h < 4; h++) {
                    __m512bh weight = (__m512bh)_mm512_set1_epi32((int)pair[g + h < G ? g + h : G - 1][c / 2]);
                    low[h] = _mm512_dpbf16_ps(low[h], first, weight);
                    high[h] = _mm512_dpbf16_ps(high[h], second, weight);
                }
            }
            for (int h = 0; h < 4 && g + h < G; h++) {
                _mm512_storeu_ps(sums + (g + h) * v + from, low[h]);
                _mm512_storeu_ps(sums + (g + h) * v + from + 16, high[h]);
            }
        }
}

// Attends with G queries to the slots from .. to. sums [G, v]: sums of values weighted by the exponentials of the
// scores less the highest score; tops[g]: that highest score; totals[g]: the sum of the exponentials. hides [slots]:
// bool if `is_bool`, else bfloat16 numbers added to the scores; may be NULL.
static void attend(const uint16_t *q, int64_t G, const uint16_t *keys, const uint16_t *values, int64_t d, int64_t v,
                   const void *hides, int64_t is_bool, int64_t from, int64_t to, float scale, float cap, float *sums,
                   float *tops, float *totals) {
    const float never = -3e38f;
    for (int64_t g = 0; g < G; g++) tops[g] = never, totals[g] = 0;
    memset(sums, 0, sizeof(float) * G * v);
    for (int64_t start = from; start < to; start += BLOCK) {
        float score[MOST][BLOCK], added[BLOCK], shrink[MOST];
        uint32_t pair[MOST][BLOCK / 2];
        int64_t n = to - start < BLOCK ? to - start : BLOCK;
        for (int64_t c = 0; c < n && hides; c++)
            added[c] = is_bool ? (((const uint8_t *)hides)[start + c] ? 0 : never)
                               : up_bf16(((const uint16_t *)hides)[start + c]);
        products_with_keys(q, G, keys + start * d, n, d, score);
        for (int64_t g = 0; g < G; g++) {
            float *s = score[g], top = tops[g], total = 0;
            for (int64_t c = 0; c < n; c++) s[c] *= scale;
            for (int64_t c = 0; c < n && cap; c++) s[c] = cap * (1 - 2 / (1 + expf_(2 * s[c] / cap)));
            for (int64_t c = 0; c < n && hides; c++) s[c] += added[c];
            for (int64_t c = 0; c < n; c++) top = s[c] > top ? s[c] : top;
            for (int64_t c = 0; c < n; c++) s[c] = expf_(s[c] - top), total += s[c];
            for (int64_t c = n; c % 2; c++) s[c] = 0;
            uint16_t *weight = (uint16_t *)pair[g];
            for (int64_t c = 0; c < (n + 1) / 2 * 2; c++) weight[c] = down_bf16(s[c]);
            shrink[g] = expf_(tops[g] - top);
            totals[g] = totals[g] * shrink[g] + total, tops[g] = top;
        }
        add_values(pair, G, values + start * v, n, v, shrink, sums);
    }
}

// Writes out [B, K * G, v], the attention of query [B, K * G, d] to keys [B, K, L, d] and values [B, K, L, v]. Slots up
// to *slot (NULL: all) are seen, and of these the last `window` (0: all). mask: as `hides` of `attend`, with rows
// mask_row apart. partial [B * K * ranges, G, v + 2]: memory for the sums, tops and totals of the ranges.
void decode_attention_bf16(const uint16_t *query, const uint16_t *keys, const uint16_t *values, int64_t B, int64_t K,
                           int64_t G, int64_t L, int64_t d, int64_t v, const void *mask, int64_t is_bool,
                           int64_t mask_row, const int64_t *slot, int64_t window, float scale, float cap, int64_t ranges,
                           float *partial, uint16_t *out, int threads) {
    int64_t end = slot ? *slot + 1 : L, begin = window && window < end ? end - window : 0, one = G * (v + 2);
    int64_t each = ((end - begin + ranges - 1) / ranges + BLOCK - 1) / BLOCK * BLOCK;
    size_t wide = is_bool ? 1 : 2;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < B * K * ranges; task++) {
            int64_t head = task / ranges, from = begin + task % ranges * each, to = from + each < end ? from + each : end;
            float *sums = partial + task * one;
            const char *hides = mask ? (const char *)mask + head / K * mask_row * wide : NULL;
            attend(query + head * G * d, G, keys + head * L * d, values + head * L * v, d, v, hides, is_bool, from, to,
                   scale, cap, sums, sums + G * v, sums + G * v + G);
        }
#pragma omp for schedule(static)
        for (int64_t at = 0; at < B * K * G; at++) {
            const float *first = partial + at / G * ranges * one;
            int64_t g = at % G;
            float top = -3e38f, total = 0;
            for (int64_t r = 0; r < ranges; r++) top = fmaxf(top, first[r * one + G * v + g]);
            for (int64_t r = 0; r < ranges; r++)
                total += first[r * one + G * v + G + g] * expf_(first[r * one + G * v + g] - top);
            for (int64_t j = 0; j < v; j += 32) {
                float whole[32] = {0};
                for (int64_t r = 0; r < ranges; r++) {
                    float by = expf_(first[r * one + G * v + g] - top) / total;
                    for (int i = 0; i < 32; i++) whole[i] += by * first[r * one + g * v + j + i];
                }
                for (int i = 0; i < 32; i++) out[at * v + j + i] = down_bf16(whole[i / 8 * 4 + i % 4 + i / 4 % 2 * 16]);
            }
        }
    }
}
#endif
