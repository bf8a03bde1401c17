// Every instruction of the emulation against a scalar definition of its own, on random data.
//
//   instructions            names the cases
//   instructions <case>...  runs them; prints what differs and exits with 1
#include <cstdio>
#include <map>
#include <set>

#include "emulation/launch.h"

using namespace AscendC;
using emulation::Fault;

namespace {

// ---- cases ----

std::map<std::string, void (*)()>& Cases() {
    static std::map<std::string, void (*)()> cases;
    return cases;
}
struct Register {
    Register(const char* name, void (*run)()) { Cases()[name] = run; }
};
#define CASE(NAME) \
    void NAME(); \
    const Register register_##NAME(#NAME, NAME); \
    void NAME()

#define EXPECT(CONDITION, ...) \
    do { \
        if (!(CONDITION)) { \
            char text[512]; \
            std::snprintf(text, sizeof text, __VA_ARGS__); \
            throw std::runtime_error(std::string(__FILE__) + ":" + std::to_string(__LINE__) + ": " + text); \
        } \
    } while (0)

std::mt19937_64 generator(20240607);

double Uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }
int Integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

// ---- number formats, from their definition: sign, `mantissa` bits, exponents from `lowest` to `highest` ----

struct Format {
    int mantissa, lowest, highest;
};
constexpr Format kHalf{10, -14, 15}, kBfloat16{7, -126, 127}, kFloat{23, -126, 127};

template <typename T>
constexpr Format FormatOf() {
    return std::is_same_v<T, half> ? kHalf : std::is_same_v<T, bfloat16_t> ? kBfloat16 : kFloat;
}

double RoundInteger(double q, RoundMode mode) {  // q >= 0 with its sign handled by the caller through FLOOR and CEIL
    const double low = std::floor(q), rest = q - low;
    switch (mode) {
        case RoundMode::CAST_FLOOR:
        case RoundMode::CAST_TRUNC: return low;
        case RoundMode::CAST_CEIL: return rest > 0 ? low + 1 : low;
        case RoundMode::CAST_ROUND: return rest >= 0.5 ? low + 1 : low;
        case RoundMode::CAST_ODD: return rest == 0 ? low : std::fmod(low, 2) == 1 ? low : low + 1;
        default: return rest > 0.5 || (rest == 0.5 && std::fmod(low, 2) == 1) ? low + 1 : low;
    }
}

RoundMode OfMagnitude(RoundMode mode, bool negative) {
    if (!negative) return mode;
    return mode == RoundMode::CAST_FLOOR ? RoundMode::CAST_CEIL : mode == RoundMode::CAST_CEIL ? RoundMode::CAST_FLOOR : mode;
}

// The value of the format nearest to x in the sense of `mode`.
double RoundTo(double x, Format format, RoundMode mode = RoundMode::CAST_RINT) {
    if (std::isnan(x) || std::isinf(x) || x == 0) return x;
    const double magnitude = std::fabs(x);
    const int exponent = std::max(std::ilogb(magnitude), format.lowest);
    const double ulp = std::ldexp(1.0, exponent - format.mantissa);
    const double rounded = RoundInteger(magnitude / ulp, OfMagnitude(mode, x < 0)) * ulp;
    if (rounded < std::ldexp(1.0, format.highest + 1)) return std::copysign(rounded, x);
    const RoundMode ofMagnitude = OfMagnitude(mode, x < 0);  // towards zero the largest finite number stays, else it is infinity
    const bool towardsZero =
        ofMagnitude == RoundMode::CAST_FLOOR || ofMagnitude == RoundMode::CAST_TRUNC || ofMagnitude == RoundMode::CAST_ODD;
    return std::copysign(towardsZero ? std::ldexp(2 - std::ldexp(1.0, -format.mantissa), format.highest) : INFINITY, x);
}

template <typename T>
double Value(T x) {
    if constexpr (std::is_same_v<T, half> || std::is_same_v<T, bfloat16_t>) {
        constexpr Format f = FormatOf<T>();
        const int mantissa = x.bits & ((1 << f.mantissa) - 1), exponent = (x.bits & 0x7fff) >> f.mantissa;
        const double sign = x.bits & 0x8000 ? -1 : 1;
        if (exponent == (1 << (15 - f.mantissa)) - 1) return mantissa ? NAN : sign * INFINITY;
        if (exponent == 0) return sign * std::ldexp(mantissa, f.lowest - f.mantissa);
        return sign * std::ldexp(mantissa + (1 << f.mantissa), exponent - 1 + f.lowest - f.mantissa);
    } else {
        return static_cast<double>(x);
    }
}

bool Same(double a, double b) { return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b)); }
bool SameValue(double a, double b) { return (std::isnan(a) && std::isnan(b)) || a == b; }

template <typename T>
T Make(double value) {
    if constexpr (std::is_same_v<T, bfloat16_t>) return ToBfloat16(static_cast<float>(value));
    else if constexpr (std::is_same_v<T, half>) return half(static_cast<float>(value));
    else return static_cast<T>(value);
}

// What an element of type T holds after an operation whose exact result is `value`.
template <typename T>
double Stored(double value) {
    if constexpr (std::is_integral_v<T>) {
        return std::min<double>(std::max<double>(value, std::numeric_limits<T>::min()), std::numeric_limits<T>::max());
    } else {
        return RoundTo(value, FormatOf<T>());
    }
}

template <typename T>
T Bits(uint16_t bits) {
    T value;
    value.bits = bits;
    return value;
}

template <typename T>
std::vector<T> Random(size_t n, double low = -8, double high = 8) {
    std::vector<T> values(n);
    for (T& value : values) value = Make<T>(Uniform(low, high));
    return values;
}

// ---- on a core ----

template <typename F>
void OnVector(F body) {
    emulation::LaunchOptions options;
    options.kernel = "instructions";
    options.type = KERNEL_TYPE_AIV_ONLY;
    emulation::Launch(options, [&] {
        TPipe pipe;
        body(pipe);
    });
}

template <typename T>
LocalTensor<T> Empty(TPipe& pipe, size_t count) {
    TBuf<TPosition::VECCALC> buffer;
    pipe.InitBuffer(buffer, static_cast<uint32_t>((count * sizeof(T) + 31) / 32 * 32));
    return buffer.Get<T>();
}

template <typename T>
LocalTensor<T> Put(TPipe& pipe, const std::vector<T>& values) {
    const LocalTensor<T> tensor = Empty<T>(pipe, values.size());
    std::memcpy(static_cast<void*>(tensor.Data()), values.data(), values.size() * sizeof(T));
    const emulation::Span span = tensor.Whole();
    std::memset(span.memory->written + span.begin, 1, (values.size() * sizeof(T) + 31) / 32 * 32);
    return tensor;
}

template <typename T>
std::vector<T> Take(const LocalTensor<T>& tensor, size_t count) {
    return {tensor.Data(), tensor.Data() + count};
}

// The element index of a lane: 32-byte blocks at `block`, iterations at `repeat` (both in blocks).
template <typename T>
size_t At(uint32_t repeat, uint32_t lane, uint32_t blockStride, uint32_t repeatStride) {
    const uint32_t perBlock = 32 / sizeof(T);
    return (size_t{repeat} * repeatStride + size_t{lane / perBlock} * blockStride) * perBlock + lane % perBlock;
}

struct Form {  // how a call iterates
    uint32_t repeats;
    uint64_t bits[2];
    bool byBits;
    uint64_t leading;
    bool Active(uint32_t lane) const { return byBits ? bits[lane / 64] >> (lane % 64) & 1 : lane < leading; }
};

Form RandomForm(uint32_t lanes) {
    Form form{};
    form.repeats = Integer(1, 5);
    form.byBits = Integer(0, 1);
    form.leading = Integer(1, lanes);
    form.bits[0] = generator();
    form.bits[1] = lanes > 64 ? generator() : 0;
    return form;
}

// expected[at] is the value `f` gives for every active lane; all other elements keep what they held.
template <typename D, typename F>
void ExpectLanes(const char* what, const std::vector<D>& before, const std::vector<D>& after, uint32_t lanes, const Form& form,
                 uint32_t block, uint32_t repeat, F f, double tolerance = 0, double absolute = 0) {
    std::vector<double> expected(before.size());
    for (size_t i = 0; i < before.size(); ++i) expected[i] = Value(before[i]);
    for (uint32_t r = 0; r < form.repeats; ++r) {
        for (uint32_t lane = 0; lane < lanes; ++lane) {
            if (form.Active(lane)) expected[At<D>(r, lane, block, repeat)] = f(r, lane);
        }
    }
    for (size_t i = 0; i < before.size(); ++i) {
        const double got = Value(after[i]);
        const bool close =
            SameValue(got, expected[i]) || std::fabs(got - expected[i]) <= tolerance * std::fabs(expected[i]) + absolute;
        EXPECT(close, "%s: element %zu is %.9g, not %.9g", what, i, got, expected[i]);
    }
}

constexpr size_t kElements = 4096;  // enough for 5 iterations at the strides below

// One two-source instruction in its three forms.
template <typename T, typename Call, typename F>
void CheckBinary(const char* name, Call call, F reference, double low = -8, double high = 8) {
    constexpr uint32_t lanes = 256 / sizeof(T);
    for (const int count : {0, 1, 7, static_cast<int>(lanes), static_cast<int>(lanes) + 1, 1000}) {
        OnVector([&](TPipe& pipe) {
            const auto a = Random<T>(1024, low, high), b = Random<T>(1024, low, high), c = Random<T>(1024, low, high);
            const auto ta = Put(pipe, a), tb = Put(pipe, b), tc = Put(pipe, c);
            call(tc, ta, tb, count);
            Form all{1, {}, false, static_cast<uint64_t>(count)};
            ExpectLanes(name, c, Take(tc, 1024), 1024, all, 1, 0,
                        [&](uint32_t, uint32_t i) { return Stored<T>(reference(Value(a[i]), Value(b[i]))); });
        });
    }
    for (int trial = 0; trial < 24; ++trial) {
        const Form form = RandomForm(lanes);
        const uint8_t blocks[3] = {static_cast<uint8_t>(Integer(1, 3)), static_cast<uint8_t>(Integer(0, 3)),
                                   static_cast<uint8_t>(Integer(0, 3))};
        const uint8_t repeats[3] = {static_cast<uint8_t>(8 * blocks[0]), static_cast<uint8_t>(Integer(0, 24)),
                                    static_cast<uint8_t>(Integer(0, 24))};
        OnVector([&](TPipe& pipe) {
            const auto a = Random<T>(kElements, low, high), b = Random<T>(kElements, low, high),
                       c = Random<T>(kElements, low, high);
            const auto ta = Put(pipe, a), tb = Put(pipe, b), tc = Put(pipe, c);
            const BinaryRepeatParams params(blocks[0], blocks[1], blocks[2], repeats[0], repeats[1], repeats[2]);
            uint64_t bits[2] = {form.bits[0], form.bits[1]};
            if (form.byBits) call(tc, ta, tb, bits, form.repeats, params);
            else call(tc, ta, tb, form.leading, form.repeats, params);
            ExpectLanes(name, c, Take(tc, kElements), lanes, form, blocks[0], repeats[0], [&](uint32_t r, uint32_t lane) {
                return Stored<T>(
                    reference(Value(a[At<T>(r, lane, blocks[1], repeats[1])]), Value(b[At<T>(r, lane, blocks[2], repeats[2])])));
            });
        });
    }
}

