// Checks the kernels against plain loops on buffers of exact size; built with sanitizers by the
// tests.  Prints the first disagreement and returns 1.
#include <cmath>
#include <cstdio>
#include <random>

#include "blocked.hpp"

using namespace sparse;

static std::mt19937 rng(7);

// Heap memory of exactly this size, so that the address sanitizer sees every step outside.
static std::vector<float> noise(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> v(n);
  for (float& x : v) x = normal(rng);
  v.shrink_to_fit();
  return v;
}

static bool close(const char* what, const std::vector<float>& got, const std::vector<double>& want) {
  for (size_t k = 0; k < want.size(); ++k)
    if (!(std::fabs(got[k] - want[k]) <= 1e-4 * (1 + std::fabs(want[k])))) {
      std::printf("%s: element %zu is %g, expected %g\n", what, k, got[k], want[k]);
      return false;
    }
  return true;
}

static bool convolution(const Shape& s, int64_t samples, const std::vector<Coord>& coords,
                        int threads) {
  const int64_t blocks = ceil_div(samples, L), oh = s.out_height(), ow = s.out_width();
  const int64_t in = s.in_channels * s.height * s.width, out = s.out_channels * oh * ow;
  const int64_t count = int64_t(coords.size());
  std::vector<float> x = noise(blocks * in * L), g = noise(blocks * out * L), w = noise(count),
                     bias = noise(s.out_channels), y(g.size(), NAN), dx(x.size(), NAN),
                     dw(count, NAN);
  std::vector<double> y0(y.size()), dx0(x.size()), dw0(count);
  for (int64_t n = 0; n < blocks; ++n) {
    for (int64_t k = 0; k < out * L; ++k) y0[n * out * L + k] = bias[k / (oh * ow * L)];
    for (int64_t k = 0; k < count; ++k) {
      const Coord& q = coords[k];
      for (int64_t i = 0; i < oh; ++i)
        for (int64_t j = 0; j < ow; ++j) {
          const int64_t r = i * s.stride + q.kh - s.padding, c = j * s.stride + q.kw - s.padding;
          if (r < 0 || r >= s.height || c < 0 || c >= s.width) continue;
          const int64_t a = (n * in + (q.c * s.height + r) * s.width + c) * L;
          const int64_t b = (n * out + (q.o * oh + i) * ow + j) * L;
          for (int64_t l = 0; l < L; ++l) {
            y0[b + l] += double(w[k]) * x[a + l];
            dx0[a + l] += double(w[k]) * g[b + l];
            if (n * L + l < samples) dw0[k] += double(x[a + l]) * g[b + l];
          }
        }
    }
  }
  Plan forward = make_plan(s, coords.data(), count, false, 0, 0, blocks, threads);
  set_values(forward, w.data(), threads);
  convolve(forward, x.data(), bias.data(), y.data(), blocks, threads);
  weight_gradient(forward, x.data(), g.data(), dw.data(), samples, threads);
  for (int64_t a = 0; a < s.stride; ++a)
    for (int64_t b = 0; b < s.stride; ++b) {
      Plan p = make_plan(s, coords.data(), count, true, a, b, blocks, threads);
      set_values(p, w.data(), threads);
      convolve(p, g.data(), nullptr, dx.data(), blocks, threads);
    }
  return close("output", y, y0) && close("input gradient", dx, dx0) &&
         close("weight gradient", dw, dw0);
}

static bool surroundings(int64_t samples, int64_t channels, int64_t h, int64_t w, bool last) {
  const int64_t pixels = h * w, blocks = ceil_div(samples, L);
  std::vector<float> plain = noise(samples * channels * pixels), back(plain.size(), NAN);
  std::vector<float> x(blocks * channels * pixels * L, NAN), y(x), dx(x);
  const Strides s = last ? Strides{channels * pixels, 1, channels}
                         : Strides{channels * pixels, pixels, 1};
  convert<true>(plain.data(), s, x.data(), samples, channels, pixels, 2);
  convert<false>(back.data(), s, x.data(), samples, channels, pixels, 2);
  if (plain != back) return std::printf("conversion there and back changes the values\n"), false;
  std::vector<float> mean(channels), var(channels), a = noise(channels), b = noise(channels);
  std::vector<float> da(channels), db(channels), sums(channels);
  norm_forward(x.data(), y.data(), mean.data(), var.data(), a.data(), b.data(), 1e-5, true, true,
               samples, channels, pixels, 2);
  norm_backward(x.data(), y.data(), dx.data(), da.data(), db.data(), mean.data(), var.data(),
                a.data(), b.data(), 1e-5, true, false, samples, channels, pixels, 2);
  channel_sum(x.data(), sums.data(), samples, channels, pixels, 2);
  std::vector<double> want(channels);
  for (int64_t c = 0; c < channels; ++c) want[c] = double(mean[c]) * samples * pixels;
  if (!close("channel sum", sums, want)) return false;
  for (int64_t size : {2, 3}) {
    if (h < size || w < size) continue;
    const Pool p{blocks * channels, h, w, size, 2};
    const int64_t outputs = p.planes * p.out_height() * p.out_width() * L;
    std::vector<float> pooled(outputs);
    std::vector<uint8_t> which(outputs);
    max_pool_forward(p, x.data(), pooled.data(), which.data(), 2);
    max_pool_backward(p, pooled.data(), which.data(), dx.data(), 2);
    mean_pool_forward(p, x.data(), pooled.data(), 2);
    mean_pool_backward(p, pooled.data(), dx.data(), 2);
  }
  return true;
}

int main() {
  std::uniform_real_distribution<double> uniform;
  auto pick = [&](int64_t lo, int64_t hi) { return lo + int64_t(rng() % uint64_t(hi - lo + 1)); };
  for (int round = 0; round < 60; ++round) {
    Shape s{pick(1, 9), pick(1, 9), pick(1, 5), pick(1, 5), pick(1, 3), pick(0, 3),
            pick(1, 11), pick(1, 11)};
    if (round % 4 == 0) s.height = s.width = s.kernel_h = s.kernel_w = s.stride = 1, s.padding = 0;
    if (round % 4 == 1) s.height = s.width = 2;
    if (round % 20 == 2) s.out_channels = 200, s.in_channels = 60, s.height = s.width = 4;
    if (s.height + 2 * s.padding < s.kernel_h || s.width + 2 * s.padding < s.kernel_w) continue;
    const double densities[] = {0.0, 0.05, 0.3, 1.0};
    const double density = densities[pick(0, 3)];
    std::vector<Coord> coords;
    for (int32_t o = 0; o < s.out_channels; ++o)
      for (int32_t c = 0; c < s.in_channels; ++c)
        for (int32_t a = 0; a < s.kernel_h; ++a)
          for (int32_t b = 0; b < s.kernel_w; ++b)
            if (uniform(rng) < density) coords.push_back({o, c, a, b});
    coords.shrink_to_fit();
    const int64_t samples = round % 5 ? pick(1, 70) : pick(200, 300);
    if (!convolution(s, samples, coords, 1 + round % 3)) {
      std::printf("round %d: out %ld in %ld kernel %ldx%ld stride %ld padding %ld input %ldx%ld "
                  "samples %ld non-zeros %zu\n",
                  round, long(s.out_channels), long(s.in_channels), long(s.kernel_h),
                  long(s.kernel_w), long(s.stride), long(s.padding), long(s.height), long(s.width),
                  long(samples), coords.size());
      return 1;
    }
    if (!surroundings(pick(1, 40), pick(1, 40), pick(1, 9), pick(1, 9), round % 2)) return 1;
  }
  std::printf("ok\n");
  return 0;
}
