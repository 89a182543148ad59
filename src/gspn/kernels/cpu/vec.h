// The one vector layer of the CPU kernels: everything that depends on the instruction set is in this file, except the
// tiles of AMX (propagate/amx.h).
//
// A translation unit defines GSPN_NS (a namespace of its own) and GSPN_LANES (float lanes: 16, 8 or 4), is compiled
// with the flags of its instruction set and includes the kernels. Everything has internal linkage: a weak symbol that
// was compiled for AVX-512 could otherwise be picked by the linker for the portable path. For the same reason nothing
// from the C++ library is used here, only compiler vector extensions (GCC >= 12 or clang) and intrinsics.
//
// Data of type T (float, double, bf16, fp16) is computed on as Acc<T> (float, double) in vectors VecOf<T>.
#pragma once
#include <stdint.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define GSPN_INLINE static inline __attribute__((always_inline))
// The instruction sets that have masked moves and conversions of their own; anything else takes the portable path.
// Flags: -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c, or -mavx2 -mfma -mf16c.
#if GSPN_LANES == 16 && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define GSPN_AVX512 1
#elif GSPN_LANES == 8 && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define GSPN_AVX2 1
#endif

namespace GSPN_NS {
namespace {

// Types

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

constexpr int kVectorBytes = 4 * GSPN_LANES;
typedef float vf __attribute__((vector_size(4 * GSPN_LANES)));
typedef double vd __attribute__((vector_size(4 * GSPN_LANES)));
typedef int32_t vi32 __attribute__((vector_size(4 * GSPN_LANES)));
typedef uint32_t vu32 __attribute__((vector_size(4 * GSPN_LANES)));
typedef int64_t vi64 __attribute__((vector_size(4 * GSPN_LANES)));
typedef uint16_t vu16 __attribute__((vector_size(2 * GSPN_LANES)));  // as many as float lanes: 16-bit storage

template <class A, class V> struct ComputedAs {
    typedef A acc;
    typedef V vec;
};
template <class T> struct Traits;
template <> struct Traits<float> : ComputedAs<float, vf> {};
template <> struct Traits<bf16> : ComputedAs<float, vf> {};
template <> struct Traits<fp16> : ComputedAs<float, vf> {};
template <> struct Traits<double> : ComputedAs<double, vd> {};
template <class T> using Acc = typename Traits<T>::acc;
template <class T> using VecOf = typename Traits<T>::vec;
template <class T> constexpr int kLanes = kVectorBytes / (int)sizeof(Acc<T>);

template <class V> GSPN_INLINE V zero() { return V{}; }
GSPN_INLINE vf broadcast(float a) { return vf{} + a; }
GSPN_INLINE vd broadcast(double a) { return vd{} + a; }
GSPN_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }  // contracted to one instruction where there is one
GSPN_INLINE vd fma(vd a, vd b, vd c) { return a * b + c; }

// Conversions of 16-bit storage

GSPN_INLINE vf widen_bf16(vu16 h) { return (vf)(__builtin_convertvector(h, vu32) << 16); }

// Round to nearest even; a NaN stays a (quiet) NaN instead of being rounded up to infinity.
GSPN_INLINE vu16 narrow_bf16(vf v) {
    vu32 u = (vu32)v;
    vu32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    vu32 quiet = (u >> 16) | 0x40u;
    return __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, vu16);
}

