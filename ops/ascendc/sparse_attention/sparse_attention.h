// sparse_attention: causal GQA attention over the keys that a block of queries selected. README.md has the maths and budgets.
#pragma once

#include "../common/cube_tile.h"
#include "../common/softmax_rows.h"
#include "tiling_data.h"

namespace npu_sparse_ascendc {

// In its iteration s the cube core computes the scores of step s and the weighted values of step s - ATTENTION_LAG; the vector
// cores do the softmax of step s and take up the values of step s - ATTENTION_LAG. One flag for each hand-over. Workspace rings
// have ATTENTION_LAG + 1 slots: before the cube core fills a slot again it has waited for a hand-over that the vector cores make
// after they are done with the slot, and the other way round.
constexpr uint16_t ATTENTION_SCORES_READY = 0;
constexpr uint16_t ATTENTION_WEIGHTS_READY = 1;
constexpr uint16_t ATTENTION_VALUES_READY = 2;
constexpr uint16_t ATTENTION_ROWS_GATHERED = 3;  // the rows of v of one chunk

// One chunk of keys for one part of a tile. The parts of a tile share the chunk in L1, so that one gather serves up to 256 rows.
// Row r of a part is token r / group, head r % group.
struct AttentionStep {
    __aicore__ inline uint32_t Slot() const { return index % ATTENTION_SLOTS; }

    uint32_t index, chunkIndex, tileIndex;  // count the steps, chunks and tiles of this core
    uint32_t tile, batch, keyHead;
    uint32_t tileToken, tileTokens;         // of all parts
    uint32_t part, parts;
    uint32_t firstToken, tokens, rows, paddedRows;
    uint64_t support;     // offset of the support's first slot
    uint32_t used;        // slots that any token of the tile may see
    uint32_t slot;        // first slot of the chunk
    uint32_t keys, paddedKeys;
    bool first, last;     // chunk of the tile
};

// What both kinds of core agree on without talking: which steps there are.
class AttentionSteps {
public:
    __aicore__ inline void Init(const SparseAttentionTiling& tiling, GM_ADDR indices, GM_ADDR count, GM_ADDR positions)
    {
        tiling_ = tiling;
        positionsGm_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(positions));
        indicesGm_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(indices));
        countGm_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(count));
    }

    // Of a token among the keys; -1 for one that sees nothing.
    __aicore__ inline int32_t Position(const AttentionStep& step, uint32_t token) const
    {
        if (tiling_.rowsAnywhere) {
            return positionsGm_.GetValue(static_cast<uint64_t>(step.batch) * tiling_.queries + token);
        }
        return static_cast<int32_t>(tiling_.keys - tiling_.queries + token);
    }

    __aicore__ inline bool Sees(int32_t position, const AttentionStep& step, uint32_t i) const
    {
        return static_cast<int32_t>(Key(step, i)) <= position;
    }

    // Of the first key of the step's head, among the rows of k or v.
    __aicore__ inline uint64_t KeyRow(const AttentionStep& step) const
    {
        return (static_cast<uint64_t>(step.batch) * tiling_.keyHeads + step.keyHead) * tiling_.keys;
    }

    __aicore__ inline GlobalTensor<int32_t> Keys(const AttentionStep& step, uint32_t i) const
    {
        return indicesGm_[step.support + step.slot + i];
    }

    __aicore__ inline uint32_t Key(const AttentionStep& step, uint32_t i) const
    {
        return static_cast<uint32_t>(indicesGm_.GetValue(step.support + step.slot + i));
    }

    // Sets the tile's fields; `used` is 0 for a tile without tokens or without visible keys.
    __aicore__ inline void ReadTile(AttentionStep& step, uint32_t tile) const
    {
        const uint32_t tileOfBlock = tile % tiling_.tilesPerBlock;
        const uint32_t block = tile / tiling_.tilesPerBlock % tiling_.blocks;
        const uint32_t head = tile / tiling_.tilesPerBlock / tiling_.blocks;
        step.tile = tile;
        step.keyHead = head % tiling_.keyHeads;
        step.batch = head / tiling_.keyHeads;
        const uint32_t blockEnd = Least((block + 1) * tiling_.block, tiling_.queries);
        const uint32_t most = tiling_.parts * tiling_.tokens;
        step.tileToken = Least(block * tiling_.block + tileOfBlock * most, blockEnd);
        step.tileTokens = Least(most, blockEnd - step.tileToken);
        step.parts = (step.tileTokens + tiling_.tokens - 1) / tiling_.tokens;
        SetPart(step, 0);
        const uint32_t supportHead = tiling_.supportHeads == 1 ? 0 : step.keyHead;
        const uint64_t heads = static_cast<uint64_t>(step.batch) * tiling_.supportHeads + supportHead;
        const uint64_t row = tiling_.rowsAnywhere ? step.batch : heads * tiling_.blocks + block;
        step.support = row * tiling_.width;
        step.used = step.tileTokens == 0 ? 0 : static_cast<uint32_t>(countGm_.GetValue(row));
        step.slot = 0;
        if (step.used > 0) {
            CutUnseen(step, Position(step, step.tileToken + step.tileTokens - 1));
        }
    }

    __aicore__ inline void SetPart(AttentionStep& step, uint32_t part) const
    {
        step.part = part;
        step.firstToken = step.tileToken + part * tiling_.tokens;
        step.tokens = Least(tiling_.tokens, step.tileTokens - part * tiling_.tokens);
        step.rows = step.tokens * tiling_.group;
        step.paddedRows = Aligned(step.rows, FRACTAL);
    }

    __aicore__ inline bool First(AttentionStep& step) const
    {
        step.index = step.chunkIndex = step.tileIndex = 0;
        return FindTile(step, CoreIndex());
    }

    __aicore__ inline bool Next(AttentionStep& step) const
    {
        ++step.index;
        if (step.part + 1 < step.parts) {
            SetPart(step, step.part + 1);
            return true;
        }
        return NextChunk(step);
    }

    // The first part of the next chunk; the index is the caller's.
    __aicore__ inline bool NextChunk(AttentionStep& step) const
    {
        ++step.chunkIndex;
        if (!step.last) {
            SetPart(step, 0);
            SetChunk(step, step.slot + ATTENTION_CHUNK);
            return true;
        }
        ++step.tileIndex;
        return FindTile(step, step.tile + tiling_.cores);
    }

