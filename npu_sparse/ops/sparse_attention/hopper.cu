// sparse_attention on Hopper: one warpgroup gathers the keys and values of supports row by row into shared memory, two multiply. A
// tile is TQ queries with the G heads of one KV head, so every gathered key serves TQ x G rows. A block of threads stays on its
// multiprocessor and takes item after item; the products of one step overlap with the softmax of the next.
//
// DIM: of queries, keys and values. BN: keys of a step. SLOTS: keys or values of that many steps are in flight.
// STREAMS: 1: an item is one tile of 128 rows, half of it for each warpgroup. 2: two tiles of 64, whose supports differ.
// UNION: indices are those of the tile, and bit i of a key's word says whether the tile's i-th support holds it.
// ARRIVING: threads of a warp that say it has read a slot: 1, or all 32 where racecheck looks on, which does not follow one thread
// that speaks for its warp after __syncwarp. PLANTED: 1 and 2 leave a wait out, so that racecheck has something to find.
// TAIL: behind its support, every block of queries of a tile has one key more, which stands for `tail_number` keys.
#include "hopper.cuh"

struct Arguments {
    const u16 *q, *k, *v;
    u16* out;
    const int *indices, *count, *member;
    const u16 *tail_k, *tail_v;  // [B, Hkv, blocks, DIM]
    const float* tail_number;    // [B, Hs, blocks]
    long long q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, i_b, i_h, i_n, c_b, c_h, c_n;
    int items, tiles, first_tile, queries, offset, block, kv_heads, heads_per_support, G, TQ, blocks;
    float scale_log2;
};

constexpr int ROWS = 128, TILE_ROWS = ROWS / STREAMS, PARTS = DIM / 64, READERS = 8 / STREAMS;
constexpr u32 SLOT_BYTES = BN * DIM * 2, QUERY_BYTES = ROWS * DIM * 2;

struct Tile {
    long long b, support;  // where its indices begin
    int h, token, held, slots;

    DEVICE Tile(const Arguments& a, int item, int stream)
    {
        const int in_head = (a.tiles + STREAMS - 1) / STREAMS, tile = item % in_head * STREAMS + stream;
        b = item / in_head / a.kv_heads;
        h = item / in_head % a.kv_heads;
        token = (a.first_tile + tile) * a.TQ;
        const long long s = h / a.heads_per_support, row = UNION ? tile : token / a.block;
        held = tile < a.tiles ? a.count[b * a.c_b + s * a.c_h + row * a.c_n] : 0;
        support = b * a.i_b + s * a.i_h + row * a.i_n;
        slots = held;
        if (TAIL && tile < a.tiles) slots += (min(token + a.TQ, a.queries) - 1) / a.block - token / a.block + 1;
    }

    DEVICE int steps() const { return (slots + BN - 1) / BN; }
};

struct Ring {  // its next slot, and the parity of that slot's turn
    u32 slot = 0, turn = 0;
    DEVICE void advance()
    {
        if (++slot == SLOTS) slot = 0, turn ^= 1;
    }
};

