// All layers of a decoding step in one kernel: one block a multiprocessor stays from the first layer
// to the last, and weights keep coming in, across products and layers, while blocks wait for each
// other. Five times a layer they do: after q, k, v | attention | o | gate, up | down.
//
// Defined at compilation: as in product.cuh and attention.cuh; DEPTH (spans on their way a warp).
#include "attention.cuh"
#include "product.cuh"

#define THREADS (WARPS * 32)

struct Layer {
    Weights weights[4];      // q, k, v | o | gate, up | down
    const u16* bias[4];      // or null
    const u16* norm[2];      // that follows o, that follows down
    const u16 *q_norm, *k_norm;
    u16 *keys, *values;
};

struct Step {
    Attention attention;     // its keys, values and norms are those of the layer
    u16 *x, *scaled, *qkv, *seen, *inner;
    double* squares;         // [2 * layers + 1][columns]
    float* partial;          // [item without split][splits][HEADS][D + 2]
    int* arrived;            // [item without split], zero before and after
    u32* barrier;            // zero before
    float eps;
    int columns, layers, splits;
};

static_assert(sizeof(Layer) == 208 && sizeof(Step) == 192, "step.py has the same");

// What is asked for next.
struct Cursor {
    Weights weights;
    int layer, phase, block, span;
};

__device__ __forceinline__ void enter(Cursor& c, const Layer* layers, int count) {
    while (c.layer < count) {
        c.weights = layers[c.layer].weights[c.phase];
        if (c.block < c.weights.rows / (16 * MT)) return;
        c.block = blockIdx.x;
        if (++c.phase == 4) c.phase = 0, ++c.layer;
    }
}

__device__ __forceinline__ void ask_next(
    Slot& slot, Cursor& c, const Layer* layers, int count, int warp, int lane) {
    if (c.layer < count) {
        fetch(slot, c.weights, c.block, c.span, c.phase == 2, lane);
        if ((c.span += WARPS) >= c.weights.K / SPAN) {
            c.span = warp;
            if ((c.block += gridDim.x) >= c.weights.rows / (16 * MT)) enter(c, layers, count);
        }
    }
    end_of_copies();
}

// All blocks are here, and see what all have written.
__device__ __forceinline__ void meet(u32* barrier, u32& round) {
    round += gridDim.x;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(barrier) : "memory");
        u32 seen;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(barrier) : "memory");
        } while (seen < round);
        __threadfence();
    }
    __syncthreads();
}

// A block's share of an item joins the others'; the last to come writes the result.
__device__ __forceinline__ void join(
    const Step& s, Share& shared, const Attention& t, const Item& item, int index, int* last) {
    u16* out = result_of(t, item);
    if (s.splits == 1) {
        for (int e = threadIdx.x; e < HEADS * D; e += THREADS)
            out[e] = to_bf16(shared.sum[e / D][e % D] / shared.weight[e / D]);
        return;
    }
    const int step = HEADS * (D + 2);
    float* all = s.partial + (size_t)index * s.splits * step;
    for (int e = threadIdx.x; e < step; e += THREADS) {
        const int g = e / (D + 2), d = e % (D + 2);
        all[item.split * step + e] =
            d < D ? shared.sum[g][d] : d == D ? shared.most[g] : shared.weight[g];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        *last = atomicAdd(s.arrived + index, 1) == s.splits - 1;
        if (*last) s.arrived[index] = 0;
        __threadfence();
    }
    __syncthreads();
    if (!*last) return;
    for (int e = threadIdx.x; e < HEADS * D; e += THREADS) {
        const float* at = all + e / D * (D + 2);
        const int d = e % D;
        float most = -1e30f, weight = 0.f, sum = 0.f;
        for (int r = 0; r < s.splits; ++r) most = fmaxf(most, __ldcg(at + r * step + D));
        for (int r = 0; r < s.splits; ++r) {
            const float shrink = exp2f(__ldcg(at + r * step + D) - most);
            weight += __ldcg(at + r * step + D + 1) * shrink;
            sum += __ldcg(at + r * step + d) * shrink;
        }
        out[e] = to_bf16(sum / weight);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) layers(const Layer* layers, Step s) {
    extern __shared__ __align__(128) Slot ring[];
    __shared__ union {
        float4 sums[WARPS][MT][NT][32];
        Share share;
    } shared;
    __shared__ int last;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    Slot* mine = ring + warp * DEPTH;
    Cursor next = {{}, 0, 0, (int)blockIdx.x, warp};
    enter(next, layers, s.layers);
#pragma unroll 1
    for (int d = 0; d < DEPTH; ++d) ask_next(mine[d], next, layers, s.layers, warp, lane);
    wait_for_prior();
    start_dependents();
    u32 round = 0;
    int slot = 0;
    Attention t = s.attention;
    const int parts = t.group / HEADS, items = s.columns * t.heads * parts * s.splits;
#pragma unroll 1
    for (int layer = 0; layer < s.layers; ++layer) {
        const Layer& l = layers[layer];
        double* squares = s.squares + 2 * layer * s.columns;
        t.keys = l.keys, t.values = l.values, t.q_norm = l.q_norm, t.k_norm = l.k_norm;
#pragma unroll 1
        for (int phase = 0; phase < 4; ++phase) {
            const int K = l.weights[phase].K, rows = l.weights[phase].rows;
            const uint4* x = (const uint4*)(phase == 1 ? s.seen : phase == 3 ? s.inner : s.scaled);
            Output output = {};
            output.eps = s.eps, output.width = K, output.bias = l.bias[phase];
            output.out = phase == 0 ? s.qkv : phase == 2 ? s.inner : s.x;
            int epilogue = RESIDUAL;
            if (phase % 2 == 0) {
                output.squares = squares + phase / 2 * s.columns;
                epilogue = phase ? SWIGLU : STORE;
            } else {
                output.weight = l.norm[phase / 2], output.scaled = s.scaled;
                output.next = squares + (phase / 2 + 1) * s.columns;
            }
            if (phase == 1) {
                Keys keys;
                int index = blockIdx.x;
                auto item_of = [&](int i) {
                    const int split = i % s.splits, part = i / s.splits % parts;
                    const int head = i / (s.splits * parts) % t.heads;
                    return Item{i / (s.splits * parts * t.heads), head, part, split, s.splits};
                };
                if (index < items) ask(keys, t, item_of(index));
                meet(s.barrier, round);
                while (index < items) {
                    const Item item = item_of(index);
                    attend(shared.share, keys, t, item);
                    join(s, shared.share, t, item, index / s.splits, &last);
                    __syncthreads();
                    index += gridDim.x;
                    if (index < items) ask(keys, t, item_of(index));
                }
            }
            if (layer + phase) meet(s.barrier, round);
            for (int block = blockIdx.x; block < rows / (16 * MT); block += gridDim.x) {
                float acc[MT][NT][4] = {};
                for (int span = warp; span < K / SPAN; span += WARPS) {
                    wait_for_copies<DEPTH - 1>();
                    __syncwarp();
                    multiply(acc, mine[slot], x, K, s.columns, span, lane);
                    __syncwarp();
                    ask_next(mine[slot], next, layers, s.layers, warp, lane);
                    if (++slot == DEPTH) slot = 0;
                }
                conclude(shared.sums, acc, output, epilogue, block, rows, s.columns);
            }
        }
    }
}
