// Stacks that take turns on one thread of the host.

#pragma once

#include <ucontext.h>

#include <cstddef>
#include <exception>
#include <functional>

namespace vne::emulation {

// Runs a function, again and again, on a stack of its own. Whoever calls resume() runs until the
// function pauses or returns, and the next resume() goes on from there.
class Fibre {
 public:
  explicit Fibre(const std::function<void()>& function);
  ~Fibre();
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // True once the function has returned; the next resume() calls it again. What it throws comes out
  // here.
  bool resume();
  // To be called from inside the function: back to whoever called resume().
  void pause() { switch_stack(own_, caller_); }

 private:
  struct Stack {
    void* place[5];        // where it stopped, as __builtin_setjmp has it
    void* fake = nullptr;  // these three are AddressSanitizer's
    const void* begin = nullptr;
    size_t size = 0;
  };
  static void enter();
  static void switch_stack(Stack& from, Stack& to, const ucontext_t* start = nullptr);

  const std::function<void()>& function_;
  void* mapping_;  // a page that must not be touched, then the stack
  ucontext_t start_;
  bool started_ = false;
  Stack own_, caller_;
  std::exception_ptr error_;
  bool returned_ = false;
};

}  // namespace vne::emulation
