// y = W x for a few columns x, at the speed of memory: W is read once, in order, by every SM.
//
// W has `rows` outputs and K inputs, 4-bit or bf16. 16 rows are a tile; a warp takes SPANs of inputs
// of a tile, multiplies them on the tensor cores (mma.m16n8k16, W as the left operand, up to 8 * NT
// columns of x as the right one), and the warps of a block add up. Blocks stay and walk over tiles.
// Which input stands where inside a product does not matter as long as W and x agree: lane (g, t)
// takes inputs 8t..8t+7 of every 32, so that it reads 16 bytes at a time.
//
// 4-bit fields become bf16 as 128 + field, by setting bits; a second product takes 128 + zero away,
// which costs the tensor cores less than four subtractions cost everything else. Partial sums of a
// group are exact to fp32; scales are applied to them, in fp32.
//
// What a block will read first is asked for before it waits for the kernel before it: DEPTH spans
// into registers, `ahead` tiles into the second cache.
//
// Defined at compilation: BITS 4 | 16; GROUP inputs a scale (BITS 4); ZEROS 0 | 1; NT, MT (tiles a
// block works on at once), WARPS, DEPTH (spans in flight a warp); STAGE (x in shared memory),
// NORM (x is RMS-normalised, STAGE only), SINGLE (one column); BIAS; EPILOGUE.
#include "common.cuh"

#define STORE 0     // out[n][row] = y, bf16
#define RESIDUAL 1  // out[n][row] = residual[n][row] + y, bf16
#define SWIGLU 2    // tiles hold 8 rows of gate, 8 of up: out[n][row] = silu(gate) * up, bf16
#define LOGITS 3    // out[n][row] = y, fp32

#if BITS == 4
#define SPAN (GROUP < 64 ? 64 : GROUP)
#define LOADS (SPAN / 64)       // uint4 a lane, tile and span
#define GROUPS_A_SPAN (SPAN / GROUP)
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

// Ask for all of a block's weights to be brought into the second cache.
__device__ __forceinline__ void bring(const Weights& W, int block) {
#if BITS == 4
    const u32 bytes = MT * W.K * 8;
    prefetch_bytes((const char*)W.words + (size_t)block * bytes, bytes);
#elif EPILOGUE == SWIGLU
    const u32 bytes = MT * 8 * W.K * 2;
    prefetch_bytes((const char*)W.words + (size_t)block * bytes, bytes);
    prefetch_bytes((const char*)W.words + (size_t)W.rows * W.K + (size_t)block * bytes, bytes);
#else
    const u32 bytes = MT * 16 * W.K * 2;
    prefetch_bytes((const char*)W.words + (size_t)block * bytes, bytes);
#endif
}

// One span of all columns: acc += W[:, span] x[span].
__device__ __forceinline__ void multiply(
    float (&acc)[MT][NT][4], const Slot& slot, const char* x, size_t pitch, int columns, int span,
    int lane) {
    const int g = lane >> 2, t = lane & 3;
    const char* mine[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        const int column = SINGLE ? 0 : min(n * 8 + g, columns - 1);
        mine[n] = x + column * pitch + (size_t)span * SPAN * 2 + t * 16;
    }
#if BITS == 4
    float part[MT][NT][4];
#pragma unroll
    for (int i = 0; i < SPAN / 32; ++i) {
        if (i % (GROUP / 32) == 0) {
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int c = 0; c < 4; ++c) part[m][n][c] = 0.f;
        }
        uint4 b[NT];
#pragma unroll
        for (int n = 0; n < NT; ++n) b[n] = *(const uint4*)(mine[n] + i * 64);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#if ZEROS
            const u32 pair = slot.zero[m][i / (GROUP / 32)];
            const u32 upper = __byte_perm(pair, 0, 0x1010) | 0x80008000u;
            const u32 lower = __byte_perm(pair, 0, 0x3232) | 0x80008000u;
#else
            const u32 upper = 0xC308C308u, lower = 0xC308C308u;  // -(128 + 8)
#endif
            const uint4 four = slot.w[m][i / 2];
            const u32 words[2] = {i % 2 ? four.z : four.x, i % 2 ? four.w : four.y};
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const u32 a0 = raised(words[j]), a1 = raised(words[j] >> 4);
                const u32 a2 = raised(words[j] >> 8), a3 = raised(words[j] >> 12);
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    const u32 b0 = j ? b[n].z : b[n].x, b1 = j ? b[n].w : b[n].y;
                    mma(part[m][n], a0, a1, a2, a3, b0, b1);
                    mma(part[m][n], upper, lower, upper, lower, b0, b1);  // takes 128 + zero away
                }
            }
        }
        if ((i + 1) % (GROUP / 32) == 0) {
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                const u32 pair = slot.scale[m][i / (GROUP / 32)];
                const float upper = half_low(pair), lower = half_high(pair);
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    acc[m][n][0] += upper * part[m][n][0], acc[m][n][1] += upper * part[m][n][1];
                    acc[m][n][2] += lower * part[m][n][2], acc[m][n][3] += lower * part[m][n][3];
                }
            }
        }
    }
