// The valid keys of a step as a bit mask in UB, and the first valid keys of a sequence.
#pragma once

#include "kernel_common.h"

namespace npu_sparse_ascendc {

class ValidMask {
public:
    // Bytes of UB: score_tiling.h and select_tokens/tiling.h count them too.
    __aicore__ inline void Init(TPipe* pipe, GM_ADDR valid, uint32_t keysOfSequence, uint32_t keysPerStep)
    {
        keys = keysOfSequence;
        step = keysPerStep;
        validGm.SetGlobalBuffer(valid);
        pipe->InitBuffer(bytesUb, step);
        pipe->InitBuffer(halvesUb, 2 * step * sizeof(half));
        pipe->InitBuffer(bitsUb, Aligned(step / 8, BLOCK_BYTES));
    }

    // Bit i: whether key first + i is valid; count <= keysPerStep.
    __aicore__ inline LocalTensor<uint8_t> Load(uint32_t sequence, uint32_t first, uint32_t count)
    {
        LocalTensor<uint8_t> bytes = bytesUb.Get<uint8_t>();
        LocalTensor<half> halves = halvesUb.Get<half>();
        LocalTensor<uint8_t> bits = bitsUb.Get<uint8_t>();
        Order<HardEvent::V_MTE2>();
        LoadRagged(bytes, validGm[static_cast<uint64_t>(sequence) * keys + first], count);
        Duplicate(halves, static_cast<half>(0), step);
        PipeBarrier<PIPE_V>();
        Order<HardEvent::MTE2_V>();
        Cast(halves, bytes, RoundMode::CAST_NONE, count);
        PipeBarrier<PIPE_V>();
        CompareScalar(bits, halves, static_cast<half>(0), CMPMODE::NE, step);
        PipeBarrier<PIPE_V>();
        return bits;
    }

    // The position behind the n-th valid key, or Tk where there are fewer.
    __aicore__ inline uint32_t EndOfFirst(uint32_t n, uint32_t sequence)
    {
        uint32_t found = 0;
        for (uint32_t first = 0; first < keys; first += step) {
            const uint32_t count = Least(step, keys - first);
            LocalTensor<uint8_t> bits = Load(sequence, first, count);
            LocalTensor<half> halves = halvesUb.Get<half>();
            uint64_t here = 0;
            GatherMask(halves[step], halves, bits.ReinterpretCast<uint16_t>(), true, step, {1, 1, 8, 8}, here);
            PipeBarrier<PIPE_V>();
            Order<HardEvent::V_S>();
            if (found + here >= n) {
                LocalTensor<uint8_t> bytes = bytesUb.Get<uint8_t>();
                Order<HardEvent::MTE2_S>();
                for (uint32_t i = 0; i < count; i++) {
                    found += bytes.GetValue(i) != 0;
                    if (found == n) {
                        Order<HardEvent::S_MTE2>();
                        return first + i + 1;
                    }
                }
            }
            found += here;
        }
        return keys;
    }

private:
    uint32_t keys;
    uint32_t step;
    GlobalTensor<uint8_t> validGm;
    TBuf<TPosition::VECCALC> bytesUb;
    TBuf<TPosition::VECCALC> halvesUb;
    TBuf<TPosition::VECCALC> bitsUb;
};

}  // namespace npu_sparse_ascendc