// One one-source instruction (a scalar is inside `call`) from S to D.
template <typename D, typename S, typename Call, typename F>
void CheckUnary(const char* name, Call call, F reference, double low = -8, double high = 8, double tolerance = 0) {
    constexpr uint32_t lanes = 256 / std::max(sizeof(D), sizeof(S));
    for (const int count : {0, 1, 7, static_cast<int>(lanes), static_cast<int>(lanes) + 1, 1000}) {
        OnVector([&](TPipe& pipe) {
            const auto a = Random<S>(1024, low, high);
            const auto c = Random<D>(1024, low, high);
            const auto ta = Put(pipe, a);
            const auto tc = Put(pipe, c);
            call(tc, ta, count);
            Form all{1, {}, false, static_cast<uint64_t>(count)};
            ExpectLanes(
                name, c, Take(tc, 1024), 1024, all, 1, 0, [&](uint32_t, uint32_t i) { return reference(Value(a[i])); },
                tolerance);
        });
    }
    for (int trial = 0; trial < 16; ++trial) {
        const Form form = RandomForm(lanes);
        const uint8_t dBlock = Integer(1, 3), sBlock = Integer(0, 3), dRepeat = 8 * dBlock, sRepeat = Integer(0, 24);
        OnVector([&](TPipe& pipe) {
            const auto a = Random<S>(kElements, low, high);
            const auto c = Random<D>(kElements, low, high);
            const auto ta = Put(pipe, a);
            const auto tc = Put(pipe, c);
            const UnaryRepeatParams params(dBlock, sBlock, dRepeat, sRepeat);
            uint64_t bits[2] = {form.bits[0], form.bits[1]};
            if (form.byBits) call(tc, ta, bits, form.repeats, params);
            else call(tc, ta, form.leading, form.repeats, params);
            ExpectLanes(
                name, c, Take(tc, kElements), lanes, form, dBlock, dRepeat,
                [&](uint32_t r, uint32_t lane) { return reference(Value(a[At<S>(r, lane, sBlock, sRepeat)])); }, tolerance);
        });
    }
}

#define CALL(NAME) [](auto&&... arguments) { NAME(arguments...); }

// ---- numbers ----

template <typename T>
void CheckFormat() {
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        const T x = Bits<T>(bits);
        const float widened = emulation::Widen(x);
        EXPECT(Same(widened, Value(x)), "bits %04x widen to %.9g, not %.9g", bits, widened, Value(x));
        const T back = emulation::Narrow<T>(widened);
        EXPECT(std::isnan(widened) ? std::isnan(emulation::Widen(back)) : back.bits == bits, "bits %04x come back as %04x", bits,
               back.bits);
    }
    // Exactly between two neighbours, and a float's breadth to either side.
    for (uint32_t bits = 0; bits + 1 < 0x8000; ++bits) {
        const double low = Value(Bits<T>(bits)), high = Value(Bits<T>(bits + 1));
        if (!std::isfinite(high)) continue;
        for (const float near :
             {std::nextafterf(static_cast<float>((low + high) / 2), 0.0f), static_cast<float>((low + high) / 2),
              std::nextafterf(static_cast<float>((low + high) / 2), INFINITY)}) {
            for (const float x : {near, -near}) {
                const double got = Value(emulation::Narrow<T>(x)), expected = RoundTo(x, FormatOf<T>());
                EXPECT(Same(got, expected), "%.9g rounds to %.9g, not %.9g", x, got, expected);
            }
        }
    }
}

CASE(half_patterns_and_halfway_cases) {
    CheckFormat<half>();
    EXPECT(half(65519.996f).bits == 0x7bff && half(65520.0f).bits == 0x7c00, "the last value that does not overflow");
    EXPECT(half(0x1p-25f).bits == 0 && half(0x1.000002p-25f).bits == 1, "half of the smallest subnormal");
}
CASE(bfloat16_patterns_and_halfway_cases) { CheckFormat<bfloat16_t>(); }

template <typename D, typename S>
void CheckCastMode(RoundMode mode, double low, double high) {
    const auto reference = [mode](double x) {
        if constexpr (std::is_integral_v<D> && std::is_integral_v<S>) {
            return Stored<D>(x);
        } else if constexpr (std::is_integral_v<D> || (std::is_same_v<D, float> && std::is_same_v<S, float>)) {
            const double rounded = std::copysign(RoundInteger(std::fabs(x), OfMagnitude(mode, x < 0)), x);
            return std::is_integral_v<D> ? Stored<D>(rounded) : rounded;
        } else {
            return RoundTo(x, FormatOf<D>(), mode);
        }
    };
    CheckUnary<D, S>("Cast", [mode](auto& dst, auto& src, auto... form) { Cast(dst, src, mode, form...); }, reference, low, high);
}

template <typename D, typename S>
void CheckCast(double low, double high) {
    for (int mode = 0; mode <= static_cast<int>(RoundMode::CAST_ODD); ++mode) {
        if (emulation::CastAllows<D, S>(static_cast<RoundMode>(mode)))
            CheckCastMode<D, S>(static_cast<RoundMode>(mode), low, high);
    }
}

CASE(cast_float) {
    CheckCast<half, float>(-70000, 70000);
    CheckCast<half, float>(-1e-4, 1e-4);
    CheckCast<bfloat16_t, float>(-300, 300);
    CheckCast<int32_t, float>(-3e9, 3e9);
    CheckCast<int32_t, float>(-20, 20);
    CheckCast<int16_t, float>(-40000, 40000);
    CheckCast<int64_t, float>(-1e6, 1e6);
    CheckCast<float, float>(-20, 20);
}
CASE(cast_16_bit_floats) {
    CheckCast<float, half>(-60000, 60000);
    CheckCast<float, bfloat16_t>(-1e9, 1e9);
    CheckCast<int32_t, half>(-100, 100);
    CheckCast<int32_t, bfloat16_t>(-100, 100);
    CheckCast<int16_t, half>(-40000, 40000);
    CheckCast<int8_t, half>(-200, 200);
    CheckCast<uint8_t, half>(-50, 300);
}
CASE(cast_integers) {
    CheckCast<half, uint8_t>(0, 255);
    CheckCast<half, int8_t>(-128, 127);
    CheckCast<half, int16_t>(-32768, 32767);
    CheckCast<float, int16_t>(-32768, 32767);
    CheckCast<float, int32_t>(-2e9, 2e9);
    CheckCast<int16_t, int32_t>(-70000, 70000);
    CheckCast<int64_t, int32_t>(-2e9, 2e9);
    CheckCast<int32_t, int64_t>(-4e9, 4e9);
    CheckCast<float, int64_t>(-1e15, 1e15);
}
CASE(cast_special_values) {
    OnVector([](TPipe& pipe) {
        const auto src = Put<float>(pipe, {NAN, INFINITY, -INFINITY, 2.5f, 3.5f, -2.5f, 1e30f, -1e30f});
        const auto integers = Empty<int32_t>(pipe, 8);
        const auto halves = Empty<half>(pipe, 16);
        Cast(integers, src, RoundMode::CAST_RINT, 8);
        Cast(halves, src, RoundMode::CAST_NONE, 8);
        const int32_t expected[8] = {0, INT32_MAX, INT32_MIN, 2, 4, -2, INT32_MAX, INT32_MIN};
        for (int i = 0; i < 8; ++i)
            EXPECT(integers.Data()[i] == expected[i], "element %d is %d, not %d", i, integers.Data()[i], expected[i]);
        EXPECT(std::isnan(Value(halves.Data()[0])) && halves.Data()[1].bits == 0x7c00 && halves.Data()[2].bits == 0xfc00 &&
                   halves.Data()[6].bits == 0x7c00,
               "NaN and infinities stay, large values overflow");
    });
}

// ---- arithmetic ----

template <typename T>
void CheckArithmetic(double range) {
    CheckBinary<T>("Add", CALL(Add), [](double a, double b) { return a + b; }, -range, range);
    CheckBinary<T>("Sub", CALL(Sub), [](double a, double b) { return a - b; }, -range, range);
    CheckBinary<T>("Mul", CALL(Mul), [](double a, double b) { return a * b; }, -range, range);
    CheckBinary<T>("Max", CALL(Max), [](double a, double b) { return std::max(a, b); }, -range, range);
    CheckBinary<T>("Min", CALL(Min), [](double a, double b) { return std::min(a, b); }, -range, range);
    const T s = Make<T>(Uniform(-range, range));
    CheckUnary<T, T>(
        "Adds", [s](auto& d, auto& a, auto... form) { Adds(d, a, s, form...); },
        [s](double a) { return Stored<T>(a + Value(s)); }, -range, range);
    CheckUnary<T, T>(
        "Muls", [s](auto& d, auto& a, auto... form) { Muls(d, a, s, form...); },
        [s](double a) { return Stored<T>(a * Value(s)); }, -range, range);
    CheckUnary<T, T>(
        "Maxs", [s](auto& d, auto& a, auto... form) { Maxs(d, a, s, form...); }, [s](double a) { return std::max(a, Value(s)); },
        -range, range);
    CheckUnary<T, T>(
        "Mins", [s](auto& d, auto& a, auto... form) { Mins(d, a, s, form...); }, [s](double a) { return std::min(a, Value(s)); },
        -range, range);
}
CASE(arithmetic_half) { CheckArithmetic<half>(300); }
CASE(arithmetic_float) { CheckArithmetic<float>(1e4); }
CASE(arithmetic_int32) { CheckArithmetic<int32_t>(2e9); }
CASE(arithmetic_int16) { CheckArithmetic<int16_t>(30000); }

CASE(division) {
    CheckBinary<half>("Div", CALL(Div), [](double a, double b) { return a / b; }, 0.5, 100);
    CheckBinary<float>("Div", CALL(Div), [](double a, double b) { return a / b; }, 0.5, 100);
}

template <typename T>
void CheckFunctions(double tolerance) {
    CheckUnary<T, T>("Relu", CALL(Relu), [](double a) { return a > 0 ? a : 0; });
    CheckUnary<T, T>("Abs", CALL(Abs), [](double a) { return std::fabs(a); });
    CheckUnary<T, T>("Exp", CALL(Exp), [](double a) { return std::exp(a); }, -8, 8, tolerance);
    CheckUnary<T, T>("Ln", CALL(Ln), [](double a) { return std::log(a); }, 2, 100, tolerance);
    CheckUnary<T, T>("Sqrt", CALL(Sqrt), [](double a) { return std::sqrt(a); }, 0, 100, tolerance);
    CheckUnary<T, T>("Rsqrt", CALL(Rsqrt), [](double a) { return 1 / std::sqrt(a); }, 0.1, 100, tolerance);
    CheckUnary<T, T>("Reciprocal", CALL(Reciprocal), [](double a) { return 1 / a; }, 0.1, 100, tolerance);
}
CASE(functions_half) { CheckFunctions<half>(0x1p-10); }
CASE(functions_float) { CheckFunctions<float>(0x1p-22); }
CASE(relu_int32) {
    CheckUnary<int32_t, int32_t>("Relu", CALL(Relu), [](double a) { return a > 0 ? a : 0; }, -1e9, 1e9);
}

