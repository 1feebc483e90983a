// What the kernels share. No header of CUDA is needed: bf16 is handled as its 16 bits.
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }
__device__ __forceinline__ float from_bf16(u16 v) { return __uint_as_float((u32)v << 16); }

__device__ __forceinline__ u32 bf16_pair(float a, float b) {  // a in the lower half
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    return r;
}
__device__ __forceinline__ u16 to_bf16(float v) { return (u16)bf16_pair(v, 0.f); }

__device__ __forceinline__ float half_low(u32 pair) {
    float r;
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(r) : "r"(pair));
    return r;
}
__device__ __forceinline__ float half_high(u32 pair) {
    float r;
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(r) : "r"(pair));
    return r;
}

__device__ __forceinline__ float squared(u32 pair) {
    return low(pair) * low(pair) + high(pair) * high(pair);
}
__device__ __forceinline__ u32 times(u32 a, u32 b) {
    return bf16_pair(low(a) * low(b), high(a) * high(b));
}

// Eight 4-bit fields lie in a word, the highest bit of each turned over: as numbers of two's
// complement they are fields less 8. Turned right by 4 i, fields i and i + 4 are the last bits of both
// halves.
__device__ __forceinline__ u32 turned(u32 word, int bits) {
    return __funnelshift_r(word, word, bits);
}
// The last bits of both halves as bf16 integers 128 + field.
__device__ __forceinline__ u32 raised(u32 word) {
    u32 r;
    asm("lop3.b32 %0, %1, 0x000F000F, 0x43084308, 0x6A;" : "=r"(r) : "r"(word));  // and, xor
    return r;
}
// Less their zero points: `minus` is -(128 + zero); the difference is exact.
__device__ __forceinline__ u32 integers(u32 word, u32 minus) {
    u32 r = raised(word);
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(r), "r"(0x3F803F80u), "r"(minus));
    return r;
}
#define MINUS_136 0xC308C308u  // -(128 + 8), where all zero points are 8

