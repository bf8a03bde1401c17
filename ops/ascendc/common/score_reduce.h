// The vector half of scoring: heads are weighted and summed, and every block of queries reduced to one row of scores.
#pragma once

#include "../generated/score_order.h"
#include "../generated/score_tiles.h"
#include "score_schedule.h"
#include "valid_mask.h"

namespace npu_sparse_ascendc {

// `Sink` takes the rows as they come: Begin() gives the row to fill, Keep(...) may raise scores of keys that are always kept,
// End(...) takes it. Only visible keys of a row are above -inf.
template <typename T, typename Sink>
class ScoreReducer {
public:
    __aicore__ inline void Init(TPipe* pipe, const ScoreTiling& tiling, GM_ADDR w, GM_ADDR valid, GM_ADDR partition, GM_ADDR workspace,
                                Sink* taker)
    {
        t = tiling;
        sink = taker;
        core = GetBlockIdx() / SUBS;
        sub = GetSubBlockIdx();
        combined = t.hasWeights || t.heads > 1;
        slotsGm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace));
        const uint32_t tileBytes = t.queriesPerLoad * t.keysPerStep * sizeof(float);
        pipe->InitBuffer(productsUb, PRODUCT_BUFFERS, tileBytes);
        if (combined || t.mean) {
            pipe->InitBuffer(scoresUb, tileBytes);
        }
        if (t.hasWeights) {
            wGm.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(w));
            weightsPerLoad = Aligned(t.queriesPerLoad * t.heads, FRACTAL);
            const uint32_t weights = Loads() * weightsPerLoad;
            pipe->InitBuffer(rawWeightsUb, Aligned(weights * sizeof(T), REPEAT_FLOATS * sizeof(float)));
            pipe->InitBuffer(weightsUb, weights * sizeof(float));
            pipe->InitBuffer(weightBlocksUb, weightsPerLoad * BLOCK_BYTES);
        }
        if (t.hasValid) {
            validGm.SetGlobalBuffer(valid);
            mask.Init(pipe, valid, t.keys, t.keysPerStep);
            pipe->InitBuffer(queryValidUb, 128);
        }
        if (t.hasPartition || t.passes <= t.mean) {
            partitionGm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(partition));
        }
        if (t.hasPartition) {
            shiftsPerLoad = Aligned(t.queriesPerLoad, BLOCK_FLOATS);
            pipe->InitBuffer(shiftsUb, Loads() * shiftsPerLoad * sizeof(float));
            pipe->InitBuffer(shiftBlocksUb, shiftsPerLoad * BLOCK_BYTES);
        }
        if (t.mean) {
            pipe->InitBuffer(largestUb, Loads() * LANES * sizeof(float));
            pipe->InitBuffer(sumUb, Loads() * LANES * sizeof(float));
            pipe->InitBuffer(foldedUb, t.queriesPerLoad * REPEAT_FLOATS * sizeof(float));
            pipe->InitBuffer(spreadUb, LANES * BLOCK_BYTES);
            pipe->InitBuffer(statUb, 3 * REPEAT_FLOATS * sizeof(float));
            pipe->InitBuffer(rowUb, t.keysPerStep * sizeof(float));
        }
    }

    __aicore__ inline void Process()
    {
        CrossCoreSetFlag<2, PIPE_MTE2>(SCORES_TAKEN);
        CrossCoreSetFlag<2, PIPE_MTE2>(SCORES_TAKEN + 1);
        uint32_t slot = 0;
        for (uint32_t i = 0; ScoreItemAt(t, core, i, item); i++) {
            BeginItem();
            for (uint32_t pass = 0; pass < t.passes; pass++) {
                for (uint32_t first = item.firstKey; first < item.endKey; first += t.keysPerStep) {
                    CrossCoreWaitFlag(SCORES_READY + slot);
                    TakeStep(first, slot, pass == t.mean);
                    CrossCoreSetFlag<2, PIPE_MTE2>(SCORES_TAKEN + slot);
                    slot = 1 - slot;
                }
            }
            if (t.passes <= t.mean) {
                StorePartitions();
            }
            sink->EndItem(item, firstQuery, queries);
        }
    }

