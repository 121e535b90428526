#include <algorithm>

#include "tiles.hpp"
#include "product.hpp"

namespace kernels {

using tiles::kTileElements;

namespace {

// Whole tiles go past the caches: nothing reads them soon, and memory need not be read before it is
// written. For a few lines here and there that is slower.
template <bool kWhole>
inline void put(bf16* line, __m512i value) {
  if constexpr (kWhole) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(line), value);
  } else {
    _mm512_storeu_si512(line, value);
  }
}

// ``num_out`` columns and ``num_in`` elements of the sum. Lines of elements beyond ``num_in`` keep
// what they hold, zeros: ranks below 32 cost as little as they have.
template <bool kWhole>
void pack_tile(const bf16* w, std::ptrdiff_t out_stride, std::ptrdiff_t in_stride, int num_out,
               int num_in, bf16* tile) {
  const int num_lines = kWhole ? 16 : divide_up(num_in, 2);
  if (in_stride == 1) {
    const __mmask32 lanes = ~__mmask32(0) >> (tiles::kTileSum - num_in);
    __m512i rows[16] = {};
    for (int n = 0; n < num_out; ++n) rows[n] = _mm512_maskz_loadu_epi16(lanes, w + n * out_stride);
    tiles::transpose_pairs(rows);
    for (int line = 0; line < num_lines; ++line) put<kWhole>(tile + line * 32, rows[line]);
    return;
  }
  // out_stride is 1: rows of the operand lie as they are, two are interleaved.
  const __mmask16 lanes = first_lanes(num_out);
  for (int line = 0; line < num_lines; ++line) {
    const bf16* even = w + 2 * line * in_stride;
    const __m256i a = _mm256_maskz_loadu_epi16(lanes, even);
    const __m256i b = _mm256_maskz_loadu_epi16(2 * line + 1 < num_in ? lanes : 0, even + in_stride);
    put<kWhole>(tile + line * 32,
                _mm512_or_si512(_mm512_cvtepu16_epi32(a),
                                _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16)));
  }
}

}  // namespace

std::size_t packed_elements(int out, int in) {
  return std::size_t(divide_up(out, 16)) * divide_up(in, tiles::kTileSum) * kTileElements;
}

void pack(const bf16* w, std::ptrdiff_t out_stride, std::ptrdiff_t in_stride, int out, int in,
          bf16* packed) {
  const int in_tiles = divide_up(in, tiles::kTileSum);
  for (int n = 0; n < out; n += 16) {
    for (int k = 0; k < in_tiles * tiles::kTileSum; k += tiles::kTileSum) {
      const int num_out = std::min(16, out - n), num_in = std::min(tiles::kTileSum, in - k);
      const bf16* from = w + n * out_stride + k * in_stride;
      if (num_in > 30) {
        pack_tile<true>(from, out_stride, in_stride, num_out, num_in, packed);
      } else {
        pack_tile<false>(from, out_stride, in_stride, num_out, num_in, packed);
      }
      packed += kTileElements;
    }
  }
  _mm_sfence();  // streamed lines are seen no later than what the thread does next
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

void transpose_packed(const PackedMatrix& from, Range in, Range out, bf16* transposed) {
  const int in_tiles = from.in / tiles::kTileSum, out_tiles = divide_up(from.out, 16);
  const int steps = divide_up(from.out, tiles::kTileSum);
  const int tile_end = std::min(divide_up(out.end, 16), out_tiles);
  for (int n = in.begin; n < in.end; n += 16) {
    const bf16* source = from.w + std::ptrdiff_t(n / tiles::kTileSum) * kTileElements +
                         n % tiles::kTileSum / 16 * (kTileElements / 2);
    bf16* to = transposed + std::ptrdiff_t(n / 16) * steps * kTileElements;
    for (int tile = out.begin / 16; tile < tile_end; ++tile) {
      transpose_half(source + std::ptrdiff_t(tile) * in_tiles * kTileElements,
                     to + std::ptrdiff_t(tile) * (kTileElements / 2));
    }
    if (tile_end == out_tiles && out_tiles % 2) {
      std::memset(to + std::ptrdiff_t(out_tiles) * (kTileElements / 2), 0, kTileElements);
    }
  }
}

void unpack_row(Packed w, int in, int index, bf16* row) {
  const int in_tiles = in / tiles::kTileSum;
  const bf16* tile = w + std::ptrdiff_t(index / 16) * in_tiles * kTileElements + index % 16 * 2;
  for (int t = 0; t < in_tiles; ++t, tile += kTileElements, row += tiles::kTileSum) {
    for (int pair = 0; pair < 16; ++pair) std::memcpy(row + 2 * pair, tile + pair * 32, 4);
  }
}

}  // namespace kernels
