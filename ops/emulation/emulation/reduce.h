// Reductions of the vector unit: inside a data block, between neighbours, over an iteration, and over all iterations.
//
// Sums are binary trees over the lanes, rounded to the element type at each level, as the chip's are; masked-off lanes do not
// take part. Of equal maxima the smallest index is returned; NaN wins, as in Max.
#pragma once

#include "vector_core.h"

namespace AscendC {

enum class ReduceOrder : uint8_t { ORDER_VALUE_INDEX = 0, ORDER_INDEX_VALUE, ORDER_ONLY_VALUE, ORDER_ONLY_INDEX };

}  // namespace AscendC

namespace emulation {

using AscendC::ReduceOrder;

enum class Reduction { Sum, Max, Min };

template <typename T>
struct Reduced {
    T value;
    uint32_t index;
    bool any = false;
};

template <typename T>
bool Beats(Reduction kind, T candidate, T best) {
    const auto x = ComparedAs(candidate), y = ComparedAs(best);
    return (kind == Reduction::Max ? x > y : x < y) || (x != x && y == y);
}

// Over lanes [begin, end) of one iteration.
template <typename T>
Reduced<T> ReduceLanes(Reduction kind, const Operand<T>& src, uint32_t repeat, Mask mask, uint32_t begin, uint32_t end) {
    const auto active = [&](uint32_t lane) { return (lane < 64 ? mask.low >> lane : mask.high >> (lane - 64)) & 1; };
    Reduced<T> result{};
    if (kind != Reduction::Sum) {
        for (uint32_t lane = begin; lane < end; ++lane) {
            if (!active(lane)) continue;
            const T value = *src.At(repeat, lane);
            if (!result.any || Beats(kind, value, result.value)) result = {value, lane - begin, true};
        }
        return result;
    }
    float tree[kIteration / sizeof(uint16_t)];
    for (uint32_t lane = begin; lane < end; ++lane) {
        tree[lane - begin] = active(lane) ? Widen(*src.At(repeat, lane)) : 0.0f;
        result.any |= active(lane);
    }
    for (uint32_t n = end - begin; n > 1; n /= 2) {
        for (uint32_t i = 0; i < n / 2; ++i) tree[i] = Widen(Narrow<T>(tree[2 * i] + tree[2 * i + 1]));
    }
    result.value = Narrow<T>(tree[0]);
    return result;
}

template <typename T>
uint32_t ResultBytes(Reduction kind, ReduceOrder order) {
    if (kind == Reduction::Sum || order == ReduceOrder::ORDER_ONLY_VALUE) return sizeof(T);
    return order == ReduceOrder::ORDER_ONLY_INDEX ? sizeof(uint32_t) : 2 * sizeof(T);
}

template <typename T>
void StoreResult(uint8_t* at, const Reduced<T>& result, Reduction kind, ReduceOrder order) {
    if (kind == Reduction::Sum || order == ReduceOrder::ORDER_ONLY_VALUE) {
        std::memcpy(at, &result.value, sizeof(T));
    } else if (order == ReduceOrder::ORDER_ONLY_INDEX) {
        std::memcpy(at, &result.index, sizeof result.index);
    } else {
        const bool valueFirst = order == ReduceOrder::ORDER_VALUE_INDEX;
        std::memcpy(at + (valueFirst ? 0 : sizeof(T)), &result.value, sizeof(T));
        std::memcpy(at + (valueFirst ? sizeof(T) : 0), &result.index, sizeof(T));  // the index's bits, cut to the element's width
    }
}

inline void CheckReduceStrides(const char* opcode, int32_t dst, int32_t block, int32_t repeat, Where where) {
    for (const int32_t stride : {dst, block, repeat}) {
        Require(stride >= 0 && stride <= 65535, 5, where,
                [&] { return std::string(opcode) + " strides must lie in [0, 65535], got " + std::to_string(stride); });
    }
}

// One result per iteration.
template <typename T>
void ReduceIterations(const char* opcode, Reduction kind, const Plan& plan, const LocalTensor<T>& dst, int32_t dstRepStride,
                      const LocalTensor<T>& src, int32_t srcBlkStride, int32_t srcRepStride, ReduceOrder order, Where where) {
    static_assert(isOneOf<T, half, float>, "WholeReduce on dav-2201 takes half or float");
    CheckReduceStrides(opcode, dstRepStride, srcBlkStride, srcRepStride, where);
    const uint32_t bytes = ResultBytes<T>(kind, order);
    const Stride stride{static_cast<uint32_t>(srcBlkStride), static_cast<uint32_t>(srcRepStride)};
    const auto d = Place(dst, {}, opcode, "dst", where, bytes);
    const auto s = Place(src, stride, opcode, "src", where);
    const Spans a = Touched(src, plan, stride);
    const Span write = Piece(dst.Whole(), 0, plan.repeats ? bytes : 0, 1, 0, plan.repeats, uint64_t{bytes} * dstRepStride);
    CheckResultsBehind(opcode, write, src.Whole(), plan, stride, where);
    Issue(PIPE_V, opcode, {a[0], a[1], a[2], a[3]}, {write}, VectorCost(plan.repeats), where, [=] {
        for (uint32_t r = 0; r < plan.repeats; ++r) {
            const auto result = ReduceLanes(kind, s, r, r + 1 == plan.repeats ? plan.last : plan.mask, 0, plan.lanes);
            if (result.any)
                StoreResult(reinterpret_cast<uint8_t*>(d.data) + uint64_t{bytes} * dstRepStride * r, result, kind, order);
        }
    });
}

// `group` lanes into one result: 32 bytes (BlockReduce) or a pair (PairReduceSum); the results of an iteration are packed.
template <typename T>
void ReduceGroups(const char* opcode, Reduction kind, uint32_t group, const Plan& plan, const LocalTensor<T>& dst,
                  int32_t dstRepStride, const LocalTensor<T>& src, int32_t srcBlkStride, int32_t srcRepStride, Where where) {
    static_assert(isOneOf<T, half, float>, "BlockReduce and PairReduceSum on dav-2201 take half or float");
    CheckReduceStrides(opcode, dstRepStride, srcBlkStride, srcRepStride, where);
    const uint32_t results = plan.lanes / group;
    const Stride stride{static_cast<uint32_t>(srcBlkStride), static_cast<uint32_t>(srcRepStride)};
    const auto d = Place(dst, {}, opcode, "dst", where, std::min<uint32_t>(results * sizeof(T), kBlock));
    const auto s = Place(src, stride, opcode, "src", where);
    const Spans a = Touched(src, plan, stride);
    const uint32_t written =
        (ActiveLanes(plan.mask).second + group - 1) / group;  // groups without an active lane stay as they were
    const Span write =
        Piece(dst.Whole(), 0, written * sizeof(T), 1, 0, plan.repeats, uint64_t{results} * dstRepStride * sizeof(T));
    CheckResultsBehind(opcode, write, src.Whole(), plan, stride, where);
    Issue(PIPE_V, opcode, {a[0], a[1], a[2], a[3]}, {write}, VectorCost(plan.repeats), where, [=] {
        for (uint32_t r = 0; r < plan.repeats; ++r) {
            T values[kIteration / sizeof(T)];
            bool any[kIteration / sizeof(T)];
            for (uint32_t g = 0; g < results; ++g) {
                const auto result =
                    ReduceLanes(kind, s, r, r + 1 == plan.repeats ? plan.last : plan.mask, g * group, (g + 1) * group);
                values[g] = result.value;
                any[g] = result.any;
            }
            for (uint32_t g = 0; g < results; ++g) {
                if (any[g]) d.data[static_cast<size_t>(r) * results * dstRepStride + g] = values[g];
            }
        }
    });
}

// Elements of sharedTmpBuffer that the documentation asks for.
template <typename T>
uint64_t ReduceScratch(uint64_t repeats, Reduction kind, bool calIndex) {
    constexpr uint64_t perBlock = kBlock / sizeof(T), perIteration = kIteration / sizeof(T);
    const auto aligned = [](uint64_t n) { return (n + perBlock - 1) / perBlock * perBlock; };
    if (kind == Reduction::Sum) return aligned(repeats);
    const uint64_t first = repeats * 2;
    if (!calIndex) return aligned(first);
    const uint64_t second = (first + perIteration - 1) / perIteration * 2;
    const uint64_t third = second > 2 ? (second + perIteration - 1) / perIteration * 2 : 0;
    return aligned(first) + aligned(second) + aligned(third);
}

// One result of all iterations; the index counts lanes over all of them.
template <typename T>
void ReduceAll(const char* opcode, Reduction kind, const Plan& plan, const LocalTensor<T>& dst, const LocalTensor<T>& src,
               const LocalTensor<T>& scratch, int32_t srcRepStride, bool calIndex, Where where) {
    static_assert(isOneOf<T, half, float>, "ReduceMax, ReduceMin and ReduceSum on dav-2201 take half or float");
    CheckReduceStrides(opcode, 0, 1, srcRepStride, where);
    if (plan.repeats == 0) return;
    const Stride stride{1, static_cast<uint32_t>(srcRepStride)};
    const uint32_t bytes = static_cast<uint32_t>((calIndex ? 2 : 1) * sizeof(T));
    const auto d = Place(dst, {}, opcode, "dst", where, kind == Reduction::Sum ? sizeof(T) : 2 * sizeof(T));
    const auto s = Place(src, stride, opcode, "src", where);
    const auto t = Place(scratch, {}, opcode, "sharedTmpBuffer", where);
    const Spans a = Touched(src, plan, stride);
    const Span write = Piece(dst.Whole(), 0, bytes);
    const uint64_t scratchBytes = ReduceScratch<T>(plan.repeats, kind, calIndex) * sizeof(T);
    const Span scratchWrite = Piece(scratch.Whole(), 0, scratchBytes);
    Issue(PIPE_V, opcode, {a[0], a[1], a[2], a[3]}, {scratchWrite, write}, VectorCost(plan.repeats), where, [=] {
        Reduced<T> total{};
        for (uint32_t r = 0; r < plan.repeats; ++r) {
            auto part = ReduceLanes(kind, s, r, r + 1 == plan.repeats ? plan.last : plan.mask, 0, plan.lanes);
            part.index += r * plan.lanes;
            if (!part.any) continue;
            if (kind == Reduction::Sum && total.any) total.value = Narrow<T>(Widen(total.value) + Widen(part.value));
            else if (!total.any || Beats(kind, part.value, total.value)) total = part;
        }
        std::memset(static_cast<void*>(t.data), kPoison, scratchBytes);
        if (total.any) {
            StoreResult(reinterpret_cast<uint8_t*>(d.data), total, kind,
                        calIndex ? ReduceOrder::ORDER_VALUE_INDEX : ReduceOrder::ORDER_ONLY_VALUE);
        }
    });
}

}  // namespace emulation

