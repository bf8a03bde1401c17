// Index scores on Hopper, and of each row only those that can be among its k best. One warpgroup copies keys into shared memory, two
// multiply them with a tile of queries that stays there. Scores never leave the chip as a whole:
//   SAMPLE  one key of every STRIDE, at a pseudo-random place, gives its score: from these a row's threshold is estimated
//   else    a key whose (score, position) reaches the row's threshold is appended to the row's candidates, in any order
// A row is a block of BSEL queries, reduced by maximum. Keys are rows of the matrix product and queries columns, so that most of that
// maximum is within a thread. With BSEL = 1 queries are rows, and what a thread appends is counted before it is written.
//
// DIM: of queries and keys. HEADS: index heads. WEIGHTED: z = sum_h w_h ReLU(q_h k). COLUMNS: queries of a tile. SLOTS: tiles of keys
// in flight. Scores are not scaled: no order depends on it. NORMAL, with BSEL > 1: every query's scores are less its own shift, its
// log-partition times sqrt(DIM), before the maximum over its block. Sums begin at minus the shift, which costs no addition; of one
// plain head, ReLU(s) - shift = max(s - shift, -shift), so that a row's scores have a floor, the largest -shift of its queries that
// see the key.
#include "hopper.cuh"
#include "ranking.cuh"

struct Arguments {
    const u16 *q, *k, *w;
    const float* shift;     // [B, ...], NORMAL: log-partitions, to be multiplied by shift_scale
    const u64* threshold;   // [B, rows]: the least rank that is kept
    u64* candidate;         // [B, rows, capacity]: score in the upper half, key in the lower
    int* held;              // [B, rows]: how many there are, beyond capacity too
    float* sample;          // [B, rows, samples]
    long long q_b, q_h, q_t, k_b, k_t, w_b, w_t, w_h, shift_b;
    int queries, offset, rows, first_query, segment, capacity, samples, sink, recent;
    float shift_scale;  // sqrt(DIM)
};

constexpr int PARTS = DIM / 64, KEYS = 128;
constexpr u32 SLOT_BYTES = KEYS * DIM * 2, QUERY_BYTES = HEADS * COLUMNS * DIM * 2;
constexpr int ACCUMULATORS = (BSEL == 1 ? KEYS : COLUMNS) / 2;

#define ONE_PLAIN_HEAD (HEADS == 1 && !WEIGHTED)
#if SAMPLE
#define NAME sample_scores
#else
#define NAME filter_scores
#endif

