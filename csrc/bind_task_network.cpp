// Networks of several tasks in Python: handles that hold the weights.
#include "bind.h"

#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <utility>

#include "bind_dense_conv.h"
#include "bind_operands.h"
#include "bind_trunk.h"
#include "task_network.h"

namespace py = pybind11;

namespace den_kernels {
namespace {

constexpr char op[] = "task_network";

template <class T>
struct Of {  // one of the two dtypes of a handle
  template <class Handle>
  static auto& of(Handle& handle) {
    if constexpr (std::is_same_v<T, float>)
      return handle.floats;
    else
      return handle.halves;
  }
};

// weight [O, I, R, S] channels-last, shape and memory for it packed.
void pack_dense_weight(const std::array<int64_t, 6>& shape, py::handle weight, py::handle packed) {
  const Tensor from(weight, op, "weight"), to(packed, op, "packed");
  const auto run = [&](auto conv, auto zero) {
    using T = decltype(zero);
    const T* values = from.maps<const T>({conv.C_out, conv.C, conv.R, conv.S});
    pack_dense(conv, values, to.dense<T>({dense_packed_size(conv)}));
  };
  from.is<bf16>() ? run(conv_of<DenseConv<bf16>>(shape), bf16{}) : run(conv_of<DenseConv<float>>(shape), 0.f);
}

// weight [O, C], bias [O] of a fully connected layer, and scale and shift [C] of a norm before it, or None.
struct HeadHandle {
  std::array<py::object, 4> tensors;
  bool half;
  int64_t C, O;
  Head<float> floats{};
  Head<bf16> halves{};

  explicit HeadHandle(std::array<py::object, 4> weights)
      : tensors(std::move(weights)), half(Tensor(tensors[0], op, "weight").is<bf16>()) {
    const Tensor weight(tensors[0], op, "weight");
    weight.require(weight.dim() == 2, "[O, C]");
    O = weight.size(0), C = weight.size(1);
    half ? fill(halves) : fill(floats);
  }
  template <class T>
  void fill(Head<T>& head) {
    head.C = C, head.O = O;
    head.weight = Tensor(tensors[0], op, "weight").dense<const T>({O, C});
    head.bias = Tensor(tensors[1], op, "bias").dense<const T>({O});
    head.scale = dense_or_null<const float>(tensors[2], op, "scale", {C});
    head.shift = dense_or_null<const float>(tensors[3], op, "shift", {C});
    check(!head.scale == !head.shift, op, "scale and shift", "both tensors or both None", "one of them");
  }
};

// For each row of logits [B, N, L] the first of its largest values, or of its NaNs, as torch.argmax has it.
template <class T>
void choose(const T* logits, int64_t rows, int64_t L, int64_t* chosen) {
  for (int64_t i = 0; i < rows; ++i, logits += L) {
    int64_t best = 0;
    for (int64_t l = 1; l < L; ++l) {
      const float v = widen(logits[l]), most = widen(logits[best]);
      if (v > most || (v != v && most == most)) best = l;
    }
    chosen[i] = best;
  }
}

// A stem and a head for each task around a trunk, or around plain convolutions.
struct TaskNetworkHandle {
  py::list stems, convs, heads;  // DenseConvHandle, DenseConvHandle, HeadHandle: they hold the weights
  py::object trunk;              // TrunkHandle, or None
  bool half = false;
  const TrunkHandle* blocks = nullptr;

  TaskNetworkHandle(py::list each_stem, py::object body, py::list each_head)
      : stems(std::move(each_stem)), heads(std::move(each_head)), trunk(py::none()) {
    check(!stems.empty() && stems.size() == heads.size(), op, "stems and heads", "one of each for every task",
          heads.size());
    if (py::isinstance<TrunkHandle>(body)) {
      trunk = std::move(body);
      blocks = &trunk.cast<const TrunkHandle&>();
      check(blocks->scales || blocks->ends_in_relu(), op, "trunk",
            "of blocks with a norm or a ReLU behind the last one", "one without");
    } else {
      convs = body.cast<py::list>();
    }
    half = stems[0].cast<const DenseConvHandle&>().half;
    half ? check_layers<bf16>() : check_layers<float>();
  }

  // parts: (task, images [B_k, C, H, W] channels-last) for each; levels: int32 [N, B] or int64 [B, N] of a trunk, or
  // None; logits: [B_k, O] for each part, or None where only the levels with the largest logits are asked for;
  // chosen: int64 [B, N] for these, or None.
  void run(const py::list& parts, py::handle levels, const std::optional<py::list>& logits, py::handle chosen) const {
    half ? run_as<bf16>(parts, levels, logits, chosen) : run_as<float>(parts, levels, logits, chosen);
  }

