#pragma once

#include <cstdint>

namespace npu_sparse_ascendc {

constexpr uint32_t MASS_TILE_ROWS = 128;  // query tokens x heads of one KV head, at most
constexpr uint32_t MASS_CHUNK = 128;      // keys of one step
constexpr uint32_t MASS_SLOTS = 2;        // steps in flight between the cube and the vector cores
constexpr uint64_t MASS_SCORES_BYTES = uint64_t(MASS_TILE_ROWS) * MASS_CHUNK * 4;
constexpr uint64_t MASS_STATISTICS_BYTES = 2 * MASS_TILE_ROWS * 4;  // of one tile

struct AttentionMassTiling {
    uint32_t batch, queryHeads, keyHeads, queries, keys, dim, block, reduceMean, perKv, hasValid, bfloat16;
    float scale;
    uint32_t group;         // query heads of a KV head
    uint32_t tokens;        // query tokens of a tile
    uint32_t tilesPerUnit;  // a unit is the work between two writes: several tiles of one block, or one tile of several blocks
    uint32_t unitTokens;
    uint32_t tilesOfUnit;   // tilesPerUnit for each KV head of an output
    uint32_t unitsPerHead;  // along the queries
    uint32_t units;         // over batch, output heads and queries
    uint32_t blocks;        // rows of the output along the queries
    uint32_t cores;         // launch this many blocks
    uint32_t coreBytes;     // of the workspace
};

}  // namespace npu_sparse_ascendc
