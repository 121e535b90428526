// Accumulators of a block of up to 2 x 2 tiles: what all products are made of.
#pragma once

#include "amx.hpp"
#include "product.hpp"

namespace kernels {

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
    _tile_loadd(6, w0 + std::ptrdiff_t(k) * amx::kTileElements, 64);
    _tile_loadd(4, x0 + k * amx::kTileSum, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kRowTiles == 2) {
      _tile_loadd(5, x1 + k * amx::kTileSum, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kColumnTiles == 2) {
      _tile_loadd(7, w1 + std::ptrdiff_t(k) * amx::kTileElements, 64);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kRowTiles == 2) _tile_dpbf16ps(3, 5, 7);
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

template <int kRowTiles, int kColumnTiles>
inline void load_accumulators(const Results& results) {
  amx::fence();
  _tile_loadd(0, results.tile[0], 64);
  if constexpr (kColumnTiles == 2) _tile_loadd(1, results.tile[1], 64);
  if constexpr (kRowTiles == 2) _tile_loadd(2, results.tile[2], 64);
  if constexpr (kRowTiles == 2 && kColumnTiles == 2) _tile_loadd(3, results.tile[3], 64);
}

}  // namespace kernels
