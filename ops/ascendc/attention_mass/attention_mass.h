// attention_mass: the softmax attention every key receives, averaged over heads and reduced over blocks of queries. README.md has
// the maths and budgets.
#pragma once

#include "../common/cube_tile.h"
#include "../common/softmax_rows.h"
#include "tiling_data.h"

namespace npu_sparse_ascendc {

constexpr uint16_t MASS_SCORES_READY = 0;
constexpr uint16_t MASS_SCORES_READ = 1;
constexpr uint16_t MASS_STATISTICS_READY = 2;

// The queries between two writes: rows [firstRow, firstRow + blocks) of one output head.
struct MassUnit {
    uint32_t index;  // counts the units of this core
    uint32_t batch, outputHead, firstHead, heads;  // KV heads
    uint32_t firstToken, tokens;
    uint32_t firstRow, blocks;
};

// One chunk of keys for one tile of query rows. Row r of a tile is token r / group, head r % group.
struct MassStep {
    uint32_t index;  // counts all steps of this core
    uint32_t batch, keyHead, tileOfUnit;
    uint32_t firstToken, tokens, rows, paddedRows;
    uint32_t visible;  // keys that the tile's last token sees
    uint32_t key, keys, paddedKeys;
    bool firstHead, lastHead;
};

__aicore__ inline void SetMassTile(MassStep& step, const MassUnit& unit, const AttentionMassTiling& tiling, uint32_t head,
                                   uint32_t tile)
{
    step.batch = unit.batch;
    step.keyHead = unit.firstHead + head;
    step.tileOfUnit = head * tiling.tilesPerUnit + tile;
    step.firstToken = unit.firstToken + tile * tiling.tokens;
    step.tokens = Least(tiling.tokens, unit.tokens - tile * tiling.tokens);
    step.rows = step.tokens * tiling.group;
    step.paddedRows = Aligned(step.rows, FRACTAL);
    step.visible = tiling.keys - tiling.queries + step.firstToken + step.tokens;
    step.firstHead = head == 0;
    step.lastHead = head + 1 == unit.heads;
}

__aicore__ inline void SetMassChunk(MassStep& step, uint32_t key)
{
    step.key = key;
    step.keys = Least(step.visible - key, MASS_CHUNK);
    step.paddedKeys = Aligned(step.keys, FRACTAL);
}

// Both kinds of core walk the same steps: for every tile of a unit all its keys to Normalise, then for every chunk of keys all
// tiles that see it to Share, and a Write for each chunk.
template <typename Core>
__aicore__ inline void WalkMass(const AttentionMassTiling& tiling, Core& core)
{
    MassUnit unit = {};
    MassStep step = {};
    for (uint32_t u = CoreIndex(); u < tiling.units; u += tiling.cores, ++unit.index) {
        const uint32_t row = u / tiling.unitsPerHead, outputHeads = tiling.perKv ? tiling.keyHeads : 1;
        unit.batch = row / outputHeads;
        unit.outputHead = row % outputHeads;
        unit.firstHead = tiling.perKv ? unit.outputHead : 0;
        unit.heads = tiling.perKv ? 1 : tiling.keyHeads;
        unit.firstToken = u % tiling.unitsPerHead * tiling.unitTokens;
        unit.tokens = Least(tiling.unitTokens, tiling.queries - unit.firstToken);
        unit.firstRow = unit.firstToken / tiling.block;
        unit.blocks = (unit.tokens + tiling.block - 1) / tiling.block;
        core.BeginUnit(unit);
        for (uint32_t head = 0; head < unit.heads; ++head) {
            for (uint32_t tile = 0; tile * tiling.tokens < unit.tokens; ++tile) {
                SetMassTile(step, unit, tiling, head, tile);
                for (uint32_t key = 0; key < step.visible; key += MASS_CHUNK, ++step.index) {
                    SetMassChunk(step, key);
                    core.Normalise(step, unit);
                }
            }
        }
        core.EndNormalise();
        for (uint32_t key = 0; key < tiling.keys; key += MASS_CHUNK) {
            core.BeginChunk(unit);
            for (uint32_t tile = 0; tile * tiling.tokens < unit.tokens; ++tile) {
                for (uint32_t head = 0; head < unit.heads; ++head) {
                    SetMassTile(step, unit, tiling, head, tile);
                    if (key < step.visible) {
                        SetMassChunk(step, key);
                        core.Share(step, unit);
                        ++step.index;
                    }
                }
            }
            core.Write(unit, key);
        }
    }
}

// q and k through L1, scores to GM.
template <typename T>
class MassCube {
public:
    __aicore__ inline void Init(const AttentionMassTiling& tiling, GM_ADDR q, GM_ADDR k, GM_ADDR workspace, TPipe* pipe)
    {
        tiling_ = tiling;
        queryGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(q));
        keyGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(k));
        scoresGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace));
        pipe->InitBuffer(queryBuffer_, 2 * L1_ELEMENTS * sizeof(T));
        pipe->InitBuffer(keyBuffer_, 2 * L1_ELEMENTS * sizeof(T));
        queryL1_ = queryBuffer_.Get<T>();
        keyL1_ = keyBuffer_.Get<T>();
        mte1ToMte2_.Init(pipe);
        mte2ToMte1_.Init(pipe);
        cube_.Init(pipe);
        for (uint32_t event = 0; event < EVENTS; ++event) {
            SetFlag<HardEvent::MTE1_MTE2>(mte1ToMte2_[event]);
        }
    }

    __aicore__ inline void BeginUnit(const MassUnit&) { statisticsKnown_ = false; }
    __aicore__ inline void Normalise(const MassStep& step, const MassUnit& unit) { Scores(step, unit); }
    __aicore__ inline void EndNormalise() {}
    __aicore__ inline void BeginChunk(const MassUnit&) {}

    __aicore__ inline void Share(const MassStep& step, const MassUnit& unit)
    {
        if (!statisticsKnown_) {  // each vector core has the statistics of half of the rows, and will read those of all
            CrossCoreWaitFlag(MASS_STATISTICS_READY);
            statisticsKnown_ = true;
        }
        Scores(step, unit);
    }

    __aicore__ inline void Write(const MassUnit&, uint32_t) {}

    __aicore__ inline void Finish()
    {
        for (uint32_t left = Least(scored_, MASS_SLOTS); left > 0; --left) {
            CrossCoreWaitFlag(MASS_SCORES_READ);
        }
        if (loads_ > 0) {
            SetFlag<HardEvent::MTE1_MTE2>(mte1ToMte2_[QUERY_EVENT + QuerySlot()]);
        }
        for (uint32_t event = 0; event < EVENTS; ++event) {
            WaitFlag<HardEvent::MTE1_MTE2>(mte1ToMte2_[event]);
        }
        cube_.Finish();
    }

