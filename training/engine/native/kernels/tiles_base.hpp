// What both forms of ``Accumulators`` share: sizes, and the product of pairs of bf16.
#pragma once

#include <immintrin.h>

#include "base.hpp"

namespace kernels::tiles {

inline constexpr int kTileRows = 16;
inline constexpr int kTileSum = 32;                         // elements of the sum that one tile covers
inline constexpr int kTileElements = kTileRows * kTileSum;  // bf16 values of an operand tile
inline constexpr int kTileFloats = kTileRows * kLanes;      // of a result tile

// Tiles of one step: rows of the left operand, columns of the right one.
struct Operands {
  const bf16* left[2];
  const bf16* right[2];
};

#ifdef __AVX512BF16__

using Pairs = __m512bh;  // 16 pairs of neighbours in a sum

inline Pairs load_pairs(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }

inline Pairs splat_pair(const char* from) {
  int pair;
  std::memcpy(&pair, from, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}

inline f32x16 add_products(f32x16 sum, Pairs x, Pairs y) { return _mm512_dpbf16_ps(sum, x, y); }

#else

struct Pairs {
  f32x16 first, second;
};

inline Pairs widen_pairs(__m512i pairs) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))))};
}

inline Pairs load_pairs(const bf16* from) { return widen_pairs(_mm512_loadu_si512(from)); }

inline Pairs splat_pair(const char* from) {
  int pair;
  std::memcpy(&pair, from, sizeof pair);
  return widen_pairs(_mm512_set1_epi32(pair));
}

inline f32x16 add_products(f32x16 sum, const Pairs& x, const Pairs& y) {
  return _mm512_fmadd_ps(x.second, y.second, _mm512_fmadd_ps(x.first, y.first, sum));
}

#endif

}  // namespace kernels::tiles
