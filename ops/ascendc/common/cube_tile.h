// The cube core's side of an attention tile: rows of q, k or v from GM to L1 as NZ fractals, products of two L1 matrices to GM.
#pragma once

#include "kernel_common.h"

namespace npu_sparse_ascendc {

constexpr uint32_t FRACTAL_ELEMENTS = FRACTAL * FRACTAL;
constexpr uint32_t L0_TILE = 128;             // rows, columns and depth of a product in L0
constexpr uint32_t L0_AB_ELEMENTS = L0_TILE * L0_TILE;  // 32 KB: two fit L0A, two fit L0B
constexpr uint32_t L0_C_ELEMENTS = L0_TILE * L0_TILE;   // 64 KB of fp32: two fit L0C

// The AIC and its two AIV count as one.
__aicore__ inline uint32_t CoreIndex()
{
    if ASCEND_IS_AIV {
        return GetBlockIdx() / 2;
    }
    return GetBlockIdx();
}

// `rows` rows of `dim` elements, `rowStride` apart, to rows at, at + step, ... of an NZ matrix of `height` rows in L1.
template <typename T>
__aicore__ inline void CopyRowsToL1(const LocalTensor<T>& matrix, uint32_t height, uint32_t at, uint32_t step,
                                    const GlobalTensor<T>& rowsGm, uint32_t rows, uint32_t dim, uint32_t rowStride)
{
    Nd2NzParams params;
    params.ndNum = 1;
    params.nValue = rows;
    params.dValue = dim;
    params.srcNdMatrixStride = 0;
    params.srcDValue = rowStride;
    params.dstNzC0Stride = height;
    params.dstNzNStride = step;
    params.dstNzMatrixStride = 0;
    DataCopy(matrix[at * FRACTAL], rowsGm, params);
}

// One row of GM, repeated, to rows at, at + 1, ... of an NZ matrix: what fills the last fractal must be defined.
template <typename T>
__aicore__ inline void RepeatRowInL1(const LocalTensor<T>& matrix, uint32_t height, uint32_t at, const GlobalTensor<T>& rowGm,
                                     uint32_t rows, uint32_t dim)
{
    if (rows == 0) {
        return;
    }
    Nd2NzParams params;
    params.ndNum = rows;
    params.nValue = 1;
    params.dValue = dim;
    params.srcNdMatrixStride = 0;
    params.srcDValue = dim;
    params.dstNzC0Stride = height;
    params.dstNzNStride = 1;
    params.dstNzMatrixStride = FRACTAL;
    DataCopy(matrix[at * FRACTAL], rowGm, params);
}

// `runs` runs of `length` neighbouring rows, which begin `distance` rows apart, to rows at, at + 1, ... of an NZ matrix, in one
// copy. As pairs of elements, which are as many bytes of a fractal's row: strides count elements, so this reaches twice as far.
constexpr uint32_t MAX_RUN_STRIDE = 65535;  // pairs of elements between two runs
template <typename T>
__aicore__ inline void CopyRunsToL1(const LocalTensor<T>& matrix, uint32_t height, uint32_t at, const GlobalTensor<float>& pairsGm,
                                    uint32_t runs, uint32_t length, uint32_t distance, uint32_t dim)
{
    const uint32_t pairs = dim / 2;
    Nd2NzParams params;
    params.ndNum = runs;
    params.nValue = length;
    params.dValue = pairs;
    params.srcNdMatrixStride = distance * pairs;
    params.srcDValue = pairs;
    params.dstNzC0Stride = height;
    params.dstNzNStride = 1;
    params.dstNzMatrixStride = length * BLOCK_FLOATS;
    DataCopy(matrix[at * FRACTAL].template ReinterpretCast<float>(), pairsGm, params);
}

// Products through double-buffered L0A, L0B and L0C. The caller orders L1: it waits for the operands before, and releases
// them on PIPE_MTE1 after Multiply.
template <typename T>
class CubeTile {
public:
    __aicore__ inline void Init(TPipe* pipe)
    {
        pipe->InitBuffer(leftBuffer_, 2 * L0_AB_ELEMENTS * sizeof(T));
        pipe->InitBuffer(rightBuffer_, 2 * L0_AB_ELEMENTS * sizeof(T));
        pipe->InitBuffer(productBuffer_, 2 * L0_C_ELEMENTS * sizeof(float));
        leftL0A_ = leftBuffer_.Get<T>();
        rightL0B_ = rightBuffer_.Get<T>();
        productL0C_ = productBuffer_.Get<float>();
        mToMte1_.Init(pipe);
        fixToM_.Init(pipe);
        mte1ToM_.Init(pipe);
        mToFix_.Init(pipe);
        for (uint32_t slot = 0; slot < 2; ++slot) {
            SetFlag<HardEvent::M_MTE1>(mToMte1_[slot]);
            SetFlag<HardEvent::FIX_M>(fixToM_[slot]);
        }
    }

    __aicore__ inline void Finish()
    {
        for (uint32_t slot = 0; slot < 2; ++slot) {
            WaitFlag<HardEvent::M_MTE1>(mToMte1_[slot]);
            WaitFlag<HardEvent::FIX_M>(fixToM_[slot]);
        }
    }

