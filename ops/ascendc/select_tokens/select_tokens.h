// select_tokens: the k best keys of every row of scores, ascending by position.
#pragma once

#include "../common/top_k.h"
#include "../common/valid_mask.h"
#include "tiling_data.h"

namespace npu_sparse_ascendc {

class SelectTokens {
public:
    __aicore__ inline void Init(TPipe* pipe, const SelectTokensTiling& tiling, GM_ADDR scores, GM_ADDR valid, GM_ADDR indices,
                                GM_ADDR count, GM_ADDR workspace)
    {
        t = tiling;
        step = t.topK.keysPerStep;
        scoresGm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(scores));
        indicesGm.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(indices));
        countGm.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(count));
        listsGm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace));
        pipe->InitBuffer(scoresUb, 2, step * sizeof(float));
        topK.Init(pipe, t.topK, 1);
        pipe->InitBuffer(seenUb, Aligned(step / 8, BLOCK_BYTES));
        if (t.hasValid) {
            mask.Init(pipe, valid, t.keys, step);
        }
    }

    __aicore__ inline void Process()
    {
        const uint32_t rows = t.batch * t.heads * t.rows;
        uint32_t sinkEnd = t.topK.sink;
        uint32_t sinkSequence = t.batch;
        for (uint32_t item = GetBlockIdx(); item < rows * t.splits; item += t.cores) {
            const uint32_t row = item / t.splits;
            const uint32_t split = item % t.splits;
            const uint32_t sequence = row / (t.heads * t.rows);
            if (t.hasValid && t.topK.sink > 0 && sequence != sinkSequence) {
                sinkEnd = mask.EndOfFirst(t.topK.sink, sequence);
                sinkSequence = sequence;
            }
            Scan(row, split, sinkEnd);
            if (t.splits > 1) {
                topK.StoreList(0, listsGm[static_cast<uint64_t>(item) * topK.ListFloats()]);
            } else {
                topK.Finish(0, indicesGm[static_cast<uint64_t>(row) * t.topK.k], countGm[row]);
            }
        }
        if (t.splits > 1) {
            PipeBarrier<PIPE_ALL>();
            SyncAll();
            MergeSplits(rows);
        }
    }

private:
    // A row's keys of one split, into list 0.
    __aicore__ inline void Scan(uint32_t row, uint32_t split, uint32_t sinkEnd)
    {
        const uint32_t firstQuery = row % t.rows * t.block;
        const uint32_t visible = t.keys - t.queries + Least(t.queries, firstQuery + t.block);
        const uint32_t windowStart = t.topK.recent ? Above(t.keys - t.queries + firstQuery + 1, t.topK.recent) : visible;
        const uint32_t length = Aligned((visible + t.splits - 1) / t.splits, step);
        const uint32_t start = Least(split * length, visible);
        const uint32_t end = Least(start + length, visible);
        topK.Reset(0);
        if (start < end) {
            Load(row, start, end);
        }
        for (uint32_t first = start; first < end; first += step) {
            if (first + step < end) {
                Load(row, first + step, end);
            }
            LocalTensor<float> scores = scoresUb.DeQue<float>();
            LocalTensor<uint8_t> seen = seenUb.Get<uint8_t>();
            CompareScalar(seen, scores, MINUS_INFINITY, CMPMODE::NE, step);  // NaN is seen, too
            PipeBarrier<PIPE_V>();
            topK.Keep(scores, sinkEnd, windowStart, visible, first, Least(step, end - first));
            Select(scores, seen, scores, MINUS_INFINITY, SELMODE::VSEL_TENSOR_SCALAR_MODE, step);
            PipeBarrier<PIPE_V>();
            topK.Push(0, scores, first);
            scoresUb.FreeTensor(scores);
        }
    }

    // A step's scores; a short one is filled up with -inf.
    __aicore__ inline void Load(uint32_t row, uint32_t first, uint32_t end)
    {
        const uint32_t keys = Least(step, end - first);
        LocalTensor<float> scores = scoresUb.AllocTensor<float>();
        if (keys < step) {
            Duplicate(scores, MINUS_INFINITY, step);
            Order<HardEvent::V_MTE2>();
        }
        const uint8_t missing = Aligned(keys, BLOCK_FLOATS) - keys;
        const DataCopyExtParams copy = {1, static_cast<uint32_t>(keys * sizeof(float)), 0, 0, 0};
        const DataCopyPadExtParams<float> pad = {missing > 0, 0, missing, MINUS_INFINITY};
        DataCopyPad(scores, scoresGm[static_cast<uint64_t>(row) * t.keys + first], copy, pad);
        scoresUb.EnQue(scores);
    }

    __aicore__ inline void MergeSplits(uint32_t rows)
    {
        for (uint32_t row = GetBlockIdx(); row < rows; row += t.cores) {
            topK.Reset(0);
            for (uint32_t split = 0; split < t.splits; split++) {
                topK.PushList(0, listsGm[(static_cast<uint64_t>(row) * t.splits + split) * topK.ListFloats()]);
            }
            topK.Finish(0, indicesGm[static_cast<uint64_t>(row) * t.topK.k], countGm[row]);
        }
    }

    SelectTokensTiling t;
    uint32_t step;
    TopK topK;
    ValidMask mask;
    GlobalTensor<float> scoresGm;
    GlobalTensor<int32_t> indicesGm;
    GlobalTensor<int32_t> countGm;
    GlobalTensor<float> listsGm;
    TQue<TPosition::VECIN, 2> scoresUb;
    TBuf<TPosition::VECCALC> seenUb;
};

}  // namespace npu_sparse_ascendc

// scores fp32 [B, Hs, Nq, Tk], valid uint8 [B, Tk] or null; indices int32 [B, Hs, Nq, min(k, Tk)], count int32 [B, Hs, Nq].
extern "C" BATCHED_VECTOR_KERNEL void npu_sparse_select_tokens(GM_ADDR scores, GM_ADDR valid, GM_ADDR indices, GM_ADDR count,
                                                               GM_ADDR workspace, npu_sparse_ascendc::SelectTokensTiling tiling)
{
    TASK_TYPE(KERNEL_TYPE_MIX_AIV_1_0);
    AscendC::TPipe pipe;
    npu_sparse_ascendc::SelectTokens op;
    op.Init(&pipe, tiling, scores, valid, indices, count, workspace);
    op.Process();
}
