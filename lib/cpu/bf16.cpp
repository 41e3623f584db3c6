// Training in bfloat16 over one layout (bf16.hpp): sparse and dense convolutions, batch norm, ReLU,
// pooling, dropout. Sums are fp32, weights come in fp32. Results don't depend on the number of
// threads: each value is summed by one thread, in one order. Reference: lib/cpu/bf16.py.
#include "bf16.hpp"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_TILES 1
// Whether dense products use AMX: built for it, and allowed by the system.
extern "C" { bool bf16_tiles = syscall(SYS_arch_prctl, 0x1023, 18) == 0; }  // ARCH_REQ_XCOMP_PERM
#else
#define HAS_TILES 0
extern "C" { bool bf16_tiles = false; }
#endif

namespace {

// Pixels of one pass, in bytes from two base addresses; with a stride, one phase of the input's
// gradient is a pass. Mirrored in lib/cpu/bf16.py.
struct Grid {
  int64_t blocks, rows, cols, outputs;
  int64_t x, x_row, x_col, x_block;
  int64_t y, y_row, y_col, y_block, y_plane;
};

// ------------------------------------------------------------------------------------- sparse

struct Entry {  // one non-zero
  int32_t offset;  // bytes from the line of the output's pixel
  uint32_t weight;
};

// vdpbf16ps takes one cycle on Zen 4 and two on the Intel cores with AMX (measured), where a
// shift, a mask and two FMAs take the same two, and round nothing.
#if defined(__AMX_BF16__)
constexpr bool FP32_WEIGHTS = true;
#else
constexpr bool FP32_WEIGHTS = false;
#endif
constexpr int AHEAD = 6;  // entries by which prefetching is ahead; the arrays end with as many

// Output lines R x Q of one channel stay in registers while its entries pass by.
template <int R, int Q, int X>
INLINE void tile(const char* base, int64_t pitch, const Entry* e, const Entry* end, float bias,
                 char* out, int64_t y_pitch, int64_t y_col) {
  __m512 even[R * Q], odd[R * Q];
  UNROLL for (int k = 0; k < R * Q; k++) even[k] = odd[k] = _mm512_set1_ps(bias);
  for (; e != end; ++e) {
    const char *p = base + e->offset, *next = base + e[AHEAD].offset;
    const __m512i w = _mm512_set1_epi32(int(e->weight)), w_odd = _mm512_slli_epi32(w, 16);
    UNROLL for (int k = 0; k < R * Q; k++) {
      const int64_t at = (k / Q) * pitch + (k % Q) * X;
      const __m512i x = _mm512_loadu_si512(p + at);
      _mm_prefetch(next + at, _MM_HINT_T0);
      if constexpr (FP32_WEIGHTS) {
        const Pair wide = widen(x);
        even[k] = _mm512_fmadd_ps(wide.even, (__m512)w, even[k]);
        odd[k] = _mm512_fmadd_ps(wide.odd, (__m512)w, odd[k]);
      } else {
        even[k] = _mm512_dpbf16_ps(even[k], (__m512bh)x, (__m512bh)w);
        odd[k] = _mm512_dpbf16_ps(odd[k], (__m512bh)x, (__m512bh)w_odd);
      }
    }
  }
  UNROLL for (int k = 0; k < R * Q; k++) store(out + (k / Q) * y_pitch + (k % Q) * y_col, {even[k], odd[k]});
}

// Tiles at the end overlap those before: their values are computed twice, alike.
template <int R, int Q, int X>
void sweep(const Grid& s, const char* x, char* y, const Entry* entries, const int32_t* start,
           const float* bias, bool over_blocks, int threads) {
  const int64_t outer = over_blocks ? s.rows : s.blocks, inner = over_blocks ? s.blocks : s.rows;
  const int64_t x_outer = over_blocks ? s.x_row : s.x_block;
  const int64_t x_inner = over_blocks ? s.x_block : s.x_row;
  const int64_t y_outer = over_blocks ? s.y_row : s.y_block;
  const int64_t y_inner = over_blocks ? s.y_block : s.y_row;
  const int64_t down = (inner + R - 1) / R, across = (s.cols + Q - 1) / Q;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < outer * down * across; task++) {
    const int64_t j = std::min(task % across * Q, s.cols - Q);
    const int64_t i = std::min(task / across % down * R, inner - R);
    const int64_t n = task / across / down;
    const char* base = x + s.x + n * x_outer + i * x_inner + j * s.x_col;
    char* out = y + s.y + n * y_outer + i * y_inner + j * s.y_col;
    for (int64_t o = 0; o < s.outputs; o++) {
      tile<R, Q, X>(base, x_inner, entries + start[o], entries + start[o + 1],
                    bias ? bias[o] : 0.0f, out + o * s.y_plane, y_inner, s.y_col);
    }
  }
}

