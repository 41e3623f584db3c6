// Lines of 32 samples in bfloat16: the one layout of lib/cpu/bf16.cpp.
//
// A tensor [N, C, H, W] is stored as [N/32][C][H + 2 halo][W + 2 halo][32], the border zero. One
// cache line holds one pixel of 32 samples; in fp32 it is two vectors, of the even and of the odd
// samples. Samples beyond N in the last block are zero where they could enter a sum.
#pragma once
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#define INLINE __attribute__((always_inline)) inline
#define UNROLL _Pragma("GCC unroll 32")

constexpr int64_t LINE = 64;

struct View {  // mirrored in lib/cpu/bf16.py
  char* at;
  int64_t channels, height, width, halo;

  int64_t row() const { return (width + 2 * halo) * LINE; }
  int64_t plane() const { return (height + 2 * halo) * row(); }
  // The first pixel of a row of the image, within the border.
  char* line(int64_t block, int64_t channel, int64_t i) const {
    return at + (block * channels + channel) * plane() + (i + halo) * row() + halo * LINE;
  }
};

struct Pair {  // 32 samples in fp32
  __m512 even, odd;
};

static INLINE Pair widen(__m512i line) {
  const __m512i high = _mm512_set1_epi32(int(0xffff0000));
  return {(__m512)_mm512_slli_epi32(line, 16), (__m512)_mm512_and_si512(line, high)};
}

static INLINE Pair load(const char* p) { return widen(_mm512_loadu_si512(p)); }

static INLINE __m512i narrow(__m512 even, __m512 odd) {  // rounds to nearest even
  alignas(64) static const uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                 21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order),
                                  (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// The same for the two halves that unpacklo and unpackhi of 16-bit words make of a line.
static INLINE __m512i narrow_halves(__m512 low, __m512 high) {
  alignas(64) static const uint16_t order[32] = {0,  1,  2,  3,  16, 17, 18, 19, 4,  5,  6,
                                                 7,  20, 21, 22, 23, 8,  9,  10, 11, 24, 25,
                                                 26, 27, 12, 13, 14, 15, 28, 29, 30, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order),
                                  (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

static INLINE void store(char* p, Pair v) { _mm512_storeu_si512(p, narrow(v.even, v.odd)); }

static INLINE float to_float(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static INLINE uint16_t to_bf16(float value) {  // of finite values
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Which lanes of a block of 32 hold samples.
struct Lanes {
  __mmask16 even, odd;
  Lanes(int64_t samples, int64_t block) {
    const int64_t left = std::clamp<int64_t>(samples - 32 * block, 0, 32);
    even = __mmask16((1u << ((left + 1) / 2)) - 1);
    odd = __mmask16((1u << (left / 2)) - 1);
  }
};

// The sums of 16 vectors as one vector. Each lane adds in the same order, wherever its vector is.
static INLINE __m512 sums_of_16(const __m512* v) {
  __m512 t[8], u[4], w[2];
  UNROLL for (int k = 0; k < 8; k++) {
    t[k] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * k], v[2 * k + 1]),
                         _mm512_unpackhi_ps(v[2 * k], v[2 * k + 1]));
  }
  UNROLL for (int k = 0; k < 4; k++) {
    const __m512d a = (__m512d)t[2 * k], b = (__m512d)t[2 * k + 1];
    u[k] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
  }
  UNROLL for (int k = 0; k < 2; k++) {
    w[k] = _mm512_add_ps(_mm512_shuffle_f32x4(u[2 * k], u[2 * k + 1], 0x88),
                         _mm512_shuffle_f32x4(u[2 * k], u[2 * k + 1], 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(w[0], w[1], 0x88),
                       _mm512_shuffle_f32x4(w[0], w[1], 0xdd));
}

// Rows and columns of dwords exchanged.
static INLINE void transpose_16(__m512i* v) {
  __m512i t[16];
  UNROLL for (int k = 0; k < 8; k++) {
    t[2 * k] = _mm512_unpacklo_epi32(v[2 * k], v[2 * k + 1]);
    t[2 * k + 1] = _mm512_unpackhi_epi32(v[2 * k], v[2 * k + 1]);
  }
  UNROLL for (int k = 0; k < 4; k++) {
    v[4 * k] = _mm512_unpacklo_epi64(t[4 * k], t[4 * k + 2]);
    v[4 * k + 1] = _mm512_unpackhi_epi64(t[4 * k], t[4 * k + 2]);
    v[4 * k + 2] = _mm512_unpacklo_epi64(t[4 * k + 1], t[4 * k + 3]);
    v[4 * k + 3] = _mm512_unpackhi_epi64(t[4 * k + 1], t[4 * k + 3]);
  }
  UNROLL for (int k = 0; k < 4; k++) {
    t[k] = _mm512_shuffle_i32x4(v[k], v[k + 4], 0x88);
    t[k + 4] = _mm512_shuffle_i32x4(v[k], v[k + 4], 0xdd);
    t[k + 8] = _mm512_shuffle_i32x4(v[k + 8], v[k + 12], 0x88);
    t[k + 12] = _mm512_shuffle_i32x4(v[k + 8], v[k + 12], 0xdd);
  }
  UNROLL for (int k = 0; k < 4; k++) {
    v[k] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0x88);
    v[k + 8] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0xdd);
    v[k + 4] = _mm512_shuffle_i32x4(t[k + 4], t[k + 12], 0x88);
    v[k + 12] = _mm512_shuffle_i32x4(t[k + 4], t[k + 12], 0xdd);
  }
}
