#include "pool.h"

#include <chrono>

#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <condition_variable>
#include <mutex>
#endif

namespace pm {
namespace {

#if defined(__linux__)
void sleep_on(std::atomic<uint32_t>& word, uint32_t value) {
  static_assert(sizeof(std::atomic<uint32_t>) == 4, "a futex is 32 bits wide");
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake_all(std::atomic<uint32_t>& word) { syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }

std::vector<int> allowed_cpus() {
  cpu_set_t set;
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int i = 0; i < CPU_SETSIZE; ++i)
      if (CPU_ISSET(i, &set)) cpus.push_back(i);
  return cpus;
}
void pin_to(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}
#else
std::mutex mutex;
std::condition_variable changed;
void sleep_on(std::atomic<uint32_t>& word, uint32_t value) {
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait(lock, [&] { return word.load() != value; });
}
void wake_all(std::atomic<uint32_t>&) {
  std::lock_guard<std::mutex> lock(mutex);
  changed.notify_all();
}
std::vector<int> allowed_cpus() { return {}; }
void pin_to(int) {}
#endif

}  // namespace

Pool::Pool(int num_threads, int spin_us, bool pin) : num_threads_(num_threads < 1 ? 1 : num_threads), spin_us_(spin_us) {
  const std::vector<int> cpus = allowed_cpus();
  // The caller is not ours to pin. Workers take the processors from the end, where a caller that was started first is least likely to sit.
  for (int i = 1; i < num_threads_; ++i) {
    const int cpu = pin && num_threads_ <= int(cpus.size()) ? cpus[cpus.size() - i] : -1;
    threads_.emplace_back([this, i, cpu] { work(i, cpu); });
  }
}

Pool::~Pool() {
  stop_.store(true);
  job_.fetch_add(1);
  wake_all(job_);
  for (auto& t : threads_) t.join();
}

void Pool::run(const std::function<void(int)>& body) {
  if (num_threads_ == 1) {
    next_.store(0, std::memory_order_relaxed);
    body(0);
    return;
  }
  body_ = &body;
  next_.store(0, std::memory_order_relaxed);
  job_.fetch_add(1);  // seq_cst, as the load of sleeping_ below: a worker either sees the job or is seen asleep
  if (sleeping_.load() > 0) wake_all(job_);
  body(0);
  barrier();
  body_ = nullptr;
}

void Pool::barrier() {
  if (num_threads_ == 1) {
    next_.store(0, std::memory_order_relaxed);
    return;
  }
  const uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
    arrived_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  // A thread that waits longer than any phase lasts waits for one that the system has put aside: let others have the processor.
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins < 20000)
      cpu_relax();
    else
      std::this_thread::yield();
  }
}

void Pool::wait_for_job(uint32_t seen) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(spin_us_);
  while (true) {
    for (int i = 0; i < 64; ++i) {
      if (job_.load(std::memory_order_acquire) != seen) return;
      cpu_relax();
    }
    if (std::chrono::steady_clock::now() >= until) break;
  }
  sleeping_.fetch_add(1);
  while (job_.load() == seen) sleep_on(job_, seen);
  sleeping_.fetch_sub(1);
}

void Pool::work(int thread, int cpu) {
  if (cpu >= 0) pin_to(cpu);
  for (uint32_t seen = 0;; ++seen) {
    wait_for_job(seen);
    if (stop_.load()) return;
    (*body_)(thread);
    barrier();
  }
}

}  // namespace pm
