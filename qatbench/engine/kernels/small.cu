// The rest of a decoding step, and INT4 -> bf16 for prefill.
#include "common.cuh"

// out[row] = table[token[row]], vectors of 8; grid (rows)
extern "C" __global__ void embed(const long long* token, const uint4* table, uint4* out, int vectors) {
    start_dependents();
    wait_for_prior();
    const uint4* from = table + (size_t)token[blockIdx.x] * vectors;
    for (int i = threadIdx.x; i < vectors; i += blockDim.x)
        out[(size_t)blockIdx.x * vectors + i] = from[i];
}

// out[row] = x[row] / rms(x[row]) * weight; grid (rows), 256 threads
extern "C" __global__ void __launch_bounds__(256) rmsnorm(
    const uint4* x, const uint4* weight, float eps, uint4* out, int vectors) {
    __shared__ float squares[8];
    start_dependents();
    wait_for_prior();
    x += (size_t)blockIdx.x * vectors, out += (size_t)blockIdx.x * vectors;
    float square = 0.f;
    for (int i = threadIdx.x; i < vectors; i += 256) {
        const uint4 v = x[i];
        square += squared(v.x) + squared(v.y) + squared(v.z) + squared(v.w);
    }
    square = warp_sum(square);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = square;
    __syncthreads();
    square = 0.f;
    for (int i = 0; i < 8; ++i) square += squares[i];
    const float r = rsqrtf(square / (vectors * 8) + eps);
    for (int i = threadIdx.x; i < vectors; i += 256) {
        const uint4 v = x[i], w = weight[i];
        out[i] = make_uint4(
            bf16_pair(low(v.x) * r * low(w.x), high(v.x) * r * high(w.x)),
            bf16_pair(low(v.y) * r * low(w.y), high(v.y) * r * high(w.y)),
            bf16_pair(low(v.z) * r * low(w.z), high(v.z) * r * high(w.z)),
            bf16_pair(low(v.w) * r * low(w.w), high(v.w) * r * high(w.w)));
    }
}

// What follows a dense product y [columns][rows], as in linear.cu; grid (outputs / 256, columns).
extern "C" __global__ void __launch_bounds__(256) finish(
    const u16* y, const u16* residual, void* out, int rows, int epilogue) {
    start_dependents();
    wait_for_prior();
    const int at = blockIdx.x * 256 + threadIdx.x, outputs = epilogue == 2 ? rows / 2 : rows;
    if (at >= outputs) return;
    const size_t to = (size_t)blockIdx.y * outputs + at;
    const float v = from_bf16(y[(size_t)blockIdx.y * rows + at]);
    if (epilogue == 2) {
        const float up = from_bf16(y[(size_t)blockIdx.y * rows + outputs + at]);
        ((u16*)out)[to] = to_bf16(v / (1.f + __expf(-v)) * up);
    } else if (epilogue == 3) {
        ((float*)out)[to] = v;
    } else {
        ((u16*)out)[to] = to_bf16(epilogue == 1 ? from_bf16(residual[to]) + v : v);
    }
}

// The likeliest token of each row, the lowest of equal ones; then the row is one token on.
// grid (blocks, rows), 256 threads; best and counter are zero before and after.
extern "C" __global__ void __launch_bounds__(256) choose(
    const float* logits, int tokens, u64* best, int* counter, long long* token, long long* told,
    int* count, int* filled, int* turned, int room) {
    __shared__ u64 found[8];
    const int row = blockIdx.y;
    start_dependents();
    wait_for_prior();
    logits += (size_t)row * tokens;
    u64 most = 0;
    for (int i = blockIdx.x * 256 + threadIdx.x; i < tokens; i += gridDim.x * 256) {
        const u32 bits = __float_as_uint(logits[i]);
        const u32 ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
        const u64 key = (u64)ordered << 32 | (0xFFFFFFFFu - (u32)i);
        most = key > most ? key : most;
    }
    for (int i = 16; i; i /= 2) {
        const u64 other = __shfl_xor_sync(~0u, most, i);
        most = other > most ? other : most;
    }
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = most;
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 0; i < 8; ++i) most = found[i] > most ? found[i] : most;
    atomicMax(best + row, most);
    __threadfence();
    if (atomicAdd(counter + row, 1) != gridDim.x - 1) return;
    __threadfence();
    const u32 chosen = 0xFFFFFFFFu - (u32)atomicExch(best + row, 0ull);
    counter[row] = 0;
    token[row] = chosen;
    if (count[row] < room) told[(size_t)row * room + count[row]] = chosen;
    ++count[row], ++filled[row], ++turned[row];
}

// Packed words -> bf16 [rows][K]; with `paired` tiles hold 8 rows of each half. grid (tiles),
// 256 threads. GROUP and ZEROS are defined at compilation.
extern "C" __global__ void __launch_bounds__(256) dequantize(
    const uint4* words, const u32* scales, const u32* zeros, u16* out, int rows, int K, int paired) {
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
            const u32 mu = 0xC308C308u, ml = 0xC308C308u;
#endif
            const u32 a = h ? four.z : four.x, b = h ? four.w : four.y;
            const u32 u[4] = {integers(a, mu), integers(a >> 8, mu), integers(b, mu), integers(b >> 8, mu)};
            const u32 l[4] = {integers(a >> 4, ml), integers(a >> 12, ml), integers(b >> 4, ml),
                              integers(b >> 12, ml)};
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
