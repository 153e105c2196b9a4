// Plans, rows of instances and batch norm in Python. Tensors come in as they are and are checked where their address is
// taken (tensor.h). The bindings alone know pybind11, whose headers take longer to compile than an op does.
#include "bind.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "check.h"
#include "norm.h"
#include "norm_spans.h"
#include "plan.h"
#include "rows.h"
#include "tensor.h"

namespace py = pybind11;

namespace den_kernels {
namespace {

using Ints = std::vector<int64_t>;

// levels, order and offsets of a plan: int32 [N, B], [N, B] and [N, S + 1].
Plan plan_of(const char* op, py::handle levels, py::handle order, py::handle offsets, int64_t B, int64_t N, int64_t S) {
  return {Tensor(levels, op, "levels").dense<int32_t>({N, B}), Tensor(order, op, "order").dense<int32_t>({N, B}),
          Tensor(offsets, op, "offsets").dense<int32_t>({N, S + 1})};
}

template <class T>
void run_plan_levels(const Tensor& levels, int64_t G, const Plan& plan) {
  const int64_t B = levels.size(0), N = levels.size(1);
  const T* in = levels.dense<const T>({B, N});
  const int64_t bad = [&] {
    py::gil_scoped_release unlocked;
    return plan_levels(in, B, N, G, plan);
  }();
  if (bad < 0) return;
  const std::string got =
      std::to_string(in[bad]) + " for instance " + std::to_string(bad / N) + ", block " + std::to_string(bad % N);
  check(false, "plan_levels", "levels", ("in 0.." + std::to_string(G)).c_str(), got);
}

}  // namespace

void bind_plan(py::module_& m) {
  m.def(
      "plan_levels",
      [](py::handle levels, int64_t G, py::handle out_levels, py::handle order, py::handle offsets) {
        const char* op = "plan_levels";
        const Tensor in(levels, op, "levels");
        in.require(in.dim() == 2, "[B, N]");
        check(G >= 1, op, "groups", "at least 1", G);
        const Plan plan = plan_of(op, out_levels, order, offsets, in.size(0), in.size(1), G + 1);
        in.is<int64_t>() ? run_plan_levels<int64_t>(in, G, plan) : run_plan_levels<int32_t>(in, G, plan);
      },
      "levels: [B, N] int32 or int64; writes out_levels and order [N, B] and offsets [N, groups + 2].",
      py::arg("levels"), py::arg("groups"), py::arg("out_levels"), py::arg("order"), py::arg("offsets"));
  m.def(
      "plan_masks",
      [](py::handle masks, py::handle levels, py::handle order, py::handle offsets) {
        const char* op = "plan_masks";
        const Tensor in(masks, op, "masks");
        const auto* bytes = reinterpret_cast<const uint8_t*>(in.dense<const bool>({any_size, any_size, any_size}));
        const int64_t N = in.size(0), B = in.size(1), G = in.size(2);
        const Plan plan = plan_of(op, levels, order, offsets, B, N, B);
        py::gil_scoped_release unlocked;
        plan_masks(bytes, B, N, G, plan);
      },
      "masks: [N, B, G] bool; writes levels and order [N, B] and offsets [N, B + 1].", py::arg("masks"),
      py::arg("levels"), py::arg("order"), py::arg("offsets"));
}

namespace {

Dtype dtype_of(const Tensor& tensor) {
  if (tensor.is<float>()) return Dtype::float32;
  if (tensor.is<bf16>()) return Dtype::bfloat16;
  tensor.require(tensor.is<fp16>(), "float32, bfloat16 or float16");
  return Dtype::float16;
}

// order [n]: instances of a batch of B.
const int32_t* instances(const Tensor& order, const char* op, int64_t n, int64_t B) {
  const int32_t* values = order.dense<const int32_t>({n});
  for (int64_t i = 0; i < n; ++i)
    check(values[i] >= 0 && values[i] < B, op, "order", "instances of the batch", values[i]);
  return values;
}

// Where `width` channels from `start` begin in the first row of a channels-last tensor [B, C, H, W].
void* channels_from(const Tensor& tensor, const char* op, int64_t start, int64_t width) {
  void* rows = tensor.any_maps({any_size, any_size, any_size, any_size});
  check(start >= 0 && start + width <= tensor.size(1), op, "channels", "inside those of the batch", start + width);
  return static_cast<char*>(rows) + start * tensor.view().bits / 8;
}

void run_gather(py::handle src, py::handle dst, py::handle order, int64_t start, py::handle scale, py::handle shift,
                bool relu) {
  const char* op = "gather_rows";
  const Tensor from(src, op, "x"), to(dst, op, "out");
  void* rows = to.any_maps({any_size, any_size, any_size, any_size});
  const int64_t n = to.size(0), width = to.size(1);
  const void* channels = channels_from(from, op, start, width);
  to.require(from.size(2) == to.size(2) && from.size(3) == to.size(3), "a map of the size of x");
  const int32_t* chosen = instances(Tensor(order, op, "order"), op, n, from.size(0));
  const float* scales = dense_or_null<float>(scale, op, "scale", {width});
  const float* shifts = dense_or_null<float>(shift, op, "shift", {width});
  check(!scales == !shifts, op, "scale and shift", "both tensors or both None", "one of them");
  const Dtype from_type = dtype_of(from), to_type = dtype_of(to);
  const int64_t P = to.size(2) * to.size(3), stride = from.size(1);
  py::gil_scoped_release unlocked;
  gather_rows(channels, rows, chosen, n, P, stride, width, from_type, to_type, scales, shifts, relu);
}

void run_scatter(py::handle src, py::handle dst, py::handle order, int64_t start, bool accumulate) {
  const char* op = "scatter_rows";
  const Tensor from(src, op, "rows"), to(dst, op, "out");
  const void* rows = from.any_maps({any_size, any_size, any_size, any_size});
  const int64_t n = from.size(0), width = from.size(1), P = from.size(2) * from.size(3), stride = to.size(1);
  void* channels = channels_from(to, op, start, width);
  from.require(from.size(2) == to.size(2) && from.size(3) == to.size(3), "maps of the size of out");
  const int32_t* chosen = instances(Tensor(order, op, "order"), op, n, to.size(0));
  const Dtype from_type = dtype_of(from), to_type = dtype_of(to);
  py::gil_scoped_release unlocked;
  scatter_rows(rows, channels, chosen, n, P, width, stride, from_type, to_type, accumulate);
}

void run_pool(py::handle src, py::handle dst, int64_t stride) {
  const char* op = "pool_rows";
  const Tensor from(src, op, "x"), to(dst, op, "out");
  check(stride >= 1, op, "stride", "at least 1", stride);
  const void* x = from.any_maps({any_size, any_size, any_size, any_size});
  const int64_t B = from.size(0), C = from.size(1), H = from.size(2), W = from.size(3);
  void* out = to.any_maps({B, any_size, (H + stride - 1) / stride, (W + stride - 1) / stride});
  const int64_t C_out = to.size(1);
  to.require(C_out >= C, "a map of at least the channels of x");
  const Dtype type = dtype_of(from);
  to.require(type == dtype_of(to), "of the dtype of x");
  py::gil_scoped_release unlocked;
  pool_rows(x, out, B, H, W, C, C_out, stride, type);
}

}  // namespace

void bind_rows(py::module_& m) {
  m.def("gather_rows", &run_gather, "out [n, width, H, W] = channels start .. of x [B, C, H, W], both channels-last.");
  m.def("scatter_rows", &run_scatter, "channels start .. of out [B, C, H, W] = or += rows [n, width, H, W].");
  m.def("pool_rows", &run_pool, "out [B, C_out, H', W'] = the shortcut of x [B, C, H, W], both channels-last.");
}

namespace {

// A batch [B, C, H, W] and the groups that its instances use; holds the selection that the description points into.
struct BatchView {
  NormBatch batch;
  int64_t H, W;
  py::object selection;

