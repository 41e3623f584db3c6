// Sparse convolutions on the CPU: loops over the non-zero weights, free of torch.
//
// Activations are "batch-blocked": [ceil(N / 16), C, H, W, 16] floats, so one non-zero weight is one
// scalar times contiguous vectors of 16 samples.  A linear layer is a 1x1 convolution with H = W = 1.
//
// One inner loop serves the forward pass, the input gradient and the weight gradient.  A tile of
// R x Q vectors of the output of one channel stays in registers while the loop runs over the
// non-zeros of that channel; each of them costs one load and one multiply-add per vector.  So the
// speed is that of the loads, and everything around the loop serves to have them hit the first-level
// cache: the input of a strip of tiles is copied into a zero-padded buffer (second-level cache),
// stride and padding vanish in that copy, and the non-zeros are sorted by blocks of input channels
// small enough for the first-level cache.  The partial sums of a tile wait in a scratch buffer
// between two blocks.
//
// The input gradient is the same loop on the transposed pattern, once per phase of the stride.
#pragma once

#include <omp.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

namespace sparse {

constexpr int L = 16;  // samples in a block: the lanes of a vector

#ifdef __AVX512F__
constexpr int kTile = 24, kWide = 4, kSums = 16;  // vectors of sums in registers; see their uses
typedef float V __attribute__((vector_size(64)));
typedef int32_t VI __attribute__((vector_size(64)));
// The same vector at any float's address; tensors promise no more than that.
typedef float VU __attribute__((vector_size(64), aligned(4), may_alias));
static inline V load(const float* p) { return *reinterpret_cast<const VU*>(p); }
static inline void store(float* p, V v) { *reinterpret_cast<VU*>(p) = v; }
static inline V select(VI where, V x, V y) { return where ? x : y; }
#else
// Two halves, because compilers leave vectors wider than the processor's in memory.
constexpr int kTile = 6, kWide = 1, kSums = 4;
typedef float H __attribute__((vector_size(32)));
typedef int32_t HI __attribute__((vector_size(32)));
typedef float HU __attribute__((vector_size(32), aligned(4), may_alias));
struct VI {
  HI a, b;
};
struct V {
  H a, b;
  V() = default;
  V(H a, H b) : a(a), b(b) {}
  V(float s) : a(s - H{}), b(s - H{}) {}
  float operator[](int lane) const { return lane < 8 ? a[lane] : b[lane - 8]; }
  friend V operator+(V x, V y) { return {x.a + y.a, x.b + y.b}; }
  friend V operator-(V x, V y) { return {x.a - y.a, x.b - y.b}; }
  friend V operator*(V x, V y) { return {x.a * y.a, x.b * y.b}; }
  friend VI operator<(V x, V y) { return {x.a < y.a, x.b < y.b}; }
  friend VI operator>(V x, V y) { return y < x; }
  V& operator+=(V x) { return *this = *this + x; }
  V& operator-=(V x) { return *this = *this - x; }
};
static inline V load(const float* p) {
  return {*reinterpret_cast<const HU*>(p), *reinterpret_cast<const HU*>(p + 8)};
}
static inline void store(float* p, V v) {
  *reinterpret_cast<HU*>(p) = v.a, *reinterpret_cast<HU*>(p + 8) = v.b;
}
static inline V select(VI where, V x, V y) {
  return {where.a ? x.a : y.a, where.b ? x.b : y.b};
}
#endif

static inline V broadcast(float s) { return s - V{}; }

static inline int64_t aligned(int64_t floats) { return (floats + L - 1) / L * L; }

// Uninitialised floats at a cache line's address, kept by the calling thread for its next call:
// fresh pages would cost more than the small layers' arithmetic.
static inline float* workspace(int64_t floats) {
  struct Holder {
    float* data = nullptr;
    int64_t size = 0;
    ~Holder() { std::free(data); }
  };
  static thread_local Holder held;
  if (held.size < floats) {
    std::free(held.data);
    held.size = 0;
    held.data = static_cast<float*>(std::aligned_alloc(64, aligned(floats) * sizeof(float)));
    if (!held.data) throw std::bad_alloc();
    held.size = floats;
  }
  return held.data;
}

struct Entry {
  int32_t offset;  // floats from the tile's first pixel in the packed strip
  float value;
};

// The convolution a pattern belongs to.
struct Shape {
  int64_t out_channels, in_channels, kernel_h, kernel_w, stride, padding;
  int64_t height, width;  // of the input
  int64_t out_height() const { return (height + 2 * padding - kernel_h) / stride + 1; }
  int64_t out_width() const { return (width + 2 * padding - kernel_w) / stride + 1; }
};

// One non-zero: output channel, input channel, row and column of the kernel.
struct Coord {
  int32_t o, c, kh, kw;
};

static inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What the inner loop needs to know, made once per mask: tile, packing and the sorted non-zeros.
struct Plan {
  int64_t src_channels = 0, src_h = 0, src_w = 0;  // what is read
  int64_t dst_channels = 0, dst_h = 0, dst_w = 0;  // what is written
  int64_t grid_h = 0, grid_w = 0;                  // pixels of dst this plan computes:
  int64_t dst_step = 1, dst_y = 0, dst_x = 0;      // (y, x) = (i, j) * dst_step + (dst_y, dst_x)
  int64_t src_step = 1;                            // stride on the side that is read
  std::vector<int64_t> phase_h, phase_w;           // residues modulo src_step that occur
  int64_t shift_h0 = 0, shift_w0 = 0;              // smallest shift of a packed row / column
  int tile_h = 4, tile_w = 4, tile_n = 1;          // pixels and batch blocks of one tile
  int rows = 4, cols = 4;                          // the same tile as R x Q vectors
  int64_t strip_w = 4;                             // columns of one strip (a multiple of tile_w)
  int64_t pack_h = 0, pack_w = 0;                  // packed rows and columns per channel and phase
  int64_t block = 1, chunk = 1;                    // input channels / output channels at a time
  std::vector<int64_t> start;                      // first entry of (chunk, block, output channel)
  std::vector<Entry> entries;
  std::vector<int32_t> source;                     // entry -> index of the non-zero