template <int X>
void sparse(const Grid& s, const char* x, char* y, const Entry* e, const int32_t* start,
            const float* bias, int threads) {
  const int q = s.cols >= 8 ? 8 : s.cols >= 4 ? 4 : s.cols >= 2 ? 2 : 1;
  const bool blocks = s.rows < 8 / q;  // small images: the tile takes several blocks of samples
  const int64_t high = blocks ? s.blocks : s.rows;
  const int r = high >= 8 ? 8 : high >= 4 ? 4 : high >= 2 ? 2 : 1;
#define SWEEP(R, Q) return sweep<R, Q, X>(s, x, y, e, start, bias, blocks, threads)
  if (q == 8) SWEEP(1, 8);
  if (q == 4 && r >= 2) SWEEP(2, 4);
  if (q == 4) SWEEP(1, 4);
  if (q == 2 && r >= 4) SWEEP(4, 2);
  if (q == 2 && r >= 2) SWEEP(2, 2);
  if (q == 2) SWEEP(1, 2);
  if (r == 8) SWEEP(8, 1);
  if (r == 4) SWEEP(4, 1);
  if (r == 2) SWEEP(2, 1);
  SWEEP(1, 1);
#undef SWEEP
}

// Weight gradient of the non-zeros. A run: entries of one output and a few input channels, whose
// lines stay in L1 while the output's gradient streams by.
struct Run {
  int32_t output, begin, count;
};

struct Sums {  // 16 vectors at a time are added up
  __m512 waiting[16];
  int count = 0;
  float* at;
  INLINE void push(__m512 v) {
    waiting[count++] = v;
    if (count == 16) flush();
  }
  INLINE void flush() {
    const __mmask16 mask = __mmask16((1u << count) - 1);
    for (int k = count; k < 16; k++) waiting[k] = _mm512_setzero_ps();
    const __m512 old = _mm512_maskz_loadu_ps(mask, at);
    _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(old, sums_of_16(waiting)));
    at += count;
    count = 0;
  }
};

// E entries, A accumulators of each in turn, so that the latency of a sum is hidden.
template <int E, int A, int X>
INLINE void stream(const char* base, const int32_t* offsets, const char* g, const Grid& s,
                   int64_t rows, Sums& sums) {
  __m512 acc[E * A];
  const char* p[E];
  UNROLL for (int k = 0; k < E * A; k++) acc[k] = _mm512_setzero_ps();
  UNROLL for (int k = 0; k < E; k++) p[k] = base + offsets[k];
  for (int64_t r = 0; r < rows; r++) {
    int64_t q = 0;
    for (; q + A <= s.cols; q += A) {
      UNROLL for (int a = 0; a < A; a++) {
        const __m512bh gv = (__m512bh)_mm512_loadu_si512(g + (q + a) * LINE);
        UNROLL for (int k = 0; k < E; k++) {
          const __m512bh xv = (__m512bh)_mm512_loadu_si512(p[k] + (q + a) * X);
          acc[k * A + a] = _mm512_dpbf16_ps(acc[k * A + a], gv, xv);
        }
      }
    }
    for (; q < s.cols; q++) {
      const __m512bh gv = (__m512bh)_mm512_loadu_si512(g + q * LINE);
      UNROLL for (int k = 0; k < E; k++) {
        const __m512bh xv = (__m512bh)_mm512_loadu_si512(p[k] + q * X);
        acc[k * A] = _mm512_dpbf16_ps(acc[k * A], gv, xv);
      }
    }
    g += s.y_row;
    UNROLL for (int k = 0; k < E; k++) p[k] += s.x_row;
  }
  UNROLL for (int k = 0; k < E; k++) {
    __m512 sum = acc[k * A];
    UNROLL for (int a = 1; a < A; a++) sum = _mm512_add_ps(sum, acc[k * A + a]);
    sums.push(sum);
  }
}

template <int X>
void sparse_weight(Grid s, const char* x, const char* g, const int32_t* offsets, const Run* runs,
                   int64_t count, float* out, int64_t strip, int threads) {
  if (s.rows == 1 && s.cols == 1) {  // linear layers: the blocks are the rows
    s.rows = strip = s.blocks, s.x_row = s.x_block, s.y_row = s.y_block, s.blocks = 1;
  }
  const int64_t entries = count ? runs[count - 1].begin + runs[count - 1].count : 0;
  memset(out, 0, size_t(entries) * sizeof(float));
#pragma omp parallel num_threads(threads)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    auto first = [&](int64_t t) {  // each thread has runs of its own
      return std::lower_bound(runs, runs + count, t * entries / all,
                              [](const Run& r, int64_t at) { return r.begin < at; });
    };
    const Run *from = first(me), *to = me + 1 == all ? runs + count : first(me + 1);
    for (int64_t n = 0; n < s.blocks; n++) {
      for (int64_t i = 0; i < s.rows && from != to; i += strip) {
        const char* base = x + s.x + n * s.x_block + i * s.x_row;
        const char* lines = g + s.y + n * s.y_block + i * s.y_row;
        const int64_t rows = std::min(strip, s.rows - i);
        Sums sums;
        sums.at = out + from->begin;
        for (const Run* r = from; r != to; r++) {
          const int32_t* e = offsets + r->begin;
          const char* gl = lines + r->output * s.y_plane;
          int left = r->count;
#define STREAM(E, A) stream<E, A, X>(base, e, gl, s, rows, sums)
          for (; left > 8; left -= 8, e += 8) STREAM(8, 1);
          switch (left) {
            case 1: STREAM(1, 4); break;
            case 2: STREAM(2, 4); break;
            case 3: STREAM(3, 2); break;
            case 4: STREAM(4, 2); break;
            case 5: STREAM(5, 2); break;
            case 6: STREAM(6, 1); break;
            case 7: STREAM(7, 1); break;
            case 8: STREAM(8, 1); break;
          }
#undef STREAM
        }
        if (sums.count) sums.flush();
      }
    }
  }
}

