// The part of the Ascend runtime that torch_npu needs to hold tensors, with the host as its one device.
//
// For tests alone: it lets the published torch_npu wheel run where there is no card and no CANN. Device memory is host
// memory, and everything has happened by the time a call returns, so streams and events only keep the books. What is not
// here is in unsupported.cpp and returns an error; nothing reports a success that did not happen.

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unistd.h>
#include <vector>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"

namespace {

constexpr size_t kDeviceBytes = size_t(16) << 30;
constexpr size_t kAlignment = 512;

struct Event { std::chrono::steady_clock::time_point recorded; bool isRecorded = false; };

std::mutex lock;
std::map<char*, size_t> allocations;  // of the device
size_t allocatedBytes = 0;
aclrtFloatOverflowMode overflowMode = ACL_RT_OVERFLOW_MODE_INFNAN;
std::map<int, std::string> compileOptions;  // kept, and used by nobody: nothing is compiled
std::map<int, int64_t> systemOptions;  // 0 (off) until set
int context;  // its address is the one context
thread_local const char* lastError = "";
std::map<std::pair<aclrtStream, int>, uint32_t> streamLimits;  // cores, where a limit was set

// What the tests count: copies, waits for the device, and launches of our kernels.
struct Launched { void* stream; uint32_t blocks; const void* workspace; };
std::vector<Launched> launches;
uint64_t copies = 0, waits = 0;

aclError Refuse(aclError code, const char* why)
{
    lastError = why;
    return code;
}

aclError Allocate(void** pointer, size_t size)
{
    if (pointer == nullptr || size == 0) return Refuse(ACL_ERROR_INVALID_PARAM, "runtime stub: allocation of no bytes");
    size_t rounded = (size + kAlignment - 1) / kAlignment * kAlignment;
    *pointer = std::aligned_alloc(kAlignment, rounded);
    if (*pointer == nullptr) return Refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, "runtime stub: out of host memory");
    std::memset(*pointer, 0xA5, rounded);  // nobody may count on zeros
    return ACL_SUCCESS;
}

/// True unless [start, start + count) begins inside a device allocation and ends outside of it.
bool InBounds(const void* pointer, size_t count)
{
    std::lock_guard<std::mutex> guard(lock);
    char* start = static_cast<char*>(const_cast<void*>(pointer));
    auto after = allocations.upper_bound(start);
    if (after == allocations.begin()) return true;
    auto& [base, size] = *--after;
    return start >= base + size || start + count <= base + size;
}

aclError Copy(void* destination, size_t room, const void* source, size_t count)
{
    if (count == 0) return ACL_SUCCESS;
    if (destination == nullptr || source == nullptr || count > room)
        return Refuse(ACL_ERROR_INVALID_PARAM, "runtime stub: copy of more bytes than there is room for");
    if (!InBounds(destination, count) || !InBounds(source, count))
        return Refuse(ACL_ERROR_INVALID_PARAM, "runtime stub: copy beyond the end of a device allocation");
    std::memmove(destination, source, count);
    return ACL_SUCCESS;
}

}  // namespace

