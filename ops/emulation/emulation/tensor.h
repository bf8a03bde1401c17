// GlobalTensor and LocalTensor, and TPipe, TQue and TBuf, which hand out the memory of a core.
#pragma once

#include "core.h"
#include "types.h"

#define __aicore__
#define __global__
#define __gm__
#define __ubuf__
#define __inout_pipe__(...)
using GM_ADDR = __gm__ uint8_t*;

namespace AscendC {

enum class TPosition : uint8_t {
    GM,
    A1,
    A2,
    B1,
    B2,
    C1,
    C2,
    CO1,
    CO2,
    VECIN,
    VECOUT,
    VECCALC,
    LCM = VECCALC,
    SPM,
    SHM = SPM,
    TSCM,
    C2PIPE2GM,
    MAX
};
using QuePosition = TPosition;

enum class CacheMode : uint8_t { CACHE_MODE_DISABLE = 0, CACHE_MODE_NORMAL = 1, CACHE_MODE_LAST, CACHE_MODE_PERSISTENT };
enum class CacheRwMode : uint8_t { READ = 1, WRITE = 2, RW = 3 };

}  // namespace AscendC

namespace emulation {

inline Space SpaceOf(AscendC::TPosition position, Where where) {
    using P = AscendC::TPosition;
    switch (position) {
        case P::A1: case P::B1: case P::C1: case P::TSCM: return Space::L1;
        case P::A2: return Space::L0A;
        case P::B2: return Space::L0B;
        case P::C2: return Space::BT;
        case P::C2PIPE2GM: return Space::FB;
        case P::CO1: return Space::L0C;
        case P::VECIN: case P::VECOUT: case P::VECCALC: return Space::UB;
        default:
            Fail(3, "a buffer's position must be A1, B1, C1, A2, B2, C2, C2PIPE2GM, CO1, VECIN, VECOUT or VECCALC, got another",
                 where);
    }
}

inline Memory* RegionOf(const void* address) {
    const auto* byte = static_cast<const uint8_t*>(address);
    for (Memory& region : Current().machine->regions) {
        if (byte >= region.bytes && byte <= region.bytes + region.size) return &region;
    }
    return nullptr;
}

constexpr uint64_t kLine = 64;          // of the scalar unit's data cache

// Scalar access to GM goes through a data cache that nobody keeps coherent. Returns the number of lines that GM had to be asked
// for.
inline uint32_t ReadThroughCache(const Span& span, Where where) {
    Core& core = Current();
    uint32_t misses = 0;
    if (span.memory == nullptr) return 0;
    for (uint64_t line = span.begin / kLine; line <= (span.begin + span.bytes - 1) / kLine; ++line) {
        const auto [cached, missed] = core.cachedLines.emplace(std::make_pair(span.memory, line), core.machine->stamp);
        misses += missed;
        if (missed || span.memory->readOnly || !core.machine->hazards) continue;
        span.memory->shadow.ForEach(
            span.begin, span.begin + span.bytes, [&, since = cached->second](const Shadow::Segment& segment) {
                const bool own =
                    segment.write.component == core.index * 8 + kDataCache || segment.write.component == core.index * 8 + PIPE_S;
                Require(own || segment.write.seq == 0 || segment.stamp <= since, 6, where, [&] {
                    return "GetValue reads " + Range(*span.memory, span.begin, span.begin + span.bytes) +
                           " from a cached line that must first be dropped by DataCacheCleanAndInvalid: it has been rewritten";
                });
            });
    }
    return misses;
}

// A line goes back to GM whole, so whatever else was written in it has to be known when it is first touched and not change after.
template <class Visit>
void ForEachWriteOfLine(const Core& core, Memory* memory, uint64_t line, Visit&& visit) {
    memory->shadow.ForEach(line * kLine, std::min((line + 1) * kLine, memory->size), [&](Shadow::Segment& segment) {
        const uint32_t component = segment.write.component;
        const bool own = component == core.index * 8 + kDataCache || component == core.index * 8 + PIPE_S;
        if (segment.write.seq && !own) visit(segment);
    });
}

inline void WriteThroughCache(const Span& span, Where where) {
    Core& core = Current();
    for (uint64_t line = span.begin / kLine; line <= (span.begin + span.bytes - 1) / kLine; ++line) {
        ForEachWriteOfLine(core, span.memory, line, [&](const Shadow::Segment& segment) {
            if (Known(core, core.clocks[PIPE_S], segment.write)) return;
            ReportHazard(core, PIPE_S, "SetValue (its whole 64-byte line)", *span.memory, line * kLine, (line + 1) * kLine,
                         segment.write, true, true, where);
        });
        core.dirtyLines.emplace(std::make_pair(span.memory, line), DirtyLine{where, core.machine->stamp});
    }
}

inline void CleanLine(Core& core, Memory* memory, uint64_t line, Where where) {
    const auto dirty = core.dirtyLines.find({memory, line});
    if (dirty != core.dirtyLines.end()) {
        ForEachWriteOfLine(core, memory, line, [&](const Shadow::Segment& segment) {
            Require(segment.stamp <= dirty->second.stamp, 6, where, [&] {
                return "DataCacheCleanAndInvalid writes back " + Range(*memory, line * kLine, (line + 1) * kLine) +
                       " whole and must not undo what was written there since SetValue";
            });
        });
        core.dirtyLines.erase(dirty);
    }
    core.cachedLines.erase({memory, line});
    const Epoch cleaned{core.index * 8 + PIPE_S,
                        ++core.issued[PIPE_S]};  // from here on a flag of the scalar pipe covers the write
    core.executed[PIPE_S] = core.issued[PIPE_S];
    if (core.machine->hazards) core.history[PIPE_S].push_back({"DataCacheCleanAndInvalid", where});
    memory->shadow.ForEach(line * kLine, std::min((line + 1) * kLine, memory->size), [&](Shadow::Segment& segment) {
        if (segment.write.component == core.index * 8 + kDataCache) segment.write = cleaned;
    });
}

}  // namespace emulation

