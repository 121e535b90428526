#include "lora.hpp"

#include <algorithm>

#include "tiles.hpp"
#include "threads.hpp"

namespace kernels {
namespace {

constexpr int kItemColumns = 128;  // of an outer product: enough items for all threads

int rows_of(const Segment& segment) {
  return round_up(segment.end - segment.begin, tiles::kTileSum);
}

}  // namespace

void LoraPlan::set(const Segment* segments, int num_segments, int num_rows) {
  segments_.assign(segments, segments + num_segments);
  meetings_.clear();
  num_row_tiles_ = divide_up(num_rows, 16);
  total_rank_ = 0;
  for (int i = 0; i < num_segments; ++i) {
    const Segment& segment = segments_[i];
    if (segment.adapter == nullptr) continue;
    for (int row = segment.begin / 16 * 16; row < segment.end; row += 16) {
      const int begin = std::max(segment.begin - row, 0), end = std::min(segment.end - row, 16);
      meetings_.push_back({row / 16, i, begin, end, total_rank_});
      total_rank_ += segment.adapter->padded_rank;
    }
  }
}

bool LoraPlan::wants_gradient() const {
  return std::any_of(segments_.begin(), segments_.end(),
                     [](const Segment& segment) { return segment.gradient != nullptr; });
}

const LoraGroup* AdaptedLinear::group_of(const Segment& segment) const {
  const LoraGroup& group = segment.adapter->groups[index_];
  return group.num_parts == 0 ? nullptr : &group;
}

bf16* AdaptedLinear::tile(bf16* reduced, const Meeting& meeting) const {
  return reduced + std::ptrdiff_t(meeting.rank_offset) * 16 * kNumParts[group_];
}

// Meetings are in order of their segments, and so of their row tiles.
template <typename F>
void AdaptedLinear::gather_terms(bf16* reduced, const F& term_of) const {
  first_term_.clear();
  terms_.clear();
  for (const Meeting& meeting : plan_.meetings()) {
    const Segment& segment = plan_.segments()[meeting.segment];
    const LoraGroup* group = group_of(segment);
    if (group == nullptr) continue;
    while (int(first_term_.size()) <= meeting.row_tile) first_term_.push_back(int(terms_.size()));
    terms_.push_back(term_of(meeting, *group, *segment.adapter, tile(reduced, meeting)));
  }
  while (int(first_term_.size()) <= plan_.num_row_tiles()) {
    first_term_.push_back(int(terms_.size()));
  }
}

void AdaptedLinear::reduce(const bf16* x, std::ptrdiff_t ldx, bf16* z) const {
  const std::vector<Meeting>& meetings = plan_.meetings();
  parallel_for(int(meetings.size()), [&](int item, int) {
    const Meeting& meeting = meetings[item];
    const Segment& segment = plan_.segments()[meeting.segment];
    const LoraGroup* group = group_of(segment);
    if (group == nullptr) return;
    const int rank = segment.adapter->padded_rank * group->num_parts;
    reduce_tile(x + meeting.row_tile * 16 * ldx, ldx, linear_.in, group->a, rank,
                segment.adapter->scale, meeting.begin, meeting.end, tile(z, meeting), rank);
  });
}

void AdaptedLinear::forward(const bf16* x, std::ptrdiff_t ldx, int num_rows, bf16* z, Output output,
                            void* y, std::ptrdiff_t ldy, const bf16* addend) const {
  gather_terms(z, [](const Meeting&, const LoraGroup& group, const Adapter& adapter,
                     const bf16* reduced) {
    LowRank term{reduced, group.b, adapter.padded_rank, group.num_parts, {}};
    std::copy(group.part_end, group.part_end + 3, term.part_end);
    return term;
  });
  if (!terms_.empty()) reduce(x, ldx, z);
  multiply({.x = x,
            .ldx = ldx,
            .rows = num_rows,
            .in = linear_.in,
            .out = linear_.out,
            .w = linear_.w,
            .bias = linear_.bias,
            .first_low_rank = terms_.empty() ? nullptr : first_term_.data(),
            .low_ranks = terms_.data(),
            .output = output,
            .y = y,
            .ldy = ldy,
            .addend = addend});
}

namespace {

constexpr int kTransposedItem = 1 << 16;  // elements that one thread transposes at a time

// Some matrices to transpose, cut into items for all threads.
class Transposer {
 public:
  // Room for ``matrix`` transposed, filled by ``run``.
  Packed add(const PackedMatrix& matrix, Workspace& workspace) {
    bf16* made = workspace.take<bf16>(packed_elements(matrix.in, matrix.out));
    const int outs = std::max(kTransposedItem / matrix.in / 32 * 32, 32);
    for (int out = 0; out < matrix.out; out += outs) {
      items_.push_back({matrix, {out, std::min(out + outs, matrix.out)}, made});
    }
    return made;
  }

