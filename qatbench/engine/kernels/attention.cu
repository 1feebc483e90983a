// One new token of every row looks at what its cache holds: rotary embedding and cache write included.
//
// A block takes a share of the keys of one key-value head and one row for all G query heads that use
// it; the block that finishes last adds up the shares. Only the filled part of the cache is read.
//
// Defined at compilation: D (head size, a multiple of 64), G, WARPS, UNROLL (keys in flight a lane),
// HEADNORM 0 | 1 (queries and keys are RMS-normalised by head: Qwen3).
#include "common.cuh"

#define LANES (D / 8)        // that hold one key
#define AT_ONCE (32 / LANES) // keys of a warp
#define PAIRS (D / 64)       // rotated pairs a lane

// Normalise (HEADNORM) and rotate one head, a warp: r[i] is input lane + 32 * i, in the upper half
// r[i + PAIRS].
__device__ __forceinline__ void prepare(
    float (&r)[2 * PAIRS], const u16* from, const u16* weight, float eps, const float2* rope,
    int lane) {
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; ++i) r[i] = from_bf16(from[lane + 32 * i]);
#if HEADNORM
    float square = 0.f;
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; ++i) square += r[i] * r[i];
    const float scale = rsqrtf(warp_sum(square) / D + eps);
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; ++i) r[i] *= scale * from_bf16(weight[lane + 32 * i]);
#endif
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
        const float2 turn = rope[lane + 32 * i];  // cos, sin
        const float a = r[i], b = r[i + PAIRS];
        r[i] = a * turn.x - b * turn.y, r[i + PAIRS] = b * turn.x + a * turn.y;
    }
}

__device__ __forceinline__ void unpack(float (&to)[8], uint4 v) {
    to[0] = low(v.x), to[1] = high(v.x), to[2] = low(v.y), to[3] = high(v.y);
    to[4] = low(v.z), to[5] = high(v.z), to[6] = low(v.w), to[7] = high(v.w);
}

// grid (splits, key-value heads, rows)
extern "C" __global__ void __launch_bounds__(WARPS * 32) attention(
    const u16* qkv,        // [rows][(H + 2 KV) * D]
    u16* keys, u16* values,  // [rows][KV][length][D]
    const float2* rope,    // [position][D / 2]: cos, sin
    const int* filled,     // [rows]: keys in the cache; the new one goes there
    const int* start,      // [rows]: the first that is no padding
    const int* turned,     // [rows]: rotary position of the new token
    const u16* q_norm, const u16* k_norm, float eps,
    float* partial,        // [rows][KV][splits][G][D + 2]
    int* counter,          // [rows][KV], zero before and after
    u16* out,              // [rows][H * D]
    int length, float scale) {
    const int split = blockIdx.x, splits = gridDim.x, head = blockIdx.y, heads = gridDim.y;
    const int row = blockIdx.z, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    __shared__ float query[G][D];
    __shared__ float sums[WARPS][G][D];
    __shared__ float maxima[WARPS][G], weights[WARPS][G];
    __shared__ int last;
    start_dependents();
    wait_for_prior();
    const int end = filled[row] + 1, first = start[row];
    const int share = (end - first + splits - 1) / splits;
    const int from = first + split * share, to = min(end, from + share);
    const u16* mine = qkv + (size_t)row * (G + 2) * heads * D;
    const float2* turn = rope + (size_t)turned[row] * (D / 2);
    const size_t base = ((size_t)row * heads + head) * length;

    for (int g = warp; g < G; g += WARPS) {
        float r[2 * PAIRS];
        prepare(r, mine + (head * G + g) * D, q_norm, eps, turn, lane);
#pragma unroll
        for (int i = 0; i < 2 * PAIRS; ++i) query[g][lane + 32 * i] = r[i] * scale;
    }
    if (from < to && to == end && warp == WARPS - 1) {  // the new key is one of mine
        float r[2 * PAIRS];
        prepare(r, mine + (G * heads + head) * D, k_norm, eps, turn, lane);
        const u16* value = mine + ((G + 1) * heads + head) * D;
        const size_t at = (base + end - 1) * D;
#pragma unroll
        for (int i = 0; i < 2 * PAIRS; ++i) {
            keys[at + lane + 32 * i] = to_bf16(r[i]);
            values[at + lane + 32 * i] = value[lane + 32 * i];
        }
        __threadfence_block();
    }
    __syncthreads();

    const int sub = lane / LANES, part = lane % LANES;
    float q[G][8], acc[G][8] = {}, top[G], total[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        top[g] = -1e30f, total[g] = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) q[g][i] = query[g][part * 8 + i];
    }
    const uint4* k = (const uint4*)(keys + base * D) + part;
    const uint4* v = (const uint4*)(values + base * D) + part;
    for (int at = from + warp * AT_ONCE + sub; at - sub < to; at += WARPS * AT_ONCE * UNROLL) {
        uint4 a[UNROLL], b[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int key = min(at + u * WARPS * AT_ONCE, to - 1);
            a[u] = k[(size_t)key * LANES], b[u] = v[(size_t)key * LANES];
        }
        float score[UNROLL][G];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            float x[8];
            unpack(x, a[u]);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                float s = 0.f;
#pragma unroll
                for (int i = 0; i < 8; ++i) s += q[g][i] * x[i];
#pragma unroll
                for (int i = LANES / 2; i; i /= 2) s += __shfl_xor_sync(~0u, s, i);
                score[u][g] = at + u * WARPS * AT_ONCE < to ? s : -1e30f;
            }
        }
