// One new token of every row looks at what its cache holds: rotary embedding and cache write
// included.
//
// A block takes a share of the keys of one key-value head and one row for G query heads that use it,
// of HEADS that do; the SPLITS blocks of a head are a cluster and give each other what they found
// through shared memory: each adds up a piece of the outputs. Only the filled part of the cache is
// read. A lane's first STAGED keys and values are on their way into shared memory, and UNROLL more into
// registers, before the kernel before this one has ended: they are older than it.
//
// Defined at compilation: D (head size, a multiple of 64), G, HEADS (a multiple of G), WARPS, UNROLL
// (keys a lane takes at once), STAGED (a multiple of UNROLL), SPLITS (1 before compute capability
// 9.0), BLOCKS (that share a multiprocessor at least), HEADNORM 0 | 1 (queries and keys are
// RMS-normalised by head: Qwen3).
#include "common.cuh"
#include "cluster.cuh"

#define LANES (D / 8)         // that hold one key, eight numbers each
#define AT_ONCE (32 / LANES)  // keys of a warp
#define STEP (WARPS * AT_ONCE)
#define THREADS (WARPS * 32)
#define PIECE (G * D / SPLITS)  // of the outputs of a cluster: what each block sums up

__device__ __forceinline__ void unpack(float (&to)[8], uint4 v) {
    to[0] = low(v.x), to[1] = high(v.x), to[2] = low(v.y), to[3] = high(v.y);
    to[4] = low(v.z), to[5] = high(v.z), to[6] = low(v.w), to[7] = high(v.w);
}

// Normalise (HEADNORM) and rotate a head that LANES lanes hold together. Halves are paired: input d
// with d + D / 2, which the lane LANES / 2 further has.
__device__ __forceinline__ void prepare(
    float (&r)[8], const float (&weight)[8], float eps, const float2 (&turn)[8], int part) {
#if HEADNORM
    float square = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) square += r[i] * r[i];
#pragma unroll
    for (int i = LANES / 2; i; i /= 2) square += __shfl_xor_sync(~0u, square, i);
    const float scale = rsqrtf(square / D + eps);
#pragma unroll
    for (int i = 0; i < 8; ++i) r[i] *= scale * weight[i];
#endif
    const float sign = part < LANES / 2 ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float other = __shfl_xor_sync(~0u, r[i], LANES / 2);
        r[i] = r[i] * turn[i].x + sign * other * turn[i].y;
    }
}

struct Sums {
    float acc[G][8], top[G], total[G];
};

// Add some keys; score < -1e29 is no key.
template <int N>
__device__ __forceinline__ void add(Sums& s, const float (&score)[N][G], const uint4 (&value)[N]) {
    float weight[N][G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        float most = s.top[g];
#pragma unroll
        for (int u = 0; u < N; ++u) most = fmaxf(most, score[u][g]);
        const float shrink = exp2f(s.top[g] - most);
        s.total[g] *= shrink, s.top[g] = most;
#pragma unroll
        for (int i = 0; i < 8; ++i) s.acc[g][i] *= shrink;
#pragma unroll
        for (int u = 0; u < N; ++u) {
            weight[u][g] = score[u][g] < -1e29f ? 0.f : exp2f(score[u][g] - most);
            s.total[g] += weight[u][g];
        }
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
        float x[8];
        unpack(x, value[u]);
#pragma unroll
        for (int g = 0; g < G; ++g)
#pragma unroll
            for (int i = 0; i < 8; ++i) s.acc[g][i] += weight[u][g] * x[i];
    }
}

__device__ __forceinline__ float dot(const float (&q)[8], const float (&x)[8]) {
    float s = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) s += q[i] * x[i];
#pragma unroll
    for (int i = LANES / 2; i; i /= 2) s += __shfl_xor_sync(~0u, s, i);
    return s;
}

// grid (SPLITS, key-value heads * HEADS / G, rows)
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#if SPLITS > 1
    __cluster_dims__(SPLITS, 1, 1)
