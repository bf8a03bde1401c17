// Small things every kernel of this folder needs.
#pragma once

#include "entry.h"
#include "kernel_operator.h"

namespace npu_sparse_ascendc {

using namespace AscendC;

constexpr uint32_t BLOCK_BYTES = 32;     // of UB and L1
constexpr uint32_t BLOCK_FLOATS = 8;
constexpr uint32_t REPEAT_FLOATS = 64;   // of a vector instruction
constexpr uint32_t FRACTAL = 16;         // rows and columns of a 16-bit fractal
constexpr float MINUS_INFINITY = -__builtin_inff();
constexpr float LOWEST = -3.402823466e38f;
constexpr float LARGEST = 3.402823466e38f;

__aicore__ inline uint32_t Least(uint32_t a, uint32_t b) { return a < b ? a : b; }
__aicore__ inline uint32_t Most(uint32_t a, uint32_t b) { return a > b ? a : b; }
__aicore__ inline uint32_t Aligned(uint32_t value, uint32_t unit) { return (value + unit - 1) / unit * unit; }
__aicore__ inline uint32_t Above(uint32_t value, uint32_t floor) { return value > floor ? value - floor : 0; }

// What the first pipe has been given is done before the second goes on.
template <HardEvent event>
__aicore__ inline void Order()
{
    const event_t id = static_cast<event_t>(GetTPipePtr()->FetchEventID(event));
    SetFlag<event>(id);
    WaitFlag<event>(id);
}

// The event ids that a kernel keeps from its Init on: of TPipe, so that nobody else has them.
template <HardEvent event, uint32_t count>
class EventIds {
public:
    __aicore__ inline void Init(TPipe* pipe)
    {
        for (uint32_t i = 0; i < count; ++i) {
            ids_[i] = static_cast<event_t>(pipe->AllocEventID<event>());
        }
    }
    __aicore__ inline event_t operator[](uint32_t i) const { return ids_[i]; }

private:
    event_t ids_[count];
};

// `rows` times `count` elements that need not fill 32 B blocks, one behind the other in GM, each to a block of its own in UB and
// zeros behind it.
template <typename T>
__aicore__ inline void LoadRagged(const LocalTensor<T>& to, const GlobalTensor<T>& from, uint32_t count, uint32_t rows = 1)
{
    const DataCopyExtParams copy = {static_cast<uint16_t>(rows), static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0};
    DataCopyPadExtParams<T> pad;
    pad.isPad = true;
    pad.leftPadding = 0;
    pad.rightPadding = Aligned(count, BLOCK_BYTES / sizeof(T)) - count;
    DataCopyPad(to, from, copy, pad);
}

template <typename T>
__aicore__ inline void StoreRagged(const GlobalTensor<T>& to, const LocalTensor<T>& from, uint32_t count)
{
    const DataCopyExtParams copy = {1, static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0};
    DataCopyPad(to, from, copy);
}

}  // namespace npu_sparse_ascendc
