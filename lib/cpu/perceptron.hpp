// A whole training step of a perceptron in one call: forward, softmax cross-entropy, backward, SGD
// with Nesterov momentum; with or without batch norm.  Small networks are otherwise mostly the cost
// of calling operators.
//
// Activations are [features, samples], samples padded to whole vectors with zero gradients, so that
// a weight is one scalar times contiguous vectors, sparse or dense.  Each layer is one of two:
//
//   dense   the weight [out, in] itself; the update happens while the gradient is still in registers
//   sparse  the values of the non-zeros by row, with their own momentum; the dense momentum is only
//           touched where a step asks for the gradients of inactive weights (see `Track`)
//
// A sum over samples or features is always taken in the same order: the bits do not depend on the
// number of threads.  Free of torch.
#pragma once

#include <cfenv>
#include <cmath>
#include <string>
#include <utility>

#include "sparse.hpp"

namespace sparse {

// Whether a step gathers the gradients g of inactive weights in the dense momentum m of its sparse
// layers: not at all, m = a * m + g, or m = g (the first step of a window).
enum Track : int32_t { kTrackNothing = 0, kTrackMore = 1, kTrackFirst = 2 };

// One layer; mirrored by lib/cpu/perceptron.py.  Pointers to floats are float32 in torch's memory.
struct PerceptronLayer {
  int64_t in, out;
  float *weight, *momentum;        // [out, in]
  const float* multiplier;         // [out, in], the mask as 0 and 1, of a dense layer; may be null
  float* gradient;                 // [out, in], takes the loss's gradient; may be null
  float *bias, *bias_momentum;     // [out]; null: none
  int64_t nonzeros;                // -1: a dense layer, and nothing below counts
  int32_t *row_start, *column;          // [out + 1], [nonzeros]
  float *value, *value_momentum;        // [nonzeros]
  int32_t *column_start, *row, *place;  // [in + 1], [nonzeros] by column; place in `value`
  float *scale, *scale_momentum, *shift, *shift_momentum;  // [out], of batch norm; null: none
  float *mean, *variance;                                  // [out], its running estimates
  float norm_momentum, eps;  // the new estimate's share in the running one; added to the variance
};

// SGD as in torch.optim.SGD: g += decay * w; m = a * m + g; w -= lr * (g + a * m with Nesterov, m).
struct Sgd {
  float lr, momentum, weight_decay;
  int32_t nesterov;
};

namespace detail {

// f of the constant n, which is 1 to N.
template <int N, class F>
static inline void with_constant(int64_t n, F&& f) {
  if constexpr (N > 1)
    if (n < N) return with_constant<N - 1>(n, f);
  f(std::integral_constant<int, N>());
}

// y[r] = bias[r] + sum over c of weight(r, c) x[c] for R rows and Q vectors of samples; the weight of
// (r, c) is at w + r * row_step + c * column_step, rows of x and y are `pitch` floats apart. With
// `gate`, laid out as y, y is zero where gate is not positive.
template <int R, int Q>
static inline void product_tile(const float* w, int64_t row_step, int64_t column_step,
                                int64_t columns, const float* x, int64_t pitch, const float* bias,
                                bool relu, const float* gate, float* y) {
  V sum[R * Q];
  unroll<R * Q>([&](auto k) SPARSE_INLINE { sum[k] = bias ? broadcast(bias[k / Q]) : V{}; });
  for (int64_t c = 0; c < columns; ++c) {
    V in[Q];
    unroll<Q>([&](auto q) SPARSE_INLINE { in[q] = load(x + c * pitch + q * L); });
    unroll<R>([&](auto r) SPARSE_INLINE {
      const V factor = broadcast(w[r * row_step + c * column_step]);
      unroll<Q>([&](auto q) SPARSE_INLINE { sum[r * Q + q] += factor * in[q]; });
    });
  }
  unroll<R * Q>([&](auto k) SPARSE_INLINE {
    const int64_t at = (k / Q) * pitch + (k % Q) * L;
    V s = sum[k];
    if (relu) s = select(s < 0.0f, V{}, s);  // in this order NaN stays NaN
    if (gate) s = select(load(gate + at) > 0.0f, s, V{});
    store(y + at, s);
  });
}

// All rows of Q vectors of samples; see product_tile.
template <int Q>
static void product_strip(const float* w, int64_t row_step, int64_t column_step, int64_t rows,
                          int64_t columns, const float* x, int64_t pitch, const float* bias,
                          bool relu, const float* gate, float* y, int threads) {
  constexpr int R = kTile / Q;
  const int64_t whole = rows / R, tiles = whole + rows % R;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t r = t < whole ? t * R : whole * R + (t - whole);
    const float *b = bias ? bias + r : nullptr, *g = gate ? gate + r * pitch : nullptr;
    const float* from = w + r * row_step;
    float* const to = y + r * pitch;
    if (t < whole)
      product_tile<R, Q>(from, row_step, column_step, columns, x, pitch, b, relu, g, to);
    else
      product_tile<1, Q>(from, row_step, column_step, columns, x, pitch, b, relu, g, to);
  }
}

// All rows of NV vectors of samples.
template <int NV>
static void product(const float* w, int64_t row_step, int64_t column_step, int64_t rows,
                    int64_t columns, const float* x, const float* bias, bool relu,
                    const float* gate, float* y, int threads) {
  for (int64_t v = 0; v < NV; v += kWide)
    with_constant<kWide>(std::min<int64_t>(kWide, NV - v), [&](auto q) {
      product_strip<q.value>(w, row_step, column_step, rows, columns, x + v * L, NV * L, bias, relu,
                             gate ? gate + v * L : nullptr, y + v * L, threads);
    });
}

// The same over the non-zeros of each row: those from start[r] to start[r + 1], in columns `column`,
// with the values value[place[k]] (value[k] without places).
template <int NV>
static void sparse_product(const int32_t* start, const int32_t* column, const int32_t* place,
                           const float* value, int64_t rows, const float* x, const float* bias,
                           bool relu, const float* gate, float* y, int threads) {
  constexpr int64_t P = NV * L;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    V sum[NV];
    unroll<NV>([&](auto v) SPARSE_INLINE { sum[v] = bias ? broadcast(bias[r]) : V{}; });
    for (int32_t k = start[r]; k < start[r + 1]; ++k) {
      const V factor = broadcast(value[place ? place[k] : k]);
      const float* in = x + column[k] * P;
      unroll<NV>([&](auto v) SPARSE_INLINE { sum[v] += factor * load(in + v * L); });
    }
    unroll<NV>([&](auto v) SPARSE_INLINE {
      V s = sum[v];
      if (relu) s = select(s < 0.0f, V{}, s);
      if (gate) s = select(load(gate + r * P + v * L) > 0.0f, s, V{});
      store(y + r * P + v * L, s);
    });
  }
}