#endif
    attention(
        const u16* qkv,          // [rows][(H + 2 KV) * D]
        u16* keys, u16* values,  // [rows][KV][length][D]
        const float2* rope,      // [position][D / 2]: cos, sin
        const int* filled,       // [rows]: keys in the cache; the new one goes there
        const int* start,        // [rows]: the first that is no padding
        const int* turned,       // [rows]: rotary position of the new token
        const u16* q_norm, const u16* k_norm, float eps,
        u16* out,                // [rows][H * D]
        int length, float scale,
        int late,                // the next kernel may start only when keys and values have come
        Later later) {
    const int split = blockIdx.x, row = blockIdx.z, heads = gridDim.y / (HEADS / G);
    const int head = blockIdx.y / (HEADS / G), query = blockIdx.y * G;  // the first of G
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int sub = lane / LANES, part = lane % LANES;
    __shared__ float sums[WARPS][G][D], maxima[WARPS][G], weights[WARPS][G];
    __shared__ float pieces[SPLITS][PIECE], most_of[SPLITS][G], weight_of[SPLITS][G];
    __shared__ u64 gifts;
    if (threadIdx.x == 0) expect(&gifts, SPLITS * (PIECE + 2 * G) * sizeof(float));
    __syncwarp();
    arrive();  // others may write into this block

    const int end = filled[row], first = start[row];  // old keys
    const Share share = share_of(first, end, split);
    const int from = share.from, to = share.to;
    const size_t base = ((size_t)row * heads + head) * length;
    const uint4* k = (const uint4*)(keys + base * D) + part;
    const uint4* v = (const uint4*)(values + base * D) + part;
    float2 turn[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
        turn[i] = rope[(size_t)turned[row] * (D / 2) + (part * 8 + i) % (D / 2)];
    float norm[8] = {};
#if HEADNORM
    unpack(norm, ((const uint4*)q_norm)[part]);
#endif
    extern __shared__ uint4 staged[];  // [key or value][STAGED][THREADS]: a lane reads its own
    uint4* const first_keys = staged + threadIdx.x;
    uint4* const first_values = first_keys + STAGED * THREADS;
    int at = from + warp * AT_ONCE + sub;
#pragma unroll
    for (int u = 0; u < STAGED; ++u)
        if (at + u * STEP < to) {
            copy_async(first_keys + u * THREADS, k + (size_t)(at + u * STEP) * LANES);
            copy_async(first_values + u * THREADS, v + (size_t)(at + u * STEP) * LANES);
        }
    end_of_copies();
    uint4 a[UNROLL], b[UNROLL];
    auto load = [&](int next) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
            if (next + u * STEP < to) {
                a[u] = k[(size_t)(next + u * STEP) * LANES];
                b[u] = v[(size_t)(next + u * STEP) * LANES];
            } else {
                a[u] = b[u] = make_uint4(0, 0, 0, 0);
            }
    };
    load(at + STAGED * STEP);
    __syncwarp();  // without it the compiler would ask for them where they are needed
    wait_for_cluster();
    wait_for_prior();
    if (!late) start_dependents();
    const uint4* fresh = (const uint4*)(qkv + (size_t)row * (HEADS + 2) * heads * D);
    uint4 of_query[G];
#pragma unroll
    for (int g = 0; g < G; ++g) of_query[g] = fresh[(query + g) * LANES + part];
    // The new key and value: whoever has them has the fewest old ones.
    const bool newest = split == SPLITS - 1 && warp == WARPS - 1;
    uint4 of_key = {}, of_value[1] = {};
    if (newest) {
        of_key = fresh[(HEADS * heads + head) * LANES + part];
        of_value[0] = fresh[((HEADS + 1) * heads + head) * LANES + part];
    }
    bring_later_near(later, threadIdx.x, THREADS);

    Sums s = {};
    float q[G][8];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        unpack(q[g], of_query[g]);
        prepare(q[g], norm, eps, turn, part);
        s.top[g] = -1e30f;
#pragma unroll
        for (int i = 0; i < 8; ++i) q[g][i] *= scale;
    }
    if (newest) {
        float x[8];
        unpack(x, of_key);
#if HEADNORM
        unpack(norm, ((const uint4*)k_norm)[part]);
#endif
        prepare(x, norm, eps, turn, part);
        const uint4 key = make_uint4(bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]),
                                     bf16_pair(x[4], x[5]), bf16_pair(x[6], x[7]));
        if (sub == 0 && query % HEADS == 0) {
            ((uint4*)(keys + (base + end) * D))[part] = key;
            ((uint4*)(values + (base + end) * D))[part] = of_value[0];
        }
        unpack(x, key);
        float score[1][G];
