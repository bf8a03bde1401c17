// What the device compiler knows by itself, for reading CANN's published headers with g++: words and types, no instructions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#define __aicore__
#define __global__
#define __host_aicore__
#define ASCENDC_HOST_AICORE
#define __mix__(cube, vector)
#define __schedmode__(mode)
#define __gm__
#define __ubuf__
#define __cbuf__
#define __ca__
#define __cb__
#define __cc__
#define __fbuf__
#define __ssbuf__
#define __in_pipe__(pipe)
#define __out_pipe__(pipe)
#define __inout_pipe__(pipe)
#define __sync_alias__
#define __sync_noalias__
#define __check_sync_alias__
#define __simd_callee__
#define __simd_vf__

// Sixteen bits that numbers turn into and back.
#define SHORT_FLOAT(name)                              \
    struct name {                                      \
        name() = default;                              \
        template <typename T> constexpr name(T) {}     \
        operator float() const { return 0; }           \
        uint16_t bits = 0;                             \
    };
SHORT_FLOAT(half)
SHORT_FLOAT(bfloat16_t)
#undef SHORT_FLOAT

enum pipe_t { PIPE_S, PIPE_V, PIPE_M, PIPE_MTE1, PIPE_MTE2, PIPE_MTE3, PIPE_ALL, PIPE_MTE4, PIPE_MTE5, PIPE_V2, PIPE_FIX };
enum event_t { EVENT_ID0, EVENT_ID1, EVENT_ID2, EVENT_ID3, EVENT_ID4, EVENT_ID5, EVENT_ID6, EVENT_ID7 };
enum QuantMode_t { NoQuant, F322F16, F322BF16, DEQF16, VDEQF16, QF322B8_PRE, VQF322B8_PRE, REQ8, VREQ8 };
enum addr_cal_mode_t {};
enum bm_t {};
enum cache_line_t {};
enum dcci_dst_t {};
enum mem_t {};