extern "C" __global__ void __launch_bounds__(384, 1) NAME(const __grid_constant__ Arguments a)
{
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 queries = shared_address(memory), slots = queries + QUERY_BYTES;
    float* const weights = reinterpret_cast<float*>(memory + QUERY_BYTES + SLOTS * SLOT_BYTES);  // [HEADS, COLUMNS]
    int* const counts = reinterpret_cast<int*>(weights + (WEIGHTED ? HEADS * COLUMNS : 0));      // [COLUMNS], BSEL = 1
    float* const starts = reinterpret_cast<float*>(counts);                                      // [COLUMNS], NORMAL: -shift
    float* const floors = starts + COLUMNS;  // [COLUMNS], NORMAL of one plain head: the largest start from here to the end of a block
    constexpr int COLUMN_BYTES = 4 * COLUMNS * (NORMAL ? 1 + ONE_PLAIN_HEAD : BSEL == 1);
    const u32 full = shared_address(counts) + COLUMN_BYTES, empty = full + 8 * SLOTS, loaded = empty + 8 * SLOTS;
    const long long b = blockIdx.z;
    const int first_query = a.first_query + (gridDim.y - 1 - blockIdx.y) * COLUMNS;  // of all queries; long rows first
    const int first_position = a.offset + first_query;
    const int end = a.offset + min(a.queries, first_query + COLUMNS);  // keys that the tile sees
    const int total = SAMPLE ? (end + STRIDE - 1) / STRIDE : end, begin = blockIdx.x * a.segment, stop = min(total, begin + a.segment);
    if (begin >= stop) return;
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; i++) barrier_init(full + 8 * i, 128), barrier_init(empty + 8 * i, 8);
        barrier_init(loaded, 128);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (WEIGHTED)
        for (int i = threadIdx.x; i < HEADS * COLUMNS; i += 384) {
            const int token = first_query + i % COLUMNS;
            weights[i] = token < a.queries ? number(a.w[b * a.w_b + token * a.w_t + i / COLUMNS * a.w_h]) : 0.0f;
        }
    if (BSEL == 1)
        for (int i = threadIdx.x; i < COLUMNS; i += 384) counts[i] = 0;
    if (NORMAL)
        for (int i = threadIdx.x; i < COLUMNS; i += 384)
            starts[i] = first_query + i < a.queries ? -__fmul_rn(a.shift[b * a.shift_b + first_query + i], a.shift_scale) : MINUS_INFINITY;
    if (NORMAL && ONE_PLAIN_HEAD) {
        __syncthreads();
        for (int i = threadIdx.x; i < COLUMNS; i += 384) {
            float most = starts[i];
            for (int c = i + 1; c % BSEL; c++) most = fmaxf(most, starts[c]);
            floors[i] = most;
        }
    }
    __syncthreads();
    const int group = threadIdx.x / 128, t = threadIdx.x % 128;
    int slot = 0;
    u32 turn = 0;

    if (group == 2) {
        fewer_registers<40>();
        const int first = t / 8, chunk = t % 8;
        const u32 column = (chunk ^ (first & 7)) * 16;
        for (int h = 0; h < HEADS; h++)
            for (int r = first; r < COLUMNS; r += 16) {
                const int token = first_query + r;
                const bool live = token < a.queries;
                const u16* from = a.q + b * a.q_b + chunk * 8 + (live ? h * a.q_h + token * a.q_t : 0);
#pragma unroll
                for (int i = 0; i < PARTS; i++) copy_16(queries + ((h * PARTS + i) * COLUMNS + r) * 128 + column, from + 64 * i, live);
            }
        arrive_after_copies(loaded);
        const u16* const k = a.k + b * a.k_b + chunk * 8;
        for (int place = begin; place < stop; place += KEYS) {
            barrier_wait(empty + 8 * slot, turn ^ 1);
#pragma unroll
            for (int i = 0; i < KEYS / 16; i++) {
                const int n = place + first + 16 * i, key = SAMPLE ? sampled_key(n) : n;
                const bool live = n < stop && key < end;
                const u16* from = k + (live ? key * a.k_t : 0);
                const u32 to = slots + slot * SLOT_BYTES + (first + 16 * i) * 128 + column;
#pragma unroll
                for (int d = 0; d < PARTS; d++) copy_16(to + d * KEYS * 128, from + 64 * d, live);
            }
            arrive_after_copies(full + 8 * slot);
            if (++slot == SLOTS) slot = 0, turn ^= 1;
        }
        return;
    }

    more_registers<232>();
    const int lane = t % 32, quad = lane % 4, row = group * 64 + t / 32 * 16 + lane / 4;
    float s[ACCUMULATORS];
#if !ONE_PLAIN_HEAD
    float z[ACCUMULATORS];
