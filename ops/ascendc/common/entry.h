// How a kernel is entered: which cores run it, and whether its blocks start together.
//
// The attributes say it to the device compiler and to the emulation. CANN before 9.1 has a statement in the kernel's body
// instead, TASK_TYPE below; NPU_SPARSE_TASK_TYPE_MACRO is defined where the library is built for one of those.
#pragma once

#include "kernel_operator.h"

#ifdef NPU_SPARSE_TASK_TYPE_MACRO
#define MIXED_KERNEL __global__ __aicore__
#define BATCHED_MIXED_KERNEL __global__ __aicore__
#define BATCHED_VECTOR_KERNEL __global__ __aicore__
#define TASK_TYPE(type) KERNEL_TASK_TYPE_DEFAULT(type)
#else
#define MIXED_KERNEL __global__ __mix__(1, 2)
// The blocks of a kernel that calls SyncAll wait for each other: all start, or none while another stream holds some of the cores
#define BATCHED_MIXED_KERNEL __schedmode__(1) __global__ __mix__(1, 2)
#define BATCHED_VECTOR_KERNEL __schedmode__(1) __global__ __mix__(0, 1)
#define TASK_TYPE(type)
#endif
