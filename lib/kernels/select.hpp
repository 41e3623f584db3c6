// What an update of the masks does to each layer: survey it, move its mask to or from the weights of
// the largest scores, clear those that were pruned, list the non-zeros.  Each is a pass or two over
// the layer, O(n).  Masks are bytes, 0 or 1.  Free of torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
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
// Nothing is read or written at a place without a bit, except that what is packed or taken may fill
// sixteen.
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

static inline void clear(float* values, uint32_t at) {
  _mm512_mask_storeu_ps(values, __mmask16(at), _mm512_setzero_ps());
}

// Places whose number has a bit set: all but +0.
static inline uint32_t with_bits(const float* values, uint32_t at) {
  const __m512i v = _mm512_maskz_loadu_epi32(__mmask16(at), values);
  return _mm512_test_epi32_mask(v, v);
}

static inline void add_magnitudes(const float* values, uint32_t at, double* sums) {
  const __m512 v = _mm512_abs_ps(_mm512_maskz_loadu_ps(__mmask16(at), values));
  const __m256 low = _mm512_castps512_ps256(v);
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), _mm512_cvtps_pd(low)));
  _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), _mm512_cvtps_pd(high)));
}

// By the bits: what is no number is larger than what is infinite, and that than all else.
static inline void raise_to_magnitudes(const float* values, uint32_t at, uint32_t* largest) {
  const __m512i v = _mm512_maskz_loadu_epi32(__mmask16(at), values);
  const __m512i magnitudes = _mm512_and_si512(v, _mm512_set1_epi32(int32_t(~kSign)));
  _mm512_storeu_si512(largest, _mm512_max_epu32(_mm512_loadu_si512(largest), magnitudes));
}

static inline void pack(const float* values, uint32_t at, float* to) {
  const __m512 v = _mm512_maskz_loadu_ps(__mmask16(at), values);
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(__mmask16(at), v));
}

// Packs the scores that are at least `lowest`, and their places; how many there are.
static inline int64_t take(const Score& score, const float* values, uint32_t at, float lowest,
                           int64_t first, float* scores, int32_t* places) {
  const __m512i v = _mm512_maskz_loadu_epi32(__mmask16(at), values);
  const __m512i kept = _mm512_and_si512(v, _mm512_set1_epi32(int32_t(score.keep)));
  const __m512i bits = _mm512_or_si512(kept, _mm512_set1_epi32(int32_t(score.set)));
  const __mmask16 taken = _mm512_mask_cmp_ps_mask(__mmask16(at), _mm512_castsi512_ps(bits),
                                                  _mm512_set1_ps(lowest), _CMP_GE_OQ);
  const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i place = _mm512_add_epi32(_mm512_set1_epi32(int32_t(first)), order);
  _mm512_storeu_si512(scores, _mm512_maskz_compress_epi32(taken, bits));
  _mm512_storeu_si512(places, _mm512_maskz_compress_epi32(taken, place));
  return __builtin_popcount(taken);
}

#else

template <class F>
static inline uint32_t where(uint32_t at, F&& f) {
  uint32_t bits = 0;
  for (int i = 0; i < kPlaces; ++i)
    if (at >> i & 1) bits |= uint32_t(f(i)) << i;
  return bits;
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

static inline void clear(float* values, uint32_t at) {
  for (; at; at &= at - 1) values[__builtin_ctz(at)] = 0.0f;
}

static inline uint32_t with_bits(const float* values, uint32_t at) {
  return where(at, [&](int i) { return bits_of(values[i]) != 0; });
}

static inline void add_magnitudes(const float* values, uint32_t at, double* sums) {
  for (; at; at &= at - 1) sums[__builtin_ctz(at)] += std::fabs(values[__builtin_ctz(at)]);
}

static inline void raise_to_magnitudes(const float* values, uint32_t at, uint32_t* largest) {
  for (; at; at &= at - 1) {
    const int i = __builtin_ctz(at);
    largest[i] = std::max(largest[i], bits_of(values[i]) & ~kSign);
  }
}

static inline void pack(const float* values, uint32_t at, float* to) {
  for (; at; at &= at - 1) *to++ = values[__builtin_ctz(at)];
}

static inline int64_t take(const Score& score, const float* values, uint32_t at, float lowest,
                           int64_t first, float* scores, int32_t* places) {
  int64_t found = 0;
  for (; at; at &= at - 1) {
    const int i = __builtin_ctz(at);
    if (const float s = score.of(values[i]); s >= lowest) {
      scores[found] = s;
      places[found++] = int32_t(first + i);
    }
  }
  return found;
}

#endif

static inline uint32_t those_of(const Candidates& candidates, int64_t i, uint32_t at) {
  const uint32_t active = set_bytes(candidates.mask + i, at);
  return candidates.active ? active : at & ~active;
}

// f(i) for each i < n whose byte is set, in order.
template <class F>
static void each_set(const uint8_t* mask, int64_t n, F&& f) {
  for (int64_t i = 0; i < n; i += kPlaces)
    for (uint32_t bits = set_bytes(mask + i, places_from(i, n)); bits; bits &= bits - 1)
      f(i + __builtin_ctz(bits));
}

// Copies the numbers for which `which(values + i, places)` has a bit to `to`, which has room for n
// and sixteen more; their number.
template <class F>
static int64_t filter(const float* values, int64_t n, float* to, F&& which) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; i += kPlaces) {
    const uint32_t bits = which(values + i, places_from(i, n));
    pack(values + i, bits, to + found);
    found += __builtin_popcount(bits);
  }
  return found;
}

