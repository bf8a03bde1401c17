// The scoring part of the tiling of index_scores and select_by_index. Host only.
#pragma once

#include <algorithm>
#include <cmath>

#include "hardware.h"
#include "../generated/score_tiles.h"
#include "score_tiling_data.h"

namespace npu_sparse_ascendc {

struct ScoreProblem {
    uint32_t batch = 1;
    uint32_t heads = 1;    // Hi
    uint32_t queries = 1;  // Tq
    uint32_t keys = 1;     // Tk
    uint32_t dim = 128;    // Di
    uint32_t block = 1;
    bool mean = false;
    bool hasWeights = false;
    bool hasValid = false;
    bool hasPartition = false;  // not with mean
    DataType dtype = FLOAT16;
};

constexpr uint32_t CUBE_ROWS = 128;             // queries of a sub-tile
constexpr uint32_t MAX_INDEX_HEADS = 64;
constexpr uint32_t MAX_KEYS = 1u << 24;         // positions are sorted as fp32
constexpr uint32_t KEYS_L1_BYTES = 256 * 1024;  // both buffers of index keys
constexpr uint32_t MAX_SLOT_BYTES = 512 * 1024;
constexpr uint32_t MAX_SPLITS = 64;

inline std::string CheckScore(const ScoreProblem& p)
{
    for (const std::string& refusal : {
             CheckRange("B", p.batch, 1, 65535),
             CheckRange("Hi", p.heads, 1, MAX_INDEX_HEADS),
             CheckRange("Tk", p.keys, 1, MAX_KEYS),
             CheckRange("Tq", p.queries, 1, p.keys),
             CheckDim("d_idx", p.dim),
             CheckRange("block", p.block, 1, CUBE_ROWS),
         }) {
        if (!refusal.empty()) {
            return refusal;
        }
    }
    return {};
}

// Bytes of UB that the reduction of scores takes (common/score_reduce.h: ScoreReducer::Init).
inline uint32_t ScoreUbBytes(const ScoreTiling& t)
{
    const uint32_t tile = t.queriesPerLoad * t.keysPerStep * 4;
    const bool combined = t.hasWeights || t.heads > 1;
    uint32_t bytes = PRODUCT_BUFFERS * tile + t.keysPerStep * 4;
    bytes += combined || t.mean ? tile : 0;
    if (t.hasWeights) {
        const uint32_t perLoad = RoundUp(t.queriesPerLoad * t.heads, 16);
        const uint32_t weights = CeilDiv(t.queriesPerSub, t.queriesPerLoad) * perLoad;
        bytes += RoundUp(weights * 2, 256) + weights * 4 + perLoad * 32;
    }
    if (t.hasValid) {
        bytes += ValidMaskUbBytes(t.keysPerStep) + CUBE_ROWS;
    }
    if (t.hasPartition) {
        const uint32_t perLoad = RoundUp(t.queriesPerLoad, 8);
        bytes += CeilDiv(t.queriesPerSub, t.queriesPerLoad) * perLoad * 4 + perLoad * 32;
    }
    if (t.mean) {
        const uint32_t lanes = 16;
        bytes += 2 * CeilDiv(t.queriesPerSub, t.queriesPerLoad) * lanes * 4;  // largest score and sum of every query
        bytes += t.queriesPerLoad * 64 * 4 + lanes * 32 + 3 * 64 * 4 + t.keysPerStep * 4;
    }
    return bytes;
}

// `rowsPerSub` and `queriesPerLoad` (of the longest steps) are upper bounds that the caller has from its own use of UB.
inline ScoreTiling MakeScoreTiling(const ScoreProblem& p, const Hardware& hardware, uint32_t rowsPerSub,
                                   uint32_t queriesPerLoad)
{
    ScoreTiling t{};
    t.batch = p.batch;
    t.heads = p.heads;
    t.queries = p.queries;
    t.keys = p.keys;
    t.dim = p.dim;
    t.block = p.block;
    t.rows = CeilDiv(p.queries, p.block);
    t.mean = p.mean;
    t.passes = 1 + p.mean;
    t.hasWeights = p.hasWeights;
    t.hasValid = p.hasValid;
    t.hasPartition = p.hasPartition;
    t.bfloat16 = p.dtype == BFLOAT16;
    t.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.dim)));

    t.rowsPerSub = std::min({rowsPerSub, CUBE_ROWS / p.block, CeilDiv(t.rows, SUBS)});
    t.queriesPerSub = t.rowsPerSub * p.block;
    t.tiles = CeilDiv(t.rows, SUBS * t.rowsPerSub);

    t.keysPerStep = MAX_KEYS_PER_STEP;
    while (t.keysPerStep > 128 && (2 * t.keysPerStep * p.dim * 2 > KEYS_L1_BYTES ||
                                   p.heads * t.queriesPerSub * t.keysPerStep * 4 > MAX_SLOT_BYTES)) {
        t.keysPerStep /= 2;
    }
    t.headsPerProduct = std::min(p.heads, CUBE_ROWS / t.queriesPerSub);
    t.productRows = RoundUp(t.headsPerProduct * t.queriesPerSub, 16);
    const uint32_t queriesL1 = CeilDiv(p.heads, t.headsPerProduct) * SUBS * t.productRows * p.dim * 2;
    t.queriesInL1 = queriesL1 + 2 * t.keysPerStep * p.dim * 2 <= hardware.l1Bytes - L1_RESERVED_BYTES;
    t.slotFloats = static_cast<uint64_t>(p.heads) * t.queriesPerSub * t.keysPerStep;

    // a load is a part of one row, or whole rows; short steps are loaded for more queries at once
    t.queriesPerLoad = std::min({queriesPerLoad * (MAX_KEYS_PER_STEP / t.keysPerStep), MAX_QUERIES_PER_LOAD, t.queriesPerSub});
    if (p.block < t.queriesPerLoad) {
        t.queriesPerLoad -= t.queriesPerLoad % p.block;
    }

    // the mean needs a query's maximum over all keys, so there a tile stays whole
    const uint32_t items = p.batch * t.tiles;
    t.splits = 1;
    if (!p.mean && items < 4 * hardware.cores) {
        const uint32_t most = std::max(1u, p.keys / (4 * t.keysPerStep));
        t.splits = std::min({CeilDiv(4 * hardware.cores, items), most, MAX_SPLITS});
    }
    t.cores = std::min(hardware.cores, items * t.splits);
    return t;
}

inline uint64_t ScoreWorkspace(const ScoreTiling& t)
{
    return t.slotFloats * 4 * SUBS * SLOTS * t.cores;
}

}  // namespace npu_sparse_ascendc
