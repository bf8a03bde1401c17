#pragma once

#include "../common/score_tiling_data.h"

namespace npu_sparse_ascendc {

struct IndexPartitionTiling {
    ScoreTiling score;
};

}  // namespace npu_sparse_ascendc
