// Everything around the convolutions in the batch-blocked layout [N / 16, C, H, W, 16]: conversion,
// batch normalisation (with ReLU), pooling, sums over a channel.  Free of torch.
//
// Lanes beyond the last sample hold finite numbers of no meaning in activations; statistics ignore
// them, and gradients are zero there.
#pragma once

#include <cmath>

#include "sparse.hpp"

namespace sparse {

namespace detail {

typedef uint8_t V8 __attribute__((vector_size(16)));
typedef uint8_t V8U __attribute__((vector_size(16), aligned(1), may_alias));

// Transposes 16 x 16 floats in place.
template <int D = 8>
static inline void transpose16(V* v) {
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    if (!(i & D)) {
      const V a = v[i], b = v[i | D];
      v[i] = merged<D, false>(a, b);
      v[i | D] = merged<D, true>(a, b);
    }
  if constexpr (D > 1) transpose16<D / 2>(v);
}

// Lanes of batch block n that hold a sample: all ones, else zero.
static inline VI valid_lanes(int64_t n, int64_t samples) {
  const VI lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lane < int32_t(std::min<int64_t>(L, samples - n * L));
}

static inline double lane_sum(V v) {
  double s = 0;
  for (int l = 0; l < L; ++l) s += v[l];
  return s;
}

}  // namespace detail

// Strides in floats of an ordinary tensor [N, C, H * W]: NCHW is {C * HW, HW, 1}, NHWC {HW * C, 1, C}.
struct Strides {
  int64_t n, c, p;
};

// Copies between an ordinary tensor and a batch-blocked one, 16 samples x 16 of the contiguous
// dimension (pixels of NCHW, channels of NHWC) at a time.
template <bool to_blocked>
static inline void convert(float* plain, Strides s, float* blocked, int64_t samples,
                           int64_t channels, int64_t pixels, int threads) {
  const int64_t blocks = ceil_div(samples, L);
  const bool by_pixel = s.p == 1;
  const int64_t outer = by_pixel ? channels : pixels, inner = by_pixel ? pixels : channels;
  const int64_t outer_plain = by_pixel ? s.c : s.p;
  const int64_t outer_blocked = (by_pixel ? pixels : 1) * L, inner_blocked = (by_pixel ? 1 : pixels) * L;
#pragma omp parallel for collapse(2) num_threads(threads)
  for (int64_t n = 0; n < blocks; ++n)
    for (int64_t a = 0; a < outer; ++a) {
      const int64_t lanes = std::min<int64_t>(L, samples - n * L);
      float* const rows = plain + n * L * s.n + a * outer_plain;
      float* const cols = blocked + n * channels * pixels * L + a * outer_blocked;
      int64_t k = 0;
      for (; k + L <= inner; k += L) {
        V v[16];
        if (to_blocked) {
          for (int64_t l = 0; l < L; ++l) v[l] = l < lanes ? load(rows + l * s.n + k) : V{};
          detail::transpose16(v);
          for (int64_t l = 0; l < L; ++l) store(cols + (k + l) * inner_blocked, v[l]);
        } else {
          for (int64_t l = 0; l < L; ++l) v[l] = load(cols + (k + l) * inner_blocked);
          detail::transpose16(v);
          for (int64_t l = 0; l < lanes; ++l) store(rows + l * s.n + k, v[l]);
        }
      }
      for (; k < inner; ++k)
        for (int64_t l = 0; l < (to_blocked ? L : lanes); ++l) {
          float* const b = cols + k * inner_blocked + l;
          if (!to_blocked) rows[l * s.n + k] = *b;
          else *b = l < lanes ? rows[l * s.n + k] : 0.0f;
        }
    }
}

// y = (x - mean) / sqrt(var + eps) * weight + bias, then ReLU if asked; mean and biased variance of
// each channel over the samples are computed first when `training`, and given otherwise.
static inline void norm_forward(const float* x, float* y, float* mean, float* var,
                                const float* weight, const float* bias, double eps, bool relu,
                                bool training, int64_t samples, int64_t channels, int64_t pixels,
                                int threads) {
  const int64_t blocks = ceil_div(samples, L), plane = pixels * L;
  const double count = double(samples) * double(pixels);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t c = 0; c < channels; ++c) {
    if (training) {
      // Sums of differences from one value: deep layers have means far larger than deviations, and
      // a channel without weights is constant to the last bit.
      const float pivot = x[c * plane];
      double sum = 0, squares = 0;
      for (int64_t n = 0; n < blocks; ++n) {
        const float* p = x + (n * channels + c) * plane;
        V s{}, t{};
        for (int64_t k = 0; k + 1 < pixels; k += 2)
          s += load(p + k * L) - pivot, t += load(p + k * L + L) - pivot;
        if (pixels % 2) s += load(p + (pixels - 1) * L) - pivot;
        sum += detail::lane_sum(detail::valid_lanes(n, samples) ? s + t : V{});
      }
      mean[c] = float(pivot + sum / count);
      for (int64_t n = 0; n < blocks; ++n) {
        const float* p = x + (n * channels + c) * plane;
        V s{};
        for (int64_t k = 0; k < pixels; ++k) {
          const V d = load(p + k * L) - mean[c];
          s += d * d;
        }
        squares += detail::lane_sum(detail::valid_lanes(n, samples) ? s : V{});
      }
      var[c] = float(squares / count);
    }
    const float scale = float(weight[c] / std::sqrt(double(var[c]) + eps));
    const float m = mean[c], shift = bias[c];
    for (int64_t n = 0; n < blocks; ++n) {
      const int64_t at = (n * channels + c) * plane;
      for (int64_t k = at; k < at + plane; k += L) {
        V v = (load(x + k) - m) * scale + shift;
        if (relu) v = v < 0.0f ? V{} : v;  // in this order NaN stays NaN
        store(y + k, v);
      }
    }
  }
}

