// Stacks that take turns on one thread of the host.

#pragma once

#include <cstddef>
#include <exception>
#include <functional>
#include <memory>

namespace vne::emulation {

// Runs a function, again and again, on a stack of its own. Whoever calls resume() runs until the
// function pauses or returns, and the next resume() goes on from there.
class Fibre {
 public:
  explicit Fibre(const std::function<void()>& function);
  ~Fibre();
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // True once the function has returned; the next resume() calls it anew. What it throws comes out
  // here.
  bool resume();
  // To be called from inside the function: back to whoever called resume().
  void pause();

 private:
  struct Stacks;
  static void enter();
  void switch_in();
  void switch_out();

  const std::function<void()>& function_;
  std::unique_ptr<Stacks> stacks_;
  std::exception_ptr error_;
  bool returned_ = false;
};

}  // namespace vne::emulation
