// The top-k part of the tiling of select_tokens and select_by_index. Host only.
#pragma once

#include <algorithm>

#include "hardware.h"
#include "top_k_tiling_data.h"

namespace npu_sparse_ascendc {

constexpr uint32_t MAX_LIST_LENGTH = 4032;  // MrgSort takes lists of at most 4095 entries

inline std::string CheckTopK(uint32_t k, uint32_t sink, uint32_t recent, uint32_t block, uint32_t keys)
{
    if (k < 1) {
        return Refusal("k", "be >= 1", k);
    }
    if (std::min(k, keys) > MAX_LIST_LENGTH) {
        return CheckRange("k", k, 1, MAX_LIST_LENGTH);
    }
    const uint64_t kept = static_cast<uint64_t>(sink) + (recent ? static_cast<uint64_t>(recent) + block - 1 : 0);
    if (k < std::min<uint64_t>(kept, keys)) {
        const std::string rule = "hold the " + std::to_string(kept) +
                                 " keys that are always kept (sinks, and recent of every query)";
        return Refusal("k", rule, k);
    }
    return {};
}

inline TopKTiling MakeTopKTiling(uint32_t k, uint32_t sink, uint32_t recent, uint32_t keys, uint32_t keysPerStep)
{
    TopKTiling t{};
    t.k = std::min(k, keys);
    t.listLength = RoundUp(t.k, 64);
    t.keysPerStep = keysPerStep;
    t.candidates = keysPerStep + 256;
    t.sink = std::min(sink, keys);
    t.recent = std::min(recent, keys);
    return t;
}

// Bytes of UB that the running top-k of `rows` rows takes (common/top_k.h: TopK::Init).
inline uint32_t TopKUbBytes(const TopKTiling& t, uint32_t rows)
{
    const uint32_t pair = 8;
    const uint32_t longest = std::max(t.listLength, t.candidates);
    const uint32_t perRow = (t.listLength + t.candidates) * pair;
    const uint32_t sorted = 2 * longest * pair;                     // two buffers that sorting alternates between
    const uint32_t merged = (t.listLength + t.candidates) * pair;   // the old list and the candidates
    const uint32_t positions = 2 * t.keysPerStep * 4;
    const uint32_t bits = RoundUp(std::max(t.listLength, t.keysPerStep) / 8, 32);
    const uint32_t result = t.listLength * 4 + 32;
    return rows * perRow + sorted + merged + positions + bits + result;
}

inline uint32_t ListBytes(const TopKTiling& t) { return t.listLength * 8; }

}  // namespace npu_sparse_ascendc
