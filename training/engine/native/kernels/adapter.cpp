// Packs an adapter's fp32 weights into the tiles that passes multiply with.

#include <algorithm>
#include <atomic>
#include <vector>

#include "amx.hpp"
#include "model.hpp"
#include "threads.hpp"

namespace {

using namespace kernels;

enum Status { kOk = 0, kNotFinite = 2 };  // as in api.cpp

// Rounds to bf16; false where a result is not finite.
bool narrow_all(const float* from, bf16* to, std::int64_t count) {
  __mmask16 bad = 0;
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 lanes = first_lanes(int(std::min<std::int64_t>(count - i, kLanes)));
    const f32x16 rounded = widen(narrow(load(from + i, lanes)));
    // Not below infinity: infinite, or NaN.
    bad |= _mm512_mask_cmp_ps_mask(lanes, _mm512_abs_ps(rounded), splat(__builtin_inff()),
                                   _CMP_NLT_UQ);
    store(to + i, rounded, lanes);
  }
  return bad == 0;
}

// All forms of one group's matrices from ``a``, its A's and B's in bf16.
void pack_group(const bf16* a, LoraGroup& group, int in, int rank, int padded) {
  const bf16* b = a + std::ptrdiff_t(group.num_parts) * rank * in;
  // Each part's ranks are padded on their own.
  for (int part = 0, begin = 0; part < group.num_parts; ++part) {
    const int end = group.part_end[part];
    const bf16* part_a = a + std::ptrdiff_t(part) * rank * in;
    const bf16* part_b = b + std::ptrdiff_t(begin) * rank;
    pack(part_a, in, 1, rank, in,
         const_cast<bf16*>(group.a) + packed_elements(padded, in) * part);
    pack(part_b, rank, 1, end - begin, rank,
         const_cast<bf16*>(group.b) + packed_elements(1, padded) * (begin / 16));
    if (group.b_t != nullptr) {
      // [in / 16][parts * padded / 32][512]: the parts of one column tile lie together.
      const int steps = padded / 32;
      for (int n = 0; n < in; n += 16) {
        for (int k = 0; k < steps; ++k) {
          const std::ptrdiff_t tile = (std::ptrdiff_t(n / 16) * group.num_parts + part) * steps + k;
          if (k * 32 < rank) {
            pack(part_a + std::ptrdiff_t(k) * 32 * in + n, 1, in, std::min(16, in - n),
                 std::min(32, rank - k * 32), const_cast<bf16*>(group.a_t) + tile * 512);
          }
        }
      }
      const int steps_out = divide_up(end - begin, 32);
      for (int r = 0; r < rank; r += 16) {
        bf16* to = const_cast<bf16*>(group.b_t);
        for (int before = 0, from = 0; before < part; ++before) {
          to += packed_elements(padded, group.part_end[before] - from);
          from = group.part_end[before];
        }
        pack(part_b + r, 1, rank, std::min(16, rank - r), end - begin,
             to + std::ptrdiff_t(r / 16) * steps_out * 512);
      }
    }
    begin = end;
  }
}

}  // namespace

extern "C" {

// ``inputs`` [num_groups] are the groups' input sizes. kNotFinite where a weight is not: nothing may
// be computed with the adapter then.
int tc_pack_adapter(const float* flat, LoraGroup* groups, const std::int32_t* inputs,
                    int num_groups, int rank, int padded_rank) {
  std::atomic<bool> finite{true};
  parallel_for(num_groups, [&](int item, int) {
    const int index = num_groups - 1 - item;  // the head first: it is the largest
    LoraGroup& group = groups[index];
    if (group.num_parts == 0) return;
    const int in = inputs[index], out = group.part_end[group.num_parts - 1];
    const std::int64_t count = (std::int64_t(group.num_parts) * in + out) * rank;
    // A group at a time, so that what is rounded is still in the cache when it is packed.
    thread_local std::vector<bf16> rounded;
    if (std::int64_t(rounded.size()) < count) rounded.resize(count);
    if (!narrow_all(flat + group.gradient, rounded.data(), count)) finite = false;
    pack_group(rounded.data(), group, in, rank, padded_rank);
  });
  return finite ? kOk : kNotFinite;
}
}
