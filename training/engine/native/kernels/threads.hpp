// A pool of threads for loops whose iterations are independent.
//
// The caller works too, and takes whatever iterations no other thread has begun: beside a busy
// process, where a worker may lie preempted for milliseconds, nobody waits for one that has not
// started anything. Which thread runs an iteration never changes its result.
#pragma once

#include <cstdint>

namespace kernels {

// Threads of the pool, the caller included; by default as many as the process may use.
int num_threads();

// Takes effect at once; must not run beside a loop.
void set_num_threads(int count);

namespace detail {
using Body = void (*)(const void* context, int item, int thread);
void run(int num_items, Body body, const void* context);
}  // namespace detail

// body(item, thread) for item in [0, num_items), thread in [0, num_threads()). One loop at a time,
// not nested. Tile registers are configured (tiles.hpp) in every thread before its first item.
template <typename F>
void parallel_for(int num_items, const F& body) {
  detail::run(
      num_items,
      [](const void* context, int item, int thread) {
        (*static_cast<const F*>(context))(item, thread);
      },
      &body);
}

}  // namespace kernels
