// Result: ints on their way to Python, as an object with a buffer. Its memory goes back to a few blocks that are kept, so that
// the next result is written where the CPU's cache still is: the allocator's way to a block of 20 KB, and the block's to the
// cache, take as long as finding out what to write there.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>  // int32_t
#include <memory>   // unique_ptr
#include <vector>   // blocks that are kept

namespace radix {

namespace py = pybind11;

class Result {
 public:
  // Room for so many. It is not one of the objects whose making may start the garbage collector.
  static py::object make(int64_t count) {
    static PyTypeObject* const type = make_type();
    const int step = step_of(count);
    std::unique_ptr<int32_t[]> block = take(step, count);
    auto* made = PyObject_New(Object, type);
    if (made == nullptr) throw py::error_already_set();
    made->ints = block.release();
    made->count = count;
    made->step = step;
    return py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(made));
  }

  static int32_t* ints(const py::object& of) { return reinterpret_cast<Object*>(of.ptr())->ints; }

 private:
  struct Object {
    PyObject head;
    int32_t* ints;
    int64_t count;
    int step;
  };

  // Blocks of 2^10 to 2^18 ints are kept, a few of each size, 8 MB at most. The GIL guards them.
  static constexpr int kSteps = 9;
  static constexpr int64_t kSmallest = 1 << 10;
  static constexpr size_t kMost = 4;
  inline static std::vector<int32_t*> kept_[kSteps];

  static int step_of(int64_t count) {
    int step = 0;
    while (step < kSteps && kSmallest << step < count) ++step;
    return step;
  }

  static std::unique_ptr<int32_t[]> take(int step, int64_t count) {
    if (step == kSteps) return std::unique_ptr<int32_t[]>(new int32_t[static_cast<size_t>(count)]);
    std::vector<int32_t*>& kept = kept_[step];
    if (kept.empty()) {
      kept.reserve(kMost);  // for give_back
      return std::unique_ptr<int32_t[]>(new int32_t[static_cast<size_t>(kSmallest << step)]);
    }
    std::unique_ptr<int32_t[]> block(kept.back());
    kept.pop_back();
    return block;
  }

  static void give_back(PyObject* self) {
    auto* object = reinterpret_cast<Object*>(self);
    std::unique_ptr<int32_t[]> block(object->ints);
    if (object->step < kSteps && kept_[object->step].size() < kMost) kept_[object->step].push_back(block.release());
    PyTypeObject* type = Py_TYPE(self);
    PyObject_Free(self);
    Py_DECREF(type);
  }

  static int get_buffer(PyObject* self, Py_buffer* view, int flags) {
    auto* object = reinterpret_cast<Object*>(self);
    const auto bytes = static_cast<Py_ssize_t>(object->count) * static_cast<Py_ssize_t>(sizeof(int32_t));
    return PyBuffer_FillInfo(view, self, object->ints, bytes, 0, flags);
  }

  static Py_ssize_t length(PyObject* self) { return static_cast<Py_ssize_t>(reinterpret_cast<Object*>(self)->count); }

  static PyTypeObject* make_type() {
    PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(give_back)},
                           {Py_bf_getbuffer, reinterpret_cast<void*>(get_buffer)},
                           {Py_sq_length, reinterpret_cast<void*>(length)},
                           {0, nullptr}};
    PyType_Spec spec = {"torch_jit_ops.RadixTreeResult", sizeof(Object), 0,
                        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
    PyObject* type = PyType_FromSpec(&spec);
    if (type == nullptr) throw py::error_already_set();
    return reinterpret_cast<PyTypeObject*>(type);
  }
};

}  // namespace radix
