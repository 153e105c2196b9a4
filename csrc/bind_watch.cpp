// Watches over tensors in Python: see den_kernels/fold_cache.py.
#include "bind.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "tensor.h"
#include "watch.h"

namespace py = pybind11;

namespace den_kernels {
namespace {

// How often a tensor was written by PyTorch's operations; RuntimeError for an inference tensor, which does not count.
int64_t version_of(py::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("_version");
  const py::object version = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), name));
  if (!version) throw py::error_already_set();
  return PyLong_AsLongLong(version.ptr());
}

// The identity of a tensor (address, type, layout and version), and checksums of its values where a CPU can read them.
struct Watched {
  int64_t version;
  char* data;
  const void* sizes;
  int32_t device, device_index;
  uint8_t code, bits;
  std::vector<int64_t> layout;  // sizes, then strides
  Checksums sums;

  Watched(int64_t version, const dlpack::View& v)
      : version(version),
        data(begin(v)),
        sizes(v.sizes),
        device(v.device),
        device_index(v.device_index),
        code(v.code),
        bits(v.bits),
        layout(v.sizes, v.sizes + v.ndim),
        sums(begin(v), v.device == dlpack::cpu ? bytes_of(v) : 0) {
    layout.insert(layout.end(), v.strides, v.strides + v.ndim);
  }

  bool is(const dlpack::View& v) const {
    return begin(v) == data && v.device == device && v.device_index == device_index && v.code == code &&
           v.bits == bits && 2 * static_cast<size_t>(v.ndim) == layout.size() &&
           std::equal(v.sizes, v.sizes + v.ndim, layout.begin()) &&
           std::equal(v.strides, v.strides + v.ndim, layout.begin() + v.ndim);
  }

  // Asks for the memory that same() reads of a tensor, so that it comes from afar for all of them side by side.
  void ask_for(const void* tensor) const {
    constexpr int64_t line = 64;
    const auto lines = [](const void* at, int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) __builtin_prefetch(static_cast<const char*>(at) + i * line);
    };
    lines(tensor, 0, 2);
    lines(sizes, -3, 3);  // they lie in the tensor
    lines(data, 0, 2);
  }

  static char* begin(const dlpack::View& v) { return static_cast<char*>(v.data) + v.offset; }
  // From its first element to its last, gaps included.
  static int64_t bytes_of(const dlpack::View& v) {
    int64_t last = 0;
    for (int32_t i = 0; i < v.ndim; ++i) {
      if (v.sizes[i] == 0) return 0;
      last += (v.sizes[i] - 1) * v.strides[i];
    }
    return (last + 1) * v.bits / 8;
  }
};

class Watch {
 public:
  explicit Watch(const py::tuple& tensors) {
    for (const py::handle tensor : tensors) {
      const int64_t version = version_of(tensor);  // first: what another thread writes meanwhile is noticed
      dlpack::View view;
      if (!view_of(tensor, view)) throw py::value_error("Watch: tensors must be on cpu or cuda");
      watched_.emplace_back(version, view);
      on_host_ &= view.device == dlpack::cpu;
    }
  }

  bool same(const py::tuple& tensors) {
    if (tensors.size() != watched_.size()) return false;
    for (size_t i = 0; i < watched_.size(); ++i)
      watched_[i].ask_for(PyTuple_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i)));
    for (size_t i = 0; i < watched_.size(); ++i) {
      dlpack::View view;
      const py::handle tensor = PyTuple_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
      if (!view_of(tensor, view) || !watched_[i].is(view) || version_of(tensor) != watched_[i].version ||
          !watched_[i].sums.next_holds(watched_[i].data))
        return false;
    }
    return true;
  }

  bool on_host() const { return on_host_; }
  int64_t turns() const {
    int64_t most = 1;
    for (const Watched& each : watched_) most = std::max(most, each.sums.groups());
    return most;
  }

 private:
  std::vector<Watched> watched_;
  bool on_host_ = true;
};

// Calls one(item) for the items of a list until one is false; true where none is.
template <class One>
bool all_of(const py::list& list, One one) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list.ptr()); ++i)
    if (!one(PyList_GET_ITEM(list.ptr(), i))) return false;
  return true;
}

// True where a dictionary has each entry of another, the very same objects.
bool has_all(PyObject* dictionary, PyObject* entries) {
  PyObject *key, *value;
  for (Py_ssize_t place = 0; PyDict_Next(entries, &place, &key, &value);)
    if (PyDict_GetItemWithError(dictionary, key) != value) return false;
  return true;
}

// True where nothing has to see a module with this __dict__ being called, and it is not in training.
bool is_plain(PyObject* own) {
  static PyObject *const hooks = PyUnicode_InternFromString("_forward_hooks"),
                         *const before = PyUnicode_InternFromString("_forward_pre_hooks"),
                         *const training = PyUnicode_InternFromString("training"),
                         *const forward = PyUnicode_InternFromString("forward");
  const auto is_empty = [own](PyObject* name) {
    PyObject* found = PyDict_GetItemWithError(own, name);
    return found && PyDict_Size(found) == 0;
  };
  return is_empty(hooks) && is_empty(before) && PyDict_GetItemWithError(own, training) == Py_False &&
         !PyDict_GetItemWithError(own, forward);
}

bool stands(const py::list& whole, const py::list& parts, const py::list& plain) {
  for (const py::handle own : plain)
    if (!PyDict_Check(own.ptr())) throw py::type_error("stands: plain must hold dictionaries");
  for (const py::list* pairs : {&whole, &parts})
    for (const py::handle pair : *pairs) {
      if (!PyTuple_Check(pair.ptr()) || PyTuple_GET_SIZE(pair.ptr()) != 2 ||
          !PyDict_Check(PyTuple_GET_ITEM(pair.ptr(), 0)) || !PyDict_Check(PyTuple_GET_ITEM(pair.ptr(), 1)))
        throw py::type_error("stands: whole and parts must hold pairs of dictionaries");
      __builtin_prefetch(PyTuple_GET_ITEM(pair.ptr(), 0));
      __builtin_prefetch(PyTuple_GET_ITEM(pair.ptr(), 1));
    }
  const auto has = [](PyObject* pair) { return has_all(PyTuple_GET_ITEM(pair, 0), PyTuple_GET_ITEM(pair, 1)); };
  const auto is = [&](PyObject* pair) {
    return PyDict_Size(PyTuple_GET_ITEM(pair, 0)) == PyDict_Size(PyTuple_GET_ITEM(pair, 1)) && has(pair);
  };
  return all_of(whole, is) && all_of(parts, has) && all_of(plain, is_plain);
}

}  // namespace

void bind_watch(py::module_& m) {
  m.def("stands", &stands, py::arg("whole"), py::arg("parts"), py::arg("plain"),
        "Whether dictionaries have the entries of others, and no more (whole) or more (parts), and modules with these "
        "__dict__ are neither watched nor trained (plain): see den_kernels/standing.py.");
  py::class_<Watch>(m, "Watch", "What a tuple of tensors is and holds; ValueError for one without memory.")
      .def(py::init<const py::tuple&>())
      .def("same", &Watch::same, "Whether these are the same tensors. What they hold is looked at in turns().")
      .def_property_readonly("on_host", &Watch::on_host, "Whether all lie in a CPU's memory, where they are summed.")
      .def_property_readonly("turns", &Watch::turns, "Calls of same() that look at everything; 1 where it is small.");
}

}  // namespace den_kernels
