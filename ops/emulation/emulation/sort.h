// The sorting unit: pairs of 8 bytes, value below (4 bytes for float; 2 bytes and 2 unused for half) and uint32 index above.
//
// Descending; of equal values the one that came first, or from the earlier list, stays first. NaN sorts before everything, so
// that one that leaks into a selection is seen. Sorting by pieces of 32 with Sort32, merging up to four lists with MrgSort.
#pragma once

#include <algorithm>

#include "vector_core.h"

namespace AscendC {

struct MrgSort4Info {
    MrgSort4Info() = default;
    MrgSort4Info(const uint16_t lengths[4], bool ifExhaustedSuspension, uint16_t validBit, uint16_t repeatTimes)
        : ifExhaustedSuspension(ifExhaustedSuspension), validBit(validBit), repeatTimes(repeatTimes) {
        for (int i = 0; i < 4; ++i) elementLengths[i] = lengths[i];
    }
    uint16_t elementLengths[4] = {0};
    bool ifExhaustedSuspension = false;
    uint16_t validBit = 0;
    emulation::RepeatTimes repeatTimes = 1;
};

template <typename T>
struct MrgSortSrcList {
    MrgSortSrcList() = default;
    MrgSortSrcList(const LocalTensor<T>& src1, const LocalTensor<T>& src2, const LocalTensor<T>& src3, const LocalTensor<T>& src4)
        : src1(src1), src2(src2), src3(src3), src4(src4) {}
    LocalTensor<T> src1, src2, src3, src4;
};

}  // namespace AscendC

namespace emulation {

constexpr uint32_t kPair = 8;

template <typename T>
struct Pair {
    alignas(4) T value;
    uint32_t index;
};
static_assert(sizeof(Pair<float>) == kPair && sizeof(Pair<half>) == kPair);

template <typename T>
bool Precedes(T a, T b) {
    const float x = Widen(a), y = Widen(b);
    return x > y || (x != x && y == y);
}

inline thread_local std::array<uint16_t, 4> mergedCounts;  // VMS4_SR: how many pairs the last MrgSort took from each list

template <typename T>
struct Lists {
    const Pair<T>* data[4];
    uint32_t length[4];
    uint32_t count;  // lists that take part
};

// Merges into `to` (or only counts, when null); returns how many pairs each list gave.
template <typename T>
std::array<uint16_t, 4> Merge(const Lists<T>& lists, bool stopAtExhaustion, Pair<T>* to) {
    std::array<uint16_t, 4> taken{};
    for (;;) {
        int best = -1;
        for (uint32_t i = 0; i < lists.count; ++i) {
            if (taken[i] == lists.length[i]) continue;
            if (best < 0 || Precedes(lists.data[i][taken[i]].value, lists.data[best][taken[best]].value))
                best = static_cast<int>(i);
        }
        if (best < 0) return taken;
        if (to != nullptr) *to++ = lists.data[best][taken[best]];
        if (++taken[best] == lists.length[best] && stopAtExhaustion) return taken;
    }
}

}  // namespace emulation

