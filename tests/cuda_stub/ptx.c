/* Executes kernels in PTX, NVIDIA's virtual instruction set, on the CPU: programs one after the other, the warps of
 * each in turn until all wait at a barrier, the threads of a warp in step where they take the same way.
 *
 * A launch fails where a GPU's would, or where its result would be chance: an access to global memory outside of all
 * allocations, to shared memory beyond what was asked for, or not aligned to its size; a barrier, shuffle or matrix
 * product that not all threads reach. Shared memory starts as NaN. By turns, programs and warps run in reverse order,
 * and asynchronous copies arrive at once or as late as they may, so that a missing barrier or wait changes results. */
#include "ptx.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LANES 32
#define COPIES 512 /* of a thread on their way at a time */
#define SPECIAL 14 /* registers with places and sizes, in the order of ptx.py */

typedef struct Copy { uint64_t to, from; uint32_t bytes, filled; int group; } Copy;
typedef struct Warp {
    uint64_t *registers; /* [register][lane] */
    int32_t next[LANES];
    uint32_t alive;
    int together, group, copies[LANES];
    Copy copy[LANES][COPIES];
} Warp;
typedef struct Program {
    const Instruction *code;
    char *shared;
    uint64_t shared_size;
    const char *arguments;
    int early; /* whether copies arrive at once */
} Program;

int (*ptx_holds)(uint64_t address, uint64_t size); /* whether a kernel may access these bytes of global memory */
static __thread jmp_buf out;
static __thread char said[200], text[300];

void fail(const char *format, ...) {
    va_list rest;
    va_start(rest, format);
    vsnprintf(said, sizeof said, format, rest);
    longjmp(out, 1);
}

int ptx_number(const char *name, int of_type) {
    const char **all = of_type ? types : operations;
    for (int k = 0; all[k]; k++)
        if (!strcmp(all[k], name)) return k;
    return -1;
}

/* ---- memory ---- */

static char *global_at(uint64_t address, uint64_t size, uint64_t aligned) {
    if (address % aligned) fail("a global address is not aligned to %d bytes", (int)aligned);
    if (!ptx_holds(address, size)) fail("%d bytes of global memory are in no allocation", (int)size);
    return (char *)address;
}
static char *shared_at(const Program *p, uint64_t address, uint64_t size) {
    uint32_t at = address;
    if (at % size) fail("shared address %u is not aligned to %d bytes", at, (int)size);
    if (at + size > p->shared_size) fail("shared address %u is beyond %d bytes", at, (int)p->shared_size);
    return p->shared + at;
}
static uint64_t load(const char *at, int size) {
    uint64_t x = 0;
    memcpy(&x, at, size);
    return x;
}

static void arrive(const Program *p, const Copy *copy) {
    char *to = shared_at(p, copy->to, copy->bytes);
    if (copy->filled) memcpy(to, global_at(copy->from, copy->filled, copy->bytes), copy->filled);
    memset(to + copy->filled, 0, copy->bytes - copy->filled);
}
static void start_copy(const Program *p, Warp *w, int lane, const Copy *copy) {
    if (copy->filled > copy->bytes) fail("a copy that reads more than it writes");
    shared_at(p, copy->to, copy->bytes);
    if (p->early) arrive(p, copy);
    else if (w->copies[lane] == COPIES) fail("more than %d copies on their way", COPIES);
    else w->copy[lane][w->copies[lane]++] = *copy;
}
/* Let the copies of all groups of a thread arrive but of the newest few. */
static void wait_for(const Program *p, Warp *w, int lane, int open) {
    int kept = 0;
    for (int k = 0; k < w->copies[lane]; k++) {
        Copy copy = w->copy[lane][k];
        if (copy.group < w->group - open) arrive(p, &copy);
        else w->copy[lane][kept++] = copy;
    }
    w->copies[lane] = kept;
}

/* ---- what a warp does as one ---- */

#define R(operand) (w->registers + (size_t)i->at[operand] * LANES)
#define EACH for (int lane = 0; lane < LANES; lane++) if (mask >> lane & 1)

