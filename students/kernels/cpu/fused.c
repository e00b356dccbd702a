// Gates, divergences and gradients of a training step, in one pass over activations, scores or logits where torch's
// operators would make ten.
//
// Compiled with kernels.c (see toolchain.py). Arithmetic is in float32; limits are first rounded to the tensors' type,
// in which torch would compare them.
//
// Sums choose factors, not terms: GCC 14.2 with -fno-trapping-math vectorises `sum += near ? a * b : 0` wrongly.

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "numbers.h"

// Writes to out x [N, I] with 0 where |x| < limit. limit [*, I]: one row for every `each` rows of x. share[n]: the
// share of channels kept.
#define CHANNEL_GATE(S, T)                                                                                       \
    void channel_gate_##S(const T *x, int64_t N, int64_t I, const float *limit, int64_t each, T *out,            \
                          float *share, int threads) {                                                           \
        _Pragma("omp parallel for num_threads(N * I > 65536 ? threads : 1)") for (int64_t n = 0; n < N; n++) {   \
            const T *from = x + n * I;                                                                           \
            const float *least = limit + n / each * I;                                                           \
            T *to = out + n * I;                                                                                 \
            int32_t count = 0;                                                                                   \
            for (int64_t i = 0; i < I; i++) {                                                                    \
                int keep = reaches_##S(from[i], least[i]);                                                       \
                to[i] = keep ? from[i] : 0;                                                                      \
                count += keep;                                                                                   \
            }                                                                                                    \
            share[n] = (float)count / I;                                                                         \
        }                                                                                                        \
    }

#define WIDE 512
#define LOW 0.6065306597126334f // exp(-1/2)
#define HIGH 1.6487212707001282f // exp(1/2)

// Returns how many adjacent channels a thread processes together: the more, the fewer pages are in use at a time.
static inline int64_t wide_of(int64_t I, int threads) {
    int64_t wide = (I / threads + 63) / 64 * 64;
    return wide < 64 ? 64 : wide > WIDE ? WIDE : wide;
}

// Gradients of CHANNEL_GATE: in[n, i] = grad[n, i] where x is kept, else 0; slope[g, i] -= grad x + by_share[n] / I,
// summed over the rows of x with LOW limit <= |x| < HIGH limit. Results go through local arrays, since compilers do not
// vectorise loops over arrays that may overlap.
#define CHANNEL_GATE_GRAD(S, T)                                                                                  \
    void channel_gate_grad_##S(const T *grad, const T *x, int64_t N, int64_t I, const float *limit,              \
                               int64_t each, const float *by_share, T *in, float *slope, int threads) {          \
        int64_t wide = wide_of(I, threads), parts = (I + wide - 1) / wide;                                       \
        _Pragma("omp parallel for num_threads(threads)") for (int64_t part = 0; part < parts; part++) {          \
            int64_t a = part * wide, m = a + wide < I ? wide : I - a;                                            \
            float least[WIDE], from[WIDE], to[WIDE], sum[WIDE] = {0};                                            \
            T by_x[WIDE];                                                                                        \
            for (int64_t n = 0; n < N; n++) {                                                                    \
                const T *v = x + n * I + a, *out = grad + n * I + a;                                             \
                int64_t group = n / each * I + a;                                                                \
                float price = by_share[n] / I;                                                                   \
                if (n % each == 0)                                                                               \
                    for (int64_t i = 0; i < m; i++) {                                                            \
                        least[i] = up_##S(down_##S(limit[group + i]));                                           \
                        from[i] = up_##S(down_##S(LOW * limit[group + i]));                                      \
                        to[i] = up_##S(down_##S(HIGH * limit[group + i]));                                       \
                    }                                                                                            \
                for (int64_t i = 0; i < m; i++) {                                                                \
                    float value = up_##S(v[i]), size = fabsf(value);                                             \
                    by_x[i] = size >= least[i] ? out[i] : 0;                                                     \
                    sum[i] += (size >= from[i]) & (size < to[i]) ? up_##S(out[i]) * value + price : 0;           \
                }                                                                                                \
                memcpy(in + n * I + a, by_x, sizeof(T) * m);                                                     \
                if ((n + 1) % each == 0)                                                                         \
                    for (int64_t i = 0; i < m; i++) slope[group + i] -= sum[i], sum[i] = 0;                      \
            }                                                                                                    \
        }                                                                                                        \
    }

