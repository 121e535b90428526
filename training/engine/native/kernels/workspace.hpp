// Memory of a pass: taken piece by piece, given back all at once, kept for the next pass.
//
// Fresh pages cost more than the arithmetic on them (measured: 30 to 50 % of a training step with
// malloc's default), so the memory stays ours until ``release``. It is one range of addresses, as
// long as the machine's memory, of which only what was ever taken has pages: passes of any sizes
// follow each other without holes.
#pragma once

#include <cstddef>

namespace kernels {

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace();

  // Aligned to a cache line, of any content. Valid until ``reset`` to a mark before it.
  // Throws std::bad_alloc.
  template <typename T>
  T* take(std::size_t count) {
    return static_cast<T*>(take_bytes(count * sizeof(T)));
  }

  using Mark = std::size_t;
  Mark mark() const { return used_; }
  void reset(Mark mark = 0) { used_ = mark; }

  // Gives all pages back to the system. Nothing may be taken at the time.
  void release();

 private:
  void* take_bytes(std::size_t num_bytes);
  void reserve();
  void open(std::size_t num_bytes);

  char* memory_ = nullptr;
  std::size_t reserved_ = 0;  // bytes of addresses
  std::size_t open_ = 0;      // of them, those that may be read and written
  std::size_t used_ = 0;
};

}  // namespace kernels