// -------------------------------------------------------------------------------------- dense
//
// A dense layer is a product: weights [outputs, K] times lines [K, 32] at each pixel, K = channels
// of one tap after another, or (few channels) all taps and channels. Lines are packed in pairs,
// [pixel][K/2][2][64 bytes], as vdpbf16ps and AMX both take them.

constexpr int64_t DEPTH = 32;  // K of a tap is padded to a multiple
constexpr int64_t OUTPUTS = 8;  // of one product without AMX

int64_t padded(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

#if HAS_TILES
struct Tiles {  // for a thread's time in a kernel
  Tiles() {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int t = 0; t < 8; t++) shape.bytes[t] = 64, shape.rows[t] = 16;
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
};

INLINE void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

INLINE void store_tiles(float* to) {
  _tile_stored(0, to, 64);
  _tile_stored(1, to + 256, 64);
  _tile_stored(2, to + 512, 64);
  _tile_stored(3, to + 768, 64);
}

// Two times 16 outputs of one pixel, both halves of its samples.
INLINE void product_tiles(const char* a0, const char* a1, const char* x, const int64_t* taps,
                          int64_t count, int64_t steps, float* result) {
  zero_tiles();
  for (int64_t t = 0; t < count; t++) {
    const char* b = x + taps[t];
    for (int64_t k = 0; k < steps; k++, b += 16 * 128, a0 += 1024, a1 += 1024) {
      _tile_loadd(6, b, 128);
      _tile_loadd(7, b + 64, 128);
      _tile_loadd(4, a0, 64);
      _tile_loadd(5, a1, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  store_tiles(result);
}
#endif

INLINE void product_vectors(const uint32_t* a, const char* x, const int64_t* taps, int64_t count,
                            int64_t pairs, __m512* low, __m512* high) {
  UNROLL for (int r = 0; r < OUTPUTS; r++) low[r] = high[r] = _mm512_setzero_ps();
  for (int64_t t = 0; t < count; t++) {
    const char* b = x + taps[t];
    for (int64_t k = 0; k < pairs; k++, b += 128, a += OUTPUTS) {
      const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b);
      const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + 64);
      UNROLL for (int r = 0; r < OUTPUTS; r++) {
        const __m512bh w = (__m512bh)_mm512_set1_epi32(int(a[r]));
        low[r] = _mm512_dpbf16_ps(low[r], b0, w);
        high[r] = _mm512_dpbf16_ps(high[r], b1, w);
      }
    }
  }
}

INLINE __m512i finish(__m512 low, __m512 high, float bias) {
  const __m512 b = _mm512_set1_ps(bias);
  return narrow_halves(_mm512_add_ps(low, b), _mm512_add_ps(high, b));
}

// Weight gradient without AMX: RO outputs x T inputs in registers, over rows of lines.
template <int RO, int T>
INLINE void correlate(const char* g, int64_t g_plane, const char* const* x, const Grid& s,
                      int64_t rows, float* result) {
  __m512 acc[32];
  UNROLL for (int k = 0; k < 32; k++) acc[k] = _mm512_setzero_ps();
  for (int64_t r = 0; r < rows; r++) {
    const char* p[T];
    UNROLL for (int t = 0; t < T; t++) p[t] = x[t] + r * s.x_row;
    for (int64_t q = 0; q < s.cols; q++) {
      __m512bh in[T];
      UNROLL for (int t = 0; t < T; t++) in[t] = (__m512bh)_mm512_loadu_si512(p[t] + q * s.x_col);
      UNROLL for (int k = 0; k < RO; k++) {
        const __m512bh gv = (__m512bh)_mm512_loadu_si512(g + k * g_plane + q * LINE);
        UNROLL for (int t = 0; t < T; t++) acc[k * T + t] = _mm512_dpbf16_ps(acc[k * T + t], gv, in[t]);
      }
    }
    g += s.y_row;
  }
  _mm512_storeu_ps(result, sums_of_16(acc));
  _mm512_storeu_ps(result + 16, sums_of_16(acc + 16));
}

// -------------------------------------------------------------------------------- elementwise

template <class F>
void each_row(int64_t blocks, const View& v, int threads, F f) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t plane = 0; plane < blocks * v.channels; plane++) {
    for (int64_t i = 0; i < v.height; i++) f(plane / v.channels, plane % v.channels, i);
  }
}

// f of every line of two tensors, where to put what comes of them, and the line's number.
template <class F>
void each_line(int64_t samples, const View& a, const View& b, const View& y, int64_t threads, F f) {
  each_row((samples + 31) / 32, a, int(threads), [&](int64_t n, int64_t c, int64_t i) {
    const char *p = a.line(n, c, i), *q = b.line(n, c, i);
    char* to = y.line(n, c, i);
    const int64_t first = ((n * a.channels + c) * a.height + i) * a.width;
    for (int64_t j = 0; j < a.width; j++) f(p + j * LINE, q + j * LINE, to + j * LINE, first + j);
  });
}

INLINE Pair keep(__mmask16 even, __mmask16 odd, Pair v) {
  return {_mm512_maskz_mov_ps(even, v.even), _mm512_maskz_mov_ps(odd, v.odd)};
}

INLINE Pair add(Pair a, Pair b) {
  return {_mm512_add_ps(a.even, b.even), _mm512_add_ps(a.odd, b.odd)};
}

INLINE double total(Pair v) {
  return _mm512_reduce_add_ps(v.even) + double(_mm512_reduce_add_ps(v.odd));
}