// Gradients of norm_forward; `frozen` (evaluation): mean and variance are constants.
static inline void norm_backward(const float* x, const float* grad, float* dx, float* dweight,
                                 float* dbias, const float* mean, const float* var,
                                 const float* weight, const float* bias, double eps, bool relu,
                                 bool frozen, int64_t samples, int64_t channels, int64_t pixels,
                                 int threads) {
  const int64_t blocks = ceil_div(samples, L), plane = pixels * L;
  const double count = double(samples) * double(pixels);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t c = 0; c < channels; ++c) {
    const float inverse = float(1.0 / std::sqrt(double(var[c]) + eps)), m = mean[c];
    const float scale = weight[c] * inverse, shift = bias[c];
    double sum = 0, dot = 0;
    for (int64_t n = 0; n < blocks; ++n) {
      const int64_t at = (n * channels + c) * plane;
      V s{}, d{};
      for (int64_t k = at; k < at + plane; k += L) {
        const V v = load(x + k);
        V g = load(grad + k);
        if (relu) g = (v - m) * scale + shift > 0.0f ? g : V{};
        s += g;
        d += g * (v - m);
      }
      const VI lanes = detail::valid_lanes(n, samples);
      sum += detail::lane_sum(lanes ? s : V{});
      dot += detail::lane_sum(lanes ? d : V{});
    }
    dbias[c] = float(sum);
    dweight[c] = float(dot * inverse);
    if (!dx) continue;
    // dx = scale * (g - mean(g) - xhat * mean(g * xhat))
    const float a = frozen ? 0.0f : float(sum / count) * scale;
    const float b = frozen ? 0.0f : float(dot / count) * inverse * inverse * scale;
    for (int64_t n = 0; n < blocks; ++n) {
      const int64_t at = (n * channels + c) * plane;
      const VI lanes = detail::valid_lanes(n, samples);
      for (int64_t k = at; k < at + plane; k += L) {
        const V v = load(x + k);
        V g = load(grad + k);
        if (relu) g = (v - m) * scale + shift > 0.0f ? g : V{};
        const V r = g * scale - a - (v - m) * b;
        store(dx + k, lanes ? r : V{});
      }
    }
  }
}

// out[c] = sum of x over the samples and pixels of channel c.
static inline void channel_sum(const float* x, float* out, int64_t samples, int64_t channels,
                               int64_t pixels, int threads) {
  const int64_t blocks = ceil_div(samples, L), plane = pixels * L;
#pragma omp parallel for num_threads(threads)
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t n = 0; n < blocks; ++n) {
      const float* p = x + (n * channels + c) * plane;
      V s{}, t{}, u{}, v{};  // independent chains: an addition takes four cycles
      int64_t k = 0;
      for (; k + 4 * L <= plane; k += 4 * L)
        s += load(p + k), t += load(p + k + L), u += load(p + k + 2 * L), v += load(p + k + 3 * L);
      for (; k < plane; k += L) s += load(p + k);
      sum += detail::lane_sum(detail::valid_lanes(n, samples) ? (s + t) + (u + v) : V{});
    }
    out[c] = float(sum);
  }
}

// Windows of `size` x `size` pixels every `stride`, without padding.
struct Pool {
  int64_t planes;  // batch blocks * channels
  int64_t height, width, size, stride;
  int64_t out_height() const { return (height - size) / stride + 1; }
  int64_t out_width() const { return (width - size) / stride + 1; }
};

constexpr uint8_t kNowhere = 255;  // also a place of a window of 16 x 16: `relu` goes up to 15 x 15

