// The order of keys within a row: larger scores first, and of equal scores the smaller position. A rank is one unsigned integer of
// that order, different for every key, so that a k-th largest is never tied.
#pragma once

DEVICE u32 ordered(float score)
{
    const u32 bits = __float_as_uint(score + 0.0f);  // + 0: both zeros are one value
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The score of a key that is not always kept: below theirs, which is +inf, and none at all where it is NaN.
DEVICE float ordinary(float score) { return score != score ? MINUS_INFINITY : fminf(score, LARGEST); }

DEVICE u64 rank(float score, int key) { return (u64)ordered(score) << 32 | (u32)~key; }

DEVICE float score_of(u64 rank)
{
    const u32 order = rank >> 32;
    return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}

DEVICE int key_of_rank(u64 rank) { return (int)~(u32)rank; }

constexpr u64 ANY = 0x007fffffull << 32;  // the rank of -inf: every key that a query sees reaches it

// The next larger number; of -inf, the least finite one.
DEVICE float above(float x)
{
    const u32 bits = __float_as_uint(x + 0.0f);
    return __uint_as_float(bits >> 31 ? bits - 1 : bits + 1);
}

// A candidate as it is stored; its rank is `rank_of`.
DEVICE u64 entry(float score, int key) { return (u64)__float_as_uint(score) << 32 | (u32)key; }
DEVICE int key_of(u64 entry) { return (int)(u32)entry; }
DEVICE u64 rank_of(u64 entry) { return rank(__uint_as_float(entry >> 32), key_of(entry)); }

// The n-th sampled key: one of every STRIDE, at a place that follows no pattern of the text.
DEVICE int sampled_key(int n)
{
    u32 x = (u32)n * 2654435761u;
    x ^= x >> 15;
    x *= 2246822519u;
    return n * STRIDE + (int)((x >> 13) % STRIDE);
}