// Moves w and m by the gradient g; the vectors are those of one place.
template <class T>
static inline SPARSE_INLINE void sgd(const Sgd& s, T& w, T& m, T g) {
  g += s.weight_decay * w;
  m = s.momentum * m + g;
  w -= s.lr * (s.nesterov ? g + s.momentum * m : m);
}

// What happens to each vector of a dense weight gradient: its first `n` floats are those at `at`.
struct Update {
  const PerceptronLayer& layer;
  const Sgd& rule;
  int32_t track;
  bool learn;  // a dense layer: its weights move; otherwise only momentum is gathered

  SPARSE_INLINE void operator()(int64_t at, V g, int64_t n) const {
    const auto get = [=](const float* from) SPARSE_INLINE {
      if (n == L) return load(from + at);
      float v[L]{};
      std::memcpy(v, from + at, n * sizeof(float));
      return load(v);
    };
    const auto put = [=](float* to, V v) SPARSE_INLINE {
      if (n == L) return store(to + at, v);
      float part[L];
      store(part, v);
      std::memcpy(to + at, part, n * sizeof(float));
    };
    if (layer.gradient) put(layer.gradient, g);
    if (learn) {
      V w = get(layer.weight), m = get(layer.momentum);
      sgd(rule, w, m, g);
      put(layer.weight, layer.multiplier ? w * get(layer.multiplier) : w);
      put(layer.momentum, m);
    } else if (track != kTrackNothing) {
      put(layer.momentum, track == kTrackFirst ? g : rule.momentum * get(layer.momentum) + g);
    }
  }
};