private:
    static constexpr uint32_t L1_ELEMENTS = MASS_TILE_ROWS * 256;
    static constexpr uint32_t SCORES_ELEMENTS = MASS_TILE_ROWS * MASS_CHUNK;
    static constexpr uint32_t KEY_EVENT = 0, QUERY_EVENT = 2, EVENTS = 4;

    __aicore__ inline uint32_t QuerySlot() const { return (loads_ - 1) % 2; }

    __aicore__ inline void Scores(const MassStep& step, const MassUnit& unit)
    {
        const uint32_t slot = step.index % 2;
        LoadQueries(step, unit);
        const LocalTensor<T> keys = keyL1_[slot * L1_ELEMENTS];
        WaitFlag<HardEvent::MTE1_MTE2>(mte1ToMte2_[KEY_EVENT + slot]);
        const uint64_t line = (static_cast<uint64_t>(step.batch) * tiling_.keyHeads + step.keyHead) * tiling_.keys + step.key;
        CopyRowsToL1(keys, step.paddedKeys, 0, 1, keyGm_[line * tiling_.dim], step.keys, tiling_.dim, tiling_.dim);
        RepeatRowInL1(keys, step.paddedKeys, step.keys, keyGm_[(line + step.keys - 1) * tiling_.dim],
                      step.paddedKeys - step.keys, tiling_.dim);
        SetFlag<HardEvent::MTE2_MTE1>(mte2ToMte1_[KEY_EVENT + slot]);
        if (scored_ >= MASS_SLOTS) {
            CrossCoreWaitFlag(MASS_SCORES_READ);
        }
        ++scored_;
        WaitFlag<HardEvent::MTE2_MTE1>(mte2ToMte1_[KEY_EVENT + slot]);
        cube_.MultiplyTransposed(scoresGm_[slot * SCORES_ELEMENTS], MASS_CHUNK, queryL1_[QuerySlot() * L1_ELEMENTS], keys,
                                 step.paddedRows, step.paddedKeys, tiling_.dim);
        SetFlag<HardEvent::MTE1_MTE2>(mte1ToMte2_[KEY_EVENT + slot]);
        CrossCoreSetFlag<2, PIPE_FIX>(MASS_SCORES_READY);
    }

    // Queries stay in L1 while the tile and its head do.
    __aicore__ inline void LoadQueries(const MassStep& step, const MassUnit& unit)
    {
        if (loads_ > 0 && loadedUnit_ == unit.index && loadedTile_ == step.tileOfUnit) {
            return;
        }
        if (loads_ > 0) {
            SetFlag<HardEvent::MTE1_MTE2>(mte1ToMte2_[QUERY_EVENT + QuerySlot()]);
        }
        ++loads_;
        loadedUnit_ = unit.index;
        loadedTile_ = step.tileOfUnit;
        const LocalTensor<T> queries = queryL1_[QuerySlot() * L1_ELEMENTS];
        WaitFlag<HardEvent::MTE1_MTE2>(mte1ToMte2_[QUERY_EVENT + QuerySlot()]);
        const uint64_t head = static_cast<uint64_t>(step.batch) * tiling_.queryHeads + step.keyHead * tiling_.group;
        for (uint32_t g = 0; g < tiling_.group; ++g) {
            CopyRowsToL1(queries, step.paddedRows, g, tiling_.group,
                         queryGm_[((head + g) * tiling_.queries + step.firstToken) * tiling_.dim], step.tokens, tiling_.dim,
                         tiling_.dim);
        }
        RepeatRowInL1(queries, step.paddedRows, step.rows, queryGm_[(head * tiling_.queries + step.firstToken) * tiling_.dim],
                      step.paddedRows - step.rows, tiling_.dim);
        SetFlag<HardEvent::MTE2_MTE1>(mte2ToMte1_[QUERY_EVENT + QuerySlot()]);
        WaitFlag<HardEvent::MTE2_MTE1>(mte2ToMte1_[QUERY_EVENT + QuerySlot()]);
    }

    AttentionMassTiling tiling_;
    EventIds<HardEvent::MTE1_MTE2, 4> mte1ToMte2_;
    EventIds<HardEvent::MTE2_MTE1, 4> mte2ToMte1_;
    CubeTile<T> cube_;
    GlobalTensor<T> queryGm_, keyGm_;
    GlobalTensor<float> scoresGm_;
    TBuf<TPosition::A1> queryBuffer_, keyBuffer_;
    LocalTensor<T> queryL1_, keyL1_;
    uint32_t scored_ = 0, loads_ = 0, loadedUnit_ = 0, loadedTile_ = 0;
    bool statisticsKnown_ = false;
};

