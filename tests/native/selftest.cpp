// Checks the kernels against plain loops on buffers of exact size; built with sanitizers by the
// tests.  Prints the first disagreement and returns 1.
#include <cmath>
#include <cstdio>
#include <random>

#include "sparse.cpp"

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
  if (count == s.out_channels * s.in_channels * s.kernel_h * s.kernel_w) {
    std::vector<float> whole(count, NAN);
    dense_weight_gradient(s, x.data(), g.data(), whole.data(), samples, threads);
    if (!close("gradient of a whole weight", whole, dw0)) return false;
  }
  return close("output", y, y0) && close("input gradient", dx, dx0) &&
         close("weight gradient", dw, dw0);
}

static bool norm(int64_t samples, int64_t channels, int64_t pixels) {
  std::vector<float> x = noise(ceil_div(samples, L) * channels * pixels * L), y(x), dx(x);
  std::vector<float> mean(channels), var(channels), a = noise(channels), b = noise(channels);
  std::vector<float> da(channels), db(channels), sums(channels);
  sparse_norm_forward(x.data(), y.data(), mean.data(), var.data(), a.data(), b.data(), 1e-5, 1, 1,
                      samples, channels, pixels, 2);
  sparse_norm_backward(x.data(), y.data(), dx.data(), da.data(), db.data(), mean.data(), var.data(),
                       a.data(), b.data(), 1e-5, 1, 0, samples, channels, pixels, 2);
  sparse_channel_sum(x.data(), sums.data(), samples, channels, pixels, 2);
  std::vector<double> want(channels);
  for (int64_t c = 0; c < channels; ++c) want[c] = double(mean[c]) * samples * pixels;
  return close("channel sum", sums, want);
}

// One layer's memory, every part of exactly its size, and the same in double for the plain loops.
struct Memory {
  int64_t in, out;
  bool sparse;
  std::vector<float> weight, momentum, multiplier, gradient, bias, bias_momentum, value,
      value_momentum;
  std::vector<int32_t> row_start{0}, column, column_start{0}, row, place;
  std::vector<double> w, m, b, bm;      // the weights and biases in double, and their momentum
  // Of batch norm: scale, its momentum, shift, its momentum, running mean and variance.
  std::vector<std::vector<float>> norm;
  std::vector<std::vector<double>> plain_norm;
  std::vector<char> mask;
  PerceptronLayer layer;

  // mask: nothing (dense), or [out * in]; as a sparse layer, or as a dense one with a multiplier.
  Memory(int64_t in, int64_t out, std::vector<char> given, bool sparse, bool gradients,
         bool normed = false, bool biased = true)
      : in(in), out(out), sparse(sparse), weight(noise(out * in)), momentum(noise(out * in)),
        gradient(gradients ? out * in : 0, NAN), bias(noise(biased ? out : 0)),
        bias_momentum(noise(biased ? out : 0)),
        mask(std::move(given)) {
    const bool masked = !mask.empty();
    if (!masked) mask.assign(out * in, 1);
    for (int64_t k = 0; k < out * in; ++k) weight[k] *= float(mask[k]) / std::sqrt(float(in));
    if (masked && !sparse) multiplier.assign(mask.begin(), mask.end());
    w.assign(weight.begin(), weight.end()), m.assign(momentum.begin(), momentum.end());
    b.assign(bias.begin(), bias.end()), bm.assign(bias_momentum.begin(), bias_momentum.end());
    if (sparse) {
      for (int64_t r = 0; r < out; ++r) {
        for (int64_t c = 0; c < in; ++c)
          if (mask[r * in + c]) {
            column.push_back(int32_t(c));
            value.push_back(weight[r * in + c]);
            value_momentum.push_back(momentum[r * in + c]);
          }
        row_start.push_back(int32_t(column.size()));
      }
      for (int64_t c = 0; c < in; ++c) {
        for (int64_t r = 0; r < out; ++r)
          for (int32_t k = row_start[r]; k < row_start[r + 1]; ++k)
            if (column[k] == c) row.push_back(int32_t(r)), place.push_back(k);
        column_start.push_back(int32_t(row.size()));
      }
    }
    for (std::vector<float>* v : {&multiplier, &gradient, &value, &value_momentum})
      v->shrink_to_fit();
    for (std::vector<int32_t>* v : {&row_start, &column, &column_start, &row, &place})
      v->shrink_to_fit();
    const bool multiplied = masked && !sparse;
    layer = {in, out, weight.data(), momentum.data(), multiplied ? multiplier.data() : nullptr,
             gradients ? gradient.data() : nullptr, biased ? bias.data() : nullptr,
             biased ? bias_momentum.data() : nullptr,
             sparse ? int64_t(column.size()) : -1, row_start.data(), column.data(), value.data(),
             value_momentum.data(), column_start.data(), row.data(), place.data(), nullptr, nullptr,
             nullptr, nullptr, nullptr, nullptr, 0, 0};
    if (!normed) return;
    for (int k = 0; k < 6; ++k) {
      norm.push_back(noise(out));
      if (k == 5) for (float& v : norm[k]) v = 0.5f + v * v;
      plain_norm.emplace_back(norm[k].begin(), norm[k].end());
    }
    layer.scale = norm[0].data(), layer.scale_momentum = norm[1].data();
    layer.shift = norm[2].data(), layer.shift_momentum = norm[3].data();
    layer.mean = norm[4].data(), layer.variance = norm[5].data();
    layer.norm_momentum = 0.25f, layer.eps = 0.01f;
  }

