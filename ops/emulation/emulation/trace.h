// What a launch did: per core, the ordered instructions with their sizes and the edges that order them.
#pragma once

#include <array>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

namespace emulation {

enum class Space : uint8_t { UB, L1, L0A, L0B, L0C, BT, FB, GM };
constexpr int kSpaces = 8;
constexpr const char* kSpaceNames[kSpaces] = {"UB", "L1", "L0A", "L0B", "L0C", "BT", "FB", "GM"};
// In traces a ninth entry says how much of GM is workspace: written moments before by the same cores.
constexpr int kTraceSpaces = kSpaces + 1;
constexpr const char* kPipeNames[8] = {"S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX", "ALL"};

// The sizes a timing model needs; an instruction fills those that apply.
struct Cost {
    uint32_t repeats = 0;               // vector: 256-byte iterations
    uint32_t m = 0, n = 0, k = 0;       // cube and fixpipe, in elements
    uint32_t bursts = 0;                // copies: contiguous pieces; GetValue on GM: 64-byte lines not yet in the data cache
    uint32_t burstBytes = 0;            // bytes of one piece
};

enum class Step : uint8_t { Instruction, Set, Wait, Barrier, CrossSet, CrossWait };
constexpr const char* kStepNames[] = {"instruction", "set", "wait", "barrier", "cross_set", "cross_wait"};

struct Edge {                           // the step that this one waits for
    int32_t core;
    uint32_t index;
};

struct TraceStep {
    Step step = Step::Instruction;
    int pipe = 0;                       // where it is queued; for a Wait the pipe that is held back; 7 = all
    const char* opcode = "";
    const char* file = "";
    int line = 0;
    int id = -1;                        // flag id of Set, Wait, CrossSet, CrossWait
    Cost cost;
    std::array<uint64_t, kTraceSpaces> read{}, written{};  // bytes by memory
    std::vector<Edge> after;            // Wait, CrossWait: the Set steps; order on one pipe is the order of the list
};

struct TraceCore {
    std::string name;                   // "AIC 3", "AIV 3.1"
    bool cube = false;
    uint32_t block = 0, sub = 0;
    std::vector<TraceStep> steps;
};

struct Trace {
    std::string kernel;
    uint64_t workspace = 0;             // bytes of the launch's workspaces
    std::vector<TraceCore> cores;
};

// One JSON object: {"kernel", "workspace", "columns", "spaces", "cores": [{"name", "steps": [[...]]}]}; a step's columns are named once,
// zeros are kept.
inline bool WriteTrace(const Trace& trace, const std::string& path) {
    std::FILE* file = std::fopen(path.c_str(), "w");
    if (file == nullptr) return false;
    std::fprintf(file,
                 "{\"kernel\":\"%s\",\"workspace\":%llu,\"columns\":[\"step\",\"pipe\",\"opcode\",\"line\",\"id\",\"repeats\","
                 "\"m\",\"n\",\"k\",\"bursts\",\"burst_bytes\",\"read\",\"written\",\"after\"],\"spaces\":[",
                 trace.kernel.c_str(), static_cast<unsigned long long>(trace.workspace));
    for (int s = 0; s < kTraceSpaces; ++s) {
        std::fprintf(file, "%s\"%s\"", s ? "," : "", s < kSpaces ? kSpaceNames[s] : "WORKSPACE");
    }
    std::fprintf(file, "],\"cores\":[");
    for (size_t c = 0; c < trace.cores.size(); ++c) {
        const TraceCore& core = trace.cores[c];
        std::fprintf(file, "%s\n{\"name\":\"%s\",\"cube\":%s,\"block\":%u,\"sub\":%u,\"steps\":[", c ? "," : "",
                     core.name.c_str(), core.cube ? "true" : "false", core.block, core.sub);
        for (size_t i = 0; i < core.steps.size(); ++i) {
            const TraceStep& s = core.steps[i];
            std::fprintf(file, "%s\n[\"%s\",\"%s\",\"%s\",%d,%d,%u,%u,%u,%u,%u,%u,[", i ? "," : "",
                         kStepNames[static_cast<int>(s.step)], kPipeNames[s.pipe], s.opcode, s.line, s.id, s.cost.repeats,
                         s.cost.m, s.cost.n, s.cost.k, s.cost.bursts, s.cost.burstBytes);
            for (int k = 0; k < kTraceSpaces; ++k)
                std::fprintf(file, "%s%llu", k ? "," : "", static_cast<unsigned long long>(s.read[k]));
            std::fprintf(file, "],[");
            for (int k = 0; k < kTraceSpaces; ++k)
                std::fprintf(file, "%s%llu", k ? "," : "", static_cast<unsigned long long>(s.written[k]));
            std::fprintf(file, "],[");
            for (size_t k = 0; k < s.after.size(); ++k)
                std::fprintf(file, "%s[%d,%u]", k ? "," : "", s.after[k].core, s.after[k].index);
            std::fprintf(file, "]]");
        }
        std::fprintf(file, "]}");
    }
    std::fprintf(file, "]}\n");
    return std::fclose(file) == 0;
}

}  // namespace emulation
