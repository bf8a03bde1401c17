// How the scoring of index keys is cut up: plain data, written by the host (common/score_tiling.h), read by the kernels.
#pragma once

#include <cstdint>

namespace npu_sparse_ascendc {

constexpr uint32_t SUBS = 2;   // AIVs of an AIC; each owns half of the rows of a tile
constexpr uint32_t SLOTS = 2;  // workspace slots of an AIV: the cube fills one while the AIV reads the other

struct ScoreTiling {
    uint32_t batch;
    uint32_t heads;          // Hi
    uint32_t queries;        // Tq
    uint32_t keys;           // Tk
    uint32_t dim;            // Di
    uint32_t block;          // queries that share a row
    uint32_t rows;           // Nq
    uint32_t mean;           // 1: mean of softmax, 0: max
    uint32_t passes;         // over a tile's keys: 2 for the mean, 1 where only its statistics are wanted (index_partition), else 1
    uint32_t hasWeights;
    uint32_t hasValid;
    uint32_t hasPartition;   // 1: every query's scores are less its log-partition before the maximum
    uint32_t bfloat16;
    uint32_t cores;          // AIC cores, and blocks of the launch
    uint32_t rowsPerSub;     // rows of a tile that one AIV owns
    uint32_t queriesPerSub;  // rowsPerSub * block <= 128
    uint32_t tiles;          // tiles of 2 * rowsPerSub rows in a sequence
    uint32_t splits;         // items a tile's keys are cut into
    uint32_t keysPerStep;    // keys of one hand-over from cube to vector
    uint32_t queriesPerLoad; // queries an AIV loads at once
    uint32_t headsPerProduct; // index heads whose queries are the rows of one product: all have the same keys
    uint32_t productRows;    // headsPerProduct * queriesPerSub, as whole fractals
    uint32_t queriesInL1;    // 1: the index queries of a tile stay in L1, 0: they are read again at every step
    float scale;             // 1 / sqrt(Di)
    uint64_t slotFloats;     // floats of a workspace slot: [heads, queries of the sub-tile, keysPerStep]
};

}  // namespace npu_sparse_ascendc
