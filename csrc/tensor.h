// Tensors of Python, as every binding takes them: seen through DLPack's C exchange interface and checked where their
// address is taken. torch has that interface since 2.11; nothing of torch is included or linked.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "numbers.h"

namespace den_kernels {

// DLPack 1.x (github.com/dmlc/dlpack), as far as it is read here. The interface is the table of functions in the
// capsule `__dlpack_c_exchange_api__` of a tensor's type.
namespace dlpack {
enum Device : int32_t { cpu = 1, cuda = 2 };
enum Code : uint8_t { integer = 0, unsigned_integer = 1, floating = 2, brain = 4, boolean = 6 };
struct View {
  void* data;
  int32_t device, device_index, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* sizes;
  int64_t* strides;  // in elements
  uint64_t offset;   // of the first element behind data, in bytes
};
}  // namespace dlpack

// The tensor behind a Python object, which must outlive the view; false for what is none, or on a device without
// memory.
bool view_of(pybind11::handle object, dlpack::View& view);

template <class T>
struct TypeOf;
template <>
struct TypeOf<float> {
  static constexpr uint8_t code = dlpack::floating, bits = 32;
};
template <>
struct TypeOf<fp16> {
  static constexpr uint8_t code = dlpack::floating, bits = 16;
};
template <>
struct TypeOf<bf16> {
  static constexpr uint8_t code = dlpack::brain, bits = 16;
};
template <>
struct TypeOf<int32_t> {
  static constexpr uint8_t code = dlpack::integer, bits = 32;
};
template <>
struct TypeOf<int64_t> {
  static constexpr uint8_t code = dlpack::integer, bits = 64;
};
template <>
struct TypeOf<bool> {
  static constexpr uint8_t code = dlpack::boolean, bits = 8;
};

constexpr int64_t any_size = -1;
using Sizes = std::initializer_list<int64_t>;

// A tensor in a CPU's memory while the caller's reference lives. What it is taken for is checked in dense() and maps():
// a mismatch is a TypeError (dtype) or a ValueError of the form "op: name must be X, got Y".
class Tensor {
 public:
  // Raises ValueError for what is no tensor in a CPU's memory.
  Tensor(pybind11::handle object, const char* op, const char* name);

  int64_t dim() const { return view_.ndim; }
  int64_t size(int axis) const { return view_.sizes[axis]; }
  int64_t count() const;                // elements
  bool lies(bool channels_last) const;  // as dense() or, of four axes, maps() takes it
  template <class T>
  bool is() const {
    return view_.code == TypeOf<std::remove_const_t<T>>::code && view_.bits == TypeOf<std::remove_const_t<T>>::bits;
  }

  // The address of a contiguous tensor of these sizes.
  template <class T>
  T* dense(Sizes sizes) const {
    using Type = TypeOf<std::remove_const_t<T>>;
    return static_cast<T*>(checked(Type::code, Type::bits, sizes, false));
  }
  // The address of a channels-last tensor [B, C, H, W], whose elements lie as [B, H, W, C]. Sizes: B, C, H, W.
  template <class T>
  T* maps(Sizes sizes) const {
    using Type = TypeOf<std::remove_const_t<T>>;
    return static_cast<T*>(checked(Type::code, Type::bits, sizes, true));
  }
  // The address for a tensor of any type, which the caller tells apart with is().
  void* any_maps(Sizes sizes) const { return checked(view_.code, view_.bits, sizes, true); }

  const dlpack::View& view() const { return view_; }
  char* data() const { return static_cast<char*>(view_.data) + view_.offset; }
  std::string text() const;  // "float32 [2, 3]", for messages
  // ValueError "op: name must be X, got float32 [2, 3]" unless it holds.
  void require(bool holds, const char* must_be) const {
    if (!holds) fail(must_be);
  }

 private:
  [[noreturn]] void fail(const std::string& must_be) const;
  void* checked(uint8_t code, uint8_t bits, Sizes sizes, bool channels_last) const;

  dlpack::View view_;
  const char* op_;
  const char* name_;
};

// The address of a contiguous tensor of these sizes, or null for None.
template <class T>
T* dense_or_null(pybind11::handle object, const char* op, const char* name, Sizes sizes) {
  return object.is_none() ? nullptr : Tensor(object, op, name).dense<T>(sizes);
}

}  // namespace den_kernels
