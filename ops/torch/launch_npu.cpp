// The kernels on the card. Compiled by CANN's bisheng alone (-x asc), which makes device code of the headers and host code of
// the launches below.

#include "attention_mass/attention_mass.h"
#include "index_partition/index_partition.h"
#include "index_scores/index_scores.h"
#include "launch.h"
#include "select_by_index/select_by_index.h"
#include "select_tokens/select_tokens.h"
#include "sparse_attention/sparse_attention.h"

namespace npu_sparse_ascendc {

#define GM(i) static_cast<GM_ADDR>(arguments[i].data)
#define LAUNCH(op, Tiling, ...)                                                                                              \
    void launch_##op(uint32_t blocks, KernelUnits, void* stream, const std::vector<GmArgument>& arguments, const Tiling& tiling) \
    {                                                                                                                        \
        npu_sparse_##op<<<blocks, nullptr, stream>>>(__VA_ARGS__, tiling);                                                   \
    }

LAUNCH(index_scores, IndexScoresTiling, GM(0), GM(1), GM(2), GM(3), GM(4), GM(5), GM(6))
LAUNCH(index_partition, IndexPartitionTiling, GM(0), GM(1), GM(2), GM(3), GM(4), GM(5))
LAUNCH(select_tokens, SelectTokensTiling, GM(0), GM(1), GM(2), GM(3), GM(4))
LAUNCH(select_by_index, SelectByIndexTiling, GM(0), GM(1), GM(2), GM(3), GM(4), GM(5), GM(6), GM(7))
LAUNCH(sparse_attention, SparseAttentionTiling, GM(0), GM(1), GM(2), GM(3), GM(4), GM(5), GM(6), GM(7))
LAUNCH(attention_mass, AttentionMassTiling, GM(0), GM(1), GM(2), GM(3), GM(4))

}  // namespace npu_sparse_ascendc