private:
    // Keys ascend: those behind the last that is seen at `position` are used no more.
    __aicore__ inline void CutUnseen(AttentionStep& step, int32_t position) const
    {
        if (Sees(position, step, step.used - 1)) {
            return;
        }
        uint32_t seen = 0;
        for (uint32_t end = step.used - 1; seen < end;) {
            const uint32_t middle = (seen + end) / 2;
            if (Sees(position, step, middle)) {
                seen = middle + 1;
            } else {
                end = middle;
            }
        }
        step.used = seen;
    }

    __aicore__ inline bool FindTile(AttentionStep& step, uint32_t tile) const
    {
        for (; tile < tiling_.tiles; tile += tiling_.cores) {
            ReadTile(step, tile);
            if (step.used > 0) {
                SetChunk(step, 0);
                return true;
            }
        }
        return false;
    }

    __aicore__ inline void SetChunk(AttentionStep& step, uint32_t slot) const
    {
        step.slot = slot;
        step.keys = Least(step.used - slot, ATTENTION_CHUNK);
        step.paddedKeys = Aligned(step.keys, FRACTAL);
        step.first = slot == 0;
        step.last = slot + step.keys == step.used;
    }

    SparseAttentionTiling tiling_;
    GlobalTensor<int32_t> indicesGm_, countGm_, positionsGm_;
};

// Sums of weighted values of a part of a tile.
__aicore__ inline uint64_t AttentionSumsOffset(const AttentionStep& step)
{
    return (step.tileIndex % ATTENTION_SLOTS * ATTENTION_PARTS + step.part) *
           static_cast<uint64_t>(ATTENTION_TILE_ROWS * ATTENTION_MAX_DIM);
}

// q, k and the gathered rows of v through L1, and the two products.
template <typename T>
class AttentionCube {
public:
    __aicore__ inline void Init(const SparseAttentionTiling& tiling, GM_ADDR q, GM_ADDR k, GM_ADDR indices, GM_ADDR count,
                                GM_ADDR positions, GM_ADDR workspace, TPipe* pipe)
    {
        tiling_ = tiling;
        steps_.Init(tiling, indices, count, positions);
        queryGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(q));
        keyGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(k));
        keyPairsGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(k));
        gatheredGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(workspace + ATTENTION_GATHERED_OFFSET));
        scoresGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace));
        weightsGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(workspace + ATTENTION_SLOTS * ATTENTION_SCORES_BYTES));
        valuesGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace + ATTENTION_VALUES_OFFSET));
        sumsGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace + ATTENTION_SUMS_OFFSET));
        pipe->InitBuffer(queryBuffer_, ATTENTION_PARTS * QUERY_ELEMENTS * sizeof(T));
        pipe->InitBuffer(keyBuffer_, KEY_SLOTS * KEY_ELEMENTS * sizeof(T));
        pipe->InitBuffer(valueBuffer_, VALUE_SLOTS * KEY_ELEMENTS * sizeof(T));
        pipe->InitBuffer(weightsBuffer_, WEIGHT_ELEMENTS * sizeof(T));
        queryL1_ = queryBuffer_.Get<T>();
        keyL1_ = keyBuffer_.Get<T>();
        valueL1_ = valueBuffer_.Get<T>();
        weightsL1_ = weightsBuffer_.Get<T>();
        mte1ToMte2_.Init(pipe);
        mte2ToMte1_.Init(pipe);
        mToMte2_.Init(pipe);
        cube_.Init(pipe);
    }

    __aicore__ inline void Run()
    {
        AttentionStep step = {};
        if (steps_.First(step)) {
            for (uint32_t event = 0; event < EVENTS; ++event) {
                SetFlag<HardEvent::MTE1_MTE2>(mte1ToMte2_[event]);
            }
            SetFlag<HardEvent::M_MTE2>(mToMte2_[0]);
            LoadQueries(step);
            AttentionStep ahead = step;
            bool moreChunks = true;
            for (uint32_t chunk = 0; chunk < ATTENTION_AHEAD && moreChunks; ++chunk) {
                BeginChunk(ahead);
                GatherKeys(ahead, ahead.keys);
                moreChunks = EndChunk(ahead);
            }
            for (bool more = true; more;) {
                Scores(step);
                recent_[step.index % RECENT] = step;
                if (step.index >= ATTENTION_LAG) {
                    Values(recent_[(step.index - ATTENTION_LAG) % RECENT]);
                }
                const bool lastPart = step.part + 1 == step.parts;
                if (lastPart && step.last && step.chunkIndex + 1 < startedChunks_) {
                    LoadQueries(chunks_[(step.chunkIndex + 1) % CHUNKS]);  // now that this tile needs its own no more
                }
                if (moreChunks) {
                    // In slices, so that the weights of the next step need not wait long in MTE2's queue; the products above keep
                    // the cube busy while the scalar unit reads indices
                    if (step.part == 0) {
                        BeginChunk(ahead);
                    }
                    GatherKeys(ahead, ahead.keys * (step.part + 1) / step.parts);
                    if (lastPart) {
                        moreChunks = EndChunk(ahead);
                    }
                }
                more = steps_.Next(step);
            }
            const uint32_t steps = step.index;
            for (uint32_t i = steps > ATTENTION_LAG ? steps - ATTENTION_LAG : 0; i < steps; ++i) {
                Values(recent_[i % RECENT]);
            }
            for (uint32_t event = 0; event < EVENTS; ++event) {
                WaitFlag<HardEvent::MTE1_MTE2>(mte1ToMte2_[event]);
            }
            WaitFlag<HardEvent::M_MTE2>(mToMte2_[0]);
        }
        cube_.Finish();
    }

