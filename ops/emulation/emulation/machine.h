// Continues core.h: the launch, handing over between cores, the checks of an instruction, flags and barriers.
#pragma once

#include "attributes.h"
#include "core.h"

enum KernelMetaType {
    KERNEL_TYPE_AIV_ONLY,
    KERNEL_TYPE_AIC_ONLY,
    KERNEL_TYPE_MIX_AIV_1_0,            // the cores of AIV_ONLY, with synchronisation between cores
    KERNEL_TYPE_MIX_AIC_1_0,            // the cores of AIC_ONLY, with synchronisation between cores
    KERNEL_TYPE_MIX_AIC_1_1,
    KERNEL_TYPE_MIX_AIC_1_2
};

namespace emulation {

constexpr const char* kTypeNames[] = {"AIV_ONLY", "AIC_ONLY", "MIX_AIV_1_0", "MIX_AIC_1_0", "MIX_AIC_1_1", "MIX_AIC_1_2"};

using KernelType = KernelMetaType;

struct Machine {
    std::string kernel;
    KernelType type = KERNEL_TYPE_MIX_AIC_1_2;
    uint32_t blocks = 1, cardCores = 20;
    Attributes attributes;
    bool allUb = false;
    bool hazards = true;
    std::vector<std::string>* warnings = nullptr;
    Trace* trace = nullptr;
    uint64_t seed = 0;
    std::deque<Core> cores;
    std::deque<Memory> regions;         // GM arguments
    uint64_t stamp = 0;                 // writes to GM so far
    std::mt19937_64 random;

