// Arithmetic of the softmax, and scratch memory, for both directions of attention.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "base.hpp"

namespace kernels {

inline constexpr float kLog2E = 1.44269504f;
inline constexpr float kLn2 = 0.693147181f;

// 2^x for x <= 0 or a little above, relative error below 3e-6: a thousandth of what rounding the
// result to bf16 costs. 2^0 = 1 and 2^-inf = 0 exactly. Minimax polynomial on [0, 1).
inline f32x16 exp2(f32x16 x) {
  const f32x16 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
  f32x16 p = splat(0.0134266844f);
  p = _mm512_fmadd_ps(p, r, splat(0.052242474f));
  p = _mm512_fmadd_ps(p, r, splat(0.241280205f));
  p = _mm512_fmadd_ps(p, r, splat(0.693044845f));
  p = _mm512_fmadd_ps(p, r, splat(1.0f));
  return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
}

// log2(x) for finite x > 0, absolute error about 1e-7 beside the exponent's rounding:
// x = m 2^e with m in [0.75, 1.5), ln m = 2 atanh((m - 1) / (m + 1)).
inline f32x16 log2(f32x16 x) {
  const f32x16 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
  const f32x16 e = _mm512_getexp_ps(_mm512_div_ps(x, m));
  const f32x16 s =
      _mm512_div_ps(_mm512_sub_ps(m, splat(1.0f)), _mm512_add_ps(m, splat(1.0f)));
  const f32x16 z = _mm512_mul_ps(s, s);
  f32x16 p = splat(1.0f / 9);
  p = _mm512_fmadd_ps(p, z, splat(1.0f / 7));
  p = _mm512_fmadd_ps(p, z, splat(1.0f / 5));
  p = _mm512_fmadd_ps(p, z, splat(1.0f / 3));
  p = _mm512_fmadd_ps(p, z, splat(1.0f));
  return _mm512_fmadd_ps(_mm512_mul_ps(p, s), splat(2 * kLog2E), e);
}

struct AddLanes {
  f32x16 operator()(f32x16 a, f32x16 b) const { return _mm512_add_ps(a, b); }
};

struct MaxLanes {
  f32x16 operator()(f32x16 a, f32x16 b) const { return _mm512_max_ps(a, b); }
};

// Lane i of the result combines the 16 lanes of rows[i]; the tree is the same for every row.
template <typename Combine>
inline f32x16 combine_lanes(const f32x16 rows[16], Combine combine) {
  f32x16 half[8], quarter[4];
  for (int i = 0; i < 8; ++i) {
    half[i] = combine(_mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]),
                      _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(half[2 * i]), b = _mm512_castps_pd(half[2 * i + 1]);
    quarter[i] = combine(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i) {
    const f32x16 a = quarter[2 * i], b = quarter[2 * i + 1];
    half[i] = combine(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  return combine(_mm512_shuffle_f32x4(half[0], half[1], 0x88),
                 _mm512_shuffle_f32x4(half[0], half[1], 0xdd));
}

// Memory of one thread, aligned to a cache line and kept from call to call. Zero at first: a tile
// may read rows that nobody wrote.
class Scratch {
 public:
  template <typename T>
  T* get(std::size_t count) {
    const std::size_t bytes = count * sizeof(T);
    if (bytes > bytes_) grow(bytes);
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  void grow(std::size_t bytes) {
    const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
    memory_.reset();
    bytes_ = 0;
    memory_.reset(std::aligned_alloc(64, rounded));
    if (!memory_) throw std::bad_alloc();
    std::memset(memory_.get(), 0, rounded);
    bytes_ = rounded;
  }

  std::unique_ptr<void, Free> memory_;
  std::size_t bytes_ = 0;
};

// Several arrays of one thread for the time of one work item, kept for the next.
class Arena {
 public:
  template <typename T>
  T* take(std::size_t count) {
    if (num_taken_ == parts_.size()) parts_.emplace_back();
    return parts_[num_taken_++].get<T>(count);
  }

  void reset() { num_taken_ = 0; }

 private:
  std::vector<Scratch> parts_;
  std::size_t num_taken_ = 0;
};

}  // namespace kernels