namespace AscendC {

using emulation::Where;

template <typename T>
class LocalTensor {
public:
    using PrimType = T;

    LocalTensor() = default;
    LocalTensor(emulation::Buffer* buffer, TPosition position, uint64_t begin, uint64_t count)
        : buffer_(buffer), generation_(buffer->generation), begin_(begin), count_(count), position_(position) {}

    LocalTensor operator[](uint32_t offset) const {
        LocalTensor part = *this;
        part.begin_ += uint64_t{offset} * sizeof(T);
        part.count_ = offset < count_ ? count_ - offset : 0;
        return part;
    }
    template <typename U>
    LocalTensor<U> ReinterpretCast() const {
        LocalTensor<U> other;
        other.buffer_ = buffer_;
        other.generation_ = generation_;
        other.begin_ = begin_;
        other.count_ = count_ * sizeof(T) / sizeof(U);
        other.position_ = position_;
        return other;
    }
    uint32_t GetSize() const { return static_cast<uint32_t>(count_); }
    void SetSize(uint32_t count) { count_ = count; }
    int32_t GetPosition() const { return static_cast<int32_t>(position_); }
    uint64_t GetPhyAddr() const { return begin_; }

    T GetValue(uint32_t index, Where where = {}) const {
        T value;
        const T* from = Data() + index;
        emulation::Issue(PIPE_S, "GetValue", {Element(index, where)}, {}, {}, where,
                         [&] { std::memcpy(&value, from, sizeof value); });
        return value;
    }
    template <typename V>
    void SetValue(uint32_t index, V value, Where where = {}) const {
        const T stored = static_cast<T>(value);
        T* to = Data() + index;
        emulation::Issue(PIPE_S, "SetValue", {}, {Element(index, where)}, {}, where,
                         [&] { std::memcpy(static_cast<void*>(to), &stored, sizeof stored); });
    }

