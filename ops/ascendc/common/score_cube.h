// The cube half of scoring: ReLU(<qi, ki>) of every step's keys and a tile's queries, into workspace slots. Where a sub-tile has few
// queries, several heads' are the rows of one product, because all index heads have the same keys: row head * queries + query.
#pragma once

#include "score_schedule.h"

namespace npu_sparse_ascendc {

template <typename T>
class ScoreCube {
public:
    __aicore__ inline void Init(TPipe* pipe, const ScoreTiling& tiling, GM_ADDR qi, GM_ADDR ki, GM_ADDR workspace)
    {
        t = tiling;
        core = GetBlockIdx();
        qiGm.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(qi));
        kiGm.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(ki));
        slotsGm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace));
        const uint32_t subBytes = t.productRows * t.dim * sizeof(T);
        if (t.queriesInL1) {
            pipe->InitBuffer(queriesL1, 1, (t.heads + t.headsPerProduct - 1) / t.headsPerProduct * SUBS * subBytes);
        } else {
            pipe->InitBuffer(queriesL1, SUBS, subBytes);
        }
        pipe->InitBuffer(keysL1, 2, t.keysPerStep * t.dim * sizeof(T));
        pipe->InitBuffer(queriesL0, 2, TILE * TILE * sizeof(T));
        pipe->InitBuffer(keysL0, 2, TILE * TILE * sizeof(T));
        const uint32_t tiles = t.productRows <= TILE / 2 ? 4 : 2;
        pipe->InitBuffer(scoresL0, tiles, t.productRows * TILE * sizeof(float));
        // both sub-tiles can use keys in L0 if neither has to hold its accumulators while Fixpipe empties the last ones
        shareKeys = t.dim <= TILE || tiles == 4;
    }

    __aicore__ inline void Process()
    {
        uint32_t slot = 0;
        ScoreItem item;
        for (uint32_t i = 0; ScoreItemAt(t, core, i, item); i++) {
            if (item.firstKey == item.endKey) {
                continue;
            }
            LocalTensor<T> queries;
            if (t.queriesInL1) {
                queries = LoadAllQueries(item);
            }
            for (uint32_t pass = 0; pass < t.passes; pass++) {
                LoadKeys(item, item.firstKey);
                for (uint32_t first = item.firstKey; first < item.endKey; first += t.keysPerStep) {
                    if (first + t.keysPerStep < item.endKey) {
                        LoadKeys(item, first + t.keysPerStep);  // ahead of the wait for the vector cores
                    }
                    CrossCoreWaitFlag(SCORES_TAKEN + slot);
                    ScoreStep(item, first, slot, queries);
                    CrossCoreSetFlag<2, PIPE_FIX>(SCORES_READY + slot);
                    slot = 1 - slot;
                }
            }
            if (t.queriesInL1) {
                queriesL1.FreeTensor(queries);
            }
        }
        CrossCoreWaitFlag(SCORES_TAKEN + slot);
        CrossCoreWaitFlag(SCORES_TAKEN + 1 - slot);
    }

