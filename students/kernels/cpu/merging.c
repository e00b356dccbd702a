// Merging of the patches of an image model into the patches most similar to them (see ../merging.py), image by image.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "numbers.h"

// Returns the largest a . b[j] over `count` rows of b, which are `stride` apart, and writes its j; four rows at a time
static float most_alike(const float *a, const float *b, int64_t count, int64_t stride, int64_t D, int64_t *which) {
    float best = -INFINITY;
    for (int64_t j = 0; j < count; j += 4) {
        const float *row[4];
        for (int i = 0; i < 4; i++) row[i] = b + (j + i < count ? j + i : j) * stride;
        float sum[4] = {0, 0, 0, 0};
        for (int64_t k = 0; k < D; k++) {
            sum[0] += a[k] * row[0][k];
            sum[1] += a[k] * row[1][k];
            sum[2] += a[k] * row[2][k];
            sum[3] += a[k] * row[3][k];
        }
        for (int i = 0; i < 4 && j + i < count; i++)
            if (sum[i] > best) best = sum[i], *which = j + i;
    }
    return best;
}

// How many of n tokens stay, prefix included, where `wanted` patches are wanted: as `in_multiples` of ../merging.py
static int64_t in_multiples(int64_t wanted, int64_t n, int64_t prefix, int64_t multiple) {
    int64_t patches = n - prefix, least = prefix + (patches + 1) / 2, whole = prefix + wanted;
    if (least >= 3 * multiple) least = (least + multiple - 1) / multiple * multiple;
    if (wanted >= patches) return n;
    if (whole >= multiple) whole = multiple * (int64_t)rint((double)whole / multiple);
    if (!prefix && whole < 1) whole = 1;
    whole = whole > n ? n : whole;
    return whole > least ? whole : least;
}

// Merges the tokens x [n, D] of one image. Behind the prefix every other patch may leave: the n - keep with the lowest
// scores leave or, if keep is negative, those with a score below -shift, as far as multiples allow. weight [D], bias
// and apart (the distance's weight) are the router's; top [prefix]: the prefix's scores; never: the score of a patch
// that may not leave; size and before [n] may be NULL (1, infinity). Writes tokens, sizes, scores and old indices of
// the tokens that stay, in order, and into [n], the old index of the token that each token is now part of. Returns how
// many stay.
#define MERGE_ONE(S, T)                                                                                                \
    static int64_t merge_one_##S(const T *x, int64_t n, int64_t D, const float *size, const float *before,             \
                                 const float *weight, float bias, float apart, const float *top, float never,          \
                                 int64_t prefix, int64_t keep, float shift, int64_t multiple, T *out, float *out_size, \
                                 float *out_score, int64_t *index, int64_t *into) {                                    \
        int64_t patches = n - prefix, going = (patches + 1) / 2, taking = patches / 2;                                 \
        float *unit = malloc(sizeof(float) * (patches * D + 2 * n + D)), *rank = unit + patches * D;                   \
        float *total = rank + n, *sum = total + n;                                                                     \
        for (int64_t p = 0; p < patches; p++) {                                                                        \
            const T *row = x + (prefix + p) * D;                                                                       \
            float square = 0, score = 0;                                                                               \
            for (int64_t k = 0; k < D; k++) {                                                                          \
                square += up_##S(row[k]) * up_##S(row[k]);                                                             \
                score += up_##S(row[k]) * weight[k];                                                                   \
            }                                                                                                          \
            float length = sqrtf(square), scale = 1 / fmaxf(length, 1e-12f);                                           \
            for (int64_t k = 0; k < D; k++) unit[p * D + k] = up_##S(row[k]) * scale;                                  \
            rank[prefix + p] = p % 2 ? never : score * sqrtf(D) / fmaxf(length, 1e-6f) + bias;                         \
        }                                                                                                              \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            if (i < prefix) rank[i] = top[i];                                                                          \
            total[i] = size ? size[i] : 1;                                                                             \
            into[i] = i;                                                                                               \
        }                                                                                                              \
        for (int64_t g = 0; g < going; g++) {                                                                          \
            int64_t partner = 0, i = prefix + 2 * g;                                                                   \
            if (!taking) { rank[i] = never; break; } /* there is no patch to merge into */                             \
            float best = most_alike(unit + 2 * g * D, unit + D, taking, 2 * D, D, &partner);                           \
            rank[i] += apart * logf(fmaxf(1 - best, 1e-3f));                                                           \
            into[i] = prefix + 2 * partner + 1;                                                                        \
        }                                                                                                              \
        if (before)                                                                                                    \
            for (int64_t i = 0; i < n; i++) rank[i] = fminf(rank[i], before[i]);                                       \
        if (keep < 0) {                                                                                                \
            int64_t wanted = taking;                                                                                   \
            for (int64_t i = prefix; i < n; i += 2) wanted += rank[i] + shift >= 0;                                    \
            keep = in_multiples(wanted, n, prefix, multiple);                                                          \
        }                                                                                                              \
        char *leaves = calloc(n, 1);                                                                                   \
        for (int64_t left = n; left > keep; left--) {                                                                  \
            int64_t lowest = -1;                                                                                       \
            for (int64_t i = prefix; i < n; i += 2)                                                                    \
                if (!leaves[i] && (lowest < 0 || rank[i] < rank[lowest])) lowest = i;                                  \
            leaves[lowest] = 1;                                                                                        \
            total[into[lowest]] += size ? size[lowest] : 1;                                                            \
        }                                                                                                              \
        int64_t place = 0;                                                                                             \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            if (leaves[i]) continue;                                                                                   \
            into[i] = i;                                                                                               \
            const T *own = x + i * D;                                                                                  \
            int alone = 1;                                                                                             \
            for (int64_t g = prefix; g < n; g += 2) {                                                                  \
                if (!leaves[g] || into[g] != i) continue;                                                              \
                const T *other = x + g * D;                                                                            \
                float share = (size ? size[g] : 1) / total[i];                                                         \
                if (alone)                                                                                             \
                    for (int64_t k = 0; k < D; k++) sum[k] = up_##S(own[k]);                                           \
                for (int64_t k = 0; k < D; k++) sum[k] += share * (up_##S(other[k]) - up_##S(own[k]));                 \
                alone = 0;                                                                                             \
            }                                                                                                          \
            if (alone)                                                                                                 \
                memcpy(out + place * D, own, sizeof(T) * D);                                                           \
            else                                                                                                       \
                for (int64_t k = 0; k < D; k++) out[place * D + k] = down_##S(sum[k]);                                 \
            out_size[place] = total[i];                                                                                \
            out_score[place] = rank[i];                                                                                \
            index[place++] = i;                                                                                        \
        }                                                                                                              \
        free(leaves);                                                                                                  \
        free(unit);                                                                                                    \
        return place;                                                                                                  \
    }

