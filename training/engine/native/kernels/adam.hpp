// AdamW and the global norm over flat fp32 buffers, on all threads of the pool.
#pragma once

#include "base.hpp"

namespace kernels {

struct AdamStep {
  std::int64_t step;  // number of this step, the first is 1
  double learning_rate, beta1, beta2, eps, weight_decay;
  double gradient_scale;  // of clipping; 1 leaves the gradient as it is
};

// One step of torch.optim.AdamW (decoupled weight decay), in place; ``gradient`` is only read.
void adamw_step(float* weights, float* exp_avg, float* exp_avg_sq, const float* gradient,
                std::int64_t count, const AdamStep& params);

// Root of the sum of squares, in double. The order of the sum does not depend on the number of
// threads. Not finite where a value is not.
double global_norm(const float* values, std::int64_t count);

}  // namespace kernels