CASE(exp_of_minus_infinity_is_zero) {
    OnVector([](TPipe& pipe) {
        const auto src = Put<float>(pipe, {-INFINITY, INFINITY, NAN, -1e30f, 0, 88.0f, -100.0f, 1});
        Exp(src, src, 8);
        const auto got = Take(src, 8);
        EXPECT(got[0] == 0 && got[1] == INFINITY && std::isnan(got[2]) && got[3] == 0 && got[4] == 1, "got %g %g %g %g %g",
               got[0], got[1], got[2], got[3], got[4]);
    });
}

CASE(nan_propagates_through_max_min_and_relu) {
    OnVector([](TPipe& pipe) {
        const auto a = Put<float>(pipe, {NAN, 1, NAN, -1, 0, 0, 0, 0}), b = Put<float>(pipe, {1, NAN, NAN, 2, 0, 0, 0, 0});
        const auto c = Empty<float>(pipe, 8), d = Empty<float>(pipe, 8), e = Empty<float>(pipe, 8);
        Max(c, a, b, 8);
        Min(d, a, b, 8);
        Relu(e, a, 8);
        for (int i = 0; i < 3; ++i) EXPECT(std::isnan(c.Data()[i]) && std::isnan(d.Data()[i]), "lane %d", i);
        EXPECT(c.Data()[3] == 2 && d.Data()[3] == -1 && std::isnan(e.Data()[0]) && e.Data()[3] == 0, "the other lanes");
    });
}

CASE(bit_operations) {
    const auto whole = [](auto f) {
        return [f](double a, double b) {
            return static_cast<double>(static_cast<int16_t>(f(static_cast<int16_t>(a), static_cast<int16_t>(b))));
        };
    };
    CheckBinary<int16_t>("And", CALL(And), whole([](int16_t a, int16_t b) { return a & b; }), -32000, 32000);
    CheckBinary<int16_t>("Or", CALL(Or), whole([](int16_t a, int16_t b) { return a | b; }), -32000, 32000);
    CheckUnary<int16_t, int16_t>("Not", CALL(Not), [](double a) { return -1 - a; }, -32000, 32000);
    CheckUnary<int32_t, int32_t>(
        "ShiftLeft", [](auto& d, auto& a, auto... form) { ShiftLeft(d, a, 3, form...); }, [](double a) { return a * 8; }, -1e8,
        1e8);
    CheckUnary<int32_t, int32_t>(
        "ShiftRight", [](auto& d, auto& a, auto... form) { ShiftRight(d, a, 3, form...); },
        [](double a) { return std::floor(a / 8); }, -1e8, 1e8);
}

template <typename D, typename S>
void CheckMultiplyAccumulate() {
    constexpr uint32_t lanes = 256 / sizeof(D);
    const S s = Make<S>(1.75);
    for (int trial = 0; trial < 16; ++trial) {
        const Form form = RandomForm(lanes);
        const uint8_t dBlock = Integer(1, 3), sBlock = Integer(0, 3), dRepeat = 8 * dBlock, sRepeat = Integer(0, 24);
        OnVector([&](TPipe& pipe) {
            const auto a = Random<S>(kElements), b = Random<S>(kElements);
            const auto c = Random<D>(kElements);
            const auto ta = Put(pipe, a), tb = Put(pipe, b);
            const auto tc = Put(pipe, c), td = Put(pipe, c);
            uint64_t bits[2] = {form.bits[0], form.bits[1]};
            const UnaryRepeatParams one(dBlock, sBlock, dRepeat, sRepeat);
            const BinaryRepeatParams two(dBlock, sBlock, 1, dRepeat, sRepeat, 8);
            if (form.byBits) {
                Axpy(tc, ta, s, bits, form.repeats, one);
                MulAddDst(td, ta, tb, bits, form.repeats, two);
            } else {
                Axpy(tc, ta, s, form.leading, form.repeats, one);
                MulAddDst(td, ta, tb, form.leading, form.repeats, two);
            }
            const auto old = [&](uint32_t r, uint32_t lane) { return Value(c[At<D>(r, lane, dBlock, dRepeat)]); };
            const auto left = [&](uint32_t r, uint32_t lane) { return Value(a[At<S>(r, lane, sBlock, sRepeat)]); };
            const double tolerance = std::is_same_v<D, half> ? 0x1p-9 : 0x1p-20;
            ExpectLanes(
                "Axpy", c, Take(tc, kElements), lanes, form, dBlock, dRepeat,
                [&](uint32_t r, uint32_t lane) { return Stored<D>(left(r, lane) * Value(s) + old(r, lane)); }, tolerance, 1e-5);
            ExpectLanes(
                "MulAddDst", c, Take(td, kElements), lanes, form, dBlock, dRepeat,
                [&](uint32_t r, uint32_t lane) {
                    return Stored<D>(left(r, lane) * Value(b[At<S>(r, lane, 1, 8)]) + old(r, lane));
                },
                tolerance, 1e-5);
        });
    }
    OnVector([&](TPipe& pipe) {
        const auto a = Random<S>(200);
        const auto c = Random<D>(200);
        const auto ta = Put(pipe, a);
        const auto tc = Put(pipe, c);
        Axpy(tc, ta, s, 150);
        Form all{1, {}, false, 150};
        ExpectLanes(
            "Axpy", c, Take(tc, 200), 200, all, 1, 0,
            [&](uint32_t, uint32_t i) { return Stored<D>(Value(a[i]) * Value(s) + Value(c[i])); },
            std::is_same_v<D, half> ? 0x1p-9 : 0x1p-20, 1e-5);
    });
}
CASE(multiply_accumulate) {
    CheckMultiplyAccumulate<float, float>();
    CheckMultiplyAccumulate<half, half>();
    CheckMultiplyAccumulate<float, half>();
}

CASE(accumulation_into_a_destination_at_stride_zero) {
    OnVector([](TPipe& pipe) {
        const auto rows = Random<float>(5 * 64), start = Random<float>(64);
        const auto src = Put(pipe, rows), dst = Put(pipe, start);
        Add(dst, src, dst, 64, 5, {1, 1, 1, 0, 8, 0});
        for (int i = 0; i < 64; ++i) {
            float sum = start[i];
            for (int r = 0; r < 5; ++r) sum = rows[r * 64 + i] + sum;
            EXPECT(dst.Data()[i] == sum, "lane %d is %g, not %g", i, dst.Data()[i], sum);
        }
    });
}

CASE(in_place_and_the_mask_register) {
    OnVector([](TPipe& pipe) {
        const auto values = Random<float>(256);
        const auto a = Put(pipe, values), b = Put(pipe, values);
        Muls(a, a, 2.0f, 256);
        for (int i = 0; i < 256; ++i) EXPECT(a.Data()[i] == 2 * values[i], "element %d", i);
        SetVectorMask<float>(0, 0xff00);
        Adds<float, false>(b, b, 1.0f, MASK_PLACEHOLDER, 4, {1, 1, 8, 8});
        for (int i = 0; i < 256; ++i) {
            const float expected = i % 64 >= 8 && i % 64 < 16 ? values[i] + 1 : values[i];
            EXPECT(b.Data()[i] == expected, "masked element %d", i);
        }
        PipeBarrier<PIPE_V>();
        SetMaskCount();
        SetVectorMask<float, MaskMode::COUNTER>(130);
        Adds<float, false>(b, b, 1.0f, MASK_PLACEHOLDER, 1, {1, 1, 8, 8});
        SetMaskNorm();
        ResetMask();
        EXPECT(b.Data()[129] == values[129] + 1 && b.Data()[130] == values[130], "counter mode covers 130 elements");
    });
}

// ---- moving and filling ----

template <typename T>
void CheckMoves() {
    const T s = Make<T>(7);
    CheckUnary<T, T>(
        "Duplicate",
        [s](auto& d, auto&, auto... form) {
            if constexpr (sizeof...(form) == 1) Duplicate(d, s, form...);
            else
                [&](auto mask, auto repeats, const UnaryRepeatParams& p) {
                    Duplicate(d, s, mask, repeats, p.dstBlkStride, p.dstRepStride);
                }(form...);
        },
        [s](double) { return Value(s); }, 0, 100);
    for (int trial = 0; trial < 8; ++trial) {
        const Form form = RandomForm(256 / sizeof(T));
        const uint16_t dBlock = Integer(1, 3), sBlock = Integer(1, 3), dRepeat = 8 * dBlock, sRepeat = Integer(0, 24);
        OnVector([&](TPipe& pipe) {
            const auto a = Random<T>(kElements, 0, 100), c = Random<T>(kElements, 0, 100);
            const auto ta = Put(pipe, a), tc = Put(pipe, c);
            if (form.byBits) Copy(tc, ta, form.bits, form.repeats, {dBlock, sBlock, dRepeat, sRepeat});
            else Copy(tc, ta, form.leading, form.repeats, {dBlock, sBlock, dRepeat, sRepeat});
            ExpectLanes("Copy", c, Take(tc, kElements), 256 / sizeof(T), form, dBlock, dRepeat,
                        [&](uint32_t r, uint32_t lane) { return Value(a[At<T>(r, lane, sBlock, sRepeat)]); });
        });
    }
    OnVector([&](TPipe& pipe) {
        const auto a = Random<T>(40, 0, 100);
        const auto ta = Put(pipe, a);
        const auto tc = Put(pipe, std::vector<T>(5 * 24 * 32 / sizeof(T), s));
        Brcb(tc, ta, 5, {3, 24});
        for (uint32_t i = 0; i < 5 * 24; ++i) {
            for (uint32_t j = 0; j < 32 / sizeof(T); ++j) {
                const double expected = i % 3 == 0 ? Value(a[i / 24 * 8 + i % 24 / 3]) : Value(s);
                EXPECT(Value(tc.Data()[i * (32 / sizeof(T)) + j]) == expected, "Brcb block %u", i);
            }
        }
    });
    for (const bool byCount : {true, false}) {
        OnVector([&](TPipe& pipe) {
            const auto a = Random<T>(500, 0, 100), c = Random<T>(512, 0, 100);
            std::vector<uint32_t> offsets(512);
            for (uint32_t& offset : offsets) offset = Integer(0, 399) * sizeof(T);
            const auto ta = Put(pipe, a), tc = Put(pipe, c);
            const auto to = Put(pipe, offsets);
            const uint32_t base = 100 * sizeof(T), lanes = 256 / sizeof(T);
            if (byCount) Gather(tc, ta, to, base, 333u);
            else Gather(tc, ta, to, base, 20, 3, 8);
            for (uint32_t i = 0; i < 512; ++i) {
                const bool active = byCount ? i < 333 : i / lanes < 3 && i % lanes < 20;
                EXPECT(Value(tc.Data()[i]) == Value(active ? a[100 + offsets[i] / sizeof(T)] : c[i]), "Gather element %u", i);
            }
        });
    }
}
CASE(moves_half) { CheckMoves<half>(); }
CASE(moves_bfloat16) { CheckMoves<bfloat16_t>(); }
CASE(moves_float) { CheckMoves<float>(); }
CASE(moves_int32) { CheckMoves<int32_t>(); }
CASE(moves_uint16) { CheckMoves<uint16_t>(); }