    // Emulation only.
    T* Data() const { return buffer_ == nullptr ? nullptr : reinterpret_cast<T*>(buffer_->memory->bytes + begin_); }
    emulation::Span Bytes(uint64_t offset, uint64_t bytes, uint32_t blocks = 1, uint64_t blockStride = 0, uint32_t repeats = 1,
                          uint64_t repeatStride = 0) const {
        emulation::Span span;
        if (buffer_ != nullptr) {
            span.memory = buffer_->memory;
            span.buffer = buffer_;
            span.lower = buffer_->begin;
            span.upper = buffer_->end;
        }
        span.generation = generation_;
        span.begin = begin_ + offset;
        span.bytes = bytes;
        span.blocks = blocks;
        span.blockStride = blockStride;
        span.repeats = repeats;
        span.repeatStride = repeatStride;
        return span;
    }
    emulation::Span Whole() const { return Bytes(0, count_ * sizeof(T)); }
    emulation::Buffer* Owner() const { return buffer_; }
    bool Stale() const { return buffer_ != nullptr && generation_ != buffer_->generation; }
    uint64_t Address() const { return begin_; }

private:
    template <typename U>
    friend class LocalTensor;
    emulation::Span Element(uint32_t index, Where where) const {
        emulation::Require(buffer_ == nullptr || buffer_->memory->space == emulation::Space::UB, 3,
                           "GetValue and SetValue must address UB or GM", where);
        return Bytes(uint64_t{index} * sizeof(T), sizeof(T));
    }

    emulation::Buffer* buffer_ = nullptr;
    uint32_t generation_ = 0;
    uint64_t begin_ = 0, count_ = 0;
    TPosition position_ = TPosition::VECCALC;
};

template <typename T>
class GlobalTensor {
public:
    using PrimType = T;

    void SetGlobalBuffer(__gm__ T* buffer, uint64_t count) {
        SetGlobalBuffer(buffer);
        count_ = count;
        upper_ = std::min(upper_, begin_ + count * sizeof(T));
    }
    void SetGlobalBuffer(__gm__ T* buffer) {
        memory_ = emulation::RegionOf(buffer);
        begin_ = memory_ ? reinterpret_cast<const uint8_t*>(buffer) - memory_->bytes : 0;
        upper_ = memory_ ? memory_->size : 0;
        lower_ = begin_;
        count_ = 0;
    }
    GlobalTensor operator[](uint64_t offset) const {
        GlobalTensor part = *this;
        part.begin_ += offset * sizeof(T);
        return part;
    }
    const __gm__ T* GetPhyAddr() const { return Data(); }
    const __gm__ T* GetPhyAddr(uint64_t offset) const { return Data() + offset; }
    uint64_t GetSize() const { return count_; }
    template <CacheRwMode mode = CacheRwMode::RW>
    void SetL2CacheHint(CacheMode) {}

    T GetValue(uint64_t index, Where where = {}) const {
        T value;
        const T* from = Data() + index;
        const emulation::Span span = Bytes(index * sizeof(T), sizeof(T));
        emulation::Cost cost;
        cost.bursts = emulation::ReadThroughCache(span, where);
        cost.burstBytes = emulation::kLine;
        emulation::Issue(PIPE_S, "GetValue", {span}, {}, cost, where, [&] { std::memcpy(&value, from, sizeof value); });
        return value;
    }
    template <typename V>
    void SetValue(uint64_t index, V value, Where where = {}) const {
        const T stored = static_cast<T>(value);
        T* to = Data() + index;
        const emulation::Span span = Bytes(index * sizeof(T), sizeof(T));
        emulation::Issue(PIPE_S, "SetValue", {}, {span}, {}, where,
                         [&] { std::memcpy(static_cast<void*>(to), &stored, sizeof stored); });
        emulation::WriteThroughCache(span, where);
    }

    // Emulation only.
    T* Data() const { return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_->bytes + begin_); }
    emulation::Span Bytes(uint64_t offset, uint64_t bytes, uint32_t blocks = 1, uint64_t blockStride = 0, uint32_t repeats = 1,
                          uint64_t repeatStride = 0) const {
        return {memory_, nullptr, 0, lower_, upper_, begin_ + offset, bytes, blocks, blockStride, repeats, repeatStride, false};
    }

private:
    emulation::Memory* memory_ = nullptr;
    uint64_t begin_ = 0, lower_ = 0, upper_ = 0, count_ = 0;
};

}  // namespace AscendC