private:
    static constexpr uint32_t QUERY_ELEMENTS = ATTENTION_TILE_ROWS * ATTENTION_MAX_DIM;
    static constexpr uint32_t KEY_ELEMENTS = ATTENTION_CHUNK * ATTENTION_MAX_DIM;
    static constexpr uint32_t WEIGHT_ELEMENTS = ATTENTION_TILE_ROWS * ATTENTION_CHUNK;
    static constexpr uint32_t CHUNKS = ATTENTION_LAG + 2, RECENT = ATTENTION_LAG + 1;
    static constexpr uint32_t KEY_SLOTS = ATTENTION_AHEAD + 1;  // chunks of keys in L1
    static constexpr uint32_t VALUE_SLOTS = 2;                  // and of values
    // Releases of L1 buffers by MTE1, as places in its event ids; queries are released by M. Loads by MTE2 have the same places,
    // but values have none: they are in L1 before the weights that they are multiplied with.
    static constexpr uint32_t KEY_EVENT = 0, VALUE_EVENT = 3, WEIGHTS_EVENT = 5, EVENTS = 6, QUERY_EVENT = 3;

    __aicore__ inline void BeginChunk(const AttentionStep& step)
    {
        chunks_[step.chunkIndex % CHUNKS] = step;
        startedChunks_ = step.chunkIndex + 1;
        scanned_ = 0;
        nextKey_ = steps_.Key(step, 0);
        WaitFlag<HardEvent::MTE1_MTE2>(mte1ToMte2_[KEY_EVENT + step.chunkIndex % KEY_SLOTS]);
    }

    // Goes on to the next chunk, if there is one.
    __aicore__ inline bool EndChunk(AttentionStep& step)
    {
        const uint32_t slot = step.chunkIndex % KEY_SLOTS;
        // Padding repeats the last selected key, so that nothing unselected is read; its weight is 0
        const uint64_t last = steps_.KeyRow(step) + lastKey_;
        RepeatRowInL1(keyL1_[slot * KEY_ELEMENTS], step.paddedKeys, step.keys, keyGm_[last * tiling_.dim],
                      step.paddedKeys - step.keys, tiling_.dim);
        SetFlag<HardEvent::MTE2_MTE1>(mte2ToMte1_[KEY_EVENT + slot]);
        if (step.chunkIndex < finishedChunks_ + VALUE_SLOTS) {
            LoadValues(step);
        }
        return steps_.NextChunk(step);
    }

    __aicore__ inline void LoadValues(const AttentionStep& step)
    {
        const uint32_t slot = step.chunkIndex % VALUE_SLOTS, dim = tiling_.valueDim;
        const LocalTensor<T> values = valueL1_[slot * KEY_ELEMENTS];
        const GlobalTensor<T> rows = gatheredGm_[step.chunkIndex % ATTENTION_GATHERED * KEY_ELEMENTS];
        CrossCoreWaitFlag(ATTENTION_ROWS_GATHERED);
        WaitFlag<HardEvent::MTE1_MTE2>(mte1ToMte2_[VALUE_EVENT + slot]);
        CopyRowsToL1(values, step.paddedKeys, 0, 1, rows, step.keys, dim, dim);
        RepeatRowInL1(values, step.paddedKeys, step.keys, rows[(step.keys - 1) * dim], step.paddedKeys - step.keys, dim);
    }

    // All parts of the tile; rows by token, then head, so that the heads of a token are neighbours in the output.
    __aicore__ inline void LoadQueries(AttentionStep step)
    {
        WaitFlag<HardEvent::M_MTE2>(mToMte2_[0]);
        for (uint32_t part = 0; part < step.parts; ++part) {
            steps_.SetPart(step, part);
            const LocalTensor<T> queries = queryL1_[part * QUERY_ELEMENTS];
            for (uint32_t g = 0; g < tiling_.group; ++g) {
                CopyRowsToL1(queries, step.paddedRows, g, tiling_.group, queryGm_[QueryOffset(step, g)], step.tokens, tiling_.dim,
                             tiling_.dim);
            }
            RepeatRowInL1(queries, step.paddedRows, step.rows, queryGm_[QueryOffset(step, 0)], step.paddedRows - step.rows,
                          tiling_.dim);
        }
        SetFlag<HardEvent::MTE2_MTE1>(mte2ToMte1_[QUERY_EVENT]);
    }

    __aicore__ inline uint64_t QueryOffset(const AttentionStep& step, uint32_t g) const
    {
        const uint64_t head = static_cast<uint64_t>(step.batch) * tiling_.queryHeads + step.keyHead * tiling_.group + g;
        return (head * tiling_.queries + step.firstToken) * tiling_.dim;
    }

    // Brings the chunk's keys up to slot `end` at least. One copy brings a run of neighbours and, if it is not too far away, as much
    // of the next run where that is no shorter.
    __aicore__ inline void GatherKeys(const AttentionStep& step, uint32_t end)
    {
        const uint32_t farthest = MAX_RUN_STRIDE / (tiling_.dim / 2);
        const LocalTensor<T> keys = keyL1_[step.chunkIndex % KEY_SLOTS * KEY_ELEMENTS];
        while (scanned_ < end) {
            const uint32_t first = scanned_, key = nextKey_;
            uint32_t length = 1, runs = 1, distance = 1;
            nextKey_ = KeyBefore(step, first + length);
            while (nextKey_ == key + length) {
                length = length < 4 ? length + 1 : RunLength(step, first, key);
                nextKey_ = KeyBefore(step, first + length);
            }
            lastKey_ = key + length - 1;
            if (nextKey_ > key && nextKey_ - key <= farthest && EndsRun(step, first + length, nextKey_, length)) {
                runs = 2;
                distance = nextKey_ - key;
                lastKey_ = nextKey_ + length - 1;
                nextKey_ = KeyBefore(step, first + 2 * length);
            }
            CopyRunsToL1(keys, step.paddedKeys, first, keyPairsGm_[(steps_.KeyRow(step) + key) * (tiling_.dim / 2)], runs, length,
                         distance, tiling_.dim);
            scanned_ += runs * length;
        }
    }

    // Whether `length` slots of the chunk from slot i on, which holds `key`, are neighbours: keys ascend, so their ends tell.
    __aicore__ inline bool EndsRun(const AttentionStep& step, uint32_t i, uint32_t key, uint32_t length) const
    {
        return i + length <= step.keys && (length == 1 || steps_.Key(step, i + length - 1) == key + length - 1);
    }

    __aicore__ inline uint32_t KeyBefore(const AttentionStep& step, uint32_t i) const
    {
        return i < step.keys ? steps_.Key(step, i) : 0;  // 0 is no key's successor
    }

    // Of a run of more than four neighbours.
    __aicore__ inline uint32_t RunLength(const AttentionStep& step, uint32_t i, uint32_t key) const
    {
        uint32_t length = 4;
        while (EndsRun(step, i, key, 2 * length)) {
            length *= 2;
        }
        for (uint32_t more = length / 2; more > 0; more /= 2) {
            length = EndsRun(step, i, key, length + more) ? length + more : length;
        }
        return length;
    }

    __aicore__ inline void Scores(const AttentionStep& step)
    {
        const uint32_t slot = step.Slot(), keySlot = step.chunkIndex % KEY_SLOTS;
        if (step.part == 0) {
            WaitFlag<HardEvent::MTE2_MTE1>(mte2ToMte1_[KEY_EVENT + keySlot]);
            if (step.first) {
                WaitFlag<HardEvent::MTE2_MTE1>(mte2ToMte1_[QUERY_EVENT]);
            }
        }
        cube_.MultiplyTransposed(scoresGm_[slot * WEIGHT_ELEMENTS], ATTENTION_CHUNK, queryL1_[step.part * QUERY_ELEMENTS],
                                 keyL1_[keySlot * KEY_ELEMENTS], step.paddedRows, step.paddedKeys, tiling_.dim);
        if (step.part + 1 == step.parts) {
            SetFlag<HardEvent::MTE1_MTE2>(mte1ToMte2_[KEY_EVENT + keySlot]);
            if (step.last) {
                SetFlag<HardEvent::M_MTE2>(mToMte2_[0]);
            }
        }
        CrossCoreSetFlag<2, PIPE_FIX>(ATTENTION_SCORES_READY);
    }

    __aicore__ inline void Values(const AttentionStep& step)
    {
        const uint32_t slot = step.Slot(), valueSlot = step.chunkIndex % VALUE_SLOTS;
        CrossCoreWaitFlag(ATTENTION_WEIGHTS_READY);
        WaitFlag<HardEvent::MTE1_MTE2>(mte1ToMte2_[WEIGHTS_EVENT]);
        CopyRowsToL1(weightsL1_, step.paddedRows, 0, 1, weightsGm_[slot * WEIGHT_ELEMENTS], step.paddedRows, step.paddedKeys,
                     ATTENTION_CHUNK);
        SetFlag<HardEvent::MTE2_MTE1>(mte2ToMte1_[WEIGHTS_EVENT]);
        WaitFlag<HardEvent::MTE2_MTE1>(mte2ToMte1_[WEIGHTS_EVENT]);
        // The first chunk's product is the sum so far
        const GlobalTensor<float> out = step.first ? sumsGm_[AttentionSumsOffset(step)] : valuesGm_[slot * QUERY_ELEMENTS];
        cube_.Multiply(out, tiling_.valueDim, weightsL1_, valueL1_[valueSlot * KEY_ELEMENTS], step.paddedRows, tiling_.valueDim,
                       step.paddedKeys);
        SetFlag<HardEvent::MTE1_MTE2>(mte1ToMte2_[WEIGHTS_EVENT]);
        CrossCoreSetFlag<2, PIPE_FIX>(ATTENTION_VALUES_READY);
        if (step.part + 1 == step.parts) {
            SetFlag<HardEvent::MTE1_MTE2>(mte1ToMte2_[VALUE_EVENT + valueSlot]);
            finishedChunks_ = step.chunkIndex + 1;
            if (step.chunkIndex + VALUE_SLOTS < startedChunks_) {
                LoadValues(chunks_[(step.chunkIndex + VALUE_SLOTS) % CHUNKS]);
            }
        }
    }

    SparseAttentionTiling tiling_;
    AttentionSteps steps_;
    AttentionStep chunks_[CHUNKS], recent_[RECENT];
    uint32_t startedChunks_ = 0, finishedChunks_ = 0;
    uint32_t scanned_ = 0, nextKey_ = 0, lastKey_ = 0;  // of the chunk that is being gathered
    EventIds<HardEvent::MTE1_MTE2, 6> mte1ToMte2_;
    EventIds<HardEvent::MTE2_MTE1, 6> mte2ToMte1_;
    EventIds<HardEvent::M_MTE2, 1> mToMte2_;
    CubeTile<T> cube_;
    GlobalTensor<T> queryGm_, keyGm_, gatheredGm_, weightsGm_;
    GlobalTensor<float> scoresGm_, valuesGm_, sumsGm_, keyPairsGm_;
    TBuf<TPosition::A1> queryBuffer_, keyBuffer_, valueBuffer_, weightsBuffer_;
    LocalTensor<T> queryL1_, keyL1_, valueL1_, weightsL1_;
};

