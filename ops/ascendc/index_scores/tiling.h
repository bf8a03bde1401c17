// Host side of index_scores: what it serves, and how a problem is cut up.
#pragma once

#include "../common/score_tiling.h"
#include "tiling_data.h"

namespace npu_sparse_ascendc {

using IndexScoresProblem = ScoreProblem;

inline std::string CheckIndexScores(const IndexScoresProblem& problem)
{
    return CheckScore(problem);
}

inline IndexScoresTiling MakeIndexScoresTiling(const IndexScoresProblem& problem, const Hardware& hardware)
{
    return {MakeScoreTiling(problem, hardware, CUBE_ROWS, 8)};
}

inline uint32_t IndexScoresBlocks(const IndexScoresTiling& tiling) { return tiling.score.cores; }

inline uint64_t IndexScoresWorkspace(const IndexScoresTiling& tiling) { return ScoreWorkspace(tiling.score); }

}  // namespace npu_sparse_ascendc
