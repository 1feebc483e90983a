// One new token of every row looks at what its cache holds. The SPLITS blocks of a head are a cluster
// and add up their shares through shared memory. Only the filled part of the cache is read, and its
// first keys are asked for before the kernel before this one has ended: they are older than it.
//
// Defined at compilation: as in attention.cuh; SPLITS (1 before compute capability 9.0).
#include "attention.cuh"

__device__ __forceinline__ float of_block(const float* shared, int rank) {
#if SPLITS > 1
    u32 at = (u32)__cvta_generic_to_shared(shared), there;
    float v;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(there));
    return v;
#else
    return *shared;
#endif
}

__device__ __forceinline__ void cluster_barrier() {
#if SPLITS > 1
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// grid (SPLITS, key-value heads, rows)
// grid (SPLITS, key-value heads * parts, rows)
extern "C" __global__ void __launch_bounds__(WARPS * 32)
#if SPLITS > 1
    __cluster_dims__(SPLITS, 1, 1)
#endif
    attention(Attention t) {
    __shared__ Share shared;
    const int parts = t.group / HEADS;
    const Item item = {(int)blockIdx.z, (int)blockIdx.y / parts, (int)blockIdx.y % parts,
                       (int)blockIdx.x, SPLITS};
    Keys keys;
    ask(keys, t, item);
    wait_for_prior();
    start_dependents();
    attend(shared, keys, t, item);
    cluster_barrier();
    u16* out = result_of(t, item);
    for (int e = item.split * WARPS * 32 + threadIdx.x; e < HEADS * D; e += SPLITS * WARPS * 32) {
        const int g = e / D, d = e % D;
        float top[SPLITS], most = -1e30f, weight = 0.f, sum = 0.f;
#pragma unroll
        for (int r = 0; r < SPLITS; ++r) {
            top[r] = of_block(&shared.most[g], r);
            most = fmaxf(most, top[r]);
        }
#pragma unroll
        for (int r = 0; r < SPLITS; ++r) {
            const float shrink = exp2f(top[r] - most);
            weight += of_block(&shared.weight[g], r) * shrink;
            sum += of_block(&shared.sum[g][d], r) * shrink;
        }
        out[e] = to_bf16(sum / weight);
    }
#if SPLITS > 1
    cluster_barrier();  // nobody leaves while his share is read
#endif
}