// MERGE_ONE for B images, of which `keep` tokens each stay; bias and apart point to the router's parameters
#define MERGE_LOWEST(S, T)                                                                                             \
    void merge_lowest_##S(const T *x, int64_t B, int64_t n, int64_t D, const float *size, const float *before,         \
                          const float *weight, const float *bias, const float *apart, const float *top, float never,   \
                          int64_t prefix, int64_t keep, T *out, float *out_size, float *out_score, int64_t *index,     \
                          int64_t *into, int threads) {                                                                \
        _Pragma("omp parallel for num_threads(threads) if (B > 1)")                                                    \
        for (int64_t b = 0; b < B; b++)                                                                                \
            merge_one_##S(x + b * n * D, n, D, size ? size + b * n : NULL, before ? before + b * n : NULL, weight,     \
                          *bias, *apart, top, never, prefix, keep, 0, 1, out + b * keep * D, out_size + b * keep,      \
                          out_score + b * keep, index + b * keep, into + b * n);                                       \
    }

// MERGE_ONE for B images padded to n tokens, each with its own length and shift. Results have n places an image: the
// tokens that stay, then all others, with size 1 and score -infinity. count[b]: how many stay
#define MERGE_BELOW(S, T)                                                                                              \
    void merge_below_##S(const T *x, int64_t B, int64_t n, int64_t D, const float *size, const float *before,          \
                         const float *weight, const float *bias, const float *apart, const float *top, float never,    \
                         int64_t prefix, const int64_t *length, const float *shift, int64_t multiple, T *out,          \
                         float *out_size, float *out_score, int64_t *index, int64_t *into, int64_t *count,             \
                         int threads) {                                                                                \
        _Pragma("omp parallel for num_threads(threads) if (B > 1)")                                                    \
        for (int64_t b = 0; b < B; b++) {                                                                              \
            int64_t s = b * n, kept = merge_one_##S(                                                                   \
                x + s * D, length[b], D, size ? size + s : NULL, before ? before + s : NULL, weight, *bias, *apart,    \
                top, never, prefix, -1, shift[b], multiple, out + s * D, out_size + s, out_score + s, index + s,       \
                into + s);                                                                                             \
            count[b] = kept;                                                                                           \
            for (int64_t i = 0; i < n; i++) {                                                                          \
                if (i >= length[b]) into[s + i] = i;                                                                   \
                if (i < length[b] && into[s + i] == i) continue;                                                       \
                memcpy(out + (s + kept) * D, x + (s + i) * D, sizeof(T) * D);                                          \
                out_size[s + kept] = 1;                                                                                \
                out_score[s + kept] = -INFINITY;                                                                       \
                index[s + kept++] = i;                                                                                 \
            }                                                                                                          \
        }                                                                                                              \
    }

MERGE_ONE(f32, float)
MERGE_ONE(bf16, uint16_t)
MERGE_LOWEST(f32, float)
MERGE_LOWEST(bf16, uint16_t)
MERGE_BELOW(f32, float)
MERGE_BELOW(bf16, uint16_t)
