// Matrix products on tiles: y = x W^T with LoRA products added before the one rounding.
//
// Every element of y is summed over ascending inputs in one fp32 accumulator, then over the ranks
// of its row's adapter: its bits depend on its own row, W and that adapter alone, whatever the
// number of rows, columns or threads. So rows of different tenants share a product.
//
// Legend: x [rows, in], y [rows, out]; a tile covers 16 rows, 16 columns, 32 elements of a sum.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base.hpp"

namespace kernels {

// A right operand in tiles: [out / 16][in / 32][512], zero where padded. See ``pack``.
using Packed = const bf16*;

std::size_t packed_elements(int out, int in);

// Element (n, k) of the operand is w[n * out_stride + k * in_stride]; one stride is 1. What pads
// ``in`` to whole tiles is not written: it must be zero. One thread.
void pack(const bf16* w, std::ptrdiff_t out_stride, std::ptrdiff_t in_stride, int out, int in,
          bf16* packed);

struct PackedMatrix {
  Packed w;
  int out, in;  // in: a multiple of 32
};

struct Range {
  int begin, end;
};

// Of the packed W^T [in, out] the rows ``in``, a multiple of 16 of them, and the columns ``out``,
// which begin at a multiple of 32 and end at one or at the last. A few milliseconds for a whole
// model, where keeping both would double its memory. One thread.
void transpose_packed(const PackedMatrix& from, Range in, Range out, bf16* transposed);

// Row ``index`` of W [out, in] out of its tiles.
void unpack_row(Packed w, int in, int index, bf16* row);

// What one adapter adds to the rows of one 16-row tile: z b, where z is [16, parts * rank] with zero
// rows for those that are not its own. Columns of part p use the p-th ``rank`` columns of z.
struct LowRank {
  const bf16* z;
  Packed b;  // [out / 16][rank / 32][512]
  int rank;  // of one part, a multiple of 32
  int num_parts;
  int part_end[3];  // in columns, ascending; multiples of 16
};

enum class Output {
  kBf16,      // y = result
  kAddBf16,   // y = result + addend (which may be y itself)
  kFloat,     // y = result in fp32
};

struct Product {
  const bf16* x;  // rows are read up to the next multiple of 16: there must be memory, of any content
  std::ptrdiff_t ldx;
  int rows, in, out;  // in: a multiple of 32
  Packed w;
  const float* bias;  // [out] or null
  // Low-rank terms of row tile t: low_ranks[first_low_rank[t] .. first_low_rank[t + 1]); or null.
  const int* first_low_rank;
  const LowRank* low_ranks;
  Output output;
  void* y;
  std::ptrdiff_t ldy;
  const bf16* addend;  // [rows, out] with stride ldy, for kAddBf16
};

// Runs on all threads.
void multiply(const Product& product);

// The 16 rows of one tile: z[16][ldz] = scale * x b^T rounded to bf16, for ``rank`` columns
// (a multiple of 16), zero outside rows [begin, end). One thread.
void reduce_tile(const bf16* x, std::ptrdiff_t ldx, int in, Packed a, int rank, float scale,
                 int begin, int end, bf16* z, std::ptrdiff_t ldz);

// out[r, n] (+)= sum over t of left[t, r] * right[t, n], fp32, for t in [0, rows); rows a multiple
// of 32. ``left_t`` is left transposed: [num_left padded to 16][rows]. ``transposed``: out[n, r]
// instead. ``accumulate``: adds to out. Further parts of ``left_t`` lie left_stride rows on, their
// results out_stride elements on. One thread.
struct OuterProduct {
  const bf16* left_t;
  int num_left, num_parts, left_stride;
  std::ptrdiff_t out_stride;
  const bf16* right;
  std::ptrdiff_t ldright;
  int num_right;
  int rows;
  float* out;
  std::ptrdiff_t ldout;
  bool transposed, accumulate;
};
void add_outer_product(const OuterProduct& product);

// [rows, columns] -> [columns][ldto], both multiples of 16.
void transpose(const bf16* from, std::ptrdiff_t ldfrom, int rows, int columns, bf16* to,
               std::ptrdiff_t ldto);

}  // namespace kernels