private:
    static constexpr uint32_t TILE = 128;  // rows, keys and features of one Mmad

    // [rows, dim] in GM to NZ fractals of `stride` rows.
    __aicore__ inline void LoadRows(const LocalTensor<T>& to, const GlobalTensor<T>& from, uint32_t rows, uint32_t stride)
    {
        Nd2NzParams params;
        params.ndNum = 1;
        params.nValue = rows;
        params.dValue = t.dim;
        params.srcNdMatrixStride = 0;
        params.srcDValue = t.dim;
        params.dstNzC0Stride = stride;
        params.dstNzNStride = 1;
        params.dstNzMatrixStride = FRACTAL;
        DataCopy(to, from, params);
    }

    // The rows behind the last one, up to a whole fractal, are copies of `from`: nothing unwritten is read.
    __aicore__ inline void FillRows(const LocalTensor<T>& to, const GlobalTensor<T>& from, uint32_t rows, uint32_t stride)
    {
        const uint32_t missing = Aligned(rows, FRACTAL) - rows;
        if (missing > 0) {
            Nd2NzParams params;
            params.ndNum = missing;
            params.nValue = 1;
            params.dValue = t.dim;
            params.srcNdMatrixStride = 0;
            params.srcDValue = t.dim;
            params.dstNzC0Stride = stride;
            params.dstNzNStride = 1;
            params.dstNzMatrixStride = FRACTAL;
            DataCopy(to[rows * FRACTAL], from, params);
        }
    }

    __aicore__ inline uint32_t ProductHeads(uint32_t head) { return Least(t.headsPerProduct, t.heads - head); }

    // The queries of a sub-tile and of the heads of a product, the first of which is `head`.
    __aicore__ inline void LoadQueries(const LocalTensor<T>& to, const ScoreItem& item, uint32_t head, uint32_t sub)
    {
        const uint64_t first = (static_cast<uint64_t>(item.sequence) * t.heads + head) * t.queries + item.firstQuery +
                               sub * t.queriesPerSub;
        const uint32_t rows = SubQueries(t, item, sub), heads = ProductHeads(head);
        for (uint32_t i = 0; i < heads; i++) {
            LoadRows(to[i * rows * FRACTAL], qiGm[(first + static_cast<uint64_t>(i) * t.queries) * t.dim], rows, t.productRows);
        }
        FillRows(to, qiGm[first * t.dim], heads * rows, t.productRows);
    }

    __aicore__ inline LocalTensor<T> LoadAllQueries(const ScoreItem& item)
    {
        LocalTensor<T> all = queriesL1.AllocTensor<T>();
        for (uint32_t head = 0; head < t.heads; head += t.headsPerProduct) {
            for (uint32_t sub = 0; sub < SUBS && SubQueries(t, item, sub) > 0; sub++) {
                LoadQueries(all[(head / t.headsPerProduct * SUBS + sub) * t.productRows * t.dim], item, head, sub);
            }
        }
        queriesL1.EnQue(all);
        return queriesL1.DeQue<T>();
    }

    __aicore__ inline void LoadKeys(const ScoreItem& item, uint32_t first)
    {
        LocalTensor<T> keys = keysL1.AllocTensor<T>();
        const uint64_t row = static_cast<uint64_t>(item.sequence) * t.keys + first;
        const uint32_t rows = Least(t.keysPerStep, item.endKey - first);
        LoadRows(keys, kiGm[row * t.dim], rows, t.keysPerStep);
        FillRows(keys, kiGm[row * t.dim], rows, t.keysPerStep);
        keysL1.EnQue(keys);
    }

    __aicore__ inline void ScoreStep(const ScoreItem& item, uint32_t first, uint32_t slot, const LocalTensor<T>& allQueries)
    {
        LocalTensor<T> keys = keysL1.DeQue<T>();
        const uint32_t count = Aligned(Least(t.keysPerStep, item.endKey - first), FRACTAL);
        const uint32_t subs = SubQueries(t, item, 1) > 0 ? SUBS : 1;
        for (uint32_t head = 0; head < t.heads; head += t.headsPerProduct) {
            LocalTensor<T> queries[SUBS];
            for (uint32_t sub = 0; sub < subs; sub++) {
                if (t.queriesInL1) {
                    queries[sub] = allQueries[(head / t.headsPerProduct * SUBS + sub) * t.productRows * t.dim];
                } else {
                    queries[sub] = LoadHeadQueries(item, head, sub);
                }
            }
            for (uint32_t key = 0; key < count; key += TILE) {
                const uint32_t columns = Least(TILE, count - key);
                if (shareKeys) {
                    ScoreTiles(item, queries, 0, subs, keys, key, columns, slot, head);
                } else {
                    for (uint32_t sub = 0; sub < subs; sub++) {
                        ScoreTiles(item, queries, sub, sub + 1, keys, key, columns, slot, head);
                    }
                }
            }
            for (uint32_t sub = 0; sub < subs && !t.queriesInL1; sub++) {
                queriesL1.FreeTensor(queries[sub]);
            }
        }
        keysL1.FreeTensor(keys);
    }

    __aicore__ inline LocalTensor<T> LoadHeadQueries(const ScoreItem& item, uint32_t head, uint32_t sub)
    {
        LocalTensor<T> queries = queriesL1.AllocTensor<T>();
        LoadQueries(queries, item, head, sub);
        queriesL1.EnQue(queries);
        return queriesL1.DeQue<T>();
    }

    // ReLU(queries keys^T) for up to 128 rows of each sub-tile from firstSub to endSub, of the heads from `head` on, and up to 128
    // keys.
    __aicore__ inline void ScoreTiles(const ScoreItem& item, const LocalTensor<T> (&queries)[SUBS], uint32_t firstSub,
                                      uint32_t endSub, const LocalTensor<T>& keys, uint32_t firstKey, uint32_t columns,
                                      uint32_t slot, uint32_t head)
    {
        LocalTensor<float> scores[SUBS];
        for (uint32_t feature = 0; feature < t.dim; feature += TILE) {
            const uint32_t depth = Least(TILE, t.dim - feature);
            LoadB(keys, firstKey, columns, feature, depth);
            LocalTensor<T> b = keysL0.DeQue<T>();
            for (uint32_t sub = firstSub; sub < endSub; sub++) {
                const uint32_t queriesOfSub = SubQueries(t, item, sub);
                const uint32_t rows = ProductHeads(head) * queriesOfSub;
                MmadParams params;
                params.m = Aligned(rows, FRACTAL);
                params.n = columns;
                params.k = depth;
                params.cmatrixInitVal = feature == 0;
                LoadA(queries[sub], feature, params.m, depth);
                LocalTensor<T> a = queriesL0.DeQue<T>();
                if (feature == 0) {
                    scores[sub] = scoresL0.AllocTensor<float>();
                }
                Mmad(scores[sub], a, b, params);
                if (t.dim > TILE && Aligned(rows, FRACTAL) * columns < 10 * FRACTAL * FRACTAL) {
                    PipeBarrier<PIPE_M>();
                }
                queriesL0.FreeTensor(a);
                if (feature + depth == t.dim) {
                    const uint64_t to = static_cast<uint64_t>(head) * queriesOfSub * t.keysPerStep + firstKey;
                    StoreScores(scores[sub], rows, columns, slotsGm[SlotOffset(t, core, sub, slot) + to]);
                }
            }
            keysL0.FreeTensor(b);
        }
    }

    // Row-major fp32, rows of keysPerStep.
    __aicore__ inline void StoreScores(const LocalTensor<float>& accumulators, uint32_t rows, uint32_t columns,
                                       const GlobalTensor<float>& to)
    {
        scoresL0.EnQue(accumulators);
        LocalTensor<float> scores = scoresL0.DeQue<float>();
        FixpipeParamsV220 params;
        params.nSize = columns;
        params.mSize = rows;
        params.srcStride = Aligned(rows, FRACTAL);
        params.dstStride = t.keysPerStep;
        params.reluEn = true;
        Fixpipe<float, float, CFG_ROW_MAJOR>(to, scores, params);
        scoresL0.FreeTensor(scores);
    }

    // NZ to ZZ: the fractals of a row of 16 queries lie one after the other.
    __aicore__ inline void LoadA(const LocalTensor<T>& queries, uint32_t feature, uint32_t m, uint32_t depth)
    {
        LocalTensor<T> a = queriesL0.AllocTensor<T>();
        LoadData2DParams params;
        params.repeatTimes = depth / FRACTAL;
        params.srcStride = t.productRows / FRACTAL;
        for (uint32_t row = 0; row < m; row += FRACTAL) {
            LoadData(a[row * depth], queries[feature * t.productRows + row * FRACTAL], params);
        }
        queriesL0.EnQue(a);
    }

    // NZ to ZN: a fractal of keys [16, 16] is the transposed fractal the cube wants, so nothing is turned.
    __aicore__ inline void LoadB(const LocalTensor<T>& keys, uint32_t firstKey, uint32_t columns, uint32_t feature,
                                 uint32_t depth)
    {
        LocalTensor<T> b = keysL0.AllocTensor<T>();
        LoadData2DParams params;
        params.repeatTimes = columns / FRACTAL;
        params.srcStride = 1;
        for (uint32_t k = 0; k < depth; k += FRACTAL) {
            LoadData(b[k * columns], keys[(feature + k) * t.keysPerStep + firstKey * FRACTAL], params);
        }
        keysL0.EnQue(b);
    }

    ScoreTiling t;
    uint32_t core;
    bool shareKeys;
    GlobalTensor<T> qiGm;
    GlobalTensor<T> kiGm;
    GlobalTensor<float> slotsGm;
    TQue<TPosition::A1, 1> queriesL1;
    TQue<TPosition::B1, 2> keysL1;
    TQue<TPosition::A2, 1> queriesL0;
    TQue<TPosition::B2, 1> keysL0;
    TQue<TPosition::CO1, 1> scoresL0;
};

}  // namespace npu_sparse_ascendc
