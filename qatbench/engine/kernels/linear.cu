// y = W x for a few columns x, at the speed of memory: W is read once, in order. Blocks stay and walk
// over tiles of 16 rows; a warp takes SPANs of inputs of a tile, multiplies them on the tensor cores
// (mma.m16n8k16, W as the left operand, up to 8 * NT columns of x as the right one), and the warps
// of a block add up. DEPTH spans a warp are always on their way, into registers or through shared
// memory, the first of them before the kernel before this one has ended.
//
// Which input stands where inside a product does not matter as long as W and x agree: lane (g, t)
// takes inputs 8t..8t+7 of every 32, so that it reads 16 bytes at a time.
//
// 4-bit fields become bf16 as 128 + field, by setting bits: (128 + zero) times the sum of x over a
// group is taken away from the group's sum before its scale is applied, all in fp32. The sums of x
// are known to each warp for its own spans. With more than 8 columns the fields are made exact
// first, which then costs less.
//
// The RMS norm of a product's input is split: whoever makes x also writes x times the norm's weight,
// which is what comes in here, and adds up the squares of x; 1 / rms is applied to y.
//
// Defined at compilation: BITS 4 | 16; GROUP inputs a scale (BITS 4); ZEROS 0 | 1; NT, MT (tiles a
// block works on at once), WARPS, DEPTH, DIRECT 0 | 1, BLOCKS (that share a multiprocessor); SINGLE
// (one column); EPILOGUE.
#include "common.cuh"

#define PAIRED (EPILOGUE == SWIGLU)  // a tile has 8 rows of gate and 8 of up
#if BITS == 4
#define SPAN (GROUP < 64 ? 64 : GROUP)
#define LOADS (SPAN / 64)  // uint4 a lane, tile and span
#define GROUPS (SPAN / GROUP)
#define RAISED (NT == 1)
#define CHAINS (NT * MT == 1 ? 2 : 1)  // sums that do not wait for each other
#define PIECES (MT * GROUPS * (1 + ZEROS) * 2)  // of 16 bytes: scales, then zeros
#else
#define SPAN 64
#define LOADS 4
#define RAISED 0
#endif

// One span of a block's tiles on its way: in a lane's registers (DIRECT), or in shared memory, where
// a lane reads the words that it asked for itself; scales are shared by the warp then.
struct Slot {
#if DIRECT
#define WORDS(slot, m, i) (slot).w[m][i]
#define SCALE(slot, kind, m, group) (slot).scale[kind][m][group]
    uint4 w[MT][LOADS];
#if BITS == 4
    u32 scale[1 + ZEROS][MT][GROUPS];  // fp16 of rows g and g + 8; bf16 of 128 + zero
#endif
#else
#define WORDS(slot, m, i) (slot).w[m][i][lane]
#define SCALE(slot, kind, m, group) (slot).scale[kind][m][group][g]
    uint4 w[MT][LOADS][32];
#if BITS == 4
    u32 scale[1 + ZEROS][MT][GROUPS][8];
#endif
#endif
};

struct Weights {
    const uint4* words;  // BITS 4: [tile][K / 64][lane]; BITS 16: bf16 [rows][K]
    const u32* scales;   // [tile][K / GROUP][8]
    const u32* zeros;
    int rows, K;
};

__device__ __forceinline__ void copy(uint4* to, const uint4* from) {
#if DIRECT
    *to = stream(from);
#else
    copy_async(to, from);
#endif
}

// What a lane asks for next. A block's tiles are `slots` spans for each warp, some of which may be
// beyond the last (DIRECT: a multiple of DEPTH, so that each slot has its registers).
struct Feed {
    const uint4* words;  // of its block's tiles, from input 0 on
#if BITS == 4
    const u32* scales;
    const u32* zeros;  // DIRECT
#else
    size_t lower;  // from a lane's upper row to its lower one, in vectors of 8
#endif
    int block, index, slots, spans, blocks;

    __device__ __forceinline__ void enter(const Weights& W) {
        const int lane = threadIdx.x & 31;
        const size_t tile = (size_t)block * MT;
#if BITS == 4
        words = W.words + tile * (W.K / 64) * 32 + lane;
#if DIRECT
        const size_t at = tile * (W.K / GROUP) * 8 + (lane >> 2);
        scales = W.scales + at, zeros = W.zeros + at;
#else
        const int half = lane % 2, group = lane / 2 % GROUPS, m = lane / (2 * GROUPS) % MT;
        const u32* from = ZEROS && lane >= PIECES / 2 ? W.zeros : W.scales;
        scales = from + ((tile + m) * (W.K / GROUP) + group) * 8 + half * 4;
#endif
#else
        const size_t step = W.K / 8, row = tile * (PAIRED ? 8 : 16) + (lane >> 2);
        words = W.words + row * step + (lane & 3);
        lower = (PAIRED ? W.rows / 2 : 8) * step;
#endif
    }