  // The values of a sparse layer where a dense one has them.
  void write_back() {
    for (int64_t r = 0; sparse && r < out; ++r)
      for (int32_t k = row_start[r]; k < row_start[r + 1]; ++k) {
        weight[r * in + column[k]] = value[k];
        momentum[r * in + column[k]] = value_momentum[k];
      }
  }
};

static std::vector<char> some(int64_t count, double density) {
  std::uniform_real_distribution<double> uniform;
  std::vector<char> mask(count);
  for (char& m : mask) m = uniform(rng) < density;
  return mask;
}

using Rows = std::vector<std::vector<double>>;  // [samples][features]

// Of a mini-batch `x` in double: `act` gets the inputs of all layers and the logits; `normal` and
// `deviation` of each layer what batch norm makes of its outputs before scale and shift, and the
// standard deviations [out]. In training the running estimates move.
static void plain_forward(std::vector<Memory>& net, const Rows& x, bool training,
                          std::vector<Rows>& act, std::vector<Rows>& normal, Rows& deviation) {
  const double n = double(x.size());
  act.assign(1, x), normal.assign(net.size(), Rows()), deviation.assign(net.size(), {});
  for (size_t k = 0; k < net.size(); ++k) {
    Memory& f = net[k];
    Rows y(x.size(), f.b.empty() ? std::vector<double>(f.out) : f.b);
    for (size_t i = 0; i < x.size(); ++i)
      for (int64_t r = 0; r < f.out; ++r)
        for (int64_t c = 0; c < f.in; ++c) y[i][r] += f.w[r * f.in + c] * act[k][i][c];
    if (!f.norm.empty()) {
      normal[k] = y, deviation[k].resize(f.out);
      for (int64_t r = 0; r < f.out; ++r) {
        double mean = f.plain_norm[4][r], variance = f.plain_norm[5][r];
        if (training) {
          mean = variance = 0;
          for (const auto& row : y) mean += row[r] / n;
          for (const auto& row : y) variance += (row[r] - mean) * (row[r] - mean) / n;
          f.plain_norm[4][r] += 0.25 * (mean - f.plain_norm[4][r]);
          f.plain_norm[5][r] += 0.25 * (variance * n / (n - 1) - f.plain_norm[5][r]);
        }
        deviation[k][r] = std::sqrt(variance + 0.01);
        for (size_t i = 0; i < x.size(); ++i) {
          normal[k][i][r] = (y[i][r] - mean) / deviation[k][r];
          y[i][r] = f.plain_norm[0][r] * normal[k][i][r] + f.plain_norm[2][r];
        }
      }
    }
    for (auto& row : y)
      for (double& v : row) v = k + 1 < net.size() ? std::max(v, 0.0) : v;
    act.push_back(y);
  }
}

