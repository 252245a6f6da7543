// Threads that run one step together: a caller and its workers, spinning briefly between phases, asleep between steps.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace pm {

inline void cpu_relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Foreign work in parts that one worker does while the caller goes on, and that is given up on when a part takes too long.
class SideJob {
 public:
  virtual ~SideJob() = default;
  virtual void run() = 0;                // the parts in order; looks at is_abandoned() between them
  virtual int progress() const = 0;      // the part being done, -1 before the first: those before it are visible to whoever has read this
  bool is_abandoned() const { return state_.load() == ABANDONED; }
  // Asked by the pool's owner. What is done after the job was given up on does not count.
  bool is_past(int part) const {
    if (given_up_at_ >= 0) return given_up_at_ > part;
    return progress() > part || state_.load(std::memory_order_acquire) == DONE;
  }
  int given_up_at() const { return given_up_at_; }  // the part, -1 when it was not

 private:
  friend class Pool;
  enum State { RUNNING, DONE, ABANDONED };
  bool finish();                            // false when it was given up on meanwhile
  bool wait(int part, double timeout_s);    // until it is past the part; false when progress() did not change for so long: it is given up on then
  std::atomic<int> state_{RUNNING};
  int given_up_at_ = -1;
  std::mutex mutex_;
  std::condition_variable finished_;
};

// One thread owns the pool and calls run(); `num_threads` counts it. Workers spin for `spin_us` after a step, then sleep on a futex, so that an idle
// pool costs nothing. A pool that finds itself in a forked child has no workers there and must not be used.
class Pool {
 public:
  Pool(int num_threads, int spin_us, bool pin);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int num_threads() const { return num_threads_; }

  // Calls body(thread) on every thread, 0 being the caller, and returns when all are done.
  void run(const std::function<void(int)>& body);

  // Has a worker do the job; there must be one. Whatever the pool is used for next waits for all of it. `timeout_s` is for one of its parts.
  void lend(const std::shared_ptr<SideJob>& job, double timeout_s);

  // Waits until a job that was lent is past the part. False when it was given up on before: the worker's thread has been replaced then, and ends should
  // the job ever come back, so whatever the job looks at must stay where it is.
  bool await(SideJob& job, int part);

  // Waits for the job that was lent last, all of it.
  void settle();

  // Within body: waits for all threads. What they wrote before is visible after. Resets the claims.
  void barrier();

  // Within body, between two barriers: the next of the units 0, 1, 2, ... that nobody has taken.
  int claim() { return next_.fetch_add(1, std::memory_order_relaxed); }

 private:
  void work(int thread, int cpu, uint32_t seen);
  uint32_t wait_for_job(uint32_t seen);
  void post(uint32_t kind);

  const int num_threads_;
  const int spin_us_;
  const std::function<void(int)>* body_ = nullptr;
  std::shared_ptr<SideJob> side_job_;  // the last one, done perhaps
  double side_timeout_s_ = 0.0;
  int first_cpu_ = -1;  // of the first worker, -1 when it is not pinned
  std::vector<std::thread> threads_;
  alignas(64) std::atomic<uint32_t> job_{0};  // grows by two with every run, odd for a side job; the futex word
  alignas(64) std::atomic<int> sleeping_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int> next_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace pm