    __device__ __forceinline__ void ask(Slot& to, const Weights& W) {
        const int lane = threadIdx.x & 31, span = (threadIdx.x >> 5) + index * WARPS;
        if (block < blocks && span < spans) {
#pragma unroll
            for (int m = 0; m < MT; ++m) {
#if BITS == 4
                const uint4* from = words + m * (W.K / 64) * 32 + span * (LOADS * 32);
#pragma unroll
                for (int i = 0; i < LOADS; ++i) copy(&WORDS(to, m, i), from + i * 32);
#if DIRECT
                const int at = (m * (W.K / GROUP) + span * GROUPS) * 8;
#pragma unroll
                for (int i = 0; i < GROUPS; ++i) {
                    to.scale[0][m][i] = scales[at + i * 8];
                    if (ZEROS) to.scale[ZEROS][m][i] = zeros[at + i * 8];
                }
#endif
#else
                const uint4* from = words + (size_t)m * (PAIRED ? W.K : 2 * W.K) + span * 8;
                copy(&WORDS(to, m, 0), from), copy(&WORDS(to, m, 1), from + lower);
                copy(&WORDS(to, m, 2), from + 4), copy(&WORDS(to, m, 3), from + lower + 4);
#endif
            }
#if BITS == 4 && !DIRECT
            if (lane < PIECES)
                copy_async(&to.scale[0][0][0][0] + lane * 4, scales + span * (GROUPS * 8));
#endif
        }
        if (!DIRECT) end_of_copies();
        if (++index == slots) {
            index = 0, block += gridDim.x;
            if (block < blocks) enter(W);
        }
    }
};

// Where the columns of x are that a lane reads.
struct Columns {
    const uint4* at[NT];

    __device__ __forceinline__ Columns(const uint4* x, int K, int columns) {
        const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
        for (int n = 0; n < NT; ++n)
            at[n] = x + (size_t)(SINGLE ? 0 : min(n * 8 + g, columns - 1)) * (K / 8) + t;
    }
};

#if RAISED
// Sums of x over the groups of a warp's spans, columns 2t and 2t + 1 in [group][t]: products with
// ones put them where they will be needed.
__device__ __forceinline__ void add_up(float2* sums, const Columns& x, int spans) {
    const int lane = threadIdx.x & 31;
#pragma unroll 1
    for (int span = threadIdx.x >> 5; span < spans; span += WARPS)
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
            float sum[4] = {};
#pragma unroll
            for (int k = 0; k < GROUP / 32; ++k) {
                const uint4 b = x.at[0][span * (SPAN / 8) + (group * (GROUP / 32) + k) * 4];
                const u32 one = 0x3F803F80u;
                mma(sum, one, one, one, one, b.x, b.y);
                mma(sum, one, one, one, one, b.z, b.w);
            }
            if (lane < 4) sums[(span * GROUPS + group) * 4 + lane] = make_float2(sum[0], sum[1]);
        }
    __syncwarp();
}
#endif

// One span of all columns: acc += W[:, span] x[span].
__device__ __forceinline__ void multiply(
    float (&acc)[MT][NT][4], const Slot& slot, const Columns& x, const float2* sums, int span) {
    const int lane = threadIdx.x & 31;
#if BITS == 4
    const int g = lane >> 2;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        float part[CHAINS][MT][NT][4] = {};
#pragma unroll
        for (int k = 0; k < GROUP / 32; ++k) {
            const int i = group * (GROUP / 32) + k;
            uint4 b[NT];
#pragma unroll
            for (int n = 0; n < NT; ++n) b[n] = x.at[n][span * (SPAN / 8) + i * 4];
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                const uint4 four = WORDS(slot, m, i / 2);
                const u32 words[2] = {i % 2 ? four.z : four.x, i % 2 ? four.w : four.y};
#if !RAISED
                const u32 pair = ZEROS ? SCALE(slot, ZEROS, m, group) : 0x43084308u;
                const u32 upper = __byte_perm(pair, 0, 0x1010) | 0x80008000u;  // -(128 + zero)
                const u32 lower = __byte_perm(pair, 0, 0x3232) | 0x80008000u;
#endif
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const u32 w = words[j];
#if RAISED
                    const u32 a[4] = {raised(w), raised(w >> 4), raised(w >> 8), raised(w >> 12)};
#else
                    const u32 a[4] = {integers(w, upper), integers(w >> 4, lower),
                                      integers(w >> 8, upper), integers(w >> 12, lower)};
#endif
#pragma unroll
                    for (int n = 0; n < NT; ++n)
                        mma(part[j % CHAINS][m][n], a[0], a[1], a[2], a[3], j ? b[n].z : b[n].x,
                            j ? b[n].w : b[n].y);
                }
            }
        }
#if RAISED
        const float2 sum = sums[(span * GROUPS + group) * 4 + lane % 4];
#endif
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            const u32 pair = SCALE(slot, 0, m, group);
            const float scale[2] = {half_low(pair), half_high(pair)};
