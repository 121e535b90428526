// Causal grouped-query attention over a paged cache, forward and backward.
//
// Shape legend: T packed rows, N query heads, K key/value heads, G = N / K, D = head_dim. A row of
// ``qkv`` is [N*D queries | K*D keys | K*D values], after rotary; ``ld`` elements from row to row.
//
// A query row's result depends on its query, its position and the keys and values of its sequence
// alone. Sums over keys run over whole cache blocks from position 0; a block that a row may not see
// adds exact zeros, so it makes no difference which rows share a tile and which blocks they visit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base.hpp"

namespace kernels {

inline constexpr int kBlockTokens = 32;

struct AttentionShape {
  int num_heads;     // N, a multiple of num_kv_heads
  int num_kv_heads;  // K
  int head_dim;      // D, a multiple of 32
  int window;        // 0: none; else a query sees ``window`` positions, itself included
  float scale;       // of the scores, > 0

  int group() const { return num_heads / num_kv_heads; }
  std::ptrdiff_t query_columns() const { return std::ptrdiff_t(num_heads) * head_dim; }
  std::ptrdiff_t key_columns() const { return std::ptrdiff_t(num_kv_heads) * head_dim; }
  std::ptrdiff_t columns() const { return query_columns() + 2 * key_columns(); }
};

// Rows [row, row + num_rows) of the packed batch are positions [position, position + num_rows) of
// one sequence; ``blocks`` are its cache blocks from position 0 on.
struct SequenceRows {
  int row;
  int num_rows;
  int position;
  const std::int32_t* blocks;
};

// One layer of a paged cache: ``num_kv_heads`` times 32 * D elements for each block. The keys of a
// head lie as [2 tiles of 16 keys][D / 32][16 pairs of d][16 keys][2], the right operand of Q K^T;
// its values as [D / 16][16 pairs of keys][16 d][2], the right operand of P V. Cells that hold no
// key yet may have any finite value.
struct LayerCache {
  bf16* k;
  bf16* v;
};

// Writes keys and values of the rows into their blocks.
void store_keys_values(const AttentionShape& shape, const bf16* qkv, std::ptrdiff_t ld,
                       const SequenceRows* sequences, int num_sequences, LayerCache cache);

// o [T][N*D]; lse [T][N] (log of the sum of e^(scaled score), for the backward pass) or null.
// The keys and values of the rows themselves must have been stored.
void attend(const AttentionShape& shape, const bf16* qkv, std::ptrdiff_t ld,
            const SequenceRows* sequences, int num_sequences, LayerCache cache, bf16* o,
            float* lse);

// Whole sequences (position 0; ``blocks`` unused). Overwrites their rows of dqkv [T][(N+2K)*D].
// ``o`` and ``lse`` are what ``attend`` gave, ``d_o`` is the derivative with respect to ``o``.
void attend_backward(const AttentionShape& shape, const bf16* qkv, std::ptrdiff_t ld,
                     const SequenceRows* sequences, int num_sequences, const bf16* o,
                     const bf16* d_o, const float* lse, bf16* dqkv);

}  // namespace kernels
