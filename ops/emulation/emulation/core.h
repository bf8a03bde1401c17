// The machine: cores as threads, memories that know which bytes are owned, written and by whom, and the checks that every
// instruction passes.
//
// Values: each core executes its instructions in program order (or, with a seed, in any order its flags and barriers allow); one
// core runs at a time and hands over at cross-core waits, so a launch is deterministic for a seed, and a dead-lock is seen.
//
// Order: every pipe has a vector clock. Its own components are the pipes of the same core; those of the other cores change only
// at cross-core flags and are shared between the clocks. An instruction is complete for a pipe when the pipe's clock has reached
// it; touching the bytes of one that is not complete is a hazard.
#pragma once

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "shadow.h"
#include "trace.h"

enum pipe_t { PIPE_S = 0, PIPE_V, PIPE_M, PIPE_MTE1, PIPE_MTE2, PIPE_MTE3, PIPE_FIX, PIPE_ALL };

namespace emulation {

// A trailing parameter `Where where = {}` is the line of the call in the kernel.
struct Where {
    const char* file;
    int line;
    constexpr Where(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
};

// A broken rule; `rule` is its number in README.md.
struct Fault : std::runtime_error {
    int rule;
    Fault(int rule, const std::string& text) : std::runtime_error(text), rule(rule) {}
};

constexpr int kPipes = 7;
constexpr int kDataCache = 7;           // the eighth clock component: scalar writes to GM that no cache clean has pushed out
constexpr uint8_t kPoison = 0xff;       // a NaN in fp16, bf16 and fp32, -1 in integers

struct Limits {
    uint64_t bytes, usable, alignment;
};
// dav-2201. The last 256 bytes of UB and L1 are the system's, and 8 KB of UB before them are AscendC's own (kOwnUbBytes).
constexpr Limits kLimits[kSpaces] = {
    {196608, 196608 - 256, 32}, {524288, 524288 - 256, 32}, {65536, 65536, 512}, {65536, 65536, 512},
    {131072, 131072, 64},       {1024, 1024, 64},           {7168, 7168, 128},   {0, 0, 1}};
constexpr uint64_t kOwnUbBytes = 8192;   // scratch of Select modes 1 and 2 and others; a kernel built without has it for itself
constexpr size_t kMaxBuffers = 64;

struct Memory {
    Space space = Space::GM;
    std::string name;
    uint8_t* bytes = nullptr;
    uint64_t size = 0;
    uint8_t* written = nullptr;         // one flag per byte
    bool workspace = false;             // a GM argument that only passes data between cores
    bool readOnly = false;              // an input: reads alone cannot conflict, so they are not tracked
    Shadow shadow;
};

// A piece of a memory handed out by TPipe.
struct Buffer {
    Memory* memory = nullptr;
    uint64_t begin = 0, end = 0;
    bool live = true;                   // false while a queue's buffer is free
    uint32_t generation = 0;            // counts the allocations from the queue, so that a stale tensor is recognised
};

// The bytes an instruction touches: `repeats` groups of `blocks` pieces of `bytes`.
struct Span {
    Memory* memory = nullptr;
    const Buffer* buffer = nullptr;
    uint32_t generation = 0;
    uint64_t lower = 0, upper = 0;      // what the tensor may touch
    uint64_t begin = 0, bytes = 0;
    uint32_t blocks = 1;
    uint64_t blockStride = 0;
    uint32_t repeats = 1;
    uint64_t repeatStride = 0;
    bool mayBeUnwritten = false;        // the instruction carries the written flags along instead (LoadData of ragged fractals)
};

struct Clock {
    std::array<uint32_t, 8> own{};
    std::shared_ptr<const std::vector<uint32_t>> others;  // every component of every core, from cross-core flags
};

inline void Join(Clock& into, const Clock& from) {
    for (int i = 0; i < 8; ++i) into.own[i] = std::max(into.own[i], from.own[i]);
    if (!from.others || from.others == into.others) return;
    if (!into.others) {
        into.others = from.others;
        return;
    }
    const std::vector<uint32_t>&a = *into.others, &b = *from.others;
    bool keep = true, adopt = true;
    for (size_t i = 0; i < a.size(); ++i) {
        keep &= a[i] >= b[i];
        adopt &= b[i] >= a[i];
    }
    if (keep) return;
    if (adopt) {
        into.others = from.others;
        return;
    }
    auto both = std::make_shared<std::vector<uint32_t>>(a);
    for (size_t i = 0; i < b.size(); ++i) (*both)[i] = std::max(a[i], b[i]);
    into.others = std::move(both);
}

struct Flag {
    bool set = false;
    bool fromQueue = false;
    Clock clock;
    uint32_t step = 0;                  // of the Set in the trace
    Where where;
};

struct CrossSet {
    Clock clock;
    int mode;
    Edge edge;
    Where where;
};

struct Pending {                        // an instruction that has been issued and not yet executed (seeded runs)
    std::function<void()> body;
    std::array<uint32_t, 8> needs;
};

struct DirtyLine {
    Where where;
    uint64_t stamp;                     // the machine's count of writes when the line was first written
};

struct Origin {
    const char* opcode;
    Where where;
};

struct Machine;

struct Core {
    Machine* machine = nullptr;
    uint32_t index = 0, block = 0, sub = 0;
    bool cube = false;
    std::string name;
    std::array<Memory, kSpaces> memories;            // the GM entry is unused: GM regions belong to the machine
    std::array<uint64_t, kSpaces> top{};             // the bump allocator of TPipe
    std::deque<Buffer> buffers;
    size_t bufferCount = 0;
    void* pipeObject = nullptr;                      // the TPipe in use
    std::vector<std::function<void()>> exitChecks;   // of the queues

