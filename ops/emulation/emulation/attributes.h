// What a kernel's attributes say: `__mix__(cube, vector)`, the cores of a block, and `__schedmode__(1)`, blocks that start
// together. They are written as for the device; here they put the kernel into a section of its cores' name, and a mark before
// its first instruction, where the launch finds them.
#pragma once

#include <cstdint>

#define __mix__(cube, vector) __attribute__((section("ascendc_mix_" #cube "_" #vector)))
#define __schedmode__(mode) EMULATION_SCHEDULE_##mode
#define EMULATION_SCHEDULE_0
#define EMULATION_SCHEDULE_1 __attribute__((patchable_function_entry(1, 1)))

// The linker's names of where a section begins and ends; null where nothing is in it.
#define EMULATION_SECTION(type, name) \
    extern "C" __attribute__((weak, visibility("hidden"))) const type __start_##name[], __stop_##name[];
EMULATION_SECTION(uintptr_t, __patchable_function_entries)
#define EMULATION_MIXES(each) each(1, 2) each(1, 1) each(1, 0) each(0, 1)
#define EMULATION_MIX(cube, vector) EMULATION_SECTION(char, ascendc_mix_##cube##_##vector)
EMULATION_MIXES(EMULATION_MIX)
#undef EMULATION_MIX

namespace emulation {

struct Attributes {
    bool known = false;                 // the kernel has __mix__
    uint32_t cube = 0, vector = 0;
    bool together = false;              // __schedmode__(1)
};

template <class... Parameters>
Attributes AttributesOf(void (*kernel)(Parameters...)) {
    const auto address = reinterpret_cast<uintptr_t>(kernel);
    const auto within = [&](const char* begin, const char* end) {
        return address >= reinterpret_cast<uintptr_t>(begin) && address < reinterpret_cast<uintptr_t>(end);
    };
    Attributes found;
#define EMULATION_MIX(c, v)                                                    \
    if (within(__start_ascendc_mix_##c##_##v, __stop_ascendc_mix_##c##_##v)) { \
        found.known = true;                                                    \
        found.cube = c;                                                        \
        found.vector = v;                                                      \
    }
    EMULATION_MIXES(EMULATION_MIX)
#undef EMULATION_MIX
    constexpr uintptr_t kMark = 8;      // bytes of an instruction that does nothing, at most
    for (const uintptr_t* mark = __start___patchable_function_entries; mark != __stop___patchable_function_entries; ++mark) {
        found.together |= *mark < address && address - *mark <= kMark;
    }
    return found;
}

// Lambdas and function objects, of which nothing is known.
template <class Kernel>
Attributes AttributesOf(const Kernel&) {
    return {};
}

}  // namespace emulation
