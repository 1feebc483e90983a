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

// Into the second cache; a multiple of 16 bytes.
__device__ __forceinline__ void prefetch_bytes(const void* from, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
#endif
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

// The kernel after this one may start while this one runs (its blocks need room); what it does
// before it waits may touch nothing that kernels write.
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