CASE(create_vec_index) {
    OnVector([](TPipe& pipe) {
        auto integers = Put<int32_t>(pipe, std::vector<int32_t>(300, -1));
        auto halves = Put<half>(pipe, std::vector<half>(512, half(-1)));
        CreateVecIndex(integers, 17, 255u);
        CreateVecIndex(halves, half(3), 100, 2, 2, 16);
        for (int i = 0; i < 300; ++i) EXPECT(integers.Data()[i] == (i < 255 ? 17 + i : -1), "int32 element %d", i);
        for (uint32_t r = 0; r < 2; ++r) {
            for (uint32_t lane = 0; lane < 100; ++lane)
                EXPECT(halves.Data()[At<half>(r, lane, 2, 16)] == 3.0f + r * 128 + lane, "half lane %u", lane);
        }
        auto floats = Put<float>(pipe, std::vector<float>(256, -1));
        uint64_t bits[2] = {0x8001000000000102ull, 0};
        CreateVecIndex(floats, 5.0f, bits, 2, 1, 8);
        for (uint32_t i = 0; i < 256; ++i) {
            EXPECT(floats.Data()[i] == (i < 128 && bits[0] >> i % 64 & 1 ? 5.0f + i : -1.0f), "float element %u", i);
        }
        auto few = Put<int32_t>(pipe, std::vector<int32_t>(16, -1));
        CreateVecIndex(few, 4, 3u);
        for (int i = 0; i < 16; ++i) EXPECT(few.Data()[i] == (i < 3 ? 4 + i : -1), "short element %d", i);
    });
}

template <typename T, typename U>
void CheckGatherMask() {
    for (int trial = 0; trial < 60; ++trial) {
        const bool counter = Integer(0, 1), byTensor = Integer(0, 1);
        const uint32_t perRepeat = counter ? Integer(1, 300) : 256 / sizeof(T), repeats = Integer(1, 4);
        const uint8_t block = Integer(1, 2), bitStride = Integer(0, 3);
        const uint16_t repeatStride = Integer(0, 40);
        const uint8_t pattern = Integer(1, 7);
        OnVector([&](TPipe& pipe) {
            const auto a = Random<T>(8192, 0, 100);
            std::vector<U> bits(512);
            for (U& word : bits) word = static_cast<U>(generator());
            const auto ta = Put(pipe, a), tc = Put(pipe, std::vector<T>(2048, Make<T>(-1)));
            const auto tb = Put(pipe, bits);
            uint64_t count = 0;
            const GatherMaskParams params(block, repeats, repeatStride, bitStride);
            if (byTensor) GatherMask(tc, ta, tb, counter, counter ? perRepeat : 0, params, count);
            else GatherMask(tc, ta, pattern, counter, counter ? perRepeat : 0, params, count);
            std::vector<double> expected;
            for (uint32_t r = 0; r < repeats; ++r) {
                for (uint32_t i = 0; i < perRepeat; ++i) {
                    const uint32_t bit = r * bitStride * 256 + i;
                    static const char* const patterns[] = {"", "1010", "0101", "1000", "0100", "0010", "0001", "1111"};
                    const bool selected =
                        byTensor ? bits[bit / (8 * sizeof(U))] >> (bit % (8 * sizeof(U))) & 1 : patterns[pattern][i % 4] == '1';
                    if (selected) expected.push_back(Value(a[At<T>(r, i, block, repeatStride)]));
                }
            }
            EXPECT(count == expected.size(), "GatherMask kept %llu, not %zu", static_cast<unsigned long long>(count),
                   expected.size());
            for (size_t i = 0; i < expected.size(); ++i) EXPECT(Value(tc.Data()[i]) == expected[i], "GatherMask element %zu", i);
            EXPECT(Value(tc.Data()[expected.size()]) == -1, "GatherMask wrote past its result");
        });
    }
}
CASE(gather_mask_16_bits) { CheckGatherMask<half, uint16_t>(); }
CASE(gather_mask_32_bits) { CheckGatherMask<float, uint32_t>(); }

// ---- Compare and Select ----

template <typename T>
void CheckCompare() {
    constexpr uint32_t lanes = 256 / sizeof(T);
    for (int mode = 0; mode < 6; ++mode) {
        const auto cmp = static_cast<CMPMODE>(mode);
        if (std::is_same_v<T, int32_t> && cmp != CMPMODE::EQ) continue;
        const auto holds = [&](double a, double b) {
            return cmp == CMPMODE::LT ? a < b
                : cmp == CMPMODE::GT  ? a > b
                : cmp == CMPMODE::EQ  ? a == b
                : cmp == CMPMODE::LE  ? a <= b
                : cmp == CMPMODE::GE  ? a >= b
                                      : a != b;
        };
        for (const bool byCount : {true, false}) {
            OnVector([&](TPipe& pipe) {
                auto a = Random<T>(kElements, -3, 3), b = Random<T>(kElements, -3, 3);
                for (size_t i = 0; i < kElements; ++i)
                    a[i] = Make<T>(std::floor(Value(a[i]))), b[i] = Make<T>(std::floor(Value(b[i])));
                if (!std::is_integral_v<T>) a[5] = Make<T>(NAN), b[9] = Make<T>(NAN), a[11] = b[11] = Make<T>(INFINITY);
                const T s = Make<T>(1);
                const auto ta = Put(pipe, a), tb = Put(pipe, b);
                const auto t0 = Put(pipe, std::vector<uint8_t>(256, 0x5a)), t1 = Put(pipe, std::vector<uint8_t>(256, 0x5a)),
                           t2 = Put(pipe, std::vector<uint8_t>(256, 0x5a));
                if (byCount) {
                    Compare(t0, ta, tb, cmp, 4 * lanes);
                    CompareScalar(t1, ta, s, cmp, 4 * lanes);
                    Compares(t2, ta, s, cmp, 4 * lanes);
                } else {  // the mask is ignored: all lanes are compared
                    Compare(t0, ta, tb, cmp, 5, 4, {1, 2, 0, 8, 16, 8});
                    CompareScalar(t1, ta, s, cmp, 5, 4, {1, 2, 8, 16});
                    Compares(t2, ta, s, cmp, 5, 4, {1, 2, 8, 16});
                }
                for (uint32_t i = 0; i < 256 * 8; ++i) {
                    const uint32_t r = i / lanes, lane = i % lanes;
                    const auto bit = [&](const LocalTensor<uint8_t>& t) { return t.Data()[i / 8] >> (i % 8) & 1; };
                    if (r >= 4) {
                        EXPECT(bit(t0) == (0x5a >> (i % 8) & 1), "Compare wrote past its result");
                        continue;
                    }
                    const double left = Value(a[byCount ? i : At<T>(r, lane, 2, 16)]),
                                 right = Value(b[byCount ? i : At<T>(r, lane, 0, 8)]);
                    EXPECT(bit(t0) == holds(left, right), "Compare mode %d bit %u", mode, i);
                    EXPECT(bit(t1) == holds(left, Value(s)) && bit(t2) == holds(left, Value(s)), "CompareScalar mode %d bit %u",
                           mode, i);
                }
            });
        }
    }
}
CASE(compare_half) { CheckCompare<half>(); }
CASE(compare_float) { CheckCompare<float>(); }
CASE(compare_int32) { CheckCompare<int32_t>(); }

template <typename T>
void CheckSelect() {
    constexpr uint32_t lanes = 256 / sizeof(T);
    for (int mode = 0; mode < 3; ++mode) {
        for (int trial = 0; trial < 12; ++trial) {
            Form form = RandomForm(lanes);
            const bool byCount = trial < 3;
            const uint8_t blocks[3] = {static_cast<uint8_t>(Integer(1, 2)), static_cast<uint8_t>(Integer(0, 2)),
                                       static_cast<uint8_t>(Integer(0, 2))};
            const uint8_t repeats[3] = {static_cast<uint8_t>(8 * blocks[0]), static_cast<uint8_t>(Integer(0, 16)),
                                        static_cast<uint8_t>(Integer(0, 16))};
            OnVector([&](TPipe& pipe) {
                const auto a = Random<T>(kElements), b = Random<T>(kElements), c = Random<T>(kElements);
                const T s = Make<T>(-1e30);
                std::vector<uint8_t> bits(512);
                for (uint8_t& byte : bits) byte = static_cast<uint8_t>(generator());
                const auto ta = Put(pipe, a), tb = Put(pipe, b), tc = Put(pipe, c);
                const auto tm = Put(pipe, bits);
                const auto sel = static_cast<SELMODE>(mode);
                const bool scalar = sel == SELMODE::VSEL_TENSOR_SCALAR_MODE;
                uint64_t maskBits[2] = {form.bits[0], form.bits[1]};
                const BinaryRepeatParams p(blocks[0], blocks[1], blocks[2], repeats[0], repeats[1], repeats[2]);
                if (byCount) {
                    if (scalar) Select(tc, tm, ta, s, sel, 777u);
                    else Select(tc, tm, ta, tb, sel, 777u);
                    form = {(777 + lanes - 1) / lanes, {}, false, lanes};
                } else if (form.byBits) {
                    if (scalar) Select(tc, tm, ta, s, sel, maskBits, form.repeats, p);
                    else Select(tc, tm, ta, tb, sel, maskBits, form.repeats, p);
                } else {
                    if (scalar) Select(tc, tm, ta, s, sel, form.leading, form.repeats, p);
                    else Select(tc, tm, ta, tb, sel, form.leading, form.repeats, p);
                }
                const auto got = Take(tc, kElements);
                ExpectLanes("Select", c, got, lanes, form, byCount ? 1 : blocks[0], byCount ? 8 : repeats[0],
                            [&](uint32_t r, uint32_t lane) {
                                if (byCount && r * lanes + lane >= 777) return Value(c[r * lanes + lane]);
                                const uint32_t bit = mode == 0 ? lane : r * lanes + lane;
                                const size_t left = byCount ? r * lanes + lane : At<T>(r, lane, blocks[1], repeats[1]);
                                const size_t right = byCount ? r * lanes + lane : At<T>(r, lane, blocks[2], repeats[2]);
                                return bits[bit / 8] >> (bit % 8) & 1 ? Value(a[left]) : scalar ? Value(s) : Value(b[right]);
                            });
            });
        }
    }
}
CASE(select_half) { CheckSelect<half>(); }
CASE(select_float) { CheckSelect<float>(); }

// ---- reductions ----

template <typename T>
double TreeSum(std::vector<double> values) {
    while (values.size() > 1) {
        std::vector<double> next;
        for (size_t i = 0; i < values.size(); i += 2) next.push_back(Stored<T>(values[i] + values[i + 1]));
        values = next;
    }
    return values[0];
}

