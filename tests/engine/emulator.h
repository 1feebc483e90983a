// Enough of CUDA to run the kernels of this project on a CPU, as slowly as that is: threads of a
// block, or of a cluster, are fibers of one thread, which meet where warps, blocks and clusters do.
// What the sources say in assembly is said here in C++ (`emulation.py` leaves those functions out).
//
// Copies into shared memory that nobody waits for come as late as they may, or at once (`lazy`): the
// first shows who reads too early, the second who overwrites what is still wanted. What a kernel may
// only read once the kernels before it have ended is not there until all threads of its cluster have
// waited for them (`late`).
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n)
#define __shared__ static __attribute__((section("block_memory")))
extern "C" char __start_block_memory[], __stop_block_memory[];
static __attribute__((section("block_memory"), used)) char block_memory_is_there[16];

struct uint3 {
    unsigned x, y, z;
};
struct uint2 {
    unsigned x, y;
} __attribute__((aligned(8)));
struct uint4 {
    unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct float2 {
    float x, y;
} __attribute__((aligned(8)));
struct float4 {
    float x, y, z, w;
} __attribute__((aligned(16)));
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint3 threadIdx, blockIdx, blockDim, gridDim;

template <class T>
static T min(T a, T b) { return b < a ? b : a; }
template <class T>
static T max(T a, T b) { return a < b ? b : a; }
static float __uint_as_float(unsigned v) { float f; memcpy(&f, &v, 4); return f; }
static unsigned __float_as_uint(float f) { unsigned v; memcpy(&v, &f, 4); return v; }
static float rsqrtf(float v) { return 1.f / sqrtf(v); }
#define __expf expf
static float __fdividef(float a, float b) { return a / b; }
static unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return (unsigned)(((uint64_t)high << 32 | low) >> (by & 31));
}
static unsigned __byte_perm(unsigned x, unsigned y, unsigned which) {
    const uint64_t all = (uint64_t)y << 32 | x;
    unsigned r = 0;
    for (int i = 0; i < 4; ++i) r |= (unsigned)(all >> (which >> 4 * i & 7) * 8 & 255) << 8 * i;
    return r;
}
static unsigned __vmaxu2(unsigned a, unsigned b) {
    const unsigned mask = 0xFFFFu;
    return max(a & mask, b & mask) | max(a & ~mask, b & ~mask);
}
template <class T>
static T atomicAdd(T* to, T v) { const T old = *to; *to += v; return old; }
static uint64_t atomicMax(unsigned long long* to, unsigned long long v) {
    const unsigned long long old = *to;
    *to = v > old ? v : old;
    return old;
}
static uint64_t atomicExch(unsigned long long* to, unsigned long long v) {
    const unsigned long long old = *to;
    *to = v;
    return old;
}
static unsigned atomicMax(unsigned* to, unsigned v) {
    const unsigned old = *to;
    *to = v > old ? v : old;
    return old;
}
static void __threadfence() {}
static int __ffs(unsigned v) { return __builtin_ffs(v); }

