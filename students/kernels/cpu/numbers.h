// Conversions, comparison and exponential for float32, and for bfloat16 held in uint16_t: the upper half of a float32.

#include <stdint.h>
#include <string.h>

#if defined(__AMX_TILE__) && !defined(__clang__)  // GCC prefers vectors of 256 bits on Intel's CPUs
#pragma GCC target("prefer-vector-width=512")
#endif

static inline float up_f32(float v) { return v; }
static inline float down_f32(float v) { return v; }
static inline float up_bf16(uint16_t v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static inline uint16_t down_bf16(float f) {  // rounds to nearest even
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Whether |v| >= limit; limit is not negative, and first rounded to v's type. bfloat16 is compared as an integer
static inline int reaches_f32(float v, float limit) { return (v < 0 ? -v : v) >= limit; }
static inline int reaches_bf16(uint16_t v, float limit) { return (v & 0x7fff) >= down_bf16(limit); }

// e^x to about one part in ten million, in a form that compilers vectorise; below -87 it is 2^-125.
static inline float expf_(float x) {
    x = x < -87.f ? -87.f : x > 88.f ? 88.f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = __builtin_fmaf(n, -0.693145752f, x);
    r = __builtin_fmaf(n, -1.42860677e-6f, r);
    float p = 1.98756915e-4f;
    p = __builtin_fmaf(p, r, 1.39819995e-3f);
    p = __builtin_fmaf(p, r, 8.33345191e-3f);
    p = __builtin_fmaf(p, r, 4.16657962e-2f);
    p = __builtin_fmaf(p, r, 1.66666655e-1f);
    p = __builtin_fmaf(p, r, 5.00000012e-1f);
    p = __builtin_fmaf(p * r, r, r) + 1.f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}
