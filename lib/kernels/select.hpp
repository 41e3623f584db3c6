// What an update of the masks does to each layer: survey it, move its mask to or from the weights of
// the largest scores, clear those that were pruned, list the non-zeros.  Each is a pass or two over
// the layer, O(n).  Masks are bytes, 0 or 1.  Free of torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace sparse {

constexpr uint32_t kSign = 0x80000000u;

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

// A choice goes by the floats themselves, by their magnitudes, or by minus these: of a float's bits
// those of `keep` remain and those of `set` are set.
struct Score {
  uint32_t keep, set;
  static Score value() { return {~0u, 0u}; }
  static Score smallness() { return {~0u, kSign}; }
  static Score magnitude() { return {~kSign, 0u}; }
  float of(float value) const { return float_of((bits_of(value) & keep) | set); }
};

// Who may be chosen: the places whose byte of the mask is set, or those where it isn't.
struct Candidates {
  const uint8_t* mask;
  bool active;
};

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

static inline uint32_t at_least(const float* values, uint32_t at, float lowest) {  // never NaN
  const __m512 v = _mm512_maskz_loadu_ps(__mmask16(at), values);
  return _mm512_mask_cmp_ps_mask(__mmask16(at), v, _mm512_set1_ps(lowest), _CMP_GE_OQ);
}

static inline uint32_t above(const float* values, uint32_t at, float pivot) {
  const __m512 v = _mm512_maskz_loadu_ps(__mmask16(at), values);
  return _mm512_mask_cmp_ps_mask(__mmask16(at), v, _mm512_set1_ps(pivot), _CMP_GT_OQ);
}

// Places whose score is at least `lowest`, never of NaN.
static inline uint32_t reaching(const Score& score, const float* values, uint32_t at,
                                float lowest) {
  const __m512i v = _mm512_maskz_loadu_epi32(__mmask16(at), values);
  const __m512i kept = _mm512_and_si512(v, _mm512_set1_epi32(int32_t(score.keep)));
  const __m512i bits = _mm512_or_si512(kept, _mm512_set1_epi32(int32_t(score.set)));
  return _mm512_mask_cmp_ps_mask(__mmask16(at), _mm512_castsi512_ps(bits), _mm512_set1_ps(lowest),
                                 _CMP_GE_OQ);
}

static inline void clear(float* values, uint32_t at) {
  _mm512_mask_storeu_ps(values, __mmask16(at), _mm512_setzero_ps());
}

// Places whose number has a bit set: all but +0.
static inline uint32_t with_bits(const float* values, uint32_t at) {
  const __m512i v = _mm512_maskz_loadu_epi32(__mmask16(at), values);
  return _mm512_test_epi32_mask(v, v);
}

static inline void pack(const float* values, uint32_t at, float* to) {
  const __m512 v = _mm512_maskz_loadu_ps(__mmask16(at), values);
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(__mmask16(at), v));
}

static inline void pack(const int32_t* values, uint32_t at, int32_t* to) {
  const __m512i v = _mm512_maskz_loadu_epi32(__mmask16(at), values);
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(at), v));
}

// Packs first, first + 1, ...
static inline void pack_places(int32_t first, uint32_t at, int32_t* to) {
  const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(first), order);
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(at), places));
}

static inline void fetch(const float* values, const int32_t* places, uint32_t at, float* to) {
  const __m512i from = _mm512_maskz_loadu_epi32(__mmask16(at), places);
  const __m512 zero = _mm512_setzero_ps();
  _mm512_mask_storeu_ps(to, __mmask16(at),
                        _mm512_mask_i32gather_ps(zero, __mmask16(at), from, values, 4));
}

// The largest magnitude, by the bits: what is no number is larger than what is infinite, and that
// than all else.
class Largest {
 public:
  void see(const float* values, uint32_t at) {
    const __m512i v = _mm512_maskz_loadu_epi32(__mmask16(at), values);
    bits_ = _mm512_max_epu32(bits_, _mm512_and_si512(v, _mm512_set1_epi32(int32_t(~kSign))));
  }
  float magnitude() const { return float_of(_mm512_reduce_max_epu32(bits_)); }

 private:
  __m512i bits_ = _mm512_setzero_si512();
};

// Sixteen sums of magnitudes, in double.
class Sum {
 public:
  void add(const float* values, uint32_t at) {
    const __m512 v = _mm512_abs_ps(_mm512_maskz_loadu_ps(__mmask16(at), values));
    const __m256 low = _mm512_castps512_ps256(v);
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    low_ = _mm512_add_pd(low_, _mm512_cvtps_pd(low));
    high_ = _mm512_add_pd(high_, _mm512_cvtps_pd(high));
  }
  double total() const {
    double sums[kPlaces], total = 0;
    _mm512_storeu_pd(sums, low_);
    _mm512_storeu_pd(sums + 8, high_);
    for (const double sum : sums) total += sum;
    return total;
  }

