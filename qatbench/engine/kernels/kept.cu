// y = W x for a few columns x, where every warp keeps its share of x in registers: see `linear.cu`.
//
// A warp has the same inputs of all units of its block, KEPT spans, or one fewer if UNEVEN. So x is read
// once a block and not once a unit, which for eight columns is more than W. Units come one after the
// other through the warp's slots, and at the end of each it leaves sums. After a round of units warps
// meet, and add up; if there are several rounds each second one has sums of its own, so that no warp
// has to wait until others have added up. UNEVEN is defined at compilation.
#define SHARERS (SPLITS * WARPS)  // of a unit
#include "product.cuh"
#include "cluster.cuh"

#define COUNT_OF_X (SINGLE && DIGITS ? SPAN / 64 : VECTORS)  // vectors of a span that a lane has

// A span of the input.
struct Kept {
    uint4 x[NT][COUNT_OF_X];
#if SINGLE
    const float2* groups;  // in shared memory, as `stage` leaves them
#elif DIGITS
    float2 groups[NT][GROUPS_A_SPAN][2];  // the same of both columns that a lane has sums of
#endif
    __device__ __forceinline__ uint4 operator()(int n, int i, int) const { return x[n][i]; }
};

#if KEPT && DIGITS == 2
// Eight numbers, in the order in which a byte of W has them, as bytes: the lower ones of all, without
// sign, and the upper ones. Largest near 2^15.
__device__ __forceinline__ void split(u32& lower, u32& upper, const float (&f)[4], float times) {
    u32 v[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = __float_as_uint(f[e] * times + 12582912.f);
    const u32 first = __byte_perm(v[0], v[2], 0x5410), second = __byte_perm(v[1], v[3], 0x5410);
    lower = __byte_perm(first, second, 0x6420), upper = __byte_perm(first, second, 0x7531);
}

// bf16 to digits, in place.
__device__ __forceinline__ void to_digits(Kept& h, int lane) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int group = 0; group < GROUPS_A_SPAN; ++group) {
            u32 both = 0;
            float sum = 0.f;
#pragma unroll
            for (int k = 0; k < GROUP / 32; ++k) {
                const uint4 v = h.x[n][group * (GROUP / 32) + k];
                const u32 of[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    both = __vmaxu2(both, of[e] & 0x7FFF7FFFu);
                    if (ZEROS) sum += low(of[e]) + high(of[e]);
                }
            }
            u32 most = max(both << 16, both & 0xFFFF0000u);
#pragma unroll
            for (int l = 1; l < 4; l *= 2) {
                most = max(most, __shfl_xor_sync(~0u, most, l));
                if (ZEROS) sum += __shfl_xor_sync(~0u, sum, l);
            }
            const u32 exponent = max(most >> 23, 19u);
            const float times = __uint_as_float(268 - exponent << 23);
            // W is times 16. What is not a number, or too large, shall not become one.
            const u32 by = exponent == 255 ? 0x7FC00000u : exponent - 18 << 23;
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int of = (lane & 3) * 8 + c * 4;  // a lane that has this column's x
                h.groups[n][group][c] = make_float2(
                    ZEROS ? __shfl_sync(~0u, sum * times * 16.f, of) : 0.f,
                    __uint_as_float(__shfl_sync(~0u, by, of)));
            }
#pragma unroll
            for (int k = 0; k < GROUP / 32; ++k) {
                uint4& v = h.x[n][group * (GROUP / 32) + k];
                const float f[2][4] = {{low(v.x), high(v.x), low(v.y), high(v.y)},
                                       {low(v.z), high(v.z), low(v.w), high(v.w)}};
                split(v.x, v.z, f[0], times), split(v.y, v.w, f[1], times);
            }
        }
}
#endif

// What a warp has of x is read, and becomes digits. `later` is called when it has been asked for.
template <class Later>
__device__ __forceinline__ void keep(
    Kept (&kept)[KEPT], const uint4* x, void* staged, int K, int columns, int from, int mine,
    const Later& later) {
    const int lane = threadIdx.x & 31;
#if SINGLE && DIGITS
    uint4* to = (uint4*)staged + from * (SPAN * 3 / 16);
    float2* groups = (float2*)((uint4*)staged + K / 16 * 3) + from * GROUPS_A_SPAN;
    stage<32>(to, groups, x + from * (SPAN / 8), mine * (SPAN / 8), lane, later);
    __syncwarp();
    const u32 at = (u32)__cvta_generic_to_shared(to + lane);
#pragma unroll
    for (int s = 0; s < KEPT; ++s) {
        if (UNEVEN && s == mine) break;
        kept[s].groups = groups + s * GROUPS_A_SPAN;
#pragma unroll
        for (int i = 0; i < COUNT_OF_X; ++i)
            kept[s].x[0][i] = first_lanes<12>(at + (s * COUNT_OF_X + i) * 192, lane);
    }
#else
#pragma unroll
    for (int s = 0; s < KEPT; ++s) {
        if (UNEVEN && s == mine) break;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const int column = min(n * 8 + lane / 4, columns - 1);
            const uint4* of = x + (size_t)column * (K / 8) + (from + s) * (SPAN / 8) + (lane & 3);
#pragma unroll
            for (int i = 0; i < COUNT_OF_X; ++i) kept[s].x[n][i] = of[i * 4];
        }
    }
    __syncwarp();  // without it the compiler would ask for x where it is needed
    later();
#if DIGITS
#pragma unroll
    for (int s = 0; s < KEPT; ++s)
        if (!UNEVEN || s < mine) to_digits(kept[s], lane);