#ifdef GSPN_AVX512
GSPN_INLINE vf widen_fp16(vu16 h) { return (vf)_mm512_cvtph_ps((__m256i)h); }
GSPN_INLINE vu16 narrow_fp16(vf v) { return (vu16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(GSPN_AVX2)
GSPN_INLINE vf widen_fp16(vu16 h) { return (vf)_mm256_cvtph_ps((__m128i)h); }
GSPN_INLINE vu16 narrow_fp16(vf v) { return (vu16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
// The exponent is rebiased by a multiplication, which also makes halves' subnormals normal.
GSPN_INLINE vf widen_fp16(vu16 h) {
    vu32 u = __builtin_convertvector(h, vu32), magnitude = (u & 0x7fffu) << 13;
    vu32 finite = (vu32)((vf)magnitude * 0x1p112f);
    vu32 special = magnitude | 0x7f800000u;
    return (vf)(((u & 0x8000u) << 16) | (magnitude >= (0x7c00u << 13) ? special : finite));
}

// Round to nearest even. Subnormal results are rounded by adding a number whose last place is the result's.
GSPN_INLINE vu16 narrow_fp16(vf v) {
    vu32 u = (vu32)v, magnitude = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
    vu32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;  // may carry to infinity
    vu32 subnormal = (vu32)((vf)magnitude + 0.5f) - 0x3f000000u;
    vu32 large = magnitude > 0x7f800000u ? vu32{} + 0x7e00u : vu32{} + 0x7c00u;
    vu32 r = magnitude < 0x38800000u ? subnormal : normal;
    r = magnitude >= 0x47800000u ? large : r;
    return __builtin_convertvector(r | sign, vu16);
}
#endif

// Loads and stores, anywhere in memory: load(p), store(p, v), and for the first n lanes only load_n, store_n (the
// other lanes read as 0)

template <class V, class P> GSPN_INLINE V load_bits(const P* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <class V, class P> GSPN_INLINE void store_bits(P* p, V v) { __builtin_memcpy(p, &v, sizeof v); }

GSPN_INLINE vf load(const float* p) { return load_bits<vf>(p); }
GSPN_INLINE vd load(const double* p) { return load_bits<vd>(p); }
GSPN_INLINE vf load(const bf16* p) { return widen_bf16(load_bits<vu16>(p)); }
GSPN_INLINE vf load(const fp16* p) { return widen_fp16(load_bits<vu16>(p)); }
GSPN_INLINE void store(float* p, vf v) { store_bits(p, v); }
GSPN_INLINE void store(double* p, vd v) { store_bits(p, v); }
GSPN_INLINE void store(bf16* p, vf v) { store_bits(p, narrow_bf16(v)); }
GSPN_INLINE void store(fp16* p, vf v) { store_bits(p, narrow_fp16(v)); }

#ifdef GSPN_AVX512
GSPN_INLINE __mmask16 first_lanes(int n) { return (__mmask16)((1u << n) - 1u); }
GSPN_INLINE vf load_n(const float* p, int n) { return (vf)_mm512_maskz_loadu_ps(first_lanes(n), p); }
GSPN_INLINE vd load_n(const double* p, int n) { return (vd)_mm512_maskz_loadu_pd((__mmask8)first_lanes(n), p); }
GSPN_INLINE vu16 load_bits_n(const void* p, int n) { return (vu16)_mm256_maskz_loadu_epi16(first_lanes(n), p); }
GSPN_INLINE void store_n(float* p, vf v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v); }
GSPN_INLINE void store_n(double* p, vd v, int n) { _mm512_mask_storeu_pd(p, (__mmask8)first_lanes(n), (__m512d)v); }
GSPN_INLINE void store_bits_n(void* p, vu16 v, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)v); }
#else
template <class V, class T> GSPN_INLINE V copy_in(const T* p, int n) {
    T lanes[sizeof(V) / sizeof(T)] = {};
    for (int i = 0; i < n; i++) lanes[i] = p[i];
    return load_bits<V>(lanes);
}
template <class V, class T> GSPN_INLINE void copy_out(T* p, V v, int n) {
    T lanes[sizeof(V) / sizeof(T)];
    store_bits(lanes, v);
    for (int i = 0; i < n; i++) p[i] = lanes[i];
}
#ifdef GSPN_AVX2
GSPN_INLINE __m256i first_lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
GSPN_INLINE vf load_n(const float* p, int n) { return (vf)_mm256_maskload_ps(p, first_lanes(n)); }
GSPN_INLINE void store_n(float* p, vf v, int n) { _mm256_maskstore_ps(p, first_lanes(n), (__m256)v); }
#else
GSPN_INLINE vf load_n(const float* p, int n) { return copy_in<vf>(p, n); }
GSPN_INLINE void store_n(float* p, vf v, int n) { copy_out(p, v, n); }
#endif
GSPN_INLINE vd load_n(const double* p, int n) { return copy_in<vd>(p, n); }
GSPN_INLINE void store_n(double* p, vd v, int n) { copy_out(p, v, n); }
GSPN_INLINE vu16 load_bits_n(const void* p, int n) { return copy_in<vu16>((const uint16_t*)p, n); }
GSPN_INLINE void store_bits_n(void* p, vu16 v, int n) { copy_out((uint16_t*)p, v, n); }
#endif
GSPN_INLINE vf load_n(const bf16* p, int n) { return widen_bf16(load_bits_n(p, n)); }
GSPN_INLINE vf load_n(const fp16* p, int n) { return widen_fp16(load_bits_n(p, n)); }
GSPN_INLINE void store_n(bf16* p, vf v, int n) { store_bits_n(p, narrow_bf16(v), n); }
GSPN_INLINE void store_n(fp16* p, vf v, int n) { store_bits_n(p, narrow_fp16(v), n); }

// All lanes or the first n, decided at compile time: for loops whose last step is partial.
template <bool PARTIAL, class T> GSPN_INLINE VecOf<T> load_if(const T* p, int n) {
    if constexpr (PARTIAL) return load_n(p, n);
    else return load(p);
}
template <bool PARTIAL, class T> GSPN_INLINE void store_if(T* p, VecOf<T> v, int n) {
    if constexpr (PARTIAL) store_n(p, v, n);
    else store(p, v);
}

// One element of storage, exactly as the vectors convert it
template <class T> GSPN_INLINE Acc<T> load_one(const T* p) { return load_n(p, 1)[0]; }
template <> inline __attribute__((always_inline)) float load_one(const float* p) { return *p; }
template <> inline __attribute__((always_inline)) double load_one(const double* p) { return *p; }
template <class T> GSPN_INLINE void store_one(T* p, Acc<T> a) { store_n(p, broadcast(a), 1); }

// Arithmetic. A NaN passes through all of these: the comparisons are written so that it fails them.

template <class V, class A> GSPN_INLINE V at_most(V v, A cap) { return v > cap ? V{} + cap : v; }
template <class V, class A> GSPN_INLINE V at_least(V v, A floor) { return v < floor ? V{} + floor : v; }
// x86's minimum is its second operand where either is a NaN: one instruction instead of three.
#if defined(GSPN_AVX512)
GSPN_INLINE vf at_most(vf v, float cap) { return (vf)_mm512_min_ps(_mm512_set1_ps(cap), (__m512)v); }
GSPN_INLINE vf at_least(vf v, float floor) { return (vf)_mm512_max_ps(_mm512_set1_ps(floor), (__m512)v); }
#elif defined(GSPN_AVX2)
GSPN_INLINE vf at_most(vf v, float cap) { return (vf)_mm256_min_ps(_mm256_set1_ps(cap), (__m256)v); }
GSPN_INLINE vf at_least(vf v, float floor) { return (vf)_mm256_max_ps(_mm256_set1_ps(floor), (__m256)v); }
#elif defined(__SSE2__)
GSPN_INLINE vf at_most(vf v, float cap) { return (vf)_mm_min_ps(_mm_set1_ps(cap), (__m128)v); }
GSPN_INLINE vf at_least(vf v, float floor) { return (vf)_mm_max_ps(_mm_set1_ps(floor), (__m128)v); }
#endif

// 1.5 * 2^23 plus the exponent of 1: added to y, it leaves the exponent of 2^(nearest integer) in the lowest bits. A
// product with that power of two keeps a NaN. An integer added to the exponent of a NaN would make it a number.
constexpr float kShift = 12582912.0f + 127.0f;
constexpr double kShiftDouble = 0x1.8p52 + 1023.0;

// 2^y to about 1 ulp; y <= 120. Far below 0 it goes to 0 (not lower than 2^-125 off AVX-512).
GSPN_INLINE vf exp2(vf y) {
#ifdef GSPN_AVX512
    vf f = (vf)_mm512_reduce_ps((__m512)y, 0x09);  // y - floor(y)
    vf p = f * 1.877576695e-03f + 8.989339694e-03f;
    p = p * f + 5.582631752e-02f;
    p = p * f + 2.401536107e-01f;
    p = p * f + 6.931530833e-01f;
    p = p * f + 9.999999404e-01f;
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)y);
#else
    y = at_least(y, -125.0f);
    vf shifted = y + kShift;
    vf f = y - (shifted - kShift);
    vf p = f * 1.327647129e-3f + 9.675540961e-3f;
    p = p * f + 5.550713092e-2f;
    p = p * f + 0.2402212023735f;
    p = p * f + 0.69314694404f;
    p = p * f + 1.0000001192f;
    return p * (vf)((vu32)shifted << 23);
#endif
}

