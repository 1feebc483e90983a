// What kernels of y = W x share: how W comes through shared memory, is multiplied, and how sums end.
//
// Which input stands where inside a product does not matter as long as W and x agree: lane (g, t)
// takes inputs 8t..8t+7 of every 32, so that it reads 16 bytes at a time, and only its own.
//
// 4-bit fields become numbers of the tensor cores by a mask. For one column they are bytes, 16 times
// field - 8 (mma.m16n8k32, integers). x is three digits of 8 bits then, which are three columns of the
// right operand: each group of it is times a power of two that brings its largest near 2^22, rounded,
// and written with digits of -128 to 127. bf16 has 8 bits, so that what is lost is below 2^-23 of the
// group's largest. Sums of a group are exact; what zero points other than 8 add is taken away by the
// group's sum of x. For more columns it is the same in `kept.cu`, with two digits, and a product for
// each; what is lost is below 2^-15 of the group's largest. In `linear.cu` x would become digits again
// and again: there fields are bf16, 128 + field, and for up to eight columns a second product takes
// 128 + zero away, which costs the tensor cores less than subtractions cost everything else. Scales are
// applied to the sums of a group, in fp32.
//
// The RMS norm of a product's input is split: whoever makes x also writes x times the norm's weight,
// which is what comes in here, and adds up the squares of x; 1 / rms is applied to y.
//
// Defined at compilation: BITS 4 | 8 | 16 (8: for one column, without zero points; bytes are weights
// as they are); GROUP inputs a scale, 32, 64 or 128 (BITS 4, 8); SPAN; ZEROS 0 | 1; NT, MT, WARPS,
// DEPTH, BLOCKS; SINGLE (one column); KEPT (0: none, see `kept.cu`); EPILOGUE.
#include "common.cuh"

#if (BITS == 8 || EPILOGUE == SCREEN) && !SINGLE || BITS == 8 && ZEROS
#error 8 bits and screens are for one column, and without zero points
#endif
#if BITS <= 8
#define LOADS (SPAN * BITS / 256)  // uint4 a lane, tile and span
#define GROUPS_A_SPAN (SPAN / GROUP)
#define RAISED (NT == 1)
#define CHAINS (NT * MT == 1 && GROUP > 32 ? 2 : 1)  // sums that do not wait for each other
#else
#define LOADS 4  // SPAN is 64
#define GROUPS_A_SPAN 0  // no scales
#endif
#define THREADS (WARPS * 32)
#define SUMS (SINGLE ? 2 : 4)  // of a tile and eight columns that a lane has
#define VECTORS (SPAN / 32)    // of eight inputs that a lane has of a column and span
#define DIGITS (BITS <= 8 ? SINGLE ? 3 : KEPT ? 2 : 0 : 0)  // of x; 0: it is bf16
#define PARTS (KEPT && BITS == 4 && SINGLE ? 2 : 1)  // of a row's sums, which have a lane each
#define UPPER (PARTS == 2 ? 16.f : 1.f)  // what sums of a tile's upper rows were divided by
#define BYTES_OF_X (SINGLE && DIGITS ? 3 : 2)        // an input in shared memory

// One span of a unit on its way. A lane reads what it asked for itself: four lanes ask for the same
// scales, which is faster than to share them.
struct Slot {
    uint4 w[MT][LOADS][32];
#if BITS <= 8
    u32 scale[MT][GROUPS_A_SPAN][32];
#if ZEROS
    u32 zero[MT][GROUPS_A_SPAN][32];
#endif
#endif
};

struct Weights {
    const uint4* words;  // BITS 4, 8: [tile][K / 64, K / 32][lane]; BITS 16: bf16 [rows][K]
    const u32* scales;   // [tile][K / GROUP][8]: fp16 of rows g and g + 8
    const u32* zeros;    // the same: 128 + zero as bf16
    int rows, K;
};

// Where a warp's next span comes from.
struct Source {
    const uint4* words;  // of this lane; BITS 16: of the upper row
#if BITS <= 8
    const u32 *scales, *zeros;
#else
    int lower;           // from there to the lower row, in vectors of 8
#endif
    int span;            // within the unit
};

