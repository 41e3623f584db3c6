// The kernels behind a C interface, called through ctypes (ops.py): no torch headers, so the library
// builds in seconds and serves every torch version.  Sizes and types are checked by the caller.
#include "blocked.hpp"
#include "dense.hpp"
#include "perceptron.hpp"
#include "select.hpp"

#include <string>

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

}  // namespace

extern "C" {

const char* sparse_error() { return last_error.c_str(); }

// shape: out_channels, in_channels, kernel_h, kernel_w, stride, padding, height, width;
// coords: [count, 4] output channel, input channel, kernel row, kernel column.
int sparse_plan_create(const int64_t* shape, const int32_t* coords, int64_t count, int transposed,
                       int64_t phase_y, int64_t phase_x, int64_t batch_blocks, int threads,
                       void** plan) {
  return guarded([&] {
    const sparse::Shape s{shape[0], shape[1], shape[2], shape[3],
                          shape[4], shape[5], shape[6], shape[7]};
    *plan = new sparse::Plan(
        sparse::make_plan(s, reinterpret_cast<const sparse::Coord*>(coords), count, transposed != 0,
                          phase_y, phase_x, batch_blocks, threads));
  });
}

void sparse_plan_free(void* plan) { delete static_cast<sparse::Plan*>(plan); }

int sparse_convolve(void* plan, const float* values, const float* src, const float* bias, float* dst,
                    int64_t batch_blocks, int threads) {
  return guarded([&] {
    sparse::Plan& p = *static_cast<sparse::Plan*>(plan);
    sparse::set_values(p, values, threads);
    sparse::convolve(p, src, bias, dst, batch_blocks, threads);
  });
}

int sparse_weight_gradient(const void* plan, const float* x, const float* grad, float* out,
                           int64_t samples, int threads) {
  return guarded([&] {
    sparse::weight_gradient(*static_cast<const sparse::Plan*>(plan), x, grad, out, samples, threads);
  });
}

// shape: see sparse_plan_create; out: the whole weight's gradient.
int sparse_dense_gradient(const int64_t* shape, const float* x, const float* grad, float* out,
                          int64_t samples, int threads) {
  return guarded([&] {
    const sparse::Shape s{shape[0], shape[1], shape[2], shape[3],
                          shape[4], shape[5], shape[6], shape[7]};
    sparse::dense_weight_gradient(s, x, grad, out, samples, threads);
  });
}

void sparse_sgd(float* weight, float* momentum, const int64_t* index, const float* gradient,
                int64_t count, float lr, float a, float weight_decay, int nesterov, int threads) {
  const sparse::Sgd rule{lr, a, weight_decay, nesterov};
  sparse::sgd_at(weight, momentum, index, gradient, count, rule, threads);
}

void sparse_convert(int to_blocked, float* plain, int64_t stride_n, int64_t stride_c,
                    int64_t stride_p, float* blocked, int64_t samples, int64_t channels,
                    int64_t pixels, int threads) {
  const sparse::Strides s{stride_n, stride_c, stride_p};
  if (to_blocked) sparse::convert<true>(plain, s, blocked, samples, channels, pixels, threads);
  else sparse::convert<false>(plain, s, blocked, samples, channels, pixels, threads);
}

void sparse_norm_forward(const float* x, float* y, float* mean, float* var, const float* weight,
                         const float* bias, double eps, int relu, int training, int64_t samples,
                         int64_t channels, int64_t pixels, int threads) {
  sparse::norm_forward(x, y, mean, var, weight, bias, eps, relu, training, samples, channels, pixels,
                       threads);
}

void sparse_norm_backward(const float* x, const float* grad, float* dx, float* dweight, float* dbias,
                          const float* mean, const float* var, const float* weight,
                          const float* bias, double eps, int relu, int frozen, int64_t samples,
                          int64_t channels, int64_t pixels, int threads) {
  sparse::norm_backward(x, grad, dx, dweight, dbias, mean, var, weight, bias, eps, relu, frozen,
                        samples, channels, pixels, threads);
}

void sparse_channel_sum(const float* x, float* out, int64_t samples, int64_t channels,
                        int64_t pixels, int threads) {
  sparse::channel_sum(x, out, samples, channels, pixels, threads);
}

void sparse_max_pool(int backward, int relu, int64_t planes, int64_t height, int64_t width, int64_t size,
                     int64_t stride, const float* from, float* to, uint8_t* which, int threads) {
  const sparse::Pool p{planes, height, width, size, stride};
  if (backward) sparse::max_pool_backward(p, from, which, to, threads);
  else sparse::max_pool_forward(p, relu != 0, from, to, which, threads);
}

void sparse_mean_pool(int backward, int64_t planes, int64_t height, int64_t width, int64_t size,
                      int64_t stride, const float* from, float* to, int threads) {
  const sparse::Pool p{planes, height, width, size, stride};
  if (backward) sparse::mean_pool_backward(p, from, to, threads);
  else sparse::mean_pool_forward(p, from, to, threads);
}

// See perceptron.hpp.
int perceptron_step(const sparse::PerceptronLayer* layers, int64_t depth, const float* x,
                    const int64_t* labels, int64_t images, const int64_t* index, int64_t samples,
                    float lr, float momentum, float weight_decay, int nesterov, int track,
                    int threads, double* loss) {
  return guarded([&] {
    const sparse::Sgd rule{lr, momentum, weight_decay, nesterov};
    *loss = sparse::perceptron_step(layers, depth, x, labels, images, index, samples, rule, track,
                                    threads);
  });
}

int perceptron_wrong(const sparse::PerceptronLayer* layers, int64_t depth, const float* x,
                     const int64_t* labels, int64_t images, int threads, int64_t* wrong) {
  return guarded(
      [&] { *wrong = sparse::perceptron_wrong(layers, depth, x, labels, images, threads); });
}

// See select.hpp; masks are bytes.
int64_t mask_count(const uint8_t* mask, int64_t n) { return sparse::count_set(mask, n); }

void mask_as_floats(const uint8_t* mask, int64_t n, float* out) {
  std::copy(mask, mask + n, out);
}

int mask_take_nonzeros(const uint8_t* mask, int64_t count, const float* weight,
                       const float* momentum, const sparse::Nonzeros* nonzeros) {
  return guarded([&] { sparse::take_nonzeros(mask, count, weight, momentum, *nonzeros); });
}

void mask_put_nonzeros(const sparse::Nonzeros* nonzeros, int64_t count, float* weight,
                       float* momentum) {
  sparse::put_nonzeros(*nonzeros, count, weight, momentum);
}

int deepr_move(const sparse::PerceptronLayer* layer, const int8_t* sign, const float* noise,
               float shrinkage, int64_t* died) {
  return guarded([&] { *died = sparse::deepr_move(*layer, sign, noise, shrinkage); });
}

// Of the structures that lib/cpu/layouts.py mirrors, in its order.
void sparse_sizes(int64_t* bytes) {
  const size_t sizes[] = {sizeof(sparse::Nonzeros), sizeof(sparse::PerceptronLayer)};
  std::copy(std::begin(sizes), std::end(sizes), bytes);
}

int deepr_wake(sparse::PerceptronLayer* layers, int64_t depth, const int64_t* chosen,
               int64_t count) {
  return guarded([&] { sparse::deepr_wake(layers, depth, chosen, count); });
}

}  // extern "C"
