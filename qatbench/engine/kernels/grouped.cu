// One new token of every row looks at what its cache holds, as in attention.cu, for models whose
// key-value heads serve several query heads each: up to eight are columns and rows of the tensor
// cores.
//
// A block takes a share of the keys of one key-value head and one row for G query heads that use it,
// of HEADS that do; the SPLITS blocks of a head are a cluster and give each other what they found
// through shared memory: each adds up a piece of the outputs. Only the filled part of the cache is
// read. Sixteen keys are a tile, a tile of every warp a turn. Keys and values of the first STAGED turns
// are on their way into shared memory before the kernel before this one has ended: they are older
// than it. With `rest` they come to the second cache first (from compute capability 9.0 on), and are
// asked for that many cycles later: what a multiprocessor has asked for before comes before the input
// of another kernel's block on it.
//
// Both products are mma.m16n8k16. Scores: each warp multiplies queries, the upper rows of the left
// operand, and its keys, the columns of the right one. All warps tell each other their largest, and
// write weights; then a warp has 16 numbers of each value of all keys, as rows of the left operand
// (ldmatrix, transposed), and weights are the right one. So nothing has to be added up between warps.
//
// Defined at compilation: D (head size: 64, 128 or 256), G (at most 8), HEADS (a multiple of G),
// WARPS (a multiple of 4), STAGED, SPLITS (1 before compute capability 9.0), BLOCKS (that share a
// multiprocessor at least), HEADNORM 0 | 1 (queries and keys are RMS-normalised by head: Qwen3).
#include "common.cuh"
#include "cluster.cuh"

#define THREADS (WARPS * 32)
#define CHUNKS (D / 32)           // of inputs that four matrices of ldmatrix have
#define ROW (D / 8)               // 16 bytes each, of a key or a value
#define TILE (16 * ROW)
#define TILES (D / 16)            // of outputs
#define OWN ((TILES + WARPS - 1) / WARPS)  // of a warp
#define PAIRS ((G + 1) / 2)       // of query heads
#define PIECE (D / 2 * PAIRS / SPLITS)  // fours of outputs that a block adds up for its cluster
#define WORDS (D == 256 ? 2 : 1)  // pairs that a lane has of half a head when it is turned
#define TURNERS (D / 4 / WORDS)   // lanes that have different ones
#define ROUNDS ((G + 2 + WARPS - 1) / WARPS)  // in which warps take queries, key and value
#define READY (D / 2 + 16)        // words of a row: neighbours lie in other banks
#define WEIGHTS (WARPS * 8 + 4)   // words of a row, the same
#define NONE -1e30f               // a score that is none

__device__ __forceinline__ float power_of_two(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
// Four matrices of eight rows of 16 bytes, whose addresses lanes have, matrix by matrix: lane (g, t)
// gets pair t of row g of each.
__device__ __forceinline__ uint4 matrices(u32 from) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
    return v;
}
// The same; lane (g, t) gets of rows 2t and 2t + 1 what stands at g.
__device__ __forceinline__ uint4 turned_matrices(u32 from) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
    return v;
}
// A number that is computed here, where there is time, and not where it is used.
__device__ __forceinline__ u32 kept(u32 v) {
    asm volatile("" : "+r"(v));
    return v;
}
__device__ __forceinline__ u64 cycles() {
    u64 v;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(v)::"memory");
    return v;
}
__device__ __forceinline__ void rest_until(u64 cycle) {
    asm volatile(
        "{.reg .pred early; .reg .u64 now;\n"
        "again: mov.u64 now, %%clock64;\n"
        "setp.lt.u64 early, now, %0;\n"
        "@early bra again;}" ::"l"(cycle) : "memory");
}

// Normalise (HEADNORM) and turn a head that TURNERS lanes hold together: halves are paired.
__device__ __forceinline__ void turn(
    u32 (&x)[2][WORDS], const u32* norm, float eps, const float2 (&by)[2 * WORDS]) {
    float scale = 1.f;
#if HEADNORM
    float square = 0.f;
#pragma unroll
    for (int w = 0; w < WORDS; ++w) square += squared(x[0][w]) + squared(x[1][w]);
#pragma unroll
    for (int i = TURNERS / 2; i; i /= 2) square += __shfl_xor_sync(~0u, square, i);
    scale = rsqrtf(square / D + eps);
#endif
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
        float a[2] = {low(x[0][w]) * scale, high(x[0][w]) * scale};
        float b[2] = {low(x[1][w]) * scale, high(x[1][w]) * scale};
#if HEADNORM
        const u32 upper = norm[w], lower = norm[D / 4 + w];
        a[0] *= low(upper), a[1] *= high(upper), b[0] *= low(lower), b[1] *= high(lower);
#endif
        const float2 p = by[2 * w], q = by[2 * w + 1];
        x[0][w] = bf16_pair(a[0] * p.x - b[0] * p.y, a[1] * q.x - b[1] * q.y);
        x[1][w] = bf16_pair(b[0] * p.x + a[0] * p.y, b[1] * q.x + a[1] * q.y);
    }
}

