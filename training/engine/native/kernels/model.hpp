// A decoder's forward and backward pass over packed rows of many sequences and adapters.
//
// The structs are the C interface: ``library.py`` declares the same ones. They hold pointers to
// memory that Python owns and keeps alive.
//
// Legend: T rows, H hidden, N heads, K kv heads, D head dimension, I inner, L layers.
#pragma once

#include <cstdint>

#include "attention.hpp"
#include "base.hpp"
#include "product.hpp"

namespace kernels {

struct Linear {
  Packed w;    // of W [out, in]
  Packed w_t;  // of W^T [in, out]; null: made when it is needed
  const float* bias;
  std::int32_t in, out;
};

struct Layer {
  const float *input_norm, *mlp_norm, *q_norm, *k_norm;  // the last two may be null
  Linear qkv, o, gate_up, down;
  std::int32_t window;  // positions a query sees, itself included; 0: all
};

struct Model {
  std::int32_t num_layers, hidden, num_heads, num_kv_heads, head_dim, inner, vocab;
  float norm_eps;
  const bf16* embedding;  // [vocab, H]; null: the head's weights
  const Layer* layers;
  const float* final_norm;
  Linear head;
  const float* cos_sin;  // [positions][D]
};

inline constexpr int kGroups = 4;  // qkv, o, gate_up, down: in this order everywhere
enum Group { kQkv, kO, kGateUp, kDown, kUnembed };

// One group of projections of an adapter. num_parts 0: not adapted.
struct LoraGroup {
  Packed a;    // of A's [parts * rank, in]
  Packed b;    // of B's, part by part: [sum of outs, rank]
  std::int32_t num_parts;
  std::int32_t part_end[3];  // output columns, ascending
  std::int64_t gradient;     // offset of dA in the flat gradient; dB follows it
};

struct Adapter {
  const LoraGroup* groups;  // [L * kGroups + 1]; the last one is the head's
  std::int32_t rank;        // of the adapter
  std::int32_t padded_rank;  // to a multiple of 32, with zeros
  float scale;
};

// Rows [begin, end). Where gradients are wanted, begin is a multiple of 32 and rows up to the next
// multiple belong to nobody.
struct Segment {
  const Adapter* adapter;  // or null
  std::int32_t begin, end;
  float* gradient;  // flat, or null
  std::int32_t accumulate;  // whether ``gradient`` holds something to add to
};

struct Batch {
  std::int32_t num_rows;
  const std::int32_t* tokens;
  const std::int32_t* positions;
  const SequenceRows* sequences;
  std::int32_t num_sequences;
  const Segment* segments;
  std::int32_t num_segments;
};

// Keys and values [layers][blocks][K][32 * D], or one layer of them that each layer overwrites.
struct Cache {
  bf16 *k, *v;
  std::int64_t layer_stride;  // elements; 0: overwritten
};

enum class Keep : std::int32_t { kNothing, kInputs, kEverything };

}  // namespace kernels
