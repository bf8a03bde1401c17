// The operators as torch calls them: inputs are checked and made contiguous, outputs and workspace allocated, the tiling
// made, the kernel launched. One source for both libraries; NPU_SPARSE_NAMESPACE tells them apart.

#include <ATen/ops/arange.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "attention_mass/tiling.h"
#include "index_partition/tiling.h"
#include "index_scores/tiling.h"
#include "launch.h"
#include "select_by_index/tiling.h"
#include "select_tokens/tiling.h"
#include "sparse_attention/tiling.h"

#ifdef NPU_SPARSE_ON_CARD
#include "torch_npu/csrc/core/npu/NPUStream.h"
#else
#include <dlfcn.h>
#endif

namespace npu_sparse_ascendc {

#ifndef NPU_SPARSE_ON_CARD
uint32_t StreamCores(void*) { return Hardware{}.cores; }  // the emulation is of a 910B3
std::string SocName() { return "Ascend910B3"; }
#endif

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

#ifdef NPU_SPARSE_ON_CARD
bool IsServed(const c10::Device& device) { return device.is_privateuseone(); }
// The current stream, after what torch_npu's own queue on the host still holds for it has been handed to the runtime. That waits for
// a thread of this process, never for the card.
void* CurrentStream() { return c10_npu::getCurrentNPUStream().stream(true); }
#else
// Under the runtime stub of the tests the memory of an `npu` tensor is host memory too.
bool HasRuntimeStub()
{
    void* runtime = dlopen("libascendcl.so", RTLD_LAZY | RTLD_NOLOAD);
    return runtime != nullptr && dlsym(runtime, "npu_sparse_runtime_stub") != nullptr;
}

bool IsServed(const c10::Device& device) { return device.is_cpu() || (device.is_privateuseone() && HasRuntimeStub()); }
void* CurrentStream() { return nullptr; }
#endif

Hardware DeviceHardware()
{
    Hardware hardware;
    hardware.cores = StreamCores(CurrentStream());
    return hardware;
}

uint32_t U32(const char* name, int64_t value)
{
    TORCH_CHECK_VALUE(value >= 0 && value <= UINT32_MAX, name, " must be from 0 to ", UINT32_MAX, ", got ", value);
    return static_cast<uint32_t>(value);
}

uint32_t Size(const char* name, const Tensor& tensor, int64_t dim) { return U32(name, tensor.size(dim)); }

DataType Type(const char* name, const Tensor& tensor)
{
    const auto type = tensor.scalar_type();
    TORCH_CHECK_TYPE(type == at::kHalf || type == at::kBFloat16, name,
                     " must be float16 or bfloat16 for the AscendC kernels, got ", c10::toString(type), " (nearest: bfloat16)");
    return type == at::kHalf ? FLOAT16 : BFLOAT16;
}

bool IsMean(c10::string_view reduce)
{
    TORCH_CHECK_VALUE(reduce == "max" || reduce == "mean", "reduce must be one of max, mean, got '", reduce, "'");
    return reduce == "mean";
}

// What a kernel takes for granted of an input beside the first one.
void CheckInput(const char* name, const Tensor& tensor, at::IntArrayRef shape, at::ScalarType type, const Tensor& first)
{
    TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
    TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " must be ", c10::toString(type), ", got ",
                     c10::toString(tensor.scalar_type()));
    TORCH_CHECK_VALUE(tensor.device() == first.device(), name, " must be on ", first.device(), ", got ", tensor.device());
}

void CheckInput(const char* name, const OptionalTensor& tensor, at::IntArrayRef shape, at::ScalarType type, const Tensor& first)
{
    if (tensor) CheckInput(name, *tensor, shape, type, first);
}

void CheckDims(const char* name, const Tensor& tensor, int64_t dims)
{
    TORCH_CHECK_VALUE(tensor.dim() == dims, name, " must have ", dims, " dimensions, got ", tensor.dim());
}

void CheckServed(const char* name, const Tensor& tensor)
{
    TORCH_CHECK_VALUE(IsServed(tensor.device()), name, " must be on a device that this library serves, got ", tensor.device());
}

void Accept(const std::string& refusal) { TORCH_CHECK_VALUE(refusal.empty(), refusal); }

GmArgument In(const char* name, const Tensor& tensor)
{
    return {name, tensor.data_ptr(), static_cast<uint64_t>(tensor.nbytes()), false};
}

GmArgument In(const char* name, const OptionalTensor& tensor)
{
    return tensor ? In(name, *tensor) : GmArgument{name, nullptr, 0, false};
}

