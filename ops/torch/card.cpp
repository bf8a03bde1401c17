// What the runtime of CANN says of the card: host code alone, compiled by g++.

#include "acl/acl.h"
#include "launch.h"

#include <algorithm>
#include <stdexcept>

namespace npu_sparse_ascendc {
namespace {

[[noreturn]] void Refuse(const char* what)
{
    const char* why = aclGetRecentErrMsg();
    throw std::runtime_error(std::string("the card must tell ") + what + ": " + (why == nullptr ? "it gave no reason" : why));
}

}  // namespace

// Of the stream, not of the card: more blocks than it may use would not run at once, and those of SyncAll would wait for ever.
uint32_t StreamCores(void* stream)
{
    uint32_t cube = 0, vector = 0;
    if (aclrtGetStreamResLimit(stream, ACL_RT_DEV_RES_CUBE_CORE, &cube) != ACL_SUCCESS ||
        aclrtGetStreamResLimit(stream, ACL_RT_DEV_RES_VECTOR_CORE, &vector) != ACL_SUCCESS) {
        Refuse("how many cores a stream may use");
    }
    const uint32_t cores = std::min(cube, vector / 2);
    if (cores == 0) {
        throw std::runtime_error("a stream must have a cube core and two vector cores at least, got " + std::to_string(cube) +
                                 " and " + std::to_string(vector));
    }
    return cores;
}

std::string SocName()
{
    const char* name = aclrtGetSocName();
    if (name == nullptr) {
        Refuse("what it is");
    }
    return name;
}

}  // namespace npu_sparse_ascendc