#pragma unroll
        for (int g = 0; g < G; ++g) {
            const float found = dot(q[g], x);
            score[0][g] = sub == 0 ? found : -1e30f;
        }
        add<1>(s, score, of_value);
    }
    auto attend = [&](const uint4(&some_keys)[UNROLL], const uint4(&some_values)[UNROLL]) {
        float score[UNROLL][G];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            float x[8];
            unpack(x, some_keys[u]);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const float found = dot(q[g], x);
                score[u][g] = at + u * STEP < to ? found : -1e30f;
            }
        }
        add<UNROLL>(s, score, some_values);
        at += UNROLL * STEP;
    };
    wait_for_copies<0>();
#pragma unroll 1
    for (int i = 0; i < STAGED && at - sub < to; i += UNROLL) {
        uint4 c[UNROLL], d[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
            if (at + u * STEP < to) {
                c[u] = first_keys[(i + u) * THREADS], d[u] = first_values[(i + u) * THREADS];
            } else {
                c[u] = d[u] = make_uint4(0, 0, 0, 0);
            }
        attend(c, d);
    }
    while (at - sub < to) {
        attend(a, b);
        load(at);
    }
    if (late) start_dependents();
#pragma unroll
    for (int g = 0; g < G; ++g) {  // the keys that a warp holds side by side
        float most = s.top[g];
#pragma unroll
        for (int i = LANES; i < 32; i *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
        const float shrink = exp2f(s.top[g] - most);
        float total = s.total[g] * shrink;
#pragma unroll
        for (int i = LANES; i < 32; i *= 2) total += __shfl_xor_sync(~0u, total, i);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float sum = s.acc[g][j] * shrink;
#pragma unroll
            for (int i = LANES; i < 32; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
            if (sub == 0) sums[warp][g][part * 8 + j] = sum;
        }
        if (lane == 0) maxima[warp][g] = most, weights[warp][g] = total;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < G * D; e += THREADS) {  // the warps of a block
        const int g = e / D, d = e % D;
        float most = -1e30f, weight = 0.f, sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) most = fmaxf(most, maxima[w][g]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float shrink = exp2f(maxima[w][g] - most);
            weight += weights[w][g] * shrink, sum += sums[w][g][d] * shrink;
        }
        give(&pieces[split][e % PIECE], e / PIECE, sum, &gifts);
        if (d < SPLITS) {
            give(&most_of[split][g], d, most, &gifts);
            give(&weight_of[split][g], d, weight, &gifts);
        }
    }
    wait_for_gifts(&gifts);
    for (int e = threadIdx.x; e < PIECE; e += THREADS) {  // the blocks of a cluster
        const int g = (split * PIECE + e) / D;
        float most = -1e30f, weight = 0.f, sum = 0.f;
#pragma unroll
        for (int r = 0; r < SPLITS; ++r) most = fmaxf(most, most_of[r][g]);
#pragma unroll
        for (int r = 0; r < SPLITS; ++r) {
            const float shrink = exp2f(most_of[r][g] - most);
            weight += weight_of[r][g] * shrink, sum += pieces[r][e] * shrink;
        }
        out[((size_t)row * heads * HEADS + query) * D + split * PIECE + e] =
            to_bf16(__fdividef(sum, weight));
    }
}