  int64_t blocks() const { return ceil_div(src_channels, block); }
  int64_t chunks() const { return ceil_div(dst_channels, chunk); }
  int64_t vectors() const { return int64_t(rows) * cols; }
  int64_t pixel() const { return int64_t(tile_n) * L; }
  int64_t packed_floats() const {
    return src_channels * int64_t(phase_h.size() * phase_w.size()) * pack_h * pack_w * pixel();
  }
};

// Sizes that decide the blocking: bytes of first- and second-level cache to fill, of the scratch of
// partial sums, and the non-zeros below which a block of input channels is too small.
constexpr int64_t kL1 = 36 * 1024, kL2 = 1024 * 1024, kChunkBytes = 256 * 1024;
constexpr double kMinEntries = 5;

namespace detail {

struct Tap {
  int64_t dst, src, phase_y, phase_x, shift_y, shift_x;
};

static inline int64_t index_of(const std::vector<int64_t>& v, int64_t x) {
  return std::find(v.begin(), v.end(), x) - v.begin();
}

static inline void add_unique(std::vector<int64_t>& v, int64_t x) {
  if (std::find(v.begin(), v.end(), x) == v.end()) v.push_back(x);
}

static inline void choose_tile(Plan& p, int64_t batch_blocks) {
  if (p.grid_h == 1 && p.grid_w == 1) {
    p.tile_h = p.tile_w = 1;
    p.tile_n = batch_blocks >= 16 ? 16 : batch_blocks > 4 ? 8 : batch_blocks > 1 ? 4 : 1;
    p.cols = std::min(p.tile_n, 4);
    p.rows = p.tile_n / p.cols;
  } else if (p.grid_h <= 2 && p.grid_w <= 2) {
    p.tile_h = p.tile_w = 2;
    p.tile_n = batch_blocks > 2 ? 4 : batch_blocks > 1 ? 2 : 1;
    p.rows = 4;
    p.cols = p.tile_n;
  } else {
    p.tile_h = p.tile_w = 4;
    p.tile_n = 1;
    p.rows = p.cols = 4;
  }
}

}  // namespace detail

// Plan of the forward pass (`transposed` false; also used for the weight gradient) or of one phase
// (y, x) of the input gradient.  `coords` lists the non-zeros, any order.
static inline Plan make_plan(const Shape& s, const Coord* coords, int64_t count, bool transposed,
                             int64_t phase_y, int64_t phase_x, int64_t batch_blocks,
                             int threads) {
  using detail::Tap;
  Plan p;
  std::vector<Tap> taps;
  std::vector<int32_t> ids;
  taps.reserve(count);
  ids.reserve(count);
  int64_t lo_y = 0, hi_y = 0, lo_x = 0, hi_x = 0;
  for (int64_t k = 0; k < count; ++k) {
    const Coord& q = coords[k];
    Tap t;
    if (!transposed) {
      const int64_t y = q.kh - s.padding, x = q.kw - s.padding;
      t.dst = q.o, t.src = q.c;
      t.shift_y = floor_div(y, s.stride), t.phase_y = y - t.shift_y * s.stride;
      t.shift_x = floor_div(x, s.stride), t.phase_x = x - t.shift_x * s.stride;
    } else {
      const int64_t y = phase_y + s.padding - q.kh, x = phase_x + s.padding - q.kw;
      if (y % s.stride != 0 || x % s.stride != 0) continue;
      t.dst = q.c, t.src = q.o;
      t.phase_y = t.phase_x = 0;
      t.shift_y = y / s.stride, t.shift_x = x / s.stride;
    }
    if (taps.empty()) lo_y = hi_y = t.shift_y, lo_x = hi_x = t.shift_x;
    lo_y = std::min(lo_y, t.shift_y), hi_y = std::max(hi_y, t.shift_y);
    lo_x = std::min(lo_x, t.shift_x), hi_x = std::max(hi_x, t.shift_x);
    detail::add_unique(p.phase_h, t.phase_y);
    detail::add_unique(p.phase_w, t.phase_x);
    taps.push_back(t);
    ids.push_back(int32_t(k));
  }
  if (taps.empty()) p.phase_h = p.phase_w = {0};
  const int64_t oh = s.out_height(), ow = s.out_width();
  if (!transposed) {
    p.src_channels = s.in_channels, p.src_h = s.height, p.src_w = s.width;
    p.dst_channels = s.out_channels, p.dst_h = oh, p.dst_w = ow;
    p.grid_h = oh, p.grid_w = ow, p.src_step = s.stride;
  } else {
    p.src_channels = s.out_channels, p.src_h = oh, p.src_w = ow;
    p.dst_channels = s.in_channels, p.dst_h = s.height, p.dst_w = s.width;
    p.grid_h = std::max<int64_t>(0, ceil_div(s.height - phase_y, s.stride));
    p.grid_w = std::max<int64_t>(0, ceil_div(s.width - phase_x, s.stride));
    p.dst_step = s.stride, p.dst_y = phase_y, p.dst_x = phase_x;
  }
  p.shift_h0 = lo_y, p.shift_w0 = lo_x;
  detail::choose_tile(p, batch_blocks);

  const int64_t phases = int64_t(p.phase_h.size() * p.phase_w.size());
  p.pack_h = p.tile_h + hi_y - lo_y;
  const int64_t halo_w = hi_x - lo_x;
  const int64_t full_w = ceil_div(std::max<int64_t>(p.grid_w, 1), p.tile_w) * p.tile_w;
  const int64_t column = p.src_channels * phases * p.pack_h * p.pixel() * int64_t(sizeof(float));
  p.strip_w = std::max<int64_t>((kL2 / column - halo_w) / p.tile_w * p.tile_w, p.tile_w);
  p.strip_w = std::min(p.strip_w, full_w);
  // Strips of equal width: the last one is padded otherwise.
  p.strip_w = ceil_div(ceil_div(full_w, ceil_div(full_w, p.strip_w)), p.tile_w) * p.tile_w;
  p.pack_w = p.strip_w + halo_w;

  // Blocks of input channels whose part of one tile fits the first-level cache; where that leaves
  // too few non-zeros per block to pay for reloading the partial sums, larger ones.
  const double per_channel = double(taps.size()) / double(p.src_channels * p.dst_channels);
  const int64_t tile_bytes =
      phases * p.pack_h * (p.tile_w + halo_w) * p.pixel() * int64_t(sizeof(float));
  int64_t block = std::max<int64_t>(kL1 / tile_bytes, 1);
  if (per_channel * double(block) < kMinEntries)
    block = per_channel > 0 ? int64_t(kMinEntries / per_channel) + 1 : p.src_channels;
  const int64_t count_blocks = std::max<int64_t>(
      1, (p.src_channels + block / 2) / std::max<int64_t>(block, 1));
  p.block = ceil_div(p.src_channels, count_blocks);
  const int64_t strips = ceil_div(std::max<int64_t>(p.grid_h, 1), p.tile_h) *
                         ceil_div(full_w, p.strip_w) * ceil_div(batch_blocks, p.tile_n);
  int64_t chunk = std::max<int64_t>(
      1, kChunkBytes / (p.vectors() * L * int64_t(sizeof(float))));
  if (strips < threads)  // too few strips for the threads: share out the output channels too
    chunk = std::min(chunk, ceil_div(p.dst_channels, ceil_div(threads, strips)));
  p.chunk = ceil_div(p.dst_channels, ceil_div(p.dst_channels, chunk));

  if (p.packed_floats() > INT32_MAX)
    throw std::invalid_argument("a layer this large is beyond the sparse kernels: its packed input "
                                "exceeds 2^31 floats");

  // Counting sort by (chunk, block, output channel).
  const int64_t nblocks = p.blocks(), nchunks = p.chunks();
  p.start.assign(nchunks * nblocks * p.chunk + 1, 0);
  auto slot = [&](const Tap& t) {
    const int64_t c = t.dst / p.chunk;
    return (c * nblocks + t.src / p.block) * p.chunk + (t.dst - c * p.chunk);
  };
  for (const Tap& t : taps) ++p.start[slot(t) + 1];
  for (size_t k = 1; k < p.start.size(); ++k) p.start[k] += p.start[k - 1];
  std::vector<int64_t> next(p.start.begin(), p.start.end() - 1);
  p.entries.resize(taps.size());
  p.source.resize(taps.size());
  for (size_t k = 0; k < taps.size(); ++k) {
    const Tap& t = taps[k];
    const int64_t at = next[slot(t)]++;
    const int64_t phase = detail::index_of(p.phase_h, t.phase_y) * int64_t(p.phase_w.size()) +
                          detail::index_of(p.phase_w, t.phase_x);
    const int64_t pix = ((t.src * phases + phase) * p.pack_h + (t.shift_y - lo_y)) * p.pack_w +
                        (t.shift_x - lo_x);
    p.entries[at] = Entry{int32_t(pix * p.pixel()), 0.0f};
    p.source[at] = ids[k];
  }
  return p;
}

// Fills in the values of the non-zeros, given in the order of make_plan's coords.
static inline void set_values(Plan& p, const float* values, int threads) {
  const int64_t n = int64_t(p.entries.size());
#pragma omp parallel for num_threads(threads) if (n > 1 << 14)
  for (int64_t k = 0; k < n; ++k) p.entries[k].value = values[p.source[k]];
}

namespace detail {

// Copies the input of the strip at output pixel (i0, j0), batch block n0, zero where there is none:
// [channel, phase, pack_h, pack_w, tile_n, 16].
static inline void pack_strip(const Plan& p, const float* src, int64_t n0, int64_t batch_blocks,
                              int64_t i0, int64_t j0, float* out) {
  const int64_t plane = p.src_h * p.src_w * L;
  for (int64_t c = 0; c < p.src_channels; ++c)
    for (int64_t ry : p.phase_h)
      for (int64_t rx : p.phase_w)
        for (int64_t r = 0; r < p.pack_h; ++r) {
          float* row = out;
          out += p.pack_w * p.pixel();
          const int64_t y = (i0 + p.shift_h0 + r) * p.src_step + ry;
          if (y < 0 || y >= p.src_h) {
            std::memset(row, 0, p.pack_w * p.pixel() * sizeof(float));
            continue;
          }
          // Columns first .. last of the packed row have a source pixel.
          const int64_t x0 = (j0 + p.shift_w0) * p.src_step + rx;
          const int64_t first =
              std::min(p.pack_w, std::max<int64_t>(0, ceil_div(-std::min<int64_t>(x0, 0), p.src_step)));
          const int64_t last = std::max(
              first, std::min(p.pack_w, x0 < p.src_w ? ceil_div(p.src_w - x0, p.src_step) : 0));
          for (int64_t k = 0; k < first * p.tile_n; ++k) store(row + k * L, V{});
          for (int64_t k = last * p.tile_n; k < p.pack_w * p.tile_n; ++k) store(row + k * L, V{});
          for (int64_t n = 0; n < p.tile_n; ++n) {
            float* to = row + n * L;
            if (n0 + n >= batch_blocks) {
              for (int64_t k = first; k < last; ++k) store(to + k * p.pixel(), V{});
              continue;
            }
            const float* from = src + ((n0 + n) * p.src_channels + c) * plane + y * p.src_w * L;
            for (int64_t k = first; k < last; ++k)
              store(to + k * p.pixel(), load(from + (x0 + k * p.src_step) * L));
          }
        }
}

#define SPARSE_INLINE __attribute__((always_inline))

template <class F, int... I>
static inline SPARSE_INLINE void unroll(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>()), ...);
}
// f(0), ..., f(N - 1) with constants, so that an array of vectors stays in registers.
template <int N, class F>
static inline SPARSE_INLINE void unroll(F&& f) {
  unroll(std::make_integer_sequence<int, N>(), f);
}