// A step and the count of wrong answers of a net of these layers, against plain loops in double.
static bool perceptron(std::vector<Memory>& net, int64_t images, int64_t samples, int32_t track,
                       bool nesterov, int threads) {
  const int64_t depth = int64_t(net.size()), in = net[0].in, classes = net.back().out;
  const std::vector<float> x = noise(images * in);
  std::vector<int64_t> labels(images), index(samples);
  for (int64_t& y : labels) y = int64_t(rng() % uint64_t(classes));
  for (int64_t& k : index) k = int64_t(rng() % uint64_t(images));
  index.back() = images - 1;  // the last row of x ends where the memory does
  std::vector<PerceptronLayer> layers;
  for (Memory& layer : net) layers.push_back(layer.layer);
  layers.shrink_to_fit();

  const Sgd rule{0.1f, 0.9f, 0.01f, nesterov};
  auto sgd = [&](double& w, double& m, double g) {
    g += 0.01 * w, m = 0.9 * m + g, w -= 0.1 * (nesterov ? g + 0.9 * m : m);
  };
  std::vector<Rows> act, normal;
  Rows gradient, bias_gradient, deviation, all, batch;
  for (int64_t n = 0; n < images; ++n) all.emplace_back(x.data() + n * in, x.data() + (n + 1) * in);
  for (int64_t n : index) batch.push_back(all[n]);
  for (const Memory& layer : net) {
    gradient.emplace_back(layer.out * layer.in);
    bias_gradient.emplace_back(layer.out);
  }
  double want = 0;
  int64_t wrong = 0;
  plain_forward(net, all, false, act, normal, deviation);
  for (int64_t n = 0; n < images; ++n) {
    const std::vector<double>& z = act[depth][n];
    wrong += std::max_element(z.begin(), z.end()) - z.begin() != labels[n];
  }
  // The kernels' own memory holds what was there before: nothing of it may show.
  auto spoil = [] { std::fill_n(workspace(400000), 400000, NAN); };
  spoil();
  const int64_t counted =
      count_wrong(layers.data(), depth, x.data(), labels.data(), images, threads);
  if (counted != wrong)
    return std::printf("%ld wrong answers, expected %ld\n", long(counted), long(wrong)), false;
  plain_forward(net, batch, true, act, normal, deviation);
  Rows d = act[depth];
  for (int64_t n = 0; n < samples; ++n) {
    const double top = *std::max_element(d[n].begin(), d[n].end());
    double sum = 0;
    for (double z : d[n]) sum += std::exp(z - top);
    want += (std::log(sum) + top - d[n][labels[index[n]]]) / double(samples);
    for (double& z : d[n]) z = std::exp(z - top) / sum / double(samples);
    d[n][labels[index[n]]] -= 1 / double(samples);
  }
  for (int64_t k = depth - 1; k >= 0; --k) {
    Memory& f = net[k];
    for (int64_t r = 0; r < f.out && !f.norm.empty(); ++r) {
      double shift = 0, scale = 0;
      for (int64_t n = 0; n < samples; ++n) shift += d[n][r], scale += d[n][r] * normal[k][n][r];
      for (int64_t n = 0; n < samples; ++n)
        d[n][r] = (d[n][r] - (shift + scale * normal[k][n][r]) / double(samples)) *
                  f.plain_norm[0][r] / deviation[k][r];
      sgd(f.plain_norm[0][r], f.plain_norm[1][r], scale);
      sgd(f.plain_norm[2][r], f.plain_norm[3][r], shift);
    }
    Rows before(samples, std::vector<double>(f.in));
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t r = 0; r < f.out; ++r) {
        bias_gradient[k][r] += d[n][r];
        for (int64_t c = 0; c < f.in; ++c) {
          gradient[k][r * f.in + c] += d[n][r] * act[k][n][c];
          before[n][c] += act[k][n][c] > 0 ? d[n][r] * f.w[r * f.in + c] : 0;
        }
      }
    d = before;
  }
  spoil();
  const double loss = train_step(layers.data(), depth, x.data(), labels.data(), images, index.data(),
                                 samples, rule, track, threads);
  if (!(std::fabs(loss - want) <= 1e-4 * (1 + want)))
    return std::printf("loss %g, expected %g\n", loss, want), false;
  for (int64_t k = 0; k < depth; ++k) {
    Memory& f = net[k];
    f.write_back();
    for (int64_t p = 0; p < f.out * f.in; ++p) {
      const double old = f.m[p];
      sgd(f.w[p], f.m[p], gradient[k][p]);
      f.w[p] *= f.mask[p];
      if (f.sparse && !f.mask[p])
        f.m[p] = track == kTrackNothing ? old
                                        : gradient[k][p] + (track == kTrackMore ? 0.9 * old : 0);
    }
    for (size_t r = 0; r < f.b.size(); ++r) sgd(f.b[r], f.bm[r], bias_gradient[k][r]);
    if (!close("weight", f.weight, f.w) || !close("momentum", f.momentum, f.m) ||
        !close("bias", f.bias, f.b) || !close("bias momentum", f.bias_momentum, f.bm) ||
        (f.layer.gradient && !close("gradient", f.gradient, gradient[k])))
      return std::printf("in layer %ld of %ld\n", long(k), long(depth)), false;
    for (size_t part = 0; part < f.norm.size(); ++part)
      if (!close("batch norm", f.norm[part], f.plain_norm[part]))
        return std::printf("part %zu in layer %ld of %ld\n", part, long(k), long(depth)), false;
  }
  return true;
}

