// An adapter's weights in the tiles that passes multiply with: packed from the fp32 masters, after
// a step of AdamW or as they are.

#include <algorithm>
#include <atomic>
#include <vector>

#include "adam.hpp"
#include "model.hpp"
#include "threads.hpp"

namespace {

using namespace kernels;

enum Status { kOk = 0, kNotFinite = 2 };  // as in api.cpp

constexpr int kPieceElements = 1 << 16;  // rounded weights that stay in a core's second cache

struct AdapterShape {
  int rank, padded_rank;
};

// What one thread packs at a time: the A of one part, or rows of its B.
struct Piece {
  LoraGroup* group;
  int in;
  int part;
  int row_begin, row_end;  // of the part's B, multiples of 16; -1: A
};

bf16* writable(Packed packed) { return const_cast<bf16*>(packed); }

int part_begin(const LoraGroup& group, int part) { return part ? group.part_end[part - 1] : 0; }

std::vector<Piece> pieces_of(LoraGroup* groups, const std::int32_t* inputs, int num_groups,
                             AdapterShape shape) {
  std::vector<Piece> pieces;
  const int most_rows = std::max(kPieceElements / shape.rank / 32 * 32, 32);
  for (int index = 0; index < num_groups; ++index) {
    LoraGroup& group = groups[index];
    for (int part = 0; part < group.num_parts; ++part) {
      pieces.push_back({&group, inputs[index], part, -1, -1});
      const int rows = group.part_end[part] - part_begin(group, part);
      for (int row = 0; row < rows; row += most_rows) {
        pieces.push_back({&group, inputs[index], part, row, std::min(row + most_rows, rows)});
      }
    }
  }
  return pieces;
}

// Elements [first, first + count) of the flat weights belong to a piece.
struct Elements {
  std::int64_t first, count;
};

Elements elements_of(const Piece& piece, AdapterShape shape) {
  const std::int64_t rank = shape.rank, a_count = rank * piece.in;
  const LoraGroup& group = *piece.group;
  if (piece.row_begin < 0) return {group.gradient + piece.part * a_count, a_count};
  const std::int64_t row = part_begin(group, piece.part) + piece.row_begin;
  return {group.gradient + group.num_parts * a_count + row * rank,
          (piece.row_end - piece.row_begin) * rank};
}

// ``a`` [rank, in] of one part, whose ranks are padded on their own.
void pack_a(const bf16* a, const Piece& piece, AdapterShape shape) {
  const auto [rank, padded] = shape;
  const LoraGroup& group = *piece.group;
  pack(a, piece.in, 1, rank, piece.in,
       writable(group.a) + packed_elements(padded, piece.in) * piece.part);
}

// ``b`` [rows, rank]: the piece's rows of one part.
void pack_b(const bf16* b, const Piece& piece, AdapterShape shape) {
  const auto [rank, padded] = shape;
  const LoraGroup& group = *piece.group;
  const int first = part_begin(group, piece.part) + piece.row_begin;
  pack(b, rank, 1, piece.row_end - piece.row_begin, rank,
       writable(group.b) + packed_elements(1, padded) * (first / 16));
}

// ``round(range, rounded)`` writes a range of the weights in bf16; false: one is not finite.
template <typename Round>
int pack_all(LoraGroup* groups, const std::int32_t* inputs, int num_groups, AdapterShape shape,
             const Round& round) {
  const std::vector<Piece> pieces = pieces_of(groups, inputs, num_groups, shape);
  std::atomic<bool> finite{true};
  parallel_for(int(pieces.size()), [&](int item, int) {
    const Piece& piece = pieces[item];
    const Elements range = elements_of(piece, shape);
    // A piece at a time, so that what is rounded is still in the cache when it is packed.
    thread_local std::vector<bf16> rounded;
    if (std::int64_t(rounded.size()) < range.count) rounded.resize(range.count);
    if (!round(range, rounded.data())) finite = false;
    if (piece.row_begin < 0) {
      pack_a(rounded.data(), piece, shape);
    } else {
      pack_b(rounded.data(), piece, shape);
    }
  });
  return finite ? kOk : kNotFinite;
}

}  // namespace

extern "C" {

// ``inputs`` [num_groups] are the groups' input sizes. kNotFinite where a weight is not: nothing may
// be computed with the adapter then.
int tc_pack_adapter(const float* flat, LoraGroup* groups, const std::int32_t* inputs,
                    int num_groups, int rank, int padded_rank) {
  return pack_all(groups, inputs, num_groups, {rank, padded_rank},
                  [&](const Elements& range, bf16* rounded) {
                    return narrow_all(flat + range.first, rounded, range.count);
                  });
}

// A step of AdamW on all weights of an adapter, and its tiles from the new ones: one pass over
// memory, which is what a step costs. Returns as tc_pack_adapter.
int tc_step_adapter(float* weights, float* exp_avg, float* exp_avg_sq, const float* gradient,
                    const AdamStep* params, LoraGroup* groups, const std::int32_t* inputs,
                    int num_groups, int rank, int padded_rank) {
  const AdamW adam({weights, exp_avg, exp_avg_sq, gradient}, *params);
  return pack_all(groups, inputs, num_groups, {rank, padded_rank},
                  [&](const Elements& range, bf16* rounded) {
                    return adam.step(range.first, range.first + range.count, rounded);
                  });
}
}
