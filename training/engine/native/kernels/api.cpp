// The C interface that library.py calls. Functions return 0, or a code of ``Status``; no exception
// leaves them.

#include <cstring>
#include <new>

#include "adam.hpp"
#include "tiles.hpp"
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

Pass* tc_pass_new(const Model* model) { return new (std::nothrow) Pass(*model); }

void tc_pass_free(Pass* pass) { delete pass; }

void tc_pass_release(Pass* pass) { pass->workspace().release(); }

int tc_pass_forward(Pass* pass, const Batch* batch, const Cache* cache, int keep, bf16* hidden) {
  return guarded([&] {
    pass->forward(*batch, cache, Keep(keep), hidden);
    tiles::release();
    return kOk;
  });
}

// ``batch`` is that of the forward pass, its segments with their gradients.
int tc_pass_backward(Pass* pass, const Batch* batch, const bf16* d_hidden) {
  return guarded([&] {
    pass->backward(batch->segments, d_hidden);
    tiles::release();
    return kOk;
  });
}

Workspace* tc_workspace_new() { return new (std::nothrow) Workspace; }

void tc_workspace_free(Workspace* workspace) { delete workspace; }

void tc_workspace_release(Workspace* workspace) { workspace->release(); }

std::int64_t tc_kept_stride(int vocab) { return kept_stride(vocab); }

int tc_head_logits(const Model* model, Workspace* workspace, const bf16* hidden, int num_rows,
                   const Segment* segments, int num_segments, float* logits) {
  return guarded([&] {
    workspace->reset();
    head_logits(*model, hidden, num_rows, segments, num_segments, *workspace, logits);
    tiles::release();
    return kOk;
  });
}

int tc_head_forward(const Model* model, Workspace* workspace, const HeadRows* rows) {
  return guarded([&] {
    workspace->reset();
    head_forward(*model, *rows, *workspace);
    tiles::release();
    return kOk;
  });
}

int tc_head_backward(const Model* model, Workspace* workspace, const HeadRows* rows,
                     const float* dlogprobs, const std::int32_t* used, int num_used,
                     bf16* d_hidden) {
  return guarded([&] {
    workspace->reset();
    head_backward(*model, *rows, dlogprobs, used, num_used, *workspace, d_hidden);
    tiles::release();
    return kOk;
  });
}

}  // extern "C"