#endif
#endif
}

// Squares of the columns that a lane ends tiles of become factors.
__device__ __forceinline__ void to_factors(
    float (&factors)[NT][2], const double (&squares)[NT][2], const Output& output) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c)
            factors[n][c] = output.squares
                                ? rsqrtf((float)squares[n][c] * output.per_input + output.eps)
                                : 1.f;
}

struct Give {
    int rank;
    u64* barrier;
    template <class T>
    __device__ __forceinline__ void operator()(T& to, const T& v) const { give(&to, rank, v, barrier); }
};

// Parameters as of `linear.cu`'s; `each` counts a cluster's units. Dynamic shared memory: WARPS * DEPTH
// slots, sums of SHARERS pairs a unit of a round that is the block's, twice if there are several
// rounds; if SINGLE and digits x, and its sums over groups.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#if SPLITS > 1
    __cluster_dims__(SPLITS, 1, 1)
#endif
    linear(
        Weights W, const uint4* x, Output output, int columns, int each, int round, int lead,
        int held_back) {
    if (lead < 0) start_dependents();
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ u64 gifts;
    Slot* ring = (Slot*)memory;
    Sums* sums = (Sums*)(ring + WARPS * DEPTH);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int rank = blockIdx.x % SPLITS, cluster = blockIdx.x / SPLITS;
    const int spans = W.K / SPAN, more = W.rows / (16 * MT) - each * (gridDim.x / SPLITS);
    const int first = cluster * each + min(cluster, more);
    const int end = first + each + (cluster < more), own = (round + SPLITS - 1) / SPLITS;
    const int rounds = each + (more > 0) > round ? 2 : 1, sharer = rank * WARPS + warp;
    const int from = sharer * spans / SHARERS, mine = (sharer + 1) * spans / SHARERS - from;
    const int lanes = SINGLE ? 4 * MT : 8 * MT * ((columns + 1) / 2);  // that have four sums to give
    if (threadIdx.x == 0)
        expect(&gifts, (end - first - rank + SPLITS - 1) / SPLITS * SHARERS * lanes * 16);
    __syncwarp();
    arrive();  // others may write into this block
    Slot *const slots = ring + warp * DEPTH, *slot = slots;
    int left = (end - first) * mine;
    Source next = source(W, first, from, lane);
    next.span = 0, next.run = mine;
    auto ask = [&](int from, int to) {
#pragma unroll 1
        for (int d = from; d < to; ++d) {
            if (d < left) fetch(slots[d], next, W.K, lane);
            end_of_copies();
        }
    };
    ask(0, DEPTH - held_back);
    // Of the tiles and eight columns that are the block's in a round, the index among all.
    const auto among_all = [&](int e) {
        return (e / (MT * NT) * SPLITS + rank) * (MT * NT) + e % (MT * NT);
    };
    const int last_at_first = (min(round, end - first) - rank + SPLITS - 1) / SPLITS * (MT * NT) - 1;
    // It is older than the kernel before this one.
    const Early first_tile =
        early(output, among_all(max(0, min(warp, last_at_first))), first, lane, W.rows, columns);
    at_hand(x), at_hand(output.squares);
    wait_for_cluster();
    wait_for_prior();
    if (lead == 0) start_dependents();
    double squares[NT][2] = {};
    Kept kept[KEPT];
    keep(kept, x, sums + rounds * own * SHARERS, W.K, columns, from, mine, [&]() {
#pragma unroll
        for (int i = 0; i < NT * 2; ++i)
            if (output.squares)
                squares[i / 2][i % 2] = output.squares[min(column(i / 2, lane, i % 2), columns - 1)];
        ask(DEPTH - held_back, DEPTH);
    });
    float factors[NT][2];
    to_factors(factors, squares, output);
    const int start_at = min(lead, left);
    u64 most = 0;
    int other = 0;  // where this round's sums begin
    for (int begin = first; begin < end; begin += round, other = own * SHARERS - other) {
        const int units = min(round, end - begin);
#pragma unroll 1
        for (int unit = 0; unit < units; ++unit) {
            float acc[MT][NT][SUMS] = {};
#pragma unroll
            for (int s = 0; s < KEPT; ++s) {
                if (UNEVEN && s == mine) break;
                if (left == start_at) start_dependents();
                wait_for_copies<DEPTH - 1>();
                multiply(acc, *slot, kept[s], lane);
                if (left > DEPTH) fetch(*slot, next, W.K, lane);
                end_of_copies();
                if (++slot == slots + DEPTH) slot = slots;
                --left;
            }
            leave(sums[other + unit / SPLITS * SHARERS + sharer], acc, columns, lane,
                  Give{unit % SPLITS, &gifts});
        }
        wait_for_gifts(&gifts);
        const int tiles = (units - rank + SPLITS - 1) / SPLITS * (MT * NT);
        for (int e = warp; e < tiles; e += WARPS) {
            if (e % NT * 8 >= columns) continue;
            const int at = among_all(e), of_all = at / (MT * NT), of_own = e / (MT * NT);
            const Early before = begin == first && e == warp
                                     ? first_tile
                                     : early(output, at, begin, lane, W.rows, columns);
            float factor[2];
#pragma unroll
            for (int n = 0; n < NT; ++n)
                if (n == e % NT) factor[0] = factors[n][0], factor[1] = factors[n][1];
            end_of_tile(
                sums + other + of_own * SHARERS - of_all, SHARERS - 1 << 16, before, factor, output,
                most, at, begin, lane, W.rows, columns);
        }
    }
    end_of_screen(output, most, lane);
}