namespace emulator {

struct Copy {
    void* to;
    const void* from;
    int bytes;
};
struct Meeting {  // of a warp, block or cluster
    int wanted = 0, arrived = 0, turn = 0;
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    uint3 thread;
    int block = 0, clusters = 0;  // of those met
    Meeting* waits_for = nullptr;
    int until = 0;
    bool ended = false;
    std::vector<std::vector<Copy>> groups;  // of copies: the last one is open
};
struct Block {
    uint3 index;
    Meeting all, gifts;  // of bytes from all blocks of a cluster
    std::vector<Meeting> warps;
    std::vector<uint32_t> lanes;  // [warp][turn % 2][value][lane]: what lanes told each other
    std::vector<char> fixed, dynamic;
};
struct Late {
    char *to;
    std::vector<char> real;
};

static const int VALUES = 6;
static std::vector<Fiber> fibers;
static std::vector<Block> blocks;
static std::vector<Late> late;
static Meeting cluster, prior;  // prior: who waits for the kernels before
static ucontext_t scheduler;
static Fiber* now;
static void (*body)(void**);
static void** parameters;
static bool lazy;
static bool waited;
static char failure[200];  // why the emulation stopped, if it did

// Nothing runs any more.
static void fail(const char* why) {
    snprintf(failure, sizeof(failure), "%s (block %u, thread %u)", why, blockIdx.x, threadIdx.x);
    if (now) swapcontext(&now->context, &scheduler);
}

static Block& here() { return blocks[now->block]; }
static void pause() { swapcontext(&now->context, &scheduler); }
static void wait_until(Meeting& m, int turn) {
    if (m.turn >= turn) return;
    now->waits_for = &m, now->until = turn;
    pause();
}
static void arrive_at(Meeting& m) {
    if (++m.arrived == m.wanted) m.arrived = 0, ++m.turn;
}
static void meet(Meeting& m) {
    const int turn = m.turn + 1;
    arrive_at(m);
    wait_until(m, turn);
}
static int lane() { return now->thread.x % 32; }
// All lanes of a warp tell a value or some; what all told.
static const uint32_t* tell(const uint32_t* values, int count) {
    const int warp = now->thread.x / 32;
    Meeting& m = here().warps[warp];
    uint32_t* told = &here().lanes[(warp * 2 + m.turn % 2) * VALUES * 32];
    for (int i = 0; i < count; ++i) told[i * 32 + lane()] = values[i];
    meet(m);
    return told;
}
static void perform(std::vector<Copy>& group) {
    for (const Copy& c : group) memcpy(c.to, c.from, c.bytes);
    group.clear();
}
static void copy(void* to, const void* from, int bytes) {
    if ((uintptr_t)from % bytes || (uintptr_t)to % bytes) fail("a copy is not aligned");
    if (lazy)
        now->groups.back().push_back({to, from, bytes});
    else
        memcpy(to, from, bytes);
}
static void start() {
    body(parameters);
    now->ended = true;
    pause();
}
static void take_place(int from, int to) {  // in the memory that a block has for itself
    const size_t bytes = __stop_block_memory - __start_block_memory;
    if (from >= 0) memcpy(blocks[from].fixed.data(), __start_block_memory, bytes);
    memcpy(__start_block_memory, blocks[to].fixed.data(), bytes);
}

// One cluster, to its end.
static void run(std::vector<uint3> indices, int threads, size_t shared) {
    const size_t bytes = __stop_block_memory - __start_block_memory;
    const int warps = threads / 32;
    blocks.clear(), fibers.clear();
    blocks.resize(indices.size()), fibers.resize(indices.size() * threads);
    cluster = prior = {(int)fibers.size(), 0, 0};
    waited = false;
    for (Late& l : late) memset(l.to, 0xFF, l.real.size());
    for (size_t b = 0; b < blocks.size(); ++b) {
        Block& block = blocks[b];
        block.index = indices[b];
        block.all.wanted = threads;
        block.warps.resize(warps);
        for (Meeting& m : block.warps) m.wanted = 32;
        block.lanes.resize(warps * 2 * VALUES * 32);
        block.fixed.assign(bytes, (char)0xFF), block.dynamic.assign(shared + 128, (char)0xFF);
        for (int t = 0; t < threads; ++t) {
            Fiber& f = fibers[b * threads + t];
            f.thread = {(unsigned)t, 0, 0}, f.block = (int)b, f.stack.resize(96 << 10);
            f.groups.resize(1);
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
            makecontext(&f.context, start, 0);
        }
    }
    // A warp goes as far as it can before the next one does anything.
    int placed = -1;
    for (bool more = true; more;) {
        bool any = more = false;
        for (size_t first = 0; first < fibers.size(); first += 32)
            for (bool on = true; on;) {
                on = false;
                for (size_t i = first; i < first + 32; ++i) {
                    Fiber& f = fibers[i];
                    if (f.ended) continue;
                    more = true;
                    if (f.waits_for && f.waits_for->turn < f.until) continue;
                    f.waits_for = nullptr, any = on = true;
                    if (placed != f.block) take_place(placed, f.block), placed = f.block;
                    now = &f, threadIdx = f.thread, blockIdx = blocks[f.block].index;
                    swapcontext(&scheduler, &f.context);
                    now = nullptr;
                    if (failure[0]) return;
                }
            }
        if (more && !any) return fail("threads wait for ever");
    }
    if (!waited) fail("a kernel ends without having waited");
}

template <class... A, size_t... I>
static void call(void (*kernel)(A...), void** given, std::index_sequence<I...>) {
    kernel(*(A*)given[I]...);
}
template <class... A>
static void call(void (*kernel)(A...), void** given) {
    call(kernel, given, std::index_sequence_for<A...>());
}

// `cluster_blocks` blocks along x are a cluster. late_to, late_bytes: what kernels before this write.
static const char* launch(
    void (*kernel)(void**), void** given, const int* grid, int cluster_blocks, int threads,
    size_t shared, int copies_are_late, int late_count, char** late_to, const size_t* late_bytes) {
    body = kernel, parameters = given, lazy = copies_are_late;
    failure[0] = 0, now = nullptr;
    gridDim = {(unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2]};
    blockDim = {(unsigned)threads, 1, 1};
    for (unsigned z = 0; z < gridDim.z; ++z)
        for (unsigned y = 0; y < gridDim.y; ++y)
            for (unsigned x = 0; x < gridDim.x; x += cluster_blocks) {
                late.clear();
                for (int i = 0; i < late_count; ++i)
                    late.push_back({late_to[i], {late_to[i], late_to[i] + late_bytes[i]}});
                std::vector<uint3> indices;
                for (int b = 0; b < cluster_blocks; ++b) indices.push_back({x + b, y, z});
                run(indices, threads, shared);
                if (failure[0]) return failure;
            }
    return nullptr;
}

}  // namespace emulator

