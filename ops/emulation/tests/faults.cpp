// Planted faults: each case is a small kernel that breaks one rule when `planted`, and its honest twin otherwise. The line that
// the fault must name carries the comment "caught" (with the case's name where it is shared).
//
//   faults --list             names and rules
//   faults --trace NAME FILE                       trace of the honest twin
//   faults NAME|all planted|honest [seed]
//   faults pipe_order|core_order planted|honest    number of different results over 100 seeds, planted ones without hazard
//   faults warnings planted|honest
//   faults rounding planted|honest                 wrong roundings to half and to bfloat16
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "emulation/launch.h"

using namespace AscendC;

namespace {

constexpr uint32_t kCount = 4096;       // floats of every GM argument
constexpr uint32_t kTile = 256;         // floats of a tile: 1 KB

struct Gms {
    GlobalTensor<float> in, out, work;
    GlobalTensor<half> halves;          // the same bytes as `in`
    GM_ADDR raw;                        // of out
};

using Kernel = std::function<void(bool planted, Gms gm)>;

struct Case {
    const char* name;
    int rule;
    KernelMetaType type;
    Kernel kernel;
    uint32_t blocks = 1;
    bool allUb = false;                 // built with --cce-disable-asc-reserved-ubuf
};

constexpr KernelMetaType kVector = KERNEL_TYPE_AIV_ONLY, kVectorMix = KERNEL_TYPE_MIX_AIV_1_0, kCube = KERNEL_TYPE_AIC_ONLY,
                         kMix = KERNEL_TYPE_MIX_AIC_1_2;

template <HardEvent event>
void Order(int32_t id = 0) {
    SetFlag<event>(id);
    WaitFlag<event>(id);
}

// One tile of UB, filled with ones and free of hazards.
struct Tile {
    TPipe pipe;
    TBuf<TPosition::VECCALC> buffer;
    LocalTensor<float> ub;
    explicit Tile(uint32_t tiles = 1) {
        pipe.InitBuffer(buffer, tiles * kTile * sizeof(float));
        ub = buffer.Get<float>();
        Duplicate(ub, 1.0f, tiles * kTile);
        PipeBarrier<PIPE_ALL>();
    }
};

// out = A B^T of one 16 x 16 fractal each, with the flags that order it.
struct Product {
    TPipe pipe;
    TBuf<TPosition::A1> l1Buffer;
    TBuf<TPosition::A2> l0aBuffer;
    TBuf<TPosition::B2> l0bBuffer;
    TBuf<TPosition::CO1> l0cBuffer;
    LocalTensor<half> l1, left, right;
    LocalTensor<float> product;
    LoadData2DParams load;
    MmadParams mmad;
    Product() {
        pipe.InitBuffer(l1Buffer, 1024);
        pipe.InitBuffer(l0aBuffer, 2048);
        pipe.InitBuffer(l0bBuffer, 2048);
        pipe.InitBuffer(l0cBuffer, 1024);
        l1 = l1Buffer.Get<half>();
        left = l0aBuffer.Get<half>();
        right = l0bBuffer.Get<half>();
        product = l0cBuffer.Get<float>();
        load.repeatTimes = 1;
        load.srcStride = 1;
        mmad.m = mmad.n = mmad.k = 16;
    }
    void CopyRows(const GlobalTensor<half>& gm, uint16_t rows = 16) {
        DataCopy(l1, gm, Nd2NzParams(1, rows, 16, 0, 16, 16, 1, 1));
    }
    void LoadAndMultiply() {
        Order<HardEvent::MTE2_MTE1>();
        LoadData(left, l1, load);
        LoadData(right, l1, load);
        Order<HardEvent::MTE1_M>();
        Mmad(product, left, right, mmad);  // caught: product_of_missing_rows
    }
    void Store(const GlobalTensor<float>& gm) {
        FixpipeParamsV220 params;
        params.nSize = params.mSize = params.srcStride = params.dstStride = 16;
        params.ndNum = 1;
        Fixpipe<float, float, CFG_ROW_MAJOR>(gm, product, params);  // caught: fixpipe_before_product
    }
};

const std::vector<Case> kCases = {
    // ---- 1 capacity ----
    {"ub_capacity", 1, kVector, [](bool planted, Gms) {
        TPipe pipe;
        TBuf<TPosition::VECCALC> buffer;
        pipe.InitBuffer(buffer, planted ? 188160 + 32 : 188160);  // caught
    }},
    {"whole_ub_capacity", 1, kVector, [](bool planted, Gms) {
        TPipe pipe;
        TBuf<TPosition::VECCALC> buffer;
        pipe.InitBuffer(buffer, planted ? 196608 - 224 : 196608 - 256);  // caught
    }, 1, true},
    {"l1_capacity", 1, kCube, [](bool planted, Gms) {
        TPipe pipe;
        TBuf<TPosition::A1> buffer;
        pipe.InitBuffer(buffer, planted ? 524288 : 524288 - 256);  // caught
    }},
    {"l0c_capacity", 1, kCube, [](bool planted, Gms) {
        TPipe pipe;
        TQue<TPosition::CO1, 1> queue;
        pipe.InitBuffer(queue, planted ? 3 : 2, 65536);  // caught
    }},
    {"sixty_five_buffers", 1, kVector, [](bool planted, Gms) {
        TPipe pipe;
        TQue<TPosition::VECIN, 1> queue;
        TBuf<TPosition::VECCALC> buffer;
        pipe.InitBuffer(queue, 63, 64);
        pipe.InitBuffer(buffer, 64);
        if (planted) pipe.InitBuffer(buffer, 64);  // caught
    }},
    {"select_scratch", 1, kVector, [](bool planted, Gms) {
        TPipe pipe;
        TBuf<TPosition::VECCALC> buffer;
        pipe.InitBuffer(buffer, 196608 - 256);
        LocalTensor<float> value = buffer.Get<float>(64);
        LocalTensor<uint8_t> bits = buffer.GetWithOffset<uint8_t>(32, 1024);
        Duplicate(value, 1.0f, 64);
        PipeBarrier<PIPE_V>();
        CompareScalar(bits, value, 0.0f, CMPMODE::GT, 64);
        PipeBarrier<PIPE_V>();
        if (planted) Select(value, bits, value, 0.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, 64);  // caught
        else Select(value, bits, value, value, SELMODE::VSEL_CMPMASK_SPR, 64);
    }, 1, true},

    // ---- 2 alignment ----
    {"copy_address", 2, kVector, [](bool planted, Gms gm) {
        Tile tile;
        DataCopy(tile.ub[planted ? 4 : 8], gm.in, 64);  // caught
    }},
    {"pad_address", 2, kVector, [](bool planted, Gms gm) {
        Tile tile;
        DataCopyPad(gm.out, tile.ub[planted ? 1 : 8], DataCopyExtParams{1, 20, 0, 0, 0});  // caught
    }},
    {"vector_address", 2, kVector, [](bool planted, Gms) {
        Tile tile;
        Adds(tile.ub[planted ? 2 : 8], tile.ub[128], 1.0f, 64);  // caught
    }},

    {"l0_buffer_after_a_short_one", 2, kCube, [](bool planted, Gms gm) {
        TPipe pipe;
        TBuf<TPosition::A1> l1;
        TBuf<TPosition::A2> first, second;
        pipe.InitBuffer(l1, 512);
        pipe.InitBuffer(first, planted ? 32 : 512);
        pipe.InitBuffer(second, 512);
        DataCopy(l1.Get<half>(), gm.halves, 256);
        Order<HardEvent::MTE2_MTE1>();
        LoadData2DParams params;
        params.repeatTimes = 1;
        LoadData(second.Get<half>(), l1.Get<half>(), params);  // caught
    }},
    {"l0_address", 2, kCube, [](bool planted, Gms gm) {
        Product step;
        step.CopyRows(gm.halves);
        Order<HardEvent::MTE2_MTE1>();
        LoadData(step.left[planted ? 128 : 256], step.l1, step.load);  // caught
    }},

    // ---- 3 queues ----
    {"alloc_beyond_buffers", 3, kVector, [](bool planted, Gms) {
        TPipe pipe;
        TQue<TPosition::VECIN, 1> queue;
        pipe.InitBuffer(queue, 2, 1024);
        LocalTensor<float> a = queue.AllocTensor<float>(), b = queue.AllocTensor<float>();
        if (planted) queue.AllocTensor<float>();  // caught
        queue.FreeTensor(a);
        queue.FreeTensor(b);
    }},
    {"enqueue_beyond_depth", 3, kVector, [](bool planted, Gms) {
        TPipe pipe;
        TQue<TPosition::VECIN, 1> queue;
        pipe.InitBuffer(queue, 2, 1024);
        LocalTensor<float> a = queue.AllocTensor<float>(), b = queue.AllocTensor<float>();
        queue.EnQue(a);
        if (!planted) a = queue.DeQue<float>();
        queue.EnQue(b);  // caught
        b = queue.DeQue<float>();
        queue.FreeTensor(a);
        queue.FreeTensor(b);
    }},
    {"double_free", 3, kVector, [](bool planted, Gms) {
        TPipe pipe;
        TQue<TPosition::VECIN, 1> queue;
        pipe.InitBuffer(queue, 1, 1024);
        LocalTensor<float> a = queue.AllocTensor<float>();
        queue.FreeTensor(a);
        if (planted) queue.FreeTensor(a);  // caught
    }},
    {"leak_at_exit", 3, kVector, [](bool planted, Gms) {
        TPipe pipe;
        TQue<TPosition::VECIN, 1> queue;
        pipe.InitBuffer(queue, 1, 1024);  // caught
        LocalTensor<float> a = queue.AllocTensor<float>();
        if (!planted) queue.FreeTensor(a);
    }},
    {"queued_at_exit", 3, kVector, [](bool planted, Gms) {
        TPipe pipe;
        TQue<TPosition::VECOUT, 1> queue;
        pipe.InitBuffer(queue, 1, 1024);  // caught
        queue.EnQue(queue.AllocTensor<float>());
        if (!planted) queue.FreeTensor(queue.DeQue<float>());
    }},
    {"wrong_queue", 3, kVector, [](bool planted, Gms) {
        TPipe pipe;
        TQue<TPosition::VECIN, 1> in;
        TQue<TPosition::VECOUT, 1> out;
        pipe.InitBuffer(in, 1, 1024);
        pipe.InitBuffer(out, 1, 1024);
        LocalTensor<float> a = in.AllocTensor<float>();
        if (planted) out.EnQue(a);  // caught
        in.FreeTensor(a);
    }},
    {"dequeue_empty", 3, kVector, [](bool planted, Gms) {
        TPipe pipe;
        TQue<TPosition::VECIN, 1> queue;
        pipe.InitBuffer(queue, 1, 1024);
        LocalTensor<float> a = queue.AllocTensor<float>();
        if (!planted) queue.EnQue(a);
        queue.FreeTensor(queue.DeQue<float>());  // caught
    }},
    {"use_after_free", 3, kVector, [](bool planted, Gms gm) {
        TPipe pipe;
        TQue<TPosition::VECIN, 1> queue;
        pipe.InitBuffer(queue, 1, 1024);
        LocalTensor<float> a = queue.AllocTensor<float>();
        if (planted) queue.FreeTensor(a);
        DataCopy(a, gm.in, kTile);  // caught
        queue.FreeTensor(a);
    }},
    {"stale_free", 3, kVector, [](bool planted, Gms) {
        TPipe pipe;
        TQue<TPosition::VECIN, 1> queue;
        pipe.InitBuffer(queue, 1, 1024);
        LocalTensor<float> a = queue.AllocTensor<float>();
        queue.FreeTensor(a);
        LocalTensor<float> b = queue.AllocTensor<float>();
        queue.FreeTensor(planted ? a : b);  // caught
    }},
    {"stale_tensor", 3, kVector, [](bool planted, Gms gm) {
        TPipe pipe;
        TQue<TPosition::VECIN, 1> queue;
        pipe.InitBuffer(queue, 1, 1024);
        LocalTensor<float> a = queue.AllocTensor<float>();
        queue.FreeTensor(a);
        LocalTensor<float> b = queue.AllocTensor<float>();
        DataCopy(planted ? a : b, gm.in, kTile);  // caught
        queue.FreeTensor(b);
    }},
    {"unit_on_wrong_core", 3, kMix, [](bool planted, Gms) {
        TPipe pipe;
        TBuf<TPosition::VECCALC> buffer;
        if (planted || ASCEND_IS_AIV) pipe.InitBuffer(buffer, 1024);  // caught
    }},
    {"fractals_to_ub", 3, kVector, [](bool planted, Gms gm) {
        Tile tile;
        Nd2NzParams params;
        params.ndNum = 1;
        params.nValue = 16;
        params.dValue = params.srcDValue = 8;
        params.dstNzC0Stride = 16;
        params.dstNzNStride = 1;
        params.dstNzMatrixStride = 1;
        if (planted) DataCopy(tile.ub, gm.in, params);  // caught
    }},

    // ---- 4 bounds ----
    {"gm_read_past_end", 4, kVector, [](bool planted, Gms gm) {
        Tile tile;
        DataCopy(tile.ub, gm.in[kCount - kTile + (planted ? 1 : 0)], kTile);  // caught
    }},
    {"gm_stride_past_end", 4, kVector, [](bool planted, Gms gm) {
        Tile tile;
        const DataCopyParams params(4, 1, planted ? 170 : 169, 0);     // the last row starts at 3 * 170 * 32 bytes
        DataCopy(tile.ub, gm.in[planted ? 8 : 0], params);  // caught
    }},
    {"ub_write_past_buffer", 4, kVector, [](bool planted, Gms gm) {
        TPipe pipe;
        TBuf<TPosition::VECCALC> first, second;
        pipe.InitBuffer(first, 1024);
        pipe.InitBuffer(second, 1024);
        DataCopy(first.Get<float>(), gm.in, planted ? 264 : 256);  // caught
    }},
    {"negative_offset", 4, kVector, [](bool planted, Gms gm) {
        Tile tile;
        DataCopy(tile.ub, planted ? gm.in[static_cast<uint64_t>(-8)] : gm.in, 8);  // caught
    }},
    {"input_written", 4, kVector, [](bool planted, Gms gm) {
        Tile tile;
        DataCopy(planted ? gm.in : gm.out, tile.ub, kTile);  // caught
    }},
    {"red_zone", 4, kVector, [](bool planted, Gms gm) {
        if (planted) reinterpret_cast<float*>(gm.raw)[kCount] = 1.0f;  // seen when the launch ends
    }},
    {"empty_tensor", 4, kVector, [](bool planted, Gms gm) {
        Tile tile;
        LocalTensor<float> none;
        DataCopy(planted ? none : tile.ub, gm.in, 8);  // caught
    }},

    // ---- 5 parameters ----
    {"block_count", 5, kVector, [](bool planted, Gms gm) {
        TPipe pipe;
        TBuf<TPosition::VECCALC> buffer;
        pipe.InitBuffer(buffer, 4096 * 32);
        DataCopyParams params;
        params.blockCount = planted ? 4096 : 511;
        params.blockLen = 1;
        DataCopy(buffer.Get<float>(), gm.in, params);  // caught
    }},
    {"field_wraps", 5, kVector, [](bool planted, Gms gm) {
        Tile tile;
        DataCopyParams params;
        params.blockCount = 1;
        params.blockLen = planted ? 65536 + 2 : 2;
        DataCopy(tile.ub, gm.in, params);  // caught
    }},
    {"ragged_count", 5, kVector, [](bool planted, Gms gm) {
        Tile tile;
        DataCopy(tile.ub, gm.in, planted ? 63 : 64);  // caught
    }},
    {"repeat_times", 5, kVector, [](bool planted, Gms) {
        Tile tile(64);
        Adds(tile.ub, tile.ub, 1.0f, 64, planted ? 256 : 255, UnaryRepeatParams{1, 1, 8, 8});  // caught
    }},
    {"product_depth", 5, kCube, [](bool planted, Gms gm) {
        Product step;
        step.CopyRows(gm.halves);
        step.LoadAndMultiply();
        step.mmad.k = planted ? 4096 : 16;
        PipeBarrier<PIPE_M>();
        Mmad(step.product, step.left, step.right, step.mmad);  // caught
    }},
    {"vector_on_cube_core", 5, kMix, [](bool planted, Gms) {
        if ASCEND_IS_AIV {
            Tile tile;
        }
        if (planted && GetBlockIdx() == 0 && ASCEND_IS_AIC) emulation::Issue(PIPE_V, "Add", {}, {}, {}, {}, [] {});  // caught
    }},
    {"task_type", 5, kVector, [](bool planted, Gms) {
        KERNEL_TASK_TYPE_DEFAULT(planted ? KERNEL_TYPE_MIX_AIC_1_2 : KERNEL_TYPE_AIV_ONLY);  // caught
    }},
    {"fixpipe_of_ragged_columns", 5, kCube, [](bool planted, Gms gm) {
        Product step;
        step.CopyRows(gm.halves);
        step.LoadAndMultiply();
        Order<HardEvent::M_FIX>();
        FixpipeParamsV220 params;
        params.nSize = planted ? 8 : 16;
        params.mSize = params.srcStride = params.dstStride = 16;
        Fixpipe<float, float, CFG_ROW_MAJOR>(gm.out, step.product, params);  // caught
    }},
    {"barrier_of_the_scalar_pipe", 5, kVector, [](bool planted, Gms) {
        if (planted) PipeBarrier<PIPE_S>();  // caught
        else PipeBarrier<PIPE_ALL>();
    }},
    {"compare_scalar_in_count_mode", 5, kVector, [](bool planted, Gms) {
        Tile tile(2);
        SetMaskCount();
        SetVectorMask<float, MaskMode::COUNTER>(100);
        if (!planted) SetMaskNorm();
        CompareScalar(tile.ub[kTile].ReinterpretCast<uint8_t>(), tile.ub, 0.0f, CMPMODE::GT, 64);  // caught
        SetMaskNorm();
    }},
    {"compare_in_count_mode", 5, kVector, [](bool planted, Gms) {
        Tile tile(2);
        SetMaskCount();
        if (!planted) SetMaskNorm();
        Compare(tile.ub[kTile].ReinterpretCast<uint8_t>(), tile.ub, tile.ub, CMPMODE::GE, 64);  // caught
        SetMaskNorm();
    }},
    {"merge_that_stops_at_an_empty_list", 5, kVector, [](bool planted, Gms) {
        Tile tile(2);
        MrgSort4Info info;
        info.elementLengths[0] = 32;
        info.validBit = 3;
        info.ifExhaustedSuspension = planted;
        MrgSort(tile.ub[kTile], MrgSortSrcList<float>(tile.ub, tile.ub, tile.ub, tile.ub), info);  // caught
    }},

    // ---- 6 hazards ----
    {"raw_load_to_vector", 6, kVector, [](bool planted, Gms gm) {
        Tile tile(2);
        DataCopy(tile.ub, gm.in, kTile);
        if (!planted) Order<HardEvent::MTE2_V>();
        Adds(tile.ub[kTile], tile.ub, 1.0f, kTile);  // caught
    }},
    {"war_vector_to_load", 6, kVector, [](bool planted, Gms gm) {
        Tile tile(2);
        Adds(tile.ub[kTile], tile.ub, 1.0f, kTile);
        if (!planted) Order<HardEvent::V_MTE2>();
        DataCopy(tile.ub, gm.in, kTile);  // caught
    }},
    {"waw_load_to_load", 6, kVector, [](bool planted, Gms gm) {
        Tile tile;
        DataCopy(tile.ub, gm.in, kTile);
        if (!planted) PipeBarrier<PIPE_MTE2>();
        DataCopy(tile.ub[128], gm.in, 128);  // caught
    }},
    {"raw_vector_to_vector", 6, kVector, [](bool planted, Gms) {
        Tile tile(3);
        Adds(tile.ub[kTile], tile.ub, 1.0f, kTile);
        if (!planted) PipeBarrier<PIPE_V>();
        Adds(tile.ub[2 * kTile], tile.ub[kTile], 1.0f, kTile);  // caught
    }},
    {"war_vector_to_vector", 6, kVector, [](bool planted, Gms) {
        Tile tile(2);
        Adds(tile.ub[kTile], tile.ub, 1.0f, kTile);
        if (!planted) PipeBarrier<PIPE_V>();
        Duplicate(tile.ub, 0.0f, kTile);  // caught
    }},
    {"one_byte_of_overlap", 6, kVector, [](bool planted, Gms) {
        Tile tile(3);
        Adds(tile.ub[kTile], tile.ub, 1.0f, 64);
        Adds(tile.ub[2 * kTile], tile.ub[kTile + (planted ? 56 : 64)], 1.0f, 64);  // caught
    }},
    {"store_before_vector", 6, kVector, [](bool planted, Gms gm) {
        Tile tile;
        Adds(tile.ub, tile.ub, 1.0f, kTile);
        if (!planted) Order<HardEvent::V_MTE3>();
        DataCopy(gm.out, tile.ub, kTile);  // caught
    }},
    {"flag_of_another_pair", 6, kVector, [](bool planted, Gms gm) {
        Tile tile(2);
        DataCopy(tile.ub, gm.in, kTile);
        if (planted) Order<HardEvent::MTE2_MTE3>();
        else Order<HardEvent::MTE2_V>();
        Adds(tile.ub[kTile], tile.ub, 1.0f, kTile);  // caught
    }},
    {"flag_set_too_early", 6, kVector, [](bool planted, Gms gm) {
        Tile tile(2);
        if (planted) SetFlag<HardEvent::MTE2_V>(0);
        DataCopy(tile.ub, gm.in, kTile);
        if (!planted) SetFlag<HardEvent::MTE2_V>(0);
        WaitFlag<HardEvent::MTE2_V>(0);
        Adds(tile.ub[kTile], tile.ub, 1.0f, kTile);  // caught
    }},
    {"scalar_before_vector", 6, kVector, [](bool planted, Gms) {
        Tile tile;
        Adds(tile.ub, tile.ub, 1.0f, 64);
        if (!planted) Order<HardEvent::V_S>();
        tile.ub.GetValue(3);  // caught
    }},
    {"vector_before_scalar", 6, kVector, [](bool planted, Gms) {
        Tile tile;
        tile.ub.SetValue(3, 2.0f);
        if (!planted) Order<HardEvent::S_V>();
        Adds(tile.ub, tile.ub, 1.0f, 64);  // caught
    }},
    {"free_before_use", 6, kVector, [](bool planted, Gms gm) {  // FreeTensor orders the queue's consumer, not another pipe
        TPipe pipe;
        TQue<TPosition::VECIN, 1> queue;
        pipe.InitBuffer(queue, 1, 1024);
        for (int i = 0; i < 2; ++i) {
            LocalTensor<float> a = queue.AllocTensor<float>();
            DataCopy(a, gm.in, kTile);  // caught
            queue.EnQue(a);
            a = queue.DeQue<float>();
            Order<HardEvent::MTE2_MTE3>();
            DataCopy(gm.out[i * kTile], a, kTile);
            if (!planted) Order<HardEvent::MTE3_V>();
            queue.FreeTensor(a);
        }
    }},
    {"fractals_before_copy", 6, kCube, [](bool planted, Gms gm) {
        Product step;
        step.CopyRows(gm.halves);
        if (!planted) Order<HardEvent::MTE2_MTE1>();
        LoadData(step.left, step.l1, step.load);  // caught
    }},
    {"accumulate_without_barrier", 6, kCube, [](bool planted, Gms gm) {
        Product step;
        step.CopyRows(gm.halves);
        step.LoadAndMultiply();
        step.mmad.cmatrixInitVal = false;
        if (!planted) PipeBarrier<PIPE_M>();
        Mmad(step.product, step.left, step.right, step.mmad);  // caught
    }},
    {"operands_overwritten", 6, kCube, [](bool planted, Gms gm) {
        Product step;
        step.CopyRows(gm.halves);
        step.LoadAndMultiply();
        if (!planted) Order<HardEvent::M_MTE1>(3);
        LoadData(step.left, step.l1, step.load);  // caught
    }},
    {"fixpipe_before_product", 6, kCube, [](bool planted, Gms gm) {
        Product step;
        step.CopyRows(gm.halves);
        step.LoadAndMultiply();
        if (!planted) Order<HardEvent::M_FIX>();
        step.Store(gm.out);
    }},
    {"gm_store_then_load", 6, kVector, [](bool planted, Gms gm) {
        Tile tile(2);
        DataCopy(gm.work, tile.ub, kTile);
        if (!planted) Order<HardEvent::MTE3_MTE2>();
        DataCopy(tile.ub[kTile], gm.work, kTile);  // caught
    }},
    {"gm_between_cores", 6, kMix, [](bool planted, Gms gm) {
        if ASCEND_IS_AIC {
            if (!planted) CrossCoreWaitFlag(0);
            TPipe pipe;
            TBuf<TPosition::A1> buffer;
            pipe.InitBuffer(buffer, 1024);
            if (planted) CrossCoreWaitFlag(1);
            DataCopy(buffer.Get<float>(), gm.work[GetBlockIdx() * kTile], kTile);  // caught
            if (!planted) CrossCoreWaitFlag(1);
        } else {
            Tile tile;
            CrossCoreSetFlag<2, PIPE_MTE3>(1);
            if (GetSubBlockIdx() == 0) DataCopy(gm.work[GetBlockIdx() / 2 * kTile], tile.ub, kTile);
            if (!planted) CrossCoreSetFlag<2, PIPE_MTE3>(0);
        }
    }, 2},
    {"cross_flag_on_wrong_pipe", 6, kMix, [](bool planted, Gms gm) {
        if ASCEND_IS_AIC {
            TPipe pipe;
            TBuf<TPosition::A1> buffer;
            pipe.InitBuffer(buffer, 1024);
            CrossCoreWaitFlag(0);
            DataCopy(buffer.Get<float>(), gm.work[GetBlockIdx() * kTile], kTile);  // caught
        } else {
            Tile tile;
            if (GetSubBlockIdx() == 0) DataCopy(gm.work[GetBlockIdx() / 2 * kTile], tile.ub, kTile);
            if (planted) CrossCoreSetFlag<2, PIPE_V>(0);
            else CrossCoreSetFlag<2, PIPE_MTE3>(0);
        }
    }, 2},
    {"gm_written_by_two_cores", 6, kVector, [](bool planted, Gms gm) {
        Tile tile;
        DataCopy(gm.out[GetBlockIdx() * (planted ? kTile - 8 : kTile)], tile.ub, kTile);  // caught
    }, 2},
    {"sync_all_forgotten", 6, kVectorMix, [](bool planted, Gms gm) {
        Tile tile;
        DataCopy(gm.work[GetBlockIdx() * kTile], tile.ub, kTile);
        if (!planted) SyncAll();
        else PipeBarrier<PIPE_ALL>();
        if (GetBlockIdx() == 1) DataCopy(tile.ub, gm.work, kTile);  // caught
        if (!planted) SyncAll();
    }, 2},
    {"scalar_gm_not_cleaned", 6, kVector, [](bool planted, Gms gm) {
        gm.out.SetValue(GetBlockIdx() * 16, 1.0f);  // caught
        if (!planted)
            DataCacheCleanAndInvalid<float, CacheLine::SINGLE_CACHE_LINE, DcciDst::CACHELINE_OUT>(gm.out[GetBlockIdx() * 16]);
    }, 2},
    {"line_shared_by_two_cores", 6, kVector, [](bool planted, Gms gm) {
        const uint32_t at = GetBlockIdx() * (planted ? 8 : 16);
        gm.out.SetValue(at, 1.0f);  // caught
        DataCacheCleanAndInvalid<float, CacheLine::SINGLE_CACHE_LINE, DcciDst::CACHELINE_OUT>(gm.out[at]);
    }, 2},
    {"write_back_undoes_a_store", 6, kVector, [](bool planted, Gms gm) {
        Tile tile;
        gm.out.SetValue(0, 1.0f);
        DataCopy(gm.out[planted ? 8 : 16], tile.ub, 8);
        Order<HardEvent::MTE3_S>();
        DataCacheCleanAndInvalid<float, CacheLine::ENTIRE_DATA_CACHE, DcciDst::CACHELINE_OUT>(gm.out);  // caught
    }},
    {"stale_cache_line", 6, kVector, [](bool planted, Gms gm) {
        Tile tile;
        const uint32_t at = GetBlockIdx() * kTile;
        DataCopy(gm.work[at], tile.ub, kTile);
        Order<HardEvent::MTE3_S>();
        gm.work.GetValue(at);
        Order<HardEvent::S_V>();
        Duplicate(tile.ub, 2.0f, kTile);
        PipeBarrier<PIPE_ALL>();
        DataCopy(gm.work[at], tile.ub, kTile);
        Order<HardEvent::MTE3_S>();
        if (!planted) DataCacheCleanAndInvalid<float, CacheLine::SINGLE_CACHE_LINE, DcciDst::CACHELINE_OUT>(gm.work[at]);
        gm.work.GetValue(at);  // caught
    }, 2},

    // ---- 7 flags ----
    {"flag_left_at_exit", 7, kVector, [](bool planted, Gms) {
        SetFlag<HardEvent::MTE2_V>(0);  // caught
        if (!planted) WaitFlag<HardEvent::MTE2_V>(0);
    }},
    {"flag_set_twice", 7, kVector, [](bool planted, Gms) {
        SetFlag<HardEvent::MTE2_V>(0);
        if (!planted) WaitFlag<HardEvent::MTE2_V>(0);
        SetFlag<HardEvent::MTE2_V>(0);  // caught
        WaitFlag<HardEvent::MTE2_V>(0);
    }},
    {"wait_without_set", 7, kVector, [](bool planted, Gms) {
        if (!planted) SetFlag<HardEvent::V_MTE3>(1);
        WaitFlag<HardEvent::V_MTE3>(1);  // caught
    }},
    {"event_beyond_seven", 7, kVector, [](bool planted, Gms) {
        SetFlag<HardEvent::V_MTE3>(planted ? 8 : 7);  // caught
        WaitFlag<HardEvent::V_MTE3>(7);
    }},
    {"event_of_a_queue", 7, kVector, [](bool planted, Gms) {
        TPipe pipe;
        TQue<TPosition::VECIN, 1> queue;
        pipe.InitBuffer(queue, 1, 1024);
        queue.EnQue(queue.AllocTensor<float>());  // holds MTE2_V 0
        const int32_t id = pipe.AllocEventID<HardEvent::MTE2_V>();
        if (!planted) SetFlag<HardEvent::MTE2_V>(id);
        WaitFlag<HardEvent::MTE2_V>(planted ? 0 : id);  // caught
        pipe.ReleaseEventID<HardEvent::MTE2_V>(id);
        queue.FreeTensor(queue.DeQue<float>());
    }},
    {"events_run_out", 7, kVector, [](bool planted, Gms) {
        TPipe pipe;
        for (int i = 0; i < (planted ? 9 : 8); ++i) pipe.AllocEventID<HardEvent::MTE2_V>();  // caught
    }},
    {"event_of_the_pipe", 7, kCube, [](bool planted, Gms) {  // TPipe keeps M_MTE1 0, 1 and 2 on the cube core
        TPipe pipe;
        const int32_t id = planted ? 1 : 3;
        SetFlag<HardEvent::M_MTE1>(id);  // caught
        WaitFlag<HardEvent::M_MTE1>(id);
    }},
    {"cube_pipe_on_vector_core", 7, kVector, [](bool planted, Gms) {
        if (planted) PipeBarrier<PIPE_M>();  // caught
        else PipeBarrier<PIPE_V>();
    }},
    {"cross_id_of_sync_all", 7, kMix, [](bool planted, Gms) {
        if ASCEND_IS_AIC CrossCoreSetFlag<2, PIPE_FIX>(planted ? 12 : 3);  // caught
        else CrossCoreWaitFlag(3);
    }},
    {"one_cross_id_in_two_modes", 7, kMix, [](bool planted, Gms) {
        if ASCEND_IS_AIC {
            CrossCoreWaitFlag(4);
            if (!planted) CrossCoreWaitFlag(3);
            CrossCoreSetFlag<0, PIPE_FIX>(planted ? 3 : 5);  // caught
            CrossCoreWaitFlag(planted ? 3 : 5);
        } else {
            CrossCoreSetFlag<2, PIPE_V>(3);
            CrossCoreSetFlag<2, PIPE_V>(4);
        }
    }, 2},
    {"cross_flag_left", 7, kMix, [](bool planted, Gms) {
        if ASCEND_IS_AIC CrossCoreSetFlag<2, PIPE_FIX>(3);  // caught
        else if (!planted || GetSubBlockIdx() == 0) CrossCoreWaitFlag(3);
    }},
    {"cross_counter", 7, kMix, [](bool planted, Gms) {
        const int sets = planted ? 16 : 15;
        if ASCEND_IS_AIC {
            for (int i = 0; i < sets; ++i) CrossCoreSetFlag<2, PIPE_FIX>(3);  // caught
            CrossCoreWaitFlag(4);
        } else {
            CrossCoreSetFlag<2, PIPE_V>(4);
            for (int i = 0; i < sets; ++i) CrossCoreWaitFlag(3);
        }
    }, 2},
    {"cross_flag_on_a_missing_pipe", 7, kMix, [](bool planted, Gms) {
        if ASCEND_IS_AIC {
            CrossCoreWaitFlag(3);
        } else if (planted) {
            CrossCoreSetFlag<2, PIPE_FIX>(3);  // caught
        } else {
            CrossCoreSetFlag<2, PIPE_MTE3>(3);
        }
    }},
    {"sync_all_in_a_vector_kernel", 7, kVector, [](bool planted, Gms) {
        if (planted) SyncAll();  // caught
    }},
    {"mode_two_without_cube", 7, kVectorMix, [](bool planted, Gms) {
        if (planted) CrossCoreSetFlag<2, PIPE_V>(3);  // caught
        else CrossCoreSetFlag<0, PIPE_V>(3);
        CrossCoreWaitFlag(3);
    }, 2},

    // ---- 8 dead-locks ----
    {"wait_for_nobody", 8, kMix, [](bool planted, Gms) {
        if ASCEND_IS_AIC {
            if (!planted) CrossCoreSetFlag<2, PIPE_FIX>(5);
        } else {
            CrossCoreWaitFlag(5);  // caught
        }
    }, 2},
    {"one_of_two_vector_cores_sets", 8, kMix, [](bool planted, Gms) {
        if ASCEND_IS_AIC CrossCoreWaitFlag(5);  // caught
        else if (!planted || GetSubBlockIdx() == 0) CrossCoreSetFlag<2, PIPE_V>(5);
    }, 2},
    {"each_waits_for_the_other", 8, kMix, [](bool planted, Gms) {
        if ASCEND_IS_AIC {
            if (!planted) CrossCoreSetFlag<2, PIPE_FIX>(5);
            CrossCoreWaitFlag(6);  // caught
            if (planted) CrossCoreSetFlag<2, PIPE_FIX>(5);
        } else {
            CrossCoreWaitFlag(5);
            CrossCoreSetFlag<2, PIPE_V>(6);
        }
    }, 2},
    {"core_skips_sync_all", 8, kVectorMix, [](bool planted, Gms) {
        if (!planted || GetBlockIdx() != 1) SyncAll();  // caught
    }, 2},

    // ---- 9 never written ----
    {"store_never_written", 9, kVector, [](bool planted, Gms gm) {
        TPipe pipe;
        TBuf<TPosition::VECCALC> buffer;
        pipe.InitBuffer(buffer, 1024);
        LocalTensor<float> ub = buffer.Get<float>();
        Duplicate(ub, 1.0f, planted ? 248 : 256);
        Order<HardEvent::V_MTE3>();
        DataCopy(gm.out, ub, 256);  // caught
    }},
    {"vector_reads_pad_tail", 9, kVector, [](bool planted, Gms gm) {
        TPipe pipe;
        TBuf<TPosition::VECCALC> buffer;
        pipe.InitBuffer(buffer, 1024);
        LocalTensor<float> ub = buffer.Get<float>();
        const DataCopyPadExtParams<float> pad(!planted, 0, 3, 0.0f);
        DataCopyPad(ub, gm.in, DataCopyExtParams{1, 20, 0, 0, 0}, pad);
        Order<HardEvent::MTE2_V>();
        Adds(ub, ub, 1.0f, 8);  // caught
    }},
    {"old_contents_of_a_queue", 9, kVector, [](bool planted, Gms gm) {
        TPipe pipe;
        TQue<TPosition::VECIN, 1> queue;
        pipe.InitBuffer(queue, 1, 1024);
        for (int i = 0; i < 2; ++i) {
            LocalTensor<float> a = queue.AllocTensor<float>();
            if (i == 0 || !planted) DataCopy(a, gm.in, kTile);
            queue.EnQue(a);
            a = queue.DeQue<float>();
            Adds(a, a, 1.0f, kTile);  // caught
            queue.FreeTensor(a);
        }
    }},
    {"scalar_reads_never_written", 9, kVector, [](bool planted, Gms) {
        TPipe pipe;
        TBuf<TPosition::VECCALC> buffer;
        pipe.InitBuffer(buffer, 1024);
        LocalTensor<int32_t> ub = buffer.Get<int32_t>();
        ub.SetValue(0, 7);
        ub.GetValue(planted ? 1 : 0);  // caught
    }},
    {"product_of_missing_rows", 9, kCube, [](bool planted, Gms gm) {
        Product step;
        step.CopyRows(gm.halves, planted ? 15 : 16);
        step.LoadAndMultiply();
    }},
    {"workspace_never_written", 9, kVector, [](bool planted, Gms gm) {
        Tile tile;
        if (!planted) {
            DataCopy(gm.work[GetBlockIdx() * kTile], tile.ub, kTile);
            PipeBarrier<PIPE_ALL>();
        }
        DataCopy(tile.ub, gm.work[GetBlockIdx() * kTile], kTile);  // caught
    }, 2},
};

// ---- what a kernel's attributes say: entries, as the device compiler takes them ----

__global__ __aicore__ void Plain(GM_ADDR, GM_ADDR, GM_ADDR) {}
__global__ __mix__(1, 2) void Mixed(GM_ADDR, GM_ADDR, GM_ADDR) {}
__global__ __mix__(0, 1) void Alone(GM_ADDR, GM_ADDR, GM_ADDR) {
    SyncAll();  // caught: sync_all_of_blocks_that_start_alone
}
__schedmode__(1) __global__ __mix__(0, 1) void Together(GM_ADDR, GM_ADDR, GM_ADDR) {
    SyncAll();  // caught: sync_all_of_more_blocks_than_vector_cores
}
__global__ __mix__(1, 2) __schedmode__(1) void MixedTogether(GM_ADDR, GM_ADDR, GM_ADDR) {
    if ASCEND_IS_AIV SyncAll();  // caught: sync_all_of_more_blocks_than_cores
}
__global__ __mix__(1, 1) void OneToOne(GM_ADDR, GM_ADDR, GM_ADDR) {}
__global__ __mix__(0, 1) void FlagsAlone(GM_ADDR, GM_ADDR, GM_ADDR) {
    CrossCoreSetFlag<0, PIPE_MTE3>(0);  // caught: flags_of_blocks_that_start_alone
    CrossCoreWaitFlag(0);
}
__schedmode__(1) __global__ __mix__(0, 1) void FlagsTogether(GM_ADDR, GM_ADDR, GM_ADDR) {
    CrossCoreSetFlag<0, PIPE_MTE3>(0);  // caught: flags_of_more_blocks_than_cores
    CrossCoreWaitFlag(0);
}

using Entry = void (*)(GM_ADDR, GM_ADDR, GM_ADDR);

struct EntryCase {
    const char* name;
    int rule;
    KernelMetaType type;
    Entry planted, honest;
    uint32_t plantedBlocks = 2, honestBlocks = 2;
};

const std::vector<EntryCase> kEntryCases = {
    {"launch_on_other_cores", 5, kVectorMix, Mixed, Together},
    {"launch_on_twice_the_vector_cores", 5, kMix, OneToOne, Mixed},
    {"entry_without_attributes", 5, kVectorMix, Plain, Together},
    {"sync_all_of_blocks_that_start_alone", 8, kVectorMix, Alone, Together},
    {"flags_of_blocks_that_start_alone", 8, kVectorMix, FlagsAlone, FlagsTogether},
    {"sync_all_of_more_blocks_than_vector_cores", 8, kVectorMix, Together, Together, 41, 40},
    {"sync_all_of_more_blocks_than_cores", 8, kMix, MixedTogether, MixedTogether, 21, 20},
    {"flags_of_more_blocks_than_cores", 8, kVectorMix, FlagsTogether, FlagsTogether, 41, 40},
};

void Run(const EntryCase& c, bool planted, uint64_t seed) {
    emulation::LaunchOptions options;
    options.kernel = c.name;
    options.blocks = planted ? c.plantedBlocks : c.honestBlocks;
    options.type = c.type;
    options.entry = true;
    options.seed = seed;
    std::vector<float> values(kCount);
    const auto gm = emulation::Gm(values.data(), kCount * 4, "in", emulation::GmUse::Read);
    emulation::Launch(options, planted ? c.planted : c.honest, gm, gm, gm);
}

// ---- 11: the seed really changes the order. Run without hazard detection: the planted kernel's result depends on the order.
// ----

void Unordered(bool planted, Gms gm) {
    Tile tile(2);
    DataCopy(tile.ub, gm.in[GetBlockIdx() * kTile], kTile);
    if (!planted) Order<HardEvent::MTE2_V>();
    Adds(tile.ub[kTile], tile.ub, 1.0f, kTile);
    Order<HardEvent::V_MTE3>();
    DataCopy(gm.out[GetBlockIdx() * kTile], tile.ub[kTile], kTile);
}

void LastWriterWins(bool planted, Gms gm) {
    Tile tile;
    Duplicate(tile.ub, static_cast<float>(GetBlockIdx()), kTile);
    Order<HardEvent::V_MTE3>();
    DataCopy(gm.out[planted ? 0 : GetBlockIdx() * kTile], tile.ub, kTile);
}

std::vector<float> Run(const char* name, KernelMetaType type, uint32_t blocks, const Kernel& kernel, bool planted, uint64_t seed,
                       bool hazards, emulation::Trace* trace = nullptr, bool allUb = false) {
    std::vector<float> in(kCount), out(kCount);
    for (uint32_t i = 0; i < kCount; ++i) in[i] = static_cast<float>(i % 97);
    emulation::LaunchOptions options;
    options.kernel = name;
    options.blocks = blocks;
    options.type = type;
    options.seed = seed;
    options.hazards = hazards;
    options.allUb = allUb;
    options.trace = trace;
    const auto entry = [&](GM_ADDR inGm, GM_ADDR outGm, GM_ADDR workGm) {
        Gms gm;
        gm.in.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(inGm));
        gm.halves.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(inGm));
        gm.out.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(outGm));
        gm.work.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workGm));
        gm.raw = outGm;
        kernel(planted, gm);
    };
    emulation::Launch(options, entry, emulation::Gm(in.data(), kCount * 4, "in", emulation::GmUse::Read),
                      emulation::Gm(out.data(), kCount * 4, "out", emulation::GmUse::Write),
                      emulation::Gm(nullptr, kCount * 4, "work", emulation::GmUse::Workspace));
    return out;
}

