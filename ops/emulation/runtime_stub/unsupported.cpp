// What torch_npu links against and the stub does not do: every call returns an error and says its own name.
//
// Without CANN's headers on purpose: the callers' arguments are not looked at.

#include <string>

extern "C" void npu_sparse_refused(const char* why);

namespace {

constexpr int kFeatureNotSupported = 207000;

int Unsupported(const char* name)
{
    static thread_local std::string message;
    message = std::string("runtime stub: ") + name + " is not implemented";
    npu_sparse_refused(message.c_str());
    return kFeatureNotSupported;
}

}  // namespace

#define STATUS(name) extern "C" int name() { return Unsupported(#name); }
#define POINTER(name) extern "C" void* name() { Unsupported(#name); return nullptr; }
#define NOTHING(name) extern "C" void name() { Unsupported(#name); }

STATUS(MsprofGetHashId)
STATUS(MsprofRegisterCallback)
STATUS(MsprofReportAdditionalInfo)
STATUS(MsprofReportApi)
STATUS(MsprofReportCompactInfo)
STATUS(MsprofSysCycleTime)
STATUS(aclDestroyDataBuffer)
STATUS(aclGetTensorDescDimV2)
STATUS(aclGetTensorDescFormat)
STATUS(aclGetTensorDescNumDims)
STATUS(aclGetTensorDescType)
STATUS(aclSetTensorFormat)
STATUS(aclSetTensorPlaceMent)
STATUS(aclSetTensorShape)
STATUS(aclmdlFinalizeDump)
STATUS(aclmdlInitDump)
STATUS(aclmdlSetDump)
STATUS(aclopCompileAndExecute)
STATUS(aclopSetAttrBool)
STATUS(aclopSetAttrDataType)
STATUS(aclopSetAttrFloat)
STATUS(aclopSetAttrInt)
STATUS(aclopSetAttrListBool)
STATUS(aclopSetAttrListFloat)
STATUS(aclopSetAttrListInt)
STATUS(aclopSetAttrListListInt)
STATUS(aclopSetAttrString)
STATUS(aclrtBinaryGetFunction)
STATUS(aclrtBinaryLoadFromData)
STATUS(aclrtDeviceCanAccessPeer)
STATUS(aclrtDeviceEnablePeerAccess)
STATUS(aclrtFreePhysical)
STATUS(aclrtGetFunctionAddr)
STATUS(aclrtMallocPhysical)
STATUS(aclrtMapMem)
STATUS(aclrtMemExportToShareableHandle)
STATUS(aclrtMemImportFromShareableHandle)
STATUS(aclrtMemSetPidToShareableHandle)
STATUS(aclrtProcessReport)
STATUS(aclrtReleaseMemAddress)
STATUS(aclrtReserveMemAddress)
STATUS(aclrtUnmapMem)
STATUS(rtDevBinaryRegister)
STATUS(rtFunctionRegister)
STATUS(rtGetC2cCtrlAddr)
STATUS(rtKernelLaunch)
POINTER(aclCreateDataBuffer)
POINTER(aclCreateTensorDesc)
POINTER(aclopCreateAttr)
NOTHING(aclDestroyTensorDesc)
NOTHING(aclSetTensorDescName)
NOTHING(aclopDestroyAttr)
