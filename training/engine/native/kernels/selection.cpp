#include "selection.hpp"

#include <algorithm>
#include <cfloat>
#include <vector>

namespace kernels::softmax {
namespace {

// How far behind the best token, in logprobs, the cut is looked for; further only if the tokens so
// far do not suffice. A language model's cuts mostly fall early, among few tokens. The depths decide
// how long a search takes, not what it finds, but for the last: e^-104 is zero in fp32.
constexpr float kDepths[] = {3, 6, 12, 103};
constexpr std::size_t kFew = 256;  // sorting so many is as fast as halving once more

struct Candidate {
  float value, weight;
  std::int32_t id;

  bool operator<(const Candidate& other) const {  // better ones first
    return value != other.value ? value > other.value : id < other.id;
  }
};

inline __m512d add_wide(__m512d total, f32x16 values) {
  const __m256 upper = _mm512_extractf32x8_ps(values, 1);
  total = _mm512_add_pd(total, _mm512_cvtps_pd(_mm512_castps512_ps256(values)));
  return _mm512_add_pd(total, _mm512_cvtps_pd(upper));
}

// The tokens that the cut may fall among, in order of ids; all better ones are kept.
class Contest {
 public:
  // Those inside ``inside`` with low < logit <= high; returns their measure.
  double gather(const Logits& row, const Bound& inside, Measure measure, float low, float high) {
    // A whole vector is written wherever one token is.
    const std::size_t room = std::size_t(row.V) + kLanes;
    for (auto* each : {&values_, &weights_}) each->resize(room);
    ids_.resize(room);
    count_ = 0;
    const __m512i steps = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512d total = _mm512_setzero_pd();
    for (int at = 0; at < row.V; at += kLanes) {
      const __mmask16 all = first_lanes(row.V - at);
      const f32x16 values = row.at(at, all);
      __mmask16 lanes = _mm512_mask_cmp_ps_mask(all, values, splat(low), _CMP_GT_OQ);
      lanes = _mm512_mask_cmp_ps_mask(lanes, values, splat(high), _CMP_LE_OQ);
      if (lanes == 0 || (lanes = inside.holds(values, at, lanes)) == 0) continue;
      const f32x16 measures = measure == Measure::kCount ? splat(1) : row.weigh(values);
      const f32x16 weights = _mm512_maskz_mov_ps(lanes, measures);
      total = add_wide(total, weights);
      put(lanes, values, weights, _mm512_add_epi32(_mm512_set1_epi32(at), steps));
    }
    return _mm512_reduce_add_pd(total);
  }

  // Halves until few or only equal ones are left, then goes through them in order. ``before``:
  // the measure of all better tokens.
  Bound find(double before, double amount) {
    measure_range();
    while (count_ > kFew && low_ < high_) {
      float middle = 0.5f * low_ + 0.5f * high_;
      if (!(middle >= low_ && middle < high_)) middle = low_;
      const double upper = measure_above(middle);
      const bool falls_above = before + upper >= amount;
      if (!falls_above) before += upper;
      keep(middle, falls_above);
      measure_range();
    }
    std::vector<Candidate>& few = sorted_;
    few.clear();
    for (std::size_t i = 0; i < count_; ++i) few.push_back({values_[i], weights_[i], ids_[i]});
    if (low_ < high_) std::sort(few.begin(), few.end());
    std::size_t last = 0;
    for (; last + 1 < few.size(); ++last) {
      before += few[last].weight;
      if (before >= amount) break;
    }
    return {few[last].value, few[last].id};
  }

 private:
  __mmask16 lanes_at(std::size_t at) const { return first_lanes(int(count_ - at)); }

  void put(__mmask16 lanes, f32x16 values, f32x16 weights, __m512i ids) {
    store(&values_[count_], _mm512_maskz_compress_ps(lanes, values));
    store(&weights_[count_], _mm512_maskz_compress_ps(lanes, weights));
    _mm512_storeu_si512(&ids_[count_], _mm512_maskz_compress_epi32(lanes, ids));
    count_ += std::size_t(__builtin_popcount(lanes));
  }

  void measure_range() {
    f32x16 low = splat(FLT_MAX), high = splat(-FLT_MAX);
    for (std::size_t at = 0; at < count_; at += kLanes) {
      const f32x16 values = load(&values_[at], lanes_at(at));
      low = _mm512_mask_min_ps(low, lanes_at(at), low, values);
      high = _mm512_mask_max_ps(high, lanes_at(at), high, values);
    }
    low_ = _mm512_reduce_min_ps(low);
    high_ = max(high);
  }

  double measure_above(float middle) const {
    __m512d total = _mm512_setzero_pd();
    for (std::size_t at = 0; at < count_; at += kLanes) {
      const f32x16 values = load(&values_[at], lanes_at(at));
      const __mmask16 above =
          _mm512_mask_cmp_ps_mask(lanes_at(at), values, splat(middle), _CMP_GT_OQ);
      total = add_wide(total, load(&weights_[at], above));
    }
    return _mm512_reduce_add_pd(total);
  }

  // In place: what is written never lies behind what was read.
  void keep(float middle, bool above) {
    const std::size_t count = count_;
    count_ = 0;
    for (std::size_t at = 0; at < count; at += kLanes) {
      const __mmask16 all = first_lanes(int(count - at));
      const f32x16 values = load(&values_[at], all), weights = load(&weights_[at], all);
      const __m512i ids = _mm512_maskz_loadu_epi32(all, &ids_[at]);
      const __mmask16 upper = _mm512_mask_cmp_ps_mask(all, values, splat(middle), _CMP_GT_OQ);
      put(above ? upper : __mmask16(all & ~upper), values, weights, ids);
    }
  }

  std::vector<float> values_, weights_;
  std::vector<std::int32_t> ids_;
  std::vector<Candidate> sorted_;
  std::size_t count_ = 0;
  float low_ = 0, high_ = 0;
};

}  // namespace

Bound select(const Logits& row, const Bound& inside, Measure measure, double amount) {
  static thread_local Contest contest;  // a decode step would else allocate for every row
  float high = row.best;
  double before = 0;
  for (float depth : kDepths) {
    const float low = std::max(row.best - depth / row.scale, -FLT_MAX);
    const double found = contest.gather(row, inside, measure, low, high);
    if (found > 0 && before + found >= amount) return contest.find(before, amount);
    before += found;
    high = low;
  }
  return inside;
}

}  // namespace kernels::softmax