  BatchView(const char* op, py::handle x, py::object chosen, const Ints& groups)
      : batch{0, 0, 0, 1, 0, nullptr, {}}, selection(std::move(chosen)) {
    const Tensor maps(x, op, "x");
    maps.require(maps.is<float>() || maps.is<bf16>(), "float32 or bfloat16");
    maps.any_maps({any_size, any_size, any_size, any_size});
    batch.B = maps.size(0), H = maps.size(2), W = maps.size(3), batch.P = H * W;
    batch.element_bytes = maps.view().bits / 8;
    for (const int64_t size : groups) {
      check(size >= 0, op, "groups", "sizes of channel groups", size);
      batch.ends.push_back(batch.C += size);
    }
    check(batch.C == maps.size(1), op, "groups", "adding up to the channels of x", batch.C);
    const Tensor used(selection, op, "selection");
    batch.selection =
        reinterpret_cast<const uint8_t*>(used.dense<const bool>({batch.B, static_cast<int64_t>(groups.size())}));
    const int64_t P = batch.P;
    while (2 * batch.fold * batch.C <= folded_lanes && P % (2 * batch.fold) == 0 && P > 0) batch.fold *= 2;
  }

  // The address of a map of the batch's shape and type.
  void* maps(py::handle object, const char* name) const {
    const Tensor tensor(object, "dynamic_batch_norm", name);
    if (batch.element_bytes == 4) return tensor.maps<float>({batch.B, batch.C, H, W});
    return tensor.maps<bf16>({batch.B, batch.C, H, W});
  }
};

// The affine map of C channels, and the tensors that it points into.
struct AffineView {
  NormAffine affine;
  int64_t C;
  py::object statistics, weight, bias;