// Normalise: half of the rows of all 128 keys. Share: all rows of half of the keys, so that heads and queries meet in one core.
class MassVector {
public:
    __aicore__ inline void Init(const AttentionMassTiling& tiling, GM_ADDR valid, GM_ADDR mass, GM_ADDR workspace,
                                TPipe* pipe)
    {
        tiling_ = tiling;
        validGm_.SetGlobalBuffer(reinterpret_cast<__gm__ uint8_t*>(valid));
        massGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(mass));
        scoresGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace));
        statisticsGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace + MASS_SLOTS * MASS_SCORES_BYTES));
        pipe->InitBuffer(scoresBuffer_, 2 * SCORES_ELEMENTS * sizeof(float));
        pipe->InitBuffer(foldedBuffer_, SoftmaxRows::ROWS * REPEAT_FLOATS * sizeof(float));
        pipe->InitBuffer(sharesBuffer_, MASS_TILE_ROWS * REPEAT_FLOATS * sizeof(float));
        pipe->InitBuffer(massBuffer_, MASS_TILE_ROWS * REPEAT_FLOATS * sizeof(float));
        pipe->InitBuffer(rowBuffer_, ROW_ELEMENTS * sizeof(float));
        scoresUb_ = scoresBuffer_.Get<float>();
        foldedUb_ = foldedBuffer_.Get<float>();
        sharesUb_ = sharesBuffer_.Get<float>();
        massUb_ = massBuffer_.Get<float>();
        const LocalTensor<float> rows = rowBuffer_.Get<float>();
        softmax_.Init(rows);
        maximumUb_ = rows[SoftmaxRows::ELEMENTS];
        sumUb_ = maximumUb_[SoftmaxRows::ROWS];
        finishedUb_ = sumUb_[SoftmaxRows::ROWS];
        statisticsUb_ = finishedUb_[2 * SoftmaxRows::ROWS];
        wideUb_ = statisticsUb_[2 * STATISTICS_ELEMENTS];
        vToMte2_.Init(pipe);
        mte3ToV_.Init(pipe);
        mte2ToV_.Init(pipe);
        vToMte3_.Init(pipe);
        for (uint32_t event = 0; event < 2; ++event) {
            SetFlag<HardEvent::V_MTE2>(vToMte2_[event]);
            SetFlag<HardEvent::MTE3_V>(mte3ToV_[event]);
        }
    }

    __aicore__ inline void Finish()
    {
        for (uint32_t event = 0; event < 2; ++event) {
            WaitFlag<HardEvent::V_MTE2>(vToMte2_[event]);
            WaitFlag<HardEvent::MTE3_V>(mte3ToV_[event]);
        }
    }

    __aicore__ inline void BeginUnit(const MassUnit&) {}

    // Running maximum and sum of this core's rows; after their last keys, maximum and inverse sum to GM.
    __aicore__ inline void Normalise(const MassStep& step, const MassUnit& unit)
    {
        const uint32_t slot = step.index % 2;
        const uint32_t rows = step.paddedRows / 2, firstRow = GetSubBlockIdx() * rows;
        const LocalTensor<float> scores = scoresUb_[slot * SCORES_ELEMENTS];
        CrossCoreWaitFlag(MASS_SCORES_READY);
        WaitFlag<HardEvent::V_MTE2>(vToMte2_[slot]);
        const uint16_t unused = (MASS_CHUNK - step.paddedKeys) / BLOCK_FLOATS;
        const DataCopyParams copy(rows, step.paddedKeys / BLOCK_FLOATS, unused, unused);
        DataCopy(scores, scoresGm_[(slot * MASS_TILE_ROWS + firstRow) * MASS_CHUNK], copy);
        CrossCoreSetFlag<2, PIPE_MTE2>(MASS_SCORES_READ);
        SetFlag<HardEvent::MTE2_V>(mte2ToV_[slot]);
        WaitFlag<HardEvent::MTE2_V>(mte2ToV_[slot]);

        ScaleScores(scores, tiling_.scale, step.keys, rows);
        for (uint32_t side = 0; side < SCORE_HALVES; ++side) {
            HideInvisible(scores[side * REPEAT_FLOATS], step, side * REPEAT_FLOATS, firstRow, rows, SCORE_STRIDE);
        }
        if (step.key == 0) {
            softmax_.Begin(maximumUb_, sumUb_, rows);
        }
        softmax_.Update(scores, maximumUb_, sumUb_, foldedUb_, rows);
        SetFlag<HardEvent::V_MTE2>(vToMte2_[slot]);

        if (step.key + step.keys == step.visible) {
            WaitFlag<HardEvent::MTE3_V>(mte3ToV_[STATISTICS_EVENT]);
            Adds(finishedUb_, maximumUb_, 0.0f, rows);
            softmax_.Inverse(finishedUb_[SoftmaxRows::ROWS], sumUb_, rows);
            SetFlag<HardEvent::V_MTE3>(vToMte3_[STATISTICS_EVENT]);
            WaitFlag<HardEvent::V_MTE3>(vToMte3_[STATISTICS_EVENT]);
            const uint64_t offset = StatisticsOffset(step, unit) + firstRow;
            DataCopy(statisticsGm_[offset], finishedUb_, rows);
            DataCopy(statisticsGm_[offset + MASS_TILE_ROWS], finishedUb_[SoftmaxRows::ROWS], rows);
            SetFlag<HardEvent::MTE3_V>(mte3ToV_[STATISTICS_EVENT]);
        }
    }

    __aicore__ inline void EndNormalise() { CrossCoreSetFlag<2, PIPE_MTE3>(MASS_STATISTICS_READY); }

    __aicore__ inline void BeginChunk(const MassUnit& unit)
    {
        WaitFlag<HardEvent::MTE3_V>(mte3ToV_[MASS_EVENT]);
        Duplicate(massUb_, 0.0f, unit.blocks * REPEAT_FLOATS);
        PipeBarrier<PIPE_V>();
    }

    // The tile's attention weights of this core's keys, summed over heads; after the last head, reduced over queries.
    __aicore__ inline void Share(const MassStep& step, const MassUnit& unit)
    {
        const uint32_t slot = step.index % 2;
        const uint32_t column = GetSubBlockIdx() * REPEAT_FLOATS, rows = step.paddedRows;
        CrossCoreWaitFlag(MASS_SCORES_READY);
        if (step.keys > column) {
            const LocalTensor<float> scores = scoresUb_[slot * SCORES_ELEMENTS];
            const LocalTensor<float> statistics = statisticsUb_[slot * STATISTICS_ELEMENTS];
            const uint32_t keys = Least(step.keys - column, REPEAT_FLOATS);
            const uint32_t paddedKeys = Least(step.paddedKeys - column, REPEAT_FLOATS);
            WaitFlag<HardEvent::V_MTE2>(vToMte2_[slot]);
            const DataCopyParams copy(rows, paddedKeys / BLOCK_FLOATS, (MASS_CHUNK - paddedKeys) / BLOCK_FLOATS,
                                               (REPEAT_FLOATS - paddedKeys) / BLOCK_FLOATS);
            DataCopy(scores, scoresGm_[slot * MASS_TILE_ROWS * MASS_CHUNK + column], copy);
            DataCopy(statistics, statisticsGm_[StatisticsOffset(step, unit)], rows);
            DataCopy(statistics[MASS_TILE_ROWS], statisticsGm_[StatisticsOffset(step, unit) + MASS_TILE_ROWS], rows);
            CrossCoreSetFlag<2, PIPE_MTE2>(MASS_SCORES_READ);
            SetFlag<HardEvent::MTE2_V>(mte2ToV_[slot]);
            WaitFlag<HardEvent::MTE2_V>(mte2ToV_[slot]);

            Muls(scores, scores, tiling_.scale, keys, rows, {1, 1, HALF_STRIDE, HALF_STRIDE});
            SoftmaxRows::Widen(wideUb_, statistics, rows);
            PipeBarrier<PIPE_V>();
            HideInvisible(scores, step, column, 0, rows, HALF_STRIDE);
            Sub(scores, scores, wideUb_, REPEAT_FLOATS, rows, {1, 1, 0, HALF_STRIDE, HALF_STRIDE, 1});
            PipeBarrier<PIPE_V>();
            Exp(scores, scores, rows * REPEAT_FLOATS);
            SoftmaxRows::Widen(wideUb_, statistics[MASS_TILE_ROWS], rows);
            PipeBarrier<PIPE_V>();
            Mul(scores, scores, wideUb_, REPEAT_FLOATS, rows, {1, 1, 0, HALF_STRIDE, HALF_STRIDE, 1});
            if (step.firstHead) {
                Duplicate(sharesUb_, 0.0f, step.tokens * REPEAT_FLOATS);
            }
            PipeBarrier<PIPE_V>();
            AddHeads(scores, step.tokens);
            SetFlag<HardEvent::V_MTE2>(vToMte2_[slot]);
            if (step.lastHead) {
                Muls(sharesUb_, sharesUb_, 1.0f / (tiling_.group * unit.heads), step.tokens * REPEAT_FLOATS);
                PipeBarrier<PIPE_V>();
                ReduceQueries(step, unit);
            }
        } else {
            CrossCoreSetFlag<2, PIPE_MTE2>(MASS_SCORES_READ);
        }
    }

    __aicore__ inline void Write(const MassUnit& unit, uint32_t key)
    {
        const uint32_t column = key + GetSubBlockIdx() * REPEAT_FLOATS;
        if (column < tiling_.keys) {
            if (tiling_.reduceMean) {
                DivideByLive(unit);
            }
            SetFlag<HardEvent::V_MTE3>(vToMte3_[MASS_EVENT]);
            WaitFlag<HardEvent::V_MTE3>(vToMte3_[MASS_EVENT]);
            const uint32_t keys = Least(tiling_.keys - column, REPEAT_FLOATS);
            const uint32_t heads = tiling_.perKv ? tiling_.keyHeads : 1;
            const uint64_t line = (static_cast<uint64_t>(unit.batch) * heads + unit.outputHead) * tiling_.blocks + unit.firstRow;
            const uint32_t unused = (REPEAT_FLOATS - keys) / BLOCK_FLOATS;
            const DataCopyExtParams copy(unit.blocks, keys * sizeof(float), unused,
                                                  (tiling_.keys - keys) * sizeof(float), 0);
            DataCopyPad(massGm_[line * tiling_.keys + column], massUb_, copy);
        }
        SetFlag<HardEvent::MTE3_V>(mte3ToV_[MASS_EVENT]);
    }

