#include "emulation/emulator.h"

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <span>

#include "emulation/fibre.h"
#include "emulation/tensor.h"

uint3 threadIdx, blockIdx;
dim3 blockDim;

namespace vne::emulation {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxShared = 48 << 10;

enum class State { kReady, kAtBlock, kAtWarp, kReturned };

struct Thread {
  uint3 index{};
  State state = State::kReturned;
  Site site{};                         // where it waits
  uint64_t brought = 0, received = 0;  // in the exchange with its warp
  int source = 0;                      // the lane to receive from
  std::unique_ptr<Fibre> fibre;
};

struct SharedMemory {
  size_t size;
  std::shared_ptr<void> data;
};

struct Running {
  const char* name = nullptr;
  std::map<const void*, SharedMemory> shared;
  bool any = false;  // of the predicates of this __syncthreads_or
  bool result = false;
};

// Fibres outlive a block and a launch: making one costs more than a small kernel.
std::function<void()> thread_function;
std::vector<Thread> threads;
Running running;
Thread* thread = nullptr;

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error(concatenate("kernel ", running.name, ", block (", blockIdx.x, ", ",
                                       blockIdx.y, ", ", blockIdx.z, "): ", what));
}

// 0 .. size - 1 as `order` has them.
class Sequence {
 public:
  explicit Sequence(size_t size) : order_(settings().order), indices_(size) {
    std::iota(indices_.begin(), indices_.end(), 0);
    if (order_ == Order::kBackward) std::reverse(indices_.begin(), indices_.end());
  }
  const std::vector<unsigned>& next(std::minstd_rand& random) {
    if (order_ == Order::kShuffled) std::shuffle(indices_.begin(), indices_.end(), random);
    return indices_;
  }

 private:
  Order order_;
  std::vector<unsigned> indices_;
};

void resume(Thread& chosen) {
  thread = &chosen;
  threadIdx = chosen.index;
  if (chosen.fibre->resume()) chosen.state = State::kReturned;
}

void wait(State state, Site site) {
  Thread& self = *thread;
  self.state = state;
  self.site = site;
  self.fibre->pause();
}

bool all_are(std::span<const Thread> some, State state) {
  return std::all_of(some.begin(), some.end(), [&](const Thread& t) {
    return t.state == state && (state == State::kReturned || t.site == some[0].site);
  });
}

void make_ready(std::span<Thread> some) {
  for (Thread& t : some) t.state = State::kReady;
}

// Runs the threads of a warp until none can go on without another warp.
void run_warp(std::span<Thread> warp, Sequence& lanes, std::minstd_rand& random) {
  for (;;) {
    for (const unsigned lane : lanes.next(random)) {
      if (warp[lane].state == State::kReady) resume(warp[lane]);
    }
    if (!all_are(warp, State::kAtWarp)) return;
    for (Thread& t : warp) t.received = warp[t.source].brought;
    make_ready(warp);
  }
}

// "3 threads wait at __syncthreads (poles.cu:7), 29 threads have returned"
std::string describe(std::span<const Thread> block) {
  std::map<std::string, int> counts;
  for (const Thread& t : block) {
    ++counts[t.state == State::kReturned ? "have returned"
                                         : concatenate("wait at ", t.site.function, " (",
                                                       t.site.file, ":", t.site.line, ")")];
  }
  std::string text;
  for (const auto& [state, count] : counts)
    text += concatenate(text.empty() ? "" : ", ", count, " threads ", state);
  return text;
}

void run_block(std::span<Thread> block, std::minstd_rand& random) {
  Sequence order(block.size() / kLanes), lanes(kLanes);
  for (;;) {
    make_ready(block);
    for (const unsigned warp : order.next(random))
      run_warp(block.subspan(warp * kLanes, kLanes), lanes, random);
    if (all_are(block, State::kReturned)) return;
    if (!all_are(block, State::kAtBlock))
      fail("a barrier that not all threads reach: " + describe(block));
    running.result = running.any;
    running.any = false;
  }
}

// The first of the threads, with the indices of a block's.
std::span<Thread> make_threads(dim3 block) {
  const size_t count = block.x * block.y * block.z;
  while (threads.size() < count)
    threads.emplace_back().fibre = std::make_unique<Fibre>(thread_function);
  for (unsigned i = 0; i < count; ++i)
    threads[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  return std::span(threads).first(count);
}

}  // namespace

Settings& settings() {
  static Settings the_settings;
  return the_settings;
}

void launch(const char* name, dim3 grid, dim3 block, cudaStream_t stream,
            const std::function<void()>& function) {
  running.name = name;
  blockIdx = {0, 0, 0};
  // Divided in this order, nothing overflows.
  if (block.x == 0 || block.y == 0 || block.z == 0 || block.x > kMaxThreads ||
      block.y > kMaxThreads / block.x || block.z > kMaxThreads / (block.x * block.y)) {
    fail("a block has 1 to 1024 threads");
  }
  if (block.x * block.y * block.z % kLanes != 0) fail("a block is made of whole warps");
  if (grid.x > 0x7fffffffu || grid.y > 0xffffu || grid.z > 0xffffu) fail("the grid is too large");
  settings().launches.push_back({name, grid, block, stream});

  blockDim = block;
  thread_function = function;
  const std::span<Thread> of_block = make_threads(block);
  std::minstd_rand random(1);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  Sequence order(blocks);
  try {
    for (const uint64_t index : order.next(random)) {
      blockIdx = {static_cast<unsigned>(index % grid.x),
                  static_cast<unsigned>(index / grid.x % grid.y),
                  static_cast<unsigned>(index / grid.x / grid.y)};
      run_block(of_block, random);
      running.shared.clear();
    }
  } catch (...) {
    threads.clear();  // fibres stuck half-way cannot be used again
    running = {};
    throw;
  }
}

void* shared_memory(const void* site, size_t size) {
  auto found = running.shared.find(site);
  if (found == running.shared.end()) {
    size_t total = size;
    for (const auto& [_, memory] : running.shared) total += memory.size;
    if (total > kMaxShared) fail("more than 48 KB of shared memory");
    found = running.shared.emplace(site, SharedMemory{size, allocate(size, 0)}).first;
  }
  return found->second.data.get();
}

void meet_block(Site site) { wait(State::kAtBlock, site); }

bool meet_block_or(Site site, bool predicate) {
  running.any = running.any || predicate;
  wait(State::kAtBlock, site);
  return running.result;
}

int lane() { return static_cast<int>((thread - threads.data()) % kLanes); }

uint64_t exchange(Site site, unsigned mask, uint64_t bits, int source) {
  if (mask != kAllLanes) fail(concatenate(site.function, " without all lanes in its mask"));
  thread->brought = bits;
  thread->source = source;
  wait(State::kAtWarp, site);
  return thread->received;
}

}  // namespace vne::emulation
