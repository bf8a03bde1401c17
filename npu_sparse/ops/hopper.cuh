// What the Hopper kernels share: barriers, asynchronous copies, matrix products of a warpgroup. PTX only, no CUDA header, so that
// NVRTC compiles it wherever torch runs. 16-bit operands are bf16 or fp16 by the macro BF16; products accumulate in fp32.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
#if BF16
#define TYPES ".f32.bf16.bf16 "
#else
#define TYPES ".f32.f16.f16 "
#endif

#if BF16
#define SMALL_TYPES ".f32.bf16.bf16.f32 "
#else
#define SMALL_TYPES ".f32.f16.f16.f32 "
#endif

#define MINUS_INFINITY __uint_as_float(0xff800000u)
#define INFINITY_ __uint_as_float(0x7f800000u)
#define LEAST __uint_as_float(0xff7fffffu)
#define NOT_A_NUMBER __uint_as_float(0x7fffffffu)
#define LARGEST __uint_as_float(0x7f7fffffu)
constexpr u32 FULL = 0xffffffffu;

DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// --- mbarriers: `parity` is that of the phase waited for --------------------------------------------------------------------------
DEVICE void barrier_init(u32 bar, u32 arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory"); }

DEVICE void barrier_arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }

DEVICE bool barrier_try_wait(u32 bar, u32 parity)
{
    u32 done;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    return done;
}

DEVICE void barrier_wait(u32 bar, u32 parity)
{
    while (!barrier_try_wait(bar, parity)) {
    }
}

// --- asynchronous copies; what is not read is filled with zeros ------------------------------------------------------------------
DEVICE void copy_16(u32 to, const void* from, bool read)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(read ? 16 : 0) : "memory");
}

DEVICE void copy_4(u32 to, const void* from, bool read)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(read ? 4 : 0) : "memory");
}

// Arrives at the barrier when all earlier copies of this thread are done; the barrier counts this thread.
DEVICE void arrive_after_copies(u32 bar) { asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory"); }

// Orders what the copies wrote before the reads of the matrix unit.
DEVICE void fence_for_matrix_unit() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- warpgroups -------------------------------------------------------------------------------------------------------------------
template <int REGISTERS>
DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS>
DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }

DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
DEVICE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// Keeps the compiler from moving uses of accumulators over a wait.
template <int N>
DEVICE void hold(float (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Matrix descriptors of a tile whose rows are 128 bytes, swizzled by 128 bytes (16-byte column c of row r stands at c ^ (r & 7)).
// K-major: rows are M or N, columns K; groups of 8 rows are 1024 bytes apart. A step of 16 along K is 32 bytes.
DEVICE u64 k_major(u32 address) { return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62; }
// MN-major: rows are K, columns N; 64 columns a tile, further tiles `tile_bytes` apart. A step of 16 along K is 2048 bytes.
DEVICE u64 n_major(u32 address, u32 tile_bytes)
{
    return (u64)((address & 0x3ffff) >> 4) | (u64)(tile_bytes >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

#define R8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define R32(d, i) R8(d, i), R8(d, i + 8), R8(d, i + 16), R8(d, i + 24)
#define R64(d, i) R32(d, i), R32(d, i + 32)
#define R128(d, i) R64(d, i), R64(d, i + 64)
#define OUT32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define OUT64 OUT32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define OUT128 OUT64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
    "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// d (+)= A B^T, both operands K-major in shared memory: 64 rows of A, N rows of B, 16 columns.
#define DEFINE_PRODUCT(COUNT, N, A, B, ADD)                                                                                        \
    DEVICE void product(float (&d)[COUNT], u64 a, u64 b, int add)                                                                  \
    {                                                                                                                              \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, " ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16" TYPES "{" OUT##COUNT      \
                     "}, " A ", " B ", p, 1, 1, 0, 0; }" : R##COUNT(d, 0) : "l"(a), "l"(b), "r"(add) : "memory");                  \
    }
// d += A B: A in registers (64 x 16), B N-major in shared memory (16 rows of N).
#define DEFINE_VALUE_PRODUCT(COUNT, N, A0, A1, A2, A3, B)                                                                          \
    DEVICE void value_product(float (&d)[COUNT], const u32* a, u64 b)                                                              \
    {                                                                                                                              \
        asm volatile("{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" #N "k16" TYPES "{" OUT##COUNT          \
                     "}, {" A0 "," A1 "," A2 "," A3 "}, " B ", p, 1, 1, 1; }" : R##COUNT(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) : "memory");          \
    }
// d (+)= A B^T: A in registers, B K-major in shared memory.
#define DEFINE_REGISTER_PRODUCT(COUNT, N, A0, A1, A2, A3, B, ADD)                                                                  \
    DEVICE void product(float (&d)[COUNT], const u32* a, u64 b, int add)                                                           \
    {                                                                                                                              \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, " ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16" TYPES "{" OUT##COUNT      \
                     "}, {" A0 "," A1 "," A2 "," A3 "}, " B ", p, 1, 1, 0; }"                                                      \
                     : R##COUNT(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add) : "memory");                  \
    }
DEFINE_PRODUCT(32, 64, "%32", "%33", "%34")
DEFINE_PRODUCT(64, 128, "%64", "%65", "%66")
DEFINE_PRODUCT(128, 256, "%128", "%129", "%130")
DEFINE_VALUE_PRODUCT(32, 64, "%32", "%33", "%34", "%35", "%36")
DEFINE_VALUE_PRODUCT(64, 128, "%64", "%65", "%66", "%67", "%68")
DEFINE_VALUE_PRODUCT(128, 256, "%128", "%129", "%130", "%131", "%132")
DEFINE_REGISTER_PRODUCT(64, 128, "%64", "%65", "%66", "%67", "%68", "%69")

// --- numbers ----------------------------------------------------------------------------------------------------------------------
DEVICE u32 pack(float low, float high)
{
    u32 both;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

DEVICE float exp2_(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The larger of two numbers, or NaN where one is: fmaxf would hide a score that is none.
DEVICE float larger(float x, float y)
{
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

DEVICE float number(u16 x)
{
#if BF16
    return __uint_as_float((u32)x << 16);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#endif
}
