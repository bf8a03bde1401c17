// Runs one operator on one emulated AI core and writes its instruction stream for npu_sparse.measure.npu_cost. Compiled by
// scripts/model_npu.py, once per operator: NPU_SPARSE_OPERATOR is 1 for sparse_attention, 2 for select_by_index, 3 for dense_rows.
//
//   sparse_attention FILE group dim queries keys k block run seed
//   select_by_index  FILE dim queries keys k block heads partition seed
//   dense_rows       FILE group dim rows keys seed
//
// Several index heads have weights; `partition` is 1 for softmax_max. The rows of dense_rows are the last, and one tile.
// The problem is the last `queries` of `keys` tokens and, for attention, one KV head with `group` query heads. Supports are `k`
// random keys in runs of neighbours of mean length `run`. Hazard checks are off here: the tests run the same kernels with them.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "emulation/launch.h"

#if NPU_SPARSE_OPERATOR != 2
#include "../../ascendc/sparse_attention/sparse_attention.h"
#include "../../ascendc/sparse_attention/tiling.h"
#else
#include "../../ascendc/select_by_index/select_by_index.h"
#include "../../ascendc/select_by_index/tiling.h"
#endif

using namespace npu_sparse_ascendc;
using emulation::Gm;
using emulation::GmUse;

namespace {

std::vector<uint16_t> RandomHalves(size_t count, std::mt19937& random)
{
    std::vector<uint16_t> values(count);  // +-[0.5, 1): sign, exponent 14, random mantissa
    for (auto& value : values) value = static_cast<uint16_t>((random() & 0x83ff) | 0x3800);
    return values;
}

emulation::GmArgument Read(const char* name, const std::vector<uint16_t>& values)
{
    return Gm(values.data(), values.size() * 2, name, GmUse::Read);
}

// `k` ascending keys below `end`, in runs whose mean length is `run`.
std::vector<int32_t> Support(uint32_t k, uint32_t end, double run, std::mt19937& random)
{
    const uint32_t held = std::min(k, end);
    const uint32_t runs = std::max(1u, static_cast<uint32_t>(held / run + 0.5));
    std::vector<uint32_t> lengths(runs, 1), gaps(runs + 1, 0);
    for (uint32_t i = runs; i < held; ++i) lengths[random() % runs]++;
    for (uint32_t i = 0; i < end - held; ++i) gaps[random() % (runs + 1)]++;
    std::vector<int32_t> keys;
    uint32_t next = gaps[0];
    for (uint32_t i = 0; i < runs; ++i) {
        for (uint32_t j = 0; j < lengths[i]; ++j) keys.push_back(static_cast<int32_t>(next++));
        next += gaps[i + 1];
    }
    return keys;
}

template <typename Kernel, typename Tiling, typename... Arguments>
void Record(const char* name, const char* path, Kernel* kernel, uint32_t blocks, const Tiling& tiling, uint64_t workspace,
            const Arguments&... arguments)
{
    emulation::Trace trace;
    trace.kernel = name;
    emulation::LaunchOptions options;
    options.kernel = name;
    options.blocks = blocks;
    options.entry = true;
    options.trace = &trace;
    options.hazards = false;
    std::vector<uint8_t> space(std::max<uint64_t>(workspace, 512));
    emulation::Launch(options, kernel, arguments..., Gm(space.data(), space.size(), "workspace", GmUse::Workspace),
                      tiling);
    if (!emulation::WriteTrace(trace, path)) throw std::runtime_error(std::string("cannot write ") + path);
}

void Refuse(const std::string& refusal)
{
    if (!refusal.empty()) throw std::runtime_error(refusal);
}

}  // namespace

