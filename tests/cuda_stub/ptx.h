/* Instructions of PTX as ptx.py encodes them, and their arithmetic (arithmetic.c). */
#include <stdint.h>

#define MOST 20 /* operands of an instruction */
#define OPERATIONS(X) \
    X(ABS) X(ADD) X(AND) X(ATOM) X(BAR) X(BFE) X(BRA) X(COMMIT) X(COPY) X(COS) X(CVT) X(DIV) X(EX2) X(FMA) X(LD) \
    X(LDMATRIX) X(LDPARAM) X(LDS) X(LG2) X(MAD) X(MAX) X(MIN) X(MMA) X(MOV) X(MUL) X(NEG) X(NOP) X(NOT) X(OR) X(PACK) \
    X(POPC) X(PRMT) X(RCP) X(REDUX) X(REM) X(RET) X(RSQRT) X(SELP) X(SETP) X(SHFL) X(SHL) X(SHR) X(SIN) X(SQRT) X(ST) \
    X(STMATRIX) X(STS) X(SUB) X(TANH) X(UNPACK) X(WAIT) X(XOR)
#define TYPES(X) \
    X(pred) X(b8) X(b16) X(b32) X(b64) X(u8) X(u16) X(u32) X(u64) X(s8) X(s16) X(s32) X(s64) X(f16) X(bf16) X(f32) \
    X(f64) X(f16x2) X(bf16x2) X(tf32) X(u16x2) X(s16x2)
#define NAME(x) #x,
#define ITEM(x) x,
enum { OPERATIONS(ITEM) };
enum { TYPES(ITEM) };

typedef struct Instruction {
    int32_t operation, type, source; /* source: type of what is converted, or of a product's factors */
    int32_t mode;                    /* a comparison, a rounding, the bits of a part ...: see where it is read */
    int32_t guard, inverted;         /* register of the predicate under which it runs, or -1 */
    int32_t line, count;             /* line of the kernel's source; number of operands */
    int64_t offset;                  /* of an address; the target of a branch */
    int32_t at[MOST];                /* registers: results, then operands */
} Instruction;

int size_of(int type); /* in bytes */
double number(uint64_t bits, int type);
uint64_t bits(double number, int type); /* rounded to nearest */
int64_t integer(uint64_t bits, int type);
uint64_t result(const Instruction *i, uint64_t a, uint64_t b, uint64_t c);
uint64_t converted(const Instruction *i, uint64_t a, uint64_t b);
int compared(const Instruction *i, int type, uint64_t a, uint64_t b);

void fail(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2))); /* ends the launch */
extern const char *operations[], *types[];
