// Host side of index_partition: what it serves, and how a problem is cut up.
#pragma once

#include "../common/score_tiling.h"
#include "tiling_data.h"

namespace npu_sparse_ascendc {

using IndexPartitionProblem = ScoreProblem;  // of block 1

inline std::string CheckIndexPartition(const IndexPartitionProblem& problem)
{
    return CheckScore(problem);
}

// The first of the two passes of a mean, whose statistics are what is wanted.
inline IndexPartitionTiling MakeIndexPartitionTiling(const IndexPartitionProblem& problem, const Hardware& hardware)
{
    ScoreProblem mean = problem;
    mean.mean = true;
    IndexPartitionTiling tiling{MakeScoreTiling(mean, hardware, CUBE_ROWS, 8)};
    tiling.score.passes = 1;
    return tiling;
}

inline uint32_t IndexPartitionBlocks(const IndexPartitionTiling& tiling) { return tiling.score.cores; }

inline uint64_t IndexPartitionWorkspace(const IndexPartitionTiling& tiling) { return ScoreWorkspace(tiling.score); }

}  // namespace npu_sparse_ascendc
