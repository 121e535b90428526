#include <algorithm>

#include "amx.hpp"
#include "product.hpp"

namespace kernels {

using amx::kTileElements;

namespace {

// ``num_out`` columns and ``num_in`` elements of the sum; where either is short, memory that holds
// zeros already may keep them: ranks below 32 cost as little as they have.
void pack_tile(const bf16* w, std::ptrdiff_t out_stride, std::ptrdiff_t in_stride, int num_out,
               int num_in, bf16* tile) {
  if (in_stride == 1 && num_in == amx::kTileSum) {
    if (num_out == 16) return amx::transpose_pairs(w, out_stride, tile);
    alignas(64) bf16 rows[16][amx::kTileSum] = {};
    for (int n = 0; n < num_out; ++n) std::memcpy(rows[n], w + n * out_stride, sizeof rows[n]);
    return amx::transpose_pairs(&rows[0][0], amx::kTileSum, tile);
  }
  if (in_stride == 1) {
    for (int k = 0; k < num_in; ++k) {
      for (int n = 0; n < num_out; ++n) tile[k / 2 * 32 + n * 2 + k % 2] = w[n * out_stride + k];
    }
    return;
  }
  // out_stride is 1: rows of the operand lie as they are, two are interleaved.
  const __mmask16 lanes = first_lanes(num_out);
  for (int pair = 0; 2 * pair < num_in; ++pair) {
    const bf16* even = w + 2 * pair * in_stride;
    const __m256i a = _mm256_maskz_loadu_epi16(lanes, even);
    const __m256i b = _mm256_maskz_loadu_epi16(2 * pair + 1 < num_in ? lanes : 0, even + in_stride);
    _mm512_storeu_si512(tile + pair * 32,
                        _mm512_or_si512(_mm512_cvtepu16_epi32(a),
                                        _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16)));
  }
}

}  // namespace

std::size_t packed_elements(int out, int in) {
  return std::size_t(divide_up(out, 16)) * divide_up(in, amx::kTileSum) * kTileElements;
}

void pack(const bf16* w, std::ptrdiff_t out_stride, std::ptrdiff_t in_stride, int out, int in,
          bf16* packed) {
  const int in_tiles = divide_up(in, amx::kTileSum);
  for (int n = 0; n < out; n += 16) {
    for (int k = 0; k < in_tiles * amx::kTileSum; k += amx::kTileSum) {
      pack_tile(w + n * out_stride + k * in_stride, out_stride, in_stride, std::min(16, out - n),
                std::min(amx::kTileSum, in - k), packed);
      packed += kTileElements;
    }
  }
}

namespace {

// Half of a tile: S[p][o] = (W[o][2p], W[o][2p + 1]) for 8 pairs of inputs and 16 outputs becomes
// T[q][2p + e] = (W[2q][2p + e], W[2q + 1][2p + e]): pairs swap inside 64 bits, then 8 x 8 words of
// 64 bits are transposed.
inline void transpose_half(const bf16* from, bf16* to) {
  const __m512i swap = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  __m512i r[8], t[8];
  for (int p = 0; p < 8; ++p) {
    r[p] = _mm512_shuffle_epi8(_mm512_loadu_si512(from + p * 32), swap);
  }
  for (int p = 0; p < 8; p += 2) {
    t[p] = _mm512_unpacklo_epi64(r[p], r[p + 1]);
    t[p + 1] = _mm512_unpackhi_epi64(r[p], r[p + 1]);
  }
  for (int i = 0; i < 2; ++i) {  // even words, then odd ones
    const __m512i a = _mm512_shuffle_i64x2(t[i], t[i + 2], 0x88);
    const __m512i b = _mm512_shuffle_i64x2(t[i + 4], t[i + 6], 0x88);
    const __m512i c = _mm512_shuffle_i64x2(t[i], t[i + 2], 0xdd);
    const __m512i d = _mm512_shuffle_i64x2(t[i + 4], t[i + 6], 0xdd);
    _mm512_storeu_si512(to + (0 + i) * 32, _mm512_shuffle_i64x2(a, b, 0x88));
    _mm512_storeu_si512(to + (4 + i) * 32, _mm512_shuffle_i64x2(a, b, 0xdd));
    _mm512_storeu_si512(to + (2 + i) * 32, _mm512_shuffle_i64x2(c, d, 0x88));
    _mm512_storeu_si512(to + (6 + i) * 32, _mm512_shuffle_i64x2(c, d, 0xdd));
  }
}

}  // namespace

void transpose_packed(Packed w, int out, int in, int begin, int end, bf16* transposed) {
  const int in_tiles = in / amx::kTileSum, out_tiles = divide_up(out, 16);
  const int steps = divide_up(out, amx::kTileSum);
  for (int n = begin; n < end; n += 16) {
    const bf16* from = w + std::ptrdiff_t(n / amx::kTileSum) * kTileElements +
                       n % amx::kTileSum / 16 * (kTileElements / 2);
    bf16* to = transposed + std::ptrdiff_t(n / 16) * steps * kTileElements;
    for (int tile = 0; tile < out_tiles; ++tile) {
      transpose_half(from + std::ptrdiff_t(tile) * in_tiles * kTileElements,
                     to + std::ptrdiff_t(tile) * (kTileElements / 2));
    }
    if (out_tiles % 2) {
      std::memset(to + std::ptrdiff_t(out_tiles) * (kTileElements / 2), 0, kTileElements);
    }
  }
}

void unpack_row(Packed w, int in, int index, bf16* row) {
  const int in_tiles = in / amx::kTileSum;
  const bf16* tile = w + std::ptrdiff_t(index / 16) * in_tiles * kTileElements + index % 16 * 2;
  for (int t = 0; t < in_tiles; ++t, tile += kTileElements, row += amx::kTileSum) {
    for (int pair = 0; pair < 16; ++pair) std::memcpy(row + 2 * pair, tile + pair * 32, 4);
  }
}

}  // namespace kernels