GmArgument Out(const char* name, const Tensor& tensor)
{
    return {name, tensor.data_ptr(), static_cast<uint64_t>(tensor.nbytes()), true};
}

OptionalTensor Contiguous(const OptionalTensor& tensor)
{
    return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

// Workspace and tiling follow a kernel's own arguments.
//
// The workspace, and contiguous copies of the inputs, are given back when the call returns, while the kernel may not even have
// begun. Their blocks belong to the current stream: torch_npu's allocator hands them to work of the same stream alone, which the
// card runs after this kernel; a kernel of another stream gets other blocks. So streams need not wait for each other here. An
// input that another stream has made is the caller's to order, as for every operator of torch.
template <typename Tiling>
void Run(Launcher<Tiling> launch, KernelUnits units, uint32_t blocks, uint64_t workspaceBytes, const Tiling& tiling,
         std::vector<GmArgument> arguments, const Tensor& like)
{
    const Tensor workspace = like.new_empty({static_cast<int64_t>(workspaceBytes)}, like.options().dtype(at::kByte));
    arguments.push_back(Out("workspace", workspace));
    launch(blocks, units, CurrentStream(), arguments, tiling);
}

ScoreProblem ScoreProblemOf(const Tensor& qi, const Tensor& ki, const OptionalTensor& w, int64_t block, c10::string_view reduce,
                            const OptionalTensor& valid, const OptionalTensor& partition)
{
    CheckServed("qi", qi);
    CheckDims("qi", qi, 4);
    CheckDims("ki", ki, 3);
    CheckInput("ki", ki, {qi.size(0), ki.size(1), qi.size(3)}, qi.scalar_type(), qi);
    CheckInput("w", w, {qi.size(0), qi.size(2), qi.size(1)}, qi.scalar_type(), qi);
    CheckInput("valid", valid, {qi.size(0), ki.size(1)}, at::kBool, qi);
    CheckInput("partition", partition, {qi.size(0), qi.size(2)}, at::kFloat, qi);
    const bool normal = reduce == "softmax_max";
    TORCH_CHECK_VALUE(normal || reduce == "max" || reduce == "mean", "reduce must be one of max, mean, softmax_max, got '", reduce, "'");
    TORCH_CHECK_VALUE(normal == partition.has_value(), "partition must be given for softmax_max and for nothing else, got ",
                      partition ? "a tensor" : "None", " for ", reduce);
    ScoreProblem problem;
    problem.batch = Size("B", qi, 0);
    problem.heads = Size("Hi", qi, 1);
    problem.queries = Size("Tq", qi, 2);
    problem.keys = Size("Tk", ki, 1);
    problem.dim = Size("d_idx", qi, 3);
    problem.block = U32("block", block);
    problem.mean = reduce == "mean";
    problem.hasWeights = w.has_value();
    problem.hasValid = valid.has_value();
    problem.hasPartition = normal;
    problem.dtype = Type("qi", qi);
    return problem;
}

Tensor IndexScores(const Tensor& qi, const Tensor& ki, const OptionalTensor& w, int64_t block, c10::string_view reduce,
                   const OptionalTensor& valid, const OptionalTensor& partition)
{
    const c10::DeviceGuard guard(qi.device());
    const IndexScoresProblem problem = ScoreProblemOf(qi, ki, w, block, reduce, valid, partition);
    Accept(CheckIndexScores(problem));
    const IndexScoresTiling tiling = MakeIndexScoresTiling(problem, DeviceHardware());
    const Tensor queries = qi.contiguous(), keys = ki.contiguous();
    const OptionalTensor weights = Contiguous(w), seen = Contiguous(valid), own = Contiguous(partition);
    const Tensor scores =
        qi.new_empty({qi.size(0), CeilDiv(problem.queries, problem.block), ki.size(1)}, qi.options().dtype(at::kFloat));
    Run(launch_index_scores, KernelUnits::MIXED, IndexScoresBlocks(tiling), IndexScoresWorkspace(tiling), tiling,
        {In("qi", queries), In("ki", keys), In("w", weights), In("valid", seen), In("partition", own), Out("scores", scores)}, qi);
    return scores;
}

Tensor IndexPartition(const Tensor& qi, const Tensor& ki, const OptionalTensor& w, const OptionalTensor& valid)
{
    const c10::DeviceGuard guard(qi.device());
    const IndexPartitionProblem problem = ScoreProblemOf(qi, ki, w, 1, "max", valid, std::nullopt);
    Accept(CheckIndexPartition(problem));
    const IndexPartitionTiling tiling = MakeIndexPartitionTiling(problem, DeviceHardware());
    const Tensor queries = qi.contiguous(), keys = ki.contiguous();
    const OptionalTensor weights = Contiguous(w), seen = Contiguous(valid);
    const Tensor partition = qi.new_empty({qi.size(0), qi.size(2)}, qi.options().dtype(at::kFloat));
    Run(launch_index_partition, KernelUnits::MIXED, IndexPartitionBlocks(tiling), IndexPartitionWorkspace(tiling), tiling,
        {In("qi", queries), In("ki", keys), In("w", weights), In("valid", seen), Out("partition", partition)}, qi);
    return partition;
}

std::tuple<Tensor, Tensor> SelectTokens(const Tensor& scores, int64_t k, int64_t sink, int64_t recent, int64_t block,
                                        int64_t queries, const OptionalTensor& valid)
{
    const c10::DeviceGuard guard(scores.device());
    CheckServed("scores", scores);
    CheckDims("scores", scores, 4);
    CheckInput("scores", scores, scores.sizes(), at::kFloat, scores);
    CheckInput("valid", valid, {scores.size(0), scores.size(3)}, at::kBool, scores);
    SelectTokensProblem problem;
    problem.batch = Size("B", scores, 0);
    problem.heads = Size("Hs", scores, 1);
    problem.rows = Size("Nq", scores, 2);
    problem.queries = U32("queries", queries);
    problem.keys = Size("Tk", scores, 3);
    problem.block = U32("block", block);
    problem.k = U32("k", k);
    problem.sink = U32("sink", sink);
    problem.recent = U32("recent", recent);
    problem.hasValid = valid.has_value();
    Accept(CheckSelectTokens(problem));
    const SelectTokensTiling tiling = MakeSelectTokensTiling(problem, DeviceHardware());
    const Tensor rows = scores.contiguous();
    const OptionalTensor seen = Contiguous(valid);
    const auto ints = scores.options().dtype(at::kInt);
    const Tensor indices =
        scores.new_empty({scores.size(0), scores.size(1), scores.size(2), std::min(k, scores.size(3))}, ints);
    const Tensor count = scores.new_empty({scores.size(0), scores.size(1), scores.size(2)}, ints);
    Run(launch_select_tokens, KernelUnits::VECTOR, SelectTokensBlocks(tiling), SelectTokensWorkspace(tiling), tiling,
        {In("scores", rows), In("valid", seen), Out("indices", indices), Out("count", count)}, scores);
    return {indices, count};
}

std::tuple<Tensor, Tensor> SelectByIndex(const Tensor& qi, const Tensor& ki, const OptionalTensor& w, int64_t k, int64_t block,
                                         c10::string_view reduce, int64_t sink, int64_t recent, const OptionalTensor& valid,
                                         const OptionalTensor& partition)
{
    const c10::DeviceGuard guard(qi.device());
    SelectByIndexProblem problem;
    static_cast<ScoreProblem&>(problem) = ScoreProblemOf(qi, ki, w, block, reduce, valid, partition);
    problem.k = U32("k", k);
    problem.sink = U32("sink", sink);
    problem.recent = U32("recent", recent);
    Accept(CheckSelectByIndex(problem));
    const SelectByIndexTiling tiling = MakeSelectByIndexTiling(problem, DeviceHardware());
    const Tensor queries = qi.contiguous(), keys = ki.contiguous();
    const OptionalTensor weights = Contiguous(w), seen = Contiguous(valid), own = Contiguous(partition);
    const int64_t rows = CeilDiv(problem.queries, problem.block);
    const auto ints = qi.options().dtype(at::kInt);
    const Tensor indices = qi.new_empty({qi.size(0), 1, rows, std::min(k, ki.size(1))}, ints);
    const Tensor count = qi.new_empty({qi.size(0), 1, rows}, ints);
    Run(launch_select_by_index, KernelUnits::MIXED, SelectByIndexBlocks(tiling), SelectByIndexWorkspace(tiling), tiling,
        {In("qi", queries), In("ki", keys), In("w", weights), In("valid", seen), In("partition", own), Out("indices", indices),
         Out("count", count)}, qi);
    return {indices, count};
}

// Why no prompt can be selected from by these sizes, padded ones among them; empty where each can. For those who attach a model.
std::string SelectionRefusal(int64_t heads, int64_t dim, int64_t k, int64_t block, c10::string_view reduce)
{
    SelectByIndexProblem problem;
    problem.heads = U32("Hi", heads);
    problem.queries = problem.keys = MAX_KEYS;
    problem.dim = U32("d_idx", dim);
    problem.block = U32("block", block);
    problem.mean = reduce == "mean";
    problem.hasPartition = reduce == "softmax_max";
    problem.hasWeights = heads > 1;
    problem.hasValid = true;
    problem.k = U32("k", k);
    return CheckSelectByIndex(problem);
}

Tensor SparseAttention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& indices, const Tensor& count,
                       int64_t block, double scale)
{
    const c10::DeviceGuard guard(q.device());
    CheckServed("q", q);
    for (const auto& [name, tensor] : {std::pair("q", q), std::pair("k", k), std::pair("v", v), std::pair("indices", indices)})
        CheckDims(name, tensor, 4);
    const int64_t width = indices.size(3), rows = CeilDiv(Size("Tq", q, 2), std::max(U32("block", block), 1u));
    CheckInput("k", k, {q.size(0), k.size(1), k.size(2), q.size(3)}, q.scalar_type(), q);
    CheckInput("v", v, {q.size(0), k.size(1), k.size(2), v.size(3)}, q.scalar_type(), q);
    CheckInput("indices", indices, {q.size(0), indices.size(1), rows, width}, at::kInt, q);
    CheckInput("count", count, {q.size(0), indices.size(1), rows}, at::kInt, q);
    SparseAttentionProblem problem{};
    problem.batch = Size("B", q, 0);
    problem.queryHeads = Size("Hq", q, 1);
    problem.keyHeads = Size("Hkv", k, 1);
    problem.queries = Size("Tq", q, 2);
    problem.keys = Size("Tk", k, 2);
    problem.dim = Size("D", q, 3);
    problem.valueDim = Size("Dv", v, 3);
    problem.supportHeads = Size("Hs", indices, 1);
    problem.width = width == 0 ? 1 : U32("K", width);  // whatever else the kernel refuses, it refuses for no keys too
    problem.block = U32("block", block);
    problem.type = Type("q", q);
    problem.scale = static_cast<float>(scale);
    Accept(CheckSparseAttention(problem));
    const std::vector<int64_t> shape{q.size(0), q.size(2), q.size(1), v.size(3)};
    if (width == 0) return q.new_zeros(shape).transpose(1, 2);
    const SparseAttentionTiling tiling = MakeSparseAttentionTiling(problem, DeviceHardware());
    const Tensor queries = q.contiguous(), keys = k.contiguous(), values = v.contiguous();
    const Tensor slots = indices.contiguous(), used = count.contiguous();
    const Tensor out = q.new_empty(shape);
    Run(launch_sparse_attention, KernelUnits::MIXED, tiling.cores, SparseAttentionWorkspace(tiling), tiling,
        {In("q", queries), In("k", keys), In("v", values), In("indices", slots), In("count", used), In("positions", OptionalTensor()),
         Out("out", out)}, q);
    return out.transpose(1, 2);
}

