#include "workspace.hpp"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <new>

namespace kernels {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kHugePage = 2u << 20;

std::size_t align(std::size_t size, std::size_t to) { return (size + to - 1) / to * to; }

// The machine's memory; where a process may have only so many addresses, an eighth of those.
std::size_t most_bytes() {
  const rlim_t memory = rlim_t(sysconf(_SC_PHYS_PAGES)) * rlim_t(sysconf(_SC_PAGESIZE));
  rlimit limit{};
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return memory;
  return std::min(memory, limit.rlim_cur / 8);
}

}  // namespace

Workspace::~Workspace() {
  if (memory_ != nullptr) munmap(memory_, reserved_);
}

void* Workspace::take_bytes(std::size_t num_bytes) {
  num_bytes = align(num_bytes, kLine);
  if (used_ + num_bytes > open_) open(used_ + num_bytes);
  void* result = memory_ + used_;
  used_ += num_bytes;
  return result;
}

void Workspace::reserve() {
  const std::size_t size = align(most_bytes(), kHugePage);
  // Without rights it counts towards no limit of the system's.
  void* memory = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  madvise(memory, size, MADV_HUGEPAGE);  // a wish: without it the pages are small
  memory_ = static_cast<char*>(memory);
  reserved_ = size;
}

void Workspace::open(std::size_t num_bytes) {
  if (memory_ == nullptr) reserve();
  num_bytes = align(num_bytes, kHugePage);
  if (num_bytes > reserved_ ||
      mprotect(memory_ + open_, num_bytes - open_, PROT_READ | PROT_WRITE) != 0) {
    throw std::bad_alloc();
  }
  open_ = num_bytes;
}

void Workspace::release() {
  reset();
  if (memory_ != nullptr) madvise(memory_, open_, MADV_DONTNEED);
}

}  // namespace kernels
