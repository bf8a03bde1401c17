// Copies between GM, UB and L1, and the cleaning of the scalar unit's data cache.
#pragma once

#include "tensor.h"

namespace emulation {

// A field of a parameter structure that remembers a value the device's `T` would wrap, so that the range check sees it.
template <typename T>
struct Field {
    int64_t value = 0;
    Field() = default;
    template <typename I, typename = std::enable_if_t<std::is_integral_v<I>>>
    Field(I value) : value(static_cast<int64_t>(value)) {}
    operator T() const { return static_cast<T>(value); }
};

template <typename T>
uint64_t InRange(const Field<T>& field, int64_t low, int64_t high, const char* opcode, const char* name, Where where) {
    Require(field.value >= low && field.value <= high, 5, where, [&] {
        return std::string(opcode) + " " + name + " must lie in [" + std::to_string(low) + ", " + std::to_string(high) +
               "], got " + std::to_string(field.value);
    });
    return static_cast<uint64_t>(field.value);
}

constexpr uint64_t kDataBlock = 32;
constexpr uint64_t RoundUpToBlock(uint64_t bytes) { return (bytes + kDataBlock - 1) / kDataBlock * kDataBlock; }

inline void RequireAligned(const Span& span, const char* opcode, Where where) {
    Require(span.begin % kDataBlock == 0, 2, where, [&] {
        return std::string(opcode) + " local address must be a multiple of 32, got " + std::to_string(span.begin);
    });
}

inline Space LocalSpace(const Span& span, const char* opcode, Where where) {
    Require(span.memory != nullptr, 4, where,
            [&] { return std::string(opcode) + " must be given tensors attached to a buffer, got none"; });
    return span.memory->space;
}

struct Rows {                           // `count` pieces of `bytes`; strides from start to start
    uint64_t count, bytes, from, to;
};

inline void CopyRows(pipe_t pipe, const char* opcode, const Span& read, const Span& write, const uint8_t* from, uint8_t* to,
                     Rows rows, Where where) {
    Cost cost;
    cost.bursts = static_cast<uint32_t>(rows.count);
    cost.burstBytes = static_cast<uint32_t>(rows.bytes);
    Issue(pipe, opcode, {read}, {write}, cost, where, [=] {
        for (uint64_t i = 0; i < rows.count; ++i) std::memmove(to + i * rows.to, from + i * rows.from, rows.bytes);
    });
}

template <typename Tensor>
const uint8_t* BytesOf(const Tensor& tensor) {
    return reinterpret_cast<const uint8_t*>(tensor.Data());
}

}  // namespace emulation