// 2^y to 7.5e-5: a 26th of the rounding of bfloat16, a 6th of that of float16
GSPN_INLINE vf rough_exp2(vf y) {
#ifdef GSPN_AVX512
    vf f = (vf)_mm512_reduce_ps((__m512)y, 0x09);  // y - floor(y)
    vf p = f * 7.802452332e-02f + 2.260671590e-01f;
    p = p * f + 6.958335367e-01f;
    p = p * f + 9.999252192e-01f;
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)y);
#else
    y = at_least(y, -125.0f);
    vf shifted = y + kShift;
    vf f = y - (shifted - kShift);
    vf p = f * 5.517166954e-02f + 2.426111254e-01f;
    p = p * f + 6.932609857e-01f;
    p = p * f + 9.999280733e-01f;
    return p * (vf)((vu32)shifted << 23);
#endif
}

// 2^y to about 1e-15; -1000 <= y <= 1000 after the cut below. Taylor series of e^(f ln 2), |f| <= 1/2.
GSPN_INLINE vd exp2(vd y) {
    y = at_least(y, -1000.0);
    vd shifted = y + kShiftDouble;
    vd g = (y - (shifted - kShiftDouble)) * 0.693147180559945309417;
    vd p = g * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
    p = p * g + 1.0 / 39916800.0;
    p = p * g + 1.0 / 3628800.0;
    p = p * g + 1.0 / 362880.0;
    p = p * g + 1.0 / 40320.0;
    p = p * g + 1.0 / 5040.0;
    p = p * g + 1.0 / 720.0;
    p = p * g + 1.0 / 120.0;
    p = p * g + 1.0 / 24.0;
    p = p * g + 1.0 / 6.0;
    p = p * g + 0.5;
    p = p * g + 1.0;
    p = p * g + 1.0;
    return p * (vd)((vi64)shifted << 52);
}

