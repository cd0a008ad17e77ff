// The dispatcher for programs without Python: a library that defines its ops by itself when it is loaded, and finds their
// kernels in the folder beside it. `python -m torch_jit_ops deploy` writes such a folder:
//
//   libjitk_ops.so   this
//   ops.txt          schemas, plans and keys; see table.h
//   *.so             a library for each variant, opened when a call first needs it
//
// A key that is not in the table is an error that names what is there: nothing is compiled here.
#include <jitk/message.h>  // how a dtype is called

#include "registration.h"
#include "table.h"

#include <fcntl.h>     // O_NONBLOCK
#include <sys/stat.h>  // who may write what is loaded
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>

namespace {

using table::Kernel;

struct Deployment {
  std::string folder;
  std::vector<table::Slot> slots;  // by number
};

// Never destroyed: another library's destructor may still call an op.
Deployment& deployment() {
  static auto* const one = new Deployment;
  return *one;
}

// Whoever can write a kernel can run code as the user who loads it: the rules of torch_jit_ops/trust.py, but for the folders
// above, in which this library lies too.
void check_trust(const std::string& path, const struct stat& state, const std::string& who) {
  const char* trusted = getenv("JITK_CACHE_TRUST");
  if (trusted != nullptr && strcmp(trusted, "1") == 0) return;
  if (state.st_uid != getuid() && state.st_uid != 0) {
    throw std::runtime_error(who + path + " belongs to another user (uid " + std::to_string(state.st_uid) +
                             "), so it could be anybody's code\n  remedy: a copy of your own, or JITK_CACHE_TRUST=1");
  }
  if ((state.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    throw std::runtime_error(who + path + " can be written by others, so it could be anybody's code\n  remedy: chmod -R go-w " +
                             deployment().folder + ", or JITK_CACHE_TRUST=1");
  }
}

// Opens what must be a folder or a file, and nothing that a read could wait for.
class Opened {
 public:
  Opened(const std::string& path, mode_t kind, const std::string& who = "")
      : file_(open(path.c_str(), (kind == S_IFDIR ? O_PATH : O_RDONLY | O_NONBLOCK) | O_CLOEXEC)) {
    try {
      if (file_ < 0 && (errno == ENOENT || errno == ENOTDIR)) throw std::runtime_error(who + path + " is not there");
      if (file_ < 0 || fstat(file_, &state_) != 0) throw std::runtime_error(who + path + ": " + strerror(errno));
      if ((state_.st_mode & S_IFMT) != kind)
        throw std::runtime_error(who + path + " is no " + (kind == S_IFDIR ? "folder" : "regular file"));
      check_trust(path, state_, who);
    } catch (...) {
      if (file_ >= 0) close(file_);
      throw;
    }
  }
  Opened(const Opened&) = delete;
  ~Opened() { close(file_); }

  // All of it, or more than `most` bytes of it.
  std::string text(size_t most) const {
    std::string text;
    char part[4096];
    while (text.size() <= most) {
      const ssize_t got = read(file_, part, sizeof part);
      if (got == 0) break;
      if (got < 0 && errno != EINTR) throw std::runtime_error(std::string("reading ops.txt: ") + strerror(errno));
      text.append(part, got < 0 ? 0 : static_cast<size_t>(got));
    }
    return text;
  }

 private:
  int file_;
  struct stat state_ = {};
};

// --- which machine code runs here ----------------------------------------------------------------

int32_t cpu_level() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("popcnt")) return 1;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2")) return 2;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
  return wide ? 4 : 3;
}

// 90 for (9, 0); -1 if the driver does not say.
int32_t gpu_arch(int64_t device) {
  using Attribute = int (*)(int*, int, int);
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY);
  const auto ask = driver == nullptr ? nullptr : reinterpret_cast<Attribute>(dlsym(driver, "cuDeviceGetAttribute"));
  int major = 0, minor = 0;
  const int kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
  if (ask == nullptr || ask(&major, kMajor, static_cast<int>(device)) != 0 ||
      ask(&minor, kMinor, static_cast<int>(device)) != 0) {
    return -1;
  }
  return major * 10 + minor;
}

// How well code for `arch` suits the device of a key: 0 if it does not run there, and more is better.
int32_t fitness(const std::string& arch, int64_t device) {
  if (device < 0) {
    const size_t at = arch.find("-v");
    const int32_t level = at == std::string::npos ? 1 : std::stoi(arch.substr(at + 2));
    return level <= cpu_level() ? level : 0;
  }
  const int32_t have = gpu_arch(device);
  if (have < 0) return 1;
  const int32_t want = std::stoi(arch) * 10 + std::stoi(arch.substr(arch.find('.') + 1));
  const bool own = arch.back() == 'a';
  if (own) return want == have ? 100 : 0;
  return want / 10 == have / 10 && want <= have ? 1 + want % 10 : 0;
}

std::string described(int64_t device) {
  if (device < 0) return cpu_level() == 1 ? "x86-64" : "x86-64-v" + std::to_string(cpu_level());
  const int32_t arch = gpu_arch(device);
  return "cuda:" + std::to_string(device) + (arch < 0 ? "" : " (sm_" + std::to_string(arch) + ")");
}

// --- a key that no call has had yet --------------------------------------------------------------

std::string value_of(const Slot& slot, const KeyPart& part, int64_t word) {
  if (word == INT64_MIN) return "none";
  const Argument& argument = slot.arguments[static_cast<size_t>(part.argument)];
  if (part.what == KeyPart::kDType) {
    jitk::host::Message text;
    text << jitk::DLDataType{static_cast<uint8_t>(word >> 8), static_cast<uint8_t>(word), 1};
    return text.text();
  }
  if (part.what != KeyPart::kValue) return std::to_string(word);
  if (argument.kind == 'b') return word != 0 ? "true" : "false";
  if (argument.kind == 's') return argument.choices[static_cast<size_t>(word)];
  return std::to_string(word);
}

