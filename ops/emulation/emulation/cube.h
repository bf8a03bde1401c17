// The cube unit: fractals of 16 x 16 from L1 to L0, products into fp32 in L0C, and Fixpipe out to GM.
//
// Layouts, in fractals of 512 bytes (16 x 16 of 16 bits), inside a fractal row by row:
//   L1  NZ   fractals column by column (as Nd2Nz leaves a row-major matrix)
//   L0A ZZ   of A[m, k]: fractals row by row, inside [m][k]
//   L0B ZN   of B[k, n]: fractals row by row, inside [n][k]
//   L0C NZ   of C[m, n] in fp32: fractals (1024 bytes) column by column, inside [m][n]
#pragma once

#include "copy.h"
#include "vector_core.h"

// A global name: on the device it belongs to the compiler.
enum QuantMode_t { NoQuant, F322F16, F322BF16, DEQF16, VDEQF16, QF322B8_PRE, VQF322B8_PRE, REQ8, VREQ8 };

namespace AscendC {

struct LoadData2DParams {
    LoadData2DParams() = default;
    LoadData2DParams(uint16_t startIndex, emulation::Field<uint8_t> repeatTimes, uint16_t srcStride, uint8_t sid, uint16_t dstGap,
                     bool ifTranspose, uint8_t addrMode)
        : startIndex(startIndex), dstGap(dstGap), srcStride(srcStride), ifTranspose(ifTranspose), repeatTimes(repeatTimes),
          sid(sid), addrMode(addrMode) {}
    emulation::Field<uint16_t> startIndex = 0, dstGap = 0, srcStride = 0;
    bool ifTranspose = false;
    emulation::Field<uint8_t> repeatTimes = 0;
    uint8_t sid = 0, addrMode = 0;
};
using LoadData2dParams = LoadData2DParams;

struct LoadData2dTransposeParams {
    LoadData2dTransposeParams() = default;
    LoadData2dTransposeParams(uint16_t startIndex, emulation::Field<uint8_t> repeatTimes, uint16_t srcStride, uint16_t dstGap,
                              uint16_t dstFracGap, uint8_t addrMode = 0)
        : startIndex(startIndex), repeatTimes(repeatTimes), srcStride(srcStride), dstGap(dstGap), dstFracGap(dstFracGap),
          addrMode(addrMode) {}
    emulation::Field<uint16_t> startIndex = 0;
    emulation::Field<uint8_t> repeatTimes = 0;
    emulation::Field<uint16_t> srcStride = 0, dstGap = 0, dstFracGap = 0;
    uint8_t addrMode = 0;
};

struct MmadParams {
    MmadParams() = default;
    MmadParams(emulation::Field<uint16_t> m, emulation::Field<uint16_t> n, emulation::Field<uint16_t> k, uint8_t unitFlag,
               bool cmatrixSource, bool cmatrixInitVal)
        : m(m), n(n), k(k), unitFlag(unitFlag), cmatrixSource(cmatrixSource), cmatrixInitVal(cmatrixInitVal) {}
    emulation::Field<uint16_t> m = 0, n = 0, k = 0;
    bool isBias = false;
    int32_t fmOffset = 0;
    bool enSsparse = false, enWinogradA = false, enWinogradB = false;
    uint8_t unitFlag = 0;
    bool kDirectionAlign = false, cmatrixSource = false, cmatrixInitVal = true;
};

enum class CO2Layout : uint8_t { NZ = 0, ROW_MAJOR, COLUMN_MAJOR };
struct FixpipeConfig {
    CO2Layout format;
    constexpr FixpipeConfig(CO2Layout format) : format(format) {}
};
inline constexpr FixpipeConfig CFG_NZ = {CO2Layout::NZ};
inline constexpr FixpipeConfig CFG_ROW_MAJOR = {CO2Layout::ROW_MAJOR};

struct FixpipeParamsV220 {
    FixpipeParamsV220() = default;
    FixpipeParamsV220(emulation::Field<uint16_t> nSize, emulation::Field<uint16_t> mSize, emulation::Field<uint16_t> srcStride,
                      uint32_t dstStride, bool reluEn)
        : nSize(nSize), mSize(mSize), srcStride(srcStride), dstStride(dstStride), reluEn(reluEn) {}
    FixpipeParamsV220(emulation::Field<uint16_t> nSize, emulation::Field<uint16_t> mSize, emulation::Field<uint16_t> srcStride,
                      uint32_t dstStride, bool reluEn, QuantMode_t quantPre, int64_t deqScalar, uint16_t ndNum,
                      uint16_t srcNdStride, uint16_t dstNdStride, uint8_t unitFlag, bool isChannelSplit = false)
        : nSize(nSize), mSize(mSize), srcStride(srcStride), dstStride(dstStride), quantPre(quantPre), deqScalar(deqScalar),
          ndNum(ndNum), srcNdStride(srcNdStride), dstNdStride(dstNdStride), reluEn(reluEn), unitFlag(unitFlag),
          isChannelSplit(isChannelSplit) {}
    emulation::Field<uint16_t> nSize = 0, mSize = 0, srcStride = 0;
    uint32_t dstStride = 0;
    QuantMode_t quantPre = QuantMode_t::NoQuant;
    uint64_t deqScalar = 0;
    emulation::Field<uint16_t> ndNum = 1, srcNdStride = 0, dstNdStride = 0;
    bool reluEn = false;
    uint8_t unitFlag = 0;
    bool isChannelSplit = false;
};

}  // namespace AscendC