// The weight gradient of R rows and Q vectors of columns: sum over samples of delta[r][n] x[n][c],
// handed to `update`.  delta: [rows, pitch]; x: [samples, Q * L], the columns from c0 on.
template <int R, int Q>
static inline void gradient_tile(const float* delta, int64_t pitch, const float* x, int64_t samples,
                                 int64_t columns, int64_t r0, int64_t c0, const Update& update) {
  V sum[R * Q];
  unroll<R * Q>([&](auto k) SPARSE_INLINE {
    sum[k] = V{};
    // Ready when the sums are: the rows lie too far apart for the processor to foresee them.
    __builtin_prefetch(update.layer.momentum + (r0 + k / Q) * columns + c0 + (k % Q) * L, 1);
  });
  for (int64_t n = 0; n < samples; ++n) {
    V in[Q];
    unroll<Q>([&](auto q) SPARSE_INLINE { in[q] = load(x + (n * Q + q) * L); });
    unroll<R>([&](auto r) SPARSE_INLINE {
      const V factor = broadcast(delta[(r0 + r) * pitch + n]);
      unroll<Q>([&](auto q) SPARSE_INLINE { sum[r * Q + q] += factor * in[q]; });
    });
  }
  unroll<R * Q>([&](auto k) SPARSE_INLINE {
    const int64_t c = c0 + (k % Q) * L, at = (r0 + k / Q) * columns + c;
    const int64_t left = columns - c;
    if (left >= L) update(at, sum[k], L);
    else if (left > 0) update(at, sum[k], left);
  });
}

// All rows of Q vectors of columns; x: [samples, width], zero beyond the last column.
template <int Q>
static inline void gradient_columns(const float* delta, int64_t pitch, const float* x, int64_t width,
                                    int64_t samples, int64_t rows, int64_t columns, int64_t c0,
                                    const Update& update) {
  constexpr int R = kTile / Q;
  alignas(64) float strip[8 * L * Q * L];  // in a few pages instead of one a sample
  for (int64_t n = 0; n < samples; ++n)
    unroll<Q>([&](auto q) SPARSE_INLINE {
      store(strip + (n * Q + q) * L, load(x + n * width + c0 + q * L));
    });
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    gradient_tile<R, Q>(delta, pitch, strip, samples, columns, r, c0, update);
  for (; r < rows; ++r)
    gradient_tile<1, Q>(delta, pitch, strip, samples, columns, r, c0, update);
}

static inline void dense_gradient(const float* delta, int64_t pitch, const float* x, int64_t width,
                                  int64_t samples, int64_t rows, int64_t columns,
                                  const Update& update, int threads) {
  constexpr int Q = kWide;  // so many vectors of all samples stay in the first-level cache
  const int64_t strips = ceil_div(width, Q * L);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t s = 0; s < strips; ++s) {
    const int64_t c0 = s * Q * L;
    with_constant<Q>(std::min<int64_t>(Q, (width - c0) / L), [&](auto q) {
      gradient_columns<q.value>(delta, pitch, x, width, samples, rows, columns, c0, update);
    });
  }
}

// The gradient at the non-zeros, and their step; delta [out, P] and x [in, P].
template <int NV>
static void sparse_gradient(const PerceptronLayer& layer, const Sgd& rule, const float* delta,
                            const float* x, int threads) {
  constexpr int64_t P = NV * L;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t r = 0; r < layer.out; ++r) {
    V d[NV];
    unroll<NV>([&](auto v) SPARSE_INLINE { d[v] = load(delta + r * P + v * L); });
    const int32_t end = layer.row_start[r + 1];
    for (int32_t first = layer.row_start[r]; first < end; first += L) {
      alignas(64) float lines[L * L];
      const int32_t count = std::min<int32_t>(L, end - first);
      for (int32_t k = 0; k < L; ++k) {
        V s{}, t{};
        if (k < count) {
          const float* in = x + layer.column[first + k] * P;
          unroll<NV>([&](auto v) SPARSE_INLINE { (v % 2 ? s : t) += d[v] * load(in + v * L); });
        }
        store(lines + k * L, s + t);
      }
      const V g = sum16(lines);
      float *const value = layer.value + first, *const momentum = layer.value_momentum + first;
      if (count == L) {
        V w = load(value), m = load(momentum);
        sgd(rule, w, m, g);
        store(value, w), store(momentum, m);
      } else {
        for (int32_t k = 0; k < count; ++k) sgd(rule, value[k], momentum[k], float(g[k]));
      }
    }
  }
}

