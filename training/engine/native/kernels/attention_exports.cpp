// C interface of the attention kernels, for tests and measurements: a shape is
// int32 {num_heads, num_kv_heads, head_dim, window}, a sequence int32 {row, num_rows, position,
// index of its first block in ``blocks``}.
#include <vector>

#include "attention.hpp"

namespace {

kernels::AttentionShape shape_of(const std::int32_t* shape, float scale) {
  return {shape[0], shape[1], shape[2], shape[3], scale};
}

std::vector<kernels::SequenceRows> sequences_of(const std::int32_t* sequences, int num_sequences,
                                                const std::int32_t* blocks) {
  std::vector<kernels::SequenceRows> result;
  for (int s = 0; s < num_sequences; ++s, sequences += 4) {
    const std::int32_t* own = blocks == nullptr ? nullptr : blocks + sequences[3];
    result.push_back({sequences[0], sequences[1], sequences[2], own});
  }
  return result;
}

}  // namespace

extern "C" {

void tc_store_keys_values(const std::int32_t* shape, const kernels::bf16* qkv, std::int64_t ld,
                          const std::int32_t* sequences, int num_sequences,
                          const std::int32_t* blocks, kernels::bf16* k, kernels::bf16* v) {
  const auto rows = sequences_of(sequences, num_sequences, blocks);
  kernels::store_keys_values(shape_of(shape, 1.0f), qkv, ld, rows.data(), num_sequences, {k, v});
}

void tc_attend(const std::int32_t* shape, float scale, const kernels::bf16* qkv, std::int64_t ld,
               const std::int32_t* sequences, int num_sequences, const std::int32_t* blocks,
               kernels::bf16* k, kernels::bf16* v, kernels::bf16* o, float* lse) {
  const auto rows = sequences_of(sequences, num_sequences, blocks);
  kernels::attend(shape_of(shape, scale), qkv, ld, rows.data(), num_sequences, {k, v}, o, lse);
}

void tc_attend_backward(const std::int32_t* shape, float scale, const kernels::bf16* qkv,
                        std::int64_t ld, const std::int32_t* sequences, int num_sequences,
                        const kernels::bf16* o, const kernels::bf16* d_o, const float* lse,
                        kernels::bf16* dqkv) {
  const auto rows = sequences_of(sequences, num_sequences, nullptr);
  kernels::attend_backward(shape_of(shape, scale), qkv, ld, rows.data(), num_sequences, o, d_o,
                           lse, dqkv);
}
}