extern "C" __global__ void __launch_bounds__(384, 1) attend_supports(const __grid_constant__ Arguments a)
{
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 queries = shared_address(memory), slots = queries + QUERY_BYTES, numbers = slots + SLOTS * SLOT_BYTES;
    int* const keys = reinterpret_cast<int*>(memory + QUERY_BYTES + SLOTS * SLOT_BYTES);  // [SLOTS, BN], then words of the same shape
    const u32 full = numbers + SLOTS * BN * 4 * (UNION ? 2 : 1), empty = full + 8 * SLOTS;
    const u32 queries_full = empty + 8 * SLOTS, queries_empty = queries_full + 8;
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; i++) barrier_init(full + 8 * i, 128), barrier_init(empty + 8 * i, READERS * ARRIVING);
        barrier_init(queries_full, 128);
        barrier_init(queries_empty, 8 * ARRIVING);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int group = threadIdx.x / 128, t = threadIdx.x % 128;
    Ring ring;

    if (group == 2) {
        fewer_registers<40>();
        constexpr int EACH = BN / 16;  // rows of a step of which one thread copies an eighth
        const int first = t / 8, chunk = t % 8;
        const u32 column = (chunk ^ (first & 7)) * 16;
        u32 turn = 0;
        for (int item = blockIdx.x; item < a.items; item += gridDim.x, turn ^= 1) {
            const Tile tile(a, item, 0), other(a, item, STREAMS - 1);
            barrier_wait(queries_empty, turn ^ 1);
            auto load_queries = [&](const Tile& of, u32 to) {
                for (int r = first; r < TILE_ROWS; r += 16) {
                    const int token = of.token + r / a.G, head = of.h * a.G + r % a.G;
                    const bool live = r < a.TQ * a.G && token < a.queries;
                    const u16* from = a.q + chunk * 8;
                    if (live) from += of.b * a.q_b + head * a.q_h + token * a.q_t;
#pragma unroll
                    for (int i = 0; i < PARTS; i++) copy_16(to + i * ROWS * 128 + r * 128 + column, from + 64 * i, live);
                }
            };
            load_queries(tile, queries);
            if (STREAMS > 1) load_queries(other, queries + TILE_ROWS * 128);
            arrive_after_copies(queries_full);

            auto gather = [&](const u16* base, long long stride, const u16* tail, const Tile& of, int step, bool with_numbers) {
                int key[EACH];
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    const int place = step * BN + first + 16 * i;
                    key[i] = place < of.held ? __ldg(a.indices + of.support + place) : -1;
                    if (TAIL && place >= of.held && place < of.slots) key[i] = -2 - (of.token / a.block + place - of.held);
                }
                if (PLANTED != 1) barrier_wait(empty + 8 * ring.slot, ring.turn ^ 1);
                if (with_numbers && t < BN) {
                    const int place = step * BN + t;
                    const bool live = place < of.held;
                    const u32 to = numbers + (ring.slot * BN + t) * 4;
                    copy_4(to, a.indices + (live ? of.support + place : 0), live);
                    if (UNION) copy_4(to + SLOTS * BN * 4, a.member + (live ? of.support + place : 0), live);
                }
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    const bool live = TAIL ? key[i] != -1 : key[i] >= 0;
                    const u16* row = base + chunk * 8 + (key[i] >= 0 ? key[i] * stride : 0);
                    if (TAIL && key[i] < -1) row = tail + chunk * 8 + (-2 - key[i]) * DIM;
                    const u32 to = slots + ring.slot * SLOT_BYTES + (first + 16 * i) * 128 + column;
#pragma unroll
                    for (int d = 0; d < PARTS; d++) copy_16(to + d * BN * 128, row + 64 * d, live);
                }
                arrive_after_copies(full + 8 * ring.slot);
                ring.advance();
            };
            const u16* const k = a.k + tile.b * a.k_b + tile.h * a.k_h;
            const u16* const v = a.v + tile.b * a.v_b + tile.h * a.v_h;
            const long long tails = TAIL ? (tile.b * a.kv_heads + tile.h) * a.blocks * DIM : 0;
            const u16 *const tail_k = a.tail_k + tails, *const tail_v = a.tail_v + tails;
            const int steps = max(tile.steps(), other.steps());
            for (int step = steps - 1; step >= -1; step--) {  // the latest keys first: only they need a causal mask
                if (step >= 0) {
                    gather(k, a.k_t, tail_k, tile, step, true);
                    if (STREAMS > 1) gather(k, a.k_t, tail_k, other, step, true);
                }
                if (step < steps - 1) {
                    gather(v, a.v_t, tail_v, tile, step + 1, false);
                    if (STREAMS > 1) gather(v, a.v_t, tail_v, other, step + 1, false);
                }
            }
        }
    } else {
        more_registers<232>();
        const int stream = STREAMS > 1 ? group : 0;
        const int lane = t % 32, quad = lane % 4, row = (STREAMS > 1 ? 0 : group * 64) + t / 32 * 16 + lane / 4;
        const u32 own = queries + group * 64 * 128;
        float o[DIM / 2], s[BN / 2];
        u32 p[BN / 4], turn = 0;
        auto release = [&](u32 bar) {
            __syncwarp();
            if (ARRIVING == 32 || lane == 0) barrier_arrive(bar);
        };
        auto await_slot = [&]() {  // the next one of this stream
            if (stream) ring.advance();
            const Ring at = ring;
            if (PLANTED != 2) barrier_wait(full + 8 * at.slot, at.turn);
            fence_for_matrix_unit();
            ring.advance();
            if (STREAMS > 1 && !stream) ring.advance();
            return at.slot;
        };
        auto multiply_keys = [&]() {
            const u32 slot = await_slot();
            products_begin();
#pragma unroll
            for (int i = 0; i < DIM / 16; i++)
                product(s, k_major(own + i / 4 * ROWS * 128 + i % 4 * 32), k_major(slots + slot * SLOT_BYTES + i / 4 * BN * 128 + i % 4 * 32), i > 0);
            products_commit();
            return slot;
        };
        auto multiply_values = [&]() {
            const u32 slot = await_slot();
            products_begin();
#pragma unroll
            for (int i = 0; i < BN / 16; i++) value_product(o, p + 4 * i, n_major(slots + slot * SLOT_BYTES + i * 2048, BN * 128));
            products_commit();
            return slot;
        };
        for (int item = blockIdx.x; item < a.items; item += gridDim.x, turn ^= 1) {
            const Tile tile(a, item, stream);
            const int steps = STREAMS > 1 ? max(tile.steps(), Tile(a, item, 1 - stream).steps()) : tile.steps();
            const int token[2] = {tile.token + row / a.G, tile.token + (row + 8) / a.G};
            const int position[2] = {a.offset + token[0], a.offset + token[1]};
            const int bit[2] = {UNION ? token[0] / a.block - tile.token / a.block : 0, UNION ? token[1] / a.block - tile.token / a.block : 0};
            const float* const number = !TAIL ? nullptr : a.tail_number
                + (tile.b * (a.kv_heads / a.heads_per_support) + tile.h / a.heads_per_support) * a.blocks + tile.token / a.block;
            float high[2] = {MINUS_INFINITY, MINUS_INFINITY}, total[2] = {0, 0}, decay[2];
            auto mask = [&](int slot, int step) {
                const int* const key = keys + slot * BN;
                if (!UNION && key[BN - 1] <= a.offset + tile.token && step * BN + BN <= tile.held) return;
#pragma unroll
                for (int i = 0; i < BN / 8; i++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int c = 8 * i + 2 * quad + e;
                        const int tail = step * BN + c - tile.held;  // of the tile's blocks, from 0 on
                        const int word = UNION ? key[SLOTS * BN + c] : 1;
#pragma unroll
                        for (int r = 0; r < 2; r++) {
                            float& score = s[4 * i + 2 * r + e];
                            if (TAIL && tail >= 0 && tail == bit[r] && step * BN + c < tile.slots && number[tail] > 0)
                                score += __log2f(number[tail]) / a.scale_log2;
                            else if (tail >= 0 || key[c] > position[r] || !(word >> bit[r] & 1))
                                score = MINUS_INFINITY;
                        }
                    }
            };
            auto weigh = [&]() {  // scores become weights, relative to the largest so far
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float most = MINUS_INFINITY;
#pragma unroll
                    for (int i = 0; i < BN / 8; i++) most = fmaxf(most, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
                    most = fmaxf(most, __shfl_xor_sync(FULL, most, 1));
                    most = fmaxf(most, __shfl_xor_sync(FULL, most, 2));
                    most = fmaxf(most, high[r]);
                    const float base = most == MINUS_INFINITY ? 0.0f : most * a.scale_log2;
                    decay[r] = exp2_(high[r] * a.scale_log2 - base);
                    high[r] = most;
                    float sum = 0;
#pragma unroll
                    for (int i = 0; i < BN / 8; i++)
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            const float weight = exp2_(s[4 * i + 2 * r + e] * a.scale_log2 - base);
                            s[4 * i + 2 * r + e] = weight;
                            sum += weight;
                        }
                    total[r] = total[r] * decay[r] + sum;
                }
            };
            auto round_weights = [&]() {
#pragma unroll
                for (int i = 0; i < BN / 4; i++) p[i] = pack(s[2 * i], s[2 * i + 1]);
            };
#pragma unroll
            for (int i = 0; i < DIM / 2; i++) o[i] = 0;
            barrier_wait(queries_full, turn);
            fence_for_matrix_unit();
            if (steps > 0) {
                const u32 slot = multiply_keys();
                products_wait<0>();
                hold(s);
                mask(slot, steps - 1);
                release(empty + 8 * slot);
                weigh();
                round_weights();
                for (int step = steps - 2; step >= 0; step--) {
                    const u32 slot = multiply_keys(), values = multiply_values();
                    products_wait<1>();
                    hold(s);
                    mask(slot, step);
                    release(empty + 8 * slot);
                    weigh();
                    products_wait<0>();
                    hold(o);
                    release(empty + 8 * values);
                    if (__any_sync(FULL, decay[0] != 1.0f || decay[1] != 1.0f)) {
#pragma unroll
                        for (int i = 0; i < DIM / 2; i++) o[i] *= decay[i / 2 % 2];
                    }
                    round_weights();
                }
                release(queries_empty);
                const u32 values = multiply_values();
                products_wait<0>();
                hold(o);
                release(empty + 8 * values);
            } else {
                release(queries_empty);
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                total[r] += __shfl_xor_sync(FULL, total[r], 1);
                total[r] += __shfl_xor_sync(FULL, total[r], 2);
                const float part = total[r] > 0 ? 1 / total[r] : 0.0f;
                const int line = row + 8 * r;
                const bool live = line < a.TQ * a.G && token[r] < a.queries;
                u16* const to = a.out + tile.b * a.o_b + (tile.h * a.G + line % a.G) * a.o_h + token[r] * a.o_t + 8 * quad;
#pragma unroll
                for (int i = 0; i < DIM / 32; i++) {  // four lanes trade, so that each writes 16 bytes
                    u32 w[4];
#pragma unroll
                    for (int j = 0; j < 4; j++) w[j] = pack(o[16 * i + 4 * j + 2 * r] * part, o[16 * i + 4 * j + 2 * r + 1] * part);
                    const bool odd = quad & 1, upper = quad & 2;
                    const u32 x = __shfl_xor_sync(FULL, odd ? w[0] : w[1], 1), y = __shfl_xor_sync(FULL, odd ? w[2] : w[3], 1);
                    const u32 x0 = odd ? x : w[0], x1 = odd ? w[1] : x, y0 = odd ? y : w[2], y1 = odd ? w[3] : y;
                    const u32 z0 = __shfl_xor_sync(FULL, upper ? x0 : y0, 2), z1 = __shfl_xor_sync(FULL, upper ? x1 : y1, 2);
                    if (live)
                        *reinterpret_cast<uint4*>(to + 32 * i) =
                            upper ? make_uint4(z0, z1, y0, y1) : make_uint4(x0, x1, z0, z1);
                }
            }
        }
    }
}