namespace AscendC {

// ---- one result per iteration: dst counts results ----

#define EMULATION_WHOLE_EXTREMUM(NAME, KIND) \
    template <typename T, bool isSetMask = true> \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint64_t mask[], const int32_t repeatTime, \
              const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride, \
              ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX, Where where = {}) { \
        emulation::ReduceIterations(#NAME, emulation::Reduction::KIND, EMULATION_BITS(NAME, T), dst, dstRepStride, src, \
                                    srcBlkStride, srcRepStride, order, where); \
    } \
    template <typename T, bool isSetMask = true> \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t mask, const int32_t repeatTime, \
              const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride, \
              ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX, Where where = {}) { \
        emulation::ReduceIterations(#NAME, emulation::Reduction::KIND, EMULATION_LEADING(NAME, T), dst, dstRepStride, src, \
                                    srcBlkStride, srcRepStride, order, where); \
    }
EMULATION_WHOLE_EXTREMUM(WholeReduceMax, Max)
EMULATION_WHOLE_EXTREMUM(WholeReduceMin, Min)
#undef EMULATION_WHOLE_EXTREMUM

template <typename T, bool isSetMask = true>
void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint64_t mask[], const int32_t repeatTime,
                    const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride, Where where = {}) {
    emulation::ReduceIterations("WholeReduceSum", emulation::Reduction::Sum, EMULATION_BITS(WholeReduceSum, T), dst, dstRepStride,
                                src, srcBlkStride, srcRepStride, ReduceOrder::ORDER_ONLY_VALUE, where);
}
template <typename T, bool isSetMask = true>
void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t mask, const int32_t repeatTime,
                    const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride, Where where = {}) {
    emulation::ReduceIterations("WholeReduceSum", emulation::Reduction::Sum, EMULATION_LEADING(WholeReduceSum, T), dst,
                                dstRepStride, src, srcBlkStride, srcRepStride, ReduceOrder::ORDER_ONLY_VALUE, where);
}

