// The rest of a decoding step, and INT4 -> bf16 for prefill.
#include "common.cuh"

// x[row] = table[token[row]]; scaled = x * weight, and the squares of x, for the first norm; the
// sums of squares of all other norms become zero, and the largest logit none. grid (rows), 256
// threads
extern "C" __global__ void __launch_bounds__(256) embed(
    const long long* token, const uint4* table, const uint4* weight, uint4* x, uint4* scaled,
    double* squares, u64* top, int vectors, int norms) {
    __shared__ float parts[8];
    wait_for_prior();
    start_dependents();
    const int row = blockIdx.x, rows = gridDim.x;
    const uint4* from = table + (size_t)token[row] * vectors;
    float square = 0.f;
    for (int i = threadIdx.x; i < vectors; i += 256) {
        const uint4 v = from[i], w = weight[i];
        square += squared(v.x) + squared(v.y) + squared(v.z) + squared(v.w);
        x[(size_t)row * vectors + i] = v;
        scaled[(size_t)row * vectors + i] =
            make_uint4(times(v.x, w.x), times(v.y, w.y), times(v.z, w.z), times(v.w, w.w));
    }
    for (int i = threadIdx.x + 1; i < norms; i += 256) squares[(size_t)i * rows + row] = 0.0;
    square = warp_sum(square);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = square;
    __syncthreads();
    if (threadIdx.x) return;
    square = 0.f;
    for (int i = 0; i < 8; ++i) square += parts[i];
    squares[row] = square;
    top[row] = 0;
}

// What follows a dense product y [columns][rows] that a library made; grid (tiles / 32, columns),
// 256 threads: eight a tile. EPILOGUE is defined at compilation.
#ifdef EPILOGUE
extern "C" __global__ void __launch_bounds__(256) after(const u16* y, Output output, int rows) {
    wait_for_prior();
    start_dependents();
    const int tiles = rows / 16, n = blockIdx.y, g = threadIdx.x % 8;
    const int tile = min(blockIdx.x * 32 + (int)threadIdx.x / 8, tiles - 1);
    const bool on = blockIdx.x * 32 + threadIdx.x / 8 < tiles;
#if EPILOGUE == SWIGLU
    const int upper = tile * 8 + g, lower = rows / 2 + upper;
#else
    const int upper = tile * 16 + g, lower = upper + 8;
#endif
    y += (size_t)n * rows;
    const float f =
        output.squares ? rsqrtf((float)output.squares[n] * output.per_input + output.eps) : 1.f;
    finish<1>(output, before(output, tile, g, n, rows), tile, g, n, from_bf16(y[upper]) * f,
           from_bf16(y[lower]) * f, rows, on);
}
#endif

// Where a row stands: one token on, or all that is known of it.
struct Row {
    u64* best;      // zero before and after, as is counter
    int* counter;
    long long *token, *told;  // told: [rows][room]
    int *count, *filled, *turned;
    int room;
};

// The largest key of all 256 threads of all blocks of a row: then the row is one token on.
__device__ __forceinline__ void settle(const Row& r, int row, u64 most, u64 (&found)[8]) {
    for (int i = 16; i; i /= 2) {
        const u64 other = __shfl_xor_sync(~0u, most, i);
        most = other > most ? other : most;
    }
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = most;
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 0; i < 8; ++i) most = found[i] > most ? found[i] : most;
    atomicMax(r.best + row, most);
    __threadfence();
    if (atomicAdd(r.counter + row, 1) != gridDim.x - 1) return;
    __threadfence();
    const u32 chosen = token_of(atomicExch(r.best + row, 0ull));
    r.counter[row] = 0;
    r.token[row] = chosen;
    if (r.count[row] < r.room) r.told[(size_t)row * r.room + r.count[row]] = chosen;
    ++r.count[row], ++r.filled[row], ++r.turned[row];
}

// The likeliest token of each row, the lowest of equal ones. grid (blocks, rows), 256 threads
extern "C" __global__ void __launch_bounds__(256) choose(
    const float* logits, int tokens, int stride, Row r) {
    __shared__ u64 found[8];
    const int row = blockIdx.y;
    wait_for_prior();
    start_dependents();
    logits += (size_t)row * stride;
    u64 most = 0;
    for (int i = blockIdx.x * 256 + threadIdx.x; i < tokens; i += gridDim.x * 256) {
        const u64 one = key(logits[i], i);
        most = one > most ? one : most;
    }
    settle(r, row, most, found);
}

