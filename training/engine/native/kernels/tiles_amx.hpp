// Accumulators in tile registers. Included by tiles.hpp alone.
//
// Tile numbers must be literals: 0..3 accumulate, 4 and 5 hold rows of the left operand, 6 and 7
// columns of the right one.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "tiles_base.hpp"

namespace kernels::tiles {

struct alignas(64) Config {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline constinit const Config kConfig;

// All eight tiles whole.
inline void configure() {
  // gcc's intrinsic tells the compiler of 8 of the 64 bytes it reads: a local would be stale.
  asm volatile("ldtilecfg %0" : : "m"(kConfig));
}

inline void release() { _tile_release(); }

// Must stand between plain stores to memory and tile loads of it: gcc's tile intrinsics do not tell
// the compiler that they read.
inline void fence() { asm volatile("" ::: "memory"); }

// The number of rows is not used: a tile of fewer would have to be configured first.
template <int kRowTiles, int kColumnTiles>
class Accumulators {
 public:
  Accumulators(float* results, int) : results_(results) {}

  void zero() {
    _tile_zero(0);
    if constexpr (kColumnTiles == 2) _tile_zero(1);
    if constexpr (kRowTiles == 2) _tile_zero(2);
    if constexpr (kRowTiles == 2 && kColumnTiles == 2) _tile_zero(3);
  }

  void load() {
    fence();
    _tile_loadd(0, results_, 64);
    if constexpr (kColumnTiles == 2) _tile_loadd(1, results_ + kTileFloats, 64);
    if constexpr (kRowTiles == 2) _tile_loadd(2, results_ + 2 * kTileFloats, 64);
    if constexpr (kRowTiles == 2 && kColumnTiles == 2) {
      _tile_loadd(3, results_ + 3 * kTileFloats, 64);
    }
  }

  template <typename F>
  void add(int num_steps, std::ptrdiff_t left_bytes, const F& operands) {
    fence();
    for (int step = 0; step < num_steps; ++step) {
      const Operands at = operands(step);
      _tile_loadd(6, at.right[0], 64);
      _tile_loadd(4, at.left[0], left_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kRowTiles == 2) {
        _tile_loadd(5, at.left[1], left_bytes);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (kColumnTiles == 2) {
        _tile_loadd(7, at.right[1], 64);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kRowTiles == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }

  template <int kRowTile, int kColumnTile>
  void add_tile(int num_steps, const bf16* left, std::ptrdiff_t left_bytes, const bf16* right) {
    fence();
    for (int step = 0; step < num_steps; ++step) {
      _tile_loadd(4, left + step * kTileSum, left_bytes);
      _tile_loadd(6, right + std::ptrdiff_t(step) * kTileElements, 64);
      if constexpr (kRowTile == 0 && kColumnTile == 0) _tile_dpbf16ps(0, 4, 6);
      if constexpr (kRowTile == 0 && kColumnTile == 1) _tile_dpbf16ps(1, 4, 6);
      if constexpr (kRowTile == 1 && kColumnTile == 0) _tile_dpbf16ps(2, 4, 6);
      if constexpr (kRowTile == 1 && kColumnTile == 1) _tile_dpbf16ps(3, 4, 6);
    }
  }

  void store() {
    _tile_stored(0, results_, 64);
    if constexpr (kColumnTiles == 2) _tile_stored(1, results_ + kTileFloats, 64);
    if constexpr (kRowTiles == 2) _tile_stored(2, results_ + 2 * kTileFloats, 64);
    if constexpr (kRowTiles == 2 && kColumnTiles == 2) {
      _tile_stored(3, results_ + 3 * kTileFloats, 64);
    }
  }

 private:
  float* results_;
};

}  // namespace kernels::tiles
