#include "workspace.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace kernels {
namespace {

constexpr std::size_t kMinChunk = 8u << 20;
constexpr std::size_t kLine = 64;
constexpr std::size_t kHugePage = 2u << 20;

std::size_t align(std::size_t size, std::size_t to) { return (size + to - 1) / to * to; }

}  // namespace

Workspace::~Workspace() {
  for (const Chunk& chunk : chunks_) munmap(chunk.memory, chunk.size);
}

void* Workspace::take_bytes(std::size_t num_bytes) {
  num_bytes = align(num_bytes, kLine);
  while (current_ < chunks_.size() && used_ + num_bytes > chunks_[current_].size) {
    ++current_;
    used_ = 0;
  }
  if (current_ == chunks_.size()) {
    const std::size_t size = align(std::max(num_bytes, kMinChunk), kHugePage);
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    madvise(memory, size, MADV_HUGEPAGE);  // a wish: without it the pages are small
    chunks_.push_back({static_cast<char*>(memory), size});
    used_ = 0;
  }
  void* result = chunks_[current_].memory + used_;
  used_ += num_bytes;
  return result;
}

void Workspace::trim(std::size_t num_bytes) {
  reset();
  while (!chunks_.empty() && this->num_bytes() > num_bytes) {
    munmap(chunks_.back().memory, chunks_.back().size);
    chunks_.pop_back();
  }
}

std::size_t Workspace::num_bytes() const {
  std::size_t total = 0;
  for (const Chunk& chunk : chunks_) total += chunk.size;
  return total;
}

}  // namespace kernels
