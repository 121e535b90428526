// LoRA products of a batch: which adapters meet which row tiles, and the passes through a linear
// with them, forward and backward.
#pragma once

#include <vector>

#include "model.hpp"
#include "workspace.hpp"

namespace kernels {

// Rows [begin, end) of a 16-row tile belong to ``segment``.
struct Meeting {
  int row_tile;
  int segment;
  int begin, end;
  int rank_offset;  // padded ranks of the meetings before
};

class LoraPlan {
 public:
  void set(const Segment* segments, int num_segments, int num_rows);

  // Elements that the reduced rows of a group take: [meeting][16][parts * rank].
  std::size_t reduced_elements(int num_parts) const { return 16ull * total_rank_ * num_parts; }

  const std::vector<Meeting>& meetings() const { return meetings_; }
  const std::vector<Segment>& segments() const { return segments_; }
  int num_row_tiles() const { return num_row_tiles_; }
  bool wants_gradient() const;

 private:
  std::vector<Segment> segments_;
  std::vector<Meeting> meetings_;
  int num_row_tiles_ = 0;
  int total_rank_ = 0;
};

inline constexpr int kMaxParts = 3;
inline constexpr int kNumParts[] = {3, 1, 2, 1, 1};  // by Group

// One linear of the model with what the segments' adapters add to it.
class AdaptedLinear {
 public:
  // ``index`` is the place of the group in Adapter::groups.
  AdaptedLinear(const LoraPlan& plan, const Linear& linear, Group group, int index)
      : plan_(plan), linear_(linear), group_(group), index_(index) {}

  // z = scale * x A^T of every meeting (LoraPlan::reduced_elements).
  void reduce(const bf16* x, std::ptrdiff_t ldx, bf16* z) const;

  // y = x W^T + bias + LoRA; leaves the reduced rows in ``z``.
  void forward(const bf16* x, std::ptrdiff_t ldx, int num_rows, bf16* z, Output output, void* y,
               std::ptrdiff_t ldy, const bf16* addend) const;

  // dx [num_rows, in] = dy W + LoRA (skipped where null); leaves scale * dy B in ``dz``.
  void backward(const bf16* dy, std::ptrdiff_t lddy, int num_rows, bf16* dz, bf16* dx,
                Workspace& workspace) const;

  // Adds dA = dz^T x and dB = dy^T z to the segments' gradients.
  void add_gradients(const bf16* x, std::ptrdiff_t ldx, const bf16* dy, std::ptrdiff_t lddy,
                     const bf16* z, const bf16* dz, Workspace& workspace) const;

 private:
  // What a backward pass multiplies by: W^T, of each segment A^T [in, parts * rank], and of each of
  // its parts B^T [rank, out of the part]. The first two are null unless ``with_dx``.
  struct Transposed {
    Packed w;
    std::vector<Packed> a, b;
  };
  Transposed transposed(bool with_dx, Workspace& workspace) const;

  const LoraGroup* group_of(const Segment& segment) const;
  bf16* tile(bf16* reduced, const Meeting& meeting) const;
  template <typename F>
  void gather_terms(bf16* reduced, const F& term_of) const;

  const LoraPlan& plan_;
  const Linear& linear_;
  Group group_;
  int index_;
  mutable std::vector<int> first_term_;
  mutable std::vector<LowRank> terms_;
};

}  // namespace kernels
