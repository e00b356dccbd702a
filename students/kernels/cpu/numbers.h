// float32, and bfloat16 held in uint16_t: the upper half of a float32.

#include <stdint.h>
#include <string.h>

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

// |v| >= limit, which is not negative and first rounded to v's type; bfloat16 compares as an integer does
static inline int reaches_f32(float v, float limit) { return (v < 0 ? -v : v) >= limit; }
static inline int reaches_bf16(uint16_t v, float limit) { return (v & 0x7fff) >= down_bf16(limit); }
