// y = W x for a few columns x, at the speed of memory: W is read once, in order, by every SM.
//
// W has `rows` outputs and K inputs, 4-bit or bf16. 16 rows are a tile; a warp takes SPANs of inputs
// of a tile, multiplies them on the tensor cores (mma.m16n8k16, W as the left operand, up to 8 * NT
// columns of x as the right one), and the warps of a block add up. Blocks stay and walk over tiles.
// Which input stands where inside a product does not matter as long as W and x agree: lane (g, t)
// takes inputs 8t..8t+7 of every 32, so that it reads 16 bytes at a time.
//
// 4-bit fields become bf16 as 128 + field, by setting bits. For few columns a second product takes
// 128 + zero away, which costs the tensor cores less than subtractions cost everything else. Scales
// are applied to the sums of a group, in fp32.
//
// The RMS norm of a product's input is split: whoever makes x also writes x times the norm's weight,
// which is what comes in here, and adds up the squares of x; 1 / rms is applied to y.
//
// Defined at compilation: BITS 4 | 16; GROUP inputs a scale (BITS 4); ZEROS 0 | 1; NT, MT (tiles a
// block works on at once), WARPS, DEPTH (spans in flight a warp), BLOCKS (that
// share a multiprocessor); SINGLE (one column); EPILOGUE.
#include "common.cuh"

#if BITS == 4
#define SPAN (GROUP < 64 ? 64 : GROUP)
#define LOADS (SPAN / 64)       // uint4 a lane, tile and span
#define GROUPS_A_SPAN (SPAN / GROUP)
#define RAISED (NT == 1)
#define CHAINS (NT * MT == 1 ? 2 : 1)  // sums that do not wait for each other
#else
#define SPAN 64
#define LOADS 4
#endif
#define THREADS (WARPS * 32)

struct Slot {
    uint4 w[MT][LOADS];
#if BITS == 4
    u32 scale[MT][GROUPS_A_SPAN];
#if ZEROS
    u32 zero[MT][GROUPS_A_SPAN];
#endif
#endif
};

struct Weights {
    const uint4* words;  // BITS 4: [tile][K / 64][lane]; BITS 16: bf16 [rows][K]
    const u32* scales;   // [tile][K / GROUP][8]: fp16 of rows g and g + 8
    const u32* zeros;    // the same: small integers 128 + zero as bf16
    int rows, K;
};

__device__ __forceinline__ void fetch(Slot& slot, const Weights& W, int block, int span, int lane) {
    const int g = lane >> 2;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
        const int tile = block * MT + m;
#if BITS == 4
        const uint4* from = W.words + ((size_t)tile * (W.K / 64) + span * LOADS) * 32 + lane;
#pragma unroll
        for (int i = 0; i < LOADS; ++i) slot.w[m][i] = stream(from + i * 32);
        const size_t at = ((size_t)tile * (W.K / GROUP) + span * GROUPS_A_SPAN) * 8 + g;
#pragma unroll
        for (int i = 0; i < GROUPS_A_SPAN; ++i) {
            slot.scale[m][i] = W.scales[at + i * 8];
#if ZEROS
            slot.zero[m][i] = W.zeros[at + i * 8];
#endif
        }
#else
#if EPILOGUE == SWIGLU
        const int upper = tile * 8 + g, lower = W.rows / 2 + upper;
#else
        const int upper = tile * 16 + g, lower = upper + 8;
#endif
        const int step = W.K / 8, at = span * 8 + (lane & 3);  // in vectors of 8
        const uint4* a = W.words + (size_t)upper * step + at;
        const uint4* b = W.words + (size_t)lower * step + at;
        slot.w[m][0] = stream(a), slot.w[m][1] = stream(b);
        slot.w[m][2] = stream(a + 4), slot.w[m][3] = stream(b + 4);
#endif
    }
}

