#include "adam.hpp"

#include <cmath>
#include <vector>

#include "threads.hpp"

namespace kernels {
namespace {

constexpr std::int64_t kBlock = 1 << 15;  // 128 KiB of each buffer

// f(begin, end) for the blocks of [0, count), on all threads.
template <typename F>
void for_blocks(std::int64_t count, const F& f) {
  parallel_for(int((count + kBlock - 1) / kBlock), [&](int block, int) {
    const std::int64_t begin = block * kBlock;
    f(block, begin, begin + kBlock < count ? begin + kBlock : count);
  });
}

// What is the same for all elements, as torch's fused kernel rounds it to fp32.
struct Factors {
  explicit Factors(const AdamStep& params)
      : gradient_scale(splat(float(params.gradient_scale))),
        decay(splat(float(1 - params.learning_rate * params.weight_decay))),
        beta1(splat(float(params.beta1))),
        one_less_beta1(splat(float(1 - params.beta1))),
        beta2(splat(float(params.beta2))),
        one_less_beta2(splat(float(1 - params.beta2))),
        eps(splat(float(params.eps))) {
    const double steps = double(params.step);
    const double correction1 = 1 - std::pow(params.beta1, steps);
    const double correction2 = 1 - std::pow(params.beta2, steps);
    step_size = splat(float(params.learning_rate / correction1));
    root_scale = splat(float(1 / std::sqrt(correction2)));
  }

  f32x16 gradient_scale, decay, beta1, one_less_beta1, beta2, one_less_beta2, eps;
  f32x16 step_size, root_scale;
};

struct Buffers {
  float *weights, *exp_avg, *exp_avg_sq;
  const float* gradient;
};

inline void step_vector(const Buffers& at, std::int64_t i, __mmask16 lanes, const Factors& with) {
  const f32x16 gradient = _mm512_mul_ps(load(at.gradient + i, lanes), with.gradient_scale);
  const f32x16 new_part = _mm512_mul_ps(gradient, with.one_less_beta1);
  const f32x16 avg = _mm512_fmadd_ps(load(at.exp_avg + i, lanes), with.beta1, new_part);
  const f32x16 squared = _mm512_mul_ps(_mm512_mul_ps(gradient, gradient), with.one_less_beta2);
  const f32x16 avg_sq = _mm512_fmadd_ps(load(at.exp_avg_sq + i, lanes), with.beta2, squared);
  const f32x16 bottom = _mm512_fmadd_ps(_mm512_sqrt_ps(avg_sq), with.root_scale, with.eps);
  const f32x16 change = _mm512_div_ps(_mm512_mul_ps(avg, with.step_size), bottom);
  const f32x16 weight = _mm512_fmsub_ps(load(at.weights + i, lanes), with.decay, change);
  store(at.exp_avg + i, avg, lanes);
  store(at.exp_avg_sq + i, avg_sq, lanes);
  store(at.weights + i, weight, lanes);
}

double sum_of_squares(const float* values, std::int64_t begin, std::int64_t end) {
  __m512d sums[4];
  for (__m512d& each : sums) each = _mm512_setzero_pd();
  std::int64_t i = begin;
  for (; i + 32 <= end; i += 32) {
    for (int part = 0; part < 4; ++part) {
      const __m512d wide = _mm512_cvtps_pd(_mm256_loadu_ps(values + i + part * 8));
      sums[part] = _mm512_fmadd_pd(wide, wide, sums[part]);
    }
  }
  double rest = 0;
  for (; i < end; ++i) rest += double(values[i]) * values[i];
  const __m512d left = _mm512_add_pd(sums[0], sums[1]), right = _mm512_add_pd(sums[2], sums[3]);
  return _mm512_reduce_add_pd(_mm512_add_pd(left, right)) + rest;
}

}  // namespace

void adamw_step(float* weights, float* exp_avg, float* exp_avg_sq, const float* gradient,
                std::int64_t count, const AdamStep& params) {
  const Buffers buffers{weights, exp_avg, exp_avg_sq, gradient};
  const Factors factors(params);
  for_blocks(count, [&](int, std::int64_t begin, std::int64_t end) {
    std::int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) step_vector(buffers, i, 0xffff, factors);
    if (i < end) step_vector(buffers, i, first_lanes(int(end - i)), factors);
  });
}

double global_norm(const float* values, std::int64_t count) {
  std::vector<double> squares(std::size_t((count + kBlock - 1) / kBlock));
  for_blocks(count, [&](int block, std::int64_t begin, std::int64_t end) {
    squares[std::size_t(block)] = sum_of_squares(values, begin, end);
  });
  double total = 0;
  for (double each : squares) total += each;
  return std::sqrt(total);
}

}  // namespace kernels

extern "C" {

void tc_adamw_step(float* weights, float* exp_avg, float* exp_avg_sq, const float* gradient,
                   std::int64_t count, std::int64_t step, double learning_rate, double beta1,
                   double beta2, double eps, double weight_decay, double gradient_scale) {
  kernels::adamw_step(weights, exp_avg, exp_avg_sq, gradient, count,
                      {step, learning_rate, beta1, beta2, eps, weight_decay, gradient_scale});
}

double tc_global_norm(const float* values, std::int64_t count) {
  return kernels::global_norm(values, count);
}
}
