// y = W x for a few columns x, where every warp keeps its part of x in registers: see `linear.cu`.
//
// A warp has the same inputs of all units of its block, KEPT spans, or one fewer if UNEVEN. So x is read
// once a block and not once a unit, which for eight columns is more than W; and it becomes digits once.
// Units come one after the other through the warp's slots, and at the end of each it leaves sums. After
// a round of units warps meet, and add up; if there are several rounds each second one has sums of its
// own, so that no warp has to wait until others have added up.
//
// SPLITS blocks are a cluster: they share inputs out, and end units by turns. What a warp leaves it
// gives to the block that ends the unit. There is one round then.
//
// Also defined at compilation: UNEVEN, SPLITS.
#define SHARERS (SPLITS * WARPS)  // of a unit
#include "product.cuh"
#include "cluster.cuh"

#define COUNT_OF_X (SINGLE && DIGITS ? SPAN / 64 : VECTORS)  // vectors of a span that a lane has

#if BITS == 4
// What a group of x, as digits, needs beside them.
struct Group {
#if SINGLE
    int start[4];  // from where sums begin: fields go from 0 to 15, and mean 8 less
#endif
    float by[2];   // what digits were divided by, of both columns that a lane has sums of
#if ZEROS
    float sum[2];  // of x
#endif
};
#endif

// A span of the input.
struct Kept {
    uint4 x[NT][COUNT_OF_X];
#if BITS == 4
    Group groups[NT][GROUPS_A_SPAN];
#elif SINGLE
    const float2* groups;  // in shared memory, as `stage` leaves them
#endif
    __device__ __forceinline__ uint4 operator()(int n, int i, int) const { return x[n][i]; }
};

#if BITS == 4
#if SINGLE
// Minus 8 times the sum of digits, for upper rows; lower rows are 16 times what they are.
__device__ __forceinline__ void to_starts(Kept& kept) {
    const u32 ones = 0x01010101u;
#pragma unroll
    for (int group = 0; group < GROUPS_A_SPAN; ++group) {
        int sum[4] = {};
#pragma unroll
        for (int k = 0; k < GROUP / 32; ++k) {
            const int i = group * (GROUP / 32) + k;
            const uint4 b = kept.x[0][i / 2];
            mma_left_unsigned(sum, ones, ones, ones, ones, i % 2 ? b.z : b.x, i % 2 ? b.w : b.y);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) kept.groups[0][group].start[c] = sum[c] * (c < 2 ? -8 : -128);
    }
}

// One span of a column: acc += W[:, span] x[span], of the upper rows a sixteenth. Fields are bytes by
// a mask alone: those of upper rows as they are, of lower rows 16 times them. Lanes with t = 0 have
// sums of two digits, with t = 1 of the third.
__device__ __forceinline__ void multiply_kept(
    float (&acc)[MT][NT][SUMS], const Slot& slot, const Kept& in, int lane) {
#pragma unroll
    for (int group = 0; group < GROUPS_A_SPAN; ++group) {
        const Group& x = in.groups[0][group];
        int part[CHAINS][MT][4] = {};
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int c = 0; c < 4; ++c) part[0][m][c] = x.start[c];
#pragma unroll
        for (int k = 0; k < GROUP / 32; ++k) {
            const int i = group * (GROUP / 32) + k;
            const uint4 b = in.x[0][i / 2];
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                const uint2 w = two_words(slot, m, i, lane);
                mma_left_unsigned(part[k % CHAINS][m], even_fields(w.x), odd_fields(w.x),
                                  even_fields(w.y), odd_fields(w.y), i % 2 ? b.z : b.x,
                                  i % 2 ? b.w : b.y);
            }
        }
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            const float2 both = scales(slot, m, group, lane);
            const float scale[2] = {both.x, both.y};
#if ZEROS
            const float2 beyond = beyond_8(slot, m, group, lane);
            const float more[2] = {beyond.x, beyond.y * 16.f};
#endif
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                float y = (float)sum_of_digits(part, m, s, lane);
#if ZEROS
                y -= more[s] * x.sum[0];
#endif
                acc[m][0][s] += scale[s] * x.by[0] * y;
            }
        }
    }
}
#else
// One span of all columns: acc += W[:, span] x[span]. Fields are bytes, 16 times field - 8.
__device__ __forceinline__ void multiply_kept(
    float (&acc)[MT][NT][SUMS], const Slot& slot, const Kept& in, int lane) {
    const u32 mask = 0xF0F0F0F0u;
#pragma unroll
    for (int group = 0; group < GROUPS_A_SPAN; ++group) {
        int lower[MT][NT][4] = {}, upper[MT][NT][4] = {};
#pragma unroll
        for (int k = 0; k < GROUP / 32; ++k) {
            const int i = group * (GROUP / 32) + k;
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                const uint2 w = two_words(slot, m, i, lane);
                const u32 a[4] = {w.x << 4 & mask, w.x & mask, w.y << 4 & mask, w.y & mask};
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    const uint4& b = in.x[n][i];
                    mma_right_unsigned(lower[m][n], a[0], a[1], a[2], a[3], b.x, b.y);
                    mma_bytes(upper[m][n], a[0], a[1], a[2], a[3], b.z, b.w);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            const float2 both = scales(slot, m, group, lane);
            const float scale[2] = {both.x, both.y};
#if ZEROS
            const float2 beyond = beyond_8(slot, m, group, lane);
            const float more[2] = {beyond.x * 16.f, beyond.y * 16.f};
#endif
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const Group& x = in.groups[n][group];
                    float y = (float)(lower[m][n][c] + upper[m][n][c] * 256);
#if ZEROS
                    y -= more[c / 2] * x.sum[c % 2];
#endif
                    acc[m][n][c] += scale[c / 2] * x.by[c % 2] * y;
                }
        }
    }
}
#endif
#else
#define multiply_kept multiply
#endif

