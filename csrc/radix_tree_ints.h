// Ints: tokens or values as Python has them, read where they are if they are int32.
//
// They may be a sequence of ints, or something with a buffer of int32 or int64: a NumPy array, array.array. A tuple is the memory
// of a tensor, which has no buffer: address, size, stride, bytes of an element. Numbers are from 0 to 2^31 - 1.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>  // int32_t and its kin
#include <cstring>  // memcpy
#include <memory>   // unique_ptr
#include <string>   // errors
#include <utility>  // move

#include "radix_tree.h"

namespace radix {

namespace py = pybind11;

inline std::string type_name(py::handle of) { return std::string(py::str(py::type::of(of).attr("__name__"))); }

// A TypeError of Python's that says less than ours will is dropped; others, such as KeyboardInterrupt, go on.
inline void drop_type_error() {
  if (PyErr_ExceptionMatches(PyExc_TypeError) == 0) throw py::error_already_set();
  PyErr_Clear();
}

class Ints {
 public:
  Ints(py::handle given, const char* what) : what_(what) {
    if (PyTuple_CheckExact(given.ptr())) {
      read_tensor(py::reinterpret_borrow<py::tuple>(given));
    } else if (!PyList_CheckExact(given.ptr()) && PyObject_CheckBuffer(given.ptr())) {
      read_buffer(given);
    } else {
      read_sequence(given);
    }
  }

  int64_t size() const { return size_; }

  // Where they are, if they are one behind the other, else a copy, which this object owns.
  Tokens tokens() {
    if (step_ != bytes_ || reinterpret_cast<uintptr_t>(memory_) % static_cast<uintptr_t>(bytes_) != 0) {
      std::unique_ptr<int32_t[]> made(new int32_t[static_cast<size_t>(size_)]);
      write(0, size_, made.get());
      own_ = std::move(made);
      memory_ = reinterpret_cast<const char*>(own_.get());
      step_ = bytes_ = 4;
    }
    return {memory_, size_, bytes_ == 8, [this](int64_t from, int64_t count, int32_t* to) { write(from, count, to); }};
  }

  // Throws if one from an index on is out of range.
  void check(int64_t from) const {
    uint64_t together = 0;
    if (step_ == 4 && bytes_ == 4) {
      for (int64_t index = from; index < size_; ++index) together |= static_cast<uint32_t>(at_next<int32_t>(index));
    } else if (step_ == 8 && bytes_ == 8) {
      for (int64_t index = from; index < size_; ++index) together |= static_cast<uint64_t>(at_next<int64_t>(index));
    }
    if (together > INT32_MAX) bytes_ == 4 ? refuse_one<int32_t>(from, size_ - from) : refuse_one<int64_t>(from, size_ - from);
  }

  // So many from an index on. Throws if one is out of range. Calls no Python.
  void write(int64_t from, int64_t count, int32_t* to) const {
    if (bytes_ == 4) {
      write_of<int32_t>(from, count, to);
    } else {
      write_of<int64_t>(from, count, to);
    }
  }

 private:
  struct Buffer {
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() {
      if (view.obj != nullptr) PyBuffer_Release(&view);
    }
    Py_buffer view = {};
  };

  void read_tensor(const py::tuple& of_tensor) {
    memory_ = reinterpret_cast<const char*>(of_tensor[0].cast<uintptr_t>());
    size_ = of_tensor[1].cast<int64_t>();
    bytes_ = of_tensor[3].cast<int64_t>();
    step_ = of_tensor[2].cast<int64_t>() * bytes_;
    if (memory_ == nullptr && size_ > 0) throw py::value_error(std::string(what_) + " must have memory, got a tensor without");
  }

  void read_buffer(py::handle given) {
    Py_buffer& view = buffer_.view;
    if (PyObject_GetBuffer(given.ptr(), &view, PyBUF_RECORDS_RO) != 0) throw py::error_already_set();
    std::string format = view.format == nullptr ? "B" : view.format;
    if (!format.empty() && (format[0] == '@' || format[0] == '=' || format[0] == '<')) format.erase(0, 1);
    const bool is_int = format == "i" || format == "l" || format == "q";
    if (!is_int || (view.itemsize != 4 && view.itemsize != 8)) {
      throw py::type_error(std::string(what_) + " must be int32 or int64, got an array of the format '" + format + "'");
    }
    if (view.ndim != 1) {
      throw py::value_error(std::string(what_) + " must have 1 dimension, got " + std::to_string(view.ndim));
    }
    memory_ = static_cast<const char*>(view.buf);
    size_ = view.shape[0];
    step_ = view.strides[0];
    bytes_ = view.itemsize;
  }

