// y = W x for a few columns x, at the speed of memory: W is read once, in order. Blocks stay and walk
// over tiles; what they need next is always on its way (product.cuh).
//
// The RMS norm of a product's input is split: whoever makes x also writes x times the norm's weight,
// which is what comes in here, and adds up the squares of x; 1 / rms is applied to y.
//
// Defined at compilation: as in product.cuh; DEPTH (spans on their way a warp), BLOCKS (that share a
// multiprocessor), EPILOGUE.
#include "product.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) linear(
    Weights W, const uint4* x, Output output, int columns) {
    extern __shared__ __align__(128) Slot ring[];
    __shared__ float4 sums[WARPS][MT][NT][32];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int spans = W.K / SPAN, blocks = W.rows / (16 * MT);
    Slot* mine = ring + warp * DEPTH;

    int next_block = warp < spans ? blockIdx.x : blocks, next = warp;  // what is asked for next
#pragma unroll 1
    for (int d = 0; d < DEPTH; ++d) {
        if (next_block < blocks) fetch(mine[d], W, next_block, next, EPILOGUE == SWIGLU, lane);
        end_of_copies();
        if ((next += WARPS) >= spans) next = warp, next_block += gridDim.x;
    }
    wait_for_prior();
    start_dependents();
    int slot = 0;
    for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
        float acc[MT][NT][4] = {};
        for (int span = warp; span < spans; span += WARPS) {
            wait_for_copies<DEPTH - 1>();
            __syncwarp();
            multiply(acc, mine[slot], x, W.K, columns, span, lane);
            __syncwarp();
            if (next_block < blocks)
                fetch(mine[slot], W, next_block, next, EPILOGUE == SWIGLU, lane);
            end_of_copies();
            if ((next += WARPS) >= spans) next = warp, next_block += gridDim.x;
            if (++slot == DEPTH) slot = 0;
        }
        conclude(sums, acc, output, EPILOGUE, block, W.rows, columns);
    }
}
