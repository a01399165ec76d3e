// ucontext makes stacks. It would switch them too, with two system calls a switch; kernels switch
// millions of times, so the compiler's own setjmp and longjmp do it, which are a few instructions.

#include "emulation/fibre.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>
#include <utility>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace vne::emulation {
namespace {

constexpr size_t kStackSize = 1 << 18;  // address space; only what is touched becomes memory
const size_t kPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));

Fibre* entering = nullptr;  // enter() takes no argument

}  // namespace

Fibre::Fibre(const std::function<void()>& function) : function_(function) {
  mapping_ = mmap(nullptr, kStackSize + kPage, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::bad_alloc();
  mprotect(mapping_, kPage, PROT_NONE);
  char* stack = static_cast<char*>(mapping_) + kPage;
  own_.begin = stack;
  own_.size = kStackSize;
#ifdef __SANITIZE_ADDRESS__
  // A fibre that was given up may have left marks where this one is mapped.
  __asan_unpoison_memory_region(stack, kStackSize);
#endif
  // Stacks begin at 32 different offsets in their pages, or they would compete for the same few
  // lines of the cache.
  static unsigned made = 0;
  getcontext(&start_);
  start_.uc_stack.ss_sp = stack;
  start_.uc_stack.ss_size = kStackSize - 128 * (made++ % 32);
  makecontext(&start_, &Fibre::enter, 0);
}

Fibre::~Fibre() { munmap(mapping_, kStackSize + kPage); }

void Fibre::enter() {
  Fibre& self = *entering;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &self.caller_.begin, &self.caller_.size);
#endif
  for (;;) {
    try {
      self.function_();
    } catch (...) {
      self.error_ = std::current_exception();
    }
    self.returned_ = true;
    self.pause();
  }
}

// A separate function, as the registers that a caller has in use are then saved; without the
// sanitizer, which takes a jump for the end of all functions on the stack.
[[gnu::noinline, gnu::no_sanitize_address]] void Fibre::switch_stack(Stack& from, Stack& to,
                                                                     const ucontext_t* start) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake, to.begin, to.size);
#endif
  if (__builtin_setjmp(from.place) == 0) {
    if (start) setcontext(start);
    __builtin_longjmp(to.place, 1);
  }
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake, &to.begin, &to.size);
#endif
}

bool Fibre::resume() {
  returned_ = false;
  entering = this;
  switch_stack(caller_, own_, std::exchange(started_, true) ? nullptr : &start_);
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  return returned_;
}

}  // namespace vne::emulation