namespace AscendC {

struct DataCopyParams {                 // in 32-byte units; strides are gaps
    DataCopyParams() = default;
    DataCopyParams(uint16_t count, uint16_t len, uint16_t srcStrideIn, uint16_t dstStrideIn)
        : blockCount(count), blockLen(len), srcStride(srcStrideIn), dstStride(dstStrideIn) {}
    emulation::Field<uint16_t> blockCount = 1, blockLen = 0, srcStride = 0, dstStride = 0;
};

struct DataCopyExtParams {              // bytes; gaps in bytes in GM and in 32-byte units in UB
    DataCopyExtParams() = default;
    DataCopyExtParams(uint16_t count, uint32_t len, uint32_t srcStrideIn, uint32_t dstStrideIn, uint32_t rsvIn)
        : blockCount(count), blockLen(len), srcStride(srcStrideIn), dstStride(dstStrideIn), rsv(rsvIn) {}
    emulation::Field<uint16_t> blockCount = 1;
    emulation::Field<uint32_t> blockLen = 0, srcStride = 0, dstStride = 0, rsv = 0;
};

template <typename T>
struct DataCopyPadExtParams {           // in elements
    DataCopyPadExtParams() = default;
    DataCopyPadExtParams(bool isPadValue, uint8_t left, uint8_t right, T value)
        : isPad(isPadValue), leftPadding(left), rightPadding(right), paddingValue(value) {}
    bool isPad = false;
    emulation::Field<uint8_t> leftPadding = 0, rightPadding = 0;
    T paddingValue{};
};

struct DataCopyPadParams {
    DataCopyPadParams() = default;
    DataCopyPadParams(bool isPadValue, uint8_t left, uint8_t right, uint64_t value)
        : isPad(isPadValue), leftPadding(left), rightPadding(right), paddingValue(value) {}
    bool isPad = false;
    emulation::Field<uint8_t> leftPadding = 0, rightPadding = 0;
    uint64_t paddingValue = 0;
};

struct Nd2NzParams {
    Nd2NzParams() = default;
    Nd2NzParams(uint16_t ndNumIn, uint16_t nValueIn, uint16_t dValueIn, uint16_t srcNdMatrixStrideIn, uint16_t srcDValueIn,
                uint16_t dstNzC0StrideIn, uint16_t dstNzNStrideIn, uint16_t dstNzMatrixStrideIn)
        : ndNum(ndNumIn), nValue(nValueIn), dValue(dValueIn), srcNdMatrixStride(srcNdMatrixStrideIn), srcDValue(srcDValueIn),
          dstNzC0Stride(dstNzC0StrideIn), dstNzNStride(dstNzNStrideIn), dstNzMatrixStride(dstNzMatrixStrideIn) {}
    emulation::Field<uint16_t> ndNum = 0, nValue = 0, dValue = 0, srcNdMatrixStride = 0, srcDValue = 0, dstNzC0Stride = 0,
                               dstNzNStride = 0, dstNzMatrixStride = 0;
};

enum class CacheLine : uint64_t { SINGLE_CACHE_LINE = 0, ENTIRE_DATA_CACHE };
enum class DcciDst : uint64_t { CACHELINE_ALL = 0, CACHELINE_UB, CACHELINE_OUT, CACHELINE_ATOMIC };

// ---- 32-byte units ----

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyParams& params, Where where = {}) {
    using namespace emulation;
    const char* opcode = "DataCopy";
    const Rows rows{InRange(params.blockCount, 1, 4095, opcode, "blockCount", where),
                    InRange(params.blockLen, 1, 65535, opcode, "blockLen", where) * kDataBlock,
                    (params.blockLen + InRange(params.srcStride, 0, 65535, opcode, "srcStride", where)) * kDataBlock,
                    (params.blockLen + InRange(params.dstStride, 0, 65535, opcode, "dstStride", where)) * kDataBlock};
    const Span write = dst.Bytes(0, rows.bytes, rows.count, rows.to);
    const Space space = LocalSpace(write, opcode, where);
    Require(space == Space::UB || space == Space::L1, 3, "DataCopy from GM must go to UB or L1", where);
    RequireAligned(write, opcode, where);
    CopyRows(PIPE_MTE2, opcode, src.Bytes(0, rows.bytes, rows.count, rows.from), write, BytesOf(src),
             reinterpret_cast<uint8_t*>(dst.Data()), rows, where);
}