extern "C" {

void npu_sparse_launched(void* stream, uint32_t blocks, const void* workspace)
{
    std::lock_guard<std::mutex> guard(lock);
    launches.push_back({stream, blocks, workspace});
}
uint64_t npu_sparse_copies() { return copies; }
uint64_t npu_sparse_waits() { return waits; }
size_t npu_sparse_launches() { return launches.size(); }
void npu_sparse_launch(size_t i, void** stream, uint32_t* blocks, const void** workspace)
{
    *stream = launches[i].stream;
    *blocks = launches[i].blocks;
    *workspace = launches[i].workspace;
}

int npu_sparse_runtime_stub = 1;  // by this symbol a process knows that its device memory is host memory

const char* aclGetRecentErrMsg() { return lastError; }
void npu_sparse_refused(const char* why) { lastError = why; }

aclError aclInit(const char*) { return ACL_SUCCESS; }
aclError aclFinalize() { return ACL_SUCCESS; }
void aclAppLog(aclLogLevel, const char*, const char*, uint32_t, const char*, ...) { }

aclError aclrtGetDeviceCount(uint32_t* count) { *count = 1; return ACL_SUCCESS; }
aclError aclrtGetDevice(int32_t* device) { *device = 0; return ACL_SUCCESS; }
aclError aclrtSetDevice(int32_t device)
{
    return device == 0 ? ACL_SUCCESS : Refuse(ACL_ERROR_RT_INVALID_DEVICEID, "runtime stub: there is one device, 0");
}
aclError aclrtResetDevice(int32_t device) { return aclrtSetDevice(device); }
aclError aclrtGetCurrentContext(aclrtContext* current) { *current = &context; return ACL_SUCCESS; }
aclError aclrtSetCurrentContext(aclrtContext wanted)
{
    return wanted == &context ? ACL_SUCCESS : Refuse(ACL_ERROR_RT_CONTEXT_NULL, "runtime stub: unknown context");
}
const char* aclrtGetSocName() { return "Ascend910B3"; }
aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo info, int64_t* value)
{
    switch (info) {  // of a 910B3
        case ACL_DEVICE_INFO_AI_CORE_NUM: *value = 20; return ACL_SUCCESS;
        case ACL_DEVICE_INFO_VECTOR_CORE_NUM: *value = 40; return ACL_SUCCESS;
        case ACL_DEVICE_INFO_L2_SIZE: *value = int64_t(192) << 20; return ACL_SUCCESS;
        default: return Refuse(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "runtime stub: unknown device property");
    }
}
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) { overflowMode = mode; return ACL_SUCCESS; }
aclError aclrtGetDeviceSatMode(aclrtFloatOverflowMode* mode) { *mode = overflowMode; return ACL_SUCCESS; }
aclError aclSetCompileopt(aclCompileOpt option, const char* value) { compileOptions[option] = value; return ACL_SUCCESS; }
size_t aclGetCompileoptSize(aclCompileOpt option) { return compileOptions[option].size() + 1; }
aclError aclGetCompileopt(aclCompileOpt option, char* value, size_t length)
{
    const std::string& held = compileOptions[option];
    if (length <= held.size()) return Refuse(ACL_ERROR_INVALID_PARAM, "runtime stub: no room for the compile option");
    std::memcpy(value, held.c_str(), held.size() + 1);
    return ACL_SUCCESS;
}
aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) { systemOptions[option] = value; return ACL_SUCCESS; }
aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t* value) { *value = systemOptions[option]; return ACL_SUCCESS; }
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { return aclrtSetSysParamOpt(option, value); }
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }  // a call that does not return is not given up on
aclError aclrtDeviceGetBareTgid(int32_t* pid) { *pid = getpid(); return ACL_SUCCESS; }

