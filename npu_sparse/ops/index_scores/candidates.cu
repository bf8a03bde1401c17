// What precedes and follows the scoring of a row: its threshold from a sample of its keys, and its k best among its candidates. Rows
// whose candidates are too few or too many - an unlucky sample - are found here and done again by another way.
//
// THREADS: of a block, which serves one row. K, sizes and strides are arguments; STRIDE is that of the sample.
#include "hopper.cuh"
#include "ranking.cuh"
#include "block.cuh"

struct Row {
    int queries, offset, rows, first_query, block;
    DEVICE int last(int row) const { return offset + min(queries, first_query + (row + 1) * block) - 1; }  // key its last query sees
};

struct Estimate {
    const float* sample;  // [B, rows, samples]
    u64* threshold;  // [B, all rows]
    int *held, *failed;  // [B, all rows], and one number: zero from here on
    Row row;
    int samples, place, capacity, first_row, all_rows;  // place: of the threshold among the sample, from the largest
};

extern "C" __global__ void __launch_bounds__(THREADS) estimate_thresholds(const __grid_constant__ Estimate a)
{
    __shared__ Shared shared;
    const int last = a.row.last(blockIdx.x);
    const long long line = (long long)blockIdx.y * a.row.rows + blockIdx.x;
    u64 threshold = ANY;
    if (last >= a.capacity) {
        const float* const sample = a.sample + line * a.samples;
        const int n = last / STRIDE + 1;
        int seen = 0, all;
        for (int i = threadIdx.x; i < n; i += THREADS) seen += sample[i] > MINUS_INFINITY;
        sum_before(shared, seen, all);
        if (all >= a.place)
            threshold = nth_largest(shared, n, a.place, [&](int i) { return sample[i] > MINUS_INFINITY ? rank(sample[i], sampled_key(i)) : 0; });
    }
    if (threadIdx.x == 0) {
        const long long to = (long long)blockIdx.y * a.all_rows + a.first_row + blockIdx.x;
        a.threshold[to] = threshold;
        a.held[to] = 0;
        if (to == 0) *a.failed = 0;
    }
}

struct Select {
    const u64* candidate;  // [B, rows, capacity]
    const int* held;
    int *indices, *count;  // [B, all rows, width], [B, all rows]
    int* failed;           // how many rows, then which: batch x rows + row
    Row row;
    int capacity, k, width, first_row, all_rows;
};

extern "C" __global__ void __launch_bounds__(THREADS) select_candidates(const __grid_constant__ Select a)
{
    extern __shared__ u32 words[];
    __shared__ Shared shared;
    const int row = blockIdx.x, last = a.row.last(row), k = min(a.k, last + 1);
    const long long line = (long long)blockIdx.y * a.row.rows + row, to = (long long)blockIdx.y * a.all_rows + a.first_row + row;
    const int n = a.held[line];
    if (n > a.capacity || n < k) {
        if (threadIdx.x == 0) a.failed[1 + atomicAdd(a.failed, 1)] = (int)line;
        return;
    }
    const u64* const candidate = a.candidate + line * a.capacity;
    const int used = last / 32 + 1;
    for (int i = threadIdx.x; i < used; i += THREADS) words[i] = 0;
    __syncthreads();
    const u64 least = n > k ? nth_largest(shared, n, k, [&](int i) { return rank_of(candidate[i]); }) : 0;
    for (int i = threadIdx.x; i < n; i += THREADS)
        if (rank_of(candidate[i]) >= least) {
            const int key = key_of(candidate[i]);
            atomicOr(words + key / 32, 1u << key % 32);
        }
    __syncthreads();
    write_keys(shared, words, used, reinterpret_cast<int*>(words + used), a.indices + to * a.width, a.width);
    if (threadIdx.x == 0) a.count[to] = k;
}

struct Rescue {
    const u16 *q, *k, *w;
    const float* shift;  // [B, ...]: what every query's scores are less, times shift_scale, or null
    float* scores;  // [blocks, keys]
    int *indices, *count;
    const int* failed;
    long long q_b, q_h, q_t, k_b, k_t, w_b, w_t, w_h, shift_b;
    Row row;
    int keys, k_best, width, first_row, all_rows, heads, dim, sink, recent;
    float shift_scale;
};

