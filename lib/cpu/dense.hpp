// Gradients of whole weights, and the step of single ones.
//
// The gradient of a whole weight, zeros of the pattern included, in the batch-blocked layout.
//
// For each output channel and each tap (input channel, row and column of the kernel) it is a sum of
// products over samples and pixels.  A few output channels times a few taps stay in registers, so
// that a multiply-add costs less than half a load: per weight several times faster than the loop
// over single non-zeros, and without conversion to torch's layout.  Every sum is taken by one thread
// in a fixed order: the bits do not depend on the number of threads.  Free of torch.
#pragma once

#include "perceptron.hpp"

namespace sparse {

namespace detail {

constexpr int kOutputs = kTile > 6 ? 4 : 2, kTaps = kTile / kOutputs;  // channels, taps at a time
constexpr int kLineSums = (kTile + L - 1) / L;  // vectors that hold a tile's sums
constexpr int64_t kGradientPixels = 96;  // vectors of each of them that wait in the first-level cache

// A copy of x [planes, height, width, 16] with a border of zeros.
static inline void pad_planes(const float* x, int64_t planes, const Shape& s, float* out,
                              int threads) {
  const int64_t h = s.height + 2 * s.padding, w = s.width + 2 * s.padding;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t k = 0; k < planes; ++k) {
    float* const plane = out + k * h * w * L;
    for (int64_t y = 0; y < h; ++y) {
      float* const row = plane + y * w * L;
      if (y < s.padding || y >= s.padding + s.height) {
        std::memset(row, 0, w * L * sizeof(float));
        continue;
      }
      std::memset(row, 0, s.padding * L * sizeof(float));
      std::memcpy(row + s.padding * L, x + (k * s.height + y - s.padding) * s.width * L,
                  s.width * L * sizeof(float));
      std::memset(row + (s.padding + s.width) * L, 0, s.padding * L * sizeof(float));
    }
  }
}

// What a tile runs over: `blocks` batch blocks, `rows` rows of `cols` output pixels.
struct Span {
  int64_t blocks, rows, cols;
  int64_t grad_block, grad_plane;   // floats between batch blocks, output channels
  int64_t last;                     // output channel counted from the first: it stands for all beyond
  int64_t x_block, x_row, x_pixel;  // floats between batch blocks, output rows, output pixels
  VI lanes;                         // those that hold a sample
};

// sums[r * Q + q] = sum over the span of grad of channel r times x at tap q.
static inline void correlate_tile(const Span& s, const float* grad, const float* x,
                                  const int64_t* taps, float* sums) {
  constexpr int R = kOutputs, Q = kTaps;
  V acc[R * Q];
  unroll<R * Q>([&](auto k) SPARSE_INLINE { acc[k] = V{}; });
  for (int64_t n = 0; n < s.blocks; ++n)
    for (int64_t i = 0; i < s.rows; ++i) {
      const float* const from = grad + n * s.grad_block + i * s.cols * L;
      const float *g[R], *at[Q];
      unroll<R>([&](auto r) SPARSE_INLINE { g[r] = from + std::min<int64_t>(r, s.last) * s.grad_plane; });
      unroll<Q>([&](auto q) SPARSE_INLINE { at[q] = x + n * s.x_block + i * s.x_row + taps[q]; });
      for (int64_t j = 0; j < s.cols; ++j) {
        V in[Q];
        unroll<Q>([&](auto q) SPARSE_INLINE { in[q] = load(at[q] + j * s.x_pixel); });
        unroll<R>([&](auto r) SPARSE_INLINE {
          const V out = load(g[r] + j * L);
          unroll<Q>([&](auto q) SPARSE_INLINE { acc[r * Q + q] += out * in[q]; });
        });
      }
    }
  alignas(64) float lines[kLineSums * L * L];
  // Lanes beyond the last sample count for nothing, whatever the tensors hold there.
  unroll<R * Q>([&](auto k) SPARSE_INLINE { store(lines + k * L, select(s.lanes, acc[k], V{})); });
  for (int k = R * Q; k < kLineSums * L; ++k) store(lines + k * L, V{});
  for (int k = 0; k < kLineSums * L; k += L) store(sums + k, sum16(lines + k * L));
}

}  // namespace detail