// Sparse attention whose support holds every valid key: rows in the order of their positions, and back.
Tensor DenseRows(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& positions, double scale,
                 const OptionalTensor& valid)
{
    const c10::DeviceGuard guard(q.device());
    CheckServed("q", q);
    for (const auto& [name, tensor] : {std::pair("q", q), std::pair("k", k), std::pair("v", v)}) CheckDims(name, tensor, 4);
    const int64_t B = q.size(0), R = q.size(2), Tk = k.size(2);
    CheckInput("k", k, {B, k.size(1), Tk, q.size(3)}, q.scalar_type(), q);
    CheckInput("v", v, {B, k.size(1), Tk, v.size(3)}, q.scalar_type(), q);
    CheckInput("positions", positions, {B, R}, at::kInt, q);
    CheckInput("valid", valid, {B, Tk}, at::kBool, q);
    SparseAttentionProblem problem{};
    problem.batch = Size("B", q, 0);
    problem.queryHeads = Size("Hq", q, 1);
    problem.keyHeads = Size("Hkv", k, 1);
    problem.queries = Size("R", q, 2);
    problem.keys = Size("Tk", k, 2);
    problem.dim = Size("D", q, 3);
    problem.valueDim = Size("Dv", v, 3);
    problem.supportHeads = 1;
    problem.width = problem.keys;
    problem.type = Type("q", q);
    problem.scale = static_cast<float>(scale);
    problem.rowsAnywhere = true;
    const Hardware hardware = DeviceHardware();
    problem.block = DenseRowsBlock(problem.batch, problem.keyHeads, problem.queries, hardware);
    Accept(CheckSparseAttention(problem));
    const SparseAttentionTiling tiling = MakeSparseAttentionTiling(problem, hardware);
    const auto [places, order] = positions.sort(1);
    const Tensor across = order.view({B, 1, R, 1});
    const Tensor queries = q.gather(2, across.expand(q.sizes())).contiguous(), keys = k.contiguous(), values = v.contiguous();
    Tensor slots, used;
    if (valid) {  // valid keys first, in their order
        slots = (*valid).logical_not().to(at::kByte).argsort(/*stable=*/true, /*dim=*/1, /*descending=*/false).to(at::kInt).contiguous();
        used = valid->sum({1}, false, at::kInt);
    } else {
        slots = at::arange(Tk, positions.options()).expand({B, Tk}).contiguous();
        used = positions.new_full({B}, Tk);
    }
    const Tensor ascending = places.contiguous();
    const Tensor out = q.new_empty({B, R, q.size(1), v.size(3)});
    Run(launch_sparse_attention, KernelUnits::MIXED, tiling.cores, SparseAttentionWorkspace(tiling), tiling,
        {In("q", queries), In("k", keys), In("v", values), In("indices", slots), In("count", used), In("positions", ascending),
         Out("out", out)}, q);
    const Tensor back = order.argsort(1, /*descending=*/false).view({B, R, 1, 1});
    return out.gather(1, back.expand(out.sizes())).transpose(1, 2);
}

