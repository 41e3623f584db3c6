// The part of GCC's OpenMP runtime that the kernels call, on std::thread.  The thread sanitizer
// needs it: it does not see how the threads of the real runtime wait for each other, and would
// report races that are none.  A parallel region has at most one dynamic loop.
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Team {
  explicit Team(int size) : size(size) {}
  const int size;
  std::mutex mutex;
  std::condition_variable released;
  int waiting = 0;
  long barriers = 0;
  std::once_flag begun;
  std::atomic<long> next{0};
  long end = 0, chunk = 1;
};

thread_local Team* team = nullptr;
thread_local int number = 0;

}  // namespace

extern "C" {

int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return team ? team->size : 1; }

void GOMP_barrier() {
  std::unique_lock<std::mutex> lock(team->mutex);
  const long mine = team->barriers;
  if (++team->waiting == team->size) {
    team->waiting = 0;
    ++team->barriers;
    team->released.notify_all();
  } else {
    team->released.wait(lock, [&] { return team->barriers != mine; });
  }
}

void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  Team mine(threads ? int(threads) : 2);
  Team* const outer = team;
  const int outer_number = number;
  std::vector<std::thread> others;
  for (int k = 1; k < mine.size; ++k)
    others.emplace_back([&mine, work, data, k] {
      team = &mine;
      number = k;
      work(data);
    });
  team = &mine;
  number = 0;
  work(data);
  for (std::thread& other : others) other.join();
  team = outer;
  number = outer_number;
}

// Relaxed: who takes which part of a loop orders nothing else.
bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) {
  *first = team->next.fetch_add(team->chunk, std::memory_order_relaxed);
  *last = *first + team->chunk < team->end ? *first + team->chunk : team->end;
  return *first < team->end;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long, long chunk, long* first,
                                          long* last) {
  std::call_once(team->begun, [&] {
    team->next.store(start, std::memory_order_relaxed);
    team->end = end;
    team->chunk = chunk;
  });
  return GOMP_loop_nonmonotonic_dynamic_next(first, last);
}

void GOMP_loop_end_nowait() {}

}  // extern "C"