// The online softmax, on half of a tile's rows in each of the two vector cores.
template <typename T>
class AttentionVector {
public:
    __aicore__ inline void Init(const SparseAttentionTiling& tiling, GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR indices,
                                GM_ADDR count, GM_ADDR positions, GM_ADDR out, GM_ADDR workspace, TPipe* pipe)
    {
        tiling_ = tiling;
        steps_.Init(tiling, indices, count, positions);
        queryRowsGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(q));
        keyRowsGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(k));
        valueRowsGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(v));
        gatheredGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(workspace + ATTENTION_GATHERED_OFFSET));
        outGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(out));
        scoresGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace));
        weightsGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(workspace + ATTENTION_SLOTS * ATTENTION_SCORES_BYTES));
        valuesGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace + ATTENTION_VALUES_OFFSET));
        sumsGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace + ATTENTION_SUMS_OFFSET));
        pipe->InitBuffer(scoresBuffer_, 2 * SCORES_ELEMENTS * sizeof(float));
        pipe->InitBuffer(stagingBuffer_, SCORES_ELEMENTS * sizeof(T));
        pipe->InitBuffer(piecesBuffer_, PIECES * 2 * PIECE_ELEMENTS * sizeof(float));
        pipe->InitBuffer(gatherBuffer_, 2 * GATHER_ELEMENTS * sizeof(T));
        pipe->InitBuffer(indexBuffer_, 2 * GATHER_KEYS * sizeof(int32_t));
        pipe->InitBuffer(rowBuffer_, ROW_ELEMENTS * sizeof(float));
        pipe->InitBuffer(finiteBuffer_, 2 * REPEAT_FLOATS * sizeof(float));
        scoresUb_ = scoresBuffer_.Get<float>();
        stagingUb_ = stagingBuffer_.Get<T>();
        foldedUb_ = stagingBuffer_.Get<float>();
        gatherUb_ = gatherBuffer_.Get<T>();
        indexUb_ = indexBuffer_.Get<int32_t>();
        piecesUb_ = piecesBuffer_.Get<float>();
        const LocalTensor<float> rows = rowBuffer_.Get<float>();
        softmax_.Init(rows);
        maximumUb_ = rows[SoftmaxRows::ELEMENTS];
        denominatorUb_ = maximumUb_[ATTENTION_PARTS * ROWS];
        inverseUb_ = denominatorUb_[ATTENTION_SLOTS * ATTENTION_PARTS * ROWS];
        rescaleWideUb_ = inverseUb_[ROWS];
        finiteUb_ = finiteBuffer_.Get<float>();
        vToMte2_.Init(pipe);
        mte3ToMte2_.Init(pipe);
        sToMte2_.Init(pipe);
        mte2ToS_.Init(pipe);
        mte3ToV_.Init(pipe);
        mte2ToMte3_.Init(pipe);
        mte2ToV_.Init(pipe);
        vToMte3_.Init(pipe);
    }

    __aicore__ inline void Run()
    {
        ClearEmptyTiles();
        AttentionStep step = {};
        if (!steps_.First(step)) {
            return;
        }
        Duplicate(finiteUb_, 0.0f, REPEAT_FLOATS);
        for (uint32_t event = 0; event < 2; ++event) {
            SetFlag<HardEvent::V_MTE2>(vToMte2_[SCORES_EVENT + event]);
            SetFlag<HardEvent::MTE3_MTE2>(mte3ToMte2_[GATHER_EVENT + event]);
            SetFlag<HardEvent::S_MTE2>(sToMte2_[INDEX_EVENT + event]);
        }
        for (uint32_t event = 0; event < PIECES; ++event) {
            SetFlag<HardEvent::MTE3_MTE2>(mte3ToMte2_[PIECE_EVENT + event]);
        }
        SetFlag<HardEvent::MTE3_V>(mte3ToV_[STAGING_EVENT]);
        AttentionStep recent[ATTENTION_LAG + 1];
        AttentionStep ahead = step;
        LoadIndices(ahead);
        bool moreChunks = true;
        for (uint32_t chunk = 0; chunk < ATTENTION_AHEAD && moreChunks; ++chunk) {
            moreChunks = GatherValues(ahead, 0, 1);
        }
        LoadScores(step);
        for (bool more = true; more;) {
            const AttentionStep current = step;
            if (moreChunks) {  // before the weights, whose way out would hold up that of the rows while V computes them
                moreChunks = GatherValues(ahead, current.part, current.parts);
            }
            Softmax(current);
            recent[current.index % (ATTENTION_LAG + 1)] = current;
            more = steps_.Next(step);
            if (more) {
                LoadScores(step);
            }
            if (current.index >= ATTENTION_LAG) {
                Accumulate(recent[(current.index - ATTENTION_LAG) % (ATTENTION_LAG + 1)]);
            }
        }
        const uint32_t steps = step.index;
        for (uint32_t i = steps > ATTENTION_LAG ? steps - ATTENTION_LAG : 0; i < steps; ++i) {
            Accumulate(recent[i % (ATTENTION_LAG + 1)]);
        }
        for (uint32_t event = 0; event < 2; ++event) {
            WaitFlag<HardEvent::V_MTE2>(vToMte2_[SCORES_EVENT + event]);
            WaitFlag<HardEvent::MTE3_MTE2>(mte3ToMte2_[GATHER_EVENT + event]);
            WaitFlag<HardEvent::S_MTE2>(sToMte2_[INDEX_EVENT + event]);
        }
        for (uint32_t event = 0; event < PIECES; ++event) {
            WaitFlag<HardEvent::MTE3_MTE2>(mte3ToMte2_[PIECE_EVENT + event]);
        }
        WaitFlag<HardEvent::MTE3_V>(mte3ToV_[STAGING_EVENT]);
        PipeBarrier<PIPE_ALL>();
        bool finite = true;
        for (uint32_t i = 0; i < REPEAT_FLOATS; ++i) {
            finite = finite && finiteUb_.GetValue(i) == 0.0f;
        }
        if (!finite) {
            Mend();
        }
    }

