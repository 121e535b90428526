// Keys and values into the blocks of a paged cache.
#include "tiles.hpp"
#include "attention.hpp"
#include "threads.hpp"

#include <algorithm>
#include <vector>

namespace kernels {
namespace {

// Positions [first, first + count) of one block, and the first of their rows in the batch.
struct Piece {
  std::int32_t block;
  int first, count, row;
};

std::vector<Piece> pieces_of(const SequenceRows* sequences, int num_sequences) {
  std::vector<Piece> pieces;
  for (int s = 0; s < num_sequences; ++s) {
    const SequenceRows& sequence = sequences[s];
    const int end = sequence.position + sequence.num_rows;
    for (int at = sequence.position; at < end;) {
      const int first = at % kBlockTokens;
      const int count = std::min(kBlockTokens - first, end - at);
      pieces.push_back({sequence.blocks[at / kBlockTokens], first, count,
                        sequence.row + at - sequence.position});
      at += count;
    }
  }
  return pieces;
}

// One key into its column of a tile: pairs of d go 16 pairs (one row of the tile) apart.
void store_key(const bf16* key, int head_dim, bf16* column) {
  const __m512i rows = _mm512_mullo_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
      _mm512_set1_epi32(tiles::kTileSum / 2));
  for (int d = 0; d < head_dim; d += tiles::kTileSum) {
    _mm512_i32scatter_epi32(column + d * tiles::kTileRows, rows, _mm512_loadu_si512(key + d), 4);
  }
}

void store_keys(const bf16* keys, std::ptrdiff_t ld, int head_dim, const Piece& piece,
                bf16* block) {
  const int tile_elements = tiles::kTileRows * head_dim;
  for (int i = 0; i < piece.count;) {
    const int key = piece.first + i;
    bf16* tile = block + key / tiles::kTileRows * tile_elements;
    if (key % tiles::kTileRows == 0 && piece.count - i >= tiles::kTileRows) {
      for (int d = 0; d < head_dim; d += tiles::kTileSum) {
        tiles::transpose_pairs(keys + i * ld + d, ld, tile + d * tiles::kTileRows);
      }
      i += tiles::kTileRows;
    } else {
      store_key(keys + i * ld, head_dim, tile + key % tiles::kTileRows * 2);
      ++i;
    }
  }
}

// One value as the even or odd elements of a row of pairs; the other half stays.
void store_value(const bf16* value, int head_dim, bool odd, bf16* pairs) {
  const __mmask32 lanes = odd ? 0xaaaaaaaau : 0x55555555u;
  for (int d = 0; d < head_dim; d += tiles::kTileRows) {
    const __m512i wide = _mm512_cvtepu16_epi32(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(value + d)));
    _mm512_mask_storeu_epi16(pairs + d * kBlockTokens, lanes,
                             odd ? _mm512_slli_epi32(wide, 16) : wide);
  }
}

void store_values(const bf16* values, std::ptrdiff_t ld, int head_dim, const Piece& piece,
                  bf16* block) {
  constexpr int kRow = 2 * tiles::kTileRows;  // elements of a row of pairs
  for (int i = 0; i < piece.count;) {
    const int key = piece.first + i;
    bf16* pairs = block + key / 2 * kRow;
    if (key % 2 == 0 && i + 1 < piece.count) {
      for (int d = 0; d < head_dim; d += 2 * tiles::kTileRows) {
        bf16* low = pairs + d * kBlockTokens;
        tiles::interleave_rows(_mm512_loadu_si512(values + i * ld + d),
                             _mm512_loadu_si512(values + (i + 1) * ld + d), low,
                             low + tiles::kTileElements);
      }
      i += 2;
    } else {
      store_value(values + i * ld, head_dim, key % 2 != 0, pairs);
      ++i;
    }
  }
}

}  // namespace

void store_keys_values(const AttentionShape& shape, const bf16* qkv, std::ptrdiff_t ld,
                       const SequenceRows* sequences, int num_sequences, LayerCache cache) {
  const std::vector<Piece> pieces = pieces_of(sequences, num_sequences);
  const std::ptrdiff_t block_elements = std::ptrdiff_t(kBlockTokens) * shape.head_dim;
  parallel_for(int(pieces.size()), [&](int item, int) {
    const Piece& piece = pieces[item];
    for (int head = 0; head < shape.num_kv_heads; ++head) {
      const std::ptrdiff_t at =
          (std::ptrdiff_t(piece.block) * shape.num_kv_heads + head) * block_elements;
      const bf16* keys =
          qkv + piece.row * ld + shape.query_columns() + std::ptrdiff_t(head) * shape.head_dim;
      store_keys(keys, ld, shape.head_dim, piece, cache.k + at);
      store_values(keys + shape.key_columns(), ld, shape.head_dim, piece, cache.v + at);
    }
  });
}

}  // namespace kernels