template <typename T>
void CheckWholeReduce() {
    constexpr uint32_t lanes = 256 / sizeof(T);
    using Word = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
    for (int trial = 0; trial < 30; ++trial) {
        const Form form = RandomForm(lanes);
        if (form.byBits && (form.bits[0] | form.bits[1]) == 0) continue;
        const int block = Integer(0, 2), repeat = Integer(0, 20), dstStride = Integer(1, 3);
        OnVector([&](TPipe& pipe) {
            auto a = Random<T>(kElements);
            for (T& x : a) x = Make<T>(std::floor(Value(x)));  // equal maxima are frequent
            const auto ta = Put(pipe, a);
            const auto run = [&](auto reduce) {
                const auto dst = Put(pipe, std::vector<T>(64, Make<T>(-77)));
                uint64_t bits[2] = {form.bits[0], form.bits[1]};
                if (form.byBits) reduce(dst, bits);
                else reduce(dst, static_cast<int32_t>(form.leading));
                return Take(dst, 64);
            };
            const int n = static_cast<int>(form.repeats);
            const auto value = run([&](auto& d, auto mask) {
                WholeReduceMax(d, ta, mask, n, dstStride, block, repeat, ReduceOrder::ORDER_ONLY_VALUE);
            });
            const auto pair = run([&](auto& d, auto mask) { WholeReduceMax(d, ta, mask, n, dstStride, block, repeat); });
            const auto swapped = run([&](auto& d, auto mask) {
                WholeReduceMin(d, ta, mask, n, dstStride, block, repeat, ReduceOrder::ORDER_INDEX_VALUE);
            });
            const auto index = run([&](auto& d, auto mask) {
                WholeReduceMin(d, ta, mask, n, dstStride, block, repeat, ReduceOrder::ORDER_ONLY_INDEX);
            });
            const auto sum = run([&](auto& d, auto mask) { WholeReduceSum(d, ta, mask, n, dstStride, block, repeat); });
            const auto bits = [](T x) {
                Word word;
                std::memcpy(&word, &x, sizeof word);
                return word;
            };
            for (uint32_t r = 0; r < form.repeats; ++r) {
                double best = -INFINITY, worst = INFINITY;
                uint32_t bestAt = 0, worstAt = 0;
                std::vector<double> terms(lanes);
                for (uint32_t lane = 0; lane < lanes; ++lane) {
                    if (!form.Active(lane)) continue;
                    const double x = Value(a[At<T>(r, lane, block, repeat)]);
                    terms[lane] = x;
                    if (x > best) best = x, bestAt = lane;
                    if (x < worst) worst = x, worstAt = lane;
                }
                EXPECT(Value(value[r * dstStride]) == best, "WholeReduceMax iteration %u", r);
                EXPECT(Value(pair[2 * r * dstStride]) == best && bits(pair[2 * r * dstStride + 1]) == bestAt,
                       "WholeReduceMax pair, iteration %u", r);
                EXPECT(Value(swapped[2 * r * dstStride + 1]) == worst && bits(swapped[2 * r * dstStride]) == worstAt,
                       "WholeReduceMin pair, iteration %u", r);
                uint32_t stored;
                std::memcpy(&stored, reinterpret_cast<const uint8_t*>(index.data()) + 4 * r * dstStride, sizeof stored);
                EXPECT(stored == worstAt, "WholeReduceMin index, iteration %u", r);
                EXPECT(Value(sum[r * dstStride]) == TreeSum<T>(terms), "WholeReduceSum iteration %u is %g, not %g", r,
                       Value(sum[r * dstStride]), TreeSum<T>(terms));
            }
        });
    }
}
CASE(whole_reduce_half) { CheckWholeReduce<half>(); }
CASE(whole_reduce_float) { CheckWholeReduce<float>(); }

template <typename T>
void CheckGroups() {
    constexpr uint32_t lanes = 256 / sizeof(T), group = 32 / sizeof(T);
    for (int trial = 0; trial < 20; ++trial) {
        const Form form = RandomForm(lanes);
        const int block = Integer(0, 2), repeat = Integer(0, 20), dstStride = Integer(1, 2), n = static_cast<int>(form.repeats);
        OnVector([&](TPipe& pipe) {
            const auto a = Random<T>(kElements);
            const auto ta = Put(pipe, a);
            const auto run = [&](auto reduce) {
                const auto dst = Put(pipe, std::vector<T>(1024, Make<T>(-77)));
                uint64_t bits[2] = {form.bits[0], form.bits[1]};
                if (form.byBits) reduce(dst, bits);
                else reduce(dst, static_cast<int32_t>(form.leading));
                return Take(dst, 1024);
            };
            const auto largest = run([&](auto& d, auto mask) { BlockReduceMax(d, ta, n, mask, dstStride, block, repeat); });
            const auto smallest = run([&](auto& d, auto mask) { BlockReduceMin(d, ta, n, mask, dstStride, block, repeat); });
            const auto sums = run([&](auto& d, auto mask) { BlockReduceSum(d, ta, n, mask, dstStride, block, repeat); });
            const auto pairs = run([&](auto& d, auto mask) { PairReduceSum(d, ta, n, mask, dstStride, block, repeat); });
            for (uint32_t r = 0; r < form.repeats; ++r) {
                for (uint32_t size : {group, 2u}) {
                    for (uint32_t g = 0; g < lanes / size; ++g) {
                        double best = -INFINITY, worst = INFINITY;
                        std::vector<double> terms(size);
                        bool any = false;
                        for (uint32_t i = 0; i < size; ++i) {
                            if (!form.Active(g * size + i)) continue;
                            const double x = Value(a[At<T>(r, g * size + i, block, repeat)]);
                            best = std::max(best, x);
                            worst = std::min(worst, x);
                            terms[i] = x;
                            any = true;
                        }
                        const size_t at = size_t{r} * dstStride * (lanes / size) + g;
                        const double sum = any ? TreeSum<T>(terms) : -77;
                        if (size == 2) {
                            EXPECT(Value(pairs[at]) == sum, "PairReduceSum iteration %u pair %u", r, g);
                        } else {
                            EXPECT(Value(largest[at]) == (any ? best : -77) && Value(smallest[at]) == (any ? worst : -77),
                                   "BlockReduceMax/Min block %u", g);
                            EXPECT(Value(sums[at]) == sum, "BlockReduceSum block %u", g);
                        }
                    }
                }
            }
        });
    }
}
CASE(block_and_pair_reduce_half) { CheckGroups<half>(); }
CASE(block_and_pair_reduce_float) { CheckGroups<float>(); }

template <typename T>
void CheckReduceAll() {
    constexpr uint32_t lanes = 256 / sizeof(T);
    using Word = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
    for (const int count : {1, 5, static_cast<int>(lanes), 200, 2000}) {
        OnVector([&](TPipe& pipe) {
            auto a = Random<T>(2048);
            for (T& x : a) x = Make<T>(std::floor(Value(x)));
            const auto ta = Put(pipe, a), tmp = Empty<T>(pipe, 512);
            const auto d0 = Empty<T>(pipe, 16), d1 = Empty<T>(pipe, 16), d2 = Empty<T>(pipe, 16), d3 = Empty<T>(pipe, 16);
            ReduceMax(d0, ta, tmp, count, true);
            PipeBarrier<PIPE_V>();
            ReduceMin(d1, ta, tmp, count);
            PipeBarrier<PIPE_V>();
            ReduceSum(d2, ta, tmp, count);
            PipeBarrier<PIPE_V>();
            ReduceSum(d3, ta, tmp, 7, 3, 16);
            double best = -INFINITY, worst = INFINITY, sum = 0, strided = 0;
            Word bestAt = 0;
            for (int i = 0; i < count; ++i) {
                if (Value(a[i]) > best) best = Value(a[i]), bestAt = static_cast<Word>(i);
                worst = std::min(worst, Value(a[i]));
                sum += Value(a[i]);
            }
            for (uint32_t r = 0; r < 3; ++r) {
                for (uint32_t lane = 0; lane < 7; ++lane) strided += Value(a[At<T>(r, lane, 1, 16)]);
            }
            Word index;
            std::memcpy(&index, d0.Data() + 1, sizeof index);
            EXPECT(Value(d0.Data()[0]) == best && index == bestAt, "ReduceMax of %d is %g at %d, not %g at %d", count,
                   Value(d0.Data()[0]), index, best, bestAt);
            EXPECT(Value(d1.Data()[0]) == worst, "ReduceMin of %d", count);
            EXPECT(Value(d2.Data()[0]) == sum, "ReduceSum of %d is %g, not %g", count, Value(d2.Data()[0]),
                   sum);  // small integers: exact
            EXPECT(Value(d3.Data()[0]) == strided, "ReduceSum of iterations");
        });
    }
}
CASE(reduce_all_half) { CheckReduceAll<half>(); }
CASE(reduce_all_float) { CheckReduceAll<float>(); }

// ---- sorting ----

template <typename T>
struct Scored {
    double value;
    uint32_t index;
};

template <typename T>
Scored<T> PairAt(const LocalTensor<T>& tensor, size_t i) {
    const auto* at = reinterpret_cast<const uint8_t*>(tensor.Data()) + 8 * i;
    T value;
    uint32_t index;
    std::memcpy(static_cast<void*>(&value), at, sizeof value);
    std::memcpy(&index, at + 4, sizeof index);
    return {Value(value), index};
}

