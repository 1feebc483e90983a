// y = W x for a few columns x, at the speed of memory: W is read once, in order, by every
// multiprocessor.
//
// W has `rows` outputs and K inputs, of 4 or 8 bits or bf16. 16 rows are a tile, MT tiles a unit. A
// block has some units; their SPANs of inputs, in order, are shared out evenly among its warps,
// whatever the ends of units. A warp multiplies its spans on the tensor cores (mma.m16n8k16, W as the
// left operand, up to 8 * NT columns of x as the right one); at the end of a unit, or of its share, it
// leaves its sums in shared memory. Warps meet once a round of units, where sums are added up.
//
// Weights come through shared memory: each warp has DEPTH spans on their way, into slots of its own
// that no other warp waits for. A block takes at most 1 / BLOCKS of a multiprocessor. With 2, the
// next kernel's blocks fit in beside this one's: they fill their slots while this kernel ends, and
// what lies between two kernels costs memory no time.
#define SHARERS WARPS  // of a unit, at most
#include "product.cuh"

#define AHEAD (BITS == 4 && !SINGLE && NT * VECTORS <= 8)  // a span of x is asked for early
#define PIECE_OF_X (DIGITS ? 64 * 3 : 64)  // bytes that a read of all lanes takes, if SINGLE

// A span of the input. If SINGLE it is in shared memory, and only lanes of columns that are some read
// it: one of bf16, or three of digits; what the other columns of the right operand have matters to
// nobody.
struct Input {
#if SINGLE
    u32 x;                 // a lane's first vector
    const float2* groups;  // BITS 4, 8: the sum of x over a group (ZEROS), and what x was divided by
    __device__ __forceinline__ uint4 operator()(int, int piece, int lane) const {
        return first_lanes<DIGITS ? 12 : 4>(x + piece * PIECE_OF_X, lane);
    }
    __device__ __forceinline__ void go_on(int spans) {
        x += spans * SPAN * BYTES_OF_X, groups += spans * GROUPS_A_SPAN;
    }
#else
    const uint4* x[NT];    // a lane's first vectors
    __device__ __forceinline__ uint4 operator()(int n, int i, int) const { return x[n][i * 4]; }
    __device__ __forceinline__ void go_on(int spans) {
#pragma unroll
        for (int n = 0; n < NT; ++n) x[n] += spans * (SPAN / 8);
    }
#endif
};

#if AHEAD
// A span of the input in registers.
struct Held {
    uint4 x[NT][VECTORS];
    __device__ __forceinline__ uint4 operator()(int n, int i, int) const { return x[n][i]; }
};
__device__ __forceinline__ Held held(const Input& in) {
    Held h;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) h.x[n][i] = in(n, i, 0);
    return h;
}
#endif

// The first and the last warp that have a share of a unit of a round.
__device__ __forceinline__ u32 sharers(int unit, int units, int spans) {
    const int all = units * spans, from = unit * spans;
    return ((from + 1) * WARPS - 1) / all | ((from + spans) * WARPS - 1) / all << 16;
}

struct Store {
    template <class T>
    __device__ __forceinline__ void operator()(T& to, const T& v) const { to = v; }
};

