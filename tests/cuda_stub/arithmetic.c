/* The arithmetic of PTX. Numbers of 16 bits are computed in double and rounded once; `approx` and `ftz` are exact. */
#include "ptx.h"

#include <math.h>
#include <string.h>

const char *operations[] = {OPERATIONS(NAME) 0}, *types[] = {TYPES(NAME) 0};

static float as_float(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }
static uint32_t as_bits(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }
static float from_half(uint16_t x) { _Float16 y; memcpy(&y, &x, 2); return (float)y; }
static uint16_t to_half(double x) { _Float16 y = (_Float16)x; uint16_t z; memcpy(&z, &y, 2); return z; }
static uint16_t to_bfloat(double x) {
    if (x != x) return 0x7fff;
    uint32_t near = as_bits((float)x);
    double y = as_float(near);
    if (y != x) near = (fabs(y) > fabs(x) ? near - 1 : near) | 1; /* to odd, so that the next rounding is right */
    return (near + 0x7fff + (near >> 16 & 1)) >> 16;
}

int size_of(int type) {
    switch (type) {
    case b8: case u8: case s8: return 1;
    case b16: case u16: case s16: case f16: case bf16: return 2;
    case b64: case u64: case s64: case f64: return 8;
    default: return 4;
    }
}
static int is_float(int type) { return type >= f16 && type <= tf32; }
static int is_signed(int type) { return type >= s8 && type <= s64; }

double number(uint64_t x, int type) {
    double y;
    switch (type) {
    case f16: return from_half(x);
    case bf16: return as_float((uint32_t)(x & 0xffff) << 16);
    case f64: memcpy(&y, &x, 8); return y;
    default: return as_float(x);
    }
}

uint64_t bits(double x, int type) {
    uint64_t y;
    switch (type) {
    case f16: return to_half(x);
    case bf16: return to_bfloat(x);
    case f64: memcpy(&y, &x, 8); return y;
    default: return as_bits((float)x);
    }
}

int64_t integer(uint64_t x, int type) {
    switch (type) {
    case s8: return (int8_t)x;
    case s16: return (int16_t)x;
    case s32: return (int32_t)x;
    case s64: case u64: case b64: return x;
    case b8: case u8: return (uint8_t)x;
    case b16: case u16: return (uint16_t)x;
    case pred: return x & 1;
    default: return (uint32_t)x;
    }
}

static uint64_t cut(uint64_t x, int type) {
    if (type == pred) return x & 1;
    int size = size_of(type);
    return size == 8 ? x : x & ((1ull << 8 * size) - 1);
}

/* Whether the first of two integers is less. */
static int less(int64_t x, int64_t y, int type) {
    return type == u64 || type == b64 ? (uint64_t)x < (uint64_t)y : x < y;
}

static float of_floats(int operation, float x, float y, float z) {
    switch (operation) {
    case ADD: return x + y;
    case SUB: return x - y;
    case MUL: return x * y;
    case DIV: return x / y;
    case FMA: return fmaf(x, y, z);
    case EX2: return exp2f(x);
    case LG2: return log2f(x);
    case RSQRT: return 1 / sqrt((double)x);
    case RCP: return 1 / x;
    case SQRT: return sqrtf(x);
    case SIN: return sinf(x);
    case COS: return cosf(x);
    case TANH: return tanhf(x);
    }
    fail("no arithmetic for %s of floats", operations[operation]);
}

static double of_doubles(int operation, double x, double y, double z) {
    switch (operation) {
    case ADD: return x + y;
    case SUB: return x - y;
    case MUL: return x * y;
    case DIV: return x / y;
    case FMA: return fma(x, y, z);
    }
    fail("no arithmetic for %s of doubles", operations[operation]);
}

/* mode of MIN and MAX: 1 where a NaN is handed on. */
static uint64_t float_result(const Instruction *i, int type, uint64_t a, uint64_t b, uint64_t c) {
    double x = number(a, type), y = number(b, type), z = number(c, type);
    uint64_t sign = 1ull << (8 * size_of(type) - 1);
    switch (i->operation) {
    case ABS: return a & ~sign;
    case NEG: return a ^ sign;
    case MIN: case MAX:
        if (x != x || y != y) return bits(i->mode || (x != x && y != y) ? NAN : x != x ? y : x, type);
        return bits((i->operation == MIN) == (x < y) ? x : y, type);
    case EX2: case TANH: return bits(of_floats(i->operation, x, 0, 0), type);
    }
    return type == f32 ? as_bits(of_floats(i->operation, x, y, z)) : bits(of_doubles(i->operation, x, y, z), type);
}

/* mode of MUL and MAD: 0 the low half of the product, 1 the high half, 2 all of it. */
static uint64_t product(const Instruction *i, int64_t x, int64_t y) {
    if (i->mode != 1) return i->mode ? (uint64_t)x * (uint64_t)y : cut((uint64_t)x * (uint64_t)y, i->type);
    if (size_of(i->type) < 8) return cut((uint64_t)(x * y) >> 8 * size_of(i->type), i->type);
    return is_signed(i->type) ? (__int128)x * y >> 64 : (unsigned __int128)(uint64_t)x * (uint64_t)y >> 64;
}

static uint64_t shifted(const Instruction *i, int64_t x, uint32_t by) {
    int width = 8 * size_of(i->type);
    if (is_signed(i->type)) return cut(x >> (by < 63 ? by : 63), i->type);
    return by >= (uint32_t)width ? 0 : cut((uint64_t)x >> by, i->type);
}