// The k-th largest of n numbers, 1 <= k <= n; quickselect, O(n). Both arrays have room for n and
// sixteen more and are overwritten.
static float kth_largest(float* values, float* room, int64_t n, int64_t k) {
  for (uint64_t seed = 1;;) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    const float pivot = values[(seed >> 33) % uint64_t(n)];
    const int64_t larger =
        filter(values, n, room, [&](const float* v, uint32_t at) { return above(v, at, pivot); });
    if (larger >= k) {
      std::swap(values, room);
      n = larger;
      continue;
    }
    const int64_t smaller = filter(values, n, room, [&](const float* v, uint32_t at) {
      return at & ~at_least(v, at, pivot);
    });
    if (n - smaller >= k) return pivot;
    k -= n - smaller;
    n = smaller;
    std::swap(values, room);
  }
}

// A score that about k of the candidates reach, and rarely fewer: read off every so-many-th place.
static float score_that_suffices(const Score& score, const float* values,
                                 const Candidates& candidates, int64_t n, int64_t count,
                                 int64_t k) {
  constexpr int64_t kSample = 2048;
  const float everything = -std::numeric_limits<float>::infinity();
  if (n < 4 * kSample) return everything;
  float sample[2 * kSample + kPlaces], room[2 * kSample + kPlaces];
  // An odd step meets all columns of a matrix whose rows are a power of two long.
  const int64_t step = (n / kSample) | 1;
  int64_t size = 0;
  for (int64_t i = step / 2; i < n; i += step)
    if ((candidates.mask[i] != 0) == candidates.active && !std::isnan(values[i]))
      sample[size++] = score.of(values[i]);
  const double share = double(k) / double(count);
  const double rank = share * double(size) + 4 * std::sqrt(share * double(size)) + 8;
  return rank < double(size) ? kth_largest(sample, room, size, int64_t(rank)) : everything;
}

struct Found {
  std::vector<int64_t> places;
  std::vector<float> scores;
};

// The candidates whose score is at least `lowest`, in order.
static Found gather(const Score& score, const float* values, const Candidates& candidates,
                    int64_t n, float lowest) {
  constexpr int64_t kBlock = 4096;
  float scores[kBlock + kPlaces];
  int32_t place[kBlock + kPlaces];
  Found all;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t size = std::min(n - start, kBlock);
    int64_t found = 0;
    for (int64_t i = 0; i < size; i += kPlaces) {
      const uint32_t at = those_of(candidates, start + i, places_from(i, size));
      found += take(score, values + start + i, at, lowest, i, scores + found, place + found);
    }
    all.scores.insert(all.scores.end(), scores, scores + found);
    for (int64_t j = 0; j < found; ++j) all.places.push_back(start + place[j]);
  }
  return all;
}

// Flips the places of the k largest of `size` scores, 1 <= k <= size; places stand in order.
template <class Place>
static void flip_best(const Place* places, const float* scores, int64_t size, int64_t k,
                      bool active, uint8_t* result) {
  std::vector<float> sorted(size + kPlaces), room(size + kPlaces);
  std::copy(scores, scores + size, sorted.begin());
  const float last = kth_largest(sorted.data(), room.data(), size, k);
  const uint8_t before = active, after = !active;
  int64_t reached = 0;
  for (int64_t j = 0; j < size; ++j) {
    const bool is = scores[j] >= last;
    reached += is;
    result[places[j]] = is ? after : before;
  }
  for (int64_t j = size - 1; reached > k; --j)  // the last ones of the ties
    if (scores[j] == last) result[places[j]] = before, --reached;
}

}  // namespace detail

// Number of set bytes.
static int64_t count_set(const uint8_t* mask, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += detail::kPlaces)
    count += __builtin_popcount(detail::set_bytes(mask + i, detail::places_from(i, n)));
  return count;
}

