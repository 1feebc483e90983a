// What kernels of attention share: the SPLITS blocks of a cluster give each other numbers.

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
// Into another block, at the place of `shared` in this one.
__device__ __forceinline__ void give(float* shared, int rank, float v, u64* barrier) {
#if SPLITS > 1
    const u32 at = (u32)__cvta_generic_to_shared(shared);
    const u32 told = (u32)__cvta_generic_to_shared(barrier);
    asm volatile(
        "{.reg .b32 to, by;\n"
        "mapa.shared::cluster.u32 to, %0, %2;\n"
        "mapa.shared::cluster.u32 by, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [to], %3, [by];}"
        ::"r"(at), "r"(told), "r"(rank), "f"(v) : "memory");
#else
    *shared = v;
#endif
}
__device__ __forceinline__ void give(float2* shared, int rank, float2 v, u64* barrier) {
#if SPLITS > 1
    const u32 at = (u32)__cvta_generic_to_shared(shared);
    const u32 told = (u32)__cvta_generic_to_shared(barrier);
    asm volatile(
        "{.reg .b32 to, by;\n"
        "mapa.shared::cluster.u32 to, %0, %2;\n"
        "mapa.shared::cluster.u32 by, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [to], {%3, %4}, [by];}"
        ::"r"(at), "r"(told), "r"(rank), "f"(v.x), "f"(v.y) : "memory");
#else
    *shared = v;
#endif
}
__device__ __forceinline__ void give(float4* shared, int rank, float4 v, u64* barrier) {
#if SPLITS > 1
    const u32 at = (u32)__cvta_generic_to_shared(shared);
    const u32 told = (u32)__cvta_generic_to_shared(barrier);
    asm volatile(
        "{.reg .b32 to, by;\n"
        "mapa.shared::cluster.u32 to, %0, %2;\n"
        "mapa.shared::cluster.u32 by, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%3, %4, %5, %6}, [by];}"
        ::"r"(at), "r"(told), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
#else
    *shared = v;
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