static uint64_t field(const Instruction *i, int64_t x, int at, int length) {
    if (!length) return 0;
    uint64_t part = is_signed(i->type) ? x >> (at < 63 ? at : 63) : at > 63 ? 0 : (uint64_t)x >> at;
    if (length >= 8 * size_of(i->type)) return cut(part, i->type);
    part &= (1ull << length) - 1;
    return cut(is_signed(i->type) && part >> (length - 1) ? part | ~0ull << length : part, i->type);
}

static uint64_t permuted(uint64_t bytes, int how) {
    uint64_t made = 0;
    for (int k = 0; k < 4; k++) {
        uint64_t byte = bytes >> 8 * (how >> 4 * k & 7) & 255;
        made |= (how >> 4 * k & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * k;
    }
    return made;
}

static uint64_t integer_result(const Instruction *i, uint64_t a, uint64_t b, uint64_t c) {
    int type = i->type;
    int64_t x = integer(a, type), y = integer(b, type);
    switch (i->operation) {
    case ADD: return cut(x + y, type);
    case SUB: return cut(x - y, type);
    case MUL: return product(i, x, y);
    case MAD: return i->mode == 2 ? product(i, x, y) + c : cut(product(i, x, y) + c, type);
    case DIV: return cut(!y ? -1 : is_signed(type) ? (uint64_t)(x / y) : (uint64_t)x / (uint64_t)y, type);
    case REM: return cut(!y ? x : is_signed(type) ? (uint64_t)(x % y) : (uint64_t)x % (uint64_t)y, type);
    case MIN: return less(x, y, type) ? a : b;
    case MAX: return less(x, y, type) ? b : a;
    case ABS: return cut(x < 0 ? -x : x, type);
    case NEG: return cut(-x, type);
    case AND: return cut(a & b, type);
    case OR: return cut(a | b, type);
    case XOR: return cut(a ^ b, type);
    case NOT: return cut(~a, type);
    case POPC: return __builtin_popcountll(cut(a, type));
    case SHL: return (uint32_t)b >= 8u * size_of(type) ? 0 : cut(a << (uint32_t)b, type);
    case SHR: return shifted(i, x, b);
    case BFE: return field(i, x, b & 255, c & 255);
    case PRMT: return permuted(b << 32 | (uint32_t)a, c);
    }
    fail("no arithmetic for %s.%s", operations[i->operation], types[type]);
}

uint64_t result(const Instruction *i, uint64_t a, uint64_t b, uint64_t c) {
    int logic = i->operation == AND || i->operation == OR || i->operation == XOR || i->operation == NOT;
    Instruction half = *i;
    switch (i->type) {
    case f16x2: case bf16x2: case s16x2: case u16x2:
        half.type = i->type == f16x2 ? f16 : i->type == bf16x2 ? bf16 : i->type == s16x2 ? s16 : u16;
        return result(&half, a & 0xffff, b & 0xffff, c & 0xffff) |
               result(&half, a >> 16 & 0xffff, b >> 16 & 0xffff, c >> 16 & 0xffff) << 16;
    }
    return is_float(i->type) && !logic ? float_result(i, i->type, a, b, c) : integer_result(i, a, b, c);
}

/* mode: eq ne lt le gt ge; from 6 on the same, and true where a number is NaN. */
int compared(const Instruction *i, int type, uint64_t a, uint64_t b) {
    int equal, below;
    if (is_float(type)) {
        double x = number(a, type), y = number(b, type);
        if (x != x || y != y) return i->mode >= 6;
        equal = x == y, below = x < y;
    } else {
        int64_t x = integer(a, type), y = integer(b, type);
        equal = x == y, below = less(x, y, type);
    }
    switch (i->mode % 6) {
    case 0: return equal;
    case 1: return !equal;
    case 2: return below;
    case 3: return below || equal;
    case 4: return !below && !equal;
    default: return !below;
    }
}

/* mode, of integers among the floats: 0 none, 2 down, 3 up, 4 to nearest, 5 towards zero. */
static double rounded(int mode, double x) {
    switch (mode) {
    case 2: return floor(x);
    case 3: return ceil(x);
    case 4: return rint(x);
    case 5: return trunc(x);
    default: return x;
    }
}

static uint64_t to_integer(double x, int type) {
    int width = 8 * size_of(type) - is_signed(type);
    double high = ldexp(1, width), low = is_signed(type) ? -high : 0;
    if (x != x) return 0;
    if (x >= high) return width == 64 ? UINT64_MAX : (1ull << width) - 1;
    if (x <= low) return cut((int64_t)low, type);
    return cut(is_signed(type) ? (uint64_t)(int64_t)x : (uint64_t)x, type);
}

uint64_t converted(const Instruction *i, uint64_t a, uint64_t b) {
    int to = i->type, from = i->source, large = from == u64 || from == b64;
    if (to == f16x2 || to == bf16x2) {
        int half = to == f16x2 ? f16 : bf16;
        return bits(number(b, from), half) | bits(number(a, from), half) << 16;
    }
    if (to == tf32) return (as_bits(number(a, from)) + 0x1000) & 0xffffe000;
    if (is_float(from)) {
        double x = rounded(i->mode, number(a, from));
        return is_float(to) ? bits(x, to) : to_integer(x, to);
    }
    int64_t x = integer(a, from);
    if (to == f32) return as_bits(large ? (float)(uint64_t)x : (float)x);
    return is_float(to) ? bits(large ? (double)(uint64_t)x : (double)x, to) : cut(x, to);
}
