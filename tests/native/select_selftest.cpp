// Checks select.hpp against plain loops on buffers of exact size; built with sanitizers by the tests,
// with AVX-512 and without.  Prints the first disagreement and returns 1.
#include "select.hpp"

#include <cstdio>
#include <numeric>
#include <random>

using namespace sparse;

static std::mt19937 rng(7);

static bool pattern(int64_t rows, int64_t columns, double density) {
  std::vector<uint8_t> mask(rows * columns);
  for (uint8_t& m : mask) m = rng() % 1000 < 1000 * density;
  mask.shrink_to_fit();
  const int64_t count = std::accumulate(mask.begin(), mask.end(), int64_t(0));
  if (count_set(mask.data(), rows * columns) != count) return std::printf("count\n"), false;
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

int main() {
  for (int64_t rows : {1, 7, 40})
    for (int64_t columns : {1, 16, 33, 100})
      for (double density : {0.0, 0.1, 1.0})
        if (!pattern(rows, columns, density)) return 1;
  std::puts("ok");
}