#endif
    barrier_wait(loaded, 0);
    fence_for_matrix_unit();

    // s, or z where heads are added up, of the next slot; one warpgroup's epilogue overlaps with the products of the other
    auto multiply = [&]() {
        barrier_wait(full + 8 * slot, turn);
        fence_for_matrix_unit();
        const u32 keys = slots + slot * SLOT_BYTES;
#pragma unroll 1
        for (int h = 0; h < HEADS; h++) {
            if (NORMAL && ONE_PLAIN_HEAD) {
#pragma unroll
                for (int i = 0; i < ACCUMULATORS; i += 4) {
                    const float2 start = *reinterpret_cast<const float2*>(starts + i / 4 * 8 + 2 * quad);
                    s[i] = s[i + 2] = start.x, s[i + 1] = s[i + 3] = start.y;
                }
                hold(s);
            }
            products_begin();
#pragma unroll
            for (int i = 0; i < DIM / 16; i++) {
                const u32 of_keys = keys + i / 4 * KEYS * 128 + i % 4 * 32, of_queries = queries + (h * PARTS + i / 4) * COLUMNS * 128 + i % 4 * 32;
                if (BSEL == 1)
                    product(s, k_major(of_queries + group * 64 * 128), k_major(of_keys), i > 0);
                else
                    product(s, k_major(of_keys + group * 64 * 128), k_major(of_queries), i > 0 || (NORMAL && ONE_PLAIN_HEAD));
            }
            products_commit();
            products_wait<0>();
            hold(s);
#if !ONE_PLAIN_HEAD
#pragma unroll
            for (int i = 0; i < ACCUMULATORS; i++) {
                float weight = 1;
                if (WEIGHTED) weight = weights[h * COLUMNS + (BSEL == 1 ? row + i / 2 % 2 * 8 : i / 4 * 8 + 2 * quad + i % 2)];
                const float part = larger(s[i], 0.0f) * weight;
                const float before = NORMAL ? starts[i / 4 * 8 + 2 * quad + i % 2] : 0.0f;
                z[i] = h ? z[i] + part : before + part;
            }
#endif
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + 8 * slot);
        if (++slot == SLOTS) slot = 0, turn ^= 1;
    };
#if ONE_PLAIN_HEAD
    float(&scores)[ACCUMULATORS] = s;
#else
    float(&scores)[ACCUMULATORS] = z;
#endif

#if BSEL == 1
    const int token[2] = {first_query + row, first_query + row + 8};
    u64 least[2];
    float bound[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const bool live = token[r] < a.queries;
        least[r] = !SAMPLE && live ? a.threshold[b * a.rows + token[r] - a.first_query] : ~0ull;
        bound[r] = live ? score_of(least[r]) : NOT_A_NUMBER;
    }
    unsigned char* const candidates = reinterpret_cast<unsigned char*>(a.candidate + (b * a.rows + first_query - a.first_query) * a.capacity);
    // element i of one of a thread's two rows: its score and its place in the tile of keys
#define SCORE(i) scores[(i) / 2 * 4 + 2 * r + (i) % 2]
#define PLACE(i) ((i) / 2 * 8 + 2 * quad + (i) % 2)
    for (int place = begin; place < stop; place += KEYS) {
        multiply();
        if (SAMPLE || place + KEYS > first_position - a.recent || place < a.sink) {
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int i = 0; i < KEYS / 4; i++) {
                    const int n = place + PLACE(i), key = SAMPLE ? sampled_key(n) : n, position = a.offset + token[r];
                    if (key > position || n >= stop) SCORE(i) = MINUS_INFINITY;
                    else if (key < a.sink || (a.recent && key > position - a.recent)) SCORE(i) = INFINITY_;
                    else if (SAMPLE) SCORE(i) = ordinary(SCORE(i));
                }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
#if SAMPLE
            const long long line = b * a.rows + token[r] - a.first_query;
            if (token[r] >= a.queries) continue;
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++) {
                const float value = SCORE(i);
                if (place + PLACE(i) < stop)
                    a.sample[line * a.samples + place + PLACE(i)] = ONE_PLAIN_HEAD && value > MINUS_INFINITY ? fmaxf(value, 0.0f) : value;
            }