// Throws, and touches nothing, for what is not there.
static bool refuses(int64_t samples, int64_t place, int64_t label, bool normed = false) {
  std::vector<Memory> net;
  net.emplace_back(3, 4, some(12, 0.5), true, false, normed);
  const std::vector<float> x = noise(7 * 3), before = net[0].value;
  std::vector<int64_t> labels(7, label), index(samples, place);
  try {
    train_step(&net[0].layer, 1, x.data(), labels.data(), 7, index.data(), samples,
               Sgd{0.1f, 0.9f, 0, 0}, kTrackNothing, 1);
  } catch (const std::exception&) {
    return net[0].value == before;
  }
  std::printf("no exception: %ld samples, image %ld, label %ld\n", long(samples), long(place),
              long(label));
  return false;
}

// Two steps of DeepR on the sparse ones of these layers, against plain loops over their masks.
static bool deepr(std::vector<Memory>& net) {
  const float shrinkage = 0.3f;
  std::vector<PerceptronLayer> layers;
  std::vector<std::vector<int8_t>> sign;
  std::vector<std::vector<int32_t>> column, row, place;
  std::vector<std::vector<float>> value, momentum;
  int64_t total = 0;
  for (const Memory& f : net) total += f.sparse ? f.layer.nonzeros : 0;
  for (Memory& f : net) {  // room for all that may wake here
    const size_t room = size_t(f.sparse ? std::min(total, f.in * f.out) : 0);
    for (auto* of : {&column, &row, &place}) of->emplace_back(room), of->back().shrink_to_fit();
    for (auto* of : {&value, &momentum}) of->emplace_back(room), of->back().shrink_to_fit();
    PerceptronLayer layer = f.layer;
    std::copy(f.column.begin(), f.column.end(), column.back().begin());
    std::copy(f.row.begin(), f.row.end(), row.back().begin());
    std::copy(f.place.begin(), f.place.end(), place.back().begin());
    std::copy(f.value.begin(), f.value.end(), value.back().begin());
    std::copy(f.value_momentum.begin(), f.value_momentum.end(), momentum.back().begin());
    layer.column = column.back().data(), layer.row = row.back().data();
    layer.place = place.back().data(), layer.value = value.back().data();
    layer.value_momentum = momentum.back().data();
    layers.push_back(layer);
    sign.emplace_back(f.in * f.out);
    for (int64_t k = 0; k < f.in * f.out; ++k) {
      sign.back()[k] = f.mask[k] ? (f.weight[k] < 0 ? -1 : 1) : (rng() % 2 ? 1 : -1);
      f.w[k] = f.sparse ? f.weight[k] : f.w[k], f.m[k] = f.mask[k] ? f.momentum[k] : 0;
    }
  }
  for (int step = 0; step < 2; ++step) {
    int64_t died = 0, want = 0;
    std::vector<std::pair<size_t, int64_t>> dormant;  // layer and position
    for (size_t k = 0; k < net.size(); ++k) {
      Memory& f = net[k];
      if (!f.sparse) continue;
      const std::vector<float> shift = noise(layers[k].nonzeros);
      died += move_weights(layers[k], sign[k].data(), step ? shift.data() : nullptr, shrinkage);
      for (int64_t p = 0, n = 0; p < f.in * f.out; ++p) {
        if (f.mask[p]) {
          f.w[p] += (step ? shift[n] : 0) - double(shrinkage) * sign[k][p];
          f.mask[p] = f.w[p] * sign[k][p] >= 0, want += !f.mask[p], ++n;
        }
        if (!f.mask[p]) f.w[p] = f.m[p] = 0, dormant.emplace_back(k, p);
      }
    }
    if (died != want) return std::printf("%ld died, expected %ld\n", long(died), long(want)), false;
    std::vector<int64_t> chosen(dormant.size());
    for (size_t k = 0; k < chosen.size(); ++k) chosen[k] = int64_t(k);
    std::shuffle(chosen.begin(), chosen.end(), rng);
    chosen.resize(size_t(died)), chosen.shrink_to_fit();
    std::sort(chosen.begin(), chosen.end());
    for (int64_t n : chosen) net[dormant[n].first].mask[dormant[n].second] = 1;
    wake(layers.data(), int64_t(layers.size()), chosen.data(), died);
    for (size_t k = 0; k < net.size(); ++k) {
      const Memory& f = net[k];
      const PerceptronLayer& got = layers[k];
      if (!f.sparse) continue;
      int32_t n = 0;
      for (int64_t p = 0; p < f.in * f.out; ++p) {
        if (p % f.in == 0 && got.row_start[p / f.in] != n)
          return std::printf("row %ld starts at %d\n", long(p / f.in), got.row_start[p / f.in]), false;
        if (!f.mask[p]) continue;
        const bool same = n < got.nonzeros && got.column[n] == p % f.in &&
                          std::fabs(got.value[n] - f.w[p]) < 1e-5 &&
                          std::fabs(got.value_momentum[n] - f.m[p]) < 1e-5;
        if (!same) return std::printf("position %ld is not as expected\n", long(p)), false;
        ++n;
      }
      if (n != got.nonzeros || n != got.row_start[f.out])
        return std::printf("%ld non-zeros, expected %d\n", long(got.nonzeros), n), false;
      for (int64_t c = 0, at = 0; k > 0 && c < f.in; ++c) {
        if (got.column_start[c] != at) return std::printf("column %ld is wrong\n", long(c)), false;
        for (int32_t r = 0, e = 0; r < f.out; ++r)
          for (; e < got.row_start[r + 1]; ++e)
            if (got.column[e] == c) {
              if (got.row[at] != r || got.place[at] != e)
                return std::printf("entry %ld by column is wrong\n", long(at)), false;
              ++at;
            }
        if (got.column_start[c + 1] != at) return std::printf("column %ld ends\n", long(c)), false;
      }
    }
  }
  return true;
}

