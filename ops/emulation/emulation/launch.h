// Host side: runs a kernel on the emulated cores.
#pragma once

#include <thread>
#include <type_traits>

#include "../kernel_operator.h"

namespace emulation {

struct LaunchOptions {
    const char* kernel = "kernel";      // named in faults
    uint32_t blocks = 1;
    KernelType type = KERNEL_TYPE_MIX_AIC_1_2;
    uint32_t cardCores = 20;            // AI cores of the card, each with two vector cores: blocks may be more
    bool allUb = false;                 // built with --cce-disable-asc-reserved-ubuf: AscendC's 8 KB of UB are the kernel's
    std::vector<std::string>* warnings = nullptr;  // what the hardware takes and should not be asked for
    bool entry = false;                 // an entry of the library: must have attributes, which others may have
    uint64_t seed = 0;                  // 0: program order; else a random order of cores and, within flags and barriers, of pipes
    Trace* trace = nullptr;
    bool hazards = true;                // false only for long performance traces of a kernel whose tests run with it on
};

enum class GmUse : uint8_t { Read, Write, ReadWrite, Workspace };

struct GmArgument {
    void* data;
    uint64_t bytes;
    std::string name;
    GmUse use;
};

// A GM argument. The kernel sees a copy between red zones; Write and ReadWrite are copied back, Write and Workspace start as
// poison.
inline GmArgument Gm(const void* data, uint64_t bytes, std::string name, GmUse use) {
    return {const_cast<void*>(data), bytes, std::move(name), use};
}

constexpr uint64_t kRedZone = 4096;
constexpr uint8_t kRed = 0xa5;

struct Region {                         // owns the bytes of a GM argument
    GmArgument argument;
    std::vector<uint8_t> storage, flags;
    Memory* memory = nullptr;
};

inline uint8_t* AddRegion(Machine& machine, std::deque<Region>& owned, const GmArgument& argument) {
    if (argument.data == nullptr && argument.use != GmUse::Workspace) return nullptr;
    owned.emplace_back();
    Region& region = owned.back();
    region.argument = argument;
    region.storage.assign(argument.bytes + 2 * kRedZone + 512, kRed);
    auto base = (reinterpret_cast<uintptr_t>(region.storage.data()) + kRedZone + 511) / 512 * 512;
    machine.regions.emplace_back();
    Memory& memory = machine.regions.back();
    region.memory = &memory;
    memory.name = argument.name;
    memory.bytes = reinterpret_cast<uint8_t*>(base);
    memory.size = argument.bytes;
    if (argument.use == GmUse::Read || argument.use == GmUse::ReadWrite) {
        if (argument.bytes) std::memcpy(memory.bytes, argument.data, argument.bytes);
        memory.readOnly = argument.use == GmUse::Read;
    } else {
        std::memset(memory.bytes, kPoison, argument.bytes);
        region.flags.assign(argument.bytes, 0);
        memory.written = region.flags.data();
        memory.workspace = argument.use == GmUse::Workspace;
        if (memory.workspace && machine.trace) machine.trace->workspace += argument.bytes;
    }
    return memory.bytes;
}

inline void CheckRegion(const Machine& machine, const Region& region) {
    const auto fail = [&](const std::string& text) {
        throw Fault(
            4, FaultText(machine.kernel, 4, "GM " + region.argument.name + " " + text, Where("end of kernel", 0), "unknown"));
    };
    const uint8_t *begin = region.memory->bytes, *end = begin + region.memory->size;
    const uint8_t *first = region.storage.data(), *last = first + region.storage.size();
    for (const uint8_t* p = first; p < begin; ++p) {
        if (*p != kRed) fail("must not be written " + std::to_string(begin - p) + " bytes before its start");
    }
    for (const uint8_t* p = end; p < last; ++p) {
        if (*p != kRed) fail("must not be written " + std::to_string(p - end) + " bytes past its end");
    }
    if (region.argument.use == GmUse::Read && region.argument.bytes &&
        std::memcmp(begin, region.argument.data, region.argument.bytes) != 0) {
        fail("must only be read, got changed bytes");
    }
}

inline void AddCores(Machine& machine) {
    const KernelType type = machine.type;
    const bool cube = type != KERNEL_TYPE_AIV_ONLY && type != KERNEL_TYPE_MIX_AIV_1_0;
    const bool onlyCube = type == KERNEL_TYPE_AIC_ONLY || type == KERNEL_TYPE_MIX_AIC_1_0;
    const uint32_t vectors = type == KERNEL_TYPE_MIX_AIC_1_2 ? 2 : onlyCube ? 0 : 1;
    for (uint32_t block = 0; block < machine.blocks; ++block) {
        for (uint32_t i = cube ? 0 : 1; i <= vectors; ++i) {
            machine.cores.emplace_back();
            Core& core = machine.cores.back();
            core.machine = &machine;
            core.index = static_cast<uint32_t>(machine.cores.size() - 1);
            core.block = block;
            core.cube = i == 0;
            core.sub = i == 0 ? 0 : i - 1;
            core.name = core.cube ? "AIC " + std::to_string(block)
                                  : "AIV " + std::to_string(block) + (vectors == 2 ? "." + std::to_string(core.sub) : "");
            core.deferring = machine.seed != 0;
            core.random.seed(machine.seed * 1000003 + core.index);
            for (int s = 0; s < kSpaces - 1; ++s) {
                const auto space = static_cast<Space>(s);
                if ((space == Space::UB) == core.cube) continue;
                Memory& memory = core.memories[s];
                memory.space = space;
                memory.size = kLimits[s].bytes;
                memory.bytes = static_cast<uint8_t*>(std::aligned_alloc(1024, memory.size));
                memory.written = static_cast<uint8_t*>(std::calloc(memory.size, 1));
            }
            if (machine.trace) machine.trace->cores.push_back({core.name, core.cube, core.block, core.sub, {}});
        }
    }
}

template <class Kernel>
void RunCore(Machine& machine, Core& core, Kernel& kernel) {
    currentCore = &core;
    try {
        {
            std::unique_lock<std::mutex> lock(machine.mutex);
            core.wake.wait(lock, [&] { return machine.running == &core || machine.aborted; });
            if (machine.aborted) throw Aborted{};
        }
        kernel();
        CheckExit(core);
        std::unique_lock<std::mutex> lock(machine.mutex);
        core.finished = true;
        machine.running = PickNext(machine, &core);
        if (machine.running) {
            machine.running->wake.notify_all();
        } else if (std::any_of(machine.cores.begin(), machine.cores.end(), [](const Core& other) { return !other.finished; })) {
            Abort(machine, DeadLock(machine));
        }
    } catch (const Aborted&) {
    } catch (...) {
        std::unique_lock<std::mutex> lock(machine.mutex);
        Abort(machine, std::current_exception());
    }
    currentCore = nullptr;
}

template <typename Argument>
auto KernelArgument(Machine& machine, std::deque<Region>& owned, const Argument& argument) {
    if constexpr (std::is_same_v<Argument, GmArgument>) return AddRegion(machine, owned, argument);
    else return argument;
}

// The cores that the host counts on are those that the kernel's attributes ask for.
inline void CheckAttributes(const LaunchOptions& options, const Attributes& attributes) {
    const auto fail = [&](const std::string& text) {
        throw Fault(5, FaultText(options.kernel, 5, text, Where("launch", 0), "host"));
    };
#ifndef NPU_SPARSE_TASK_TYPE_MACRO
    if (options.entry && !attributes.known) fail("an entry must say its cores by __mix__(cube, vector), got none");
#endif
    const KernelType asked = attributes.cube == 0     ? KERNEL_TYPE_MIX_AIV_1_0
                             : attributes.vector == 0 ? KERNEL_TYPE_MIX_AIC_1_0
                             : attributes.vector == 1 ? KERNEL_TYPE_MIX_AIC_1_1
                                                      : KERNEL_TYPE_MIX_AIC_1_2;
    if (attributes.known && asked != options.type) {
        fail("the launch must be for the cores of __mix__(" + std::to_string(attributes.cube) + ", " +
             std::to_string(attributes.vector) + "), got " + kTypeNames[options.type]);
    }
}

// Runs `kernel` on options.blocks blocks; throws Fault when it breaks a rule.
template <class Kernel, class... Arguments>
void Launch(const LaunchOptions& options, Kernel kernel, const Arguments&... arguments) {
    if (options.blocks == 0) throw std::invalid_argument("blocks must be positive, got 0");
    Machine machine;
    std::deque<Region> owned;
    machine.kernel = options.kernel;
    machine.type = options.type;
    machine.blocks = options.blocks;
    machine.cardCores = options.cardCores;
    machine.allUb = options.allUb;
    machine.warnings = options.warnings;
    machine.attributes = AttributesOf(kernel);
    CheckAttributes(options, machine.attributes);
    machine.hazards = options.hazards;
    machine.trace = options.trace;
    machine.seed = options.seed;
    machine.random.seed(options.seed);
    if (machine.trace) {
        machine.trace->kernel = machine.kernel;
        machine.trace->workspace = 0;
        machine.trace->cores.clear();
    }
    AddCores(machine);
    // Braces fix the order of evaluation, so regions are registered in the order of the arguments.
    std::tuple<decltype(KernelArgument(machine, owned, arguments))...> values{KernelArgument(machine, owned, arguments)...};
    auto call = [&] { std::apply(kernel, values); };
    std::vector<std::thread> threads;
    for (Core& core : machine.cores) threads.emplace_back([&machine, &core, &call] { RunCore(machine, core, call); });
    {
        std::unique_lock<std::mutex> lock(machine.mutex);
        machine.running = PickNext(machine, nullptr);
        machine.running->wake.notify_all();
    }
    for (std::thread& thread : threads) thread.join();
    for (Core& core : machine.cores) {
        for (Memory& memory : core.memories) {
            std::free(memory.bytes);
            std::free(memory.written);
        }
    }
    if (machine.error) std::rethrow_exception(machine.error);
    for (const Core& core : machine.cores) {
        for (const auto& [key, sets] : core.arrivals) {
            if (sets.empty()) continue;
            throw Fault(7, FaultText(machine.kernel, 7,
                                     "CrossCoreSetFlag id " + std::to_string(key.first) +
                                         " must be waited for before the kernel ends, got " + std::to_string(sets.size()) +
                                         " left on core " + core.name,
                                     sets.front().where, machine.cores[key.second].name));
        }
    }
    for (const Region& region : owned) {
        CheckRegion(machine, region);
        const bool result = region.argument.use == GmUse::Write || region.argument.use == GmUse::ReadWrite;
        if (result && region.argument.bytes) std::memcpy(region.argument.data, region.memory->bytes, region.argument.bytes);
    }
}

}  // namespace emulation