struct Norm {  // of one channel: y = scale * (x - mean) + shift, with ReLU where asked for
  __m512 mean, scale, shift;
  bool relu;
  INLINE Pair centred(const char* p) const {
    const Pair v = load(p);
    return {_mm512_sub_ps(v.even, mean), _mm512_sub_ps(v.odd, mean)};
  }
  INLINE Pair value(Pair c) const {
    return {_mm512_fmadd_ps(c.even, scale, shift), _mm512_fmadd_ps(c.odd, scale, shift)};
  }
  INLINE Pair passed(Pair c, const char* g) const {  // the gradient, after the ReLU
    const Pair in = load(g);
    if (!relu) return in;
    const Pair v = value(c);
    const __m512 zero = _mm512_setzero_ps();
    return keep(_mm512_cmp_ps_mask(v.even, zero, _CMP_GT_OQ),
                _mm512_cmp_ps_mask(v.odd, zero, _CMP_GT_OQ), in);
  }
};

// 32 numbers of 16 bits for line `line`: two rounds of an integer hash with full avalanche (the
// multipliers: C. Wellons, "Prospecting for hash functions", 2018).
INLINE __m512i hashed(__m512i v) {
  v = _mm512_xor_si512(v, _mm512_srli_epi32(v, 16));
  v = _mm512_mullo_epi32(v, _mm512_set1_epi32(0x7feb352d));
  v = _mm512_xor_si512(v, _mm512_srli_epi32(v, 15));
  v = _mm512_mullo_epi32(v, _mm512_set1_epi32(int(0x846ca68b)));
  return _mm512_xor_si512(v, _mm512_srli_epi32(v, 16));
}

INLINE __m512i random_line(uint64_t seed, uint64_t line) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32(int(line * 16)));
  const __m512i once = hashed(_mm512_xor_si512(at, _mm512_set1_epi32(int(seed))));
  return hashed(_mm512_add_epi32(once, _mm512_set1_epi32(int(seed >> 32))));
}

}  // namespace

extern "C" {

// ---- conversion ----

// fp32 [samples, C, H, W] -> lines; lanes without a sample are zero.
void bf16_load(const float* x, const View* y, int64_t samples, int64_t threads) {
  const int64_t image = y->channels * y->height * y->width;
  each_row((samples + 31) / 32, *y, threads, [&](int64_t n, int64_t c, int64_t i) {
    const float* from = x + n * 32 * image + (c * y->height + i) * y->width;
    uint16_t* to = reinterpret_cast<uint16_t*>(y->line(n, c, i));
    const int64_t lanes = std::min<int64_t>(32, samples - n * 32);
    if (lanes < 32) memset(to, 0, size_t(y->width) * LINE);
    for (int64_t s = 0; s < lanes; s++) {
      for (int64_t j = 0; j < y->width; j++) to[j * 32 + s] = to_bf16(from[s * image + j]);
    }
  });
}

void bf16_store(const View* x, float* y, int64_t samples, int64_t threads) {
  const int64_t image = x->channels * x->height * x->width;
  each_row((samples + 31) / 32, *x, threads, [&](int64_t n, int64_t c, int64_t i) {
    float* to = y + n * 32 * image + (c * x->height + i) * x->width;
    const uint16_t* from = reinterpret_cast<const uint16_t*>(x->line(n, c, i));
    for (int64_t s = 0; s < std::min<int64_t>(32, samples - n * 32); s++) {
      for (int64_t j = 0; j < x->width; j++) to[s * image + j] = to_float(from[j * 32 + s]);
    }
  });
}

// ---- sparse layers ----

// Entry k takes on value order[k]; those of output o begin at start[o].
void bf16_sparse(const Grid* s, const char* x, char* y, Entry* e, const int32_t* start,
                 const int32_t* order, const float* values, const float* bias, int64_t threads) {
  for (int64_t k = 0; k < start[s->outputs]; k++) {
    if (FP32_WEIGHTS) memcpy(&e[k].weight, values + order[k], 4);
    else e[k].weight = to_bf16(values[order[k]]);
  }
  if (s->x_col == LINE) sparse<LINE>(*s, x, y, e, start, bias, threads);
  else sparse<2 * LINE>(*s, x, y, e, start, bias, threads);
}

void bf16_sparse_weight(const Grid* s, const char* x, const char* g, const int32_t* offsets,
                        const Run* runs, int64_t count, float* out, int64_t strip, int64_t threads) {
  if (s->x_col == LINE) sparse_weight<LINE>(*s, x, g, offsets, runs, count, out, strip, threads);
  else sparse_weight<2 * LINE>(*s, x, g, offsets, runs, count, out, strip, threads);
}

// ---- dense layers ----

// weights[row * row_step + k * k_step + taps[t]], k < depth, packed for bf16_dense.
void bf16_pack_weights(const float* weights, int64_t rows, int64_t row_step, int64_t depth,
                       int64_t k_step, const int64_t* taps, int64_t count, uint16_t* out,
                       int64_t threads) {
  const int64_t unit = bf16_tiles ? 16 : OUTPUTS, deep = padded(depth, DEPTH);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < padded(rows, 2 * unit); row++) {
    uint16_t* group = out + row / unit * unit * count * deep;
    for (int64_t t = 0; t < count; t++) {
      const float* from = weights + row * row_step + taps[t];
      for (int64_t k = 0; k < deep; k++) {
        const uint16_t v = row < rows && k < depth ? to_bf16(from[k * k_step]) : 0;
        if (bf16_tiles) group[((t * deep + k) / 32 * 16 + row % 16) * 32 + k % 32] = v;
        else group[((t * deep + k) / 2 * OUTPUTS + row % OUTPUTS) * 2 + k % 2] = v;
      }
    }
  }
}