// Batch norm, and ReLU with `relu`, of z [out, P], into y; z becomes the normalised value before scale
// and shift and `inverse` [out] one over the standard deviation.  valid: [P], 1 for a sample and 0 for
// padding.  In training with the mini-batch's own statistics, which also enter the running ones.
template <int NV>
static void batch_norm(const PerceptronLayer& f, const float* valid, int64_t samples, bool training,
                       bool relu, float* z, float* inverse, float* y, int threads) {
  constexpr int64_t P = NV * L;
  const float n = float(samples);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t r = 0; r < f.out; ++r) {
    float* const row = z + r * P;
    float mean = f.mean[r], variance = f.variance[r];
    if (training) {
      // From the first sample on: the mean of equal values is exact.
      V sum{}, squares{};
      unroll<NV>([&](auto v) SPARSE_INLINE {
        sum += (load(row + v * L) - row[0]) * load(valid + v * L);
      });
      mean = row[0] + float(lane_sum(sum)) / n;
      unroll<NV>([&](auto v) SPARSE_INLINE {
        const V off = (load(row + v * L) - mean) * load(valid + v * L);
        squares += off * off;
      });
      variance = float(lane_sum(squares)) / n;
      f.mean[r] += f.norm_momentum * (mean - f.mean[r]);
      f.variance[r] += f.norm_momentum * (variance * (n / (n - 1)) - f.variance[r]);
    }
    inverse[r] = 1 / std::sqrt(variance + f.eps);
    // As torch does it, not from the normalised value: a feature without non-zeros is zero but for
    // rounding, and as often as there it is open, and so can learn, and can grow connections.
    const float slope = f.scale[r] * inverse[r], offset = f.shift[r] - mean * slope;
    unroll<NV>([&](auto v) SPARSE_INLINE {
      const V x = load(row + v * L);
      store(row + v * L, (x - mean) * inverse[r] * load(valid + v * L));
      V s = slope * x + offset;
      if (relu) s = select(s < 0.0f, V{}, s);  // in this order NaN stays NaN
      store(y + r * P + v * L, s);
    });
  }
}

// The gradient d [out, P] of batch norm's outputs becomes that of its inputs; scale and shift learn.
template <int NV>
static void batch_norm_back(const PerceptronLayer& f, const float* valid, int64_t samples,
                            const float* normal, const float* inverse, const Sgd& rule, float* d,
                            int threads) {
  constexpr int64_t P = NV * L;
  const float n = float(samples);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t r = 0; r < f.out; ++r) {
    float* const row = d + r * P;
    const float* const x = normal + r * P;
    V sum{}, product{};
    unroll<NV>([&](auto v) SPARSE_INLINE {
      sum += load(row + v * L);
      product += load(row + v * L) * load(x + v * L);
    });
    const float shift = float(lane_sum(sum)), scale = float(lane_sum(product));
    const float factor = f.scale[r] * inverse[r];
    unroll<NV>([&](auto v) SPARSE_INLINE {
      const V g = load(row + v * L) - shift / n - load(x + v * L) * (scale / n);
      store(row + v * L, g * factor * load(valid + v * L));
    });
    sgd(rule, f.scale[r], f.scale_momentum[r], scale);
    sgd(rule, f.shift[r], f.shift_momentum[r], shift);
  }
}

// [rows, P] to [samples, width] (width: `rows` padded to whole vectors, zeros there) or back.
static inline void transpose(const float* from, int64_t from_pitch, float* to, int64_t to_pitch,
                             int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += L)
    for (int64_t c = 0; c < columns; c += L) {
      V v[16];
      for (int64_t k = 0; k < L; ++k) v[k] = r + k < rows ? load(from + (r + k) * from_pitch + c) : V{};
      transpose16(v);
      for (int64_t k = 0; k < L; ++k) store(to + (c + k) * to_pitch + r, v[k]);
    }
}