bool Before(double a, double b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

template <typename T>
std::vector<T> ScoresWithTies(size_t n) {
    auto values = Random<T>(n, -4, 4);
    for (T& x : values) x = Make<T>(std::floor(Value(x)));
    for (size_t i = 3; i < n; i += 11) values[i] = Make<T>(-INFINITY);
    for (size_t i = 17; i < n; i += 40) values[i] = Make<T>(NAN);
    return values;
}

template <typename T>
void CheckSort() {
    const uint32_t n = 4 * 32 * 3;
    OnVector([&](TPipe& pipe) {
        const auto scores = ScoresWithTies<T>(n);
        std::vector<uint32_t> indices(n);
        for (uint32_t i = 0; i < n; ++i) indices[i] = 1000 + i;
        const auto ts = Put(pipe, scores);
        const auto ti = Put(pipe, indices);
        const uint32_t words = 8 / sizeof(T);
        LocalTensor<T> sorted = Empty<T>(pipe, n * words + 256 / sizeof(T));
        sorted = sorted[(256 - sorted.Address() % 256) % 256 / sizeof(T)];
        Sort32(sorted, ts, ti, n / 32);
        for (uint32_t r = 0; r < n / 32; ++r) {
            std::vector<uint32_t> order(32);
            for (uint32_t i = 0; i < 32; ++i) order[i] = r * 32 + i;
            std::stable_sort(order.begin(), order.end(),
                             [&](uint32_t a, uint32_t b) { return Before(Value(scores[a]), Value(scores[b])); });
            for (uint32_t i = 0; i < 32; ++i) {
                const auto got = PairAt(sorted, r * 32 + i);
                EXPECT(got.index == 1000 + order[i] && SameValue(got.value, Value(scores[order[i]])),
                       "Sort32 iteration %u place %u", r, i);
            }
        }
        PipeBarrier<PIPE_V>();
        const auto expectMerged = [&](const LocalTensor<T>& dst, uint32_t begin, uint32_t end, uint32_t at, uint32_t length) {
            std::vector<uint32_t> order;
            for (uint32_t i = begin; i < end; ++i) order.push_back(i);
            std::stable_sort(order.begin(), order.end(),
                             [&](uint32_t a, uint32_t b) { return Before(Value(scores[a]), Value(scores[b])); });
            for (uint32_t i = 0; i < length; ++i) EXPECT(PairAt(dst, at + i).index == 1000 + order[i], "MrgSort place %u", i);
        };
        MrgSort4Info info;
        for (auto& length : info.elementLengths) length = 32;
        for (const int lists : {2, 3, 4}) {
            const auto dst = Empty<T>(pipe, n * words);
            info.validBit = (1 << lists) - 1;
            MrgSort(dst, MrgSortSrcList<T>(sorted, sorted[32 * words], sorted[64 * words], sorted[96 * words]), info);
            expectMerged(dst, 0, 32 * lists, 0, 32 * lists);
        }
        const auto dst = Empty<T>(pipe, n * words);
        info.repeatTimes = 3;
        MrgSort(dst, MrgSortSrcList<T>(sorted, sorted[32 * words], sorted[64 * words], sorted[96 * words]), info);
        for (uint32_t r = 0; r < 3; ++r) expectMerged(dst, r * 128, r * 128 + 128, r * 128, 128);
        PipeBarrier<PIPE_V>();
        // A short list ends the merge: the first 5 of list 2 with the first 30 of list 1.
        info.repeatTimes = 1;
        info.validBit = 3;
        info.elementLengths[0] = 30;
        info.elementLengths[1] = 5;
        info.ifExhaustedSuspension = true;
        const auto stopped = Put(pipe, std::vector<T>(n * words, Make<T>(-99)));
        MrgSort(stopped, MrgSortSrcList<T>(sorted, sorted[32 * words], sorted, sorted), info);
        uint16_t taken[4];
        GetMrgSortResult(taken[0], taken[1], taken[2], taken[3]);
        uint32_t a = 0, b = 0;
        while (a < 30 && b < 5) {
            const auto left = PairAt(sorted, a), right = PairAt(sorted, 32 + b);
            const bool second = Before(right.value, left.value);
            EXPECT(PairAt(stopped, a + b).index == (second ? right.index : left.index), "suspended MrgSort place %u", a + b);
            ++(second ? b : a);
        }
        EXPECT(taken[0] == a && taken[1] == b && taken[2] == 0 && taken[3] == 0, "GetMrgSortResult gives %d %d", taken[0],
               taken[1]);
        EXPECT(PairAt(stopped, a + b).value == -99, "a suspended MrgSort stops writing");
    });
}
CASE(sort_float) { CheckSort<float>(); }
CASE(sort_half) { CheckSort<half>(); }

// The running selection of a top-k in orders that the flags allow: every run keeps the same 48 indices.
CASE(selection_in_random_orders) {
    const uint32_t n = 128, kept = 48;
    const auto scores = ScoresWithTies<float>(n);
    std::vector<uint32_t> indices(n), order(n);
    for (uint32_t i = 0; i < n; ++i) indices[i] = 5000 + i, order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return Before(scores[a], scores[b]); });
    for (uint64_t seed = 0; seed < 20; ++seed) {
        std::vector<uint32_t> result(kept);
        std::vector<int32_t> counts(8);
        emulation::LaunchOptions options;
        options.kernel = "selection";
        options.type = KERNEL_TYPE_AIV_ONLY;
        options.seed = seed;
        const auto kernel = [&](GM_ADDR scoresGm, GM_ADDR indicesGm, GM_ADDR resultGm, GM_ADDR countsGm) {
            TPipe pipe;
            TBuf<TPosition::VECCALC> sortedBuf, mergedBuf, scoresBuf, indicesBuf, keptBuf, countsBuf;
            pipe.InitBuffer(sortedBuf, n * 8);
            pipe.InitBuffer(mergedBuf, n * 8);
            pipe.InitBuffer(scoresBuf, n * 4);
            pipe.InitBuffer(indicesBuf, n * 4);
            pipe.InitBuffer(keptBuf, n * 4);
            pipe.InitBuffer(countsBuf, 32);
            GlobalTensor<float> scoresIn;
            GlobalTensor<uint32_t> indicesIn, resultOut;
            GlobalTensor<int32_t> countsOut;
            scoresIn.SetGlobalBuffer(reinterpret_cast<float*>(scoresGm));
            indicesIn.SetGlobalBuffer(reinterpret_cast<uint32_t*>(indicesGm));
            resultOut.SetGlobalBuffer(reinterpret_cast<uint32_t*>(resultGm));
            countsOut.SetGlobalBuffer(reinterpret_cast<int32_t*>(countsGm));
            const auto sorted = sortedBuf.Get<float>(), merged = mergedBuf.Get<float>(), values = scoresBuf.Get<float>();
            const auto places = indicesBuf.Get<uint32_t>(), selected = keptBuf.Get<uint32_t>();
            const auto seen = countsBuf.Get<int32_t>();
            DataCopy(values, scoresIn, n);
            DataCopy(places, indicesIn, n);
            SetFlag<HardEvent::MTE2_V>(0);
            WaitFlag<HardEvent::MTE2_V>(0);
            Sort32(sorted, values, places, n / 32);
            PipeBarrier<PIPE_V>();
            MrgSort4Info info;
            for (auto& length : info.elementLengths) length = 32;
            info.validBit = 15;
            MrgSort(merged, MrgSortSrcList<float>(sorted, sorted[64], sorted[128], sorted[192]), info);
            uint16_t taken[4];
            GetMrgSortResult(taken[0], taken[1], taken[2], taken[3]);
            PipeBarrier<PIPE_V>();
            uint64_t count = 0;
            GatherMask(selected, merged.ReinterpretCast<uint32_t>(), static_cast<uint8_t>(2), true, 2 * kept, {1, 1, 8, 0},
                       count);
            Duplicate(seen, static_cast<int32_t>(count), 8);
            SetFlag<HardEvent::V_MTE3>(0);
            WaitFlag<HardEvent::V_MTE3>(0);
            DataCopy(resultOut, selected, kept);
            DataCopy(countsOut, seen, 8);
        };
        emulation::Launch(options, kernel, emulation::Gm(scores.data(), n * 4, "scores", emulation::GmUse::Read),
                          emulation::Gm(indices.data(), n * 4, "indices", emulation::GmUse::Read),
                          emulation::Gm(result.data(), kept * 4, "result", emulation::GmUse::Write),
                          emulation::Gm(counts.data(), 32, "counts", emulation::GmUse::Write));
        for (uint32_t i = 0; i < kept; ++i)
            EXPECT(result[i] == 5000 + order[i], "seed %llu place %u", static_cast<unsigned long long>(seed), i);
        EXPECT(counts[0] == static_cast<int32_t>(kept), "seed %llu kept %d", static_cast<unsigned long long>(seed), counts[0]);
    }
}

// ---- the cube ----

struct Product {
    uint32_t m, n, k;
    bool aTransposed, bTransposed;  // A given as [k, m], B given as [n, k]
    bool relu;
    uint32_t splits;  // of k, accumulated in L0C
    uint32_t dstStride;
};

template <typename T>
void LoadNd(const LocalTensor<T>& l1, const GlobalTensor<T>& gm, uint32_t rows, uint32_t columns) {
    Nd2NzParams params;
    params.ndNum = 1;
    params.nValue = rows;
    params.dValue = columns;
    params.srcDValue = columns;
    params.dstNzC0Stride = (rows + 15) / 16 * 16;
    params.dstNzNStride = 1;
    DataCopy(l1, gm, params);
}