#else
            // what equals the bound is kept up to a position: the tile lies before it, behind it, or holds it
            const int last = key_of_rank(least[r]);
            const bool holds = place <= last && last < place + KEYS - 1;
            float reaches = place + KEYS - 1 <= last || holds ? bound[r] : above(bound[r]);
            if (reaches == MINUS_INFINITY) reaches = LEAST;
            if (token[r] >= a.queries) reaches = NOT_A_NUMBER;
            if (ONE_PLAIN_HEAD && reaches <= 0) {  // above zero, ReLU changes nothing that reaches the bound
#pragma unroll
                for (int i = 0; i < KEYS / 4; i++)
                    if (SCORE(i) > MINUS_INFINITY) SCORE(i) = fmaxf(SCORE(i), 0.0f);
            }
            u32 hits = 0;
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++)
                if (SCORE(i) >= reaches) hits |= 1u << i;
            if (holds) {
#pragma unroll
                for (int i = 0; i < KEYS / 4; i++)
                    if (SCORE(i) == bound[r] && place + PLACE(i) > last) hits &= ~(1u << i);
            }
            if (!__any_sync(FULL, hits)) continue;
            const int mine = __popc(hits);
            int sum = mine, left = __shfl_up_sync(FULL, sum, 1, 4);
            sum += quad >= 1 ? left : 0;
            left = __shfl_up_sync(FULL, sum, 2, 4);
            sum += quad >= 2 ? left : 0;
            const int all = __shfl_sync(FULL, sum, 3, 4);
            int at = 0;
            if (quad == 0 && all) at = atomicAdd(counts + row + 8 * r, all);
            at = __shfl_sync(FULL, at, 0, 4);
            if (at + all > a.capacity) continue;  // the row is done again
            u32 to = 8 * ((row + 8 * r) * a.capacity + at + sum - mine);
            const int first = place + 2 * quad;
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++)
                if (hits & 1u << i) {
                    const int key = first + i / 2 * 8 + i % 2;
                    const bool always = key < a.sink || (a.recent && key > a.offset + token[r] - a.recent);
                    *reinterpret_cast<u64*>(candidates + to) = entry(always ? SCORE(i) : ordinary(SCORE(i)), key);
                    to += 8;
                }
#endif
        }
    }
    if (!SAMPLE) {
        asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");  // the rows of a warpgroup are its own
        if (t < 64 && first_query + group * 64 + t < a.queries)
            a.held[b * a.rows + first_query - a.first_query + group * 64 + t] = counts[group * 64 + t];
    }
#else
    constexpr int BLOCKS = COLUMNS / BSEL, HALF = BLOCKS > 1 ? BLOCKS / 2 : 1, MINE = HALF > 1 ? HALF / 2 : 1;
    const bool upper = quad & 2, odd = quad & 1;
    const bool reports = (BLOCKS > 1 || !upper) && (HALF > 1 || !odd);
    const int first_row = (first_query - a.first_query) / BSEL + (BLOCKS > 1 && upper ? HALF : 0) + (HALF > 1 && odd ? MINE : 0);
    u64 least[MINE];
    float bound[MINE];
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const bool live = reports && first_row + i < a.rows;
        least[i] = !SAMPLE && live ? a.threshold[b * a.rows + first_row + i] : ~0ull;
        bound[i] = live ? score_of(least[i]) : NOT_A_NUMBER;
    }
    const int first_column = first_row * BSEL - (first_query - a.first_query);
    float floor[MINE];  // of one plain head's scores, where all queries of the row see the key
#pragma unroll
    for (int i = 0; i < MINE; i++) floor[i] = NORMAL && ONE_PLAIN_HEAD ? floors[first_column + i * BSEL] : 0.0f;
    int waiting[2][MINE];  // places whose candidate is written one step later, when the counter has answered
    float kept[2][MINE];