private:
    static constexpr uint32_t LANES = MAX_QUERIES_PER_LOAD;  // their statistics lie together

    __aicore__ inline void BeginItem()
    {
        firstQuery = item.firstQuery + sub * t.queriesPerSub;
        queries = SubQueries(t, item, sub);
        firstPosition = t.keys - t.queries + firstQuery;
        allValid = true;
        PipeBarrier<PIPE_ALL>();  // the scalar unit and the vector unit are done with the last item's queries
        if (queries > 0 && t.hasWeights) {
            LoadWeights();
        }
        if (queries > 0 && t.hasPartition) {
            LoadShifts();
        }
        if (queries > 0 && t.hasValid) {
            LocalTensor<uint8_t> flags = queryValidUb.Get<uint8_t>();
            const uint64_t from = static_cast<uint64_t>(item.sequence) * t.keys + firstPosition;
            LoadRagged(flags, validGm[from], queries);
            Order<HardEvent::MTE2_S>();
            for (uint32_t q = 0; q < queries; q++) {
                allValid = allValid && flags.GetValue(q) != 0;
            }
        }
        if (t.mean) {
            Duplicate(largestUb.Get<float>(), LOWEST, Loads() * LANES);
            Duplicate(sumUb.Get<float>(), 0.0f, Loads() * LANES);
            PipeBarrier<PIPE_V>();
        }
        sink->BeginItem(item, queries, mask);
    }

    // Loads of a full sub-tile, of one head.
    __aicore__ inline uint32_t Loads() const { return (t.queriesPerSub + t.queriesPerLoad - 1) / t.queriesPerLoad; }

    // fp32, times 1 / sqrt(Di); every load's weights [queries, heads] start on a block.
    __aicore__ inline void LoadWeights()
    {
        LocalTensor<T> raw = rawWeightsUb.Get<T>();
        LocalTensor<float> weights = weightsUb.Get<float>();
        const uint64_t from = (static_cast<uint64_t>(item.sequence) * t.queries + firstQuery) * t.heads;
        const uint32_t whole = queries / t.queriesPerLoad;
        const uint32_t rest = queries % t.queriesPerLoad;
        const uint32_t count = (whole + (rest > 0)) * weightsPerLoad;
        Duplicate(raw.template ReinterpretCast<half>(), static_cast<half>(0), count);
        Order<HardEvent::V_MTE2>();
        if (whole > 0) {
            LoadRagged(raw, wGm[from], t.queriesPerLoad * t.heads, whole);
        }
        if (rest > 0) {
            LoadRagged(raw[whole * weightsPerLoad], wGm[from + whole * t.queriesPerLoad * t.heads], rest * t.heads);
        }
        Order<HardEvent::MTE2_V>();
        Cast(weights, raw, RoundMode::CAST_NONE, count);
        PipeBarrier<PIPE_V>();
        Muls(weights, weights, t.scale, count);
        PipeBarrier<PIPE_V>();
    }

    // The queries' log-partitions in the unit of scores before their maximum; every load's start on a block.
    __aicore__ inline void LoadShifts()
    {
        LocalTensor<float> shifts = shiftsUb.Get<float>();
        const uint64_t from = static_cast<uint64_t>(item.sequence) * t.queries + firstQuery;
        const uint32_t whole = queries / t.queriesPerLoad;
        const uint32_t rest = queries % t.queriesPerLoad;
        const uint32_t count = (whole + (rest > 0)) * shiftsPerLoad;
        Duplicate(shifts, 0.0f, count);
        Order<HardEvent::V_MTE2>();
        if (whole > 0) {
            LoadRagged(shifts, partitionGm[from], t.queriesPerLoad, whole);
        }
        if (rest > 0) {
            LoadRagged(shifts[whole * shiftsPerLoad], partitionGm[from + whole * t.queriesPerLoad], rest);
        }
        Order<HardEvent::MTE2_V>();
        if (!combined) {
            Muls(shifts, shifts, 1.0f / t.scale, count);
            PipeBarrier<PIPE_V>();
        }
    }

    __aicore__ inline bool IsValid(uint32_t query)
    {
        return allValid || queryValidUb.Get<uint8_t>().GetValue(query) != 0;
    }

    // Keys of the step that a query sees.
    __aicore__ inline uint32_t Seen(uint32_t query, uint32_t first, uint32_t keys)
    {
        return IsValid(query) ? Least(keys, Above(firstPosition + query + 1, first)) : 0;
    }

    __aicore__ inline void TakeStep(uint32_t first, uint32_t slot, bool last)
    {
        const uint32_t keys = Least(t.keysPerStep, item.endKey - first);
        const uint32_t loads = (queries + t.queriesPerLoad - 1) / t.queriesPerLoad * t.heads;
        LocalTensor<uint8_t> bits;
        if (t.hasValid && queries > 0) {
            bits = mask.Load(item.sequence, first, keys);
        }
        for (uint32_t load = 0; load < Least(loads, PRODUCT_BUFFERS - 1); load++) {
            LoadProducts(slot, load, keys);
        }
        LocalTensor<float> row;
        for (uint32_t load = 0; load < loads; load += t.heads) {
            const uint32_t query = load / t.heads * t.queriesPerLoad;
            const uint32_t count = Least(t.queriesPerLoad, queries - query);
            LocalTensor<float> products;
            LocalTensor<float> scores;
            for (uint32_t head = 0; head < t.heads; head++) {
                if (load + head + PRODUCT_BUFFERS - 1 < loads) {
                    LoadProducts(slot, load + head + PRODUCT_BUFFERS - 1, keys);
                }
                products = productsUb.template DeQue<float>();
                if (!combined && !t.mean) {
                    scores = products;
                    break;
                }
                scores = scoresUb.Get<float>();
                AddHead(scores, products, query, count, head, Aligned(keys, FRACTAL));
                productsUb.FreeTensor(products);
            }
            if (t.hasPartition) {
                TakeShifts(scores, load / t.heads, count, Aligned(keys, FRACTAL));
            }
            if (t.mean) {
                MaskRows(scores, bits, query, count, first, keys);
                last ? Weigh(scores, load / t.heads, count) : Accumulate(scores, load / t.heads, count);
            }
            if (last) {
                row = ReduceLoad(row, scores, bits, query, count, first, keys);
            }
            if (!combined && !t.mean) {
                productsUb.FreeTensor(products);
            }
        }
    }

    // [count, keys] products of a load's queries and one head, into rows of keysPerStep.
    __aicore__ inline void LoadProducts(uint32_t slot, uint32_t load, uint32_t keys)
    {
        const uint32_t queryLoads = (queries + t.queriesPerLoad - 1) / t.queriesPerLoad;
        const uint32_t query = QueriesOfLoad(load, t.heads, queryLoads) * t.queriesPerLoad;
        const uint32_t count = Least(t.queriesPerLoad, queries - query);
        const uint64_t row = static_cast<uint64_t>(HeadOfLoad(load, t.heads, queryLoads)) * queries + query;
        const uint16_t blocks = Aligned(keys, FRACTAL) / BLOCK_FLOATS;
        const uint16_t gap = t.keysPerStep / BLOCK_FLOATS - blocks;
        LocalTensor<float> products = productsUb.template AllocTensor<float>();
        const DataCopyParams copy = {static_cast<uint16_t>(count), blocks, gap, gap};
        DataCopy(products, slotsGm[SlotOffset(t, core, sub, slot) + row * t.keysPerStep], copy);
        productsUb.EnQue(products);
    }

    // scores (+)= w ReLU(...) / sqrt(Di)
    __aicore__ inline void AddHead(const LocalTensor<float>& scores, const LocalTensor<float>& products, uint32_t query,
                                   uint32_t count, uint32_t head, uint32_t columns)
    {
        if (t.hasWeights) {
            AddWeightedHead(scores, products, query, count, head, columns);
        } else {
            const bool whole = columns == t.keysPerStep;
            for (uint32_t i = 0; i < (whole ? 1 : count); i++) {
                const uint32_t at = i * t.keysPerStep;
                if (head == 0) {
                    Muls(scores[at], products[at], t.scale, whole ? count * columns : columns);
                } else {
                    Axpy(scores[at], products[at], t.scale, whole ? count * columns : columns);
                }
            }
        }
        PipeBarrier<PIPE_V>();
    }

    // Every weight fills a block, so that it multiplies a row of scores: 64 columns of all rows with one instruction, or all columns
    // of a row where that takes fewer of them.
    __aicore__ inline void AddWeightedHead(const LocalTensor<float>& scores, const LocalTensor<float>& products, uint32_t query,
                                           uint32_t count, uint32_t head, uint32_t columns)
    {
        LocalTensor<float> blocks = weightBlocksUb.Get<float>();
        if (head == 0) {
            Brcb(blocks, weightsUb.Get<float>()[query / t.queriesPerLoad * weightsPerLoad], weightsPerLoad / 8, {1, 8});
            PipeBarrier<PIPE_V>();
        }
        const uint8_t stride = t.keysPerStep / BLOCK_FLOATS;
        const LocalTensor<float> weight = blocks[head * BLOCK_FLOATS];
        if (columns % REPEAT_FLOATS == 0 && count < columns / REPEAT_FLOATS) {
            const BinaryRepeatParams along(1, 1, 0, REPEAT_FLOATS / BLOCK_FLOATS, REPEAT_FLOATS / BLOCK_FLOATS, 0);
            for (uint32_t i = 0; i < count; i++) {
                const uint32_t at = i * t.keysPerStep;
                AddWeighted(scores[at], products[at], weight[i * t.heads * BLOCK_FLOATS], REPEAT_FLOATS, columns / REPEAT_FLOATS,
                            along, head == 0);
            }
            return;
        }
        const BinaryRepeatParams rows(1, 1, 0, stride, stride, static_cast<uint8_t>(t.heads));
        for (uint32_t at = 0; at < columns; at += REPEAT_FLOATS) {
            AddWeighted(scores[at], products[at], weight, Least(REPEAT_FLOATS, columns - at), count, rows, head == 0);
        }
    }

    __aicore__ inline void AddWeighted(const LocalTensor<float>& scores, const LocalTensor<float>& products,
                                       const LocalTensor<float>& weight, uint64_t lanes, uint8_t repeats,
                                       const BinaryRepeatParams& strides, bool first)
    {
        if (first) {
            Mul(scores, products, weight, lanes, repeats, strides);
        } else {
            MulAddDst(scores, products, weight, lanes, repeats, strides);
        }
    }

    // Every query's scores less its log-partition. The cube has taken ReLU before.
    __aicore__ inline void TakeShifts(const LocalTensor<float>& scores, uint32_t load, uint32_t count, uint32_t columns)
    {
        LocalTensor<float> blocks = shiftBlocksUb.Get<float>();
        Brcb(blocks, shiftsUb.Get<float>()[load * shiftsPerLoad], shiftsPerLoad / 8, {1, 8});
        PipeBarrier<PIPE_V>();
        for (uint32_t at = 0; at < columns; at += REPEAT_FLOATS) {
            Sub(scores[at], scores[at], blocks, Least(REPEAT_FLOATS, columns - at), count, PerRow());
        }
        PipeBarrier<PIPE_V>();
    }

    // The rows of a load that end here are given to the sink; the row that goes on is returned.
    __aicore__ inline LocalTensor<float> ReduceLoad(LocalTensor<float> row, const LocalTensor<float>& scores,
                                                    const LocalTensor<uint8_t>& bits, uint32_t query, uint32_t count,
                                                    uint32_t first, uint32_t keys)
    {
        uint32_t from = query;
        while (from < query + count) {
            const uint32_t index = from / t.block;
            const uint32_t end = Least((index + 1) * t.block, queries);
            const uint32_t to = Least(end, query + count);
            if (from == index * t.block) {
                row = sink->Begin();
                Duplicate(row, t.mean ? 0.0f : MINUS_INFINITY, t.keysPerStep);
                PipeBarrier<PIPE_V>();
            }
            const LocalTensor<float> part = scores[(from - query) * t.keysPerStep];
            t.mean ? AddRows(row, part, from, to, first, keys) : MaxRows(row, part, from, to, first, keys);
            if (to == end) {
                FinishRow(row, bits, index, end, first, keys);
            }
            from = to;
        }
        return row;
    }

    __aicore__ inline void MaxRows(const LocalTensor<float>& row, const LocalTensor<float>& scores, uint32_t from, uint32_t to,
                                   uint32_t first, uint32_t keys)
    {
        if (allValid && keys == t.keysPerStep && first + keys <= firstPosition + from + 1) {
            for (uint32_t rows = to - from; rows > 1; rows -= rows / 2) {  // the last half of the rows onto the first
                Max(scores, scores, scores[(rows - rows / 2) * t.keysPerStep], rows / 2 * t.keysPerStep);
                PipeBarrier<PIPE_V>();
            }
            Max(row, row, scores, keys);
            PipeBarrier<PIPE_V>();
            return;
        }
        for (uint32_t query = from; query < to; query++) {  // what a query does not see is not even read
            const uint32_t seen = Seen(query, first, keys);
            if (seen > 0) {
                Max(row, row, scores[(query - from) * t.keysPerStep], seen);
                PipeBarrier<PIPE_V>();
            }
        }
    }

    __aicore__ inline void AddRows(const LocalTensor<float>& row, const LocalTensor<float>& weights, uint32_t from, uint32_t to,
                                   uint32_t first, uint32_t keys)
    {
        for (uint32_t query = from; query < to; query++) {  // of a query with a NaN all weights are NaN, those it does not see too
            const uint32_t seen = Seen(query, first, keys);
            if (seen > 0) {
                Add(row, row, weights[(query - from) * t.keysPerStep], seen);
                PipeBarrier<PIPE_V>();
            }
        }
    }

    __aicore__ inline void FinishRow(const LocalTensor<float>& row, const LocalTensor<uint8_t>& bits, uint32_t index,
                                     uint32_t end, uint32_t first, uint32_t keys)
    {
        uint32_t live = end - index * t.block;
        uint32_t lastLive = end - 1;
        if (!allValid) {
            live = 0;
        }
        for (uint32_t query = index * t.block; !allValid && query < end; query++) {
            if (IsValid(query)) {
                live++;
                lastLive = query;
            }
        }
        const uint32_t visible = live > 0 ? firstPosition + lastLive + 1 : 0;
        if (t.mean) {
            LocalTensor<float> copy = rowUb.Get<float>();
            Muls(copy, row, live > 0 ? 1.0f / static_cast<float>(live) : 0.0f, t.keysPerStep);
            PipeBarrier<PIPE_V>();
            Duplicate(row, MINUS_INFINITY, t.keysPerStep);
            PipeBarrier<PIPE_V>();
            const uint32_t seen = Least(keys, Above(visible, first));
            if (seen > 0) {
                Adds(row, copy, 0.0f, seen);
                PipeBarrier<PIPE_V>();
            }
        } else if (!combined) {
            Muls(row, row, t.scale, t.keysPerStep);
            PipeBarrier<PIPE_V>();
        }
        sink->Keep(row, firstPosition + index * t.block, visible, first, keys);
        if (t.hasValid) {
            Select(row, bits, row, MINUS_INFINITY, SELMODE::VSEL_TENSOR_SCALAR_MODE, t.keysPerStep);
            PipeBarrier<PIPE_V>();
        }
        sink->End(row, item.sequence, firstQuery / t.block + index, index, visible, first, keys);
    }

    // -inf where a query does not see the key, and where there is none.
    __aicore__ inline void MaskRows(const LocalTensor<float>& scores, const LocalTensor<uint8_t>& bits, uint32_t query,
                                    uint32_t count, uint32_t first, uint32_t keys)
    {
        LocalTensor<float> copy = rowUb.Get<float>();
        for (uint32_t i = 0; i < count; i++) {
            const LocalTensor<float> row = scores[i * t.keysPerStep];
            const uint32_t seen = Seen(query + i, first, keys);
            if (seen < t.keysPerStep) {
                if (seen > 0) {
                    Adds(copy, row, 0.0f, seen);
                }
                PipeBarrier<PIPE_V>();
                Duplicate(row, MINUS_INFINITY, t.keysPerStep);
                PipeBarrier<PIPE_V>();
                if (seen > 0) {
                    Adds(row, copy, 0.0f, seen);
                    PipeBarrier<PIPE_V>();
                }
            }
            if (t.hasValid) {
                Select(row, bits, row, MINUS_INFINITY, SELMODE::VSEL_TENSOR_SCALAR_MODE, t.keysPerStep);
                PipeBarrier<PIPE_V>();
            }
        }
    }

    // [count, keysPerStep] with every row's statistic, one per block of `spread`, taken off or multiplied.
    __aicore__ inline BinaryRepeatParams PerRow()
    {
        const uint8_t stride = t.keysPerStep / BLOCK_FLOATS;
        return BinaryRepeatParams(1, 1, 0, stride, stride, 1);
    }

    __aicore__ inline void ExpOfDifference(const LocalTensor<float>& scores, const LocalTensor<float>& largest, uint32_t count)
    {
        LocalTensor<float> spread = spreadUb.Get<float>();
        Brcb(spread, largest, LANES / 8, {1, 8});
        PipeBarrier<PIPE_V>();
        for (uint32_t at = 0; at < t.keysPerStep; at += REPEAT_FLOATS) {
            Sub(scores[at], scores[at], spread, REPEAT_FLOATS, count, PerRow());
        }
        PipeBarrier<PIPE_V>();
        Exp(scores, scores, count * t.keysPerStep);
        PipeBarrier<PIPE_V>();
    }

    // First pass: every query's largest score so far and the sum of exp(z - largest).
    __aicore__ inline void Accumulate(const LocalTensor<float>& scores, uint32_t load, uint32_t count)
    {
        const uint8_t stride = t.keysPerStep / BLOCK_FLOATS;
        const BinaryRepeatParams onto = {1, 1, 1, 8, 8, stride};
        LocalTensor<float> largest = largestUb.Get<float>()[load * LANES];
        LocalTensor<float> sum = sumUb.Get<float>()[load * LANES];
        LocalTensor<float> folded = foldedUb.Get<float>();
        LocalTensor<float> stat = statUb.Get<float>();
        LocalTensor<float> correction = stat[REPEAT_FLOATS];
        LocalTensor<float> newest = stat[2 * REPEAT_FLOATS];
        Duplicate(stat, LOWEST, LANES);
        Duplicate(folded, LOWEST, count * REPEAT_FLOATS);
        PipeBarrier<PIPE_V>();
        for (uint32_t at = 0; at < t.keysPerStep; at += REPEAT_FLOATS) {
            Max(folded, folded, scores[at], REPEAT_FLOATS, count, onto);
            PipeBarrier<PIPE_V>();
        }
        WholeReduceMax(stat, folded, REPEAT_FLOATS, count, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
        PipeBarrier<PIPE_V>();
        Max(newest, largest, stat, LANES);
        PipeBarrier<PIPE_V>();
        Sub(correction, largest, newest, LANES);
        PipeBarrier<PIPE_V>();
        Exp(correction, correction, LANES);
        Adds(largest, newest, 0.0f, LANES);
        PipeBarrier<PIPE_V>();
        Mul(sum, sum, correction, LANES);
        ExpOfDifference(scores, largest, count);
        Duplicate(stat, 0.0f, LANES);
        Duplicate(folded, 0.0f, count * REPEAT_FLOATS);
        PipeBarrier<PIPE_V>();
        for (uint32_t at = 0; at < t.keysPerStep; at += REPEAT_FLOATS) {
            Add(folded, folded, scores[at], REPEAT_FLOATS, count, onto);
            PipeBarrier<PIPE_V>();
        }
        WholeReduceSum(stat, folded, REPEAT_FLOATS, count, 1, 1, 8);
        PipeBarrier<PIPE_V>();
        Add(sum, sum, stat, LANES);
        PipeBarrier<PIPE_V>();
    }

    // Second pass: scores become softmax weights. A query that sees nothing has no sum; its row is never read.
    __aicore__ inline void Weigh(const LocalTensor<float>& scores, uint32_t load, uint32_t count)
    {
        LocalTensor<float> stat = statUb.Get<float>();
        LocalTensor<float> spread = spreadUb.Get<float>();
        ExpOfDifference(scores, largestUb.Get<float>()[load * LANES], count);
        Duplicate(stat, 1.0f, LANES);
        PipeBarrier<PIPE_V>();
        Div(stat, stat, sumUb.Get<float>()[load * LANES], LANES);
        PipeBarrier<PIPE_V>();
        Brcb(spread, stat, LANES / 8, {1, 8});
        PipeBarrier<PIPE_V>();
        for (uint32_t at = 0; at < t.keysPerStep; at += REPEAT_FLOATS) {
            Mul(scores[at], scores[at], spread, REPEAT_FLOATS, count, PerRow());
        }
        PipeBarrier<PIPE_V>();
    }

    // log(sum of exp) of the item's queries to GM; -inf for those that see nothing, whose sum is zero.
    __aicore__ inline void StorePartitions()
    {
        LocalTensor<float> sum = sumUb.Get<float>();
        Ln(sum, sum, Loads() * LANES);
        PipeBarrier<PIPE_V>();
        Add(sum, sum, largestUb.Get<float>(), Loads() * LANES);
        Order<HardEvent::V_MTE3>();
        const uint64_t to = static_cast<uint64_t>(item.sequence) * t.queries + firstQuery;
        for (uint32_t query = 0; query < queries; query += t.queriesPerLoad) {
            const uint32_t count = Least(t.queriesPerLoad, queries - query);
            StoreRagged(partitionGm[to + query], sum[query / t.queriesPerLoad * LANES], count);
        }
    }

    ScoreTiling t;
    Sink* sink;
    uint32_t core;
    uint32_t sub;
    uint32_t weightsPerLoad;
    uint32_t shiftsPerLoad;
    bool combined;  // heads are summed in UB, with 1 / sqrt(Di) in their weights
    ScoreItem item;
    uint32_t firstQuery;  // of this AIV's sub-tile
    uint32_t queries;
    uint32_t firstPosition;
    bool allValid;  // no query of the sub-tile is padding
    ValidMask mask;
    GlobalTensor<float> slotsGm;
    GlobalTensor<T> wGm;
    GlobalTensor<uint8_t> validGm;
    GlobalTensor<float> partitionGm;
    TQue<TPosition::VECIN, PRODUCT_BUFFERS> productsUb;
    TBuf<TPosition::VECCALC> scoresUb;
    TBuf<TPosition::VECCALC> rawWeightsUb;
    TBuf<TPosition::VECCALC> weightsUb;
    TBuf<TPosition::VECCALC> weightBlocksUb;
    TBuf<TPosition::VECCALC> queryValidUb;
    TBuf<TPosition::VECCALC> shiftsUb;
    TBuf<TPosition::VECCALC> shiftBlocksUb;
    TBuf<TPosition::VECCALC> largestUb;
    TBuf<TPosition::VECCALC> sumUb;
    TBuf<TPosition::VECCALC> foldedUb;
    TBuf<TPosition::VECCALC> spreadUb;
    TBuf<TPosition::VECCALC> statUb;
    TBuf<TPosition::VECCALC> rowUb;
};

}  // namespace npu_sparse_ascendc
