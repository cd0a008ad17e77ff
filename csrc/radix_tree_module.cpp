// RadixTree for Python. torch_jit_ops/ops/radix_tree.py is the class that users see; it alone calls this one.
//
// Tokens and values come as radix_tree_ints.h reads them, and go as bytearrays of int32 or, where time matters, as
// radix_tree_result.h has them.
//
// A tree is locked while it is used. Nobody waits for it with the GIL in hand, and while it is locked nothing is called that may
// run Python code, which may be code that uses the same tree.

#include <pybind11/pybind11.h>

#include <cstring>   // memcpy
#include <memory>    // unique_ptr
#include <mutex>     // one for each tree
#include <new>       // locks of children
#include <optional>  // what may be left out
#include <random>    // salts
#include <string>    // errors
#include <utility>   // move
#include <vector>    // what is copied out

#include "radix_tree.h"
#include "radix_tree_calls.h"
#include "radix_tree_ints.h"
#include "radix_tree_result.h"

namespace {

namespace py = pybind11;

// --- what comes from Python -----------------------------------------------------------------------

// An extra key, or None.
class Key {
 public:
  explicit Key(py::handle given) : is_given_(!given.is_none()) {
    if (!is_given_) return;
    if (!PyUnicode_Check(given.ptr())) throw py::type_error("extra_key must be a str or None, got " + radix::type_name(given));
    Py_ssize_t size;
    const char* text = PyUnicode_AsUTF8AndSize(given.ptr(), &size);
    if (text == nullptr) throw py::error_already_set();
    name_.assign(text, static_cast<size_t>(size));
  }
  const std::string* name() const { return is_given_ ? &name_ : nullptr; }

 private:
  bool is_given_;
  std::string name_;
};

radix::Handle node_of(py::handle given) {
  if (!PyLong_Check(given.ptr()))
    throw py::type_error("node must be what match_prefix returned, got " + radix::type_name(given));
  const unsigned long long node = PyLong_AsUnsignedLongLong(given.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw py::value_error("node must be what match_prefix returned, got " + std::string(py::str(given)));
  }
  return node;
}

// --- what goes to Python --------------------------------------------------------------------------

py::object bytes_of(const std::vector<int32_t>& values) {
  return py::bytearray(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(int32_t));
}

// --- the tree -------------------------------------------------------------------------------------

class Tree {
 public:
  explicit Tree(int64_t page_size) : tree_(new radix::RadixTree(page_size, salt())) {}
  explicit Tree(std::unique_ptr<radix::RadixTree> tree) : tree_(std::move(tree)) {}

  PyObject* match(py::handle tokens, py::handle extra_key, bool lock) {
    radix::Ints given(tokens, "tokens");
    const Key key(extra_key);
    const radix::Tokens read = given.tokens();
    radix::Match found;
    py::object values;
    {
      const Lock locked(*this);
      found = tree_->match(read, key.name());
      given.check(found.length);  // what was found is as what is here
      values = radix::Result::make(found.length);
      if (lock) tree_->lock(found.node);
      tree_->read_values(found.node, found.length, radix::Result::ints(values));
    }
    return Py_BuildValue("(NKL)", values.release().ptr(), static_cast<unsigned long long>(found.node),
                         static_cast<long long>(found.length));
  }

  int64_t insert(py::handle tokens, py::handle values, py::handle extra_key, int64_t counted) {
    radix::Ints given(tokens, "tokens");
    const radix::Ints slots(values, "values");
    const Key key(extra_key);
    if (given.size() != slots.size()) {
      throw py::value_error("there must be a value for each token, got " + std::to_string(given.size()) + " tokens and " +
                            std::to_string(slots.size()) + " values");
    }
    if (counted < 0) throw py::value_error("counted must not be negative, got " + std::to_string(counted));
    const radix::Tokens read = given.tokens();
    const Lock locked(*this);
    const auto write = [&](int64_t from, int64_t count, int32_t* to) { slots.write(from, count, to); };
    return tree_->insert(read, write, key.name(), counted);
  }

  py::object evict(int64_t wanted, bool lfu, bool is_long) {
    if (wanted < 0) throw py::value_error("tokens must not be negative, got " + std::to_string(wanted));
    std::vector<radix::Freed> freed;
    {
      const Lock locked(*this);
      const Meanwhile others_run(is_long);
      tree_->evict(wanted, lfu ? radix::Policy::lfu : radix::Policy::lru, freed);
    }
    int64_t went = 0;
    for (const radix::Freed& leaf : freed) went += leaf.size;
    py::object values = radix::Result::make(went);
    int32_t* to = radix::Result::ints(values);
    for (const radix::Freed& leaf : freed) {
      std::memcpy(to, leaf.label.get() + leaf.size, static_cast<size_t>(leaf.size) * sizeof(int32_t));
      to += leaf.size;
    }
    return values;
  }

  void lock(py::handle given) {
    const radix::Handle node = node_of(given);
    const Lock locked(*this);
    tree_->lock(node);
  }

  void unlock(py::handle given) {
    const radix::Handle node = node_of(given);
    const Lock locked(*this);
    tree_->unlock(node);
  }

  void reset() {
    const Lock locked(*this);
    const Meanwhile others_run(true);
    tree_->reset();
  }

  void check() {
    const Lock locked(*this);
    const Meanwhile others_run(true);
    tree_->check();
  }

  // total, evictable, protected, nodes, bytes: of one moment
  py::tuple sizes() {
    int64_t total, evictable, held, nodes, bytes;
    {
      const Lock locked(*this);
      total = tree_->total();
      evictable = tree_->evictable();
      held = tree_->protected_tokens();
      nodes = tree_->count();
      bytes = tree_->bytes();
    }
    return py::make_tuple(total, evictable, held, nodes, bytes);
  }