template <typename T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& params, Where where = {}) {
    using namespace emulation;
    const char* opcode = "DataCopy";
    const Rows rows{InRange(params.blockCount, 1, 4095, opcode, "blockCount", where),
                    InRange(params.blockLen, 1, 65535, opcode, "blockLen", where) * kDataBlock,
                    (params.blockLen + InRange(params.srcStride, 0, 65535, opcode, "srcStride", where)) * kDataBlock,
                    (params.blockLen + InRange(params.dstStride, 0, 65535, opcode, "dstStride", where)) * kDataBlock};
    const Span read = src.Bytes(0, rows.bytes, rows.count, rows.from);
    const Space space = LocalSpace(read, opcode, where);
    Require(space == Space::UB || space == Space::L1, 3, "DataCopy to GM must come from UB or L1", where);
    RequireAligned(read, opcode, where);
    CopyRows(PIPE_MTE3, opcode, read, dst.Bytes(0, rows.bytes, rows.count, rows.to), BytesOf(src),
             reinterpret_cast<uint8_t*>(dst.Data()), rows, where);
}

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& params, Where where = {}) {
    using namespace emulation;
    const char* opcode = "DataCopy";
    const Rows rows{InRange(params.blockCount, 1, 4095, opcode, "blockCount", where),
                    InRange(params.blockLen, 1, 65535, opcode, "blockLen", where) * kDataBlock,
                    (params.blockLen + InRange(params.srcStride, 0, 65535, opcode, "srcStride", where)) * kDataBlock,
                    (params.blockLen + InRange(params.dstStride, 0, 65535, opcode, "dstStride", where)) * kDataBlock};
    const Span read = src.Bytes(0, rows.bytes, rows.count, rows.from), write = dst.Bytes(0, rows.bytes, rows.count, rows.to);
    const Space from = LocalSpace(read, opcode, where), to = LocalSpace(write, opcode, where);
    const bool vector = from == Space::UB && to == Space::UB, bias = from == Space::L1 && to == Space::BT,
               fix = from == Space::L1 && to == Space::FB;
    Require(vector || bias || fix, 3, where, [&] {
        return std::string("DataCopy between local memories must go UB to UB, L1 to BT or L1 to FB, got ") +
               kSpaceNames[static_cast<int>(from)] + " to " + kSpaceNames[static_cast<int>(to)];
    });
    RequireAligned(read, opcode, where);
    RequireAligned(write, opcode, where);
    CopyRows(vector ? PIPE_V
             : bias ? PIPE_MTE1
                    : PIPE_FIX,
             opcode, read, write, BytesOf(src), reinterpret_cast<uint8_t*>(dst.Data()), rows, where);
}

template <typename Destination, typename Source>
void CopyCount(const Destination& dst, const Source& src, uint64_t bytes, Where where) {
    emulation::Require(bytes > 0 && bytes % emulation::kDataBlock == 0, 5, where, [&] {
        return "DataCopy length must be a positive multiple of 32 bytes, got " + std::to_string(bytes) +
               " (DataCopyPad moves other lengths)";
    });
    DataCopyParams params;
    params.blockLen = bytes / emulation::kDataBlock;
    DataCopy(dst, src, params, where);
}
template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, uint32_t count, Where where = {}) {
    CopyCount(dst, src, uint64_t{count} * sizeof(T), where);
}
template <typename T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count, Where where = {}) {
    CopyCount(dst, src, uint64_t{count} * sizeof(T), where);
}
template <typename T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count, Where where = {}) {
    CopyCount(dst, src, uint64_t{count} * sizeof(T), where);
}

// ---- any length ----

// Every row starts a 32-byte block. What is left of its last block is garbage: it counts as never written.
template <typename T>
void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyExtParams& params,
                 const DataCopyPadExtParams<T>& pad, Where where = {}) {
    using namespace emulation;
    const char* opcode = "DataCopyPad";
    const uint64_t count = InRange(params.blockCount, 1, 4095, opcode, "blockCount", where);
    const uint64_t bytes = InRange(params.blockLen, 1, 2097151, opcode, "blockLen", where);
    const uint64_t from = bytes + InRange(params.srcStride, 0, 4294967295, opcode, "srcStride", where);
    const uint64_t left = InRange(pad.leftPadding, 0, 32 / sizeof(T), opcode, "leftPadding", where) * sizeof(T);
    const uint64_t right = InRange(pad.rightPadding, 0, 32 / sizeof(T), opcode, "rightPadding", where) * sizeof(T);
    const uint64_t row = RoundUpToBlock(left + bytes + right);
    const uint64_t to = row + InRange(params.dstStride, 0, 4294967295, opcode, "dstStride", where) * kDataBlock;
    const Span write = dst.Bytes(0, row, count, to);
    Require(LocalSpace(write, opcode, where) == Space::UB, 3, "DataCopyPad from GM must go to UB", where);
    RequireAligned(write, opcode, where);
    Cost cost;
    cost.bursts = static_cast<uint32_t>(count);
    cost.burstBytes = static_cast<uint32_t>(bytes);
    const uint8_t* source = BytesOf(src);
    uint8_t* target = reinterpret_cast<uint8_t*>(dst.Data());
    const bool isPad = pad.isPad;
    const T value = pad.paddingValue;
    Issue(PIPE_MTE2, opcode, {src.Bytes(0, bytes, count, from)}, {write}, cost, where, [=] {
        for (uint64_t i = 0; i < count; ++i) {
            uint8_t* line = target + i * to;
            std::memset(line, kPoison, row);
            if (isPad) {
                for (uint64_t at = 0; at < left; at += sizeof(T)) std::memcpy(line + at, &value, sizeof(T));
                for (uint64_t at = left + bytes; at < left + bytes + right; at += sizeof(T))
                    std::memcpy(line + at, &value, sizeof(T));
            }
            std::memcpy(line + left, source + i * from, bytes);
        }
    });
    const uint64_t head = isPad ? 0 : left, tail = isPad ? left + bytes + right : left + bytes;
    for (uint64_t i = 0; i < count; ++i) {
        uint8_t* flags = write.memory->written + write.begin + i * to;
        std::memset(flags, 0, head);
        std::memset(flags + tail, 0, row - tail);
    }
}

