// The kernels on the card. Compiled by CANN's bisheng alone (-x asc), which makes device code of the headers and host code of
// the launches below.

#include <stdexcept>
#include <string>

#include "acl/acl.h"
#include "attention_mass/attention_mass.h"
#include "index_partition/index_partition.h"
#include "index_scores/index_scores.h"
#include "launch.h"
#include "select_by_index/select_by_index.h"
#include "select_tokens/select_tokens.h"
#include "sparse_attention/sparse_attention.h"

namespace npu_sparse_ascendc {

uint32_t DeviceCores()
{
    int32_t device = 0;
    int64_t cores = 0;
    if (aclrtGetDevice(&device) != ACL_SUCCESS ||
        aclGetDeviceCapability(device, ACL_DEVICE_INFO_AI_CORE_NUM, &cores) != ACL_SUCCESS || cores < 1) {
        throw std::runtime_error(std::string("the card must tell how many AI cores it has: ") + aclGetRecentErrMsg());
    }
    return static_cast<uint32_t>(cores);
}

#define GM(i) static_cast<GM_ADDR>(arguments[i].data)
#define LAUNCH(op, ...)                                                                                           \
    void launch_##op(uint32_t blocks, KernelUnits, void* stream, const std::vector<GmArgument>& arguments)        \
    {                                                                                                             \
        npu_sparse_##op<<<blocks, nullptr, stream>>>(__VA_ARGS__);                                                \
    }

LAUNCH(index_scores, GM(0), GM(1), GM(2), GM(3), GM(4), GM(5), GM(6), GM(7))
LAUNCH(index_partition, GM(0), GM(1), GM(2), GM(3), GM(4), GM(5), GM(6))
LAUNCH(select_tokens, GM(0), GM(1), GM(2), GM(3), GM(4), GM(5))
LAUNCH(select_by_index, GM(0), GM(1), GM(2), GM(3), GM(4), GM(5), GM(6), GM(7), GM(8))
LAUNCH(sparse_attention, GM(0), GM(1), GM(2), GM(3), GM(4), GM(5), GM(6), GM(7))
LAUNCH(attention_mass, GM(0), GM(1), GM(2), GM(3), GM(4), GM(5))

}  // namespace npu_sparse_ascendc