// grid (SPLITS, key-value heads * HEADS / G, rows); dynamic shared memory: of STAGED turns keys and
// values of a tile of every warp
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#if SPLITS > 1
    __cluster_dims__(SPLITS, 1, 1)
#endif
    grouped(
        const u16* qkv,          // [rows][(H + 2 KV) * D]
        u16* keys, u16* values,  // [rows][KV][length][D]
        const float2* rope,      // [position][D / 2]: cos, sin
        const int* filled,       // [rows]: keys in the cache; the new one goes there
        const int* start,        // [rows]: the first that is no padding
        const int* turned_by,    // [rows]: rotary position of the new token
        const u16* q_norm, const u16* k_norm, float eps,
        u16* out,                // [rows][H * D]
        int length, float scale,
        int late,                // the next kernel may start only when keys and values have come
        Later later, u32 rest) {
    const int split = blockIdx.x, row = blockIdx.z, heads = gridDim.y / (HEADS / G);
    const int head = blockIdx.y / (HEADS / G), query = blockIdx.y * G;  // the first of G
    const int end = filled[row], first_key = start[row], position = turned_by[row];
    const u64 began = cycles();
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
    __shared__ __align__(16) float maxima[8][WARPS], totals[8][WARPS];
    __shared__ float4 pieces[SPLITS][PIECE];
    __shared__ float2 most_and_total[SPLITS][G];
    __shared__ __align__(16) u32 ready[G + 2][READY];  // queries, key and value, in bf16
    __shared__ u32 weights[8][WEIGHTS];
    __shared__ u64 gifts;
    if (threadIdx.x == 0) expect(&gifts, SPLITS * (PIECE * sizeof(float4) + G * sizeof(float2)));
    __syncwarp();
    arrive();  // others may write into this block

    // The new key and value: whoever has them has the fewest old ones.
    const bool newest = split == SPLITS - 1;
    const Share share = share_of(first_key, end, split);
    const int from = share.from, old = share.to - from;
    const int tiles = (old + newest + 15) / 16;
    const size_t base = ((size_t)row * heads + head) * length;
    extern __shared__ __align__(128) uint4 memory[];  // [STAGED][key or value][warp][TILE]
    // A lane copies a part of some keys and values of a tile: neighbours are next to each other, and
    // parts of a key lie as its number turns them, so that those of eight keys lie in all banks.
    const int of_lane = lane / ROW, part = lane % ROW ^ of_lane;
    const uint4* const old_keys = (const uint4*)(keys + (base + from) * D) + lane;
    const uint4* const old_values = (const uint4*)(values + (base + from) * D) + lane;
    auto fetch = [&](int stage, int tile) {
        uint4* const to = memory + (stage * 2 * WARPS + warp) * TILE + of_lane * ROW;
#pragma unroll
        for (int i = 0; i < TILE / 32; ++i) {
            const int key = i * (32 / ROW), at = key * ROW + (part ^ key % 8);
            const bool there = tile * 16 + key + of_lane < old;
            copy_or_zero(to + at, old_keys + (size_t)tile * TILE + i * 32, there);
            copy_or_zero(to + WARPS * TILE + at, old_values + (size_t)tile * TILE + i * 32, there);
        }
    };
    const int turner = lane % TURNERS;
    float2 by[2 * WORDS];
#pragma unroll
    for (int i = 0; i < 2 * WORDS; ++i)
        by[i] = rope[(size_t)position * (D / 2) + turner * 2 * WORDS + i];
    if (rest && lane == 0 && warp < 2 && old)
        bring_near((warp ? values : keys) + (base + from) * D, old * D * sizeof(u16));
    bring_later_near(later, lane * WARPS + warp, THREADS);  // different warps ask
    if (rest) rest_until(began + rest);
#pragma unroll 1
    for (int s = 0; s < STAGED; ++s) {
        if (warp + s * WARPS < tiles) fetch(s, warp + s * WARPS);
        end_of_copies();
    }
    // Where a lane's row of a matrix lies, and what else it will read and write.
    const int matrix = lane / 8, line = lane % 8;
    const u32 shared = (u32)__cvta_generic_to_shared(memory);
    const u32 of_keys = kept(shared + (warp * TILE + line * ROW) * 16);
    const u32 in_row = kept((matrix ^ line) * 16);
    u32 of_values[OWN];
#pragma unroll
    for (int m = 0; m < OWN; ++m) {
        const int row_of_tile = matrix / 2 * 8 + line;
        const int at = ((warp + m * WARPS) * 2 + matrix % 2) ^ line;
        of_values[m] = kept(shared + (WARPS * TILE + row_of_tile * ROW + at) * 16);
    }
    const u32 of_query = kept(min(g, G - 1) * (READY / 4) + t);  // of those too many, the last one
    const u32 of_weights = kept(g * WEIGHTS + t), of_warp = kept(g * WARPS + warp);
    const u32 new_tile = kept((u32)old / 16), new_row = kept((u32)old % 16);
    const u32* const fresh = (const u32*)(qkv + (size_t)row * (HEADS + 2) * heads * D);
    wait_for_cluster();
    at_hand(fresh);
    wait_for_prior();
    if (!late) start_dependents();

    // Warps take turns at G queries, the key and the value.
    u32 x[ROUNDS][2][WORDS];
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
        const int what = warp + r * WARPS;
        const int of = what < G ? query + what : (HEADS + min(what - G, 1)) * heads + head;
#pragma unroll
        for (int w = 0; w < 2 * WORDS; ++w)
            x[r][w / WORDS][w % WORDS] =
                fresh[(of * 2 + w / WORDS) * (D / 4) + turner * WORDS + w % WORDS];
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
        const int what = warp + r * WARPS;
        if (what >= G + 2) break;
        const u32* const norm = (const u32*)(what < G ? q_norm : k_norm) + turner * WORDS;
        if (what <= G) turn(x[r], norm, eps, by);
        u32* const cached = (u32*)((what == G ? keys : values) + (base + end) * D);
        const bool caches = what >= G && newest && query % HEADS == 0;
#pragma unroll
        for (int w = 0; w < 2 * WORDS; ++w) {
            const int at = w / WORDS * (D / 4) + turner * WORDS + w % WORDS;
            // Of queries a lane's pairs of 32 numbers are next to each other: those that ldmatrix
            // gives it of a key.
            const int place = what < G ? at / 16 * 16 + at % 4 * 4 + at / 4 % 4 : at;
            ready[what][place] = x[r][w / WORDS][w % WORDS];
            if (caches) cached[at] = x[r][w / WORDS][w % WORDS];
        }
    }
    __syncthreads();
    uint4 queries[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) queries[c] = ((const uint4*)ready[0])[of_query + c * 4];

    float acc[OWN][2][4] = {};  // numbers g and g + 8 of queries 2t and 2t + 1; two sums
    float most = NONE, total = 0.f;  // of query g; of this warp's keys
    int stage = 0;
