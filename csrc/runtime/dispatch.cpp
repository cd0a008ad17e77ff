// The dispatcher runtime: one boxed kernel that serves every op on every backend, and the only C++ here that knows PyTorch.
//
//   op call -> trampoline<slot> -> read arguments -> key -> table -> Entry of the variant
//                                                            \ miss: jitk::_build, a Python op, compiles or loads the variant
//
// It is written against PyTorch's stable C ABI, whose boxed kernels are plain function pointers without a closure: hence a
// table of trampolines, each of which knows its number. No CUDA header: what it needs of CUDA it asks of PyTorch.
// A hit takes no lock and runs no Python: a table gets new entries while it is read, and one that is full is replaced by one of
// twice the size and stays for its readers, so a reader never waits.
#include <jitk/abi.h>

#include "overlap.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/version.h>

#include <dlfcn.h>    // symbols that only a CUDA build of PyTorch has
#include <pthread.h>  // fork

#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

// What the stable ABI has no function for: a written tensor counts as changed. PyTorch has exported both for years; null in one
// that does not.
namespace at {
class Tensor;
}
namespace c10 {
struct InferenceMode {
  __attribute__((weak)) static bool is_enabled();
};
}  // namespace c10
namespace torch::autograd::impl {
__attribute__((weak)) void bump_version(const at::Tensor& tensor);
}

namespace {

using jitk::Value;
using jitk::ValueKind;

#define JITK_MAX_SLOTS 16384  // (op overload, backend) pairs; also for the assembler, and MAX_SLOTS of runtime.py
constexpr int32_t kMaxSlots = JITK_MAX_SLOTS;
constexpr int32_t kMaxArguments = 32;
constexpr int32_t kMaxResults = 8;
constexpr int32_t kMaxKeyParts = 16;

thread_local std::string reported_error;

void check(AOTITorchError status, const char* what) {
  if (status != AOTI_TORCH_SUCCESS) throw std::runtime_error(std::string("PyTorch failed to ") + what);
}

// --- dtypes and devices: PyTorch's numbers are asked for once, as they are not part of its ABI ---

struct Numbering {
  static constexpr int32_t kCount = 64;
  jitk::DLDataType dlpack[kCount] = {};
  int32_t cpu = aoti_torch_device_type_cpu();
  int32_t cuda = aoti_torch_device_type_cuda();

  Numbering() {
    add(aoti_torch_dtype_bool(), jitk::kDLBool, 8);
    add(aoti_torch_dtype_uint8(), jitk::kDLUInt, 8);
    add(aoti_torch_dtype_uint16(), jitk::kDLUInt, 16);
    add(aoti_torch_dtype_uint32(), jitk::kDLUInt, 32);
    add(aoti_torch_dtype_uint64(), jitk::kDLUInt, 64);
    add(aoti_torch_dtype_int8(), jitk::kDLInt, 8);
    add(aoti_torch_dtype_int16(), jitk::kDLInt, 16);
    add(aoti_torch_dtype_int32(), jitk::kDLInt, 32);
    add(aoti_torch_dtype_int64(), jitk::kDLInt, 64);
    add(aoti_torch_dtype_float16(), jitk::kDLFloat, 16);
    add(aoti_torch_dtype_bfloat16(), jitk::kDLBfloat, 16);
    add(aoti_torch_dtype_float32(), jitk::kDLFloat, 32);
    add(aoti_torch_dtype_float64(), jitk::kDLFloat, 64);
    add(aoti_torch_dtype_complex32(), jitk::kDLComplex, 32);
    add(aoti_torch_dtype_complex64(), jitk::kDLComplex, 64);
    add(aoti_torch_dtype_complex128(), jitk::kDLComplex, 128);
    add(aoti_torch_dtype_float8_e4m3fn(), jitk::kDLFloat8_e4m3fn, 8);
    add(aoti_torch_dtype_float8_e4m3fnuz(), jitk::kDLFloat8_e4m3fnuz, 8);
    add(aoti_torch_dtype_float8_e5m2(), jitk::kDLFloat8_e5m2, 8);
    add(aoti_torch_dtype_float8_e5m2fnuz(), jitk::kDLFloat8_e5m2fnuz, 8);
    add(torch_dtype_float8_e8m0fnu(), jitk::kDLFloat8_e8m0fnu, 8);
  }

  void add(int32_t torch, uint8_t code, uint8_t bits) {
    if (torch >= 0 && torch < kCount) dlpack[torch] = {code, bits, 1};
  }

  jitk::DLDataType from_torch(int32_t dtype) const {
    return dtype >= 0 && dtype < kCount ? dlpack[dtype] : jitk::DLDataType{255, 0, 0};
  }

