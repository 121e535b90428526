// The row-wise parts of a layer, on one thread, for rows [begin, end): the caller runs them in
// parallel and beside the product that needs them, while the rows are in the processor's cache.
//
// bf16 in and out, fp32 between, one rounding. Rows are contiguous unless a stride ``ld`` is given;
// any length. NaN and infinity pass through. Shape legend: T rows, H hidden, D head dimension,
// I inner.
#pragma once

#include "base.hpp"

namespace kernels {

// y[T, H] = x / rms(x) * weight. ``y`` may be ``x``.
void rms_norm(const bf16* x, const float* weight, float eps, bf16* y, int H, int begin, int end);

// dx[T, H] += the gradient of rms_norm's x, given ``dy``; ``x`` is rms_norm's input.
void rms_norm_backward(const bf16* x, const float* weight, float eps, const bf16* dy, bf16* dx,
                       int H, int begin, int end);

// x[T, H] += y
void add_rows(bf16* x, const bf16* y, int H, int begin, int end);

struct Heads {
  int num_heads;     // query heads come first in a row,
  int num_kv_heads;  // then key heads, then as many value heads, which nothing here touches
  int head_dim;      // even
};

// Per-head RMS norms of Qwen3: weights [D], both null where the model has none.
struct HeadNorms {
  const float* q = nullptr;
  const float* k = nullptr;
  float eps = 0;
};

// Rotary embedding of the query and key heads of qkv[T, ld], in place, each normed first where the
// model does so; halves are paired: x_i with x_{i + D/2}. ``cos_sin`` is [positions][D], D/2
// cosines before D/2 sines; row t uses line positions[t].
void rotate(bf16* qkv, std::ptrdiff_t ld, const Heads& heads, const float* cos_sin,
            const std::int32_t* positions, const HeadNorms& norms, int begin, int end);

// Given the gradient of rotate's output in dqkv[T, ld], leaves there the gradient of its input
// (value heads stay). With norms, ``qkv`` [T, ld_qkv] must be rotate's INPUT: the caller saves it or
// computes it again. Without norms ``qkv`` may be null.
void rotate_backward(bf16* dqkv, std::ptrdiff_t ld, const bf16* qkv, std::ptrdiff_t ld_qkv,
                     const Heads& heads, const float* cos_sin, const std::int32_t* positions,
                     const HeadNorms& norms, int begin, int end);

// act[T, I] = silu(gate) * up of gate_up[T, 2 * I] = [gate | up].
void swiglu(const bf16* gate_up, bf16* act, int I, int begin, int end);

// dgate_up[T, 2 * I] from dact[T, I]; ``dgate_up`` may be ``gate_up``. Writes ``act`` again where it
// is not null.
void swiglu_backward(const bf16* gate_up, const bf16* dact, bf16* dgate_up, bf16* act, int I,
                     int begin, int end);

}  // namespace kernels