__device__ __forceinline__ Source source(const Weights& W, int unit, int span, int lane) {
#if BITS <= 8
    const size_t at = (size_t)unit * MT * (W.K / SPAN) + span;
    const size_t scale = at * GROUPS_A_SPAN * 8 + lane / 4;
    return Source{W.words + at * LOADS * 32 + lane, W.scales + scale, W.zeros + scale, span};
#else
    const int step = W.K / 8, half = EPILOGUE == SWIGLU ? W.rows / 2 : 8;
    const int row = unit * MT * (EPILOGUE == SWIGLU ? 8 : 16) + lane / 4;
    return Source{W.words + (size_t)row * step + span * 8 + (lane & 3), half * step, span};
#endif
}

// Ask for a span, and go on. `all`: it was a unit's last; what follows is `jump` spans further on.
__device__ __forceinline__ void fetch(
    Slot& slot, Source& s, int K, int lane, bool all, int jump) {
    const int spans = K / SPAN;
#if BITS <= 8
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
            copy_async(&slot.w[m][i][lane], s.words + (size_t)(m * spans * LOADS + i) * 32);
#pragma unroll
        for (int i = 0; i < GROUPS_A_SPAN; ++i) {
            const int at = (m * spans * GROUPS_A_SPAN + i) * 8;
            copy_word(&slot.scale[m][i][lane], s.scales + at);
#if ZEROS
            copy_word(&slot.zero[m][i][lane], s.zeros + at);
#endif
        }
    }
    const int on = all ? 1 + jump : 1;
    s.words += on * LOADS * 32, s.scales += on * GROUPS_A_SPAN * 8;
#if ZEROS
    s.zeros += on * GROUPS_A_SPAN * 8;
#endif
#else
    const int rows = EPILOGUE == SWIGLU ? 8 : 16;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
        const uint4 *a = s.words + m * rows * (K / 8), *b = a + s.lower;
        copy_async(&slot.w[m][0][lane], a), copy_async(&slot.w[m][1][lane], b);
        copy_async(&slot.w[m][2][lane], a + 4), copy_async(&slot.w[m][3][lane], b + 4);
    }
    s.words += all ? 8 + jump * 8 : 8;
#endif
}

// Spans from the end of a warp's of a unit to the first of the next's, where it has `run` of them.
__device__ __forceinline__ int jump_of(int K, int run) {
#if BITS <= 8
    return MT * (K / SPAN) - run;
#else
    return (EPILOGUE == SWIGLU ? 8 : 16) * MT * (K / SPAN) - run;  // rows follow each other
#endif
}

#if BITS == 4
// A lane's words of 32 inputs, the i-th of a span.
__device__ __forceinline__ uint2 two_words(const Slot& slot, int m, int i, int lane) {
    const uint4 four = slot.w[m][i / 2][lane];
    return i % 2 ? make_uint2(four.z, four.w) : make_uint2(four.x, four.y);
}
#endif
#if BITS <= 8
// Scales of a tile's rows g and g + 8, and (ZEROS) what their zero points are more than 8.
__device__ __forceinline__ float2 scales(const Slot& slot, int m, int group, int lane) {
    const u32 pair = slot.scale[m][group][lane];
    return make_float2(half_low(pair), half_high(pair));
}
#if ZEROS
__device__ __forceinline__ float2 beyond_8(const Slot& slot, int m, int group, int lane) {
    const u32 pair = slot.zero[m][group][lane];
    return make_float2(low(pair) - 136.f, high(pair) - 136.f);
}
#endif
#endif
#if DIGITS == 3
// A row's sum of digits times their places, up to two of them: of rows g (0) or g + 8 (1). Lanes with
// t = 0 have digits 0 and 1, with t = 1 digit 2 alone.
__device__ __forceinline__ int sum_of_digits(
    const int (&part)[CHAINS][MT][4], int m, int row, int lane) {
    int first = part[0][m][2 * row], next = part[0][m][2 * row + 1];
    if (CHAINS == 2)
        first += part[CHAINS - 1][m][2 * row], next += part[CHAINS - 1][m][2 * row + 1];
    return first + next * (lane & 1 ? 0 : 256);
}
#endif

