// The running top-k of rows of scores, in UB: TopK(A u B) = TopK(TopK(A) u TopK(B)), by Sort32 and MrgSort. Keys must come in
// ascending order of position: both instructions put what came first first among equals, so ties go to the smaller position.
// Sorting is the dear part, so a key is first compared with its row's k-th best score so far: few of a long context beat it, and
// those wait as candidates until enough have come together.
#pragma once

#include "kernel_common.h"
#include "top_k_tiling_data.h"

namespace npu_sparse_ascendc {

constexpr uint32_t PAIR = 2;      // floats of a (score, position)
constexpr uint32_t SORTED = 32;   // elements that Sort32 puts in order
constexpr uint32_t MERGED = 4;    // lists that MrgSort merges
constexpr uint32_t MAX_ROWS = 128;

class TopK {
public:
    // To be called before buffers of odd sizes are: Sort32 wants addresses of 256 B.
    // A list per row: listLength pairs by descending score, -inf where there are fewer.
    __aicore__ inline void Init(TPipe* pipe, const TopKTiling& tiling, uint32_t rows)
    {
        t = tiling;
        longest = Most(t.listLength, t.candidates);
        pipe->InitBuffer(listsUb, rows * ListFloats() * sizeof(float));
        pipe->InitBuffer(pairsUb, (2 * longest + t.listLength + t.candidates) * PAIR * sizeof(float));
        pipe->InitBuffer(candidatesUb, rows * t.candidates * PAIR * sizeof(float));
        pipe->InitBuffer(stepUb, t.keysPerStep * sizeof(int32_t));
        pipe->InitBuffer(positionsUb, t.keysPerStep * sizeof(int32_t));
        pipe->InitBuffer(bitsUb, Aligned(Most(t.listLength, t.keysPerStep) / 8, BLOCK_BYTES));
        pipe->InitBuffer(resultUb, 1, t.listLength * sizeof(int32_t) + BLOCK_BYTES);
        LocalTensor<int32_t> step = stepUb.Get<int32_t>();
        CreateVecIndex(step, static_cast<int32_t>(0), t.keysPerStep);
        for (uint32_t row = 0; row < rows; row++) {
            Duplicate(Positions(row), static_cast<int32_t>(0), t.candidates);  // those of the gaps between candidates
        }
        PipeBarrier<PIPE_V>();
    }

    __aicore__ inline void Reset(uint32_t row)
    {
        Duplicate(List(row), MINUS_INFINITY, ListFloats());
        PipeBarrier<PIPE_V>();
        threshold[row] = MINUS_INFINITY;
        filled[row] = 0;
    }

    // +inf for the visible keys of [first, first + keys) that are sinks or lie in the window [windowStart, visible), whatever their
    // scores were, NaN too; all others are below that.
    __aicore__ inline void Keep(const LocalTensor<float>& scores, uint32_t sinkEnd, uint32_t windowStart, uint32_t visible,
                                uint32_t first, uint32_t keys)
    {
        if (t.sink > 0 || t.recent > 0) {
            Mins(scores, scores, LARGEST, t.keysPerStep);
            PipeBarrier<PIPE_V>();
        }
        const uint32_t seen = Least(keys, Above(visible, first));
        const uint32_t sinks = Least(seen, Above(sinkEnd, first));
        if (sinks > 0) {
            Duplicate(scores, -MINUS_INFINITY, sinks);
            PipeBarrier<PIPE_V>();
        }
        const uint32_t before = Above(windowStart, first);
        if (seen > before) {
            const uint32_t group = before / REPEAT_FLOATS * REPEAT_FLOATS, next = Least(seen, group + REPEAT_FLOATS);
            uint64_t mask[2] = {~0ull >> (REPEAT_FLOATS - (next - before)) << (before - group), 0};
            Duplicate(scores[group], -MINUS_INFINITY, mask, 1, 1, REPEAT_FLOATS / BLOCK_FLOATS);
            if (seen > next) {
                Duplicate(scores[next], -MINUS_INFINITY, seen - next);
            }
            PipeBarrier<PIPE_V>();
        }
    }

    // keysPerStep scores of the keys from `first` on; -inf where there is no key.
    __aicore__ inline void Push(uint32_t row, const LocalTensor<float>& scores, uint32_t first)
    {
        LocalTensor<int32_t> positions = positionsUb.Get<int32_t>();
        LocalTensor<uint8_t> bits = bitsUb.Get<uint8_t>();
        LocalTensor<uint32_t> better = bits.ReinterpretCast<uint32_t>();
        LocalTensor<float> newScores = Scores(row)[filled[row]];
        LocalTensor<int32_t> newPositions = Positions(row)[filled[row]];
        Adds(positions, stepUb.Get<int32_t>(), static_cast<int32_t>(first), t.keysPerStep);
        Adds(scores, scores, 0.0f, t.keysPerStep);  // -0 becomes +0: equal scores must look equal to the sort
        Duplicate(newScores, MINUS_INFINITY, t.keysPerStep);
        PipeBarrier<PIPE_V>();
        CompareScalar(bits, scores, threshold[row], CMPMODE::GT, t.keysPerStep);  // an equal key comes too late to win
        PipeBarrier<PIPE_V>();
        uint64_t count = 0;
        GatherMask(newScores, scores, better, true, t.keysPerStep, {1, 1, 8, 8}, count);
        GatherMask(newPositions, positions, better, true, t.keysPerStep, {1, 1, 8, 8}, count);
        PipeBarrier<PIPE_V>();
        filled[row] += Aligned(static_cast<uint32_t>(count), BLOCK_FLOATS);
        if (filled[row] + t.keysPerStep > t.candidates) {
            Flush(row);
        }
    }

