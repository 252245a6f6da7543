// Threads that run one step together: a caller and its workers, spinning briefly between phases, asleep between steps.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
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

  // Within body: waits for all threads. What they wrote before is visible after. Resets the claims.
  void barrier();

  // Within body, between two barriers: the next of the units 0, 1, 2, ... that nobody has taken.
  int claim() { return next_.fetch_add(1, std::memory_order_relaxed); }

 private:
  void work(int thread, int cpu);
  void wait_for_job(uint32_t seen);

  const int num_threads_;
  const int spin_us_;
  const std::function<void(int)>* body_ = nullptr;
  std::vector<std::thread> threads_;
  alignas(64) std::atomic<uint32_t> job_{0};  // grows with every run; the futex word
  alignas(64) std::atomic<int> sleeping_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int> next_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace pm
