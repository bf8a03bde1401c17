// The vector unit: 256 bytes per iteration ("repeat"), 32-byte data blocks at a stride, a mask over the lanes of an iteration.
//
// Every instruction checks its parameters (rules 2 and 5), tells Issue which bytes it reads and writes, and computes on host
// memory.
// A call has the documented forms: the first `count` elements, or iterations with a mask (number of leading lanes, or bits).
#pragma once

#include "sync.h"
#include "vector_core.h"

namespace AscendC {

constexpr int32_t DEFAULT_BLK_NUM = 8;
constexpr int32_t DEFAULT_BLK_STRIDE = 1;
constexpr uint8_t DEFAULT_REPEAT_STRIDE = 8;
constexpr uint64_t MASK_PLACEHOLDER = 0;

enum class CMPMODE : uint8_t { LT = 0, GT, EQ, LE, GE, NE };
enum class SELMODE : uint8_t { VSEL_CMPMASK_SPR = 0, VSEL_TENSOR_SCALAR_MODE, VSEL_TENSOR_TENSOR_MODE };
enum class MaskMode : uint8_t { NORMAL = 0, COUNTER };
enum class GatherMaskMode : uint8_t { VERSION_V1 = 0, VERSION_V2 = 1 };
constexpr GatherMaskMode defaultGatherMaskMode = GatherMaskMode::VERSION_V2;

struct UnaryRepeatParams {
    UnaryRepeatParams() = default;
    UnaryRepeatParams(uint16_t dstBlkStride, uint16_t srcBlkStride, uint8_t dstRepStride, uint8_t srcRepStride,
                      bool halfBlock = false)
        : dstBlkStride(dstBlkStride), srcBlkStride(srcBlkStride), dstRepStride(dstRepStride), srcRepStride(srcRepStride),
          halfBlock(halfBlock) {}
    uint32_t blockNumber = DEFAULT_BLK_NUM;
    uint16_t dstBlkStride = DEFAULT_BLK_STRIDE, srcBlkStride = DEFAULT_BLK_STRIDE;
    uint8_t dstRepStride = DEFAULT_REPEAT_STRIDE, srcRepStride = DEFAULT_REPEAT_STRIDE;
    bool repeatStrideMode = false, strideSizeMode = false, halfBlock = false;
};

struct BinaryRepeatParams {
    BinaryRepeatParams() = default;
    BinaryRepeatParams(uint8_t dstBlkStride, uint8_t src0BlkStride, uint8_t src1BlkStride, uint8_t dstRepStride,
                       uint8_t src0RepStride, uint8_t src1RepStride)
        : dstBlkStride(dstBlkStride), src0BlkStride(src0BlkStride), src1BlkStride(src1BlkStride), dstRepStride(dstRepStride),
          src0RepStride(src0RepStride), src1RepStride(src1RepStride) {}
    uint32_t blockNumber = DEFAULT_BLK_NUM;
    uint8_t dstBlkStride = DEFAULT_BLK_STRIDE, src0BlkStride = DEFAULT_BLK_STRIDE, src1BlkStride = DEFAULT_BLK_STRIDE;
    uint8_t dstRepStride = DEFAULT_REPEAT_STRIDE, src0RepStride = DEFAULT_REPEAT_STRIDE, src1RepStride = DEFAULT_REPEAT_STRIDE;
    bool repeatStrideMode = false, strideSizeMode = false;
};

struct CopyRepeatParams {
    CopyRepeatParams() = default;
    CopyRepeatParams(uint16_t dstStride, uint16_t srcStride, uint16_t dstRepeatSize, uint16_t srcRepeatSize)
        : dstStride(dstStride), srcStride(srcStride), dstRepeatSize(dstRepeatSize), srcRepeatSize(srcRepeatSize) {}
    uint16_t dstStride = DEFAULT_BLK_STRIDE, srcStride = DEFAULT_BLK_STRIDE;
    uint16_t dstRepeatSize = DEFAULT_REPEAT_STRIDE, srcRepeatSize = DEFAULT_REPEAT_STRIDE;
};

struct BrcbRepeatParams {
    BrcbRepeatParams() = default;
    BrcbRepeatParams(uint16_t dstBlkStride, uint16_t dstRepStride) : dstRepStride(dstRepStride), dstBlkStride(dstBlkStride) {}
    uint32_t blockNumber = DEFAULT_BLK_NUM;
    uint16_t dstRepStride = DEFAULT_REPEAT_STRIDE, dstBlkStride = DEFAULT_BLK_STRIDE;
};

struct GatherMaskParams {
    GatherMaskParams() = default;
    GatherMaskParams(uint8_t src0BlockStride, uint16_t repeatTimes, uint16_t src0RepeatStride, uint8_t src1RepeatStride)
        : src0BlockStride(src0BlockStride), repeatTimes(repeatTimes), src0RepeatStride(src0RepeatStride),
          src1RepeatStride(src1RepeatStride) {}
    uint8_t src0BlockStride = DEFAULT_BLK_STRIDE;
    uint16_t repeatTimes = 0;
    uint16_t src0RepeatStride = DEFAULT_REPEAT_STRIDE;
    uint8_t src1RepeatStride = DEFAULT_REPEAT_STRIDE;
};

}  // namespace AscendC

