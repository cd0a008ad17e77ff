// Tells in C++ whether a call wants a gradient: if not, it goes on to the kernel, without Python.
//
//   op call -> differentiate -> no gradient wanted: what comes below autograd for these arguments
//                            \ wanted: the kernel that op.py gave to the alias key Autograd, in Python
//
// Apart from dispatch.cpp, because the stable ABI has no way to go on to the next kernel for the same dispatch keys, which is
// what keeps modes, subclasses and functorch right, and none that lets an exception of Python through. These headers take four
// times as long to compile, so nobody waits for them: until the library is there, the kernel in Python answers alone.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <cstring>  // the text of an error, for C
#include <exception>
#include <list>
#include <vector>

namespace {

bool wants_gradient(const at::Tensor& tensor, bool grad_mode) {
  // The tangent of forward mode; PyTorch has the one level 0.
  return tensor.defined() && ((grad_mode && tensor.requires_grad()) || tensor._fw_grad(0).defined());
}

bool wants_gradient(const c10::IValue& value, bool grad_mode) {
  if (value.isTensor()) return wants_gradient(value.toTensor(), grad_mode);
  if (!value.isTensorList()) return false;
  for (const at::Tensor& tensor : value.toTensorVector()) {
    if (wants_gradient(tensor, grad_mode)) return true;
  }
  return false;
}

void count_as_changed(const at::Tensor& written) {
  if (written.defined() && !written.is_inference()) written.unsafeGetTensorImpl()->bump_version();
}

void differentiate(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const std::vector<c10::Argument>& declared = op.schema().arguments();
  const size_t count = declared.size();
  const c10::IValue* arguments = stack->data() + stack->size() - count;
  const bool grad_mode = c10::GradMode::is_enabled();
  for (size_t i = 0; i < count; ++i) {
    if (wants_gradient(arguments[i], grad_mode)) {
      // The alias key's kernel still serves the one autograd key that belongs to no device.
      op.redispatchBoxed((keys & c10::after_autograd_keyset) | c10::DispatchKeySet(c10::DispatchKey::AutogradOther), stack);
      return;
    }
  }
  // What autograd has saved of a tensor that is written must not be taken for what it was.
  for (size_t i = 0; i < count; ++i) {
    const c10::AliasInfo* alias = declared[i].alias_info();
    if (alias == nullptr || !alias->isWrite()) continue;
    if (arguments[i].isTensor()) count_as_changed(arguments[i].toTensor());
    if (!arguments[i].isTensorList()) continue;
    for (const at::Tensor& written : arguments[i].toTensorVector()) count_as_changed(written);
  }
  const at::AutoDispatchBelowAutograd below;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

}  // namespace

// Whether any tensor can have a tangent. Python cannot tell: compiled graphs enter the level without torch.autograd.forward_ad.
extern "C" __attribute__((visibility("default"))) bool jitk_in_forward_mode() {
  return torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

// Throws what Python has kept of this thread's failure: an exception of a kernel in Python goes through C++ as it is.
extern "C" __attribute__((visibility("default"))) void jitk_raise() {
  static const c10::OperatorHandle raise = c10::Dispatcher::singleton().findSchemaOrThrow("jitk::_raise", "");
  torch::jit::Stack none;
  raise.callBoxed(&none);
}

// Puts `differentiate` before the kernels of an overload on the CPU and on CUDA, for good.
extern "C" __attribute__((visibility("default"))) int jitk_differentiate(const char* op, const char* overload, char* error,
                                                                         size_t capacity) {
  static auto* registered = new std::list<c10::RegistrationHandleRAII>;  // never freed: dropping one takes its kernel away
  try {
    for (const c10::DispatchKey key : {c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradCUDA}) {
      registered->push_back(c10::Dispatcher::singleton().registerImpl(
          {op, overload}, key, c10::KernelFunction::makeFromBoxedFunction<&differentiate>(), std::nullopt, nullptr, __FILE__));
    }
    return 0;
  } catch (const std::exception& problem) {
    strncpy(error, problem.what(), capacity - 1);
    error[capacity - 1] = '\0';
    return 1;
  }
}
