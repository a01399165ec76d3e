#include "emulation/emulator.h"

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <sstream>
#include <stdexcept>

#include "emulation/fibre.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

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
  Site site{};        // where it waits
  unsigned turn = 0;  // exchanges so far, modulo 2
  std::unique_ptr<Fibre> fibre;
};

struct Warp {
  std::array<Thread, kLanes> lanes;
  // Exchanged values. Two sets: a lane that writes to one has met the others since they read it.
  uint64_t slots[2][kLanes];
};

struct SharedMemory {
  SharedMemory(size_t size, std::align_val_t alignment)
      : size(size), alignment(alignment), data(::operator new(size, alignment)) {
    std::memset(data, 0xff, size);
  }
  ~SharedMemory() { ::operator delete(data, alignment); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  size_t size;
  std::align_val_t alignment;
  void* data;
};

struct Running {
  const char* name = nullptr;
  std::map<const void*, SharedMemory> shared;
  bool any = false;  // of the predicates of this __syncthreads_or
  bool result = false;
};

// Fibres outlive a block and a launch: making one costs more than a small kernel.
std::function<void()> thread_function;
std::vector<std::unique_ptr<Warp>> warps;
Running running;
Warp* warp = nullptr;
Thread* thread = nullptr;

std::string where() {
  std::ostringstream out;
  out << "kernel " << running.name << ", block (" << blockIdx.x << ", " << blockIdx.y << ", "
      << blockIdx.z << ")";
  return out.str();
}

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(where() + ": " + what); }

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

template <typename Threads>
bool all_wait(const Threads& threads, State state) {
  return std::all_of(threads.begin(), threads.end(), [&](const Thread& t) {
    return t.state == state && t.site == threads[0].site;
  });
}

// Runs the threads of a warp until none can go on without another warp.
void run_warp(Warp& chosen, Sequence& lanes, std::minstd_rand& random) {
  warp = &chosen;
  for (;;) {
    for (const unsigned lane : lanes.next(random)) {
      if (chosen.lanes[lane].state == State::kReady) resume(chosen.lanes[lane]);
    }
    if (!all_wait(chosen.lanes, State::kAtWarp)) return;
    for (Thread& lane : chosen.lanes) lane.state = State::kReady;
  }
}

// "3 threads wait at __syncthreads (poles.cu:7), 29 threads have returned"
std::string describe(std::span<const std::unique_ptr<Warp>> block) {
  std::map<std::string, int> counts;
  for (const auto& w : block) {
    for (const Thread& t : w->lanes) {
      std::ostringstream state;
      if (t.state == State::kReturned) {
        state << "have returned";
      } else {
        state << "wait at " << t.site.function << " (" << t.site.file << ":" << t.site.line << ")";
      }
      ++counts[state.str()];
    }
  }
  std::ostringstream out;
  for (const auto& [state, count] : counts) {
    out << (out.tellp() > 0 ? ", " : "") << count << " threads " << state;
  }
  return out.str();
}

void run_block(std::span<const std::unique_ptr<Warp>> block, std::minstd_rand& random) {
  for (const auto& w : block) {
    for (Thread& lane : w->lanes) {
      lane.state = State::kReady;
      lane.turn = 0;
    }
  }
  Sequence order(block.size()), lanes(kLanes);
  for (;;) {
    for (const unsigned index : order.next(random)) run_warp(*block[index], lanes, random);
    const Thread& first = block[0]->lanes[0];
    bool all_returned = true, all_met = true;
    for (const auto& w : block) {
      for (const Thread& t : w->lanes) {
        all_returned = all_returned && t.state == State::kReturned;
        all_met = all_met && t.state == State::kAtBlock && t.site == first.site;
      }
    }
    if (all_returned) return;
    if (!all_met) fail("a barrier that not all threads reach: " + describe(block));
    for (const auto& w : block) {
      for (Thread& t : w->lanes) t.state = State::kReady;
    }
    running.result = running.any;
    running.any = false;
  }
}

void make_warps(dim3 block) {
  const unsigned threads = block.x * block.y * block.z;
  while (warps.size() < threads / kLanes) {
    auto made = std::make_unique<Warp>();
    for (Thread& lane : made->lanes) lane.fibre = std::make_unique<Fibre>(thread_function);
    warps.push_back(std::move(made));
  }
  for (unsigned i = 0; i < threads; ++i) {
    warps[i / kLanes]->lanes[i % kLanes].index = {i % block.x, i / block.x % block.y,
                                                  i / (block.x * block.y)};
  }
}

void check_mask(Site site, unsigned mask) {
  if (mask != kAllLanes) fail(std::string(site.function) + " without all lanes in its mask");
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
  const unsigned threads = block.x * block.y * block.z;
  if (threads % kLanes != 0) fail("a block is made of whole warps");
  if (grid.x > 0x7fffffffu || grid.y > 0xffffu || grid.z > 0xffffu) fail("the grid is too large");
  settings().launches.push_back({name, grid, block, stream});

  blockDim = block;
  gridDim = grid;
  thread_function = function;
  make_warps(block);
  std::minstd_rand random(1);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  Sequence order(blocks);
  try {
    for (const uint64_t index : order.next(random)) {
      blockIdx = {static_cast<unsigned>(index % grid.x),
                  static_cast<unsigned>(index / grid.x % grid.y),
                  static_cast<unsigned>(index / grid.x / grid.y)};
      run_block(std::span(warps).first(threads / kLanes), random);
      running.shared.clear();
    }
  } catch (...) {
    warps.clear();  // fibres stuck half-way cannot be used again
    running = {};
    throw;
  }
}

void* shared_memory(const void* site, size_t size, size_t alignment) {
  auto found = running.shared.find(site);
  if (found == running.shared.end()) {
    size_t total = size;
    for (const auto& [_, memory] : running.shared) total += memory.size;
    if (total > kMaxShared) fail("more than 48 KB of shared memory");
    found =
        running.shared.try_emplace(site, size, std::align_val_t(std::max(alignment, 16ul))).first;
  }
  return found->second.data;
}

void meet_block(Site site) { wait(State::kAtBlock, site); }

bool meet_block_or(Site site, bool predicate) {
  running.any = running.any || predicate;
  wait(State::kAtBlock, site);
  return running.result;
}

void meet_warp(Site site, unsigned mask) {
  check_mask(site, mask);
  wait(State::kAtWarp, site);
}

int lane() { return static_cast<int>(thread - warp->lanes.data()); }

const uint64_t* exchange(Site site, unsigned mask, uint64_t bits) {
  check_mask(site, mask);
  uint64_t* slots = warp->slots[thread->turn];
  thread->turn ^= 1;
  slots[lane()] = bits;
  wait(State::kAtWarp, site);
  return slots;
}

}  // namespace vne::emulation
