#include <algorithm>
#include <vector>

#include "product.hpp"
#include "tiles.hpp"

namespace kernels {

using tiles::kTileElements;

namespace {

// Tiles [rows / 32][2][512] of a right operand whose sum runs over rows, for 32 columns.
void interleave(const OuterProduct& p, int column, bf16* tiles) {
  const __mmask32 lanes = p.num_right - column >= 32
                              ? ~__mmask32(0)
                              : __mmask32((1ull << (p.num_right - column)) - 1);
  for (int t = 0; t < p.rows; t += 2) {
    const bf16* even = p.right + t * p.ldright + column;
    bf16* to = tiles + std::ptrdiff_t(t / 32) * 2 * kTileElements + t % 32 / 2 * 32;
    tiles::interleave_rows(_mm512_maskz_loadu_epi16(lanes, even),
                         _mm512_maskz_loadu_epi16(lanes, even + p.ldright), to, to + kTileElements);
  }
}

// A whole line that nothing reads soon goes past the caches: memory need not be read first.
inline void put(const OuterProduct& p, float* to, f32x16 value, __mmask16 lanes) {
  if (p.accumulate) value = _mm512_add_ps(value, load(to, lanes));
  if (!p.accumulate && lanes == 0xffff && reinterpret_cast<std::uintptr_t>(to) % 64 == 0) {
    _mm512_stream_ps(to, value);
  } else {
    store(to, value, lanes);
  }
}

void write_outer(const OuterProduct& p, const float (*tile)[16], float* out, int r0, int n0) {
  const int num_r = std::min(16, p.num_left - r0), num_n = std::min(16, p.num_right - n0);
  if (num_r <= 0 || num_n <= 0) return;
  if (!p.transposed) {
    const __mmask16 lanes = first_lanes(num_n);
    for (int r = 0; r < num_r; ++r) {
      float* to = out + (r0 + r) * p.ldout + n0;
      put(p, to, _mm512_load_ps(tile[r]), lanes);
    }
    return;
  }
  const __m512i steps = _mm512_mullo_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(16));
  const __mmask16 lanes = first_lanes(num_r);
  for (int n = 0; n < num_n; ++n) {
    float* to = out + (n0 + n) * p.ldout + r0;
    put(p, to, _mm512_i32gather_ps(steps, &tile[0][n], 4), lanes);
  }
}

// One row tile of ``left`` times two columns of tiles.
inline void multiply_rows(const bf16* left, int rows, const bf16* right, tiles::Results& results) {
  tiles::Accumulators<1, 2> sums(results.tile[0][0], 16);
  sums.zero();
  sums.add(rows / tiles::kTileSum, std::ptrdiff_t(rows) * 2, [&](int step) {
    const bf16* at = right + std::ptrdiff_t(step) * 2 * kTileElements;
    return tiles::Operands{{left + step * tiles::kTileSum, nullptr}, {at, at + kTileElements}};
  });
  sums.store();
}

}  // namespace

void add_outer_product(const OuterProduct& p) {
  thread_local std::vector<bf16> right;
  const int steps = p.rows / tiles::kTileSum;
  right.resize(std::max(right.size(), std::size_t(steps) * 2 * kTileElements));
  tiles::Results results;
  for (int column = 0; column < p.num_right; column += 32) {
    interleave(p, column, right.data());
    for (int part = 0; part < p.num_parts; ++part) {
      const bf16* left = p.left_t + std::ptrdiff_t(part) * p.left_stride * p.rows;
      float* out = p.out + part * p.out_stride;
      for (int r = 0; r < p.num_left; r += 16) {
        multiply_rows(left + std::ptrdiff_t(r) * p.rows, p.rows, right.data(), results);
        write_outer(p, results.tile[0], out, r, column);
        write_outer(p, results.tile[1], out, r, column + 16);
      }
    }
  }
  _mm_sfence();  // streamed lines are seen no later than what the thread does next
}

void transpose(const bf16* from, std::ptrdiff_t ldfrom, int rows, int columns, bf16* to,
               std::ptrdiff_t ldto) {
  for (int r = 0; r < rows; r += 16) {
    for (int c = 0; c < columns; c += 16) {
      alignas(64) bf16 block[16][16];
      for (int i = 0; i < 16; ++i) {
        const bf16* row = from + (r + i) * ldfrom + c;
        for (int j = 0; j < 16; ++j) block[j][i] = row[j];
      }
      for (int j = 0; j < 16; ++j) std::memcpy(to + (c + j) * ldto + r, block[j], 32);
    }
  }
}

}  // namespace kernels
