// The 16-bit floating-point types of the device, held as bit patterns.
//
// Every conversion to 16 bits rounds to nearest, ties to even, keeps subnormals, overflows to infinity and quietens NaN. The
// other rounding modes of Cast are in convert.h. On the device both types are built in, at global scope; bfloat16_t has no scalar
// arithmetic there and converts only through AscendC::ToFloat and AscendC::ToBfloat16.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace emulation {

inline uint32_t FloatBits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float BitsFloat(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Branches written as selects, so that loops over these four conversions vectorise.
inline float HalfToFloat(uint16_t bits) {
    const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
    const float finite = BitsFloat(magnitude) * 0x1p112f;  // moves the exponent bias; exact for subnormals too
    const uint32_t special = magnitude | 0x7f800000;
    const uint32_t unsignedBits = (bits & 0x7c00) == 0x7c00 ? special : FloatBits(finite);
    return BitsFloat(unsignedBits | static_cast<uint32_t>(bits & 0x8000) << 16);
}

inline uint16_t FloatToHalf(float value) {
    const uint32_t bits = FloatBits(value);
    const uint32_t magnitude = bits & 0x7fffffff;
    // Normal results: round the 13 dropped bits to even by carrying into the exponent; 0x38000000 is the bias difference.
    const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
    // Subnormal results: adding 0.5 leaves exactly the bits that a half subnormal has, rounded to even by the addition itself.
    const uint32_t subnormal = FloatBits(BitsFloat(magnitude) + 0.5f) - 0x3f000000;
    uint32_t result = magnitude < 0x38800000 ? subnormal : normal;
    result = magnitude >= 0x477ff000 ? 0x7c00 : result;  // 65520 and above
    result = magnitude > 0x7f800000 ? 0x7e00 : result;
    return static_cast<uint16_t>(result | bits >> 31 << 15);
}

inline float Bfloat16ToFloat(uint16_t bits) { return BitsFloat(static_cast<uint32_t>(bits) << 16); }

inline uint16_t FloatToBfloat16(float value) {
    const uint32_t bits = FloatBits(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded);
}

}  // namespace emulation

struct half {
    uint16_t bits;

    half() = default;
    template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
    half(T value) : bits(emulation::FloatToHalf(static_cast<float>(value))) {}
    operator float() const { return emulation::HalfToFloat(bits); }
};

struct bfloat16_t {
    uint16_t bits;
};

static_assert(sizeof(half) == 2 && std::is_trivially_copyable_v<half>);
static_assert(sizeof(bfloat16_t) == 2 && std::is_trivially_copyable_v<bfloat16_t>);

namespace AscendC {

inline float ToFloat(const bfloat16_t& value) { return emulation::Bfloat16ToFloat(value.bits); }

inline bfloat16_t ToBfloat16(const float& value) { return {emulation::FloatToBfloat16(value)}; }

}  // namespace AscendC
