// Host side of select_by_index: what it serves, and how a problem is cut up.
#pragma once

#include "../common/score_tiling.h"
#include "../common/top_k_tiling.h"
#include "tiling_data.h"

namespace npu_sparse_ascendc {

struct SelectByIndexProblem : ScoreProblem {
    uint32_t k = 1;
    uint32_t sink = 0;
    uint32_t recent = 0;
};

inline uint32_t SelectByIndexUbBytes(const SelectByIndexTiling& t)
{
    return ScoreUbBytes(t.score) + TopKUbBytes(t.topK, t.score.rowsPerSub);
}

// The most rows whose lists fit into UB beside loads of 8 queries; shorter loads only where not even one row does.
inline SelectByIndexTiling MakeSelectByIndexTiling(const SelectByIndexProblem& p, const Hardware& hardware)
{
    const uint32_t available = hardware.ubBytes - UB_RESERVED_BYTES - SELECT_RESERVED_BYTES;
    SelectByIndexTiling best{};
    for (uint32_t load = 8; load >= 2 && best.score.rowsPerSub == 0; load /= 2) {
        for (uint32_t rows = CUBE_ROWS / p.block; rows >= 1; rows--) {
            SelectByIndexTiling t{};
            t.score = MakeScoreTiling(p, hardware, rows, load);
            t.topK = MakeTopKTiling(p.k, p.sink, p.recent, p.keys, t.score.keysPerStep);
            if (SelectByIndexUbBytes(t) <= available && t.score.queriesPerLoad > 0) {
                best = t;
                break;
            }
        }
    }
    best.listsOffset = ScoreWorkspace(best.score);
    return best;
}

inline std::string CheckSelectByIndex(const SelectByIndexProblem& p)
{
    std::string refusal = CheckScore(p);
    if (refusal.empty()) {
        refusal = CheckTopK(p.k, p.sink, p.recent, p.block, p.keys);
    }
    if (refusal.empty() && MakeSelectByIndexTiling(p, Hardware{}).score.rowsPerSub == 0) {
        SelectByIndexProblem smaller = p;
        while (smaller.k > 64 && MakeSelectByIndexTiling(smaller, Hardware{}).score.rowsPerSub == 0) {
            smaller.k -= 64;
        }
        refusal = Refusal("k", "leave room in UB for the scores of " + std::to_string(p.heads) + " heads", p.k) +
                  " (nearest: " + std::to_string(smaller.k) + ")";
    }
    return refusal;
}

inline uint32_t SelectByIndexBlocks(const SelectByIndexTiling& tiling) { return tiling.score.cores; }

inline uint64_t SelectByIndexWorkspace(const SelectByIndexTiling& t)
{
    const uint64_t rows = static_cast<uint64_t>(t.score.batch) * t.score.rows;
    return t.listsOffset + (t.score.splits > 1 ? rows * t.score.splits * ListBytes(t.topK) : 0);
}

}  // namespace npu_sparse_ascendc
