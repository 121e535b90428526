#include "rowwise.hpp"

#include <cmath>

namespace kernels {
namespace {

// f(start, lanes) over [0, count): whole vectors, then the rest.
template <typename F>
inline void for_vectors(int count, const F& f) {
  int start = 0;
  for (; start + kLanes <= count; start += kLanes) f(start, __mmask16(0xffff));
  if (start < count) f(start, first_lanes(count - start));
}

// The sum over [0, count) of what f(start, lanes) gives. Four sums side by side, since one would wait
// for itself; their order depends on ``count`` alone.
template <typename F>
inline float sum_over(int count, const F& f) {
  f32x16 sums[4] = {splat(0), splat(0), splat(0), splat(0)};
  int start = 0;
  for (; start + 4 * kLanes <= count; start += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) {
      sums[i] = _mm512_add_ps(sums[i], f(start + i * kLanes, __mmask16(0xffff)));
    }
  }
  for (; start < count; start += kLanes) {
    sums[0] = _mm512_add_ps(sums[0], f(start, first_lanes(count - start)));
  }
  return sum(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

inline float inverse_rms(const bf16* x, float eps, int H) {
  const float squares = sum_over(H, [&](int at, __mmask16 lanes) {
    const f32x16 values = load(x + at, lanes);
    return _mm512_mul_ps(values, values);
  });
  return 1.0f / std::sqrt(squares / float(H) + eps);
}

// The pair (x_i, x_{i + D/2}) of one head, in fp32.
struct Pair {
  f32x16 low, high;

  static Pair of(const bf16* head, int half, int at, __mmask16 lanes) {
    return {load(head + at, lanes), load(head + half + at, lanes)};
  }
  static Pair of(const float* line, int half, int at, __mmask16 lanes) {
    return {load(line + at, lanes), load(line + half + at, lanes)};
  }
  void store_to(bf16* head, int half, int at, __mmask16 lanes) const {
    store(head + at, low, lanes);
    store(head + half + at, high, lanes);
  }
  Pair operator*(const Pair& other) const {
    return {_mm512_mul_ps(low, other.low), _mm512_mul_ps(high, other.high)};
  }
  Pair operator*(float factor) const { return *this * Pair{splat(factor), splat(factor)}; }
  // The turn by an angle whose cosine and sine are ``turn``.
  Pair turned(const Pair& turn) const {
    return {_mm512_fmsub_ps(low, turn.low, _mm512_mul_ps(high, turn.high)),
            _mm512_fmadd_ps(high, turn.low, _mm512_mul_ps(low, turn.high))};
  }
  Pair turned_back(const Pair& turn) const {
    return {_mm512_fmadd_ps(low, turn.low, _mm512_mul_ps(high, turn.high)),
            _mm512_fmsub_ps(high, turn.low, _mm512_mul_ps(low, turn.high))};
  }
};

void rotate_head(bf16* head, int D, const float* turns, const float* norm, float eps) {
  const int half = D / 2;
  const float scale = norm != nullptr ? inverse_rms(head, eps, D) : 1.0f;
  for_vectors(half, [&](int at, __mmask16 lanes) {
    Pair x = Pair::of(head, half, at, lanes);
    if (norm != nullptr) x = x * scale * Pair::of(norm, half, at, lanes);
    x.turned(Pair::of(turns, half, at, lanes)).store_to(head, half, at, lanes);
  });
}

void rotate_head_backward(bf16* dhead, int D, const float* turns) {
  const int half = D / 2;
  for_vectors(half, [&](int at, __mmask16 lanes) {
    const Pair dy = Pair::of(dhead, half, at, lanes);
    dy.turned_back(Pair::of(turns, half, at, lanes)).store_to(dhead, half, at, lanes);
  });
}

// The turned gradient is computed twice: it must not be rounded before the norm's gradient is.
void rotate_normed_head_backward(bf16* dhead, const bf16* head, int D, const float* turns,
                                 const float* norm, float eps) {
  const int half = D / 2;
  const float scale = inverse_rms(head, eps, D);
  const auto weighted = [&](int at, __mmask16 lanes) {
    const Pair dy = Pair::of(dhead, half, at, lanes);
    return dy.turned_back(Pair::of(turns, half, at, lanes)) * Pair::of(norm, half, at, lanes);
  };
  const float along = sum_over(half, [&](int at, __mmask16 lanes) {
    const Pair product = weighted(at, lanes) * Pair::of(head, half, at, lanes);
    return _mm512_add_ps(product.low, product.high);
  });
  const f32x16 share = splat(along * scale * scale / float(D));
  for_vectors(half, [&](int at, __mmask16 lanes) {
    const Pair dy = weighted(at, lanes), x = Pair::of(head, half, at, lanes);
    const Pair dx{_mm512_fnmadd_ps(x.low, share, dy.low), _mm512_fnmadd_ps(x.high, share, dy.high)};
    (dx * scale).store_to(dhead, half, at, lanes);
  });
}

// 1 / (1 + e^-x). Below -80 it stays at e^-80, so that the reciprocal's refinement never meets
// infinity; a product with it is zero in every sense that matters.
inline f32x16 sigmoid(f32x16 x) {
  const f32x16 negated = _mm512_min_ps(splat(80.0f), _mm512_sub_ps(splat(0), x));
  const f32x16 bottom = _mm512_add_ps(splat(1), exp(negated));
  const f32x16 guess = _mm512_rcp14_ps(bottom);
  const f32x16 error = _mm512_fnmadd_ps(bottom, guess, splat(1));
  return _mm512_fmadd_ps(guess, error, guess);
}

}  // namespace

void rms_norm(const bf16* x, const float* weight, float eps, bf16* y, int H, int begin, int end) {
  for (std::ptrdiff_t row = begin; row < end; ++row) {
    const bf16* in = x + row * H;
    bf16* out = y + row * H;
    const f32x16 scale = splat(inverse_rms(in, eps, H));
    for_vectors(H, [&](int at, __mmask16 lanes) {
      const f32x16 normed = _mm512_mul_ps(load(in + at, lanes), scale);
      store(out + at, _mm512_mul_ps(normed, load(weight + at, lanes)), lanes);
    });
  }
}

void rms_norm_backward(const bf16* x, const float* weight, float eps, const bf16* dy, bf16* dx,
                       int H, int begin, int end) {
  for (std::ptrdiff_t row = begin; row < end; ++row) {
    const bf16 *in = x + row * H, *dout = dy + row * H;
    bf16* din = dx + row * H;
    const float scale = inverse_rms(in, eps, H);
    const float along = sum_over(H, [&](int at, __mmask16 lanes) {
      const f32x16 product = _mm512_mul_ps(load(dout + at, lanes), load(weight + at, lanes));
      return _mm512_mul_ps(product, load(in + at, lanes));
    });
    const f32x16 share = splat(along * scale * scale / float(H));
    for_vectors(H, [&](int at, __mmask16 lanes) {
      const f32x16 product = _mm512_mul_ps(load(dout + at, lanes), load(weight + at, lanes));
      const f32x16 across = _mm512_fnmadd_ps(load(in + at, lanes), share, product);
      store(din + at, _mm512_fmadd_ps(across, splat(scale), load(din + at, lanes)), lanes);
    });
  }
}

void add_rows(bf16* x, const bf16* y, int H, int begin, int end) {
  for (std::ptrdiff_t row = begin; row < end; ++row) {
    for_vectors(H, [&](int at, __mmask16 lanes) {
      bf16* to = x + row * H + at;
      store(to, _mm512_add_ps(load(to, lanes), load(y + row * H + at, lanes)), lanes);
    });
  }
}

void rotate(bf16* qkv, std::ptrdiff_t ld, const Heads& heads, const float* cos_sin,
            const std::int32_t* positions, const HeadNorms& norms, int begin, int end) {
  const int D = heads.head_dim;
  for (std::ptrdiff_t row = begin; row < end; ++row) {
    const float* turns = cos_sin + std::ptrdiff_t(positions[row]) * D;
    bf16* head = qkv + row * ld;
    for (int i = 0; i < heads.num_heads + heads.num_kv_heads; ++i, head += D) {
      rotate_head(head, D, turns, i < heads.num_heads ? norms.q : norms.k, norms.eps);
    }
  }
}

void rotate_backward(bf16* dqkv, std::ptrdiff_t ld, const bf16* qkv, std::ptrdiff_t ld_qkv,
                     const Heads& heads, const float* cos_sin, const std::int32_t* positions,
                     const HeadNorms& norms, int begin, int end) {
  const int D = heads.head_dim;
  for (std::ptrdiff_t row = begin; row < end; ++row) {
    const float* turns = cos_sin + std::ptrdiff_t(positions[row]) * D;
    for (int i = 0; i < heads.num_heads + heads.num_kv_heads; ++i) {
      bf16* dhead = dqkv + row * ld + std::ptrdiff_t(i) * D;
      const float* norm = i < heads.num_heads ? norms.q : norms.k;
      if (norm == nullptr) {
        rotate_head_backward(dhead, D, turns);
      } else {
        const bf16* head = qkv + row * ld_qkv + std::ptrdiff_t(i) * D;
        rotate_normed_head_backward(dhead, head, D, turns, norm, norms.eps);
      }
    }
  }
}

void swiglu(const bf16* gate_up, bf16* act, int I, int begin, int end) {
  for (std::ptrdiff_t row = begin; row < end; ++row) {
    const bf16 *gates = gate_up + row * 2 * I, *ups = gates + I;
    for_vectors(I, [&](int at, __mmask16 lanes) {
      const f32x16 gate = load(gates + at, lanes);
      const f32x16 silu = _mm512_mul_ps(gate, sigmoid(gate));
      store(act + row * I + at, _mm512_mul_ps(silu, load(ups + at, lanes)), lanes);
    });
  }
}

void swiglu_backward(const bf16* gate_up, const bf16* dact, bf16* dgate_up, bf16* act, int I,
                     int begin, int end) {
  for (std::ptrdiff_t row = begin; row < end; ++row) {
    const bf16 *gates = gate_up + row * 2 * I, *ups = gates + I;
    bf16 *dgates = dgate_up + row * 2 * I, *dups = dgates + I;
    for_vectors(I, [&](int at, __mmask16 lanes) {
      const f32x16 gate = load(gates + at, lanes), up = load(ups + at, lanes);
      const f32x16 dy = load(dact + row * I + at, lanes);
      const f32x16 share = sigmoid(gate), silu = _mm512_mul_ps(gate, share);
      // d silu = s (1 + g (1 - s)) = s + silu (1 - s)
      const f32x16 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(splat(1), share), share);
      store(dgates + at, _mm512_mul_ps(_mm512_mul_ps(dy, up), slope), lanes);
      store(dups + at, _mm512_mul_ps(dy, silu), lanes);
      if (act != nullptr) store(act + row * I + at, _mm512_mul_ps(silu, up), lanes);
    });
  }
}

}  // namespace kernels