// ---- groups inside an iteration; the repeat count comes before the mask ----

#define EMULATION_GROUPS(NAME, KIND, GROUP) \
    template <typename T, bool isSetMask = true> \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t repeatTime, const int32_t mask, \
              const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride, Where where = {}) { \
        emulation::ReduceGroups(#NAME, emulation::Reduction::KIND, GROUP, EMULATION_LEADING(NAME, T), dst, dstRepStride, src, \
                                srcBlkStride, srcRepStride, where); \
    } \
    template <typename T, bool isSetMask = true> \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t repeatTime, const uint64_t mask[], \
              const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride, Where where = {}) { \
        emulation::ReduceGroups(#NAME, emulation::Reduction::KIND, GROUP, EMULATION_BITS(NAME, T), dst, dstRepStride, src, \
                                srcBlkStride, srcRepStride, where); \
    }
EMULATION_GROUPS(BlockReduceMax, Max, emulation::kBlock / sizeof(T))
EMULATION_GROUPS(BlockReduceMin, Min, emulation::kBlock / sizeof(T))
EMULATION_GROUPS(BlockReduceSum, Sum, emulation::kBlock / sizeof(T))
EMULATION_GROUPS(PairReduceSum, Sum, 2)
#undef EMULATION_GROUPS

// ---- one result of everything ----