namespace emulation {

constexpr uint32_t kFractal = 512, kAccumulator = 1024, kEdge = 16;

inline uint32_t Fractals(uint32_t extent) { return (extent + kEdge - 1) / kEdge; }

template <typename T>
T* PlaceCube(const LocalTensor<T>& tensor, std::initializer_list<Space> spaces, uint32_t alignment, const char* opcode,
             const char* name, Where where) {
    const Span span = tensor.Whole();
    bool inside = false;
    std::string allowed;
    for (const Space space : spaces) {
        inside |= span.memory != nullptr && span.memory->space == space;
        allowed += (allowed.empty() ? "" : " or ") + std::string(kSpaceNames[static_cast<int>(space)]);
    }
    Require(inside, 3, where, [&] {
        return std::string(opcode) + " " + name + " must lie in " + allowed + ", got " +
            (span.memory ? kSpaceNames[static_cast<int>(span.memory->space)] : "an empty tensor");
    });
    Require(span.begin % alignment == 0, 2, where, [&] {
        return std::string(opcode) + " " + name + " must start at a multiple of " + std::to_string(alignment) + " bytes, got " +
            std::to_string(span.begin);
    });
    return tensor.Data();
}

// What Nd2Nz left unwritten in ragged fractals is carried along; Mmad checks the elements that count.
template <typename T>
void LoadFractals(const char* opcode, const LocalTensor<T>& dst, const LocalTensor<T>& src, uint32_t start, uint32_t repeats,
                  uint32_t srcStride, uint32_t dstGap, bool transpose, Where where) {
    auto* to = reinterpret_cast<uint8_t*>(PlaceCube(dst, {Space::L0A, Space::L0B}, kFractal, opcode, "dst", where));
    const auto* from = reinterpret_cast<const uint8_t*>(PlaceCube(src, {Space::L1}, kBlock, opcode, "src", where));
    if (repeats == 0) return;
    const uint64_t stepFrom = uint64_t{srcStride} * kFractal, stepTo = uint64_t{dstGap + 1} * kFractal;
    Span read = Piece(src.Whole(), uint64_t{start} * kFractal, kFractal, 1, 0, repeats, stepFrom);
    read.mayBeUnwritten = true;
    const Span write = Piece(dst.Whole(), 0, kFractal, 1, 0, repeats, stepTo);
    from += uint64_t{start} * kFractal;
    Cost cost;
    cost.bursts = repeats;
    cost.burstBytes = kFractal;
    const auto fractal = [=](auto* t, const auto* f) {
        if (!transpose) {
            std::memcpy(t, f, kFractal);
            return;
        }
        constexpr uint32_t size = sizeof(*t) == 1 && sizeof(T) == 2 ? 2 : 0;
        for (uint32_t r = 0; r < kEdge; ++r) {
            for (uint32_t c = 0; c < kEdge; ++c) std::memcpy(t + (c * kEdge + r) * size, f + (r * kEdge + c) * size, size);
        }
    };
    Issue(PIPE_MTE1, opcode, {read}, {write}, cost, where, [=] {
        for (uint32_t r = 0; r < repeats; ++r) fractal(to + r * stepTo, from + r * stepFrom);
    });
    if (write.memory->written != nullptr && read.memory->written != nullptr) {
        for (uint32_t r = 0; r < repeats; ++r) {
            fractal(write.memory->written + write.begin + r * stepTo, read.memory->written + read.begin + r * stepFrom);
        }
    }
}

// The valid elements of a matrix of fractals, `rows` x `columns` of 16 bits inside fractals, fractal (r, c) at
// r * stepR + c * stepC.
inline std::array<Span, 4> ValidElements(const Span& whole, uint32_t rows, uint32_t columns, uint64_t stepR, uint64_t stepC) {
    const uint32_t fullR = rows / kEdge, fullC = columns / kEdge, restR = rows % kEdge, restC = columns % kEdge;
    return {Piece(whole, 0, fullR && fullC ? kFractal : 0, fullC, stepC, fullR, stepR),
            Piece(whole, fullR * stepR, fullC ? restR * kBlock : 0, fullC, stepC),
            Piece(whole, fullC * stepC, fullR ? restC * 2 : 0, kEdge, kBlock, fullR, stepR),
            Piece(whole, fullR * stepR + fullC * stepC, restR && restC ? restC * 2 : 0, restR, kBlock)};
}

// The m x n accumulators: columns of fractals `step` bytes apart, 64 bytes per row.
inline std::array<Span, 2> Accumulators(const Span& whole, uint32_t m, uint32_t n, uint64_t step) {
    return {Piece(whole, 0, n / kEdge ? m * 64 : 0, n / kEdge, step), Piece(whole, n / kEdge * step, n % kEdge * 4, m, 64)};
}

// c[16 rows, 16 columns] += a[16, k] * b[k, 16] in fp32, k in order: tiles of 4 rows and two vectors of `width` floats in
// registers.
#define EMULATION_TILE(NAME, TARGET, WIDTH) \
    TARGET inline void NAME(const float* a, const float* b, float* c, uint32_t k) { \
        typedef float Vector __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias)); \
        for (uint32_t column = 0; column < 16; column += 2 * WIDTH) { \
            for (uint32_t row = 0; row < 16; row += 4) { \
                Vector* to[4]; \
                Vector sum[4][2]; \
                _Pragma("GCC unroll 4") for (uint32_t r = 0; r < 4; ++r) { \
                    to[r] = reinterpret_cast<Vector*>(c + (row + r) * 16 + column); \
                    sum[r][0] = to[r][0]; \
                    sum[r][1] = to[r][1]; \
                } \
                for (uint32_t i = 0; i < k; ++i) { \
                    const Vector* right = reinterpret_cast<const Vector*>(b + i * 16 + column); \
                    _Pragma("GCC unroll 4") for (uint32_t r = 0; r < 4; ++r) { \
                        sum[r][0] += a[(row + r) * k + i] * right[0]; \
                        sum[r][1] += a[(row + r) * k + i] * right[1]; \
                    } \
                } \
                _Pragma("GCC unroll 4") for (uint32_t r = 0; r < 4; ++r) { \
                    to[r][0] = sum[r][0]; \
                    to[r][1] = sum[r][1]; \
                } \
            } \
        } \
    }