template <typename T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyExtParams& params, Where where = {}) {
    using namespace emulation;
    const char* opcode = "DataCopyPad";
    const uint64_t bytes = InRange(params.blockLen, 1, 2097151, opcode, "blockLen", where);
    const Rows rows{InRange(params.blockCount, 1, 4095, opcode, "blockCount", where), bytes,
                    RoundUpToBlock(bytes) + InRange(params.srcStride, 0, 4294967295, opcode, "srcStride", where) * kDataBlock,
                    bytes + InRange(params.dstStride, 0, 4294967295, opcode, "dstStride", where)};
    const Span read = src.Bytes(0, rows.bytes, rows.count, rows.from);
    Require(LocalSpace(read, opcode, where) == Space::UB, 3, "DataCopyPad to GM must come from UB", where);
    RequireAligned(read, opcode, where);
    CopyRows(PIPE_MTE3, opcode, read, dst.Bytes(0, rows.bytes, rows.count, rows.to), BytesOf(src),
             reinterpret_cast<uint8_t*>(dst.Data()), rows, where);
}

template <typename T>
void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyParams& params,
                 const DataCopyPadParams& pad, Where where = {}) {
    DataCopyExtParams wide;
    wide.blockCount.value = params.blockCount.value;
    wide.blockLen.value = emulation::InRange(params.blockLen, 1, 65535, "DataCopyPad", "blockLen", where);
    wide.srcStride.value = emulation::InRange(params.srcStride, 0, 65535, "DataCopyPad", "srcStride", where);
    wide.dstStride.value = emulation::InRange(params.dstStride, 0, 65535, "DataCopyPad", "dstStride", where);
    DataCopyPadExtParams<T> padding;
    padding.isPad = pad.isPad;
    padding.leftPadding.value = pad.leftPadding.value;
    padding.rightPadding.value = pad.rightPadding.value;
    std::memcpy(static_cast<void*>(&padding.paddingValue), &pad.paddingValue, sizeof(T));
    DataCopyPad(dst, src, wide, padding, where);
}

template <typename T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& params, Where where = {}) {
    DataCopyExtParams wide;
    wide.blockCount.value = params.blockCount.value;
    wide.blockLen.value = emulation::InRange(params.blockLen, 1, 65535, "DataCopyPad", "blockLen", where);
    wide.srcStride.value = emulation::InRange(params.srcStride, 0, 65535, "DataCopyPad", "srcStride", where);
    wide.dstStride.value = emulation::InRange(params.dstStride, 0, 65535, "DataCopyPad", "dstStride", where);
    DataCopyPad(dst, src, wide, where);
}

// ---- row-major in GM to NZ fractals in L1 ----

