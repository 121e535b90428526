#include "head.hpp"

#include <algorithm>

#include "lora.hpp"
#include "threads.hpp"
#include "vocabulary.hpp"

namespace kernels {
namespace {

// Some rows of one segment at work: gathered, so that they lie side by side with room after them.
class Block {
 public:
  Block(const Model& model, const Segment& segment, int num_rows, Workspace& workspace)
      : model_(model),
        num_rows_(num_rows),
        padded_rows_(round_up(num_rows, 32)),
        linear_(plan_, model.head, kUnembed, model.num_layers * kGroups) {
    Segment own = segment;
    own.begin = 0;
    own.end = num_rows;
    plan_.set(&own, 1, num_rows);
    x_ = workspace.take<bf16>(std::size_t(padded_rows_) * model.hidden);
    z_ = workspace.take<bf16>(plan_.reduced_elements(1));
    std::memset(row(num_rows), 0,
                std::size_t(padded_rows_ - num_rows) * model.hidden * sizeof(bf16));
  }

  bf16* row(int index) { return x_ + std::ptrdiff_t(index) * model_.hidden; }

  void set_row(int index, const bf16* hidden) {
    std::memcpy(row(index), hidden, model_.hidden * sizeof(bf16));
  }

  void logits(float* to) {
    linear_.forward(x_, model_.hidden, num_rows_, z_, Output::kFloat, to, model_.vocab, nullptr);
  }

  // ``gradient`` [padded rows, kept_stride] of the logits; returns dx [num_rows, H].
  bf16* backward(bf16* gradient, Workspace& workspace) {
    const std::ptrdiff_t stride = kept_stride(model_.vocab);
    std::memset(gradient + num_rows_ * stride, 0,
                std::size_t(padded_rows_ - num_rows_) * stride * sizeof(bf16));
    bf16* dz = workspace.take<bf16>(plan_.reduced_elements(1));
    bf16* dx = workspace.take<bf16>(std::size_t(padded_rows_) * model_.hidden);
    linear_.backward(gradient, stride, num_rows_, dz, dx, workspace);
    if (plan_.wants_gradient()) {
      linear_.reduce(x_, model_.hidden, z_);
      linear_.add_gradients(x_, model_.hidden, gradient, stride, z_, dz, workspace);
    }
    return dx;
  }

 private:
  const Model& model_;
  int num_rows_, padded_rows_;
  LoraPlan plan_;
  AdaptedLinear linear_;
  bf16* x_;
  bf16* z_;
};

}  // namespace

// Whole tiles, and one line more: rows that lie a multiple of 4 KiB apart would fight for one set
// of the first cache.
std::ptrdiff_t kept_stride(int vocab) { return round_up(vocab, 32) + 32; }

void head_logits(const Model& model, const bf16* hidden, int num_rows, const Segment* segments,
                 int num_segments, Workspace& workspace, float* logits) {
  const Workspace::Mark mark = workspace.mark();
  LoraPlan plan;
  plan.set(segments, num_segments, num_rows);
  const AdaptedLinear linear(plan, model.head, kUnembed, model.num_layers * kGroups);
  bf16* x = workspace.take<bf16>(std::size_t(round_up(num_rows, 16)) * model.hidden);
  std::memcpy(x, hidden, std::size_t(num_rows) * model.hidden * sizeof(bf16));
  bf16* z = workspace.take<bf16>(plan.reduced_elements(1));
  linear.forward(x, model.hidden, num_rows, z, Output::kFloat, logits, model.vocab, nullptr);
  workspace.reset(mark);
}

void head_forward(const Model& model, const HeadRows& rows, Workspace& workspace) {
  const Workspace::Mark mark = workspace.mark();
  const int K = rows.num_targets, V = model.vocab;
  for (int begin = 0; begin < rows.num_rows; begin += kHeadRows) {
    const int count = std::min(kHeadRows, rows.num_rows - begin);
    Block block(model, rows.segment, count, workspace);
    for (int i = 0; i < count; ++i) {
      block.set_row(i, rows.hidden + std::ptrdiff_t(begin + i) * model.hidden);
    }
    float* logits = workspace.take<float>(std::size_t(count) * V);
    block.logits(logits);
    parallel_for(count, [&](int i, int) {
      const std::ptrdiff_t row = begin + i;
      const float* mine = logits + std::ptrdiff_t(i) * V;
      rows.lse[row] = log_sum_exp(mine, V);
      target_logprobs(mine, rows.targets + row * K, K, rows.lse[row], rows.logprobs + row * K);
      if (rows.kept != nullptr) {
        store_probabilities(mine, rows.lse[row], V, rows.kept + row * kept_stride(V));
      }
    });
    workspace.reset(mark);
  }
}

void head_backward(const Model& model, const HeadRows& rows, const float* dlogprobs,
                   const std::int32_t* used, int num_used, Workspace& workspace, bf16* d_hidden) {
  const Workspace::Mark mark = workspace.mark();
  const int K = rows.num_targets, V = model.vocab;
  const std::ptrdiff_t stride = kept_stride(V);
  Segment segment = rows.segment;
  for (int begin = 0; begin < num_used; begin += kHeadRows) {
    const int count = std::min(kHeadRows, num_used - begin);
    Block block(model, segment, count, workspace);
    for (int i = 0; i < count; ++i) {
      block.set_row(i, rows.hidden + std::ptrdiff_t(used[begin + i]) * model.hidden);
    }
    float* logits = nullptr;
    if (rows.kept == nullptr) {
      logits = workspace.take<float>(std::size_t(count) * V);
      block.logits(logits);
    }
    bf16* gradient = workspace.take<bf16>(std::size_t(round_up(count, 32)) * stride);
    parallel_for(count, [&](int i, int) {
      const std::ptrdiff_t row = used[begin + i];
      const std::int32_t* targets = rows.targets + row * K;
      const float *logprobs = rows.logprobs + row * K, *derivatives = dlogprobs + row * K;
      bf16* mine = gradient + i * stride;
      if (rows.kept != nullptr) {
        std::memcpy(mine, rows.kept + row * stride, V * sizeof(bf16));
        head_gradient(mine, V, targets, logprobs, derivatives, K);
      } else {
        head_gradient(logits + std::ptrdiff_t(i) * V, rows.lse[row], V, targets, logprobs,
                      derivatives, K, mine);
      }
      std::memset(mine + V, 0, (stride - V) * sizeof(bf16));
    });
    const bf16* dx = block.backward(gradient, workspace);
    for (int i = 0; i < count; ++i) {
      std::memcpy(d_hidden + std::ptrdiff_t(used[begin + i]) * model.hidden,
                  dx + std::ptrdiff_t(i) * model.hidden, model.hidden * sizeof(bf16));
    }
    segment.accumulate = 1;
    workspace.reset(mark);
  }
}

}  // namespace kernels
