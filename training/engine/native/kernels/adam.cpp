#include "adam.hpp"

#include <algorithm>
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

// Lanes whose value in bf16 is infinite or NaN: not below infinity.
inline __mmask16 store_rounded(bf16* to, f32x16 values, __mmask16 lanes) {
  const f32x16 rounded = widen(narrow(values));
  store(to, rounded, lanes);
  return _mm512_mask_cmp_ps_mask(lanes, _mm512_abs_ps(rounded), splat(__builtin_inff()),
                                 _CMP_NLT_UQ);
}

}  // namespace

// Factors are rounded to fp32 as torch's fused kernel rounds them.
AdamW::AdamW(const AdamBuffers& buffers, const AdamStep& params)
    : at_(buffers),
      gradient_scale_(splat(float(params.gradient_scale))),
      decay_(splat(float(1 - params.learning_rate * params.weight_decay))),
      beta1_(splat(float(params.beta1))),
      one_less_beta1_(splat(float(1 - params.beta1))),
      beta2_(splat(float(params.beta2))),
      one_less_beta2_(splat(float(1 - params.beta2))),
      eps_(splat(float(params.eps))) {
  const double steps = double(params.step);
  step_size_ = splat(float(params.learning_rate / (1 - std::pow(params.beta1, steps))));
  root_scale_ = splat(float(1 / std::sqrt(1 - std::pow(params.beta2, steps))));
}

inline f32x16 AdamW::step_vector(std::int64_t i, __mmask16 lanes) const {
  const f32x16 gradient = _mm512_mul_ps(load(at_.gradient + i, lanes), gradient_scale_);
  const f32x16 new_part = _mm512_mul_ps(gradient, one_less_beta1_);
  const f32x16 avg = _mm512_fmadd_ps(load(at_.exp_avg + i, lanes), beta1_, new_part);
  const f32x16 squared = _mm512_mul_ps(_mm512_mul_ps(gradient, gradient), one_less_beta2_);
  const f32x16 avg_sq = _mm512_fmadd_ps(load(at_.exp_avg_sq + i, lanes), beta2_, squared);
  const f32x16 bottom = _mm512_fmadd_ps(_mm512_sqrt_ps(avg_sq), root_scale_, eps_);
  const f32x16 change = _mm512_div_ps(_mm512_mul_ps(avg, step_size_), bottom);
  const f32x16 weight = _mm512_fmsub_ps(load(at_.weights + i, lanes), decay_, change);
  store(at_.exp_avg + i, avg, lanes);
  store(at_.exp_avg_sq + i, avg_sq, lanes);
  store(at_.weights + i, weight, lanes);
  return weight;
}

void AdamW::step(std::int64_t begin, std::int64_t end) const {
  std::int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) step_vector(i, 0xffff);
  if (i < end) step_vector(i, first_lanes(int(end - i)));
}

bool AdamW::step(std::int64_t begin, std::int64_t end, bf16* rounded) const {
  __mmask16 bad = 0;
  for (std::int64_t i = begin; i < end; i += kLanes) {
    const __mmask16 lanes = first_lanes(int(std::min<std::int64_t>(end - i, kLanes)));
    bad |= store_rounded(rounded + (i - begin), step_vector(i, lanes), lanes);
  }
  return bad == 0;
}

bool narrow_all(const float* from, bf16* to, std::int64_t count) {
  __mmask16 bad = 0;
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 lanes = first_lanes(int(std::min<std::int64_t>(count - i, kLanes)));
    bad |= store_rounded(to + i, load(from + i, lanes), lanes);
  }
  return bad == 0;
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
                   std::int64_t count, const kernels::AdamStep* params) {
  const kernels::AdamW adam({weights, exp_avg, exp_avg_sq, gradient}, *params);
  kernels::for_blocks(count, [&](int, std::int64_t begin, std::int64_t end) {
    adam.step(begin, end);
  });
}

double tc_global_norm(const float* values, std::int64_t count) {
  return kernels::global_norm(values, count);
}
}