namespace emulation {

using AscendC::CMPMODE;
using AscendC::GatherMaskParams;
using AscendC::SELMODE;

template <typename T>
void Fill(const char* opcode, const Plan& plan, T value, const LocalTensor<T>& dst, Stride stride, Where where) {
    const auto d = Place(dst, stride, opcode, "dst", where);
    const Spans w = Touched(dst, plan, stride);
    Issue(PIPE_V, opcode, {}, {w[0], w[1], w[2], w[3]}, VectorCost(plan.repeats), where,
          [=] { Run(plan, [=] { return value; }, d); });
}

// As the library does it: the scalar pipe writes the first `byScalar` lanes of the first iteration, the vector unit goes on from
// there by Adds, block by block and then iteration by iteration.
template <typename T>
void Index(const Plan& plan, T first, uint32_t byScalar, const LocalTensor<T>& dst, Stride stride, Where where) {
    constexpr uint32_t perBlock = kBlock / sizeof(T);
    const auto value = [=](uint32_t i) { return Compute<T>([](auto a, auto b) { return a + b; }, first, static_cast<T>(i)); };
    const auto d = Place(dst, stride, "CreateVecIndex", "dst", where);
    if (plan.repeats == 0) return;
    const Spans w = Touched(dst, plan, stride);
    const Mask& mask = plan.repeats == 1 ? plan.last : plan.mask;
    uint32_t used = 0;
    for (uint32_t lane = 0; lane < plan.lanes; ++lane) {
        if (!(((lane < 64 ? mask.low : mask.high) >> lane % 64) & 1)) continue;
        used = lane + 1;
        if (lane < byScalar) dst.SetValue(lane / perBlock * stride.block * perBlock + lane % perBlock, value(lane), where);
    }
    const int32_t event = AscendC::GetTPipePtr()->FetchEventID(AscendC::HardEvent::S_V, where);
    AscendC::SetFlag<AscendC::HardEvent::S_V>(event, where);
    AscendC::WaitFlag<AscendC::HardEvent::S_V>(event, where);
    const uint32_t blocks = used > byScalar ? (used - byScalar + perBlock - 1) / perBlock : 0;
    if (blocks + plan.repeats == 1) return;
    Issue(PIPE_V, "CreateVecIndex", {}, {w[0], w[1], w[2], w[3]}, VectorCost(blocks + plan.repeats - 1), where,
          [=] { ForEachLane(plan, [&](uint32_t r, uint32_t lane) { *d.At(r, lane) = value(r * plan.lanes + lane); }); });
}

template <typename T>
void Broadcast(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint32_t repeats, Stride stride, Where where) {
    const auto d = Place(dst, stride, "Brcb", "dst", where);
    const auto s = Place(src, {}, "Brcb", "src", where);
    Require(stride.block > 0, 5, "Brcb dstBlkStride must be at least 1, got 0", where);
    const Span read = Piece(src.Whole(), 0, repeats * 8 * sizeof(T));
    const Span write = Piece(dst.Whole(), 0, repeats ? kBlock : 0, 8, stride.block * kBlock, repeats, stride.repeat * kBlock);
    CheckApart("Brcb", write, read, where);
    Issue(PIPE_V, "Brcb", {read}, {write}, VectorCost(repeats), where, [=] {
        constexpr uint32_t perBlock = kBlock / sizeof(T);
        for (uint32_t r = 0; r < repeats; ++r) {
            for (uint32_t b = 0; b < 8; ++b) std::fill_n(d.At(r, b * perBlock), perBlock, s.data[r * 8 + b]);
        }
    });
}

template <typename T>
void GatherElements(const Plan& plan, const LocalTensor<T>& dst, Stride stride, const LocalTensor<T>& src,
                    const LocalTensor<uint32_t>& offset, uint32_t base, Where where) {
    const auto d = Place(dst, stride, "Gather", "dst", where);
    const auto s = Place(src, {}, "Gather", "src", where);
    const auto o = Place(offset, Dense<uint32_t>(plan.lanes), "Gather", "srcOffset", where);
    ExecuteAll(Current());  // the offsets decide what is read
    uint64_t low = ~0ull, high = 0;
    ForEachLane(plan, [&](uint32_t r, uint32_t lane) {
        const uint64_t at = uint64_t{base} + *o.At(r, lane);
        Require(at % sizeof(T) == 0, 5, where, [&] {
            return "Gather srcOffset must be a multiple of " + std::to_string(sizeof(T)) + " bytes, got " + std::to_string(at);
        });
        low = std::min(low, at);
        high = std::max(high, at + sizeof(T));
    });
    if (high == 0) return;
    const Span read = Piece(src.Whole(), low, high - low);
    const Spans w = Touched(dst, plan, stride), a = Touched(offset, plan, o.stride);
    for (const Span& span : w) CheckApart("Gather", span, read, where);
    Issue(PIPE_V, "Gather", {read, a[0], a[1], a[2], a[3]}, {w[0], w[1], w[2], w[3]}, VectorCost(plan.repeats), where, [=] {
        ForEachLane(plan, [&](uint32_t r, uint32_t lane) { *d.At(r, lane) = s.data[(base + *o.At(r, lane)) / sizeof(T)]; });
    });
}

// ---- GatherMask ----

template <typename T>
struct Packing {
    Operand<T> dst, src;
    uint32_t repeats, perRepeat;  // elements of an iteration
};

template <typename T>
Packing<T> CheckPacking(const LocalTensor<T>& dst, const LocalTensor<T>& src0, bool reduceMode, uint32_t mask,
                        const GatherMaskParams& p, Where where) {
    const auto d = Place(dst, {}, "GatherMask", "dst", where);
    const auto s = Place(src0, {p.src0BlockStride, p.src0RepeatStride}, "GatherMask", "src0", where);
    Require(!reduceMode || mask > 0, 5, "GatherMask mask must be at least 1 in counter mode, got 0", where);
    CheckRepeats(p.repeatTimes, "GatherMask", where);
    maskRegister = {false, {mask, 0}};
    return {d, s, p.repeatTimes, reduceMode ? mask : static_cast<uint32_t>(kIteration / sizeof(T))};
}

template <typename T, typename Selected>
uint64_t Pack(const Packing<T>& packing, Selected selected) {
    uint64_t count = 0;
    for (uint32_t r = 0; r < packing.repeats; ++r) {
        for (uint32_t i = 0; i < packing.perRepeat; ++i) {
            if (selected(r, i)) packing.dst.data[count++] = *packing.src.At(r, i);
        }
    }
    return count;
}

template <typename T>
void CheckPackingOverlap(const Span& write, const Span& read, Where where) {
    if (write.begin != read.begin) CheckApart("GatherMask", write, read, where);
}

template <typename T>
void PackByPattern(const LocalTensor<T>& dst, const LocalTensor<T>& src0, uint8_t pattern, bool reduceMode, uint32_t mask,
                   const GatherMaskParams& p, uint64_t& rsvdCnt, Where where) {
    const Packing<T> packing = CheckPacking(dst, src0, reduceMode, mask, p, where);
    const bool all = pattern == 7, second = pattern <= 2;
    const uint32_t step = all ? 1 : (second ? 2 : 4), first = all ? 0 : (second ? pattern - 1 : pattern - 3);
    const uint32_t each = packing.perRepeat > first ? (packing.perRepeat - first + step - 1) / step : 0;
    const uint64_t rowStride = uint64_t{p.src0RepeatStride} * kBlock;
    Span read;
    if (p.src0BlockStride == 1) {
        read = Piece(src0.Whole(), first * sizeof(T), sizeof(T), each, step * sizeof(T), packing.repeats, rowStride);
    } else {
        read = Piece(src0.Whole(), 0, kBlock, (packing.perRepeat * sizeof(T) + kBlock - 1) / kBlock, p.src0BlockStride * kBlock,
                     packing.repeats, rowStride);
    }
    const Span write = Piece(dst.Whole(), 0, uint64_t{each} * packing.repeats * sizeof(T));
    CheckPackingOverlap<T>(write, read, where);
    uint64_t* count = &rsvdCnt;
    Issue(PIPE_V, "GatherMask", {read}, {write}, VectorCost(packing.repeats), where,
          [=] { *count = Pack(packing, [&](uint32_t, uint32_t i) { return i % step == first; }); });
    Finish(PIPE_V, where);
}

template <typename T, typename U>
void PackByMask(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<U>& bits, bool reduceMode, uint32_t mask,
                const GatherMaskParams& p, uint64_t& rsvdCnt, Where where) {
    const Packing<T> packing = CheckPacking(dst, src0, reduceMode, mask, p, where);
    const auto b = Place(bits, {1, p.src1RepeatStride}, "GatherMask", "src1Pattern", where);
    const auto* bytes = reinterpret_cast<const uint8_t*>(b.data);
    const uint64_t bitStride = uint64_t{p.src1RepeatStride} * kBlock, bitBytes = (packing.perRepeat + 7) / 8;
    const auto selected = [=](uint32_t r, uint32_t i) { return bytes[r * bitStride + i / 8] >> (i % 8) & 1; };
    ExecuteAll(Current());  // the mask decides how much is written
    uint64_t selectedCount = 0;
    for (uint32_t r = 0; r < packing.repeats; ++r) {
        for (uint32_t i = 0; i < packing.perRepeat; ++i) selectedCount += selected(r, i);
    }
    const uint32_t blocks = (packing.perRepeat * sizeof(T) + kBlock - 1) / kBlock;
    const Span read = p.src0BlockStride == 1
        ? Piece(src0.Whole(), 0, packing.perRepeat * sizeof(T), 1, 0, packing.repeats, uint64_t{p.src0RepeatStride} * kBlock)
        : Piece(src0.Whole(), 0, kBlock, blocks, p.src0BlockStride * kBlock, packing.repeats,
                uint64_t{p.src0RepeatStride} * kBlock);
    const Span readBits = Piece(bits.Whole(), 0, bitBytes, 1, 0, packing.repeats, bitStride);
    const Span write = Piece(dst.Whole(), 0, selectedCount * sizeof(T));
    CheckPackingOverlap<T>(write, read, where);
    CheckApart("GatherMask", write, readBits, where);
    uint64_t* count = &rsvdCnt;
    Issue(PIPE_V, "GatherMask", {read, readBits}, {write}, VectorCost(packing.repeats), where,
          [=] { *count = Pack(packing, selected); });
    Finish(PIPE_V, where);
}

// ---- Compare and Select ----

template <typename T>
uint32_t WholeIterations(uint32_t count, Where where) {
    Require(count * sizeof(T) % kIteration == 0, 5, where, [&] {
        return "Compare count must cover a multiple of 256 bytes, got " + std::to_string(count) + " elements of " +
            std::to_string(sizeof(T));
    });
    return static_cast<uint32_t>(count * sizeof(T) / kIteration);
}

template <typename T>
bool Holds(CMPMODE mode, T a, T b) {
    const auto x = ComparedAs(a), y = ComparedAs(b);
    switch (mode) {
        case CMPMODE::LT: return x < y;
        case CMPMODE::GT: return x > y;
        case CMPMODE::EQ: return x == y;
        case CMPMODE::LE: return x <= y;
        case CMPMODE::GE: return x >= y;
        default: return x != y;
    }
}

template <typename T, typename U>
void CheckCompare(CMPMODE mode, Where where) {
    static_assert(isOneOf<T, half, float, int32_t>, "Compare on dav-2201 takes half, float, and int32_t for EQ");
    static_assert(isOneOf<U, int8_t, uint8_t>, "Compare on dav-2201 writes int8_t or uint8_t");
    Require(!std::is_same_v<T, int32_t> || mode == CMPMODE::EQ, 5, "Compare cmpMode must be EQ for int32_t", where);
    Require(!maskRegister.counter, 5, "Compare must be in normal mask mode, got count mode left over: call SetMaskNorm", where);
}

template <typename T, typename Right>
void StoreBits(uint32_t repeats, CMPMODE mode, uint8_t* bits, Operand<T> left, Right right) {
    constexpr uint32_t lanes = LanesOf<T>();
    for (uint32_t r = 0; r < repeats; ++r) {
        for (uint32_t byte = 0; byte < lanes / 8; ++byte) {
            uint32_t value = 0;
            for (uint32_t i = 0; i < 8; ++i) value |= Holds(mode, *left.At(r, byte * 8 + i), right(r, byte * 8 + i)) << i;
            bits[r * (lanes / 8) + byte] = static_cast<uint8_t>(value);
        }
    }
}

template <typename T, typename U>
void CompareTensors(const LocalTensor<U>& dst, const LocalTensor<T>& src0, Stride stride0, const LocalTensor<T>& src1,
                    Stride stride1, CMPMODE mode, RepeatTimes repeatTime, Where where) {
    CheckCompare<T, U>(mode, where);
    constexpr uint32_t lanes = LanesOf<T>();
    const Plan plan{lanes, CheckRepeats(repeatTime, "Compare", where), LeadingLanes(lanes), LeadingLanes(lanes)};
    const auto d = Place(dst, {}, "Compare", "dst", where);
    const auto s0 = Place(src0, stride0, "Compare", "src0", where);
    const auto s1 = Place(src1, stride1, "Compare", "src1", where);
    const Spans a = Touched(src0, plan, stride0), b = Touched(src1, plan, stride1);
    const Span write = Piece(dst.Whole(), 0, uint64_t{plan.repeats} * lanes / 8);
    for (const Span& span : a) CheckApart("Compare", write, span, where);
    for (const Span& span : b) CheckApart("Compare", write, span, where);
    Issue(PIPE_V, "Compare", {a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]}, {write}, VectorCost(plan.repeats), where, [=] {
        StoreBits(plan.repeats, mode, reinterpret_cast<uint8_t*>(d.data), s0,
                  [&](uint32_t r, uint32_t lane) { return *s1.At(r, lane); });
    });
}