// What the hardware takes and should not be asked for.
std::vector<std::string> Warnings(bool planted) {
    std::vector<std::string> told;
    emulation::LaunchOptions options;
    options.kernel = "warnings";
    options.type = kVector;
    options.warnings = &told;
    emulation::Launch(options, [=] {
        TPipe pipe;
        int32_t id = 0;
        for (int i = 0; i < 7; ++i) id = pipe.AllocEventID<HardEvent::MTE2_V>();
        Order<HardEvent::MTE2_V>(id);  // 6, which TPipe hands out
        for (int i = 0; i < 2; ++i) Order<HardEvent::V_MTE3>(planted ? 6 + i : i);
    });
    return told;
}

// The number of different results over 100 seeds.
int Outcomes(const Kernel& kernel, bool planted) {
    std::vector<std::vector<float>> seen;
    for (uint64_t seed = 1; seed <= 100; ++seed) {
        std::vector<float> out = Run("schedule", kVector, 2, kernel, planted, seed, !planted);
        bool known = false;
        for (const auto& other : seen) known |= std::memcmp(other.data(), out.data(), out.size() * sizeof(float)) == 0;
        if (!known) seen.push_back(std::move(out));
    }
    return static_cast<int>(seen.size());
}

// ---- 12: rounding, against a search over every 16-bit value ----

