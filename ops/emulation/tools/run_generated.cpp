// Runs kernels that npu_sparse.schedule.ascend.kernel generated on emulated vector cores. npu_sparse/schedule/ascend/emulate.py
// compiles it with CASES, a header that includes the kernels and defines EACH_CASE(X): X(number, function, arrays, scalars) for
// each of them.
//
//   run_generated CASE FOLDER blocks seed trace USE:FLOATS ... SCALAR ...
//
// Array n is FOLDER/n.bin, fp32; USE is r, w, b (both) or k (workspace). What is written goes back there. With trace 1 hazard
// checks are off and the instruction stream goes to FOLDER/trace.json.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "emulation/launch.h"

#include CASES

using emulation::GmUse;

namespace {

struct Array {
    GmUse use;
    std::vector<float> values;
    std::string name;
};

void Transfer(const std::string& folder, Array& array, const char* mode)
{
    std::FILE* file = std::fopen((folder + "/" + array.name + ".bin").c_str(), mode);
    if (file == nullptr) throw std::runtime_error("cannot open " + array.name + ".bin");
    const size_t size = array.values.size();
    float* values = array.values.data();
    const size_t moved = mode[0] == 'r' ? std::fread(values, 4, size, file) : std::fwrite(values, 4, size, file);
    std::fclose(file);
    if (moved != size) throw std::runtime_error("cannot transfer all of " + array.name + ".bin");
}

template <typename Kernel, size_t... A, size_t... S>
void Run(const emulation::LaunchOptions& options, Kernel* kernel, const std::vector<Array>& arrays,
         const std::vector<float>& scalars, std::index_sequence<A...>, std::index_sequence<S...>)
{
    emulation::Launch(options, kernel,
                      emulation::Gm(arrays[A].values.data(), arrays[A].values.size() * 4, arrays[A].name, arrays[A].use)...,
                      scalars[S]...);
}

}  // namespace

int main(int argc, char** argv) try {
    const std::string folder = argv[2];
    const bool traced = std::atoi(argv[5]) != 0;
    emulation::Trace trace;
    emulation::LaunchOptions options;
    options.blocks = std::atoi(argv[3]);
    options.seed = std::atoi(argv[4]);
    options.type = KERNEL_TYPE_MIX_AIV_1_0;
    options.hazards = !traced;
    options.trace = traced ? &trace : nullptr;
    std::vector<Array> arrays;
    std::vector<float> scalars;
    for (int n = 6; n < argc; ++n) {
        if (argv[n][1] != ':') {
            scalars.push_back(std::strtof(argv[n], nullptr));
            continue;
        }
        const char kind = argv[n][0];
        const GmUse use = kind == 'r'   ? GmUse::Read
                          : kind == 'w' ? GmUse::Write
                          : kind == 'b' ? GmUse::ReadWrite
                                        : GmUse::Workspace;
        arrays.push_back({use, std::vector<float>(std::atoll(argv[n] + 2)), std::to_string(n - 6)});
        if (use == GmUse::Read || use == GmUse::ReadWrite) Transfer(folder, arrays.back(), "rb");
    }
#define RUN(number, kernel, count, others) \
    case number: \
        Run(options, kernel, arrays, scalars, std::make_index_sequence<count>(), std::make_index_sequence<others>()); \
        break;
    switch (std::atoi(argv[1])) {
        EACH_CASE(RUN)
        default: throw std::runtime_error("no such case");
    }
    for (Array& array : arrays) {
        if (array.use == GmUse::Write || array.use == GmUse::ReadWrite) Transfer(folder, array, "wb");
    }
    if (traced && !emulation::WriteTrace(trace, folder + "/trace.json")) throw std::runtime_error("cannot write trace.json");
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
