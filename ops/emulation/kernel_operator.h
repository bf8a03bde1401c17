// The AscendC basic API (dav-2201) for the host: kernels include this file, as they include CANN's of the same name on the device.
#pragma once

#include "emulation/types.h"
#include "emulation/core.h"
#include "emulation/tensor.h"
#include "emulation/sync.h"
#include "emulation/copy.h"
#include "emulation/vector.h"
#include "emulation/sort.h"
#include "emulation/cube.h"
#include "emulation/kernel.h"
