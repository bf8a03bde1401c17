// What all vector instructions share: masks, iterations, the bytes an operand touches, overlap, and the loops.
#pragma once

#include <array>
#include <cmath>
#include <limits>

#include "convert.h"
#include "core.h"
#include "tensor.h"

namespace emulation {

using AscendC::LocalTensor;

constexpr uint32_t kBlock = 32, kIteration = 256, kMaxRepeats = 255;

// A uint8_t parameter that remembers a value too large for it, which the device would silently wrap.
struct RepeatTimes {
    int64_t value;
    template <typename I, typename = std::enable_if_t<std::is_integral_v<I>>>
    RepeatTimes(I value) : value(static_cast<int64_t>(value)) {}
};

struct Mask {
    uint64_t low = ~0ull, high = ~0ull;
};

inline Mask LeadingLanes(uint64_t lanes) {
    const auto bits = [](uint64_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; };
    return {bits(lanes), lanes > 64 ? bits(lanes - 64) : 0};
}

// The mask register and its mode; every instruction that sets a mask itself leaves all lanes on.
struct MaskRegister {
    bool counter = false;
    Mask mask;
};
inline thread_local MaskRegister maskRegister;

// What an instruction iterates over: `repeats` iterations of `lanes` lanes, all with `mask` except the last.
struct Plan {
    uint32_t lanes, repeats;
    Mask mask, last;
};

inline Plan CountPlan(uint32_t lanes, uint64_t count) {
    const uint32_t repeats = static_cast<uint32_t>((count + lanes - 1) / lanes);
    return {lanes, repeats, LeadingLanes(lanes), LeadingLanes(count - (repeats ? repeats - 1 : 0) * uint64_t{lanes})};
}

inline uint32_t CheckRepeats(RepeatTimes repeats, const char* opcode, Where where) {
    Require(repeats.value >= 0 && repeats.value <= kMaxRepeats, 5, where,
            [&] { return std::string(opcode) + " repeatTime must lie in [0, 255], got " + std::to_string(repeats.value); });
    return static_cast<uint32_t>(repeats.value);
}

inline uint64_t CheckCount(int64_t count, const char* opcode, Where where) {
    Require(count >= 0, 5, where,
            [&] { return std::string(opcode) + " count must not be negative, got " + std::to_string(count); });
    return static_cast<uint64_t>(count);
}

inline Plan LeadingPlan(uint32_t lanes, uint64_t mask, RepeatTimes repeats, bool isSetMask, const char* opcode, Where where) {
    if (!isSetMask) {
        if (maskRegister.counter) return CountPlan(lanes, maskRegister.mask.low);
        return {lanes, CheckRepeats(repeats, opcode, where), maskRegister.mask, maskRegister.mask};
    }
    if (maskRegister.counter) return CountPlan(lanes, mask);
    Require(mask <= lanes, 5, where, [&] {
        return std::string(opcode) + " mask must lie in [0, " + std::to_string(lanes) + "], got " + std::to_string(mask);
    });
    return {lanes, mask == 0 ? 0 : CheckRepeats(repeats, opcode, where), LeadingLanes(mask), LeadingLanes(mask)};
}

inline Plan BitPlan(uint32_t lanes, const uint64_t bits[], RepeatTimes repeats, bool isSetMask, const char* opcode, Where where) {
    if (!isSetMask || maskRegister.counter) return LeadingPlan(lanes, bits[0], repeats, isSetMask, opcode, where);
    const Mask mask{bits[0], lanes > 64 ? bits[1] : 0};
    return {lanes, CheckRepeats(repeats, opcode, where), mask, mask};
}

// The strides of one operand in 32-byte blocks.
struct Stride {
    uint32_t block = 1, repeat = 8;
};

// Count form: iterations follow each other; an operand narrower than the widest one fills fewer blocks per iteration.
template <typename T>
Stride Dense(uint32_t lanes) {
    return {1, static_cast<uint32_t>(lanes * sizeof(T) / kBlock)};
}

template <typename T>
struct Operand {
    T* data;
    Stride stride;
    T* At(uint32_t repeat, uint32_t lane) const {
        constexpr uint32_t perBlock = kBlock / sizeof(T);
        return data +
            (static_cast<size_t>(repeat) * stride.repeat + static_cast<size_t>(lane / perBlock) * stride.block) * perBlock +
            lane % perBlock;
    }
};

inline std::pair<uint32_t, uint32_t> ActiveLanes(Mask mask) {  // the first active lane and one past the last
    if ((mask.low | mask.high) == 0) return {0, 0};
    const uint32_t first = mask.low ? __builtin_ctzll(mask.low) : 64 + __builtin_ctzll(mask.high);
    const uint32_t last = mask.high ? 127 - __builtin_clzll(mask.high) : 63 - __builtin_clzll(mask.low);
    return {first, last + 1};
}

inline Span Piece(const Span& whole, uint64_t offset, uint64_t bytes, uint32_t blocks = 1, uint64_t blockStride = 0,
                  uint32_t repeats = 1, uint64_t repeatStride = 0) {
    Span span = whole;
    span.begin += offset;
    span.bytes = bytes;
    span.blocks = blocks;
    span.blockStride = blockStride;
    span.repeats = repeats;
    span.repeatStride = repeatStride;
    return span;
}

using Spans = std::array<Span, 4>;  // unused ones have zero bytes

// The bytes of an operand's active lanes: exact when the mask is one run of lanes, else from its first to its last active lane.
inline Spans Touched(const Span& whole, uint32_t size, const Plan& plan, Stride stride) {
    Spans spans;
    for (Span& span : spans) span = Piece(whole, 0, 0);
    if (plan.repeats == 0) return spans;
    const uint32_t perBlock = kBlock / size;
    const uint64_t rowStride = uint64_t{stride.repeat} * kBlock, blockStride = uint64_t{stride.block} * kBlock;
    const auto [first, end] = ActiveLanes(plan.mask);
    const auto [lastFirst, lastEnd] = ActiveLanes(plan.last);
    const bool sameLast = lastFirst == first && lastEnd == end;
    const uint32_t full = sameLast ? plan.repeats : plan.repeats - 1;
    if (stride.block == 1) {
        if (first == 0 && uint64_t{end} * size == rowStride) {  // iterations follow each other without a gap
            spans[0] = Piece(whole, 0, full * rowStride + (sameLast ? 0 : uint64_t{lastEnd} * size));
            return spans;
        }
        spans[0] = Piece(whole, uint64_t{first} * size, full ? uint64_t{end - first} * size : 0, 1, 0, full, rowStride);
        if (!sameLast) spans[1] = Piece(whole, full * rowStride, uint64_t{lastEnd} * size);
        return spans;
    }
    const auto rows = [&](uint64_t row, uint32_t from, uint32_t to, uint32_t repeats, size_t slot) {
        if (repeats == 0 || from == to) return;
        const uint32_t head = from / perBlock, tail = to / perBlock;  // partial first and last blocks are pieces of their own
        if (head == tail) {
            spans[slot] = Piece(whole, row + head * blockStride + from % perBlock * size, uint64_t{to - from} * size, 1, 0,
                                repeats, rowStride);
            return;
        }
        const uint32_t whole0 = from % perBlock ? head + 1 : head;
        if (tail > whole0)
            spans[slot] = Piece(whole, row + whole0 * blockStride, kBlock, tail - whole0, blockStride, repeats, rowStride);
        if (to % perBlock)
            spans[slot + 1] = Piece(whole, row + tail * blockStride, to % perBlock * size, 1, 0, repeats, rowStride);
        if (from % perBlock) {
            spans[slot + 2] = Piece(whole, row + head * blockStride + from % perBlock * size, (perBlock - from % perBlock) * size,
                                    1, 0, repeats, rowStride);
        }
    };
    rows(0, first, end, full, 0);
    if (!sameLast) rows(full * rowStride, lastFirst, lastEnd, 1, 2);
    return spans;
}

template <typename T>
Operand<T> Place(const LocalTensor<T>& tensor, Stride stride, const char* opcode, const char* name, Where where,
                 uint32_t alignment = kBlock) {
    const Span span = tensor.Whole();
    Require(span.memory != nullptr && span.memory->space == Space::UB, 3, where, [&] {
        return std::string(opcode) + " " + name + " must lie in UB, got " +
            (span.memory ? kSpaceNames[static_cast<int>(span.memory->space)] : "an empty tensor");
    });
    Require(span.begin % alignment == 0, 2, where, [&] {
        return std::string(opcode) + " " + name + " must start at a multiple of " + std::to_string(alignment) + " bytes, got " +
            std::to_string(span.begin);
    });
    return {tensor.Data(), stride};
}

template <typename T>
Spans Touched(const LocalTensor<T>& tensor, const Plan& plan, Stride stride) {
    return Touched(tensor.Whole(), sizeof(T), plan, stride);
}

// The bytes from a span's first to its last.
inline uint64_t Reach(const Span& span) {
    if (span.bytes == 0 || span.blocks == 0 || span.repeats == 0) return 0;
    return (span.repeats - 1) * span.repeatStride + (span.blocks - 1) * span.blockStride + span.bytes;
}

inline void CheckApart(const char* opcode, const Span& write, const Span& read, Where where) {
    const bool apart = Reach(write) == 0 || Reach(read) == 0 || write.memory != read.memory ||
        write.begin + Reach(write) <= read.begin || read.begin + Reach(read) <= write.begin;
    Require(apart, 5, where, [&] {
        return std::string(opcode) + " source and destination must not overlap, got bytes " + std::to_string(read.begin) +
            " to " + std::to_string(read.begin + Reach(read)) + " and " + std::to_string(write.begin) + " to " +
            std::to_string(write.begin + Reach(write));
    });
}

// Rule 5, overlap: an iteration must not read what an earlier one wrote, and inside an iteration source and destination coincide
// or are apart (a narrower destination may lie over its own source). `accumulates` is the documented exception: destination and
// second source at repeat stride 0.
template <typename D, typename S>
void CheckOverlap(const Plan& plan, Operand<D> dst, Operand<S> src, bool accumulates, const char* opcode, Where where) {
    if (plan.repeats == 0) return;
    const auto* d = reinterpret_cast<const uint8_t*>(dst.data);
    const auto* s = reinterpret_cast<const uint8_t*>(src.data);
    const auto blocks = [&](uint32_t repeat, uint32_t size) {
        return (ActiveLanes(repeat + 1 == plan.repeats ? plan.last : plan.mask).second * size + kBlock - 1) / kBlock;
    };
    const auto reach = [&](Stride stride, uint32_t size) {
        int64_t end = 0;
        for (uint32_t r = plan.repeats - std::min(plan.repeats, 2u); r < plan.repeats; ++r) {
            if (const uint32_t n = blocks(r, size))
                end = std::max(end, int64_t{r} * stride.repeat + int64_t{n - 1} * stride.block + 1);
        }
        return end * kBlock;
    };
    if (d + reach(dst.stride, sizeof(D)) <= s || s + reach(src.stride, sizeof(S)) <= d) return;
    const bool same =
        d == s && sizeof(D) == sizeof(S) && dst.stride.block == src.stride.block && dst.stride.repeat == src.stride.repeat;
    if (same && (plan.repeats == 1 || dst.stride.repeat >= 7 * dst.stride.block + 1)) return;
    if (accumulates && (dst.stride.repeat == 0 || src.stride.repeat == 0)) return;
    constexpr int64_t ubBlocks = 196608 / kBlock;
    struct Visit {
        uint16_t writer, reader;  // 1 + iteration, 1 + iteration * 8 + block
    };
    thread_local std::array<Visit, ubBlocks> visits;  // counted from the lower of the two operands
    visits.fill({});
    const int64_t dstOrigin = d > s ? (d - s) / kBlock : 0, srcOrigin = s > d ? (s - d) / kBlock : 0;
    for (uint32_t r = 0; r < plan.repeats; ++r) {
        for (uint32_t b = 0; b < blocks(r, sizeof(S)); ++b) {
            const int64_t at = srcOrigin + int64_t{r} * src.stride.repeat + int64_t{b} * src.stride.block;
            if (at >= ubBlocks) break;  // out of bounds: Issue reports that
            Require(visits[at].writer == 0, 5, where, [&] {
                return std::string(opcode) + " must not read in iteration " + std::to_string(r) + " what iteration " +
                    std::to_string(visits[at].writer - 1) + " wrote: source and destination overlap";
            });
            visits[at].reader = static_cast<uint16_t>(1 + r * 8 + b);
        }
        for (uint32_t b = 0; b < blocks(r, sizeof(D)); ++b) {
            const int64_t at = dstOrigin + int64_t{r} * dst.stride.repeat + int64_t{b} * dst.stride.block;
            if (at >= ubBlocks) break;
            const uint32_t reader = visits[at].reader;
            Require(sizeof(D) < sizeof(S) || reader == 0 || (reader - 1) / 8 != r || (reader - 1) % 8 == b, 5, where, [&] {
                return std::string(opcode) +
                    " source and destination of an iteration must coincide or be apart, got a distance of " +
                    std::to_string(d - s) + " bytes";
            });
            visits[at].writer = static_cast<uint16_t>(r + 1);
        }
    }
}

// Results may lie over sources that earlier iterations or the same one have read, never over those of a later iteration.
inline void CheckResultsBehind(const char* opcode, const Span& write, const Span& source, const Plan& plan, Stride stride,
                               Where where) {
    if (write.memory != source.memory || Reach(write) == 0) return;
    const uint64_t rowStride = uint64_t{stride.repeat} * kBlock, rowReach = uint64_t{7} * stride.block * kBlock + kBlock;
    for (uint64_t r = 0; r + 1 < plan.repeats; ++r) {
        const uint64_t begin = write.begin + r * write.repeatStride, end = begin + write.bytes;
        const uint64_t later = source.begin + (r + 1) * rowStride,
                       laterEnd = source.begin + (plan.repeats - 1) * rowStride + rowReach;
        Require(end <= later || begin >= laterEnd, 5, where, [&] {
            return std::string(opcode) + " must not write over the source of a later iteration, got the result of iteration " +
                std::to_string(r) + " at byte " + std::to_string(begin);
        });
    }
}

inline Cost VectorCost(uint32_t repeats) {
    Cost cost;
    cost.repeats = repeats;
    return cost;
}

// ---- the loops ----

template <uint32_t n, typename F, typename D, typename... S>
void Lanes(F f, D* dst, const S*... src) {
    D result[n];  // dst may be a source
    for (uint32_t i = 0; i < n; ++i) result[i] = f(src[i]...);
    std::memcpy(static_cast<void*>(dst), result, sizeof result);
}

// dst[lane] = f(src[lane]...) for every active lane of every iteration.
template <typename F, typename D, typename... S>
void Run(const Plan& plan, F f, Operand<D> dst, Operand<S>... src) {
    constexpr uint32_t widest = std::max({sizeof(D), sizeof(S)...}), lanes = kIteration / widest, chunk = kBlock / widest;
    const bool dense = dst.stride.block == 1 && ((src.stride.block == 1) && ...);
    const Mask all = LeadingLanes(lanes);
    for (uint32_t r = 0; r < plan.repeats; ++r) {
        const Mask mask = r + 1 == plan.repeats ? plan.last : plan.mask;
        if (dense && (mask.low & all.low) == all.low && (mask.high & all.high) == all.high) {
            Lanes<lanes>(f, dst.At(r, 0), src.At(r, 0)...);
            continue;
        }
        for (uint32_t lane = 0; lane < lanes; lane += chunk) {
            const uint32_t bits =
                static_cast<uint32_t>((lane < 64 ? mask.low >> lane : mask.high >> (lane - 64)) & ((1ull << chunk) - 1));
            if (bits == (1ull << chunk) - 1) {
                Lanes<chunk>(f, dst.At(r, lane), src.At(r, lane)...);
            } else if (bits != 0) {
                for (uint32_t i = 0; i < chunk; ++i) {
                    if (bits >> i & 1) *dst.At(r, lane + i) = f(*src.At(r, lane + i)...);
                }
            }
        }
    }
}

// body(iteration, lane) for every active lane.
template <typename F>
void ForEachLane(const Plan& plan, F body) {
    for (uint32_t r = 0; r < plan.repeats; ++r) {
        const Mask mask = r + 1 == plan.repeats ? plan.last : plan.mask;
        for (uint32_t lane = 0; lane < plan.lanes; ++lane) {
            if ((lane < 64 ? mask.low >> lane : mask.high >> (lane - 64)) & 1) body(r, lane);
        }
    }
}

template <typename... T>
constexpr uint32_t LanesOf() {
    return kIteration / std::max({sizeof(T)...});
}

// The common body of one-source and two-source instructions; `reads` also covers a destination that is read.
template <typename F, typename D, typename S>
void Unary(const char* opcode, const Plan& plan, F f, const LocalTensor<D>& dst, Stride dstStride, const LocalTensor<S>& src,
           Stride srcStride, Where where) {
    const auto d = Place(dst, dstStride, opcode, "dst", where);
    const auto s = Place(src, srcStride, opcode, "src", where);
    CheckOverlap(plan, d, s, false, opcode, where);
    const Spans w = Touched(dst, plan, dstStride), a = Touched(src, plan, srcStride);
    Issue(PIPE_V, opcode, {a[0], a[1], a[2], a[3]}, {w[0], w[1], w[2], w[3]}, VectorCost(plan.repeats), where,
          [=] { Run(plan, f, d, s); });
}

template <typename F, typename D, typename S0, typename S1>
void Binary(const char* opcode, const Plan& plan, F f, const LocalTensor<D>& dst, Stride dstStride, const LocalTensor<S0>& src0,
            Stride stride0, const LocalTensor<S1>& src1, Stride stride1, bool mayAccumulate, Where where) {
    const auto d = Place(dst, dstStride, opcode, "dst", where);
    const auto s0 = Place(src0, stride0, opcode, "src0", where);
    const auto s1 = Place(src1, stride1, opcode, "src1", where);
    CheckOverlap(plan, d, s0, false, opcode, where);
    CheckOverlap(plan, d, s1, mayAccumulate, opcode, where);
    const Spans w = Touched(dst, plan, dstStride), a = Touched(src0, plan, stride0), b = Touched(src1, plan, stride1);
    Issue(PIPE_V, opcode, {a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]}, {w[0], w[1], w[2], w[3]}, VectorCost(plan.repeats),
          where, [=] { Run(plan, f, d, s0, s1); });
}