// The scores of a failed row by the small matrix instruction, straight from global memory, and its k best among all of them.
extern "C" __global__ void __launch_bounds__(THREADS) rescue_rows(const __grid_constant__ Rescue a)
{
    __shared__ Shared shared;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
    float* const scores = a.scores + (long long)blockIdx.x * a.keys;
    const int failed = *a.failed;
    for (int n = blockIdx.x; n < failed; n += gridDim.x) {
        const int line = a.failed[1 + n], b = line / a.row.rows, row = line % a.row.rows, last = a.row.last(row);
        const int first = a.row.first_query + row * a.row.block, end = min(a.row.queries, first + a.row.block);
        for (int place = warp * 16; place <= last; place += THREADS / 2) {
            float best[2] = {MINUS_INFINITY, MINUS_INFINITY};
            for (int token = first; token < end; token += 8) {
                float z[4] = {0, 0, 0, 0};
                for (int h = 0; h < a.heads; h++) {
                    float c[4] = {0, 0, 0, 0};
                    const int query = min(token + lane / 4, end - 1);
                    const u16* const q = a.q + b * a.q_b + h * a.q_h + query * a.q_t + 2 * quad;
                    const u16* const k0 = a.k + b * a.k_b + min(place + lane / 4, last) * a.k_t + 2 * quad;
                    const u16* const k1 = a.k + b * a.k_b + min(place + lane / 4 + 8, last) * a.k_t + 2 * quad;
                    for (int d = 0; d < a.dim; d += 16) {
                        auto two = [](const u16* at) { return *reinterpret_cast<const u32*>(at); };
                        asm volatile("mma.sync.aligned.m16n8k16.row.col" SMALL_TYPES "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                                     : "r"(two(k0 + d)), "r"(two(k1 + d)), "r"(two(k0 + d + 8)), "r"(two(k1 + d + 8)), "r"(two(q + d)), "r"(two(q + d + 8)));
                    }
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int column = min(token + 2 * quad + i % 2, end - 1);
                        z[i] += larger(c[i], 0.0f) * (a.w ? number(a.w[b * a.w_b + column * a.w_t + h * a.w_h]) : 1.0f);
                    }
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int column = token + 2 * quad + i % 2, key = place + lane / 4 + i / 2 * 8;
                    if (column >= end || key > a.row.offset + column) continue;
                    best[i / 2] = larger(best[i / 2], a.shift ? z[i] - __fmul_rn(a.shift[b * a.shift_b + column], a.shift_scale) : z[i]);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                best[r] = larger(best[r], __shfl_xor_sync(FULL, best[r], 1));
                best[r] = larger(best[r], __shfl_xor_sync(FULL, best[r], 2));
                const int key = place + lane / 4 + 8 * r;
                if (key < a.sink || (a.recent && key > a.row.offset + first - a.recent)) best[r] = INFINITY_;
                else best[r] = ordinary(best[r]);
                if (quad == 0 && key <= last) scores[key] = best[r];
            }
        }
        __syncthreads();
        const int k = min(a.k_best, last + 1);
        const u64 least = nth_largest(shared, last + 1, k, [&](int i) { return rank(scores[i], i); });
        const long long to = (long long)b * a.all_rows + a.first_row + row;
        int at = 0;
        for (int start = 0; start <= last; start += THREADS) {
            const int key = start + threadIdx.x, chosen = key <= last && scores[key] > MINUS_INFINITY && rank(scores[key], key) >= least;
            int all;
            const int before = sum_before(shared, chosen, all);
            if (chosen) a.indices[to * a.width + at + before] = key;
            at += all;
        }
        for (int i = at + threadIdx.x; i < a.width; i += THREADS) a.indices[to * a.width + i] = -1;
        if (threadIdx.x == 0) a.count[to] = at;
        __syncthreads();
    }
}
