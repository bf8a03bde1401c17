// Host side of sparse_attention: what it serves, how a problem is cut up, and the workspace it takes.
#pragma once

#include <algorithm>

#include "../common/hardware.h"
#include "tiling_data.h"

namespace npu_sparse_ascendc {

struct SparseAttentionProblem {
    uint32_t batch, queryHeads, keyHeads, queries, keys;  // B, Hq, Hkv, Tq, Tk
    uint32_t dim, valueDim;                               // D, Dv
    uint32_t supportHeads, width, block;                  // Hs, K (slots of a support), b_sel
    uint32_t type;                                        // DataType of q, k, v and the output
    float scale;
    bool rowsAnywhere = false;                            // dense_rows: queries have positions, a sequence has one support
};

inline std::string CheckSparseAttention(const SparseAttentionProblem& p)
{
    for (const std::string& refusal :
         {CheckDim("D", p.dim), CheckDim("Dv", p.valueDim), CheckRange("block", p.block, 1, 128)}) {
        if (!refusal.empty()) {
            return refusal;
        }
    }
    if (p.type != FLOAT16 && p.type != BFLOAT16) {
        return Refusal("q", "be float16 (0) or bfloat16 (1)", p.type);
    }
    if (p.batch == 0 || p.queries == 0 || p.width == 0) {
        return Refusal("B, Tq and the support's width", "be at least 1", 0);
    }
    const std::string shape = CheckHeadsAndLengths(p.queryHeads, p.keyHeads, ATTENTION_TILE_ROWS,
                                                   p.rowsAnywhere ? 1 : p.queries, p.keys);
    if (!shape.empty()) {
        return shape;
    }
    if (p.keys > INT32_MAX) {
        return Refusal("Tk", "be at most 2147483647", p.keys);
    }
    if (p.supportHeads != 1 && p.supportHeads != p.keyHeads) {
        return Refusal("support heads", "be 1 or Hkv = " + std::to_string(p.keyHeads), p.supportHeads);
    }
    return {};
}

inline SparseAttentionTiling MakeSparseAttentionTiling(const SparseAttentionProblem& p, const Hardware& hardware)
{
    SparseAttentionTiling t = {};
    t.batch = p.batch;
    t.queryHeads = p.queryHeads;
    t.keyHeads = p.keyHeads;
    t.queries = p.queries;
    t.keys = p.keys;
    t.dim = p.dim;
    t.valueDim = p.valueDim;
    t.supportHeads = p.supportHeads;
    t.width = p.width;
    t.block = p.block;
    t.bfloat16 = p.type == BFLOAT16;
    t.scale = p.scale;
    t.rowsAnywhere = p.rowsAnywhere;
    t.group = p.queryHeads / p.keyHeads;
    const uint32_t most = ATTENTION_TILE_ROWS / t.group;
    const uint32_t shared = p.block < p.queries ? p.block : p.queries;
    const uint32_t parts = CeilDiv(shared, most);
    t.tokens = CeilDiv(shared, parts);
    t.parts = parts < ATTENTION_PARTS ? parts : ATTENTION_PARTS;
    t.tilesPerBlock = CeilDiv(parts, t.parts);
    t.blocks = CeilDiv(p.queries, p.block);
    t.tiles = p.batch * p.keyHeads * t.blocks * t.tilesPerBlock;
    t.cores = t.tiles < hardware.cores ? t.tiles : hardware.cores;
    return t;
}

// Rows of dense_rows in a block: as many blocks as there are cores for, for a block's rows read all keys on one of them.
inline uint32_t DenseRowsBlock(uint32_t batch, uint32_t keyHeads, uint32_t rows, const Hardware& hardware)
{
    const uint32_t blocks = std::min(rows, CeilDiv(hardware.cores, batch * keyHeads));
    return std::min(CeilDiv(rows, blocks), 128u);
}

inline uint32_t SparseAttentionBlocks(const SparseAttentionTiling& t) { return t.cores; }

inline uint64_t SparseAttentionWorkspace(const SparseAttentionTiling& t) { return t.cores * ATTENTION_CORE_BYTES; }

}  // namespace npu_sparse_ascendc
