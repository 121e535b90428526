// Accumulators in vector registers: 8 rows of 32 columns at a time, which keeps both of a core's
// multipliers busy (16 independent sums) and reads 10 values from the first cache for 16 products.
// Included by tiles.hpp alone.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "tiles_base.hpp"

namespace kernels::tiles {

inline void configure() {}
inline void release() {}
inline void fence() {}

template <int kRowTiles, int kColumnTiles>
class Accumulators {
 public:
  Accumulators(float* results, int num_rows)
      : results_(results), num_rows_(std::min(num_rows, kRowTiles * kTileRows)) {}

  void zero() { begins_ = true; }
  void load() { begins_ = false; }
  void store() {}  // every addition leaves its sums in memory

  template <typename F>
  void add(int num_steps, std::ptrdiff_t left_bytes, const F& operands) {
    for (int tile = 0; tile < kRowTiles; ++tile) {
      const auto at = [&](int step) {
        const Operands all = operands(step);
        return Operands{{all.left[tile], nullptr}, {all.right[0], all.right[1]}};
      };
      add_rows<kColumnTiles>(results_ + 2 * tile * kTileFloats, num_rows_ - tile * kTileRows,
                             num_steps, left_bytes, at);
    }
    begins_ = false;
  }

  template <int kRowTile, int kColumnTile>
  void add_tile(int num_steps, const bf16* left, std::ptrdiff_t left_bytes, const bf16* right) {
    const auto at = [&](int step) {
      return Operands{{left + step * kTileSum, nullptr},
                      {right + std::ptrdiff_t(step) * kTileElements, nullptr}};
    };
    add_rows<1>(results_ + (2 * kRowTile + kColumnTile) * kTileFloats,
                num_rows_ - kRowTile * kTileRows, num_steps, left_bytes, at);
  }

 private:
  // One row tile, as many rows of it as are wanted. A row's bits do not depend on who is with it.
  template <int kColumns, typename F>
  void add_rows(float* results, int num_rows, int num_steps, std::ptrdiff_t left_bytes,
                const F& at) {
    for (int row = 0; row < std::min(num_rows, kTileRows); row += 8) {
      const auto group = [&]<int kRows>() {
        add_group<kRows, kColumns>(results + row * kLanes, num_steps, row * left_bytes, left_bytes,
                                   at);
      };
      switch (std::min(num_rows - row, 8)) {
        case 1: group.template operator()<1>(); break;
        case 2: group.template operator()<2>(); break;
        case 3:
        case 4: group.template operator()<4>(); break;
        default: group.template operator()<8>();
      }
    }
  }

  template <int kRows, int kColumns, typename F>
  void add_group(float* results, int num_steps, std::ptrdiff_t first_bytes,
                 std::ptrdiff_t left_bytes, const F& at) {
    f32x16 sums[kRows][kColumns];
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kColumns; ++c) {
        sums[r][c] = begins_ ? _mm512_setzero_ps()
                             : _mm512_loadu_ps(results + c * kTileFloats + r * kLanes);
      }
    }
    for (int step = 0; step < num_steps; ++step) {
      const Operands operands = at(step);
      const char* left = reinterpret_cast<const char*>(operands.left[0]) + first_bytes;
#pragma GCC unroll 4
      for (int pair = 0; pair < kTileSum / 2; ++pair) {
        Pairs right[kColumns];
        for (int c = 0; c < kColumns; ++c) right[c] = load_pairs(operands.right[c] + pair * 32);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Pairs x = splat_pair(left + r * left_bytes + pair * 4);
          for (int c = 0; c < kColumns; ++c) sums[r][c] = add_products(sums[r][c], x, right[c]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kColumns; ++c) {
        _mm512_storeu_ps(results + c * kTileFloats + r * kLanes, sums[r][c]);
      }
    }
  }

  float* results_;
  int num_rows_;
  bool begins_ = true;
};

}  // namespace kernels::tiles