extern "C" {

using kernels::bf16;

void tc_rms_norm(const bf16* x, const float* weight, float eps, bf16* y, int H, int begin,
                 int end) {
  kernels::rms_norm(x, weight, eps, y, H, begin, end);
}

void tc_rms_norm_backward(const bf16* x, const float* weight, float eps, const bf16* dy, bf16* dx,
                          int H, int begin, int end) {
  kernels::rms_norm_backward(x, weight, eps, dy, dx, H, begin, end);
}

void tc_add_rows(bf16* x, const bf16* y, int H, int begin, int end) {
  kernels::add_rows(x, y, H, begin, end);
}

void tc_rotate(bf16* qkv, std::ptrdiff_t ld, int num_heads, int num_kv_heads, int head_dim,
               const float* cos_sin, const std::int32_t* positions, const float* q_norm,
               const float* k_norm, float eps, int begin, int end) {
  kernels::rotate(qkv, ld, {num_heads, num_kv_heads, head_dim}, cos_sin, positions,
                  {q_norm, k_norm, eps}, begin, end);
}

void tc_rotate_backward(bf16* dqkv, std::ptrdiff_t ld, const bf16* qkv, std::ptrdiff_t ld_qkv,
                        int num_heads, int num_kv_heads, int head_dim, const float* cos_sin,
                        const std::int32_t* positions, const float* q_norm, const float* k_norm,
                        float eps, int begin, int end) {
  kernels::rotate_backward(dqkv, ld, qkv, ld_qkv, {num_heads, num_kv_heads, head_dim}, cos_sin,
                           positions, {q_norm, k_norm, eps}, begin, end);
}

void tc_swiglu(const bf16* gate_up, bf16* act, int I, int begin, int end) {
  kernels::swiglu(gate_up, act, I, begin, end);
}

void tc_swiglu_backward(const bf16* gate_up, const bf16* dact, bf16* dgate_up, bf16* act, int I,
                        int begin, int end) {
  kernels::swiglu_backward(gate_up, dact, dgate_up, act, I, begin, end);
}
}
