#include "pass.hpp"

#include <algorithm>
#include <cmath>

#include "rowwise.hpp"
#include "threads.hpp"

namespace kernels {
namespace {

constexpr int kRowsPerItem = 16;

}  // namespace

struct Pass::Gradients {
  bf16* x;        // [T, H] of the residual stream
  bf16* normed;   // [T, H]
  bf16* gate_up;  // [T, 2 * I]
  bf16* act;      // [T, I]
  bf16* o;        // [T, N * D]
  bf16* qkv;      // [T, (N + 2K) * D]
  bf16* dz;
};

template <typename F>
void Pass::for_rows(const F& body) const {
  const int num_rows = num_rows_;
  parallel_for(divide_up(num_rows, kRowsPerItem), [&](int item, int) {
    const int begin = item * kRowsPerItem;
    body(begin, std::min(begin + kRowsPerItem, num_rows));
  });
}

AdaptedLinear Pass::linear(int layer, Group group) const {
  const Layer& weights = model_.layers[layer];
  const Linear* linears[] = {&weights.qkv, &weights.o, &weights.gate_up, &weights.down};
  return AdaptedLinear(plan_, *linears[group], group, layer * kGroups + group);
}

AttentionShape Pass::shape(int layer) const {
  return {model_.num_heads, model_.num_kv_heads, model_.head_dim, model_.layers[layer].window,
          1.0f / std::sqrt(float(model_.head_dim))};
}

// The caller may let go of the batch before the backward pass.
void Pass::copy_batch(const Batch& batch) {
  num_rows_ = batch.num_rows;
  padded_rows_ = round_up(num_rows_, 32);
  tokens_.assign(batch.tokens, batch.tokens + num_rows_);
  positions_.assign(batch.positions, batch.positions + num_rows_);
  sequences_.assign(batch.sequences, batch.sequences + batch.num_sequences);
  plan_.set(batch.segments, batch.num_segments, num_rows_);
}

LayerState Pass::take_state(bool everything) {
  const std::size_t rows = padded_rows_;
  const std::size_t columns = shape(0).columns(), queries = shape(0).query_columns();
  const bool has_head_norms = model_.layers[0].q_norm != nullptr;
  LayerState state{};
  state.qkv = workspace_.take<bf16>(rows * columns);
  state.raw_qkv = everything && has_head_norms ? workspace_.take<bf16>(rows * columns) : nullptr;
  state.o = workspace_.take<bf16>(rows * queries);
  state.lse = everything ? workspace_.take<float>(rows * model_.num_heads) : nullptr;
  state.x_mid = everything ? workspace_.take<bf16>(rows * model_.hidden) : nullptr;
  state.gate_up = workspace_.take<bf16>(rows * 2 * model_.inner);
  for (int group = 0; group < kGroups; ++group) {
    state.z[group] = workspace_.take<bf16>(plan_.reduced_elements(kNumParts[group]));
  }
  return state;
}

// Rows that no sequence owns get no attention; the products that follow must read finite values.
void Pass::zero_unowned(bf16* rows, std::ptrdiff_t columns) const {
  int next = 0;
  auto zero = [&](int begin, int end) {
    if (begin < end) std::memset(rows + begin * columns, 0, (end - begin) * columns * sizeof(bf16));
  };
  for (const SequenceRows& sequence : sequences_) {
    zero(next, sequence.row);
    next = sequence.row + sequence.num_rows;
  }
  zero(next, padded_rows_);
}

void Pass::forward(const Batch& batch, const Cache* cache, Keep keep, bf16* hidden) {
  copy_batch(batch);
  keep_ = keep;
  workspace_.reset();
  const std::size_t rows = padded_rows_, stream = rows * model_.hidden;
  if (cache != nullptr) {
    cache_ = *cache;
  } else {
    // One layer's keys and values: the backward pass makes them again from qkv.
    int num_blocks = 0;
    for (const SequenceRows& each : sequences_) {
      num_blocks += divide_up(each.num_rows, kBlockTokens);
    }
    blocks_.resize(num_blocks);
    for (int i = 0; i < num_blocks; ++i) blocks_[i] = i;
    num_blocks = 0;
    for (SequenceRows& each : sequences_) {
      each.blocks = blocks_.data() + num_blocks;
      num_blocks += divide_up(each.num_rows, kBlockTokens);
    }
    const std::size_t cells = std::size_t(num_blocks) * kBlockTokens * shape(0).key_columns();
    cache_ = {workspace_.take<bf16>(cells), workspace_.take<bf16>(cells), 0};
    std::memset(cache_.k, 0, cells * sizeof(bf16));
    std::memset(cache_.v, 0, cells * sizeof(bf16));
  }
  normed_ = workspace_.take<bf16>(stream);
  act_ = workspace_.take<bf16>(rows * model_.inner);
  bf16* x = workspace_.take<bf16>(stream);
  for_rows([&](int begin, int end) {
    for (int row = begin; row < end; ++row) {
      bf16* to = x + std::ptrdiff_t(row) * model_.hidden;
      if (model_.embedding == nullptr) {
        unpack_row(model_.head.w, model_.hidden, tokens_[row], to);
        continue;
      }
      std::memcpy(to, model_.embedding + std::ptrdiff_t(tokens_[row]) * model_.hidden,
                  model_.hidden * sizeof(bf16));
    }
  });
  std::memset(x + std::ptrdiff_t(num_rows_) * model_.hidden, 0,
              (stream - std::size_t(num_rows_) * model_.hidden) * sizeof(bf16));
  states_.clear();
  const bool everything = keep == Keep::kEverything;
  const bool keeps_inputs = keep != Keep::kNothing;
  LayerState shared{};
  if (!everything) shared = take_state(keeps_inputs);
  for (int index = 0; index < model_.num_layers; ++index) {
    LayerState state = everything ? take_state(true) : shared;
    state.x = x;
    if (keeps_inputs) x = workspace_.take<bf16>(stream);
    if (!keeps_inputs) state.x_mid = x;
    run_layer(index, state, x);
    states_.push_back(state);
  }
  last_x_ = x;
  for_rows([&](int begin, int end) {
    rms_norm(x, model_.final_norm, model_.norm_eps, hidden, model_.hidden, begin, end);
  });
}

void Pass::run_layer(int index, LayerState& state, bf16* out) {
  run_attention(index, state);
  run_mlp(index, state, out);
}

void Pass::run_attention(int index, LayerState& state) {
  const Layer& layer = model_.layers[index];
  const int hidden = model_.hidden;
  const AttentionShape attention = shape(index);
  const std::ptrdiff_t columns = attention.columns();
  for_rows([&](int begin, int end) {
    rms_norm(state.x, layer.input_norm, model_.norm_eps, normed_, hidden, begin, end);
  });
  linear(index, kQkv).forward(normed_, hidden, num_rows_, state.z[kQkv], Output::kBf16, state.qkv,
                              columns, nullptr);
  for_rows([&](int begin, int end) {
    if (state.raw_qkv != nullptr) {
      std::memcpy(state.raw_qkv + begin * columns, state.qkv + begin * columns,
                  (end - begin) * columns * sizeof(bf16));
    }
    rotate(state.qkv, columns, {model_.num_heads, model_.num_kv_heads, model_.head_dim},
           model_.cos_sin, positions_.data(), {layer.q_norm, layer.k_norm, model_.norm_eps}, begin,
           end);
  });
  const LayerCache cache{cache_.k + index * cache_.layer_stride,
                         cache_.v + index * cache_.layer_stride};
  const int num_sequences = int(sequences_.size());
  store_keys_values(attention, state.qkv, columns, sequences_.data(), num_sequences, cache);
  attend(attention, state.qkv, columns, sequences_.data(), num_sequences, cache, state.o,
         state.lse);
  zero_unowned(state.o, attention.query_columns());
  linear(index, kO).forward(state.o, attention.query_columns(), num_rows_, state.z[kO],
                            Output::kAddBf16, state.x_mid, hidden, state.x);
}

void Pass::run_mlp(int index, LayerState& state, bf16* out) {
  const Layer& layer = model_.layers[index];
  const int hidden = model_.hidden, inner = model_.inner;
  for_rows([&](int begin, int end) {
    rms_norm(state.x_mid, layer.mlp_norm, model_.norm_eps, normed_, hidden, begin, end);
  });
  linear(index, kGateUp).forward(normed_, hidden, num_rows_, state.z[kGateUp], Output::kBf16,
                                 state.gate_up, 2 * inner, nullptr);
  for_rows([&](int begin, int end) { swiglu(state.gate_up, act_, inner, begin, end); });
  linear(index, kDown).forward(act_, inner, num_rows_, state.z[kDown], Output::kAddBf16, out,
                               hidden, state.x_mid);
}

void Pass::backward(const Segment* segments, const bf16* d_hidden) {
  plan_.set(segments, int(plan_.segments().size()), num_rows_);
  const std::size_t rows = padded_rows_;
  const AttentionShape attention = shape(0);
  Gradients gradients{
      .x = workspace_.take<bf16>(rows * model_.hidden),
      .normed = workspace_.take<bf16>(rows * model_.hidden),
      .gate_up = workspace_.take<bf16>(rows * 2 * model_.inner),
      .act = workspace_.take<bf16>(rows * model_.inner),
      .o = workspace_.take<bf16>(rows * attention.query_columns()),
      .qkv = workspace_.take<bf16>(rows * attention.columns()),
      .dz = workspace_.take<bf16>(plan_.reduced_elements(3)),
  };
  std::memset(gradients.x, 0, rows * model_.hidden * sizeof(bf16));
  for_rows([&](int begin, int end) {
    rms_norm_backward(last_x_, model_.final_norm, model_.norm_eps, d_hidden, gradients.x,
                      model_.hidden, begin, end);
  });
  for (int index = model_.num_layers - 1; index >= 0; --index) {
    LayerState& state = states_[index];
    if (keep_ == Keep::kInputs) run_layer(index, state, gradients.normed);
    backward_layer(index, state, gradients);
  }
}

void Pass::backward_layer(int index, LayerState& state, Gradients& gradients) {
  backward_mlp(index, state, gradients);
  backward_attention(index, state, gradients);
}

void Pass::backward_mlp(int index, LayerState& state, Gradients& gradients) {
  const Layer& layer = model_.layers[index];
  const int hidden = model_.hidden, inner = model_.inner;
  const AdaptedLinear down = linear(index, kDown), gate_up = linear(index, kGateUp);
  down.backward(gradients.x, hidden, num_rows_, gradients.dz, gradients.act, workspace_);
  for_rows([&](int begin, int end) {
    swiglu_backward(state.gate_up, gradients.act, gradients.gate_up, act_, inner, begin, end);
    rms_norm(state.x_mid, layer.mlp_norm, model_.norm_eps, normed_, hidden, begin, end);
  });
  down.add_gradients(act_, inner, gradients.x, hidden, state.z[kDown], gradients.dz, workspace_);
  gate_up.backward(gradients.gate_up, 2 * inner, num_rows_, gradients.dz, gradients.normed,
                   workspace_);
  gate_up.add_gradients(normed_, hidden, gradients.gate_up, 2 * inner, state.z[kGateUp],
                        gradients.dz, workspace_);
  for_rows([&](int begin, int end) {
    rms_norm_backward(state.x_mid, layer.mlp_norm, model_.norm_eps, gradients.normed, gradients.x,
                      hidden, begin, end);
  });
}

void Pass::backward_attention(int index, LayerState& state, Gradients& gradients) {
  const Layer& layer = model_.layers[index];
  const int hidden = model_.hidden;
  const AttentionShape attention = shape(index);
  const std::ptrdiff_t columns = attention.columns(), queries = attention.query_columns();
  const AdaptedLinear o = linear(index, kO), qkv = linear(index, kQkv);
  o.backward(gradients.x, hidden, num_rows_, gradients.dz, gradients.o, workspace_);
  o.add_gradients(state.o, queries, gradients.x, hidden, state.z[kO], gradients.dz, workspace_);
  attend_backward(attention, state.qkv, columns, sequences_.data(), int(sequences_.size()), state.o,
                  gradients.o, state.lse, gradients.qkv);
  zero_unowned(gradients.qkv, columns);
  for_rows([&](int begin, int end) {
    rotate_backward(gradients.qkv, columns, state.raw_qkv, columns,
                    {model_.num_heads, model_.num_kv_heads, model_.head_dim}, model_.cos_sin,
                    positions_.data(), {layer.q_norm, layer.k_norm, model_.norm_eps}, begin, end);
    rms_norm(state.x, layer.input_norm, model_.norm_eps, normed_, hidden, begin, end);
  });
  // Nothing below the first layer is trained.
  bf16* d_normed = index > 0 ? gradients.normed : nullptr;
  qkv.backward(gradients.qkv, columns, num_rows_, gradients.dz, d_normed, workspace_);
  qkv.add_gradients(normed_, hidden, gradients.qkv, columns, state.z[kQkv], gradients.dz,
                    workspace_);
  if (index == 0) return;
  for_rows([&](int begin, int end) {
    rms_norm_backward(state.x, layer.input_norm, model_.norm_eps, gradients.normed, gradients.x,
                      hidden, begin, end);
  });
}

}  // namespace kernels