// The same for one row whose logits are those of a screen: weights of 8 bits. A logit is off by at most
// |x| times the norm of what its weights lack, `errors`, the largest of which is `most_error`. So tokens
// that may be the likeliest are those that could reach what the one on top, whose key is `top`, has at
// least; their logits are computed anew, from W in bf16, and written; all where something is no number.
// grid (blocks), 256 threads
extern "C" __global__ void __launch_bounds__(256) decide(
    float* logits, int tokens, const u64* top, const float* errors, float most_error,
    const uint4* W, const uint4* x, int vectors, const double* squares, float eps, Row r) {
    extern __shared__ uint4 staged[];  // x
    __shared__ float parts[8];
    __shared__ u64 found[8];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    wait_for_prior();
    start_dependents();
    const float factor = rsqrtf((float)(squares[0] / (vectors * 8)) + eps);
    float square = 0.f;
    for (int i = threadIdx.x; i < vectors; i += 256) {
        const uint4 v = x[i];
        square += squared(v.x) + squared(v.y) + squared(v.z) + squared(v.w);
        staged[i] = v;
    }
    square = warp_sum(square);
    if (lane == 0) parts[warp] = square;
    __syncthreads();
    square = 0.f;
    for (int i = 0; i < 8; ++i) square += parts[i];
    const float norm = sqrtf(square) * factor;
    const float least = of_order((u32)(top[0] >> 32)) - errors[token_of(top[0])] * norm;
    u64 most = 0;
    for (int begin = (blockIdx.x * 8 + warp) * 32; begin < tokens; begin += gridDim.x * 256) {
        const int i = begin + lane;
        bool may_be = false;
        if (i < tokens) {
            const float v = logits[i];
            may_be = !(v + most_error * norm < least) && !(v + errors[i] * norm < least);
        }
        for (u32 left = __ballot_sync(~0u, may_be); left; left &= left - 1) {
            const int token = begin + __ffs(left) - 1;
            const uint4* const w = W + (size_t)token * vectors;
            float sum = 0.f;
            for (int k = lane; k < vectors; k += 32) {
                const uint4 a = w[k], b = staged[k];
                sum += low(a.x) * low(b.x) + high(a.x) * high(b.x);
                sum += low(a.y) * low(b.y) + high(a.y) * high(b.y);
                sum += low(a.z) * low(b.z) + high(a.z) * high(b.z);
                sum += low(a.w) * low(b.w) + high(a.w) * high(b.w);
            }
            const float exact = warp_sum(sum) * factor;
            if (lane == 0) logits[token] = exact;
            const u64 one = key(exact, token);
            most = one > most ? one : most;
        }
    }
    settle(r, 0, most, found);
}

#ifdef GROUP
// Read once: past the first cache.
__device__ __forceinline__ uint4 stream(const uint4* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

// Packed words -> bf16 [rows][K]; with `paired` tiles hold 8 rows of each half. grid (tiles),
// 256 threads. GROUP and ZEROS are defined at compilation.
extern "C" __global__ void __launch_bounds__(256) dequantize(
    const uint4* words, const u32* scales, const u32* zeros, u16* out, int rows, int K,
    int paired) {
    wait_for_prior();  // whoever reads what was here before
    const int tile = blockIdx.x, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int upper = paired ? tile * 8 + g : tile * 16 + g;
    const int lower = paired ? rows / 2 + upper : upper + 8;
    for (int chunk = threadIdx.x >> 5; chunk < K / 64; chunk += 8) {
        const uint4 four = stream(words + ((size_t)tile * (K / 64) + chunk) * 32 + lane);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int at = chunk * 64 + h * 32 + t * 8;
            const size_t group = ((size_t)tile * (K / GROUP) + at / GROUP) * 8 + g;
            const float su = half_low(scales[group]), sl = half_high(scales[group]);
#if ZEROS
            const u32 pair = zeros[group];
            const u32 mu = __byte_perm(pair, 0, 0x1010) | 0x80008000u;
            const u32 ml = __byte_perm(pair, 0, 0x3232) | 0x80008000u;
#else
            const u32 mu = MINUS_136, ml = MINUS_136;
#endif
            const u32 a = h ? four.z : four.x, b = h ? four.w : four.y;
            const u32 u[4] = {integers(a, mu), integers(turned(a, 8), mu), integers(b, mu),
                              integers(turned(b, 8), mu)};
            const u32 l[4] = {integers(turned(a, 4), ml), integers(turned(a, 12), ml),
                              integers(turned(b, 4), ml), integers(turned(b, 12), ml)};
            u32 x[4], y[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                x[i] = bf16_pair(low(u[i]) * su, high(u[i]) * su);
                y[i] = bf16_pair(low(l[i]) * sl, high(l[i]) * sl);
            }
            *(uint4*)(out + (size_t)upper * K + at) = make_uint4(x[0], x[1], x[2], x[3]);
            *(uint4*)(out + (size_t)lower * K + at) = make_uint4(y[0], y[1], y[2], y[3]);
        }
    }
}
#endif