__device__ __forceinline__ void mma(
    float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Integers of 8 bits with signs, four a word: 16 x 32 times 32 x 8.
__device__ __forceinline__ void mma_bytes(
    int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same where the left operand has no signs, or the right one has none.
__device__ __forceinline__ void mma_left_unsigned(
    int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_right_unsigned(
    int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Every second field of eight as bytes, and the others as bytes that are 16 times them.
__device__ __forceinline__ u32 even_fields(u32 word) {
    u32 r;
    asm("lop3.b32 %0, %1, 0x0F0F0F0F, 0x08080808, 0x6A;" : "=r"(r) : "r"(word));  // and, xor
    return r;
}
__device__ __forceinline__ u32 odd_fields(u32 word) {
    u32 r;
    asm("lop3.b32 %0, %1, 0xF0F0F0F0, 0x80808080, 0x6A;" : "=r"(r) : "r"(word));
    return r;
}

// From shared memory, by the first lanes alone; what the others get is anything.
template <int LANES>
__device__ __forceinline__ uint4 first_lanes(u32 from, int lane) {
    uint4 v;
    asm volatile(
        "{.reg .pred p; setp.lt.s32 p, %5, %6; @p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from), "r"(lane), "n"(LANES));
    return v;
}

// Into shared memory, without waiting for it: 16 bytes past the first cache, or 4.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    const u32 at = (u32)__cvta_generic_to_shared(to);
    asm volatile(
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
// Zeros if there is nothing to copy.
__device__ __forceinline__ void copy_or_zero(void* to, const void* from, bool there) {
    const u32 at = (u32)__cvta_generic_to_shared(to), bytes = there ? 16 : 0;
    asm volatile(
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes)
        : "memory");
}
__device__ __forceinline__ void copy_word(void* to, const void* from) {
    const u32 at = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(at), "l"(from) : "memory");
}
__device__ __forceinline__ void end_of_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Into the second cache: a multiple of 16 bytes in a row.
__device__ __forceinline__ void bring_near(const void* from, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}
template <int N>
__device__ __forceinline__ void wait_for_copies() {  // all but the last N groups
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int i = 16; i; i /= 2) v += __shfl_xor_sync(~0u, v, i);
    return v;
}

// A parameter is read here, where there is time, and not only where it is used.
template <typename T>
__device__ __forceinline__ void at_hand(T* parameter) {
    asm volatile("" ::"l"(parameter));
}

// The kernel after this one may start once all blocks of this one are past their wait, if there is
// room for its blocks. So before its own wait a kernel may read what the kernel before the one before
// it, or an older one, wrote, and may write nothing.
__device__ __forceinline__ void start_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_prior() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- what becomes of y = W x ----------------------------------------------------------------------

#define STORE 0     // out[n][row] = y, bf16
#define RESIDUAL 1  // x[n][row] += y, bf16; scaled = x * weight and squares of x for the next norm
#define SWIGLU 2    // the first half of the rows is gate, the second up: silu(gate) * up, bf16
#define LOGITS 3    // out[n][row] = y, fp32
#define SCREEN 4    // the same of one column; the `key` of the largest also goes to `top`

struct Output {
    void* out;
    const double* squares;  // [column]: of the input, whose norm is still to be applied; or null
    float eps, per_input;  // of that norm; 1 / inputs
    const u16* bias;       // [row], or null
    const u16* weight;     // RESIDUAL: of the next norm
    u16* scaled;           // RESIDUAL
    double* next;          // RESIDUAL: [column], added to
    u64* top;              // SCREEN
    int tokens;            // SCREEN: rows that are some
};

// Numbers in the order of what they are told as; 0 is none's.
__device__ __forceinline__ u32 ordered(float v) {
    const u32 bits = __float_as_uint(v);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float of_order(u32 v) {
    return __uint_as_float(v & 0x80000000u ? v & 0x7FFFFFFFu : ~v);
}
// A logit and its token: of equal ones the lowest token is the largest.
__device__ __forceinline__ u64 key(float logit, int token) {
    return (u64)ordered(logit) << 32 | (0xFFFFFFFFu - (u32)token);
}
__device__ __forceinline__ u32 token_of(u64 key) { return 0xFFFFFFFFu - (u32)key; }

#ifdef EPILOGUE

// What was there before: two rows' biases; for RESIDUAL their numbers and the next norm's weights.
// Row g is in the lower half, row g + 8 in the upper one.
struct Before {
    u32 bias, x, weight;
};
__device__ __forceinline__ u32 both(const u16* of) { return of[0] | (u32)of[8] << 16; }
__device__ __forceinline__ Before before(const Output& o, int tile, int g, int n, int rows) {
    Before b = {};
#if EPILOGUE != SWIGLU
    const int row = tile * 16 + g;
    if (o.bias) b.bias = both(o.bias + row);
#if EPILOGUE == RESIDUAL
    b.x = both((const u16*)o.out + (size_t)n * rows + row), b.weight = both(o.weight + row);
#endif
#endif
    return b;
}

// Rows g and g + 8 of a tile (SWIGLU: row g of both halves), column n. Lanes BETWEEN apart have the
// eight g of one tile and column; lanes that are not `on` only take part.
template <int BETWEEN>
__device__ __forceinline__ void finish(
    const Output& o, const Before& b, int tile, int g, int n, float upper, float lower, int rows,
    bool on) {
#if EPILOGUE == SWIGLU
    const float y = __fdividef(upper, 1.f + __expf(-upper)) * lower;
    if (on) ((u16*)o.out)[(size_t)n * (rows / 2) + tile * 8 + g] = to_bf16(y);
#else
    const int row = tile * 16 + g;
    const size_t to = (size_t)n * rows + row;
    if (o.bias) upper += low(b.bias), lower += high(b.bias);
#if EPILOGUE == LOGITS || EPILOGUE == SCREEN
    if (on) ((float*)o.out)[to] = upper, ((float*)o.out)[to + 8] = lower;
#elif EPILOGUE == RESIDUAL
    const u16 first = to_bf16(low(b.x) + upper);
    const u16 second = to_bf16(high(b.x) + lower);
    const float u = from_bf16(first), v = from_bf16(second);
    float square = on ? u * u + v * v : 0.f;
#pragma unroll
    for (int i = 1; i < 8; i *= 2) square += __shfl_xor_sync(~0u, square, i * BETWEEN);
    if (on && g == 0) atomicAdd(o.next + n, (double)square);
    if (on) {
        u16* x = (u16*)o.out;
        x[to] = first, x[to + 8] = second;
        o.scaled[to] = to_bf16(u * low(b.weight));
        o.scaled[to + 8] = to_bf16(v * high(b.weight));
    }
#else
    if (on) ((u16*)o.out)[to] = to_bf16(upper), ((u16*)o.out)[to + 8] = to_bf16(lower);
#endif
#endif
}
#endif
