#include "product.hpp"

#include <algorithm>
#include <vector>

#include "amx.hpp"
#include "threads.hpp"

namespace kernels {
namespace {

using amx::kTileElements;

// Columns whose weights stay in a core's second cache while rows pass over them.
constexpr int kBlockElements = 400 * 1024;
constexpr int kItemRows = 128;
// Tiles of a sum taken at once: 32 rows of x are then at most 36 KiB.
constexpr int kMaxSteps = 18;
constexpr int kItemsPerThread = 6;

// Tile numbers must be literals: 0..3 accumulate, 4 and 5 hold rows of x, 6 and 7 columns of w.
template <int kRowTiles, int kColumnTiles>
inline void zero_accumulators() {
  _tile_zero(0);
  if constexpr (kColumnTiles == 2) _tile_zero(1);
  if constexpr (kRowTiles == 2) _tile_zero(2);
  if constexpr (kRowTiles == 2 && kColumnTiles == 2) _tile_zero(3);
}

// Adds x [16 or 32 rows, 32 * steps] times one or two columns of tiles.
template <int kRowTiles, int kColumnTiles>
inline void accumulate(const bf16* x0, const bf16* x1, std::ptrdiff_t x_bytes, Packed w0, Packed w1,
                       int steps) {
  amx::fence();
  for (int k = 0; k < steps; ++k) {
    _tile_loadd(6, w0 + std::ptrdiff_t(k) * kTileElements, 64);
    _tile_loadd(4, x0 + k * amx::kTileSum, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kRowTiles == 2) {
      _tile_loadd(5, x1 + k * amx::kTileSum, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kColumnTiles == 2) {
      _tile_loadd(7, w1 + std::ptrdiff_t(k) * kTileElements, 64);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kRowTiles == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
}

inline int part_of(const LowRank& term, int column) {
  int part = 0;
  while (column >= term.part_end[part]) ++part;
  return part;
}

// The terms of one row tile, added to accumulators kRowTile (0 or 1) of each column of tiles.
template <int kRowTile, int kColumnTiles>
inline void accumulate_low_ranks(const Product& p, int row_tile, int column) {
  for (int i = p.first_low_rank[row_tile]; i < p.first_low_rank[row_tile + 1]; ++i) {
    const LowRank& term = p.low_ranks[i];
    const int steps = term.rank / amx::kTileSum;
    const std::ptrdiff_t z_bytes = std::ptrdiff_t(term.num_parts) * term.rank * 2;
    const Packed b = term.b + std::ptrdiff_t(column / 16) * steps * kTileElements;
    // The parts of two neighbouring tiles of columns differ where one ends between them.
    const bf16* z0 = term.z + part_of(term, column) * term.rank;
    for (int k = 0; k < steps; ++k) {
      _tile_loadd(4, z0 + k * amx::kTileSum, z_bytes);
      _tile_loadd(6, b + k * kTileElements, 64);
      if constexpr (kRowTile == 0) _tile_dpbf16ps(0, 4, 6);
      if constexpr (kRowTile == 1) _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (kColumnTiles == 2) {
      const bf16* z1 = term.z + part_of(term, column + 16) * term.rank;
      for (int k = 0; k < steps; ++k) {
        _tile_loadd(4, z1 + k * amx::kTileSum, z_bytes);
        _tile_loadd(7, b + (steps + k) * kTileElements, 64);
        if constexpr (kRowTile == 0) _tile_dpbf16ps(1, 4, 7);
        if constexpr (kRowTile == 1) _tile_dpbf16ps(3, 4, 7);
      }
    }
  }
}

struct alignas(64) Results {
  float tile[4][16][16];  // numbered as the accumulators
};

template <int kRowTiles, int kColumnTiles>
inline void store_accumulators(Results& results) {
  _tile_stored(0, results.tile[0], 64);
  if constexpr (kColumnTiles == 2) _tile_stored(1, results.tile[1], 64);
  if constexpr (kRowTiles == 2) _tile_stored(2, results.tile[2], 64);
  if constexpr (kRowTiles == 2 && kColumnTiles == 2) _tile_stored(3, results.tile[3], 64);
}

// One row of 16 results with bias and addend, to y.
template <Output kOutput>
inline void finish(const Product& p, f32x16 value, int row, int column, __mmask16 lanes) {
  if (p.bias != nullptr) value = _mm512_add_ps(value, load(p.bias + column, lanes));
  const std::ptrdiff_t place = row * p.ldy + column;
  if constexpr (kOutput == Output::kAddBf16) {
    value = _mm512_add_ps(value, load(p.addend + place, lanes));
  }
  if constexpr (kOutput == Output::kFloat) {
    store(static_cast<float*>(p.y) + place, value, lanes);
  } else {
    store(static_cast<bf16*>(p.y) + place, value, lanes);
  }
}

// 16 whole rows of 32 columns without bias, as nearly all are.
template <Output kOutput>
inline void finish_whole(const Product& p, const float (*left)[16], const float (*right)[16],
                         std::ptrdiff_t place) {
  for (int i = 0; i < 16; ++i, place += p.ldy) {
    f32x16 low = _mm512_load_ps(left[i]), high = _mm512_load_ps(right[i]);
    if constexpr (kOutput == Output::kFloat) {
      float* to = static_cast<float*>(p.y) + place;
      store(to, low);
      store(to + 16, high);
      continue;
    }
    if constexpr (kOutput == Output::kAddBf16) {
      low = _mm512_add_ps(low, load(p.addend + place));
      high = _mm512_add_ps(high, load(p.addend + place + 16));
    }
    _mm512_storeu_si512(static_cast<bf16*>(p.y) + place, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

template <Output kOutput, int kColumnTiles>
inline void finish_rows(const Product& p, const float (*left)[16], const float (*right)[16], int row,
                        int column) {
  const int num_rows = std::min(16, p.rows - row);
  if constexpr (kColumnTiles == 2) {
    if (num_rows == 16 && column + 32 <= p.out && p.bias == nullptr) {
      return finish_whole<kOutput>(p, left, right, row * p.ldy + column);
    }
  }
  const __mmask16 left_lanes = first_lanes(p.out - column);
  const __mmask16 right_lanes = kColumnTiles == 2 ? first_lanes(p.out - column - 16) : 0;
  for (int i = 0; i < num_rows; ++i) {
    finish<kOutput>(p, _mm512_load_ps(left[i]), row + i, column, left_lanes);
    if constexpr (kColumnTiles == 2) {
      finish<kOutput>(p, _mm512_load_ps(right[i]), row + i, column + 16, right_lanes);
    }
  }
}

template <int kRowTiles, int kColumnTiles>
inline void load_accumulators(const Results& results) {
  amx::fence();
  _tile_loadd(0, results.tile[0], 64);
  if constexpr (kColumnTiles == 2) _tile_loadd(1, results.tile[1], 64);
  if constexpr (kRowTiles == 2) _tile_loadd(2, results.tile[2], 64);
  if constexpr (kRowTiles == 2 && kColumnTiles == 2) _tile_loadd(3, results.tile[3], 64);
}

// Part of a sum: tiles [begin, end) of p.in. The first one starts from zero; the last one adds what
// the adapters do and writes y. Between them ``results`` keeps the accumulators.
struct Steps {
  int begin, end;
};

template <Output kOutput, int kRowTiles, int kColumnTiles>
inline void block(const Product& p, int row, int column, Steps steps, Results& results) {
  const int num_steps = p.in / amx::kTileSum;
  const Packed w =
      p.w + (std::ptrdiff_t(column / 16) * num_steps + steps.begin) * kTileElements;
  const bf16* x = p.x + row * p.ldx + steps.begin * amx::kTileSum;
  if (steps.begin == 0) {
    zero_accumulators<kRowTiles, kColumnTiles>();
  } else {
    load_accumulators<kRowTiles, kColumnTiles>(results);
  }
  accumulate<kRowTiles, kColumnTiles>(x, x + 16 * p.ldx, p.ldx * 2, w,
                                      w + std::ptrdiff_t(num_steps) * kTileElements,
                                      steps.end - steps.begin);
  const bool is_last = steps.end == num_steps;
  if (is_last && p.first_low_rank != nullptr) {
    accumulate_low_ranks<0, kColumnTiles>(p, row / 16, column);
    if constexpr (kRowTiles == 2) accumulate_low_ranks<1, kColumnTiles>(p, row / 16 + 1, column);
  }
  store_accumulators<kRowTiles, kColumnTiles>(results);
  if (!is_last) return;
  finish_rows<kOutput, kColumnTiles>(p, results.tile[0], results.tile[1], row, column);
  if constexpr (kRowTiles == 2) {
    finish_rows<kOutput, kColumnTiles>(p, results.tile[2], results.tile[3], row + 16, column);
  }
}

template <Output kOutput, int kRowTiles>
inline void row_of_blocks(const Product& p, int row, int begin, int end, Steps steps,
                          Results* results, int stride) {
  int column = begin;
  for (; column + 16 < end; column += 32, results += stride) {
    block<kOutput, kRowTiles, 2>(p, row, column, steps, *results);
  }
  if (column < end) block<kOutput, kRowTiles, 1>(p, row, column, steps, *results);
}

// Rows outside, columns inside: 32 rows of x stay in the first cache, the weights stream by from
// the second one. A sum too long for that is cut; its order stays the same.
template <Output kOutput>
void region(const Product& p, int row_begin, int row_end, int column_begin, int column_end) {
  thread_local std::vector<Results> kept;
  Results once;
  const int num_steps = p.in / amx::kTileSum, row_blocks = divide_up(column_end - column_begin, 32);
  const int num_cuts = divide_up(num_steps, kMaxSteps);
  const int stride = num_cuts > 1 ? 1 : 0;
  if (stride && kept.size() < std::size_t(row_blocks) * (kItemRows / 32)) {
    kept.resize(std::size_t(row_blocks) * (kItemRows / 32));
  }
  for (int cut = 0; cut < num_cuts; ++cut) {
    const Steps steps{num_steps * cut / num_cuts, num_steps * (cut + 1) / num_cuts};
    Results* results = stride ? kept.data() : &once;
    int row = row_begin;
    for (; row + 16 < row_end; row += 32, results += stride * row_blocks) {
      row_of_blocks<kOutput, 2>(p, row, column_begin, column_end, steps, results, stride);
    }
    if (row < row_end) {
      row_of_blocks<kOutput, 1>(p, row, column_begin, column_end, steps, results, stride);
    }
  }
}

template <Output kOutput>
void multiply_as(const Product& p) {
  const int row_items = divide_up(p.rows, kItemRows);
  int columns = std::max(32, kBlockElements / std::min(p.in, kMaxSteps * 32) / 32 * 32);
  const int wanted = divide_up(num_threads() * kItemsPerThread, row_items);
  columns = std::min(columns, round_up(divide_up(p.out, wanted), 32));
  const int column_items = divide_up(p.out, columns);
  parallel_for(row_items * column_items, [&](int item, int) {
    const int row = item % row_items * kItemRows, column = item / row_items * columns;
    region<kOutput>(p, row, std::min(row + kItemRows, p.rows), column,
                    std::min(column + columns, p.out));
  });
}

// Edge tiles are filled up with zeros here first.
void pack_tile(const bf16* w, std::ptrdiff_t out_stride, std::ptrdiff_t in_stride, int num_out,
               int num_in, bf16* tile) {
  if (in_stride == 1) {
    if (num_out == 16 && num_in == amx::kTileSum) return amx::transpose_pairs(w, out_stride, tile);
    alignas(64) bf16 rows[16][amx::kTileSum] = {};
    for (int n = 0; n < num_out; ++n) std::memcpy(rows[n], w + n * out_stride, num_in * sizeof(bf16));
    return amx::transpose_pairs(&rows[0][0], amx::kTileSum, tile);
  }
  // out_stride is 1: rows of the operand lie as they are, two are interleaved.
  const __mmask16 lanes = first_lanes(num_out);
  for (int pair = 0; pair < 16; ++pair) {
    const bf16* even = w + 2 * pair * in_stride;
    const __m256i a = _mm256_maskz_loadu_epi16(2 * pair < num_in ? lanes : 0, even);
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

void multiply(const Product& product) {
  switch (product.output) {
    case Output::kBf16: return multiply_as<Output::kBf16>(product);
    case Output::kAddBf16: return multiply_as<Output::kAddBf16>(product);
    case Output::kFloat: return multiply_as<Output::kFloat>(product);
  }
}

void reduce_tile(const bf16* x, std::ptrdiff_t ldx, int in, Packed a, int rank, float scale,
                 int begin, int end, bf16* z, std::ptrdiff_t ldz) {
  const int steps = in / amx::kTileSum;
  Results results;
  for (int column = 0; column < rank; column += 32) {
    const Packed left = a + std::ptrdiff_t(column / 16) * steps * kTileElements;
    const bool two = column + 16 < rank;
    zero_accumulators<1, 2>();
    if (two) {
      accumulate<1, 2>(x, nullptr, ldx * 2, left, left + std::ptrdiff_t(steps) * kTileElements,
                       steps);
    } else {
      accumulate<1, 1>(x, nullptr, ldx * 2, left, nullptr, steps);
    }
    store_accumulators<1, 2>(results);
    for (int row = 0; row < 16; ++row) {
      const f32x16 factor = splat(scale);
      const bool own = row >= begin && row < end;
      bf16* to = z + row * ldz + column;
      for (int half = 0; half < (two ? 2 : 1); ++half) {
        const f32x16 value = _mm512_mul_ps(_mm512_load_ps(results.tile[half][row]), factor);
        store(to + half * 16, own ? value : _mm512_setzero_ps());
      }
    }
  }
}

namespace {

// Tiles [rows / 32][2][512] of a right operand whose sum runs over rows, for 32 columns.
void interleave(const OuterProduct& p, int column, bf16* tiles) {
  const __mmask32 lanes = p.num_right - column >= 32
                              ? ~__mmask32(0)
                              : __mmask32((1ull << (p.num_right - column)) - 1);
  for (int t = 0; t < p.rows; t += 2) {
    const bf16* even = p.right + t * p.ldright + column;
    bf16* to = tiles + std::ptrdiff_t(t / 32) * 2 * kTileElements + t % 32 / 2 * 32;
    amx::interleave_rows(_mm512_maskz_loadu_epi16(lanes, even),
                         _mm512_maskz_loadu_epi16(lanes, even + p.ldright), to, to + kTileElements);
  }
}

void write_outer(const OuterProduct& p, const float (*tile)[16], float* out, int r0, int n0) {
  const int num_r = std::min(16, p.num_left - r0), num_n = std::min(16, p.num_right - n0);
  if (num_r <= 0 || num_n <= 0) return;
  if (!p.transposed) {
    const __mmask16 lanes = first_lanes(num_n);
    for (int r = 0; r < num_r; ++r) {
      float* to = out + (r0 + r) * p.ldout + n0;
      f32x16 value = _mm512_load_ps(tile[r]);
      if (p.accumulate) value = _mm512_add_ps(value, load(to, lanes));
      store(to, value, lanes);
    }
    return;
  }
  const __m512i steps = _mm512_mullo_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(16));
  const __mmask16 lanes = first_lanes(num_r);
  for (int n = 0; n < num_n; ++n) {
    float* to = out + (n0 + n) * p.ldout + r0;
    f32x16 value = _mm512_i32gather_ps(steps, &tile[0][n], 4);
    if (p.accumulate) value = _mm512_add_ps(value, load(to, lanes));
    store(to, value, lanes);
  }
}

inline void accumulate_outer(const bf16* left, int rows, const bf16* tiles) {
  for (int t = 0; t < rows; t += amx::kTileSum, tiles += 2 * kTileElements) {
    _tile_loadd(4, left + t, std::ptrdiff_t(rows) * 2);
    _tile_loadd(6, tiles, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, tiles + kTileElements, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
}

}  // namespace

void add_outer_product(const OuterProduct& p) {
  thread_local std::vector<bf16> tiles;
  const int steps = p.rows / amx::kTileSum;
  tiles.resize(std::max(tiles.size(), std::size_t(steps) * 2 * kTileElements));
  Results results;
  for (int column = 0; column < p.num_right; column += 32) {
    interleave(p, column, tiles.data());
    amx::fence();
    for (int part = 0; part < p.num_parts; ++part) {
      const bf16* left = p.left_t + std::ptrdiff_t(part) * p.left_stride * p.rows;
      float* out = p.out + part * p.out_stride;
      for (int r = 0; r < p.num_left; r += 16) {
        zero_accumulators<1, 2>();
        accumulate_outer(left + std::ptrdiff_t(r) * p.rows, p.rows, tiles.data());
        store_accumulators<1, 2>(results);
        write_outer(p, results.tile[0], out, r, column);
        write_outer(p, results.tile[1], out, r, column + 16);
      }
    }
  }
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

extern "C" {

// y [rows, out] = x [rows, in] of a packed W, in bf16; for tests and measurements.
void tc_multiply(const kernels::bf16* x, int rows, int in, int out, const kernels::bf16* w,
                 kernels::bf16* y) {
  kernels::multiply({.x = x,
                     .ldx = in,
                     .rows = rows,
                     .in = in,
                     .out = out,
                     .w = w,
                     .bias = nullptr,
                     .first_low_rank = nullptr,
                     .low_ranks = nullptr,
                     .output = kernels::Output::kBf16,
                     .y = y,
                     .ldy = out,
                     .addend = nullptr});
  kernels::amx::release();
}
}
