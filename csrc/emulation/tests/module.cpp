// The Python module: every registered operator as a function on NumPy arrays, and the emulator's
// settings. bfloat16 comes as uint16, its bits.

#include <pybind11/numpy.h>

#include "common/stable.h"
#include "emulation/emulator.h"

namespace py = pybind11;

namespace vne::emulation {
namespace {

const std::map<std::string, ScalarType> kDtypes{{"float16", ScalarType::Half},
                                                {"float32", ScalarType::Float},
                                                {"float64", ScalarType::Double},
                                                {"uint16", ScalarType::BFloat16}};

const std::map<std::string, Order> kOrders{
    {"forward", Order::kForward}, {"backward", Order::kBackward}, {"shuffled", Order::kShuffled}};

// A contiguous array is copied, so that the memory ends where the tensor does, to an address as
// well or badly aligned as its own. A strided one is read where it is.
Tensor to_tensor(const py::array& array) {
  const auto dtype = kDtypes.find(py::str(array.dtype()));
  if (dtype == kDtypes.end()) throw py::type_error("no tensor has this array's dtype");
  const int64_t item = item_size(dtype->second);
  std::vector<int64_t> sizes(array.shape(), array.shape() + array.ndim()), strides;
  for (int64_t i = 0; i < array.ndim(); ++i) strides.push_back(array.strides(i) / item);
  void* data = const_cast<void*>(array.data());
  const Tensor borrowed({data, [array](void*) {}}, sizes, strides, dtype->second);
  if (!borrowed.is_contiguous()) return borrowed;
  const Tensor copy = make_tensor(sizes, dtype->second, reinterpret_cast<uintptr_t>(data) % 64);
  if (copy.numel() > 0) std::memcpy(copy.mutable_data_ptr(), data, copy.numel() * item);
  return copy;
}

py::array to_array(const Tensor& tensor) {
  std::string name;
  for (const auto& [dtype_name, dtype] : kDtypes) {
    if (dtype == tensor.scalar_type()) name = dtype_name;
  }
  std::vector<int64_t> strides = tensor.strides();
  for (int64_t& stride : strides) stride *= item_size(tensor.scalar_type());
  const auto* owner = new std::shared_ptr<void>(tensor.storage());
  const py::capsule base(owner, [](void* p) { delete static_cast<std::shared_ptr<void>*>(p); });
  return py::array(py::dtype(name), tensor.sizes(), strides, owner->get(), base);
}

Value to_value(const py::handle& argument) {
  if (argument.is_none()) return std::optional<Tensor>();
  if (py::isinstance<py::array>(argument))
    return std::optional<Tensor>(to_tensor(py::reinterpret_borrow<py::array>(argument)));
  if (py::isinstance<py::bool_>(argument)) return argument.cast<bool>();
  if (py::isinstance<py::float_>(argument)) return argument.cast<double>();
  return argument.cast<std::string>();
}

// The result is a tuple of arrays where the operator has several.
py::object call(const std::string& name, const Operator& called, const py::args& arguments) {
  if (arguments.size() != called.parameters) {
    throw py::type_error(
        concatenate(name, " takes ", called.parameters, " arguments, got ", arguments.size()));
  }
  std::vector<Value> values;
  for (const py::handle& argument : arguments) values.push_back(to_value(argument));
  const std::vector<Tensor> results = called.call(values);
  if (results.size() == 1) return to_array(results[0]);
  py::tuple arrays(results.size());
  for (size_t i = 0; i < results.size(); ++i) arrays[i] = to_array(results[i]);
  return arrays;
}

py::tuple to_tuple(const dim3& d) { return py::make_tuple(d.x, d.y, d.z); }

}  // namespace
}  // namespace vne::emulation

PYBIND11_MODULE(VNE_EMULATION_MODULE, module) {
  using namespace vne::emulation;
  for (const auto& [name, registered] : operators()) {
    module.def(name.c_str(), [name, registered](const py::args& arguments) {
      return call(name, registered, arguments);
    });
  }
  module.def("set_order", [](const std::string& name) { settings().order = kOrders.at(name); });
  module.def("set_multiprocessors", [](int count) { settings().multiprocessors = count; });
  // (name, grid, block, stream) of every launch since clear_launches(); a product or an
  // eigendecomposition of a vendor's library has zeros for grid and block.
  module.def("launches", [] {
    py::list list;
    for (const Launch& l : settings().launches) {
      list.append(py::make_tuple(l.name, to_tuple(l.grid), to_tuple(l.block),
                                 reinterpret_cast<uintptr_t>(l.stream)));
    }
    return list;
  });
  module.def("clear_launches", [] { settings().launches.clear(); });
}