private:
    static constexpr uint32_t SCORES_ELEMENTS = MASS_TILE_ROWS * MASS_CHUNK / 2;
    static constexpr uint32_t STATISTICS_ELEMENTS = 2 * MASS_TILE_ROWS;  // maximum and inverse sum
    static constexpr uint32_t ROW_ELEMENTS =
        SoftmaxRows::ELEMENTS + 4 * SoftmaxRows::ROWS + 2 * STATISTICS_ELEMENTS + MASS_TILE_ROWS * BLOCK_FLOATS;
    static constexpr uint8_t HALF_STRIDE = REPEAT_FLOATS / BLOCK_FLOATS;
    static constexpr uint32_t STATISTICS_EVENT = 0, MASS_EVENT = 1;
    static constexpr uint32_t MAX_STRIDE = 255;  // of a repeat, in blocks of 32 bytes

    __aicore__ inline uint64_t StatisticsOffset(const MassStep& step, const MassUnit& unit) const
    {
        return (static_cast<uint64_t>(unit.index % 2) * tiling_.tilesOfUnit + step.tileOfUnit) * STATISTICS_ELEMENTS;
    }

    __aicore__ inline bool IsValid(uint32_t batch, uint32_t position) const
    {
        return tiling_.hasValid == 0 || validGm_.GetValue(static_cast<uint64_t>(batch) * tiling_.keys + position) != 0;
    }

    // Of the chunk's columns [column, column + 64): those beyond the chunk and padding for every row, later keys for each token,
    // and everything for a token that is padding itself.
    __aicore__ inline void HideInvisible(const LocalTensor<float>& scores, const MassStep& step, uint32_t column,
                                         uint32_t firstRow, uint32_t rows, uint8_t rowStride)
    {
        uint64_t hidden = ColumnsFrom(step.keys, column);
        if (tiling_.hasValid) {
            for (uint32_t i = 0; i < REPEAT_FLOATS && column + i < step.keys; ++i) {
                hidden |= IsValid(step.batch, step.key + column + i) ? 0 : 1ull << i;
            }
        }
        Hide(scores, hidden, rows, rowStride);
        PipeBarrier<PIPE_V>();
        for (uint32_t row = firstRow; row < firstRow + rows && row < step.rows;) {
            const uint32_t token = row / tiling_.group;
            const uint32_t position = tiling_.keys - tiling_.queries + step.firstToken + token;
            const uint32_t end = Least((token + 1) * tiling_.group, firstRow + rows);
            const uint32_t seen = position + 1 > step.key ? position + 1 - step.key : 0;
            const uint64_t more = IsValid(step.batch, position) ? ColumnsFrom(seen, column) : ~0ull;
            if ((more & ~hidden) != 0) {
                Hide(scores[(row - firstRow) * rowStride * BLOCK_FLOATS], more, end - row, rowStride);
            }
            row = end;
        }
        PipeBarrier<PIPE_V>();
    }

    __aicore__ inline void AddHeads(const LocalTensor<float>& weights, uint32_t tokens)
    {
        const uint32_t stride = tiling_.group * HALF_STRIDE;
        for (uint32_t g = 0; g < tiling_.group; ++g) {
            if (stride <= MAX_STRIDE) {
                const uint8_t tokenStride = stride;
                Add(sharesUb_, sharesUb_, weights[g * REPEAT_FLOATS], REPEAT_FLOATS, tokens,
                             {1, 1, 1, HALF_STRIDE, HALF_STRIDE, tokenStride});
            } else {
                for (uint32_t token = 0; token < tokens; ++token) {
                    Add(sharesUb_[token * REPEAT_FLOATS], sharesUb_[token * REPEAT_FLOATS],
                                 weights[(token * tiling_.group + g) * REPEAT_FLOATS], REPEAT_FLOATS);
                }
            }
            PipeBarrier<PIPE_V>();
        }
    }

    // Folds every block's queries into its row of the output.
    __aicore__ inline void ReduceQueries(const MassStep& step, const MassUnit& unit)
    {
        const uint32_t first = step.firstToken - unit.firstToken;
        for (uint32_t token = 0; token < step.tokens;) {
            const uint32_t block = (first + token) / tiling_.block;
            const uint32_t end = Least((block + 1) * tiling_.block - first, step.tokens);
            uint32_t left = end - token;
            while (left > 1) {
                const uint32_t kept = (left + 1) / 2;
                Reduce(sharesUb_[token * REPEAT_FLOATS], sharesUb_[(token + kept) * REPEAT_FLOATS], left - kept);
                PipeBarrier<PIPE_V>();
                left = kept;
            }
            Reduce(massUb_[block * REPEAT_FLOATS], sharesUb_[token * REPEAT_FLOATS], 1);
            token = end;
        }
        PipeBarrier<PIPE_V>();
    }

    __aicore__ inline void Reduce(const LocalTensor<float>& into, const LocalTensor<float>& from, uint32_t rows)
    {
        if (tiling_.reduceMean) {
            Add(into, into, from, rows * REPEAT_FLOATS);
        } else {
            Max(into, into, from, rows * REPEAT_FLOATS);
        }
    }

    __aicore__ inline void DivideByLive(const MassUnit& unit)
    {
        for (uint32_t block = 0; block < unit.blocks; ++block) {
            const uint32_t begin = block * tiling_.block, end = Least(begin + tiling_.block, unit.tokens);
            uint32_t live = 0;
            for (uint32_t token = begin; token < end; ++token) {
                live += IsValid(unit.batch, tiling_.keys - tiling_.queries + unit.firstToken + token) ? 1 : 0;
            }
            if (live > 1) {
                Muls(massUb_[block * REPEAT_FLOATS], massUb_[block * REPEAT_FLOATS], 1.0f / live, REPEAT_FLOATS);
            }
        }
    }

    EventIds<HardEvent::V_MTE2, 2> vToMte2_;
    EventIds<HardEvent::MTE3_V, 2> mte3ToV_;
    EventIds<HardEvent::MTE2_V, 2> mte2ToV_;
    EventIds<HardEvent::V_MTE3, 2> vToMte3_;
    AttentionMassTiling tiling_;
    SoftmaxRows softmax_;
    GlobalTensor<uint8_t> validGm_;
    GlobalTensor<float> massGm_, scoresGm_, statisticsGm_;
    TBuf<TPosition::VECCALC> scoresBuffer_, foldedBuffer_, sharesBuffer_, massBuffer_, rowBuffer_;
    LocalTensor<float> scoresUb_, foldedUb_;
    LocalTensor<float> sharesUb_;  // of a tile: weights of 64 keys for each token, summed over heads
    LocalTensor<float> massUb_;    // of a unit: 64 keys for each block of queries
    LocalTensor<float> maximumUb_, sumUb_, finishedUb_, statisticsUb_, wideUb_;
};

