// The emulator's settings, as operators beside the kernels'.

#include "common/stable.h"
#include "emulation/emulator.h"

namespace vne::emulation {
namespace {

void set_order(std::string order) { settings().order = order; }
void set_multiprocessors(int64_t count) { settings().multiprocessors = static_cast<int>(count); }
std::vector<std::string> launches() { return settings().launches; }
void clear_launches() { settings().launches.clear(); }

}  // namespace
}  // namespace vne::emulation

STABLE_TORCH_LIBRARY_FRAGMENT(VNE_LIBRARY, library) {
  library.def("set_order(str order) -> ()");
  library.def("set_multiprocessors(int count) -> ()");
  library.def("launches() -> str[]");
  library.def("clear_launches() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(VNE_LIBRARY, CompositeExplicitAutograd, library) {
  using namespace vne::emulation;
  library.impl("set_order", TORCH_BOX(&set_order));
  library.impl("set_multiprocessors", TORCH_BOX(&set_multiprocessors));
  library.impl("launches", TORCH_BOX(&launches));
  library.impl("clear_launches", TORCH_BOX(&clear_launches));
}
