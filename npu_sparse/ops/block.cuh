// What a block of THREADS threads does together: sums, the k-th largest rank, the keys of a bitmap.
#pragma once

constexpr int BINS = 2048;

struct Shared {
    int histogram[BINS];
    int warp[THREADS / 32];
    int bin, wanted, inside;
    u32 differ[2];
};

// The sum over the threads before this one; `total` becomes that over all.
DEVICE int sum_before(Shared& shared, int value, int& total)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = value;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const int left = __shfl_up_sync(FULL, sum, d);
        if (lane >= d) sum += left;
    }
    __syncthreads();
    if (lane == 31) shared.warp[warp] = sum;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int i = 0; i < THREADS / 32; i++) {
        if (i < warp) before += shared.warp[i];
        total += shared.warp[i];
    }
    return before + sum - value;
}

// The least rank such that exactly `wanted` of the n ranks reach it, 1 <= wanted <= n. All threads call it.
template <class Ranks>
DEVICE u64 nth_largest(Shared& shared, int n, int wanted, Ranks ranks)
{
    const u64 any = ranks(0);
    u64 differ = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) differ |= ranks(i) ^ any;
    const u32 upper = __reduce_or_sync(FULL, (u32)(differ >> 32)), lower = __reduce_or_sync(FULL, (u32)differ);
    if (threadIdx.x == 0) shared.differ[0] = shared.differ[1] = 0;
    __syncthreads();
    if (threadIdx.x % 32 == 0) atomicOr(shared.differ, upper), atomicOr(shared.differ + 1, lower);
    __syncthreads();
    differ = (u64)shared.differ[0] << 32 | shared.differ[1];
    int known = 64 - __clzll(differ);  // bits from here on are the same in all ranks
    u64 prefix = known < 64 ? any >> known << known : 0;
    while (known > 0) {
        const int width = min(11, known), shift = known - width;
        for (int i = threadIdx.x; i < BINS; i += THREADS) shared.histogram[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += THREADS) {
            const u64 rank = ranks(i);
            if (known == 64 || rank >> known == prefix >> known) atomicAdd(&shared.histogram[rank >> shift & ((1 << width) - 1)], 1);
        }
        __syncthreads();
        constexpr int EACH = BINS / THREADS;  // bins of a thread, from the largest on
        int bins[EACH], mine = 0, all;
#pragma unroll
        for (int i = 0; i < EACH; i++) mine += bins[i] = shared.histogram[BINS - 1 - (threadIdx.x * EACH + i)];
        int before = sum_before(shared, mine, all);
        if (before < wanted && wanted <= before + mine) {
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                if (before < wanted && wanted <= before + bins[i])
                    shared.bin = BINS - 1 - (threadIdx.x * EACH + i), shared.wanted = wanted - before, shared.inside = bins[i];
                before += bins[i];
            }
        }
        __syncthreads();
        prefix |= (u64)shared.bin << shift;
        known = shift;
        wanted = shared.wanted;
        if (shared.inside == wanted) break;
    }
    return prefix;
}

// Writes the keys whose bit is set, ascending, then -1 up to `width`. The n words and `room` for `width` keys are in shared memory.
DEVICE void write_keys(Shared& shared, const u32* words, int n, int* room, int* indices, int width)
{
    const int each = (n + THREADS - 1) / THREADS | 1, begin = min(n, (int)threadIdx.x * each), stop = min(n, begin + each);
    int mine = 0, all;
    for (int i = begin; i < stop; i++) mine += __popc(words[i]);
    int at = sum_before(shared, mine, all);
    for (int i = begin; i < stop; i++)
        for (u32 word = words[i]; word; word &= word - 1) room[at++] = i * 32 + __ffs(word) - 1;
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += THREADS) indices[i] = i < all ? room[i] : -1;
}