    std::array<Clock, kPipes> clocks;
    std::array<uint32_t, 8> issued{};
    std::array<uint32_t, kPipes> scalarSeen{};       // version of the scalar clock already joined
    uint32_t scalarVersion = 1;
    uint32_t cacheCleaned = 0;
    std::map<std::pair<Memory*, uint64_t>, DirtyLine>
        dirtyLines;  // 64-byte lines of GM written by the scalar pipe and not cleaned
    std::map<std::pair<Memory*, uint64_t>, uint64_t> cachedLines;  // lines it has read, and the machine's stamp then
    std::array<std::vector<Origin>, 8> history;

    std::array<std::array<Flag, 8>, 64> flags;       // [source * 8 + destination][id]
    std::array<uint8_t, 64> eventIds{}, queueIds{},
        fetchedIds{};  // bit masks: taken from TPipe's pool; those of queues; shown to the kernel
    std::map<std::pair<int, uint32_t>, std::deque<CrossSet>> arrivals;  // (flag id, source core) -> sets not yet waited for

    std::array<std::deque<Pending>, kPipes> pending;
    std::array<uint32_t, 8> executed{};
    bool deferring = false;
    std::mt19937_64 random;

    bool finished = false;
    std::function<bool()> blockedOn;                 // empty: can run
    std::string blockedText;
    Where blockedAt;
    std::condition_variable wake;
};

inline thread_local Core* currentCore = nullptr;

[[noreturn]] void Fail(int rule, const std::string& message, Where where);

inline Core& Current() {
    if (currentCore == nullptr) throw std::logic_error("AscendC calls must be made inside emulation::Launch");
    return *currentCore;
}

inline void Require(bool holds, int rule, const std::string& message, Where where) {
    if (!holds) Fail(rule, message, where);
}
// Without building the message when the rule holds: Require(ok, 5, where, [&] { return "m must be ..., got " + ...; }).
template <class Message>
void Require(bool holds, int rule, Where where, Message&& message) {
    if (!holds) Fail(rule, message(), where);
}

void Admit(Core& core, pipe_t pipe, const char* opcode, std::initializer_list<Span> reads, std::initializer_list<Span> writes,
           const Cost& cost, Where where);
void Execute(Core& core, int pipe, uint32_t target);  // runs what is pending on the pipe up to its target-th instruction
void ExecuteAll(Core& core);

// Every instruction: checks the spans, records them, and runs `body` (now, or later where the seed says so). `body` captures by
// value all it needs, masks and registers included.
template <class Body>
void Issue(pipe_t pipe, const char* opcode, std::initializer_list<Span> reads, std::initializer_list<Span> writes,
           const Cost& cost, Where where, Body&& body) {
    Core& core = Current();
    Admit(core, pipe, opcode, reads, writes, cost, where);
    if (core.deferring && pipe != PIPE_S) {
        core.pending[pipe].push_back({std::forward<Body>(body), core.clocks[pipe].own});
    } else {
        body();
        core.executed[pipe] = core.issued[pipe];
    }
}

// For an instruction whose result the scalar unit reads back implicitly (a special register): completes the pipe for the caller.
void Finish(pipe_t pipe, Where where);
// Select modes 1 and 2 call this: they are gone where the kernel has AscendC's share of UB for itself.
void NeedOwnUb(Where where);

}  // namespace emulation

#include "machine.h"
