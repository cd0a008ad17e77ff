// Builtin functions of Python that call one C++ object: in a quarter of the time that pybind11 takes to call a method, which is
// more than most of these calls take themselves.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>  // what was thrown
#include <memory>     // unique_ptr
#include <new>        // bad_alloc
#include <stdexcept>  // what is thrown

namespace radix {

namespace py = pybind11;

// To be called where something was caught. Raises it in Python as pybind11 does.
inline PyObject* raise_caught() {
  try {
    throw;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc& error) {
    PyErr_SetString(PyExc_MemoryError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::length_error& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::overflow_error& error) {
    PyErr_SetString(PyExc_OverflowError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// `call` takes so many arguments, all by place, and is a function of Self& and PyObject* const*, which returns a new reference.
template <typename Self, Py_ssize_t kArguments, PyObject* (*call)(Self&, PyObject* const*)>
PyObject* builtin(PyObject* capsule, PyObject* const* given, Py_ssize_t count) {
  if (count != kArguments) {
    return PyErr_Format(PyExc_TypeError, "it takes %zd arguments, got %zd", kArguments, count);
  }
  try {
    return call(*static_cast<Self*>(PyCapsule_GetPointer(capsule, nullptr)), given);
  } catch (...) {
    return raise_caught();
  }
}

template <typename Self, Py_ssize_t kArguments, PyObject* (*call)(Self&, PyObject* const*)>
PyMethodDef defined(const char* name) {
  PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t) = builtin<Self, kArguments, call>;
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

// The functions, each of which keeps the object alive, as `owner` does. `definitions` must outlive them.
template <typename Self, size_t kCount>
py::tuple bound(Self& self, py::object owner, PyMethodDef (&definitions)[kCount]) {
  const auto let_go = [](PyObject* capsule) { Py_XDECREF(static_cast<PyObject*>(PyCapsule_GetContext(capsule))); };
  const py::object capsule = py::reinterpret_steal<py::object>(PyCapsule_New(&self, nullptr, let_go));
  if (!capsule || PyCapsule_SetContext(capsule.ptr(), owner.ptr()) != 0) throw py::error_already_set();
  owner.release();
  py::tuple functions(kCount);
  for (size_t index = 0; index < kCount; ++index) {
    py::object function = py::reinterpret_steal<py::object>(PyCFunction_New(&definitions[index], capsule.ptr()));
    if (!function) throw py::error_already_set();
    functions[index] = std::move(function);
  }
  return functions;
}

}  // namespace radix