static void __syncthreads() { emulator::meet(emulator::here().all); }
static void __syncwarp() { emulator::tell(nullptr, 0); }
template <class T>
static T of_lane(T v, int lane) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    uint32_t words[2] = {}, got[2];
    memcpy(words, &v, sizeof(T));
    const uint32_t* told = emulator::tell(words, sizeof(T) / 4);
    for (size_t i = 0; i < sizeof(T) / 4; ++i) got[i] = told[i * 32 + lane];
    memcpy(&v, got, sizeof(T));
    return v;
}
template <class T>
static T __shfl_xor_sync(unsigned, T v, int with) { return of_lane(v, emulator::lane() ^ with); }
template <class T>
static T __shfl_sync(unsigned, T v, int lane) { return of_lane(v, lane % 32); }
template <class T>
static T __shfl_down_sync(unsigned, T v, unsigned by) {
    const unsigned lane = emulator::lane();
    return of_lane(v, lane + by < 32 ? lane + by : lane);
}
static unsigned __ballot_sync(unsigned, bool v) {
    const uint32_t mine = v, *told = emulator::tell(&mine, 1);
    unsigned all = 0;
    for (int i = 0; i < 32; ++i) all |= told[i] << i;
    return all;
}
static char* aligned(char* at) { return at + (128 - (uintptr_t)at % 128) % 128; }
static char* dynamic_memory() { return aligned(emulator::here().dynamic.data()); }
static size_t __cvta_generic_to_shared(const void* at) { return (const char*)at - dynamic_memory(); }

// --- what the sources say in assembly -------------------------------------------------------------

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