 private:
  __m512d low_ = _mm512_setzero_pd(), high_ = _mm512_setzero_pd();
};

#else

template <class F>
static inline uint32_t where(uint32_t at, F&& f) {
  uint32_t bits = 0;
  for (int i = 0; i < kPlaces; ++i)
    if (at >> i & 1) bits |= uint32_t(f(i)) << i;
  return bits;
}

// f(i) for each place i.
template <class F>
static inline void each(uint32_t at, F&& f) {
  for (; at; at &= at - 1) f(__builtin_ctz(at));
}

static inline uint32_t set_bytes(const uint8_t* mask, uint32_t at) {
  return where(at, [&](int i) { return mask[i] != 0; });
}

static inline uint32_t at_least(const float* values, uint32_t at, float lowest) {  // never NaN
  return where(at, [&](int i) { return values[i] >= lowest; });
}

static inline uint32_t above(const float* values, uint32_t at, float pivot) {
  return where(at, [&](int i) { return values[i] > pivot; });
}

// Places whose score is at least `lowest`, never of NaN.
static inline uint32_t reaching(const Score& score, const float* values, uint32_t at,
                                float lowest) {
  return where(at, [&](int i) { return score.of(values[i]) >= lowest; });
}

static inline void clear(float* values, uint32_t at) {
  each(at, [&](int i) { values[i] = 0.0f; });
}

static inline uint32_t with_bits(const float* values, uint32_t at) {
  return where(at, [&](int i) { return bits_of(values[i]) != 0; });
}

template <class T>
static inline void pack(const T* values, uint32_t at, T* to) {
  each(at, [&](int i) { *to++ = values[i]; });
}

static inline void pack_places(int32_t first, uint32_t at, int32_t* to) {
  each(at, [&](int i) { *to++ = first + i; });
}

static inline void fetch(const float* values, const int32_t* places, uint32_t at, float* to) {
  each(at, [&](int i) { to[i] = values[places[i]]; });
}

// The largest magnitude, by the bits: what is no number is larger than what is infinite, and that
// than all else.
class Largest {
 public:
  void see(const float* values, uint32_t at) {
    each(at, [&](int i) { bits_ = std::max(bits_, bits_of(values[i]) & ~kSign); });
  }
  float magnitude() const { return float_of(bits_); }

 private:
  uint32_t bits_ = 0;
};

// Sixteen sums of magnitudes, in double.
class Sum {
 public:
  void add(const float* values, uint32_t at) {
    each(at, [&](int i) { sums_[i] += std::fabs(values[i]); });
  }
  double total() const {
    double total = 0;
    for (const double sum : sums_) total += sum;
    return total;
  }

 private:
  double sums_[kPlaces] = {};
};

#endif

static inline uint32_t those_of(const Candidates& candidates, int64_t i, uint32_t at) {
  const uint32_t active = set_bytes(candidates.mask + i, at);
  return candidates.active ? active : at & ~active;
}

// Asks for what a pass that stands at `at` will need soon; beyond an array's end without effect.
static inline void prefetch(const float* at) {
  __builtin_prefetch(reinterpret_cast<const char*>(at) + 2048);
}

// Goes over n < 2^31 places in blocks: lists those that `which(i, sixteen from i on)` has a bit for,
// then gives a block's to `take(places, found)`.
template <class Which, class Take>
static void list_in_blocks(int64_t n, Which&& which, Take&& take) {
  constexpr int64_t kBlock = 4096;
  int32_t places[kBlock + kPlaces];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(n, start + kBlock);
    int64_t found = 0;
    for (int64_t i = start; i < end; i += kPlaces) {
      const uint32_t bits = which(i, places_from(i, end));
      pack_places(int32_t(i), bits, places + found);
      found += __builtin_popcount(bits);
    }
    take(places, found);
  }
}

// f(j, sixteen from j on) for n of something.
template <class F>
static inline void by_sixteen(int64_t n, F&& f) {
  for (int64_t j = 0; j < n; j += kPlaces) f(j, places_from(j, n));
}

// Copies the numbers that `which(i, sixteen from i on)` has a bit for to `to`, which has room for n
// and sixteen more; their number.
template <class T, class F>
static int64_t filter(const T* values, int64_t n, T* to, F&& which) {
  int64_t found = 0;
  by_sixteen(n, [&](int64_t i, uint32_t at) {
    const uint32_t bits = which(i, at);
    pack(values + i, bits, to + found);
    found += __builtin_popcount(bits);
  });
  return found;
}