// R x Q vectors of one output channel: from `in` (or the bias when null), plus value * input for
// every entry, to `out`.  Row r of the tile lies at base + rows[r].
template <int R, int Q>
static inline void accumulate(const float* base, const int64_t* rows, const Entry* e,
                              const Entry* end, const float* in, float bias, float* out,
                              int64_t out_pitch) {
  constexpr int G = std::min(R * Q, kSums);
  const float* row[R];
  unroll<R>([&](auto r) SPARSE_INLINE { row[r] = base + rows[r]; });
  unroll<R * Q / G>([&](auto part) SPARSE_INLINE {
    constexpr int K = part * G;
    V sum[G];
    unroll<G>([&](auto k) SPARSE_INLINE { sum[k] = in ? load(in + (K + k) * L) : broadcast(bias); });
    for (const Entry* at = e; at != end; ++at) {
      const V w = broadcast(at->value);
      unroll<G>([&](auto k) SPARSE_INLINE {
        sum[k] += w * load(row[(K + k) / Q] + at->offset + (K + k) % Q * L);
      });
    }
    unroll<G>([&](auto k) SPARSE_INLINE {
      store(out + (K + k) / Q * out_pitch + (K + k) % Q * L, sum[k]);
    });
  });
}

// Lanes of x and y merged: where the bit D of lane l is clear x[l], else y[l - D]; each D further on
// with Far.
template <int D, bool Far, class T, int... I>
static inline T merged(T x, T y, std::integer_sequence<int, I...>) {
  constexpr int N = sizeof...(I);
  return __builtin_shufflevector(x, y, (I & D ? I + N - (Far ? 0 : D) : I + (Far ? D : 0))...);
}
template <int D, bool Far>
static inline V merged(V x, V y) {
#ifdef __AVX512F__
  return merged<D, Far>(x, y, std::make_integer_sequence<int, L>());
#else
  constexpr std::make_integer_sequence<int, 8> half;
  if constexpr (D == 8) return Far ? V(x.b, y.b) : V(x.a, y.a);
  else return V(merged<D, Far>(x.a, y.a, half), merged<D, Far>(x.b, y.b, half));
#endif
}

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
  int32_t lane[L];
  for (int l = 0; l < L; ++l) lane[l] = n * L + l < samples ? -1 : 0;
  VI valid;
  std::memcpy(&valid, lane, sizeof(VI));
  return valid;
}