#if RAISED
            const u32 zeros = ZEROS ? SCALE(slot, ZEROS, m, group) : 0x43084308u;
            const float less[2] = {low(zeros), high(zeros)};
#endif
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int c = 0; c < 4; c += SINGLE ? 2 : 1) {
                    float found = part[0][m][n][c];
                    if (CHAINS == 2) found += part[CHAINS - 1][m][n][c];
#if RAISED
                    found -= less[c / 2] * (c % 2 ? sum.y : sum.x);
#endif
                    acc[m][n][c] += scale[c / 2] * found;
                }
        }
    }
#else
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        uint4 b[NT];
#pragma unroll
        for (int n = 0; n < NT; ++n) b[n] = x.at[n][span * (SPAN / 8) + i * 4];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            const uint4 u = WORDS(slot, m, 2 * i), v = WORDS(slot, m, 2 * i + 1);
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                mma(acc[m][n], u.x, v.x, u.y, v.y, b[n].x, b[n].y);
                mma(acc[m][n], u.z, v.z, u.w, v.w, b[n].z, b[n].w);
            }
        }
    }
#endif
}

// Sums of a block's warps, in turns: who writes the next is past the barrier after the last.
#if SINGLE
typedef float2 Sums[WARPS][MT][8];  // rows g and g + 8
#else
typedef float4 Sums[WARPS][MT][NT][32];
#endif

// Add up what the warps of a block have of its tiles, and finish them.
__device__ __forceinline__ void conclude(
    Sums& sums, const float (&acc)[MT][NT][4], const Output& output, int block, int rows,
    int columns) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#if SINGLE
        if (lane % 4 == 0) sums[warp][m][lane / 4] = make_float2(acc[m][0][0], acc[m][0][2]);
#else
#pragma unroll
        for (int n = 0; n < NT; ++n)
            if (n * 8 + (lane & 3) * 2 < columns)
                sums[warp][m][n][lane] =
                    make_float4(acc[m][n][0], acc[m][n][1], acc[m][n][2], acc[m][n][3]);
#endif
    __syncthreads();
    // Eight threads a tile and column, side by side; all of a warp stay together.
    const int work = MT * 8 * columns;
    for (int base = warp * 32; base < work; base += WARPS * 32) {
        const int e = min(base + lane, work - 1), g = e % 8, m = e / 8 % MT, n = e / (8 * MT);
        float upper = 0.f, lower = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
#if SINGLE
            const float2 one = sums[w][m][g];
            upper += one.x, lower += one.y;
#else
            const float* at = (const float*)&sums[w][m][n / 8][g * 4 + n % 8 / 2] + n % 2;
            upper += at[0], lower += at[2];
#endif
        }
        const bool on = base + lane < work;
        finish(output, EPILOGUE, block * MT + m, g, n, upper, lower, rows, on);
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) linear(
    Weights W, const uint4* x, Output output, int columns) {
    extern __shared__ __align__(128) char dynamic[];
    __shared__ Sums sums[2];
    const int warp = threadIdx.x >> 5;
    const int spans = W.K / SPAN, blocks = W.rows / (16 * MT);
    Feed feed;
    feed.block = blockIdx.x, feed.index = 0, feed.spans = spans, feed.blocks = blocks;
#if DIRECT
    float2* groups = (float2*)dynamic;
    Slot ring[DEPTH];
    feed.slots = (spans + WARPS * DEPTH - 1) / (WARPS * DEPTH) * DEPTH;
#else
    Slot* ring = (Slot*)dynamic + warp * DEPTH;
    float2* groups = (float2*)((Slot*)dynamic + WARPS * DEPTH);
    feed.slots = max(1, (spans - warp + WARPS - 1) / WARPS);
    int slot = 0;
#endif
    feed.enter(W);
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) feed.ask(ring[d], W);
    wait_for_prior();
    start_dependents();
    const Columns columns_of(x, W.K, columns);
#if RAISED
    add_up(groups, columns_of, spans);
#endif
    for (int block = blockIdx.x, turn = 0; block < blocks; block += gridDim.x, turn ^= 1) {
        float acc[MT][NT][4] = {};
#if DIRECT
        for (int first = warp; first < warp + feed.slots * WARPS; first += DEPTH * WARPS) {
#pragma unroll
            for (int d = 0; d < DEPTH; ++d) {
                const int span = first + d * WARPS;
                if (span < spans) multiply(acc, ring[d], columns_of, groups, span);
                feed.ask(ring[d], W);
            }
        }
#else
        for (int i = 0, span = warp; i < feed.slots; ++i, span += WARPS) {
            wait_for_copies<DEPTH - 1>();
            __syncwarp();
            if (span < spans) multiply(acc, ring[slot], columns_of, groups, span);
            __syncwarp();
            feed.ask(ring[slot], W);
            slot = slot + 1 == DEPTH ? 0 : slot + 1;
        }
#endif
        conclude(sums[turn], acc, output, block, W.rows, columns);
    }
}