template <typename T>
__aicore__ inline void RunAttentionMass(const AttentionMassTiling& tiling, GM_ADDR q, GM_ADDR k, GM_ADDR valid, GM_ADDR mass,
                                        GM_ADDR workspace)
{
    TPipe pipe;
    workspace += static_cast<uint64_t>(CoreIndex()) * tiling.coreBytes;
    if ASCEND_IS_AIC {
        MassCube<T> cube;
        cube.Init(tiling, q, k, workspace, &pipe);
        WalkMass(tiling, cube);
        cube.Finish();
    }
    if ASCEND_IS_AIV {
        MassVector vector;
        vector.Init(tiling, valid, mass, workspace, &pipe);
        WalkMass(tiling, vector);
        vector.Finish();
    }
}

}  // namespace npu_sparse_ascendc

// mass is fp32 [B, Hs, Nq, Tk]; valid is uint8 [B, Tk] or null. MakeAttentionMassTiling and AttentionMassWorkspace say the rest.
extern "C" MIXED_KERNEL void npu_sparse_attention_mass(GM_ADDR q, GM_ADDR k, GM_ADDR valid, GM_ADDR mass, GM_ADDR workspace,
                                                       npu_sparse_ascendc::AttentionMassTiling tiling)
{
    TASK_TYPE(KERNEL_TYPE_MIX_AIC_1_2);
    if (tiling.bfloat16) {
        npu_sparse_ascendc::RunAttentionMass<bfloat16_t>(tiling, q, k, valid, mass, workspace);
    } else {
        npu_sparse_ascendc::RunAttentionMass<half>(tiling, q, k, valid, mass, workspace);
    }
}
