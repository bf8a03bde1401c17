// The basic API of CANN's published headers, without the advanced one.
#pragma once

#define __ASCENDC_INCLUDE_INTERNAL_HEADERS__
#include "stub_def.h"
#include "kernel_tpipe.h"
#include "kernel_tensor.h"
#include "kernel_type.h"
#include "kernel_basic_intf.h"
