// index_partition: every query's log-partition of its index scores, fp32 [B, Tq].
#pragma once

#include "../common/score_cube.h"
#include "../common/score_reduce.h"
#include "tiling_data.h"

namespace npu_sparse_ascendc {

// Scores are only added up: no row of them is ever begun.
class NoRows {
public:
    __aicore__ inline void BeginItem(const ScoreItem& item, uint32_t queries, ValidMask& mask) {}
    __aicore__ inline LocalTensor<float> Begin() { return LocalTensor<float>(); }
    __aicore__ inline void Keep(const LocalTensor<float>& row, uint32_t firstPosition, uint32_t visible, uint32_t first,
                                uint32_t keys)
    {
    }
    __aicore__ inline void End(const LocalTensor<float>& row, uint32_t sequence, uint32_t rowOfSequence, uint32_t rowOfSub,
                               uint32_t visible, uint32_t first, uint32_t keys)
    {
    }
    __aicore__ inline void EndItem(const ScoreItem& item, uint32_t firstQuery, uint32_t queries) {}
};

template <typename T>
__aicore__ inline void IndexPartition(GM_ADDR qi, GM_ADDR ki, GM_ADDR w, GM_ADDR valid, GM_ADDR partition, GM_ADDR workspace,
                                      const IndexPartitionTiling& tiling)
{
    TPipe pipe;
    if ASCEND_IS_AIC {
        ScoreCube<T> cube;
        cube.Init(&pipe, tiling.score, qi, ki, workspace);
        cube.Process();
    }
    if ASCEND_IS_AIV {
        NoRows none;
        ScoreReducer<T, NoRows> reducer;
        reducer.Init(&pipe, tiling.score, w, valid, partition, workspace, &none);
        reducer.Process();
    }
}

}  // namespace npu_sparse_ascendc

// qi [B, Hi, Tq, Di], ki [B, Tk, Di], w [B, Tq, Hi] or null, valid uint8 [B, Tk] or null; partition fp32 [B, Tq].
extern "C" MIXED_KERNEL void npu_sparse_index_partition(GM_ADDR qi, GM_ADDR ki, GM_ADDR w, GM_ADDR valid, GM_ADDR partition,
                                                        GM_ADDR workspace, npu_sparse_ascendc::IndexPartitionTiling tiling)
{
    TASK_TYPE(KERNEL_TYPE_MIX_AIC_1_2);
    if (tiling.score.bfloat16) {
        npu_sparse_ascendc::IndexPartition<bfloat16_t>(qi, ki, w, valid, partition, workspace, tiling);
    } else {
        npu_sparse_ascendc::IndexPartition<half>(qi, ki, w, valid, partition, workspace, tiling);
    }
}