private:
    static constexpr uint32_t ROWS = SoftmaxRows::ROWS;
    static constexpr uint32_t SCORES_ELEMENTS = ROWS * ATTENTION_CHUNK;
    static constexpr uint32_t PIECE_ROWS = 16;    // of sums and weighted values, in UB at a time
    static constexpr uint32_t PIECES = 2;
    static constexpr uint32_t PIECE_ELEMENTS = PIECE_ROWS * ATTENTION_MAX_DIM;
    static constexpr uint32_t ROW_ELEMENTS =
        SoftmaxRows::ELEMENTS + ((ATTENTION_SLOTS + 1) * ATTENTION_PARTS + 1) * ROWS + ATTENTION_SLOTS * SoftmaxRows::WIDE;
    static constexpr uint32_t GATHER_KEYS = ATTENTION_CHUNK / 2;  // of a chunk, by one vector core
    static constexpr uint32_t GATHER_ROWS = 16;  // of them at a time: a whole number of pieces in half of them
    static constexpr uint32_t GATHER_ELEMENTS = GATHER_ROWS * ATTENTION_MAX_DIM;
    static constexpr uint32_t SCORES_EVENT = 0, STAGING_EVENT = 0, PIECE_EVENT = 2, GATHER_EVENT = 0, INDEX_EVENT = 0;

    __aicore__ inline uint32_t Rows(const AttentionStep& step) const { return step.paddedRows / 2; }
    __aicore__ inline uint32_t FirstRow(const AttentionStep& step) const { return GetSubBlockIdx() * Rows(step); }

    __aicore__ inline LocalTensor<float> Denominator(const AttentionStep& step) const
    {
        return denominatorUb_[(step.tileIndex % ATTENTION_SLOTS * ATTENTION_PARTS + step.part) * ROWS];
    }

    // This core's half of the chunk's keys.
    __aicore__ inline uint32_t FirstGathered() const { return GetSubBlockIdx() * GATHER_KEYS; }
    __aicore__ inline uint32_t GatheredKeys(const AttentionStep& step) const
    {
        return Least(Above(step.keys, FirstGathered()), GATHER_KEYS);
    }

    __aicore__ inline void LoadIndices(const AttentionStep& step)
    {
        const uint32_t slot = step.chunkIndex % 2;
        if (GatheredKeys(step) > 0) {
            WaitFlag<HardEvent::S_MTE2>(sToMte2_[INDEX_EVENT + slot]);
            LoadRagged(indexUb_[slot * GATHER_KEYS], steps_.Keys(step, FirstGathered()), GatheredKeys(step));
            SetFlag<HardEvent::MTE2_S>(mte2ToS_[INDEX_EVENT + slot]);
        }
    }

    // Rows of v of half a chunk to where the cube core finds them in one piece, in as many slices as the step has parts. After the
    // last one the chunk goes on to the next, if any, and its indices are loaded. Returns whether there are rows left to gather.
    __aicore__ inline bool GatherValues(AttentionStep& step, uint32_t part, uint32_t parts)
    {
        const uint32_t keys = GatheredKeys(step), dim = tiling_.valueDim;
        const uint32_t slot = step.chunkIndex % 2;
        const LocalTensor<int32_t> index = indexUb_[slot * GATHER_KEYS];
        if (part == 0 && keys > 0) {
            WaitFlag<HardEvent::MTE2_S>(mte2ToS_[INDEX_EVENT + slot]);
        }
        const uint32_t sliceEnd = Least(keys, Aligned(keys * (part + 1) / parts, GATHER_ROWS));
        for (uint32_t begin = Aligned(keys * part / parts, GATHER_ROWS); begin < sliceEnd; begin += GATHER_ROWS) {
            const uint32_t piece = begin / GATHER_ROWS % 2;
            const uint32_t end = Least(begin + GATHER_ROWS, keys);
            WaitFlag<HardEvent::MTE3_MTE2>(mte3ToMte2_[GATHER_EVENT + piece]);
            for (uint32_t i = begin; i < end;) {
                i += FetchRows(gatherUb_[piece * GATHER_ELEMENTS + (i - begin) * dim], index, i, end, steps_.KeyRow(step));
            }
            SetFlag<HardEvent::MTE2_MTE3>(mte2ToMte3_[GATHER_EVENT + piece]);
            WaitFlag<HardEvent::MTE2_MTE3>(mte2ToMte3_[GATHER_EVENT + piece]);
            const uint64_t row = step.chunkIndex % ATTENTION_GATHERED * ATTENTION_CHUNK * ATTENTION_MAX_DIM;
            DataCopy(gatheredGm_[row + (FirstGathered() + begin) * dim], gatherUb_[piece * GATHER_ELEMENTS], (end - begin) * dim);
            SetFlag<HardEvent::MTE3_MTE2>(mte3ToMte2_[GATHER_EVENT + piece]);
        }
        if (part + 1 < parts) {
            return true;
        }
        if (keys > 0) {
            SetFlag<HardEvent::S_MTE2>(sToMte2_[INDEX_EVENT + slot]);
        }
        CrossCoreSetFlag<2, PIPE_MTE3>(ATTENTION_ROWS_GATHERED);
        const bool more = steps_.NextChunk(step);
        if (more) {
            LoadIndices(step);
        }
        return more;
    }

    __aicore__ inline uint32_t Index(const LocalTensor<int32_t>& index, uint32_t i) const
    {
        return static_cast<uint32_t>(index.GetValue(i));
    }

    // One copy: a run of neighbours and, where it is no shorter, as much of the next. Returns how many rows it brings.
    __aicore__ inline uint32_t FetchRows(const LocalTensor<T>& to, const LocalTensor<int32_t>& index, uint32_t i, uint32_t end,
                                         uint64_t head)
    {
        const uint32_t key = Index(index, i), rowBytes = tiling_.valueDim * sizeof(T);
        uint32_t length = 1, next = key;
        for (; i + length < end; ++length) {
            next = Index(index, i + length);
            if (next != key + length) {
                break;
            }
        }
        // keys ascend, so the ends of the next run tell
        const bool two = i + 2 * length <= end && (length == 1 || Index(index, i + 2 * length - 1) == next + length - 1);
        const uint32_t runs = two ? 2 : 1;
        const DataCopyExtParams copy(runs, length * rowBytes, two ? (next - key - length) * rowBytes : 0, 0, 0);
        DataCopyPad(to, valueRowsGm_[(head + key) * tiling_.valueDim], copy, DataCopyPadExtParams<T>(false, 0, 0, T{}));
        return runs * length;
    }

    __aicore__ inline void LoadScores(const AttentionStep& step)
    {
        const uint32_t event = SCORES_EVENT + step.index % 2;
        CrossCoreWaitFlag(ATTENTION_SCORES_READY);
        WaitFlag<HardEvent::V_MTE2>(vToMte2_[event]);
        const uint16_t unused = (ATTENTION_CHUNK - step.paddedKeys) / BLOCK_FLOATS;
        const DataCopyParams copy(Rows(step), step.paddedKeys / BLOCK_FLOATS, unused, unused);
        DataCopy(scoresUb_[step.index % 2 * SCORES_ELEMENTS],
                 scoresGm_[(step.Slot() * ATTENTION_TILE_ROWS + FirstRow(step)) * ATTENTION_CHUNK], copy);
        SetFlag<HardEvent::MTE2_V>(mte2ToV_[event]);
    }

    // Weights of the step, exp(score - running maximum), to GM; running maximum and sum of every row.
    __aicore__ inline void Softmax(const AttentionStep& step)
    {
        const uint32_t slot = step.Slot(), rows = Rows(step), firstRow = FirstRow(step);
        const uint32_t event = SCORES_EVENT + step.index % 2;
        const LocalTensor<float> scores = scoresUb_[step.index % 2 * SCORES_ELEMENTS];
        const LocalTensor<float> denominator = Denominator(step), maximum = maximumUb_[step.part * ROWS];
        const LocalTensor<float> rescaleWide = rescaleWideUb_[slot * SoftmaxRows::WIDE];
        WaitFlag<HardEvent::MTE2_V>(mte2ToV_[event]);
        ScaleScores(scores, tiling_.scale, step.keys, rows);
        for (uint32_t side = 0; side < SCORE_HALVES; ++side) {
            Hide(scores[side * REPEAT_FLOATS], ColumnsFrom(step.keys, side * REPEAT_FLOATS), rows, SCORE_STRIDE);
        }
        PipeBarrier<PIPE_V>();
        HideLaterKeys(scores, step, firstRow, rows);
        if (step.first) {
            softmax_.Begin(maximum, denominator, rows);
        }
        WaitFlag<HardEvent::MTE3_V>(mte3ToV_[STAGING_EVENT]);  // foldedUb_ shares its memory
        softmax_.Update(scores, maximum, denominator, foldedUb_, rows);
        SoftmaxRows::Widen(rescaleWide, softmax_.Rescale(), rows);
        Cast(stagingUb_, scores, RoundMode::CAST_RINT, rows * ATTENTION_CHUNK);
        SetFlag<HardEvent::V_MTE2>(vToMte2_[event]);
        SetFlag<HardEvent::V_MTE3>(vToMte3_[STAGING_EVENT]);
        WaitFlag<HardEvent::V_MTE3>(vToMte3_[STAGING_EVENT]);
        DataCopy(weightsGm_[(slot * ATTENTION_TILE_ROWS + firstRow) * ATTENTION_CHUNK], stagingUb_,
                          rows * ATTENTION_CHUNK);
        SetFlag<HardEvent::MTE3_V>(mte3ToV_[STAGING_EVENT]);
        CrossCoreSetFlag<2, PIPE_MTE3>(ATTENTION_WEIGHTS_READY);
    }

    // The causal mask. Keys ascend, so every token sees the chunk up to some column, and later tokens see more.
    __aicore__ inline void HideLaterKeys(const LocalTensor<float>& scores, const AttentionStep& step, uint32_t firstRow,
                                         uint32_t rows)
    {
        uint32_t visible = 0;
        for (uint32_t row = firstRow; row < firstRow + rows && row < step.rows;) {
            const uint32_t token = row / tiling_.group;
            const int32_t position = steps_.Position(step, step.firstToken + token);
            if (steps_.Sees(position, step, step.keys - 1)) {
                break;  // this token and all later ones see everything
            }
            while (visible < step.keys && steps_.Sees(position, step, visible)) {
                ++visible;
            }
            const uint32_t end = Least((token + 1) * tiling_.group, firstRow + rows);
            for (uint32_t side = 0; side < SCORE_HALVES; ++side) {
                const uint32_t column = side * REPEAT_FLOATS;
                Hide(scores[(row - firstRow) * SCORE_COLUMNS + column], ColumnsFrom(visible, column), end - row, SCORE_STRIDE);
            }
            row = end;
        }
        PipeBarrier<PIPE_V>();
    }

    // sum = sum * rescale + weighted values, in pieces of rows through UB; after the last chunk the quotient goes out.
    __aicore__ inline void Accumulate(const AttentionStep& step)
    {
        CrossCoreWaitFlag(ATTENTION_VALUES_READY);
        if (step.first && !step.last) {
            return;
        }
        const uint32_t rows = Rows(step), firstRow = FirstRow(step), dim = tiling_.valueDim;
        const LocalTensor<float> rescaleWide = rescaleWideUb_[step.Slot() * SoftmaxRows::WIDE];
        const uint64_t valuesOffset = step.Slot() * ATTENTION_VALUES_BYTES;
        const uint64_t sumsOffset = AttentionSumsOffset(step) * sizeof(float);
        const GlobalTensor<float> valuesGm = valuesGm_[valuesOffset / sizeof(float)];
        const GlobalTensor<float> sumsGm = sumsGm_[sumsOffset / sizeof(float)];
        const uint32_t distance = ATTENTION_SUMS_OFFSET + sumsOffset - (ATTENTION_VALUES_OFFSET + valuesOffset);
        if (step.last) {
            softmax_.Inverse(inverseUb_, Denominator(step), rows);
            SoftmaxRows::Widen(softmax_.Scratch(), inverseUb_, rows);
            PipeBarrier<PIPE_V>();
        }
        for (uint32_t row = 0; row < rows; row += PIECE_ROWS) {
            const uint32_t piece = row / PIECE_ROWS % PIECES;
            const uint32_t pieceRows = Least(rows - row, PIECE_ROWS), elements = pieceRows * dim;
            const LocalTensor<float> values = piecesUb_[piece * 2 * PIECE_ELEMENTS], sum = values[PIECE_ELEMENTS];
            // Also says that the last chunk has stored these rows: they went through this buffer, or through it before others
            WaitFlag<HardEvent::MTE3_MTE2>(mte3ToMte2_[PIECE_EVENT + piece]);
            const uint32_t bytes = elements * sizeof(float), unused = (PIECE_ELEMENTS - elements) / BLOCK_FLOATS;
            if (step.first) {
                DataCopy(sum, sumsGm[(firstRow + row) * dim], elements);
            } else {  // both in one copy
                DataCopyPad(values, valuesGm[(firstRow + row) * dim], DataCopyExtParams(2, bytes, distance - bytes, unused, 0),
                            DataCopyPadExtParams<float>(false, 0, 0, 0.0f));
            }
            SetFlag<HardEvent::MTE2_V>(mte2ToV_[PIECE_EVENT + piece]);
            WaitFlag<HardEvent::MTE2_V>(mte2ToV_[PIECE_EVENT + piece]);
            if (!step.first) {
                ScaleRows(sum, rescaleWide[row * BLOCK_FLOATS], pieceRows);
                PipeBarrier<PIPE_V>();
                Add(sum, sum, values, elements);
                PipeBarrier<PIPE_V>();
            }
            if (step.last) {
                ScaleRows(sum, softmax_.Scratch()[row * BLOCK_FLOATS], pieceRows);
                PipeBarrier<PIPE_V>();
                WholeReduceSum(finiteUb_[REPEAT_FLOATS], sum, REPEAT_FLOATS, elements / REPEAT_FLOATS, 1, 1,
                               REPEAT_FLOATS / BLOCK_FLOATS);
                PipeBarrier<PIPE_V>();
                Axpy(finiteUb_, finiteUb_[REPEAT_FLOATS], 0.0f, elements / REPEAT_FLOATS);  // 0, or NaN of what is not finite
                PipeBarrier<PIPE_V>();
                WaitFlag<HardEvent::MTE3_V>(mte3ToV_[STAGING_EVENT]);
                Cast(stagingUb_, sum, RoundMode::CAST_RINT, elements);
            }
            SetFlag<HardEvent::V_MTE3>(vToMte3_[PIECE_EVENT + piece]);
            WaitFlag<HardEvent::V_MTE3>(vToMte3_[PIECE_EVENT + piece]);
            if (step.last) {
                CopyOut(step, firstRow + row, pieceRows, true);
                SetFlag<HardEvent::MTE3_V>(mte3ToV_[STAGING_EVENT]);
            } else {
                DataCopy(sumsGm[(firstRow + row) * dim], sum, elements);
            }
            SetFlag<HardEvent::MTE3_MTE2>(mte3ToMte2_[PIECE_EVENT + piece]);
        }
    }

    __aicore__ inline void ScaleRows(const LocalTensor<float>& values, const LocalTensor<float>& factorsWide, uint32_t rows)
    {
        const uint8_t stride = tiling_.valueDim / BLOCK_FLOATS;
        for (uint32_t column = 0; column < tiling_.valueDim; column += REPEAT_FLOATS) {
            const uint64_t width = Least(tiling_.valueDim - column, REPEAT_FLOATS);
            Mul(values[column], values[column], factorsWide, width, rows, {1, 1, 0, stride, stride, 1});
        }
    }

    // Staged rows to their tokens: the heads of one token that belong to a KV head are contiguous. Zeros are staged once.
    __aicore__ inline void CopyOut(const AttentionStep& step, uint32_t firstRow, uint32_t rows, bool advance)
    {
        const uint32_t end = Least(firstRow + rows, step.rows);
        for (uint32_t row = firstRow; row < end;) {
            const uint32_t token = row / tiling_.group, head = row % tiling_.group;
            const uint32_t left = Least(tiling_.group - head, end - row);
            const uint64_t line = static_cast<uint64_t>(step.batch) * tiling_.queries + step.firstToken + token;
            const uint64_t offset = (line * tiling_.queryHeads + step.keyHead * tiling_.group + head) * tiling_.valueDim;
            DataCopy(outGm_[offset], stagingUb_[advance ? (row - firstRow) * tiling_.valueDim : 0],
                              left * tiling_.valueDim);
            row += left;
        }
    }

    // Tiles whose tokens see nothing get zeros.
    __aicore__ inline void ClearEmptyTiles()
    {
        bool staged = false;
        AttentionStep step = {};
        for (uint32_t tile = CoreIndex(); tile < tiling_.tiles; tile += tiling_.cores) {
            steps_.ReadTile(step, tile);
            if (step.used > 0) {
                continue;
            }
            if (!staged) {
                Duplicate(stagingUb_.template ReinterpretCast<int16_t>(), static_cast<int16_t>(0), SCORES_ELEMENTS);
                SetFlag<HardEvent::V_MTE3>(vToMte3_[STAGING_EVENT]);
                WaitFlag<HardEvent::V_MTE3>(vToMte3_[STAGING_EVENT]);
                staged = true;
            }
            for (uint32_t part = 0; part < step.parts; ++part) {
                steps_.SetPart(step, part);
                CopyOut(step, FirstRow(step), Rows(step), false);
            }
        }
        if (staged) {
            SetFlag<HardEvent::MTE3_V>(mte3ToV_[STAGING_EVENT]);
            WaitFlag<HardEvent::MTE3_V>(mte3ToV_[STAGING_EVENT]);
        }
    }

    // Products multiply what only later tokens of a tile see by zero for the earlier ones, and zero times NaN is NaN. So rows of
    // this core that hold NaN are computed again, one by one, from the keys that their token sees and nothing else.
    __aicore__ inline void Mend()
    {
        AttentionStep step = {};
        for (uint32_t tile = CoreIndex(); tile < tiling_.tiles; tile += tiling_.cores) {
            steps_.ReadTile(step, tile);
            for (uint32_t part = 0; step.used > 0 && part < step.parts; ++part) {
                steps_.SetPart(step, part);
                const uint32_t end = Least(FirstRow(step) + Rows(step), step.rows);
                for (uint32_t row = FirstRow(step); row < end; ++row) {
                    MendRow(step, row);
                }
            }
        }
    }

    __aicore__ inline void MendRow(const AttentionStep& step, uint32_t row)
    {
        const uint32_t token = step.firstToken + row / tiling_.group;
        const int32_t position = steps_.Position(step, token);
        const uint32_t dim = tiling_.dim, valueDim = tiling_.valueDim;
        const uint64_t head = static_cast<uint64_t>(step.keyHead) * tiling_.group + row % tiling_.group;
        const uint64_t line = static_cast<uint64_t>(step.batch) * tiling_.queries + token;
        const uint64_t place = (line * tiling_.queryHeads + head) * valueDim;
        const LocalTensor<float> sum = piecesUb_, query = sum[ATTENTION_MAX_DIM], other = query[ATTENTION_MAX_DIM];
        const LocalTensor<float> few = other[ATTENTION_MAX_DIM + REPEAT_FLOATS];  // the last repeat reads that far
        FetchWide(sum, outGm_[place], valueDim);
        bool holds = false;
        for (uint32_t i = 0; i < valueDim; ++i) {
            const float value = sum.GetValue(i);
            holds = holds || value != value;
        }
        if (!holds) {
            return;
        }
        const uint64_t queryLine = (static_cast<uint64_t>(step.batch) * tiling_.queryHeads + head) * tiling_.queries + token;
        FetchWide(query, queryRowsGm_[queryLine * dim], dim);
        float most = LOWEST_MAXIMUM, total = 0.0f;
        for (uint32_t i = 0; i < step.used && steps_.Sees(position, step, i); ++i) {
            const uint64_t key = steps_.KeyRow(step) + steps_.Key(step, i);
            FetchWide(other, keyRowsGm_[key * dim], dim);
            Mul(other, other, query, dim);
            PipeBarrier<PIPE_V>();
            WholeReduceSum(few, other, BLOCK_FLOATS, dim / BLOCK_FLOATS, 1, 1, 1);
            PipeBarrier<PIPE_ALL>();
            float score = 0.0f;
            for (uint32_t j = 0; j < dim / BLOCK_FLOATS; ++j) {
                score += few.GetValue(j);
            }
            score *= tiling_.scale;
            const float decay = score > most ? Power(few, most - score) : 1.0f;
            most = score > most ? score : most;
            const float weight = Power(few, score - most);
            total = total * decay + weight;
            FetchWide(other, valueRowsGm_[key * valueDim], valueDim);
            if (i == 0) {
                Muls(sum, other, weight, valueDim);
            } else {
                Muls(sum, sum, decay, valueDim);
                PipeBarrier<PIPE_V>();
                Axpy(sum, other, weight, valueDim);
            }
            PipeBarrier<PIPE_ALL>();
        }
        if (total == 0.0f) {  // the token sees nothing
            Duplicate(sum, 0.0f, valueDim);
        } else {
            Muls(sum, sum, 1.0f / total, valueDim);
        }
        PipeBarrier<PIPE_V>();
        Cast(stagingUb_, sum, RoundMode::CAST_RINT, valueDim);
        PipeBarrier<PIPE_ALL>();
        DataCopy(outGm_[place], stagingUb_, valueDim);
        PipeBarrier<PIPE_ALL>();
    }

    __aicore__ inline void FetchWide(const LocalTensor<float>& to, const GlobalTensor<T>& row, uint32_t dim)
    {
        PipeBarrier<PIPE_ALL>();
        DataCopy(gatherUb_, row, dim);
        PipeBarrier<PIPE_ALL>();
        Cast(to, gatherUb_, RoundMode::CAST_NONE, dim);
        PipeBarrier<PIPE_ALL>();
    }

    __aicore__ inline float Power(const LocalTensor<float>& scratch, float exponent)
    {
        PipeBarrier<PIPE_ALL>();
        Duplicate(scratch, exponent, BLOCK_FLOATS);
        PipeBarrier<PIPE_V>();
        Exp(scratch, scratch, BLOCK_FLOATS);
        PipeBarrier<PIPE_ALL>();
        return scratch.GetValue(0);
    }

    EventIds<HardEvent::V_MTE2, 2> vToMte2_;
    EventIds<HardEvent::MTE3_MTE2, 4> mte3ToMte2_;
    EventIds<HardEvent::S_MTE2, 2> sToMte2_;
    EventIds<HardEvent::MTE2_S, 2> mte2ToS_;
    EventIds<HardEvent::MTE3_V, 1> mte3ToV_;
    EventIds<HardEvent::MTE2_MTE3, 2> mte2ToMte3_;
    EventIds<HardEvent::MTE2_V, 4> mte2ToV_;
    EventIds<HardEvent::V_MTE3, 4> vToMte3_;
    SparseAttentionTiling tiling_;
    AttentionSteps steps_;
    SoftmaxRows softmax_;
    GlobalTensor<T> outGm_, weightsGm_, queryRowsGm_, keyRowsGm_, valueRowsGm_, gatheredGm_;
    GlobalTensor<float> scoresGm_, valuesGm_, sumsGm_;
    TBuf<TPosition::VECCALC> scoresBuffer_, stagingBuffer_, piecesBuffer_, gatherBuffer_, indexBuffer_, rowBuffer_, finiteBuffer_;
    LocalTensor<T> stagingUb_;  // weights or output on their way out; foldedUb_ is the same memory
    LocalTensor<float> scoresUb_, foldedUb_, piecesUb_;
    LocalTensor<float> maximumUb_, denominatorUb_, inverseUb_, rescaleWideUb_;
    LocalTensor<float> finiteUb_;  // zeros while all results are finite, then room for a piece's sums of 64
    LocalTensor<T> gatherUb_;
    LocalTensor<int32_t> indexUb_;
};