// One span of all columns: acc += W[:, span] x[span].
__device__ __forceinline__ void multiply(
    float (&acc)[MT][NT][4], const Slot& slot, const uint4* x, int K, int columns, int span,
    int lane) {
    const int g = lane >> 2, t = lane & 3;
    const uint4* mine[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        const int column = SINGLE ? 0 : min(n * 8 + g, columns - 1);
        mine[n] = x + (size_t)column * (K / 8) + span * (SPAN / 8) + t;
    }
#if BITS == 4
#pragma unroll
    for (int group = 0; group < GROUPS_A_SPAN; ++group) {
        float part[CHAINS][MT][NT][4] = {};
#if RAISED
        float less[CHAINS][MT][NT][4] = {};
#endif
#pragma unroll
        for (int k = 0; k < GROUP / 32; ++k) {
            const int i = group * (GROUP / 32) + k;
            uint4 b[NT];
#pragma unroll
            for (int n = 0; n < NT; ++n) b[n] = mine[n][i * 4];
#pragma unroll
            for (int m = 0; m < MT; ++m) {
#if ZEROS
                const u32 pair = slot.zero[m][group];
                const u32 upper = __byte_perm(pair, 0, 0x1010) | 0x80008000u;
                const u32 lower = __byte_perm(pair, 0, 0x3232) | 0x80008000u;
#else
                const u32 upper = 0xC308C308u, lower = 0xC308C308u;  // -(128 + 8)
#endif
                const uint4 four = slot.w[m][i / 2];
                const u32 words[2] = {i % 2 ? four.z : four.x, i % 2 ? four.w : four.y};
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const u32 w = words[j];
                    const int c = j % CHAINS;
#if RAISED
                    const u32 a[4] = {raised(w), raised(w >> 4), raised(w >> 8), raised(w >> 12)};
#else
                    const u32 a[4] = {integers(w, upper), integers(w >> 4, lower),
                                      integers(w >> 8, upper), integers(w >> 12, lower)};
#endif
#pragma unroll
                    for (int n = 0; n < NT; ++n) {
                        const u32 b0 = j ? b[n].z : b[n].x, b1 = j ? b[n].w : b[n].y;
                        mma(part[c][m][n], a[0], a[1], a[2], a[3], b0, b1);
#if RAISED
                        mma(less[c][m][n], upper, lower, upper, lower, b0, b1);
#endif
                    }
                }
            }
        }
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            const u32 pair = slot.scale[m][group];
            const float scale[2] = {half_low(pair), half_high(pair)};
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    float sum = part[0][m][n][c];
#if RAISED
                    sum += less[0][m][n][c];
                    if (CHAINS == 2) sum += part[CHAINS - 1][m][n][c] + less[CHAINS - 1][m][n][c];
#endif
                    acc[m][n][c] += scale[c / 2] * sum;
                }
        }
    }
#else
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        uint4 b[NT];
#pragma unroll
        for (int n = 0; n < NT; ++n) b[n] = mine[n][i * 4];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            const uint4 u = slot.w[m][2 * i], v = slot.w[m][2 * i + 1];
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                mma(acc[m][n], u.x, v.x, u.y, v.y, b[n].x, b[n].y);
                mma(acc[m][n], u.z, v.z, u.w, v.w, b[n].z, b[n].w);
            }
        }
    }
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) linear(
    Weights W, const uint4* x, Output output, int columns) {
    __shared__ float4 sums[WARPS][MT][NT][32];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int spans = W.K / SPAN, blocks = W.rows / (16 * MT);
    const int slots = (spans + WARPS * DEPTH - 1) / (WARPS * DEPTH) * DEPTH;  // a warp and block

    Slot ring[DEPTH];
    int next_block = blockIdx.x, next = 0;  // what is fetched next
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
        const int span = warp + next * WARPS;
        if (next_block < blocks && span < spans) fetch(ring[d], W, next_block, span, lane);
        ++next;
    }
    if (next == slots) next = 0, next_block += gridDim.x;
    wait_for_prior();
    start_dependents();
    for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
        float acc[MT][NT][4] = {};
        for (int slot = 0; slot < slots; slot += DEPTH) {
#pragma unroll
            for (int d = 0; d < DEPTH; ++d) {
                const int span = warp + (slot + d) * WARPS;
                if (span < spans) multiply(acc, ring[d], x, W.K, columns, span, lane);
                const int coming = warp + (next + d) * WARPS;
                if (next_block < blocks && coming < spans)
                    fetch(ring[d], W, next_block, coming, lane);
            }
            next += DEPTH;
            if (next == slots) next = 0, next_block += gridDim.x;
        }
        __syncthreads();  // the sums of the block before were read
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int n = 0; n < NT; ++n)
                if (n * 8 + (lane & 3) * 2 < columns)
                    sums[warp][m][n][lane] =
                        make_float4(acc[m][n][0], acc[m][n][1], acc[m][n][2], acc[m][n][3]);
        __syncthreads();
        // Eight threads a tile and column, in one group of lanes; all of a warp stay together.
        const int work = MT * 8 * columns;
        for (int base = warp * 32; base < work; base += THREADS) {
            const int e = min(base + lane, work - 1), g = e % 8, m = e / 8 % MT, n = e / (8 * MT);
            const float* at = (const float*)&sums[0][m][n / 8][g * 4 + n % 8 / 2] + n % 2;
            float upper = 0.f, lower = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w)
                upper += at[w * MT * NT * 128], lower += at[w * MT * NT * 128 + 2];
            finish(output, block * MT + m, g, n, upper, lower, W.rows, base + lane < work);
        }
    }
}
