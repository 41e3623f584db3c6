// Masks and the non-zeros under them: count, list by row and by column, write back.  Each is one pass,
// O(n).  Masks are bytes, 0 or 1.  Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace sparse {

namespace detail {

// Sixteen places at a time, as a set of bits; compilers don't find these instructions by themselves.
// Nothing is read or written at a place without a bit, except that what is packed may fill sixteen.
constexpr int64_t kPlaces = 16;

// The places from i on, of n.
static inline uint32_t places_from(int64_t i, int64_t n) {
  return n - i >= kPlaces ? 0xffffu : (1u << (n - i)) - 1;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

static inline uint32_t set_bytes(const uint8_t* mask, uint32_t at) {
  const __m128i bytes = _mm_maskz_loadu_epi8(__mmask16(at), mask);
  return _mm_test_epi8_mask(bytes, bytes);
}

// Packs first, first + 1, ...
static inline void pack_places(int32_t first, uint32_t at, int32_t* to) {
  const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(first), order);
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(at), places));
}

#else

static inline uint32_t set_bytes(const uint8_t* mask, uint32_t at) {
  uint32_t bits = 0;
  for (int i = 0; i < kPlaces; ++i)
    if (at >> i & 1) bits |= uint32_t(mask[i] != 0) << i;
  return bits;
}

// Packs first, first + 1, ...
static inline void pack_places(int32_t first, uint32_t at, int32_t* to) {
  for (; at; at &= at - 1) *to++ = first + __builtin_ctz(at);
}

#endif

// f(j, sixteen from j on) for n of something.
template <class F>
static inline void by_sixteen(int64_t n, F&& f) {
  for (int64_t j = 0; j < n; j += kPlaces) f(j, places_from(j, n));
}

// f(k, index[k]) for k < count, where f goes to these places of two arrays: rarely in a cache, they
// are asked for ahead.
template <class F>
static void each_place(const int64_t* index, int64_t count, const float* a, const float* b, F&& f) {
  constexpr int64_t kAhead = 48;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t later = index[std::min(k + kAhead, count - 1)];
    __builtin_prefetch(a + later);
    __builtin_prefetch(b + later);
    f(k, index[k]);
  }
}

}  // namespace detail

// Number of set bytes.
static int64_t count_set(const uint8_t* mask, int64_t n) {
  int64_t count = 0;
  detail::by_sixteen(n, [&](int64_t i, uint32_t at) {
    count += __builtin_popcount(detail::set_bytes(mask + i, at));
  });
  return count;
}

// The non-zeros of a matrix, by row and by column, and what two matrices hold there; see
// PerceptronLayer.  `index` [nonzeros] are their places in the matrix. `column` has room for sixteen
// more.
struct Nonzeros {
  int64_t rows, columns;
  int64_t* index;
  int32_t *row_start, *column, *column_start, *row, *place;
  float *value, *value_momentum;
};

// Throws where the mask doesn't have `count` set bytes, for which the arrays have room.
static void take_nonzeros(const uint8_t* mask, int64_t count, const float* weight,
                          const float* momentum, const Nonzeros& p) {
  std::fill(p.column_start, p.column_start + p.columns + 1, 0);
  int64_t found = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t first = r * p.columns, start = found;
    p.row_start[r] = int32_t(found);
    detail::by_sixteen(p.columns, [&](int64_t c, uint32_t at) {
      const uint32_t bits = detail::set_bytes(mask + first + c, at);
      if (found + __builtin_popcount(bits) > count)
        throw std::invalid_argument("a mask has more non-zeros than were counted");
      detail::pack_places(int32_t(c), bits, p.column + found);
      found += __builtin_popcount(bits);
    });
    for (int64_t k = start; k < found; ++k) {
      p.index[k] = first + p.column[k];
      ++p.column_start[p.column[k] + 1];
    }
  }
  if (found < count) throw std::invalid_argument("a mask has fewer non-zeros than were counted");
  p.row_start[p.rows] = int32_t(found);
  detail::each_place(p.index, count, weight, momentum, [&](int64_t k, int64_t at) {
    p.value[k] = weight[at];
    p.value_momentum[k] = momentum[at];
  });
  for (int64_t c = 0; c < p.columns; ++c) p.column_start[c + 1] += p.column_start[c];
  std::vector<int32_t> next(p.column_start, p.column_start + p.columns);
  for (int64_t r = 0; r < p.rows; ++r)
    for (int32_t k = p.row_start[r]; k < p.row_start[r + 1]; ++k) {
      const int32_t at = next[p.column[k]]++;
      p.row[at] = int32_t(r);
      p.place[at] = k;
    }
}

// Writes `count` of them back.
static void put_nonzeros(const Nonzeros& p, int64_t count, float* weight, float* momentum) {
  detail::each_place(p.index, count, weight, momentum, [&](int64_t k, int64_t at) {
    weight[at] = p.value[k];
    momentum[at] = p.value_momentum[k];
  });
}

}  // namespace sparse
