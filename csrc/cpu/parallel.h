// Parallel loops on XLA's intra-op pool.
//
// A handler may itself run on a worker of that pool. If it only scheduled work and waited,
// two handlers could fill the pool and wait for each other, so the caller takes part: it
// drains the same counter as the tasks and then waits only for blocks already begun.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace flashllm {

// XLA runs with subnormals flushed to zero; weights and activations keep theirs here.
class KeepSubnormals {
#if defined(__x86_64__)
 public:
  KeepSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
  ~KeepSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
 public:
  KeepSubnormals() {}
#endif
};

// Calls f(i) once for each i in [0, n), on up to `workers` threads, the caller's among them.
template <typename F>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t workers, int64_t n, const F& f) {
  workers = std::min(std::min(workers, n), pool.num_threads());
  if (workers <= 1) {
    KeepSubnormals keep;
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  // A task that starts after the loop has ended finds the counter spent and touches only
  // this state, which it shares.
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    int64_t n;
    const F* f;
  };
  auto state = std::make_shared<State>();
  state->n = n;
  state->f = &f;
  const int64_t chunk = std::max<int64_t>(1, n / (workers * 16));
  auto drain = [chunk](State& s) {
    KeepSubnormals keep;
    for (int64_t begin; (begin = s.next.fetch_add(chunk)) < s.n;) {
      const int64_t end = std::min(s.n, begin + chunk);
      for (int64_t i = begin; i < end; ++i) (*s.f)(i);
      s.done.fetch_add(end - begin, std::memory_order_release);
    }
  };
  for (int64_t w = 1; w < workers; ++w) pool.Schedule([state, drain] { drain(*state); });
  drain(*state);
  while (state->done.load(std::memory_order_acquire) < n) std::this_thread::yield();
}

}  // namespace flashllm