template <typename T, typename Out>
void CheckProduct(const Product& p, uint64_t seed) {
    const auto a = Random<T>(size_t{p.m} * p.k, -1, 1), b = Random<T>(size_t{p.k} * p.n, -1, 1);
    std::vector<Out> c(size_t{p.m} * p.dstStride, Make<Out>(-99));
    const auto aOf = [&](uint32_t i, uint32_t k) { return Value(a[p.aTransposed ? size_t{k} * p.m + i : size_t{i} * p.k + k]); };
    const auto bOf = [&](uint32_t k, uint32_t j) { return Value(b[p.bTransposed ? size_t{j} * p.k + k : size_t{k} * p.n + j]); };
    emulation::LaunchOptions options;
    options.kernel = "product";
    options.type = KERNEL_TYPE_AIC_ONLY;
    options.seed = seed;
    const auto kernel = [&](GM_ADDR aGm, GM_ADDR bGm, GM_ADDR cGm) {
        TPipe pipe;
        TBuf<TPosition::A1> a1;
        TBuf<TPosition::B1> b1;
        TBuf<TPosition::A2> a2;
        TBuf<TPosition::B2> b2;
        TBuf<TPosition::CO1> co1;
        const uint32_t mf = (p.m + 15) / 16, nf = (p.n + 15) / 16, kf = (p.k + 15) / 16, step = (kf + p.splits - 1) / p.splits;
        pipe.InitBuffer(a1, mf * kf * 512);
        pipe.InitBuffer(b1, kf * nf * 512);
        pipe.InitBuffer(a2, mf * step * 512);
        pipe.InitBuffer(b2, step * nf * 512);
        pipe.InitBuffer(co1, mf * nf * 1024);
        GlobalTensor<T> aTensor, bTensor;
        GlobalTensor<Out> cTensor;
        aTensor.SetGlobalBuffer(reinterpret_cast<T*>(aGm));
        bTensor.SetGlobalBuffer(reinterpret_cast<T*>(bGm));
        cTensor.SetGlobalBuffer(reinterpret_cast<Out*>(cGm));
        const auto aL1 = a1.template Get<T>(), bL1 = b1.template Get<T>();
        LoadNd(aL1, aTensor, p.aTransposed ? p.k : p.m, p.aTransposed ? p.m : p.k);
        LoadNd(bL1, bTensor, p.bTransposed ? p.n : p.k, p.bTransposed ? p.k : p.n);
        SetFlag<HardEvent::MTE2_MTE1>(0);
        WaitFlag<HardEvent::MTE2_MTE1>(0);
        const auto aL0 = a2.template Get<T>(), bL0 = b2.template Get<T>();
        const auto cL0 = co1.template Get<float>();
        for (uint32_t first = 0; first < kf; first += step) {
            const uint32_t fractals = std::min(step, kf - first);
            LoadData2DParams load;
            for (uint32_t i = 0; i < mf; ++i) {  // L0A: row i of fractals
                load.repeatTimes = fractals;
                load.ifTranspose = p.aTransposed;
                load.srcStride = p.aTransposed ? 1 : mf;  // NZ of [k, m]: fractal (k, i) at i * kf + k
                LoadData(aL0[i * fractals * 256], aL1[(p.aTransposed ? i * kf + first : first * mf + i) * 256], load);
            }
            for (uint32_t k = 0; k < fractals; ++k) {  // L0B: row k of fractals
                load.repeatTimes = nf;
                load.ifTranspose = !p.bTransposed;
                load.srcStride = p.bTransposed ? 1 : kf;  // NZ of [n, k]: fractal (n, k) at k * nf + n
                LoadData(bL0[k * nf * 256], bL1[(p.bTransposed ? (first + k) * nf : first + k) * 256], load);
            }
            SetFlag<HardEvent::MTE1_M>(0);
            WaitFlag<HardEvent::MTE1_M>(0);
            MmadParams mmad;
            mmad.m = p.m;
            mmad.n = p.n;
            mmad.k = std::min(p.k - first * 16, fractals * 16);
            mmad.cmatrixInitVal = first == 0;
            Mmad(cL0, aL0, bL0, mmad);
            PipeBarrier<PIPE_M>();
            SetFlag<HardEvent::M_MTE1>(3);
            WaitFlag<HardEvent::M_MTE1>(3);
        }
        SetFlag<HardEvent::M_FIX>(0);
        WaitFlag<HardEvent::M_FIX>(0);
        FixpipeParamsV220 fix;
        fix.nSize = p.n;
        fix.mSize = p.m;
        fix.srcStride = mf * 16;
        fix.dstStride = p.dstStride;
        fix.reluEn = p.relu;
        fix.quantPre = std::is_same_v<Out, half> ? QuantMode_t::F322F16
            : std::is_same_v<Out, bfloat16_t>    ? QuantMode_t::F322BF16
                                                 : QuantMode_t::NoQuant;
        Fixpipe(cTensor, cL0, fix);
    };
    emulation::Launch(
        options, kernel, emulation::Gm(a.data(), a.size() * sizeof(T), "a", emulation::GmUse::Read),
        emulation::Gm(b.data(), b.size() * sizeof(T), "b", emulation::GmUse::Read),
        emulation::Gm(c.data(), ((p.m - 1) * size_t{p.dstStride} + p.n) * sizeof(Out), "c", emulation::GmUse::ReadWrite));
    for (uint32_t i = 0; i < p.m; ++i) {
        for (uint32_t j = 0; j < p.dstStride; ++j) {
            const double got = Value(c[size_t{i} * p.dstStride + j]);
            if (j >= p.n) {
                EXPECT(got == -99, "Fixpipe wrote column %u of %u", j, p.n);
                continue;
            }
            double sum = 0, magnitude = 0;
            for (uint32_t k = 0; k < p.k; ++k) {
                sum += aOf(i, k) * bOf(k, j);
                magnitude += std::fabs(aOf(i, k) * bOf(k, j));
            }
            if (p.relu) sum = std::max(sum, 0.0);
            const double ulp = std::is_same_v<Out, float> ? 0 : std::ldexp(1.0, -FormatOf<Out>().mantissa - 1);
            const double tolerance = magnitude * (p.k + 1) * 0x1p-24 + std::fabs(sum) * ulp * 1.01;
            EXPECT(std::fabs(got - sum) <= tolerance, "%ux%ux%u element (%u, %u) is %.9g, not %.9g", p.m, p.n, p.k, i, j, got,
                   sum);
        }
    }
}

constexpr Product kProducts[] = {{16, 16, 16, false, false, false, 1, 16},    {16, 16, 16, true, true, false, 1, 16},
                                 {128, 128, 128, false, true, false, 1, 128}, {17, 48, 50, false, false, false, 1, 56},
                                 {17, 48, 50, false, true, true, 1, 48},      {33, 32, 70, true, false, false, 1, 32},
                                 {2, 16, 7, false, true, false, 1, 25},         {30, 48, 70, true, true, true, 1, 64},
                                 {64, 208, 256, false, true, false, 2, 208},  {48, 32, 130, false, false, false, 3, 40},
                                 {100, 128, 64, false, true, false, 4, 128}};

template <typename T, typename Out>
void CheckProducts() {  // in program order, and in orders that the flags allow
    for (const uint64_t seed : {0, 1, 2}) {
        for (const Product& p : kProducts) CheckProduct<T, Out>(p, seed);
    }
}
CASE(product_half_into_float) { CheckProducts<half, float>(); }
CASE(product_bfloat16_into_float) { CheckProducts<bfloat16_t, float>(); }
CASE(product_half_into_half) { CheckProducts<half, half>(); }
CASE(product_bfloat16_into_bfloat16) { CheckProducts<bfloat16_t, bfloat16_t>(); }

template <typename F>
void OnCube(F body) {
    emulation::LaunchOptions options;
    options.kernel = "instructions";
    options.type = KERNEL_TYPE_AIC_ONLY;
    emulation::Launch(options, [&] {
        TPipe pipe;
        TBuf<TPosition::A1> l1;
        TBuf<TPosition::A2> l0a;
        TBuf<TPosition::B2> l0b;
        TBuf<TPosition::CO1> l0c;
        pipe.InitBuffer(l1, 65536);
        pipe.InitBuffer(l0a, 32768);
        pipe.InitBuffer(l0b, 32768);
        pipe.InitBuffer(l0c, 65536);
        body(l1.Get<half>(), l0a.Get<half>(), l0b.Get<half>(), l0c.Get<float>());
    });
}

template <typename T>
void Write(const LocalTensor<T>& tensor, const std::vector<T>& values) {
    std::memcpy(static_cast<void*>(tensor.Data()), values.data(), values.size() * sizeof(T));
    const emulation::Span span = tensor.Whole();
    std::memset(span.memory->written + span.begin, 1, values.size() * sizeof(T));
}

CASE(load_data_strides_and_transpose) {
    OnCube([](auto l1, auto l0a, auto, auto) {
        const auto values = Random<half>(32 * 256);
        Write(l1, values);
        LoadData2DParams p;
        p.startIndex = 2;
        p.repeatTimes = 5;
        p.srcStride = 3;
        p.dstGap = 2;
        LoadData(l0a, l1, p);
        p.ifTranspose = true;
        LoadData(l0a[20 * 256], l1, p);
        LoadData2dTransposeParams t(2, 5, 3, 2, 0);
        LoadDataWithTranspose(l0a[40 * 256], l1, t);
        for (uint32_t r = 0; r < 5; ++r) {
            for (uint32_t i = 0; i < 256; ++i) {
                const half expected = values[(2 + 3 * r) * 256 + i];
                EXPECT(l0a.Data()[3 * r * 256 + i].bits == expected.bits, "LoadData fractal %u", r);
                EXPECT(l0a.Data()[(20 + 3 * r) * 256 + i % 16 * 16 + i / 16].bits == expected.bits,
                       "LoadData transposed fractal %u", r);
                EXPECT(l0a.Data()[(40 + 3 * r) * 256 + i % 16 * 16 + i / 16].bits == expected.bits,
                       "LoadDataWithTranspose fractal %u", r);
            }
        }
    });
}

CASE(product_of_ragged_columns) {  // which Fixpipe does not store: only whole fractals leave L0C
    OnCube([](auto, auto l0a, auto l0b, auto l0c) {
        constexpr uint32_t n = 33;
        const auto a = Random<half>(256, -1, 1), b = Random<half>(3 * 256, -1, 1);
        Write(l0a, a);
        Write(l0b, b);
        Mmad(l0c, l0a, l0b, MmadParams(16, n, 16, 0, false, true));
        for (uint32_t i = 0; i < 16; ++i) {
            for (uint32_t j = 0; j < n; ++j) {
                double sum = 0;
                for (uint32_t k = 0; k < 16; ++k) sum += Value(a[i * 16 + k]) * Value(b[j / 16 * 256 + j % 16 * 16 + k]);
                EXPECT(std::fabs(l0c.Data()[j / 16 * 256 + i * 16 + j % 16] - sum) < 1e-5, "ragged product (%u, %u)", i, j);
            }
        }
    });
}

CASE(one_row_is_read_as_a_plain_vector) {
    OnCube([](auto, auto l0a, auto l0b, auto l0c) {
        const auto a = Random<half>(40, -1, 1), b = Random<half>(3 * 256, -1, 1);
        Write(l0a, a);
        Write(l0b, b);
        Mmad(l0c, l0a, l0b, MmadParams(1, 16, 40, 0, false, true));
        for (uint32_t j = 0; j < 16; ++j) {
            double sum = 0;
            for (uint32_t k = 0; k < 40; ++k) sum += Value(a[k]) * Value(b[k / 16 * 256 + j * 16 + k % 16]);
            EXPECT(std::fabs(l0c.Data()[j] - sum) < 1e-5, "column %u", j);
        }
    });
}

CASE(nan_outside_the_product_does_not_leak) {
    OnCube([](auto, auto l0a, auto l0b, auto l0c) {
        std::vector<half> a(2 * 256, Make<half>(NAN)), b(2 * 256, Make<half>(NAN));
        for (uint32_t i = 0; i < 5; ++i) {
            for (uint32_t k = 0; k < 20; ++k)
                a[k / 16 * 256 + i * 16 + k % 16] = half(1), b[k / 16 * 256 + i * 16 + k % 16] = half(2);
        }
        Write(l0a, a);
        Write(l0b, b);
        Mmad(l0c, l0a, l0b, MmadParams(5, 5, 20, 0, false, true));
        for (uint32_t i = 0; i < 5; ++i) {
            for (uint32_t j = 0; j < 5; ++j)
                EXPECT(l0c.Data()[i * 16 + j] == 40, "element (%u, %u) is %g", i, j, l0c.Data()[i * 16 + j]);
        }
    });
}

// ---- what must be refused ----

template <typename F>
void ExpectFault(const char* what, int rule, F body) {
    try {
        body();
    } catch (const Fault& fault) {
        EXPECT(fault.rule == rule, "%s: rule %d and not %d: %s", what, fault.rule, rule, fault.what());
        EXPECT(std::string(fault.what()).find("instructions.cpp:") != std::string::npos, "%s: no line in: %s", what,
               fault.what());
        return;
    }
    EXPECT(false, "%s: accepted", what);
}
template <typename F>
void RefusedOnVector(const char* what, int rule, F body) {
    ExpectFault(what, rule, [&] { OnVector(body); });
}
template <typename F>
void RefusedOnCube(const char* what, int rule, F body) {
    ExpectFault(what, rule, [&] { OnCube(body); });
}