static inline double lane_sum(V v) {
  double s = 0;
  for (int l = 0; l < L; ++l) s += v[l];
  return s;
}

// The sums of each of N vectors, in place of 16 / N lanes each: halves their number until one is left.
template <int D>
static inline V folded(const float* v) {
  if constexpr (D == 0) {
    return load(v);
  } else {
    const V x = folded<D / 2>(v), y = folded<D / 2>(v + D * L);
    return merged<D, false>(x, y) + merged<D, true>(x, y);
  }
}

// Sixteen vectors to the vector of their sums.
static inline V sum16(const float* v) { return folded<8>(v); }

// For every entry the products of its input with the tile `g` of the output gradient, summed over
// the tile: one vector per entry at `out`.
template <int R, int Q>
static inline void correlate(const float* base, const int64_t* rows, const Entry* e,
                             const Entry* end, const float* g, float* out) {
  constexpr int G = std::min(R * Q, kSums);
  const float* row[R];
  unroll<R>([&](auto r) SPARSE_INLINE { row[r] = base + rows[r]; });
  unroll<R * Q / G>([&](auto part) SPARSE_INLINE {
    constexpr int K = part * G;
    V grad[G];
    unroll<G>([&](auto k) SPARSE_INLINE { grad[k] = load(g + (K + k) * L); });
    float* to = out;
    for (const Entry* at = e; at != end; ++at, to += L) {
      V s[4]{};  // independent chains: a multiply-add takes four cycles
      unroll<G>([&](auto k) SPARSE_INLINE {
        s[k % Q] += grad[k] * load(row[(K + k) / Q] + at->offset + (K + k) % Q * L);
      });
      const V sum = (s[0] + s[1]) + (s[2] + s[3]);
      store(to, part ? load(to) + sum : sum);
    }
  });
}

