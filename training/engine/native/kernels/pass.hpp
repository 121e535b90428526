// One pass of a batch through the layers, and back.
#pragma once

#include <vector>

#include "lora.hpp"
#include "model.hpp"
#include "workspace.hpp"

namespace kernels {

// What the backward pass reads of one layer. Rows are counted up to a multiple of 32.
struct LayerState {
  bf16* x;        // [T, H] the layer's input
  bf16* raw_qkv;  // [T, (N + 2K) * D] before the heads' norms; null where the model has none
  bf16* qkv;      // after rotary
  bf16* o;        // [T, N * D]
  float* lse;     // [T, N]
  bf16* x_mid;    // [T, H] between attention and MLP
  bf16* gate_up;  // [T, 2 * I]
  bf16* z[kGroups];
};

class Pass {
 public:
  explicit Pass(const Model& model) : model_(model) {}

  // hidden [T, H]: final-normed. Keys and values go into ``cache``; with none (training) into
  // memory of the pass. ``keep`` is what a backward pass needs: kInputs computes layers again.
  void forward(const Batch& batch, const Cache* cache, Keep keep, bf16* hidden);

  // Once, after forward with a ``keep``: adds to the gradients that the segments now point to.
  void backward(const Segment* segments, const bf16* d_hidden);

  Workspace& workspace() { return workspace_; }

 private:
  struct Gradients;

  void copy_batch(const Batch& batch);
  LayerState take_state(bool everything);
  void run_layer(int index, LayerState& state, bf16* out);
  void run_attention(int index, LayerState& state);
  void run_mlp(int index, LayerState& state, bf16* out);
  void backward_layer(int index, LayerState& state, Gradients& gradients);
  void backward_mlp(int index, LayerState& state, Gradients& gradients);
  void backward_attention(int index, LayerState& state, Gradients& gradients);
  AdaptedLinear linear(int layer, Group group) const;
  AttentionShape shape(int layer) const;
  void zero_unowned(bf16* rows, std::ptrdiff_t columns) const;
  template <typename F>
  void for_rows(const F& body) const;

  const Model& model_;
  Workspace workspace_;
  LoraPlan plan_;
  int num_rows_ = 0;    // of the batch
  int padded_rows_ = 0;  // to a multiple of 32
  std::vector<std::int32_t> tokens_, positions_, blocks_;
  std::vector<SequenceRows> sequences_;
  Cache cache_{};
  Keep keep_ = Keep::kNothing;
  std::vector<LayerState> states_;
  bf16* last_x_ = nullptr;
  bf16* normed_ = nullptr;  // [T, H], of the layer at work
  bf16* act_ = nullptr;     // [T, I]
};

}  // namespace kernels