// The k-th largest of n numbers, 1 <= k <= n; quickselect, O(n). Both arrays have room for n and
// sixteen more and are overwritten.
static float kth_largest(float* values, float* room, int64_t n, int64_t k) {
  for (uint64_t seed = 1;;) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    const float pivot = values[(seed >> 33) % uint64_t(n)];
    const int64_t larger = filter(
        values, n, room, [&](int64_t i, uint32_t at) { return above(values + i, at, pivot); });
    if (larger >= k) {
      std::swap(values, room);
      n = larger;
      continue;
    }
    const int64_t smaller = filter(values, n, room, [&](int64_t i, uint32_t at) {
      return at & ~at_least(values + i, at, pivot);
    });
    if (n - smaller >= k) return pivot;
    k -= n - smaller;
    n = smaller;
    std::swap(values, room);
  }
}

// A score that rarely fewer than k of the candidates reach, and not many more: read off every
// so-many-th place. (Neighbours are too much alike for looking at several at once.)
static float score_that_suffices(const Score& score, const float* values,
                                 const Candidates& candidates, int64_t n, int64_t k) {
  constexpr int64_t kSample = 2048;
  const float everything = -std::numeric_limits<float>::infinity();
  if (n < 4 * kSample) return everything;
  float sample[2 * kSample + kPlaces], room[2 * kSample + kPlaces];
  // An odd step meets all columns of a matrix whose rows are a power of two long.
  const int64_t step = (n / kSample) | 1;
  int64_t size = 0;
  for (int64_t i = step / 2; i < n; i += step) {
    sample[size] = score.of(values[i]);
    size += (candidates.mask[i] != 0) == candidates.active && !std::isnan(values[i]);
  }
  const double expected = double(k) / double(step);
  const double rank = expected + 4 * std::sqrt(expected) + 8;
  return rank < double(size) ? kth_largest(sample, room, size, int64_t(rank)) : everything;
}