// Writes the activations of x [m] and their derivatives; kind: 0 for SiLU, 1 for GELU with tanh.
static inline void activation(const float *x, int64_t m, int64_t kind, float *active, float *slope) {
    const float root = 0.797884561f, cube = 0.044715f;
    if (kind == 0)
        for (int64_t i = 0; i < m; i++) {
            float soft = 1 / (1 + expf_(-x[i]));
            active[i] = x[i] * soft;
            slope[i] = soft * (1 + x[i] * (1 - soft));
        }
    else
        for (int64_t i = 0; i < m; i++) {
            float v = x[i], soft = 1 - 2 / (1 + expf_(2 * root * (v + cube * v * v * v)));
            active[i] = 0.5f * v * (1 + soft);
            slope[i] = 0.5f * (1 + soft + v * (1 - soft * soft) * root * (1 + 3 * cube * v * v));
        }
}

// CHANNEL_GATE_GRAD for x = activation(gate) * up [N, I], which is recomputed. Writes the gradients by_gate and by_up
// [N, I], and slope.
#define GATED_GRAD(S, T)                                                                                         \
    void gated_grad_##S(const T *grad, const T *gate, const T *up, int64_t N, int64_t I, const float *limit,     \
                        int64_t each, const float *by_share, int64_t kind, T *by_gate, T *by_up, float *slope,   \
                        int threads) {                                                                           \
        int64_t wide = wide_of(I, threads), parts = (I + wide - 1) / wide;                                       \
        _Pragma("omp parallel for num_threads(threads)") for (int64_t part = 0; part < parts; part++) {          \
            int64_t a = part * wide, m = a + wide < I ? wide : I - a;                                            \
            float x[WIDE], active[WIDE], rise[WIDE], least[WIDE], from[WIDE], to[WIDE], sum[WIDE] = {0};         \
            T by_x[WIDE], by_y[WIDE];                                                                            \
            for (int64_t n = 0; n < N; n++) {                                                                    \
                const T *g = gate + n * I + a, *y = up + n * I + a, *out = grad + n * I + a;                     \
                int64_t group = n / each * I + a;                                                                \
                float price = by_share[n] / I;                                                                   \
                if (n % each == 0)                                                                               \
                    for (int64_t i = 0; i < m; i++) {                                                            \
                        least[i] = up_##S(down_##S(limit[group + i]));                                           \
                        from[i] = up_##S(down_##S(LOW * limit[group + i]));                                      \
                        to[i] = up_##S(down_##S(HIGH * limit[group + i]));                                       \
                    }                                                                                            \
                for (int64_t i = 0; i < m; i++) x[i] = up_##S(g[i]);                                             \
                activation(x, m, kind, active, rise);                                                            \
                for (int64_t i = 0; i < m; i++) {                                                                \
                    float gain = up_##S(down_##S(active[i])), other = up_##S(y[i]), slow = up_##S(out[i]);       \
                    float value = up_##S(down_##S(gain * other)), size = fabsf(value);                           \
                    float kept = size >= least[i] ? slow : 0;                                                    \
                    by_x[i] = down_##S(kept * other * rise[i]), by_y[i] = down_##S(kept * gain);                 \
                    sum[i] += (size >= from[i]) & (size < to[i]) ? slow * value + price : 0;                     \
                }                                                                                                \
                memcpy(by_gate + n * I + a, by_x, sizeof(T) * m), memcpy(by_up + n * I + a, by_y, sizeof(T) * m); \
                if ((n + 1) % each == 0)                                                                         \
                    for (int64_t i = 0; i < m; i++) slope[group + i] = -sum[i], sum[i] = 0;                      \
            }                                                                                                    \
        }                                                                                                        \
    }