    // out[m, n] (fp32, `outStride` elements a row) = left[m, k] right[n, k]^T, both NZ in L1; n <= 128.
    __aicore__ inline void MultiplyTransposed(const GlobalTensor<float>& outGm, uint32_t outStride,
                                              const LocalTensor<T>& leftL1, const LocalTensor<T>& rightL1,
                                              uint32_t m, uint32_t n, uint32_t k)
    {
        const LocalTensor<float> product = BeginProduct();
        for (uint32_t depth = 0; depth < k; depth += L0_TILE) {
            const uint32_t piece = k - depth < L0_TILE ? k - depth : L0_TILE;
            const LocalTensor<T> left = BeginOperands();
            const LocalTensor<T> right = rightL0B_[operandSlot_ * L0_AB_ELEMENTS];
            LoadLeft(left, leftL1[depth * m], m, piece);
            // NZ of right is already the order of fractals that L0B wants
            LoadData2DParams params;
            params.repeatTimes = (piece / FRACTAL) * (n / FRACTAL);
            params.srcStride = 1;
            LoadData(right, rightL1[depth * n], params);
            Accumulate(product, left, right, m, n, piece, depth == 0);
        }
        EndProduct(outGm, outStride, product, m, n);
    }

    // out[m, n] = left[m, k] right[k, n], both NZ in L1; k <= 128.
    __aicore__ inline void Multiply(const GlobalTensor<float>& outGm, uint32_t outStride,
                                    const LocalTensor<T>& leftL1, const LocalTensor<T>& rightL1, uint32_t m,
                                    uint32_t n, uint32_t k)
    {
        for (uint32_t column = 0; column < n; column += L0_TILE) {
            const uint32_t width = n - column < L0_TILE ? n - column : L0_TILE;
            const LocalTensor<float> product = BeginProduct();
            const LocalTensor<T> left = BeginOperands();
            const LocalTensor<T> right = rightL0B_[operandSlot_ * L0_AB_ELEMENTS];
            LoadLeft(left, leftL1, m, k);
            LoadData2DParams params;
            params.repeatTimes = width / FRACTAL;
            params.srcStride = k / FRACTAL;
            params.ifTranspose = true;
            for (uint32_t i = 0; i < k / FRACTAL; ++i) {
                LoadData(right[i * width * FRACTAL], rightL1[column * k + i * FRACTAL_ELEMENTS], params);
            }
            Accumulate(product, left, right, m, width, k, true);
            EndProduct(outGm[column], outStride, product, m, width);
        }
    }

private:
    __aicore__ inline LocalTensor<T> BeginOperands()
    {
        WaitFlag<HardEvent::M_MTE1>(mToMte1_[operandSlot_]);
        return leftL0A_[operandSlot_ * L0_AB_ELEMENTS];
    }

    __aicore__ inline LocalTensor<float> BeginProduct()
    {
        WaitFlag<HardEvent::FIX_M>(fixToM_[productSlot_]);
        return productL0C_[productSlot_ * L0_C_ELEMENTS];
    }

    // NZ in L1 (columns of fractals) to ZZ in L0A (rows of fractals)
    __aicore__ inline void LoadLeft(const LocalTensor<T>& left, const LocalTensor<T>& leftL1, uint32_t m,
                                    uint32_t k)
    {
        LoadData2DParams params;
        params.repeatTimes = k / FRACTAL;
        params.srcStride = m / FRACTAL;
        for (uint32_t i = 0; i < m / FRACTAL; ++i) {
            LoadData(left[i * k * FRACTAL], leftL1[i * FRACTAL_ELEMENTS], params);
        }
    }

    __aicore__ inline void Accumulate(const LocalTensor<float>& product, const LocalTensor<T>& left,
                                      const LocalTensor<T>& right, uint32_t m, uint32_t n, uint32_t k, bool first)
    {
        SetFlag<HardEvent::MTE1_M>(mte1ToM_[operandSlot_]);
        WaitFlag<HardEvent::MTE1_M>(mte1ToM_[operandSlot_]);
        MmadParams params;
        params.m = m;
        params.n = n;
        params.k = k;
        params.cmatrixInitVal = first;
        if (!first && (m / FRACTAL) * (n / FRACTAL) < 10) {
            PipeBarrier<PIPE_M>();  // short products would read the accumulator before it is written
        }
        Mmad(product, left, right, params);
        SetFlag<HardEvent::M_MTE1>(mToMte1_[operandSlot_]);
        operandSlot_ = 1 - operandSlot_;
    }

    __aicore__ inline void EndProduct(const GlobalTensor<float>& outGm, uint32_t outStride,
                                      const LocalTensor<float>& product, uint32_t m, uint32_t n)
    {
        SetFlag<HardEvent::M_FIX>(mToFix_[productSlot_]);
        WaitFlag<HardEvent::M_FIX>(mToFix_[productSlot_]);
        FixpipeParamsV220 params;
        params.nSize = n;
        params.mSize = m;
        params.srcStride = m;
        params.dstStride = outStride;
        params.ndNum = 1;
        Fixpipe<float, float, CFG_ROW_MAJOR>(outGm, product, params);
        SetFlag<HardEvent::FIX_M>(fixToM_[productSlot_]);
        productSlot_ = 1 - productSlot_;
    }

    TBuf<TPosition::A2> leftBuffer_;
    TBuf<TPosition::B2> rightBuffer_;
    TBuf<TPosition::CO1> productBuffer_;
    LocalTensor<T> leftL0A_, rightL0B_;
    LocalTensor<float> productL0C_;
    EventIds<HardEvent::M_MTE1, 2> mToMte1_;
    EventIds<HardEvent::FIX_M, 2> fixToM_;
    EventIds<HardEvent::MTE1_M, 2> mte1ToM_;
    EventIds<HardEvent::M_FIX, 2> mToFix_;
    uint32_t operandSlot_ = 0, productSlot_ = 0;
};

}  // namespace npu_sparse_ascendc
