#include "threads.hpp"

#include <sched.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "tiles.hpp"

namespace kernels {
namespace {

constexpr int kMaxItems = 1 << 20;
// About 50 us: longer than any gap inside a pass, shorter than what a person or a neighbour feels.
constexpr int kSpins = 1000;

// Number of the loop, its items, and the next one to take, in one word: a late worker can never
// take an item of one loop with the body of another.
struct Ticket {
  std::uint32_t loop, num_items, next;

  static Ticket unpack(std::uint64_t word) {
    return {std::uint32_t(word >> 42), std::uint32_t(word >> 21) & 0x1fffff,
            std::uint32_t(word) & 0x1fffff};
  }
  std::uint64_t pack() const {
    return std::uint64_t(loop) << 42 | std::uint64_t(num_items) << 21 | next;
  }
};

class Pool {
 public:
  explicit Pool(int count) : count_(count) {
    for (int thread = 1; thread < count; ++thread) {
      workers_.emplace_back([this, thread] { work(thread); });
    }
  }

  ~Pool() {
    stopping_ = true;
    post({loop_ + 1, 0, 0});
    for (std::thread& worker : workers_) worker.join();
  }

  int count() const { return count_; }

  void run(int num_items, detail::Body body, const void* context) {
    body_ = body;
    context_ = context;
    num_done_.store(0, std::memory_order_relaxed);
    post({loop_ + 1, std::uint32_t(num_items), 0});
    tiles::configure();
    take_items(0);
    for (int spins = 0; num_done_.load(std::memory_order_acquire) != num_items; ++spins) {
      if (spins < kSpins) {
        _mm_pause();
      } else {
        sched_yield();
      }
    }
  }

 private:
  void post(Ticket ticket) {
    loop_ = ticket.loop & 0x3fffff;
    ticket.loop = loop_;
    ticket_.store(ticket.pack(), std::memory_order_seq_cst);
    if (num_sleeping_.load(std::memory_order_seq_cst) > 0) ticket_.notify_all();
  }

  // Runs items until none is left; returns the number of the loop that ended.
  std::uint32_t take_items(int thread) {
    for (;;) {
      const Ticket ticket = Ticket::unpack(ticket_.fetch_add(1, std::memory_order_acq_rel));
      if (ticket.next >= ticket.num_items) return ticket.loop;
      // The loop cannot end before this item is done: body and context are its own.
      body_(context_, int(ticket.next), thread);
      num_done_.fetch_add(1, std::memory_order_acq_rel);
    }
  }

  void work(int thread) {
    std::uint32_t seen = 0;
    while (!stopping_) {
      wait_for_other_than(seen);
      if (stopping_) return;
      tiles::configure();
      seen = take_items(thread);
    }
  }

  void wait_for_other_than(std::uint32_t seen) {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (Ticket::unpack(ticket_.load(std::memory_order_acquire)).loop != seen) return;
      _mm_pause();
    }
    tiles::release();  // a sleeping thread need not have its tiles saved
    num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
    for (;;) {
      const std::uint64_t word = ticket_.load(std::memory_order_seq_cst);
      if (Ticket::unpack(word).loop != seen) break;
      ticket_.wait(word, std::memory_order_seq_cst);
    }
    num_sleeping_.fetch_sub(1, std::memory_order_seq_cst);
  }

  const int count_;
  std::vector<std::thread> workers_;
  std::atomic<std::uint64_t> ticket_{0};
  std::atomic<int> num_done_{0};
  std::atomic<int> num_sleeping_{0};
  std::atomic<bool> stopping_{false};
  std::uint32_t loop_ = 0;
  detail::Body body_ = nullptr;
  const void* context_ = nullptr;
};

int available_processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return CPU_COUNT(&set);
}

std::unique_ptr<Pool>& pool() {
  static std::unique_ptr<Pool> instance = std::make_unique<Pool>(available_processors());
  return instance;
}

}  // namespace

int num_threads() { return pool()->count(); }

void set_num_threads(int count) {
  pool().reset();
  pool() = std::make_unique<Pool>(count);
}

void detail::run(int num_items, Body body, const void* context) {
  for (int done = 0; done < num_items; done += kMaxItems) {
    const int count = num_items - done < kMaxItems ? num_items - done : kMaxItems;
    if (done == 0) {
      pool()->run(count, body, context);
      continue;
    }
    struct Rest {
      Body body;
      const void* context;
      int offset;
    } rest{body, context, done};
    pool()->run(
        count,
        [](const void* rest_context, int item, int thread) {
          const Rest& it = *static_cast<const Rest*>(rest_context);
          it.body(it.context, item + it.offset, thread);
        },
        &rest);
  }
}

}  // namespace kernels

extern "C" {

int tc_num_threads() { return kernels::num_threads(); }

void tc_set_num_threads(int count) { kernels::set_num_threads(count); }
}