aclError aclrtMalloc(void** pointer, size_t size, aclrtMemMallocPolicy)
{
    std::lock_guard<std::mutex> guard(lock);
    if (allocatedBytes + size > kDeviceBytes) return Refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, "runtime stub: the device is full");
    aclError status = Allocate(pointer, size);
    if (status == ACL_SUCCESS) {
        allocations[static_cast<char*>(*pointer)] = size;
        allocatedBytes += size;
    }
    return status;
}
aclError aclrtFree(void* pointer)
{
    std::lock_guard<std::mutex> guard(lock);
    auto found = allocations.find(static_cast<char*>(pointer));
    if (found == allocations.end()) return Refuse(ACL_ERROR_INVALID_PARAM, "runtime stub: not a device allocation");
    allocatedBytes -= found->second;
    allocations.erase(found);
    std::free(pointer);
    return ACL_SUCCESS;
}
aclError aclrtMallocHost(void** pointer, size_t size) { return Allocate(pointer, size); }
aclError aclrtFreeHost(void* pointer) { std::free(pointer); return ACL_SUCCESS; }
aclError aclrtGetMemInfo(aclrtMemAttr, size_t* unused, size_t* total)
{
    std::lock_guard<std::mutex> guard(lock);
    *unused = kDeviceBytes - allocatedBytes;
    *total = kDeviceBytes;
    return ACL_SUCCESS;
}
aclError aclrtMemcpy(void* destination, size_t room, const void* source, size_t count, aclrtMemcpyKind)
{
    ++copies;
    return Copy(destination, room, source, count);
}
aclError aclrtMemcpyAsync(void* destination, size_t room, const void* source, size_t count, aclrtMemcpyKind, aclrtStream)
{
    ++copies;
    return Copy(destination, room, source, count);
}
aclError aclrtMemset(void* pointer, size_t room, int32_t value, size_t count)
{
    if (count > room || !InBounds(pointer, count))
        return Refuse(ACL_ERROR_INVALID_PARAM, "runtime stub: memset beyond the end of a device allocation");
    std::memset(pointer, value, count);
    return ACL_SUCCESS;
}

aclError aclrtCreateStream(aclrtStream* stream) { *stream = new char; return ACL_SUCCESS; }
aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) { return aclrtCreateStream(stream); }
aclError aclrtDestroyStream(aclrtStream stream) { delete static_cast<char*>(stream); return ACL_SUCCESS; }
aclError aclrtSynchronizeStream(aclrtStream) { ++waits; return ACL_SUCCESS; }
aclError aclrtSynchronizeDevice() { ++waits; return ACL_SUCCESS; }
aclError aclrtSetStreamResLimit(aclrtStream stream, aclrtDevResLimitType type, uint32_t value)
{
    streamLimits[{stream, type}] = value;
    return ACL_SUCCESS;
}
aclError aclrtResetStreamResLimit(aclrtStream stream)
{
    for (int type : {ACL_RT_DEV_RES_CUBE_CORE, ACL_RT_DEV_RES_VECTOR_CORE}) streamLimits.erase({stream, type});
    return ACL_SUCCESS;
}
aclError aclrtGetStreamResLimit(aclrtStream stream, aclrtDevResLimitType type, uint32_t* value)
{
    const auto found = streamLimits.find({stream, type});
    *value = found != streamLimits.end() ? found->second : type == ACL_RT_DEV_RES_CUBE_CORE ? 20 : 40;  // of a 910B3
    return ACL_SUCCESS;
}

aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t) { *event = new Event; return ACL_SUCCESS; }
aclError aclrtDestroyEvent(aclrtEvent event) { delete static_cast<Event*>(event); return ACL_SUCCESS; }
aclError aclrtRecordEvent(aclrtEvent event, aclrtStream)
{
    *static_cast<Event*>(event) = {std::chrono::steady_clock::now(), true};
    return ACL_SUCCESS;
}
aclError aclrtResetEvent(aclrtEvent event, aclrtStream) { static_cast<Event*>(event)->isRecorded = false; return ACL_SUCCESS; }
aclError aclrtSynchronizeEvent(aclrtEvent) { return ACL_SUCCESS; }
aclError aclrtStreamWaitEvent(aclrtStream, aclrtEvent) { return ACL_SUCCESS; }
aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus* status)
{
    bool done = static_cast<Event*>(event)->isRecorded;
    *status = done ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
    return ACL_SUCCESS;
}
aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent start, aclrtEvent end)
{
    auto *first = static_cast<Event*>(start), *last = static_cast<Event*>(end);
    if (!first->isRecorded || !last->isRecorded) return Refuse(ACL_ERROR_INVALID_PARAM, "runtime stub: event not recorded");
    *milliseconds = std::chrono::duration<float, std::milli>(last->recorded - first->recorded).count();
    return ACL_SUCCESS;
}

}  // extern "C"
