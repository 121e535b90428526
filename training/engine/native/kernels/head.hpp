// The head: from hidden states to logits, logprobs of targets, and back.
//
// The logits of at most kHeadRows rows exist at once. Legend: R rows, H hidden, V vocab, K targets.
#pragma once

#include "model.hpp"
#include "workspace.hpp"

namespace kernels {

inline constexpr int kHeadRows = 128;

// Elements of one row of kept probabilities.
std::ptrdiff_t kept_stride(int vocab);

// logits [R, V] in fp32; segments cover the rows.
void head_logits(const Model& model, const bf16* hidden, int num_rows, const Segment* segments,
                 int num_segments, Workspace& workspace, float* logits);

// Rows of one segment with their targets.
struct HeadRows {
  const bf16* hidden;  // [R, H]
  int num_rows;
  const std::int32_t* targets;  // [R, K]
  int num_targets;
  Segment segment;  // of rows [0, R)
  float* logprobs;  // [R, K], written by the forward pass
  double* lse;      // [R], likewise
  bf16* kept;       // [R, kept_stride] for the probabilities, or null: computed again
};

void head_forward(const Model& model, const HeadRows& rows, Workspace& workspace);

// For ``used`` (ascending places of rows): writes d_hidden [R, H] of these rows, given dlogprobs
// [R, K]; adds to the segment's gradient.
void head_backward(const Model& model, const HeadRows& rows, const float* dlogprobs,
                   const std::int32_t* used, int num_used, Workspace& workspace, bf16* d_hidden);

}  // namespace kernels
