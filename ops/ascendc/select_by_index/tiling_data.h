#pragma once

#include "../common/score_tiling_data.h"
#include "../common/top_k_tiling_data.h"

namespace npu_sparse_ascendc {

struct SelectByIndexTiling {
    ScoreTiling score;
    TopKTiling topK;
    uint64_t listsOffset;  // bytes into the workspace: the lists of split tiles
};

}  // namespace npu_sparse_ascendc
