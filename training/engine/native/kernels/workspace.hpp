// Memory of a pass: taken piece by piece, given back all at once, kept for the next pass.
//
// Fresh pages cost more than the arithmetic on them (measured: 30 to 50 % of a training step with
// malloc's default), so the memory stays ours until ``trim``.
#pragma once

#include <cstddef>
#include <vector>

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

  struct Mark {
    std::size_t chunk, used;
  };
  Mark mark() const { return {current_, used_}; }
  void reset(Mark mark) {
    current_ = mark.chunk;
    used_ = mark.used;
  }
  void reset() { reset({0, 0}); }

  // Gives memory beyond ``num_bytes`` back to the system. Nothing may be taken at the time.
  void trim(std::size_t num_bytes);

  std::size_t num_bytes() const;

 private:
  struct Chunk {
    char* memory;
    std::size_t size;
  };
  void* take_bytes(std::size_t num_bytes);

  std::vector<Chunk> chunks_;
  std::size_t current_ = 0;
  std::size_t used_ = 0;  // of the current chunk
};

}  // namespace kernels
