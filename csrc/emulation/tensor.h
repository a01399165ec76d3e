// Stand-in for libtorch's stable ABI: the part of it that the CUDA sources use, under its names.
//
// An operator becomes a function from a list of Value to a list of Tensor, which module.cpp makes a
// Python function on NumPy arrays.

#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#define VNE_CHECK(condition, ...) \
  if (!(condition)) throw std::runtime_error(vne::emulation::concatenate(__VA_ARGS__))

namespace vne {

enum class ScalarType { Half, Float, Double, BFloat16 };

namespace emulation {

template <typename... Parts>
std::string concatenate(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

inline int64_t item_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// Exactly `size` bytes, so that AddressSanitizer sees their ends, `offset` past an aligned address.
inline std::shared_ptr<void> allocate(int64_t size, int64_t offset) {
  constexpr std::align_val_t kAlignment{64};
  char* data = static_cast<char*>(::operator new(size + offset, kAlignment));
  std::memset(data, 0xff, size + offset);
  return {data + offset, [=](void*) { ::operator delete(static_cast<void*>(data), kAlignment); }};
}

}  // namespace emulation

class Tensor {
 public:
  Tensor(std::shared_ptr<void> data, std::vector<int64_t> sizes, std::vector<int64_t> strides,
         ScalarType dtype)
      : data_(std::move(data)),
        sizes_(std::move(sizes)),
        strides_(std::move(strides)),
        dtype_(dtype) {}

  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t i) const { return sizes_.at(i); }
  int64_t stride(int64_t i) const { return strides_.at(i); }  // in elements
  const std::vector<int64_t>& sizes() const { return sizes_; }
  const std::vector<int64_t>& strides() const { return strides_; }
  ScalarType scalar_type() const { return dtype_; }
  bool is_cuda() const { return true; }
  int get_device_index() const { return 0; }
  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : sizes_) count *= size;
    return count;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dim(); i-- > 0;) {
      if (sizes_[i] != 1 && strides_[i] != expected) return numel() == 0;
      expected *= sizes_[i];
    }
    return true;
  }
  // Null for an empty tensor.
  const void* const_data_ptr() const { return mutable_data_ptr(); }
  void* mutable_data_ptr() const { return numel() == 0 ? nullptr : data_.get(); }
  const std::shared_ptr<void>& storage() const { return data_; }

 private:
  std::shared_ptr<void> data_;
  std::vector<int64_t> sizes_, strides_;
  ScalarType dtype_;
};

namespace emulation {

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  return strides;
}

// NaN wherever nothing is written.
inline Tensor make_tensor(const std::vector<int64_t>& sizes, ScalarType dtype, int64_t offset) {
  int64_t size = item_size(dtype);
  for (const int64_t s : sizes) size *= s;
  return {allocate(size, offset), sizes, contiguous_strides(sizes), dtype};
}

}  // namespace emulation

inline Tensor empty(const Tensor&, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return emulation::make_tensor(sizes, dtype, 0);
}

// ---- registration ----------------------------------------------------------------------------

namespace emulation {

using Value = std::variant<std::optional<Tensor>, bool, double, std::string>;

template <typename T>
T unpack(const Value& value) {
  if constexpr (std::is_same_v<T, Tensor>) {
    return std::get<std::optional<Tensor>>(value).value();
  } else {
    return std::get<T>(value);
  }
}

inline std::vector<Tensor> pack(const Tensor& result) { return {result}; }

template <typename... Tensors>
std::vector<Tensor> pack(const std::tuple<Tensors...>& results) {
  return std::apply([](const auto&... result) { return std::vector<Tensor>{result...}; }, results);
}

struct Operator {
  size_t parameters;
  std::function<std::vector<Tensor>(const std::vector<Value>&)> call;
};

inline std::map<std::string, Operator>& operators() {
  static std::map<std::string, Operator> registered;
  return registered;
}

struct Library {
  template <typename Result, typename... Parameters>
  void impl(const char* name, Result (*function)(Parameters...)) {
    operators()[name] = {sizeof...(Parameters), [=](const std::vector<Value>& values) {
                           return call(function, values, std::index_sequence_for<Parameters...>());
                         }};
  }

 private:
  template <typename Result, typename... Parameters, size_t... I>
  static std::vector<Tensor> call(Result (*function)(Parameters...),
                                  const std::vector<Value>& values, std::index_sequence<I...>) {
    return pack(function(unpack<std::remove_cvref_t<Parameters>>(values.at(I))...));
  }
};

struct Registration {
  explicit Registration(void (*registers)(Library&)) {
    Library library;
    registers(library);
  }
};

}  // namespace emulation
}  // namespace vne

#define TORCH_BOX(function) (function)
#define VNE_CONCATENATE(a, b) a##b
#define VNE_REGISTER(function, library)                                                 \
  static void function(vne::emulation::Library&);                                       \
  static const vne::emulation::Registration VNE_CONCATENATE(function, _done)(function); \
  static void function(vne::emulation::Library& library)
#define VNE_UNIQUE(name, number) VNE_CONCATENATE(name, number)
#define STABLE_TORCH_LIBRARY_IMPL(name, device, library) \
  VNE_REGISTER(VNE_UNIQUE(name##_##device##_, __COUNTER__), library)

namespace torch::stable {

// A copy where the tensor is strided.
inline vne::Tensor contiguous(const vne::Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  const vne::Tensor copy = vne::emulation::make_tensor(tensor.sizes(), tensor.scalar_type(), 0);
  const int64_t item = vne::emulation::item_size(tensor.scalar_type()), count = copy.numel();
  const char* from = static_cast<const char*>(tensor.const_data_ptr());
  char* to = static_cast<char*>(copy.mutable_data_ptr());
  for (int64_t flat = 0; flat < count; ++flat) {
    int64_t rest = flat, offset = 0;
    for (int64_t i = tensor.dim(); i-- > 0; rest /= tensor.size(i)) {
      offset += rest % tensor.size(i) * tensor.stride(i);
    }
    std::memcpy(to + flat * item, from + offset * item, item);
  }
  return copy;
}

}  // namespace torch::stable