template <typename T>
__aicore__ inline void RunSparseAttention(const SparseAttentionTiling& tiling, GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR indices,
                                          GM_ADDR count, GM_ADDR positions, GM_ADDR out, GM_ADDR workspace)
{
    TPipe pipe;
    workspace += CoreIndex() * ATTENTION_CORE_BYTES;
    if ASCEND_IS_AIC {
        AttentionCube<T> cube;
        cube.Init(tiling, q, k, indices, count, positions, workspace, &pipe);
        cube.Run();
    }
    if ASCEND_IS_AIV {
        AttentionVector<T> vector;
        vector.Init(tiling, q, k, v, indices, count, positions, out, workspace, &pipe);
        vector.Run();
    }
}

}  // namespace npu_sparse_ascendc

// out is [B, Tq, Hq, Dv] in memory; positions, int32 [B, Tq] or null, is for dense_rows, whose indices are [B, K] and count [B];
// MakeSparseAttentionTiling and SparseAttentionWorkspace say the rest.
extern "C" MIXED_KERNEL void npu_sparse_sparse_attention(GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR indices, GM_ADDR count,
                                                         GM_ADDR positions, GM_ADDR out, GM_ADDR workspace,
                                                         npu_sparse_ascendc::SparseAttentionTiling tiling)
{
    TASK_TYPE(KERNEL_TYPE_MIX_AIC_1_2);
    if (tiling.bfloat16) {
        npu_sparse_ascendc::RunSparseAttention<bfloat16_t>(tiling, q, k, v, indices, count, positions, out, workspace);
    } else {
        npu_sparse_ascendc::RunSparseAttention<half>(tiling, q, k, v, indices, count, positions, out, workspace);
    }
}
