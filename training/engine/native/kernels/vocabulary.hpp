// From fp32 logits to logprobs and the gradient of the logits, on one thread, one row each.
//
// A row with NaN, with +inf, or wholly of -inf has NaN logprobs; single -inf logits are tokens of
// probability zero. Shape legend: V vocab, K targets of the row.
#pragma once

#include "base.hpp"

namespace kernels {

// log(sum(exp(logits))), within 1e-7 or so: kept in double, since fp32 would lose that much again.
// Trainer and sampler both take logprobs through here, so theirs agree to the bit.
double log_sum_exp(const float* logits, int V);

// out[K] = logits[targets] - lse, rounded once. ``targets`` lie in [0, V).
void target_logprobs(const float* logits, const std::int32_t* targets, int K, double lse,
                     float* out);

// p[V] = exp(logits - lse): half of the memory of the logits, for the backward pass.
void store_probabilities(const float* logits, double lse, int V, bf16* p);

// p[V], in place, becomes d loss / d logits = scatter(dlogprobs) - p * sum(dlogprobs); a target that
// stands twice gets both. ``logprobs`` [K] are those of target_logprobs: the probability of a target
// comes from there, since 1 - p of a confident token would not survive p in bf16.
void head_gradient(bf16* p, int V, const std::int32_t* targets, const float* logprobs,
                   const float* dlogprobs, int K);

// The same from logits that were kept or computed again.
void head_gradient(const float* logits, double lse, int V, const std::int32_t* targets,
                   const float* logprobs, const float* dlogprobs, int K, bf16* gradient);

}  // namespace kernels