constexpr int64_t kLines = 128;  // products of the weight gradient that wait for their sum

struct Item {
  int64_t n0, i0, j0, chunk0, chunk1;
};

// The strips of a plan, and shares of the output channels where there are too few strips.
static inline std::vector<Item> work(const Plan& p, int64_t batch_blocks, int threads) {
  std::vector<Item> items;
  if (p.grid_h <= 0 || p.grid_w <= 0) return items;
  const int64_t strips = ceil_div(p.grid_h, p.tile_h) * ceil_div(p.grid_w, p.strip_w) *
                         ceil_div(batch_blocks, p.tile_n);
  const int64_t shares = std::min(p.chunks(), strips < threads ? ceil_div(threads, strips) : 1);
  for (int64_t n = 0; n < batch_blocks; n += p.tile_n)
    for (int64_t i = 0; i < p.grid_h; i += p.tile_h)
      for (int64_t j = 0; j < p.grid_w; j += p.strip_w)
        for (int64_t k = 0; k < shares; ++k)
          items.push_back({n, i, j, k * p.chunks() / shares, (k + 1) * p.chunks() / shares});
  return items;
}

// Floats from a tile's first vector to the first of each of its rows.
static inline std::array<int64_t, 4> row_offsets(const Plan& p) {
  std::array<int64_t, 4> at;
  for (int64_t r = 0; r < 4; ++r)
    at[r] = p.tile_h == 4   ? r * p.pack_w * L
            : p.tile_h == 2 ? ((r / 2) * p.pack_w + r % 2) * p.pixel()
                            : r * p.cols * L;
  return at;
}