static bool deeprs() {
  const double densities[] = {0.0, 0.05, 0.3, 0.9, 1.0};
  for (int round = 0; round < 60; ++round) {
    std::vector<Memory> net;
    int64_t in = 1 + int64_t(rng() % 40);
    for (int k = 0; k < 1 + round % 3; ++k) {
      const int64_t out = 1 + int64_t(rng() % 40);
      const bool sparse = round % 4 || k != 1;
      net.emplace_back(in, out, sparse ? some(in * out, densities[rng() % 5]) : std::vector<char>(),
                       sparse, false);
      in = out;
    }
    if (!deepr(net)) return std::printf("deepr, round %d\n", round), false;
  }
  return true;
}

static bool perceptrons() {
  const int64_t widths[] = {1, 2, 15, 16, 17, 31, 33, 64, 65};
  const int64_t batches[] = {1, 2, 15, 16, 17, 127, 128};
  // Dense, with a multiplier, sparse: some, no, all and one non-zero; an empty and a full row.
  enum { kDense, kMultiplier, kSome, kNone, kAll, kOne, kRows, kKinds };
  for (int round = 0; round < 84; ++round) {
    const int64_t depth = 1 + round % 4, samples = batches[round % 7];
    std::vector<Memory> net;
    std::vector<int> kinds;
    int64_t in = widths[rng() % 9];
    for (int64_t k = 0; k < depth; ++k) {
      const int64_t out = widths[rng() % 9];
      const int kind = round < kKinds ? round : int(rng() % kKinds);
      std::vector<char> mask;
      if (kind != kDense) mask = some(out * in, kind == kAll ? 1 : kind == kNone ? 0 : 0.3);
      if (kind == kOne) std::fill(mask.begin(), mask.end(), 0), mask.back() = 1;
      if (kind == kRows) {
        std::fill(mask.begin(), mask.begin() + in, 0);
        std::fill(mask.end() - in, mask.end(), 1);
      }
      const bool normed = samples > 1 && rng() % 2, biased = rng() % 2;
      net.emplace_back(in, out, mask, kind > kMultiplier, round % 3 == 0, normed, biased);
      kinds.push_back(kind);
      in = out;
    }
    const int64_t images = 1 + int64_t(rng() % 200);
    if (!perceptron(net, images, samples, round % 3, round % 2, 1 + round % 2)) {
      std::printf("perceptron, round %d: %ld samples of %ld, track %d, layers", round,
                  long(samples), long(images), round % 3);
      for (size_t k = 0; k < net.size(); ++k)
        std::printf(" %ldx%ld (kind %d%s%s)", long(net[k].out), long(net[k].in), kinds[k],
                    net[k].norm.empty() ? "" : ", batch norm", net[k].b.empty() ? "" : ", bias");
      return std::printf("\n"), false;
    }
  }
  return refuses(0, 0, 0) && refuses(129, 0, 0) && refuses(5, 7, 0) && refuses(5, -1, 0) &&
         refuses(5, 0, 4) && refuses(5, 0, -1) && refuses(1, 0, 0, true);
}

