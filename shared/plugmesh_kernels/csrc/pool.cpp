#include "pool.h"

#include <algorithm>
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

constexpr uint32_t SIDE_JOB = 1;  // the bit of the word that tells it from a run
constexpr int WAITS = 4;          // a process that was suspended must see its thread run before a job is called hung
constexpr auto BUSY_WAIT = std::chrono::microseconds(500);  // for a side job, before the caller sleeps: most are done by then
constexpr auto NAP = std::chrono::milliseconds(1);          // between two looks at a side job's parts, whose ends wake nobody
constexpr int ALL_PARTS = INT32_MAX;

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
    if (i == 1) first_cpu_ = cpu;
    threads_.emplace_back([this, i, cpu] { work(i, cpu, 0); });
  }
}

Pool::~Pool() {
  settle();
  stop_.store(true);
  job_.fetch_add(2);
  wake_all(job_);
  for (auto& t : threads_) t.join();
}

void Pool::run(const std::function<void(int)>& body) {
  if (num_threads_ == 1) {
    next_.store(0, std::memory_order_relaxed);
    body(0);
    return;
  }
  settle();
  body_ = &body;
  next_.store(0, std::memory_order_relaxed);
  post(0);
  body(0);
  barrier();
  body_ = nullptr;
}

void Pool::post(uint32_t kind) {
  job_.store(((job_.load(std::memory_order_relaxed) + 2) & ~SIDE_JOB) | kind);  // seq_cst, as the load of sleeping_: a worker either sees it or is seen asleep
  if (sleeping_.load() > 0) wake_all(job_);
}

void Pool::lend(const std::shared_ptr<SideJob>& job, double timeout_s) {
  settle();
  side_job_ = job;
  side_timeout_s_ = timeout_s;
  post(SIDE_JOB);
}

bool Pool::await(SideJob& job, int part) {
  if (job.is_past(part)) return true;
  if (job.is_abandoned()) return false;
  const bool is_past = job.wait(part, side_timeout_s_);
  if (!job.is_abandoned()) return is_past;
  side_job_ = nullptr;
  threads_[0].detach();
  const int cpu = first_cpu_;
  const uint32_t seen = job_.load();
  threads_[0] = std::thread([this, cpu, seen] { work(1, cpu, seen); });
  return is_past;
}

void Pool::settle() {
  if (!side_job_) return;
  await(*side_job_, ALL_PARTS);
  side_job_ = nullptr;
}

bool SideJob::finish() {
  int running = RUNNING;
  if (!state_.compare_exchange_strong(running, DONE)) return false;
  const std::lock_guard<std::mutex> lock(mutex_);  // so that nobody begins to sleep meanwhile
  finished_.notify_all();
  return true;
}

bool SideJob::wait(int part, double timeout_s) {
  using Clock = std::chrono::steady_clock;
  const auto is_past_it = [&] { return is_past(part); };
  for (int i = 0; i < 1024; ++i) {
    if (is_past_it()) return true;
    cpu_relax();
  }
  const auto busy_until = Clock::now() + BUSY_WAIT;
  do {
    for (int i = 0; i < 64; ++i) {
      if (is_past_it()) return true;
      cpu_relax();
    }
    std::this_thread::yield();  // the worker may want this very processor
  } while (Clock::now() < busy_until);
  const auto slice = std::chrono::duration<double>(timeout_s / WAITS);
  std::unique_lock<std::mutex> lock(mutex_);
  for (int at = progress(), num_waits = 0; num_waits < WAITS;) {
    for (const auto began = Clock::now(); Clock::now() - began < slice;)
      if (finished_.wait_for(lock, std::min<std::chrono::duration<double>>(slice, NAP), is_past_it)) return true;
    num_waits = at >= 0 && progress() == at ? num_waits + 1 : 0;  // a worker that has not begun is not hung, and would look for its job when there is none
    at = progress();
  }
  int running = RUNNING;
  if (!state_.compare_exchange_strong(running, ABANDONED)) return true;
  given_up_at_ = progress();
  return is_past(part);
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

uint32_t Pool::wait_for_job(uint32_t seen) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(spin_us_);
  while (true) {
    for (int i = 0; i < 64; ++i) {
      if (const uint32_t now = job_.load(std::memory_order_acquire); now != seen) return now;
      cpu_relax();
    }
    if (std::chrono::steady_clock::now() >= until) break;
  }
  sleeping_.fetch_add(1);
  while (job_.load() == seen) sleep_on(job_, seen);
  sleeping_.fetch_sub(1);
  return job_.load();
}

void Pool::work(int thread, int cpu, uint32_t seen) {
  if (cpu >= 0) pin_to(cpu);
  for (;;) {
    seen = wait_for_job(seen);
    if (stop_.load()) return;
    if (!(seen & SIDE_JOB)) {
      (*body_)(thread);
      barrier();
    } else if (thread == 1) {
      const std::shared_ptr<SideJob> job = side_job_;
      job->run();
      if (!job->finish()) return;  // a new thread has this one's place, and there may be no pool any more
    }
  }
}

}  // namespace pm