/* mode: up, down, bfly, idx (PTX ISA, "shfl.sync"); with a sixth operand, whether the lane read from is in reach. */
static void shuffle(const Instruction *i, Warp *w, uint32_t mask) {
    uint64_t made[LANES], reached[LANES];
    EACH {
        int by = R(2)[lane] & 31, clamp = R(3)[lane] & 31, segment = R(3)[lane] >> 8 & 31;
        int least = lane & segment, most = least | (clamp & ~segment);
        int from[] = {lane - by, lane + by, lane ^ by, least | (by & ~segment)};
        reached[lane] = i->mode ? from[i->mode] <= most : from[0] >= most;
        made[lane] = (uint32_t)R(1)[reached[lane] ? from[i->mode] : lane];
    }
    EACH {
        R(0)[lane] = made[lane];
        if (i->count == 6) R(5)[lane] = reached[lane];
    }
}

static void reduce(const Instruction *i, Warp *w, uint32_t mask) {
    static const int how[] = {ADD, MIN, MAX, AND, OR, XOR};
    Instruction step = *i;
    step.operation = how[i->mode], step.mode = 0;
    int some = 0;
    uint64_t sum = 0;
    EACH sum = some++ ? result(&step, sum, R(1)[lane], 0) : R(1)[lane];
    EACH R(0)[lane] = sum;
}

static void update(const Instruction *i, Warp *w, uint32_t mask) { /* mode: as in `reduce`, or 6: exchange */
    static const int how[] = {ADD, MIN, MAX, AND, OR, XOR};
    int size = size_of(i->type), returns = i->count == 3;
    Instruction step = *i;
    step.operation = how[i->mode % 6], step.mode = 0;
    EACH {
        char *at = global_at(R(returns)[lane] + i->offset, size, size);
        uint64_t old = load(at, size), x = R(returns + 1)[lane], new = i->mode == 6 ? x : result(&step, old, x, 0);
        memcpy(at, &new, size);
        if (returns) R(0)[lane] = old;
    }
}

static float factor(uint64_t x, int high, int type) { return number(type == tf32 ? x : x >> 16 * high & 0xffff, type); }

/* D = A B + C for fragments of m16n8k8 and m16n8k16 (PTX ISA, "Matrix Fragments for mma"); mode: 8 or 16. */
static void multiply(const Instruction *i, Warp *w) {
    int parts = i->source == tf32 ? 1 : 2; /* numbers in a register */
    int a_count = i->mode / 2 / parts, b_count = a_count / 2, d_count = i->type == f32 ? 4 : 2;
    float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < LANES; lane++) {
        int row = lane / 4, column = lane % 4;
        for (int k = 0; k < a_count * parts; k++) {
            int part = k / parts, high = k % parts;
            float x = factor(R(d_count + part)[lane], high, i->source);
            a[row + 8 * (part & 1)][column * parts + high + 4 * parts * (part >> 1)] = x;
        }
        for (int k = 0; k < b_count * parts; k++) {
            int part = k / parts, high = k % parts;
            float x = factor(R(d_count + a_count + part)[lane], high, i->source);
            b[column * parts + high + 4 * parts * part][row] = x;
        }
        for (int k = 0; k < 4; k++) {
            uint64_t x = R(d_count + a_count + b_count + k * d_count / 4)[lane];
            d[row + 8 * (k / 2)][2 * column + k % 2] = number(d_count == 4 ? x : x >> 16 * (k % 2) & 0xffff, i->type);
        }
    }
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 8; n++)
            for (int k = 0; k < i->mode; k++) d[m][n] += a[m][k] * b[k][n];
    for (int lane = 0; lane < LANES; lane++) {
        const float *first = &d[lane / 4][lane % 4 * 2], *second = &d[lane / 4 + 8][lane % 4 * 2];
        uint64_t x[4];
        for (int k = 0; k < 4; k++) x[k] = bits((k < 2 ? first : second)[k % 2], i->type);
        for (int k = 0; k < d_count; k++) R(k)[lane] = d_count == 4 ? x[k] : x[2 * k] | x[2 * k + 1] << 16;
    }
}

/* 8 x 8 numbers of 16 bits each, whose rows lanes 8 k ... 8 k + 7 name; mode: whether they are transposed. */
static void move_matrices(const Program *p, const Instruction *i, Warp *w) {
    int stores = i->operation == STMATRIX, parts = i->count - 1;
    for (int n = 0; n < parts * LANES * 2; n++) {
        int part = n / LANES / 2, lane = n / 2 % LANES, high = n % 2, row = lane / 4, column = lane % 4 * 2 + high;
        uint64_t address = R(stores ? 0 : parts)[8 * part + (i->mode ? column : row)] + i->offset;
        char *at = shared_at(p, address, 16) + 2 * (i->mode ? row : column);
        uint64_t *own = R(stores ? part + 1 : part) + lane;
        if (stores) memcpy(at, (char *)own + 2 * high, 2);
        else *own = load(at, 2) << 16 * high | (high ? *own & 0xffff : 0);
    }
}