template <typename T, typename U>
void CompareWithScalar(const char* opcode, const LocalTensor<U>& dst, const LocalTensor<T>& src, Stride stride, T scalar,
                       CMPMODE mode, RepeatTimes repeatTime, Where where) {
    CheckCompare<T, U>(mode, where);
    constexpr uint32_t lanes = LanesOf<T>();
    const Plan plan{lanes, CheckRepeats(repeatTime, opcode, where), LeadingLanes(lanes), LeadingLanes(lanes)};
    const auto d = Place(dst, {}, opcode, "dst", where);
    const auto s = Place(src, stride, opcode, "src0", where);
    const Spans a = Touched(src, plan, stride);
    const Span write = Piece(dst.Whole(), 0, uint64_t{plan.repeats} * lanes / 8);
    for (const Span& span : a) CheckApart(opcode, write, span, where);
    Issue(PIPE_V, opcode, {a[0], a[1], a[2], a[3]}, {write}, VectorCost(plan.repeats), where, [=] {
        StoreBits(plan.repeats, mode, reinterpret_cast<uint8_t*>(d.data), s, [&](uint32_t, uint32_t) { return scalar; });
    });
}

// dst = bit ? src0 : src1. Mode 0 uses the first iteration's bits for all of them; modes 1 and 2 go on through the bits.
template <typename T, typename Right>
void Choose(const Plan& plan, bool sameBits, const uint8_t* bits, Operand<T> dst, Operand<T> left, Right right) {
    ForEachLane(plan, [&](uint32_t r, uint32_t lane) {
        const uint64_t bit = sameBits ? lane : uint64_t{r} * plan.lanes + lane;
        *dst.At(r, lane) = bits[bit / 8] >> (bit % 8) & 1 ? *left.At(r, lane) : right(r, lane);
    });
}

