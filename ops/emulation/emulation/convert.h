// Cast's rounding modes: every (source, destination) pair the 910B vector unit converts, one scalar at a time.
//
// Integer destinations saturate and NaN becomes 0; floating destinations overflow to infinity (the chip's default,
// non-saturating mode).
#pragma once

#include <cmath>
#include <limits>

#include "emulation/types.h"

namespace AscendC {

enum class RoundMode : uint8_t { CAST_NONE = 0, CAST_RINT, CAST_FLOOR, CAST_CEIL, CAST_ROUND, CAST_TRUNC, CAST_ODD };

}  // namespace AscendC

namespace emulation {

using AscendC::RoundMode;

template <typename T, typename... Ts>
inline constexpr bool isOneOf = (std::is_same_v<T, Ts> || ...);

inline float Widen(half value) { return HalfToFloat(value.bits); }
inline float Widen(bfloat16_t value) { return Bfloat16ToFloat(value.bits); }
inline float Widen(float value) { return value; }

template <typename T>
T Narrow(float value) {
    if constexpr (std::is_same_v<T, half>) {
        half result;
        result.bits = FloatToHalf(value);
        return result;
    } else if constexpr (std::is_same_v<T, bfloat16_t>) {
        return {FloatToBfloat16(value)};
    } else {
        static_assert(std::is_same_v<T, float>);
        return value;
    }
}

// The 16-bit magnitude's value, with infinity read as the power of two that follows the largest finite number.
template <typename T>
double MagnitudeValue(uint16_t magnitude) {
    constexpr uint16_t infinity = std::is_same_v<T, half> ? 0x7c00 : 0x7f80;
    if (magnitude == infinity) return std::is_same_v<T, half> ? 65536.0 : std::ldexp(1.0, 128);
    T value;
    value.bits = magnitude;
    return Widen(value);
}

template <typename T>
T RoundTo16(float value, RoundMode mode) {
    const T nearest = Narrow<T>(value);
    if (mode == RoundMode::CAST_NONE || mode == RoundMode::CAST_RINT || !std::isfinite(value)) return nearest;
    const double magnitude = std::fabs(static_cast<double>(value));
    constexpr uint16_t largest = std::is_same_v<T, half> ? 0x7bff : 0x7f7f;
    uint16_t below = nearest.bits & 0x7fff;  // largest finite magnitude that is not above |value|
    if (MagnitudeValue<T>(below) > magnitude || below > largest) --below;
    const double down = MagnitudeValue<T>(below);
    const bool exact = down == magnitude;
    const bool negative = std::signbit(value);
    bool away = false;
    switch (mode) {
        case RoundMode::CAST_FLOOR: away = negative; break;
        case RoundMode::CAST_CEIL: away = !negative; break;
        case RoundMode::CAST_ROUND: away = magnitude - down >= MagnitudeValue<T>(below + 1) - magnitude; break;
        case RoundMode::CAST_ODD: away = (below & 1) == 0; break;
        default: break;  // CAST_TRUNC
    }
    T result;
    result.bits = static_cast<uint16_t>((below + (away && !exact)) | (negative ? 0x8000 : 0));
    return result;
}

inline double RoundToIntegral(double value, RoundMode mode) {
    switch (mode) {
        case RoundMode::CAST_FLOOR: return std::floor(value);
        case RoundMode::CAST_CEIL: return std::ceil(value);
        case RoundMode::CAST_ROUND: return std::round(value);
        case RoundMode::CAST_TRUNC: return std::trunc(value);
        default: return std::nearbyint(value);
    }
}

template <typename T>
T Saturate(double integral) {
    if (std::isnan(integral)) return 0;
    if (integral >= -static_cast<double>(std::numeric_limits<T>::min()) && std::is_signed_v<T>)
        return std::numeric_limits<T>::max();
    if (integral > static_cast<double>(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
    if (integral < static_cast<double>(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
    return static_cast<T>(integral);
}

// An integer as float: exact up to 24 bits, beyond that rounded by mode.
inline float IntegerToFloat(int64_t value, RoundMode mode) {
    const float nearest = static_cast<float>(value);
    if (mode == RoundMode::CAST_NONE || mode == RoundMode::CAST_RINT) return nearest;
    const long double exact = static_cast<long double>(value), rounded = static_cast<long double>(nearest);
    if (exact == rounded) return nearest;
    const float low = rounded < exact ? nearest : std::nextafter(nearest, -std::numeric_limits<float>::infinity());
    const float high = std::nextafter(low, std::numeric_limits<float>::infinity());
    const bool tie = exact - static_cast<long double>(low) == static_cast<long double>(high) - exact;
    switch (mode) {
        case RoundMode::CAST_FLOOR: return low;
        case RoundMode::CAST_CEIL: return high;
        case RoundMode::CAST_TRUNC: return value < 0 ? high : low;
        default: return tie ? (value < 0 ? low : high) : nearest;  // CAST_ROUND
    }
}

template <typename D, typename S>
inline constexpr bool castSupported = (std::is_same_v<S, half> && isOneOf<D, float, int32_t, int16_t, int8_t, uint8_t>) ||
    (std::is_same_v<S, bfloat16_t> && isOneOf<D, float, int32_t>) ||
    (std::is_same_v<S, float> && isOneOf<D, float, half, bfloat16_t, int16_t, int32_t, int64_t>) ||
    (isOneOf<S, int8_t, uint8_t> && std::is_same_v<D, half>) || (std::is_same_v<S, int16_t> && isOneOf<D, half, float>) ||
    (std::is_same_v<S, int32_t> && isOneOf<D, float, int16_t, int64_t>) ||
    (std::is_same_v<S, int64_t> && isOneOf<D, int32_t, float>);

// Which rounding modes the documentation lists for a supported pair.
template <typename D, typename S>
bool CastAllows(RoundMode mode) {
    const bool none = mode == RoundMode::CAST_NONE, odd = mode == RoundMode::CAST_ODD;
    constexpr bool widening = isOneOf<S, half, bfloat16_t, int16_t> && std::is_same_v<D, float>;
    constexpr bool integers = std::is_integral_v<S> && std::is_integral_v<D>;
    if (widening || integers || isOneOf<S, int8_t, uint8_t>) return none;
    if (std::is_same_v<S, float> && std::is_same_v<D, half>) return true;
    const bool noneListed = (std::is_same_v<S, half> && isOneOf<D, int8_t, uint8_t>) ||
        (std::is_same_v<S, int16_t> && std::is_same_v<D, half>) || (std::is_same_v<S, int32_t> && std::is_same_v<D, float>);
    return !odd && (!none || noneListed);
}

template <typename D, typename S>
D Convert(S value, RoundMode mode) {
    if constexpr (std::is_integral_v<S> && std::is_integral_v<D>) {
        if constexpr (sizeof(D) >= sizeof(S)) return value;
        else if (value > std::numeric_limits<D>::max()) return std::numeric_limits<D>::max();
        else if (value < std::numeric_limits<D>::min()) return std::numeric_limits<D>::min();
        else return static_cast<D>(value);
    } else if constexpr (std::is_integral_v<S> && std::is_same_v<D, float>) {
        return IntegerToFloat(value, mode);
    } else if constexpr (std::is_integral_v<S>) {
        return RoundTo16<D>(static_cast<float>(value), mode);  // at most 16 bits: exact as float
    } else if constexpr (std::is_integral_v<D>) {
        return Saturate<D>(RoundToIntegral(Widen(value), mode));
    } else if constexpr (std::is_same_v<D, float> && std::is_same_v<S, float>) {
        return static_cast<float>(RoundToIntegral(value, mode));
    } else if constexpr (std::is_same_v<D, float>) {
        return Widen(value);
    } else {
        return RoundTo16<D>(value, mode);
    }
}

}  // namespace emulation
