// Operands of the backward pass of attention: blocks of keys and of queries, packed.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.hpp"
#include "attention_math.hpp"

namespace kernels {

inline constexpr int kPanelBlocks = 4;   // key blocks that are taken together
inline constexpr int kPanelSquares = 8;  // at most: blocks of queries that are taken together

struct BackwardCall {
  const AttentionShape& shape;
  const bf16* qkv;
  std::ptrdiff_t ld;
  const bf16* o;
  const bf16* d_o;
  const float* lse;
  bf16* dqkv;
};

// Blocks of 32 positions of a sequence.
struct BlockRange {
  int first, count;
};

// Some heads of a group at some positions; square q is one head at one block of positions.
struct PanelShape {
  BlockRange positions;
  int first_member, num_members;

  int num_squares() const { return positions.count * num_members; }
  int query_block(int q) const { return positions.first + q % positions.count; }
  int member(int q) const { return first_member + q / positions.count; }

  // Floats before this panel's where all panels from block ``first`` on lie one after the other.
  std::size_t offset(const AttentionShape& shape, int first) const {
    const std::size_t squares = std::size_t(positions.first - first) * shape.group() +
                                std::size_t(first_member) * positions.count;
    return squares * kBlockTokens * shape.head_dim;
  }
};

// Whether some query of the block may see some key of the other.
inline bool sees(int query_block, int key_block, int window) {
  return key_block <= query_block &&
         (window == 0 ||
          key_block * kBlockTokens + kBlockTokens > query_block * kBlockTokens + 1 - window);
}

// The same of a panel and several key blocks.
inline bool sees(const PanelShape& panel, BlockRange keys, int window) {
  const int last_query = panel.positions.first + panel.positions.count - 1;
  const int last_key = keys.first + keys.count - 1;
  return keys.first <= last_query &&
         (last_key >= panel.positions.first || sees(panel.positions.first, last_key, window));
}

// All panels of a sequence of ``num_blocks`` blocks, in order of position.
std::vector<PanelShape> panels_of(const AttentionShape& shape, int num_blocks);

// Keys and values of one head, and the sums of their derivatives: [D / 32] squares of floats for
// each block of 32.
class KeyPanel {
 public:
  KeyPanel(Arena& memory, int num_blocks, int head_dim);

  void load(const BackwardCall& call, const SequenceRows& sequence, int kv_head, BlockRange blocks);
  void write(const BackwardCall& call, const SequenceRows& sequence, int kv_head,
             BlockRange blocks) const;

  const bf16* keys(int block) const { return keys_ + block * stride_; }        // left
  const bf16* values(int block) const { return values_ + block * stride_; }    // left
  const bf16* columns(int block) const { return columns_ + block * stride_; }  // of the keys
  float* dk(int block) const { return dk_ + block * stride_; }
  float* dv(int block) const { return dv_ + block * stride_; }

 private:
  std::ptrdiff_t stride_;
  bf16 *keys_, *values_, *columns_, *rows_, *pairs_;
  float *dk_, *dv_;
};

// Of 32 queries; exponent +inf beyond the end of the sequence: probability 0.
struct alignas(64) QueryStatistics {
  float exponent[kBlockTokens];  // log2 of the sum of e^(scaled score)
  float delta[kBlockTokens];     // sum over d of dO * O
};

class QueryPanel {
 public:
  QueryPanel(Arena& memory, int head_dim);

  void load(const BackwardCall& call, const SequenceRows& sequence, int kv_head,
            const PanelShape& shape);

  const bf16* q_transposed(int q) const { return q_transposed_ + q * stride_; }
  const bf16* q_pairs(int q) const { return q_pairs_ + q * stride_; }
  const bf16* do_transposed(int q) const { return do_transposed_ + q * stride_; }
  const bf16* do_pairs(int q) const { return do_pairs_ + q * stride_; }
  const QueryStatistics& statistics(int q) const { return statistics_[q]; }
  float* dq() const { return dq_; }

 private:
  std::ptrdiff_t stride_;
  bf16 *q_transposed_, *q_pairs_, *do_transposed_, *do_pairs_, *rows_;
  QueryStatistics* statistics_;
  float* dq_;
};

// Rows of dqkv from dQ^T: [square][D / 32] squares of floats, not yet scaled.
void write_queries(const BackwardCall& call, const SequenceRows& sequence, int kv_head,
                   const PanelShape& shape, const float* dq);

}  // namespace kernels