inline uint64_t SelectedBytes(const Plan& plan, bool sameBits) {
    if (plan.repeats == 0) return 0;
    const uint64_t end = ActiveLanes(plan.last).second;
    return sameBits ? plan.lanes / 8 : (uint64_t{plan.repeats - 1} * plan.lanes + end + 7) / 8;
}

template <typename T, typename U>
void SelectTensors(const Plan& plan, const LocalTensor<T>& dst, Stride dstStride, const LocalTensor<U>& selMask,
                   const LocalTensor<T>& src0, Stride stride0, const LocalTensor<T>& src1, Stride stride1, SELMODE mode,
                   Where where) {
    static_assert(isOneOf<T, half, float>, "Select on dav-2201 takes half or float");
    static_assert(isOneOf<U, uint8_t, uint16_t, uint32_t, uint64_t>, "Select's mask is uint8_t, uint16_t, uint32_t or uint64_t");
    Require(mode != SELMODE::VSEL_TENSOR_SCALAR_MODE, 5,
            "Select of two tensors must use VSEL_CMPMASK_SPR or VSEL_TENSOR_TENSOR_MODE", where);
    const bool sameBits = mode == SELMODE::VSEL_CMPMASK_SPR;
    if (!sameBits) NeedOwnUb(where);
    const auto d = Place(dst, dstStride, "Select", "dst", where);
    const auto s0 = Place(src0, stride0, "Select", "src0", where);
    const auto s1 = Place(src1, stride1, "Select", "src1", where);
    const auto m = Place(selMask, {}, "Select", "selMask", where);
    CheckOverlap(plan, d, s0, false, "Select", where);
    CheckOverlap(plan, d, s1, false, "Select", where);
    const Spans w = Touched(dst, plan, dstStride), a = Touched(src0, plan, stride0), b = Touched(src1, plan, stride1);
    const Span bits = Piece(selMask.Whole(), 0, SelectedBytes(plan, sameBits));
    Issue(PIPE_V, "Select", {a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], bits}, {w[0], w[1], w[2], w[3]},
          VectorCost(plan.repeats), where, [=] {
              Choose(plan, sameBits, reinterpret_cast<const uint8_t*>(m.data), d, s0,
                     [&](uint32_t r, uint32_t lane) { return *s1.At(r, lane); });
          });
}

template <typename T, typename U>
void SelectScalar(const Plan& plan, const LocalTensor<T>& dst, Stride dstStride, const LocalTensor<U>& selMask,
                  const LocalTensor<T>& src0, Stride stride0, T scalar, SELMODE mode, Where where) {
    static_assert(isOneOf<T, half, float>, "Select on dav-2201 takes half or float");
    static_assert(isOneOf<U, uint8_t, uint16_t, uint32_t, uint64_t>, "Select's mask is uint8_t, uint16_t, uint32_t or uint64_t");
    Require(mode == SELMODE::VSEL_TENSOR_SCALAR_MODE, 5, "Select of a tensor and a scalar must use VSEL_TENSOR_SCALAR_MODE",
            where);
    NeedOwnUb(where);
    const auto d = Place(dst, dstStride, "Select", "dst", where);
    const auto s = Place(src0, stride0, "Select", "src0", where);
    const auto m = Place(selMask, {}, "Select", "selMask", where);
    CheckOverlap(plan, d, s, false, "Select", where);
    const Spans w = Touched(dst, plan, dstStride), a = Touched(src0, plan, stride0);
    const Span bits = Piece(selMask.Whole(), 0, SelectedBytes(plan, false));
    Issue(PIPE_V, "Select", {a[0], a[1], a[2], a[3], bits}, {w[0], w[1], w[2], w[3]}, VectorCost(plan.repeats), where, [=] {
        Choose(plan, false, reinterpret_cast<const uint8_t*>(m.data), d, s, [&](uint32_t, uint32_t) { return scalar; });
    });
}

template <typename T, typename U>
void MulAdd(const char* opcode, const Plan& plan, const LocalTensor<T>& dst, Stride dstStride, const LocalTensor<U>& src0,
            Stride stride0, const LocalTensor<U>& src1, Stride stride1, Where where) {
    const auto d = Place(dst, dstStride, opcode, "dst", where);
    const auto s0 = Place(src0, stride0, opcode, "src0", where);
    const auto s1 = Place(src1, stride1, opcode, "src1", where);
    CheckOverlap(plan, d, s0, false, opcode, where);
    CheckOverlap(plan, d, s1, false, opcode, where);
    const Spans w = Touched(dst, plan, dstStride), a = Touched(src0, plan, stride0), b = Touched(src1, plan, stride1);
    Issue(PIPE_V, opcode, {a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], w[0], w[1], w[2], w[3]}, {w[0], w[1], w[2], w[3]},
          VectorCost(plan.repeats), where,
          [=] { Run(plan, [](U x, U y, T z) { return Narrow<T>(Widen(x) * Widen(y) + Widen(z)); }, d, s0, s1, d); });
}

}  // namespace emulation