#pragma unroll 1
    for (int first = 0; first < tiles; first += WARPS) {
        const int tile = first + warp, active = min(tiles - first, WARPS);
        const u32 staged = stage * 2 * WARPS * TILE * 16;
        float found[2][2] = {{NONE, NONE}, {NONE, NONE}}, top = NONE;
        wait_for_copies<STAGED - 1>();
        if (tile < tiles) {
            __syncwarp();
            if (newest && tile == new_tile) {  // the new ones are not in the cache
                uint4* const to = memory + (stage * 2 * WARPS + warp) * TILE + new_row * ROW;
                for (int i = lane; i < 2 * ROW; i += 32)
                    to[i / ROW * WARPS * TILE + (i % ROW ^ new_row % 8)] =
                        ((const uint4*)ready[G + i / ROW])[i % ROW];
                __syncwarp();
            }
            float score[2][2][4] = {};  // keys 2t and 2t + 1, and 8 on; sums that do not wait
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const uint4 q = queries[c];
                    const uint4 k = matrices(of_keys + staged + (in_row ^ c * 64) + h * 8 * ROW * 16);
                    mma(score[h][0], q.x, 0, q.y, 0, k.x, k.y);
                    mma(score[h][1], q.z, 0, q.w, 0, k.z, k.w);
                }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int h = i / 2, j = i % 2;
                if (tile * 16 + h * 8 + t * 2 + j < old + newest)
                    found[h][j] = (score[h][0][j] + score[h][1][j]) * scale;
                top = fmaxf(top, found[h][j]);
            }
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        }
        if (t == 0) maxima[0][of_warp] = top;
        __syncthreads();
        const float before = most;