double Value(half, uint16_t bits) {
    return (bits & 0x7fff) == 0x7c00 ? std::copysign(65536.0, bits & 0x8000 ? -1 : 1) : emulation::HalfToFloat(bits);
}
double Value(bfloat16_t, uint16_t bits) {
    return (bits & 0x7fff) == 0x7f80 ? std::copysign(std::ldexp(1.0, 128), bits & 0x8000 ? -1 : 1)
                                     : emulation::Bfloat16ToFloat(bits);
}

template <typename T>
uint16_t Nearest(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    uint16_t best = sign;
    for (uint32_t bits = 0; bits <= 0x7fff; ++bits) {
        const uint16_t candidate = static_cast<uint16_t>(sign | bits);
        const double value = Value(T{}, candidate), distance = std::fabs(value - x), least = std::fabs(Value(T{}, best) - x);
        if (std::isnan(value)) break;
        if (distance < least || (distance == least && candidate % 2 == 0)) best = candidate;
    }
    return best;
}

template <typename T>
int WrongRoundings(bool planted) {
    constexpr uint32_t count = 256;
    std::vector<float> in(count);
    std::vector<uint16_t> out(count);
    uint32_t state = 12345;
    for (uint32_t i = 0; i < count; ++i) {
        state = state * 1664525 + 1013904223;
        const uint32_t tie = i % 2 ? 0x8000 : 0x1000;       // half-way in bf16 and in half
        const uint32_t exponent = i % 8 == 0   ? 100 + i % 16
                                  : i % 8 == 1 ? 142
                                               : 120 + i % 16;  // subnormal, overflowing and plain halves
        in[i] = emulation::BitsFloat((state & 0x80000000) | exponent << 23 | ((state >> 3) & 0x7f0000) |
                                     (i % 3 ? tie : state & 0xffff));
    }
    emulation::LaunchOptions options;
    options.kernel = "rounding";
    options.type = kVector;
    const auto entry = [&](GM_ADDR inGm, GM_ADDR outGm) {
        GlobalTensor<float> source;
        GlobalTensor<T> result;
        source.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(inGm));
        result.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(outGm));
        TPipe pipe;
        TBuf<TPosition::VECCALC> buffer;
        pipe.InitBuffer(buffer, count * 6);
        LocalTensor<float> wide = buffer.Get<float>(count);
        LocalTensor<T> narrow = buffer.GetWithOffset<T>(count, count * 4);
        DataCopy(wide, source, count);
        Order<HardEvent::MTE2_V>();
        Cast(narrow, wide, planted ? RoundMode::CAST_TRUNC : RoundMode::CAST_RINT, count);
        Order<HardEvent::V_MTE3>();
        DataCopy(result, narrow, count);
    };
    emulation::Launch(options, entry, emulation::Gm(in.data(), count * 4, "in", emulation::GmUse::Read),
                      emulation::Gm(out.data(), count * 2, "out", emulation::GmUse::Write));
    int wrong = 0;
    for (uint32_t i = 0; i < count; ++i) wrong += out[i] != Nearest<T>(in[i]);
    return wrong;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc == 2 && std::string(argv[1]) == "--list") {
        for (const Case& c : kCases) std::printf("%s %d\n", c.name, c.rule);
        for (const EntryCase& c : kEntryCases) std::printf("%s %d\n", c.name, c.rule);
        return 0;
    }
    if (argc < 3) return 2;
    if (argc == 4 && std::string(argv[1]) == "--trace") {
        for (const Case& c : kCases) {
            if (std::string(argv[2]) != c.name) continue;
            emulation::Trace trace;
            Run(c.name, c.type, c.blocks, c.kernel, false, 0, true, &trace);
            return emulation::WriteTrace(trace, argv[3]) ? 0 : 1;
        }
        return 2;
    }
    const std::string name = argv[1];
    const bool planted = std::string(argv[2]) == "planted";
    if (name == "pipe_order" || name == "core_order") {
        std::printf("%d\n", Outcomes(name == "pipe_order" ? Unordered : LastWriterWins, planted));
        return 0;
    }
    if (name == "warnings") {
        for (const std::string& text : Warnings(planted)) std::printf("%s\n", text.c_str());
        return 0;
    }
    if (name == "rounding") {
        std::printf("%d %d\n", WrongRoundings<half>(planted), WrongRoundings<bfloat16_t>(planted));
        return 0;
    }
    const auto report = [&](const char* which, const std::function<void()>& run) {
        if (name != which && name != "all") return;
        try {
            run();
            std::printf("%s: clean\n", which);
        } catch (const emulation::Fault& fault) {
            std::printf("%s: %d: %s\n", which, fault.rule, fault.what());
        }
        std::fflush(stdout);
    };
    const uint64_t seed = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 0;
    for (const Case& c : kCases) report(c.name, [&] { Run(c.name, c.type, c.blocks, c.kernel, planted, seed, true, nullptr, c.allUb); });
    for (const EntryCase& c : kEntryCases) report(c.name, [&] { Run(c, planted, seed); });
    return 0;
}
