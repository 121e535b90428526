// Products of blocks of 32 rows, and the layouts their operands need.
//
// A block of 32 rows of D elements can lie as
//   left:       [2 tiles of 16 rows][D / 32][16 rows][32 d], the left operand of a sum over d;
//   transposed: [2 tiles of 16 rows][D / 32][16 pairs of d][16 rows][2], its right operand;
//   pairs:      [D / 16][16 pairs of rows][16 d][2], the right operand of a sum over rows;
//   columns:    [D / 16][16 d][32 rows], its left operand.
// The result of 32 x 32 is [2][2] tiles of 16 x 16 floats: rows, then columns of the product.
#pragma once

#include "amx.hpp"
#include "base.hpp"

namespace kernels {

inline constexpr int kTileFloats = amx::kTileRows * kLanes;  // of a 16 x 16 result
inline constexpr int kSquareFloats = 4 * kTileFloats;        // of a 32 x 32 result

inline void zero_square() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void load_square(const float* c) {
  _tile_loadd(0, c, 64);
  _tile_loadd(1, c + kTileFloats, 64);
  _tile_loadd(2, c + 2 * kTileFloats, 64);
  _tile_loadd(3, c + 3 * kTileFloats, 64);
}

inline void store_square(float* c) {
  _tile_stored(0, c, 64);
  _tile_stored(1, c + kTileFloats, 64);
  _tile_stored(2, c + 2 * kTileFloats, 64);
  _tile_stored(3, c + 3 * kTileFloats, 64);
}

// Adds 32 x 32 * 32 x 32 to tiles 0..3.
inline void accumulate_square(const bf16* a0, const bf16* a1, const bf16* b0, const bf16* b1) {
  _tile_loadd(4, a0, 64);
  _tile_loadd(6, b0, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, b1, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, a1, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// c = left times transposed: a sum over d.
inline void multiply_over_d(const bf16* left, const bf16* transposed, int head_dim, float* c) {
  const std::ptrdiff_t tile = std::ptrdiff_t(amx::kTileRows) * head_dim;
  amx::fence();
  zero_square();
  for (std::ptrdiff_t d = 0; d < tile; d += amx::kTileElements) {
    accumulate_square(left + d, left + d + tile, transposed + d, transposed + d + tile);
  }
  store_square(c);
}

// c += the sum, over the steps whose bit in ``steps`` is set, of two adjacent left tiles times two
// adjacent right tiles.
inline void accumulate_over_rows(const bf16* left, std::ptrdiff_t left_step, const bf16* right,
                                 std::ptrdiff_t right_step, std::uint32_t steps, float* c) {
  amx::fence();
  load_square(c);
  for (; steps != 0; steps &= steps - 1) {
    const int step = __builtin_ctz(steps);
    const bf16* a = left + step * left_step;
    const bf16* b = right + step * right_step;
    accumulate_square(a, a + amx::kTileElements, b, b + amx::kTileElements);
  }
  store_square(c);
}

inline void pack_left(const bf16* rows, std::ptrdiff_t ld, int head_dim, bf16* left) {
  for (int r = 0; r < 2 * amx::kTileRows; ++r) {
    bf16* to = left + r / amx::kTileRows * amx::kTileRows * head_dim +
               r % amx::kTileRows * amx::kTileSum;
    for (int d = 0; d < head_dim; d += amx::kTileSum) {
      _mm512_storeu_si512(to + d * amx::kTileRows, _mm512_loadu_si512(rows + r * ld + d));
    }
  }
}

inline void pack_transposed(const bf16* rows, std::ptrdiff_t ld, int head_dim, bf16* transposed) {
  for (int r = 0; r < 2 * amx::kTileRows; r += amx::kTileRows) {
    for (int d = 0; d < head_dim; d += amx::kTileSum) {
      amx::transpose_pairs(rows + r * ld + d, ld, transposed + r * head_dim + d * amx::kTileRows);
    }
  }
}

inline void pack_pairs(const bf16* rows, std::ptrdiff_t ld, int head_dim, bf16* pairs) {
  for (int r = 0; r < 2 * amx::kTileRows; r += 2) {
    for (int d = 0; d < head_dim; d += 2 * amx::kTileRows) {
      bf16* low = pairs + d * amx::kTileSum + r * amx::kTileRows;
      amx::interleave_rows(_mm512_loadu_si512(rows + r * ld + d),
                           _mm512_loadu_si512(rows + (r + 1) * ld + d), low,
                           low + amx::kTileElements);
    }
  }
}

inline void pairs_to_columns(const bf16* pairs, int head_dim, bf16* columns) {
  for (int d = 0; d < head_dim; d += amx::kTileRows) {
    amx::transpose_pairs(pairs + d * amx::kTileSum, 2 * amx::kTileRows,
                         columns + d * amx::kTileSum);
  }
}

}  // namespace kernels
