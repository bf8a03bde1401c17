// The keys that any support of a tile of queries holds, ascending, with a word for each: bit i where the tile's i-th support holds it.
// A block of threads serves one tile, CHUNK keys at a time: supports ascend, so each goes on where it stopped.
//
// THREADS: of a block, a warp for each two of up to 32 supports. CHUNK: keys whose words stand in shared memory.
#include "hopper.cuh"
#include "ranking.cuh"
#include "block.cuh"

struct Arguments {
    const int *indices, *count;
    int *united, *member, *held;  // [B * Hs, tiles, width] twice, [B * Hs, tiles]
    long long i_b, i_h, i_n, c_b, c_h, c_n, width;
    int heads, first_tile, TQ, block, queries, offset;
};

constexpr int WARPS = THREADS / 32, EACH = 32 / WARPS, WORDS = CHUNK / THREADS;

extern "C" __global__ void __launch_bounds__(THREADS) unite_supports(const __grid_constant__ Arguments a)
{
    extern __shared__ u32 words[];  // a thread's WORDS words are consecutive, with one word between those of neighbours
    __shared__ Shared shared;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = (a.first_tile + blockIdx.x) * a.TQ, stop = min(first + a.TQ, a.queries);
    const int support = first / a.block, supports = (stop - 1) / a.block - support + 1;
    const int* const indices = a.indices + blockIdx.y / a.heads * a.i_b + blockIdx.y % a.heads * a.i_h + support * a.i_n;
    const int* const count = a.count + blockIdx.y / a.heads * a.c_b + blockIdx.y % a.heads * a.c_h + support * a.c_n;
    const long long line = (long long)blockIdx.y * gridDim.x + blockIdx.x;
    int *const united = a.united + line * a.width, *const member = a.member + line * a.width;
    auto at = [](int i) { return i + i / WORDS; };
    int done[EACH], held[EACH], total = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        done[i] = 0;
        held[i] = warp + i * WARPS < supports ? count[(warp + i * WARPS) * a.c_n] : 0;
    }
    for (int base = 0; base < a.offset + stop; base += CHUNK) {
        for (int i = threadIdx.x; i < CHUNK + THREADS; i += THREADS) words[i] = 0;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int* const from = indices + (warp + i * WARPS) * a.i_n;
            while (done[i] < held[i]) {
                const int place = done[i] + lane, key = place < held[i] ? from[place] : base + CHUNK;
                const bool here = key < base + CHUNK;
                if (here) atomicOr(words + at(key - base), 1u << (warp + i * WARPS));
                const int n = __popc(__ballot_sync(FULL, here));
                done[i] += n;
                if (n < 32) break;
            }
        }
        __syncthreads();
        int mine = 0, all;
#pragma unroll
        for (int i = 0; i < WORDS; i++) mine += words[threadIdx.x * (WORDS + 1) + i] != 0;
        int to = total + sum_before(shared, mine, all);
#pragma unroll
        for (int i = 0; i < WORDS; i++)
            if (const u32 word = words[threadIdx.x * (WORDS + 1) + i]) {
                united[to] = base + threadIdx.x * WORDS + i;
                member[to++] = word;
            }
        total += all;
        __syncthreads();
    }
    if (threadIdx.x == 0) a.held[line] = total;
}
