// Flags between the pipes of a core, barriers, and flags between cores.
#pragma once

#include "tensor.h"

using event_t = int32_t;
constexpr event_t EVENT_ID0 = 0, EVENT_ID1 = 1, EVENT_ID2 = 2, EVENT_ID3 = 3, EVENT_ID4 = 4, EVENT_ID5 = 5, EVENT_ID6 = 6,
                  EVENT_ID7 = 7;

namespace AscendC {

template <HardEvent event>
void SetFlag(int32_t id, Where where = {}) {
    emulation::SetEvent(static_cast<int>(event) / 8, static_cast<int>(event) % 8, id, false, where);
}

template <HardEvent event>
void WaitFlag(int32_t id, Where where = {}) {
    emulation::WaitEvent(static_cast<int>(event) / 8, static_cast<int>(event) % 8, id, false, where);
}

template <pipe_t pipe>
void PipeBarrier(Where where = {}) {
    emulation::Barrier(pipe, where);
}

template <uint8_t modeId, pipe_t pipe>
void CrossCoreSetFlag(uint16_t id, Where where = {}) {
    emulation::CheckCrossId(id, modeId, "CrossCoreSetFlag", where);
    if constexpr (modeId == 0) emulation::CheckTogether("CrossCoreSetFlag of mode 0", where);
    emulation::CrossSetFlag(modeId, pipe, id, where);
}

// The set says which cores it comes from; the pipe that waits is the scalar one, which issues all that follows.
template <uint8_t modeId = 0, pipe_t pipe = PIPE_S>
void CrossCoreWaitFlag(uint16_t id, Where where = {}) {
    emulation::CheckCrossId(id, 0, "CrossCoreWaitFlag", where);
    emulation::CrossWaitFlag(id, PIPE_S, where);
}

template <bool isAIVOnly = true>
void SyncAll(Where where = {}) {
    emulation::SynchroniseAll(isAIVOnly, where);
}

}  // namespace AscendC
