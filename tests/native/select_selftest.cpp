// Checks select.hpp against plain loops on buffers of exact size; built with sanitizers by the tests,
// with AVX-512 and without.  Prints the first disagreement and returns 1.
#include "select.hpp"

#include <cstdio>
#include <numeric>
#include <random>

using namespace sparse;

static std::mt19937 rng(7);

static bool check(int64_t n, double density, int values, int64_t k_of_8, const Score& score) {
  std::normal_distribution<float> normal;
  std::vector<float> v(n);
  std::vector<uint8_t> mask(n), flipped(n, 7);
  for (int64_t i = 0; i < n; ++i) {  // few different values: ties
    v[i] = values ? float(int(rng() % values) - values / 2) : normal(rng);
    mask[i] = rng() % 1000 < 1000 * density;
  }
  for (auto* x : {&mask, &flipped}) x->shrink_to_fit();
  v.shrink_to_fit();
  double sum = 0;
  float largest = 0, largest_of_all = 0;
  std::vector<int64_t> places[2];  // where the mask is not set, and where it is
  for (int64_t i = 0; i < n; ++i) {
    places[mask[i]].push_back(i);
    if (mask[i]) sum += std::fabs(v[i]), largest = std::max(largest, std::fabs(v[i]));
    largest_of_all = std::max(largest_of_all, std::fabs(v[i]));
  }
  const int64_t count = int64_t(places[1].size());
  if (count_set(mask.data(), n) != count) return std::printf("count of %ld\n", long(n)), false;
  if (std::fabs(sum_of_magnitudes(v.data(), mask.data(), n) - sum) > 1e-9 * (1 + sum))
    return std::printf("sum of %ld\n", long(n)), false;

  for (const bool active : {false, true}) {
    std::vector<int64_t>& order = places[active];
    const int64_t candidates = int64_t(order.size()), k = candidates * k_of_8 / 8;
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return score.of(v[a]) > score.of(v[b]); });
    std::vector<uint8_t> want = mask;
    for (int64_t j = 0; j < k; ++j) want[order[j]] = !active;
    flip_largest(score, v.data(), {mask.data(), active}, n, k, flipped.data());
    if (flipped != want) return std::printf("choice of %ld of %ld\n", long(k), long(n)), false;
    try {
      flip_largest(score, v.data(), {mask.data(), active}, n, candidates + 1, flipped.data());
      return std::printf("more than there are were chosen\n"), false;
    } catch (const std::invalid_argument&) {
    }
  }

  std::vector<float> cleared = v, surveyed = v;
  for (auto* x : {&cleared, &surveyed}) x->shrink_to_fit();
  clear_outside(cleared.data(), mask.data(), n, 2);
  for (int64_t i = 0; i < n; ++i)
    if (cleared[i] != (mask[i] ? v[i] : 0.0f)) return std::printf("cleared %ld\n", long(i)), false;
  std::vector<int32_t> place(count + 16);
  std::vector<float> listed(count + 16);
  const ActiveList list{count + 16, place.data(), listed.data()};
  const ActiveList small{count, place.data() + 16, listed.data() + 16};  // too small: left alone
  const Survey still = survey(surveyed.data(), nullptr, mask.data(), n, &small);
  const Survey seen = survey(surveyed.data(), v.data(), mask.data(), n, &list);
  if (surveyed != cleared || seen.active != count || still.active != count ||
      seen.momentum != sum_of_magnitudes(v.data(), mask.data(), n) || still.momentum != 0 ||
      seen.largest_weight != largest || seen.largest_momentum != largest_of_all)
    return std::printf("survey of %ld\n", long(n)), false;

  for (int64_t j = 0; j < count; ++j)
    if (!mask[place[j]] || listed[j] != v[place[j]] || (j > 0 && place[j] <= place[j - 1]))
      return std::printf("listed %ld\n", long(j)), false;
  const int64_t k = count * k_of_8 / 8;
  std::vector<uint8_t> dropped(n);
  flip_largest(Score::smallness(), v.data(), {mask.data(), true}, n, k, flipped.data());
  drop_smallest(list, count, mask.data(), n, k, dropped.data());
  if (dropped != flipped) return std::printf("dropped %ld of %ld\n", long(k), long(n)), false;
  clear_listed(surveyed.data(), dropped.data(), list, count);
  for (int64_t i = 0; i < n; ++i)
    if (surveyed[i] != (dropped[i] ? v[i] : 0.0f))
      return std::printf("cleared %ld of those listed\n", long(i)), false;
  return true;
}

