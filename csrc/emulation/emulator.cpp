#include "emulation/emulator.h"

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <sstream>

#include "common/stable.h"
#include "emulation/fibre.h"

Index threadIdx, blockIdx, blockDim;

namespace vne::emulation {
namespace {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxShared = 48 << 10;

enum class State { kReady, kAtBlock, kAtWarp, kReturned };

struct Thread {
  State state = State::kReturned;
  Site site{};                         // where it waits
  uint64_t brought = 0, received = 0;  // in the exchange with its warp
  int source = 0;                      // the lane to receive from
  std::unique_ptr<Fibre> fibre;
};

struct Running {
  const char* name = nullptr;
  std::map<const void*, std::vector<char>> shared;
  bool any = false;  // of the predicates of this __syncthreads_or
  bool result = false;
};

// Fibres outlive a block and a launch: making one costs more than a small kernel.
std::function<void()> thread_function;
std::vector<Thread> threads;
Running running;
Thread* thread = nullptr;

#define VNE_REQUIRE(condition, ...) \
  VNE_CHECK(condition, "kernel ", running.name, ", block ", blockIdx.x, ": ", __VA_ARGS__)

// 0 .. size - 1 as the settings' order has them.
class Sequence {
 public:
  explicit Sequence(size_t size) : indices_(size) {
    std::iota(indices_.begin(), indices_.end(), 0);
    if (settings().order == "backward") std::reverse(indices_.begin(), indices_.end());
  }
  const std::vector<unsigned>& next(std::minstd_rand& random) {
    if (shuffled_) std::shuffle(indices_.begin(), indices_.end(), random);
    return indices_;
  }

 private:
  const bool shuffled_ = settings().order == "shuffled";
  std::vector<unsigned> indices_;
};

void resume(Thread& chosen) {
  thread = &chosen;
  threadIdx.x = static_cast<unsigned>(&chosen - threads.data());
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
    std::ostringstream place;
    place << "wait at " << t.site.function << " (" << t.site.file << ":" << t.site.line << ")";
    ++counts[t.state == State::kReturned ? "have returned" : place.str()];
  }
  std::string text;
  for (const auto& [state, count] : counts)
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " threads " + state;
  return text;
}

void run_block(std::span<Thread> block, std::minstd_rand& random) {
  Sequence order(block.size() / kLanes), lanes(kLanes);
  for (;;) {
    make_ready(block);
    for (const unsigned warp : order.next(random))
      run_warp(block.subspan(warp * kLanes, kLanes), lanes, random);
    if (all_are(block, State::kReturned)) return;
    VNE_REQUIRE(all_are(block, State::kAtBlock),
                "a barrier that not all threads reach: ", describe(block));
    running.result = running.any;
    running.any = false;
  }
}

}  // namespace

Settings& settings() {
  static Settings the_settings;
  return the_settings;
}

void launch(const char* name, int64_t blocks, int block_size,
            const std::function<void()>& function) {
  running.name = name;
  blockIdx = {0};
  VNE_REQUIRE(block_size > 0 && block_size <= kMaxThreads, "a block has 1 to 1024 threads");
  VNE_REQUIRE(block_size % kLanes == 0, "a block is made of whole warps");
  VNE_REQUIRE(blocks <= 0x7fffffff, "the grid is too large");
  settings().launches.push_back(name);

  blockDim = {static_cast<unsigned>(block_size)};
  thread_function = function;
  while (threads.size() < blockDim.x)
    threads.emplace_back().fibre = std::make_unique<Fibre>(thread_function);
  const std::span<Thread> block = std::span(threads).first(blockDim.x);
  std::minstd_rand random(1);
  Sequence order(blocks);
  try {
    for (const unsigned index : order.next(random)) {
      blockIdx = {index};
      run_block(block, random);
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
    for (const auto& [_, memory] : running.shared) total += memory.size();
    VNE_REQUIRE(total <= kMaxShared, "more than 48 KB of shared memory");
    found = running.shared.emplace(site, std::vector<char>(size, '\xff')).first;
  }
  return found->second.data();
}

void meet_block(Site site) { wait(State::kAtBlock, site); }

bool meet_block_or(Site site, bool predicate) {
  running.any = running.any || predicate;
  wait(State::kAtBlock, site);
  return running.result;
}

uint64_t exchange(Site site, unsigned mask, uint64_t bits, int source) {
  VNE_REQUIRE(mask == 0xffffffffu, site.function, " without all lanes in its mask");
  thread->brought = bits;
  thread->source = source;
  wait(State::kAtWarp, site);
  return thread->received;
}

}  // namespace vne::emulation