// One span of all columns: acc += W[:, span] x[span]. `in`: a span of x, with what groups of it need.
template <class Input>
__device__ __forceinline__ void multiply(
    float (&acc)[MT][NT][SUMS], const Slot& slot, const Input& in, int lane) {
#if BITS <= 8 && SINGLE
#pragma unroll
    for (int group = 0; group < GROUPS_A_SPAN; ++group) {
        int part[CHAINS][MT][4] = {};
        uint4 b;
#pragma unroll
        for (int k = 0; k < GROUP / 32; ++k) {
            const int i = group * (GROUP / 32) + k;
            if (k == 0 || i % 2 == 0) b = in(0, i / 2, lane);
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                const u32 b0 = i % 2 ? b.z : b.x, b1 = i % 2 ? b.w : b.y;
#if BITS == 4
                const uint2 w = two_words(slot, m, i, lane);
                const u32 mask = 0xF0F0F0F0u;
                mma_bytes(part[k % CHAINS][m], w.x << 4 & mask, w.x & mask, w.y << 4 & mask,
                          w.y & mask, b0, b1);
#else
                const uint4 a = slot.w[m][i][lane];
                mma_bytes(part[k % CHAINS][m], a.x, a.y, a.z, a.w, b0, b1);
#endif
            }
        }
        const float2 x = in.groups[group];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            const float2 both = scales(slot, m, group, lane);
            const float scale[2] = {both.x * x.y, both.y * x.y};
            float less[2] = {};
#if ZEROS
            const float2 more = beyond_8(slot, m, group, lane);
            const float sum = lane & 3 ? 0.f : x.x;  // once
            less[0] = more.x * sum, less[1] = more.y * sum;
#endif
#pragma unroll
            for (int s = 0; s < 2; ++s)
                acc[m][0][s] += scale[s] * ((float)sum_of_digits(part, m, s, lane) - less[s]);
        }
    }
#elif BITS == 4
#pragma unroll
    for (int group = 0; group < GROUPS_A_SPAN; ++group) {
        float part[CHAINS][MT][NT][4] = {};
#if RAISED
        float less[CHAINS][ZEROS ? MT : 1][NT][4] = {};  // alike in all tiles without zero points
#endif
#pragma unroll
        for (int k = 0; k < GROUP / 32; ++k) {
            const int i = group * (GROUP / 32) + k;
            uint4 b[NT];
#pragma unroll
            for (int n = 0; n < NT; ++n) b[n] = in(n, i, lane);
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                const uint2 words = two_words(slot, m, i, lane);
#if ZEROS
                const u32 pair = slot.zero[m][group][lane];
                const u32 upper = __byte_perm(pair, 0, 0x1010) | 0x80008000u;
                const u32 lower = __byte_perm(pair, 0, 0x3232) | 0x80008000u;
#else
                const u32 upper = MINUS_136, lower = MINUS_136;
#endif
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const u32 w = j ? words.y : words.x;
                    const int c = j % CHAINS;
#if RAISED
                    const u32 a[4] = {raised(w), raised(turned(w, 4)), raised(turned(w, 8)),
                                      raised(turned(w, 12))};
#else
                    const u32 a[4] = {
                        integers(w, upper), integers(turned(w, 4), lower),
                        integers(turned(w, 8), upper), integers(turned(w, 12), lower)};
#endif
#pragma unroll
                    for (int n = 0; n < NT; ++n) {
                        const u32 b0 = j ? b[n].z : b[n].x, b1 = j ? b[n].w : b[n].y;
                        mma(part[c][m][n], a[0], a[1], a[2], a[3], b0, b1);
#if RAISED
                        if (ZEROS || m == 0) mma(less[c][m][n], upper, lower, upper, lower, b0, b1);
#endif
                    }
                }
            }
        }
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            const float2 both = scales(slot, m, group, lane);
            const float scale[2] = {both.x, both.y};
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    float y = part[0][m][n][c];
                    if (CHAINS == 2) y += part[CHAINS - 1][m][n][c];
#if RAISED
                    y += less[0][ZEROS ? m : 0][n][c];
                    if (CHAINS == 2) y += less[CHAINS - 1][ZEROS ? m : 0][n][c];
#endif
                    acc[m][n][c] += scale[c / 2] * y;
                }
        }
    }
#else
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            float part[4] = {};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint4 u = slot.w[m][2 * i][lane], v = slot.w[m][2 * i + 1][lane];
                const uint4 b = in(n, i, lane);
                mma(part, u.x, v.x, u.y, v.y, b.x, b.y);
                mma(part, u.z, v.z, u.w, v.w, b.z, b.w);
            }
#pragma unroll
            for (int s = 0; s < SUMS; ++s) acc[m][n][s] += part[s * 4 / SUMS];
        }
#endif
}