// Steps at some places of a weight, against torch's formula in double; the others stay.
static bool single_weights(int64_t size, int threads) {
  std::vector<float> weight = noise(size), momentum = noise(size);
  std::vector<int64_t> index;
  for (int64_t k = 0; k < size; ++k)
    if (rng() % 3) index.push_back(k);
  index.shrink_to_fit();
  const std::vector<float> gradient = noise(index.size());
  std::vector<double> w(weight.begin(), weight.end()), m(momentum.begin(), momentum.end());
  for (bool nesterov : {false, true}) {
    const Sgd rule{0.1f, 0.9f, 0.01f, nesterov};
    sgd_at(weight.data(), momentum.data(), index.data(), gradient.data(), int64_t(index.size()), rule,
           threads);
    for (size_t k = 0; k < index.size(); ++k) {
      const int64_t at = index[k];
      const double g = gradient[k] + 0.01 * w[at];
      m[at] = 0.9 * m[at] + g;
      w[at] -= 0.1 * (nesterov ? g + 0.9 * m[at] : m[at]);
    }
  }
  return close("weight after steps", weight, w) && close("its momentum", momentum, m);
}

int main() {
  if (!single_weights(1, 1) || !single_weights(1000, 1) || !single_weights(70000, 3)) return 1;
  if (!perceptrons() || !deeprs()) return 1;
  std::uniform_real_distribution<double> uniform;
  auto pick = [&](int64_t lo, int64_t hi) { return lo + int64_t(rng() % uint64_t(hi - lo + 1)); };
  for (int round = 0; round < 60; ++round) {
    Shape s{pick(1, 9), pick(1, 9), pick(1, 5), pick(1, 5), pick(1, 3), pick(0, 3),
            pick(1, 11), pick(1, 11)};
    if (round % 4 == 0) s.height = s.width = s.kernel_h = s.kernel_w = s.stride = 1, s.padding = 0;
    if (round % 4 == 1) s.height = s.width = 2;
    if (round % 20 == 2)
      s.out_channels = 200, s.in_channels = 60, s.height = s.width = 4, s.kernel_h = s.kernel_w = 2;
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
    if (!norm(pick(1, 40), pick(1, 40), pick(1, 81))) return 1;
  }
  std::printf("ok\n");
  return 0;
}