    std::mutex mutex;
    std::condition_variable done;
    Core* running = nullptr;
    bool aborted = false;
    std::exception_ptr error;
};

struct Aborted {};                      // unwinds the other cores after a fault

constexpr const char* kRuleNames[] = {"",     "capacity",  "alignment",     "queue",          "bounds",   "parameter", "hazard",
                                      "flag", "dead-lock", "uninitialised", "host construct", "schedule", "rounding"};

inline std::string FaultText(const std::string& kernel, int rule, const std::string& message, Where where,
                             const std::string& core) {
    return "rule " + std::to_string(rule) + " (" + kRuleNames[rule] + "): " + message + "; kernel " + kernel + ", " + where.file +
           ":" + std::to_string(where.line) + ", core " + core;
}

inline void Fail(int rule, const std::string& message, Where where) {
    const Core& core = Current();
    throw Fault(rule, FaultText(core.machine->kernel, rule, message, where, core.name));
}

// What the hardware takes and should not be asked for: told once for each line.
inline void Warn(const std::string& message, Where where) {
    const Core& core = Current();
    std::vector<std::string>* told = core.machine->warnings;
    if (told == nullptr) return;
    const std::string text = message + "; kernel " + core.machine->kernel + ", " + where.file + ":" + std::to_string(where.line);
    if (std::find(told->begin(), told->end(), text) == told->end()) told->push_back(text);
}

// ---- handing over ----

inline Core* PickNext(Machine& machine, const Core* from) {
    std::vector<Core*> ready;
    const size_t count = machine.cores.size(), start = from ? from->index : 0;
    for (size_t i = 0; i < count; ++i) {
        Core& core = machine.cores[(start + i) % count];
        if (!core.finished && (!core.blockedOn || core.blockedOn())) ready.push_back(&core);
    }
    if (ready.empty()) return nullptr;
    return machine.seed ? ready[machine.random() % ready.size()] : ready.front();
}

inline void Abort(Machine& machine, std::exception_ptr error) {  // with the mutex held
    if (!machine.aborted) machine.error = error;
    machine.aborted = true;
    for (Core& core : machine.cores) core.wake.notify_all();
    machine.done.notify_all();
}

inline std::exception_ptr DeadLock(Machine& machine) {
    std::string waiting;
    const Core* first = nullptr;
    for (const Core& core : machine.cores) {
        if (core.finished) continue;
        if (first == nullptr) first = &core;
        waiting += (waiting.empty() ? "" : "; ") + core.name + " waits for " + core.blockedText;
    }
    return std::make_exception_ptr(
        Fault(8, FaultText(machine.kernel, 8, "every unfinished core must be woken, got a dead-lock: " + waiting,
                           first->blockedAt, first->name)));
}

inline void RunNext(Machine& machine, Core* from, Core* next, std::unique_lock<std::mutex>& lock) {
    if (next == nullptr) {
        Abort(machine, DeadLock(machine));
    } else {
        machine.running = next;
        if (next == from) return;
        next->wake.notify_all();
    }
    from->wake.wait(lock, [&] { return machine.running == from || machine.aborted; });
    if (machine.aborted) throw Aborted{};
}

inline void Yield(Core& core) {
    std::unique_lock<std::mutex> lock(core.machine->mutex);
    RunNext(*core.machine, &core, PickNext(*core.machine, &core), lock);
}

inline void BlockOn(Core& core, std::function<bool()> ready, const std::string& text, Where where) {
    if (ready()) return;
    std::unique_lock<std::mutex> lock(core.machine->mutex);
    core.blockedOn = std::move(ready);
    core.blockedText = text + " at " + where.file + ":" + std::to_string(where.line);
    core.blockedAt = where;
    RunNext(*core.machine, &core, PickNext(*core.machine, &core), lock);
    core.blockedOn = nullptr;
}

// ---- deferred execution (seeded runs) ----

inline void Execute(Core& core, int pipe, uint32_t target) {
    while (core.executed[pipe] < target) {
        Pending next = std::move(core.pending[pipe].front());
        core.pending[pipe].pop_front();
        for (int other = 0; other < kPipes; ++other) {
            if (other != pipe && other != PIPE_S) Execute(core, other, next.needs[other]);
        }
        next.body();
        ++core.executed[pipe];
    }
}

inline void ExecuteNeeds(Core& core, const Clock& clock) {
    const int start = static_cast<int>(core.random() % kPipes);
    for (int i = 0; i < kPipes; ++i) {
        const int pipe = (start + i) % kPipes;
        if (pipe != PIPE_S) Execute(core, pipe, clock.own[pipe]);
    }
}

inline void ExecuteAll(Core& core) {
    Clock all;
    all.own = core.issued;
    if (core.deferring) ExecuteNeeds(core, all);
}

// ---- clocks ----

// Instructions are issued by the scalar unit in program order, so what it has waited for holds for all that follow; its own
// memory accesses are another matter and need a flag.
inline Clock& Refresh(Core& core, int pipe) {
    Clock& clock = core.clocks[pipe];
    if (pipe == PIPE_S) {
        clock.own[PIPE_S] = core.issued[PIPE_S];
        clock.own[kDataCache] = core.issued[kDataCache];
    } else if (core.scalarSeen[pipe] != core.scalarVersion) {
        const uint32_t scalar = clock.own[PIPE_S], cache = clock.own[kDataCache];
        Join(clock, core.clocks[PIPE_S]);
        clock.own[PIPE_S] = scalar;
        clock.own[kDataCache] = cache;
        core.scalarSeen[pipe] = core.scalarVersion;
    }
    return clock;
}

inline Clock Completed(Core& core, int pipe) {  // what a flag set on the pipe now tells its waiter
    Clock clock = Refresh(core, pipe);
    clock.own[pipe] = core.issued[pipe];
    if (pipe == PIPE_S) clock.own[kDataCache] = core.cacheCleaned;
    return clock;
}

inline void Learn(Core& core, int pipe, const Clock& clock) {
    Join(Refresh(core, pipe), clock);
    if (pipe == PIPE_S) ++core.scalarVersion;
}

inline TraceStep* AddStep(Core& core, Step step, int pipe, const char* opcode, Where where, int id = -1) {
    if (core.machine->trace == nullptr) return nullptr;
    auto& steps = core.machine->trace->cores[core.index].steps;
    steps.emplace_back();
    TraceStep& added = steps.back();
    added.step = step;
    added.pipe = pipe;
    added.opcode = opcode;
    added.file = where.file;
    added.line = where.line;
    added.id = id;
    return &added;
}

inline uint32_t LastStep(const Core& core) {
    const Trace* trace = core.machine->trace;
    return trace ? static_cast<uint32_t>(trace->cores[core.index].steps.size() - 1) : 0;
}

// ---- the checks of an instruction ----

inline std::string Range(const Memory& memory, uint64_t begin, uint64_t end) {
    const char* space = kSpaceNames[static_cast<int>(memory.space)];
    return std::string(space) + (memory.name.empty() ? "" : " " + memory.name) + " bytes [" + std::to_string(begin) + ", " +
           std::to_string(end) + ")";
}

inline void CheckSpan(const Span& s, const char* opcode, bool isWrite, Where where) {
    const char* verb = isWrite ? " writes " : " reads ";
    Require(s.memory != nullptr, 4, where,
            [&] { return std::string(opcode) + verb + "a tensor that must be attached to a buffer, got none"; });
    if (s.buffer != nullptr) {
        Require(s.buffer->live && s.buffer->generation == s.generation, 3, where, [&] {
            return std::string(opcode) + verb + "a tensor that must be allocated, got one already freed (" +
                   Range(*s.memory, s.lower, s.upper) + ")";
        });
    }
    const uint64_t last = s.begin + (s.blocks - 1) * s.blockStride + (s.repeats - 1) * s.repeatStride;
    Require(s.begin >= s.lower && s.begin <= s.upper && last <= s.upper && s.bytes <= s.upper - last, 4, where, [&] {
        return std::string(opcode) + verb + Range(*s.memory, s.begin, last + s.bytes) + " and must stay in [" +
               std::to_string(s.lower) + ", " + std::to_string(s.upper) + ")";
    });
    if (s.memory->space == Space::L0A || s.memory->space == Space::L0B) {
        const uint64_t alignment = kLimits[static_cast<int>(s.memory->space)].alignment;
        Require(s.begin % alignment == 0, 2, where, [&] {
            return std::string(opcode) + verb + kSpaceNames[static_cast<int>(s.memory->space)] +
                   " at an address that must be a multiple of " + std::to_string(alignment) + ", got " + std::to_string(s.begin);
        });
    }
    Require(!isWrite || !s.memory->readOnly, 4, where, [&] {
        return std::string(opcode) + " writes GM " + s.memory->name + ", which must only be read";
    });
}

template <class Visit>
void ForEachPiece(const Span& s, Visit&& visit) {
    uint64_t bytes = s.bytes;
    uint32_t blocks = s.blocks, repeats = s.repeats;
    uint64_t blockStride = s.blockStride, repeatStride = s.repeatStride;
    if (bytes == 0) return;
    if (blocks > 1 && blockStride == bytes) {
        bytes *= blocks;
        blocks = 1;
    }
    if (repeats > 1 && blocks == 1 && repeatStride == bytes) {
        bytes *= repeats;
        repeats = 1;
    }
    if (repeatStride == 0) repeats = 1;
    if (blockStride == 0) blocks = 1;
    for (uint32_t r = 0; r < repeats; ++r) {
        for (uint32_t b = 0; b < blocks; ++b) {
            const uint64_t begin = s.begin + r * repeatStride + b * blockStride;
            visit(begin, begin + bytes);
        }
    }
}

inline bool Known(const Core& core, const Clock& clock, Epoch epoch) {
    if (epoch.component / 8 == core.index) return clock.own[epoch.component % 8] >= epoch.seq;
    return clock.others && (*clock.others)[epoch.component] >= epoch.seq;
}

inline void ReportHazard(Core& core, pipe_t pipe, const char* opcode, const Memory& memory, uint64_t begin, uint64_t end,
                         Epoch earlier, bool earlierIsWrite, bool isWrite, Where where) {
    const Core& other = core.machine->cores[earlier.component / 8];
    const int otherPipe = earlier.component % 8;
    const Origin& origin = other.history[otherPipe][earlier.seq - 1];
    const char* kind = isWrite ? (earlierIsWrite ? "WAW" : "WAR") : "RAW";
    const std::string pipeName = otherPipe == kDataCache ? "scalar (data cache)" : kPipeNames[otherPipe];
    Fail(6,
         std::string(kind) + " on " + Range(memory, begin, end) + ": " + opcode + " on " + kPipeNames[pipe] +
             (isWrite ? " writes" : " reads") + " what " + origin.opcode + " on " + pipeName +
             (earlierIsWrite ? " wrote" : " read") + " (" + origin.where.file + ":" + std::to_string(origin.where.line) +
             (&other == &core ? "" : ", core " + other.name) + ") and must be ordered after it",
         where);
}

inline bool HasPipe(const Core& core, int pipe) {
    return core.cube ? pipe != PIPE_V : pipe != PIPE_M && pipe != PIPE_MTE1 && pipe != PIPE_FIX;
}

inline void Admit(Core& core, pipe_t pipe, const char* opcode, std::initializer_list<Span> reads,
                  std::initializer_list<Span> writes, const Cost& cost, Where where) {
    Machine& machine = *core.machine;
    if (machine.seed) {
        if (core.random() % 16 == 0) Yield(core);
        // A third of the seeds executes as late as possible, the others run ahead on a random pipe now and then or often.
        const int any = static_cast<int>(core.random() % kPipes);
        const bool ahead = core.random() % 8 < machine.seed % 3 * 3;
        if (ahead && any != PIPE_S && !core.pending[any].empty()) Execute(core, any, core.executed[any] + 1);
    }
    Require(HasPipe(core, pipe), 5, where, [&] {
        return std::string(opcode) + " must be issued on the " + (core.cube ? "vector" : "cube") + " core";
    });
    for (const Span& span : reads) {
        if (span.bytes) CheckSpan(span, opcode, false, where);
    }
    for (const Span& span : writes) {
        if (span.bytes) CheckSpan(span, opcode, true, where);
    }
    for (const Span& span : reads) {
        if (span.bytes == 0 || span.mayBeUnwritten || span.memory->written == nullptr) continue;
        ForEachPiece(span, [&](uint64_t begin, uint64_t end) {
            const void* hole = std::memchr(span.memory->written + begin, 0, end - begin);
            Require(hole == nullptr, 9, where, [&] {
                const uint64_t at = static_cast<const uint8_t*>(hole) - span.memory->written;
                return std::string(opcode) + " reads " + Range(*span.memory, begin, end) +
                       ", which must have been written: byte " + std::to_string(at) + " was not";
            });
        });
    }
    const Clock& clock = Refresh(core, pipe);
    bool cached = false;                // a scalar write to GM stays in the data cache until it is cleaned
    for (const Span& span : writes) cached |= pipe == PIPE_S && span.memory && span.memory->space == Space::GM;
    const int component = cached ? kDataCache : pipe;
    const Epoch me{core.index * 8 + component, ++core.issued[component]};
    if (pipe == PIPE_S) Refresh(core, PIPE_S);
    if (machine.hazards) {
        core.history[component].push_back({opcode, where});
        // Mmads accumulate in order by themselves once the product is long enough to hide the latency.
        const bool ordered = pipe == PIPE_M && ((cost.m + 15) / 16) * ((cost.n + 15) / 16) >= 10;
        const auto check = [&](const Span& span, uint64_t begin, uint64_t end, bool isWrite, Epoch earlier, bool earlierIsWrite) {
            if (Known(core, clock, earlier) || (earlier.component == me.component && earlier.seq == me.seq)) return;
            if (ordered && span.memory->space == Space::L0C && earlier.component == me.component) return;
            ReportHazard(core, pipe, opcode, *span.memory, begin, end, earlier, earlierIsWrite, isWrite, where);
        };
        for (const Span& span : reads) {
            if (span.bytes == 0 || span.memory->readOnly) continue;
            ForEachPiece(span, [&](uint64_t begin, uint64_t end) {
                span.memory->shadow.Read(begin, end, me, [&](Epoch e, bool w) { check(span, begin, end, false, e, w); });
            });
        }
        for (const Span& span : writes) {
            if (span.bytes == 0) continue;
            const uint64_t stamp = span.memory->space == Space::GM ? ++machine.stamp : 0;
            ForEachPiece(span, [&](uint64_t begin, uint64_t end) {
                span.memory->shadow.Write(begin, end, me, stamp, [&](Epoch e, bool w) { check(span, begin, end, true, e, w); });
            });
        }
    }
    for (const Span& span : writes) {
        if (span.bytes == 0 || span.memory->written == nullptr) continue;
        ForEachPiece(span, [&](uint64_t begin, uint64_t end) { std::memset(span.memory->written + begin, 1, end - begin); });
    }
    if (TraceStep* step = AddStep(core, Step::Instruction, pipe, opcode, where)) {
        step->cost = cost;
        const auto count = [](std::array<uint64_t, kTraceSpaces>& bytes, const Span& s) {
            if (s.bytes == 0) return;
            const uint64_t total = s.bytes * s.blocks * s.repeats;
            bytes[static_cast<int>(s.memory->space)] += total;
            if (s.memory->workspace) bytes[kSpaces] += total;
        };
        for (const Span& s : reads) count(step->read, s);
        for (const Span& s : writes) count(step->written, s);
    }
    if (pipe == PIPE_S && core.deferring) ExecuteNeeds(core, clock);
}

inline void Finish(pipe_t pipe, Where) {
    Core& core = Current();
    Execute(core, pipe, core.issued[pipe]);
}

inline void CheckUbTop(Core& core, Where where) {
    const bool all = core.machine->allUb;
    const uint64_t usable = kLimits[static_cast<int>(Space::UB)].usable - (all ? 0 : kOwnUbBytes);
    Require(core.top[static_cast<int>(Space::UB)] <= usable, 1, where, [&] {
        return "UB buffers must total at most " + std::to_string(usable) + " bytes" +
               (all ? "" : " (8192 more are AscendC's, unless it is built with --cce-disable-asc-reserved-ubuf)") + ", got " +
               std::to_string(core.top[static_cast<int>(Space::UB)]);
    });
}

inline void NeedOwnUb(Where where) {
    Require(!Current().machine->allUb, 1, where, [] {
        return std::string("Select of mode 1 or 2 must not be used with --cce-disable-asc-reserved-ubuf: its scratch is the end of UB");
    });
}

// ---- flags inside a core ----

inline std::string EventName(int source, int destination) {
    return std::string(kPipeNames[source]) + "_" + kPipeNames[destination];
}

constexpr int kEventIds = 8, kDiscouragedEvent = 6;

inline void CheckEvent(const Core& core, int source, int destination, int id, bool queue, const char* call, Where where) {
    Require(HasPipe(core, source) && HasPipe(core, destination), 7, where, [&] {
        return std::string(call) + "<" + EventName(source, destination) + "> must name pipes of this core";
    });
    const int event = source * 8 + destination;
    const bool taken = id >= 0 && id < kEventIds && ((core.eventIds[event] | core.fetchedIds[event]) >> id & 1);
    Require(id >= 0 && id < kEventIds, 7, where, [&] {
        return std::string(call) + "<" + EventName(source, destination) + "> id must lie in [0, 7], got " + std::to_string(id);
    });
    if (!taken && id >= kDiscouragedEvent) {
        Warn(std::string(call) + "<" + EventName(source, destination) + "> id " + std::to_string(id) +
                 " should be left to the system: take it from AllocEventID", where);
    }
    Require(queue || !(core.queueIds[event] >> id & 1), 7, where, [&] {
        return std::string(call) + "<" + EventName(source, destination) + "> id " + std::to_string(id) +
               " must not be one that TPipe or a queue holds: take it from AllocEventID";
    });
}

inline void SetEvent(int source, int destination, int id, bool queue, Where where) {
    Core& core = Current();
    CheckEvent(core, source, destination, id, queue, "SetFlag", where);
    Flag& flag = core.flags[source * 8 + destination][id];
    Require(!flag.set, 7, where, [&] {
        return "SetFlag<" + EventName(source, destination) + "> id " + std::to_string(id) +
               " must be waited for before it is set again, set at " + flag.where.file + ":" + std::to_string(flag.where.line);
    });
    flag.set = true;
    flag.fromQueue = queue;
    flag.clock = Completed(core, source);
    flag.where = where;
    AddStep(core, Step::Set, source, "SetFlag", where, id);
    flag.step = LastStep(core);
}

inline void WaitEvent(int source, int destination, int id, bool queue, Where where) {
    Core& core = Current();
    CheckEvent(core, source, destination, id, queue, "WaitFlag", where);
    Flag& flag = core.flags[source * 8 + destination][id];
    Require(flag.set, 7, where, [&] {
        return "WaitFlag<" + EventName(source, destination) + "> id " + std::to_string(id) +
               " must follow its SetFlag, got none pending";
    });
    flag.set = false;
    Learn(core, destination, flag.clock);
    if (TraceStep* step = AddStep(core, Step::Wait, destination, "WaitFlag", where, id)) {
        step->after.push_back({static_cast<int32_t>(core.index), flag.step});
    }
}

inline int TakeEventId(int source, int destination, bool queue, Where where) {
    Core& core = Current();
    uint8_t& taken = core.eventIds[source * 8 + destination];
    int id = 0;
    while (id < kEventIds && (taken >> id & 1)) ++id;
    Require(id < kEventIds, 7, where,
            [&] { return "events of " + EventName(source, destination) + " must be at most 8 at a time, got a ninth"; });
    taken |= 1 << id;
    if (queue) core.queueIds[source * 8 + destination] |= 1 << id;
    return id;
}

inline void ReturnEventId(int source, int destination, int id, Where where) {
    Core& core = Current();
    uint8_t& taken = core.eventIds[source * 8 + destination];
    Require(id >= 0 && id < kEventIds && (taken >> id & 1), 7, where, [&] {
        return "ReleaseEventID<" + EventName(source, destination) + "> id must have been allocated, got " + std::to_string(id);
    });
    taken &= ~(1 << id);
    core.queueIds[source * 8 + destination] &= ~(1 << id);
}

inline void Barrier(int pipe, Where where) {
    Core& core = Current();
    Require(pipe != PIPE_S, 5, where, [] { return std::string("PipeBarrier must name a pipe other than PIPE_S, got PIPE_S"); });
    if (pipe != PIPE_ALL) {
        Require(HasPipe(core, pipe), 7, where, [&] {
            return std::string("PipeBarrier<PIPE_") + kPipeNames[pipe] + "> must name a pipe of this core";
        });
        Refresh(core, pipe).own[pipe] = core.issued[pipe];
        AddStep(core, Step::Barrier, pipe, "PipeBarrier", where);
        return;
    }
    Clock all = Completed(core, PIPE_S);
    for (int p = 1; p < kPipes; ++p) Join(all, Completed(core, p));
    for (int p = 0; p < kPipes; ++p) core.clocks[p] = all;
    ++core.scalarVersion;
    AddStep(core, Step::Barrier, PIPE_ALL, "PipeBarrier", where);
}

// ---- flags between cores ----

inline std::shared_ptr<const std::vector<uint32_t>> Flatten(const Core& core, const Clock& clock) {
    auto all = clock.others ? std::make_shared<std::vector<uint32_t>>(*clock.others)
                            : std::make_shared<std::vector<uint32_t>>(core.machine->cores.size() * 8);
    for (int i = 0; i < 8; ++i) (*all)[core.index * 8 + i] = std::max((*all)[core.index * 8 + i], clock.own[i]);
    return all;
}

inline std::vector<Core*> Group(const Core& core, int mode) {  // whom a set of this core reaches
    std::vector<Core*> group;
    for (Core& other : core.machine->cores) {
        const bool inside = mode == 0   ? other.cube == core.cube
                            : mode == 1 ? other.cube == core.cube && other.block == core.block
                            : mode == 2 ? other.cube != core.cube && other.block == core.block
                                        : true;
        if (inside) group.push_back(&other);
    }
    return group;
}

constexpr int kEveryCore = 3;           // SyncAll<false>

inline void CrossSetFlag(int mode, int pipe, int id, Where where) {
    Core& core = Current();
    Require(HasPipe(core, pipe), 7, where, [&] {
        return std::string("CrossCoreSetFlag<PIPE_") + kPipeNames[pipe] + "> must name a pipe of this core";
    });
    Clock clock = Completed(core, pipe);
    if (core.deferring) ExecuteNeeds(core, clock);
    const auto all = Flatten(core, clock);
    AddStep(core, Step::CrossSet, pipe, "CrossCoreSetFlag", where, id);
    const Edge edge{static_cast<int32_t>(core.index), LastStep(core)};
    for (Core* target : Group(core, mode)) {
        for (const auto& [key, sets] : target->arrivals) {
            Require(key.first != id || sets.empty() || sets.front().mode == mode, 7, where, [&, id = key.first] {
                const CrossSet& earlier = sets.front();
                return "CrossCoreSetFlag id " + std::to_string(id) + " must be waited for in one mode before it is set in another: " +
                       "core " + target->name + " has a set of mode " + std::to_string(earlier.mode) + " from " +
                       earlier.where.file + ":" + std::to_string(earlier.where.line) + ", got mode " + std::to_string(mode);
            });
        }
        auto& queue = target->arrivals[{id, core.index}];
        Clock sent;
        sent.others = all;
        queue.push_back({sent, mode, edge, where});
        Require(queue.size() <= 15, 7, where, [&] {
            return "CrossCoreSetFlag id " + std::to_string(id) + " counter of core " + target->name +
                   " must be at most 15, got " + std::to_string(queue.size());
        });
    }
}

// The cores whose sets complete a wait on this id, or none yet. Sets of different modes under one id are separate sources.
inline std::vector<uint32_t> Arrived(const Core& core, int id) {
    for (const auto& [key, queue] : core.arrivals) {
        if (key.first != id || queue.empty()) continue;
        const int mode = queue.front().mode;
        std::vector<uint32_t> sources;
        bool complete = true;
        for (const Core* source : Group(core, mode)) {
            const auto found = core.arrivals.find({id, source->index});
            complete &= found != core.arrivals.end() && !found->second.empty() && found->second.front().mode == mode;
            sources.push_back(source->index);
        }
        if (complete) return sources;
    }
    return {};
}

inline void CrossWaitFlag(int id, int pipe, Where where) {
    Core& core = Current();
    BlockOn(core, [&core, id] { return !Arrived(core, id).empty(); }, "cross-core flag " + std::to_string(id), where);
    TraceStep* step = AddStep(core, Step::CrossWait, pipe, "CrossCoreWaitFlag", where, id);
    for (uint32_t source : Arrived(core, id)) {
        auto& queue = core.arrivals[{id, source}];
        Clock clock = queue.front().clock;
        for (int i = 0; i < 8; ++i) clock.own[i] = (*clock.others)[core.index * 8 + i];
        Learn(core, pipe, clock);
        if (step) step->after.push_back(queue.front().edge);
        queue.pop_front();
    }
}

// The cores' synchronisation unit works in MIX kernels only; MIX_AIV_1_0 and MIX_AIC_1_0 are those with one kind of core.
inline void CheckSynchronises(const char* call, Where where) {
    const KernelType type = Current().machine->type;
    Require(type != KERNEL_TYPE_AIV_ONLY && type != KERNEL_TYPE_AIC_ONLY, 7, where, [&] {
        return std::string(call) + " must be used in a kernel of a MIX type (MIX_AIV_1_0 has vector cores only), got " +
               (type == KERNEL_TYPE_AIV_ONLY ? "KERNEL_TYPE_AIV_ONLY" : "KERNEL_TYPE_AIC_ONLY");
    });
}

// Blocks that wait for each other must all be on the card's cores at once.
inline void CheckTogether(const char* call, Where where) {
    const Machine& machine = *Current().machine;
    const bool vectorOnly = machine.type == KERNEL_TYPE_MIX_AIV_1_0;
    const uint32_t cores = vectorOnly ? 2 * machine.cardCores : machine.cardCores;
    Require(machine.blocks <= cores, 8, where, [&] {
        return std::string(call) + " must be on at most " + std::to_string(cores) + (vectorOnly ? " vector" : " AI") +
               " cores, as many as the card has, got " + std::to_string(machine.blocks) + " blocks";
    });
    Require(!machine.attributes.known || machine.attributes.together, 8, where, [&] {
        return std::string(call) + " must be in a kernel of __schedmode__(1): without it blocks of two streams can wait for "
                                   "each other's cores";
    });
}

inline void CheckCrossId(int id, int mode, const char* call, Where where) {
    CheckSynchronises(call, where);
    Require(id >= 0 && id <= 15 && (id < 11 || id > 14), 7, where, [&] {
        return std::string(call) + " id must lie in [0, 15] outside 11..14 (used by SyncAll), got " + std::to_string(id);
    });
    Require(mode >= 0 && mode <= 2, 7, where,
            [&] { return std::string(call) + " mode must be 0, 1 or 2, got " + std::to_string(mode); });
    const KernelType type = Current().machine->type;
    Require(mode != 2 || type == KERNEL_TYPE_MIX_AIC_1_2 || type == KERNEL_TYPE_MIX_AIC_1_1, 7, where, [&] {
        return std::string(call) + " mode 2 must be used in a MIX kernel, where a cube core has vector cores";
    });
}

inline void SynchroniseAll(bool vectorOnly, Where where) {
    CheckSynchronises("SyncAll", where);
    CheckTogether("SyncAll", where);
    Require(!vectorOnly || !Current().cube, 5, where,
            [] { return std::string("SyncAll<true> must be called on vector cores only"); });
    Barrier(PIPE_ALL, where);
    const int id = vectorOnly ? 11 : 12;
    CrossSetFlag(vectorOnly ? 0 : kEveryCore, PIPE_MTE3, id, where);
    CrossWaitFlag(id, PIPE_S, where);
    Barrier(PIPE_ALL, where);
}

// ---- the end of a core ----

inline void CheckExit(Core& core) {
    ExecuteAll(core);
    for (const auto& check : core.exitChecks) check();
    for (int e = 0; e < 64; ++e) {
        for (int id = 0; id < 8; ++id) {
            const Flag& flag = core.flags[e][id];
            Require(!flag.set || flag.fromQueue, 7, flag.where, [&] {
                return "SetFlag<" + EventName(e / 8, e % 8) + "> id " + std::to_string(id) +
                       " must be waited for before the kernel ends";
            });
        }
    }
    if (!core.dirtyLines.empty()) {
        Fail(6, "a scalar write to GM must be followed by DataCacheCleanAndInvalid, got a line left in the cache",
             core.dirtyLines.begin()->second.where);
    }
}

}  // namespace emulation