/* ---- one instruction ---- */

static void access_memory(const Program *p, const Instruction *i, Warp *w, uint32_t mask) {
    int size = size_of(i->type), parts = i->count - 1, stores = i->operation == ST || i->operation == STS;
    EACH {
        uint64_t address = R(stores ? 0 : parts)[lane] + i->offset, all = size * parts;
        char *at = i->operation == LD || i->operation == ST ? global_at(address, all, all) : shared_at(p, address, all);
        for (int k = 0; k < parts; k++)
            if (stores) memcpy(at + k * size, &R(k + 1)[lane], size);
            else R(k)[lane] = integer(load(at + k * size, size), i->type);
    }
}

static void compare(const Instruction *i, Warp *w, uint32_t mask) {
    int half = i->type == f16x2 ? f16 : i->type == bf16x2 ? bf16 : 0;
    for (int high = 0; high < 2 && half; high++)
        EACH R(high)[lane] = compared(i, half, R(2)[lane] >> 16 * high & 0xffff, R(3)[lane] >> 16 * high & 0xffff);
    if (!half) EACH R(0)[lane] = compared(i, i->type, R(1)[lane], R(2)[lane]);
}

static void execute(const Program *p, const Instruction *i, Warp *w, uint32_t mask) {
    uint64_t part = i->mode == 64 ? ~0ull : (1ull << (i->mode & 63)) - 1; /* of PACK and UNPACK */
    switch (i->operation) {
    case NOP: break;
    case COMMIT: w->group++; break;
    case WAIT: EACH wait_for(p, w, lane, i->mode); break;
    case LDPARAM: EACH R(0)[lane] = integer(load(p->arguments + i->offset, size_of(i->type)), i->type); break;
    case LD: case LDS: case ST: case STS: access_memory(p, i, w, mask); break;
    case COPY: /* mode: offset of the shared address */
        EACH {
            uint32_t bytes = R(2)[lane], filled = i->count > 3 ? R(3)[lane] : bytes;
            start_copy(p, w, lane, &(Copy){R(0)[lane] + i->mode, R(1)[lane] + i->offset, bytes, filled, w->group});
        }
        break;
    case ATOM: update(i, w, mask); break;
    case SHFL: case REDUX: case LDMATRIX: case STMATRIX: case MMA:
        if (mask != w->alive) fail("%s is not reached by all threads", operations[i->operation]);
        if (i->operation == SHFL) shuffle(i, w, mask);
        else if (i->operation == REDUX) reduce(i, w, mask);
        else if (i->operation == MMA) multiply(i, w);
        else move_matrices(p, i, w);
        break;
    case MOV: EACH R(0)[lane] = R(1)[lane]; break;
    case PACK: /* mode: bits of a part */
        EACH {
            uint64_t made = 0;
            for (int k = 1; k < i->count; k++) made |= (R(k)[lane] & part) << (k - 1) * i->mode;
            R(0)[lane] = made;
        }
        break;
    case UNPACK:
        EACH {
            uint64_t x = R(i->count - 1)[lane];
            for (int k = 0; k < i->count - 1; k++) R(k)[lane] = x >> k * i->mode & part;
        }
        break;
    case SELP: EACH R(0)[lane] = R(3)[lane] & 1 ? R(1)[lane] : R(2)[lane]; break;
    case SETP: compare(i, w, mask); break;
    case CVT: EACH R(0)[lane] = converted(i, R(1)[lane], i->count > 2 ? R(2)[lane] : 0); break;
    default: EACH R(0)[lane] = result(i, R(1)[lane], i->count > 2 ? R(2)[lane] : 0, i->count > 3 ? R(3)[lane] : 0);
    }
}

/* Return the lanes that are furthest behind, and where; they run next, so that ways that part come together again. */
static uint32_t behind(Warp *w, int32_t *at) {
    if (w->together) {
        *at = w->next[__builtin_ctz(w->alive)];
        return w->alive;
    }
    uint32_t mask = w->alive;
    *at = INT32_MAX;
    EACH if (w->next[lane] < *at) *at = w->next[lane];
    EACH if (w->next[lane] != *at) mask &= ~(1u << lane);
    w->together = mask == w->alive;
    return mask;
}