#else
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        uint4 b[NT];
#pragma unroll
        for (int n = 0; n < NT; ++n) b[n] = *(const uint4*)(mine[n] + i * 64);
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

// x -> shared memory; with NORM times the norm's weight, and 1 / rms of each column on the side.
__device__ __forceinline__ void stage(
    char* to, size_t pitch, float* rstd, const uint4* x, const uint4* weight, float eps, int columns,
    int K) {
    const int vectors = K / 8, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#if SINGLE
    const int first = threadIdx.x, stride = THREADS, from = 0, by = 1;
#else
    const int first = lane, stride = 32, from = warp, by = WARPS;
#endif
    for (int column = from; column < columns; column += by) {
        float square = 0.f;
        for (int i = first; i < vectors; i += stride) {
            uint4 v = x[(size_t)column * vectors + i];
#if NORM
            const uint4 w = weight[i];
            square += squared(v.x) + squared(v.y) + squared(v.z) + squared(v.w);
            v = make_uint4(times(v.x, w.x), times(v.y, w.y), times(v.z, w.z), times(v.w, w.w));
#endif
            *(uint4*)(to + column * pitch + i * 16) = v;
        }
#if NORM
        square = warp_sum(square);
#if SINGLE
        if (lane == 0) rstd[1 + warp] = square;
#else
        if (lane == 0) rstd[column] = rsqrtf(square / K + eps);
#endif
#endif
    }
    __syncthreads();
#if NORM && SINGLE
    float square = 0.f;
    for (int i = 0; i < WARPS; ++i) square += rstd[1 + i];
    if (threadIdx.x == 0) rstd[0] = rsqrtf(square / K + eps);
    // read after the next barrier
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) linear(
    Weights W, const char* x, const uint4* norm, float eps, const u16* bias, const u16* residual,
    void* out, int columns, int ahead) {
    extern __shared__ __align__(16) char shared[];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int spans = W.K / SPAN, blocks = W.rows / (16 * MT);
    const int slots = (spans + WARPS * DEPTH - 1) / (WARPS * DEPTH) * DEPTH;  // a warp and block
    float4* sums = (float4*)shared;  // [WARPS][MT][NT][32]
    float* rstd = (float*)(sums + WARPS * MT * NT * 32);
    char* staged = (char*)(rstd + 64);
    const size_t pitch = STAGE ? (size_t)W.K * 2 + 64 : (size_t)W.K * 2;

    Slot ring[DEPTH];
    int next_block = blockIdx.x, next = 0;  // what is fetched next
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
        const int span = warp + next * WARPS;
        if (next_block < blocks && span < spans) fetch(ring[d], W, next_block, span, lane);
        ++next;
    }
    if (next == slots) next = 0, next_block += gridDim.x;
    if (threadIdx.x < ahead && blockIdx.x + threadIdx.x * gridDim.x < blocks)
        bring(W, blockIdx.x + threadIdx.x * gridDim.x);
    start_dependents();
    wait_for_prior();
#if STAGE
    stage(staged, pitch, rstd, (const uint4*)x, norm, eps, columns, W.K);
    const char* source = staged;
#else
    const char* source = x;
#endif
    for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
        float acc[MT][NT][4] = {};
        for (int slot = 0; slot < slots; slot += DEPTH) {
#pragma unroll
            for (int d = 0; d < DEPTH; ++d) {
                const int span = warp + (slot + d) * WARPS;
                if (span < spans) multiply(acc, ring[d], source, pitch, columns, span, lane);
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
                    sums[((warp * MT + m) * NT + n) * 32 + lane] =
                        make_float4(acc[m][n][0], acc[m][n][1], acc[m][n][2], acc[m][n][3]);
        __syncthreads();
        for (int e = threadIdx.x; e < MT * 8 * columns; e += THREADS) {
            const int g = e % 8, m = e / 8 % MT, n = e / (8 * MT);
            const float* at = (const float*)&sums[(m * NT + n / 8) * 32 + g * 4 + n % 8 / 2] + n % 2;
            float upper = 0.f, lower = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                upper += at[w * MT * NT * 128], lower += at[w * MT * NT * 128 + 2];
            }
            if (NORM) upper *= rstd[n], lower *= rstd[n];
            const int tile = block * MT + m;
#if EPILOGUE == SWIGLU
            const float y = upper / (1.f + __expf(-upper)) * lower;
            ((u16*)out)[(size_t)n * (W.rows / 2) + tile * 8 + g] = to_bf16(y);
#else
            const int row = tile * 16 + g;
            const size_t to = (size_t)n * W.rows + row;
#if BIAS
            upper += from_bf16(bias[row]), lower += from_bf16(bias[row + 8]);
#endif
#if EPILOGUE == LOGITS
            ((float*)out)[to] = upper, ((float*)out)[to + 8] = lower;
#elif EPILOGUE == RESIDUAL
            ((u16*)out)[to] = to_bf16(from_bf16(residual[to]) + upper);
            ((u16*)out)[to + 8] = to_bf16(from_bf16(residual[to + 8]) + lower);
#else
            ((u16*)out)[to] = to_bf16(upper), ((u16*)out)[to + 8] = to_bf16(lower);
#endif
#endif
        }
    }
}
