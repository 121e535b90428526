// Drawing tokens from fp32 logits without a second tensor of their size and without sorting them.
//
// One thread, one row; the extern "C" functions in sampling.cpp take all rows of a decode step at
// once. Results depend on the row's logits and its own parameters alone. Shape legend: V vocab.
#pragma once

#include "base.hpp"

namespace kernels {

// ``temperature`` 0 takes the most probable token, of equal ones the lowest id; its logprob is that
// of the unscaled distribution. ``top_k`` <= 0 and ``top_p`` >= 1 keep everything. top_p applies to
// what top_k kept: tokens by descending logit, equal ones by ascending id, are kept while the mass
// before them is below top_p of the whole.
struct Cut {
  float temperature = 1;  // 0, or from 1e-30 to 1e30
  int top_k = -1;
  float top_p = 1;
};

struct Drawn {
  std::int32_t token;  // some valid id where ``logprob`` is NaN
  float logprob;       // of the whole distribution at this temperature, before top_k and top_p
};

// The token whose interval of the cumulative probabilities, in order of ids, holds ``uniform`` in
// [0, 1). Never one of probability zero.
Drawn sample_row(const float* logits, int V, const Cut& cut, double uniform);

// U tokens from the uncut distribution, one for each of ``uniforms``.
void draw_row(const float* logits, int V, float temperature, const double* uniforms, int U,
              std::int32_t* tokens, float* logprobs);

// The ``k`` <= V most probable tokens at ``temperature``, best first, equal ones by ascending id.
void top_logprobs(const float* logits, int V, float temperature, int k, std::int32_t* ids,
                  float* logprobs);

}  // namespace kernels
