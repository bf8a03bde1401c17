// A kernel on the host emulation. Compiled once per operator: NPU_SPARSE_OPERATOR is its name, and its header, which is pure
// AscendC, is included in front of this file.

#include "emulation/launch.h"

#include "launch.h"

#define JOINED(a, b) a##b
#define NAMED(prefix, name) JOINED(prefix, name)
#define TEXT(name) #name
#define TEXT_OF(name) TEXT(name)

namespace npu_sparse_ascendc {
namespace {

template <typename... Parameters, size_t... I>
void Run(const emulation::LaunchOptions& options, void (*kernel)(Parameters...), const std::vector<GmArgument>& arguments,
         std::index_sequence<I...>)
{
    const auto gm = [&](const GmArgument& argument) {
        const auto use = std::string(argument.name) == "workspace" ? emulation::GmUse::Workspace
                         : argument.written                        ? emulation::GmUse::Write
                                                                   : emulation::GmUse::Read;
        return emulation::Gm(argument.data, argument.bytes, argument.name, use);
    };
    emulation::Launch(options, kernel, gm(arguments[I])...);
}

template <typename... Parameters>
void Run(const emulation::LaunchOptions& options, void (*kernel)(Parameters...), const std::vector<GmArgument>& arguments)
{
    if (arguments.size() != sizeof...(Parameters)) {
        throw std::logic_error(std::string(options.kernel) + " must be launched with as many arguments as it has parameters");
    }
    Run(options, kernel, arguments, std::index_sequence_for<Parameters...>{});
}

}  // namespace

void NAMED(launch_, NPU_SPARSE_OPERATOR)(uint32_t blocks, KernelUnits units, void*, const std::vector<GmArgument>& arguments)
{
    emulation::LaunchOptions options;
    options.kernel = TEXT_OF(NPU_SPARSE_OPERATOR);
    options.blocks = blocks;
    options.type = units == KernelUnits::VECTOR ? KERNEL_TYPE_MIX_AIV_1_0 : KERNEL_TYPE_MIX_AIC_1_2;
    Run(options, &NAMED(npu_sparse_, NPU_SPARSE_OPERATOR), arguments);
}

}  // namespace npu_sparse_ascendc