// Element (i, j) of matrix p goes to p * dstNzMatrixStride + (j / c0) * dstNzC0Stride * c0 + i * dstNzNStride * c0 + j % c0, with
// c0 = 32 bytes of elements; the last column of blocks is filled up with zeros.
template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const Nd2NzParams& params, Where where = {}) {
    using namespace emulation;
    const char* opcode = "DataCopy(Nd2Nz)";
    constexpr uint64_t c0 = kDataBlock / sizeof(T);
    const uint64_t matrices = InRange(params.ndNum, 0, 4095, opcode, "ndNum", where);
    const uint64_t n = InRange(params.nValue, 0, 16384, opcode, "nValue", where),
                   d = InRange(params.dValue, 0, 65535, opcode, "dValue", where);
    const bool one = matrices <= 1;     // the strides between matrices are not looked at
    const uint64_t sourceMatrix = InRange(params.srcNdMatrixStride, 0, 65535, opcode, "srcNdMatrixStride", where) * sizeof(T);
    const uint64_t sourceRow = InRange(params.srcDValue, 1, 65535, opcode, "srcDValue", where) * sizeof(T);
    const uint64_t column = InRange(params.dstNzC0Stride, 1, 16384, opcode, "dstNzC0Stride", where) * kDataBlock;
    const uint64_t row = InRange(params.dstNzNStride, 1, 16384, opcode, "dstNzNStride", where) * kDataBlock;
    const uint64_t matrix = InRange(params.dstNzMatrixStride, one ? 0 : 1, 65535, opcode, "dstNzMatrixStride", where) * sizeof(T);
    if (matrices == 0 || n == 0 || d == 0) return;
    const uint64_t columns = (d + c0 - 1) / c0;
    Require(LocalSpace(dst.Bytes(0, 0), opcode, where) == Space::L1, 3, "DataCopy(Nd2Nz) must go to L1", where);
    RequireAligned(dst.Bytes(0, 0), opcode, where);
    // One instruction, whatever ndNum. A span has two strides: of matrices whose rows lie apart in L1, each is recorded by itself
    const bool together = n == 1 || row == kDataBlock;
    const uint64_t instructions = together ? 1 : matrices, each = together ? matrices : 1;
    for (uint64_t p = 0; p < instructions; ++p) {
        const Span read = src.Bytes(p * sourceMatrix, d * sizeof(T), n, sourceRow, each, sourceMatrix);
        const Span write = together ? dst.Bytes(0, n * kDataBlock, columns, column, each, matrix)
                                    : dst.Bytes(p * matrix, kDataBlock, n, row, columns, column);
        Cost cost;
        cost.bursts = static_cast<uint32_t>(each * n);
        cost.burstBytes = static_cast<uint32_t>(d * sizeof(T));
        const uint8_t* source = BytesOf(src) + p * sourceMatrix;
        uint8_t* target = reinterpret_cast<uint8_t*>(dst.Data()) + p * matrix;
        Issue(PIPE_MTE2, opcode, {read}, {write}, cost, where, [=] {
            for (uint64_t j = 0; j < each * n; ++j) {
                const uint8_t* from = source + j / n * sourceMatrix + j % n * sourceRow;
                uint8_t* to = target + j / n * matrix + j % n * row;
                for (uint64_t c = 0; c < columns; ++c) {
                    const uint64_t bytes = std::min<uint64_t>(kDataBlock, (d - c * c0) * sizeof(T));
                    std::memcpy(to + c * column, from + c * kDataBlock, bytes);
                    std::memset(to + c * column + bytes, 0, kDataBlock - bytes);
                }
            }
        });
    }
}

// ---- the data cache of the scalar unit ----

template <typename T, CacheLine entireType, DcciDst dcciDst = DcciDst::CACHELINE_OUT>
void DataCacheCleanAndInvalid(const GlobalTensor<T>& dst, Where where = {}) {
    using namespace emulation;
    Core& core = Current();
    if constexpr (entireType == CacheLine::ENTIRE_DATA_CACHE) {
        while (!core.dirtyLines.empty()) {
            const auto [memory, line] = core.dirtyLines.begin()->first;
            CleanLine(core, memory, line, where);
        }
        core.cachedLines.clear();
        core.cacheCleaned = core.issued[kDataCache];
    } else {
        const Span span = dst.Bytes(0, sizeof(T));
        if (span.memory != nullptr) CleanLine(core, span.memory, span.begin / kLine, where);
    }
}

}  // namespace AscendC