// Writes to out exact [N, V] where preview >= limit[n], else preview + tail; share[n]: the share of exact logits.
#define ROW_GATE(S, T)                                                                                           \
    void row_gate_##S(const T *exact, const T *preview, int64_t N, int64_t V, const float *limit, float tail,    \
                      T *out, float *share, int threads) {                                                       \
        _Pragma("omp parallel for num_threads(threads)") for (int64_t n = 0; n < N; n++) {                       \
            const T *e = exact + n * V, *p = preview + n * V;                                                    \
            float least = up_##S(down_##S(limit[n]));                                                            \
            T *to = out + n * V;                                                                                 \
            int32_t count = 0;                                                                                   \
            for (int64_t v = 0; v < V; v++) {                                                                    \
                float guess = up_##S(p[v]);                                                                      \
                int keep = guess >= least;                                                                       \
                to[v] = keep ? e[v] : down_##S(guess + tail);                                                    \
                count += keep;                                                                                   \
            }                                                                                                    \
            share[n] = (float)count / V;                                                                         \
        }                                                                                                        \
    }

// Gradients of ROW_GATE: to_exact [N, V] is grad where the exact logit is kept, else 0; to_preview [N, V] is grad
// elsewhere; to_limit[n] and to_tail[n]. to_preview and by_share may be NULL.
#define ROW_GATE_GRAD(S, T)                                                                                      \
    void row_gate_grad_##S(const T *grad, const T *exact, const T *preview, int64_t N, int64_t V,                \
                           const float *limit, float tail, const float *by_share, T *to_exact, T *to_preview,    \
                           float *to_limit, float *to_tail, int threads) {                                       \
        _Pragma("omp parallel for num_threads(threads)") for (int64_t n = 0; n < N; n++) {                       \
            const T *g = grad + n * V, *e = exact + n * V, *p = preview + n * V;                                 \
            float least = up_##S(down_##S(limit[n])), low = up_##S(down_##S(limit[n] - 0.5f));                   \
            float high = up_##S(down_##S(limit[n] + 0.5f)), price = by_share ? by_share[n] / V : 0;              \
            float slope = 0, rest = 0;                                                                           \
            T *te = to_exact + n * V;                                                                            \
            for (int64_t v = 0; v < V; v++) {                                                                    \
                float guess = up_##S(p[v]), out = up_##S(g[v]);                                                  \
                int keep = guess >= least, near = (guess >= low) & (guess < high);                               \
                te[v] = keep ? g[v] : 0;                                                                         \
                rest += keep ? 0 : out;                                                                          \
                slope += (near ? up_##S(e[v]) - up_##S(down_##S(guess + tail)) : 0) * out + (near ? price : 0);  \
            }                                                                                                    \
            for (int64_t v = 0; to_preview && v < V; v++) to_preview[n * V + v] = up_##S(p[v]) >= least ? 0 : g[v]; \
            to_limit[n] = -slope, to_tail[n] = rest;                                                             \
        }                                                                                                        \
    }

#define LARGEST(S, T)                                                                                            \
    static float largest_##S(const T *x, int64_t V) {                                                            \
        float most = -INFINITY;                                                                                  \
        _Pragma("omp simd reduction(max : most)") /* not vectorised without the pragma */                        \
        for (int64_t v = 0; v < V; v++) most = up_##S(x[v]) > most ? up_##S(x[v]) : most;                        \
        return most;                                                                                             \
    }

// KL(p || q) [N] of teacher logits t and student logits s [N, V] at a temperature of 1, and the log-sum-exp of each
// row, logs [2, N]: student, teacher.
#define FORWARD_KL(S, T)                                                                                         \
    void forward_kl_##S(const T *s, const T *t, int64_t N, int64_t V, float *value, float *logs, int threads) {  \
        _Pragma("omp parallel for num_threads(threads)") for (int64_t n = 0; n < N; n++) {                       \
            const T *a = s + n * V, *b = t + n * V;                                                              \
            int same = !memcmp(a, b, V * sizeof(T)); /* else equal rows of unlike alignment sum differently */   \
            float most_a = largest_##S(a, V), most_b = largest_##S(b, V), sum_a = 0, sum_b = 0, apart = 0;       \
            for (int64_t v = 0; v < V; v++) {                                                                    \
                float x = up_##S(a[v]), y = up_##S(b[v]), p = expf_(y - most_b);                                 \
                sum_a += expf_(x - most_a), sum_b += p, apart += p * (y - x);                                    \
            }                                                                                                    \
            float log_a = most_a + logf(sum_a), log_b = same ? log_a : most_b + logf(sum_b);                     \
            float kl = same ? log_a - log_a : apart / sum_b - (log_b - log_a); /* NaN if logits are infinite */    \
            value[n] = kl, logs[n] = log_a, logs[N + n] = log_b;                                                 \
        }                                                                                                        \
    }