namespace AscendC {

inline void SetMaskCount() { emulation::maskRegister.counter = true; }
inline void SetMaskNorm() { emulation::maskRegister.counter = false; }
inline void ResetMask() { emulation::maskRegister.mask = {}; }
template <typename T, MaskMode mode = MaskMode::NORMAL>
void SetVectorMask(const uint64_t maskHigh, const uint64_t maskLow) {
    emulation::maskRegister.mask = {maskLow, maskHigh};
}
template <typename T, MaskMode mode = MaskMode::NORMAL>
void SetVectorMask(int32_t len) {
    emulation::maskRegister.mask =
        mode == MaskMode::COUNTER ? emulation::Mask{static_cast<uint64_t>(len), 0} : emulation::LeadingLanes(len);
}

// ---- two sources ----

#define EMULATION_BINARY(NAME, ACCUMULATES, ...) \
    template <typename T, bool isSetMask = true> \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, uint64_t mask[], \
              RepeatTimes repeatTime, const BinaryRepeatParams& p, Where where = {}) { \
        EMULATION_TAKES(NAME, __VA_ARGS__); \
        emulation::Binary(#NAME, EMULATION_BITS(NAME, T), emulation::ops::NAME{}, dst, {p.dstBlkStride, p.dstRepStride}, src0, \
                          {p.src0BlkStride, p.src0RepStride}, src1, {p.src1BlkStride, p.src1RepStride}, ACCUMULATES, where); \
    } \
    template <typename T, bool isSetMask = true> \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, uint64_t mask, \
              RepeatTimes repeatTime, const BinaryRepeatParams& p, Where where = {}) { \
        EMULATION_TAKES(NAME, __VA_ARGS__); \
        emulation::Binary(#NAME, EMULATION_LEADING(NAME, T), emulation::ops::NAME{}, dst, {p.dstBlkStride, p.dstRepStride}, \
                          src0, {p.src0BlkStride, p.src0RepStride}, src1, {p.src1BlkStride, p.src1RepStride}, ACCUMULATES, \
                          where); \
    } \
    template <typename T> \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, const int32_t& count, \
              Where where = {}) { \
        EMULATION_TAKES(NAME, __VA_ARGS__); \
        emulation::Binary(#NAME, EMULATION_COUNT(NAME, T), emulation::ops::NAME{}, dst, {}, src0, {}, src1, {}, false, where); \
    }
EMULATION_BINARY(Add, true, half, float, int16_t, int32_t)
EMULATION_BINARY(Sub, true, half, float, int16_t, int32_t)
EMULATION_BINARY(Mul, true, half, float, int16_t, int32_t)
EMULATION_BINARY(Max, true, half, float, int16_t, int32_t)
EMULATION_BINARY(Min, true, half, float, int16_t, int32_t)
EMULATION_BINARY(Div, false, half, float)
EMULATION_BINARY(And, false, int16_t, uint16_t)
EMULATION_BINARY(Or, false, int16_t, uint16_t)
#undef EMULATION_BINARY

// ---- one source ----

#define EMULATION_UNARY(NAME, ...) \
    template <typename T, bool isSetMask = true> \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint64_t mask[], RepeatTimes repeatTime, \
              const UnaryRepeatParams& p, Where where = {}) { \
        EMULATION_TAKES(NAME, __VA_ARGS__); \
        emulation::Unary(#NAME, EMULATION_BITS(NAME, T), emulation::ops::NAME{}, dst, {p.dstBlkStride, p.dstRepStride}, src, \
                         {p.srcBlkStride, p.srcRepStride}, where); \
    } \
    template <typename T, bool isSetMask = true> \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint64_t mask, RepeatTimes repeatTime, \
              const UnaryRepeatParams& p, Where where = {}) { \
        EMULATION_TAKES(NAME, __VA_ARGS__); \
        emulation::Unary(#NAME, EMULATION_LEADING(NAME, T), emulation::ops::NAME{}, dst, {p.dstBlkStride, p.dstRepStride}, src, \
                         {p.srcBlkStride, p.srcRepStride}, where); \
    } \
    template <typename T> \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count, Where where = {}) { \
        EMULATION_TAKES(NAME, __VA_ARGS__); \
        emulation::Unary(#NAME, EMULATION_COUNT(NAME, T), emulation::ops::NAME{}, dst, {}, src, {}, where); \
    }
EMULATION_UNARY(Relu, half, float, int32_t)
EMULATION_UNARY(Abs, half, float)
EMULATION_UNARY(Exp, half, float)
EMULATION_UNARY(Ln, half, float)
EMULATION_UNARY(Sqrt, half, float)
EMULATION_UNARY(Rsqrt, half, float)
EMULATION_UNARY(Reciprocal, half, float)
EMULATION_UNARY(Not, int16_t, uint16_t)
#undef EMULATION_UNARY

// ---- a source and a scalar ----

#define EMULATION_SCALAR(NAME, OPERATOR, ...) \
    template <typename T, bool isSetMask = true> \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalarValue, uint64_t mask[], \
              RepeatTimes repeatTime, const UnaryRepeatParams& p, Where where = {}) { \
        EMULATION_TAKES(NAME, __VA_ARGS__); \
        emulation::Unary( \
            #NAME, EMULATION_BITS(NAME, T), [scalarValue](T x) { return emulation::ops::OPERATOR{}(x, scalarValue); }, dst, \
            {p.dstBlkStride, p.dstRepStride}, src, {p.srcBlkStride, p.srcRepStride}, where); \
    } \
    template <typename T, bool isSetMask = true> \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalarValue, uint64_t mask, RepeatTimes repeatTime, \
              const UnaryRepeatParams& p, Where where = {}) { \
        EMULATION_TAKES(NAME, __VA_ARGS__); \
        emulation::Unary( \
            #NAME, EMULATION_LEADING(NAME, T), [scalarValue](T x) { return emulation::ops::OPERATOR{}(x, scalarValue); }, dst, \
            {p.dstBlkStride, p.dstRepStride}, src, {p.srcBlkStride, p.srcRepStride}, where); \
    } \
    template <typename T, bool isSetMask = true> \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalarValue, const int32_t& count, \
              Where where = {}) { \
        EMULATION_TAKES(NAME, __VA_ARGS__); \
        static_assert(isSetMask, #NAME " with a count and the mask register is not emulated"); \
        emulation::Unary( \
            #NAME, EMULATION_COUNT(NAME, T), [scalarValue](T x) { return emulation::ops::OPERATOR{}(x, scalarValue); }, dst, {}, \
            src, {}, where); \
    }
EMULATION_SCALAR(Adds, Add, half, float, int16_t, int32_t)
EMULATION_SCALAR(Muls, Mul, half, float, int16_t, int32_t)
EMULATION_SCALAR(Maxs, Max, half, float, int16_t, int32_t)
EMULATION_SCALAR(Mins, Min, half, float, int16_t, int32_t)
EMULATION_SCALAR(ShiftLeft, ShiftLeft, int16_t, uint16_t, int32_t, uint32_t)
EMULATION_SCALAR(ShiftRight, ShiftRight, int16_t, uint16_t, int32_t, uint32_t)
#undef EMULATION_SCALAR

// ---- dst = src * scalar + dst, dst = src0 * src1 + dst ----

#define EMULATION_AXPY(PLAN, DST, SRC) \
    static_assert( \
        (std::is_same_v<T, U> && emulation::isOneOf<T, half, float>) || (std::is_same_v<T, float> && std::is_same_v<U, half>), \
        "Axpy on dav-2201 takes half, float, or half into float"); \
    emulation::Binary( \
        "Axpy", PLAN, \
        [scalarValue](U x, T y) { \
            return emulation::Narrow<T>(emulation::Widen(x) * emulation::Widen(scalarValue) + emulation::Widen(y)); \
        }, \
        dst, DST, src, SRC, dst, DST, false, where)
template <typename T, typename U, bool isSetMask = true>
void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalarValue, uint64_t mask[], RepeatTimes repeatTime,
          const UnaryRepeatParams& p, Where where = {}) {
    EMULATION_AXPY(EMULATION_BITS(Axpy, T, U), (emulation::Stride{p.dstBlkStride, p.dstRepStride}),
                   (emulation::Stride{p.srcBlkStride, p.srcRepStride}));
}
template <typename T, typename U, bool isSetMask = true>
void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalarValue, uint64_t mask, RepeatTimes repeatTime,
          const UnaryRepeatParams& p, Where where = {}) {
    EMULATION_AXPY(EMULATION_LEADING(Axpy, T, U), (emulation::Stride{p.dstBlkStride, p.dstRepStride}),
                   (emulation::Stride{p.srcBlkStride, p.srcRepStride}));
}
template <typename T, typename U>
void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalarValue, const int32_t& count, Where where = {}) {
    EMULATION_AXPY(EMULATION_COUNT(Axpy, T, U), emulation::Stride{}, emulation::Dense<U>(emulation::LanesOf<T>()));
}
#undef EMULATION_AXPY