#define EMULATION_EXTREMUM(NAME, KIND) \
    template <typename T> \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& sharedTmpBuffer, const int32_t mask, \
              const int32_t repeatTime, const int32_t srcRepStride, bool calIndex = 0, Where where = {}) { \
        constexpr bool isSetMask = true; \
        emulation::ReduceAll(#NAME, emulation::Reduction::KIND, EMULATION_LEADING(NAME, T), dst, src, sharedTmpBuffer, \
                             srcRepStride, calIndex, where); \
    } \
    template <typename T> \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& sharedTmpBuffer, \
              const uint64_t mask[], const int32_t repeatTime, const int32_t srcRepStride, bool calIndex = 0, \
              Where where = {}) { \
        constexpr bool isSetMask = true; \
        emulation::ReduceAll(#NAME, emulation::Reduction::KIND, EMULATION_BITS(NAME, T), dst, src, sharedTmpBuffer, \
                             srcRepStride, calIndex, where); \
    } \
    template <typename T> \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& sharedTmpBuffer, const int32_t count, \
              bool calIndex = 0, Where where = {}) { \
        emulation::ReduceAll(#NAME, emulation::Reduction::KIND, EMULATION_COUNT(NAME, T), dst, src, sharedTmpBuffer, 8, \
                             calIndex, where); \
    }
EMULATION_EXTREMUM(ReduceMax, Max)
EMULATION_EXTREMUM(ReduceMin, Min)
#undef EMULATION_EXTREMUM

template <typename T>
void ReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& sharedTmpBuffer, const int32_t mask,
               const int32_t repeatTime, const int32_t srcRepStride, Where where = {}) {
    constexpr bool isSetMask = true;
    emulation::ReduceAll("ReduceSum", emulation::Reduction::Sum, EMULATION_LEADING(ReduceSum, T), dst, src, sharedTmpBuffer,
                         srcRepStride, false, where);
}
template <typename T>
void ReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& sharedTmpBuffer, const uint64_t mask[],
               const int32_t repeatTime, const int32_t srcRepStride, Where where = {}) {
    constexpr bool isSetMask = true;
    emulation::ReduceAll("ReduceSum", emulation::Reduction::Sum, EMULATION_BITS(ReduceSum, T), dst, src, sharedTmpBuffer,
                         srcRepStride, false, where);
}
template <typename T, bool isSetMask = true>
void ReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& sharedTmpBuffer, const int32_t count,
               Where where = {}) {
    static_assert(isSetMask, "ReduceSum with the mask register is not emulated");
    emulation::ReduceAll("ReduceSum", emulation::Reduction::Sum, EMULATION_COUNT(ReduceSum, T), dst, src, sharedTmpBuffer, 8,
                         false, where);
}

}  // namespace AscendC