// ---- arithmetic on one element ----

template <typename T>
inline constexpr bool isFloating = isOneOf<T, half, bfloat16_t, float>;

// 16-bit floats compute in fp32 and round once; integers saturate.
template <typename T, typename F, typename... A>
T Compute(F f, A... a) {
    if constexpr (isFloating<T>) {
        return Narrow<T>(f(Widen(a)...));
    } else {
        const int64_t wide = f(static_cast<int64_t>(a)...);
        return static_cast<T>(
            std::min<int64_t>(std::max<int64_t>(wide, std::numeric_limits<T>::min()), std::numeric_limits<T>::max()));
    }
}

template <typename T>
auto ComparedAs(T value) {
    if constexpr (isFloating<T>) return Widen(value);
    else return value;
}

// NaN propagates: a kernel that lets one into a maximum must not look right by luck.
template <typename T>
T Larger(T a, T b) {
    const auto x = ComparedAs(a), y = ComparedAs(b);
    return x > y || x != x ? a : b;
}
template <typename T>
T Smaller(T a, T b) {
    const auto x = ComparedAs(a), y = ComparedAs(b);
    return x < y || x != x ? a : b;
}

namespace ops {

#define EMULATION_OPERATOR(NAME, PARAMETERS, VALUE) \
    struct NAME { \
        template <typename T> \
        T operator() PARAMETERS const { \
            return VALUE; \
        } \
    }
EMULATION_OPERATOR(Add, (T a, T b), Compute<T>([](auto x, auto y) { return x + y; }, a, b));
EMULATION_OPERATOR(Sub, (T a, T b), Compute<T>([](auto x, auto y) { return x - y; }, a, b));
EMULATION_OPERATOR(Mul, (T a, T b), Compute<T>([](auto x, auto y) { return x * y; }, a, b));
EMULATION_OPERATOR(Div, (T a, T b), Compute<T>([](auto x, auto y) { return x / y; }, a, b));
EMULATION_OPERATOR(Max, (T a, T b), Larger(a, b));
EMULATION_OPERATOR(Min, (T a, T b), Smaller(a, b));
EMULATION_OPERATOR(And, (T a, T b), static_cast<T>(a& b));
EMULATION_OPERATOR(Or, (T a, T b), static_cast<T>(a | b));
EMULATION_OPERATOR(Not, (T a), static_cast<T>(~a));
EMULATION_OPERATOR(ShiftLeft, (T a, T b), static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) << b));
EMULATION_OPERATOR(ShiftRight, (T a, T b), static_cast<T>(a >> b));
EMULATION_OPERATOR(Relu, (T a), Compute<T>([](auto x) { return x < 0 ? decltype(x){0} : x; }, a));
EMULATION_OPERATOR(Abs, (T a), Compute<T>([](auto x) { return std::fabs(x); }, a));
EMULATION_OPERATOR(Exp, (T a), Compute<T>([](auto x) { return std::exp(x); }, a));
EMULATION_OPERATOR(Ln, (T a), Compute<T>([](auto x) { return std::log(x); }, a));
EMULATION_OPERATOR(Sqrt, (T a), Compute<T>([](auto x) { return std::sqrt(x); }, a));
EMULATION_OPERATOR(Rsqrt, (T a), Compute<T>([](auto x) { return 1.0f / std::sqrt(x); }, a));
EMULATION_OPERATOR(Reciprocal, (T a), Compute<T>([](auto x) { return 1.0f / x; }, a));
#undef EMULATION_OPERATOR

}  // namespace ops

}  // namespace emulation

namespace AscendC {

using emulation::RepeatTimes;
using emulation::Where;

}  // namespace AscendC

// TAKES names the element types of the 910B, anything else does not compile; the others are the iterations of a call's form.
#define EMULATION_TAKES(NAME, ...) static_assert(emulation::isOneOf<T, __VA_ARGS__>, #NAME " on dav-2201 takes " #__VA_ARGS__)
#define EMULATION_BITS(NAME, ...) emulation::BitPlan(emulation::LanesOf<__VA_ARGS__>(), mask, repeatTime, isSetMask, #NAME, where)
#define EMULATION_LEADING(NAME, ...) \
    emulation::LeadingPlan(emulation::LanesOf<__VA_ARGS__>(), mask, repeatTime, isSetMask, #NAME, where)
#define EMULATION_COUNT(NAME, ...) \
    emulation::CountPlan(emulation::LanesOf<__VA_ARGS__>(), emulation::CheckCount(count, #NAME, where))