#pragma unroll
    for (int i = 0; i < 2 * MINE; i++) waiting[i / MINE][i % MINE] = -1;
    auto write_waiting = [&](int place) {
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < MINE; i++)
                if (waiting[r][i] >= 0 && waiting[r][i] < a.capacity)
                    a.candidate[(b * a.rows + first_row + i) * a.capacity + waiting[r][i]] = entry(kept[r][i], place + row + 8 * r);
    };
    const bool ragged = first_query + COLUMNS > a.queries;
    for (int place = begin; place < stop; place += KEYS) {
        multiply();
        const bool special = SAMPLE || ragged || place + KEYS > first_position - a.recent || place < a.sink;
        if (special) {
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; i++) {
                const int n = place + row + i / 2 % 2 * 8, key = SAMPLE ? sampled_key(n) : n, column = i / 4 * 8 + 2 * quad + i % 2;
                if (key > first_position + column || first_query + column >= a.queries || n >= stop) scores[i] = MINUS_INFINITY;
            }
        }
        float best[2][BLOCKS];
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int i = 0; i < BLOCKS; i++) {
                best[r][i] = scores[i * BSEL / 2 + 2 * r];
#pragma unroll
                for (int c = 1; c < BSEL / 4; c++) best[r][i] = larger(best[r][i], scores[i * BSEL / 2 + c / 2 * 4 + 2 * r + c % 2]);
            }
            // four lanes share a key: each ends up with the maxima of a quarter of the blocks
#pragma unroll
            for (int i = 0; i < HALF; i++) {
                const float mine = BLOCKS > 1 && upper ? best[r][i + HALF * (BLOCKS > 1)] : best[r][i];
                const float theirs = BLOCKS > 1 ? (upper ? best[r][i] : best[r][i + HALF * (BLOCKS > 1)]) : best[r][i];
                best[r][i] = larger(mine, __shfl_xor_sync(FULL, theirs, 2));
            }
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                const float mine = HALF > 1 && odd ? best[r][i + MINE * (HALF > 1)] : best[r][i];
                const float theirs = HALF > 1 ? (odd ? best[r][i] : best[r][i + MINE * (HALF > 1)]) : best[r][i];
                best[r][i] = larger(mine, __shfl_xor_sync(FULL, theirs, 1));
                if (ONE_PLAIN_HEAD && !(NORMAL && special) && best[r][i] > MINUS_INFINITY) best[r][i] = fmaxf(best[r][i], floor[i]);
            }
        }
        if (NORMAL && ONE_PLAIN_HEAD && special) {  // the floor of a key is that of the queries from its own on
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int i = 0; i < MINE; i++) {
                    const int n = place + row + 8 * r, own = (SAMPLE ? sampled_key(n) : n) - first_position;
                    if (best[r][i] > MINUS_INFINITY) best[r][i] = fmaxf(best[r][i], floors[max(first_column + i * BSEL, own)]);
                }
        }
        if (!SAMPLE) write_waiting(place - KEYS);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int n = place + row + 8 * r, key = SAMPLE ? sampled_key(n) : n;
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                float value = best[r][i];
                bool always = false;
                if (special && value != MINUS_INFINITY) {
                    const int first = a.offset + a.first_query + (first_row + i) * BSEL;
                    always = key < a.sink || (a.recent && key > first - a.recent);
                    if (always) value = INFINITY_;
                    else if (SAMPLE) value = ordinary(value);
                }
                if (SAMPLE) {
                    if (reports && first_row + i < a.rows && n < stop) a.sample[(b * a.rows + first_row + i) * a.samples + n] = value;
                } else {
                    waiting[r][i] = -1;
                    if (value >= bound[i] && value > MINUS_INFINITY && (value > bound[i] || key <= key_of_rank(least[i]))) {
                        waiting[r][i] = atomicAdd(a.held + b * a.rows + first_row + i, 1);
                        kept[r][i] = always ? value : ordinary(value);
                    }
                }
            }
        }
    }
    if (!SAMPLE) write_waiting(begin + (stop - 1 - begin) / KEYS * KEYS);
#endif
}