[[noreturn]] void refuse(const Slot& slot, const int64_t* key) {
  const Deployment& all = deployment();
  std::string text = slot.name + ": there is no kernel for ";
  const table::Slot& known = all.slots.at(static_cast<size_t>(slot.asks));
  for (size_t i = 0; i < slot.key.size(); ++i) text += known.asked[i] + "=" + value_of(slot, slot.key[i], key[i + 1]) + " ";
  text += "on " + described(key[0]) + " in " + all.folder + "/ops.txt";
  for (const Kernel& kernel : known.kernels) text += "\n  there is  " + kernel.label + " for " + kernel.arch;
  throw std::runtime_error(text + "\n  remedy: python -m torch_jit_ops deploy, with this kernel too");
}

jitk::Entry on_miss(Slot& slot, const int64_t* key) {
  const std::vector<int64_t> words(key + 1, key + slot.key_size());
  const Kernel* best = nullptr;
  const table::Slot& known = deployment().slots.at(static_cast<size_t>(slot.asks));
  for (const Kernel& kernel : known.kernels) {
    const int32_t fits = kernel.words == words ? fitness(kernel.arch, key[0]) : 0;
    if (fits > (best == nullptr ? 0 : fitness(best->arch, key[0]))) best = &kernel;
  }
  if (best == nullptr) refuse(slot, key);
  const std::string path = deployment().folder + "/" + best->file;
  Opened(path, S_IFREG, slot.name + ": ");
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(slot.name + ": " + dlerror());
  const auto version = reinterpret_cast<uint32_t (*)()>(dlsym(library, "jitk_abi_version"));
  if (version == nullptr || version() != jitk::kAbiVersion)
    throw std::runtime_error(slot.name + ": " + path + " is of another version than libjitk_ops.so");
  const auto entry = reinterpret_cast<jitk::Entry>(dlsym(library, ("jitk_entry_" + best->entry).c_str()));
  if (entry == nullptr) throw std::runtime_error(slot.name + ": " + dlerror());
  const auto signature = reinterpret_cast<const char* (*)()>(dlsym(library, ("jitk_signature_" + best->entry).c_str()));
  if (signature == nullptr || signature() != known.signature) {
    throw std::runtime_error(slot.name + ": " + path + " has " + best->entry + " as " +
                             (signature == nullptr ? "nothing" : signature()) + ", expected " + known.signature);
  }
  const auto load_kernels = reinterpret_cast<int32_t (*)(int32_t)>(dlsym(library, "jitk_load_kernels"));
  if (load_kernels != nullptr && key[0] >= 0) load_kernels(static_cast<int32_t>(key[0]));
  return slot.add(key, entry, slot.forgotten.load());
}

// --- what this library holds ---------------------------------------------------------------------

void define(const std::string& ns, const std::string& schema) {
  static std::map<std::string, TorchLibraryHandle> fragments;  // kept for good: dropping one takes its schemas away
  TorchLibraryHandle& fragment = fragments[ns];
  if (fragment == nullptr)
    check(aoti_torch_library_init_fragment(ns.c_str(), __FILE__, __LINE__, &fragment), "open an op library");
  if (aoti_torch_library_def(fragment, schema.c_str()) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("PyTorch refuses to define " + ns + "::" + schema +
                             "\n  an op is defined once in a process: load one such library for all models, and none where "
                             "Python has imported torch_jit_ops");
  }
}

void read_table(const std::string& path) {
  const Opened file(path, S_IFREG);
  const std::string text = file.text(table::kMaxBytes);
  if (text.size() > table::kMaxBytes)
    throw std::runtime_error(path + " has more than " + std::to_string(table::kMaxBytes >> 20) + " MiB");
  table::Contents contents = table::Reader(path).read(text);
  if (contents.slots.size() > static_cast<size_t>(kMaxSlots)) {
    throw std::runtime_error(path + " has " + std::to_string(contents.slots.size()) + " slots; a process has at most " +
                             std::to_string(kMaxSlots));
  }
  deployment().slots = std::move(contents.slots);
  for (const table::Op& op : contents.ops) define(op.ns, op.schema);
  int32_t number = 0;
  for (const table::Slot& slot : deployment().slots) {
    register_slot(number++, (slot.ns + "::" + slot.overload).c_str(), slot.ns.c_str(), slot.overload.c_str(),
                  slot.dispatch_key.c_str(), "", slot.plan.c_str());
  }
}

// Runs when the library is loaded. An exception would end the program here, so a reason that it defines no ops is a line.
const bool registered = [] {
  try {
    Dl_info self = {};
    if (dladdr(&slots, &self) == 0) throw std::runtime_error("the dynamic linker does not know this library");
    // The kernels' addresses are PyTorch's from now on.
    dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
    char* real = realpath(self.dli_fname, nullptr);  // the program may go to another folder before it calls an op
    const std::string path = real == nullptr ? self.dli_fname : real;
    free(real);
    const size_t slash = path.rfind('/');
    deployment().folder = path.substr(0, slash);
    const std::string table_path = deployment().folder + "/ops.txt";
    // Under another name and alone it is where it was built, and opened to see whether it can be.
    if (path.substr(slash + 1) != "libjitk_ops.so" && access(table_path.c_str(), F_OK) != 0) return false;
    Opened(deployment().folder, S_IFDIR);
    read_table(table_path);
    return true;
  } catch (const std::exception& error) {
    fprintf(stderr, "jitk: no ops are defined: %s\n", error.what());
    return false;
  }
}();

}  // namespace