// Softmax cross-entropy of logits [classes, pitch]: the mean loss; in place of the logits their
// gradient, zero beyond the last sample.
static inline double cross_entropy(float* logits, int64_t pitch, int64_t classes, int64_t samples,
                                   const int64_t* labels) {
  double total = 0;
  const float scale = 1.0f / float(samples);
  for (int64_t n = 0; n < pitch; ++n) {
    float* const z = logits + n;
    if (n >= samples) {
      for (int64_t c = 0; c < classes; ++c) z[c * pitch] = 0.0f;
      continue;
    }
    float top = z[0];
    for (int64_t c = 1; c < classes; ++c) top = std::max(top, z[c * pitch]);
    const float right = z[labels[n] * pitch] - top;
    float sum = 0;
    for (int64_t c = 0; c < classes; ++c) sum += z[c * pitch] = std::exp(z[c * pitch] - top);
    total += std::log(double(sum)) - double(right);
    for (int64_t c = 0; c < classes; ++c) z[c * pitch] *= scale / sum;
    z[labels[n] * pitch] -= scale;
  }
  return total / double(samples);
}

// Activations of one mini-batch of at most 128 samples.
template <int NV>
struct Perceptron {
  static constexpr int64_t P = NV * L;
  const PerceptronLayer* layers;
  int64_t depth, samples;
  int threads;
  std::vector<float*> act, delta;      // [width, P] each
  std::vector<float*> normal, inverse;  // of layer k's batch norm [width, P], [width]; else null
  float *natural, *other;               // [P, width padded]
  float* valid;                         // [P], 1 for a sample and 0 for padding

  Perceptron(const PerceptronLayer* layers, int64_t depth, int64_t samples, int threads)
      : layers(layers), depth(depth), samples(samples), threads(threads) {
    int64_t widest = 0, size = 0;
    for (int64_t k = 0; k <= depth; ++k) {
      const int64_t width = aligned(k ? layers[k - 1].out : layers[0].in);
      widest = std::max(widest, width);
      size += 2 * width * P;
      if (k && layers[k - 1].scale) size += width * (P + 1);
    }
    float* at = workspace(size + 2 * widest * P + P);
    for (int64_t k = 0; k <= depth; ++k) {
      const int64_t width = aligned(k ? layers[k - 1].out : layers[0].in);
      act.push_back(at), delta.push_back(at + width * P);
      at += 2 * width * P;
      if (!k) continue;
      const bool norm = layers[k - 1].scale != nullptr;
      normal.push_back(norm ? at : nullptr), inverse.push_back(norm ? at + width * P : nullptr);
      if (norm) at += width * (P + 1);
    }
    natural = at, other = at + widest * P, valid = other + widest * P;
    for (int64_t n = 0; n < P; ++n) valid[n] = n < samples ? 1.0f : 0.0f;
  }

  // Rows of x [images, in] named by `index` (0, 1, ... when null) become `natural` and act[0].
  void read(const float* x, const int64_t* index) {
    const int64_t in = layers[0].in, width = aligned(in);
    for (int64_t n = 0; n < P; ++n) {
      float* const row = natural + n * width;
      if (n < samples) std::memcpy(row, x + (index ? index[n] : n) * in, in * sizeof(float));
      std::fill(row + (n < samples ? in : 0), row + width, 0.0f);
    }
    transpose(natural, width, act[0], P, P, width);
  }

  void forward(bool training) {
    for (int64_t k = 0; k < depth; ++k) {
      const PerceptronLayer& f = layers[k];
      // Behind every layer but the last, and behind its batch norm where it has one.
      const bool relu = k + 1 < depth, now = relu && !f.scale;
      float* const y = f.scale ? normal[k] : act[k + 1];
      if (f.nonzeros >= 0)
        sparse_product<NV>(f.row_start, f.column, nullptr, f.value, f.out, act[k], f.bias, now,
                           nullptr, y, threads);
      else
        product<NV>(f.weight, f.in, 1, f.out, f.in, act[k], f.bias, now, nullptr, y, threads);
      if (f.scale)
        batch_norm<NV>(f, valid, samples, training, relu, y, inverse[k], act[k + 1], threads);
    }
  }

