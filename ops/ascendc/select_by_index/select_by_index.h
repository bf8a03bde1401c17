// select_by_index: index_scores and select_tokens in one. Scores live in UB and two workspace slots per AIV, never as a matrix.
#pragma once

#include "../common/score_cube.h"
#include "../common/score_reduce.h"
#include "../common/top_k.h"
#include "tiling_data.h"

namespace npu_sparse_ascendc {

// Rows of scores into running lists, and finished lists to GM.
class Selector {
public:
    __aicore__ inline void Init(TPipe* pipe, const SelectByIndexTiling& tiling, GM_ADDR valid, GM_ADDR indices, GM_ADDR count,
                                GM_ADDR workspace)
    {
        t = tiling.score;
        topKTiling = tiling.topK;
        indicesGm.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(indices));
        countGm.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(count));
        listsGm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace + tiling.listsOffset));
        pipe->InitBuffer(rowUb, t.keysPerStep * sizeof(float));
        topK.Init(pipe, topKTiling, t.rowsPerSub);
        sinkEnd = topKTiling.sink;
        sinkSequence = t.batch;
    }

    __aicore__ inline void BeginItem(const ScoreItem& item, uint32_t queries, ValidMask& mask)
    {
        if (t.hasValid && topKTiling.sink > 0 && sinkSequence != item.sequence) {
            sinkEnd = mask.EndOfFirst(topKTiling.sink, item.sequence);
            sinkSequence = item.sequence;
        }
        for (uint32_t row = 0; row * t.block < queries; row++) {
            topK.Reset(row);
        }
    }

    __aicore__ inline LocalTensor<float> Begin() { return rowUb.Get<float>(); }

    __aicore__ inline void Keep(const LocalTensor<float>& row, uint32_t firstPosition, uint32_t visible, uint32_t first,
                                uint32_t keys)
    {
        const uint32_t windowStart = topKTiling.recent ? Above(firstPosition + 1, topKTiling.recent) : visible;
        topK.Keep(row, sinkEnd, windowStart, visible, first, keys);
    }

    __aicore__ inline void End(const LocalTensor<float>& row, uint32_t sequence, uint32_t rowOfSequence, uint32_t rowOfSub,
                               uint32_t visible, uint32_t first, uint32_t keys)
    {
        if (visible > first) {
            topK.Push(rowOfSub, row, first);
        }
    }

    __aicore__ inline void EndItem(const ScoreItem& item, uint32_t firstQuery, uint32_t queries)
    {
        for (uint32_t row = 0; row * t.block < queries; row++) {
            const uint64_t index = static_cast<uint64_t>(item.sequence) * t.rows + firstQuery / t.block + row;
            if (t.splits > 1) {
                topK.StoreList(row, listsGm[(index * t.splits + item.split) * topK.ListFloats()]);
            } else {
                topK.Finish(row, indicesGm[index * topKTiling.k], countGm[index]);
            }
        }
    }

    // Split tiles: every row's lists, in the order of their keys.
    __aicore__ inline void MergeSplits()
    {
        const uint64_t rows = static_cast<uint64_t>(t.batch) * t.rows;
        for (uint64_t index = GetBlockIdx(); index < rows; index += SUBS * t.cores) {
            topK.Reset(0);
            for (uint32_t split = 0; split < t.splits; split++) {
                topK.PushList(0, listsGm[(index * t.splits + split) * topK.ListFloats()]);
            }
            topK.Finish(0, indicesGm[index * topKTiling.k], countGm[index]);
        }
    }

private:
    ScoreTiling t;
    TopKTiling topKTiling;
    TopK topK;
    uint32_t sinkEnd;       // keys before it are sinks
    uint32_t sinkSequence;  // of the sequence it was found for
    GlobalTensor<int32_t> indicesGm;
    GlobalTensor<int32_t> countGm;
    GlobalTensor<float> listsGm;
    TBuf<TPosition::VECCALC> rowUb;
};

template <typename T>
__aicore__ inline void SelectByIndex(GM_ADDR qi, GM_ADDR ki, GM_ADDR w, GM_ADDR valid, GM_ADDR partition, GM_ADDR indices,
                                     GM_ADDR count, GM_ADDR workspace, const SelectByIndexTiling& tiling)
{
    TPipe pipe;
    if ASCEND_IS_AIC {
        ScoreCube<T> cube;
        cube.Init(&pipe, tiling.score, qi, ki, workspace);
        cube.Process();
    }
    if ASCEND_IS_AIV {
        Selector selector;
        selector.Init(&pipe, tiling, valid, indices, count, workspace);
        ScoreReducer<T, Selector> reducer;
        reducer.Init(&pipe, tiling.score, w, valid, partition, workspace, &selector);
        reducer.Process();
        if (tiling.score.splits > 1) {
            PipeBarrier<PIPE_ALL>();
            SyncAll();
            selector.MergeSplits();
        }
    }
}

}  // namespace npu_sparse_ascendc

// qi [B, Hi, Tq, Di], ki [B, Tk, Di], w [B, Tq, Hi] or null, valid uint8 [B, Tk] or null, partition fp32 [B, Tq] or null;
// indices int32 [B, 1, Nq, min(k, Tk)], count int32 [B, 1, Nq].
extern "C" BATCHED_MIXED_KERNEL void npu_sparse_select_by_index(GM_ADDR qi, GM_ADDR ki, GM_ADDR w, GM_ADDR valid,
                                                                GM_ADDR partition, GM_ADDR indices, GM_ADDR count,
                                                                GM_ADDR workspace,
                                                                npu_sparse_ascendc::SelectByIndexTiling tiling)
{
    TASK_TYPE(KERNEL_TYPE_MIX_AIC_1_2);
    if (tiling.score.bfloat16) {
        npu_sparse_ascendc::SelectByIndex<bfloat16_t>(qi, ki, w, valid, partition, indices, count, workspace, tiling);
    } else {
        npu_sparse_ascendc::SelectByIndex<half>(qi, ki, w, valid, partition, indices, count, workspace, tiling);
    }
}