#pragma unroll
        for (int w = 0; w < WARPS; w += 4) {
            const float4 some = *(const float4*)&maxima[g][w];
            most = fmaxf(fmaxf(most, fmaxf(some.x, some.y)), fmaxf(some.z, some.w));
        }
        const float shrink = power_of_two(before - most);
        total *= shrink;
        if (tile < tiles) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const u32 two = bf16_pair(
                    power_of_two(found[h][0] - most), power_of_two(found[h][1] - most));
                weights[0][of_weights + warp * 8 + h * 4] = two;
                total += low(two) + high(two);
            }
        }
        float all = total + __shfl_xor_sync(~0u, total, 1);
        all += __shfl_xor_sync(~0u, all, 2);
        if (t == 0) totals[0][of_warp] = all;
        if (first) {
            const float one = __shfl_sync(~0u, shrink, 8 * t);
            const float two = __shfl_sync(~0u, shrink, 8 * t + 4);
#pragma unroll
            for (int m = 0; m < OWN; ++m)
#pragma unroll
                for (int i = 0; i < 8; ++i) acc[m][i / 4][i % 4] *= i % 2 ? two : one;
        }
        __syncthreads();
#pragma unroll
        for (int m = 0; m < OWN; ++m) {
            const int n = warp + m * WARPS;
            if (n >= TILES) break;
#pragma unroll
            for (int k = 0; k < WARPS; ++k) {
                if (k >= active) break;
                const uint4 v = turned_matrices(of_values[m] + staged + k * TILE * 16);
                const u32* const two = weights[0] + of_weights + k * 8;
                mma(acc[m][k % 2], v.x, v.y, v.z, v.w, two[0], two[4]);
            }
        }
        if (first + WARPS < tiles) {
            __syncthreads();  // all have read
            if (tile + STAGED * WARPS < tiles) fetch(stage, tile + STAGED * WARPS);
            end_of_copies();
            if (++stage == STAGED) stage = 0;
        }
    }
    if (late) start_dependents();
    if (t == 0 && g < G) {
        float all = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) all += tiles ? totals[g][w] : 0.f;
        for (int to = warp; to < SPLITS; to += WARPS)
            give(&most_and_total[split][g], to, make_float2(most, all), &gifts);
    }
#pragma unroll
    for (int m = 0; m < OWN; ++m) {
        const int n = warp + m * WARPS, at = (n * 8 + g) * PAIRS + t;
        if (n >= TILES || t >= PAIRS) break;
        const float(&a)[2][4] = acc[m];
        give(&pieces[split][at % PIECE], at / PIECE,
             make_float4(a[0][0] + a[1][0], a[0][1] + a[1][1], a[0][2] + a[1][2],
                         a[0][3] + a[1][3]),
             &gifts);
    }
    wait_for_gifts(&gifts);
    for (int i = threadIdx.x; i < PIECE * 4; i += THREADS) {  // the blocks of a cluster
        const int four = i % PIECE, part = i / PIECE, at = split * PIECE + four;
        const int q = at % PAIRS * 2 + part % 2;
        const int d = at / PAIRS / 8 * 16 + at / PAIRS % 8 + part / 2 * 8;
        if (q >= G) continue;
        float top = NONE, weight = 0.f, sum = 0.f;
#pragma unroll
        for (int s = 0; s < SPLITS; ++s) top = fmaxf(top, most_and_total[s][q].x);
#pragma unroll
        for (int s = 0; s < SPLITS; ++s) {
            const float shrink = power_of_two(most_and_total[s][q].x - top);
            weight += most_and_total[s][q].y * shrink;
            sum += ((const float*)&pieces[s][four])[part] * shrink;
        }
        out[((size_t)row * heads * HEADS + query + q) * D + d] = to_bf16(__fdividef(sum, weight));
    }
}