// Copies between a tile [tile_h, tile_w, tile_n, 16] and the pixels of a tensor that exist.
template <bool to_tensor>
static inline void move_tile(const Plan& p, float* tile, float* tensor, int64_t o, int64_t n0,
                             int64_t batch_blocks, int64_t i0, int64_t j0) {
  const int64_t h = std::min<int64_t>(p.tile_h, p.grid_h - i0);
  const int64_t w = std::min<int64_t>(p.tile_w, p.grid_w - j0);
  const int64_t m = std::min<int64_t>(p.tile_n, batch_blocks - n0);
  if (!to_tensor && (h < p.tile_h || w < p.tile_w || m < p.tile_n))
    std::memset(tile, 0, p.vectors() * L * sizeof(float));
  for (int64_t n = 0; n < m; ++n)
    for (int64_t i = 0; i < h; ++i)
      for (int64_t j = 0; j < w; ++j) {
        float* a = tile + ((i * p.tile_w + j) * p.tile_n + n) * L;
        float* b = tensor + ((((n0 + n) * p.dst_channels + o) * p.dst_h +
                              (i0 + i) * p.dst_step + p.dst_y) * p.dst_w +
                             (j0 + j) * p.dst_step + p.dst_x) * L;
        if (to_tensor) store(b, load(a));
        else store(a, load(b));
      }
}