// Lines at offsets[k] from each pixel of the grid, in pairs, pixel after pixel.
void bf16_pack_pairs(const Grid* s, const char* x, const int64_t* offsets, int64_t depth, char* out,
                     int64_t threads) {
  const int64_t size = padded(depth, DEPTH) * LINE;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < s->blocks * s->rows; row++) {
    const char* base = x + s->x + row / s->rows * s->x_block + row % s->rows * s->x_row;
    char* to = out + row * s->cols * size;
    for (int64_t k = 0; k < padded(depth, DEPTH); k += 2) {
      for (int64_t j = 0; j < s->cols; j++) {
        const char* p = base + j * s->x_col;
        const __m512i zero = _mm512_setzero_si512();
        const __m512i a = k < depth ? _mm512_loadu_si512(p + offsets[k]) : zero;
        const __m512i b = k + 1 < depth ? _mm512_loadu_si512(p + offsets[k + 1]) : zero;
        _mm512_storeu_si512(to + j * size + k * LINE, _mm512_unpacklo_epi16(a, b));
        _mm512_storeu_si512(to + j * size + k * LINE + LINE, _mm512_unpackhi_epi16(a, b));
      }
    }
  }
}

// The same, [pixel][K/16][16 pairs of samples][16 of K]: the right side of the weight gradient.
void bf16_pack_samples(const Grid* s, const char* x, const int64_t* offsets, int64_t depth,
                       char* out, int64_t threads) {
  const int64_t size = padded(depth, DEPTH) * LINE;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < s->blocks * s->rows; row++) {
    const char* base = x + s->x + row / s->rows * s->x_block + row % s->rows * s->x_row;
    char* to = out + row * s->cols * size;
    for (int64_t k = 0; k < padded(depth, DEPTH); k += 16) {
      for (int64_t j = 0; j < s->cols; j++) {
        __m512i v[16];
        UNROLL for (int m = 0; m < 16; m++) {
          v[m] = k + m < depth ? _mm512_loadu_si512(base + j * s->x_col + offsets[k + m])
                               : _mm512_setzero_si512();
        }
        transpose_16(v);
        UNROLL for (int m = 0; m < 16; m++) _mm512_storeu_si512(to + j * size + (k + m) * LINE, v[m]);
      }
    }
  }
}

// x: pairs; taps: bytes from the pixel's; depth of one tap.
void bf16_dense(const Grid* grid, const char* x, char* y, const uint16_t* weights,
                const int64_t* taps, int64_t count, int64_t depth, const float* bias, int64_t threads) {
  Grid s = *grid;
  if (s.rows == 1 && s.cols == 1) {  // linear layers: the blocks are the pixels
    s.cols = s.blocks, s.x_col = s.x_block, s.y_col = s.y_block, s.blocks = 1;
  }
  const int64_t deep = padded(depth, DEPTH), unit = bf16_tiles ? 32 : OUTPUTS;
  const int64_t strip = std::clamp<int64_t>((int64_t(1) << 20) / std::max<int64_t>(1, s.x_row), 1, s.rows);
  const int64_t strips = (s.rows + strip - 1) / strip, groups = (s.outputs + unit - 1) / unit;
  // A strip of rows stays in L2 while the outputs pass by, few of them at a time.
#pragma omp parallel num_threads(threads)
  {
#if HAS_TILES
    alignas(64) float result[1024];
    if (bf16_tiles) {
      Tiles tiles;
#pragma omp for schedule(static)
      for (int64_t task = 0; task < s.blocks * strips * groups; task++) {
        const int64_t n = task / groups / strips, from = task / groups % strips * strip;
        const int64_t o = task % groups * 32;
        const char* a = reinterpret_cast<const char*>(weights + o * count * deep);
        for (int64_t i = from; i < std::min(from + strip, s.rows); i++) {
          for (int64_t j = 0; j < s.cols; j++) {
            const char* base = x + s.x + n * s.x_block + i * s.x_row + j * s.x_col;
            char* out = y + s.y + n * s.y_block + i * s.y_row + j * s.y_col;
            product_tiles(a, a + 32 * count * deep, base, taps, count, deep / 32, result);
            for (int64_t r = 0; r < std::min<int64_t>(32, s.outputs - o); r++) {
              const float* low = result + r / 16 * 512 + r % 16 * 16;
              _mm512_storeu_si512(out + (o + r) * s.y_plane,
                                  finish(_mm512_load_ps(low), _mm512_load_ps(low + 256),
                                         bias ? bias[o + r] : 0.0f));
            }
          }
        }
      }
    } else
#endif
    {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < s.blocks * strips * groups; task++) {
        const int64_t n = task / groups / strips, from = task / groups % strips * strip;
        const int64_t o = task % groups * OUTPUTS;
        const uint32_t* a = reinterpret_cast<const uint32_t*>(weights + o * count * deep);
        for (int64_t i = from; i < std::min(from + strip, s.rows); i++) {
          for (int64_t j = 0; j < s.cols; j++) {
            const char* base = x + s.x + n * s.x_block + i * s.x_row + j * s.x_col;
            char* out = y + s.y + n * s.y_block + i * s.y_row + j * s.y_col;
            __m512 low[OUTPUTS], high[OUTPUTS];
            product_vectors(a, base, taps, count, deep / 2, low, high);
            for (int64_t r = 0; r < std::min(OUTPUTS, s.outputs - o); r++) {
              _mm512_storeu_si512(out + (o + r) * s.y_plane,
                                  finish(low[r], high[r], bias ? bias[o + r] : 0.0f));
            }
          }
        }
      }
    }
  }
}

