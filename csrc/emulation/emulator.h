// Kernels on the host: every CUDA thread is a fibre, blocks run one after another.
//
// Threads take turns only where they meet (a barrier, a shuffle). Until then one runs alone, and
// the next is taken in an order that can be chosen: a kernel that lacks a barrier gives other
// results in another order. A kernel with a barrier that some threads do not reach is an error that
// says so.
//
// Nothing here is for several host threads at once.

#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <new>
#include <string>
#include <type_traits>
#include <vector>

namespace vne::emulation {

struct Settings {
  // Warps one after another, each as far as it gets; lanes likewise; blocks likewise. "backward" is
  // the other way round; "shuffled" draws another order every time.
  std::string order = "forward";
  int multiprocessors = 80;
  std::vector<std::string> launches;  // of kernels and of a vendor's library
};
Settings& settings();

void launch(const char* name, int64_t blocks, int block_size, const std::function<void()>& thread);

// Memory of the running block, the same for all its threads that come from one place. It is on the
// heap, so that AddressSanitizer sees its ends, and begins as NaN in every block.
void* shared_memory(const void* site, size_t size);

template <typename T>
T* shared(const void* site) {
  static_assert(std::is_trivially_default_constructible_v<T> &&
                std::is_trivially_destructible_v<T>);
  return std::launder(reinterpret_cast<T*>(shared_memory(site, sizeof(T))));
}

}  // namespace vne::emulation
