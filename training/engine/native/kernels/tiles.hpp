// Products of tiles: 16 x 16 floats += 16 x 32 bf16 * 32 x 16 bf16, and how their operands lie.
//
// The right operand lies in pairs: row p of its tile holds, for 16 columns, the elements 2p and
// 2p + 1 of the sum. A row of the result depends on its row of the left operand alone.
//
// ``Accumulators<rows, columns>`` is what all products are made of: a block of up to 2 x 2 tiles of
// results on its way through a sum. In memory, results lie [row tile][2 column tiles][16][16].
// Tile registers hold them where the processor has those, vector registers elsewhere:
//   zero() or load()                   begin a sum, or go on with one that was stored
//   add(steps, left_bytes, operands)   add the product of ``steps`` tiles of every row and column;
//                                      operands(step) says where they are, rows of the left ones lie
//                                      left_bytes apart
//   add_tile<row, column>(...)         the same to one tile alone, from operands that lie in a line
//   store()                            to memory; of the last row tile only rows that are wanted
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "tiles_base.hpp"

#ifdef __AMX_BF16__
#include "tiles_amx.hpp"
#else
#include "tiles_avx512.hpp"
#endif

namespace kernels::tiles {

// Whether this processor, and its operating system, let the process compute so. Asks for the right
// to use tile registers where they are used.
bool available();

struct alignas(64) Results {
  float tile[4][16][16];
};

// Elements [K][2][16] of a right operand's tile for 16 columns from the 16 rows in ``r`` (row n
// is column n), 32 elements each: a transposition of 32-bit pairs, in place.
inline void transpose_pairs(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// The same from memory to memory.
inline void transpose_pairs(const bf16* w, std::ptrdiff_t row_stride, bf16* tile) {
  __m512i rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(w + i * row_stride);
  transpose_pairs(rows);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tile + i * 32, rows[i]);
}

// Interleaves two rows of 32 elements: the row of a right operand's tiles whose sum runs over rows.
// ``low`` gets columns 0..15 as [16][2], ``high`` columns 16..31.
inline void interleave_rows(__m512i even, __m512i odd, bf16* low, bf16* high) {
  const __m512i lo = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                      39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i hi = _mm512_add_epi16(lo, _mm512_set1_epi16(16));
  _mm512_storeu_si512(low, _mm512_permutex2var_epi16(even, lo, odd));
  _mm512_storeu_si512(high, _mm512_permutex2var_epi16(even, hi, odd));
}

}  // namespace kernels::tiles