    // The list in GM of the same row's next keys, merged into the row's own.
    __aicore__ inline void PushList(uint32_t row, const GlobalTensor<float>& list)
    {
        Order<HardEvent::V_MTE2>();
        DataCopy(Pairs(0), list, ListFloats());
        Order<HardEvent::MTE2_V>();
        Merge(row, Pairs(0), t.listLength, Pairs(1));
    }

    __aicore__ inline void StoreList(uint32_t row, const GlobalTensor<float>& to)
    {
        Flush(row);
        Order<HardEvent::V_MTE3>();
        DataCopy(to, List(row), ListFloats());
        Order<HardEvent::MTE3_V>();
    }

    // The row's positions, ascending, and their number; unused slots are -1.
    __aicore__ inline void Finish(uint32_t row, const GlobalTensor<int32_t>& indices, const GlobalTensor<int32_t>& count)
    {
        Flush(row);
        const uint32_t used = Count(row);
        LocalTensor<float> scratch = Pairs(2);
        LocalTensor<uint32_t> positions = scratch[t.listLength].ReinterpretCast<uint32_t>();
        Extract(positions, List(row).ReinterpretCast<uint32_t>(), 2);
        LocalTensor<float> keys = scratch;  // the negative position, exact in fp32: descending order of it is what we want
        LocalTensor<float> sorted = Pairs(1);
        Cast(sorted, positions.ReinterpretCast<int32_t>(), RoundMode::CAST_RINT, t.listLength);
        Duplicate(keys, LOWEST, t.listLength);
        PipeBarrier<PIPE_V>();
        if (used > 0) {
            Muls(keys, sorted, -1.0f, used);
            PipeBarrier<PIPE_V>();
        }
        Sort32(Pairs(0), keys, positions, t.listLength / SORTED);
        PipeBarrier<PIPE_V>();
        Extract(keys, MergeRuns(t.listLength), 1);

        LocalTensor<int32_t> result = resultUb.AllocTensor<int32_t>();
        Duplicate(result, static_cast<int32_t>(-1), t.listLength);
        Duplicate(result[t.listLength], static_cast<int32_t>(used), BLOCK_FLOATS);
        PipeBarrier<PIPE_V>();
        if (used > 0) {
            Muls(keys, keys, -1.0f, used);
            PipeBarrier<PIPE_V>();
            Cast(result, keys, RoundMode::CAST_RINT, used);
            PipeBarrier<PIPE_V>();
        }
        resultUb.EnQue(result);
        result = resultUb.DeQue<int32_t>();
        StoreRagged(indices, result, t.k);
        StoreRagged(count, result[t.listLength], 1);
        resultUb.FreeTensor(result);
    }

    __aicore__ inline uint32_t ListFloats() const { return t.listLength * PAIR; }

private:
    // The row's candidates into its list, and a new threshold.
    __aicore__ inline void Flush(uint32_t row)
    {
        if (filled[row] == 0) {
            return;
        }
        const uint32_t elements = Aligned(filled[row], SORTED);
        if (elements > filled[row]) {
            Duplicate(Scores(row)[filled[row]], MINUS_INFINITY, elements - filled[row]);
            PipeBarrier<PIPE_V>();
        }
        Sort32(Pairs(0), Scores(row), Positions(row).ReinterpretCast<uint32_t>(), elements / SORTED);
        PipeBarrier<PIPE_V>();
        Merge(row, MergeRuns(elements), elements, Pairs(2));
        Order<HardEvent::V_S>();
        threshold[row] = List(row).GetValue((t.k - 1) * PAIR);
        Order<HardEvent::S_V>();
        filled[row] = 0;
    }

    __aicore__ inline LocalTensor<float> Scores(uint32_t row) { return candidatesUb.Get<float>()[row * t.candidates * PAIR]; }

    __aicore__ inline LocalTensor<int32_t> Positions(uint32_t row)
    {
        return candidatesUb.Get<int32_t>()[(row * PAIR + 1) * t.candidates];
    }

    __aicore__ inline LocalTensor<float> List(uint32_t row) { return listsUb.Get<float>()[row * ListFloats()]; }

    // Two buffers for sorting, and from the second's end on, room for an old list and candidates.
    __aicore__ inline LocalTensor<float> Pairs(uint32_t which) { return pairsUb.Get<float>()[which * longest * PAIR]; }

