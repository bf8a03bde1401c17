// Host side of select_tokens: what it serves, and how a problem is cut up.
#pragma once

#include "../common/top_k_tiling.h"
#include "tiling_data.h"

namespace npu_sparse_ascendc {

struct SelectTokensProblem {
    uint32_t batch = 1;
    uint32_t heads = 1;    // Hs
    uint32_t rows = 1;     // Nq
    uint32_t queries = 1;  // Tq
    uint32_t keys = 1;     // Tk
    uint32_t block = 1;
    uint32_t k = 1;
    uint32_t sink = 0;
    uint32_t recent = 0;
    bool hasValid = false;
};

inline std::string CheckSelectTokens(const SelectTokensProblem& p)
{
    for (const std::string& refusal : {
             CheckRange("B", p.batch, 1, 65535),
             CheckRange("Hs", p.heads, 1, 65535),
             CheckRange("Tk", p.keys, 1, 1u << 24),
             CheckRange("queries", p.queries, 1, p.keys),
             CheckRange("block", p.block, 1, 1u << 24),
         }) {
        if (!refusal.empty()) {
            return refusal;
        }
    }
    if (p.rows != CeilDiv(p.queries, p.block)) {
        return Refusal("Nq", "be " + std::to_string(CeilDiv(p.queries, p.block)) + " blocks of queries", p.rows);
    }
    return CheckTopK(p.k, p.sink, p.recent, p.block, p.keys);
}

inline SelectTokensTiling MakeSelectTokensTiling(const SelectTokensProblem& p, const Hardware& hardware)
{
    SelectTokensTiling t{};
    const bool small = p.keys <= 512 || std::min(p.k, p.keys) > 2048;  // then longer steps gain nothing, or do not fit
    t.topK = MakeTopKTiling(p.k, p.sink, p.recent, p.keys, small ? 512 : 2048);
    t.batch = p.batch;
    t.heads = p.heads;
    t.rows = p.rows;
    t.queries = p.queries;
    t.keys = p.keys;
    t.block = p.block;
    t.hasValid = p.hasValid;
    const uint32_t cores = 2 * hardware.cores;
    const uint32_t rows = p.batch * p.heads * p.rows;
    t.splits = 1;
    if (rows < cores) {
        t.splits = std::min({CeilDiv(cores, rows), std::max(1u, p.keys / (2 * t.topK.keysPerStep)), 64u});
    }
    t.cores = std::min(cores, rows * t.splits);
    return t;
}

inline uint32_t SelectTokensBlocks(const SelectTokensTiling& tiling) { return tiling.cores; }

// One list for every part of a row that was split.
inline uint64_t SelectTokensWorkspace(const SelectTokensTiling& t)
{
    const uint64_t rows = static_cast<uint64_t>(t.batch) * t.heads * t.rows;
    return t.splits > 1 ? rows * t.splits * ListBytes(t.topK) : 0;
}

}  // namespace npu_sparse_ascendc
