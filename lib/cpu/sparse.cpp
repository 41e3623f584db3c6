// The kernels behind a C interface, called through ctypes (library.py): no torch headers, so the
// library builds in seconds and serves every torch version.  Sizes and types are checked by the
// caller.  What is not in a header is here: batch normalisation and sums over a channel.
#include <string>

#include "dense.hpp"
#include "perceptron.hpp"

namespace {

thread_local std::string last_error;

// Runs `f`; 0, or 1 with the message kept for sparse_error().
template <class F>
int guarded(F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& e) {
    last_error = e.what();
  } catch (...) {
    last_error = "unknown error";
  }
  return 1;
}

// out_channels, in_channels, kernel_h, kernel_w, stride, padding, height, width
sparse::Shape shape_of(const int64_t* s) { return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]}; }

}  // namespace

namespace sparse {
using detail::lane_sum;
using detail::valid_lanes;

extern "C" {

const char* sparse_error() { return last_error.c_str(); }

// coords: [count, 4] output channel, input channel, kernel row, kernel column.
int sparse_plan_create(const int64_t* shape, const int32_t* coords, int64_t count,
                       int64_t transposed, int64_t phase_y, int64_t phase_x, int64_t batch_blocks,
                       Plan** plan, int64_t threads) {
  return guarded([&] {
    *plan = new Plan(make_plan(shape_of(shape), reinterpret_cast<const Coord*>(coords), count,
                               transposed, phase_y, phase_x, batch_blocks, int(threads)));
  });
}

int sparse_plan_free(Plan* plan, int64_t) { return delete plan, 0; }

int sparse_convolve(Plan* plan, const float* values, const float* src, const float* bias, float* dst,
                    int64_t batch_blocks, int64_t threads) {
  return guarded([&] {
    set_values(*plan, values, int(threads));
    convolve(*plan, src, bias, dst, batch_blocks, int(threads));
  });
}

int sparse_weight_gradient(const Plan* plan, const float* x, const float* grad, float* out,
                           int64_t samples, int64_t threads) {
  return guarded([&] { weight_gradient(*plan, x, grad, out, samples, int(threads)); });
}

// out: the whole weight's gradient.
int sparse_dense_gradient(const int64_t* shape, const float* x, const float* grad, float* out,
                          int64_t samples, int64_t threads) {
  return guarded(
      [&] { dense_weight_gradient(shape_of(shape), x, grad, out, samples, int(threads)); });
}

int sparse_sgd(float* weight, float* momentum, const int64_t* index, const float* gradient,
               int64_t count, double lr, double a, double weight_decay, int64_t nesterov,
               int64_t threads) {
  const Sgd rule{float(lr), float(a), float(weight_decay), int32_t(nesterov)};
  return guarded([&] { sgd_at(weight, momentum, index, gradient, count, rule, int(threads)); });
}

// In the layout [N / 16, C, H, W, 16], whose lanes beyond the last sample hold finite numbers of no
// meaning in activations; statistics ignore them, and gradients are zero there.
//
// y = (x - mean) / sqrt(var + eps) * weight + bias, then ReLU if asked; mean and biased variance of
// each channel over the samples are computed first when `training`, and given otherwise.
int sparse_norm_forward(const float* x, float* y, float* mean, float* var, const float* weight,
                        const float* bias, double eps, int64_t relu, int64_t training,
                        int64_t samples, int64_t channels, int64_t pixels, int64_t threads) {
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
        sum += lane_sum(select(valid_lanes(n, samples), s + t, V{}));
      }
      mean[c] = float(pivot + sum / count);
      for (int64_t n = 0; n < blocks; ++n) {
        const float* p = x + (n * channels + c) * plane;
        V s{};
        for (int64_t k = 0; k < pixels; ++k) {
          const V d = load(p + k * L) - mean[c];
          s += d * d;
        }
        squares += lane_sum(select(valid_lanes(n, samples), s, V{}));
      }
      var[c] = float(squares / count);
    }
    const float scale = float(weight[c] / std::sqrt(double(var[c]) + eps));
    const float m = mean[c], shift = bias[c];
    for (int64_t n = 0; n < blocks; ++n) {
      const int64_t at = (n * channels + c) * plane;
      for (int64_t k = at; k < at + plane; k += L) {
        V v = (load(x + k) - m) * scale + shift;
        if (relu) v = select(v < 0.0f, V{}, v);  // in this order NaN stays NaN
        store(y + k, v);
      }
    }
  }
  return 0;
}