// out [out_channels, in_channels, kernel_h, kernel_w] = gradient of the weight of a convolution with
// input x and output gradient grad, both batch-blocked, of `samples` samples.
static inline void dense_weight_gradient(const Shape& s, const float* x, const float* grad,
                                         float* out, int64_t samples, int threads) {
  using namespace detail;
  constexpr int R = kOutputs, Q = kTaps;
  const int64_t oh = s.out_height(), ow = s.out_width(), blocks = ceil_div(samples, L);
  const int64_t h = s.height + 2 * s.padding, w = s.width + 2 * s.padding;
  const int64_t count = s.in_channels * s.kernel_h * s.kernel_w;
  std::vector<int64_t> taps(ceil_div(count, Q) * Q);
  for (int64_t t = 0; t < int64_t(taps.size()); ++t) {
    const int64_t k = std::min(t, count - 1);  // the last one again up to a whole tile
    const int64_t c = k / (s.kernel_h * s.kernel_w), y = k / s.kernel_w % s.kernel_h;
    taps[t] = ((c * h + y) * w + k % s.kernel_w) * L;
  }
  if (s.padding > 0) {
    float* const padded = workspace(blocks * s.in_channels * h * w * L);
    pad_planes(x, blocks * s.in_channels, s, padded, threads);
    x = padded;
  }
  const int64_t rows = std::min(oh, std::max<int64_t>(1, kGradientPixels / ow));
  const int64_t together = rows < oh ? 1 : std::max<int64_t>(1, kGradientPixels / (oh * ow));
  const int64_t grad_plane = oh * ow * L, x_block = s.in_channels * h * w * L;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t o = 0; o < s.out_channels; o += R) {
    const int64_t outputs = std::min<int64_t>(R, s.out_channels - o);
    // Fewer than R channels are left: the last R, of which the first are done elsewhere.
    const int64_t first = std::max<int64_t>(0, o + outputs - R);
    std::fill(out + o * count, out + (o + outputs) * count, 0.0f);
    for (int64_t n = 0; n < blocks;) {
      // The last block is alone where not all its lanes count.
      const int64_t full = samples / L;
      const int64_t some = n < full ? std::min(together, full - n) : 1;
      for (int64_t i = 0; i < oh; i += rows) {
        const Span span{some, std::min(rows, oh - i), ow, s.out_channels * grad_plane, grad_plane,
                        s.out_channels - 1, x_block, s.stride * w * L, s.stride * L,
                        valid_lanes(n, samples)};
        const float* const g = grad + (n * s.out_channels + first) * grad_plane + i * ow * L;
        const float* const from = x + n * x_block + i * s.stride * w * L;
        for (int64_t t = 0; t < count; t += Q) {
          alignas(64) float sums[kLineSums * L];
          correlate_tile(span, g, from, taps.data() + t, sums);
          const int64_t some_taps = std::min<int64_t>(Q, count - t);
          for (int64_t r = 0; r < outputs; ++r)
            for (int64_t q = 0; q < some_taps; ++q)
              out[(o + r) * count + t + q] += sums[(o - first + r) * Q + q];
        }
      }
      n += some;
    }
  }
}

// A step of SGD for the weights at the places `index` [count] of a layer, and their momentum;
// gradient [count].  The other weights and their momentum stay.
static inline void sgd_at(float* weight, float* momentum, const int64_t* index,
                          const float* gradient, int64_t count, const Sgd& rule, int threads) {
  const bool shared = threads > 1 && count > 1 << 15;
  if (shared) detail::same_arithmetic(threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (shared)
  for (int64_t k = 0; k < count; ++k)
    detail::sgd(rule, weight[index[k]], momentum[index[k]], gradient[k]);
}

}  // namespace sparse
