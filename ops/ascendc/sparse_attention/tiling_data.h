#pragma once

#include <cstdint>

namespace npu_sparse_ascendc {

constexpr uint32_t ATTENTION_TILE_ROWS = 128;  // query tokens x heads of one KV head in a part of a tile, at most
constexpr uint32_t ATTENTION_PARTS = 2;        // of a tile, at most
constexpr uint32_t ATTENTION_CHUNK = 128;      // keys of one step
constexpr uint32_t ATTENTION_LAG = 3;          // steps from the scores to the weighted values
constexpr uint32_t ATTENTION_SLOTS = ATTENTION_LAG + 1;
constexpr uint32_t ATTENTION_AHEAD = 2;        // chunks between the gathering of rows of v and the scores
constexpr uint32_t ATTENTION_GATHERED = ATTENTION_LAG + 1 + ATTENTION_AHEAD;  // chunks of gathered rows
constexpr uint32_t ATTENTION_MAX_DIM = 256;
constexpr uint64_t ATTENTION_SCORES_BYTES = uint64_t(ATTENTION_TILE_ROWS) * ATTENTION_CHUNK * 4;
constexpr uint64_t ATTENTION_WEIGHTS_BYTES = ATTENTION_SCORES_BYTES / 2;
constexpr uint64_t ATTENTION_VALUES_BYTES = uint64_t(ATTENTION_TILE_ROWS) * ATTENTION_MAX_DIM * 4;
constexpr uint64_t ATTENTION_VALUES_OFFSET = ATTENTION_SLOTS * (ATTENTION_SCORES_BYTES + ATTENTION_WEIGHTS_BYTES);
constexpr uint64_t ATTENTION_SUMS_OFFSET = ATTENTION_VALUES_OFFSET + ATTENTION_SLOTS * ATTENTION_VALUES_BYTES;
constexpr uint64_t ATTENTION_GATHERED_OFFSET =
    ATTENTION_SUMS_OFFSET + ATTENTION_SLOTS * ATTENTION_PARTS * ATTENTION_VALUES_BYTES;
constexpr uint64_t ATTENTION_GATHERED_BYTES = uint64_t(ATTENTION_CHUNK) * ATTENTION_MAX_DIM * 2;
constexpr uint64_t ATTENTION_CORE_BYTES =  // of workspace
    ATTENTION_GATHERED_OFFSET + ATTENTION_GATHERED * ATTENTION_GATHERED_BYTES;

struct SparseAttentionTiling {
    uint32_t batch, queryHeads, keyHeads, queries, keys, dim, valueDim, supportHeads, width, block, bfloat16;
    float scale;
    uint32_t group;          // query heads of a KV head
    uint32_t tokens;         // query tokens of a part of a tile
    uint32_t parts;          // of a tile
    uint32_t blocks;         // supports along the queries
    uint32_t tilesPerBlock;  // tiles that share one support
    uint32_t tiles;          // over batch, KV heads and blocks
    uint32_t cores;          // launch this many blocks
    uint32_t rowsAnywhere;   // 1: queries stand where `positions` says, ascending, and a sequence has one support (dense_rows)
};

}  // namespace npu_sparse_ascendc
