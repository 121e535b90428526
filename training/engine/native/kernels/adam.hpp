// AdamW and the global norm over flat fp32 buffers, on all threads of the pool.
#pragma once

#include "base.hpp"

namespace kernels {

struct AdamStep {
  std::int64_t step;  // number of this step, the first is 1
  double learning_rate, beta1, beta2, eps, weight_decay;
  double gradient_scale;  // of clipping; 1 leaves the gradient as it is
};

struct AdamBuffers {
  float *weights, *exp_avg, *exp_avg_sq;
  const float* gradient;  // only read
};

// One step of torch.optim.AdamW (decoupled weight decay), in place and in pieces.
class AdamW {
 public:
  AdamW(const AdamBuffers& buffers, const AdamStep& params);

  // Elements [begin, end), on this thread.
  void step(std::int64_t begin, std::int64_t end) const;

  // Also writes the new weights in bf16 to ``rounded``; false where one is not finite.
  bool step(std::int64_t begin, std::int64_t end, bf16* rounded) const;

 private:
  f32x16 step_vector(std::int64_t at, __mmask16 lanes) const;

  AdamBuffers at_;
  f32x16 gradient_scale_, decay_, beta1_, one_less_beta1_, beta2_, one_less_beta2_, eps_;
  f32x16 step_size_, root_scale_;
};

// Rounds weights to bf16; false where a result is not finite.
bool narrow_all(const float* from, bf16* to, std::int64_t count);

// Root of the sum of squares, in double. The order of the sum does not depend on the number of
// threads. Not finite where a value is not.
double global_norm(const float* values, std::int64_t count);

}  // namespace kernels
