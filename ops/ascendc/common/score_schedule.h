// Which tiles and keys a core scores, in which order: the cube and the vector cores walk the same list.
#pragma once

#include "kernel_common.h"
#include "score_tiling_data.h"

namespace npu_sparse_ascendc {

constexpr uint16_t SCORES_READY = 0;  // + slot: the cube has filled it
constexpr uint16_t SCORES_TAKEN = 2;  // + slot: both AIVs have read it

struct ScoreItem {
    uint32_t sequence;
    uint32_t split;
    uint32_t firstQuery;  // of the tile
    uint32_t firstKey;    // keys [firstKey, endKey) are scored
    uint32_t endKey;
    uint32_t tileEnd;     // keys that the tile's last query sees
};

// The i-th item of a core. Tiles with the most keys come first, and cores take turns back and forth: that evens out the causal
// triangle.
__aicore__ inline bool ScoreItemAt(const ScoreTiling& t, uint32_t core, uint32_t i, ScoreItem& item)
{
    const uint32_t rank = i * t.cores + (i % 2 ? t.cores - 1 - core : core);
    if (rank >= t.batch * t.tiles * t.splits) {
        return false;
    }
    const uint32_t tile = t.tiles - 1 - rank / (t.batch * t.splits);
    item.sequence = rank % (t.batch * t.splits) / t.splits;
    item.split = rank % t.splits;
    item.firstQuery = tile * SUBS * t.queriesPerSub;
    item.tileEnd = t.keys - t.queries + Least(t.queries, item.firstQuery + SUBS * t.queriesPerSub);
    const uint32_t length = Aligned((item.tileEnd + t.splits - 1) / t.splits, t.keysPerStep);
    item.firstKey = Least(item.split * length, item.tileEnd);
    item.endKey = Least(item.firstKey + length, item.tileEnd);
    return true;
}

// Queries of a sub-tile; 0 beyond the end of the sequence.
__aicore__ inline uint32_t SubQueries(const ScoreTiling& t, const ScoreItem& item, uint32_t sub)
{
    return Least(t.queriesPerSub, Above(t.queries, item.firstQuery + sub * t.queriesPerSub));
}

__aicore__ inline uint64_t SlotOffset(const ScoreTiling& t, uint32_t core, uint32_t sub, uint32_t slot)
{
    return ((static_cast<uint64_t>(core) * SUBS + sub) * SLOTS + slot) * t.slotFloats;
}

}  // namespace npu_sparse_ascendc
