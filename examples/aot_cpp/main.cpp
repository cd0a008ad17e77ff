// Runs the model that export.py made, in a process without Python.
//
//   ./main model.pt2 kernels/libjitk_ops.so
#include <ATen/Context.h>  // hasCUDA
#include <ATen/ops/arange.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>  // AOTIModelPackageLoader

#include <dlfcn.h>

#include <cstdio>
#include <exception>

int main(int argc, char** argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: main model.pt2 libjitk_ops.so\n");
    return 2;
  }
  // Before the model: it looks its ops up when it is loaded.
  if (dlopen(argv[2], RTLD_NOW) == nullptr) {
    fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  try {
    const c10::InferenceMode mode;
    torch::inductor::AOTIModelPackageLoader loader(argv[1]);
    const at::Device device = at::hasCUDA() ? at::kCUDA : at::kCPU;
    const at::Tensor x = at::arange(32, at::dtype(at::kFloat).device(device)).view({2, 16}).div(16);
    const at::Tensor y = loader.run({x})[0].cpu();
    printf("c++:");
    for (int64_t i = 0; i < y.numel(); ++i) printf(" %.5f", y[i].item<float>());
    printf("\n");
    return 0;
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