static u16 rounded_bf16(float v) {
    if (v != v) return 0x7FFF;
    const u32 bits = __float_as_uint(v);
    return (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
static float widened_bf16(u16 v) { return __uint_as_float((u32)v << 16); }
static float widened_half(u16 bits) {
    _Float16 h;
    memcpy(&h, &bits, 2);
    return (float)h;
}
static u32 bf16_pair(float a, float b) { return rounded_bf16(a) | (u32)rounded_bf16(b) << 16; }
static float half_low(u32 pair) { return widened_half((u16)pair); }
static float half_high(u32 pair) { return widened_half((u16)(pair >> 16)); }
static u32 raised(u32 word) { return (word & 0x000F000Fu) ^ 0x43084308u; }
static u32 integers(u32 word, u32 minus) {
    const u32 r = raised(word);
    return bf16_pair(widened_bf16((u16)r) + widened_bf16((u16)minus),
                     widened_bf16((u16)(r >> 16)) + widened_bf16((u16)(minus >> 16)));
}
// PTX ISA, mma.m16n8k16 and k32: fragments of operands of 16 and 8 bits, K a word of them.
template <int K, class T, class LEFT, class RIGHT>
static void multiply_fragments(T (&c)[4], const u32 (&mine)[6], LEFT left, RIGHT right) {
    u32 told[6][32];
    memcpy(told, emulator::tell(mine, 6), sizeof(told));
    const int g = emulator::lane() / 4, t = emulator::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = i / 2, column = t * 2 + i % 2;  // row: g or g + 8
        T sum = 0;
        for (int k = 0; k < 8 * K; ++k) {
            const int half = k / (4 * K), part = k / K % 4, at = k % K * (32 / K);
            const u32 a = told[row + half * 2][g * 4 + part], b = told[4 + half][column * 4 + part];
            sum += left(a >> at) * right(b >> at);
        }
        c[i] += sum;
    }
}
static void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const auto widened = [](u32 v) { return widened_bf16((u16)v); };
    multiply_fragments<2>(c, {a0, a1, a2, a3, b0, b1}, widened, widened);
}
static int with_sign(u32 byte) { return (signed char)byte; }
static int without_sign(u32 byte) { return (unsigned char)byte; }
static void mma_bytes(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    multiply_fragments<4>(c, {a0, a1, a2, a3, b0, b1}, with_sign, with_sign);
}
static void mma_left_unsigned(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    multiply_fragments<4>(c, {a0, a1, a2, a3, b0, b1}, without_sign, with_sign);
}
static void mma_right_unsigned(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    multiply_fragments<4>(c, {a0, a1, a2, a3, b0, b1}, with_sign, without_sign);
}
static u32 even_fields(u32 word) { return (word & 0x0F0F0F0Fu) ^ 0x08080808u; }
static u32 odd_fields(u32 word) { return (word & 0xF0F0F0F0u) ^ 0x80808080u; }
// PTX ISA, ldmatrix: lanes 8i to 8i + 7 have the addresses of matrix i's rows.
static uint4 told_matrices(u32 from, bool turned) {
    u32 told[32], got[4];
    memcpy(told, emulator::tell(&from, 1), sizeof(told));
    const int g = emulator::lane() / 4, t = emulator::lane() % 4;
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j) {
            const u32 row = told[i * 8 + (turned ? 2 * t + j : g)];
            if (row % 16) emulator::fail("a row of a matrix is not aligned");
            memcpy((char*)&got[i] + 2 * j, dynamic_memory() + row + 2 * (turned ? g : 2 * t + j), 2);
        }
    return {got[0], got[1], got[2], got[3]};
}
static uint4 matrices(u32 from) { return told_matrices(from, false); }
static uint4 turned_matrices(u32 from) { return told_matrices(from, true); }
static float power_of_two(float v) { return exp2f(v); }
static u32 kept(u32 v) { return v; }
static u64 cycles() { return 0; }
static void rest_until(u64) {}
template <int LANES>
static uint4 first_lanes(u32 from, int lane) {
    if (lane >= LANES) return {~0u, ~0u, ~0u, ~0u};  // no bf16 number
    return *(const uint4*)(dynamic_memory() + from);
}
static uint4 stream(const uint4* from) { return *from; }
static void copy_async(void* to, const void* from) { emulator::copy(to, from, 16); }
alignas(16) static const char zeros[16] = {};
static void copy_or_zero(void* to, const void* from, bool there) {
    emulator::copy(to, there ? from : zeros, 16);
}
static void copy_word(void* to, const void* from) { emulator::copy(to, from, 4); }
static void end_of_copies() { emulator::now->groups.emplace_back(); }
template <int N>
static void wait_for_copies() {
    auto& groups = emulator::now->groups;
    while (groups.size() > N + 1) {
        emulator::perform(groups.front());
        groups.erase(groups.begin());
    }
}
static void bring_near(const void* from, u32 bytes) {
    volatile char seen = 0;
    for (u32 i = 0; i < bytes; i += 32) seen = ((const char*)from)[i];
    (void)seen;
}
template <class T>
static void at_hand(T*) {}
static void start_dependents() {}
static void wait_for_prior() {
    emulator::meet(emulator::prior);
    if (!emulator::waited)
        for (emulator::Late& l : emulator::late) memcpy(l.to, l.real.data(), l.real.size());
    emulator::waited = true;
}
#ifdef SPLITS
static void expect(u64*, u32 bytes) { emulator::here().gifts.wanted = (int)bytes; }
template <class T>
static void give(T* shared, int rank, T v, u64*) {
    auto& there = emulator::blocks[rank];
    const size_t begin = (size_t)emulator::here().dynamic.data(), at = (size_t)shared - begin;
    if ((size_t)shared % sizeof(T)) emulator::fail("a gift is not aligned");
    if (rank == emulator::now->block)
        *shared = v;
    else if (at < emulator::here().dynamic.size())
        memcpy(aligned(there.dynamic.data()) + ((char*)shared - dynamic_memory()), &v, sizeof(T));
    else
        memcpy(there.fixed.data() + ((char*)shared - __start_block_memory), &v, sizeof(T));
    if (!emulator::blocks[rank].gifts.wanted) emulator::fail("a block gets what it does not expect");
    for (size_t i = 0; i < sizeof(T); ++i) emulator::arrive_at(emulator::blocks[rank].gifts);
}
static void wait_for_gifts(u64*) {
    if (SPLITS > 1)
        emulator::wait_until(emulator::here().gifts, 1);
    else
        __syncthreads();
}
static void arrive() {
    if (SPLITS > 1) emulator::arrive_at(emulator::cluster);
}
static void wait_for_cluster() {
    if (SPLITS > 1) emulator::wait_until(emulator::cluster, ++emulator::now->clusters);
}
#endif
