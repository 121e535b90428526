#include "sampling.hpp"

#include <algorithm>
#include <vector>

#include "selection.hpp"
#include "softmax.hpp"
#include "threads.hpp"

namespace kernels {
namespace {

using softmax::Bound;
using softmax::kBlock;
using softmax::Measure;

// Rounding may carry a share of the total up to the total itself, where no interval is left.
double share_of(double total, double share) {
  return std::min(share * total, std::nextafter(total, 0.0));
}

// A row with what its draws share. Only one of a thread at a time: the memory is kept between rows.
class Row {
 public:
  Row(const float* logits, int V, float temperature)
      : logits_{logits, V, softmax::largest(logits, V),
                temperature == 0 ? 1.0f : float(1 / double(temperature))} {
    ends_.clear();
    lse_ = softmax::log_sum_exp(logits_, [this](double end) { ends_.push_back(end); });
  }

  bool is_sound() const { return std::isfinite(lse_); }
  float logprob(std::int32_t id) const { return logits_.logprob(id, lse_); }

  std::int32_t most_probable() const {
    for (int at = 0; at < logits_.V; at += kLanes) {
      const __mmask16 lanes = first_lanes(logits_.V - at);
      const __mmask16 hits = _mm512_mask_cmp_ps_mask(lanes, logits_.at(at, lanes),
                                                     splat(logits_.best), _CMP_EQ_OQ);
      if (hits != 0) return at + __builtin_ctz(hits);
    }
    return 0;
  }

  // Later draws are from what top-k and then top-p keep.
  void cut(int top_k, float top_p) {
    if (top_k > 0 && top_k < logits_.V) {
      restrict(softmax::select(logits_, bound_, Measure::kCount, top_k));
    }
    if (top_p < 1) {
      restrict(softmax::select(logits_, bound_, Measure::kMass, top_p * ends_.back()));
    }
  }

  std::int32_t draw(double uniform) const {
    const double target = share_of(ends_.back(), uniform);
    const auto end = std::upper_bound(ends_.begin(), ends_.end(), target);
    const int block = int(end - ends_.begin());
    const double start = block == 0 ? 0.0 : ends_[std::size_t(block) - 1];
    return draw_inside(block, (target - start) / (*end - start));
  }

  // The k best ids, in order.
  const std::int32_t* best_ids(int k) {
    const Bound bound =
        k < logits_.V ? softmax::select(logits_, {}, Measure::kCount, k) : Bound{};
    static thread_local std::vector<std::int32_t> ids;
    ids.clear();
    for (int at = 0; at < logits_.V; at += kLanes) {
      const __mmask16 lanes = first_lanes(logits_.V - at);
      unsigned hits = bound.holds(logits_.at(at, lanes), at, lanes);
      for (; hits != 0; hits &= hits - 1) ids.push_back(at + __builtin_ctz(hits));
    }
    const float* values = logits_.values;
    std::partial_sort(ids.begin(), ids.begin() + k, ids.end(), [values](int a, int b) {
      return values[a] != values[b] ? values[a] > values[b] : a < b;
    });
    return ids.data();
  }

 private:
  void restrict(const Bound& bound) {
    if (bound.is_whole()) return;
    bound_ = bound;
    double total = 0;
    for (int block = 0; block < int(ends_.size()); ++block) {
      total += softmax::block_sum(logits_, block * kBlock, softmax::block_end(block, logits_.V),
                                  bound_);
      ends_[std::size_t(block)] = total;
    }
  }