namespace emulation {

// A new buffer at the end of what TPipe has handed out; its bytes are poison and count as never written.
inline Buffer* Allocate(Space space, uint64_t bytes, Where where) {
    Core& core = Current();
    const int s = static_cast<int>(space);
    Memory& memory = core.memories[s];
    Require(memory.bytes != nullptr, 3, where, [&] {
        return std::string("a buffer in ") + kSpaceNames[s] + " must be made on the " + (core.cube ? "vector" : "cube") + " core";
    });
    const uint64_t begin = core.top[s];  // TPipe counts in 32 bytes and aligns to nothing else
    const uint64_t size = (bytes + 31) / 32 * 32;
    Require(bytes > 0, 5, where, [] { return std::string("InitBuffer length must be positive, got 0"); });
    core.top[s] = begin + size;
    if (space == Space::UB) CheckUbTop(core, where);
    Require(core.top[s] <= kLimits[s].usable, 1, where, [&] {
        return std::string(kSpaceNames[s]) + " buffers must total at most " + std::to_string(kLimits[s].usable) + " bytes, got " +
               std::to_string(core.top[s]);
    });
    ++core.bufferCount;
    Require(core.bufferCount <= kMaxBuffers, 1, where,
            [] { return std::string("a TPipe must hold at most 64 buffers, got 65"); });
    core.buffers.emplace_back();
    Buffer& buffer = core.buffers.back();
    buffer.memory = &memory;
    buffer.begin = begin;
    buffer.end = begin + size;
    return &buffer;
}

inline void Poison(Buffer& buffer) {
    std::memset(buffer.memory->written + buffer.begin, 0, buffer.end - buffer.begin);
    // A seeded run may still have to read what was here; the flags alone catch a read before a write.
    if (!Current().deferring) std::memset(buffer.memory->bytes + buffer.begin, kPoison, buffer.end - buffer.begin);
}

struct Queue {
    struct Slot {
        Buffer* buffer;
        enum { Free, Taken, Queued } state = Free;
        int freeEvent = -1;             // set when the consumer let go of it
    };
    struct Entry {
        size_t slot;
        int event;
    };
    int producer = 0, consumer = 0;     // pipes
    uint32_t depth = 1;
    std::vector<Slot> slots;
    std::deque<Entry> entries;
    size_t next = 0;
};

// Position of a queue -> the pipe that fills its tensors and the pipe that uses them.
constexpr std::pair<int, int> QueuePipes(AscendC::TPosition source, AscendC::TPosition destination) {
    using P = AscendC::TPosition;
    const auto fills = [](P p) {
        return p == P::VECIN || p == P::A1 || p == P::B1 || p == P::C1 || p == P::TSCM ? PIPE_MTE2
               : p == P::A2 || p == P::B2 || p == P::C2                                ? PIPE_MTE1
               : p == P::CO1                                                           ? PIPE_M
                                                                                       : PIPE_V;
    };
    const auto uses = [](P p) {
        return p == P::VECIN || p == P::VECCALC                          ? PIPE_V
               : p == P::A1 || p == P::B1 || p == P::C1 || p == P::TSCM ? PIPE_MTE1
               : p == P::A2 || p == P::B2 || p == P::C2                 ? PIPE_M
               : p == P::CO1                                            ? PIPE_FIX
                                                                        : PIPE_MTE3;
    };
    return {fills(source), uses(destination)};
}

}  // namespace emulation