  void read_sequence(py::handle given) {
    py::object fast;
    if (PySequence_Check(given.ptr()) != 0) {
      fast = py::reinterpret_steal<py::object>(PySequence_Fast(given.ptr(), ""));
      if (!fast) drop_type_error();
    }
    if (!fast) {
      throw py::type_error(std::string(what_) + " must be a sequence of ints, an array or a tensor, got " + type_name(given));
    }
    size_ = PySequence_Fast_GET_SIZE(fast.ptr());
    own_.reset(new int32_t[static_cast<size_t>(size_)]);
    for (int64_t index = 0; index < size_; ++index) {
      // An item may run code of its own to become an int, and the list be another one behind it.
      if (index >= PySequence_Fast_GET_SIZE(fast.ptr())) {
        throw py::value_error(std::string(what_) + " became shorter while they were read");
      }
      own_[static_cast<size_t>(index)] = item(PySequence_Fast_GET_ITEM(fast.ptr(), index), index);
    }
    memory_ = reinterpret_cast<const char*>(own_.get());
    step_ = bytes_ = 4;
  }

  int32_t item(PyObject* from, int64_t index) const {
    if (PyLong_CheckExact(from)) return number(from, index);
    const py::object held = py::reinterpret_borrow<py::object>(from);
    const py::object made = py::reinterpret_steal<py::object>(PyNumber_Index(from));
    if (!made) {
      drop_type_error();
      throw py::type_error(std::string(what_) + "[" + std::to_string(index) + "] must be an int, got " + type_name(held));
    }
    return number(made.ptr(), index);
  }

  int32_t number(PyObject* from, int64_t index) const {
    // Nearly all are below 2^30, which is one digit of Python's, and are read in a third of the time that its function takes.
#if PY_VERSION_HEX >= 0x030C0000
    auto* digits = reinterpret_cast<PyLongObject*>(from);
    if (PyUnstable_Long_IsCompact(digits) != 0) {
      const Py_ssize_t small = PyUnstable_Long_CompactValue(digits);
      if (small >= 0) return static_cast<int32_t>(small);
    }
#else
    if (Py_SIZE(from) == 1) return static_cast<int32_t>(reinterpret_cast<PyLongObject*>(from)->ob_digit[0]);
#endif
    int overflow = 0;
    const long value = PyLong_AsLongAndOverflow(from, &overflow);
    if (overflow != 0) refuse(index, overflow < 0 ? "below -2^63" : "above 2^63");
    if (value < 0 || value > INT32_MAX) refuse(index, std::to_string(value));
    return static_cast<int32_t>(value);
  }

  template <typename T>
  T at(int64_t index) const {
    T value;
    std::memcpy(&value, memory_ + index * step_, sizeof(T));
    return value;
  }

  // The same where one is behind the other, of which the compiler makes vectors.
  template <typename T>
  T at_next(int64_t index) const {
    T value;
    std::memcpy(&value, memory_ + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
  }

  template <typename T>
  void write_of(int64_t from, int64_t count, int32_t* to) const {
    uint64_t together = 0;
    const auto take = [&](int64_t index, T value) {
      together |= static_cast<uint64_t>(int64_t{value});
      to[index] = static_cast<int32_t>(value);
    };
    if (step_ == static_cast<int64_t>(sizeof(T))) {
      for (int64_t index = 0; index < count; ++index) take(index, at_next<T>(from + index));
    } else {
      for (int64_t index = 0; index < count; ++index) take(index, at<T>(from + index));
    }
    if (together > INT32_MAX) refuse_one<T>(from, count);
  }

  template <typename T>
  [[noreturn]] void refuse_one(int64_t from, int64_t count) const {
    for (int64_t index = from; index < from + count; ++index) {
      const int64_t value = at<T>(index);
      if (value < 0 || value > INT32_MAX) refuse(index, std::to_string(value));
    }
    throw py::value_error(std::string(what_) + " were written by another thread while they were read");
  }

  [[noreturn]] void refuse(int64_t index, const std::string& value) const {
    throw py::value_error(std::string(what_) + "[" + std::to_string(index) + "] is " + value +
                          ", which is not from 0 to 2147483647");
  }

  const char* what_;
  Buffer buffer_;
  std::unique_ptr<int32_t[]> own_;
  const char* memory_ = nullptr;
  int64_t size_ = 0;
  int64_t step_ = 4;  // in bytes, as is the size of an element
  int64_t bytes_ = 4;
};

}  // namespace radix