  py::tuple path(py::handle given) {
    const radix::Handle node = node_of(given);
    std::vector<int32_t> tokens, values;
    {
      const Lock locked(*this);
      tree_->path(node, tokens, values);
    }
    return py::make_tuple(bytes_of(tokens), bytes_of(values));
  }

  py::list nodes(bool leaves_alone) {
    struct Copied {
      radix::Seen seen;
      std::vector<int32_t> tokens, values;
      std::optional<std::string> extra_key;
    };
    std::vector<Copied> all;
    {
      const Lock locked(*this);
      for (const radix::Seen& seen : tree_->nodes()) {
        if (leaves_alone && !seen.is_leaf) continue;
        all.push_back({seen, {seen.tokens, seen.tokens + seen.size}, {seen.values, seen.values + seen.size}, std::nullopt});
        if (seen.extra_key != nullptr) all.back().extra_key = *seen.extra_key;
      }
    }
    py::list listed;
    for (const Copied& each : all) {
      const py::object key = each.extra_key ? py::object(py::str(*each.extra_key)) : py::none();
      listed.append(py::make_tuple(each.seen.node, each.seen.parent, bytes_of(each.tokens), bytes_of(each.values), key,
                                   each.seen.locks, each.seen.hits, each.seen.used, each.seen.is_leaf));
    }
    return listed;
  }

  py::bytes save() {
    std::string data;
    {
      const Lock locked(*this);
      const Meanwhile others_run(true);
      data = tree_->save();
    }
    return py::bytes(data);
  }

  static std::unique_ptr<Tree> load(py::handle data) {
    Py_buffer buffer = {};
    if (PyObject_GetBuffer(data.ptr(), &buffer, PyBUF_SIMPLE) != 0) throw py::error_already_set();
    const std::unique_ptr<Py_buffer, void (*)(Py_buffer*)> held(&buffer, PyBuffer_Release);
    std::unique_ptr<radix::RadixTree> tree =
        radix::RadixTree::load(static_cast<const char*>(buffer.buf), static_cast<size_t>(buffer.len), salt());
    for (const std::string& key : tree->extra_keys()) {
      const py::object text =
          py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(key.data(), static_cast<Py_ssize_t>(key.size()), nullptr));
      if (!text) {
        PyErr_Clear();
        throw py::value_error("the snapshot of a RadixTree is damaged: an extra key is no text");
      }
    }
    return std::unique_ptr<Tree>(new Tree(std::move(tree)));
  }

  int64_t page_size() const { return tree_->page_size(); }

  // In the child of a fork nobody holds the lock, though a thread that is not there may have taken it.
  void free_in_child() { new (&mutex_) std::mutex; }

 private:
  class Lock {
   public:
    explicit Lock(Tree& tree) : mutex_(tree.mutex_) {
      if (!mutex_.try_lock()) {
        const py::gil_scoped_release others_run;
        mutex_.lock();
      }
    }
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;
    ~Lock() { mutex_.unlock(); }

   private:
    std::mutex& mutex_;
  };

  // Lets other threads run, which may then wait for this tree.
  class Meanwhile {
   public:
    explicit Meanwhile(bool really) {
      if (really) released_.emplace();
    }

   private:
    std::optional<py::gil_scoped_release> released_;
  };

  static uint64_t salt() {
    static std::random_device device;
    return uint64_t{device()} << 32 | device();
  }

  std::mutex mutex_;
  std::unique_ptr<radix::RadixTree> tree_;
};

// --- calls so short that pybind11's way to them would be the longest part ---------------------------

int64_t int64_of(py::handle given) {
  const long long value = PyLong_AsLongLong(given.ptr());
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

PyObject* match(Tree& tree, PyObject* const* given) { return tree.match(given[0], given[1], given[2] == Py_True); }
PyObject* insert(Tree& tree, PyObject* const* given) {
  return PyLong_FromLongLong(tree.insert(given[0], given[1], given[2], int64_of(given[3])));
}
PyObject* evict(Tree& tree, PyObject* const* given) {
  return tree.evict(int64_of(given[0]), given[1] == Py_True, given[2] == Py_True).release().ptr();
}
PyObject* lock(Tree& tree, PyObject* const* given) {
  tree.lock(given[0]);
  return py::none().release().ptr();
}
PyObject* unlock(Tree& tree, PyObject* const* given) {
  tree.unlock(given[0]);
  return py::none().release().ptr();
}

py::tuple calls(py::object self) {
  static PyMethodDef definitions[] = {radix::defined<Tree, 3, match>("match"), radix::defined<Tree, 4, insert>("insert"),
                                      radix::defined<Tree, 3, evict>("evict"), radix::defined<Tree, 1, lock>("lock"),
                                      radix::defined<Tree, 1, unlock>("unlock")};
  Tree& tree = self.cast<Tree&>();
  return radix::bound(tree, std::move(self), definitions);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  radix::Result::make(0);  // its type is made here, which may start the garbage collector, and not while a tree is locked
  py::class_<Tree>(m, "Tree")
      .def(py::init<int64_t>())
      .def("calls", &calls)
      .def("reset", &Tree::reset)
      .def("check", &Tree::check)
      .def("sizes", &Tree::sizes)
      .def("path", &Tree::path)
      .def("nodes", &Tree::nodes)
      .def("save", &Tree::save)
      .def_static("load", &Tree::load)
      .def("free_in_child", &Tree::free_in_child)
      .def_property_readonly("page_size", &Tree::page_size);
}