// 1/q for finite q whose reciprocal is normal
GSPN_INLINE vf reciprocal(vf q) {
#ifdef GSPN_AVX512
    vf y = (vf)_mm512_rcp14_ps((__m512)q);
    return y * (2.0f - q * y);
#else
    return 1.0f / q;
#endif
}
GSPN_INLINE vd reciprocal(vd q) { return 1.0 / q; }

// Lists of lane numbers for shuffles
template <int... I> struct Lanes {};
template <int N, int... I> struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I> struct MakeLanes<0, I...> {
    typedef Lanes<I...> type;
};

// Lane j is p[j % R]: one broadcasting load for any power of two R.
template <int R, class A, int... I> GSPN_INLINE VecOf<A> repeat_lanes(const A* p, Lanes<I...>) {
    typedef A Few __attribute__((vector_size(R * sizeof(A))));
    Few few = load_bits<Few>(p);
    return __builtin_shufflevector(few, few, (I % R)...);
}
template <int R, class A> GSPN_INLINE VecOf<A> repeat(const A* p) {
    if constexpr (R == 1) return broadcast(*p);
    else if constexpr (R == kLanes<A>) return load(p);
#ifdef GSPN_AVX512
    else if constexpr (R * sizeof(A) == 8) return (vf)_mm512_set1_pd(load_bits<double>(p));
    else if constexpr (R * sizeof(A) == 16) return (VecOf<A>)_mm512_broadcast_f32x4(_mm_loadu_ps((const float*)p));
    else return (VecOf<A>)_mm512_broadcast_f32x8(_mm256_loadu_ps((const float*)p));
#else
    else return repeat_lanes<R>(p, typename MakeLanes<kLanes<A>>::type{});
#endif
}

template <class V> GSPN_INLINE auto sum_lanes(V v) {
    auto s = v[0];
    for (int i = 1; i < (int)(sizeof v / sizeof v[0]); i++) s += v[i];
    return s;
}

// Transposition in registers, by log2(lanes) rounds of exchanges between pairs of vectors

// Swap the off-diagonal STEP x STEP blocks of the pair (a above b).
template <int STEP, class V, int... I> GSPN_INLINE void exchange(V& a, V& b, Lanes<I...>) {
    constexpr int n = sizeof...(I);
    V upper = __builtin_shufflevector(a, b, (I & STEP ? n + I - STEP : I)...);
    b = __builtin_shufflevector(a, b, (I & STEP ? n + I : I + STEP)...);
    a = upper;
}

template <int STEP, class V> GSPN_INLINE void transpose_round(V* v) {
    constexpr int n = sizeof(V) / sizeof(v[0][0]);
#pragma GCC unroll 16
    for (int i = 0; i < n; i++)
        if (!(i & STEP)) exchange<STEP>(v[i], v[i + STEP], typename MakeLanes<n>::type{});
    if constexpr (STEP > 1) transpose_round<STEP / 2>(v);
}

// The sums of the lanes of as many vectors as there are lanes: lane i is that of v[i]. Overwrites v.
template <int STEP, class V> GSPN_INLINE void fold_round(V* v) {
#pragma GCC unroll 16
    for (int i = 0; i < STEP; i++) {
        exchange<STEP>(v[i], v[i + STEP], typename MakeLanes<sizeof(V) / sizeof(v[0][0])>::type{});
        v[i] = v[i] + v[i + STEP];
    }
    if constexpr (STEP > 1) fold_round<STEP / 2>(v);
}
template <class V> GSPN_INLINE V sums_of_lanes(V* v) {
    fold_round<(int)(sizeof(V) / sizeof(v[0][0])) / 2>(v);
    return v[0];
}

// v[i][j] <-> v[j][i] for a square of lanes x lanes elements
template <class V> GSPN_INLINE void transpose(V* v) { transpose_round<(int)(sizeof(V) / sizeof(v[0][0])) / 2>(v); }

}  // namespace
}  // namespace GSPN_NS