    // Pattern 1: the scores of a list of pairs, 2: their positions.
    template <typename U>
    __aicore__ inline void Extract(const LocalTensor<U>& to, const LocalTensor<U>& pairs, uint8_t pattern)
    {
        uint64_t extracted = 0;
        const uint16_t repeats = ListFloats() / REPEAT_FLOATS;
        GatherMask(to, pairs, pattern, false, 0, {1, repeats, 8, 0}, extracted);
        PipeBarrier<PIPE_V>();
    }

    // Of the first k entries, those above -inf.
    __aicore__ inline uint32_t Count(uint32_t row)
    {
        LocalTensor<float> scores = Pairs(0);
        LocalTensor<float> chosen = Pairs(1);
        LocalTensor<uint8_t> bits = bitsUb.Get<uint8_t>();
        Extract(scores, List(row), 1);
        CompareScalar(bits, scores, LOWEST, CMPMODE::GE, t.listLength);
        PipeBarrier<PIPE_V>();
        uint64_t count = 0;
        GatherMask(chosen, scores, bits.ReinterpretCast<uint32_t>(), true, t.listLength, {1, 1, 8, 8}, count);
        PipeBarrier<PIPE_V>();
        Order<HardEvent::V_S>();
        return Least(t.k, static_cast<uint32_t>(count));
    }

    // Runs of 32 in Pairs(0), merged four at a time until one is left; returns where it lies.
    __aicore__ inline LocalTensor<float> MergeRuns(uint32_t elements)
    {
        uint32_t source = 0;
        for (uint32_t run = SORTED; run < elements; run *= MERGED) {
            const LocalTensor<float> from = Pairs(source);
            const LocalTensor<float> to = Pairs(1 - source);
            const uint32_t whole = elements / (MERGED * run);
            if (whole > 0) {
                MergeAdjacent(to, from, run, MERGED * run, whole);
            }
            const uint32_t at = whole * MERGED * run;
            if (at + run < elements) {
                MergeAdjacent(to[at * PAIR], from[at * PAIR], run, elements - at, 1);
            } else if (at < elements) {
                Move(to[at * PAIR], from[at * PAIR], (elements - at) * PAIR);
            }
            PipeBarrier<PIPE_V>();
            source = 1 - source;
        }
        return Pairs(source);
    }

    // `elements` in runs that lie one behind the other, the last one maybe shorter; `repeats` times over.
    __aicore__ inline void MergeAdjacent(const LocalTensor<float>& to, const LocalTensor<float>& from, uint32_t run,
                                         uint32_t elements, uint32_t repeats)
    {
        const uint32_t lists = (elements + run - 1) / run;
        MrgSort4Info info;
        for (uint32_t i = 0; i < MERGED; i++) {
            info.elementLengths[i] = Least(run, Above(elements, i * run));
        }
        info.ifExhaustedSuspension = false;
        info.validBit = (1 << lists) - 1;
        info.repeatTimes = repeats;
        const uint32_t third = lists > 2 ? 2 * run * PAIR : 0;
        const uint32_t fourth = lists > 3 ? 3 * run * PAIR : 0;
        MrgSort(to, MrgSortSrcList<float>(from, from[run * PAIR], from[third], from[fourth]), info);
    }

    // The row's list and a later one, into the row's list.
    __aicore__ inline void Merge(uint32_t row, const LocalTensor<float>& later, uint32_t length,
                                 const LocalTensor<float>& scratch)
    {
        const LocalTensor<float> list = List(row);
        MrgSort4Info info;
        info.elementLengths[0] = t.listLength;
        info.elementLengths[1] = length;
        info.elementLengths[2] = 0;
        info.elementLengths[3] = 0;
        info.ifExhaustedSuspension = false;
        info.validBit = 3;
        info.repeatTimes = 1;
        MrgSort(scratch, MrgSortSrcList<float>(list, later, list, list), info);
        PipeBarrier<PIPE_V>();
        Move(list, scratch, ListFloats());
        PipeBarrier<PIPE_V>();
    }

    // As integers: positions in pairs are no floats.
    __aicore__ inline void Move(const LocalTensor<float>& to, const LocalTensor<float>& from, uint32_t floats)
    {
        Adds(to.ReinterpretCast<int32_t>(), from.ReinterpretCast<int32_t>(), static_cast<int32_t>(0), floats);
    }

    TopKTiling t;
    uint32_t longest;
    float threshold[MAX_ROWS];  // a row's k-th best score at its last Flush
    uint32_t filled[MAX_ROWS];  // candidates of a row; gaps of less than a block between two steps' hold -inf
    TBuf<TPosition::VECCALC> listsUb;
    TBuf<TPosition::VECCALC> pairsUb;
    TBuf<TPosition::VECCALC> candidatesUb;
    TBuf<TPosition::VECCALC> stepUb;
    TBuf<TPosition::VECCALC> positionsUb;
    TBuf<TPosition::VECCALC> bitsUb;
    TQue<TPosition::VECOUT, 1> resultUb;
};

}  // namespace npu_sparse_ascendc