// Gradient of all weights, out[o * K + k]: line k of a pixel is at offsets[k]. Without AMX.
void bf16_dense_weight(const Grid* grid, const char* x, const char* g, const int64_t* offsets,
                       int64_t depth, float* out, int64_t strip, int64_t threads) {
  Grid s = *grid;
  if (s.rows == 1 && s.cols == 1) {
    s.rows = strip = s.blocks, s.x_row = s.x_block, s.y_row = s.y_block, s.blocks = 1;
  }
  constexpr int RO = 4, T = 6;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < (s.outputs + RO - 1) / RO; group++) {
    const int64_t o = std::max<int64_t>(0, std::min(group * RO, s.outputs - RO));
    const int64_t fresh = group * RO - o, count = std::min<int64_t>(RO, s.outputs);
    const int64_t g_plane = count == RO ? s.y_plane : 0;  // fewer outputs: one by one, below
    for (int64_t single = 0; single < (count == RO ? 1 : count); single++) {
      memset(out + (o + (count == RO ? fresh : single)) * depth, 0,
             size_t((count == RO ? RO - fresh : 1) * depth) * sizeof(float));
      for (int64_t n = 0; n < s.blocks; n++) {
        for (int64_t i = 0; i < s.rows; i += strip) {
          const char* lines = g + s.y + n * s.y_block + i * s.y_row + (o + single) * s.y_plane;
          for (int64_t k = 0; k < depth; k += T) {
            const char* p[T];
            for (int64_t t = 0; t < T; t++) {
              p[t] = x + s.x + n * s.x_block + i * s.x_row + offsets[std::min(k + t, depth - 1)];
            }
            float result[32];
            correlate<RO, T>(lines, g_plane, p, s, std::min(strip, s.rows - i), result);
            for (int64_t r = count == RO ? fresh : 0; r < (count == RO ? RO : 1); r++) {
              float* to = out + (o + single + r) * depth + k;
              for (int64_t t = 0; t < std::min<int64_t>(T, depth - k); t++) to[t] += result[r * T + t];
            }
          }
        }
      }
    }
  }
}

#if HAS_TILES
// With AMX: out[(o * depth + k) * count + t]; x: samples, taps in bytes. The gradient has up to 15
// planes more than outputs, of whatever values. `scratch`: fp32, outputs and K padded.
void bf16_dense_weight_tiles(const Grid* grid, const char* x, const char* g, const int64_t* taps,
                             int64_t count, int64_t depth, float* scratch, float* out,
                             int64_t threads) {
  Grid s = *grid;
  if (s.cols == 1 && s.rows == 1) {
    s.cols = s.blocks, s.x_col = s.x_block, s.y_col = s.y_block, s.blocks = 1;
  }
  const int64_t per_tap = padded(depth, DEPTH) / 16, wide = count * per_tap;
  const int64_t groups = (s.outputs + 31) / 32, total = s.blocks * s.rows;
  const int64_t strip = std::clamp<int64_t>((int64_t(3) << 18) / std::max<int64_t>(1, s.x_row), 1, total);
#pragma omp parallel num_threads(threads)
  {
    Tiles tiles;
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; group++) {
      const int64_t o = group * 32, second = o + 16 < s.outputs ? 16 * s.y_plane : 0;
      float* sums = scratch + group * wide * 512;
      for (int64_t from = 0; from < total; from += strip) {
        for (int64_t t = 0; t < wide; t += 2) {
          float* at = sums + t * 512;
          if (from == 0) {
            zero_tiles();
          } else {
            _tile_loadd(0, at, 64);
            _tile_loadd(1, at + 256, 64);
            _tile_loadd(2, at + 512, 64);
            _tile_loadd(3, at + 768, 64);
          }
          // A tap has an even number of tiles.
          const char* bx = x + s.x + taps[t / per_tap] + t % per_tap * 1024;
          for (int64_t row = from; row < std::min(from + strip, total); row++) {
            const int64_t n = row / s.rows, i = row % s.rows;
            const char* b = bx + n * s.x_block + i * s.x_row;
            const char* a = g + s.y + n * s.y_block + i * s.y_row + o * s.y_plane;
            for (int64_t j = 0; j < s.cols; j++, b += s.x_col, a += s.y_col) {
              _tile_loadd(6, b, 64);
              _tile_loadd(4, a, s.y_plane);
              _tile_loadd(7, b + 1024, 64);
              _tile_loadd(5, a + second, s.y_plane);
              _tile_dpbf16ps(0, 4, 6);
              _tile_dpbf16ps(1, 4, 7);
              _tile_dpbf16ps(2, 5, 6);
              _tile_dpbf16ps(3, 5, 7);
            }
          }
          store_tiles(at);
        }
      }
      for (int64_t r = 0; r < std::min<int64_t>(32, s.outputs - o); r++) {
        for (int64_t t = 0; t < wide; t++) {
          const float* from = sums + t / 2 * 1024 + r / 16 * 512 + t % 2 * 256 + r % 16 * 16;
          float* to = out + (o + r) * depth * count + t / per_tap;
          const int64_t k = t % per_tap * 16;
          for (int64_t m = 0; m < std::min<int64_t>(16, depth - k); m++) to[(k + m) * count] = from[m];
        }
      }
    }
  }
}
#endif