static bool pattern(int64_t rows, int64_t columns, double density) {
  std::vector<uint8_t> mask(rows * columns);
  for (uint8_t& m : mask) m = rng() % 1000 < 1000 * density;
  mask.shrink_to_fit();
  const int64_t count = std::accumulate(mask.begin(), mask.end(), int64_t(0));
  std::vector<float> weight(rows * columns), momentum(rows * columns), value(count), moved(count);
  for (int64_t i = 0; i < rows * columns; ++i) weight[i] = float(i), momentum[i] = -float(i);
  std::vector<int64_t> index(count);
  std::vector<int32_t> row_start(rows + 1), column(count + 16), column_start(columns + 1), row(count),
      place(count);
  const Nonzeros nonzeros{rows,         columns,    index.data(), row_start.data(), column.data(),
                          column_start.data(), row.data(), place.data(), value.data(),
                          moved.data()};
  take_nonzeros(mask.data(), count, weight.data(), momentum.data(), nonzeros);
  for (const int64_t wrong : {count - 1, count + 1}) try {
      if (wrong < 0) continue;
      take_nonzeros(mask.data(), wrong, weight.data(), momentum.data(), nonzeros);
      return std::printf("a wrong count was taken\n"), false;
    } catch (const std::invalid_argument&) {
    }
  take_nonzeros(mask.data(), count, weight.data(), momentum.data(), nonzeros);
  int64_t n = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (row_start[r] != n) return std::printf("row %ld starts wrong\n", long(r)), false;
    for (int64_t c = 0; c < columns; ++c)
      if (mask[r * columns + c]) {
        if (index[n] != r * columns + c || column[n] != c) return std::printf("by row\n"), false;
        if (value[n] != weight[index[n]] || moved[n] != momentum[index[n]])
          return std::printf("values\n"), false;
        ++n;
      }
  }
  if (row_start[rows] != n) return std::printf("rows end wrong\n"), false;
  n = 0;
  for (int64_t c = 0; c < columns; ++c) {
    if (column_start[c] != n) return std::printf("column %ld starts wrong\n", long(c)), false;
    for (int64_t r = 0; r < rows; ++r)
      if (mask[r * columns + c]) {
        if (row[n] != r || index[place[n]] != r * columns + c)
          return std::printf("by column\n"), false;
        ++n;
      }
  }
  if (column_start[columns] != n) return std::printf("columns end wrong\n"), false;
  std::vector<float> put(rows * columns, 0.5f), put_momentum = put;
  put_nonzeros(nonzeros, count, put.data(), put_momentum.data());
  for (int64_t i = 0; i < rows * columns; ++i)
    if (put[i] != (mask[i] ? weight[i] : 0.5f) || put_momentum[i] != (mask[i] ? -weight[i] : 0.5f))
      return std::printf("put %ld\n", long(i)), false;
  return true;
}

// Scores that are high just where the sample looks, or no numbers; weights that aren't finite.
static bool hard() {
  constexpr int64_t n = 1 << 16, step = 33;
  std::vector<float> v(n);
  std::vector<uint8_t> mask(n, 0), flipped(n);
  for (int64_t i = 0; i < n; ++i) v[i] = float(n - i) + (i % step == step / 2 ? 1e6f : 0.0f);
  constexpr int64_t k = n / 2;
  flip_largest(Score::value(), v.data(), {mask.data(), false}, n, k, flipped.data());
  if (count_set(flipped.data(), n) != k) return std::printf("misled\n"), false;
  v.assign(n, NAN);
  try {
    flip_largest(Score::value(), v.data(), {mask.data(), false}, n, 1, flipped.data());
    return std::printf("NaN was chosen\n"), false;
  } catch (const std::invalid_argument&) {
  }
  for (const float bad : {NAN, -NAN, INFINITY, -INFINITY}) {
    std::vector<float> weight(n, 1.0f), momentum(n, 1.0f);
    weight[7] = momentum[8] = bad;
    mask.assign(n, 1);
    const Survey seen = survey(weight.data(), momentum.data(), mask.data(), n, nullptr);
    if (std::isfinite(seen.largest_weight) || std::isfinite(seen.largest_momentum))
      return std::printf("not finite, not seen\n"), false;
    mask[7] = 0;  // an inactive weight is cleared, inactive momentum counts
    const Survey inside = survey(weight.data(), momentum.data(), mask.data(), n, nullptr);
    if (inside.largest_weight != 1.0f || std::isfinite(inside.largest_momentum))
      return std::printf("seen outside of the mask\n"), false;
  }
  return true;
}

int main() {
  for (int64_t n : {0, 1, 15, 16, 17, 100, 9000, 40000})
    for (double density : {0.0, 0.05, 0.5, 1.0})
      for (int values : {0, 1, 5})
        for (int64_t k : {0, 1, 4, 8})
          for (const Score& score : {Score::value(), Score::smallness(), Score::magnitude()})
            if (!check(n, density, values, k, score)) return 1;
  for (int64_t rows : {1, 7, 40})
    for (int64_t columns : {1, 16, 33, 100})
      for (double density : {0.0, 0.1, 1.0})
        if (!pattern(rows, columns, density)) return 1;
  if (!hard()) return 1;
  std::puts("ok");
}