EMULATION_TILE(MultiplyTile, , 4)
#if defined(__x86_64__)
EMULATION_TILE(MultiplyTileAvx2, __attribute__((target("avx2,fma"))), 8)
#endif
#undef EMULATION_TILE

template <typename T>
void MultiplyFractals(float* c, const T* a, const T* b, uint32_t m, uint32_t n, uint32_t k, bool accumulate) {
    const uint32_t mf = Fractals(m), nf = Fractals(n), kf = Fractals(k);
    std::vector<float> left(size_t{mf} * kEdge * k), right(size_t{k} * kEdge);
    for (uint32_t row = 0; row < m; ++row) {
        for (uint32_t i = 0; i < k; ++i) {
            const T value = m == 1 ? a[i] : a[((row / kEdge) * kf + i / kEdge) * 256 + row % kEdge * kEdge + i % kEdge];
            left[size_t{row} * k + i] = Widen(value);
        }
    }
#if defined(__x86_64__)
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    for (uint32_t ni = 0; ni < nf; ++ni) {
        const uint32_t columns = std::min(kEdge, n - ni * kEdge);
        for (uint32_t i = 0; i < k; ++i) {
            const T* fractal = b + ((i / kEdge) * nf + ni) * 256 + i % kEdge;
            for (uint32_t j = 0; j < kEdge; ++j) right[i * kEdge + j] = j < columns ? Widen(fractal[j * kEdge]) : 0.0f;
        }
        for (uint32_t mi = 0; mi < mf; ++mi) {
            float* accumulators = c + (size_t{ni} * mf + mi) * 256;
            const uint32_t rows = std::min(kEdge, m - mi * kEdge);
            float tile[256] = {};
            for (uint32_t r = 0; accumulate && r < rows; ++r) std::copy_n(accumulators + r * kEdge, columns, tile + r * kEdge);
            const float* from = left.data() + size_t{mi} * kEdge * k;
#if defined(__x86_64__)
            (avx2 ? MultiplyTileAvx2 : MultiplyTile)(from, right.data(), tile, k);
#else
            MultiplyTile(from, right.data(), tile, k);
#endif
            for (uint32_t r = 0; r < rows; ++r) std::copy_n(tile + r * kEdge, columns, accumulators + r * kEdge);
        }
    }
}

}  // namespace emulation

