// How the binding starts a kernel: one declaration, implemented by launch_emulated.cpp and by launch_npu.cpp.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "attention_mass/tiling_data.h"
#include "index_partition/tiling_data.h"
#include "index_scores/tiling_data.h"
#include "select_by_index/tiling_data.h"
#include "select_tokens/tiling_data.h"
#include "sparse_attention/tiling_data.h"

namespace npu_sparse_ascendc {

// A tensor as a kernel sees it. `data` is null for an optional input that is not there.
struct GmArgument {
    const char* name;
    void* data;
    uint64_t bytes;
    bool written;
};

// Which cores a block has: one cube core with two vector cores, or one vector core.
enum class KernelUnits { MIXED, VECTOR };

// Runs a kernel on `blocks` blocks over its GM arguments, in the order of its parameters, and its tiling, which it gets by value:
// on the card it is queued on `stream` when the call returns, emulated it has run. Nothing is copied to the device and nobody is
// waited for. Throws std::exception where a rule of the hardware is broken.
template <typename Tiling>
using Launcher = void(uint32_t blocks, KernelUnits units, void* stream, const std::vector<GmArgument>& arguments,
                      const Tiling& tiling);

Launcher<IndexScoresTiling> launch_index_scores;
Launcher<IndexPartitionTiling> launch_index_partition;
Launcher<SelectTokensTiling> launch_select_tokens;
Launcher<SelectByIndexTiling> launch_select_by_index;
Launcher<SparseAttentionTiling> launch_sparse_attention;
Launcher<AttentionMassTiling> launch_attention_mass;

// AI cores (a cube core and two vector cores each) that work of this stream may use, on the current card.
uint32_t StreamCores(void* stream);

// The name that the current card has for its system on chip, such as Ascend910B3.
std::string SocName();

}  // namespace npu_sparse_ascendc