// n numbers, not set to anything, and sixteen more.
template <class T>
static std::unique_ptr<T[]> room_for(int64_t n) {
  return std::unique_ptr<T[]>(new T[n + kPlaces]);
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

struct Found {
  std::vector<int32_t> places;
  std::unique_ptr<float[]> scores;
};

// The candidates whose score is at least `lowest`, in order.
static Found gather(const Score& score, const float* values, const Candidates& candidates,
                    int64_t n, float lowest) {
  Found all;
  list_in_blocks(
      n,
      [&](int64_t i, uint32_t at) {
        prefetch(values + i);
        return reaching(score, values + i, those_of(candidates, i, at), lowest);
      },
      [&](const int32_t* places, int64_t found) {
        all.places.insert(all.places.end(), places, places + found);
      });
  all.scores = room_for<float>(int64_t(all.places.size()));
  for (size_t j = 0; j < all.places.size(); ++j) all.scores[j] = score.of(values[all.places[j]]);
  return all;
}

// Flips the places of the k largest of `size` scores, 1 <= k <= size; places stand in order.
static void flip_best(const int32_t* places, const float* scores, int64_t size, int64_t k,
                      uint8_t* result) {
  const auto left = room_for<float>(size), room = room_for<float>(size);
  std::copy(scores, scores + size, left.get());
  const float last = kth_largest(left.get(), room.get(), size, k);
  const auto best = room_for<int32_t>(size);
  int64_t reached = filter(places, size, best.get(), [&](int64_t j, uint32_t at) {
    return at_least(scores + j, at, last);
  });
  if (reached > k) {  // the first ones of the ties
    int64_t ties = k;
    by_sixteen(size, [&](int64_t j, uint32_t at) {
      ties -= __builtin_popcount(above(scores + j, at, last));
    });
    reached = 0;
    for (int64_t j = 0; j < size; ++j)
      if (scores[j] > last || (scores[j] == last && ties-- > 0)) best[reached++] = places[j];
  }
  for (int64_t j = 0; j < k; ++j) result[best[j]] ^= 1;
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

// `result` [n] is the mask with exactly k candidates flipped, those of the largest scores; of equal
// scores the first places win.  Throws where fewer than k candidates have a score that is a number.
static void flip_largest(const Score& score, const float* values, const Candidates& candidates,
                         int64_t n, int64_t k, uint8_t* result) {
  std::copy(candidates.mask, candidates.mask + n, result);
  if (k == 0) return;
  const float lowest = detail::score_that_suffices(score, values, candidates, n, k);
  detail::Found found = detail::gather(score, values, candidates, n, lowest);
  if (int64_t(found.places.size()) < k)  // the sample misled, or there are too few
    found = detail::gather(score, values, candidates, n, -std::numeric_limits<float>::infinity());
  const int64_t size = int64_t(found.places.size());
  if (size < k) {
    const int64_t active = count_set(candidates.mask, n);
    const int64_t all = candidates.active ? active : n - active;
    throw std::invalid_argument(
        "cannot pick " + std::to_string(k) + " of " + std::to_string(all) + " candidates" +
        (size < all ? ": only " + std::to_string(size) + " scores are numbers" : std::string()));
  }
  detail::flip_best(found.places.data(), found.scores.get(), size, k, result);
}

// Sum of |value| where the mask is set, in double, always in the same order.
static double sum_of_magnitudes(const float* values, const uint8_t* mask, int64_t n) {
  detail::Sum sum;
  detail::list_in_blocks(
      n, [&](int64_t i, uint32_t at) { return detail::set_bytes(mask + i, at); },
      [&](const int32_t* places, int64_t found) {
        float of[detail::kPlaces];
        detail::by_sixteen(found, [&](int64_t j, uint32_t at) {
          detail::fetch(values, places + j, at, of);
          sum.add(of, at);
        });
      });
  return sum.total();
}

// What an update has to know of a layer. The largest magnitudes, of the weights inside the mask and
// of all momentum, are NaN or infinite where one of the numbers is.
struct Survey {
  int64_t active;
  double momentum;  // sum of the magnitudes inside the mask, as of sum_of_magnitudes
  float largest_weight, largest_momentum;
};

// Room for the places and values of a layer's active weights, in order, and for sixteen more.
struct ActiveList {
  int64_t room;
  int32_t* place;
  float* weight;
};

// Clears the weights outside of the mask on the way, and lists those inside, unless the list is null
// or has no room for them. No momentum (null) counts as zero.
static Survey survey(float* weight, const float* momentum, const uint8_t* mask, int64_t n,
                     const ActiveList* list) {
  detail::Sum sum;
  detail::Largest weights, momenta;
  int64_t active = 0;
  detail::list_in_blocks(
      n,
      [&](int64_t i, uint32_t at) {
        detail::prefetch(weight + i);
        const uint32_t inside = detail::set_bytes(mask + i, at);
        // Mostly they are clear already: not written then.
        if (const uint32_t stale = detail::with_bits(weight + i, at & ~inside))
          detail::clear(weight + i, stale);
        if (momentum != nullptr) {
          detail::prefetch(momentum + i);
          momenta.see(momentum + i, at);
        }
        return inside;
      },
      [&](const int32_t* places, int64_t found) {
        const bool listed = list != nullptr && active + found + detail::kPlaces <= list->room;
        float of[detail::kPlaces];
        detail::by_sixteen(found, [&](int64_t j, uint32_t at) {
          float* const to = listed ? list->weight + active + j : of;
          detail::fetch(weight, places + j, at, to);
          weights.see(to, at);
          if (momentum == nullptr) return;
          detail::fetch(momentum, places + j, at, of);
          sum.add(of, at);
        });
        if (listed) std::copy(places, places + found, list->place + active);
        active += found;
      });
  return {active, sum.total(), weights.magnitude(), momenta.magnitude()};
}

// `result` [n] is the mask without the k smallest of the `active` weights listed, finite ones.
static void drop_smallest(const ActiveList& list, int64_t active, const uint8_t* mask, int64_t n,
                          int64_t k, uint8_t* result) {
  std::copy(mask, mask + n, result);
  if (k == 0) return;
  if (k > active)
    throw std::invalid_argument("cannot pick " + std::to_string(k) + " of " +
                                std::to_string(active) + " candidates");
  const auto scores = detail::room_for<float>(active);
  for (int64_t j = 0; j < active; ++j) scores[j] = Score::smallness().of(list.weight[j]);
  detail::flip_best(list.place, scores.get(), active, k, result);
}

// Sets values outside of the mask to zero.
static void clear_outside(float* values, const uint8_t* mask, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && n > 1 << 18)
  for (int64_t i = 0; i < n; i += detail::kPlaces) {
    const uint32_t at = detail::places_from(i, n);
    detail::clear(values + i, at & ~detail::set_bytes(mask + i, at));
  }
}

// The same for values that are zero wherever none is listed.
static void clear_listed(float* values, const uint8_t* mask, const ActiveList& list,
                         int64_t active) {
  constexpr int64_t kBlock = 1024;
  int32_t outside[kBlock];
  for (int64_t start = 0; start < active; start += kBlock) {
    const int64_t end = std::min(active, start + kBlock);
    int64_t found = 0;  // first without a branch, which nobody could predict
    for (int64_t j = start; j < end; ++j) {
      outside[found] = list.place[j];
      found += mask[list.place[j]] == 0;
    }
    for (int64_t j = 0; j < found; ++j) values[outside[j]] = 0.0f;
  }
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