  void backward(const Sgd& rule, int32_t track) {
    for (int64_t k = depth - 1; k >= 0; --k) {
      const PerceptronLayer& f = layers[k];
      const bool sparse = f.nonzeros >= 0;
      float* const d = k + 1 == depth ? act[depth] : delta[k + 1];
      if (f.scale)
        batch_norm_back<NV>(f, valid, samples, normal[k], inverse[k], rule, d, threads);
      if (k > 0) {  // with the weights from before the step
        if (sparse)
          sparse_product<NV>(f.column_start, f.row, f.place, f.value, f.in, d, nullptr, false, act[k],
                             delta[k], threads);
        else
          product<NV>(f.weight, 1, f.in, f.in, f.out, d, nullptr, false, act[k], delta[k], threads);
      }
      if (!sparse || track != kTrackNothing || f.gradient) {
        const int64_t width = aligned(f.in);
        const float* x = natural;
        if (k > 0) {
          transpose(act[k], P, other, width, f.in, P);
          x = other;
        }
        dense_gradient(d, P, x, width, samples, f.out, f.in, Update{f, rule, track, !sparse}, threads);
      }
      if (sparse) sparse_gradient<NV>(f, rule, d, act[k], threads);
      for (int64_t r = 0; f.bias && r < f.out; ++r) {
        V s{};
        unroll<NV>([&](auto v) SPARSE_INLINE { s += load(d + r * P + v * L); });
        sgd(rule, f.bias[r], f.bias_momentum[r], float(lane_sum(s)));
      }
    }
  }
};

// The caller's treatment of denormals (and its rounding) in all threads: those of the pool may have
// started under another one, and the bits would depend on the number of threads.
static inline void same_arithmetic(int threads) {
  if (threads < 2) return;
  std::fenv_t mode;
  std::fegetenv(&mode);
#pragma omp parallel num_threads(threads)
  std::fesetenv(&mode);
}

// Labels [samples] of the images `index`; throws for what is not there, before anything changes.
static inline void read_labels(const int64_t* labels, int64_t images, const int64_t* index,
                               int64_t samples, int64_t classes, int64_t* own) {
  for (int64_t n = 0; n < samples; ++n) {
    if (index[n] < 0 || index[n] >= images)
      throw std::out_of_range("there is no image " + std::to_string(index[n]) + " among " +
                              std::to_string(images));
    own[n] = labels[index[n]];
    if (own[n] < 0 || own[n] >= classes)
      throw std::out_of_range("label " + std::to_string(own[n]) + " is none of the " +
                              std::to_string(classes) + " classes");
  }
}

}  // namespace detail

// One step on the images `index` [samples] of x [images, in]; labels [images].  The mean loss from
// before the step.  Throws std::exception for another number of samples, for a single one where there
// is batch norm, and for an index or a label that is none.
static inline double train_step(const PerceptronLayer* layers, int64_t depth, const float* x,
                                const int64_t* labels, int64_t images, const int64_t* index,
                                int64_t samples, const Sgd& rule, int32_t track, int threads) {
  double loss = 0;
  const auto normed = [](const PerceptronLayer& layer) { return layer.scale != nullptr; };
  if (samples == 1 && std::any_of(layers, layers + depth, normed))
    throw std::invalid_argument("batch norm takes the statistics of more than one sample");
  if (samples < 1 || samples > 8 * L)
    throw std::invalid_argument("a mini-batch has 1 to 128 samples");
  detail::with_constant<8>(ceil_div(samples, L), [&](auto vectors) {
    int64_t own[8 * L];
    detail::read_labels(labels, images, index, samples, layers[depth - 1].out, own);
    detail::same_arithmetic(threads);
    detail::Perceptron<vectors.value> net(layers, depth, samples, threads);
    net.read(x, index);
    net.forward(true);
    loss = detail::cross_entropy(net.act[depth], net.P, layers[depth - 1].out, samples, own);
    net.backward(rule, track);
  });
  return loss;
}

// Number of wrong answers over `images` rows of x; the answer is the first largest logit, or the
// first that is no number, as in torch.argmax.
static inline int64_t count_wrong(const PerceptronLayer* layers, int64_t depth, const float* x,
                                  const int64_t* labels, int64_t images, int threads) {
  detail::same_arithmetic(threads);
  int64_t wrong = 0;
  for (int64_t done = 0; done < images; done += 8 * L) {
    const int64_t samples = std::min<int64_t>(8 * L, images - done);
    detail::with_constant<8>(ceil_div(samples, L), [&](auto vectors) {
      detail::Perceptron<vectors.value> net(layers, depth, samples, threads);
      net.read(x + done * layers[0].in, nullptr);
      net.forward(false);
      for (int64_t n = 0; n < samples; ++n) {
        const float* const logit = net.act[depth] + n;
        int64_t best = 0;
        for (int64_t c = 1; c < layers[depth - 1].out; ++c) {
          const float top = logit[best * net.P], other = logit[c * net.P];
          if (other > top || (std::isnan(other) && !std::isnan(top))) best = c;
        }
        wrong += best != labels[done + n];
      }
    });
  }
  return wrong;
}