// Gradients of sparse_norm_forward; `frozen` (evaluation): mean and variance are constants.
int sparse_norm_backward(const float* x, const float* grad, float* dx, float* dweight, float* dbias,
                         const float* mean, const float* var, const float* weight,
                         const float* bias, double eps, int64_t relu, int64_t frozen,
                         int64_t samples, int64_t channels, int64_t pixels, int64_t threads) {
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
        if (relu) g = select((v - m) * scale + shift > 0.0f, g, V{});
        s += g;
        d += g * (v - m);
      }
      const VI lanes = valid_lanes(n, samples);
      sum += lane_sum(select(lanes, s, V{}));
      dot += lane_sum(select(lanes, d, V{}));
    }
    dbias[c] = float(sum);
    dweight[c] = float(dot * inverse);
    if (!dx) continue;
    // dx = scale * (g - mean(g) - xhat * mean(g * xhat))
    const float a = frozen ? 0.0f : float(sum / count) * scale;
    const float b = frozen ? 0.0f : float(dot / count) * inverse * inverse * scale;
    for (int64_t n = 0; n < blocks; ++n) {
      const int64_t at = (n * channels + c) * plane;
      const VI lanes = valid_lanes(n, samples);
      for (int64_t k = at; k < at + plane; k += L) {
        const V v = load(x + k);
        V g = load(grad + k);
        if (relu) g = select((v - m) * scale + shift > 0.0f, g, V{});
        const V r = g * scale - a - (v - m) * b;
        store(dx + k, select(lanes, r, V{}));
      }
    }
  }
  return 0;
}

// out[c] = sum of x over the samples and pixels of channel c.
int sparse_channel_sum(const float* x, float* out, int64_t samples, int64_t channels,
                       int64_t pixels, int64_t threads) {
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
      sum += lane_sum(select(valid_lanes(n, samples), (s + t) + (u + v), V{}));
    }
    out[c] = float(sum);
  }
  return 0;
}

// See perceptron.hpp.
int perceptron_step(const PerceptronLayer* layers, int64_t depth, const float* x,
                    const int64_t* labels, int64_t images, const int64_t* index, int64_t samples,
                    double lr, double momentum, double weight_decay, int64_t nesterov,
                    int64_t track, double* loss, int64_t threads) {
  const Sgd rule{float(lr), float(momentum), float(weight_decay), int32_t(nesterov)};
  return guarded([&] {
    *loss = train_step(layers, depth, x, labels, images, index, samples, rule, int32_t(track),
                       int(threads));
  });
}

int perceptron_wrong(const PerceptronLayer* layers, int64_t depth, const float* x,
                     const int64_t* labels, int64_t images, int64_t* wrong, int64_t threads) {
  return guarded([&] { *wrong = count_wrong(layers, depth, x, labels, images, int(threads)); });
}

int deepr_move(const PerceptronLayer* layer, const int8_t* sign, const float* noise,
               double shrinkage, int64_t* died, int64_t) {
  return guarded([&] { *died = move_weights(*layer, sign, noise, float(shrinkage)); });
}

int deepr_wake(PerceptronLayer* layers, int64_t depth, const int64_t* chosen, int64_t count,
               int64_t) {
  return guarded([&] { wake(layers, depth, chosen, count); });
}

}  // extern "C"

}  // namespace sparse
