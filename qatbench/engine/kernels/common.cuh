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

// Fields 0 and 4 of a word as bf16 integers 128 + field: the field is the number's last bits.
__device__ __forceinline__ u32 raised(u32 word) {
    u32 r;
    asm("lop3.b32 %0, %1, 0x000F000F, 0x43004300, 0xEA;" : "=r"(r) : "r"(word));
    return r;
}
// The fields less their zero points; `minus` is -(128 + zero): the difference is exact.
__device__ __forceinline__ u32 integers(u32 word, u32 minus) {
    u32 r = raised(word);
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(r), "r"(0x3F803F80u), "r"(minus));
    return r;
}

__device__ __forceinline__ void mma(
    float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Read once: past the first cache.
__device__ __forceinline__ uint4 stream(const uint4* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int i = 16; i; i /= 2) v += __shfl_xor_sync(~0u, v, i);
    return v;
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

struct Output {
    void* out;
    const double* squares;  // [column]: of the input, whose norm is still to be applied; or null
    float eps, width;      // of that norm
    const u16* bias;       // [row], or null
    const u16* weight;     // RESIDUAL: of the next norm
    u16* scaled;           // RESIDUAL
    double* next;          // RESIDUAL: [column], added to
};

#ifdef EPILOGUE
// Rows g and g + 8 of a tile (SWIGLU: row g of both halves), column n. Eight lanes side by side have
// the eight g of one tile and column; lanes that are not `on` repeat another's work.
__device__ __forceinline__ void finish(
    const Output& o, int tile, int g, int n, float upper, float lower, int rows, bool on) {
    if (o.squares) {
        const float r = rsqrtf((float)(o.squares[n] / o.width) + o.eps);
        upper *= r, lower *= r;
    }
#if EPILOGUE == SWIGLU
    const float y = upper / (1.f + __expf(-upper)) * lower;
    if (on) ((u16*)o.out)[(size_t)n * (rows / 2) + tile * 8 + g] = to_bf16(y);
#else
    const int row = tile * 16 + g;
    const size_t to = (size_t)n * rows + row;
    if (o.bias) upper += from_bf16(o.bias[row]), lower += from_bf16(o.bias[row + 8]);
#if EPILOGUE == LOGITS
    if (on) ((float*)o.out)[to] = upper, ((float*)o.out)[to + 8] = lower;
#elif EPILOGUE == RESIDUAL
    u16* x = (u16*)o.out;
    const u16 a = to_bf16(from_bf16(x[to]) + upper), b = to_bf16(from_bf16(x[to + 8]) + lower);
    const float u = from_bf16(a), v = from_bf16(b);
    float square = on ? u * u + v * v : 0.f;
#pragma unroll
    for (int i = 4; i; i /= 2) square += __shfl_xor_sync(~0u, square, i);
    if (on) {
        x[to] = a, x[to + 8] = b;
        o.scaled[to] = to_bf16(u * from_bf16(o.weight[row]));
        o.scaled[to + 8] = to_bf16(v * from_bf16(o.weight[row + 8]));
        if (g == 0) atomicAdd(o.next + n, (double)square);
    }
#else
    if (on) ((u16*)o.out)[to] = to_bf16(upper), ((u16*)o.out)[to + 8] = to_bf16(lower);
#endif
#endif
}
#endif