// Gradient of FORWARD_KL by s: (q - p) * by[n].
#define FORWARD_KL_GRAD(S, T)                                                                                    \
    void forward_kl_grad_##S(const T *s, const T *t, int64_t N, int64_t V, const float *logs, const float *by,   \
                             T *to, int threads) {                                                               \
        _Pragma("omp parallel for num_threads(threads)") for (int64_t n = 0; n < N; n++)                         \
            for (int64_t v = 0; v < V; v++)                                                                      \
                to[n * V + v] = down_##S((expf_(up_##S(s[n * V + v]) - logs[n])                                  \
                                          - expf_(up_##S(t[n * V + v]) - logs[N + n])) * by[n]);                 \
    }

// ROW_GATE and FORWARD_KL in one pass, with teacher logits t: the student's logits are never stored. Exact logit and
// preview are both loaded before one is chosen, since compilers do not vectorise conditional loads.
#define CHOSEN(S, v)                                                                                             \
    float guess = up_##S(p[v]), value_ = up_##S(e[v]), other = up_##S(down_##S(guess + tail)), y = up_##S(b[v]);  \
    int keep = guess >= least;                                                                                   \
    float x = keep ? value_ : other;
#define ROUTED_KL(S, T)                                                                                          \
    void routed_kl_##S(const T *exact, const T *preview, const T *t, int64_t N, int64_t V, const float *limit,   \
                       float tail, float *value, float *share, float *logs, int threads) {                       \
        _Pragma("omp parallel for num_threads(threads)") for (int64_t n = 0; n < N; n++) {                       \
            const T *e = exact + n * V, *p = preview + n * V, *b = t + n * V;                                    \
            float least = up_##S(down_##S(limit[n])), most_a = -INFINITY, most_b = -INFINITY;                    \
            float sum_a = 0, sum_b = 0, apart = 0;                                                               \
            int32_t count = 0, differ = 0;                                                                       \
            _Pragma("omp simd reduction(max : most_a, most_b) reduction(+ : count) reduction(| : differ)")       \
            for (int64_t v = 0; v < V; v++) {                                                                    \
                CHOSEN(S, v)                                                                                     \
                most_a = x > most_a ? x : most_a, most_b = y > most_b ? y : most_b;                              \
                count += keep, differ |= x != y;                                                                 \
            }                                                                                                    \
            _Pragma("omp simd reduction(+ : sum_a, sum_b, apart)") for (int64_t v = 0; v < V; v++) {             \
                CHOSEN(S, v)                                                                                     \
                float q = expf_(y - most_b);                                                                     \
                sum_a += expf_(x - most_a), sum_b += q, apart += q * (y - x);                                    \
            }                                                                                                    \
            float log_a = most_a + logf(sum_a), log_b = differ ? most_b + logf(sum_b) : log_a;                   \
            value[n] = differ ? apart / sum_b - (log_b - log_a) : log_a - log_a; /* NaN if logits are infinite */ \
            share[n] = (float)count / V, logs[n] = log_a, logs[N + n] = log_b;                                   \
        }                                                                                                        \
    }