template <int R, int Q>
static void convolve_item(const Plan& p, const Item& it, const float* src, const float* bias,
                          float* dst, int64_t batch_blocks, float* packed, float* scratch) {
  const int64_t T = int64_t(R) * Q * L;
  const int64_t nblocks = p.blocks();
  const std::array<int64_t, 4> rows = row_offsets(p);
  pack_strip(p, src, it.n0, batch_blocks, it.i0, it.j0, packed);
  const int64_t j_end = std::min(it.j0 + p.strip_w, p.grid_w);
  const int64_t dst_plane = p.dst_h * p.dst_w * L;
  for (int64_t j = it.j0; j < j_end; j += p.tile_w) {
    const float* base = packed + (j - it.j0) * p.pixel();
    const bool direct = p.tile_n == 1 && p.tile_h == 4 && p.dst_step == 1 &&
                        it.i0 + 4 <= p.grid_h && j + 4 <= p.grid_w;
    float* corner = dst + it.n0 * p.dst_channels * dst_plane + (it.i0 * p.dst_w + j) * L;
    for (int64_t k = it.chunk0; k < it.chunk1; ++k) {
      const int64_t o0 = k * p.chunk, on = std::min(p.chunk, p.dst_channels - o0);
      for (int64_t b = 0; b < nblocks; ++b) {
        const int64_t* start = p.start.data() + (k * nblocks + b) * p.chunk;
        for (int64_t o = 0; o < on; ++o) {
          const Entry* e = p.entries.data() + start[o];
          const Entry* end = p.entries.data() + start[o + 1];
          float* partial = scratch + o * T;
          const float* in = b ? partial : nullptr;
          const float s = bias ? bias[o0 + o] : 0.0f;
          if (b + 1 < nblocks) {
            if (b && e == end) continue;
            accumulate<R, Q>(base, rows.data(), e, end, in, s, partial, Q * L);
          } else if (direct) {
            accumulate<R, Q>(base, rows.data(), e, end, in, s, corner + (o0 + o) * dst_plane,
                             p.dst_w * L);
          } else {
            accumulate<R, Q>(base, rows.data(), e, end, in, s, partial, Q * L);
            move_tile<true>(p, partial, dst, o0 + o, it.n0, batch_blocks, it.i0, j);
          }
        }
      }
    }
  }
}

template <int R, int Q>
static void weight_gradient_item(const Plan& p, const Item& it, const float* x, const float* grad,
                                 float* sums, int64_t samples, int64_t batch_blocks, float* packed,
                                 float* scratch, float* lines) {
  const int64_t T = int64_t(R) * Q * L;
  const int64_t nblocks = p.blocks();
  const std::array<int64_t, 4> rows = row_offsets(p);
  pack_strip(p, x, it.n0, batch_blocks, it.i0, it.j0, packed);
  const int64_t j_end = std::min(it.j0 + p.strip_w, p.grid_w);
  // Lanes beyond the last sample count for nothing, whatever the gradient holds there.
  const int64_t tail = samples - (batch_blocks - 1) * L;
  const bool mask = tail < L && it.n0 + p.tile_n >= batch_blocks;
  for (int64_t j = it.j0; j < j_end; j += p.tile_w) {
    const float* base = packed + (j - it.j0) * p.pixel();
    for (int64_t k = it.chunk0; k < it.chunk1; ++k) {
      const int64_t o0 = k * p.chunk, on = std::min(p.chunk, p.dst_channels - o0);
      for (int64_t o = 0; o < on; ++o) {
        float* tile = scratch + o * T;
        move_tile<false>(p, tile, const_cast<float*>(grad), o0 + o, it.n0, batch_blocks, it.i0, j);
        if (mask) {
          const int64_t n = batch_blocks - 1 - it.n0;
          for (int64_t q = 0; q < int64_t(p.tile_h) * p.tile_w; ++q)
            for (int64_t l = tail; l < L; ++l) tile[(q * p.tile_n + n) * L + l] = 0.0f;
        }
      }
      for (int64_t b = 0; b < nblocks; ++b) {
        const int64_t* start = p.start.data() + (k * nblocks + b) * p.chunk;
        const int64_t first = start[0], end = start[on];
        int64_t done = first, at = first;
        for (int64_t o = 0; o < on; ++o) {
          int64_t stop = start[o + 1];
          while (at < stop) {
            const int64_t upto = std::min(stop, done + kLines);
            correlate<R, Q>(base, rows.data(), p.entries.data() + at, p.entries.data() + upto,
                            scratch + o * T, lines + (at - done) * L);
            at = upto;
            if (at - done == kLines || at == end) {
              int64_t q = done;
              for (; q + L <= at; q += L)
                store(sums + q, load(sums + q) + sum16(lines + (q - done) * L));
              if (q < at) {
                for (int64_t r = at; r < q + L; ++r) store(lines + (r - done) * L, V{});
                const V s = sum16(lines + (q - done) * L);
                for (int64_t r = q; r < at; ++r) sums[r] += s[r - q];
              }
              done = at;
            }
          }
        }
      }
    }
  }
}

