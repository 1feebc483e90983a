// What one new token of every row finds in its cache: rotary embedding and cache write included.
//
// A block takes a share of the keys of one key-value head and row, for HEADS query heads of those
// that use it. The SPLITS blocks of a head are a cluster and add up their shares through shared
// memory. Only the filled part of the cache is read, and its first keys are asked for before the
// kernel before this one has ended: they are older than it.
//
// Defined at compilation: D (head size, a multiple of 64), HEADS, WARPS, UNROLL (keys in flight a
// lane), SPLITS (1 before compute capability 9.0), HEADNORM 0 | 1 (queries and keys are
// RMS-normalised by head: Qwen3).
#include "common.cuh"

#define LANES (D / 8)         // that hold one key, eight numbers each
#define AT_ONCE (32 / LANES)  // keys of a warp
#define STEP (WARPS * AT_ONCE)

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
    float acc[HEADS][8], top[HEADS], total[HEADS];
};

// Add some keys; score < -1e29 is no key.
template <int N>
__device__ __forceinline__ void add(Sums& s, const float (&score)[N][HEADS], const uint4 (&value)[N]) {
    float weight[N][HEADS];
#pragma unroll
    for (int g = 0; g < HEADS; ++g) {
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
        for (int g = 0; g < HEADS; ++g)
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


struct Attention {
    const u16* qkv;          // [rows][(H + 2 KV) * D]
    u16 *keys, *values;      // [rows][KV][length][D]
    const float2* rope;      // [position][D / 2]: cos, sin
    const int* filled;       // [rows]: keys in the cache; the new one goes there
    const int* start;        // [rows]: the first that is no padding
    const int* turned;       // [rows]: rotary position of the new token
    const u16 *q_norm, *k_norm;
    u16* out;                // [rows][H * D]
    float eps, scale;        // scale: of scores, times log2(e)
    int length, heads, group;  // heads: KV; group: query heads of one
};

// Which row, key-value head, part of its query heads and share of its keys.
struct Item {
    int row, head, part, split, splits;
};

struct Share {  // shared memory
    float sums[WARPS][HEADS][D], maxima[WARPS][HEADS], weights[WARPS][HEADS];
    float sum[HEADS][D], most[HEADS], weight[HEADS];
};

struct Keys {
    uint4 a[UNROLL], b[UNROLL];
    float2 turn[8];  // cos, sin of the new token's position, for a lane's inputs
    int at, to;
};

__device__ __forceinline__ size_t base_of(const Attention& t, const Item& item) {
    return ((size_t)item.row * t.heads + item.head) * t.length * LANES + threadIdx.x % LANES;
}

__device__ __forceinline__ void load(Keys& keys, const Attention& t, size_t base) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
        if (keys.at + u * STEP < keys.to) {
            const size_t at = base + (size_t)(keys.at + u * STEP) * LANES;
            keys.a[u] = ((const uint4*)t.keys)[at], keys.b[u] = ((const uint4*)t.values)[at];
        } else {
            keys.a[u] = keys.b[u] = make_uint4(0, 0, 0, 0);
        }
}

__device__ __forceinline__ void ask(Keys& keys, const Attention& t, const Item& item) {
    const int end = t.filled[item.row], first = t.start[item.row];  // old keys
    const int share = (end - first + item.splits - 1) / item.splits;
    const int from = min(first + item.split * share, end);
    keys.to = min(end, from + share);
    keys.at = from + threadIdx.x / LANES;
    load(keys, t, base_of(t, item));
    const float2* rope = t.rope + (size_t)t.turned[item.row] * (D / 2);
#pragma unroll
    for (int i = 0; i < 8; ++i) keys.turn[i] = rope[(threadIdx.x % LANES * 8 + i) % (D / 2)];
}

// The block's share, into shared memory; ends with a barrier.
__device__ __forceinline__ void attend(
    Share& shared, Keys& keys, const Attention& t, const Item& item) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int sub = lane / LANES, part = lane % LANES;
    float norm[8] = {};
#if HEADNORM
    unpack(norm, ((const uint4*)t.q_norm)[part]);
#endif
    const uint4* fresh = (const uint4*)(t.qkv + (size_t)item.row * (t.group + 2) * t.heads * D);
    Sums s = {};
    float q[HEADS][8];
#pragma unroll
    for (int g = 0; g < HEADS; ++g) {
        const int head = item.head * t.group + item.part * HEADS + g;
        unpack(q[g], fresh[head * LANES + part]);
        prepare(q[g], norm, t.eps, keys.turn, part);
        s.top[g] = -1e30f;
#pragma unroll
        for (int i = 0; i < 8; ++i) q[g][i] *= t.scale;
    }
    if (item.split == 0 && warp == 0) {  // the new key
        float x[8];
        unpack(x, fresh[(t.group * t.heads + item.head) * LANES + part]);
#if HEADNORM
        unpack(norm, ((const uint4*)t.k_norm)[part]);
#endif
        prepare(x, norm, t.eps, keys.turn, part);
        const uint4 key = make_uint4(bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]),
                                     bf16_pair(x[4], x[5]), bf16_pair(x[6], x[7]));
        const uint4 value[1] = {fresh[((t.group + 1) * t.heads + item.head) * LANES + part]};
        if (sub == 0 && item.part == 0) {
            const size_t at = base_of(t, item) + (size_t)t.filled[item.row] * LANES;
            ((uint4*)t.keys)[at] = key, ((uint4*)t.values)[at] = value[0];
        }
        unpack(x, key);
        float score[1][HEADS];
#pragma unroll
        for (int g = 0; g < HEADS; ++g) {
            const float found = dot(q[g], x);
            score[0][g] = sub == 0 ? found : -1e30f;
        }
        add<1>(s, score, value);
    }
    while (keys.at - sub < keys.to) {
        float score[UNROLL][HEADS];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            float x[8];
            unpack(x, keys.a[u]);
#pragma unroll
            for (int g = 0; g < HEADS; ++g) {
                const float found = dot(q[g], x);
                score[u][g] = keys.at + u * STEP < keys.to ? found : -1e30f;
            }
        }
        add<UNROLL>(s, score, keys.b);
        keys.at += UNROLL * STEP;
        load(keys, t, base_of(t, item));
    }
#pragma unroll
    for (int g = 0; g < HEADS; ++g) {  // the keys that a warp holds side by side
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
            if (sub == 0) shared.sums[warp][g][part * 8 + j] = sum;
        }
        if (lane == 0) shared.maxima[warp][g] = most, shared.weights[warp][g] = total;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < HEADS * D; e += WARPS * 32) {  // the warps of a block
        const int g = e / D, d = e % D;
        float most = -1e30f, weight = 0.f, sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) most = fmaxf(most, shared.maxima[w][g]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float shrink = exp2f(shared.maxima[w][g] - most);
            weight += shared.weights[w][g] * shrink, sum += shared.sums[w][g][d] * shrink;
        }
        shared.sum[g][d] = sum;
        if (d == 0) shared.most[g] = most, shared.weight[g] = weight;
    }
    __syncthreads();
}

// Where an item's results go: [HEADS][D].
__device__ __forceinline__ u16* result_of(const Attention& t, const Item& item) {
    const size_t head = (size_t)(item.row * t.heads + item.head) * t.group + item.part * HEADS;
    return t.out + head * D;
}

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
