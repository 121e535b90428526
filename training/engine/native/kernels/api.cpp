// The C interface that library.py calls. Functions return 0, or a code of ``Status``; no exception
// leaves them.

#include <atomic>
#include <cstring>
#include <new>

#include "adam.hpp"
#include "amx.hpp"
#include "head.hpp"
#include "pass.hpp"
#include "threads.hpp"

namespace {

using namespace kernels;

enum Status { kOk = 0, kNoMemory = 1, kNotFinite = 2 };

template <typename F>
int guarded(const F& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

constexpr std::int64_t kNarrowBlock = 1 << 14;

// Rounds to bf16; false where a result is not finite.
bool narrow_all(const float* from, bf16* to, std::int64_t count) {
  std::atomic<bool> finite{true};
  parallel_for(int((count + kNarrowBlock - 1) / kNarrowBlock), [&](int item, int) {
    const std::int64_t begin = item * kNarrowBlock, end = std::min(begin + kNarrowBlock, count);
    __mmask16 bad = 0;
    for (std::int64_t i = begin; i < end; i += kLanes) {
      const __mmask16 lanes = first_lanes(int(std::min<std::int64_t>(end - i, kLanes)));
      const f32x16 rounded = widen(narrow(load(from + i, lanes)));
      // Not below infinity: infinite, or NaN.
      bad |= _mm512_mask_cmp_ps_mask(lanes, _mm512_abs_ps(rounded),
                                     splat(__builtin_inff()), _CMP_NLT_UQ);
      store(to + i, rounded, lanes);
    }
    if (bad) finite = false;
  });
  return finite;
}

// All forms of one group's matrices from the flat bf16 adapter.
void pack_group(const bf16* flat, LoraGroup& group, int in, int rank, int padded) {
  const bf16* a = flat + group.gradient;
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

std::int64_t tc_packed_elements(int out, int in) { return std::int64_t(packed_elements(out, in)); }

// w [out, in] bf16 into tiles, and its transpose where ``packed_t`` is not null.
void tc_pack_linear(const bf16* w, int out, int in, bf16* packed, bf16* packed_t) {
  parallel_for(divide_up(out, 16), [&](int tile, int) {
    const int n = tile * 16;
    pack(w + std::ptrdiff_t(n) * in, in, 1, std::min(16, out - n), in,
         packed + packed_elements(1, in) * tile);
  });
  if (packed_t == nullptr) return;
  parallel_for(divide_up(in, 16), [&](int tile, int) {
    const int n = tile * 16;
    pack(w + n, 1, in, std::min(16, in - n), out, packed_t + packed_elements(1, out) * tile);
  });
}

// Packs an adapter's groups from flat fp32 weights; ``scratch`` is [num_params] bf16, ``inputs``
// [num_groups] their input sizes. kNotFinite where a weight is not: nothing may be computed with it.
int tc_pack_adapter(const float* flat, std::int64_t num_params, bf16* scratch, LoraGroup* groups,
                    const std::int32_t* inputs, int num_groups, int rank, int padded_rank) {
  if (!narrow_all(flat, scratch, num_params)) return kNotFinite;
  parallel_for(num_groups, [&](int item, int) {
    if (groups[item].num_parts == 0) return;
    pack_group(scratch, groups[item], inputs[item], rank, padded_rank);
  });
  return kOk;
}

Pass* tc_pass_new(const Model* model) { return new (std::nothrow) Pass(*model); }

void tc_pass_free(Pass* pass) { delete pass; }

void tc_pass_trim(Pass* pass, std::int64_t num_bytes) { pass->workspace().trim(num_bytes); }

std::int64_t tc_pass_bytes(Pass* pass) { return std::int64_t(pass->workspace().num_bytes()); }

int tc_pass_forward(Pass* pass, const Batch* batch, const Cache* cache, int keep, bf16* hidden) {
  return guarded([&] {
    pass->forward(*batch, cache, Keep(keep), hidden);
    amx::release();
    return kOk;
  });
}

// ``batch`` is that of the forward pass, its segments with their gradients.
int tc_pass_backward(Pass* pass, const Batch* batch, const bf16* d_hidden) {
  return guarded([&] {
    pass->backward(batch->segments, d_hidden);
    amx::release();
    return kOk;
  });
}

Workspace* tc_workspace_new() { return new (std::nothrow) Workspace; }

void tc_workspace_free(Workspace* workspace) { delete workspace; }

void tc_workspace_trim(Workspace* workspace, std::int64_t num_bytes) { workspace->trim(num_bytes); }

std::int64_t tc_kept_stride(int vocab) { return kept_stride(vocab); }

int tc_head_logits(const Model* model, Workspace* workspace, const bf16* hidden, int num_rows,
                   const Segment* segments, int num_segments, float* logits) {
  return guarded([&] {
    workspace->reset();
    head_logits(*model, hidden, num_rows, segments, num_segments, *workspace, logits);
    amx::release();
    return kOk;
  });
}

int tc_head_forward(const Model* model, Workspace* workspace, const HeadRows* rows) {
  return guarded([&] {
    workspace->reset();
    head_forward(*model, *rows, *workspace);
    amx::release();
    return kOk;
  });
}

int tc_head_backward(const Model* model, Workspace* workspace, const HeadRows* rows,
                     const float* dlogprobs, const std::int32_t* used, int num_used,
                     bf16* d_hidden) {
  return guarded([&] {
    workspace->reset();
    head_backward(*model, *rows, dlogprobs, used, num_used, *workspace, d_hidden);
    amx::release();
    return kOk;
  });
}

}  // extern "C"