/* Run a warp until it waits for others or is done. */
static void run_warp(const Program *p, Warp *w, const Instruction **here) {
    while (w->alive) {
        int32_t at;
        uint32_t all = behind(w, &at), mask = all;
        const Instruction *i = *here = p->code + at;
        if (i->guard >= 0)
            for (int lane = 0; lane < LANES; lane++)
                if ((w->registers[(size_t)i->guard * LANES + lane] & 1) == (uint64_t)i->inverted) mask &= ~(1u << lane);
        for (int lane = 0; lane < LANES; lane++)
            if (all >> lane & 1) w->next[lane] = i->operation == BRA && mask >> lane & 1 ? (int32_t)i->offset : at + 1;
        if (i->operation == BRA) {
            if (mask && mask != all) w->together = 0;
        } else if (i->operation == RET) {
            w->alive &= ~mask;
        } else if (i->operation == BAR) {
            if (mask != w->alive) fail("a barrier is not reached by all threads");
            if (!i->mode) return; /* else of this warp alone */
        } else {
            execute(p, i, w, mask);
        }
    }
}

/* ---- launches ---- */

typedef struct Kernel {
    const Instruction *code;
    int32_t registers, constants;
    const int32_t *special;
    const int64_t *constant; /* pairs of a register and its value */
} Kernel;

static void begin_warp(const Kernel *kernel, Warp *w, uint32_t number, uint64_t program, const uint32_t *grid,
                       const uint32_t *block) {
    uint32_t left = block[0] * block[1] * block[2] - number * LANES;
    w->together = 1, w->group = 0;
    w->alive = left >= LANES ? UINT32_MAX : (1u << left) - 1;
    memset(w->next, 0, sizeof w->next);
    memset(w->copies, 0, sizeof w->copies);
    memset(w->registers, 0xfe, (size_t)kernel->registers * LANES * sizeof *w->registers);
    for (uint32_t lane = 0; lane < LANES; lane++) {
        uint64_t n = number * LANES + lane;
        uint64_t place[SPECIAL] = {
            n % block[0], n / block[0] % block[1], n / block[0] / block[1],
            program % grid[0], program / grid[0] % grid[1], program / grid[0] / grid[1],
            block[0], block[1], block[2], grid[0], grid[1], grid[2], lane, number};
        for (int k = 0; k < kernel->constants; k++)
            w->registers[kernel->constant[2 * k] * LANES + lane] = kernel->constant[2 * k + 1];
        for (int k = 0; k < SPECIAL; k++)
            if (kernel->special[k] >= 0) w->registers[kernel->special[k] * LANES + lane] = place[k];
    }
}

/* Run a kernel and return 0, or what went wrong; turn: the number of the launch, on which orders depend. */
const char *ptx_launch(const Kernel *kernel, const uint32_t *grid, const uint32_t *block, uint64_t shared,
                       const char *arguments, long turn) {
    uint32_t warps = (block[0] * block[1] * block[2] + LANES - 1) / LANES;
    uint64_t programs = (uint64_t)grid[0] * grid[1] * grid[2];
    Program p = {kernel->code, malloc(shared + 1), shared, arguments, 0};
    Warp *all = calloc(warps, sizeof *all);
    uint64_t *memory = malloc((size_t)warps * kernel->registers * LANES * sizeof *memory);
    const Instruction *volatile here = kernel->code;
    const char *wrong = 0;
    if (setjmp(out)) {
        snprintf(text, sizeof text, "line %d: %s", here->line, said);
        wrong = text;
    } else {
        for (uint64_t n = 0; n < programs; n++) {
            uint64_t program = turn & 1 ? programs - 1 - n : n;
            uint32_t back = (turn + n) >> 1 & 1, left = warps;
            p.early = (turn + n) & 1;
            memset(p.shared, 0xff, shared);
            for (uint32_t k = 0; k < warps; k++) {
                all[k].registers = memory + (size_t)k * kernel->registers * LANES;
                begin_warp(kernel, all + k, k, program, grid, block);
            }
            while (left) {
                left = 0;
                for (uint32_t k = 0; k < warps; k++) {
                    Warp *w = all + (back ? warps - 1 - k : k);
                    run_warp(&p, w, (const Instruction **)&here);
                    left += w->alive != 0;
                }
            }
        }
    }
    free(memory);
    free(all);
    free(p.shared);
    return wrong;
}
