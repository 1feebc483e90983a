// The SPLITS blocks of a cluster give each other numbers. And what kernels of attention share.

// Each block knows how much it is to get, and waits for that much. A release by all, and an acquire,
// would take a fence of the whole device.
__device__ __forceinline__ void expect(u64* barrier, u32 bytes) {
#if SPLITS > 1
    const u32 at = (u32)__cvta_generic_to_shared(barrier);
    asm volatile(
        "mbarrier.init.shared.b64 [%0], 1;\n"
        "fence.mbarrier_init.release.cluster;\n"
        "mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
#endif
}
// Where in another block's memory something of this one would be.
__device__ __forceinline__ u32 there(const void* shared, int rank) {
    u32 at;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(at) : "r"((u32)__cvta_generic_to_shared(shared)), "r"(rank));
    return at;
}
#define GIVE "st.async.shared::cluster.mbarrier::complete_tx::bytes"
// Into another block, at the place of `to` in this one.
__device__ __forceinline__ void give(float* to, int rank, float v, u64* barrier) {
#if SPLITS > 1
    asm volatile(GIVE ".f32 [%0], %1, [%2];"
        ::"r"(there(to, rank)), "f"(v), "r"(there(barrier, rank)) : "memory");
#else
    *to = v;
#endif
}
__device__ __forceinline__ void give(float2* to, int rank, float2 v, u64* barrier) {
#if SPLITS > 1
    asm volatile(GIVE ".v2.f32 [%0], {%1, %2}, [%3];"
        ::"r"(there(to, rank)), "f"(v.x), "f"(v.y), "r"(there(barrier, rank)) : "memory");
#else
    *to = v;
#endif
}
__device__ __forceinline__ void give(float4* to, int rank, float4 v, u64* barrier) {
#if SPLITS > 1
    asm volatile(GIVE ".v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
        ::"r"(there(to, rank)), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(there(barrier, rank))
        : "memory");
#else
    *to = v;
#endif
}
__device__ __forceinline__ void wait_for_gifts(u64* barrier) {
#if SPLITS > 1
    const u32 at = (u32)__cvta_generic_to_shared(barrier);
    asm volatile(
        "{.reg .pred there;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 there, [%0], 0;\n"
        "@!there bra again;}" ::"r"(at) : "memory");
#else
    __syncthreads();
#endif
}

// All blocks of a cluster, in two halves: what they expect is written down.
__device__ __forceinline__ void arrive() {
#if SPLITS > 1
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_cluster() {
#if SPLITS > 1
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// What a later kernel will read: while this one waits more than it reads, memory has time for it.
struct Later {
    const unsigned char* from;
    u32 pieces, take;  // of so many pieces of 16 KB the first so many bytes
};
#define PIECE_BYTES 16384
// By all threads of a block, each with a turn of its own: neighbouring pieces are asked for by different
// blocks.
__device__ __forceinline__ void bring_later_near(const Later& later, u32 turn, u32 threads) {
    const u32 blocks = gridDim.z * gridDim.y * SPLITS;
    const u32 block = (blockIdx.z * gridDim.y + blockIdx.y) * SPLITS + blockIdx.x;
    for (u32 i = turn * blocks + block; i < later.pieces; i += blocks * threads)
        bring_near(later.from + (size_t)i * PIECE_BYTES, later.take);
}

// Of the keys from `first` on to `end`, those of one of a cluster's blocks.
struct Share {
    int from, to;
};
__device__ __forceinline__ Share share_of(int first, int end, int split) {
    const int share = (end - first + SPLITS - 1) / SPLITS;
    const int from = min(first + split * share, end);
    return Share{from, min(end, from + share)};
}