#define EMULATION_MUL_ADD_DST(PLAN, DST, SRC0, SRC1) \
    static_assert( \
        (std::is_same_v<T, U> && emulation::isOneOf<T, half, float>) || (std::is_same_v<T, float> && std::is_same_v<U, half>), \
        "MulAddDst on dav-2201 takes half, float, or half into float"); \
    emulation::MulAdd("MulAddDst", PLAN, dst, DST, src0, SRC0, src1, SRC1, where)
template <typename T, typename U, bool isSetMask = true>
void MulAddDst(const LocalTensor<T>& dst, const LocalTensor<U>& src0, const LocalTensor<U>& src1, const uint64_t mask[],
               RepeatTimes repeatTime, const BinaryRepeatParams& p, Where where = {}) {
    EMULATION_MUL_ADD_DST(EMULATION_BITS(MulAddDst, T, U), (emulation::Stride{p.dstBlkStride, p.dstRepStride}),
                          (emulation::Stride{p.src0BlkStride, p.src0RepStride}),
                          (emulation::Stride{p.src1BlkStride, p.src1RepStride}));
}
template <typename T, typename U, bool isSetMask = true>
void MulAddDst(const LocalTensor<T>& dst, const LocalTensor<U>& src0, const LocalTensor<U>& src1, uint64_t mask,
               RepeatTimes repeatTime, const BinaryRepeatParams& p, Where where = {}) {
    EMULATION_MUL_ADD_DST(EMULATION_LEADING(MulAddDst, T, U), (emulation::Stride{p.dstBlkStride, p.dstRepStride}),
                          (emulation::Stride{p.src0BlkStride, p.src0RepStride}),
                          (emulation::Stride{p.src1BlkStride, p.src1RepStride}));
}
template <typename T, typename U>
void MulAddDst(const LocalTensor<T>& dst, const LocalTensor<U>& src0, const LocalTensor<U>& src1, const int32_t& count,
               Where where = {}) {
    EMULATION_MUL_ADD_DST(EMULATION_COUNT(MulAddDst, T, U), emulation::Stride{}, emulation::Dense<U>(emulation::LanesOf<T>()),
                          emulation::Dense<U>(emulation::LanesOf<T>()));
}
#undef EMULATION_MUL_ADD_DST

// ---- Cast ----

#define EMULATION_CAST(PLAN, DST, SRC) \
    static_assert(emulation::castSupported<T, U>, "this pair of types is not one that Cast converts on dav-2201"); \
    emulation::Require( \
        emulation::CastAllows<T, U>(roundMode), 5, \
        "Cast roundMode must be one that this pair of types supports, got " + std::to_string(static_cast<int>(roundMode)), \
        where); \
    const RoundMode mode = roundMode; \
    emulation::Unary("Cast", PLAN, [mode](U x) { return emulation::Convert<T>(x, mode); }, dst, DST, src, SRC, where)
template <typename T, typename U, bool isSetMask = true>
void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& roundMode, const uint64_t mask[],
          RepeatTimes repeatTime, const UnaryRepeatParams& p, Where where = {}) {
    EMULATION_CAST(EMULATION_BITS(Cast, T, U), (emulation::Stride{p.dstBlkStride, p.dstRepStride}),
                   (emulation::Stride{p.srcBlkStride, p.srcRepStride}));
}
template <typename T, typename U, bool isSetMask = true>
void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& roundMode, const uint64_t mask,
          RepeatTimes repeatTime, const UnaryRepeatParams& p, Where where = {}) {
    EMULATION_CAST(EMULATION_LEADING(Cast, T, U), (emulation::Stride{p.dstBlkStride, p.dstRepStride}),
                   (emulation::Stride{p.srcBlkStride, p.srcRepStride}));
}
template <typename T, typename U>
void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& roundMode, const uint32_t count,
          Where where = {}) {
    EMULATION_CAST(EMULATION_COUNT(Cast, T, U), (emulation::Dense<T>(emulation::LanesOf<T, U>())),
                   (emulation::Dense<U>(emulation::LanesOf<T, U>())));
}
#undef EMULATION_CAST

// ---- moving and filling ----