// `which` receives the place of the maximum within its window (row * size + column).  With `relu` the
// outputs below zero become zero, and where none is above zero `which` is kNowhere: no place of the
// window gets a gradient, as of a ReLU after the pooling.
static inline void max_pool_forward(const Pool& p, bool relu, const float* x, float* y,
                                    uint8_t* which, int threads) {
  const int64_t oh = p.out_height(), ow = p.out_width();
#pragma omp parallel for num_threads(threads)
  for (int64_t c = 0; c < p.planes; ++c)
    for (int64_t i = 0; i < oh; ++i)
      for (int64_t j = 0; j < ow; ++j) {
        const float* q = x + ((c * p.height + i * p.stride) * p.width + j * p.stride) * L;
        V best = load(q);
        VI at{};
        for (int64_t a = 0; a < p.size; ++a)
          for (int64_t b = 0; b < p.size; ++b) {
            const V v = load(q + (a * p.width + b) * L);
            const VI better = (v > best) | (v != v);  // NaN wins, as in torch
            best = better ? v : best;
            at = better ? VI{} + int32_t(a * p.size + b) : at;
          }
        if (relu) {
          const VI none = best <= 0.0f;  // a NaN stays, and its gradient passes, as in torch
          best = none ? V{} : best;
          at = none ? VI{} + int32_t(kNowhere) : at;
        }
        const int64_t out = ((c * oh + i) * ow + j) * L;
        store(y + out, best);
        *reinterpret_cast<detail::V8U*>(which + out) = __builtin_convertvector(at, detail::V8);
      }
}

static inline void max_pool_backward(const Pool& p, const float* grad, const uint8_t* which,
                                     float* dx, int threads) {
  const int64_t oh = p.out_height(), ow = p.out_width();
  const bool apart = p.stride >= p.size;      // each pixel is in one window at most,
  const bool cover = p.stride == p.size && oh * p.stride == p.height && ow * p.stride == p.width;
#pragma omp parallel for num_threads(threads)
  for (int64_t c = 0; c < p.planes; ++c) {
    float* plane = dx + c * p.height * p.width * L;
    if (!cover) std::memset(plane, 0, p.height * p.width * L * sizeof(float));  // or in exactly one
    for (int64_t i = 0; i < oh; ++i)
      for (int64_t j = 0; j < ow; ++j) {
        const int64_t out = ((c * oh + i) * ow + j) * L;
        const V g = load(grad + out);
        const VI at = __builtin_convertvector(
            *reinterpret_cast<const detail::V8U*>(which + out), VI);
        for (int64_t a = 0; a < p.size; ++a)
          for (int64_t b = 0; b < p.size; ++b) {
            float* d = plane + ((i * p.stride + a) * p.width + j * p.stride + b) * L;
            const V own = at == int32_t(a * p.size + b) ? g : V{};
            store(d, apart ? own : load(d) + own);
          }
      }
  }
}

static inline void mean_pool_forward(const Pool& p, const float* x, float* y, int threads) {
  const int64_t oh = p.out_height(), ow = p.out_width();
  const float weight = 1.0f / float(p.size * p.size);
#pragma omp parallel for num_threads(threads)
  for (int64_t c = 0; c < p.planes; ++c)
    for (int64_t i = 0; i < oh; ++i)
      for (int64_t j = 0; j < ow; ++j) {
        const float* q = x + ((c * p.height + i * p.stride) * p.width + j * p.stride) * L;
        V s{};
        for (int64_t a = 0; a < p.size; ++a)
          for (int64_t b = 0; b < p.size; ++b) s += load(q + (a * p.width + b) * L);
        store(y + ((c * oh + i) * ow + j) * L, s * weight);
      }
}

static inline void mean_pool_backward(const Pool& p, const float* grad, float* dx, int threads) {
  const int64_t oh = p.out_height(), ow = p.out_width();
  const float weight = 1.0f / float(p.size * p.size);
#pragma omp parallel for num_threads(threads)
  for (int64_t c = 0; c < p.planes; ++c) {
    float* plane = dx + c * p.height * p.width * L;
    std::memset(plane, 0, p.height * p.width * L * sizeof(float));
    for (int64_t i = 0; i < oh; ++i)
      for (int64_t j = 0; j < ow; ++j) {
        const V g = load(grad + ((c * oh + i) * ow + j) * L) * weight;
        for (int64_t a = 0; a < p.size; ++a)
          for (int64_t b = 0; b < p.size; ++b) {
            float* d = plane + ((i * p.stride + a) * p.width + j * p.stride + b) * L;
            store(d, load(d) + g);
          }
      }
  }
}

}  // namespace sparse