template <class F>
static void dispatch(const Plan& p, F&& f) {
  switch (p.rows * 10 + p.cols) {
    case 44: f(std::integral_constant<int, 4>(), std::integral_constant<int, 4>()); break;
    case 42: f(std::integral_constant<int, 4>(), std::integral_constant<int, 2>()); break;
    case 41: f(std::integral_constant<int, 4>(), std::integral_constant<int, 1>()); break;
    case 24: f(std::integral_constant<int, 2>(), std::integral_constant<int, 4>()); break;
    case 14: f(std::integral_constant<int, 1>(), std::integral_constant<int, 4>()); break;
    case 11: f(std::integral_constant<int, 1>(), std::integral_constant<int, 1>()); break;
    default: throw std::logic_error("no kernel for this tile");
  }
}

}  // namespace detail

// dst = convolution of src by the plan's entries, plus the bias (may be null) per dst channel.
// src: [batch_blocks, src_channels, src_h, src_w, 16]; dst likewise, only the plan's phase written.
static inline void convolve(const Plan& p, const float* src, const float* bias, float* dst,
                            int64_t batch_blocks, int threads) {
  const std::vector<detail::Item> items = detail::work(p, batch_blocks, threads);
  const int64_t n = int64_t(items.size());
  const int64_t packed = aligned(p.packed_floats()), scratch = p.chunk * p.vectors() * L;
  float* const space = workspace(threads * (packed + scratch));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t k = 0; k < n; ++k) {
    float* const own = space + omp_get_thread_num() * (packed + scratch);
    detail::dispatch(p, [&](auto r, auto q) {
      detail::convolve_item<decltype(r)::value, decltype(q)::value>(
          p, items[k], src, bias, dst, batch_blocks, own, own + packed);
    });
  }
}

// out[k] = gradient of non-zero k (order of make_plan's coords) for a forward plan; x and grad are
// input and output gradient, `samples` the batch size without padding.
static inline void weight_gradient(const Plan& p, const float* x, const float* grad, float* out,
                                   int64_t samples, int threads) {
  const int64_t batch_blocks = ceil_div(samples, L);
  const std::vector<detail::Item> items = detail::work(p, batch_blocks, threads);
  const int64_t n = int64_t(items.size()), entries = int64_t(p.entries.size());
  const int64_t packed = aligned(p.packed_floats()), scratch = p.chunk * p.vectors() * L;
  const int64_t lines = detail::kLines * L, sums = aligned(entries);
  const int64_t size = packed + scratch + lines + sums;
  float* const space = workspace(threads * size);
#pragma omp parallel num_threads(threads)
  {
    float* const own = space + omp_get_thread_num() * size;
    float* const total = own + packed + scratch + lines;
    std::fill(total, total + entries, 0.0f);
#pragma omp for schedule(static)  // a total of its own per thread: the same items each time
    for (int64_t k = 0; k < n; ++k)
      detail::dispatch(p, [&](auto r, auto q) {
        detail::weight_gradient_item<decltype(r)::value, decltype(q)::value>(
            p, items[k], x, grad, total, samples, batch_blocks, own, own + packed,
            own + packed + scratch);
      });
    const int team = omp_get_num_threads();
#pragma omp for
    for (int64_t k = 0; k < entries; ++k) {
      float s = 0.0f;
      for (int t = 0; t < team; ++t) s += space[t * size + packed + scratch + lines + k];
      out[p.source[k]] = s;
    }
  }
}

}  // namespace sparse
