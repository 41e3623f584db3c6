// Checks select.hpp against plain loops on buffers of exact size; built with sanitizers by the tests,
// with AVX-512 and without.  Prints the first disagreement and returns 1.
#include "select.hpp"

#include <cstdio>
#include <numeric>
#include <random>

using namespace sparse;

static std::mt19937 rng(7);

static bool check(int64_t n, double density, int values, int64_t k_of_8, uint32_t sign) {
  std::normal_distribution<float> normal;
  std::vector<float> v(n);
  std::vector<uint8_t> mask(n), chosen(n, 7);
  for (int64_t i = 0; i < n; ++i) {  // few different values: ties
    v[i] = values ? float(int(rng() % values) - values / 2) : normal(rng);
    mask[i] = rng() % 1000 < 1000 * density;
  }
  for (auto* x : {&mask, &chosen}) x->shrink_to_fit();
  v.shrink_to_fit();
  double sum = 0;
  std::vector<int64_t> order;
  for (int64_t i = 0; i < n; ++i)
    if (mask[i]) sum += std::fabs(v[i]), order.push_back(i);
  const int64_t count = int64_t(order.size()), k = count * k_of_8 / 8;
  if (count_set(mask.data(), n) != count) return std::printf("count of %ld\n", long(n)), false;
  if (std::fabs(sum_of_magnitudes(v.data(), mask.data(), n) - sum) > 1e-9 * (1 + sum))
    return std::printf("sum of %ld\n", long(n)), false;

  const Score score{sign};
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return score.of(v[a]) > score.of(v[b]); });
  std::vector<uint8_t> want(n, 0);
  for (int64_t j = 0; j < k; ++j) want[order[j]] = 1;
  choose_largest(score, v.data(), mask.data(), n, k, chosen.data());
  if (chosen != want) return std::printf("choice of %ld of %ld\n", long(k), long(n)), false;
  try {
    choose_largest(score, v.data(), mask.data(), n, count + 1, chosen.data());
    return std::printf("more than there are were chosen\n"), false;
  } catch (const std::invalid_argument&) {
  }

  std::vector<float> cleared = v;
  cleared.shrink_to_fit();
  clear_outside(cleared.data(), mask.data(), n, 2);
  for (int64_t i = 0; i < n; ++i)
    if (cleared[i] != (mask[i] ? v[i] : 0.0f)) return std::printf("cleared %ld\n", long(i)), false;
  return true;
}

static bool pattern(int64_t rows, int64_t columns, double density) {
  std::vector<uint8_t> mask(rows * columns);
  for (uint8_t& m : mask) m = rng() % 1000 < 1000 * density;
  mask.shrink_to_fit();
  const int64_t count = std::accumulate(mask.begin(), mask.end(), int64_t(0));
  std::vector<int64_t> index(count);
  std::vector<int32_t> row_start(rows + 1), column(count), column_start(columns + 1), row(count),
      place(count);
  list_nonzeros(mask.data(), {rows, columns, index.data(), row_start.data(), column.data(),
                              column_start.data(), row.data(), place.data()});
  int64_t n = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (row_start[r] != n) return std::printf("row %ld starts wrong\n", long(r)), false;
    for (int64_t c = 0; c < columns; ++c)
      if (mask[r * columns + c]) {
        if (index[n] != r * columns + c || column[n] != c) return std::printf("by row\n"), false;
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
  return column_start[columns] == n || (std::printf("columns end wrong\n"), false);
}

// Scores that are high just where the sample looks, or no numbers.
static bool hard() {
  constexpr int64_t n = 1 << 16, step = 33;
  std::vector<float> v(n);
  std::vector<uint8_t> mask(n, 1), chosen(n);
  for (int64_t i = 0; i < n; ++i) v[i] = float(n - i) + (i % step == step / 2 ? 1e6f : 0.0f);
  constexpr int64_t k = n / 2;
  choose_largest({0}, v.data(), mask.data(), n, k, chosen.data());
  if (count_set(chosen.data(), n) != k) return std::printf("misled\n"), false;
  v.assign(n, NAN);
  try {
    choose_largest({0}, v.data(), mask.data(), n, 1, chosen.data());
    return std::printf("NaN was chosen\n"), false;
  } catch (const std::invalid_argument&) {
  }
  return true;
}

int main() {
  for (int64_t n : {0, 1, 15, 16, 17, 100, 9000, 40000})
    for (double density : {0.0, 0.05, 0.5, 1.0})
      for (int values : {0, 1, 5})
        for (int64_t k : {0, 1, 4, 8})
          for (uint32_t sign : {0u, 0x80000000u})
            if (!check(n, density, values, k, sign)) return 1;
  for (int64_t rows : {1, 7, 40})
    for (int64_t columns : {1, 16, 33, 100})
      for (double density : {0.0, 0.1, 1.0})
        if (!pattern(rows, columns, density)) return 1;
  if (!hard()) return 1;
  std::puts("ok");
}