// ---- batch norm, ReLU, sums, dropout, pooling ----

// Training: mean and (biased) variance are computed; otherwise they are given.
void bf16_norm(const View* x, const View* y, float* mean, float* variance, const float* gamma,
               const float* beta, double eps, int64_t relu, int64_t training, int64_t samples,
               int64_t threads) {
  const int64_t blocks = (samples + 31) / 32;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < x->channels; c++) {
    if (training) {
      const float first = to_float(*reinterpret_cast<uint16_t*>(x->line(0, c, 0)));
      const __m512 pivot = _mm512_set1_ps(first);  // variances don't cancel
      double sum = 0, squares = 0;
      for (int64_t n = 0; n < blocks; n++) {
        const Lanes lanes(samples, n);
        Pair s{}, q{};
        for (int64_t i = 0; i < x->height; i++) {
          const char* p = x->line(n, c, i);
          for (int64_t j = 0; j < x->width; j++, p += LINE) {
            const Pair v = load(p);
            const Pair d = {_mm512_sub_ps(v.even, pivot), _mm512_sub_ps(v.odd, pivot)};
            s = add(s, d);
            q = {_mm512_fmadd_ps(d.even, d.even, q.even), _mm512_fmadd_ps(d.odd, d.odd, q.odd)};
          }
        }
        sum += total(keep(lanes.even, lanes.odd, s));
        squares += total(keep(lanes.even, lanes.odd, q));
      }
      const double count = double(samples) * x->height * x->width, off = sum / count;
      mean[c] = float(first + off);
      variance[c] = float(std::max(0.0, squares / count - off * off));
    }
    const float scale = float((gamma ? gamma[c] : 1.0f) / __builtin_sqrt(variance[c] + eps));
    const Norm norm{_mm512_set1_ps(mean[c]), _mm512_set1_ps(scale),
                    _mm512_set1_ps(beta ? beta[c] : 0.0f), relu != 0};
    const __m512 floor = _mm512_set1_ps(relu ? 0.0f : -__builtin_inff());
    for (int64_t n = 0; n < blocks; n++) {
      for (int64_t i = 0; i < x->height; i++) {
        const char* p = x->line(n, c, i);
        char* to = y->line(n, c, i);
        for (int64_t j = 0; j < x->width; j++) {
          const Pair v = norm.value(norm.centred(p + j * LINE));
          store(to + j * LINE, {_mm512_max_ps(floor, v.even), _mm512_max_ps(floor, v.odd)});
        }
      }
    }
  }
}

void bf16_norm_backward(const View* x, const View* g, const View* dx, const float* mean,
                        const float* variance, const float* gamma, const float* beta, double eps,
                        int64_t relu, float* d_gamma, float* d_beta, int64_t samples, int64_t threads) {
  const int64_t blocks = (samples + 31) / 32;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < x->channels; c++) {
    const float inverse = float(1.0 / __builtin_sqrt(variance[c] + eps));
    const float scale = (gamma ? gamma[c] : 1.0f) * inverse;
    const Norm norm{_mm512_set1_ps(mean[c]), _mm512_set1_ps(scale),
                    _mm512_set1_ps(beta ? beta[c] : 0.0f), relu != 0};
    double sum = 0, dot = 0;
    for (int64_t n = 0; n < blocks; n++) {
      Pair s{}, d{};
      for (int64_t i = 0; i < x->height; i++) {
        const char *p = x->line(n, c, i), *q = g->line(n, c, i);
        for (int64_t j = 0; j < x->width; j++) {
          const Pair v = norm.centred(p + j * LINE), in = norm.passed(v, q + j * LINE);
          s = add(s, in);
          d = {_mm512_fmadd_ps(in.even, v.even, d.even), _mm512_fmadd_ps(in.odd, v.odd, d.odd)};
        }
      }
      sum += total(s);  // lanes without a sample have no gradient
      dot += total(d);
    }
    d_beta[c] = float(sum);
    d_gamma[c] = float(dot * inverse);
    const double count = double(samples) * x->height * x->width;
    const __m512 a = _mm512_set1_ps(float(sum / count * scale));
    const __m512 b = _mm512_set1_ps(float(dot / count * inverse * inverse * scale));
    for (int64_t n = 0; n < blocks; n++) {
      const Lanes lanes(samples, n);
      for (int64_t i = 0; i < x->height; i++) {
        const char *p = x->line(n, c, i), *q = g->line(n, c, i);
        char* to = dx->line(n, c, i);
        for (int64_t j = 0; j < x->width; j++) {
          const Pair v = norm.centred(p + j * LINE), in = norm.passed(v, q + j * LINE);
          const Pair r = {
              _mm512_fnmadd_ps(v.even, b, _mm512_fmsub_ps(in.even, norm.scale, a)),
              _mm512_fnmadd_ps(v.odd, b, _mm512_fmsub_ps(in.odd, norm.scale, a))};
          store(to + j * LINE, keep(lanes.even, lanes.odd, r));
        }
      }
    }
  }
}

