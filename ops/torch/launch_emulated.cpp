// A kernel on the host emulation. Compiled once per operator: NPU_SPARSE_OPERATOR is its name, and its header, which is pure
// AscendC, is included in front of this file.

#include "emulation/launch.h"

#include "launch.h"

#define JOINED(a, b) a##b
#define NAMED(prefix, name) JOINED(prefix, name)
#define TEXT(name) #name
#define TEXT_OF(name) TEXT(name)

// Of the runtime stub of the tests, where it is loaded: keeps the books of launches.
extern "C" __attribute__((weak)) void npu_sparse_launched(void* stream, uint32_t blocks, const void* workspace);

namespace npu_sparse_ascendc {
namespace {

template <typename... Parameters>
using Last = std::tuple_element_t<sizeof...(Parameters) - 1, std::tuple<Parameters...>>;

template <typename... Parameters>
Last<Parameters...> TilingOf(void (*)(Parameters...));
using Tiling = decltype(TilingOf(&NAMED(npu_sparse_, NPU_SPARSE_OPERATOR)));

template <typename Kernel, size_t... I>
void Run(const emulation::LaunchOptions& options, Kernel* kernel, const std::vector<GmArgument>& arguments, const Tiling& tiling,
         std::index_sequence<I...>)
{
    const auto gm = [&](const GmArgument& argument) {
        const auto use = std::string(argument.name) == "workspace" ? emulation::GmUse::Workspace
                         : argument.written                        ? emulation::GmUse::Write
                                                                   : emulation::GmUse::Read;
        return emulation::Gm(argument.data, argument.bytes, argument.name, use);
    };
    emulation::Launch(options, kernel, gm(arguments[I])..., tiling);
}

template <typename... Parameters>
void Run(const emulation::LaunchOptions& options, void (*kernel)(Parameters...), const std::vector<GmArgument>& arguments,
         const Tiling& tiling)
{
    if (arguments.size() + 1 != sizeof...(Parameters)) {
        throw std::logic_error(std::string(options.kernel) + " must be launched with as many arguments as it has parameters");
    }
    Run(options, kernel, arguments, tiling, std::make_index_sequence<sizeof...(Parameters) - 1>{});
}

}  // namespace

void NAMED(launch_, NPU_SPARSE_OPERATOR)(uint32_t blocks, KernelUnits units, void* stream,
                                         const std::vector<GmArgument>& arguments, const Tiling& tiling)
{
    emulation::LaunchOptions options;
    options.kernel = TEXT_OF(NPU_SPARSE_OPERATOR);
    options.blocks = blocks;
    options.entry = true;
    options.type = units == KernelUnits::VECTOR ? KERNEL_TYPE_MIX_AIV_1_0 : KERNEL_TYPE_MIX_AIC_1_2;
    if (npu_sparse_launched != nullptr) npu_sparse_launched(stream, blocks, arguments.back().data);
    Run(options, &NAMED(npu_sparse_, NPU_SPARSE_OPERATOR), arguments, tiling);
}

}  // namespace npu_sparse_ascendc
