// Kernels on the host: every CUDA thread is a fibre, blocks run one after another.
//
// Threads take turns only where they meet (a barrier, a shuffle). Until then one runs alone, and
// the next is taken in an order that can be chosen: a kernel that lacks a barrier gives other
// results in another order. A kernel with a barrier that some threads do not reach is an error that
// says so.
//
// Nothing here is for several host threads at once: Python's lock is held while a kernel runs.

#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <new>
#include <string>
#include <tuple>
#include <vector>

namespace vne::emulation {

// Warps one after another, each as far as it gets; lanes likewise; blocks likewise. kShuffled draws
// another order every time.
enum class Order { kForward, kBackward, kShuffled };

struct Launch {
  std::string name;
  dim3 grid, block;  // zero for what a vendor's library would launch
  cudaStream_t stream;
};

struct Settings {
  Order order = Order::kForward;
  int multiprocessors = 80;
  std::vector<Launch> launches;
};
Settings& settings();

void launch(const char* name, dim3 grid, dim3 block, cudaStream_t stream,
            const std::function<void()>& thread);

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