Tensor AttentionMass(const Tensor& q, const Tensor& k, double scale, int64_t block, c10::string_view reduce, bool perKv,
                     const OptionalTensor& valid)
{
    const c10::DeviceGuard guard(q.device());
    CheckServed("q", q);
    CheckDims("q", q, 4);
    CheckDims("k", k, 4);
    CheckInput("k", k, {q.size(0), k.size(1), k.size(2), q.size(3)}, q.scalar_type(), q);
    CheckInput("valid", valid, {q.size(0), k.size(2)}, at::kBool, q);
    AttentionMassProblem problem{};
    problem.batch = Size("B", q, 0);
    problem.queryHeads = Size("Hq", q, 1);
    problem.keyHeads = Size("Hkv", k, 1);
    problem.queries = Size("Tq", q, 2);
    problem.keys = Size("Tk", k, 2);
    problem.dim = Size("D", q, 3);
    problem.block = U32("reduce_block", block);
    problem.reduceMean = IsMean(reduce);
    problem.perKv = perKv;
    problem.hasValid = valid.has_value();
    problem.type = Type("q", q);
    problem.scale = static_cast<float>(scale);
    Accept(CheckAttentionMass(problem));
    const AttentionMassTiling tiling = MakeAttentionMassTiling(problem, DeviceHardware());
    const Tensor queries = q.contiguous(), keys = k.contiguous();
    const OptionalTensor seen = Contiguous(valid);
    const Tensor mass = q.new_empty({q.size(0), perKv ? k.size(1) : 1, CeilDiv(problem.queries, problem.block), k.size(2)},
                                    q.options().dtype(at::kFloat));
    Run(launch_attention_mass, KernelUnits::MIXED, tiling.cores, AttentionMassWorkspace(tiling), tiling,
        {In("q", queries), In("k", keys), In("valid", seen), Out("mass", mass)}, q);
    return mass;
}

