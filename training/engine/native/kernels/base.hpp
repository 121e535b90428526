// Number formats and vector arithmetic shared by the kernels.
//
// Every sum here has one order that depends on the length of a row alone, so a row has the same bits
// whatever is computed beside it.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kernels {

using bf16 = std::uint16_t;  // the upper half of an IEEE float
using f32x16 = __m512;

inline constexpr int kLanes = 16;

inline __mmask16 first_lanes(int count) {
  return count >= kLanes ? __mmask16(0xffff) : __mmask16((1u << count) - 1);
}

inline f32x16 widen(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline f32x16 load(const bf16* from) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline f32x16 load(const float* from) { return _mm512_loadu_ps(from); }

inline f32x16 load(const bf16* from, __mmask16 lanes) {
  return widen(_mm256_maskz_loadu_epi16(lanes, from));
}

inline f32x16 load(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }

// Rounds to nearest, ties to even; NaN stays NaN.
#ifdef __AVX512BF16__
inline __m256i narrow(f32x16 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

// 32 values, those of ``low`` first.
inline __m512i narrow(f32x16 low, f32x16 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
#else
inline __m256i narrow(f32x16 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i rounded = _mm512_mask_mov_epi32(
      _mm512_add_epi32(bits, half), _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q), quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

inline __m512i narrow(f32x16 low, f32x16 high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(low)), narrow(high), 1);
}
#endif

inline void store(bf16* to, f32x16 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(values));
}

inline void store(float* to, f32x16 values) { _mm512_storeu_ps(to, values); }

inline void store(bf16* to, f32x16 values, __mmask16 lanes) {
  _mm256_mask_storeu_epi16(to, lanes, narrow(values));
}

inline void store(float* to, f32x16 values, __mmask16 lanes) {
  _mm512_mask_storeu_ps(to, lanes, values);
}

inline float widen(bf16 value) {
  std::uint32_t bits = std::uint32_t(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline f32x16 splat(float value) { return _mm512_set1_ps(value); }

// e^x within 1 ulp or so: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial of degree 6 in r.
// -inf gives 0, +inf gives inf, NaN stays NaN: min and max give their second operand then.
inline f32x16 exp(f32x16 x) {
  const f32x16 clamped = _mm512_max_ps(splat(-104.0f), _mm512_min_ps(splat(89.0f), x));
  const f32x16 shift = splat(12582912.0f);  // 1.5 * 2^23: the sum has no room for a fraction
  const f32x16 shifted = _mm512_fmadd_ps(clamped, splat(1.44269504f), shift);
  const f32x16 n = _mm512_sub_ps(shifted, shift);
  f32x16 r = _mm512_fnmadd_ps(n, splat(0.693145752f), clamped);
  r = _mm512_fnmadd_ps(n, splat(1.42860677e-6f), r);
  f32x16 p = splat(1.38888889e-3f);
  p = _mm512_fmadd_ps(p, r, splat(8.33333333e-3f));
  p = _mm512_fmadd_ps(p, r, splat(4.16666667e-2f));
  p = _mm512_fmadd_ps(p, r, splat(1.66666667e-1f));
  p = _mm512_fmadd_ps(p, r, splat(0.5f));
  p = _mm512_fmadd_ps(p, r, splat(1.0f));
  p = _mm512_fmadd_ps(p, r, splat(1.0f));
  return _mm512_scalef_ps(p, n);
}

inline float sum(f32x16 values) { return _mm512_reduce_add_ps(values); }

inline float max(f32x16 values) { return _mm512_reduce_max_ps(values); }

inline constexpr int divide_up(int value, int by) { return (value + by - 1) / by; }

inline constexpr int round_up(int value, int to) { return divide_up(value, to) * to; }

}  // namespace kernels