#if DIGITS == 2
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
__device__ __forceinline__ void to_digits(Kept& kept, int lane) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int group = 0; group < GROUPS_A_SPAN; ++group) {
            u32 both = 0;
            float sum = 0.f;
#pragma unroll
            for (int k = 0; k < GROUP / 32; ++k) {
                const uint4 v = kept.x[n][group * (GROUP / 32) + k];
                both = largest(both, v);
                if (ZEROS)
                    sum += low(v.x) + high(v.x) + low(v.y) + high(v.y) + low(v.z) + high(v.z) +
                           low(v.w) + high(v.w);
            }
            u32 most = largest(both);
#pragma unroll
            for (int l = 1; l < 4; l *= 2) {
                most = max(most, __shfl_xor_sync(~0u, most, l));
                if (ZEROS) sum += __shfl_xor_sync(~0u, sum, l);
            }
            const u32 exponent = max(most >> 23, 19u);
            const float times = __uint_as_float(268 - exponent << 23);
            const float by = power(exponent, 18);  // W is times 16
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int of = (lane & 3) * 8 + c * 4;  // a lane that has this column's x
                kept.groups[n][group].by[c] = __shfl_sync(~0u, by, of);
#if ZEROS
                kept.groups[n][group].sum[c] = __shfl_sync(~0u, sum * times, of);
#endif
            }
#pragma unroll
            for (int k = 0; k < GROUP / 32; ++k) {
                uint4& v = kept.x[n][group * (GROUP / 32) + k];
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
    uint4* to = (uint4*)staged + from * (SPAN * BYTES_OF_X / 16);
    float2* groups = (float2*)((uint4*)staged + K / 16 * BYTES_OF_X) + from * GROUPS_A_SPAN;
    stage<32>(to, groups, x + from * (SPAN / 8), mine * (SPAN / 8), lane, later);
    __syncwarp();
    const u32 at = (u32)__cvta_generic_to_shared(to + lane);
#pragma unroll
    for (int s = 0; s < KEPT; ++s) {
        if (UNEVEN && s == mine) break;
#pragma unroll
        for (int i = 0; i < COUNT_OF_X; ++i)
            kept[s].x[0][i] = first_lanes<12>(at + (s * COUNT_OF_X + i) * 192, lane);
#if BITS == 4
#pragma unroll
        for (int group = 0; group < GROUPS_A_SPAN; ++group) {
            const float2 x = groups[s * GROUPS_A_SPAN + group];
            kept[s].groups[0][group].by[0] = (lane & 3) == 1 ? x.y * 65536.f : x.y;
#if ZEROS
            kept[s].groups[0][group].sum[0] = lane & 3 ? 0.f : x.x / 16.f;  // once
#endif
        }
        to_starts(kept[s]);
#else
        kept[s].groups = groups + s * GROUPS_A_SPAN;
#endif
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
    __device__ __forceinline__ void operator()(T& to, const T& v) const {
        give(&to, rank, v, barrier);
    }
};

// Parameters are those of `linear.cu`; `each` counts a cluster's units. Dynamic shared memory: WARPS *
// DEPTH slots, sums of SHARERS pairs a unit of a round that the block ends, twice if there are several
// rounds; if SINGLE and there are digits x, and what its groups need.
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
    const int lanes = SINGLE ? 4 * PARTS : 8 * ((columns + 1) / 2);  // that have four sums to give
    if (threadIdx.x == 0)
        expect(&gifts, (end - first - rank + SPLITS - 1) / SPLITS * SHARERS * MT * lanes * 16);
    __syncwarp();
    arrive();  // others may write into this block
    Slot *const slots = ring + warp * DEPTH, *slot = slots;
    int left = (end - first) * mine;
    Source next = source(W, first, from, lane);
    const int jump = jump_of(W.K, mine);
    next.span = 0;
    // `last`: whether this is a unit's last, unless UNEVEN.
    const auto bring = [&](Slot& to, bool last) {
        const bool all = UNEVEN ? ++next.span == mine : last;
        if (UNEVEN && all) next.span = 0;
        fetch(to, next, W.K, lane, all, jump);
    };
    auto ask = [&](int from, int to) {
#pragma unroll 1
        for (int d = from; d < to; ++d) {
            if (d < left) bring(slots[d], (d + 1) % KEPT == 0);
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
        Sums* to = sums + other + sharer;
        int whose = 0;  // SPLITS blocks end units by turns
#pragma unroll 1
        for (int unit = 0; unit < units; ++unit) {
            float acc[MT][NT][SUMS] = {};
#pragma unroll
            for (int s = 0; s < KEPT; ++s) {
                if (UNEVEN && s == mine) break;
                if (left == start_at) start_dependents();
                wait_for_copies<DEPTH - 1>();
                multiply_kept(acc, *slot, kept[s], lane);
                if (left > DEPTH) bring(*slot, (s + DEPTH + 1) % KEPT == 0);
                end_of_copies();
                if (++slot == slots + DEPTH) slot = slots;
                --left;
            }
            leave(*to, acc, columns, lane, Give{whose, &gifts});
            if (++whose == SPLITS) whose = 0, to += SHARERS;
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