// `result` [n] is the mask with exactly k candidates flipped, those of the largest scores; of equal
// scores the first places win.  Throws where fewer than k candidates have a score that is a number.
static void flip_largest(const Score& score, const float* values, const Candidates& candidates,
                         int64_t n, int64_t k, uint8_t* result) {
  std::copy(candidates.mask, candidates.mask + n, result);
  if (k == 0) return;
  const int64_t active = count_set(candidates.mask, n);
  const int64_t count = candidates.active ? active : n - active;
  if (k > count)
    throw std::invalid_argument("cannot pick " + std::to_string(k) + " of " +
                                std::to_string(count) + " candidates");
  const float lowest = detail::score_that_suffices(score, values, candidates, n, count, k);
  detail::Found found = detail::gather(score, values, candidates, n, lowest);
  if (int64_t(found.places.size()) < k)  // the sample misled, or scores that aren't numbers
    found = detail::gather(score, values, candidates, n, -std::numeric_limits<float>::infinity());
  const int64_t size = int64_t(found.places.size());
  if (size < k)
    throw std::invalid_argument("cannot pick " + std::to_string(k) + " of " +
                                std::to_string(count) + " candidates: only " +
                                std::to_string(size) + " scores are numbers");
  detail::flip_best(found.places.data(), found.scores.data(), size, k, candidates.active, result);
}

// Sum of |value| where the mask is set, in double, always in the same order.
static double sum_of_magnitudes(const float* values, const uint8_t* mask, int64_t n) {
  double sums[detail::kPlaces] = {}, total = 0;
  for (int64_t i = 0; i < n; i += detail::kPlaces)
    detail::add_magnitudes(values + i, detail::set_bytes(mask + i, detail::places_from(i, n)), sums);
  for (const double sum : sums) total += sum;
  return total;
}

// What an update has to know of a layer. The largest magnitudes, of the weights inside the mask and
// of all momentum, are NaN or infinite where one of the numbers is.
struct Survey {
  int64_t active;
  double momentum;  // sum of the magnitudes inside the mask
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
  double sums[detail::kPlaces] = {};
  uint32_t weights[detail::kPlaces] = {}, momenta[detail::kPlaces] = {};
  Survey seen = {};
  for (int64_t i = 0; i < n; i += detail::kPlaces) {
    const uint32_t at = detail::places_from(i, n), active = detail::set_bytes(mask + i, at);
    // Mostly they are clear already: not written then.
    if (const uint32_t stale = detail::with_bits(weight + i, at & ~active))
      detail::clear(weight + i, stale);
    detail::raise_to_magnitudes(weight + i, active, weights);
    if (list != nullptr && seen.active + detail::kPlaces <= list->room)
      detail::take(Score::value(), weight + i, active, -std::numeric_limits<float>::infinity(), i,
                   list->weight + seen.active, list->place + seen.active);
    seen.active += __builtin_popcount(active);
    if (momentum == nullptr) continue;
    detail::add_magnitudes(momentum + i, active, sums);
    detail::raise_to_magnitudes(momentum + i, at, momenta);
  }
  for (const double sum : sums) seen.momentum += sum;
  seen.largest_weight = float_of(*std::max_element(weights, weights + detail::kPlaces));
  seen.largest_momentum = float_of(*std::max_element(momenta, momenta + detail::kPlaces));
  return seen;
}

// `result` [n] is the mask without the k smallest of the `active` weights listed, finite ones.
static void drop_smallest(const ActiveList& list, int64_t active, const uint8_t* mask, int64_t n,
                          int64_t k, uint8_t* result) {
  std::copy(mask, mask + n, result);
  if (k == 0) return;
  if (k > active)
    throw std::invalid_argument("cannot pick " + std::to_string(k) + " of " +
                                std::to_string(active) + " candidates");
  std::vector<float> scores(active);
  for (int64_t j = 0; j < active; ++j) scores[j] = Score::smallness().of(list.weight[j]);
  detail::flip_best(list.place, scores.data(), active, k, true, result);
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
  for (int64_t j = 0; j < active; ++j)
    if (!mask[list.place[j]]) values[list.place[j]] = 0.0f;
}

// The non-zeros of a matrix, by row and by column, and what two matrices hold there; see
// PerceptronLayer.  `index` [nonzeros] are their places in the matrix.
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
  int32_t found = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    p.row_start[r] = found;
    detail::each_set(mask + r * p.columns, p.columns, [&](int64_t c) {
      if (found == count) throw std::invalid_argument("a mask has more non-zeros than were counted");
      const int64_t at = p.index[found] = r * p.columns + c;
      p.value[found] = weight[at];
      p.value_momentum[found] = momentum[at];
      p.column[found++] = int32_t(c);
      ++p.column_start[c + 1];
    });
  }
  if (found < count) throw std::invalid_argument("a mask has fewer non-zeros than were counted");
  p.row_start[p.rows] = found;
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
  for (int64_t k = 0; k < count; ++k) {
    weight[p.index[k]] = p.value[k];
    momentum[p.index[k]] = p.value_momentum[k];
  }
}

}  // namespace sparse
