// Products of blocks of 32 rows, and the layouts their operands need.
//
// A block of 32 rows of D elements can lie as
//   left:       [2 tiles of 16 rows][D / 32][16 rows][32 d], the left operand of a sum over d;
//   transposed: [2 tiles of 16 rows][D / 32][16 pairs of d][16 rows][2], its right operand;
//   pairs:      [D / 16][16 pairs of rows][16 d][2], the right operand of a sum over rows;
//   columns:    [D / 16][16 d][32 rows], its left operand.
// The result of 32 x 32 is [2][2] tiles of 16 x 16 floats: rows, then columns of the product.
#pragma once

#include "tiles.hpp"
#include "base.hpp"

namespace kernels {

using tiles::kTileFloats;

inline constexpr int kSquareFloats = 4 * kTileFloats;  // of a 32 x 32 result

// c = left times transposed: a sum over d.
inline void multiply_over_d(const bf16* left, const bf16* transposed, int head_dim, float* c) {
  const std::ptrdiff_t tile = std::ptrdiff_t(tiles::kTileRows) * head_dim;
  tiles::Accumulators<2, 2> sums(c, 32);
  sums.zero();
  sums.add(head_dim / tiles::kTileSum, 64, [&](int step) {
    const bf16* a = left + step * tiles::kTileElements;
    const bf16* b = transposed + step * tiles::kTileElements;
    return tiles::Operands{{a, a + tile}, {b, b + tile}};
  });
  sums.store();
}

// c += the sum, over the steps whose bit in ``steps`` is set, of two adjacent left tiles times two
// adjacent right tiles.
inline void accumulate_over_rows(const bf16* left, std::ptrdiff_t left_step, const bf16* right,
                                 std::ptrdiff_t right_step, std::uint32_t steps, float* c) {
  int chosen[32], count = 0;
  for (; steps != 0; steps &= steps - 1) chosen[count++] = __builtin_ctz(steps);
  tiles::Accumulators<2, 2> sums(c, 32);
  sums.load();
  sums.add(count, 64, [&](int i) {
    const bf16* a = left + chosen[i] * left_step;
    const bf16* b = right + chosen[i] * right_step;
    return tiles::Operands{{a, a + tiles::kTileElements}, {b, b + tiles::kTileElements}};
  });
  sums.store();
}

inline void pack_left(const bf16* rows, std::ptrdiff_t ld, int head_dim, bf16* left) {
  for (int r = 0; r < 2 * tiles::kTileRows; ++r) {
    bf16* to = left + r / tiles::kTileRows * tiles::kTileRows * head_dim +
               r % tiles::kTileRows * tiles::kTileSum;
    for (int d = 0; d < head_dim; d += tiles::kTileSum) {
      _mm512_storeu_si512(to + d * tiles::kTileRows, _mm512_loadu_si512(rows + r * ld + d));
    }
  }
}

inline void pack_transposed(const bf16* rows, std::ptrdiff_t ld, int head_dim, bf16* transposed) {
  for (int r = 0; r < 2 * tiles::kTileRows; r += tiles::kTileRows) {
    for (int d = 0; d < head_dim; d += tiles::kTileSum) {
      tiles::transpose_pairs(rows + r * ld + d, ld, transposed + r * head_dim + d * tiles::kTileRows);
    }
  }
}

inline void pack_pairs(const bf16* rows, std::ptrdiff_t ld, int head_dim, bf16* pairs) {
  for (int r = 0; r < 2 * tiles::kTileRows; r += 2) {
    for (int d = 0; d < head_dim; d += 2 * tiles::kTileRows) {
      bf16* low = pairs + d * tiles::kTileSum + r * tiles::kTileRows;
      tiles::interleave_rows(_mm512_loadu_si512(rows + r * ld + d),
                           _mm512_loadu_si512(rows + (r + 1) * ld + d), low,
                           low + tiles::kTileElements);
    }
  }
}

inline void pairs_to_columns(const bf16* pairs, int head_dim, bf16* columns) {
  for (int d = 0; d < head_dim; d += tiles::kTileRows) {
    tiles::transpose_pairs(pairs + d * tiles::kTileSum, 2 * tiles::kTileRows,
                         columns + d * tiles::kTileSum);
  }
}

}  // namespace kernels