  // ``fraction`` of the block's mass. Summed again token by token, whose total differs in the last
  // bits from the block's fp32 sum: a fraction fits both.
  std::int32_t draw_inside(int block, double fraction) const {
    alignas(64) float weights[kBlock];
    const int begin = block * kBlock, count = softmax::block_end(block, logits_.V) - begin;
    for (int at = 0; at < count; at += kLanes) {
      const f32x16 values = logits_.at(begin + at, first_lanes(count - at));
      const __mmask16 lanes = bound_.holds(values, begin + at, first_lanes(count - at));
      store(weights + at, _mm512_maskz_mov_ps(lanes, logits_.weigh(values)));
    }
    double total = 0;
    for (int i = 0; i < count; ++i) total += weights[i];
    const double target = share_of(total, fraction);
    double end = 0;
    int id = begin;
    for (int i = 0; i < count; ++i, ++id) {
      end += weights[i];
      if (end > target) break;
    }
    return id;
  }

  softmax::Logits logits_;
  double lse_;
  Bound bound_;
  static thread_local std::vector<double> ends_;  // of the blocks, in the cumulative sum of weights
};

thread_local std::vector<double> Row::ends_;

}  // namespace

Drawn sample_row(const float* logits, int V, const Cut& cut, double uniform) {
  Row row(logits, V, cut.temperature);
  if (!row.is_sound()) return {0, NAN};
  if (cut.temperature == 0) {
    const std::int32_t token = row.most_probable();
    return {token, row.logprob(token)};
  }
  row.cut(cut.top_k, cut.top_p);
  const std::int32_t token = row.draw(uniform);
  return {token, row.logprob(token)};
}

void draw_row(const float* logits, int V, float temperature, const double* uniforms, int U,
              std::int32_t* tokens, float* logprobs) {
  const Row row(logits, V, temperature);
  for (int i = 0; i < U; ++i) {
    const bool greedy = temperature == 0 || !row.is_sound();
    tokens[i] = greedy ? row.most_probable() : row.draw(uniforms[i]);
    logprobs[i] = row.is_sound() ? row.logprob(tokens[i]) : NAN;
  }
}

void top_logprobs(const float* logits, int V, float temperature, int k, std::int32_t* ids,
                  float* logprobs) {
  Row row(logits, V, temperature);
  const std::int32_t* best = row.is_sound() ? row.best_ids(k) : nullptr;
  for (int i = 0; i < k; ++i) {
    ids[i] = best != nullptr ? best[i] : i;
    logprobs[i] = best != nullptr ? row.logprob(best[i]) : NAN;
  }
}

}  // namespace kernels

extern "C" {

// One token of each row of logits [R, ld]; parameters, tokens and logprobs are [R].
void tc_sample_rows(const float* logits, std::ptrdiff_t ld, int R, int V, const float* temperature,
                    const std::int32_t* top_k, const float* top_p, const double* uniform,
                    std::int32_t* tokens, float* logprobs) {
  kernels::parallel_for(R, [&](int row, int) {
    const kernels::Cut cut{temperature[row], top_k[row], top_p[row]};
    const kernels::Drawn drawn = kernels::sample_row(logits + row * ld, V, cut, uniform[row]);
    tokens[row] = drawn.token;
    logprobs[row] = drawn.logprob;
  });
}

// U tokens of each row, uncut; temperature [R]; uniforms, tokens and logprobs are [R, U].
void tc_draw_rows(const float* logits, std::ptrdiff_t ld, int R, int V, const float* temperature,
                  const double* uniforms, int U, std::int32_t* tokens, float* logprobs) {
  kernels::parallel_for(R, [&](int row, int) {
    const std::ptrdiff_t first = std::ptrdiff_t(row) * U;
    kernels::draw_row(logits + row * ld, V, temperature[row], uniforms + first, U, tokens + first,
                      logprobs + first);
  });
}

// The k best tokens of each row; temperature [R]; ids and logprobs are [R, k].
void tc_top_rows(const float* logits, std::ptrdiff_t ld, int R, int V, const float* temperature,
                 int k, std::int32_t* ids, float* logprobs) {
  kernels::parallel_for(R, [&](int row, int) {
    const std::ptrdiff_t first = std::ptrdiff_t(row) * k;
    kernels::top_logprobs(logits + row * ld, V, temperature[row], k, ids + first,
                          logprobs + first);
  });
}
}