namespace AscendC {

enum class HardEvent : uint8_t {  // source pipe * 8 + destination pipe
    MTE2_MTE1 = PIPE_MTE2 * 8 + PIPE_MTE1, MTE1_MTE2 = PIPE_MTE1 * 8 + PIPE_MTE2, MTE1_M = PIPE_MTE1 * 8 + PIPE_M,
    M_MTE1 = PIPE_M * 8 + PIPE_MTE1, MTE2_V = PIPE_MTE2 * 8 + PIPE_V, V_MTE2 = PIPE_V * 8 + PIPE_MTE2,
    MTE3_V = PIPE_MTE3 * 8 + PIPE_V, V_MTE3 = PIPE_V * 8 + PIPE_MTE3, M_V = PIPE_M * 8 + PIPE_V,
    V_M = PIPE_V * 8 + PIPE_M, V_V = PIPE_V * 8 + PIPE_V, MTE3_MTE1 = PIPE_MTE3 * 8 + PIPE_MTE1,
    MTE1_MTE3 = PIPE_MTE1 * 8 + PIPE_MTE3, MTE1_V = PIPE_MTE1 * 8 + PIPE_V, MTE2_M = PIPE_MTE2 * 8 + PIPE_M,
    M_MTE2 = PIPE_M * 8 + PIPE_MTE2, V_MTE1 = PIPE_V * 8 + PIPE_MTE1, M_FIX = PIPE_M * 8 + PIPE_FIX,
    FIX_M = PIPE_FIX * 8 + PIPE_M, MTE3_MTE2 = PIPE_MTE3 * 8 + PIPE_MTE2, MTE2_MTE3 = PIPE_MTE2 * 8 + PIPE_MTE3,
    S_V = PIPE_S * 8 + PIPE_V, V_S = PIPE_V * 8 + PIPE_S, S_MTE2 = PIPE_S * 8 + PIPE_MTE2,
    MTE2_S = PIPE_MTE2 * 8 + PIPE_S, S_MTE3 = PIPE_S * 8 + PIPE_MTE3, MTE3_S = PIPE_MTE3 * 8 + PIPE_S,
    MTE2_FIX = PIPE_MTE2 * 8 + PIPE_FIX, FIX_MTE2 = PIPE_FIX * 8 + PIPE_MTE2, FIX_S = PIPE_FIX * 8 + PIPE_S,
    M_S = PIPE_M * 8 + PIPE_S, FIX_MTE3 = PIPE_FIX * 8 + PIPE_MTE3,
};

class TPipe;
template <TPosition source, TPosition destination, int32_t depth, auto mask>
class TQueBind;

template <TPosition position = TPosition::LCM>
class TBuf {
public:
    template <typename T>
    LocalTensor<T> Get(Where where = {}) const {
        Check(where);
        return {buffer_, position, buffer_->begin, length_ / sizeof(T)};
    }
    template <typename T>
    LocalTensor<T> Get(uint32_t count, Where where = {}) const {
        return GetWithOffset<T>(count, 0, where);
    }
    template <typename T>
    LocalTensor<T> GetWithOffset(uint32_t count, uint32_t offset, Where where = {}) const {
        Check(where);
        emulation::Require(offset + uint64_t{count} * sizeof(T) <= buffer_->end - buffer_->begin, 4, where, [&] {
            return "TBuf::Get must stay in " + std::to_string(length_) + " bytes, got " + std::to_string(count * sizeof(T)) +
                   " at " + std::to_string(offset);
        });
        return {buffer_, position, buffer_->begin + offset, count};
    }

private:
    friend class TPipe;
    void Check(Where where) const {
        emulation::Require(buffer_ != nullptr, 3, "TBuf must be given to InitBuffer before Get", where);
    }
    emulation::Buffer* buffer_ = nullptr;
    uint64_t length_ = 0;
};

class TPipe {
public:
    explicit TPipe(Where where = {}) { Init(where); }
    TPipe(const TPipe&) = delete;
    ~TPipe() { Release(); }
    void Init(Where where = {}) {
        emulation::Core& core = emulation::Current();
        emulation::Require(core.pipeObject == nullptr, 1, "a core must use one TPipe at a time, got a second", where);
        core.pipeObject = this;
        core.top = {};
        core.bufferCount = 0;
        if (!core.cube) return;
        for (int i = 0; i < kOwnEvents; ++i) {  // on the cube core TPipe keeps these set, for the device's own matrix product
            emulation::SetEvent(PIPE_M, PIPE_MTE1, emulation::TakeEventId(PIPE_M, PIPE_MTE1, true, where), true, where);
        }
    }
    void Destroy() { Release(); }
    void Reset() {
        emulation::Core& core = emulation::Current();
        core.top = {};
        core.bufferCount = 0;
    }

