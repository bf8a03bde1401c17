// The vector cores' side of an attention tile: masks and the running maximum and sum of rows of 128 scores.
#pragma once

#include "../generated/softmax_plan.h"
#include "kernel_common.h"

namespace npu_sparse_ascendc {

constexpr float MASKED_SCORE = -2e38f;    // exp(MASKED_SCORE - LOWEST_MAXIMUM) is 0, so a row that sees nothing sums to 0
constexpr float LOWEST_MAXIMUM = -1e38f;
constexpr float TINY = 1e-30f;            // a row that sees something sums to at least exp(0)
constexpr uint32_t SCORE_HALVES = SCORE_COLUMNS / REPEAT_FLOATS;
constexpr uint8_t SCORE_STRIDE = SCORE_COLUMNS / BLOCK_FLOATS;

// The columns, of 64 that begin at `begin`, from `end` on.
__aicore__ inline uint64_t ColumnsFrom(uint32_t end, uint32_t begin)
{
    return end >= begin + REPEAT_FLOATS ? 0 : end > begin ? ~0ull << (end - begin) : ~0ull;
}

// Masks some of 64 columns in some rows. Assigning, not adding: what was there may be NaN.
__aicore__ inline void Hide(const LocalTensor<float>& scores, uint64_t columns, uint32_t rows, uint8_t rowStride)
{
    if (columns != 0) {
        uint64_t mask[2] = {columns, 0};
        Duplicate(scores, MASKED_SCORE, mask, rows, 1, rowStride);
    }
}

// Scales `keys` columns of rows of scores; the others hold nothing yet.
__aicore__ inline void ScaleScores(const LocalTensor<float>& scores, float scale, uint32_t keys, uint32_t rows)
{
    for (uint32_t column = 0; column < keys; column += REPEAT_FLOATS) {
        const uint64_t width = keys - column < REPEAT_FLOATS ? keys - column : REPEAT_FLOATS;
        Muls(scores[column], scores[column], scale, width, rows, {1, 1, SCORE_STRIDE, SCORE_STRIDE});
    }
    PipeBarrier<PIPE_V>();
}

// Running maximum and sum of up to 64 rows; rows come in multiples of 8.
class SoftmaxRows {
public:
    static constexpr uint32_t ROWS = SOFTMAX_ROWS;
    static constexpr uint32_t WIDE = ROWS * BLOCK_FLOATS;  // one 32-byte block a row
    static constexpr uint32_t ELEMENTS = 3 * ROWS + WIDE;

    __aicore__ inline void Init(const LocalTensor<float>& rows)
    {
        newMaximum_ = rows;
        part_ = rows[ROWS];
        rescale_ = rows[2 * ROWS];
        wide_ = rows[3 * ROWS];
    }

    __aicore__ inline static void Begin(const LocalTensor<float>& maximum, const LocalTensor<float>& sum, uint32_t rows)
    {
        Duplicate(maximum, LOWEST_MAXIMUM, rows);
        Duplicate(sum, 0.0f, rows);
    }

    // scores = exp(scores - maximum) and sum = sum * Rescale() + their sums, with the maximum so far. `folded`: rows x 64.
    __aicore__ inline void Update(const LocalTensor<float>& scores, const LocalTensor<float>& maximum,
                                  const LocalTensor<float>& sum, const LocalTensor<float>& folded, uint32_t rows)
    {
        const Tile tile = {*this, scores, maximum, sum, folded, rows};
        ForEachPass(tile);
    }

    __aicore__ inline LocalTensor<float> Rescale() const { return rescale_; }  // of what came before the last Update
    __aicore__ inline LocalTensor<float> Scratch() const { return wide_; }              // WIDE values, free between calls

    // out = 1 / sum, or 1 / TINY for a row that saw nothing
    __aicore__ inline static void Inverse(const LocalTensor<float>& out, const LocalTensor<float>& sum, uint32_t rows)
    {
        Maxs(sum, sum, TINY, rows);
        Duplicate(out, 1.0f, rows);
        PipeBarrier<PIPE_V>();
        Div(out, out, sum, rows);
        PipeBarrier<PIPE_V>();
    }

    // Every value to a block of its own, for instructions that read one value over a whole row.
    __aicore__ inline static void Widen(const LocalTensor<float>& wide, const LocalTensor<float>& values,
                                        uint32_t rows)
    {
        Brcb(wide, values, rows / BLOCK_FLOATS, {1, BLOCK_FLOATS});
    }

private:
    // What the plan calls the maxima, the exponentials and the sums of a tile's rows.
    struct Tile {
        __aicore__ inline void Top() const
        {
            Max(folded, scores, scores[REPEAT_FLOATS], REPEAT_FLOATS, rows, Fold());
            PipeBarrier<PIPE_V>();
            WholeReduceMax(state.part_, folded, REPEAT_FLOATS, rows, 1, 1, REPEAT_FLOATS / BLOCK_FLOATS,
                           ReduceOrder::ORDER_ONLY_VALUE);
            PipeBarrier<PIPE_V>();
            Max(state.newMaximum_, maximum, state.part_, rows);
            PipeBarrier<PIPE_V>();
            Sub(state.rescale_, maximum, state.newMaximum_, rows);
            Widen(state.wide_, state.newMaximum_, rows);
            PipeBarrier<PIPE_V>();
            Exp(state.rescale_, state.rescale_, rows);
            Adds(maximum, state.newMaximum_, 0.0f, rows);
        }

        __aicore__ inline void Power() const
        {
            for (uint32_t column = 0; column < SCORE_COLUMNS; column += REPEAT_FLOATS) {
                Sub(scores[column], scores[column], state.wide_, REPEAT_FLOATS, rows, {1, 1, 0, SCORE_STRIDE, SCORE_STRIDE, 1});
            }
            PipeBarrier<PIPE_V>();
            Exp(scores, scores, rows * SCORE_COLUMNS);
        }

        __aicore__ inline void Total() const
        {
            Mul(sum, sum, state.rescale_, rows);
            PipeBarrier<PIPE_V>();
            Add(folded, scores, scores[REPEAT_FLOATS], REPEAT_FLOATS, rows, Fold());
            PipeBarrier<PIPE_V>();
            WholeReduceSum(state.part_, folded, REPEAT_FLOATS, rows, 1, 1, REPEAT_FLOATS / BLOCK_FLOATS);
            PipeBarrier<PIPE_V>();
            Add(sum, sum, state.part_, rows);
            PipeBarrier<PIPE_V>();
        }

        __aicore__ inline static BinaryRepeatParams Fold()
        {
            return BinaryRepeatParams(1, 1, 1, REPEAT_FLOATS / BLOCK_FLOATS, SCORE_STRIDE, SCORE_STRIDE);
        }

        const SoftmaxRows& state;
        const LocalTensor<float>& scores;
        const LocalTensor<float>& maximum;
        const LocalTensor<float>& sum;
        const LocalTensor<float>& folded;
        uint32_t rows;
    };

    LocalTensor<float> newMaximum_, part_, rescale_, wide_;
};

}  // namespace npu_sparse_ascendc