template <typename T, bool isSetMask = true>
void Copy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint64_t mask[], RepeatTimes repeatTime,
          const CopyRepeatParams& p, Where where = {}) {
    EMULATION_TAKES(Copy, half, bfloat16_t, int16_t, uint16_t, float, int32_t, uint32_t);
    emulation::Unary(
        "Copy", EMULATION_BITS(Copy, T), [](T x) { return x; }, dst, {p.dstStride, p.dstRepeatSize}, src,
        {p.srcStride, p.srcRepeatSize}, where);
}
template <typename T, bool isSetMask = true>
void Copy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint64_t mask, RepeatTimes repeatTime,
          const CopyRepeatParams& p, Where where = {}) {
    EMULATION_TAKES(Copy, half, bfloat16_t, int16_t, uint16_t, float, int32_t, uint32_t);
    emulation::Unary(
        "Copy", EMULATION_LEADING(Copy, T), [](T x) { return x; }, dst, {p.dstStride, p.dstRepeatSize}, src,
        {p.srcStride, p.srcRepeatSize}, where);
}

template <typename T, bool isSetMask = true>
void Duplicate(const LocalTensor<T>& dst, const T& scalarValue, uint64_t mask, RepeatTimes repeatTime,
               const uint16_t dstBlockStride, const uint8_t dstRepeatStride, Where where = {}) {
    EMULATION_TAKES(Duplicate, half, bfloat16_t, int16_t, uint16_t, float, int32_t, uint32_t);
    emulation::Fill("Duplicate", EMULATION_LEADING(Duplicate, T), scalarValue, dst, {dstBlockStride, dstRepeatStride}, where);
}
template <typename T, bool isSetMask = true>
void Duplicate(const LocalTensor<T>& dst, const T& scalarValue, uint64_t mask[], RepeatTimes repeatTime,
               const uint16_t dstBlockStride, const uint8_t dstRepeatStride, Where where = {}) {
    EMULATION_TAKES(Duplicate, half, bfloat16_t, int16_t, uint16_t, float, int32_t, uint32_t);
    emulation::Fill("Duplicate", EMULATION_BITS(Duplicate, T), scalarValue, dst, {dstBlockStride, dstRepeatStride}, where);
}
template <typename T>
void Duplicate(const LocalTensor<T>& dst, const T& scalarValue, const int32_t& count, Where where = {}) {
    EMULATION_TAKES(Duplicate, half, bfloat16_t, int16_t, uint16_t, float, int32_t, uint32_t);
    emulation::Fill("Duplicate", EMULATION_COUNT(Duplicate, T), scalarValue, dst, {}, where);
}

// dst[i] = firstValue + i; in the iteration form i counts the lanes of all iterations, masked ones included.
template <typename T>
void CreateVecIndex(LocalTensor<T>& dst, const T& firstValue, uint64_t mask, RepeatTimes repeatTime, uint16_t dstBlkStride,
                    uint8_t dstRepStride, Where where = {}) {
    constexpr bool isSetMask = true;
    EMULATION_TAKES(CreateVecIndex, half, float, int16_t, int32_t);
    emulation::Index(EMULATION_LEADING(CreateVecIndex, T), firstValue, emulation::kBlock / sizeof(T), dst,
                     {dstBlkStride, dstRepStride}, where);
}
template <typename T>
void CreateVecIndex(LocalTensor<T>& dst, const T& firstValue, uint64_t mask[], RepeatTimes repeatTime, uint16_t dstBlkStride,
                    uint8_t dstRepStride, Where where = {}) {
    constexpr bool isSetMask = true;
    EMULATION_TAKES(CreateVecIndex, half, float, int16_t, int32_t);
    emulation::Index(EMULATION_BITS(CreateVecIndex, T), firstValue, emulation::LanesOf<T>(), dst, {dstBlkStride, dstRepStride},
                     where);
}
template <typename T>
void CreateVecIndex(LocalTensor<T> dst, const T& firstValue, uint32_t count, Where where = {}) {
    EMULATION_TAKES(CreateVecIndex, half, float, int16_t, int32_t);
    emulation::Index(EMULATION_COUNT(CreateVecIndex, T), firstValue, emulation::kBlock / sizeof(T), dst, {}, where);
}

// Each of 8 elements per iteration fills one 32-byte block.
template <typename T>
void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src, RepeatTimes repeatTime, const BrcbRepeatParams& p,
          Where where = {}) {
    EMULATION_TAKES(Brcb, half, bfloat16_t, int16_t, uint16_t, float, int32_t, uint32_t);
    emulation::Broadcast(dst, src, emulation::CheckRepeats(repeatTime, "Brcb", where), {p.dstBlkStride, p.dstRepStride}, where);
}

// dst[i] = the element of src at srcBaseAddr + srcOffset[i] bytes.
template <typename T>
void Gather(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<uint32_t>& srcOffset,
            const uint32_t srcBaseAddr, const uint64_t mask, RepeatTimes repeatTime, const uint16_t dstRepStride,
            Where where = {}) {
    constexpr bool isSetMask = true;
    EMULATION_TAKES(Gather, half, bfloat16_t, int16_t, uint16_t, float, int32_t, uint32_t);
    emulation::GatherElements(EMULATION_LEADING(Gather, T), dst, {1, dstRepStride}, src, srcOffset, srcBaseAddr, where);
}
template <typename T>
void Gather(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<uint32_t>& srcOffset,
            const uint32_t srcBaseAddr, const uint64_t mask[], RepeatTimes repeatTime, const uint16_t dstRepStride,
            Where where = {}) {
    constexpr bool isSetMask = true;
    EMULATION_TAKES(Gather, half, bfloat16_t, int16_t, uint16_t, float, int32_t, uint32_t);
    emulation::GatherElements(EMULATION_BITS(Gather, T), dst, {1, dstRepStride}, src, srcOffset, srcBaseAddr, where);
}
template <typename T>
void Gather(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<uint32_t>& srcOffset,
            const uint32_t srcBaseAddr, const uint32_t count, Where where = {}) {
    EMULATION_TAKES(Gather, half, bfloat16_t, int16_t, uint16_t, float, int32_t, uint32_t);
    emulation::GatherElements(EMULATION_COUNT(Gather, T), dst, {}, src, srcOffset, srcBaseAddr, where);
}