int main(int argc, char** argv)
try {
    const auto number = [&](int i) { return static_cast<uint32_t>(std::strtoul(argv[i], nullptr, 10)); };
    Hardware hardware;
    hardware.cores = 1;
#if NPU_SPARSE_OPERATOR == 1
    if (argc != 10) throw std::runtime_error("usage: trace FILE group dim queries keys k block run seed");
    SparseAttentionProblem p{};
    p.batch = p.keyHeads = p.supportHeads = 1;
    p.queryHeads = number(2);
    p.dim = p.valueDim = number(3);
    p.queries = number(4);
    p.keys = number(5);
    p.width = number(6);
    p.block = number(7);
    p.type = BFLOAT16;
    p.scale = 0.0625f;
    Refuse(CheckSparseAttention(p));
    std::mt19937 random(number(9));
    const uint32_t rows = (p.queries + p.block - 1) / p.block;
    std::vector<int32_t> indices(static_cast<size_t>(rows) * p.width, -1), count(rows);
    for (uint32_t row = 0; row < rows; ++row) {
        const uint32_t end = p.keys - p.queries + std::min((row + 1) * p.block, p.queries);
        const auto keys = Support(p.width, end, std::strtod(argv[8], nullptr), random);
        std::copy(keys.begin(), keys.end(), indices.begin() + static_cast<size_t>(row) * p.width);
        count[row] = static_cast<int32_t>(keys.size());
    }
    const auto q = RandomHalves(static_cast<size_t>(p.queryHeads) * p.queries * p.dim, random);
    const auto k = RandomHalves(static_cast<size_t>(p.keys) * p.dim, random);
    std::vector<uint16_t> out(q.size());
    const auto tiling = MakeSparseAttentionTiling(p, hardware);
    Record("sparse_attention", argv[1], npu_sparse_sparse_attention, SparseAttentionBlocks(tiling), tiling,
           SparseAttentionWorkspace(tiling), Read("q", q), Read("k", k), Read("v", k),
           Gm(indices.data(), indices.size() * 4, "indices", GmUse::Read), Gm(count.data(), count.size() * 4, "count", GmUse::Read),
           Gm(nullptr, 0, "positions", GmUse::Read), Gm(out.data(), out.size() * 2, "out", GmUse::Write));
#elif NPU_SPARSE_OPERATOR == 3
    if (argc != 7) throw std::runtime_error("usage: trace FILE group dim rows keys seed");
    SparseAttentionProblem p{};
    p.batch = p.keyHeads = p.supportHeads = 1;
    p.queryHeads = number(2);
    p.dim = p.valueDim = number(3);
    p.queries = p.block = number(4);
    p.keys = p.width = number(5);
    p.type = BFLOAT16;
    p.scale = 0.0625f;
    p.rowsAnywhere = true;
    Refuse(CheckSparseAttention(p));
    std::mt19937 random(number(6));
    std::vector<int32_t> indices(p.keys), positions(p.queries), count{static_cast<int32_t>(p.keys)};
    for (uint32_t i = 0; i < p.keys; ++i) indices[i] = static_cast<int32_t>(i);
    for (uint32_t i = 0; i < p.queries; ++i) positions[i] = static_cast<int32_t>(p.keys - p.queries + i);
    const auto q = RandomHalves(static_cast<size_t>(p.queryHeads) * p.queries * p.dim, random);
    const auto k = RandomHalves(static_cast<size_t>(p.keys) * p.dim, random);
    std::vector<uint16_t> out(q.size());
    const auto tiling = MakeSparseAttentionTiling(p, hardware);
    Record("dense_rows", argv[1], npu_sparse_sparse_attention, SparseAttentionBlocks(tiling), tiling,
           SparseAttentionWorkspace(tiling), Read("q", q), Read("k", k), Read("v", k),
           Gm(indices.data(), indices.size() * 4, "indices", GmUse::Read), Gm(count.data(), count.size() * 4, "count", GmUse::Read),
           Gm(positions.data(), positions.size() * 4, "positions", GmUse::Read), Gm(out.data(), out.size() * 2, "out", GmUse::Write));
#else
    if (argc != 10) throw std::runtime_error("usage: trace FILE dim queries keys k block heads partition seed");
    SelectByIndexProblem p;
    p.dim = number(2);
    p.queries = number(3);
    p.keys = number(4);
    p.k = number(5);
    p.block = number(6);
    p.heads = number(7);
    p.hasWeights = p.heads > 1;
    p.hasPartition = number(8) != 0;
    p.dtype = BFLOAT16;
    Refuse(CheckSelectByIndex(p));
    std::mt19937 random(number(9));
    const auto qi = RandomHalves(static_cast<size_t>(p.heads) * p.queries * p.dim, random);
    const auto w = RandomHalves(static_cast<size_t>(p.heads) * p.queries, random);
    std::vector<float> partition(p.queries, 8.0f);
    const auto ki = RandomHalves(static_cast<size_t>(p.keys) * p.dim, random);
    const uint32_t rows = (p.queries + p.block - 1) / p.block;
    std::vector<int32_t> indices(static_cast<size_t>(rows) * p.k), count(rows);
    const auto tiling = MakeSelectByIndexTiling(p, hardware);
    const auto none = Gm(nullptr, 0, "absent", GmUse::Read);
    Record("select_by_index", argv[1], npu_sparse_select_by_index, SelectByIndexBlocks(tiling), tiling,
           SelectByIndexWorkspace(tiling), Read("qi", qi), Read("ki", ki), p.hasWeights ? Read("w", w) : none, none,
           p.hasPartition ? Gm(partition.data(), partition.size() * 4, "partition", GmUse::Read) : none,
           Gm(indices.data(), indices.size() * 4, "indices", GmUse::Write), Gm(count.data(), count.size() * 4, "count", GmUse::Write));
#endif
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