  AffineView(const char* op, int64_t channels, py::object moments, py::object scale, py::object offset, float eps,
             bool relu)
      : affine{Tensor(moments, op, "statistics").dense<const float>({3, channels}),
               dense_or_null<const float>(scale, op, "weight", {channels}),
               dense_or_null<const float>(offset, op, "bias", {channels}), eps, relu},
        C(channels),
        statistics(std::move(moments)),
        weight(std::move(scale)),
        bias(std::move(offset)) {}

  const NormAffine& of(const BatchView& batch) const {
    check(C == batch.batch.C, "dynamic_batch_norm", "affine", "of the batch's channels", C);
    return affine;
  }
};

}  // namespace

void bind_norm(py::module_& m) {
  static constexpr char op[] = "dynamic_batch_norm";
  py::class_<BatchView>(m, "NormBatch", "x [B, C, H, W] channels-last, selection bool [B, G], sizes of the G groups.")
      .def(py::init([](py::handle x, py::object selection, const Ints& groups) {
        return BatchView(op, x, std::move(selection), groups);
      }));
  py::class_<AffineView>(m, "NormAffine", "Of a batch: statistics float32 [3, C], weight and bias [C] or None.")
      .def(py::init(
          [](const BatchView& batch, py::object statistics, py::object weight, py::object bias, float eps, bool relu) {
            return AffineView(op, batch.batch.C, std::move(statistics), std::move(weight), std::move(bias), eps, relu);
          }));
  m.def("norm_statistics", [](const BatchView& batch, py::handle x, py::handle statistics) {
    const void* in = batch.maps(x, "x");
    float* out = Tensor(statistics, op, "statistics").dense<float>({3, batch.batch.C});
    py::gil_scoped_release unlocked;
    norm_statistics(batch.batch, in, out);
  });
  m.def("norm_apply", [](const BatchView& batch, const AffineView& affine, py::handle x, py::handle y) {
    const void* in = batch.maps(x, "x");
    void* out = batch.maps(y, "y");
    py::gil_scoped_release unlocked;
    norm_apply(batch.batch, affine.of(batch), in, out);
  });
  m.def("norm_reduce",
        [](const BatchView& batch, const AffineView& affine, py::handle dy, py::handle x, py::handle sums) {
          const void *grad = batch.maps(dy, "dy"), *in = batch.maps(x, "x");
          float* out = Tensor(sums, op, "sums").dense<float>({2, batch.batch.C});
          py::gil_scoped_release unlocked;
          norm_reduce(batch.batch, affine.of(batch), grad, in, out);
        });
  m.def("norm_gradient", [](const BatchView& batch, const AffineView& affine, py::handle dy, py::handle x,
                            py::handle sums, py::handle dx) {
    const void *grad = batch.maps(dy, "dy"), *in = batch.maps(x, "x");
    const float* through = dense_or_null<const float>(sums, op, "sums", {2, batch.batch.C});
    void* out = batch.maps(dx, "dx");
    py::gil_scoped_release unlocked;
    norm_gradient(batch.batch, affine.of(batch), grad, in, through, out);
  });
}

}  // namespace den_kernels