    template <TPosition source, TPosition destination, int32_t depth, auto mask>
    bool InitBuffer(TQueBind<source, destination, depth, mask>& queue, uint8_t num, uint32_t length, Where where = {}) {
        const TPosition position = source == TPosition::GM ? destination : source;
        queue.state_ = std::make_shared<emulation::Queue>();
        std::tie(queue.state_->producer, queue.state_->consumer) =
            emulation::QueuePipes(position, destination == TPosition::GM ? source : destination);
        queue.state_->depth = depth;
        queue.length_ = length;
        for (uint32_t i = 0; i < num; ++i) {
            emulation::Buffer* buffer = emulation::Allocate(emulation::SpaceOf(position, where), length, where);
            buffer->live = false;
            emulation::Poison(*buffer);
            queue.state_->slots.push_back({buffer});
        }
        emulation::Current().exitChecks.push_back([state = queue.state_, where] {
            for (const auto& slot : state->slots) {
                emulation::Require(slot.state == emulation::Queue::Slot::Free, 3,
                                   "a queue's tensor must be freed before the kernel ends, got one left", where);
            }
        });
        return true;
    }
    template <TPosition position>
    bool InitBuffer(TBuf<position>& buf, uint32_t length, Where where = {}) {
        buf.buffer_ = emulation::Allocate(emulation::SpaceOf(position, where), length, where);
        buf.length_ = buf.buffer_->end - buf.buffer_->begin;
        emulation::Poison(*buf.buffer_);
        return true;
    }

    template <HardEvent event>
    int32_t AllocEventID(Where where = {}) {
        return emulation::TakeEventId(static_cast<int>(event) / 8, static_cast<int>(event) % 8, false, where);
    }
    template <HardEvent event>
    void ReleaseEventID(int32_t id, Where where = {}) {
        emulation::ReturnEventId(static_cast<int>(event) / 8, static_cast<int>(event) % 8, id, where);
    }
    // An id that is free now; the caller sets and waits before anyone else allocates.
    int32_t FetchEventID(HardEvent event, Where where = {}) {
        const int source = static_cast<int>(event) / 8, destination = static_cast<int>(event) % 8;
        const int32_t id = emulation::TakeEventId(source, destination, false, where);
        emulation::ReturnEventId(source, destination, id, where);
        emulation::Current().fetchedIds[source * 8 + destination] |= 1 << id;
        return id;
    }
    template <HardEvent event>
    int32_t FetchEventID(Where where = {}) {
        return FetchEventID(event, where);
    }

private:
    static constexpr int kOwnEvents = 3;

    void Release() {
        emulation::Core& core = emulation::Current();
        if (core.pipeObject != this || std::uncaught_exceptions() > 0) return;
        core.pipeObject = nullptr;
        for (int id = 0; core.cube && id < kOwnEvents; ++id) {
            emulation::WaitEvent(PIPE_M, PIPE_MTE1, id, true, {});
            emulation::ReturnEventId(PIPE_M, PIPE_MTE1, id, {});
        }
        emulation::Barrier(PIPE_ALL, {});
    }
};

inline TPipe* GetTPipePtr() { return static_cast<TPipe*>(emulation::Current().pipeObject); }

// Tensors that pass from the pipe of `source` to the pipe of `destination` and back; GM at either end stands for "outside".
template <TPosition source, TPosition destination, int32_t depth, auto mask = 0>
class TQueBind {
public:
    static constexpr TPosition position = source == TPosition::GM ? destination : source;

    template <typename T>
    LocalTensor<T> AllocTensor(Where where = {}) {
        auto& q = State(where);
        for (size_t tried = 0; tried < q.slots.size(); ++tried) {
            auto& slot = q.slots[(q.next + tried) % q.slots.size()];
            if (slot.state != Slot::Free) continue;
            q.next = (q.next + tried + 1) % q.slots.size();
            if (slot.freeEvent >= 0) {
                emulation::WaitEvent(q.consumer, q.producer, slot.freeEvent, true, where);
                emulation::ReturnEventId(q.consumer, q.producer, slot.freeEvent, where);
                slot.freeEvent = -1;
            }
            slot.state = Slot::Taken;
            slot.buffer->live = true;
            ++slot.buffer->generation;
            emulation::Poison(*slot.buffer);
            return {slot.buffer, position, slot.buffer->begin, length_ / sizeof(T)};
        }
        emulation::Fail(3, "AllocTensor must find a free buffer, got all " + std::to_string(q.slots.size()) + " in use", where);
    }