void bf16_relu(const View* x, const View* y, int64_t samples, int64_t threads) {
  each_line(samples, *x, *x, *y, threads, [](const char* p, const char*, char* to, int64_t) {
    const Pair v = load(p);
    const __m512 zero = _mm512_setzero_ps();  // first: what isn't a number stays
    store(to, {_mm512_max_ps(zero, v.even), _mm512_max_ps(zero, v.odd)});
  });
}

void bf16_relu_backward(const View* y, const View* g, const View* dx, int64_t samples,
                        int64_t threads) {
  each_line(samples, *y, *g, *dx, threads, [](const char* p, const char* q, char* to, int64_t) {
    const __mmask32 on = _mm512_cmpneq_epi16_mask(_mm512_loadu_si512(p), _mm512_setzero_si512());
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(on, q));
  });
}

void bf16_add(const View* a, const View* b, const View* y, int64_t samples, int64_t threads) {
  each_line(samples, *a, *b, *y, threads, [](const char* p, const char* q, char* to, int64_t) {
    store(to, add(load(p), load(q)));
  });
}

// Of each channel the sum over all samples and pixels: the gradient of a bias.
void bf16_channel_sums(const View* g, float* out, int64_t samples, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < g->channels; c++) {
    double sum = 0;
    for (int64_t n = 0; n < (samples + 31) / 32; n++) {
      Pair s{};
      for (int64_t i = 0; i < g->height; i++) {
        const char* p = g->line(n, c, i);
        for (int64_t j = 0; j < g->width; j++) s = add(s, load(p + j * LINE));
      }
      sum += total(s);
    }
    out[c] = float(sum);
  }
}

// Values are zero with probability rate (a multiple of 1 / 65536), the others scaled. The same seed
// gives the same mask, so the gradient passes through the same call.
void bf16_dropout(const View* x, const View* y, double rate, uint64_t seed, int64_t samples,
                  int64_t threads) {
  const int cut = int(rate * 65536 + 0.5);
  const __m512i threshold = _mm512_set1_epi16(short(cut));
  const __m512 scale = _mm512_set1_ps(float(65536.0 / (65536 - cut)));
  each_line(samples, *x, *x, *y, threads, [=](const char* p, const char*, char* to, int64_t at) {
    const __mmask32 kept = _mm512_cmpge_epu16_mask(random_line(seed, uint64_t(at)), threshold);
    const Pair v = widen(_mm512_maskz_loadu_epi16(kept, p));
    store(to, {_mm512_mul_ps(v.even, scale), _mm512_mul_ps(v.odd, scale)});
  });
}

// Windows of size x size, side by side.
void bf16_pool(const View* x, const View* y, int64_t size, int64_t mean, int64_t samples,
               int64_t threads) {
  const __m512 share = _mm512_set1_ps(1.0f / float(size * size));
  each_row((samples + 31) / 32, *y, threads, [&](int64_t n, int64_t c, int64_t i) {
    char* to = y->line(n, c, i);
    for (int64_t j = 0; j < y->width; j++) {
      Pair r = load(x->line(n, c, i * size) + j * size * LINE);
      for (int64_t k = 1; k < size * size; k++) {
        const Pair v = load(x->line(n, c, i * size + k / size) + (j * size + k % size) * LINE);
        if (mean) r = add(r, v);
        else r = {_mm512_max_ps(r.even, v.even), _mm512_max_ps(r.odd, v.odd)};
      }
      if (mean) r = {_mm512_mul_ps(r.even, share), _mm512_mul_ps(r.odd, share)};
      store(to + j * LINE, r);
    }
  });
}

// The gradient goes to the first of the largest, or to all alike; pixels in no window have none.
void bf16_pool_backward(const View* x, const View* y, const View* g, const View* dx, int64_t size,
                        int64_t mean, int64_t samples, int64_t threads) {
  const __m512 share = _mm512_set1_ps(1.0f / float(size * size));
  const __m512i zero = _mm512_setzero_si512();
  each_row((samples + 31) / 32, *dx, threads, [&](int64_t n, int64_t c, int64_t i) {
    char* to = dx->line(n, c, i);
    const bool outside = i / size >= g->height;
    for (int64_t j = outside ? 0 : g->width * size; j < dx->width; j++) {
      _mm512_storeu_si512(to + j * LINE, zero);
    }
    if (outside || (!mean && i % size)) return;
    for (int64_t j = 0; j < g->width; j++) {
      const char* in = g->line(n, c, i / size) + j * LINE;
      if (mean) {
        const Pair v = load(in);
        for (int64_t k = 0; k < size; k++) {
          store(to + (j * size + k) * LINE, {_mm512_mul_ps(v.even, share), _mm512_mul_ps(v.odd, share)});
        }
        continue;
      }
      const __m512i best = _mm512_loadu_si512(y->line(n, c, i / size) + j * LINE);
      __mmask32 left = ~__mmask32(0);
      for (int64_t k = 0; k < size * size; k++) {
        const int64_t row = i + k / size, at = (j * size + k % size) * LINE;
        const __m512i v = _mm512_loadu_si512(x->line(n, c, row) + at);
        const __mmask32 here = left & _mm512_cmpeq_epi16_mask(v, best);
        left &= ~here;
        _mm512_storeu_si512(dx->line(n, c, row) + at, _mm512_maskz_loadu_epi16(here, in));
      }
    }
  });
}
}
