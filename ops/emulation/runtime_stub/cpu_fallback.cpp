// aten on the stub's `npu` device: every operator that torch_npu would hand to CANN runs on the CPU instead.
//
// For tests alone. Device memory is host memory here, so an operator gets CPU tensors over the same bytes, and what it
// writes is where the device tensor looks for it. Allocation and views stay torch_npu's own.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

namespace {

at::Tensor OnCpu(const at::Tensor& tensor)
{
    if (!tensor.defined() || !tensor.is_privateuseone()) return tensor;
    auto view = at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
    if (tensor.is_conj()) view._set_conj(true);
    if (tensor.is_neg()) view._set_neg(true);
    return view;
}

at::Tensor OnDevice(const at::Tensor& tensor)
{
    if (!tensor.defined()) return tensor;
    auto result = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kPrivateUse1));
    OnCpu(result).copy_(tensor);
    return result;
}

template <typename Change>
c10::IValue Changed(const c10::IValue& value, const Change& change)
{
    if (value.isTensor()) return change(value.toTensor());
    if (value.isTensorList()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(change(tensor));
        return list;
    }
    if (value.isOptionalTensorList()) {
        c10::List<std::optional<at::Tensor>> list;
        for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
            list.push_back(tensor ? std::optional<at::Tensor>(change(*tensor)) : std::nullopt);
        return list;
    }
    if (value.isDevice() && value.toDevice().is_privateuseone()) return c10::Device(at::kCPU);
    return value;
}

/// A result that is an argument written to: the operator's own tensor, grown where the operator has grown it.
void WriteBack(const at::Tensor& device, const at::Tensor& host)
{
    if (!device.defined() || !device.is_privateuseone() || device.data_ptr() == host.data_ptr()) return;
    device.resize_(host.sizes());
    OnCpu(device).copy_(host);
}

void RunOnCpu(const c10::OperatorHandle& op, torch::jit::Stack* stack)
{
    const auto& schema = op.schema();
    const size_t count = schema.arguments().size(), begin = stack->size() - count;
    std::vector<c10::IValue> given(stack->begin() + begin, stack->end());
    bool toHost = false;  // such as tensor.cpu()
    for (size_t i = 0; i < count; ++i) {
        toHost |= given[i].isDevice() && given[i].toDevice().is_cpu();
        (*stack)[begin + i] = Changed(given[i], OnCpu);
    }
    std::vector<c10::IValue> hosted(stack->begin() + begin, stack->end());
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

    for (size_t i = 0; i < count; ++i) {
        const auto* alias = schema.arguments()[i].alias_info();
        if (alias == nullptr || !alias->isWrite()) continue;
        if (given[i].isTensor()) WriteBack(given[i].toTensor(), hosted[i].toTensor());
        if (given[i].isTensorList())
            for (size_t t = 0; t < given[i].toTensorVector().size(); ++t)
                WriteBack(given[i].toTensorVector()[t], hosted[i].toTensorVector()[t]);
    }
    const size_t results = schema.returns().size(), first = stack->size() - results;
    for (size_t r = 0; r < results; ++r) {
        const auto* alias = schema.returns()[r].alias_info();
        c10::IValue& result = (*stack)[first + r];
        if (alias == nullptr) {
            if (!toHost) result = Changed(result, OnDevice);
            continue;
        }
        for (size_t i = 0; i < count; ++i) {  // `Tensor(a!)` is the argument of that name
            const auto* other = schema.arguments()[i].alias_info();
            if (other != nullptr && *other == *alias) result = given[i];
        }
    }
}

/// Zero-copy views, metadata and allocation must stay torch_npu's; a view is an alias that is not written to.
bool StaysWithTorchNpu(const c10::FunctionSchema& schema)
{
    static const std::set<std::string> own = {
        "aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided", "aten::resize_",
        "aten::resize_as_", "aten::set_", "aten::is_pinned", "aten::_pin_memory", "aten::record_stream", "aten::is_set_to",
        "aten::_fused_sdp_choice", "aten::_copy_from", "aten::_has_compatible_shallow_copy_type", "aten::_resize_output_",
    };
    if (own.count(schema.name())) return true;
    for (const auto& result : schema.returns())
        if (result.alias_info() != nullptr && !result.alias_info()->isWrite()) return true;
    return false;
}

/// The math path of scaled_dot_product_attention: its fused kernels have another operator per device.
int64_t FusedSdpChoice(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
                       std::optional<double>, bool)
{
    return 0;
}

at::Tensor CopyFrom(const at::Tensor& source, const at::Tensor& destination, bool)
{
    OnCpu(destination).copy_(OnCpu(source));
    return destination;
}

/// torch_npu's kernels, those under its autograd key too: a device of the tests has no gradients.
std::vector<torch::Library> Override()
{
    auto& dispatcher = c10::Dispatcher::singleton();
    std::vector<torch::Library> libraries;
    for (auto key : {c10::DispatchKey::PrivateUse1, c10::DispatchKey::AutogradPrivateUse1}) {
        auto& library = libraries.emplace_back(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
        for (const auto& name : dispatcher.getAllOpNames()) {
            auto op = dispatcher.findSchema(name);
            if (name.getNamespace() != std::optional<c10::string_view>("aten") || !op) continue;
            if (!op->hasKernelForDispatchKey(key) || StaysWithTorchNpu(op->schema())) continue;
            std::string full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
            library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&RunOnCpu>());
        }
    }
    libraries.front().impl("_fused_sdp_choice", FusedSdpChoice);
    libraries.front().impl("_copy_from", CopyFrom);
    return libraries;
}

const std::vector<torch::Library> overrides = Override();

}  // namespace
