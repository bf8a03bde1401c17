// What a tiling function needs to know of the card (architecture dav-2201), and the words its refusals are made of. Host only.
#pragma once

#include <cstdint>
#include <string>

namespace npu_sparse_ascendc {

constexpr uint32_t UB_RESERVED_BYTES = 256;
constexpr uint32_t SELECT_RESERVED_BYTES = 8192;  // Select with a scalar or a second tensor keeps the end of UB for itself
constexpr uint32_t L1_RESERVED_BYTES = 256;

enum DataType : uint32_t { FLOAT16 = 0, BFLOAT16 = 1 };

struct Hardware {
    uint32_t cores = 20;  // AIC cores, each with two AIV; 910B3, 910B4 (910B1, 910B2: 24)
    uint32_t ubBytes = 196608;
    uint32_t l1Bytes = 524288;
    uint32_t l0aBytes = 65536;
    uint32_t l0bBytes = 65536;
    uint32_t l0cBytes = 131072;
};

inline uint32_t CeilDiv(uint32_t value, uint32_t unit) { return (value + unit - 1) / unit; }
inline uint32_t RoundUp(uint32_t value, uint32_t unit) { return CeilDiv(value, unit) * unit; }

// Bytes of UB of a ValidMask (common/valid_mask.h).
inline uint32_t ValidMaskUbBytes(uint32_t keysPerStep) { return keysPerStep * 5 + RoundUp(keysPerStep / 8, 32); }

// "<name> must <rule>, got <value>"
inline std::string Refusal(const std::string& name, const std::string& rule, uint64_t value)
{
    return name + " must " + rule + ", got " + std::to_string(value);
}

// Empty, or the refusal of a feature dimension the kernels do not serve, with the nearest one they do.
inline std::string CheckDim(const std::string& name, uint32_t dim)
{
    if (dim >= 16 && dim <= 256 && dim % 16 == 0) {
        return {};
    }
    const uint32_t nearest = dim < 16 ? 16 : dim > 256 ? 256 : (dim + 8) / 16 * 16;
    return Refusal(name, "be a multiple of 16 from 16 to 256", dim) + " (nearest: " + std::to_string(nearest) + ")";
}

inline std::string CheckRange(const std::string& name, uint64_t value, uint64_t least, uint64_t most)
{
    if (value >= least && value <= most) {
        return {};
    }
    const std::string rule = "be from " + std::to_string(least) + " to " + std::to_string(most);
    return Refusal(name, rule, value) + " (nearest: " + std::to_string(value < least ? least : most) + ")";
}

// Both attention operators: whole groups of at most `mostGroup` query heads, and queries that are the last of the keys.
inline std::string CheckHeadsAndLengths(uint32_t queryHeads, uint32_t keyHeads, uint32_t mostGroup, uint32_t queries, uint32_t keys)
{
    if (keyHeads == 0 || queryHeads == 0 || queryHeads % keyHeads != 0) {
        return Refusal("query heads", "be a multiple of the " + std::to_string(keyHeads) + " KV heads", queryHeads);
    }
    const std::string group = CheckRange("query heads per KV head", queryHeads / keyHeads, 1, mostGroup);
    if (!group.empty()) {
        return group;
    }
    return queries > keys ? Refusal("Tq", "be at most Tk = " + std::to_string(keys), queries) : std::string{};
}

}  // namespace npu_sparse_ascendc
