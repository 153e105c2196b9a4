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

// The identity of a tensor (address, type and layout), and checksums of its values where a CPU can read them.
struct Watched {
  char* data;
  int32_t device, device_index;
  uint8_t code, bits;
  std::vector<int64_t> layout;  // sizes, then strides
  Checksums sums;

  explicit Watched(const dlpack::View& v)
      : data(begin(v)),
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
      dlpack::View view;
      if (!view_of(tensor, view)) throw py::value_error("Watch: tensors must be on cpu or cuda");
      watched_.emplace_back(view);
      on_host_ &= view.device == dlpack::cpu;
    }
  }

  bool same(const py::tuple& tensors) {
    if (tensors.size() != watched_.size()) return false;
    for (size_t i = 0; i < watched_.size(); ++i) {
      dlpack::View view;
      const py::handle tensor = PyTuple_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
      if (!view_of(tensor, view) || !watched_[i].is(view) || !watched_[i].sums.next_holds(watched_[i].data))
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

}  // namespace

void bind_watch(py::module_& m) {
  py::class_<Watch>(m, "Watch", "What a tuple of tensors is and holds; ValueError for one without memory.")
      .def(py::init<const py::tuple&>())
      .def("same", &Watch::same, "Whether these are the same tensors. What they hold is looked at in turns().")
      .def_property_readonly("on_host", &Watch::on_host, "Whether all lie in a CPU's memory, where they are summed.")
      .def_property_readonly("turns", &Watch::turns, "Calls of same() that look at everything; 1 where it is small.");
}

}  // namespace den_kernels