 private:
  template <class T, class Handle>
  static const auto& layer(const py::list& list, size_t i) {
    return Of<T>::of(list[i].cast<const Handle&>());
  }

  template <class T>
  void check_layers() const {
    for (size_t k = 0; k < stems.size(); ++k) {
      const auto& stem = stems[k].cast<const DenseConvHandle&>();
      const auto& head = heads[k].cast<const HeadHandle&>();
      check(stem.half == half && head.half == half, op, "layers", "of one dtype", "two");
      int64_t channels = layer<T, DenseConvHandle>(stems, k).C_out;
      for (size_t i = 0; i < convs.size(); ++i) {
        const DenseConv<T>& conv = layer<T, DenseConvHandle>(convs, i);
        check(convs[i].cast<const DenseConvHandle&>().half == half, op, "layers", "of one dtype", "two");
        check(conv.C == channels, op, "input channels", "those of the layer before", conv.C);
        channels = conv.C_out;
      }
      if (blocks) {
        check(blocks->half == half, op, "layers", "of one dtype", "two");
        check(blocks->in_channels == channels, op, "the trunk's input channels", "those of each stem",
              blocks->in_channels);
        channels = blocks->channels;
      }
      check(head.C == channels, op, "a head's input channels", "those of the layer before", head.C);
    }
  }

  template <class T>
  TaskPart<T> part_of(const py::tuple& given) const {
    const int64_t task = given[0].cast<int64_t>();
    check(task >= 0 && task < static_cast<int64_t>(stems.size()), op, "task", "one of the tasks", task);
    TaskPart<T> part{};
    part.stem = &layer<T, DenseConvHandle>(stems, static_cast<size_t>(task));
    part.head = &layer<T, HeadHandle>(heads, static_cast<size_t>(task));
    const Tensor images(given[1], op, "images");
    part.images = images.maps<const T>({any_size, part.stem->C, any_size, any_size});
    part.count = images.size(0), part.H = images.size(2), part.W = images.size(3);
    check(part.stem->out(part.H, part.stem->R) >= 1 && part.stem->out(part.W, part.stem->S) >= 1, op, "images",
          "at least as large as the stem's kernel", images.text());
    return part;
  }

  template <class T>
  void run_as(const py::list& given, py::handle levels, const std::optional<py::list>& logits,
              py::handle chosen) const {
    TaskNetwork<T> network{};
    int64_t B = 0;
    check(!given.empty() && (!logits || given.size() == logits->size()), op, "parts and logits",
          "as many, at least one", logits ? logits->size() : given.size());
    check(logits || !chosen.is_none(), op, "logits or chosen", "given", "neither");
    for (size_t k = 0; k < given.size(); ++k) {
      network.parts.push_back(part_of<T>(given[k].cast<py::tuple>()));
      const TaskPart<T>&first = network.parts.front(), &part = network.parts.back();
      check(part.stem->C_out == first.stem->C_out && side(part, 0) == side(first, 0) && side(part, 1) == side(first, 1),
            op, "images", "of sizes whose stems make maps of one size", side(part, 0));
      B += part.count;
    }
    std::vector<T> unasked;
    place_logits(network.parts, logits, unasked);
    int64_t H = side(network.parts[0], 0), W = side(network.parts[0], 1);
    for (size_t i = 0; i < convs.size(); ++i) {
      const DenseConv<T>& conv = layer<T, DenseConvHandle>(convs, i);
      H = conv.out(H, conv.R), W = conv.out(W, conv.S);
      check(H >= 1 && W >= 1, op, "images", "large enough for all convolutions", H);
      network.convs.push_back(&conv);
    }
    Trunk<T> shared{};
    std::vector<int32_t> own;
    if (blocks) {
      shared.blocks = &blocks->blocks<T>(), shared.G = blocks->G;
      shared.scale = blocks->scales, shared.shift = blocks->shifts, shared.shortcuts = blocks->convs<T>();
      shared.levels = levels_of(levels, B, own);
      network.trunk = &shared;
    } else {
      check(levels.is_none(), op, "levels", "None without a trunk", "a tensor");
    }
    const Choice choice = choice_of(network.parts, chosen, B);
    py::gil_scoped_release unlocked;
    run_task_network(network);
    int64_t* next = choice.chosen;
    for (const TaskPart<T>& part : network.parts) {
      if (!next) break;
      choose(part.logits, part.count * choice.N, part.head->O / choice.N, next);
      next += part.count * choice.N;
    }
  }

