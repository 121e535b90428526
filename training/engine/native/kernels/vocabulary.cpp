#include "vocabulary.hpp"

#include <algorithm>
#include <vector>

#include "softmax.hpp"
#include "threads.hpp"

namespace kernels {
namespace {

// -sum(g) * p everywhere: right for all but the targets. ``probabilities(at, lanes)`` gives p.
template <typename F>
void fill_untargeted(const F& probabilities, float total, int V, bf16* gradient) {
  for (int at = 0; at < V; at += kLanes) {
    const __mmask16 lanes = first_lanes(V - at);
    store(gradient + at, _mm512_mul_ps(probabilities(at, lanes), splat(-total)), lanes);
  }
}

float sum_of(const float* values, int count) {
  double total = 0;
  for (int i = 0; i < count; ++i) total += values[i];
  return float(total);
}

bf16 narrow_one(float value) {
  return bf16(_mm_extract_epi16(_mm256_castsi256_si128(narrow(splat(value))), 0));
}

void set_targets(const std::int32_t* targets, const float* logprobs, const float* dlogprobs, int K,
                 float total, bf16* gradient) {
  static thread_local std::vector<int> order;  // places by target, in their order where it repeats
  order.resize(std::size_t(K));
  for (int i = 0; i < K; ++i) order[std::size_t(i)] = i;
  std::sort(order.begin(), order.end(), [&](int a, int b) {
    return targets[a] != targets[b] ? targets[a] < targets[b] : a < b;
  });
  for (std::size_t i = 0; i < order.size();) {
    const int first = order[i];
    double mine = 0;
    for (; i < order.size() && targets[order[i]] == targets[first]; ++i) mine += dlogprobs[order[i]];
    const double probability = std::exp(double(logprobs[first]));
    gradient[targets[first]] = narrow_one(float(mine - probability * total));
  }
}

}  // namespace

double log_sum_exp(const float* logits, int V) {
  return softmax::log_sum_exp({logits, V, softmax::largest(logits, V), 1.0f}, [](double) {});
}

void target_logprobs(const float* logits, const std::int32_t* targets, int K, double lse,
                     float* out) {
  const softmax::Logits row{logits, 0, 0.0f, 1.0f};
  for (int i = 0; i < K; ++i) out[i] = row.logprob(targets[i], lse);
}

void store_probabilities(const float* logits, double lse, int V, bf16* p) {
  const f32x16 shift = splat(float(lse));
  for (int at = 0; at < V; at += kLanes) {
    const __mmask16 lanes = first_lanes(V - at);
    store(p + at, exp(_mm512_sub_ps(load(logits + at, lanes), shift)), lanes);
  }
}

void head_gradient(bf16* p, int V, const std::int32_t* targets, const float* logprobs,
                   const float* dlogprobs, int K) {
  const float total = sum_of(dlogprobs, K);
  fill_untargeted([&](int at, __mmask16 lanes) { return load(p + at, lanes); }, total, V, p);
  set_targets(targets, logprobs, dlogprobs, K, total, p);
}

void head_gradient(const float* logits, double lse, int V, const std::int32_t* targets,
                   const float* logprobs, const float* dlogprobs, int K, bf16* gradient) {
  const float total = sum_of(dlogprobs, K);
  const f32x16 shift = splat(float(lse));
  const auto probabilities = [&](int at, __mmask16 lanes) {
    return exp(_mm512_sub_ps(load(logits + at, lanes), shift));
  };
  fill_untargeted(probabilities, total, V, gradient);
  set_targets(targets, logprobs, dlogprobs, K, total, gradient);
}

}  // namespace kernels

extern "C" {

using kernels::bf16;

// logprobs [R, K] of ``targets``, and lse [R]; logits [R, ld].
void tc_target_rows(const float* logits, std::ptrdiff_t ld, int R, int V,
                    const std::int32_t* targets, int K, double* lse, float* logprobs) {
  kernels::parallel_for(R, [&](int row, int) {
    const float* mine = logits + row * ld;
    const std::ptrdiff_t first = std::ptrdiff_t(row) * K;
    lse[row] = kernels::log_sum_exp(mine, V);
    kernels::target_logprobs(mine, targets + first, K, lse[row], logprobs + first);
  });
}

void tc_store_probabilities(const float* logits, double lse, int V, bf16* p) {
  kernels::store_probabilities(logits, lse, V, p);
}

void tc_head_gradient(bf16* p, int V, const std::int32_t* targets, const float* logprobs,
                      const float* dlogprobs, int K) {
  kernels::head_gradient(p, V, targets, logprobs, dlogprobs, K);
}

void tc_logits_gradient(const float* logits, double lse, int V, const std::int32_t* targets,
                        const float* logprobs, const float* dlogprobs, int K, bf16* gradient) {
  kernels::head_gradient(logits, lse, V, targets, logprobs, dlogprobs, K, gradient);
}
}
