// Host side of attention_mass: what it serves, how a problem is cut up, and the workspace it takes.
#pragma once

#include "../common/hardware.h"
#include "tiling_data.h"

namespace npu_sparse_ascendc {

struct AttentionMassProblem {
    uint32_t batch, queryHeads, keyHeads, queries, keys, dim;  // B, Hq, Hkv, Tq, Tk, D
    uint32_t block;                                            // queries whose rows become one
    uint32_t reduceMean;                                       // 0: maximum over the block's queries, 1: mean over the live ones
    uint32_t perKv;                                            // 1: one output per KV head, 0: the mean over all heads
    uint32_t hasValid;                                         // 1: valid is uint8 [B, Tk], 0: it is a null address
    uint32_t type;                                             // DataType of q and k
    float scale;
};

inline std::string CheckAttentionMass(const AttentionMassProblem& p)
{
    for (const std::string& refusal : {CheckDim("D", p.dim), CheckRange("reduce_block", p.block, 1, 128)}) {
        if (!refusal.empty()) {
            return refusal;
        }
    }
    if (p.type != FLOAT16 && p.type != BFLOAT16) {
        return Refusal("q", "be float16 (0) or bfloat16 (1)", p.type);
    }
    if (p.batch == 0 || p.queries == 0) {
        return Refusal("B and Tq", "be at least 1", 0);
    }
    const std::string shape = CheckHeadsAndLengths(p.queryHeads, p.keyHeads, MASS_TILE_ROWS, p.queries, p.keys);
    if (!shape.empty()) {
        return shape;
    }
    return CheckRange("Tk", p.keys, 1, 1u << 30);  // row strides of the output are 32-bit byte counts
}

inline AttentionMassTiling MakeAttentionMassTiling(const AttentionMassProblem& p, const Hardware& hardware)
{
    AttentionMassTiling t = {};
    t.batch = p.batch;
    t.queryHeads = p.queryHeads;
    t.keyHeads = p.keyHeads;
    t.queries = p.queries;
    t.keys = p.keys;
    t.dim = p.dim;
    t.block = p.block;
    t.reduceMean = p.reduceMean;
    t.perKv = p.perKv;
    t.hasValid = p.hasValid;
    t.bfloat16 = p.type == BFLOAT16;
    t.scale = p.scale;
    t.group = p.queryHeads / p.keyHeads;
    const uint32_t most = MASS_TILE_ROWS / t.group;
    if (p.block >= most) {
        t.tilesPerUnit = CeilDiv(p.block, most);
        t.tokens = CeilDiv(p.block, t.tilesPerUnit);
        t.unitTokens = p.block;
    } else {
        t.tilesPerUnit = 1;
        t.tokens = t.unitTokens = most / p.block * p.block;
    }
    t.unitsPerHead = CeilDiv(p.queries, t.unitTokens);
    t.units = p.batch * (p.perKv ? p.keyHeads : 1) * t.unitsPerHead;
    t.blocks = CeilDiv(p.queries, p.block);
    t.cores = t.units < hardware.cores ? t.units : hardware.cores;
    t.tilesOfUnit = t.tilesPerUnit * (p.perKv ? 1 : p.keyHeads);
    t.coreBytes = MASS_SLOTS * MASS_SCORES_BYTES + 2 * t.tilesOfUnit * MASS_STATISTICS_BYTES;
    return t;
}

inline uint32_t AttentionMassBlocks(const AttentionMassTiling& t) { return t.cores; }

inline uint64_t AttentionMassWorkspace(const AttentionMassTiling& t) { return uint64_t(t.cores) * t.coreBytes; }

}  // namespace npu_sparse_ascendc