// Packs the selected elements; pattern 1..6 takes every second or fourth element, 7 all. reduceMode: `mask` elements per
// iteration, else whole 256-byte iterations. Leaves the mask register in normal mode.
template <typename T, GatherMaskMode mode = defaultGatherMaskMode>
void GatherMask(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const uint8_t src1Pattern, const bool reduceMode,
                const uint32_t mask, const GatherMaskParams& p, uint64_t& rsvdCnt, Where where = {}) {
    EMULATION_TAKES(GatherMask, half, bfloat16_t, int16_t, uint16_t, float, int32_t, uint32_t);
    emulation::Require(src1Pattern >= 1 && src1Pattern <= 7, 5,
                       "GatherMask src1Pattern must lie in [1, 7], got " + std::to_string(src1Pattern), where);
    emulation::PackByPattern(dst, src0, src1Pattern, reduceMode, mask, p, rsvdCnt, where);
}
template <typename T, typename U, GatherMaskMode mode = defaultGatherMaskMode>
void GatherMask(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<U>& src1Pattern, const bool reduceMode,
                const uint32_t mask, const GatherMaskParams& p, uint64_t& rsvdCnt, Where where = {}) {
    static_assert((sizeof(T) == 2 && std::is_same_v<U, uint16_t>) || (sizeof(T) == 4 && std::is_same_v<U, uint32_t>),
                  "GatherMask on dav-2201 takes a uint16_t mask for 16-bit and a uint32_t mask for 32-bit elements");
    emulation::PackByMask(dst, src0, src1Pattern, reduceMode, mask, p, rsvdCnt, where);
}

// ---- Compare and Select ----

// One bit per element, packed; an instruction covers whole 256-byte iterations and this chip ignores the mask.
template <typename T, typename U, bool isSetMask = true>
void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, CMPMODE cmpMode,
             const uint64_t mask[], RepeatTimes repeatTime, const BinaryRepeatParams& p, Where where = {}) {
    (void)mask;
    emulation::CompareTensors<T, U>(dst, src0, {p.src0BlkStride, p.src0RepStride}, src1, {p.src1BlkStride, p.src1RepStride},
                                    cmpMode, repeatTime, where);
}
template <typename T, typename U, bool isSetMask = true>
void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, CMPMODE cmpMode,
             const uint64_t mask, RepeatTimes repeatTime, const BinaryRepeatParams& p, Where where = {}) {
    (void)mask;
    emulation::CompareTensors<T, U>(dst, src0, {p.src0BlkStride, p.src0RepStride}, src1, {p.src1BlkStride, p.src1RepStride},
                                    cmpMode, repeatTime, where);
}
template <typename T, typename U>
void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, CMPMODE cmpMode, uint32_t count,
             Where where = {}) {
    emulation::CompareTensors<T, U>(dst, src0, {}, src1, {}, cmpMode, emulation::WholeIterations<T>(count, where), where);
}

#define EMULATION_COMPARE_SCALAR(NAME) \
    template <typename T, typename U, bool isSetMask = true> \
    void NAME(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const T src1Scalar, CMPMODE cmpMode, const uint64_t mask[], \
              RepeatTimes repeatTime, const UnaryRepeatParams& p, Where where = {}) { \
        (void)mask; \
        emulation::CompareWithScalar<T, U>(#NAME, dst, src0, {p.srcBlkStride, p.srcRepStride}, src1Scalar, cmpMode, repeatTime, \
                                           where); \
    } \
    template <typename T, typename U, bool isSetMask = true> \
    void NAME(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const T src1Scalar, CMPMODE cmpMode, const uint64_t mask, \
              RepeatTimes repeatTime, const UnaryRepeatParams& p, Where where = {}) { \
        (void)mask; \
        emulation::CompareWithScalar<T, U>(#NAME, dst, src0, {p.srcBlkStride, p.srcRepStride}, src1Scalar, cmpMode, repeatTime, \
                                           where); \
    } \
    template <typename T, typename U> \
    void NAME(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const T src1Scalar, CMPMODE cmpMode, uint32_t count, \
              Where where = {}) { \
        emulation::CompareWithScalar<T, U>(#NAME, dst, src0, {}, src1Scalar, cmpMode, \
                                           emulation::WholeIterations<T>(count, where), where); \
    }
EMULATION_COMPARE_SCALAR(CompareScalar)
EMULATION_COMPARE_SCALAR(Compares)
#undef EMULATION_COMPARE_SCALAR

template <typename T, typename U, bool isSetMask = true>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
            SELMODE selMode, uint64_t mask[], RepeatTimes repeatTime, const BinaryRepeatParams& p, Where where = {}) {
    emulation::SelectTensors(EMULATION_BITS(Select, T), dst, {p.dstBlkStride, p.dstRepStride}, selMask, src0,
                             {p.src0BlkStride, p.src0RepStride}, src1, {p.src1BlkStride, p.src1RepStride}, selMode, where);
}
template <typename T, typename U, bool isSetMask = true>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
            SELMODE selMode, uint64_t mask, RepeatTimes repeatTime, const BinaryRepeatParams& p, Where where = {}) {
    emulation::SelectTensors(EMULATION_LEADING(Select, T), dst, {p.dstBlkStride, p.dstRepStride}, selMask, src0,
                             {p.src0BlkStride, p.src0RepStride}, src1, {p.src1BlkStride, p.src1RepStride}, selMode, where);
}
template <typename T, typename U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
            SELMODE selMode, uint32_t count, Where where = {}) {
    emulation::SelectTensors(EMULATION_COUNT(Select, T), dst, {}, selMask, src0, {}, src1, {}, selMode, where);
}
template <typename T, typename U, bool isSetMask = true>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0, T src1, SELMODE selMode,
            uint64_t mask[], RepeatTimes repeatTime, const BinaryRepeatParams& p, Where where = {}) {
    emulation::SelectScalar(EMULATION_BITS(Select, T), dst, {p.dstBlkStride, p.dstRepStride}, selMask, src0,
                            {p.src0BlkStride, p.src0RepStride}, src1, selMode, where);
}
template <typename T, typename U, bool isSetMask = true>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0, T src1, SELMODE selMode,
            uint64_t mask, RepeatTimes repeatTime, const BinaryRepeatParams& p, Where where = {}) {
    emulation::SelectScalar(EMULATION_LEADING(Select, T), dst, {p.dstBlkStride, p.dstRepStride}, selMask, src0,
                            {p.src0BlkStride, p.src0RepStride}, src1, selMode, where);
}
template <typename T, typename U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0, T src1, SELMODE selMode,
            uint32_t count, Where where = {}) {
    emulation::SelectScalar(EMULATION_COUNT(Select, T), dst, {}, selMask, src0, {}, src1, selMode, where);
}

}  // namespace AscendC

#include "reduce.h"
