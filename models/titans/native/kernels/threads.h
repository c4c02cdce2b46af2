// A team of threads. Its workers sleep between calls; inside one they meet at barriers, where they spin, since a phase
// takes microseconds, and after a while yield, since a core may be shared. A team runs one call at a time.

#pragma once

#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int SPINS = 4'000;

class Barrier {
  public:
    explicit Barrier(int count) : count_(count) {}

    void wait() {
        if (count_ == 1) return;
        const unsigned phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
            if (spins < SPINS) _mm_pause();
            else sched_yield();
        }
    }

  private:
    const int count_;
    std::atomic<int> arrived_{0};
    std::atomic<unsigned> phase_{0};
};

struct Share {  // of a range that a team splits
    int64_t begin, end;
};

class Team {
  public:
    explicit Team(int size) : size(size), barrier(size) {
        for (int i = 1; i < size; ++i) workers_.emplace_back([this, i] { work(i); });
    }

    ~Team() {
        call_ = nullptr;
        wake();
        for (auto &worker : workers_) worker.join();
    }

    template <class F> void run(F &&call) {
        const std::lock_guard<std::mutex> one(mutex_);
        call_ = [](void *context, int index) { (*static_cast<F *>(context))(index); };
        context_ = &call;
        wake();
        call(0);
        barrier.wait();  // nobody is inside any more
    }

    Share share(int64_t count, int index) const { return {count * index / size, count * (index + 1) / size}; }

    const int size;
    Barrier barrier;

  private:
    void wake() {
        if (size == 1) return;
        turn_.fetch_add(1, std::memory_order_release);
        turn_.notify_all();
    }

    void work(int index) {
        for (unsigned seen = 0;; ) {
            turn_.wait(seen, std::memory_order_acquire);
            ++seen;
            if (call_ == nullptr) return;
            call_(context_, index);
            barrier.wait();
        }
    }

    std::mutex mutex_;
    std::atomic<unsigned> turn_{0};
    void (*call_)(void *, int) = nullptr;
    void *context_ = nullptr;
    std::vector<std::thread> workers_;
};

}  // namespace
