// index_scores: the reduced score of every key for every block of queries, fp32 [B, Nq, Tk].
#pragma once

#include "../common/score_cube.h"
#include "../common/score_reduce.h"
#include "tiling_data.h"

namespace npu_sparse_ascendc {

// Rows of scores straight to GM, and -inf for the keys behind a tile's last query.
class ScoreWriter {
public:
    __aicore__ inline void Init(TPipe* pipe, const ScoreTiling& tiling, GM_ADDR scores)
    {
        t = tiling;
        scoresGm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(scores));
        pipe->InitBuffer(rowsUb, 2, t.keysPerStep * sizeof(float));
        pipe->InitBuffer(unseenUb, t.keysPerStep * sizeof(float));
        Duplicate(unseenUb.Get<float>(), MINUS_INFINITY, t.keysPerStep);
        Order<HardEvent::V_MTE3>();
    }

    __aicore__ inline void BeginItem(const ScoreItem& item, uint32_t queries, ValidMask& mask) {}

    __aicore__ inline LocalTensor<float> Begin() { return rowsUb.AllocTensor<float>(); }

    __aicore__ inline void Keep(const LocalTensor<float>& row, uint32_t firstPosition, uint32_t visible, uint32_t first,
                                uint32_t keys)
    {
    }

    __aicore__ inline void End(LocalTensor<float> row, uint32_t sequence, uint32_t rowOfSequence, uint32_t rowOfSub,
                               uint32_t visible, uint32_t first, uint32_t keys)
    {
        rowsUb.EnQue(row);
        row = rowsUb.DeQue<float>();
        Write(row, sequence, rowOfSequence, first, keys);
        rowsUb.FreeTensor(row);
    }

    __aicore__ inline void EndItem(const ScoreItem& item, uint32_t firstQuery, uint32_t queries)
    {
        if (item.split + 1 < t.splits) {
            return;
        }
        for (uint32_t query = 0; query < queries; query += t.block) {
            for (uint32_t first = item.tileEnd; first < t.keys; first += t.keysPerStep) {
                const uint32_t keys = Least(t.keysPerStep, t.keys - first);
                Write(unseenUb.Get<float>(), item.sequence, (firstQuery + query) / t.block, first, keys);
            }
        }
    }

private:
    __aicore__ inline void Write(const LocalTensor<float>& row, uint32_t sequence, uint32_t rowOfSequence, uint32_t first,
                                 uint32_t keys)
    {
        const uint64_t to = (static_cast<uint64_t>(sequence) * t.rows + rowOfSequence) * t.keys + first;
        StoreRagged(scoresGm[to], row, keys);
    }

    ScoreTiling t;
    GlobalTensor<float> scoresGm;
    TQue<TPosition::VECOUT, 1> rowsUb;
    TBuf<TPosition::VECCALC> unseenUb;
};

template <typename T>
__aicore__ inline void IndexScores(GM_ADDR qi, GM_ADDR ki, GM_ADDR w, GM_ADDR valid, GM_ADDR partition, GM_ADDR scores,
                                   GM_ADDR workspace, const IndexScoresTiling& tiling)
{
    TPipe pipe;
    if ASCEND_IS_AIC {
        ScoreCube<T> cube;
        cube.Init(&pipe, tiling.score, qi, ki, workspace);
        cube.Process();
    }
    if ASCEND_IS_AIV {
        ScoreWriter writer;
        writer.Init(&pipe, tiling.score, scores);
        ScoreReducer<T, ScoreWriter> reducer;
        reducer.Init(&pipe, tiling.score, w, valid, partition, workspace, &writer);
        reducer.Process();
    }
}

}  // namespace npu_sparse_ascendc

// qi [B, Hi, Tq, Di], ki [B, Tk, Di], w [B, Tq, Hi] or null, valid uint8 [B, Tk] or null, partition fp32 [B, Tq] or null; scores
// fp32 [B, Nq, Tk].
extern "C" MIXED_KERNEL void npu_sparse_index_scores(GM_ADDR qi, GM_ADDR ki, GM_ADDR w, GM_ADDR valid, GM_ADDR partition,
                                                     GM_ADDR scores, GM_ADDR workspace,
                                                     npu_sparse_ascendc::IndexScoresTiling tiling)
{
    TASK_TYPE(KERNEL_TYPE_MIX_AIC_1_2);
    if (tiling.score.bfloat16) {
        npu_sparse_ascendc::IndexScores<bfloat16_t>(qi, ki, w, valid, partition, scores, workspace, tiling);
    } else {
        npu_sparse_ascendc::IndexScores<half>(qi, ki, w, valid, partition, scores, workspace, tiling);
    }
}
