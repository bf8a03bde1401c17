#pragma once

#include "../common/top_k_tiling_data.h"

namespace npu_sparse_ascendc {

struct SelectTokensTiling {
    TopKTiling topK;
    uint32_t batch;
    uint32_t heads;    // Hs
    uint32_t rows;     // Nq
    uint32_t queries;  // Tq
    uint32_t keys;     // Tk
    uint32_t block;
    uint32_t hasValid;
    uint32_t splits;   // items a row's keys are cut into
    uint32_t cores;    // AIV cores, and blocks of the launch
};

}  // namespace npu_sparse_ascendc