    template <typename T>
    bool EnQue(const LocalTensor<T>& tensor, Where where = {}) {
        auto& q = State(where);
        const size_t slot = SlotOf(q, tensor, "EnQue", where);
        emulation::Require(q.slots[slot].state == Slot::Taken, 3,
                           "EnQue must be given a tensor that is allocated and not yet queued", where);
        emulation::Require(q.entries.size() < q.depth, 3, where, [&] {
            return "EnQue must keep at most " + std::to_string(q.depth) + " (the depth) tensors queued, got one more";
        });
        q.slots[slot].state = Slot::Queued;
        int event = -1;
        if (q.producer != q.consumer) {
            event = emulation::TakeEventId(q.producer, q.consumer, true, where);
            emulation::SetEvent(q.producer, q.consumer, event, true, where);
        }
        q.entries.push_back({slot, event});
        return true;
    }

    template <typename T>
    LocalTensor<T> DeQue(Where where = {}) {
        auto& q = State(where);
        emulation::Require(!q.entries.empty(), 3, "DeQue must follow an EnQue, got an empty queue", where);
        const auto entry = q.entries.front();
        q.entries.pop_front();
        if (entry.event < 0) {
            emulation::Barrier(q.producer, where);
        } else {
            emulation::WaitEvent(q.producer, q.consumer, entry.event, true, where);
            emulation::ReturnEventId(q.producer, q.consumer, entry.event, where);
        }
        auto& slot = q.slots[entry.slot];
        slot.state = Slot::Taken;
        return {slot.buffer, position, slot.buffer->begin, length_ / sizeof(T)};
    }

    template <typename T>
    void FreeTensor(const LocalTensor<T>& tensor, Where where = {}) {
        auto& q = State(where);
        auto& slot = q.slots[SlotOf(q, tensor, "FreeTensor", where)];
        emulation::Require(slot.state != Slot::Free, 3, "FreeTensor must be given an allocated tensor, got one already free",
                           where);
        emulation::Require(slot.state != Slot::Queued, 3, "FreeTensor must follow DeQue, got a tensor still queued", where);
        slot.state = Slot::Free;
        slot.buffer->live = false;
        if (q.producer != q.consumer) {
            slot.freeEvent = emulation::TakeEventId(q.consumer, q.producer, true, where);
            emulation::SetEvent(q.consumer, q.producer, slot.freeEvent, true, where);
        } else {
            emulation::Barrier(q.producer, where);
        }
    }

    bool HasTensorInQue() const { return state_ && !state_->entries.empty(); }
    int32_t GetTensorCountInQue() const { return state_ ? static_cast<int32_t>(state_->entries.size()) : 0; }
    bool VacantInQue() const { return state_ && state_->entries.size() < state_->depth; }
    bool HasIdleBuffer() const {
        return state_ &&
               std::any_of(state_->slots.begin(), state_->slots.end(), [](const Slot& slot) { return slot.state == Slot::Free; });
    }

private:
    using Slot = emulation::Queue::Slot;
    friend class TPipe;
    emulation::Queue& State(Where where) const {
        emulation::Require(state_ != nullptr, 3, "a queue must be given to InitBuffer before use", where);
        return *state_;
    }
    template <typename T>
    static size_t SlotOf(const emulation::Queue& q, const LocalTensor<T>& tensor, const char* call, Where where) {
        for (size_t i = 0; i < q.slots.size(); ++i) {
            if (q.slots[i].buffer != tensor.Owner()) continue;
            emulation::Require(!tensor.Stale(), 3, where, [&] {
                return std::string(call) +
                       " must be given a live tensor, got one freed since (its buffer has been allocated again)";
            });
            return i;
        }
        emulation::Fail(3, std::string(call) + " must be given a tensor of this queue, got one of another buffer", where);
    }

    std::shared_ptr<emulation::Queue> state_;  // outlives the queue: checked when the core ends
    uint64_t length_ = 0;
};

constexpr TPosition QueueSource(TPosition position) {
    return position == TPosition::VECOUT || position == TPosition::VECCALC || position == TPosition::CO1 ? position
                                                                                                         : TPosition::GM;
}
constexpr TPosition QueueDestination(TPosition position) { return QueueSource(position) == position ? TPosition::GM : position; }

template <TPosition position, int32_t depth, auto mask = 0>
class TQue : public TQueBind<QueueSource(position), QueueDestination(position), depth, mask> {};

}  // namespace AscendC