// A warp's sums of a unit, where it leaves them: of the units and warps of a round, in order, each
// pair that has something to leave has an index of its own.
struct Sums {
#if SINGLE
    float of[MT][PARTS * 16];
#else
    float4 of[MT][NT][32];
#endif
};

// `put` stores a number, or four.
template <class Put>
__device__ __forceinline__ void leave(
    Sums& to, float (&acc)[MT][NT][SUMS], int columns, int lane, const Put& put) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#if SINGLE
#if BITS <= 8 && PARTS == 1
#pragma unroll
            for (int s = 0; s < 2; ++s)
                acc[m][n][s] += 65536.f * __shfl_down_sync(~0u, acc[m][n][s], 1);
#endif
            float* const row = to.of[m] + lane % 4 * 16 + lane / 4;
            if (lane % 4 < PARTS) put(row[0], acc[m][n][0]), put(row[8], acc[m][n][1]);
#else
            if (n * 8 + (lane & 3) * 2 < columns)
                put(to.of[m][n][lane],
                    make_float4(acc[m][n][0], acc[m][n][1], acc[m][n][2], acc[m][n][3]));
#endif
#pragma unroll
            for (int s = 0; s < SUMS; ++s) acc[m][n][s] = 0.f;
        }
}

// What is wanted at the end of a warp's first tile and eight columns, or only column, of a round.
struct Early {
    Before of[SINGLE ? 1 : 2];
};
__device__ __forceinline__ int column(int e, int lane, int c) {
    return SINGLE ? 0 : e % NT * 8 + (lane & 3) * 2 + c;
}
__device__ __forceinline__ Early early(
    const Output& output, int e, int begin, int lane, int rows, int columns) {
    Early found;
#pragma unroll
    for (int c = 0; c < (SINGLE ? 1 : 2); ++c)
        found.of[c] = before(
            output, begin * MT + e / NT, SINGLE ? lane % 8 : lane / 4,
            min(column(e, lane, c), columns - 1), rows);
    return found;
}

// Add up what warps left of tile and eight columns e of a round, times a factor for each column, and
// finish it. All of a warp.
__device__ __forceinline__ void end_of_tile(
    const Sums* sums, u32 sharers, const Early& before, const float (&factors)[2],
    const Output& output, u64& most, int e, int begin, int lane, int rows, int columns) {
    const int tile = e / NT, unit = tile / MT, m = tile % MT, last = sharers >> 16;
    int w = sharers & 0xFFFF;
#if SINGLE
    // Lanes r and r + 16 have row r, of every second warp each.
    float y = 0.f;
    w += lane / 16;
#pragma unroll
    for (int j = 0; j < (SHARERS + 1) / 2; ++j, w += 2)
        if (w <= last)
#pragma unroll
            for (int p = 0; p < PARTS; ++p) y += sums[unit + w].of[m][p * 16 + lane % 16];
    y += __shfl_xor_sync(~0u, y, 16);
    if (!(lane & 8)) y *= UPPER;
    const float lower = __shfl_xor_sync(~0u, y, 8), f = factors[0];
    finish<1>(output, before.of[0], begin * MT + tile, lane % 8, 0, y * f, lower * f, rows, lane < 8);
#if EPILOGUE == SCREEN
    const int row = (begin * MT + tile) * 16 + lane % 16;
    if (row < output.tokens) most = max(most, key(y * f, row));
#endif
#else
    float4 y = make_float4(0.f, 0.f, 0.f, 0.f);
    for (; w <= last; w += 4) {
        float4 v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            v[j] = w + j <= last ? sums[unit + w + j].of[m][e % NT][lane]
                                 : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int j = 0; j < 4; ++j) y.x += v[j].x, y.y += v[j].y, y.z += v[j].z, y.w += v[j].w;
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const int n = column(e, lane, c), own = min(n, columns - 1);
        const float upper = (c ? y.y : y.x) * factors[c], lower = (c ? y.w : y.z) * factors[c];
        finish<4>(output, before.of[c], begin * MT + tile, lane / 4, own, upper, lower, rows,
                  n < columns);
    }
#endif
}

// What a warp's outputs of a screen come to: `most` is the largest key of a lane's.
__device__ __forceinline__ void end_of_screen(const Output& output, u64 most, int lane) {
#if EPILOGUE == SCREEN
#pragma unroll
    for (int i = 1; i < 16; i *= 2) most = max(most, __shfl_xor_sync(~0u, most, i));
    if (lane == 0 && most) atomicMax(output.top, most);
#endif
}