// `each`: units of a block, some have one more. `round`: units that a block has sums for at once.
// `lead`: spans that a warp has left when the next kernel may start and ask for weights of its own; 0:
// it may when this one's input is there, -1: at once. `held_back`: spans of its first that a warp asks
// for only after x, which would have to wait for them in the memory's queues. Dynamic shared memory:
// WARPS * DEPTH slots, sums of round + WARPS pairs, sharers of round units; if SINGLE x, and its sums
// over groups.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) linear(
    Weights W, const uint4* x, Output output, int columns, int each, int round, int lead,
    int held_back) {
    if (lead < 0) start_dependents();
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ float factors[NT * 8];
    Slot* ring = (Slot*)memory;
    Sums* sums = (Sums*)(ring + WARPS * DEPTH);
    u32* shared_by = (u32*)(sums + round + WARPS);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int spans = W.K / SPAN, all = W.rows / (16 * MT);
    const int more = all - each * gridDim.x;  // blocks that have one more
    const int first = blockIdx.x * each + min((int)blockIdx.x, more);
    const int end = first + each + ((int)blockIdx.x < more);
    Slot *const slots = ring + warp * DEPTH, *slot = slots;
    Input in;
#if SINGLE
    uint4* staged = (uint4*)(shared_by + (round + 3) / 4 * 4);
    float2* groups = (float2*)(staged + W.K / 16 * BYTES_OF_X);
    in.x = (u32)__cvta_generic_to_shared(staged + lane), in.groups = groups;
#else
#pragma unroll
    for (int n = 0; n < NT; ++n)
        in.x[n] = x + (size_t)min(n * 8 + lane / 4, columns - 1) * (W.K / 8) + (lane & 3);
#endif
    u64 most = 0;
    for (int begin = first; begin < end; begin += round) {
        const int units = min(round, end - begin), share = units * spans;
        const int from = warp * share / WARPS, unit = warp * units / WARPS;
        int left = (warp + 1) * share / WARPS - from, span = from - unit * spans;
        Source next = source(W, begin + unit, span, lane);
        const auto bring = [&](Slot& to) {
            const bool all = (MT > 1 || BITS == 16) && ++next.span == spans;
            if (all) next.span = 0;
            fetch(to, next, W.K, lane, all, jump_of(W.K, spans));
        };
        const int asked = begin == first ? DEPTH - held_back : DEPTH;
        auto ask = [&](int from, int to) {
#pragma unroll 1
            for (int d = from; d < to; ++d) {
                if (d < left) bring(slots[d]);
                end_of_copies();
            }
        };
        ask(0, asked);
        if (threadIdx.x < units) shared_by[threadIdx.x] = sharers(threadIdx.x, units, spans);
        const int tiles = units * MT * NT;
        // It is older than the kernel before this one.
        const Early first_tile =
            early(output, min(warp, tiles - 1), begin, lane, W.rows, columns);
        Sums* to = sums + unit + warp;
        float acc[MT][NT][SUMS] = {};
        Input now = in;
        now.go_on(span);
        if (left == 0) leave(*to, acc, columns, lane, Store());  // between two that have a share of a unit
#if AHEAD
        Held x_now;
#endif
        if (begin == first) {
            at_hand(x), at_hand(output.squares);
            wait_for_prior();
            if (lead == 0) start_dependents();
            // After x, on which everything waits, and not used before x is there.
            const bool normed = output.squares && threadIdx.x < columns;
            double square = 0.;
            auto later = [&]() {
                if (normed) square = output.squares[threadIdx.x];
                ask(asked, DEPTH);
            };
#if SINGLE
            stage<THREADS>(staged, groups, x, W.K / 8, threadIdx.x, later);
            __syncthreads();
#else
#if AHEAD
            x_now = held(now);
            __syncwarp();
#endif
            later();
#endif
            if (threadIdx.x < NT * 8)
                factors[threadIdx.x] =
                    normed ? rsqrtf((float)square * output.per_input + output.eps) : 1.f;
        }
#if AHEAD
        else
            x_now = held(now);
#endif
        slot = slots;
        const int start_at = begin + round < end ? 0 : min(lead, left);
#pragma unroll 1
        while (left) {
            if (left == start_at) start_dependents();
#if AHEAD
            // What comes next is asked for now: it takes long to come, from the second cache. Without
            // the barrier the compiler would ask for it where it is needed.
            now.go_on(1);
            if (span + 1 == spans || left == 1) now = in;
            const Held x_next = held(now);
            __syncwarp();
#endif
            wait_for_copies<DEPTH - 1>();
#if AHEAD
            multiply(acc, *slot, x_now, lane);
            x_now = x_next;
#else
            multiply(acc, *slot, now, lane);
            now.go_on(1);
#endif
            if (left > DEPTH) bring(*slot);
            end_of_copies();
            if (++slot == slots + DEPTH) slot = slots;
            --left;
            if (++span == spans || left == 0) {
                leave(*to++, acc, columns, lane, Store());
                span = 0, now = in;
            }
        }
        __syncthreads();
        for (int e = warp; e < tiles; e += WARPS) {
            if (e % NT * 8 >= columns) continue;
            const Early before =
                e == warp ? first_tile : early(output, e, begin, lane, W.rows, columns);
            const float of[2] = {factors[min(column(e, lane, 0), columns - 1)],
                                 factors[min(column(e, lane, 1), columns - 1)]};
            end_of_tile(
                sums, shared_by[e / (MT * NT)], before, of, output, most, e, begin, lane,
                W.rows, columns);
        }
        if (begin + round < end) __syncthreads();  // sums were read
    }
    end_of_screen(output, most, lane);
}