// DeepR's step (deepr_step of lib/methods/rules.py) on the non-zeros alone, in two calls: between them
// the caller draws which dormant connections wake.  First each value moves by `shrinkage` against its
// sign and by its noise (null: none); those that end on the wrong side of zero are dead: column -1
// until wake().  sign: [out, in], -1 or 1.  How many died.
static inline int64_t move_weights(const PerceptronLayer& layer, const int8_t* sign,
                                   const float* noise, float shrinkage) {
  int64_t died = 0;
  for (int64_t r = 0; r < layer.out; ++r)
    for (int32_t k = layer.row_start[r]; k < layer.row_start[r + 1]; ++k) {
      const float s = float(sign[r * layer.in + layer.column[k]]);
      const float moved = layer.value[k] - shrinkage * s + (noise ? noise[k] : 0.0f);
      layer.value[k] = moved;
      if (moved * s < 0) layer.column[k] = -1, ++died;
    }
  return died;
}

// The non-zeros by column, from those by row.
static inline void sort_by_column(const PerceptronLayer& layer) {
  int32_t* const next = layer.column_start;  // of each column the first place that is free
  std::fill_n(next, layer.in + 1, 0);
  for (int64_t k = 0; k < layer.nonzeros; ++k) ++next[layer.column[k]];
  for (int64_t c = 0, start = 0; c <= layer.in; ++c) {
    const int64_t count = next[c];
    next[c] = int32_t(start), start += count;
  }
  for (int64_t r = 0; r < layer.out; ++r)
    for (int32_t k = layer.row_start[r]; k < layer.row_start[r + 1]; ++k) {
      const int32_t to = next[layer.column[k]]++;
      layer.row[to] = int32_t(r), layer.place[to] = k;
    }
  std::memmove(next + 1, next, layer.in * sizeof(int32_t));  // each is where the next column starts
  next[0] = 0;
}

// Drops the dead of all sparse layers and wakes the dormant connections `chosen` [count], ascending
// numbers among the dormant ones of those layers in row-major order; they start at zero, without
// momentum.  The caller's memory has room for the new number of non-zeros.
static inline void wake(PerceptronLayer* layers, int64_t depth, const int64_t* chosen,
                        int64_t count) {
  int64_t most = 0;
  for (int64_t k = 0; k < depth; ++k) most = std::max(most, layers[k].nonzeros + count);
  std::vector<int32_t> column(most);
  std::vector<float> value(most), momentum(most);
  const int64_t* const end = chosen + count;
  int64_t first = 0, alive = 0;  // the layer's first position, and the active ones met, of all layers
  for (int64_t k = 0; k < depth; ++k) {
    PerceptronLayer& f = layers[k];
    if (f.nonzeros < 0) continue;
    int64_t size = 0;
    int32_t from = 0;
    for (int64_t r = 0; r < f.out; ++r, first += f.in) {
      // A dormant position has as many dormant ones before it as active ones are missing there.
      const auto wake_before = [&](int64_t position) {
        for (; chosen < end && *chosen + alive < position; ++chosen, ++size)
          column[size] = int32_t(*chosen + alive - first), value[size] = momentum[size] = 0.0f;
      };
      for (const int32_t stop = f.row_start[r + 1]; from < stop; ++from) {
        const int32_t c = f.column[from];
        if (c < 0) continue;
        wake_before(first + c);
        column[size] = c, value[size] = f.value[from], momentum[size] = f.value_momentum[from];
        ++size, ++alive;
      }
      wake_before(first + f.in);
      f.row_start[r + 1] = int32_t(size);
    }
    f.nonzeros = size;
    std::copy_n(column.data(), size, f.column);
    std::copy_n(value.data(), size, f.value);
    std::copy_n(momentum.data(), size, f.value_momentum);
    if (k > 0) sort_by_column(f);  // the first layer's gradient goes no further back
  }
}

}  // namespace sparse