namespace AscendC {

template <typename T>
void Sort32(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<uint32_t>& src1, RepeatTimes repeatTime,
            Where where = {}) {
    using namespace emulation;
    static_assert(isOneOf<T, half, float>, "Sort32 on dav-2201 takes half or float");
    constexpr uint32_t n = 32;
    const uint32_t repeats = CheckRepeats(repeatTime, "Sort32", where);
    const auto d = Place(dst, {}, "Sort32", "dst", where, n * kPair);
    const auto values = Place(src0, {}, "Sort32", "src0", where, n * sizeof(T));
    const auto indices = Place(src1, {}, "Sort32", "src1", where, n * sizeof(uint32_t));
    const Span readValues = Piece(src0.Whole(), 0, repeats * n * sizeof(T)),
               readIndices = Piece(src1.Whole(), 0, repeats * n * sizeof(uint32_t));
    const Span write = Piece(dst.Whole(), 0, repeats * n * kPair);
    CheckApart("Sort32", write, readValues, where);
    CheckApart("Sort32", write, readIndices, where);
    Issue(PIPE_V, "Sort32", {readValues, readIndices}, {write}, VectorCost(repeats), where, [=] {
        auto* pairs = reinterpret_cast<Pair<T>*>(d.data);
        for (uint32_t r = 0; r < repeats; ++r, pairs += n) {
            for (uint32_t i = 0; i < n; ++i) {
                std::memset(static_cast<void*>(&pairs[i]), 0, kPair);
                pairs[i].value = values.data[r * n + i];
                pairs[i].index = indices.data[r * n + i];
            }
            std::stable_sort(pairs, pairs + n, [](const Pair<T>& a, const Pair<T>& b) { return Precedes(a.value, b.value); });
        }
    });
}

template <typename T>
void MrgSort(const LocalTensor<T>& dst, const MrgSortSrcList<T>& src, const MrgSort4Info& params, Where where = {}) {
    using namespace emulation;
    static_assert(isOneOf<T, half, float>, "MrgSort on dav-2201 takes half or float");
    Require(params.validBit == 3 || params.validBit == 7 || params.validBit == 15, 5,
            "MrgSort validBit must be 3, 7 or 15 (the first two, three or four lists), got " + std::to_string(params.validBit),
            where);
    const uint32_t repeats = CheckRepeats(params.repeatTimes, "MrgSort", where);
    Require(repeats >= 1, 5, "MrgSort repeatTimes must lie in [1, 255], got 0", where);
    const LocalTensor<T>* sources[4] = {&src.src1, &src.src2, &src.src3, &src.src4};
    const auto d = Place(dst, {}, "MrgSort", "dst", where);
    Lists<T> lists{};
    lists.count = params.validBit == 3 ? 2 : params.validBit == 7 ? 3 : 4;
    Span reads[4] = {};
    uint64_t total = 0;
    for (uint32_t i = 0; i < lists.count; ++i) {
        lists.length[i] = params.elementLengths[i];
        Require(lists.length[i] <= 4095, 5,
                "MrgSort elementLengths of a valid list must lie in [0, 4095], got " + std::to_string(lists.length[i]), where);
        if (lists.length[i] == 0) continue;
        lists.data[i] = reinterpret_cast<const Pair<T>*>(Place(*sources[i], {}, "MrgSort", "a source list", where, kPair).data);
        total += lists.length[i];
        if (repeats > 1) {
            Require(lists.count == 4 && lists.length[i] == lists.length[0] &&
                        lists.data[i] == lists.data[0] + uint64_t{i} * lists.length[0] && !params.ifExhaustedSuspension,
                    5,
                    "MrgSort repeatTimes must be 1 unless four equal lists lie one after the other and "
                    "ifExhaustedSuspension is false, got " +
                        std::to_string(repeats),
                    where);
        }
    }
    for (uint32_t i = 0; i < lists.count; ++i) {
        Require(lists.length[i] > 0 || !params.ifExhaustedSuspension, 5,
                "MrgSort ifExhaustedSuspension must be false with an empty list, which is exhausted from the start", where);
        if (lists.length[i] == 0) continue;
        reads[i] = Piece(sources[i]->Whole(), 0, lists.length[i] * kPair, 1, 0, repeats, total * kPair);
    }
    uint64_t written = total * repeats;
    if (params.ifExhaustedSuspension) {  // the values decide how much is written
        ExecuteAll(Current());
        const auto taken = Merge<T>(lists, true, nullptr);
        written = uint64_t{taken[0]} + taken[1] + taken[2] + taken[3];
    }
    const Span write = Piece(dst.Whole(), 0, written * kPair);
    for (uint32_t i = 0; i < lists.count; ++i) CheckApart("MrgSort", write, reads[i], where);
    Issue(PIPE_V, "MrgSort", {reads[0], reads[1], reads[2], reads[3]}, {write},
          VectorCost(static_cast<uint32_t>((written * kPair + kIteration - 1) / kIteration)), where,
          [=, stop = params.ifExhaustedSuspension] {
              Lists<T> from = lists;
              for (uint32_t r = 0; r < repeats; ++r) {
                  for (uint32_t i = 0; i < from.count; ++i) {
                      const auto descends = [](const Pair<T>& a, const Pair<T>& b) { return Precedes(a.value, b.value); };
                      Require(std::is_sorted(from.data[i], from.data[i] + from.length[i], descends), 5, where, [&] {
                          return "MrgSort lists must be sorted in descending order, got list " + std::to_string(i + 1) +
                              " unsorted";
                      });
                  }
                  mergedCounts = Merge<T>(from, stop, reinterpret_cast<Pair<T>*>(d.data) + r * total);
                  for (uint32_t i = 0; i < from.count; ++i) {
                      if (from.length[i] > 0) from.data[i] += total;
                  }
              }
          });
}

inline void GetMrgSortResult(uint16_t& mrgSortList1, uint16_t& mrgSortList2, uint16_t& mrgSortList3, uint16_t& mrgSortList4,
                             Where where = {}) {
    emulation::Finish(PIPE_V, where);
    mrgSortList1 = emulation::mergedCounts[0];
    mrgSortList2 = emulation::mergedCounts[1];
    mrgSortList3 = emulation::mergedCounts[2];
    mrgSortList4 = emulation::mergedCounts[3];
}

// Sizes in elements of T of sorted pairs.
template <typename T>
uint32_t GetSortOffset(const uint32_t elemOffset) {
    return elemOffset * (emulation::kPair / sizeof(T));
}
template <typename T>
uint32_t GetSortLen(const uint32_t elemCount) {
    return elemCount * (emulation::kPair / sizeof(T));
}

}  // namespace AscendC
