#include "product.hpp"

#include <algorithm>
#include <vector>

#include "tiles.hpp"
#include "threads.hpp"

namespace kernels {
namespace {

using tiles::kTileElements;

// Columns whose weights stay in a core's second cache while rows pass over them.
constexpr int kBlockElements = 400 * 1024;
constexpr int kItemRows = 128;
// Tiles of a sum taken at once: 32 rows of x are then at most 36 KiB.
constexpr int kMaxSteps = 18;
constexpr int kItemsPerThread = 6;

inline int part_of(const LowRank& term, int column) {
  int part = 0;
  while (column >= term.part_end[part]) ++part;
  return part;
}

// The terms of one row tile, added to its accumulators in each column of tiles.
template <int kRowTile, int kRowTiles, int kColumnTiles>
inline void add_low_ranks(tiles::Accumulators<kRowTiles, kColumnTiles>& sums, const Product& p,
                          int row_tile, int column) {
  for (int i = p.first_low_rank[row_tile]; i < p.first_low_rank[row_tile + 1]; ++i) {
    const LowRank& term = p.low_ranks[i];
    const int steps = term.rank / tiles::kTileSum;
    const std::ptrdiff_t z_bytes = std::ptrdiff_t(term.num_parts) * term.rank * 2;
    const Packed b = term.b + std::ptrdiff_t(column / 16) * steps * kTileElements;
    // The parts of two neighbouring tiles of columns differ where one ends between them.
    sums.template add_tile<kRowTile, 0>(steps, term.z + part_of(term, column) * term.rank, z_bytes,
                                        b);
    if constexpr (kColumnTiles == 2) {
      sums.template add_tile<kRowTile, 1>(steps, term.z + part_of(term, column + 16) * term.rank,
                                          z_bytes, b + steps * kTileElements);
    }
  }
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
    _mm512_storeu_si512(static_cast<bf16*>(p.y) + place, narrow(low, high));
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

// Part of a sum: tiles [begin, end) of p.in. The first one starts from zero; the last one adds what
// the adapters do and writes y. Between them ``results`` keeps the accumulators.
struct Steps {
  int begin, end;
};

template <Output kOutput, int kRowTiles, int kColumnTiles>
inline void block(const Product& p, int row, int column, Steps steps, tiles::Results& results) {
  const int num_steps = p.in / tiles::kTileSum;
  const std::ptrdiff_t next = std::ptrdiff_t(num_steps) * kTileElements;
  const Packed w = p.w + column / 16 * next + std::ptrdiff_t(steps.begin) * kTileElements;
  const bf16* x = p.x + row * p.ldx + steps.begin * tiles::kTileSum;
  tiles::Accumulators<kRowTiles, kColumnTiles> sums(results.tile[0][0], p.rows - row);
  if (steps.begin == 0) {
    sums.zero();
  } else {
    sums.load();
  }
  sums.add(steps.end - steps.begin, p.ldx * 2, [&](int step) {
    const bf16* left = x + step * tiles::kTileSum;
    const Packed right = w + std::ptrdiff_t(step) * kTileElements;
    return tiles::Operands{{left, left + 16 * p.ldx}, {right, right + next}};
  });
  const bool is_last = steps.end == num_steps;
  if (is_last && p.first_low_rank != nullptr) {
    add_low_ranks<0>(sums, p, row / 16, column);
    if constexpr (kRowTiles == 2) add_low_ranks<1>(sums, p, row / 16 + 1, column);
  }
  sums.store();
  if (!is_last) return;
  finish_rows<kOutput, kColumnTiles>(p, results.tile[0], results.tile[1], row, column);
  if constexpr (kRowTiles == 2) {
    finish_rows<kOutput, kColumnTiles>(p, results.tile[2], results.tile[3], row + 16, column);
  }
}

template <Output kOutput, int kRowTiles>
inline void row_of_blocks(const Product& p, int row, int begin, int end, Steps steps,
                          tiles::Results* results, int stride) {
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
  thread_local std::vector<tiles::Results> kept;
  tiles::Results once;
  const int num_steps = p.in / tiles::kTileSum, row_blocks = divide_up(column_end - column_begin, 32);
  const int num_cuts = divide_up(num_steps, kMaxSteps);
  const int stride = num_cuts > 1 ? 1 : 0;
  if (stride && kept.size() < std::size_t(row_blocks) * (kItemRows / 32)) {
    kept.resize(std::size_t(row_blocks) * (kItemRows / 32));
  }
  for (int cut = 0; cut < num_cuts; ++cut) {
    const Steps steps{num_steps * cut / num_cuts, num_steps * (cut + 1) / num_cuts};
    tiles::Results* results = stride ? kept.data() : &once;
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

}  // namespace

void multiply(const Product& product) {
  switch (product.output) {
    case Output::kBf16: return multiply_as<Output::kBf16>(product);
    case Output::kAddBf16: return multiply_as<Output::kAddBf16>(product);
    case Output::kFloat: return multiply_as<Output::kFloat>(product);
  }
}

namespace {

template <int kColumnTiles>
void reduce_columns(const bf16* x, std::ptrdiff_t ldx, int steps, Packed a, int num_rows,
                    tiles::Results& results) {
  tiles::Accumulators<1, kColumnTiles> sums(results.tile[0][0], num_rows);
  sums.zero();
  sums.add(steps, ldx * 2, [&](int step) {
    const Packed right = a + std::ptrdiff_t(step) * kTileElements;
    return tiles::Operands{{x + step * tiles::kTileSum, nullptr},
                           {right, right + std::ptrdiff_t(steps) * kTileElements}};
  });
  sums.store();
}

}  // namespace

void reduce_tile(const bf16* x, std::ptrdiff_t ldx, int in, Packed a, int rank, float scale,
                 int begin, int end, bf16* z, std::ptrdiff_t ldz) {
  const int steps = in / tiles::kTileSum;
  tiles::Results results;
  for (int column = 0; column < rank; column += 32) {
    const Packed left = a + std::ptrdiff_t(column / 16) * steps * kTileElements;
    const bool two = column + 16 < rank;
    if (two) {
      reduce_columns<2>(x, ldx, steps, left, end, results);
    } else {
      reduce_columns<1>(x, ldx, steps, left, end, results);
    }
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
  kernels::tiles::release();
}
}
