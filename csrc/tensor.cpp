#include "tensor.h"

#include <array>
#include <sstream>

namespace py = pybind11;

namespace den_kernels {
namespace {

struct Exchange {  // the table of functions; only the last but one of its entries is called
  uint32_t major, minor;
  Exchange* previous;
  void *allocator, *from_object, *to_object;
  int (*view)(void* object, dlpack::View* out);  // borrows; 0, or -1 with Python's error set
  void* current_stream;
};

// The table of the object's type, or null. torch.Tensor and its subclasses share one.
const Exchange* exchange_of(py::handle object) {
  static std::array<PyTypeObject*, 4> known{};  // all written while the interpreter's lock is held
  static size_t next = 0;
  static const Exchange* table = nullptr;
  for (const PyTypeObject* type : known)
    if (Py_TYPE(object.ptr()) == type) return table;
  const py::handle type(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())));
  if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return nullptr;
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  const auto* made = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!made) PyErr_Clear();
  if (!made || made->major != 1) return nullptr;
  type.inc_ref();  // kept for good, so that no other type gets its address
  known[next++ % known.size()] = Py_TYPE(object.ptr());
  return table = made;
}

const char* type_name(uint8_t code, uint8_t bits) {
  if (code == dlpack::floating) return bits == 64 ? "float64" : bits == 32 ? "float32" : "float16";
  if (code == dlpack::brain) return "bfloat16";
  if (code == dlpack::boolean) return "bool";
  if (code == dlpack::integer) return bits == 64 ? "int64" : bits == 32 ? "int32" : bits == 16 ? "int16" : "int8";
  return code == dlpack::unsigned_integer ? "an unsigned integer type" : "another type";
}

template <class Iterator>
std::string list(Iterator first, Iterator last) {
  std::string text = "[";
  for (Iterator i = first; i != last; ++i)
    text += (i == first ? "" : ", ") + (*i == any_size ? std::string("any") : std::to_string(*i));
  return text + "]";
}

}  // namespace

bool view_of(py::handle object, dlpack::View& view) {
  const Exchange* exchange = exchange_of(object);
  if (exchange && exchange->view(object.ptr(), &view) == 0) return true;
  PyErr_Clear();
  return false;
}

Tensor::Tensor(py::handle object, const char* op, const char* name) : op_(op), name_(name) {
  const bool seen = view_of(object, view_);
  if (seen && view_.device == dlpack::cpu && (view_.data || count() == 0)) return;
  std::string got = Py_TYPE(object.ptr())->tp_name;
  if (seen && view_.device == dlpack::cpu)
    got = "one without memory";
  else if (py::hasattr(object, "device"))
    got = std::string(py::str(object.attr("device")));
  throw py::value_error(std::string(op) + ": " + name + " must be a tensor on cpu, got " + got);
}

int64_t Tensor::count() const {
  int64_t count = 1;
  for (int axis = 0; axis < view_.ndim; ++axis) count *= view_.sizes[axis];
  return count;
}

std::string Tensor::text() const {
  return std::string(type_name(view_.code, view_.bits)) + " " + list(view_.sizes, view_.sizes + view_.ndim);
}

void Tensor::fail(const std::string& must_be) const {
  throw py::value_error(std::string(op_) + ": " + name_ + " must be " + must_be + ", got " + text());
}

// Axes of one element may have any stride.
bool Tensor::lies(bool channels_last) const {
  constexpr int usual[] = {0, 1, 2, 3}, last[] = {0, 2, 3, 1};
  int64_t step = 1;
  for (int i = view_.ndim - 1; i >= 0; --i) {
    const int axis = channels_last ? last[i] : i < 4 ? usual[i] : i;
    if (view_.sizes[axis] != 1 && view_.strides[axis] != step) return false;
    step *= view_.sizes[axis];
  }
  return true;
}

void* Tensor::checked(uint8_t code, uint8_t bits, Sizes sizes, bool channels_last) const {
  const auto refuse = [&](bool type) {
    const std::string text = std::string(op_) + ": " + name_ + " must be " + type_name(code, bits) + " " +
                             list(sizes.begin(), sizes.end()) + (channels_last ? " channels-last" : " contiguous") +
                             ", got " + this->text() + " with strides " +
                             list(view_.strides, view_.strides + view_.ndim);
    if (type) throw py::type_error(text);
    throw py::value_error(text);
  };
  if (view_.code != code || view_.bits != bits || view_.lanes != 1) refuse(true);
  if (view_.ndim != static_cast<int32_t>(sizes.size()) || (channels_last && view_.ndim != 4)) refuse(false);
  bool empty = false;
  int axis = 0;
  for (const int64_t size : sizes) {
    const int64_t got = view_.sizes[axis++];
    if (size != any_size && size != got) refuse(false);
    empty |= got == 0;
  }
  if (!empty && !lies(channels_last)) refuse(false);
  return data();
}

}  // namespace den_kernels
