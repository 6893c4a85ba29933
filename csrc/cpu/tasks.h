// Threads share tasks: each takes the next one when it is free, so that a thread that shares its core with another
// program does fewer of them. Which thread does a task never changes a result.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace rada_fast {

// Below this number of multiply-adds, some tens of microseconds, a single thread works: it would gain little by others,
// and where another program shares the cores it may wait for them much longer than that.
constexpr int64_t kWorkOfOneThread = 1 << 21;

class TaskQueue {
 public:
  explicit TaskQueue(int64_t count) : count_(count) {}
  // Writes the number of the next task, and returns false if there is none.
  bool take(int64_t& task) {
    task = next_.fetch_add(1, std::memory_order_relaxed);
    return task < count_;
  }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t count_;
};

// Groups of pieces of work. A task is a whole group, which saves what its pieces would do twice; but the last groups, one
// for each thread, are handed out piece by piece, so that no thread waits long for the last task of another.
struct GroupedTasks {
  int64_t pieces;  // of one group
  int64_t whole;   // the number of groups that are handed out whole
  int64_t count;   // the number of tasks

  GroupedTasks(int64_t groups, int64_t pieces_of_group, int threads)
      : pieces(pieces_of_group), whole(std::max<int64_t>(groups - threads, 0)),
        count(whole + (groups - whole) * pieces) {}

  // The pieces of a task, from first to before last, numbered through all groups.
  int64_t first(int64_t task) const { return task < whole ? task * pieces : whole * pieces + task - whole; }
  int64_t last(int64_t task) const { return task < whole ? (task + 1) * pieces : first(task) + 1; }
};

// Calls worker(queue) on as many threads as `count` tasks of `work` multiply-adds in all are worth.
template <typename Worker>
void share_tasks(int threads, int64_t count, int64_t work, const Worker& worker) {
  TaskQueue queue(count);
  const int64_t workers = work < kWorkOfOneThread ? 1 : std::min<int64_t>(threads, count);
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) { worker(queue); });
}

}  // namespace rada_fast
