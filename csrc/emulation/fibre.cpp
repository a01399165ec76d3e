// ucontext makes and switches stacks, portably and with two system calls a switch. Kernels switch
// millions of times, so on x86-64 a few instructions do it.

#include "emulation/fibre.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>
#include <utility>

#if defined(__x86_64__) && !defined(VNE_EMULATION_UCONTEXT)
#define VNE_SWITCH_X86
#else
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef VNE_SWITCH_X86
// Saves what a function has to preserve, leaves the stack pointer in *from, goes on at `to`. It
// jumps back: the processor predicts a `ret` from calls, of which the other stack has made others.
extern "C" void vne_switch_stack(void** from, void* to);
asm(R"(
.text
.globl vne_switch_stack
.hidden vne_switch_stack
.type vne_switch_stack, @function
vne_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size vne_switch_stack, .-vne_switch_stack
)");
#endif

namespace vne::emulation {
namespace {

constexpr size_t kStackSize = 1 << 18;  // address space; only what is touched becomes memory

Fibre* entering = nullptr;  // enter() takes no argument

}  // namespace

struct Fibre::Stacks {
#ifdef VNE_SWITCH_X86
  void *own = nullptr, *caller = nullptr;
#else
  ucontext_t own{}, caller{};
#endif
  void* mapping = nullptr;  // a page that must not be touched, then the stack
  size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  char* stack() const { return static_cast<char*>(mapping) + page; }
#ifdef __SANITIZE_ADDRESS__
  void *own_fake = nullptr, *caller_fake = nullptr;
  const void* caller_stack = nullptr;
  size_t caller_size = 0;
#endif
};

Fibre::Fibre(const std::function<void()>& function)
    : function_(function), stacks_(std::make_unique<Stacks>()) {
  Stacks& s = *stacks_;
  s.mapping = mmap(nullptr, kStackSize + s.page, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (s.mapping == MAP_FAILED) throw std::bad_alloc();
  mprotect(s.mapping, s.page, PROT_NONE);
#ifdef __SANITIZE_ADDRESS__
  // A fibre that was given up may have left marks where this one is mapped.
  __asan_unpoison_memory_region(s.stack(), kStackSize);
#endif
#ifdef VNE_SWITCH_X86
  // Stacks begin at 32 different offsets in their pages, or they would compete for the same few
  // lines of the cache.
  static unsigned made = 0;
  void** top = reinterpret_cast<void**>(s.stack() + kStackSize - 128 * (made++ % 32));
  // What vne_switch_stack pops: six registers and where to go on. Then the stack is aligned as
  // after a call, and where its caller would be there is none.
  top[-2] = reinterpret_cast<void*>(&Fibre::enter);
  s.own = top - 8;
#else
  getcontext(&s.own);
  s.own.uc_stack.ss_sp = s.stack();
  s.own.uc_stack.ss_size = kStackSize;
  makecontext(&s.own, &Fibre::enter, 0);
#endif
}

Fibre::~Fibre() { munmap(stacks_->mapping, kStackSize + stacks_->page); }

void Fibre::enter() {
  Fibre& self = *entering;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &self.stacks_->caller_stack, &self.stacks_->caller_size);
#endif
  for (;;) {
    try {
      self.function_();
    } catch (...) {
      self.error_ = std::current_exception();
    }
    self.returned_ = true;
    self.switch_out();
  }
}

void Fibre::switch_in() {
  Stacks& s = *stacks_;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&s.caller_fake, s.stack(), kStackSize);
#endif
#ifdef VNE_SWITCH_X86
  vne_switch_stack(&s.caller, s.own);
#else
  swapcontext(&s.caller, &s.own);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(s.caller_fake, nullptr, nullptr);
#endif
}

void Fibre::switch_out() {
  Stacks& s = *stacks_;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&s.own_fake, s.caller_stack, s.caller_size);
#endif
#ifdef VNE_SWITCH_X86
  vne_switch_stack(&s.own, s.caller);
#else
  swapcontext(&s.own, &s.caller);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(s.own_fake, &s.caller_stack, &s.caller_size);
#endif
}

bool Fibre::resume() {
  returned_ = false;
  entering = this;
  switch_in();
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  return returned_;
}

void Fibre::pause() { switch_out(); }

}  // namespace vne::emulation