  // Where the logits of each part go: to those that were given, or to `own` memory.
  template <class T>
  static void place_logits(std::vector<TaskPart<T>>& parts, const std::optional<py::list>& given, std::vector<T>& own) {
    int64_t values = 0;
    for (const TaskPart<T>& part : parts) values += part.count * part.head->O;
    if (!given) own.resize(static_cast<size_t>(values));
    T* next = own.data();
    for (size_t k = 0; k < parts.size(); ++k) {
      TaskPart<T>& part = parts[k];
      part.logits = given ? Tensor((*given)[k], op, "logits").dense<T>({part.count, part.head->O}) : next;
      if (!given) next += part.count * part.head->O;
    }
  }

  template <class T>
  static int64_t side(const TaskPart<T>& part, int axis) {
    return axis ? part.stem->out(part.W, part.stem->S) : part.stem->out(part.H, part.stem->R);
  }

  void refuse_level(int64_t level, int64_t instance, int64_t block) const {
    const auto text = [](int64_t number) { return std::to_string(number); };
    check(false, op, "levels", ("in 0.." + text(blocks->G)).c_str(),
          text(level) + " for instance " + text(instance) + ", block " + text(block));
  }

  // Levels [N, B], of int64 [B, N] copied into `own`.
  const int32_t* levels_of(py::handle levels, int64_t B, std::vector<int32_t>& own) const {
    const Tensor tensor(levels, op, "levels");
    const int64_t N = static_cast<int64_t>(blocks->handles.size());
    if (!tensor.is<int64_t>()) {
      const int32_t* found = tensor.dense<const int32_t>({N, B});
      blocks->check_levels(found, N * B);
      return found;
    }
    const int64_t* rows = tensor.dense<const int64_t>({B, N});
    own.resize(static_cast<size_t>(N * B));
    for (int64_t i = 0; i < B * N; ++i) {
      if (rows[i] < 0 || rows[i] > blocks->G) refuse_level(rows[i], i / N, i % N);
      own[i % N * B + i / N] = static_cast<int32_t>(rows[i]);
    }
    return own.data();
  }

  struct Choice {
    int64_t* chosen;
    int64_t N;
  };
  template <class T>
  static Choice choice_of(const std::vector<TaskPart<T>>& parts, py::handle chosen, int64_t B) {
    if (chosen.is_none()) return {nullptr, 1};
    const Tensor tensor(chosen, op, "chosen");
    int64_t* to = tensor.dense<int64_t>({B, any_size});
    const int64_t N = tensor.size(1);
    for (const TaskPart<T>& part : parts)
      check(N >= 1 && part.head->O % N == 0, op, "chosen", "of blocks that share a head's outputs", N);
    return {to, N};
  }
};

}  // namespace

void bind_task_network(py::module_& m) {
  m.def(
      "dense_packed_size",
      [](const std::array<int64_t, 6>& shape, bool half) {
        return half ? dense_packed_size(conv_of<DenseConv<bf16>>(shape))
                    : dense_packed_size(conv_of<DenseConv<float>>(shape));
      },
      "Values of the packed weight of a convolution (C, C_out, R, S, stride, padding), of bfloat16 or float32.");
  m.def("pack_dense", &pack_dense_weight,
        "(C, C_out, R, S, stride, padding), weight [C_out, C, R, S] channels-last, packed.");
  py::class_<DenseConvHandle>(
      m, "DenseConv",
      "(C, C_out, R, S, stride, padding), packed weight, bias [C_out], its ReLU, (size, stride, "
      "padding) of a max pooling or (0, 1, 0).")
      .def(py::init<std::array<int64_t, 6>, py::object, py::object, bool, std::array<int64_t, 3>>(), py::arg("shape"),
           py::arg("weight"), py::arg("bias"), py::arg("relu") = true,
           py::arg("pool") = std::array<int64_t, 3>{0, 1, 0});
  py::class_<HeadHandle>(m, "Head", "(weight [O, C], bias [O], scale and shift [C] of the inputs or None)")
      .def(py::init<std::array<py::object, 4>>());
  py::class_<TaskNetworkHandle>(m, "TaskNetwork",
                                "DenseConv of each task; a Trunk, or a list of DenseConv; Head of each task.")
      .def(py::init<py::list, py::object, py::list>())
      .def("__call__", &TaskNetworkHandle::run,
           "(task, images [B_k, C, H, W] channels-last) of each part; levels int32 [N, B] or int64 [B, N], or None; "
           "logits [B_k, O] of each part, or None; int64 [B, N] for the largest of L = O / N logits, or None.");
}

}  // namespace den_kernels