namespace AscendC {

template <typename T>
void LoadData(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LoadData2DParams& p, Where where = {}) {
    using namespace emulation;
    Require(!p.ifTranspose || sizeof(T) == 2, 5, "LoadData ifTranspose must be used with 16-bit elements only", where);
    LoadFractals("LoadData", dst, src, InRange(p.startIndex, 0, 65535, "LoadData", "startIndex", where),
                 InRange(p.repeatTimes, 0, 255, "LoadData", "repeatTimes", where),
                 InRange(p.srcStride, 0, 65535, "LoadData", "srcStride", where),
                 InRange(p.dstGap, 0, 65535, "LoadData", "dstGap", where), p.ifTranspose, where);
}

template <typename T>
void LoadDataWithTranspose(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LoadData2dTransposeParams& p,
                           Where where = {}) {
    using namespace emulation;
    static_assert(sizeof(T) == 2, "LoadDataWithTranspose is emulated for 16-bit elements");
    LoadFractals("LoadDataWithTranspose", dst, src, InRange(p.startIndex, 0, 65535, "LoadDataWithTranspose", "startIndex", where),
                 InRange(p.repeatTimes, 0, 255, "LoadDataWithTranspose", "repeatTimes", where),
                 InRange(p.srcStride, 0, 65535, "LoadDataWithTranspose", "srcStride", where),
                 InRange(p.dstGap, 0, 65535, "LoadDataWithTranspose", "dstGap", where), true, where);
}

// dst[m, n] (+)= fm[m, k] * filter[k, n]. m == 1 is the matrix-vector mode, in which fm is a plain row.
template <typename T, typename U, typename S>
void Mmad(const LocalTensor<T>& dst, const LocalTensor<U>& fm, const LocalTensor<S>& filter, const MmadParams& p,
          Where where = {}) {
    using namespace emulation;
    static_assert(std::is_same_v<T, float> && std::is_same_v<U, S> && isOneOf<U, half, bfloat16_t>,
                  "Mmad is emulated for half or bfloat16_t operands of one type into float");
    const auto m = static_cast<uint32_t>(InRange(p.m, 0, 4095, "Mmad", "m", where));
    const auto n = static_cast<uint32_t>(InRange(p.n, 0, 4095, "Mmad", "n", where));
    const auto k = static_cast<uint32_t>(InRange(p.k, 0, 4095, "Mmad", "k", where));
    Require(p.unitFlag == 0, 5, "Mmad unitFlag must be 0 (the unit flag is not emulated), got " + std::to_string(p.unitFlag),
            where);
    Require(!p.isBias && !p.cmatrixSource, 5, "Mmad isBias and cmatrixSource must be false (the bias table is not emulated)",
            where);
    auto* c = PlaceCube(dst, {Space::L0C}, kAccumulator, "Mmad", "dst", where);
    const auto* a = PlaceCube(fm, {Space::L0A}, kFractal, "Mmad", "fm", where);
    const auto* b = PlaceCube(filter, {Space::L0B}, kFractal, "Mmad", "filter", where);
    if (m == 0 || n == 0 || k == 0) return;
    const uint32_t mf = Fractals(m), nf = Fractals(n), kf = Fractals(k);
    auto left = ValidElements(fm.Whole(), m, k, uint64_t{kf} * kFractal, kFractal);
    if (m == 1) left = {Piece(fm.Whole(), 0, k * 2), Piece(fm.Whole(), 0, 0), Piece(fm.Whole(), 0, 0), Piece(fm.Whole(), 0, 0)};
    const auto right = ValidElements(filter.Whole(), n, k, kFractal, uint64_t{nf} * kFractal);
    const auto out = Accumulators(dst.Whole(), m, n, uint64_t{mf} * kAccumulator);
    const bool accumulate = !p.cmatrixInitVal;
    const Span none = Piece(dst.Whole(), 0, 0);
    Cost cost;
    cost.m = m;
    cost.n = n;
    cost.k = k;
    Issue(PIPE_M, "Mmad",
          {left[0], left[1], left[2], left[3], right[0], right[1], right[2], right[3], accumulate ? out[0] : none,
           accumulate ? out[1] : none},
          {out[0], out[1]}, cost, where, [=] { MultiplyFractals(c, a, b, m, n, k, accumulate); });
}

// L0C (NZ, fp32) to row-major GM, through an optional conversion to 16 bits (nearest even) and ReLU.
template <typename T, typename U, const FixpipeConfig& config = CFG_ROW_MAJOR>
void Fixpipe(const GlobalTensor<T>& dst, const LocalTensor<U>& src, const FixpipeParamsV220& p, Where where = {}) {
    using namespace emulation;
    static_assert(std::is_same_v<U, float> && isOneOf<T, float, half, bfloat16_t>,
                  "Fixpipe is emulated from float to float, half or bfloat16_t");
    static_assert(config.format == CO2Layout::ROW_MAJOR, "Fixpipe is emulated for CFG_ROW_MAJOR");
    const auto n = static_cast<uint32_t>(InRange(p.nSize, 0, 4095, "Fixpipe", "nSize", where));
    Require(n % kEdge == 0, 5, "Fixpipe nSize must be a multiple of 16, got " + std::to_string(n), where);
    const auto m = static_cast<uint32_t>(InRange(p.mSize, 0, 8192, "Fixpipe", "mSize", where));
    const auto srcStride = static_cast<uint32_t>(InRange(p.srcStride, 0, 65535, "Fixpipe", "srcStride", where));
    const QuantMode_t narrow = std::is_same_v<T, half> ? QuantMode_t::F322F16 : QuantMode_t::F322BF16;
    const QuantMode_t expected = std::is_same_v<T, float> ? QuantMode_t::NoQuant : narrow;
    Require(p.quantPre == expected, 5, where, [&] {
        const std::string name = std::is_same_v<T, half> ? "F322F16" : "F322BF16";
        return "Fixpipe quantPre must be " + (std::is_same_v<T, float> ? "NoQuant" : name) + " for this destination type, got " +
            std::to_string(p.quantPre);
    });
    Require(p.unitFlag == 0, 5, "Fixpipe unitFlag must be 0 (the unit flag is not emulated), got " + std::to_string(p.unitFlag),
            where);
    Require(p.ndNum.value == 1, 5,
            "Fixpipe ndNum must be 1 (several matrices are not emulated), got " + std::to_string(p.ndNum.value), where);
    Require(!p.isChannelSplit, 5, "Fixpipe isChannelSplit must be false with CFG_ROW_MAJOR", where);
    const auto* from = PlaceCube(src, {Space::L0C}, 64, "Fixpipe", "src", where);
    if (m == 0 || n == 0) return;
    Require(p.dstStride > 0, 5, "Fixpipe dstStride must be positive, got 0", where);
    Require(m == 1 || p.dstStride >= n, 5, "Fixpipe dstStride must be at least nSize, got " + std::to_string(p.dstStride), where);
    Require(n <= kEdge || srcStride >= m, 5, "Fixpipe srcStride must be at least mSize, got " + std::to_string(srcStride), where);
    const auto in = Accumulators(src.Whole(), m, n, uint64_t{srcStride} * 64);
    const Span write = dst.Bytes(0, n * sizeof(T), m, uint64_t{p.dstStride} * sizeof(T));
    Cost cost;
    cost.m = m;
    cost.n = n;
    cost.bursts = m;
    cost.burstBytes = n * sizeof(T);
    T* to = dst.Data();
    Issue(PIPE_FIX, "Fixpipe", {in[0], in[1]}, {write}, cost, where, [=, dstStride = size_t{p.dstStride}, relu = p.reluEn] {
        for (uint32_t row = 0; row < m; ++row) {
            for (uint32_t column = 0; column < n; ++column) {
                const float value = from[(size_t{column / kEdge} * srcStride + row) * kEdge + column % kEdge];
                to[row * dstStride + column] = Narrow<T>(relu && value < 0 ? 0.0f : value);
            }
        }
    });
}

}  // namespace AscendC