// Every device has the one kernel: each refuses tensors whose memory its library cannot read.
TORCH_LIBRARY(NPU_SPARSE_NAMESPACE, m)
{
    m.def("index_scores(Tensor qi, Tensor ki, Tensor? w, int block, str reduce, Tensor? valid, Tensor? partition=None)"
          " -> Tensor",
          torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(IndexScores)));
    m.def("index_partition(Tensor qi, Tensor ki, Tensor? w, Tensor? valid) -> Tensor",
          torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(IndexPartition)));
    m.def("select_tokens(Tensor scores, int k, int sink, int recent, int block, int queries, Tensor? valid) -> (Tensor, Tensor)",
          torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(SelectTokens)));
    m.def("select_by_index(Tensor qi, Tensor ki, Tensor? w, int k, int block, str reduce, int sink, int recent, Tensor? valid,"
          " Tensor? partition=None) -> (Tensor, Tensor)",
          torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(SelectByIndex)));
    m.def("sparse_attention(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor count, int block, float scale) -> Tensor",
          torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(SparseAttention)));
    m.def("dense_rows(Tensor q, Tensor k, Tensor v, Tensor positions, float scale, Tensor? valid) -> Tensor",
          torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(DenseRows)));
    m.def("attention_mass(Tensor q, Tensor k, float scale, int block, str reduce, bool per_kv, Tensor? valid) -> Tensor",
          torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(AttentionMass)));
    m.def("selection_refusal(int heads, int dim, int k, int block, str reduce) -> str",
          torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(SelectionRefusal)));
    m.def("soc_name() -> str", torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(SocName)));
}

}  // namespace
}  // namespace npu_sparse_ascendc
