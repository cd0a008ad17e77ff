// Runs the model that export.py made by AOTInductor's C interface alone, where PyTorch's loader of packages does not work.
//
//   ./by_hand model.so kernels/libjitk_ops.so jitk::silu_and_mul
//
// The library is the one in the package (a zip file). The names are those of the ops that it calls, as the .json beside it
// lists them ("target"); their arguments and results are tensors. check.py does all of this.
#include <ATen/Context.h>  // hasCUDA
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <torch/csrc/inductor/aoti_runtime/interface.h>
#include <torch/csrc/inductor/aoti_torch/proxy_executor.h>
#include <torch/csrc/inductor/aoti_torch/tensor_converter.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>  // tensor_handle_to_tensor_pointer

#include <dlfcn.h>

#include <algorithm>  // min
#include <cstdio>
#include <exception>
#include <string>
#include <utility>
#include <vector>

namespace {

// Calls the ops that the generated code does not contain: by their place in the list, results behind the arguments.
class Ops : public torch::aot_inductor::ProxyExecutor {
 public:
  explicit Ops(const std::vector<std::string>& names) {
    for (const std::string& name : names) {  // as jitk::silu_and_mul, or with an overload: jitk::silu_and_mul.out
      const size_t dot = std::min(name.find('.'), name.size());
      const std::string overload = name.substr(std::min(dot + 1, name.size()));
      ops_.push_back(c10::Dispatcher::singleton().findSchemaOrThrow(name.substr(0, dot).c_str(), overload.c_str()));
    }
  }

  void call_function(int index, int, int64_t*, int, AtenTensorHandle* tensors) override {
    const c10::OperatorHandle& op = ops_.at(index);
    const size_t arguments = op.schema().arguments().size();
    std::vector<c10::IValue> stack;
    for (size_t i = 0; i < arguments; ++i)
      stack.emplace_back(*torch::aot_inductor::tensor_handle_to_tensor_pointer(tensors[i]));
    op.callBoxed(stack);
    for (size_t i = 0; i < stack.size(); ++i) {
      *torch::aot_inductor::tensor_handle_to_tensor_pointer(tensors[arguments + i]) = stack[i].toTensor();
    }
  }

 private:
  std::vector<c10::OperatorHandle> ops_;
};

// A function of the model's library.
template <typename Function>
Function* find(void* library, const char* name) {
  void* found = dlsym(library, name);
  TORCH_CHECK(found != nullptr, dlerror());
  return reinterpret_cast<Function*>(found);
}

void run(const std::string& path, const std::vector<std::string>& names) {
  void* library = dlopen(path.c_str(), RTLD_NOW);
  TORCH_CHECK(library != nullptr, dlerror());
  const auto create =
      find<decltype(AOTInductorModelContainerCreateWithDevice)>(library, "AOTInductorModelContainerCreateWithDevice");
  const auto call = find<decltype(AOTInductorModelContainerRun)>(library, "AOTInductorModelContainerRun");
  const auto destroy = find<decltype(AOTInductorModelContainerDelete)>(library, "AOTInductorModelContainerDelete");

  const at::Device device = at::hasCUDA() ? at::kCUDA : at::kCPU;
  const at::Tensor x = at::arange(32, at::dtype(at::kFloat).device(device)).view({2, 16}).div(16);
  Ops ops(names);
  AOTInductorModelContainerHandle model = nullptr;
  const std::string folder = path.substr(0, path.find_last_of('/'));  // the kernels of Triton are there
  TORCH_CHECK(create(&model, 1, device.str().c_str(), folder.c_str()) == 0, "the model's library cannot be set up");
  std::vector<AtenTensorHandle> inputs = torch::aot_inductor::unsafe_alloc_new_handles_from_tensors({x});
  AtenTensorHandle output = nullptr;
  // The null stream is the one that PyTorch works on unless it is told otherwise.
  TORCH_CHECK(call(model, inputs.data(), 1, &output, 1, nullptr, reinterpret_cast<AOTIProxyExecutorHandle>(&ops)) == 0,
              "the model failed");
  const at::Tensor y = torch::aot_inductor::alloc_tensors_by_stealing_from_handles(&output, 1)[0].cpu();
  printf("c++:");
  for (int64_t i = 0; i < y.numel(); ++i) printf(" %.5f", y[i].item<float>());
  printf("\n");
  TORCH_CHECK(destroy(model) == 0, "the model cannot be freed");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: by_hand /path/to/model.so libjitk_ops.so [op...]\n");
    return 2;
  }
  if (dlopen(argv[2], RTLD_NOW) == nullptr) {
    fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  try {
    const c10::InferenceMode mode;
    run(argv[1], {argv + 3, argv + argc});
    return 0;
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
