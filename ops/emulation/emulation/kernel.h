// What a kernel asks about the core it runs on.
#pragma once

#include "tensor.h"

#define ASCEND_IS_AIC (::emulation::Current().cube)
#define ASCEND_IS_AIV (!::emulation::Current().cube)
#define KERNEL_TASK_TYPE_DEFAULT(type) ::emulation::RequireTaskType(type)

namespace emulation {

inline void RequireTaskType(KernelType type, Where where = {}) {
    Require(Current().machine->type == type, 5, "KERNEL_TASK_TYPE_DEFAULT must be the type the kernel is launched with", where);
}

}  // namespace emulation

namespace AscendC {

inline int64_t GetSubBlockNum() { return emulation::Current().machine->type == KERNEL_TYPE_MIX_AIC_1_2 ? 2 : 1; }
inline int64_t GetTaskRation() { return emulation::Current().cube ? 1 : GetSubBlockNum(); }
inline int64_t GetSubBlockIdx() { return emulation::Current().sub; }
inline int64_t GetBlockNum() { return emulation::Current().machine->blocks; }
inline int64_t GetBlockIdx() {
    const emulation::Core& core = emulation::Current();
    return core.cube ? core.block : core.block * GetSubBlockNum() + core.sub;
}

}  // namespace AscendC