  int32_t to_torch(jitk::DLDataType dtype) const {
    for (int32_t i = 0; i < kCount; ++i) {
      if (dlpack[i] == dtype && dlpack[i].bits != 0) return i;
    }
    throw std::runtime_error("PyTorch has no dtype for DLPack code " + std::to_string(dtype.code) + " with " +
                             std::to_string(dtype.bits) + " bits");
  }
};

const Numbering numbering;

// --- Python, on the slow paths -------------------------------------------------------------------

StableIValue from_int(int64_t value) {
  StableIValue cell;
  memcpy(&cell, &value, sizeof(cell));
  return cell;
}

StableIValue from_ints(const int64_t* values, int64_t count) {
  StableListHandle list;
  check(torch_new_list_reserve_size(static_cast<size_t>(count), &list), "make a list");
  for (int64_t i = 0; i < count; ++i) check(torch_list_push_back(list, from_int(values[i])), "fill a list");
  return reinterpret_cast<StableIValue>(list);
}

std::string take_string(StableIValue cell) {
  const auto handle = reinterpret_cast<StringHandle>(cell);
  const char* text = nullptr;
  size_t length = 0;
  torch_string_length(handle, &length);
  torch_string_c_str(handle, &text);
  std::string result(text, length);
  torch_delete_string(handle);
  return result;
}

// --- what variants may ask for -------------------------------------------------------------------

void report_error(const char* text, size_t length) { reported_error.assign(text, length); }

using CurrentStream = AOTITorchError (*)(int32_t, void**);

CurrentStream find_current_stream() {
  // Loaded privately by PyTorch, so invisible to a plain dlsym, and absent from a CPU build.
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr : reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

int current_stream(int32_t device_id, void** stream) {
  static const CurrentStream ask = find_current_stream();
  if (ask != nullptr && ask(device_id, stream) == AOTI_TORCH_SUCCESS) return 0;
  reported_error = ask == nullptr ? "this build of PyTorch has no CUDA" : "PyTorch could not tell the current CUDA stream";
  return 1;
}

void view_of(AtenTensorHandle tensor, jitk::TensorView* view) {
  int64_t ndim = 0;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  int32_t dtype = 0, device_type = 0, device_index = 0;
  if (aoti_torch_get_dim(tensor, &ndim) != 0 || aoti_torch_get_sizes(tensor, &sizes) != 0 ||
      aoti_torch_get_strides(tensor, &strides) != 0 || aoti_torch_get_dtype(tensor, &dtype) != 0 ||
      aoti_torch_get_device_type(tensor, &device_type) != 0 || aoti_torch_get_device_index(tensor, &device_index) != 0) {
    throw std::runtime_error("PyTorch could not describe a tensor: it may be sparse or have no storage");
  }
  view->sizes_ = sizes;
  view->strides_ = strides;
  view->ndim_ = static_cast<int32_t>(ndim);
  view->dtype_ = numbering.from_torch(dtype);
  if (device_type == numbering.cuda) {
    view->device_ = {jitk::kDLCUDA, device_index};
  } else if (device_type == numbering.cpu) {
    view->device_ = {jitk::kDLCPU, 0};
  } else {
    view->device_ = {jitk::kDLExtDev, device_index};
  }
}

// The reason for a failed allocation does not pass the C ABI. Python tries the same and keeps the text.
std::string explain_allocation(const int64_t* sizes, int32_t ndim, jitk::DLDataType dtype, jitk::DLDevice device) {
  const int32_t cuda_index = device.device_type == jitk::kDLCUDA ? device.device_id : -1;
  StableIValue stack[3] = {from_ints(sizes, ndim), from_int(dtype.code << 8 | dtype.bits), from_int(cuda_index)};
  if (torch_call_dispatcher("jitk::_explain_allocation", "", stack, TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) {
    return "PyTorch could not allocate the output";
  }
  return take_string(stack[0]);
}

int allocate(const int64_t* sizes, int32_t ndim, jitk::DLDataType dtype, jitk::DLDevice device, void** handle,
             jitk::TensorView* view) {
  try {
    int64_t strides[64];
    if (ndim > 64) throw std::runtime_error("a tensor has at most 64 dimensions");
    int64_t step = 1;
    for (int32_t i = ndim - 1; i >= 0; --i) {
      strides[i] = step;
      step *= sizes[i] > 1 ? sizes[i] : 1;
    }
    const int32_t torch_dtype = numbering.to_torch(dtype);
    const int32_t device_type = device.device_type == jitk::kDLCUDA ? numbering.cuda : numbering.cpu;
    AtenTensorHandle tensor = nullptr;
    if (aoti_torch_empty_strided(ndim, sizes, strides, torch_dtype, device_type, device.device_id, &tensor) !=
        AOTI_TORCH_SUCCESS) {
      reported_error = explain_allocation(sizes, ndim, dtype, device);
      return 1;
    }
    *handle = tensor;
    int64_t* tensor_sizes = nullptr;
    int64_t* tensor_strides = nullptr;
    check(aoti_torch_get_sizes(tensor, &tensor_sizes), "give the sizes of a tensor");
    check(aoti_torch_get_strides(tensor, &tensor_strides), "give the strides of a tensor");
    check(torch_get_mutable_data_ptr(tensor, &view->data_), "give the memory of a tensor");
    view->sizes_ = tensor_sizes;
    view->strides_ = tensor_strides;
    view->ndim_ = ndim;
    view->dtype_ = dtype;
    view->device_ = device;
    view->name_ = nullptr;
    return 0;
  } catch (const std::exception& error) {
    reported_error = error.what();
    return 1;
  }
}

void release(void* handle) { aoti_torch_delete_tensor_object(static_cast<AtenTensorHandle>(handle)); }

int parallel_for(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  struct Work {
    void (*body)(void*, int64_t, int64_t);
    void* context;
  } work{body, context};
  const auto run = [](int64_t begin, int64_t end, void* data) {
    const Work& mine = *static_cast<const Work*>(data);
    mine.body(mine.context, begin, end);
  };
  if (torch_parallel_for(0, count, grain < 1 ? 1 : grain, run, &work) == AOTI_TORCH_SUCCESS) return 0;
  reported_error = "PyTorch's parallel_for failed";
  return 1;
}

const jitk::HostApi host{jitk::kAbiVersion, 0, report_error, current_stream, allocate, release, parallel_for};

// --- slots: what is known of an op overload on a backend -----------------------------------------

struct Argument {
  char kind;  // T i f b s l, as in export.h
  bool optional;
  bool written;
  bool reusable;  // read, but a written argument may take its place (overlap.h)
  bool returned;  // an output that the schema returns
  bool passed;    // to the C++ function; a value that is a template argument is not
  int32_t place;  // among the values: those that are passed come first
  std::string name;
  std::vector<std::string> choices;  // of a str
};

struct KeyPart {
  enum What { kDType, kSize, kDim, kValue } what;
  int32_t argument;
  int64_t dim;
};

struct Variant {
  std::vector<int64_t> key;
  jitk::Entry entry;  // null: no kernel can serve this key here, so the op's reference does
};

// Half of its cells at most are taken, so that a search ends at an empty one.
struct Table {
  explicit Table(size_t size) : mask(size - 1), cells(size) {}
  size_t mask;
  std::vector<std::atomic<const Variant*>> cells;
};

uint64_t hash(const int64_t* key, int32_t count) {
  uint64_t state = 0x9e3779b97f4a7c15u;
  for (int32_t i = 0; i < count; ++i) {
    state = (state ^ static_cast<uint64_t>(key[i])) * 0xff51afd7ed558ccdu;
    state ^= state >> 32;
  }
  return state;
}

struct Slot {
  int64_t asks = 0;  // what jitk::_build knows it by
  int32_t number = 0;
  std::string name;       // jitk::silu_and_mul.out
  std::string reference;  // jitk::_reference_silu_and_mul_out
  bool on_cuda = false;
  bool writes = false;
  int32_t results = 0;   // of the C++ function
  int32_t returned = 0;  // outputs that follow them
  int32_t passed = 0;
  std::vector<Argument> arguments;
  std::vector<KeyPart> key;

  std::atomic<Table*> table{new Table(2)};
  size_t variants = 0;

  int32_t key_size() const { return static_cast<int32_t>(key.size()) + 1; }

  const Variant* find(const int64_t* wanted) const {
    const Table& now = *table.load(std::memory_order_acquire);
    for (size_t at = hash(wanted, key_size());; ++at) {
      const Variant* variant = now.cells[at & now.mask].load(std::memory_order_acquire);
      if (variant == nullptr || memcmp(variant->key.data(), wanted, sizeof(int64_t) * static_cast<size_t>(key_size())) == 0)
        return variant;
    }
  }

  // The first entry for a key stays: a thread that lost a race uses the winner's.
  const Variant* add(const int64_t* wanted, jitk::Entry entry);

 private:
  void insert(Table& into, const Variant* variant) const {
    size_t at = hash(variant->key.data(), key_size());
    while (into.cells[at & into.mask].load(std::memory_order_relaxed) != nullptr) ++at;
    into.cells[at & into.mask].store(variant, std::memory_order_release);
  }
};

// Held by whoever changes a table or registers a kernel, and by a fork: the child finds all of it whole, and PyTorch's own lock
// for registrations free.
std::mutex changes;

const Variant* Slot::add(const int64_t* wanted, jitk::Entry entry) {
  const std::lock_guard<std::mutex> lock(changes);
  if (const Variant* known = find(wanted)) return known;
  Table* now = table.load(std::memory_order_relaxed);
  if (2 * (variants + 1) > now->mask + 1) {
    auto* grown = new Table(2 * (now->mask + 1));  // those before are never freed: together they are smaller than it
    for (const auto& cell : now->cells) {
      if (const Variant* one = cell.load(std::memory_order_relaxed)) insert(*grown, one);
    }
    table.store(now = grown, std::memory_order_release);
  }
  const auto* variant = new Variant{{wanted, wanted + key_size()}, entry};
  insert(*now, variant);
  ++variants;
  return variant;
}

std::atomic<Slot*> slots[kMaxSlots];

// --- one call ------------------------------------------------------------------------------------

// "[4, 64]"
std::string text_of(const int64_t* numbers, int32_t count) {
  std::string text = "[";
  for (int32_t i = 0; i < count; ++i) text += (i == 0 ? "" : ", ") + std::to_string(numbers[i]);
  return text + "]";
}

// "'out' [4, 32] with strides [64, 1]"
std::string text_of(const jitk::TensorView& view) {
  return std::string("'") + view.name_ + "' " + text_of(view.sizes_, view.ndim_) + " with strides " +
         text_of(view.strides_, view.ndim_);
}

// Reads the arguments off PyTorch's stack, and frees what the stack owns, read or not.
class Call {
 public:
  Call(const Slot& slot, StableIValue* stack) : slot_(slot), stack_(stack) {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call() {
    for (size_t i = 0; owns_stack_ && i < slot_.arguments.size(); ++i) free(static_cast<int32_t>(i));
  }

  // Apart from the constructor, so that what was read is freed when reading throws.
  void read() {
    key_[0] = -1;
    const auto count = static_cast<int32_t>(slot_.arguments.size());
    for (int32_t i = 0; i < count; ++i) read(i);
    for (size_t i = 0; i < slot_.key.size(); ++i) key_[i + 1] = key_part(slot_.key[i]);
    if (slot_.writes) refuse_overlap();
  }

  // Inference mode leaves out what bumps versions elsewhere, which is autograd.cpp or autograd.py. Its own tensors have none.
  void count_as_changed() const {
    if (&c10::InferenceMode::is_enabled == nullptr || &torch::autograd::impl::bump_version == nullptr) return;
    if (!c10::InferenceMode::is_enabled()) return;
    for (size_t i = 0; i < slot_.arguments.size(); ++i) {
      if (written(i) != nullptr)
        torch::autograd::impl::bump_version(*reinterpret_cast<const at::Tensor*>(inner(static_cast<int32_t>(i))));
    }
  }

  const int64_t* key() const { return key_; }
  const Value* values() const { return values_; }
  int32_t device_id() const { return device_id_; }
  // From here on somebody else frees the stack.
  void abandon() { owns_stack_ = false; }

  // The outputs that the schema returns are the caller's own: what was theirs on the stack becomes the result.
  void hand_over(StableIValue* made) {
    for (size_t i = 0; slot_.returned > 0 && i < slot_.arguments.size(); ++i) {
      if (slot_.arguments[i].returned) *made++ = stack_[i];
    }
    handed_over_ = true;
  }

 private:
  StableIValue inner(int32_t i) const {
    return slot_.arguments[static_cast<size_t>(i)].optional ? *reinterpret_cast<StableIValue*>(stack_[i]) : stack_[i];
  }

  void read(int32_t i) {
    const Argument& argument = slot_.arguments[static_cast<size_t>(i)];
    Value& value = values_[argument.place];
    value.length = 0;
    value.integer = 0;
    if (argument.optional && stack_[i] == 0) {
      value.kind = ValueKind::kNone;
      return;
    }
    const StableIValue cell = inner(i);
    switch (argument.kind) {
      case 'T': read_tensor(argument, reinterpret_cast<AtenTensorHandle>(cell), value, views_[i]); break;
      case 'i':
        value.kind = ValueKind::kInt;
        memcpy(&value.integer, &cell, sizeof(value.integer));
        break;
      case 'f':
        value.kind = ValueKind::kFloat;
        memcpy(&value.number, &cell, sizeof(value.number));
        break;
      case 'b':
        value.kind = ValueKind::kBool;
        memcpy(&value.boolean, &cell, sizeof(value.boolean));
        break;
      case 's': read_string(argument, reinterpret_cast<StringHandle>(cell), value); break;
      default: read_list(reinterpret_cast<StableListHandle>(cell), value); break;
    }
  }

  void read_tensor(const Argument& argument, AtenTensorHandle tensor, Value& value, jitk::TensorView& view) {
    view_of(tensor, &view);
    view.name_ = argument.name.c_str();
    // A read must not materialise a copy-on-write tensor.
    const AOTITorchError status = argument.written ? torch_get_mutable_data_ptr(tensor, &view.data_)
                                                   : torch_get_const_data_ptr(tensor, const_cast<const void**>(&view.data_));
    if (status != AOTI_TORCH_SUCCESS)
      throw std::runtime_error(slot_.name + ": argument '" + argument.name + "' has no storage");
    value.kind = ValueKind::kTensor;
    value.tensor = &view;
    if (slot_.on_cuda && device_id_ < 0 && view.device_.device_type == jitk::kDLCUDA) {
      key_[0] = device_id_ = view.device_.device_id;
    }
  }

  const jitk::TensorView* tensor(size_t i) const {
    const Value& value = values_[slot_.arguments[i].place];
    return value.kind == ValueKind::kTensor ? value.tensor : nullptr;
  }

  const jitk::TensorView* written(size_t i) const { return slot_.arguments[i].written ? tensor(i) : nullptr; }

  // What a kernel writes belongs to one element of one argument; else the result is whatever its threads make of it.
  void refuse_overlap() const {
    const size_t count = slot_.arguments.size();
    for (size_t i = 0; i < count; ++i) {
      const jitk::TensorView* out = written(i);
      if (out == nullptr) continue;
      const overlap::Range range(*out);
      if (!range.nested && overlap::overlaps_itself(*out)) {
        throw std::runtime_error(slot_.name + ": argument '" + out->name_ + "' is written, but its elements overlap\n  " +
                                 why_it_overlaps(*out));
      }
      for (size_t j = 0; j < count; ++j) {
        const jitk::TensorView* other = tensor(j);
        if (j == i || other == nullptr || (j < i && written(j) != nullptr) || !range.meets(overlap::Range(*other))) continue;
        const bool reusable = slot_.arguments[j].reusable;
        if ((reusable && overlap::takes_the_place(*out, *other)) || !overlap::shares_memory(*out, *other)) continue;
        refuse_overlap(*out, *other, reusable);
      }
    }
  }

  static std::string why_it_overlaps(const jitk::TensorView& view) {
    for (int32_t i = 0; i < view.ndim_; ++i) {
      if (view.strides_[i] == 0 && view.sizes_[i] > 1)
        return "dimension " + std::to_string(i) + " has size " + std::to_string(view.sizes_[i]) + " and stride 0";
    }
    return text_of(view);
  }

  [[noreturn]] void refuse_overlap(const jitk::TensorView& out, const jitk::TensorView& other, bool reusable) const {
    const int64_t behind = static_cast<const char*>(out.data_) - static_cast<const char*>(other.data_);
    const std::string bytes = std::to_string(behind < 0 ? -behind : behind) + " bytes ";
    throw std::runtime_error(
        slot_.name + ": argument '" + out.name_ + "' is written, but shares memory with argument '" + other.name_ + "'\n  " +
        text_of(out) + " begins " +
        (behind == 0  ? "where"
         : behind < 0 ? bytes + "before"
                      : bytes + "behind") +
        "\n  " + text_of(other) + (behind == 0 ? " does" : "") + "\n  remedy: memory of its own for one of them" +
        (reusable ? std::string(", or '") + out.name_ + "' exactly in the place of '" + other.name_ + "'" : ""));
  }

  void read_string(const Argument& argument, StringHandle string, Value& value) {
    const char* text = nullptr;
    size_t length = 0;
    check(torch_string_length(string, &length), "read a string");
    check(torch_string_c_str(string, &text), "read a string");
    value.kind = ValueKind::kString;
    value.text = text;
    value.length = static_cast<int32_t>(length);
    if (argument.choices.empty()) return;
    std::string all;
    for (const std::string& choice : argument.choices) {
      if (choice.size() == length && memcmp(choice.data(), text, length) == 0) return;
      all += (all.empty() ? "'" : ", '") + choice + "'";
    }
    throw std::runtime_error(slot_.name + ": argument '" + argument.name + "' must be one of " + all + ", got '" +
                             std::string(text, length) + "'");
  }

  void read_list(StableListHandle list, Value& value) {
    size_t size = 0;
    check(torch_list_size(list, &size), "read a list");
    int64_t* const items = lists_.emplace_back(new int64_t[size + 1]).get();
    for (size_t at = 0; at < size; ++at) {
      StableIValue item;
      check(torch_list_get_item(list, at, &item), "read a list");
      memcpy(items + at, &item, sizeof(item));
    }
    value.kind = ValueKind::kIntList;
    value.list = items;
    value.length = static_cast<int32_t>(size);
  }

  int64_t key_part(const KeyPart& part) const {
    const Argument& argument = slot_.arguments[static_cast<size_t>(part.argument)];
    const Value& value = values_[argument.place];
    if (value.kind == ValueKind::kNone) return INT64_MIN;
    switch (part.what) {
      case KeyPart::kDType: {
        const jitk::DLDataType dtype = value.tensor->dtype_;
        return dtype.code << 8 | dtype.bits;
      }
      case KeyPart::kSize: {
        const int32_t ndim = value.tensor->ndim_;
        const int64_t dim = part.dim < 0 ? part.dim + ndim : part.dim;
        if (dim < 0 || dim >= ndim) {
          throw std::runtime_error(slot_.name + ": argument '" + argument.name + "' has " + std::to_string(ndim) +
                                   " dimensions; dimension " + std::to_string(part.dim) + " is needed to choose the kernel");
        }
        return value.tensor->sizes_[dim];
      }
      case KeyPart::kDim: return value.tensor->ndim_;
      case KeyPart::kValue: break;
    }
    if (value.kind == ValueKind::kBool) return value.boolean ? 1 : 0;
    if (value.kind == ValueKind::kInt) return value.integer;
    for (size_t i = 0; i < argument.choices.size(); ++i) {
      const std::string& choice = argument.choices[i];
      if (choice.size() == static_cast<size_t>(value.length) && memcmp(choice.data(), value.text, choice.size()) == 0) {
        return static_cast<int64_t>(i);
      }
    }
    return -1;
  }

  void free(int32_t i) {
    const Argument& argument = slot_.arguments[static_cast<size_t>(i)];
    if ((argument.optional && stack_[i] == 0) || (argument.returned && handed_over_)) return;
    const StableIValue cell = inner(i);
    if (argument.kind == 'T') aoti_torch_delete_tensor_object(reinterpret_cast<AtenTensorHandle>(cell));
    if (argument.kind == 's') torch_delete_string(reinterpret_cast<StringHandle>(cell));
    if (argument.kind == 'l') torch_delete_list(reinterpret_cast<StableListHandle>(cell));
    if (argument.optional) delete reinterpret_cast<StableIValue*>(stack_[i]);
  }

  const Slot& slot_;
  StableIValue* stack_;
  bool owns_stack_ = true;
  bool handed_over_ = false;
  int32_t device_id_ = -1;
  int64_t key_[kMaxKeyParts + 1];
  Value values_[kMaxArguments];
  jitk::TensorView views_[kMaxArguments];
  std::vector<std::unique_ptr<int64_t[]>> lists_;
};

// Unless there is only one GPU, which Python knows.
bool several_devices = true;

// Makes the tensors' device current, as a kernel's launch, allocation and occupancy queries expect.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device_id) {
    if (device_id < 0 || !several_devices) return;
    int32_t current = -1;
    check(aoti_torch_get_current_device_index(&current), "tell the current device");
    if (current != device_id) check(aoti_torch_create_device_guard(device_id, &guard_), "change the device");
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (guard_ != nullptr) aoti_torch_delete_device_guard(guard_);
  }

 private:
  DeviceGuardHandle guard_ = nullptr;
};

// Raises in Python what jitk::_build or a reference failed with: torch_call_dispatcher loses the exception. autograd.cpp lends
// the function; until it does, callers get a RuntimeError of the same text.
using Raise = void (*)();
std::atomic<Raise> raise_kept{nullptr};

[[noreturn]] void fail(const std::string& text) {
  if (const Raise raise = raise_kept.load(std::memory_order_acquire)) raise();
  throw std::runtime_error(text);
}

// For this call alone: the kernel is being built further down this thread's stack, under a signal handler.
const Variant reference_once{{}, nullptr};

// Python compiles or loads the variant, and answers "entry ADDRESS", "once ADDRESS", "reference" or "error TEXT". One string, because
// torch_call_dispatcher mixes up results of different types (PyTorch 2.11 to 2.13).
const Variant* build(Slot& slot, const int64_t* key) {
  StableIValue stack[2] = {from_int(slot.asks), from_ints(key, slot.key_size())};
  if (torch_call_dispatcher("jitk::_build", "", stack, TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error(slot.name + ": the op jitk::_build failed. It needs Python with torch_jit_ops imported");
  }
  const std::string answer = take_string(stack[0]);
  const size_t space = answer.find(' ');
  const std::string what = answer.substr(0, space);
  if (what == "reference") return &reference_once;
  if (what == "once") {
    thread_local Variant once;
    once.entry = reinterpret_cast<jitk::Entry>(std::stoull(answer.substr(space + 1)));
    return &once;
  }
  if (what != "entry") fail(answer.substr(space + 1));
  return slot.add(key, reinterpret_cast<jitk::Entry>(std::stoull(answer.substr(space + 1))));
}

// Finds the variant of a key that a call has for the first time. Other libraries than Python's set another way: standalone.cpp.
using Miss = const Variant* (*)(Slot& slot, const int64_t* key);
Miss on_miss = build;

// The reference takes over the stack, and returns each result as an optional. If it failed, Python has kept the text.
void run_reference(const Slot& slot, StableIValue* stack, StableIValue* made) {
  StableIValue cells[kMaxArguments + kMaxResults];
  memcpy(cells, stack, sizeof(StableIValue) * slot.arguments.size());
  if (torch_call_dispatcher(slot.reference.c_str(), "", cells, TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error(slot.name + ": the op's reference failed");
  }
  StableIValue error[1];
  check(torch_call_dispatcher("jitk::_take_error", "", error, TORCH_ABI_VERSION), "tell an error");
  const std::string text = take_string(error[0]);
  for (int32_t i = 0; i < slot.results; ++i) {
    auto* cell = reinterpret_cast<StableIValue*>(cells[i]);
    if (cell == nullptr) continue;
    made[i] = *cell;
    delete cell;
  }
  if (!text.empty()) fail(text);
}

// Handles of their own to the outputs that the schema returns, as the reference frees the ones that it gets.
class Returned {
 public:
  Returned(const Slot& slot, const StableIValue* stack, StableIValue* made) : made_(made) {
    for (size_t i = 0; i < slot.arguments.size(); ++i) {
      if (!slot.arguments[i].returned) continue;
      AtenTensorHandle handle = nullptr;
      check(aoti_torch_new_tensor_handle(reinterpret_cast<AtenTensorHandle>(stack[i]), &handle), "hold a tensor");
      made_[count_++] = reinterpret_cast<StableIValue>(handle);
    }
  }
  Returned(const Returned&) = delete;
  Returned& operator=(const Returned&) = delete;
  ~Returned() {
    for (int32_t i = 0; i < count_; ++i) aoti_torch_delete_tensor_object(reinterpret_cast<AtenTensorHandle>(made_[i]));
  }
  void keep() { count_ = 0; }

 private:
  StableIValue* made_;
  int32_t count_ = 0;
};

void dispatch(StableIValue* stack, int32_t number) {
  Slot& slot = *slots[number].load(std::memory_order_acquire);
  StableIValue made[kMaxResults];
  {
    Call call(slot, stack);
    call.read();
    if (slot.writes) call.count_as_changed();
    const DeviceGuard guard(call.device_id());
    const Variant* variant = slot.find(call.key());
    if (__builtin_expect(variant == nullptr, 0)) variant = on_miss(slot, call.key());
    if (__builtin_expect(variant->entry != nullptr, 1)) {
      Value results[kMaxResults];
      if (__builtin_expect(variant->entry(&host, call.values(), slot.passed, results) != 0, 0)) {
        throw std::runtime_error(slot.name + ": " + reported_error);
      }
      for (int32_t i = 0; i < slot.results; ++i) made[i] = reinterpret_cast<StableIValue>(results[i].handle);
      call.hand_over(made + slot.results);
    } else {
      Returned returned(slot, stack, made + slot.results);
      call.abandon();
      run_reference(slot, stack, made);
      returned.keep();
    }
  }
  memcpy(stack, made, sizeof(StableIValue) * static_cast<size_t>(slot.results + slot.returned));
}

}  // namespace

// Trampoline n is `dispatch(stack, n)`, in 16 bytes. As 16384 instantiations of a template they would take 10 s to compile.
extern "C" {
__attribute__((visibility("hidden"), used)) void jitk_dispatch(StableIValue* stack, int32_t number) { dispatch(stack, number); }
__attribute__((visibility("hidden"))) extern const char jitk_trampolines[];
}

#define JITK_TEXT(macro) JITK_TEXT_OF(macro)
#define JITK_TEXT_OF(text) #text

#if defined(__x86_64__)
#define JITK_TRAMPOLINE "movl $jitk_slot, %esi\n jmp jitk_dispatch\n"
#elif defined(__aarch64__)
#define JITK_TRAMPOLINE "mov w1, #jitk_slot\n b jitk_dispatch\n"
#else
#error "no trampolines for this processor: pass a number as the second argument and jump to jitk_dispatch"
#endif

asm(".pushsection .text\n"
    ".balign 16\n"
    ".hidden jitk_trampolines\n"
    ".globl jitk_trampolines\n"
    "jitk_trampolines:\n"
    ".cfi_startproc\n"
    ".set jitk_slot, 0\n"
    ".rept " JITK_TEXT(JITK_MAX_SLOTS) "\n"
    ".balign 16\n" JITK_TRAMPOLINE
    ".set jitk_slot, jitk_slot + 1\n"
    ".endr\n"
    ".cfi_endproc\n"
    ".popsection\n");

namespace {

using Trampoline = void (*)(StableIValue*, uint64_t, uint64_t);

Trampoline trampoline_of(int32_t number) { return reinterpret_cast<Trampoline>(jitk_trampolines + 16 * number); }

// --- registration --------------------------------------------------------------------------------

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t end; (end = text.find(separator, begin)) != std::string::npos; begin = end + 1)
    parts.push_back(text.substr(begin, end - begin));
  parts.push_back(text.substr(begin));
  return parts;
}

// Lines of "arg KIND[?][!][=][<][>] NAME CHOICE,CHOICE", "key ARGUMENT dtype|size|dim|value DIM" and "results COUNT". Made by
// variant.py.
void read_plan(const char* plan, Slot& slot) {
  for (const std::string& line : split(plan, '\n')) {
    const std::vector<std::string> words = split(line, ' ');
    if (words[0] == "arg") {
      const auto has = [&](char flag) { return words[1].find(flag) != std::string::npos; };
      Argument argument{words[1][0], has('?'), has('!'), has('='), has('>'), !has('<'), 0, words[2], {}};
      if (words.size() > 3) argument.choices = split(words[3], ',');
      slot.arguments.push_back(argument);
      slot.returned += argument.returned ? 1 : 0;
      slot.writes = slot.writes || argument.written;
    } else if (words[0] == "key") {
      const auto what = words[2] == "dtype"  ? KeyPart::kDType
                        : words[2] == "size" ? KeyPart::kSize
                        : words[2] == "dim"  ? KeyPart::kDim
                                             : KeyPart::kValue;
      slot.key.push_back({what, std::stoi(words[1]), std::stoll(words[3])});
    } else if (words[0] == "results") {
      slot.results = std::stoi(words[1]);
    }
  }
  for (Argument& argument : slot.arguments) {
    if (argument.passed) argument.place = slot.passed++;
  }
  int32_t place = slot.passed;
  for (Argument& argument : slot.arguments) {
    if (!argument.passed) argument.place = place++;
  }
  if (slot.arguments.size() > kMaxArguments || slot.key.size() > kMaxKeyParts || slot.results + slot.returned > kMaxResults) {
    throw std::runtime_error(slot.name + ": an op has at most " + std::to_string(kMaxArguments) + " arguments, " +
                             std::to_string(kMaxResults) + " results and " + std::to_string(kMaxKeyParts) + " placeholders");
  }
}

// Serves `overload` ("silu_and_mul.out") of `ns` on the dispatch key "CPU" or "CUDA" from now on. Called once for each
// `number`. `who` stands in the texts of errors.
void register_slot(int32_t number, const char* who, const char* ns, const char* overload, const char* dispatch_key,
                   const char* reference, const char* plan) {
  if (number < 0 || number >= kMaxSlots)
    throw std::runtime_error("a process has at most " + std::to_string(kMaxSlots) + " op overloads");
  auto* slot = new Slot;
  slot->number = number;
  slot->asks = number;
  slot->name = who;
  slot->reference = reference;
  slot->on_cuda = strcmp(dispatch_key, "CUDA") == 0;
  read_plan(plan, *slot);
  slots[number].store(slot, std::memory_order_release);

  static const int forks = pthread_atfork([] { changes.lock(); }, [] { changes.unlock(); }, [] { changes.unlock(); });
  if (forks != 0) throw std::runtime_error("pthread_atfork failed");
  static std::map<std::string, TorchLibraryHandle> libraries;  // kept for good: dropping one takes its kernels away
  const std::lock_guard<std::mutex> lock(changes);
  TorchLibraryHandle& library = libraries[std::string(ns) + "/" + dispatch_key];
  if (library == nullptr)
    check(aoti_torch_library_init_impl(ns, dispatch_key, __FILE__, __LINE__, &library), "open an op library");
  check(torch_library_impl(library, overload, trampoline_of(number), TORCH_ABI_VERSION), "register a kernel");
}

int failure(const char* text, char* error, size_t capacity) {
  strncpy(error, text, capacity - 1);
  error[capacity - 1] = '\0';
  return 1;
}

}  // namespace

#define JITK_RUNTIME extern "C" __attribute__((visibility("default")))

// `register_slot`. 0, or else `error` holds the reason.
JITK_RUNTIME int jitk_register(int32_t number, const char* who, const char* ns, const char* overload, const char* dispatch_key,
                               const char* reference, const char* plan, char* error, size_t capacity) {
  try {
    register_slot(number, who, ns, overload, dispatch_key, reference, plan);
    return 0;
  } catch (const std::exception& problem) {
    return failure(problem.what(), error, capacity);
  }
}

// Serves an overload that was declared again, by the trampoline that it has. `asks`: what jitk::_build is called with from now on.
JITK_RUNTIME int jitk_replace(int32_t number, int64_t asks, const char* who, const char* reference, const char* plan,
                              char* error, size_t capacity) {
  try {
    Slot* old = slots[number].load();
    auto* slot = new Slot;
    slot->number = number;
    slot->asks = asks;
    slot->name = who;
    slot->reference = reference;
    slot->on_cuda = old->on_cuda;
    read_plan(plan, *slot);
    slots[number].store(slot, std::memory_order_release);
    return 0;
  } catch (const std::exception& problem) {
    return failure(problem.what(), error, capacity);
  }
}

// Has every key of the slot asked for again.
JITK_RUNTIME int jitk_forget(int32_t number, char* error, size_t capacity) {
  Slot* slot = slots[number].load();
  const std::lock_guard<std::mutex> lock(changes);
  slot->variants = 0;
  slot->table.store(new Table(2));
  return 0;
}

// `raise`: throws what Python has kept of this thread's failure.
JITK_RUNTIME void jitk_set_raise(void (*raise)()) { raise_kept.store(raise, std::memory_order_release); }

JITK_RUNTIME void jitk_set_several_devices(int several) { several_devices = several != 0; }
