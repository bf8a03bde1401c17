// How the binding starts a kernel: one declaration, implemented by launch_emulated.cpp and by launch_npu.cpp.
#pragma once

#include <cstdint>
#include <vector>

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

// Runs a kernel on `blocks` blocks over its GM arguments, in the order of its parameters: on the card it is queued on `stream`
// when the call returns, emulated it has run. Throws std::exception where a rule of the hardware is broken.
using Launcher = void(uint32_t blocks, KernelUnits units, void* stream, const std::vector<GmArgument>& arguments);

Launcher launch_index_scores, launch_index_partition, launch_select_tokens, launch_select_by_index, launch_sparse_attention,
    launch_attention_mass;

// AI cores (a cube core and two vector cores each) of the current card.
uint32_t DeviceCores();

}  // namespace npu_sparse_ascendc