CASE(refused_masks_and_repeats) {
    const auto with = [](auto call) {
        return [call](TPipe& pipe) {
            call(Put(pipe, Random<float>(4096)), Put(pipe, Random<float>(4096)), Put(pipe, Random<float>(4096)));
        };
    };
    RefusedOnVector("mask above the lanes", 5, with([](auto a, auto b, auto c) { Add(a, b, c, 65, 1, {1, 1, 1, 8, 8, 8}); }));
    RefusedOnVector("256 repeats", 5, with([](auto a, auto b, auto c) { Add(a, b, c, 8, 256, {1, 1, 1, 0, 0, 0}); }));
    RefusedOnVector("256 repeats of Cast", 5,
                    with([](auto a, auto b, auto) { Cast(a, b, RoundMode::CAST_RINT, 8, 256, {1, 1, 0, 0}); }));
    RefusedOnVector("negative count", 5, with([](auto a, auto b, auto c) { Add(a, b, c, -1); }));
    RefusedOnVector("unaligned destination", 2, with([](auto a, auto b, auto c) { Add(a[1], b, c, 8); }));
    RefusedOnVector("unaligned source", 2, with([](auto a, auto b, auto) { Exp(a, b[4], 8); }));
    RefusedOnVector("past the end", 4, with([](auto a, auto b, auto c) { Add(c, a, b, 4097); }));
    RefusedOnVector("unwritten source", 9, [](TPipe& pipe) { Exp(Empty<float>(pipe, 64), Empty<float>(pipe, 64), 64); });
    RefusedOnVector("no barrier between dependent instructions", 6, with([](auto a, auto b, auto c) {
                        Add(a, b, c, 64);
                        Exp(a, a, 64);
                    }));
    RefusedOnVector("CreateVecIndex, whose first block the scalar pipe writes, behind a vector instruction", 6, [](TPipe& pipe) {
        auto index = Empty<int32_t>(pipe, 64);
        Duplicate(index, 1, 64);
        PipeBarrier<PIPE_V>();
        CreateVecIndex(index, 0, 64u);
    });
}

CASE(refused_overlap) {
    RefusedOnVector("widening in place", 5, [](TPipe& pipe) {
        const auto a = Put(pipe, Random<float>(256));
        Cast(a, a.ReinterpretCast<half>(), RoundMode::CAST_NONE, 256);
    });
    RefusedOnVector("a shifted source", 5, [](TPipe& pipe) {
        const auto a = Put(pipe, Random<float>(256));
        Adds(a[8], a, 1.0f, 128);
    });
    RefusedOnVector("a later iteration's source", 5, [](TPipe& pipe) {
        const auto a = Put(pipe, Random<float>(256));
        Adds(a[64], a, 1.0f, 64, 2, {1, 1, 8, 8});
    });
    RefusedOnVector("Compare onto its source", 5, [](TPipe& pipe) {
        const auto a = Put(pipe, Random<float>(64));
        CompareScalar(a.ReinterpretCast<uint8_t>(), a, 0.0f, CMPMODE::GT, 64u);
    });
    RefusedOnVector("Brcb onto its source", 5, [](TPipe& pipe) {
        const auto a = Put(pipe, Random<float>(64));
        Brcb(a, a, 1, {1, 8});
    });
    // Narrowing in place writes behind what it reads.
    OnVector([](TPipe& pipe) {
        const auto values = Random<float>(256);
        const auto a = Put(pipe, values);
        Cast(a.ReinterpretCast<half>(), a, RoundMode::CAST_NONE, 256);
        for (int i = 0; i < 256; ++i) EXPECT(a.ReinterpretCast<half>().Data()[i].bits == half(values[i]).bits, "element %d", i);
    });
}

CASE(refused_modes) {
    const auto with = [](auto call) {
        return [call](TPipe& pipe) {
            call(pipe, Put(pipe, Random<float>(512)), Put(pipe, Random<float>(512)), Put(pipe, std::vector<uint8_t>(512)));
        };
    };
    RefusedOnVector("Compare of 63 elements", 5, with([](auto&, auto a, auto b, auto m) { Compare(m, a, b, CMPMODE::LT, 63u); }));
    RefusedOnVector("Compare int32 LT", 5, with([](auto&, auto a, auto b, auto m) {
                        Compare(m, a.template ReinterpretCast<int32_t>(), b.template ReinterpretCast<int32_t>(), CMPMODE::LT,
                                64u);
                    }));
    RefusedOnVector("Cast float to bf16 without rounding", 5, with([](auto&, auto a, auto b, auto) {
                        Cast(a.template ReinterpretCast<bfloat16_t>(), b, RoundMode::CAST_NONE, 64);
                    }));
    RefusedOnVector("Cast half to float with rounding", 5, with([](auto&, auto a, auto b, auto) {
                        Cast(a, b.template ReinterpretCast<half>(), RoundMode::CAST_RINT, 64);
                    }));
    RefusedOnVector("Select of a scalar in tensor mode", 5,
                    with([](auto&, auto a, auto b, auto m) { Select(a, m, b, 1.0f, SELMODE::VSEL_TENSOR_TENSOR_MODE, 64u); }));
    RefusedOnVector("Select without its 8 KB", 1, with([](auto& pipe, auto a, auto b, auto m) {
                        Empty<float>(pipe, (196608 - 256 - 8192) / 4 - 512);
                        Select(a, m, b, 1.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, 64u);
                    }));
    RefusedOnVector("GatherMask pattern 8", 5, with([](auto&, auto a, auto b, auto) {
                        uint64_t n;
                        GatherMask(a, b, static_cast<uint8_t>(8), false, 0, {1, 1, 8, 0}, n);
                    }));
    RefusedOnVector("Gather at an odd address", 5, [](TPipe& pipe) {
        Gather(Empty<float>(pipe, 64), Put(pipe, Random<float>(64)), Put<uint32_t>(pipe, {0, 2, 4, 6, 8, 10, 12, 14}), 0u, 8u);
    });
    RefusedOnVector("ReduceMax without scratch", 4,
                    with([](auto& pipe, auto a, auto b, auto) { ReduceMax(a, b, Empty<float>(pipe, 8), 512, true); }));
    RefusedOnVector("WholeReduceMax pair at 4 bytes", 2,
                    with([](auto&, auto a, auto b, auto) { WholeReduceMax(a[1], b, 64, 1, 1, 1, 8); }));
}

CASE(refused_sorts) {
    const auto with = [](auto call) {
        return [call](TPipe& pipe) {
            std::vector<float> pairs(512);
            for (int i = 0; i < 256; ++i) pairs[2 * i] = 100.0f - i % 32;
            call(Put(pipe, pairs), Put(pipe, std::vector<float>(512)));
        };
    };
    MrgSort4Info info;
    for (auto& length : info.elementLengths) length = 32;
    info.validBit = 15;
    const auto merge = [](auto dst, auto src, const MrgSort4Info& params) {
        MrgSort(dst, MrgSortSrcList<float>(src, src[64], src[128], src[192]), params);
    };
    OnVector(with([&](auto src, auto dst) { merge(dst, src, info); }));
    OnVector(with([&](auto src, auto dst) {  // lists may be empty, the first one and all of them too
        auto some = info;
        some.elementLengths[0] = some.elementLengths[2] = 0;
        merge(dst, src, some);
        for (uint32_t i = 0; i < 64; ++i) EXPECT(dst.Data()[2 * i] == 100.0f - i / 2, "place %u of a merge with empty lists", i);
        for (auto& length : some.elementLengths) length = 0;
        merge(dst, src, some);
    }));
    auto bad = info;
    bad.validBit = 1;
    RefusedOnVector("one list", 5, with([&](auto src, auto dst) { merge(dst, src, bad); }));
    bad = info;
    bad.elementLengths[1] = 4096;
    RefusedOnVector("a list of 4096", 5, with([&](auto src, auto dst) { merge(dst, src, bad); }));
    bad = info;
    bad.repeatTimes = 2;
    bad.ifExhaustedSuspension = true;
    RefusedOnVector("repeats with suspension", 5, with([&](auto src, auto dst) { merge(dst, src, bad); }));
    RefusedOnVector("merging onto a source", 5, with([&](auto src, auto) { merge(src, src, info); }));
    RefusedOnVector("unsorted lists", 5, with([&](auto src, auto dst) {
                        src.Data()[10] = 1000;
                        merge(dst, src, info);
                    }));
    RefusedOnVector("Sort32 destination at 128 bytes", 2, [](TPipe& pipe) {
        const auto values = Put(pipe, Random<float>(32));
        const auto indices = Put(pipe, std::vector<uint32_t>(32));
        const auto dst = Empty<float>(pipe, 256);
        Sort32(dst[dst.Address() % 256 == 0 ? 32 : 0], values, indices, 1);
    });
}

CASE(refused_cube_parameters) {
    const auto ones = std::vector<half>(4096, half(1));
    const auto ready = [&](auto call) {
        return [&ones, call](auto l1, auto l0a, auto l0b, auto l0c) {
            Write(l1, ones);
            Write(l0a, ones);
            Write(l0b, ones);
            call(l1, l0a, l0b, l0c);
        };
    };
    RefusedOnCube("Mmad m of 4096", 5,
                  ready([](auto, auto a, auto b, auto c) { Mmad(c, a, b, MmadParams(4096, 16, 16, 0, false, true)); }));
    RefusedOnCube("Mmad k of 65536 + 16", 5, ready([](auto, auto a, auto b, auto c) {
                      MmadParams p;
                      p.m = p.n = 16;
                      p.k = 65552;
                      Mmad(c, a, b, p);
                  }));
    RefusedOnCube("Mmad into 512-byte aligned L0C", 2,
                  ready([](auto, auto a, auto b, auto c) { Mmad(c[128], a, b, MmadParams(16, 16, 16, 0, false, true)); }));
    RefusedOnCube("Mmad from an unaligned L0A", 2,
                  ready([](auto, auto a, auto b, auto c) { Mmad(c, a[128], b, MmadParams(16, 16, 16, 0, false, true)); }));
    RefusedOnCube("Mmad with exchanged operands", 3,
                  ready([](auto, auto a, auto b, auto c) { Mmad(c, b, a, MmadParams(16, 16, 16, 0, false, true)); }));
    RefusedOnCube("Mmad of unwritten elements", 9,
                  ready([](auto, auto a, auto b, auto c) { Mmad(c, a, b, MmadParams(16, 16, 272, 0, false, true)); }));
    RefusedOnCube("accumulating on nothing", 9,
                  ready([](auto, auto a, auto b, auto c) { Mmad(c, a, b, MmadParams(16, 16, 16, 0, false, false)); }));
    RefusedOnCube("LoadData of 256 fractals", 5, ready([](auto l1, auto a, auto, auto) {
                      LoadData2DParams p;
                      p.repeatTimes = 256;
                      LoadData(a, l1, p);
                  }));
    RefusedOnCube("LoadData past L1's buffer", 4, ready([](auto l1, auto a, auto, auto) {
                      LoadData2DParams p;
                      p.repeatTimes = 2;
                      p.startIndex = 127;
                      p.srcStride = 1;
                      LoadData(a, l1, p);
                  }));
}

}  // namespace

int main(int argc, char** argv) {
    if (argc == 1) {
        for (const auto& [name, run] : Cases()) std::printf("%s\n", name.c_str());
        return 0;
    }
    int failed = 0;
    for (int i = 1; i < argc; ++i) {
        const auto found = Cases().find(argv[i]);
        if (found == Cases().end()) {
            std::printf("no case named %s\n", argv[i]);
            return 2;
        }
        try {
            found->second();
            std::printf("ok %s\n", argv[i]);
        } catch (const std::exception& error) {
            std::printf("FAILED %s: %s\n", argv[i], error.what());
            ++failed;
        }
    }
    return failed != 0;
}