#pragma unroll
        for (int g = 0; g < G; ++g) {
            float most = top[g];
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) most = fmaxf(most, score[u][g]);
            const float shrink = exp2f(top[g] - most);
            total[g] *= shrink, top[g] = most;
#pragma unroll
            for (int i = 0; i < 8; ++i) acc[g][i] *= shrink;
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const float s = score[u][g];
                score[u][g] = s <= -1e30f ? 0.f : exp2f(s - most);
                total[g] += score[u][g];
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            float x[8];
            unpack(x, b[u]);
#pragma unroll
            for (int g = 0; g < G; ++g)
#pragma unroll
                for (int i = 0; i < 8; ++i) acc[g][i] += score[u][g] * x[i];
        }
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {  // add up the keys that a warp holds side by side
        float most = top[g];
#pragma unroll
        for (int i = LANES; i < 32; i *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
        const float shrink = exp2f(top[g] - most);
        total[g] *= shrink;
#pragma unroll
        for (int i = LANES; i < 32; i *= 2) total[g] += __shfl_xor_sync(~0u, total[g], i);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            acc[g][j] *= shrink;
#pragma unroll
            for (int i = LANES; i < 32; i *= 2) acc[g][j] += __shfl_xor_sync(~0u, acc[g][j], i);
            if (sub == 0) sums[warp][g][part * 8 + j] = acc[g][j];
        }
        if (lane == 0) maxima[warp][g] = most, weights[warp][g] = total[g];
    }
    __syncthreads();
    float* shares = partial + ((size_t)row * heads + head) * splits * G * (D + 2);
    for (int e = threadIdx.x; e < G * D; e += WARPS * 32) {  // then its warps
        const int g = e / D, d = e % D;
        float most = -1e30f, weight = 0.f, sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) most = fmaxf(most, maxima[w][g]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float shrink = exp2f(maxima[w][g] - most);
            weight += weights[w][g] * shrink, sum += sums[w][g][d] * shrink;
        }
        u16* result = out + ((size_t)row * heads + head) * G * D + e;
        if (splits == 1) {
            *result = to_bf16(sum / weight);
            continue;
        }
        float* to_share = shares + ((size_t)split * G + g) * (D + 2);
        to_share[d] = sum;
        if (d == 0) to_share[D] = most, to_share[D + 1] = weight;
    }
    if (splits == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(counter + row * heads + head, 1) == splits - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last) return;
    for (int e = threadIdx.x; e < G * D; e += WARPS * 32) {  // then the shares
        const int g = e / D, d = e % D;
        const volatile float* at = shares + (size_t)g * (D + 2);
        const int step = G * (D + 2);
        float most = -1e30f, weight = 0.f, sum = 0.f;
        for (int s = 0; s < splits; ++s) most = fmaxf(most, at[s * step + D]);
        for (int s = 0; s < splits; ++s) {
            const float shrink = exp2f(at[s * step + D] - most);
            weight += at[s * step + D + 1] * shrink, sum += at[s * step + d] * shrink;
        }
        out[((size_t)row * heads + head) * G * D + e] = to_bf16(sum / weight);
    }
    if (threadIdx.x == 0) counter[row * heads + head] = 0;
}