// Gradients of ROUTED_KL, as of ROW_GATE and FORWARD_KL; exact and preview are overwritten with their gradients.
#define ROUTED_KL_GRAD(S, T)                                                                                     \
    void routed_kl_grad_##S(T *exact, T *preview, const T *t, int64_t N, int64_t V, const float *limit,          \
                            float tail, const float *logs, const float *by, const float *by_share,               \
                            float *to_limit, float *to_tail, int threads) {                                      \
        _Pragma("omp parallel for num_threads(threads)") for (int64_t n = 0; n < N; n++) {                       \
            T *restrict e = exact + n * V, *restrict p = preview + n * V;                                        \
            const T *restrict b = t + n * V;                                                                     \
            float least = up_##S(down_##S(limit[n])), low = up_##S(down_##S(limit[n] - 0.5f));                   \
            float high = up_##S(down_##S(limit[n] + 0.5f)), price = by_share[n] / V, slope = 0, rest = 0;        \
            float log_a = logs[n], log_b = logs[N + n], scale = by[n];                                           \
            for (int64_t v = 0; v < V; v++) {                                                                    \
                float guess = up_##S(p[v]), value = up_##S(e[v]), other = up_##S(down_##S(guess + tail));        \
                int keep = guess >= least, near = (guess >= low) & (guess < high);                               \
                T back = down_##S((expf_((keep ? value : other) - log_a) - expf_(up_##S(b[v]) - log_b)) * scale); \
                float out = up_##S(back);                                                                        \
                e[v] = keep ? back : 0, p[v] = keep ? 0 : back;                                                  \
                rest += keep ? 0 : out;                                                                          \
                slope += (near ? value - other : 0) * out + (near ? price : 0);                                  \
            }                                                                                                    \
            to_limit[n] = -slope, to_tail[n] = rest;                                                             \
        }                                                                                                        \
    }

// Gradient by x [N, D] of gain * x / sqrt(mean(x^2) + epsilon); grad: the gradient by that product.
#define RMS_NORM_GRAD(S, T)                                                                                      \
    void rms_norm_grad_##S(const T *grad, const T *x, int64_t N, int64_t D, const float *gain, float epsilon,    \
                           T *to, int threads) {                                                                 \
        _Pragma("omp parallel for num_threads(threads)") for (int64_t n = 0; n < N; n++) {                       \
            const T *g = grad + n * D, *v = x + n * D;                                                           \
            float squares = 0, along = 0;                                                                        \
            for (int64_t d = 0; d < D; d++) {                                                                    \
                float value = up_##S(v[d]);                                                                      \
                squares += value * value, along += value * up_##S(g[d]) * gain[d];                               \
            }                                                                                                    \
            float scale = 1 / sqrtf(squares / D + epsilon), back = along * scale * scale * scale / D;            \
            for (int64_t d = 0; d < D; d++)                                                                      \
                to[n * D + d] = down_##S(scale * up_##S(g[d]) * gain[d] - back * up_##S(v[d]));                  \
        }                                                                                                        \
    }

// Overwrites scores [N, K] with their softmax, and grad, the gradient by that softmax, with the gradient by the scores.
// tokens: 0, or T for causal attention: of every T rows the last sees all keys, the one before it one key fewer, etc.
#define SOFTMAX_GRAD(S, T)                                                                                       \
    void softmax_grad_##S(T *score, T *grad, int64_t N, int64_t K, int64_t tokens, int threads) {                \
        _Pragma("omp parallel for num_threads(threads)") for (int64_t n = 0; n < N; n++) {                       \
            T *s = score + n * K, *g = grad + n * K;                                                             \
            int64_t seen = tokens ? K - tokens + n % tokens + 1 : K;                                        \
            float most = largest_##S(s, seen), sum = 0, mean = 0;                                                \
            for (int64_t k = 0; k < seen; k++) {                                                                 \
                float e = expf_(up_##S(s[k]) - most);                                                            \
                sum += e, mean += e * up_##S(g[k]);                                                              \
            }                                                                                                    \
            mean /= sum;                                                                                         \
            for (int64_t k = 0; k < seen; k++) {                                                                 \
                float weight = expf_(up_##S(s[k]) - most) / sum;                                                 \
                s[k] = down_##S(weight), g[k] = down_##S(weight * (up_##S(g[k]) - mean));                        \
            }                                                                                                    \
            for (int64_t k = seen; k < K; k++) s[k] = g[k] = 0;                                                  \
        }                                                                                                        \
    }

#define KERNELS(S, T)                                                                                            \
    CHANNEL_GATE(S, T) CHANNEL_GATE_GRAD(S, T) GATED_GRAD(S, T) ROW_GATE(S, T) ROW_GATE_GRAD(S, T)               \
    LARGEST(S, T) FORWARD_KL(S, T) FORWARD_KL_GRAD(S, T) ROUTED_KL(S, T) ROUTED_KL_GRAD(S, T)            \
    RMS_NORM_GRAD(S, T) SOFTMAX_GRAD(S, T)

KERNELS(f32, float)
KERNELS(bf16, uint16_t)