// Of pairs of bf16 the largest, without signs: of each half, and of both as fp32.
__device__ __forceinline__ u32 largest(u32 so_far, const uint4& v) {
    const u32 mask = 0x7FFF7FFFu;
    return __vmaxu2(__vmaxu2(__vmaxu2(so_far, v.x & mask), __vmaxu2(v.y & mask, v.z & mask)),
                    v.w & mask);
}
__device__ __forceinline__ u32 largest(u32 both) { return max(both << 16, both & 0xFFFF0000u); }
// 2 to the power that an exponent's bits mean, less `by`. What is no number, or none that is finite,
// has to stay that, though digits cannot tell.
__device__ __forceinline__ float power(u32 exponent, int by) {
    return __uint_as_float(exponent == 255 ? 0x7FC00000u : exponent - by << 23);
}

#if SINGLE
// The first three bytes of four words, byte by byte, each less 128.
__device__ __forceinline__ void split(u32 (&to)[3], u32 a, u32 b, u32 c, u32 d) {
    const u32 first = __byte_perm(a, b, 0x5140), second = __byte_perm(c, d, 0x5140);
    to[0] = __byte_perm(first, second, 0x5410) ^ 0x80808080u;
    to[1] = __byte_perm(first, second, 0x7632) ^ 0x80808080u;
    to[2] = __byte_perm(__byte_perm(a, b, 0x62), __byte_perm(c, d, 0x62), 0x5410) ^ 0x80808080u;
}

// x into shared memory by COUNT threads, of which this is the one `me`, a vector of eight a thread and
// turn. BITS 4, 8: digit by digit of 64 inputs, of each those of lanes with t = 0 first, in the order in
// which a byte of W has them (see weights.py and screen.py). `asked`: is called when x, or its first
// part, has been asked for.
template <int COUNT, class Asked>
__device__ __forceinline__ void stage(
    uint4* to, float2* groups, const uint4* x, int vectors, int me, const Asked& asked) {
    for (int first = 0; first < vectors; first += COUNT * 4) {
        uint4 v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int i = first + j * COUNT + me;
            v[j] = i < vectors ? x[i] : make_uint4(0, 0, 0, 0);
        }
        __syncwarp();  // without it the compiler would ask for x where it is needed
        if (first == 0) asked();
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int i = first + j * COUNT + me;
            if (first + j * COUNT + (me & ~31) >= vectors) break;  // the whole warp
#if BITS <= 8
            const float f[8] = {low(v[j].x), high(v[j].x), low(v[j].y), high(v[j].y),
                                low(v[j].z), high(v[j].z), low(v[j].w), high(v[j].w)};
            u32 most = largest(largest(0, v[j]));
            float sum = 0.f;
#pragma unroll
            for (int e = 0; e < 8; ++e)
                if (ZEROS) sum += f[e];
#pragma unroll
            for (int l = GROUP / 16; l; l /= 2) {
                most = max(most, __shfl_xor_sync(~0u, most, l));
                if (ZEROS) sum += __shfl_xor_sync(~0u, sum, l);
            }
            // Of numbers below 2^-101 not all digits are kept.
            const u32 exponent = max(most >> 23, 26u);
            const float times = __uint_as_float(275 - exponent << 23);
            u32 digits[8];  // the last three bytes, each 128 more
#pragma unroll
            for (int e = 0; e < 8; ++e)
                digits[e] = __float_as_uint(f[e] * times + 12582912.f) + 0x408080u;
            u32 upper[3], lower[3];
            split(upper, digits[0], digits[2], digits[1], digits[3]);
            split(lower, digits[4], digits[6], digits[5], digits[7]);
            uint2* at = (uint2*)to + i / 8 * 24 + i % 4 * 2 + i / 4 % 2;
#pragma unroll
            for (int d = 0; d < 3; ++d)
                if (i < vectors) at[d * 8] = make_uint2(upper[d], lower[d]);
            const float divided_by = power(exponent, 25);  // W is times 16
            if (i < vectors && i % (GROUP / 8) == 0)
                groups[i * 8 / GROUP] = make_float2(sum * times * 16.f, divided_by);
#else
            if (i < vectors) to[i] = v[j];
#endif
        }
    }
}
#endif