  void run() const {
    parallel_for(int(items_.size()), [&](int index, int) {
      const Item& item = items_[index];
      transpose_packed(item.matrix, {0, item.matrix.in}, item.out, item.made);
    });
  }

 private:
  struct Item {
    PackedMatrix matrix;
    Range out;
    bf16* made;
  };
  std::vector<Item> items_;
};

}  // namespace

// What a backward pass multiplies by is made from the tiles of the forward pass each time: keeping
// it would double the memory of model and adapters, and the time to pack an adapter after a step.
AdaptedLinear::Transposed AdaptedLinear::transposed(bool with_dx, Workspace& workspace) const {
  Transposer transposer;
  Transposed made{nullptr, std::vector<Packed>(plan_.segments().size()),
                  std::vector<Packed>(plan_.segments().size() * kMaxParts)};
  if (with_dx) {
    made.w = linear_.w_t != nullptr
                 ? linear_.w_t
                 : transposer.add({linear_.w, linear_.out, linear_.in}, workspace);
  }
  for (std::size_t i = 0; i < plan_.segments().size(); ++i) {
    const Segment& segment = plan_.segments()[i];
    const LoraGroup* group = segment.adapter == nullptr ? nullptr : group_of(segment);
    if (group == nullptr) continue;
    const int rank = segment.adapter->padded_rank;
    if (with_dx) {
      made.a[i] = transposer.add({group->a, group->num_parts * rank, linear_.in}, workspace);
    }
    for (int part = 0, begin = 0; part < group->num_parts; ++part) {
      const int end = group->part_end[part];
      made.b[i * kMaxParts + part] = transposer.add(
          {group->b + packed_elements(1, rank) * (begin / 16), end - begin, rank}, workspace);
      begin = end;
    }
  }
  transposer.run();
  return made;
}

void AdaptedLinear::backward(const bf16* dy, std::ptrdiff_t lddy, int num_rows, bf16* dz, bf16* dx,
                             Workspace& workspace) const {
  const int in = linear_.in;
  const Workspace::Mark mark = workspace.mark();
  const Transposed with = transposed(dx != nullptr, workspace);
  gather_terms(dz, [&](const Meeting& meeting, const LoraGroup& group, const Adapter& adapter,
                       const bf16* reduced) {
    return LowRank{reduced, with.a[meeting.segment], adapter.padded_rank * group.num_parts, 1,
                   {in, in, in}};
  });
  const std::vector<Meeting>& meetings = plan_.meetings();
  parallel_for(terms_.empty() ? 0 : int(meetings.size()), [&](int item, int) {
    const Meeting& meeting = meetings[item];
    const Segment& segment = plan_.segments()[meeting.segment];
    const LoraGroup* group = group_of(segment);
    if (group == nullptr) return;
    const int rank = segment.adapter->padded_rank;
    for (int part = 0, begin = 0; part < group->num_parts; ++part) {
      const int end = group->part_end[part];
      reduce_tile(dy + meeting.row_tile * 16 * lddy + begin, lddy, round_up(end - begin, 32),
                  with.b[meeting.segment * kMaxParts + part], rank, segment.adapter->scale,
                  meeting.begin, meeting.end, tile(dz, meeting) + part * rank,
                  std::ptrdiff_t(rank) * group->num_parts);
      begin = end;
    }
  });
  if (dx != nullptr) {
    multiply({.x = dy,
              .ldx = lddy,
              .rows = num_rows,
              .in = round_up(linear_.out, tiles::kTileSum),
              .out = in,
              .w = with.w,
              .bias = nullptr,
              .first_low_rank = terms_.empty() ? nullptr : first_term_.data(),
              .low_ranks = terms_.data(),
              .output = Output::kBf16,
              .y = dx,
              .ldy = in,
              .addend = nullptr});
  }
  workspace.reset(mark);
}

namespace {

// One piece of the work on gradients: some columns of dA, or of the dB of one part.
struct Piece {
  const Segment* segment;
  const LoraGroup* group;
  const bf16 *z_t, *dz_t;
  int part;  // -1: dA
  int begin, end;
};

}  // namespace

void AdaptedLinear::add_gradients(const bf16* x, std::ptrdiff_t ldx, const bf16* dy,
                                  std::ptrdiff_t lddy, const bf16* z, const bf16* dz,
                                  Workspace& workspace) const {
  const Workspace::Mark mark = workspace.mark();
  std::vector<std::pair<bf16*, bf16*>> transposed(plan_.segments().size());
  std::vector<Piece> pieces;
  for (std::size_t i = 0; i < plan_.segments().size(); ++i) {
    const Segment& segment = plan_.segments()[i];
    if (segment.adapter == nullptr || segment.gradient == nullptr) continue;
    const LoraGroup* group = group_of(segment);
    if (group == nullptr) continue;
    const std::size_t count = std::size_t(segment.adapter->padded_rank) * group->num_parts *
                              rows_of(segment);
    transposed[i] = {workspace.take<bf16>(count), workspace.take<bf16>(count)};
    auto cut = [&](int part, int begin, int end) {
      for (; begin < end; begin += kItemColumns) {
        pieces.push_back({&segment, group, transposed[i].first, transposed[i].second, part, begin,
                          std::min(begin + kItemColumns, end)});
      }
    };
    cut(-1, 0, linear_.in);
    for (int part = 0; part < group->num_parts; ++part) {
      cut(part, part == 0 ? 0 : group->part_end[part - 1], group->part_end[part]);
    }
  }
  const std::vector<Meeting>& meetings = plan_.meetings();
  parallel_for(int(meetings.size()), [&](int item, int) {
    const Meeting& meeting = meetings[item];
    const Segment& segment = plan_.segments()[meeting.segment];
    auto [z_t, dz_t] = transposed[meeting.segment];
    if (z_t == nullptr) return;
    const int rank = segment.adapter->padded_rank * kNumParts[group_], rows = rows_of(segment);
    const int place = meeting.row_tile * 16 - segment.begin;
    transpose(tile(const_cast<bf16*>(z), meeting), rank, 16, rank, z_t + place, rows);
    transpose(tile(const_cast<bf16*>(dz), meeting), rank, 16, rank, dz_t + place, rows);
    if (place + 16 < rows && segment.end - segment.begin <= place + 16) {
      // The sum runs in steps of 32 rows: the tile after the last one is nobody's.
      for (int r = 0; r < rank; ++r) {
        std::memset(z_t + std::ptrdiff_t(r) * rows + place + 16, 0, 32);
        std::memset(dz_t + std::ptrdiff_t(r) * rows + place + 16, 0, 32);
      }
    }
  });
  parallel_for(int(pieces.size()), [&](int item, int) {
    const Piece& piece = pieces[item];
    const Segment& segment = *piece.segment;
    const int rank = segment.adapter->rank, padded = segment.adapter->padded_rank;
    const int rows = rows_of(segment), num_parts = piece.group->num_parts;
    float* da = segment.gradient + piece.group->gradient;
    OuterProduct product{.left_t = piece.dz_t,
                         .num_left = rank,
                         .num_parts = num_parts,
                         .left_stride = padded,
                         .out_stride = std::ptrdiff_t(rank) * linear_.in,
                         .right = x + segment.begin * ldx + piece.begin,
                         .ldright = ldx,
                         .num_right = piece.end - piece.begin,
                         .rows = rows,
                         .out = da + piece.begin,
                         .ldout = linear_.in,
                         .transposed = false,
                         .accumulate = segment.accumulate != 0};
    if (piece.part >= 0) {
      product.left_t = piece.z_t + std::ptrdiff_t(piece.part) * padded * rows;
      product.num_parts = 1;
      product.right = dy + segment.begin * lddy + piece.begin;
      product.ldright = lddy;
      product.out = da + std::ptrdiff_t(num_parts) * rank * linear_.in +
                    std::ptrdiff_t(piece.begin) * rank;
      product.ldout = rank;
      product.transposed = true;
    }
    add_outer_product(product);
  });
  workspace.reset(mark);
}

}  // namespace kernels
