// The running top-k of a row of scores: plain data, written by the host, read by the kernels.
#pragma once

#include <cstdint>

namespace npu_sparse_ascendc {

struct TopKTiling {
    uint32_t k;            // slots of a row of indices: min(k, Tk)
    uint32_t listLength;   // entries of a running list: k rounded up to 64
    uint32_t keysPerStep;  // scores taken in at once, a multiple of 128
    uint32_t sink;
    uint32_t recent;
    uint32_t candidates;   // room for keys that beat a row's threshold and are not yet sorted
};

}  // namespace npu_sparse_ascendc
